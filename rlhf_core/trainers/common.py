"""What the trainers share: config fields, metrics, the optimiser step with exact accumulation, the loop, the log.

Left out so far: several devices.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
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
from rlhf_core.data import Example, Pair, Ranked, Steps, TokenBatch, Tokenizer, collate
from rlhf_core.data.collate import length
from rlhf_core.files import write_json
from rlhf_core.models import eval_mode
from rlhf_core.models.lora import adapters_off, frozen_adapters, has_adapters
from rlhf_core.models.transformer import Trunk
from rlhf_core.trainers import checkpoint

Tensors = TypeVar("Tensors", bound=NamedTuple)


def option(default: Any, help: str) -> Any:
    """A config field with its meaning, unit and range; the command line shows the same text."""
    return field(default=default, metadata={"help": help})


def check_options(config: Any, *rules: tuple[str, Any, str]) -> None:
    """ValueError for the first rule, a field, whether it is valid and what it must be, that does not hold."""
    for name, valid, wanted in rules:
        if not valid:
            raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)!r}")


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
    save_every: int | None = option(None, "steps between checkpoints, and one at the end; None: only where interrupted")
    precision: str = option("float32", "of the forward: float32 or bfloat16; weights and log-probs stay float32")
    activation_checkpointing: bool = option(False, "keep a block's input alone and compute the rest again: less memory")
    freeze_layers: int = option(0, "from 1: the embedding and this many of the lowest blocks stay as they are")
    seed: int = option(0, "of data order and sampling")

    def __post_init__(self):
        positive = ("lr", "batch_size", "epochs", "max_grad_norm", "log_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("micro_batch_size", "max_steps", "eval_every", "save_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if getattr(self, "max_length", 2) < 2:
            raise ValueError(f"max_length must be at least 2, a token and one to learn, got {self.max_length}")
        for name, allowed in (("lr_schedule", ("linear", "constant")), ("precision", ("float32", "bfloat16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name in ("warmup_steps", "weight_decay", "adam_eps", "freeze_layers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


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
        model: trained in place; what freeze_layers freezes takes no gradient afterwards either.
        examples, eval_examples: what `step` and `losses` take in batches.
        tokenizer: saved with the model; PPO also decodes with it.
        out: folder for metrics.jsonl, train_config.json and the model; None writes nothing.
        """
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
        self.steps_done = 0
        for name, rows in (("example", examples), ("evaluation example", eval_examples)):
            self._check_lengths(name, rows)
        for trained in self.trained_models():
            self._prepare(trained)
        settings = dict(eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)
        self.optimizer = torch.optim.AdamW(self.parameter_groups(), lr=config.lr, **settings)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]

    def trained_models(self) -> list[nn.Module]:
        return [self.model]

    def trained_parameters(self) -> list[nn.Parameter]:
        parameters = [p for model in self.trained_models() for p in model.parameters() if p.requires_grad]
        return list(dict.fromkeys(parameters))  # once, where two models are on one trunk

    def parameter_groups(self) -> list[dict]:
        """`trained_parameters` as AdamW takes them, with learning rates of their own where they have one."""
        return [{"params": self.trained_parameters()}]

    def _check_lengths(self, name: str, examples: Sequence) -> None:
        limit = self.model.config.max_positions
        for i, example in enumerate(examples):
            if (
                isinstance(example, Example | Pair | Ranked | Steps) and length(example) > limit
            ):  # PPO's prompts are cut
                raise ValueError(f"{name} {i} has {length(example)} tokens, the model {limit} positions")

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
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def token_batches(self, batch: list, *, packing: int | None = None) -> Iterator[TokenBatch]:
        """The micro-batches of examples or pairs, on the model's device; packing as for `collate`."""
        return (tokens for _, tokens in self.parts(batch, packing=packing))

    def parts(self, batch: list, *, packing: int | None = None) -> Iterator[tuple[list, TokenBatch]]:
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
        return metrics.means() | {"grad_norm": grad_norm, "lr": self.optimizer.param_groups[0]["lr"]}

    @torch.no_grad()
    def _blame(self, batch: list) -> str:
        """Which of the batch's examples have no finite loss on their own, in words."""
        bad = []
        for at, row in enumerate(batch):
            with contextlib.suppress(ValueError):  # a loss that needs several rows
                if not all(loss.isfinite() for loss in self.losses([row], Metrics())):
                    places = (f"example {i}" for i, example in enumerate(self.examples) if example is row)
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
            for _ in self.losses(self.eval_examples[start : start + self.config.batch_size], metrics):
                pass
        self.model.train(self.config.dropout)
        return {f"eval_{name}": value for name, value in metrics.means().items()}

    def train(self) -> list[dict[str, float]]:
        """Run all steps that are left, log each, save the model to `out`; returns every step's metrics.

        Where there is an `out`, Ctrl-C waits for the end of the step and leaves a checkpoint; a second one does not.
        Where a step fails, its state is left in `out`/checkpoint-error; FloatingPointError where the run has diverged,
        ValueError and RuntimeError (a reward's) then name the step.
        """
        with RunLog(self) as log, checkpoint.interrupts_wait(self.out is not None) as interrupted:
            history = log.history
            for batch in itertools.islice(self.batches(), self.steps_done, self.total_steps):
                self._set_lr()
                try:
                    metrics = self.step(batch)
                except Exception as error:
                    seen = f"; the state is in {checkpoint.save(self, checkpoint.ERROR_NAME)}" if self.out else ""
                    if type(error) not in (FloatingPointError, ValueError, RuntimeError):
                        raise
                    raise type(error)(f"step {self.steps_done + 1}: {error}{seen}") from error
                self.steps_done += 1
                last = self.steps_done == self.total_steps
                due = last or (self.config.eval_every and self.steps_done % self.config.eval_every == 0)
                if due and len(self.eval_examples):
                    metrics |= self.evaluate()
                if last:
                    metrics |= self.finish()
                history.append({"step": self.steps_done, **metrics})
                log.write(history[-1])
                stop, every = interrupted() and not last, self.config.save_every
                if stop or (every and (last or self.steps_done % every == 0)):
                    log.sync()
                    path = checkpoint.save(self)
                if stop:
                    raise KeyboardInterrupt(f"step {self.steps_done} is in {path}, to go on from")
        if self.out is not None:
            self.save(self.out)
        return history

    def finish(self) -> dict[str, float]:
        """What is left to do after the last step, before the model is saved; returns its metrics."""
        return {}

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
        """Cut the lines of later steps, and a checkpoint where none is done: both are of a run before."""
        trainer = self.trainer
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


