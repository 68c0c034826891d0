"""What the trainers share: config fields, metrics, the optimiser step with exact accumulation, the loop, the log.

Left out so far: mixed precision, several devices, resuming.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import rlhf_core
from rlhf_core.data import Tokenizer
from rlhf_core.files import write_json

Tensors = TypeVar("Tensors", bound=NamedTuple)


def option(default: Any, help: str) -> Any:
    """A config field with its meaning, unit and range; the command line shows the same text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Fields of every trainer."""

    lr: float = option(1e-5, "peak learning rate of AdamW")
    lr_schedule: str = option("linear", "linear (down to 0) or constant")
    warmup_steps: int = option(0, "steps over which lr rises from 0")
    batch_size: int = option(16, "rows (pairs, prompts) an optimiser step sees; PPO: a rollout")
    micro_batch_size: int | None = option(None, "rows of one forward and backward; None: all at once")
    epochs: int = option(1, "passes over the data")
    max_steps: int | None = option(None, "stop after this many steps; None: when the epochs are over")
    max_grad_norm: float = option(1.0, "clip the gradient's global norm to this")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    adam_eps: float = option(1e-8, "AdamW's epsilon")
    dropout: bool = option(False, "train with the dropout of the model's config")
    log_every: int = option(10, "steps between printed lines where there is no progress bar")
    eval_every: int | None = option(None, "steps between evaluations; None: only at the end")
    seed: int = option(0, "of data order and sampling")

    def __post_init__(self):
        positive = ("lr", "batch_size", "epochs", "max_grad_norm", "log_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("micro_batch_size", "max_steps", "eval_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr_schedule not in ("linear", "constant"):
            raise ValueError(f"lr_schedule must be 'linear' or 'constant', got {self.lr_schedule!r}")


class Metrics:
    """Named means, kept as sums and counts until read, so that unequal micro-batches add up exactly."""

    def __init__(self):
        self._sums: dict[str, list] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add the values, those under a True mask (same shape) or all."""
        values = values.detach().float()
        count = values.numel() if mask is None else mask.sum()
        self._add(name, values.sum() if mask is None else values.masked_fill(~mask, 0).sum(), count)

    def add_mean(self, name: str, mean: Tensor, count: Tensor) -> None:
        """Add `count` values whose mean is known."""
        self._add(name, mean.detach() * count, count)

    def _add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        entry = self._sums.setdefault(name, [0, 0])
        entry[0] += total
        entry[1] += count

    def means(self) -> dict[str, float]:
        return {name: float(total) / max(float(count), 1) for name, (total, count) in self._sums.items()}


