"""A run's metrics on disk, and its progress on the terminal."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_core import distributed
from rlhf_core.files import naming, open_for_append, replacing
from rlhf_core.training import checkpoint

TIMINGS = "timings.jsonl"  # apart from the metrics, which a repeated run gives bit by bit
SAMPLES = "samples.jsonl"
OnStep = Callable[[dict[str, Any], int], object]  # metrics of a step or round, and its number


class RunLog:
    """Writes metrics, timings and samples to `out`; shows a progress bar or plain lines."""

    def __init__(
        self,
        algorithm: str,
        config: dict[str, Any],
        out: Path | None,
        *,
        main_metric: str,
        steps_done: int,
        total_steps: int,
        quiet: bool = False,
    ):
        """
        Args:
            config: the options of the run.
            out: folder of the file; None writes none.
            main_metric: the metric on the terminal.
            steps_done: steps before this process, whose lines are kept.
            quiet: show nothing on the terminal.
        """
        self.algorithm, self.config, self.out = algorithm, config, out
        self.main_metric, self.steps_done, self.total_steps = main_metric, steps_done, total_steps
        self.quiet, self.file, self.bar = quiet, None, None
        self.history: list[dict[str, float]] = []  # of the steps done before
        self.started = time.monotonic()

    def __enter__(self) -> RunLog:
        if self.out is not None:
            self._keep_steps_done(self.out / "metrics.jsonl")
            self.file = open_for_append(self.out / "metrics.jsonl")
            for name in (TIMINGS, SAMPLES):
                drop_later(self.out / name, "step", self.steps_done)
        if sys.stderr.isatty() and not self.quiet:
            try:
                from tqdm import tqdm

                steps = dict(initial=self.steps_done, total=self.total_steps)
                self.bar = tqdm(desc=self.algorithm, file=sys.stderr, **steps)
            except ImportError:  # plain lines show the same
                pass
        return self

    def _keep_steps_done(self, path: Path) -> None:
        """Remove what an earlier run left: lines of later steps, and checkpoints out of date."""
        checkpoint.begin(self.out, self.steps_done)
        text = path.read_text(encoding="utf-8") if self.steps_done and path.is_file() else ""
        lines = text.splitlines(keepends=True)[: self.steps_done]
        whole = sum(line.endswith("\n") for line in lines)
        if whole < self.steps_done:
            raise ValueError(
                f"{path}: the file ends before step {whole + 1}, but the checkpoint is at step "
                f"{self.steps_done}"
            )
        self.history = [parse_line(path, step, line, "step") for step, line in enumerate(lines, 1)]
        with replacing(path) as file:  # not in place: the file may be a link
            file.write("".join(lines).encode())

    def sync(self) -> None:
        """Flush the lines to disk, before a checkpoint that counts on them."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def write(
        self, metrics: dict[str, float], timings: dict[str, float], samples: list[dict]
    ) -> None:
        """Log one step; samples as from `sample_rows`."""
        step = metrics["step"]
        if self.file is not None:
            self._check_there()
            with naming(self.out / "metrics.jsonl"):
                self.file.write(json.dumps(metrics) + "\n")
                self.file.flush()
            append_rows(self.out / TIMINGS, [timings])
            append_rows(self.out / SAMPLES, samples)
        if self.quiet:
            return
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            self._show(step, metrics)
            if self.config.get("print_samples"):
                for row in samples:
                    self._say(preview(row))

    def _check_there(self) -> None:
        """Raise FileNotFoundError if the folder was removed or renamed: the run would be lost."""
        path = self.out / "metrics.jsonl"
        try:
            there = os.path.samestat(os.fstat(self.file.fileno()), path.stat())
        except FileNotFoundError:
            there = False
        if not there:
            raise FileNotFoundError(f"{path} was removed or replaced while the run wrote to it")

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        main = {name: metrics[name] for name in (self.main_metric,) if name in metrics}
        text, place = _values(main), f"{self.algorithm} {step}/{self.total_steps}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif step == 1 or step % self.config["log_every"] == 0 or step == self.total_steps:
            seconds = time.monotonic() - self.started
            left = seconds / (step - self.steps_done) * (self.total_steps - step)
            rest = f", {duration(left)} left" if step < self.total_steps else ""
            print(f"{place}  {text}  {duration(seconds)}{rest}", file=sys.stderr)
        evaluated = {n: x for n, x in metrics.items() if n.startswith("eval_")}
        if evaluated:
            self._say(f"{place}  {_values(evaluated)}")

    def _say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is None:
            print(line, file=sys.stderr)
        else:
            self.bar.write(line, file=sys.stderr)

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()
        if self.file is not None:
            if exception[0] is None:
                self._check_there()
            with contextlib.suppress(OSError):  # `write` has raised it already
                self.file.close()


