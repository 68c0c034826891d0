"""Timing, tables and pictures that the benchmarks share.

Before anything is timed, our op is compared with float64 on the tensors of the timing.
Then all variants take turns, so that other load on the machine slows all of them. The table has
medians and their ratios to ours; a ratio below 1 is a slow-down. No timing is ever asserted: a bar
is met or missed.

glibc returns a large tensor to the system and then gets the memory back page by page, which can
cost more than the op. `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` makes it keep the
memory, like other allocators. Then the kernels alone are timed, which helps the baselines most.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_core.files import write_json

OURS, FLOOR, AVX2, MEMORY = "rlhf_core", "floor", "avx2", "memory"
# Relative, by the dtype of the result.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Shape(NamedTuple):
    """A shape to time instead of our own: B sequences of T tokens, V logits, hidden width D."""

    B: int
    T: int
    V: int
    dtype: str
    D: int | None = None

    def check_memory(self, op: str, device: str, baseline: bool = False) -> None:
        """Raise ValueError if the case of an op may need more memory than is free.

        Args:
            baseline: whether a baseline runs, which makes up to eight float32 tensors of all
                logits. Ours makes the inputs, the gradient and the truth of some rows.
        """
        rows = self.B * (1 if op == "sampling" else self.T)
        logits = rows * (1 if op in ("gae", "policy_loss") else self.V)
        width, weights = getattr(torch, self.dtype).itemsize, self.V * (self.D or 0)
        needed = (6 * width + 32 * baseline) * logits + (6 * width + 24) * weights + 8192 * self.V
        free = free_memory(device)
        if needed > free:
            raise ValueError(
                f"{op} at shape {' '.join(map(str, self[:3]))} in {self.dtype} needs up to "
                f"{needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free. Choose a smaller shape"
            )


Size = str | Shape


@dataclasses.dataclass
class Case:
    """One problem, solved by several variants.

    Attributes:
        variants: OURS, the baselines, and FLOOR: the least time that the hardware needs.
        truth: the result in float64, maybe for some rows only: `rows` picks them from a result.
        compare: raises AssertionError if a part of our result is too far from the truth.
        check: the same for our whole result, where truth is not enough.
        bytes: memory traffic, or
        flop: operations of the matrix products.
        bars: lowest ratio to ours, for some of the variants.
        h200_ms: target on an H200, derived from published figures of other kernels.
        peaks: the baselines whose peak memory is measured; that of the first is compared with ours.
        avx2: also time the AVX2 code on a CPU with AVX-512.
        latency: time on the wall clock, also on a GPU.
        grows: in a sweep, the panel of the picture and the position on its x axis.
    """

    variants: dict[str, Callable[[], object]]
    truth: Callable[[], Sequence[Tensor]] | None = None
    rows: slice | Tensor | None = None
    compare: Callable[[Tensor, Tensor], None] | None = None
    check: Callable[[Any], None] | None = None
    bytes: int = 0
    flop: int = 0
    bars: dict[str, float] = dataclasses.field(default_factory=dict)
    h200_ms: float | None = None
    peaks: Sequence[str] = ()
    avx2: bool = False
    latency: bool = False
    grows: tuple[str, int] | None = None

    def checked(self) -> Any:
        """Our result. AssertionError if it is wrong."""
        result = self.variants[OURS]()
        if self.check is not None:
            self.check(result)
        for got, want in self.pairs(result):
            (self.compare or assert_close)(got, want)
        return result

    def error(self, result: Any) -> float | None:
        """The largest difference from the truth, relative to the truth's largest value."""
        pairs = [(got.double(), want) for got, want in self.pairs(result)]
        if not pairs or any(got.shape != want.shape for got, want in pairs):
            return None  # a baseline that computes something else
        return max(
            float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
            for got, want in pairs
        )

    def pairs(self, result: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of a result, each with its truth."""
        parts = result if isinstance(result, tuple | list) else [result]
        for part, truth in zip(parts, self.exact):
            want = torch.atleast_1d(truth.detach())
            got = torch.as_tensor(part).detach().reshape(-1, *want.shape[1:])
            yield (got if len(got) <= len(want) else got[self.rows]), want

    @functools.cached_property
    def exact(self) -> Sequence[Tensor]:
        return self.truth() if self.truth is not None else ()


def cases(op: str, size: Size, device: str) -> dict[str, Callable[[], Case]]:
    """An op's cases by name.

    Args:
        size: "full", "sweep" (how the cost grows), "tiny" (small enough for a test), or a shape.
    """
    return importlib.import_module(f"rlhf_core.benchmarks.bench_{op}").cases(size, device)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- parts of cases


def assert_close(got: Tensor, truth: Tensor) -> None:
    """Compare within the rounding of got's dtype. NaN is never close."""
    rtol = TOLERANCES[got.dtype]
    torch.testing.assert_close(got.double(), truth.double(), rtol=rtol, atol=1e-5)


def some_rows(count: int, most: int = 256) -> slice:
    """At most `most` of `count` rows, evenly spaced. A check of all of them would take too long."""
    return slice(None, None, -(-count // most))


def traffic(num_bytes: int, device: str) -> Callable[[], object]:
    """The floor of a memory-bound op: a sum over the bytes, or on a GPU a copy that moves them."""
    if device == "cuda":
        source, target = torch.ones(2, num_bytes // 2, dtype=torch.uint8, device=device).unbind()
        return lambda: target.copy_(source)
    words = num_bytes // 4
    buffer = torch.ones(min(words, 2**26))
    times, rest = divmod(words, len(buffer))
    return lambda: ([buffer.sum() for _ in range(times)], buffer[:rest].sum())


def call_and_grad(
    f: Callable, inputs: Iterable[Tensor], *upstream: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs f() and returns its first results with the gradients of the inputs.

    upstream: the gradient of each result that counts. None: of the first result, a scalar.
    """
    inputs = list(inputs)

    def run():
        out = f()
        out = (out if isinstance(out, tuple) else (out,))[: len(upstream) or 1]
        return *out, *torch.autograd.grad(out, inputs, upstream or None)

    return run


def compiled(f: Callable) -> Callable:
    return torch.compile(f, dynamic=False)


def peer(module: str):
    """A package to compare with, or None if it is not installed; then `missing` lists it."""
    return (
        importlib.import_module(module) if importlib.util.find_spec(module.split(".")[0]) else None
    )


def missing(device: str) -> list[str]:
    wanted = {"liger_kernel": "liger-kernel"} if device == "cuda" else {}
    return [
        package for module, package in wanted.items() if importlib.util.find_spec(module) is None
    ]


def free_memory(device: str) -> int:
    """Bytes that can still be allocated."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    try:
        with open("/proc/meminfo") as file:
            return next(int(x.split()[1]) * 1024 for x in file if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- timing


class Twin:
    """The variants of a case in a process of its own, with other environment variables."""

    def __init__(self, environment: Mapping[str, str], *what: str | Size):
        context = multiprocessing.get_context("spawn")  # a fork lacks the threads of OpenMP
        self.pipe, other = context.Pipe()
        process = context.Process(
            target=_twin, args=(other, torch.get_num_threads(), *what), daemon=True
        )
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        other.close()

    def call(self, variant: str) -> None:
        self.pipe.send((variant, False))
        self.pipe.recv()

    def peak_bytes(self, variant: str) -> int | None:
        self.pipe.send((variant, True))
        return self.pipe.recv()


def _twin(pipe, threads: int, op: str, size: Size, name: str) -> None:
    torch.set_num_threads(threads)
    variants = cases(op, size, "cpu")[name]().variants
    with contextlib.suppress(EOFError):  # the other end is closed
        while True:
            variant, peak = pipe.recv()
            if peak:
                pipe.send(_resident_peak(variants[variant]))
            else:
                variants[variant]()
                pipe.send(None)


def _resident_peak(call: Callable) -> int | None:
    """Growth of the process's resident memory in a second call, in bytes. None if unknown."""

    def resident(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    call()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        call()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _cuda_peak(call: Callable) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def quartiles(
    variants: dict[str, Callable], device: str, latency: bool, rounds: int = 9
) -> dict[str, list[float]]:
    """Quartiles of the seconds per call of each variant."""
    timers = {
        name: (_device_timer if device == "cuda" and not latency else _timer)(f)
        for name, f in variants.items()
    }
    samples = {name: [] for name in variants}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer())
    return {name: statistics.quantiles(times, n=4) for name, times in samples.items()}


def _timer(call: Callable) -> Callable[[], float]:
    """Wall time per call. Calls shorter than a millisecond are timed in bundles."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    seconds(1)  # compiles, allocates
    bundle = max(1, int(1e-3 / seconds(1)))
    return lambda: seconds(bundle)


def _device_timer(call: Callable) -> Callable[[], float]:
    """Time between two events on the GPU, with a cold L2 cache.

    The GPU waits up to 5 ms while launches are queued. A longer queue is timed as it arrives.
    """
    cache = torch.empty(
        2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda"
    )
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):  # compiles, allocates
        call()
    torch.cuda.synchronize()
    queued = time.perf_counter()
    call()
    cycles = int(2e9 * min(2 * (time.perf_counter() - queued), 5e-3))

    def seconds() -> float:
        cache.zero_()
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def measure(op: str, name: str, case: Case, size: Size, device: str) -> dict:
    """Check a case and time it. Returns a row of the table that JSON can hold."""
    errors = {OURS: case.error(case.checked())}
    variants = dict(case.variants)
    failed = {}
    for baseline in [name for name in variants if name != OURS]:
        try:
            if isinstance(size, Shape) and baseline != FLOOR:
                size.check_memory(op, device, baseline=True)
            result = variants[baseline]()
            errors |= {} if baseline == FLOOR else {baseline: case.error(result)}
        except Exception as error:  # another version of a package, or no compiler
            failed[baseline] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            del variants[baseline]
    result = None
    vars(case).pop("exact", None)  # gives its memory back
    times = quartiles(variants, device, case.latency)
    seconds = {name: median for name, (_, median, _) in times.items()}
    ours, (low, _, high) = seconds[OURS], times[OURS]
    ratios = {name: value / ours for name, value in seconds.items() if name != OURS}
    # Last, because the threads of the other process spin.
    if case.avx2 and device == "cpu" and "avx512" in machine(device)["backend"]:
        twin = Twin({"RLHF_CORE_CPU_ISA": "avx2"}, op, size, name)
        pair = {OURS: variants[OURS], AVX2: functools.partial(twin.call, OURS)}
        pair = quartiles(pair, device, case.latency)
        seconds[AVX2], ratios[AVX2] = pair[AVX2][1], pair[AVX2][1] / pair[OURS][1]
    row = {
        "op": op,
        "case": name,
        "check": "passed",
        "ms": {k: v * 1e3 for k, v in seconds.items()},
    }
    row["quartiles ms"] = {k: [low * 1e3, high * 1e3] for k, (low, _, high) in times.items()}
    row |= {"spread": (high - low) / ours, "of floor": ratios.pop(FLOOR, None), "error": errors}
    row |= (
        {"GB/s": case.bytes / ours / 1e9}
        if case.bytes
        else {"GFLOP/s": case.flop / ours / 1e9}
        if case.flop
        else {}
    )
    peaks_of = (
        case.peaks if isinstance(size, str) else [x for x in variants if x not in (OURS, FLOOR)]
    )
    if peaks_of:
        names = [OURS, *(name for name in peaks_of if name in variants)]
        if device == "cuda":
            peaks = {name: _cuda_peak(variants[name]) for name in names}
        else:
            # Tensors of 64 KiB or more go back to the system, so that resident memory is in use.
            # One thread compiles, because more would each load torch first.
            environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            twin = Twin(environment, op, size, name)
            peaks = {name: twin.peak_bytes(name) for name in names}
        row["peak MB"] = {variant: peak and peak / 1e6 for variant, peak in peaks.items()}
        if peaks[OURS] and peaks.get(peaks_of[0]):
            ratios[MEMORY] = peaks[peaks_of[0]] / peaks[OURS]
    reached = {**ratios, FLOOR: row["of floor"]}
    row |= {
        "ratios": ratios,
        "bars": [[k, bar, reached[k] >= bar] for k, bar in case.bars.items() if reached.get(k)],
    }
    if case.h200_ms and "H200" in machine(device)["device"]:
        row["bars"].append(["ms on an H200", case.h200_ms, seconds[OURS] * 1e3 <= case.h200_ms])
    if failed:
        row["failed"] = failed
    if case.grows:
        row["grows"] = case.grows
    return row


def record(benchmark, op: str, name: str) -> None:
    """Run one case under pytest-benchmark, which times ours. The rest goes to extra_info."""
    torch.manual_seed(0)
    case = cases(op, "full", device())[name]()
    benchmark.extra_info.update(measure(op, name, case, "full", device()), **machine(device()))
    benchmark.pedantic(case.variants[OURS], rounds=5, warmup_rounds=1)
    torch._dynamo.reset()


# ---- what `rlhf-core bench` does


def run(
    ops: Iterable[str],
    size: Size,
    device: str,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    report: Callable[[list[dict]], str] | None = None,
) -> int:
    """Print a table for each op and write JSON and a picture. Returns how many checks failed.

    report: the text about the rows of an op; None: `table`.
    """
    if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("a picture needs matplotlib: pip install 'rlhf-core[report]'")
    rows = []
    print("; ".join(f"{key} {value}" for key, value in machine(device).items()))
    print(f"load average at the start {os.getloadavg()[0]:.1f}; other load distorts the figures")
    settings = (f"{key}={value}" for key, value in os.environ.items() if key.startswith("MALLOC_"))
    program = Path(sys.argv[0]).name.replace("__main__.py", "rlhf-core")  # of python -m rlhf_core
    print(f"`{' '.join([*settings, program, *sys.argv[1:]])}`")
    for package in missing(device):
        print(f"not compared with {package}: it is not installed")
    for op in ops:
        for name, make in cases(op, size, device).items():
            print(f"{op} {name} ...", file=sys.stderr, flush=True)
            torch.manual_seed(0)
            try:
                rows.append(measure(op, name, make(), size, device))
            except (AssertionError, torch.OutOfMemoryError) as error:
                rows.append({"op": op, "case": name, "check": f"{type(error).__name__}: {error}"})
            torch._dynamo.reset()
            if json_path is not None:  # after every case, so that a stopped run keeps its rows
                write_json(json_path, {"machine": machine(device), "rows": rows})
        if found := [row for row in rows if row["op"] == op]:
            print(f"\n### {op}\n\n{(report or table)(found)}", flush=True)
    if plot_path is not None:
        plot([row for row in rows if "ms" in row], machine(device)["device"], plot_path)
    return sum(row["check"] != "passed" for row in rows)


def table(rows: list[dict]) -> str:
    """A Markdown table. A case that failed its check has no figures."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("ratios", {})))
    header = ["case", "ms", "spread", "rate", "of floor", *(f"x {name}" for name in names), "bars"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 2) + "---|"]
    for row in rows:
        cells = [row["case"]]
        if row["check"] == "passed":
            rate = next(
                (f"{digits(row[unit])} {unit}" for unit in ("GB/s", "GFLOP/s") if unit in row), ""
            )
            cells += [
                digits(row["ms"][OURS]),
                f"{row['spread']:.0%}",
                rate,
                digits(row["of floor"]),
            ]
            cells += [digits(row["ratios"].get(name)) for name in names]
            notes = [
                f"{name} {bar:.3g}: {'met' if met else 'MISSED'}" for name, bar, met in row["bars"]
            ]
            notes += [f"no {name}: {error}" for name, error in row.get("failed", {}).items()]
            cells.append("; ".join(notes))
        else:
            cells += ["not timed"] + [""] * (len(header) - 3) + [" ".join(row["check"].split())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits(x: float | None) -> str:
    """Three digits or so of a figure; "" for None."""
    return "" if x is None else f"{x:.{3 if x < 1 else 1 if x < 100 else 0}f}"


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Draw the growth of time for a sweep, or else the roofline: speed relative to the floor."""
    from matplotlib.figure import Figure

    panels = {}
    for row in rows:
        if row["of floor"]:
            panels.setdefault(row["grows"][0] if "grows" in row else row["op"], []).append(row)
    columns = min(len(panels), 2 if len(panels) < 5 else 3) if rows and "grows" in rows[0] else 1
    lines = -(-len(panels) // columns)
    heights = (
        [1.2 + 0.3 * len(panel) for panel in panels.values()] if columns == 1 else [3.4] * lines
    )
    figure = Figure(
        figsize=(9 if columns == 1 else 4.2 * columns, sum(heights)), layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False, height_ratios=heights).ravel()
    for ax, (name, panel) in zip(axes, panels.items()):
        ax.set_title(name, fontsize=10)
        series = {}  # variant -> [(x, y)]
        for y, row in enumerate(panel):
            for variant, ms in row["ms"].items():
                if "grows" in row:
                    series.setdefault(variant, []).append((row["grows"][1], ms))
                elif variant != FLOOR:
                    series.setdefault(variant, []).append((row["ms"][FLOOR] / ms, y))
        for variant, points in series.items():
            style = {
                OURS: dict(color="black", zorder=3),
                FLOOR: dict(color="gray", ls="--", marker=""),
            }.get(variant, {})
            ax.plot(
                *zip(*points),
                **{"marker": "o", "ms": 5, "ls": "-" if "grows" in row else "", **style},
                label=variant,
            )
        ax.set_xscale("log", base=2 if "grows" in row else 10)
        if "grows" in row:
            ax.set_yscale("log")
            ax.set_ylabel("ms")
            ax.set_xlabel(name.split(",")[0])
        else:
            ax.axvline(1, color="gray", ls="--")
            ax.set_yticks(range(len(panel)), [row["case"] for row in panel], fontsize=8)
            ax.invert_yaxis()
            ax.set_xlabel(
                "speed relative to the measured roof (memory traffic or matrix products alone)"
            )
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def machine(device: str) -> dict[str, object]:
    """Hardware and versions that figures depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {
        name: importlib.metadata.version(name)
        for name in ("numpy", "triton")
        if importlib.util.find_spec(name)
    }
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), **versions, "cuda": torch.version.cuda}
    from rlhf_core import backends

    try:
        with open("/proc/cpuinfo") as file:
            model = next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        model = platform.processor() or "CPU"
    impl = backends.resolve(None, torch.zeros(1))
    backend = "reference" if impl is None else f"{impl.__name__} {impl.isa()}"
    return {"device": model, "backend": backend, "threads": torch.get_num_threads(), **versions}
