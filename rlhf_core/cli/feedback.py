"""The commands for human feedback: from candidates to labels, agreement and clean data."""

from __future__ import annotations

import itertools
import math
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_core.cli import arguments as shared
from rlhf_core.cli.arguments import Command
from rlhf_core.data import (
    DataError,
    Preference,
    encode_preference,
    encode_prompt,
    load_tokenizer,
)
from rlhf_core.data.chat import Content
from rlhf_core.data.quality import BIAS_CHECKS, CHECKS, DROPPED, ROW_CHECKS, PairAudit
from rlhf_core.data.readers import (
    PromptRow,
    iterate_preferences,
    read_candidates,
    read_preferences,
    read_prompt_rows,
    read_prompts,
    read_texts,
)
from rlhf_core.feedback.agreement import LEVELS, NEXT, agreement_report
from rlhf_core.feedback.candidate_file import (
    Source,
    appending,
    candidate_row,
    gibberish,
    pair_rows,
    prompt_rows,
    sampled,
)
from rlhf_core.feedback.candidates import SamplingConfig, prompts_for
from rlhf_core.feedback.dawid_skene import DawidSkene, dawid_skene
from rlhf_core.feedback.label_rows import (
    LabelColumns,
    is_database,
    read_database,
    read_label_rows,
    table_of,
)
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.feedback.templates import padding_pair, sycophancy_pairs
from rlhf_core.files import (
    Replacement,
    check_replaceable,
    check_writable,
    dump_rows,
    write_json,
    write_rows,
)
from rlhf_core.locks import hold
from rlhf_core.models import Transformer, load_reward
from rlhf_core.training.checkpoint import digest

SHOWN = 100  # findings of each check in the JSON file
_MODELLED = 20  # labels whose confusion is estimated; more would need too many labels
_LISTED = 10  # labels, pairs of annotators, and confusing items, on the terminal
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
    if arguments.json in outputs[1:]:
        raise ValueError(f"--json {arguments.json} is also written by --fix. Choose another file")
    for out in outputs:
        shared.check_new_file(out, arguments.overwrite, arguments.data)
    against = _prompts_of(arguments.against, arguments.columns) if arguments.against else ()
    audit, margins, score = PairAudit(against), [], margins_of(arguments)
    pairs = _pairs(arguments, audit)
    while batch := list(itertools.islice(pairs, _SCORED_AT_ONCE)):
        try:
            margins += score(batch) if score else []
        except ValueError as error:
            last = f"the pairs up to row {audit.rows}"
            raise ValueError(f"{arguments.data}: {last} cannot be scored: {error}") from None
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


def _pairs(arguments: Namespace, audit: PairAudit) -> Iterator[Preference]:
    """The pairs, each added to the audit."""
    for _, pair in _audited_rows(arguments, audit.add_unreadable):
        audit.add(pair)
        yield pair


def _prompts_of(path: Path, columns: dict[str, str] | None) -> list:
    """The prompts of a file of prompts or of pairs, which may have theirs within the answers."""
    try:
        return read_prompts(path, columns=columns)
    except DataError:
        return read_candidates(path, encode=lambda row: row.prompt, columns=columns)


def margins_of(arguments: Namespace) -> Callable[[list[Preference]], list[float]] | None:
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
                f"{name}: {rows[number]}"
                for name, rows in audit.findings.items()
                if number in rows and (name == "unreadable" or name in arguments.drop)
            ]
            kept += not reasons
            line = {"row": number, "reasons": reasons, "data": row} if reasons else row
            dump_rows(outputs[bool(reasons)], [line])

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
    """The file beside --fix for the rows that are not kept."""
    if out.suffix == ".gz":
        raise ValueError(f"{out}: is written as plain text. Choose a name without .gz")
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.dropped.jsonl")


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


