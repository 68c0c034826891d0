"""The loop that all trainers share: batches, optimiser steps with exact accumulation, evaluation,
checkpoints.

Several processes share each step's forward passes, see distributed.py: every rank runs this loop.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core import backends, distributed
from rlhf_core.checks import check_own
from rlhf_core.data import Example, TokenBatch, Tokenizer, collate
from rlhf_core.data.batches import to_device
from rlhf_core.data.collate import count_targets, length, misfit, unknown_id
from rlhf_core.data.store import Block, ExampleStore, digest, kinds_of
from rlhf_core.feedback.endpoint import JudgeError
from rlhf_core.feedback.judges import Judge, JudgeScorer
from rlhf_core.feedback.rewards import RewardError, Scorer
from rlhf_core.files import replacing_folder
from rlhf_core.generation import Engine, EngineError
from rlhf_core.locks import hold
from rlhf_core.models.gather import is_sharded, piece_like, reshard, whole_tensor
from rlhf_core.models.hub import stale_adapters
from rlhf_core.models.lora import adapter_config, has_adapters
from rlhf_core.models.low_precision import FrozenCopies
from rlhf_core.models.shard import shard_all
from rlhf_core.training import checkpoint, freed_memory, signals
from rlhf_core.training.completions import completion_loss
from rlhf_core.training.config import TrainConfig
from rlhf_core.training.held_out import evaluate_answers
from rlhf_core.training.metrics import Metrics, peak_memory
from rlhf_core.training.monitors import alarms
from rlhf_core.training.reference import Reference
from rlhf_core.training.run_file import RunFile, recording
from rlhf_core.training.run_log import OnStep, RunLog, check_on_step, notify, sample_rows

PRETRAINING_BEFORE = "pretraining/loss_before"


MIN_STEPS = 10  # a run of at least this many steps should move its model


class Trainer:
    """Runs `step` on batches of examples, logs its metrics, and saves the model at the end.

    A subclass defines `losses`, or its own `step`, and these class attributes.
    """

    algorithm = "trainer"  # name in logs and checkpoints
    main_metric = "loss"  # shown by the progress bar
    least_movement = 1e-3  # a run with less `movement` is warned of
    pace = "lr"  # the option that sets how far a run moves its model
    model_type: type[nn.Module] = nn.Module
    kinds: tuple[type, ...] = ()  # types of the examples; empty: prompts
    needs: str | None = None  # the field that `fault` asks for
    scorer: Scorer | JudgeScorer | None = None  # of methods that sample
    eval_judge: Judge | None = None  # compares their answers to held-out prompts
    eval_reference: Reference | None = None  # with which these are compared; never moves
    eos_ids: Sequence[int] | None = None  # that end their responses
    generator: torch.Generator | None = None  # of their seeds
    engine: Engine | None = None  # samples in place of `generate`
    reference: Reference | None = None
    sharded = False  # whether they are

    def __new__(cls, *arguments: Any, **options: Any):
        """Look at the arguments before any `__init__` reads them."""
        check_own(*arguments, *options.values())
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence,
        config: TrainConfig,
        *,
        tokenizer: Tokenizer | None = None,
        eval_examples: Sequence = (),
        pretraining_examples: Sequence[Example] = (),
        out: str | os.PathLike | None = None,
        on_step: OnStep | None = None,
    ):
        """
        Args:
            model: trained in place. Layers frozen by freeze_layers stay frozen afterwards.
            examples, eval_examples: `step` and `losses` get them in batches.
            pretraining_examples: plain text, whose loss in nats per token shows what the model
                forgets: pretraining/loss_before of the first step, and pretraining/loss after the
                last one and at eval_every.
            tokenizer: saved with the model; methods that sample decode with it.
            out: folder for metrics.jsonl, run.json, checkpoints and the model; None writes nothing.
            on_step: called as on_step(metrics, step) after each step of this process, with a copy
                of the step's metrics and timings. An exception in it ends the run with a
                RuntimeError that names the step; with out, a checkpoint to resume from is left.
        """
        if not isinstance(model, self.model_type):
            wanted = self.model_type.__name__
            raise TypeError(
                f"{self.algorithm} trains a model of type {wanted}, got {type(model).__name__}"
            )
        distributed.check_started()
        check_on_step(on_step)
        if not len(examples):
            raise ValueError("there are no examples to train on")
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.examples, self.eval_examples = examples, eval_examples
        self.out = None if out is None else Path(out).absolute()  # a reward may call os.chdir
        self.pretraining_examples, self.on_step = pretraining_examples, on_step
        if config.eval_every is not None and not (len(eval_examples) or len(pretraining_examples)):
            message = "eval_every has no effect without evaluation or pretraining examples"
            warnings.warn(message, stacklevel=3)
        for name in ("save_every", "keep_best"):
            if getattr(config, name) is not None and out is None:
                warnings.warn(f"{name} has no effect without out", stacklevel=3)
        self.device = model.device
        self.pad_id = model.config.pad_id or 0
        self.steps_done = 0
        self.finished = False
        self._warned: set[str] = set()
        self.tokens: int | Tensor = 0  # of this step: sampled, and targets that updates have read
        self.timings: dict[str, float] = {}
        self.frozen_copies = FrozenCopies(torch.bfloat16)  # with precision bfloat16
        self.samples: list[dict] = []
        self.check_examples("example", examples, self.kinds)
        self.check_examples("evaluation example", eval_examples, self.kinds)
        self.check_examples("pretraining example", pretraining_examples, (Example,), plain=True)
        if len(pretraining_examples) and not any(map(count_targets, pretraining_examples)):
            raise ValueError("no pretraining example has a token to predict")
        for trained in self.trained_models():
            self._prepare(trained)
        if config.dropout and not any(map(_has_dropout, self.trained_models())):
            warnings.warn("dropout has no effect: the model's config has none", stacklevel=3)
        self.optimizer = self._new_optimizer()
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._check_mesh()

    def _check_mesh(self) -> None:
        """Raise ValueError if the config's mesh does not fit the processes or the model."""
        self.config.check_ranks(distributed.size())
        if self.config.copies is None and any(map(is_sharded, self.trained_models())):
            raise ValueError(
                "the model's weights are in pieces: set shard, or mesh to the one they were read on"
            )
        if self.config.shard and self.config.mesh is None and distributed.size() == 1:
            warnings.warn("shard has no effect in one process", stacklevel=4)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        settings = dict(eps=self.config.adam_eps, weight_decay=self.config.weight_decay, fused=True)
        reshard(*self.trained_models())
        groups = self.parameter_groups()
        if self.config.weight_decay:
            groups = [part for group in groups for part in _without_decay_of_vectors(group)]
        return torch.optim.AdamW(groups, lr=self.config.lr, **settings)

    # ---- models and examples

    def trained_models(self) -> list[nn.Module]:
        """The models whose parameters the optimiser updates."""
        return [self.model]

    @property
    def sampled_policy(self) -> nn.Module:
        """What responses are sampled from, in methods that sample."""
        return self.model

    def trained_parameters(self) -> list[nn.Parameter]:
        """Every parameter that trains, once, also where two models share a trunk."""
        parameters = [
            p for model in self.trained_models() for p in model.parameters() if p.requires_grad
        ]
        return list(dict.fromkeys(parameters))

    def parameter_groups(self) -> list[dict]:
        """`trained_parameters` as AdamW takes them, in groups with their own learning rates."""
        return [{"params": self.trained_parameters()}]

    def _prepare(self, model: nn.Module) -> None:
        model.train(self.config.dropout)
        model.prepare_training(
            freeze_layers=self.config.freeze_layers,
            activation_checkpointing=self.config.activation_checkpointing,
        )

    def check_examples(
        self, name: str, examples: Sequence, kinds: tuple[type, ...], *, plain: bool = False
    ) -> None:
        """Raise ValueError for the first example that cannot be trained on.

        Without kinds the examples are prompts, which are truncated instead. A method's `fault` does
        not apply to plain text.
        """
        if kinds:
            self.check_kinds(name, examples, kinds)
        vocab_size = self.model.config.vocab_size
        for i, example in self._unclear(examples, bool(kinds), plain):
            fault = unknown_id(example, vocab_size)
            if kinds:
                fault = misfit(example) or fault or self._excess(length(example))
                fault = fault or (None if plain else self.fault(example))
            if fault:
                raise ValueError(f"{name} {i} {fault}")

    def _unclear(self, examples: Sequence, whole: bool, plain: bool) -> Iterable[tuple[int, Any]]:
        """Places and examples that may have a fault: of a store those that its arrays do not clear.

        whole: Check all of an example, and not only its ids.
        """
        own_fault = whole and not plain and type(self).fault is not Trainer.fault
        if not isinstance(examples, ExampleStore) or (own_fault and self.needs is None):
            return enumerate(examples)
        config = self.model.config

        def may_have_fault(block: Block) -> np.ndarray:
            found = block.has_id_outside(config.vocab_size)
            if whole:
                longest = getattr(self.config, "max_length", config.max_positions)
                found |= block.may_misfit()
                found |= block.lengths() > min(longest, config.max_positions)
            if own_fault:
                found |= block.lacks(self.needs)
            return found

        return ((i, examples[i]) for i in examples.where(may_have_fault))

    def check_kinds(self, name: str, examples: Sequence, kinds: tuple[type, ...]) -> None:
        """Raise ValueError for the first example of another type."""
        if all(issubclass(kind, kinds) for kind in kinds_of(examples)):
            return
        for i, example in enumerate(examples):
            if not isinstance(example, kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                found = type(example).__name__
                raise ValueError(f"{name} {i} is of type {found}, {self.algorithm} takes {wanted}")

    def _excess(self, tokens: int) -> str | None:
        positions = self.model.config.max_positions
        if tokens > positions:
            return f"has {tokens} tokens, but the model has {positions} positions"
        max_length = getattr(self.config, "max_length", positions)
        if tokens > max_length:
            return (
                f"has {tokens} tokens, but max_length is {max_length}; the encoders of "
                "rlhf_core.data truncate examples"
            )
        return None

    def warn_once(self, message: str, key: str | None = None, step: int | None = None) -> None:
        """Warn of something that may recur in every step.

        Args:
            key: What it is, where the message changes.
            step: None: the step that runs.
        """
        key = key or message
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(f"step {step or self.steps_done + 1}: {message}", stacklevel=3)

    def fault(self, example: Any) -> str | None:
        """A method's own reason why an example cannot be trained on, or None.

        If all that it asks for is a finite number, or a label, in one field, `needs` names the
        field. Examples in an ExampleStore are then checked by their arrays.
        """
        return None

    # ---- batches

    @property
    def total_steps(self) -> int:
        steps = self.config.epochs * math.ceil(len(self.examples) / self.config.batch_size)
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    def batches(self) -> Iterator[list]:
        """Lists of examples, shuffled anew every epoch."""
        order = torch.Generator().manual_seed(self.config.seed)
        for _ in range(self.config.epochs):
            shuffled = torch.randperm(len(self.examples), generator=order).tolist()
            for start in range(0, len(shuffled), self.config.batch_size):
                yield [self.examples[i] for i in shuffled[start : start + self.config.batch_size]]

    def parts(
        self, batch: list, *, packing: int | None = None
    ) -> Iterator[tuple[list, TokenBatch]]:
        """Micro-batches of this rank's rows: examples and their tokens on the model's device.

        packing: as for `collate`.
        """
        for own in distributed.shares(len(batch), self.config.micro_batch_size):
            part = batch[own]
            tokens = collate(part, self.pad_id, packing=packing)
            if not distributed.idle():
                self.tokens += len(tokens.targets)
            yield part, to_device(tokens, self.device)

    def total(self, count: int) -> int:
        """The count over the whole batch: the one denominator of a mean loss; at least 1.

        Every rank holds the whole batch, so it needs no exchange.
        """
        return max(count, 1)

    # ---- one step

    def losses(self, batch: list, metrics: Metrics) -> Iterator[Tensor]:
        """Add to the metrics and yield each micro-batch's loss; they add up to the batch's loss."""
        raise TypeError(f"{type(self).__name__} defines neither losses nor step")

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of one forward pass with the config's `precision`; not of its backward.

        A CPU without bfloat16 instructions stays in float32, in which it is 5 to 70 times faster.

        Enter it anew for each forward: it caches a weight's bfloat16 copy, and a copy made without
        gradient would cut a later forward off from its weights.
        """
        enabled = self.config.precision == "bfloat16"
        if enabled and not backends.multiplies_bfloat16(self.device.type):
            self.warn_once(
                "precision bfloat16: this CPU has no bfloat16 instructions, so the run computes in "
                "float32, which is faster here"
            )
            enabled = False
        with contextlib.ExitStack() as stack:
            if enabled and not self.sharded:
                for model in self.trained_models():
                    stack.enter_context(self.frozen_copies.used_by(model))
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=enabled))
            yield

    def step(self, batch: list) -> dict[str, float]:
        """Take one optimiser step on a batch of examples; returns its metrics."""
        metrics = Metrics()
        try:
            grad_norm = self.optimize(self.losses(batch, metrics))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._blame(batch)}") from None
        lr = self.optimizer.param_groups[0]["lr"]
        return metrics.over_ranks().means() | {"grad_norm": grad_norm, "lr": lr}

    @torch.no_grad()
    def _blame(self, batch: list) -> str:
        """Name the examples whose loss alone is not finite, or say what to try."""
        bad = []
        for at, row in enumerate(batch):
            # Some losses need several rows.
            with distributed.alone(), contextlib.suppress(ValueError):
                if not all(loss.isfinite() for loss in self.losses([row], Metrics())):
                    places = (f"example {i}" for i, x in enumerate(self.examples) if x == row)
                    bad.append(next(places, f"row {at}, {row},"))  # a sampled row has no place
        if len(bad) == len(batch):
            return (
                "no row has a finite loss, so the weights are at fault: try a smaller lr or "
                "max_grad_norm, or a longer warmup"
            )
        if bad:
            count = f"one of {len(bad)} such rows in {len(batch)}"
            return f"the loss of {bad[0]} alone is not finite, {count}"
        return "every row's loss alone is finite: try a smaller lr, or precision float32"

    def shard(self) -> None:
        """Cut weights and optimiser states into pieces, if the config asks for it (FSDP2).

        Copies that follow the policy stay whole on every rank.
        """
        if self.sharded or self.config.copies is None or distributed.size() == 1:
            return
        _ = self.digests, self.description  # before whole weights are replaced
        states = {name: self.optimizer.state[x] for name, x in self._named_parameters().items()}
        compared = [] if self.eval_reference is None else [self.eval_reference.model]
        models = [self.model, *self.trained_models(), *self.fixed_models(), *compared]
        # Rank 0 alone asks a judge.
        asked = self.scorer.models if isinstance(self.scorer, JudgeScorer) else ()
        shard_all((model for model in models if model not in asked), self.config.copies)
        self.sharded, self.optimizer = True, self._new_optimizer()
        for name, parameter in self._named_parameters().items():
            for kind, x in states[name].items():
                self.optimizer.state[parameter][kind] = piece_like(x, parameter)

    def optimize(self, losses: Iterator[Tensor]) -> float:
        """Add up the gradients of the losses of all ranks, clip them and step.

        Returns:
            The gradient's norm before clipping.

        Raises:
            FloatingPointError: loss or gradient are not finite; the weights are unchanged.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total_loss: float | Tensor = 0.0
        with distributed.together():
            for loss in losses:
                loss = loss * 0 if distributed.idle() else loss
                loss.backward()
                total_loss += loss.detach()
        (total_loss,) = distributed.added(float(total_loss))
        reshard(*self.trained_models())
        parameters = self.trained_parameters()
        if not self.sharded:
            distributed.add_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        total_norm = nn.utils.get_total_norm(gradients)
        grad_norm = float(whole_tensor(total_norm))
        for name, value in (("gradient's norm", grad_norm), ("loss", total_loss)):
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value}; no weight was updated")
        if grad_norm > self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, total_norm)
        self.optimizer.step()
        return grad_norm

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics on `eval_examples` without dropout; their names start with eval_.

        For held-out prompts see `evaluate_answers`.
        """
        if not self.kinds:
            return self._evaluate_prompts()
        return {f"eval_{name}": x for name, x in self.metrics_of(self.eval_examples).items()}

    @torch.no_grad()
    def metrics_of(self, examples: Sequence) -> dict[str, float]:
        """The metrics of `losses` on examples, without dropout and without a step."""
        metrics, size = Metrics(), self.config.batch_size
        self.model.eval()
        for start in range(0, len(examples), size):
            for _ in self.losses(list(examples[start : start + size]), metrics):
                pass
        self.model.train(self.config.dropout)
        return metrics.over_ranks().means()

    def _evaluate_prompts(self) -> dict[str, float]:
        try:
            metrics, answers = evaluate_answers(
                self.sampled_policy,
                self.eval_examples,
                self.config,
                scorer=self.scorer,
                reference=self.eval_reference,
                judge=self.eval_judge,
                eos_ids=self.eos_ids,
                tokenizer=self.tokenizer,
                autocast=self.autocast,
                engine=self.engine,
            )
        except (JudgeError, EngineError) as error:  # it matters less than the run
            message = f"held-out prompts are not evaluated: {error}"
            self.warn_once(message, "held-out prompts", self.steps_done)
            return {}
        found = sample_rows("step", self.steps_done, *answers, self.tokenizer)
        self.samples += [row | {"held_out": True} for row in found]
        return metrics

    @torch.no_grad()
    def pretraining_loss(self) -> float:
        """Mean loss of `pretraining_examples` in nats per token, without dropout."""
        metrics, size = Metrics(), self.config.batch_size
        self.model.eval()
        for start in range(0, len(self.pretraining_examples), size):
            for _, tokens in self.parts(list(self.pretraining_examples[start : start + size])):
                with self.autocast():
                    completion_loss(self.model, tokens, 1, metrics)
        self.model.train(self.config.dropout)
        return metrics.over_ranks().means()["loss"]

    # ---- the run

    def train(self) -> list[dict[str, float]]:
        """Run the remaining steps, log each, save the model to `out`; returns all steps' metrics.

        With `out`, the first Ctrl-C, SIGTERM or SIGHUP waits for the end of the step and leaves a
        checkpoint; a second one, or $RLHF_CORE_GRACE seconds (30), stop at once. In both cases it
        raises KeyboardInterrupt, which exits with status 143 after SIGTERM and 129 after SIGHUP.

        Raises:
            BlockingIOError: another process or thread trains into `out`.
            FileNotFoundError: `out` was removed while the run went on. See also `advance`.
        """
        self._check_same_run()
        self.shard()
        if self.out is None:
            return self._train(signals.DelayedStop())
        with signals.delayed() as delayed, self._recording() as run:
            try:
                history = self._train(delayed)
            finally:
                run.facts["steps_done"] = self.steps_done
            run.facts["status"] = "finished"
            if delayed.signum:
                done = (
                    f"all {self.total_steps} steps are done, and the model is saved in {self.out}"
                )
                raise signals.stop(delayed.signum, done)
            return history

    def _check_same_run(self) -> None:
        """Raise ValueError if ranks differ in weights, data or options."""
        if distributed.size() == 1:
            return
        run, weights = self._run(), checkpoint.digest(*self.trained_parameters())
        facts = {**run["settings"], **run["digests"], "trained weights": weights}
        first, *others = distributed.gather_objects(facts)
        for rank, other in enumerate(others, 1):
            for name in first | other:
                here, there = first.get(name), other.get(name)
                if here != there:
                    raise ValueError(
                        f"rank {rank} has another {name} than rank 0: {there!r:.60}, not "
                        f"{here!r:.60}. Give all processes the same command, files and seed"
                    )

    @contextlib.contextmanager
    def _recording(self) -> Iterator[RunFile]:
        """Hold `out`, and record the run in its run.json. Rank 0 does; the others only wait."""
        with contextlib.ExitStack() as stack:
            run = RunFile(self.out, {})
            with distributed.together():
                if not distributed.rank():
                    stack.enter_context(hold(self.out))
                    run = stack.enter_context(recording(self.out))
                    stale_adapters(self.out)  # refuses now what it would refuse at the end
                    run.start(self._facts(), resumed=self.steps_done > 0)
            yield run

    def _train(self, delayed: signals.DelayedStop) -> list[dict[str, float]]:
        writes = self.out is not None and not distributed.rank()
        log = RunLog(
            self.algorithm,
            asdict(self.config),
            self.out if writes else None,
            main_metric=self.main_metric,
            steps_done=self.steps_done,
            total_steps=self.total_steps,
            quiet=distributed.rank() > 0,
        )
        keeping = freed_memory.kept() if self.device.type == "cpu" else contextlib.nullcontext()
        with log, keeping:
            history = distributed.from_rank_0(log.history)
            best = max(map(self._value_to_keep, history), default=-math.inf)
            for batch in itertools.islice(self.batches(), self.steps_done, self.total_steps):
                history.append(self.advance(batch))
                last, every = self.steps_done == self.total_steps, self.config.save_every
                if last and PRETRAINING_BEFORE in history[0]:
                    history[-1][PRETRAINING_BEFORE] = history[0][PRETRAINING_BEFORE]
                delayed.signum = max(distributed.gather_objects(delayed.signum or 0)) or None
                for monitor, message in alarms(history, self.config.eval_every).items():
                    self.warn_once(message, monitor.advice, self.steps_done)
                value = self._value_to_keep(history[-1])
                due = every and self.out and (last or self.steps_done % every == 0)
                with distributed.together():
                    log.write(history[-1], self.timings, self.samples)
                    self._notify(log, history[-1])
                    if value > best and self.out is not None:
                        best = value
                        self.save_checkpoint(checkpoint.BEST_NAME)
                    if delayed.signum or due:
                        log.sync()
                        path = self.save_checkpoint()
                if delayed.signum and not last:
                    saved = f"step {self.steps_done} is saved in {path}"
                    raise signals.stop(delayed.signum, saved)
        if self.out is not None and self.config.keep_best:
            self._report_best(history)
        if not self.finished:
            if self.total_steps >= MIN_STEPS:
                self._warn_if_unmoved(history[0])
            self.finish(history[-1])
            self.finished = True
        with distributed.together():
            if writes or (self.sharded and self.out is not None):
                self.save(self.out)
        return history

    def _notify(self, log: RunLog, metrics: dict[str, float]) -> None:
        """Call on_step; if it raises, leave a checkpoint, because the step itself is done."""
        try:
            notify(self.on_step, metrics | self.timings, "step")
        except RuntimeError as error:
            if self.out is None or self.sharded:  # the other ranks do not save now
                raise
            log.sync()
            saved = f"{error}; continue from {self.save_checkpoint()}"
            raise RuntimeError(saved) from error.__cause__

    def advance(self, batch: list) -> dict[str, float]:
        """Take a step, then evaluate and compute `last_metrics` where they are due.

        Raises:
            FloatingPointError: the run has diverged.
            ValueError, RewardError: a batch or reward is bad.
            EngineError: the engine does not sample. All name the step. With `out`, the state before
                the error is left in `out`/checkpoint-error, or, for a JudgeError or an EngineError,
                in a checkpoint to resume from.
        """
        step, every = self.steps_done + 1, self.config.eval_every
        last = step == self.total_steps
        before = None if self.generator is None else self.generator.get_state()
        self._set_lr()
        if self.config.dropout and distributed.rank():  # other rows, so other masks than rank 0's
            torch.manual_seed((self.config.seed + step) * distributed.size() + distributed.rank())
        try:
            metrics: dict[str, float] = {"step": step}
            if len(self.pretraining_examples) and step == 1:
                metrics[PRETRAINING_BEFORE] = self.pretraining_loss()
            self.tokens, self.samples, started = 0, [], time.monotonic()
            with distributed.together():
                metrics |= self.step(batch)
                self._time(step, time.monotonic() - started)
                self.steps_done = step
                due = last or (every and step % every == 0)
                if len(self.eval_examples) and due:
                    metrics |= self.evaluate()
                if len(self.pretraining_examples) and due:
                    metrics["pretraining/loss"] = self.pretraining_loss()
                return metrics | self.last_metrics() if last else metrics
        except Exception as error:
            saved = ""
            # A judge or an engine may work again later: the step is taken again, with its samples.
            passing = isinstance(error, JudgeError | EngineError)
            if passing and before is not None and self.steps_done < step:
                self.generator.set_state(before)
            if self.out and not distributed.rank() and not self.sharded:
                name = None if passing else checkpoint.ERROR_NAME
                saved = f"; the state is saved in {self.save_checkpoint(name)}"
            plain = (FloatingPointError, ValueError, RuntimeError, distributed.RankError)
            if type(error) not in plain and not isinstance(error, RewardError | EngineError):
                raise
            raise type(error)(f"step {step}: {error}{saved}") from error

    def _value_to_keep(self, metrics: dict[str, float]) -> float:
        """The value of keep_best in a step's metrics, higher is better; -inf if it has none."""
        way, _, name = (self.config.keep_best or "").rpartition(":")
        lower = way == "min" or (not way and name.endswith("loss"))
        value = metrics.get(name, math.nan)
        return (-value if lower else value) if math.isfinite(value) else -math.inf

    def _report_best(self, history: list[dict[str, float]]) -> None:
        """Print which step is kept in checkpoint-best, or warn that none has the metric."""
        best, wanted = max(history, key=self._value_to_keep), self.config.keep_best
        if self._value_to_keep(best) == -math.inf:
            message = f"nothing is kept: no step has keep_best {wanted!r}, which must be one of "
            warnings.warn(message + ", ".join(history[-1]), stacklevel=4)
        else:
            value = best[wanted.rpartition(":")[2]]
            place = self.out / checkpoint.BEST_NAME
            print(f"best {wanted} {value:.4g} at step {best['step']}: {place}", file=sys.stderr)

    def _time(self, step: int, seconds: float) -> None:
        (tokens,) = distributed.added(float(self.tokens))
        self.timings = {
            "step": step,
            "time/step_s": seconds,
            "time/tokens_per_s": tokens / max(seconds, 1e-9),
            "memory/peak_mb": peak_memory(self.device),
        }

    def note_samples(self, prompts: Sequence, responses: Sequence, scores: Sequence) -> None:
        """Keep some of this step's responses for the log, where sample_every asks for them."""
        step, every = self.steps_done + 1, self.config.sample_every
        if every and (step == 1 or step % every == 0):
            self.samples = sample_rows("step", step, prompts, responses, scores, self.tokenizer)

    def _warn_if_unmoved(self, first: dict[str, float]) -> None:
        moved = self.movement(first)
        if moved is not None and moved[0] < self.least_movement:
            value = getattr(self.config, self.pace)
            warnings.warn(
                f"{self.pace} {value:g} {moved[1]} in {self.total_steps} steps: almost nothing. "
                f"Try a larger {self.pace}; see docs/guides/settings.md",
                stacklevel=4,
            )

    @torch.no_grad()
    def movement(self, first: dict[str, float]) -> tuple[float, str] | None:
        """How far the run has moved the model, as a number and as text; None if unknown.

        first: the metrics of the first step.
        """
        if not self.kinds or not first.get("loss"):
            return None
        before, now = first["loss"], self.metrics_of(next(self.batches()))["loss"]
        return abs(now / before - 1), f"moved the first batch's loss from {before:.6g} to {now:.6g}"

    def last_metrics(self) -> dict[str, float]:
        """Metrics of the last step only."""
        return {}

    def finish(self, last: dict[str, float]) -> None:
        """Finish the model before it is saved, given the last step's metrics.

        Checkpoints hold the model before this, so that a finished run can be extended.
        """

    def save(self, path: Path) -> None:
        """Write the model, and the tokenizer if there is one, in the Hugging Face layout.

        All ranks call this if the weights are sharded; rank 0 writes.
        """
        self.model.save_pretrained(path)
        if self.tokenizer is not None and not distributed.rank():
            self.tokenizer.save(path)

    def _set_lr(self) -> None:
        factor, warmup = 1.0, self.config.warmup_steps
        if self.steps_done < warmup:
            factor = (self.steps_done + 1) / warmup
        elif self.config.lr_schedule != "constant":
            factor = (self.total_steps - self.steps_done) / (self.total_steps - warmup)
            if self.config.lr_schedule == "cosine":
                factor = (1 - math.cos(math.pi * factor)) / 2
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs):
            group["lr"] = peak_lr * factor

    # ---- checkpoints

    def save_checkpoint(self, name: str | None = None) -> Path:
        """Write the model and the run's state to a folder in `out`; returns its path.

        Of several processes rank 0 writes, because their states are equal; of sharded weights each
        rank writes its pieces.

        name: of the folder; None means checkpoint-STEP, which also removes older ones: see `keep`.
        """
        path = self.out / (name or f"{checkpoint.NAME}-{self.steps_done}")
        if distributed.rank():
            if self.sharded:
                self._write_state(distributed.from_rank_0(None))
            return path
        checkpoint.check_ours(path)
        with hold(self.out):
            with replacing_folder(path) as folder:
                self._write_state(distributed.from_rank_0(folder) if self.sharded else folder)
            if name is None:
                states = checkpoint.find(self.out)
                last = states.index(path / checkpoint.STATE)
                checkpoint.remove(states[: max(last + 1 - self.config.keep, 0)])
        return path

    def _write_state(self, folder: Path) -> None:
        """Write the model and the run's state into a folder."""
        self.save(folder)
        reshard(*self.trained_models())
        run, parameters = self._run(), self._named_parameters()
        checkpoint.save(folder / checkpoint.STATE, run, self.state(), parameters, self.optimizer)

    def resume(self) -> None:
        """Move to the step of the newest checkpoint in `out`; `train` runs the remaining steps.

        Build the trainer as for the original run. For errors see `checkpoint.load`.
        """
        if self.out is None:
            raise ValueError("a trainer without out has no checkpoint to resume from")
        if checkpoint.in_pieces(self.out):
            self.shard()
        run, parameters = self._run(), self._named_parameters()
        self.steps_done = checkpoint.load(
            self.out, run, self.state(), parameters, self.optimizer, self.load_state
        )

    def state(self) -> dict[str, Tensor]:
        """Generators and counters, for a checkpoint; weights and optimiser are included anyway."""
        state = {"generator": torch.get_rng_state()}
        if self.generator is not None:
            state["sampling"] = self.generator.get_state()
        if self.device.type == "cuda":
            state["generator_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors that `state` returned."""
        torch.set_rng_state(state["generator"])
        if self.generator is not None:
            self.generator.set_state(state["sampling"])
        if self.device.type == "cuda" and "generator_cuda" in state:
            torch.cuda.set_rng_state(state["generator_cuda"], self.device)

    def settings(self) -> dict:
        """Further values that a run depends on, for its checkpoint, which includes the config."""
        return {}

    def fixed_data(self) -> list[Sequence]:
        """The examples that a resumed run must share with the checkpoint's run."""
        return [self.examples]

    def fixed_models(self) -> list[nn.Module]:
        """Models whose frozen weights a resumed run must share with the checkpoint's run."""
        return [self.model]

    def models(self) -> list[nn.Module]:
        """Every model that a run uses."""
        reference = [] if self.reference is None else [self.reference.model]
        return [*self.trained_models(), *self.fixed_models(), *reference]

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """Models, reward and tokenizer, as `checkpoint.description` has them."""
        return checkpoint.description(self.models(), self.tokenizer, self.scorer)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the data, and of every weight that no step changes."""
        trained = set(map(id, self.trained_parameters()))
        weights = nn.ModuleList(self.fixed_models()).parameters()
        frozen = (weight for weight in weights if id(weight) not in trained)
        data = digest(self.fixed_data())
        return {"examples": data, "frozen weights": checkpoint.digest_of(frozen)}

    def _run(self) -> dict[str, Any]:
        """The description of the run in its checkpoint; JSON values."""
        settings = {"algorithm": self.algorithm, **asdict(self.config), **self.settings()}
        if has_adapters(self.model):
            lora = asdict(adapter_config(self.model))
            del lora["base"]  # a path, which may change
            settings["lora"] = lora
        steps = {"steps_done": self.steps_done, "total_steps": self.total_steps}
        settings = json.loads(json.dumps(settings)) | self.description
        return {**steps, "settings": settings, "digests": self.digests}

    def _facts(self) -> dict[str, Any]:
        """What run.json says of the run; JSON values."""
        return {
            "algorithm": self.algorithm,
            "steps_done": self.steps_done,
            "total_steps": self.total_steps,
            "seed": self.config.seed,
            "options": asdict(self.config),
            "examples": {"train": len(self.examples), "eval": len(self.eval_examples)},
            **self.description,
            "device": str(self.device),
        }

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter once, by the index of its model and its name there."""
        named = {}
        for i, model in enumerate(self.trained_models()):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    named.setdefault(parameter, f"{i}.{name}")
        return {name: parameter for parameter, name in named.items()}


def _without_decay_of_vectors(group: dict) -> list[dict]:
    """The group in two: matrices, and norms and biases, which weight decay would only disturb."""
    matrices = [p for p in group["params"] if p.ndim > 1]
    vectors = [p for p in group["params"] if p.ndim <= 1]
    return [group | {"params": matrices}, group | {"params": vectors, "weight_decay": 0.0}]


def _has_dropout(model: nn.Module) -> bool:
    """Whether the model's config, or that of its adapters, drops anything in train mode."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    names = ("dropout", "attention_dropout")
    return any(getattr(config, name, 0) for config in configs for name in names)