def check_on_step(on_step: Any) -> None:
    """Raise TypeError for an on_step that cannot be called."""
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be a function of metrics and step, got {on_step!r:.60}")


def notify(on_step: OnStep | None, metrics: dict[str, Any], counter: str) -> None:
    """Call on_step, on rank 0, with a copy of the metrics of a step or round, and its number.

    Raises:
        RuntimeError: on_step raised; the message names the step or round.
    """
    if on_step is None or distributed.rank():
        return
    number = metrics[counter]
    try:
        on_step(copy.deepcopy(metrics), number)
    except Exception as error:
        raise RuntimeError(f"{counter} {number}: on_step raised {error!r}") from error


def summarize(history: Sequence[dict]) -> tuple[list[dict], dict, dict]:
    """A run in short: the last tenth of its steps, their means, and metrics that have no mean.

    The latter are evaluations, and other metrics that only the last of several steps has. A list
    is as in the last step.
    """
    last, recent = history[-1], list(history[-max(len(history) // 10, 1) :])
    before = {name for line in history[:-1] for name in line} or last.keys()
    means, final = {}, {}
    for name, value in last.items():
        if name.startswith("eval_") or name not in before:
            final[name] = value
        elif isinstance(value, list):
            means[name] = value
        elif name not in ("step", "round"):
            values = [line[name] for line in recent if name in line]
            means[name] = sum(values) / len(values)
    return recent, means, final


def _values(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def duration(seconds: float) -> str:
    """Seconds as text, in at most two units: 12 s, 1 min 48 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def sample_rows(
    counter: str, number: int, prompts: Sequence, responses: Sequence, scores: Sequence, tokenizer
) -> list[dict]:
    """Up to four rows, spread evenly, as lines of samples.jsonl; token ids without a tokenizer."""
    read = list if tokenizer is None else tokenizer.decode
    return [
        {
            counter: number,
            "prompt": read(prompts[i]),
            "response": read(responses[i]),
            "score": round(float(scores[i]), 6),
        }
        for i in range(0, len(responses), max(math.ceil(len(responses) / 4), 1))
    ]


def preview(row: dict) -> str:
    """A row of samples.jsonl in one line: the end of the prompt, the start of the response."""
    prompt, response = str(row["prompt"]), str(row["response"])
    return f"  {prompt[-40:]!r} -> {response[:80]!r}  score {row['score']:.4g}"


def append_rows(path: Path, rows: Sequence[dict]) -> None:
    """Append rows to a JSONL file, which is made if there are some."""
    if rows:
        with naming(path), open_for_append(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def drop_later(path: Path, counter: str, done: int) -> None:
    """Keep the whole lines of a JSONL file up to step or round `done`; the others come again."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace") if done else ""
    kept = []
    for line in text.splitlines(keepends=True):
        number = re.match(rf'\{{"{counter}": (\d+),.*\}}\n', line)
        if number and int(number[1]) <= done:
            kept.append(line)
    with replacing(path) as file:
        file.write("".join(kept).encode())


def parse_line(path: Path, number: int, line: str, counter: str) -> dict[str, Any]:
    """The metrics in a line of metrics.jsonl, whose `counter` must be the line's number.

    Raises:
        ValueError: it is damaged; the message names file and line.
    """
    try:
        metrics = json.loads(line)
        if metrics[counter] != number:
            raise ValueError(f"{counter} is {metrics[counter]!r:.40}, not {number}")
        for name, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float | list):
                raise ValueError(f"{name} is {value!r:.40}, not a number")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}:{number}: not the metrics of {counter} {number}: {error}. Restore the file, "
            "or start a new run"
        ) from None
    return metrics
