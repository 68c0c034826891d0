"""Trains the same tasks with rlhf_core, TRL and a bare loop. Prints time and memory as a table.

    OMP_NUM_THREADS=2 python -m benchmarks.peers --ppo-python PY --json peers.json

Each side is a process of its own, and they take turns step by step. This needs `pip install
trl==1.16.0`. PY is the Python of an environment with rlhf_core and trl==1.12.0, the last version
with PPO. With `--model-size 0.5b` it trains adapters of 0.5 B weights, see half_billion.py; both
environments then need peft.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers import ROOT, half_billion
from benchmarks.peers.cells import judged, memory
from benchmarks.peers.task import METHODS, Task

SIDES = ("ours", "theirs", "bare")
VOCAB_SIZES = (50257, 4096)
BARS = {  # lowest ratio of TRL's time to ours, by method and vocabulary
    "sft": {50257: 3.5, 4096: 1.2},
    "dpo": {50257: 5, 4096: 2},
    "reward": {50257: 1.15, 4096: 1.15},
    "ppo": {50257: 1.8, 4096: 1.5},
}
BARE_BARS = {"sft": 1.0, "dpo": 1.0, "reward": 1.0, "ppo": 1.3}
LOSS_TOLERANCE = 1e-4  # PPO differs by some 2e-5: TRL whitens with n - 1, the others with n
PACKAGES = ("trl", "transformers", "torch", "rlhf_core")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model-size",
        choices=("small", "0.5b"),
        default="small",
        help="a GPT-2 of 4 layers, or adapters of a Qwen2.5-0.5B; default: small",
    )
    every = list(dict.fromkeys((*METHODS, *half_billion.METHODS)))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=every,
        help="default: all; reward for small only, dpo-cached and grpo for 0.5b only",
    )
    parser.add_argument(
        "--vocab-sizes", nargs="+", type=int, help="default: 50257 4096; 0.5b: 151936"
    )
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, help="default: all; ours is required"
    )
    parser.add_argument(
        "--rounds", type=int, help="timed steps, after a warm-up; default: 7, with 0.5b 1"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16"),
        default=("float32", "bfloat16"),
        help="of 0.5b; default: both",
    )
    parser.add_argument(
        "--layers", type=int, default=24, help="of 0.5b, fewer for a quick look; default: 24"
    )
    parser.add_argument(
        "--ppo-python",
        default=sys.executable,
        help="interpreter with rlhf_core and trl==1.12.0; default: this one",
    )
    parser.add_argument("--json", type=Path, help="write all figures and settings to this file")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(*arguments.worker)
    if "ours" not in arguments.sides:
        parser.error("--sides needs ours, with which the others are compared")
    large = arguments.model_size == "0.5b"
    known = half_billion.METHODS if large else METHODS
    methods = arguments.methods or known
    if unknown := set(methods) - set(known):
        parser.error(f"--model-size {arguments.model_size} has no {', '.join(sorted(unknown))}")
    results = compare_large(arguments, methods) if large else compare_small(arguments, methods)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def compare_large(arguments: argparse.Namespace, methods) -> list[dict]:
    """Print the table of adapters of 0.5 B weights; returns its figures."""
    results, sides = [], {method: ["ours"] for method in methods}
    for method in methods if "theirs" in arguments.sides else ():
        missing = lacking(python_of(method, arguments), method)
        for name in missing:
            print(f"{name} is not installed, so TRL is left out of {method}")
        sides[method] += ["theirs"] * (not missing)
    print("\n".join(half_billion.HEAD))
    for method in methods:
        python = python_of(method, arguments)
        for dtype in arguments.dtypes:
            for vocab_size in arguments.vocab_sizes or (151936,):
                name, settings = half_billion.settings_of(method, dtype)
                settings |= dict(num_layers=arguments.layers)
                rounds = arguments.rounds or 1
                result = compare(name, vocab_size, sides[method], rounds, python, **settings)
                result |= dict(method=method, dtype=dtype, layers=arguments.layers)
                results.append(result)
                print(half_billion.row(result), flush=True)
    return results


def compare_small(arguments: argparse.Namespace, methods) -> list[dict]:
    """Print the table of the GPT-2; returns its figures."""
    results = []
    print("\n".join(HEAD))
    for method in methods:
        for vocab_size in arguments.vocab_sizes or VOCAB_SIZES:
            rounds = arguments.rounds or 7
            python = python_of(method, arguments)
            results.append(compare(method, vocab_size, arguments.sides, rounds, python))
            print(row(results[-1]), flush=True)
    return results


def python_of(method: str, arguments: argparse.Namespace) -> str:
    return arguments.ppo_python if method == "ppo" else sys.executable


def lacking(python: str, method: str) -> list[str]:
    """Packages that TRL's side of 0.5 B weights needs and an interpreter does not have."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"

    def found(name: str) -> bool:
        run = subprocess.run([python, "-c", find, name], stderr=subprocess.DEVNULL)
        return run.returncode == 0

    names = "trl.experimental.ppo" if method == "ppo" else "trl", "peft"
    return [name for name in names if not found(name)]


