"""The commands around the library: demo, bench, info."""

from __future__ import annotations

import platform
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from rlhf_core import backends
from rlhf_core import demo as chain
from rlhf_core.benchmarks import OPS
from rlhf_core.cli.arguments import Command, device_of, seed
from rlhf_core.evaluation.report import PAGE
from rlhf_core.files import check_writable
from rlhf_core.locks import check_one_process, hold
from rlhf_core.training.run_file import versions


def _add_demo(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--real", type=Path, metavar="DIR", help="use the story model and data in DIR"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of all files; default: runs/demo or runs/demo-real"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything")


def run_demo(arguments: Namespace) -> None:
    """Run the whole chain on a task with a known gold score."""
    real = arguments.real is not None
    out = arguments.out or Path("runs") / ("demo-real" if real else "demo")
    check_one_process()
    out = out.absolute()
    check_writable(out)
    with hold(out):
        if real:
            task = chain.stories_task(arguments.real, arguments.seed)
        else:
            task = chain.replies_task(arguments.seed)
        print(chain.run(task, out, arguments.seed))
    print(f"models, metrics and this report are in {out}")
    if (out / PAGE).is_file():
        print(f"open {out / PAGE} in a browser")


def _add_bench(parser: ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="ops to time")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument(
        "--sweep", action="store_true", help="time growth with vocabulary, rows and length instead"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the roofline, or the growth of --sweep"
    )


def run_bench(arguments: Namespace) -> None:
    """Check the ops against float64, then time them."""
    from rlhf_core.benchmarks import common

    size, device = "sweep" if arguments.sweep else "full", device_of(arguments).type
    failed = common.run(arguments.op, size, device, arguments.json, arguments.plot)
    if failed:
        sys.exit(f"rlhf-core bench: {failed} cases gave wrong results and were not timed")


def run_info(arguments: Namespace) -> None:
    """Print versions, backends and CPU features."""
    for name, version in versions().items():
        print(name, version or "not installed")
    print(f"{platform.platform()}, {torch.get_num_threads()} threads")
    backends.report()
    try:
        from rlhf_core import cpp
    except ImportError:
        return
    for name, value in cpp.cpu_features().items():
        print(f"CPU {name}: {value}")


COMMANDS = {
    "demo": Command(_add_demo, run_demo),
    "bench": Command(_add_bench, run_bench),
    "info": Command(lambda parser: None, run_info),
}