def _add_candidates(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, nargs="+", metavar="DIR", help=shared.MODEL)
    shared.add_prompts(parser)
    parser.add_argument("--out", required=True, type=Path, help="JSONL file, a row for each prompt")
    parser.add_argument(
        "--overwrite", action="store_true", help="start --out anew; without it a run goes on"
    )
    temperature = shared.between(float, 0)
    parser.add_argument(
        "--temperature",
        dest="temperatures",
        type=temperature,
        nargs="+",
        default=[1.0, 1.2],
        help="one or more; higher: more varied answers; 0 is greedy; default: 1.0 1.2",
    )
    parser.add_argument(
        "--num-samples", type=int, default=2, help="answers of each model at each temperature"
    )
    parser.add_argument(
        "--max-new-tokens", dest="response_length", type=int, default=128, help="longest answer"
    )
    parser.add_argument(
        "--chosen-from",
        metavar="DIR",
        help="write pairs: chosen is an answer of this better model, rejected one of --model",
    )
    parser.add_argument(
        "--chosen-temperature", type=temperature, default=0.0, help="of --chosen-from; 0 is greedy"
    )
    parser.add_argument(
        "--drop-gibberish",
        action="store_true",
        help="leave out answers without EOS, or below --min-logprob",
    )
    parser.add_argument(
        "--min-logprob",
        type=float,
        default=-5.0,
        help="mean log-prob of a token, in nats at temperature 1, below which an answer is "
        "gibberish; higher: more is dropped",
    )
    shared.add_eos_ids(parser)
    shared.add_template(parser)
    shared.add_skip_bad(parser)
    shared.add_device(parser)
    shared.add_engine(parser)
    sampling = ("num_samples", "temperature", "response_length")
    shared.add_config(parser, SamplingConfig, without=sampling)


def run_candidates(arguments: Namespace) -> None:
    """Sample answers to prompts, for people to compare, or pairs with a better model's answer."""
    out = arguments.out
    check_replaceable(out)
    check_writable(out.parent)
    with hold(out.parent, f".{out.name}.lock"):
        _candidates(arguments)


def _candidates(arguments: Namespace) -> None:
    temperatures = list(dict.fromkeys(arguments.temperatures))
    plan = [(folder, temperatures, arguments.num_samples) for folder in arguments.model]
    if arguments.chosen_from:
        plan = [(arguments.chosen_from, [arguments.chosen_temperature], 1), *plan]
    rows, sources, config = _sources(arguments, plan)
    least = arguments.min_logprob if arguments.drop_gibberish else None
    settings = (config, least, arguments.chosen_from, sources[0].model.device.type)
    details = ((name, eos_ids, prompts, *how) for name, _, _, eos_ids, prompts, *how, _ in sources)
    models = (source.model for source in sources)
    run = digest(repr(settings), repr(rows), repr(list(details)), *models)[:16]
    begun, out = prompt_rows(arguments.prompts, rows, run), arguments.out
    dropped: Counter[str] = Counter()

    if arguments.overwrite:
        out.unlink(missing_ok=True)
    with appending(out, begun, config.batch_size) as (write, first):
        if first:
            print(f"{out} has the answers to {first} of {len(rows)} prompts; going on")
        batches = math.ceil((len(rows) - first) / config.batch_size)
        found = shared.progress(sampled(sources, config, first), "batches of prompts", batches)
        for start, batch in found:
            lines: list[dict[str, Any]] = []
            for row, answers in zip(begun[start:], batch):
                dropped.update(filter(None, (gibberish(answer, least) for answer in answers)))
                if arguments.chosen_from:
                    lines += pair_rows(row, answers, least)
                else:
                    lines.append(candidate_row(row, answers, least))
            write(lines)
    for reason, count in sorted(dropped.items()):
        print(f"dropped {count} answers: {reason}")
    with open(out, "rb") as file:
        written = sum(1 for _ in file)
    print(f"{written} rows from {len(rows)} prompts; written to {out}")


def _sources(
    arguments: Namespace, plan: list[tuple[str, list[float], int]]
) -> tuple[dict[int, PromptRow], list[Source], SamplingConfig]:
    """The prompts that leave room in every model, by their number, and the models."""
    if arguments.engine is not None and len(arguments.model) > 1:
        raise ValueError(f"--engine serves one --model, got {len(arguments.model)}")
    config, device = shared.config_of(SamplingConfig, arguments), shared.device_of(arguments)
    tokenizers = [shared.tokenizer_of(arguments, folder) for folder, *_ in plan]
    models = [Transformer.from_pretrained(folder).to(device) for folder, *_ in plan]

    def encode(row: PromptRow) -> tuple[PromptRow, list[list[int]]]:
        both = zip(tokenizers, models)
        return row, [shared.known(encode_prompt(row.prompt, t), model, t) for t, model in both]

    rows = shared.read(read_prompt_rows, arguments.prompts, arguments, encode)
    fitting = [
        dict(zip(*prompts_for(model, [ids[i] for _, ids in rows], config)))
        for i, model in enumerate(models)
    ]
    kept = [i for i in range(len(rows)) if all(i in prompts for prompts in fitting)]
    if not kept:
        raise ValueError("no prompt leaves room for a response in every model")
    sources = []
    for (folder, *how), model, tokenizer, prompts in zip(plan, models, tokenizers, fitting):
        eos_ids = shared.eos_ids_of(arguments, model, tokenizer)
        options = {}
        if folder != arguments.chosen_from:
            options = shared.engine_of(arguments, model, tokenizer)
        own = [prompts[i] for i in kept]
        sources.append(Source(folder, model, tokenizer, eos_ids, own, *how, **options))
    return {i: rows[i][0] for i in kept}, sources, config


