"""The commands for labels from people: the page, exports, and labels from other platforms."""

from __future__ import annotations

import argparse
import sys
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from rlhf_core.cli import arguments as shared
from rlhf_core.cli.arguments import Command
from rlhf_core.data import read_candidates
from rlhf_core.feedback.annotation import export, flags, platforms
from rlhf_core.feedback.annotation.items import MODES, Item, make_items
from rlhf_core.feedback.annotation.labels import Settings, open_store, read_labels
from rlhf_core.feedback.annotation.server import AnnotationServer
from rlhf_core.files import read_text, write_rows

# ---- annotate


def _add_annotate(parser: ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument(
        "--db", required=True, type=Path, help="database of labels; made if it does not exist"
    )
    add_people(parser)
    parser.add_argument(
        "--gold", type=Path, metavar="FILE", help="pairs or ranked lists whose answer is known"
    )
    parser.add_argument(
        "--gold-every",
        type=shared.between(int, 1),
        metavar="N",
        help="one in N items is a gold question; default: 20",
    )
    parser.add_argument(
        "--guidelines", type=Path, metavar="FILE", help="text that the page shows on request"
    )


def add_people(parser: Any) -> None:
    """Add who labels, and where the page is."""
    parser.add_argument(
        "--annotators", nargs="+", default=["annotator"], metavar="NAME", help="a link for each"
    )
    parser.add_argument(
        "--overlap", type=shared.between(int, 1), default=1, help="people who label each item"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every network"
    )
    port = shared.between(int, 0, 2**16 - 1)
    parser.add_argument("--port", type=port, default=8765, help="0 takes a free one")


def check_people(arguments: Namespace) -> None:
    """Raise ValueError unless the options of `add_people` fit; warn of an open network."""
    people = arguments.annotators
    if len(set(people)) < len(people) or not all(name.isprintable() and name for name in people):
        raise ValueError(f"--annotators must be different names, got {' '.join(people)}")
    if arguments.overlap > len(people):
        raise ValueError(
            f"--overlap {arguments.overlap} needs as many annotators, got {len(people)}. Name more "
            "with --annotators"
        )
    if arguments.host not in ("127.0.0.1", "::1", "localhost"):
        warnings.warn(
            f"--host {arguments.host}: texts, labels and links travel unencrypted, and whoever "
            "reads them can label. Use a network that you trust, or a proxy with TLS",
            stacklevel=1,
        )


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        help="candidates: prompt and responses; or pairs, or prompts alone for write; default: the "
        "items of --db",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="choose one of two, say how much better it is (8 points), rank, or write the answer; "
        "default: pair",
    )
    parser.add_argument(
        "--criteria",
        type=_criteria,
        metavar="NAME,...",
        help="rate each answer from 1 to 5 by these, such as helpful,honest,harmless",
    )
    parser.add_argument("--seed", type=shared.seed, help="seed of the sides; default: 0")


