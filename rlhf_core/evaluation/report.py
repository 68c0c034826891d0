"""One HTML page about runs: curves, policies compared, samples, agreement, audits, settings.

The page needs no network and runs no script, and every text in it is escaped. Left out: the weights
and the data of the runs.
"""

from __future__ import annotations

import datetime
import html
import importlib.resources
import importlib.util
import io
import itertools
import json
import os
import string
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rlhf_core
from rlhf_core.data import Sample, read_samples
from rlhf_core.evaluation import curves
from rlhf_core.evaluation.curves import Run, read_run
from rlhf_core.evaluation.summary import mean_text
from rlhf_core.files import parse_json, read_object, replacing, require

PAGE = "report.html"
LINES = 200_000  # of the metrics of all runs together that are read
PROMPTS = 5  # whose responses are shown
EDGE = 3  # responses at the start and at the end of a run that are shown
SHOWN = 6  # policies whose responses are shown, and runs whose options are compared
LONGEST = 2000  # characters of a response that is shown
COLUMNS = (*curves.MAIN[:5], "accuracy", "eval_accuracy")  # of the runs
INK = "#123456"  # becomes the colour of the text around a picture
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "rlhf-core",  # the same picture has the same bytes
    "text.parse_math": False,  # a name may hold a $
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Markup(str):
    """HTML; any other string is a text, which is escaped."""


class Material(NamedTuple):
    """What the folders hold, by its name: that of the folder, or of the file."""

    runs: list[Run]
    evaluations: dict[str, dict[str, Any]]  # evaluation.json
    samples: dict[str, list[Sample]]  # of evaluations
    responses: dict[str, list[bytes]]  # of runs: the first and the last lines of samples.jsonl
    agreements: dict[str, dict[str, Any]]  # --json of `rlhf-core agreement`
    audits: dict[str, dict[str, Any]]  # --json of `rlhf-core audit`


def write_report(paths: Sequence[Path], out: Path, title: str = "Report") -> Material:
    """Write a page about folders of runs and evaluations, and JSON files of agreement and audits.

    A path with nothing to show is left out with a warning.

    Args:
        paths: At least one. Names on the page are relative to the folder that holds all of them.
        out: The file, which is replaced.
        title: The heading of the page.

    Returns:
        What is on the page.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
        ValueError: There is nothing to show.
    """
    require("matplotlib", "report")
    material = read_material(paths)
    text = page(material, title)
    with replacing(out) as file:
        file.write(text.encode(errors="replace"))  # JSON may hold half a character
    return material