def _add_template_pairs(parser: ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=("sycophancy", "padding"),
        help="sycophancy: users claim facts and errors; padding: the answers of --data, and the "
        "same ones padded with empty sentences as rejected",
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="padding: pairs, or prompts with completions"
    )
    parser.add_argument("--out", required=True, type=Path, help="JSONL file for the pairs")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument(
        "--chat", action="store_true", help="sycophancy: write each prompt as a user's message"
    )
    parser.add_argument("--seed", type=shared.seed, default=0, help="padding: of the sentences")
    shared.add_columns(parser)


def run_template_pairs(arguments: Namespace) -> None:
    """Write pairs from templates."""
    padding, data = arguments.kind == "padding", arguments.data
    if padding != (data is not None):
        raise ValueError("--data is required for padding, and has no effect on sycophancy")
    shared.check_new_file(arguments.out, arguments.overwrite, data)
    if padding:
        pairs = [
            padding_pair(prompt, answer, seed=arguments.seed + i)
            for i, (prompt, answer) in enumerate(_answers_of(data, arguments.columns))
        ]
    else:
        pairs = list(sycophancy_pairs())
        if arguments.chat:
            pairs = [x | {"prompt": [{"role": "user", "content": x["prompt"]}]} for x in pairs]
    write_rows(arguments.out, pairs)
    print(f"{len(pairs)} pairs; written to {arguments.out}")


def _answers_of(path: Path, columns: dict[str, str] | None) -> list[tuple[Content, Content]]:
    """Prompts with the chosen answers of pairs, or with completions."""
    try:
        return read_preferences(path, encode=lambda row: (row.prompt, row.chosen), columns=columns)
    except DataError:
        return [(row.prompt, row.completion) for row in read_texts(path, columns=columns)]


def _add_agreement(parser: ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=Path,
        help="rows of item, annotator and label; or a database of `rlhf-core annotate`",
    )
    parser.add_argument("--item", metavar="COLUMN", help="default: item, or id")
    parser.add_argument("--annotator", metavar="COLUMN", help="default: annotator")
    parser.add_argument(
        "--label",
        metavar="COLUMN",
        help="a label, or a list with one of each annotator; of a database, a criterion whose "
        "ratings to compare; default: label, or labels",
    )
    parser.add_argument("--time", metavar="COLUMN", help="when each label was given; shows drift")
    parser.add_argument(
        "--annotators", nargs="+", default=(), metavar="COLUMN", help="a column for each annotator"
    )
    parser.add_argument(
        "--level",
        choices=LEVELS,
        help="how labels differ; default: nominal (equal or not), of Likert labels and ratings in "
        "a database ordinal",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--overwrite", action="store_true", help="replace --json")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples for the intervals"
    )
    parser.add_argument("--seed", type=shared.seed, default=0, help="seed of the resamples")