def _criteria(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be different names, NAME,NAME,..., got {text!r}")
    return names


def _items_and_settings(arguments: Namespace) -> tuple[list[Item], Settings]:
    """What --data and its options say."""
    mode = arguments.mode or MODES[0]
    if mode == "write" and arguments.criteria:
        raise ValueError("--criteria rates answers, but --mode write asks for a text. Remove one")
    rows = read_candidates(arguments.data)
    items = make_items(rows, mode)
    if not items:
        raise ValueError(
            f"{arguments.data}: no row has two different responses to compare. Add responses, or "
            "use --mode write"
        )
    left_out = len(rows) - len({item.row for item in items})
    if left_out:
        reason = "repeated, or without two different responses"
        print(f"{left_out} of {len(rows)} rows are left out: {reason}", file=sys.stderr)
    return items, Settings(mode, arguments.criteria or (), arguments.seed or 0)


def _check_database_decides(arguments: Namespace, *more: str) -> None:
    """Raise ValueError if an option of --data, or one of these more, is given without it."""
    reason = "goes with --data; the database has its own. Remove it"
    shared.check_unused(arguments, ("mode", "criteria", "seed", *more), reason)


def run_annotate(arguments: Namespace) -> None:
    """Serve the page on which people label, until a signal."""
    check_people(arguments)
    items = settings = None
    if arguments.data is None:
        _check_database_decides(arguments, "gold")
    else:
        items, settings = _items_and_settings(arguments)
    if arguments.gold:
        items += make_items(read_candidates(arguments.gold), settings.mode, gold=True)
    elif arguments.gold_every and arguments.data is not None:
        warnings.warn("--gold-every has no effect without --gold", stacklevel=1)
    options = {
        "annotators": arguments.annotators,
        "overlap": arguments.overlap,
        "gold_every": arguments.gold_every or 20,
        "guidelines": read_text(arguments.guidelines) if arguments.guidelines else "",
    }
    with (
        open_store(arguments.db, items, settings, **options) as store,
        AnnotationServer(store, arguments.host, arguments.port, _report) as server,
    ):
        for name, token in store.tokens.items():
            print(f"{name}: {server.link(token)}", flush=True)
        status = server.link(server.status_token, "/status")
        print(f"status: {status}\nCtrl-C ends the server; every label is stored", file=sys.stderr)
        try:
            server.serve_forever()
        finally:
            _report(flags.summary_lines(flags.summary(arguments.db)))


def _report(lines: list[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


# ---- export


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("--db", type=Path, help="database of labels")
    _add_data(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=(*export.FORMATS, *platforms.PLATFORMS),
        help="rows that train a model, or tasks for another platform (of --db, or of --data)",
    )
    parser.add_argument("--out", required=True, type=Path, help="file of rows or tasks")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument(
        "--aggregate",
        choices=export.AGGREGATES,
        default="majority",
        help="the outcome with most votes, or the most likely one given how reliable people are",
    )
    parser.add_argument(
        "--min-agreement",
        type=shared.between(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="leave out comparisons whose winner has a smaller share of the votes",
    )


def run_export(arguments: Namespace) -> None:
    """Write labels as rows that train a model, or items as tasks for another platform."""
    if (arguments.db is None) == (arguments.data is None):
        raise ValueError("pass either --db or --data")
    if arguments.data is None:
        _check_database_decides(arguments)
    votes = arguments.format not in ("sft", *platforms.PLATFORMS)
    if not votes and (arguments.min_agreement or arguments.aggregate != export.AGGREGATES[0]):
        options = "--aggregate and --min-agreement have no effect"
        warnings.warn(f"{options} with --format {arguments.format}", stacklevel=1)
    (_export_tasks if arguments.format in platforms.PLATFORMS else _export_rows)(arguments)


def _export_rows(arguments: Namespace) -> None:
    if arguments.db is None:
        raise ValueError(f"--format {arguments.format} is made from labels: pass --db")
    shared.check_new_file(arguments.out, arguments.overwrite, arguments.db)
    options = arguments.format, arguments.aggregate, arguments.min_agreement
    rows, left_out = export.export_rows(read_labels(arguments.db), *options)
    write_rows(arguments.out, rows)
    reasons = export.describe(left_out)
    print(f"{len(rows)} rows written to {arguments.out}" + f"; left out: {reasons}" * bool(reasons))


def _export_tasks(arguments: Namespace) -> None:
    suffix = ".config.xml" if arguments.format == "label-studio" else ".settings.json"
    config = arguments.out.with_suffix(suffix)
    for path in (arguments.out, config):
        shared.check_new_file(path, arguments.overwrite, arguments.db or arguments.data)
    if arguments.db is None:
        items, settings = _items_and_settings(arguments)
    else:
        contents = read_labels(arguments.db)
        items = [item for item in contents.items.values() if not item.ranks]
        settings = contents.settings
    platforms.write_tasks(arguments.format, items, settings, arguments.out, config)
    print(f"{len(items)} tasks written to {arguments.out}, their configuration to {config}")


# ---- import-labels


def _add_import(parser: ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="JSON export of Label Studio or Argilla"
    )
    parser.add_argument(
        "--db", required=True, type=Path, help="database of labels; made if --data is given"
    )
    _add_data(parser)


def run_import(arguments: Namespace) -> None:
    """Store the labels that another platform exports, with their annotators and times."""
    source: tuple = ()
    if arguments.data:
        source = _items_and_settings(arguments)
    else:
        _check_database_decides(arguments)
    with open_store(arguments.db, *source) as store:
        rows = platforms.read_platform(arguments.file, store.items, store.settings)
        counts = store.add_imported(rows)
    people = len({row["annotator"] for row in rows})
    print(
        f"{counts['new']} labels of {people} people are new, {counts['replaced']} replace older "
        f"ones, {counts['known']} were known; stored in {arguments.db}"
    )


COMMANDS: dict[str, Command] = {
    "annotate": Command(_add_annotate, run_annotate),
    "export": Command(_add_export, run_export),
    "import-labels": Command(_add_import, run_import),
}
