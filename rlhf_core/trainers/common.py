"""What the trainers share: metrics, the optimiser step with exact accumulation, the loop.

Left out so far: several devices.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rlhf_core.data import TokenBatch, Tokenizer, collate
from rlhf_core.data.collate import length, misfit
from rlhf_core.trainers import checkpoint
from rlhf_core.trainers.config import TrainConfig
from rlhf_core.trainers.run_log import RunLog

Tensors = TypeVar("Tensors", bound=NamedTuple)


class RewardError(RuntimeError):
    """What a caller's reward or judge has raised, with the row."""


class Metrics:
    """Named means, kept as sums and counts until read, so that unequal micro-batches add up exactly."""

    def __init__(self):
        self._sums: dict[str, list] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add the values, those under a True mask (same shape) or all."""
        values = values.detach().float()
        count = values.numel() if mask is None else mask.sum()
        self._add(name, values.sum() if mask is None else values.masked_fill(~mask, 0).sum(), count)

    def add_mean(self, name: str, mean: Tensor, count: Tensor | int) -> None:
        """Add `count` values whose mean is known."""
        self._add(name, mean.detach() * count, count)

    def _add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        entry = self._sums.setdefault(name, [0, 0])
        entry[0] += total
        entry[1] += count

    def merge(self, other: Metrics) -> None:
        """Add what the other one holds."""
        for name, (total, count) in other._sums.items():
            self._add(name, total, count)

    def means(self) -> dict[str, float]:
        """Of what has values; a name whose masks were all False is left out."""
        return {
            name: float(total) / float(count)
            for name, (total, count) in self._sums.items()
            if count
        }


class Trainer:
    """The loop: batches of examples, `step` on each, a line of metrics for each, the model at the end.

    A subclass gives `losses`, which adds to the metrics and yields the loss of each micro-batch, weighted so that they
    add up to the batch's loss; or its own `step`.
    """

    algorithm: str
    main_metric: str  # what the progress bar shows
    model_type: type[nn.Module] = nn.Module
    kinds: tuple[type, ...] = ()  # of examples that it takes; none: prompts
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
        model: trained in place; what freeze_layers freezes takes no gradient afterwards either.
        examples, eval_examples: what `step` and `losses` take in batches.
        tokenizer: saved with the model; PPO also decodes with it.
        out: folder for metrics.jsonl, train_config.json and the model; None writes nothing.
        """
        if not isinstance(model, self.model_type):
            wanted = self.model_type.__name__
            raise TypeError(
                f"{self.algorithm} trains a model of type {wanted}, got {type(model).__name__}"
            )
        if not len(examples):
            raise ValueError("there are no examples to train on")
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.examples, self.eval_examples = examples, eval_examples
        self.out = None if out is None else Path(out)
        if config.eval_every is not None and not len(eval_examples):
            raise ValueError("eval_every has no effect without evaluation examples")
        if config.save_every is not None and out is None:
            raise ValueError("save_every has no effect without out")
        self.device = next(model.parameters()).device
        self.pad_id = model.config.pad_id or 0
        self.steps_done, self.finished = 0, False
        for name, rows in (("example", examples), ("evaluation example", eval_examples)):
            self.check_examples(name, rows, self.kinds)
        for trained in self.trained_models():
            self._prepare(trained)
        if config.dropout and not any(map(has_dropout, self.trained_models())):
            raise ValueError("dropout has no effect: no model's config has any")
        settings = dict(eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)
        self.optimizer = torch.optim.AdamW(self.parameter_groups(), lr=config.lr, **settings)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]

    def trained_models(self) -> list[nn.Module]:
        return [self.model]

    def trained_parameters(self) -> list[nn.Parameter]:
        parameters = [
            p for model in self.trained_models() for p in model.parameters() if p.requires_grad
        ]
        return list(dict.fromkeys(parameters))  # once, where two models are on one trunk

    def parameter_groups(self) -> list[dict]:
        """`trained_parameters` as AdamW takes them, with learning rates of their own where they have one."""
        return [{"params": self.trained_parameters()}]

    def check_examples(self, name: str, examples: Sequence, kinds: tuple[type, ...]) -> None:
        """ValueError for the first that cannot be trained on; without kinds they are prompts, which are cut."""
        if kinds:
            self.check_kinds(name, examples, kinds)
            for i, example in enumerate(examples):
                fault = misfit(example) or self._excess(length(example)) or self.fault(example)
                if fault:
                    raise ValueError(f"{name} {i} {fault}")

    def check_kinds(self, name: str, examples: Sequence, kinds: tuple[type, ...]) -> None:
        """ValueError for the first that is of none of these types."""
        for i, example in enumerate(examples):
            if not isinstance(example, kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                found = type(example).__name__
                raise ValueError(f"{name} {i} is of type {found}, {self.algorithm} takes {wanted}")

    def _excess(self, tokens: int) -> str | None:
        positions = self.model.config.max_positions
        if tokens > positions:
            return f"has {tokens} tokens, the model {positions} positions"
        if tokens > getattr(self.config, "max_length", positions):
            return f"has {tokens} tokens, max_length is {self.config.max_length}; the encoders of rlhf_core.data cut"
        return None

    def fault(self, example) -> str | None:
        """What else keeps an example from being trained on, in words."""
        return None

    def _prepare(self, model: nn.Module) -> None:
        """Dropout, checkpointing and frozen layers as the config says."""
        trunk, layers = model.trunk, self.config.freeze_layers
        if layers > len(trunk.blocks):
            raise ValueError(f"freeze_layers is {layers}, the model has {len(trunk.blocks)} blocks")
        model.train(self.config.dropout)
        trunk.checkpointing = self.config.activation_checkpointing
        if layers:
            for frozen in (trunk.embed, getattr(trunk, "position", None), *trunk.blocks[:layers]):
                if frozen is not None:
                    frozen.requires_grad_(False)

    def autocast(self) -> torch.autocast:
        """The context of a forward, as `precision` says; not of its backward.

        One for each forward: within it a weight's bfloat16 copy is made once, and one that was made without gradient
        would cut a later forward off from its weights.
        """
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        )

    def token_batches(self, batch: list, *, packing: int | None = None) -> Iterator[TokenBatch]:
        """The micro-batches of examples or pairs, on the model's device; packing as for `collate`."""
        return (tokens for _, tokens in self.parts(batch, packing=packing))

    def parts(
        self, batch: list, *, packing: int | None = None
    ) -> Iterator[tuple[list, TokenBatch]]:
        """The same, each with its examples."""
        size = self.config.micro_batch_size or len(batch)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            yield part, to_device(collate(part, self.pad_id, packing=packing), self.device)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Of the data and of what does not train: see `checkpoint.digests`."""
        return checkpoint.digests(self)

    def settings(self) -> dict:
        """What a run depends on beside its config, for its checkpoint."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside weights and the optimizer's state: generators, counters."""
        state = {"generator": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["generator_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        torch.set_rng_state(state["generator"])
        if self.device.type == "cuda" and "generator_cuda" in state:
            torch.cuda.set_rng_state(state["generator_cuda"], self.device)

    def resume(self) -> None:
        """Move to the step of the checkpoint in `out`, from where `train` goes on; errors as for `checkpoint.load`."""
        if self.out is None:
            raise ValueError("there is no out to go on from")
        checkpoint.load(self)

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
        try:
            grad_norm = self.optimize(self.losses(batch, metrics))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._blame(batch)}") from None
        return metrics.means() | {
            "grad_norm": grad_norm,
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def _blame(self, batch: list) -> str:
        """Which of the batch's examples have no finite loss on their own, in words."""
        bad = []
        for at, row in enumerate(batch):
            with contextlib.suppress(ValueError):  # a loss that needs several rows
                if not all(loss.isfinite() for loss in self.losses([row], Metrics())):
                    places = (
                        f"example {i}" for i, example in enumerate(self.examples) if example is row
                    )
                    bad.append(next(places, f"row {at}, {row},"))  # or one that was sampled
        if len(bad) == len(batch):
            return "no row has a finite loss, so look at the weights: a smaller lr or max_grad_norm, a longer warmup"
        if bad:
            return f"the loss of {bad[0]} alone is not finite, one of {len(bad)} such in {len(batch)} rows"
        return "every row's loss alone is finite: a smaller lr, or precision float32"

    def optimize(self, losses: Iterator[Tensor]) -> float:
        """Add up the gradients of the losses, clip them, step; returns the norm before clipping.

        FloatingPointError, and untouched weights, where loss or gradient are not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total_loss = 0.0
        for loss in losses:
            loss.backward()
            total_loss += loss.detach()
        parameters = self.trained_parameters()
        total_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        grad_norm = float(total_norm)
        for name, value in (("gradient's norm", grad_norm), ("loss", float(total_loss))):
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value}; nothing updated")
        if grad_norm > self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, total_norm)
        self.optimizer.step()
        return grad_norm

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics on `eval_examples`, prefixed eval_, with dropout off."""
        metrics = Metrics()
        self.model.eval()
        for start in range(0, len(self.eval_examples), self.config.batch_size):
            for _ in self.losses(
                self.eval_examples[start : start + self.config.batch_size], metrics
            ):
                pass
        self.model.train(self.config.dropout)
        return {f"eval_{name}": value for name, value in metrics.means().items()}

    def train(self) -> list[dict[str, float]]:
        """Run all steps that are left, log each, save the model to `out`; returns every step's metrics.

        Where there is an `out`, Ctrl-C waits for the end of the step and leaves a checkpoint; a second one does not.
        Errors: see `advance`.
        """
        with RunLog(self) as log, checkpoint.interrupts_wait(self.out is not None) as interrupted:
            history = log.history
            for batch in itertools.islice(self.batches(), self.steps_done, self.total_steps):
                history.append(self.advance(batch))
                log.write(history[-1])
                last, every = self.steps_done == self.total_steps, self.config.save_every
                stop = interrupted() and not last
                if stop or (every and (last or self.steps_done % every == 0)):
                    log.sync()
                    path = checkpoint.save(self)
                if stop:
                    raise KeyboardInterrupt(f"step {self.steps_done} is in {path}, to go on from")
        if not self.finished:
            self.finish(history[-1])
            self.finished = True
        if self.out is not None:
            self.save(self.out)
        return history

    def advance(self, batch: list) -> dict[str, float]:
        """A step and what is due after it, evaluation or `last_metrics`; returns their metrics.

        Where it fails, its state is left in `out`/checkpoint-error; FloatingPointError where the run has diverged,
        ValueError and RewardError then name the step.
        """
        step, every, last = (
            self.steps_done + 1,
            self.config.eval_every,
            self.steps_done + 1 == self.total_steps,
        )
        self._set_lr()
        try:
            metrics = {"step": step, **self.step(batch)}
            self.steps_done = step
            if len(self.eval_examples) and (last or (every and step % every == 0)):
                metrics |= self.evaluate()
            return metrics | self.last_metrics() if last else metrics
        except Exception as error:
            seen = (
                f"; the state is in {checkpoint.save(self, checkpoint.ERROR_NAME)}"
                if self.out
                else ""
            )
            if type(error) not in (FloatingPointError, ValueError, RuntimeError, RewardError):
                raise
            raise type(error)(f"step {step}: {error}{seen}") from error

    def last_metrics(self) -> dict[str, float]:
        """What only the last step tells."""
        return {}

    def finish(self, last: dict[str, float]) -> None:
        """What is left to do to the model before it is saved, from the last step's metrics. A checkpoint is of before,
        so that a run may go on from its end."""

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
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs):
            group["lr"] = peak_lr * factor


def has_dropout(model: nn.Module) -> bool:
    """Whether its config, or that of its adapters, drops anything in train mode."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return any(
        getattr(config, name, 0) for config in configs for name in ("dropout", "attention_dropout")
    )


def rows(batch: Tensors, index) -> Tensors:
    """The rows of every tensor in a NamedTuple of tensors, or None."""
    return type(batch)(*(x if x is None else x[index] for x in batch))


def micro_batches(size: int | None, *tensors: Any) -> Iterator[tuple]:
    """Slices of at most `size` rows of each tensor, or NamedTuple of tensors, side by side."""
    first = tensors[0] if isinstance(tensors[0], Tensor) else tensors[0][0]
    size = size or len(first)
    for start in range(0, len(first), size):
        part = slice(start, start + size)
        yield tuple(x[part] if isinstance(x, Tensor) else rows(x, part) for x in tensors)


def to_device(batch: Tensors, device: torch.device) -> Tensors:
    """A NamedTuple of tensors, or None, on `device`."""
    return type(batch)(*(x if x is None else x.to(device) for x in batch))
