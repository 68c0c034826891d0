"""`make gpu`: the checks that need a GPU, in under 8 minutes.

These are the op tests on CUDA, compute-sanitizer's memcheck and racecheck over small shapes, and
all benchmarks. Each part is a process with a time limit. Its result is written to
<results>/<gpu>.json when it ends. A part that passed with the same sources is not repeated, so that
an interrupted run can continue. <results>/<gpu>.md is the table.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_core.benchmarks import OPS, common

# It compiles for GPUs that need not be present, so that any machine can run it.
AHEAD_OF_TIME = "tests/test_kernels.py::test_triton_kernels_compile_for_every_gpu"
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

    found = {
        "tests": Part(tests(*(f"ops/test_{op}" for op in OPS), "test_kernels"), 140),
        "tests of torch.compile": Part(tests("test_compiled"), 60),
    }
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
    for op, seconds in zip(OPS, (60, 36, 26, 18, 14, 18, 18)):
        found[f"bench {op}"] = Part(python(f"bench({op!r}, {size!r}, {device!r})"), seconds)
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


def run(root: Path, results: Path, size: str = "full", device: str = "cuda") -> int:
    """Run the parts that have not passed yet. Returns how many failed."""
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
        if part["sources"] == sources and part["status"] != "failed"
    }
    results.mkdir(parents=True, exist_ok=True)
    for name, part in parts(root, size, device).items():
        if name not in done:
            print(f"{name} ...", flush=True)
            done[name] = {"sources": sources, **run_part(part)}
            path.write_text(json.dumps({"machine": machine, "parts": done}, indent=1) + "\n")
        print(
            f"{name}: {done[name]['status']} ({done[name]['seconds']} s)",
            *done[name].get("log", ()),
            sep="\n",
        )
    path.with_suffix(".md").write_text(markdown(machine, done))
    print(
        f"\n{path.with_suffix('.md').read_text()}\nwritten to {path} and {path.with_suffix('.md')}"
    )
    return sum(part["status"] == "failed" for part in done.values())


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
        with open(Path(folder, "log"), "w+") as log:
            try:
                code = subprocess.run(
                    part.command,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=part.seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {part.seconds} s"
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
            lines += ["", f"## {name}", "", common.table(part["rows"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device, and torch sees none")
    repository = Path(sys.argv[1])
    sys.exit(run(repository, repository / "benchmarks" / "results"))
