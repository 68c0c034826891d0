"""Runs the comparison: every side in a process of its own, taking turns step by step; a Markdown table, and JSON.

    OMP_NUM_THREADS=2 python -m benchmarks.peers --ppo-python PY --json peers.json

It needs `pip install trl==1.16.0`; PY is the Python of an environment with trl==1.12.0, the last that had PPO.
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

from benchmarks.peers.task import METHODS, Task

SIDES = ("ours", "theirs", "bare")
VOCAB_SIZES = (50257, 4096)
BARS = {  # method -> least ratio of TRL's time to ours, by vocabulary
    "sft": {50257: 3.5, 4096: 1.2},
    "dpo": {50257: 5, 4096: 2},
    "reward": {50257: 1.15, 4096: 1.15},
    "ppo": {50257: 1.8, 4096: 1.5},
}
BARE_BARS = {"sft": 1.0, "dpo": 1.0, "reward": 1.0, "ppo": 1.3}
MEMORY_BAR = 0.7  # most, of TRL's
LOSS_TOLERANCE = 1e-4  # PPO is apart by some 2e-5: TRL whitens with n - 1, ours and bare with n
PACKAGES = ("trl", "transformers", "torch", "rlhf_core")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--vocab-sizes", nargs="+", type=int, default=VOCAB_SIZES)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument(
        "--rounds", type=int, default=7, help="steps timed, after one that warms up"
    )
    parser.add_argument(
        "--ppo-python", default=sys.executable, help="an interpreter with trl==1.12.0"
    )
    parser.add_argument(
        "--json", type=Path, help="write what was measured, and the settings, to this file"
    )
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(*arguments.worker)
    results = []
    print("\n".join(HEAD))
    for method in arguments.methods:
        for vocab_size in arguments.vocab_sizes:
            python = arguments.ppo_python if method == "ppo" else sys.executable
            results.append(compare(method, vocab_size, arguments.sides, arguments.rounds, python))
            print(row(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def compare(method: str, vocab_size: int, sides, rounds: int, python: str, **settings) -> dict:
    """Times in seconds, losses and bytes of every side, over the same steps, in turns."""
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
                for i in range(len(sides)):  # another one goes first in every round
                    workers[sides[(number + i) % len(sides)]].step()
            measured = {side: worker.end() for side, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.process.kill()
                worker.process.wait()
    return {
        "method": method,
        "vocab_size": vocab_size,
        "settings": task.__dict__ | {"folder": ""},
        "sides": measured,
    }


class Worker:
    """The process of one side. It reports when it is ready and after each step, and waits to be told to go on."""

    def __init__(self, python: str, side: str, file: Path):
        command = [python, "-P", "-m", "benchmarks.peers", "--worker", side, str(file)]
        self.log = file.with_name(f"{side}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(),
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
            "losses": [step["loss"] for step in self.steps],
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
    """That of this process, offline, with the threads said."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return {"OMP_NUM_THREADS": "2", **os.environ, **quiet, "TRL_EXPERIMENTAL_SILENCE": "1"}


def work(side: str, file: str) -> None:
    """Train as `side`, in turns with the others."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers print goes where it disturbs nobody
    train = importlib.import_module(f"benchmarks.peers.{side}").train
    started = math.nan

    def turn(loss: float) -> None:
        nonlocal started
        report = {"seconds": time.perf_counter() - started, "loss": loss, "peak": status("VmHWM")}
        if math.isnan(started):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            report = {"resident": status("VmRSS"), "versions": versions()}
        print(json.dumps(report), file=reports, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("nobody waits for another step")
        started = time.perf_counter()

    train(Task.load(file), turn)


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
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
    """A line of the table. Times are medians of the steps after the first."""
    method, vocab_size, sides = result["method"], result["vocab_size"], result["sides"]
    seconds = {name: statistics.median(side["seconds"][1:]) for name, side in sides.items()}
    training = {name: side["peak_bytes"] - side["ready_bytes"] for name, side in sides.items()}
    total = {name: side["peak_bytes"] for name, side in sides.items()}
    ours = sides["ours"]["seconds"][1:]
    quarters = statistics.quantiles(ours, n=4) if len(ours) > 1 else [ours[0]] * 3

    def time_of(name):
        return f"{seconds[name]:.3g}" if name in seconds else ""

    def ratio(name, bar):
        if name not in seconds:
            return ""
        value = seconds[name] / seconds["ours"]
        return f"{value:.2f} ({bar}{'' if value >= bar else ', missed'})"

    def memory(values):
        share = f"{values['ours'] / values['theirs']:.2f}" if "theirs" in values else ""
        missed = " missed" if share and values["ours"] > MEMORY_BAR * values["theirs"] else ""
        return f"{values['ours'] / 1e6:.0f} | {share}{missed}"

    bar = BARS[method].get(vocab_size, math.nan)
    return (
        f"| {method}, {vocab_size} | {time_of('ours')} | {(quarters[2] - quarters[0]) / seconds['ours']:.0%} "
        f"| {time_of('theirs')} | {time_of('bare')} | {ratio('theirs', bar)} | {ratio('bare', BARE_BARS[method])} "
        f"| {memory(training)} | {memory(total)} | {agreement(result)} |"
    )


def agreement(result: dict) -> str:
    """Whether the first losses are equal, by how much not, and how far the last are apart."""
    losses = {name: side["losses"] for name, side in result["sides"].items()}
    first, last = (max(abs(x[i] - losses["ours"][i]) for x in losses.values()) for i in (0, -1))
    # PPO samples from the second step on.
    apart = (
        f"first {first:.1e}" if result["method"] == "ppo" else f"first {first:.1e}, last {last:.1e}"
    )
    return apart if first <= LOSS_TOLERANCE else f"DIFFER: {apart}"


if __name__ == "__main__":
    main()
