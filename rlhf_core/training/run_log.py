"""A run's metrics and options on disk, and its progress on the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

import rlhf_core
from rlhf_core.files import write_json
from rlhf_core.training import checkpoint


class RunLog:
    """Writes metrics.jsonl and train_config.json to `out`; shows a progress bar or plain lines."""

    def __init__(
        self,
        algorithm: str,
        config: dict[str, Any],
        out: Path | None,
        *,
        main_metric: str,
        steps_done: int,
        total_steps: int,
    ):
        """
        Args:
            config: the options of the run, for train_config.json.
            out: folder of the files; None writes none.
            main_metric: the metric on the terminal; those of evaluations are shown, too.
            steps_done: steps before this process, whose lines are kept.
        """
        self.algorithm, self.config, self.out = algorithm, config, out
        self.main_metric, self.steps_done, self.total_steps = main_metric, steps_done, total_steps
        self.file, self.bar = None, None
        self.history: list[dict[str, float]] = []  # of the steps done before
        self.started = time.monotonic()

    def __enter__(self) -> RunLog:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            versions = {"rlhf_core": rlhf_core.__version__, "torch": torch.__version__}
            run = {"algorithm": self.algorithm, **self.config, "versions": versions}
            write_json(self.out / "train_config.json", run)
            self.file = open(self.out / "metrics.jsonl", "a+", encoding="utf-8")
            self._keep_steps_done()
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                steps = dict(initial=self.steps_done, total=self.total_steps)
                self.bar = tqdm(desc=self.algorithm, file=sys.stderr, **steps)
            except ImportError:  # plain lines show the same
                pass
        return self

    def _keep_steps_done(self) -> None:
        """Remove what an earlier run left: lines of later steps, and checkpoints out of date."""
        (self.out / checkpoint.ERROR_NAME).unlink(missing_ok=True)
        if not self.steps_done:
            (self.out / checkpoint.NAME).unlink(missing_ok=True)
        self.file.seek(0)
        for step in range(1, self.steps_done + 1):
            line = self.file.readline()
            if not line.endswith("\n"):
                raise ValueError(
                    f"{self.file.name}: the file ends before step {step}, but the checkpoint is at "
                    f"step {self.steps_done}"
                )
            self.history.append(json.loads(line))
        self.file.truncate(self.file.tell())

    def sync(self) -> None:
        """Flush the lines to disk, before a checkpoint that counts on them."""
        os.fsync(self.file.fileno())

    def write(self, metrics: dict[str, float]) -> None:
        """Log one step."""
        step = metrics["step"]
        if self.file is not None:
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        shown = {n: v for n, v in metrics.items() if n == self.main_metric or n.startswith("eval_")}
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif step == 1 or step % self.config["log_every"] == 0 or step == self.total_steps:
            seconds = time.monotonic() - self.started
            line = f"{self.algorithm} {step}/{self.total_steps}  {text}  {seconds:.0f} s"
            print(line, file=sys.stderr)

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()
