"""The commands for human feedback: from candidates to labels, agreement and clean data."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_core.cli import arguments as shared
from rlhf_core.cli.arguments import Command
from rlhf_core.data import DataError, Preference, encode_preference, load_tokenizer
from rlhf_core.data.quality import BIAS_CHECKS, CHECKS, DROPPED, ROW_CHECKS, PairAudit
from rlhf_core.data.readers import iterate_preferences, read_candidates, read_prompts
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.files import Replacement, check_replaceable, check_writable, write_json
from rlhf_core.models import load_reward

SHOWN = 100  # findings of each check in the JSON file
_SCORED_AT_ONCE = 32  # pairs


def _add_audit(parser: ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="pairs: prompt, chosen and rejected")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="test prompts or pairs, to look for leaks"
    )
    parser.add_argument(
        "--reward-model",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="flag rows that it ranks the other way; it must not have been trained on them",
    )
    parser.add_argument(
        "--flip-margin",
        type=float,
        default=1.0,
        help="flag rows whose rejected answer scores higher by more than this; higher: fewer rows",
    )
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="FILE",
        help="write the rows to keep here, and the others with reasons to a file *.dropped.jsonl",
    )
    parser.add_argument(
        "--drop",
        nargs="+",
        choices=ROW_CHECKS,
        default=DROPPED,
        metavar="CHECK",
        help=f"row checks whose rows --fix drops: {', '.join(ROW_CHECKS)}; default: "
        f"{' '.join(DROPPED)}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument(
        "--fail-on",
        nargs="+",
        choices=(*CHECKS, "any"),
        default=(),
        metavar="CHECK",
        help=f"end with status 1 if one of these fails: row checks, {', '.join(BIAS_CHECKS)}, any",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --fix and --json")
    shared.add_columns(parser)
    shared.add_device(parser)


def run_audit(arguments: Namespace) -> None:
    """Look for biases, duplicates, contradictions, leaks and personal data."""
    outputs = [arguments.json] if arguments.json else []
    if arguments.fix:
        outputs += [arguments.fix, _dropped(arguments.fix)]
    for out in outputs:
        _check_output(out, arguments)
    against = _prompts_of(arguments.against, arguments.columns) if arguments.against else ()
    audit, score, margins, waiting = PairAudit(against), _margins_of(arguments), [], []
    for _, pair in shared.progress(_audited_rows(arguments, audit.add_unreadable), "audit"):
        audit.add(pair)
        if score:
            waiting.append(pair)
            if len(waiting) == _SCORED_AT_ONCE:
                margins += score(waiting)
                waiting.clear()
    if waiting:
        margins += score(waiting)
    report = audit.report(margins if score else None, arguments.flip_margin)
    print("\n".join(_audit_lines(report, audit)))
    if arguments.fix:
        _fix(arguments, audit)
    if arguments.json:
        findings = {
            name: [{"row": row, "reason": reason} for row, reason in list(rows.items())[:SHOWN]]
            for name, rows in audit.findings.items()
        }
        write_json(arguments.json, {"file": str(arguments.data), **report, "findings": findings})
    wanted = CHECKS if "any" in arguments.fail_on else arguments.fail_on
    if failed := [name for name in report["failed"] if name in wanted]:
        sys.exit(f"rlhf-core audit: failed on {', '.join(failed)}")


def _audited_rows(
    arguments: Namespace, on_bad: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], Preference]]:
    return iterate_preferences(arguments.data, lambda error: on_bad(str(error)), arguments.columns)


def _prompts_of(path: Path, columns: dict[str, str] | None) -> list:
    """The prompts of a file of prompts or of pairs, which may have theirs within the answers."""
    try:
        return read_prompts(path, columns=columns)
    except DataError:
        return read_candidates(path, encode=lambda row: row.prompt, columns=columns)


def _margins_of(arguments: Namespace) -> Callable[[list[Preference]], list[float]] | None:
    """A function from pairs to the reward model's score of chosen minus that of rejected."""
    folders = arguments.reward_model
    if not folders:
        return None
    model = load_reward(folders).to(shared.device_of(arguments))
    tokenizer = load_tokenizer(folders[0])
    scorer, length = Scorer(model, pad_id=model.config.pad_id or 0), model.config.max_positions

    def margins(pairs: list[Preference]) -> list[float]:
        encoded = [encode_preference(pair, tokenizer, length) for pair in pairs]
        prompts = [pair.prompt_ids for pair in encoded]
        chosen, rejected = (
            scorer(prompts, [pair.completions_ids[i] for pair in encoded]) for i in (0, 1)
        )
        return (chosen - rejected).tolist()

    return margins


