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
from rlhf_core.cli.arguments import Command, between, check_unused, device_of, seed
from rlhf_core.evaluation.report import PAGE
from rlhf_core.files import check_writable
from rlhf_core.locks import check_one_process, hold
from rlhf_core.training.run_file import versions

SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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
    parser.add_argument("--op", nargs="+", choices=OPS, help="ops to time; default: all")
    whole = between(int, 1)
    parser.add_argument(
        "--shape",
        type=whole,
        nargs=3,
        metavar=("B", "T", "V"),
        help="B sequences of T tokens and V logits instead of our own shapes; recommends a backend",
    )
    parser.add_argument(
        "--dtype",
        type=lambda text: SHORT.get(text, text),
        choices=tuple(SHORT.values()),
        help="of the logits at --shape, also as bf16, fp16 or fp32; default: float32",
    )
    parser.add_argument(
        "--width", type=whole, metavar="D", help="of hidden states at --shape, for linear_logprobs"
    )
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
    from rlhf_core.benchmarks import at_shape, common

    ops, device, files = arguments.op, device_of(arguments).type, (arguments.json, arguments.plot)
    if arguments.shape is None:
        check_unused(arguments, ("dtype", "width"), "needs --shape")
        size = "sweep" if arguments.sweep else "full"
        failed = common.run(ops or OPS, size, device, *files)
    else:
        if arguments.sweep:
            raise ValueError("--shape contradicts --sweep, which has shapes of its own")
        shape = common.Shape(*arguments.shape, arguments.dtype or "float32", arguments.width)
        failed = at_shape.run(ops, shape, device, *files)
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
