"""TRPO (Schulman et al. 2015): the largest step of the policy within a KL of the one that sampled.

A step maximises the surrogate E[ratio * A] subject to a mean KL per token of at most max_kl. Its
direction is the natural gradient, its length the one whose KL is max_kl to second order, and a line
search shortens it until both hold. The critic trains as in PPO. Left out: a replay of states.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.algorithms.ppo import PPOConfig, PPOTrainer
from rlhf_core.data.batches import micro_batches, rows
from rlhf_core.masking import loss_weights
from rlhf_core.options import option
from rlhf_core.policy_gradient.experience import Experience
from rlhf_core.policy_gradient.trainer import DIVERGED
from rlhf_core.policy_gradient.trust_region import (
    Outcome,
    Weights,
    compare,
    dot_of,
    fisher_product,
    line_search,
    natural_step,
    take_gradient,
)
from rlhf_core.rollout import Rollout, response_hidden
from rlhf_core.training.metrics import Metrics

NO_STEP = (
    "no step of the line search improves the surrogate within max_kl, so the policy stays as it "
    "is; trpo/failed counts such steps. Try a larger cg_damping, fisher_share or batch_size"
)


@dataclass(frozen=True)
class TRPOConfig(PPOConfig):
    """The trust region. Optimiser, minibatches and ppo_epochs are those of the critic alone."""

    lr: float = option(3e-6, "peak learning rate of the critic", within="(0, inf)")
    ppo_epochs: int = option(4, "the critic's passes over each rollout", within="[1, inf)")
    clip_range: float = option(math.inf, "TRPO does not clip", within="(0, inf]")
    max_kl: float = option(
        0.003,
        "nats per token by which a step may move the policy; higher moves it further",
        within="(0, inf)",
    )
    cg_iterations: int = option(
        10, "products with the Fisher matrix for a step's direction", within="[1, inf)"
    )
    cg_damping: float = option(
        0.1,
        "added to the Fisher matrix's diagonal; higher turns the direction to the gradient's",
        within="(0, inf)",
    )
    fisher_share: float = option(
        1.0, "share of a rollout's responses that the Fisher matrix is made of", within="(0, 1]"
    )
    line_search_steps: int = option(
        10, "lengths of a step that are tried before the policy stays", within="[1, inf)"
    )
    backtrack: float = option(
        0.7, "each further length is this share of the one before", within="(0, 1)"
    )

    def __post_init__(self):
        super().__post_init__()
        in_loss = self.kl_in == "loss" and self.kl_coef > 0
        self.check(
            ("clip_range", self.clip_range == math.inf, "inf in TRPO: max_kl bounds a step"),
            ("clip_range_high", self.clip_range_high is None, "None in TRPO: max_kl bounds a step"),
            ("dual_clip", self.dual_clip is None, "None in TRPO: max_kl bounds a step"),
            ("max_approx_kl", self.max_approx_kl is None, "None in TRPO: see max_kl"),
            ("critic_lr", self.critic_lr is None, "None in TRPO: lr is the critic's"),
            ("ptx_coef", not self.ptx_coef, "0 in TRPO: its surrogate knows rollouts only"),
            ("dropout", not self.dropout, "False in TRPO: its KL belongs to a fixed policy"),
            ("kl_estimator", not in_loss or self.estimator != "full", "k1, k2 or k3 in the loss"),
        )


class TRPOTrainer(PPOTrainer):
    """Arguments as for `PPOTrainer`; a critic on the policy's trunk trains its head alone.

    Further metrics: trpo/kl, the exact mean KL per token of a step; trpo/improvement of the
    surrogate, and that expected to first order; trpo/step_fraction, the share of the full length;
    trpo/failed, 1 if no length would do. The statistics of the policy, and loss/policy_avg, are
    those after its step. With precision bfloat16, Fisher matrix and line search stay float32.
    """

    algorithm = "trpo"
    pace = "max_kl"

    def parameter_groups(self) -> list[dict]:
        policy = set(self.model.parameters())
        return [{"params": [p for p in self.trained_parameters() if p not in policy]}]

    def passes(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> None:
        """One step of the policy, then the critic's optimiser steps."""
        if self.policy_trains:
            self.step_policy(rollout, experience._replace(returns=None), metrics)
        if self.config.vf_coef:
            super().passes(rollout, experience, metrics)

    def step_policy(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> None:
        """Move the policy along the natural gradient, as far as the line search accepts."""
        config, before = self.config, Metrics()

        # 1. The gradient of the loss, which is minus the surrogate, where the ratio is 1.
        losses = super().minibatch_losses(rollout, experience, before)
        with distributed.together():
            for loss in super().checked(losses, before, first=True):
                (loss * 0 if distributed.idle() else loss).backward()
        gradient, dot = take_gradient(self.model), dot_of(self.model)
        if not dot(gradient, gradient).isfinite():
            self.predict(rollout)  # names the row and token at fault, if there is one
            raise FloatingPointError(
                f"the policy's gradient is not finite; no weight was updated; perhaps {DIVERGED}"
            )

        # 2. The natural gradient, at the length that has a KL of max_kl to second order.
        size = len(rollout.response_ids)
        order = torch.randperm(size, generator=self.generator, device=self.device)
        some = rows(rollout, order[: math.ceil(config.fisher_share * size)])
        tokens = self.total(int(some.response_mask.sum()))
        options = dict(micro_batch_size=config.micro_batch_size, temperature=config.temperature)
        product = partial(fisher_product, self.model, some, tokens=tokens, **options)
        options = dict(damping=config.cg_damping, iterations=config.cg_iterations, dot=dot)
        step = natural_step(product, -gradient, max_kl=config.max_kl, **options)
        moves = bool(dot(step, step) > 0)

        # 3. The longest part of that step whose exact KL is within max_kl and that improves.
        tries = config.line_search_steps if moves else 0
        options = dict(max_kl=config.max_kl, tries=tries, backtrack=config.backtrack)
        measure = partial(self.measure, rollout, experience)
        part, outcome = line_search(self.model, step, measure, **options)
        failed = outcome is None and moves
        if failed:
            self.warn_once(NO_STEP)
        kl, gain, after = outcome or (0.0, 0.0, before.over_ranks())
        metrics.merge(after)
        for name, value in {
            "kl": kl,
            "improvement": gain,
            "expected_improvement": -part * float(dot(gradient, step)),
            "step_fraction": part,
            "failed": float(failed),
        }.items():
            metrics.add(f"trpo/{name}", torch.tensor(value))

    def measure(self, rollout: Rollout, experience: Experience, start: Weights) -> Outcome:
        """What the move from the weights `start` has done, in float32."""
        config, mask = self.config, rollout.response_mask
        weights = loss_weights(mask, config.aggregation, length=config.response_length)
        total_kl = gain = torch.zeros((), device=self.device)
        metrics = Metrics()
        for part, old, w in micro_batches(config.micro_batch_size, rollout, experience, weights):
            kl, before, now = compare(self.model, start, part, config.temperature)
            if distributed.idle():
                continue
            rest = old._replace(old_logprobs=before[0]), part.response_mask, w
            gain = gain + self.policy_loss(*before, *rest, Metrics())
            gain = gain - self.policy_loss(*now, *rest, metrics)
            total_kl = total_kl + kl.sum()
        total, gained = distributed.added(float(total_kl), float(gain))
        return Outcome(total / self.total(int(mask.sum())), gained, metrics.over_ranks())

    # ---- the critic

    def minibatch_losses(
        self, rollout: Rollout, experience: Experience, metrics: Metrics
    ) -> Iterator[Tensor]:
        """The critic's loss of each micro-batch; they add up to the minibatch's loss."""
        config = self.config
        weights = loss_weights(
            rollout.response_mask, config.aggregation, length=config.response_length
        )
        for part, old, w in micro_batches(config.micro_batch_size, rollout, experience, weights):
            hidden = None
            if self.shares_trunk:
                with torch.no_grad(), self.autocast():
                    hidden = response_hidden(self.model, part)
            values = self.predict_values(part, hidden)
            yield self.value_loss(values, old, part.response_mask, w, metrics)

    def checked(self, losses: Iterator[Tensor], metrics: Metrics, first: bool) -> Iterator[Tensor]:
        """The losses as they are: only those of the policy need a check."""
        return losses