def _fix(arguments: Namespace, audit: PairAudit) -> None:
    """Read the rows again. Write those that are kept, and the others with every reason."""
    number, kept = 0, 0
    with Replacement(arguments.fix.parent) as files:
        outputs = [files.open(path.name) for path in (arguments.fix, _dropped(arguments.fix))]

        def write(row: dict[str, Any] | None) -> None:
            nonlocal number, kept
            number += 1
            reasons = [
                f"{name}: {audit.findings[name][number]}"
                for name in arguments.drop
                if number in audit.findings[name]
            ]
            kept += not reasons
            line = {"row": number, "reasons": reasons, "data": row} if reasons else row
            text = json.dumps(line, ensure_ascii=False) + "\n"
            outputs[bool(reasons)].write(text.encode())

        for row, _ in _audited_rows(arguments, lambda _: write(None)):
            write(row)
        if number != audit.rows:
            raise ValueError(
                f"{arguments.data}: has {number} rows now, but had {audit.rows} when they were "
                "checked. Run the audit again"
            )
        if not kept:
            raise ValueError(f"--fix {arguments.fix}: --drop would leave no row")
    dropped = number - kept
    print(f"kept {kept} rows in {arguments.fix}; {dropped} in {_dropped(arguments.fix)}")


def _dropped(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.dropped.jsonl")


def _check_output(out: Path, arguments: Namespace) -> None:
    """Raise OSError unless `out` is a new file, or one that --overwrite may replace."""
    if out.exists() and out.samefile(arguments.data):
        raise FileExistsError(f"{out} is the data itself. Choose another file")
    if out.suffix == ".gz":
        raise ValueError(f"{out}: is written as plain text. Choose a name without .gz")
    check_replaceable(out)
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{out} exists. Choose another file, or pass --overwrite")
    check_writable(out.parent)


def _audit_lines(report: dict[str, Any], audit: PairAudit) -> Iterable[str]:
    """The report as a table."""
    length = report["length_bias"]
    yield f"{report['rows']} rows; '!' marks a check that failed"
    yield ""

    def line(check: str, is_bad: bool, text: str) -> str:
        return f"{'!' if is_bad else ' '} {check:<15} {text}"

    share = f"{length['longer_chosen_chars']:.2%} (words {length['longer_chosen_words']:.2%})"
    text = f"longer answer chosen {share}, p = {_p(length['sign_test_p'])}"
    yield line("length_bias", length["biased"], text)
    sides = [("format_bias", name, side) for name, side in report["format_bias"].items()]
    agrees = "agrees with the user, whom the other answer contradicts"
    for check, what, side in (*sides, ("agreement_bias", agrees, report["agreement_bias"])):
        if side["sign_test_p"] is not None:
            yield line(
                check,
                side["biased"],
                f"{what}: only chosen {side['only_chosen']}, only rejected "
                f"{side['only_rejected']}, p = {_p(side['sign_test_p'])}",
            )
    yield ""
    for name, what in ROW_CHECKS.items():
        rows = audit.findings[name]
        first = ", ".join(map(str, list(rows)[:5])) + (", ..." if len(rows) > 5 else "")
        yield line(name, bool(rows), f"{len(rows):>6}  {what}" + (f": row {first}" if rows else ""))
    yield ""
    repeated = report["duplicates"]
    at_least = "" if repeated["all_pairs_compared"] else "at least "
    yield (
        f"{repeated['prompts']} rows repeat a prompt; {at_least}{repeated['near_prompt_pairs']} "
        f"pairs of rows have nearly equal prompts"
    )
    triples = report["intransitive"]
    yield f"{triples['cyclic']} of {triples['triples_without_ties']} triples of answers are circles"
    if tests := report["contamination"]["test_rows"]:
        leaked = report["contamination"]["rows_with_a_shared_ngram"]
        yield f"{leaked} of {tests} test prompts leak into the data"
    if margin := report["reward_margin"]:
        yield f"the reward model agrees with {margin['accuracy']:.2%} of the labels"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


COMMANDS: dict[str, Command] = {
    "audit": Command(_add_audit, run_audit),
}
