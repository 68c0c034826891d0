"""Timing that the benchmarks share: all variants of a case take turns, so that a busy machine hurts them alike.

`python benchmarks/bench_<op>.py` prints the table; `pytest benchmarks --benchmark-only` records the same
numbers with pytest-benchmark. No timing is ever asserted.

glibc hands a large tensor back to the system and gets it page by page again, which can cost more than the op. Run with
`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` to let it keep the memory, as other allocators do: that times
the kernels alone, and helps the baselines most.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

OURS, FLOOR = "rlhf_core", "floor"


def quartiles(variants: dict[str, Callable], rounds: int = 9) -> dict[str, list[float]]:
    """Quartiles of the seconds per call of each variant; calls shorter than a millisecond are timed in bundles."""
    bundle = {}
    for name, call in variants.items():
        call()  # compiles, allocates
        start = time.perf_counter()
        call()
        bundle[name] = max(1, int(1e-3 / (time.perf_counter() - start)))
    samples = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            for _ in range(bundle[name]):
                call()
            samples[name].append((time.perf_counter() - start) / bundle[name])
    return {name: statistics.quantiles(times, n=4) for name, times in samples.items()}


def report(variants: dict[str, Callable], num_bytes: int) -> dict[str, float]:
    """What one row of the table says: ours in ms (median, and interquartile range over it) and GB/s, floor / ours, and
    baseline / ours for every baseline."""
    times = quartiles(variants)
    seconds = {name: median for name, (_, median, _) in times.items()}
    ours, (low, _, high) = seconds[OURS], times[OURS]
    row = {"ms": ours * 1e3, "spread": (high - low) / ours, "GB/s": num_bytes / ours / 1e9}
    for name, value in seconds.items():
        if name == FLOOR:
            row["of floor"] = value / ours
        elif name != OURS:
            row[f"x {name}"] = value / ours
    return row


def run(benchmark, variants: dict[str, Callable], num_bytes: int) -> None:
    """One case under pytest-benchmark: it times ours, `report` goes to extra_info."""
    benchmark.extra_info.update(report(variants, num_bytes))
    benchmark.pedantic(variants[OURS], rounds=5, warmup_rounds=1)


def table(cases: dict[str, Callable]) -> None:
    """Print a Markdown table; a case is a function that returns (variants, num_bytes)."""
    command = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_")] + ["python", *sys.argv]
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; `{' '.join(command)}`\n")
    header = None
    for name, case in cases.items():
        row = report(*case())
        if header is None:
            header = list(row)
            print("| case | " + " | ".join(header) + " |\n|---|" + "---:|" * len(header))
        numbers = (f"{row[key]:.{3 if row[key] < 1 else 1}f}" for key in header)
        print(f"| {name} | " + " | ".join(numbers) + " |", flush=True)


def cpu_name() -> str:
    from rlhf_core import cpp

    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model} ({cpp.isa()})"