def run_agreement(arguments: Namespace) -> None:
    """Measure how far annotators agree, and say what to do with their labels."""
    path = arguments.data
    if arguments.json:
        shared.check_new_file(arguments.json, arguments.overwrite, path)
    columns = LabelColumns(*(getattr(arguments, name) for name in LabelColumns._fields))
    if is_database(path):
        if unused := [name for name, x in columns._asdict().items() if x and name != "label"]:
            raise ValueError(f"--{unused[0]} is for files of rows, but {path} is a database")
        rows, level = read_database(path, arguments.label)
        level = arguments.level or level
    else:
        if arguments.annotators and (arguments.annotator or arguments.label):
            raise ValueError("--annotators names columns of labels: leave out --annotator, --label")
        level = arguments.level or "nominal"
        rows = list(read_label_rows(path, columns, numeric=level != "nominal"))
    table = table_of(rows)
    if len(table.annotators) < 2:
        names = ", ".join(map(str, table.annotators)) or "nobody"
        raise ValueError(f"{path}: all labels are by {names}. Agreement needs two annotators")
    if all(sum(x is not None for x in labels) < 2 for labels in zip(*table.ratings)):
        raise ValueError(
            f"{path}: no item has labels of two annotators. Give several people the same items, "
            "such as with annotate --overlap 2"
        )
    try:
        report = agreement_report(
            table.ratings,
            level=level,
            annotators=table.annotators,
            items=table.items,
            times=table.times,
            resamples=arguments.bootstrap,
            seed=arguments.seed,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if table.repeats:
        report["warnings"].append(
            f"{table.repeats} labels were replaced by later ones of the same person for the item"
        )
    few = len(report["categories"]) <= _MODELLED
    model = dawid_skene(rows) if few else None
    print("\n".join(_agreement_lines(path, report, model)))
    if arguments.json:
        if model is not None:
            report["dawid_skene"] = {
                name: value.tolist() if hasattr(value, "tolist") else value
                for name, value in model._asdict().items()
            }
        write_json(arguments.json, {"file": str(path), **report})


def _agreement_lines(path: Path, report: dict[str, Any], model: DawidSkene | None) -> Iterable[str]:
    """The report as tables."""
    labels = ", ".join(
        f"{n} x {label}" for label, n in list(report["categories"].items())[:_LISTED]
    )
    labels += ", ..." * (len(report["categories"]) > _LISTED)
    yield f"{path}: {report['items']} items, {report['labels']} labels: {labels}"
    yield f"{report['unanimous_items']} items unanimous, {report['split_items']} split"
    yield ""
    yield f"{'coefficient':<24} {'value':>6}   95 % interval"
    for name, entry in report["coefficients"].items():
        undefined = entry["undefined_resamples"]
        note = f"   undefined in {undefined} resamples" * bool(undefined and not entry["reason"])
        yield f"{name:<24} {_estimate(entry)}{note}"
    yield ""
    beside = [
        f"{name} {entry['value']:.3f}"
        for name, entry in report["coefficients"].items()
        if name in (report["based_on"], "gwet_ac1") and entry["value"] is not None
    ]
    yield f"verdict: {report['verdict']}, by {report['based_on']} ({', '.join(beside)})"
    yield f"next: {NEXT[report['verdict']]}"
    yield from (f"! {warning}" for warning in report["warnings"])
    yield ""
    yield f"{'annotator':<24} {'labels':>6}   with the others' majority"
    for row in report["annotators"]:
        share = "-" if row["with_majority"] is None else f"{row['with_majority']:.1%}"
        guesses = model is not None and row["annotator"] in model.guessers
        note = "   guesses: labels carry no information (Dawid & Skene)" * guesses
        yield f"{row['annotator']!s:<24} {row['labels']:>6}   {share} of {row['compared']}{note}"
    yield ""
    yield f"{'pair':<24} {'items':>6}   Cohen's kappa, lowest first"
    pairs = [pair for pair in report["pairs"] if pair["cohen_kappa"]["value"] is not None]
    for pair in sorted(pairs, key=lambda pair: pair["cohen_kappa"]["value"])[:_LISTED]:
        names = " - ".join(map(str, pair["annotators"]))
        yield f"{names:<24} {pair['items']:>6}   {_estimate(pair['cohen_kappa'])}"
    if report["confusing_items"]:
        yield ""
        yield f"{'confusing item':<24} labels"
    for row in report["confusing_items"][:_LISTED]:
        votes = ", ".join(f"{name}: {label}" for name, label in row["labels"].items())
        yield f"{row['item']!s:<24} {votes}"
    if report["drift"]:
        yield ""
        yield f"{'items by time':<24} {report['based_on']}"
    for block in report["drift"]:
        yield f"{block['items']:<24} {_estimate(block)}"


def _estimate(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return f"     -   {entry['reason']}"
    if entry["low"] is None:
        return f"{entry['value']:6.3f}   no resample has a value"
    return f"{entry['value']:6.3f}   {entry['low']:.3f} to {entry['high']:.3f}"


COMMANDS: dict[str, Command] = {
    "candidates": Command(_add_candidates, run_candidates),
    "template-pairs": Command(_add_template_pairs, run_template_pairs),
    "audit": Command(_add_audit, run_audit),
    "agreement": Command(_add_agreement, run_agreement),
}