def try_report(paths: Sequence[Path], out: Path, title: str) -> None:
    """Write a report if matplotlib is there. A failure is a warning: the run itself is saved."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    try:
        write_report(paths, out, title)
    except (Exception, KeyboardInterrupt) as error:
        warnings.warn(f"{out}: not written: {error!r}", stacklevel=2)


# ---- reading


def read_material(paths: Sequence[Path]) -> Material:
    """Read what `write_report` shows."""
    paths = [Path(os.path.abspath(path)) for path in dict.fromkeys(paths)]
    root = os.path.commonpath([path.parent for path in paths])
    most, found = max(500, min(20_000, LINES // len(paths))), Material([], {}, {}, {}, {}, {})
    for path in paths:
        try:
            _read(path, str(path.relative_to(root)), most, found)
        except (OSError, ValueError) as error:
            warnings.warn(f"not in the report: {error}", stacklevel=3)
    if not any(found):
        raise ValueError(f"{', '.join(map(str, paths[:3]))}: nothing to report")
    return found


def _read(path: Path, name: str, most: int, found: Material) -> None:
    """Add what is in a folder or file to `found`. ValueError if that is nothing."""
    before = sum(map(len, found))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        if (path / "metrics.jsonl").is_file() or (path / "run.json").is_file():
            found.runs.append(_run(path, name, most))
        if (path / "evaluation.json").is_file():
            found.evaluations[name] = read_object(path / "evaluation.json")
            if (path / "samples.jsonl").is_file():
                found.samples[name] = read_samples(path / "samples.jsonl")
        elif (path / "samples.jsonl").is_file():
            with open(path / "samples.jsonl", "rb") as lines:
                first = list(itertools.islice(lines, EDGE))
                found.responses[name] = [*first, *deque(lines, EDGE)]
        files = sorted(path.glob("*.json"))
    else:
        files = [path]
    for file in filter(Path.is_file, files):
        with file.open("rb") as opened:
            if b'"file":' not in opened.read(64):  # both reports begin with it
                continue
        report = read_object(file)
        label = f"{name}/{file.name}" if path.is_dir() else name
        if {"coefficients", "verdict"} <= report.keys():
            found.agreements[label] = report
        elif {"length_bias", "failed"} <= report.keys():
            found.audits[label] = report
    if sum(map(len, found)) == before:
        raise ValueError(f"{path}: holds no metrics, evaluation, agreement or audit")


def _run(folder: Path, name: str, most: int) -> Run:
    """The run of a folder, which may not have finished a step."""
    try:
        return read_run(folder, name, most)
    except (OSError, ValueError) as error:
        if not (folder / "run.json").is_file():
            raise
        return Run(name, [], str(error), read_object(folder / "run.json"))


# ---- the page


def page(found: Material, title: str) -> str:
    """The HTML of the page."""
    evaluations = _rendered(_evaluation, found.evaluations)
    samples = _rendered(_samples, found.samples)
    responses = _rendered(_responses, found.responses)
    agreements = _rendered(_agreement, found.agreements)
    audits = _rendered(_audit, found.audits)
    found = found._replace(
        evaluations={name: found.evaluations[name] for name in evaluations},
        agreements={name: found.agreements[name] for name in agreements},
        audits={name: found.audits[name] for name in audits},
    )
    sections: dict[str, Iterable[str]] = {
        "Summary": _summary(found),
        "Score against KL": _scores(found),
    }
    for name, body in evaluations.items():
        is_first = name == next(iter(samples), None)
        shown = _details("Samples side by side", samples.get(name, ""), is_first)
        sections[f"Evaluation: {name}"] = [body, shown]
    sections["Training"] = _training(found.runs)
    sections["Responses in training"] = itertools.starmap(_details, responses.items())
    sections |= {f"Agreement of annotators: {name}": [x] for name, x in agreements.items()}
    sections |= {f"Audit of the data: {name}": [x] for name, x in audits.items()}
    sections["Settings and versions"] = _settings(found.runs)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    template = importlib.resources.files(__package__).joinpath("report.html")
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=_text(title),
        subtitle=f"{now}, rlhf_core {rlhf_core.__version__}",
        body="\n".join(
            f"<section><h2>{_text(heading)}</h2>\n{text}</section>"
            for heading, text in _rendered(iter, sections).items()
            if text
        ),
    )


def _rendered(render: Callable[[Any], Iterable[str]], reports: dict[str, Any]) -> dict[str, str]:
    """The HTML of each report. One of another form than ours is left out with a warning."""
    rendered = {}
    for name, report in reports.items():
        try:
            rendered[name] = "\n".join(render(report))
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            warnings.warn(f"not in the report: {name}: unknown form: {error!r}", stacklevel=4)
    return rendered


def _summary(found: Material) -> Iterable[str]:
    """The verdicts, in a sentence each."""
    lines: list[str] = []
    for name, result in found.evaluations.items():
        scores = {row["name"]: row["score"] for row in result.get("policies", [])}
        for row in result.get("comparisons", []):
            first, other = row["policy"], row["against"]
            if other != result["reference"]:
                continue
            low, high = row["interval"]
            means = [f"{scores[x]['mean']:.2f}" for x in (first, other) if scores[x]]
            score = f"; mean score {' against '.join(means)}" if means else ""
            lines.append(
                Markup(
                    f"{_text(first)} against {_text(other)}: {_verdict(row)}, wins "
                    f"<b>{row['rate']:.0%}</b> of {row['comparisons']:,} comparisons, 95 % "
                    f"interval {low:.0%} to {high:.0%}"
                    f"{score} <span class=soft>({_text(name)})</span>"
                )
            )
        if "accuracy" in result:
            low, high = result["interval"]
            lines.append(
                f"the reward model agrees with {result['accuracy']:.1%} of {result['pairs']:,} "
                f"labels, 95 % interval {low:.1%} to {high:.1%} ({name})"
            )
    for name, report in found.agreements.items():
        lines.append(f"labels: {report['verdict']}, by {report['based_on']} ({name})")
    for name, report in found.audits.items():
        lines.append(f"audit: {', '.join(report['failed']) or 'nothing'} failed ({name})")
    unfinished = [run.name for run in found.runs if run.fault]
    count = len(found.runs)
    if count:
        note = f"; unfinished or damaged: {', '.join(unfinished)}" if unfinished else ""
        lines.append(f"{count} training run{'s' * (count > 1)}{note}")
    yield "<ul class=summary>"
    yield from (f"<li>{_text(line)}</li>" for line in lines)
    yield "</ul>"


def _verdict(row: dict[str, Any]) -> Markup:
    if not row["decided"]:
        return Markup("undecided")
    return _mark("good", "better") if row["rate"] > 0.5 else _mark("bad", "worse")


def _evaluation(result: dict[str, Any]) -> Iterable[str]:
    return _policies(result) if "policies" in result else _reward_model(result)


def _policies(result: dict[str, Any]) -> Iterable[str]:
    """The policies of an evaluation, their comparisons and their frontier."""
    policies = result["policies"]
    names = list(dict.fromkeys(name for row in policies for name in row.get("criteria", ())))
    head = ["policy", "score", *names, "KL, nats", "tokens", "refusals", "over-refusals"]
    head += ["refusals of unsafe", "Elo", "95 % interval"]
    rows = []
    for row in policies:
        criteria = [mean_text(row.get("criteria", {}).get(name)) for name in names]
        means = mean_text(row["score"]), *criteria, mean_text(row["kl"], 2)
        means = *means, mean_text(row["tokens"], 1)
        groups = ("refusals", "over_refusals", "refusals_of_unsafe")
        shares = [_shown(row[name] and row[name]["rate"], ".1%") for name in groups]
        elo = row["elo"] or {"rating": None, "interval": None}
        rating = _shown(elo["rating"], ".0f"), _interval(elo["interval"], ".0f")
        rows.append([row["name"], *means, *shares, *rating])
    yield _table(head, rows)
    yield f"<p class=soft>{_text(result['reference'])} is the reference; ± is a standard error "
    yield "clustered by prompt.</p>"
    to_reference = [row for row in result["comparisons"] if row["against"] == result["reference"]]
    others = [row for row in result["comparisons"] if row["against"] != result["reference"]]
    if to_reference:
        yield f"<h3>Win rates</h3>{_comparisons(to_reference)}"
    if others:
        yield _details(f"Other comparisons: {len(others)}", _comparisons(others))
    if result["frontier"]:
        yield _picture(lambda: curves.draw_frontier(result["frontier"]))


def _comparisons(rows: list[dict[str, Any]]) -> str:
    head = ["policy", "against", "win rate", "", "95 % interval", "at equal length"]
    head += ["wins, ties, losses", "sign test p", "verdict", "more needed"]
    cells = [
        [
            row["policy"],
            row["against"],
            _shown(row["rate"], ".3f"),
            _bar(row["rate"], row["interval"]),
            _interval(row["interval"], ".3f"),
            _shown(row["length_controlled"]["rate"], ".3f"),
            f"{row['wins']}, {row['ties']}, {row['losses']}",
            _shown(row["sign_test"], ".2g"),
            _verdict(row),
            row["more_comparisons"],
        ]
        for row in rows
    ]
    return _table(head, cells)


def _bar(rate: float, interval: Sequence[float]) -> Markup:
    """A share with its interval between 0 and 1, whose middle is marked."""
    low, high = interval
    return Markup(
        '<svg class=mark width=120 height=14 role=img aria-label="interval">'
        '<line x1=0 x2=120 y1=7 y2=7 stroke="var(--line)"/>'
        '<line x1=60 x2=60 y1=1 y2=13 stroke="var(--soft)"/>'
        f'<line x1={120 * low:.1f} x2={120 * high:.1f} y1=7 y2=7 stroke="var(--accent)" '
        f'stroke-width=3 /><circle cx={120 * rate:.1f} cy=7 r=4 fill="var(--accent)"/></svg>'
    )


def _reward_model(result: dict[str, Any]) -> Iterable[str]:
    """The accuracy and calibration of a reward model."""
    groups = {f"chosen is {name}": row for name, row in result["chosen_is"].items()}
    groups = {"all": result, **groups, **result.get("subsets", {})}
    rows = []
    for name, row in groups.items():
        accuracy, interval = row["accuracy"], row["interval"]
        shown = _bar(accuracy, interval), _interval(interval, ".3f")
        rows.append([name, row["pairs"], _shown(accuracy, ".3f"), *shown])
    yield _table(["pairs", "number", "accuracy", "", "95 % interval"], rows)
    yield "<h3>Calibration</h3>"
    yield _table(list(result["calibration"]), [result["calibration"].values()])


def _scores(found: Material) -> Iterable[str]:
    drawn = {
        name: result["policies"]
        for name, result in found.evaluations.items()
        if all(row["score"] and row["kl"] for row in result.get("policies", [{"score": None}]))
    }
    if drawn:
        yield _picture(lambda: curves.draw_policies(drawn))


def _samples(rows: list[Sample]) -> Iterable[str]:
    """The first responses of every policy, side by side."""
    policies = list(dict.fromkeys(row.policy for row in rows))[:SHOWN]
    prompts: dict[str, dict[str, Sample]] = {}
    for row in rows:
        key = json.dumps(row.prompt)
        if key in prompts or len(prompts) < PROMPTS:
            prompts.setdefault(key, {}).setdefault(row.policy, row)
    cells = []
    for responses in prompts.values():
        line = [_content(next(iter(responses.values())).prompt)]
        for policy in policies:
            line.append(_response(responses[policy]) if policy in responses else "-")
        cells.append(line)
    yield "<p class=soft>The first prompts of the file, not chosen ones.</p>"
    yield f"<div class=samples>{_table(['prompt', *policies], cells)}</div>"


def _responses(lines: list[bytes]) -> Iterable[str]:
    """The first and the last responses of a run."""
    rows = [parse_json(line.decode()) for line in lines if line.endswith(b"\n")]
    cells = [
        [
            _cut(str(row["prompt"])),
            _cut(str(row["response"])),
            row["score"],
            row[curves.counter(row)],
        ]
        for row in rows
    ]
    head = ["prompt", "response", "score", *dict.fromkeys(map(curves.counter, rows))]
    yield f"<div class=samples>{_table(head, cells)}</div>"


def _content(content: Any) -> str:
    if isinstance(content, str):
        return _cut(content)
    return _cut("\n\n".join(f"{turn['role']}: {turn['content']}" for turn in content))


def _response(row: Sample) -> Markup:
    score = "" if row.score is None else f"<span class=soft>score {row.score:.3g}</span>"
    return Markup(_text(_cut(row.response)) + score)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _training(runs: list[Run]) -> Iterable[str]:
    """A table of the runs, and their curves."""
    if not runs:
        return
    rows = []
    for run, style in zip(runs, curves.colours_of(len(runs))):
        facts = run.facts or {}
        step = run.history[-1][curves.counter(run.history[-1])] if run.history else 0
        of = facts.get("total_steps")
        rows.append(
            [
                Markup(f"{_swatch(style)} {_text(run.name)}"),
                facts.get("algorithm", "-"),
                facts.get("status", "-"),
                f"{step:,}" + (f" of {of:,}" if isinstance(of, int) and of != step else ""),
                _duration(facts),
                *(_last(run, name) for name in COLUMNS),
            ]
        )
    yield _table(["run", "method", "status", "steps", "time", *COLUMNS], rows)
    for run in runs:
        if run.fault:
            yield f"<p class=bad>{_text(run.fault)}</p>"
    ends = [run.history[-1] for run in runs if run.history]
    for run in runs:
        if run.history and isinstance(elo := run.history[-1].get("elo"), list):
            ratings = ", ".join(f"{rating:.0f}" for rating in elo)
            yield f"<p>Elo of the rounds of {_text(run.name)}, from its start: {ratings}</p>"
    if ends:
        smooth = max(1, int(max(row[curves.counter(row)] for row in ends)) // 40)
        several = [
            name
            for name in curves.MAIN
            if any(len(curves.points_of(run, name)) > 1 for run in runs)
        ]
        metrics = several[: curves.MOST] or None  # None: those with one point
        yield _picture(lambda: curves.draw_curves(runs, metrics, smooth, legend=False))
    if any({curves.SCORE, curves.KL} <= run.history[-1].keys() for run in runs if run.history):
        yield _picture(lambda: curves.draw_against_kl(runs))


def _last(run: Run, metric: str) -> float | None:
    """The last value of the metric."""
    points = curves.points_of(run, metric)
    return points[-1][1] if points else None


def _duration(facts: dict[str, Any]) -> str:
    try:
        start, end = (datetime.datetime.fromisoformat(facts[name]) for name in ("start", "end"))
        return str(end - start)
    except (KeyError, TypeError, ValueError):
        return "-"


def _agreement(report: dict[str, Any]) -> Iterable[str]:
    yield f"<p>Verdict: <b>{_text(report['verdict'])}</b>, by {_text(report['based_on'])}; "
    yield f"{report['items']:,} items, {report['labels']:,} labels.</p>"
    rows = [
        [name, *(_shown(row[x], ".3f") for x in ("value", "low", "high"))]
        for name, row in report["coefficients"].items()
    ]
    yield _table(["coefficient", "value", "95 % from", "to"], rows)
    yield "<h3>Annotators</h3>"
    rows = [
        [row["annotator"], row["labels"], _shown(row["with_majority"], ".1%")]
        for row in report["annotators"]
    ]
    yield _table(["annotator", "labels", "with the others' majority"], rows)
    yield from (f"<p class=bad>{_text(warning)}</p>" for warning in report["warnings"])


def _audit(report: dict[str, Any]) -> Iterable[str]:
    """The biases, and the checks of rows with the first rows that they found."""
    length = report["length_bias"]
    longer = f"longer answer chosen {length['longer_chosen_chars']:.1%}"
    sides = {f"format_bias: {name}": side for name, side in report["format_bias"].items()}
    sides["agreement_bias"] = report["agreement_bias"]
    rows = [["length_bias", length["biased"], longer, length["sign_test_p"]]]
    for name, side in sides.items():
        counts = f"only chosen {side['only_chosen']}, only rejected {side['only_rejected']}"
        rows.append([name, side["biased"], counts, side["sign_test_p"]])
    for name, count in report["flagged"].items():
        first = "".join(f"; row {x['row']}: {x['reason']}" for x in report["findings"][name][:2])
        rows.append([name, count > 0, f"{count} rows{first}", None])
    yield f"<p>{report['rows']:,} rows of {_text(report['file'])}</p>"
    rows = [[name, _mark("bad", "failed") if bad else "", *rest] for name, bad, *rest in rows]
    yield _table(["check", "", "found", "p"], rows)


def _mark(kind: str, text: str) -> Markup:
    return Markup(f"<span class={kind}>{text}</span>")


def _settings(runs: list[Run]) -> Iterable[str]:
    """The options that differ between few runs, and everything in run.json of each."""
    known = {run.name: _flat(run.facts) for run in runs if run.facts}
    shown = list(known)[:SHOWN]
    differ = []
    for name in dict.fromkeys(name for run in shown for name in known[run]):
        values = [known[run].get(name) for run in shown]
        if name.startswith("options.") and len({*values} - {None}) > 1:
            differ.append([name, *values])
    if differ:
        yield _details("Options that differ", _facts(["option", *shown], differ))
    for name, facts in known.items():
        yield _details(name, _facts(["name", "value"], facts.items()))


def _facts(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    return f"<div class=facts>{_table(head, rows)}</div>"


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The facts as texts, with dotted names."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict) and prefix.count(".") < 3:
            flat |= _flat(value, f"{prefix}{name}.")
        elif name == "command" and isinstance(value, list):
            flat[prefix + name] = " ".join(map(str, value))
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


# ---- the parts of HTML


def _text(value: Any) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> Markup:
    """A table. Columns without a value are left out."""

    def cell(value: Any) -> str:
        if type(value) in (int, float):
            return f"<td class=number>{value:{',' if type(value) is int else '.4g'}}</td>"
        return f"<td>{_text('-' if value is None else value)}</td>"

    cells = [list(map(cell, row)) for row in rows]
    kept = [i for i in range(len(head)) if any(row[i] != "<td>-</td>" for row in cells)]
    titles = "".join(f"<th>{_text(head[i])}</th>" for i in kept)
    body = "\n".join(f"<tr>{''.join(row[i] for i in kept)}</tr>" for row in cells)
    return Markup(f"<div class=wide><table><tr>{titles}</tr>\n{body}</table></div>")


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _interval(bounds: Sequence[float] | None, form: str) -> str:
    return "-" if bounds is None else " to ".join(format(x, form) for x in bounds)


def _details(summary: str, body: str, is_open: bool = False) -> str:
    """A part that the reader opens."""
    tag = "details open" if is_open else "details"
    return body and f"<{tag}><summary>{_text(summary)}</summary>\n{body}</details>"


def _swatch(style: dict[str, Any]) -> str:
    """The line of a run in the pictures."""
    colour = "rgb({:.0%} {:.0%} {:.0%})".format(*style["color"])
    dashes = {"-": "", "--": "6 3", ":": "2 2"}[style["linestyle"]]
    return (
        "<svg class=mark width=24 height=8><line x1=0 x2=24 y1=4 y2=4 stroke-width=3 "
        f'stroke="{colour}" stroke-dasharray="{dashes}"/></svg>'
    )


def _picture(draw: Callable[[], Any]) -> str:
    """A figure as SVG, whose ink is the colour of the text around it."""
    file = io.StringIO()
    with require("matplotlib", "report").rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that only the browser has, and of long names
        draw().savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return f"<figure>{svg[svg.index('<svg') :].replace(INK, 'currentColor')}</figure>"
