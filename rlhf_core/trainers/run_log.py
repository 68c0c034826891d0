"""What a run leaves beside its model, a line for each step, and what it shows on the way."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

import rlhf_core
from rlhf_core.files import write_json
from rlhf_core.trainers import checkpoint

if TYPE_CHECKING:
    from rlhf_core.trainers.common import Trainer


class RunLog:
    """metrics.jsonl and train_config.json in `out`, and a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.file, self.bar = trainer, None, None
        self.history: list[dict[str, float]] = []  # of the steps done before
        self.started = time.monotonic()

    def __enter__(self) -> RunLog:
        trainer = self.trainer
        if trainer.out is not None:
            trainer.out.mkdir(parents=True, exist_ok=True)
            versions = {"rlhf_core": rlhf_core.__version__, "torch": torch.__version__}
            run = {"algorithm": trainer.algorithm, **asdict(trainer.config), "versions": versions}
            write_json(trainer.out / "train_config.json", run)
            self.file = open(trainer.out / "metrics.jsonl", "a+", encoding="utf-8")
            self._keep_steps_done()
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                steps = dict(initial=trainer.steps_done, total=trainer.total_steps)
                self.bar = tqdm(desc=trainer.algorithm, file=sys.stderr, **steps)
            except ImportError:  # plain lines say the same
                pass
        return self

    def _keep_steps_done(self) -> None:
        """Cut the lines of later steps, a checkpoint where none is done, and the state of an error: all are of a run
        before."""
        trainer = self.trainer
        (trainer.out / checkpoint.ERROR_NAME).unlink(missing_ok=True)
        if not trainer.steps_done:
            (trainer.out / checkpoint.NAME).unlink(missing_ok=True)
        self.file.seek(0)
        for step in range(1, trainer.steps_done + 1):
            line = self.file.readline()
            if not line.endswith("\n"):
                raise ValueError(
                    f"{self.file.name}: ends before step {step}, the checkpoint is of {trainer.steps_done}"
                )
            self.history.append(json.loads(line))
        self.file.truncate(self.file.tell())

    def sync(self) -> None:
        """The lines so far to the disk, as a checkpoint goes there that counts on them."""
        os.fsync(self.file.fileno())

    def write(self, metrics: dict[str, float]) -> None:
        """Log one step."""
        trainer, step = self.trainer, metrics["step"]
        if self.file is not None:
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        shown = {
            n: v for n, v in metrics.items() if n == trainer.main_metric or n.startswith("eval_")
        }
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif step == 1 or step % trainer.config.log_every == 0 or step == trainer.total_steps:
            seconds = time.monotonic() - self.started
            print(
                f"{trainer.algorithm} {step}/{trainer.total_steps}  {text}  {seconds:.0f} s",
                file=sys.stderr,
            )

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()