class Trainer:
    """The loop: batches of examples, `step` on each, a line of metrics for each, the model at the end.

    A subclass gives `losses`, which adds to the metrics and yields the loss of each micro-batch, weighted so that they
    add up to the batch's loss; or its own `step`.
    """

    algorithm: str
    main_metric: str  # what the progress bar shows
    losses: Callable[[list, Metrics], Iterator[Tensor]]

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence,
        config: TrainConfig,
        *,
        tokenizer: Tokenizer | None = None,
        eval_examples: Sequence = (),
        out: str | os.PathLike | None = None,
    ):
        """
        model: trained in place.
        examples, eval_examples: what `step` and `losses` take in batches.
        tokenizer: saved with the model; PPO also decodes with it.
        out: folder for metrics.jsonl, train_config.json and the model; None writes nothing.
        """
        if not len(examples):
            raise ValueError("there are no examples to train on")
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.examples, self.eval_examples = examples, eval_examples
        self.out = None if out is None else Path(out)
        self.device = next(model.parameters()).device
        self.pad_id = model.config.pad_id or 0
        self.steps_done = 0
        self.optimizer = torch.optim.AdamW(
            self.trained_parameters(), lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay
        )
        model.train(config.dropout)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def total_steps(self) -> int:
        steps = self.config.epochs * math.ceil(len(self.examples) / self.config.batch_size)
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def batches(self) -> Iterator[list]:
        """Lists of examples, in a new order every epoch."""
        order = torch.Generator().manual_seed(self.config.seed)
        for _ in range(self.config.epochs):
            shuffled = torch.randperm(len(self.examples), generator=order).tolist()
            for start in range(0, len(shuffled), self.config.batch_size):
                yield [self.examples[i] for i in shuffled[start : start + self.config.batch_size]]

    def step(self, batch: list) -> dict[str, float]:
        """One optimiser step on a batch of examples; returns its metrics."""
        metrics = Metrics()
        grad_norm = self.optimize(self.losses(batch, metrics))
        return metrics.means() | {"grad_norm": grad_norm, "lr": self.optimizer.param_groups[0]["lr"]}

    def optimize(self, losses: Iterator[Tensor]) -> float:
        """Add up the gradients of the losses, clip them, step; returns the norm before clipping.

        FloatingPointError, and untouched weights, where the gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()
        grad_norm = float(nn.utils.clip_grad_norm_(self.trained_parameters(), self.config.max_grad_norm))
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {self.steps_done + 1}: the gradient's norm is {grad_norm}; nothing updated")
        self.optimizer.step()
        return grad_norm

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics on `eval_examples`, prefixed eval_, with dropout off."""
        metrics = Metrics()
        self.model.eval()
        for start in range(0, len(self.eval_examples), self.config.batch_size):
            for _ in self.losses(self.eval_examples[start : start + self.config.batch_size], metrics):
                pass
        self.model.train(self.config.dropout)
        return {f"eval_{name}": value for name, value in metrics.means().items()}

    def train(self) -> list[dict[str, float]]:
        """Run all steps, log each, save the model to `out`; returns every step's metrics."""
        history = []
        with RunLog(self) as log:
            for batch in self.batches():
                if self.steps_done == self.total_steps:
                    break
                self._set_lr()
                metrics = self.step(batch)
                self.steps_done += 1
                last = self.steps_done == self.total_steps
                due = last or (self.config.eval_every and self.steps_done % self.config.eval_every == 0)
                if due and len(self.eval_examples):
                    metrics |= self.evaluate()
                history.append({"step": self.steps_done, **metrics})
                log.write(history[-1])
        if self.out is not None:
            self.save(self.out)
        return history

    def save(self, path: Path) -> None:
        """Write the model, and the tokenizer where there is one, in the Hugging Face layout."""
        self.model.save_pretrained(path)
        if self.tokenizer is not None:
            self.tokenizer.save(path)

    def _set_lr(self) -> None:
        factor = 1.0
        if self.steps_done < self.config.warmup_steps:
            factor = (self.steps_done + 1) / self.config.warmup_steps
        elif self.config.lr_schedule == "linear":
            rest = self.total_steps - self.config.warmup_steps
            factor = (self.total_steps - self.steps_done) / rest
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor


class RunLog:
    """metrics.jsonl and train_config.json in `out`, and a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.file, self.bar = trainer, None, None
        self.started = time.monotonic()

    def __enter__(self) -> RunLog:
        trainer = self.trainer
        if trainer.out is not None:
            trainer.out.mkdir(parents=True, exist_ok=True)
            versions = {"rlhf_core": rlhf_core.__version__, "torch": torch.__version__}
            run = {"algorithm": trainer.algorithm, **asdict(trainer.config), "versions": versions}
            write_json(trainer.out / "train_config.json", run)
            self.file = open(trainer.out / "metrics.jsonl", "w", encoding="utf-8")
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=trainer.total_steps, desc=trainer.algorithm, file=sys.stderr)
            except ImportError:  # plain lines say the same
                pass
        return self

    def write(self, metrics: dict[str, float]) -> None:
        """Log one step."""
        trainer, step = self.trainer, metrics["step"]
        if self.file is not None:
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        shown = {n: v for n, v in metrics.items() if n == trainer.main_metric or n.startswith("eval_")}
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif step == 1 or step % trainer.config.log_every == 0 or step == trainer.total_steps:
            seconds = time.monotonic() - self.started
            print(f"{trainer.algorithm} {step}/{trainer.total_steps}  {text}  {seconds:.0f} s", file=sys.stderr)

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            self.file.close()


def rows(batch: Tensors, index) -> Tensors:
    """The rows of every tensor in a NamedTuple of tensors."""
    return type(batch)(*(x[index] for x in batch))


def micro_batches(size: int | None, *tensors: Any) -> Iterator[tuple]:
    """Slices of at most `size` rows of each tensor, or NamedTuple of tensors, side by side."""
    first = tensors[0] if isinstance(tensors[0], Tensor) else tensors[0][0]
    size = size or len(first)
    for start in range(0, len(first), size):
        part = slice(start, start + size)
        yield tuple(x[part] if isinstance(x, Tensor) else rows(x, part) for x in tensors)


def to_device(batch: Tensors, device: torch.device) -> Tensors:
    """A NamedTuple of tensors on `device`."""
    return type(batch)(*(x.to(device) for x in batch))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradient: a reference policy."""
    return copy.deepcopy(model).eval().requires_grad_(False)