def compare(method: str, vocab_size: int, sides, rounds: int, python: str, **settings) -> dict:
    """Seconds, losses and memory of every side over the same steps, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        batch_size = 16 if method == "ppo" else 8
        task = Task(
            method, folder, vocab_size, **{"batch_size": batch_size, "steps": rounds + 1} | settings
        )
        task.write()
        file = Path(folder, "task.json")
        task.save(file)
        workers = {side: Worker(python, side, file) for side in sides}
        try:
            for number in range(task.steps):
                for i in range(len(sides)):  # each round starts with another side
                    workers[sides[(number + i) % len(sides)]].step()
            measured = {side: worker.end() for side, worker in workers.items()}
            large = task.lora_rank > 0
            flop = half_billion.arithmetic(task) if large else None
            bytes_read = half_billion.reading(task) if large else None
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()
    return {
        "method": method,
        "vocab_size": vocab_size,
        "settings": task.__dict__ | {"folder": ""},
        "flop": flop,
        "bytes_read": bytes_read,
        "sides": measured,
    }


class Worker:
    """The process of one side. It reports when it is ready and after each step, and then waits."""

    def __init__(self, python: str, side: str, file: Path):
        command = [python, "-m", "benchmarks.peers", "--worker", side, str(file)]
        self.log = file.with_name(f"{side}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
                cwd=ROOT,
            )
        self.steps = []
        self.ready = self.read()

    def step(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self.read())

    def end(self) -> dict:
        self.process.communicate("go\n")
        return {
            "seconds": [step["seconds"] for step in self.steps],
            "cpu_seconds": [step["cpu"] for step in self.steps],
            "losses": [step["loss"] for step in self.steps],
            "rates": [step["rates"] for step in self.steps if "rates" in step],
            "ready_bytes": self.ready["resident"],
            "peak_bytes": max(step["peak"] for step in self.steps),
            "versions": self.ready["versions"],
        }

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended:\n{self.log.read_text()[-4000:]}")
        return json.loads(line)


def environment() -> dict[str, str]:
    """The environment of this process, offline and quiet, with two threads by default."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return {"OMP_NUM_THREADS": "2", **os.environ, **quiet, "TRL_EXPERIMENTAL_SILENCE": "1"}


def work(side: str, file: str) -> None:
    """Train as `side`, in turns with the others."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of the trainers must not mix with the reports
    train = importlib.import_module(f"benchmarks.peers.{side}").train
    task = Task.load(file)
    started = cpu_started = math.nan

    def turn(loss: float) -> None:
        nonlocal started, cpu_started
        report = {"seconds": time.perf_counter() - started, "loss": loss, "peak": status("VmHWM")}
        report["cpu"] = time.process_time() - cpu_started
        if math.isnan(started):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            report = {"resident": status("VmRSS"), "versions": versions()}
        elif task.lora_rank and side == "ours":
            report["rates"] = half_billion.machine_rates(task)
        print(json.dumps(report), file=reports, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("the comparison has ended")
        started, cpu_started = time.perf_counter(), time.process_time()

    train(task, turn)


def status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) * 1024


def versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name)
        for name in PACKAGES
        if name.replace("-", "_") in sys.modules
    }


HEAD = (
    "| method, V | ours, s | spread | TRL, s | bare, s | TRL / ours (bar) | bare / ours (bar) "
    "| memory of training, MB | / TRL's | in all, MB | / TRL's | losses |",
    "|---|" + "---:|" * 10 + "---|",
)


def row(result: dict) -> str:
    """A row of the table. Times are medians of the steps after the first."""
    method, vocab_size, sides = result["method"], result["vocab_size"], result["sides"]
    seconds = {name: statistics.median(side["seconds"][1:]) for name, side in sides.items()}
    ours = sides["ours"]["seconds"][1:]
    quarters = statistics.quantiles(ours, n=4) if len(ours) > 1 else [ours[0]] * 3

    def time_of(name):
        return f"{seconds[name]:.3g}" if name in seconds else ""

    def ratio(name, bar):
        return judged(seconds[name] / seconds["ours"], bar) if name in seconds else ""

    bar = BARS[method].get(vocab_size, math.nan)
    cells = [f"{method}, {vocab_size}", time_of("ours")]
    cells += [f"{(quarters[2] - quarters[0]) / seconds['ours']:.0%}"]
    cells += [time_of("theirs"), time_of("bare")]
    cells += [ratio("theirs", bar), ratio("bare", BARE_BARS[method]), *memory(sides)]
    return f"| {' | '.join(cells)} | {agreement(result)} |"


def agreement(result: dict) -> str:
    """Largest differences of the first and the last losses; DIFFER if the first are not equal."""
    losses = {name: side["losses"] for name, side in result["sides"].items()}
    first, last = (max(abs(x[i] - losses["ours"][i]) for x in losses.values()) for i in (0, -1))
    # PPO samples from the second step on.
    apart = (
        f"first {first:.1e}" if result["method"] == "ppo" else f"first {first:.1e}, last {last:.1e}"
    )
    return apart if first <= LOSS_TOLERANCE else f"DIFFER: {apart}"


if __name__ == "__main__":
    main()
