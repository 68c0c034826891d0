"""The commands that draw runs: as a picture, and as a page with all that is known of them."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rlhf_core.cli import arguments as shared
from rlhf_core.cli.arguments import Command
from rlhf_core.evaluation.curves import draw_curves, read_run
from rlhf_core.evaluation.report import write_report
from rlhf_core.files import replacing

FORMATS = ("png", "svg", "pdf")


def _add_plot(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out", required=True, type=Path, help=f"picture; its name ends with {', '.join(FORMATS)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="default: the main ones")
    steps = shared.between(int, 1)
    parser.add_argument(
        "--smooth", type=steps, default=1, metavar="STEPS", help="average over this many steps"
    )


def run_plot(arguments: Namespace) -> None:
    """Draw the curves of the runs' metrics into a file."""
    out, smooth = arguments.out, arguments.smooth
    suffix = out.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise ValueError(f"--out must end with one of {', '.join(FORMATS)}, got {out.name}")
    shared.check_new_file(out, arguments.overwrite)
    runs = [read_run(folder, str(folder)) for folder in dict.fromkeys(arguments.runs)]
    figure = draw_curves(runs, arguments.metrics, smooth)
    with replacing(out) as file:
        figure.savefig(file, format=suffix, dpi=130)
    for run in runs:
        if run.fault is not None:
            print(f"note: {run.fault}", file=sys.stderr)
    print(f"{len(runs)} run{'s' * (len(runs) > 1)} drawn in {out}")


def _add_report(parser: ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="folders of runs and of evaluations; JSON files of agreement and audit, which are "
        "also found in these folders",
    )
    parser.add_argument("--out", required=True, type=Path, help="HTML file")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    parser.add_argument("--title", default="Report", help="heading of the page")


def run_report(arguments: Namespace) -> None:
    """Write a page about runs and evaluations."""
    out = arguments.out
    shared.check_new_file(out, arguments.overwrite)
    found = write_report(arguments.paths, out, arguments.title)
    parts = [
        f"{len(part)} {name}{'s' * (len(part) > 1)}"
        for name, part in zip(
            ("run", "evaluation", "agreement", "audit"),
            (found.runs, found.evaluations, found.agreements, found.audits),
        )
        if part
    ]
    for run in found.runs:
        if run.fault is not None:
            print(f"note: {run.fault}", file=sys.stderr)
    print(f"{', '.join(parts)} reported in {out}")


COMMANDS = {
    "plot": Command(_add_plot, run_plot),
    "report": Command(_add_report, run_report),
}
