"""`make gpu`: the checks that need a GPU, in under 8 minutes.

These are the op tests on CUDA, all benchmarks, and compute-sanitizer's memcheck and racecheck over
small shapes. Each part is a process with a time limit. When it ends, <results>/<gpu>.json and the
table <results>/<gpu>.md are written. A part that passed with the same sources is not repeated, so
that another run does what was interrupted, failed or left out for lack of time.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_core.benchmarks import OPS, common
from rlhf_core.benchmarks.bench_linear_logprobs import ON_CHIP
from rlhf_core.files import replacing, write_json

# It compiles for GPUs that need not be present, so that any machine can run it.
AHEAD_OF_TIME = "tests/test_kernels.py::test_triton_kernels_compile_for_every_gpu"
SECONDS = 475  # of a whole run
LEAST_SECONDS = 10  # a part that has less time left does not start
NOT_RUN = "not run: no time was left"
UNFINISHED = ("failed", NOT_RUN)
SOURCES = ("rlhf_core/**/*.py", "kernels/*.py", "csrc/*", "benchmarks/*.py", "tests/**/*.py")


class Part(NamedTuple):
    command: list[str]
    seconds: int  # its time limit


def parts(root: Path, size: str, device: str) -> dict[str, Part]:
    """Every part by name, the most informative first."""

    def python(call: str) -> list[str]:
        return [
            sys.executable,
            "-c",
            f"import sys; from rlhf_core.benchmarks import gpu; sys.exit(gpu.{call})",
        ]

    def tests(*names: str) -> list[str]:
        files = (str(root / "tests" / f"{name}.py") for name in names)
        return [sys.executable, "-m", "pytest", *files, "-k", "triton", "--deselect", AHEAD_OF_TIME]

    found = {"tests": Part(tests(*(f"ops/test_{op}" for op in OPS), "test_kernels"), 180)}
    for op, seconds in zip(OPS, (60, 45, 26, 18, 14, 18, 18)):
        found[f"bench {op}"] = Part(python(f"bench({op!r}, {size!r}, {device!r})"), seconds)
    found["tests of torch.compile"] = Part(tests("test_compiled"), 60)
    sanitizer = shutil.which(
        "compute-sanitizer", path=f"{os.environ.get('PATH')}:/usr/local/cuda/bin"
    )
    for tool in ("memcheck", "racecheck"):
        command = [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            *python(f"check({device!r})"),
        ]
        found[tool] = Part(command if sanitizer else [], 45)
    return found


def check(device: str) -> int:
    """Compare ours with float64 in every small case, for the slow sanitizer. Returns 0."""
    for op in OPS:
        for name, make in common.cases(op, "tiny", device).items():
            print(op, name, flush=True)
            make().checked()
    return 0


def bench(op: str, size: str, device: str) -> int:
    return common.run([op], size, device, json_path=Path(os.environ["RLHF_CORE_BENCH_ROWS"]))


def run(
    root: Path, results: Path, size: str = "full", device: str = "cuda", seconds: float = SECONDS
) -> int:
    """Run the parts that have not passed yet, until the time is over.

    Returns: how many failed or were not run.
    """
    end = time.monotonic() + seconds
    machine = common.machine(device)
    path = results / f"{re.sub('[^a-z0-9]+', '-', machine['device'].lower()).strip('-')}.json"
    digest = hashlib.sha256()
    for file in sorted(
        file
        for pattern in SOURCES
        for file in root.glob(pattern)
        if file.suffix in (".py", ".h", ".cpp")
    ):
        digest.update(file.read_bytes())
    sources = digest.hexdigest()[:16]
    done = json.loads(path.read_text())["parts"] if path.exists() else {}
    done = {
        name: part
        for name, part in done.items()
        if part["sources"] == sources and part["status"] not in UNFINISHED
    }
    results.mkdir(parents=True, exist_ok=True)
    for name, part in parts(root, size, device).items():
        if name not in done:
            print(f"{name} ...", flush=True)
            left = end - time.monotonic()
            limited = part._replace(seconds=min(part.seconds, left))
            found = {"status": NOT_RUN, "seconds": 0} if left < LEAST_SECONDS else run_part(limited)
            done[name] = {"sources": sources, **found}
            write_json(path, {"machine": machine, "parts": done})
            with replacing(path.with_suffix(".md")) as file:
                file.write(markdown(machine, done).encode())
        print(
            f"{name}: {done[name]['status']} ({done[name]['seconds']} s)",
            *done[name].get("log", ()),
            sep="\n",
        )
    print(f"\n{markdown(machine, done)}\nwritten to {path} and {path.with_suffix('.md')}")
    return sum(part["status"] in UNFINISHED for part in done.values())


def run_part(part: Part) -> dict:
    """Status and seconds of a part, a benchmark's rows, and the last output of a failed one."""
    if not part.command:
        return {"status": "skipped: compute-sanitizer is not installed", "seconds": 0}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        # Without the caching allocator the sanitizer knows where each tensor ends.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--tool" in part.command else {}
        environment |= {**os.environ, "RLHF_CORE_BENCH_ROWS": str(rows), "PYTHONUNBUFFERED": "1"}
        with open(Path(folder, "log"), "w+", errors="replace") as log:
            process = subprocess.Popen(
                part.command,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(part.seconds)
            except subprocess.TimeoutExpired:
                code = f"stopped after {part.seconds:.0f} s"
            finally:  # what it started would slow down the next part
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            log.seek(0)
            lines = log.read().splitlines()
        found = {
            "status": "passed" if code == 0 else "failed",
            "seconds": round(time.monotonic() - start),
        }
        if (
            code != 0
            and "--tool" in part.command
            and any("Device not supported" in line for line in lines)
        ):
            return found | {
                "status": "skipped: compute-sanitizer does not support this device here"
            }
        if code != 0:
            found["log"] = [*lines[-20:], f"exit: {code}"]
        if rows.exists():
            found["rows"] = json.loads(rows.read_text())["rows"]
        return found


def markdown(machine: dict, done: dict[str, dict]) -> str:
    lines = [
        "# " + "; ".join(f"{key} {value}" for key, value in machine.items()),
        "",
        "| part | result | s |",
        "|---|---|---:|",
    ]
    lines += [f"| {name} | {part['status']} | {part['seconds']} |" for name, part in done.items()]
    for name, part in done.items():
        if "rows" in part:
            lines += ["", f"## {name}", "", common.table(part["rows"]), *winners(part["rows"])]
    return "\n".join(lines) + "\n"


def winners(rows: list[dict]) -> Iterator[str]:
    """A line for each case that keeps logits in memory or on the chip: which one is faster."""
    for row in rows:
        if ON_CHIP in row.get("ms", ()):
            ours, on_chip = row["ms"][common.OURS], row["ms"][ON_CHIP]
            times = f"{ours:.2f} ms with logits in memory, {on_chip:.2f} on chip"
            best = "memory" if ours <= on_chip else "chip"
            yield f"\n{row['case']}: {times}, so the {best} wins"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device, and torch sees none")
    repository = Path(sys.argv[1])
    sys.exit(run(repository, repository / "benchmarks" / "results"))