def read_hidden(trunk: Trunk, tokens: TokenBatch, where: Tensor) -> Tensor:
    """Hidden states (len(where), D) at those of the batch's R * T tokens."""
    return trunk(tokens.input_ids, positions=tokens.positions, visible=tokens.visible, read=where)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradient: a reference policy."""
    return copy.deepcopy(model).eval().requires_grad_(False)


class Reference:
    """What a policy is compared with: the model given; else the policy as it is now.

    Where the policy has adapters that is the policy itself with them as they are now, off if they are new, and no
    second copy of its weights; else it is a frozen copy. One that `moves` (whoever holds it moves it) is a copy, too.
    """

    def __init__(self, model: nn.Module, given: nn.Module | None = None, *, moves: bool = False):
        if given is model:
            raise ValueError(
                "the reference is the policy itself, which moves; leave it out for the policy as it is now"
            )
        self.adapters, self.switch, self.moves = None, given is None and has_adapters(model), moves
        if moves and self.switch:
            raise ValueError("a reference that is the policy without its adapters cannot follow it")
        if moves and given is not None:
            given = frozen_copy(given)
        if self.switch:
            moving = [n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n]
            if moving:
                raise ValueError(f"the policy is no reference without its adapters while {moving[0]} trains; freeze it")
            self.adapters = frozen_adapters(model)
        self.model = model if self.switch else frozen_copy(model) if given is None else given

    @contextlib.contextmanager
    def policy(self) -> Iterator[nn.Module]:
        """The reference, for forwards without gradient and without dropout."""
        off = adapters_off(self.model, self.adapters) if self.switch else contextlib.nullcontext()
        with eval_mode(self.model), off, torch.no_grad():
            yield self.model
