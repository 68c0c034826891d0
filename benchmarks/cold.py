"""What a call of `gae` costs that follows other work, instead of itself.

`python -m rlhf_core.benchmarks.cold` times calls on (256, 1024) after each of these has been made
cold: the caches, the memory of the outputs, the threads. Conditions take turns; the table has
medians in milliseconds and the interquartile range over them.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from rlhf_core import gae

SHAPE, GAMMA, LAM = (256, 1024), 0.99, 0.95
OTHER_WORK = 2**27  # bytes, more than any cache
PAUSE = 0.02  # seconds; idle OpenMP threads fall asleep sooner


def conditions() -> dict[str, list[Callable[[], object]]]:
    """By name, what is done between an untimed call and the timed one."""
    other = torch.ones(OTHER_WORK // 4)
    caches = [other.sum]
    threads = [lambda: time.sleep(PAUSE)]
    found = {"repeated": [], "caches are cold": caches, "threads are asleep": threads}
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # gives free memory back, so that outputs get new pages
        outputs = [lambda: libc.malloc_trim(0)]
        found |= {"outputs have new pages": outputs, "all of these": caches + outputs + threads}
    return found


def calls() -> dict[str, Callable[[], object]]:
    """`gae` by kind of mask."""
    rewards, values = torch.randn(SHAPE), torch.randn(SHAPE)
    lengths = torch.randint(SHAPE[1] // 2, SHAPE[1] + 1, (SHAPE[0], 1))
    masks = {"no gaps": torch.arange(SHAPE[1]) < lengths, "gaps": torch.rand(SHAPE) < 0.7}

    def call(mask: torch.Tensor) -> Callable[[], object]:
        return lambda: gae(rewards, values, mask, gamma=GAMMA, lam=LAM)

    return {name: call(mask) for name, mask in masks.items()}


def measure(rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each condition and mask."""
    seconds: dict[tuple[str, str], list[float]] = {}
    prepared, kinds = conditions(), calls()
    for _ in range(rounds):
        for condition, steps in prepared.items():
            for kind, call in kinds.items():
                call()
                for step in steps:
                    step()
                start = time.perf_counter()
                call()
                seconds.setdefault((condition, kind), []).append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_core.benchmarks.cold", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=30, help="default: 30")
    seconds = measure(parser.parse_args().rounds)
    kinds = list(dict.fromkeys(kind for _, kind in seconds))
    print(f"| gae {SHAPE}, {torch.get_num_threads()} threads | {' | '.join(kinds)} |")
    print("|---|" + "---:|" * len(kinds))
    for condition in dict.fromkeys(condition for condition, _ in seconds):
        cells = []
        for kind in kinds:
            low, middle, high = statistics.quantiles(seconds[condition, kind], n=4)
            cells.append(f"{1e3 * middle:.2f} ({(high - low) / middle:.0%})")
        print(f"| {condition} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
