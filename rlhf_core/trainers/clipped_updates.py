"""Passes of clipped policy updates over a rollout, with everything that may be added to their loss: the KL, an entropy
bonus, a value loss, the likelihood of other texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data import Example
from rlhf_core.data.collate import count_targets
from rlhf_core.losses.kl import kl_loss
from rlhf_core.masking import loss_weights, masked_mean
from rlhf_core.ops import kl_estimate, ppo_loss
from rlhf_core.ops.policy_loss import PPOLossStats
from rlhf_core.rollout import Rollout, response_full_kl, response_hidden, response_logprobs
from rlhf_core.trainers.common import Metrics, Trainer, micro_batches, rows
from rlhf_core.trainers.completions import completion_loss
from rlhf_core.trainers.config import OnPolicyConfig
from rlhf_core.trainers.reference import Reference

MAX_FIRST_ERROR = {
    "float32": 1e-3,
    "bfloat16": 0.05,
}  # of the first minibatch's ratio: its padding rounds otherwise
DIVERGED = "the weights have diverged (a smaller lr, fewer ppo_epochs) or overflow in bfloat16"


class Experience(NamedTuple):
    """What the passes over a rollout read beside it, all (B, R), fixed while the policy moves."""

    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor
    old_values: Tensor | None = None  # with a critic
    returns: Tensor | None = None
    importance: Tensor | None = (
        None  # with importance_cap: trained / sampled; the advantages have it in them
    )


class Coefficient:
    """A coefficient that is steered so that what it holds down stays at a target (Ziegler et al. 2019, section 2.2).

    value *= 1 + clip(measured / target - 1, +-0.2) * n / horizon, n the responses seen; sign -1 for what it lifts.
    """

    def __init__(self, value: float, target: float | None, horizon: int, sign: int = 1):
        self.value, self.target, self.horizon, self.sign = value, target, horizon, sign

    def update(self, measured: float, n: int) -> None:
        if self.target is not None:
            error = min(max(measured / self.target - 1, -0.2), 0.2)
            self.value *= 1 + self.sign * error * n / self.horizon


class ClippedUpdates(Trainer):
    """A trainer whose `step` calls `update`; it has, beside model and optimizer, what follows."""

    config: OnPolicyConfig
    reference: Reference | None
    kl_coef: Coefficient
    entropy_coef: Coefficient
    ptx_examples: Sequence[Example]
    generator: torch.Generator

    value_clip_range, vf_coef = None, 0.0  # without a critic
    policy_rests = False  # in a critic's warm-up

    def forward(self, rollout: Rollout, loss_of: Callable | None = None) -> dict[str, Tensor]:
        """logprobs and entropy (B, R) of the response tokens, and the hidden states they were read from; loss_of as for
        `response_logprobs`."""
        with self.autocast():
            hidden = response_hidden(self.model.trunk, rollout)
            logprobs, entropy = self.response_logprobs(rollout, hidden, loss_of)
        return {"logprobs": logprobs, "entropy": entropy, "hidden": hidden}

    def response_logprobs(
        self, rollout: Rollout, hidden: Tensor, loss_of: Callable | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy (B, R) under what is sampled from."""
        return response_logprobs(self.model, rollout, self.config.temperature, hidden, loss_of)

    def check(self, columns: dict[str, Tensor]) -> None:
        """FloatingPointError naming column, row and token where one (B, R) holds what it never may."""
        for (name, x), bad in zip(
            columns.items(), torch.stack([~x.isfinite() for x in columns.values()]).cpu()
        ):
            if bad.any():
                row, token = bad.nonzero()[0].tolist()
                raise FloatingPointError(
                    f"{name} is {x[row, token]} at row {row}, token {token}: {DIVERGED}"
                )
        kl, estimator = columns.get("kl"), self.config.estimator
        if kl is not None and estimator != "k1" and (kl < 0).any():
            row, token = (kl < 0).nonzero()[0].tolist()
            raise FloatingPointError(
                f"{estimator} is {kl[row, token]} < 0 at row {row}, token {token}: no log-probs give that, so the op "
                "is wrong here; try RLHF_CORE_BACKEND=reference, and see `rlhf-core info` for what that replaces"
            )

    def update(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> None:
        """Passes of clipped updates over the rollout, in minibatches; they end early beyond max_approx_kl."""
        config, size = self.config, len(rollout.response_ids)
        if config.importance_cap is not None:
            log_weight = (experience.old_logprobs - rollout.logprobs).where(
                rollout.response_mask, 0
            )
            weight = log_weight.exp().clamp_max(config.importance_cap)
            experience = experience._replace(
                advantages=experience.advantages * weight, importance=weight
            )
        for epoch in range(config.ppo_epochs):
            order = torch.randperm(size, generator=self.generator, device=self.device)
            for i, index in enumerate(order.split(config.update_size)):
                seen = Metrics()
                losses = self.minibatch_losses(rows(rollout, index), rows(experience, index), seen)
                losses = losses if epoch or i else self.checked(losses, seen)
                try:
                    norm = self.optimize(chain(losses, self.ptx_losses(len(index), seen)))
                except FloatingPointError as error:
                    with torch.no_grad():
                        self.check(
                            {
                                name: x
                                for name, x in self.forward(rollout).items()
                                if name != "hidden"
                            }
                        )
                    raise FloatingPointError(f"{error}; perhaps {DIVERGED}") from None
                metrics.merge(seen)
                metrics.add("grad_norm", torch.tensor(norm))
                if (
                    config.max_approx_kl is not None
                    and seen.means()["policy/approxkl_avg"] > config.max_approx_kl
                ):
                    return

    def checked(self, losses: Iterator[Tensor], metrics: Metrics) -> Iterator[Tensor]:
        """The losses of a rollout's first minibatch; then, before it updates anything, the policy must still be the one
        that the old log-probs are of: ratio 1 up to rounding. With dropout it is not."""
        yield from losses
        means = metrics.means()
        error = max(abs(means["val/ratio"] - 1), means["policy/approxkl_avg"])
        if error > MAX_FIRST_ERROR[self.config.precision] and not self.config.dropout:
            raise FloatingPointError(
                f"the first minibatch has ratio {means['val/ratio']:.6g} and approximate KL "
                f"{means['policy/approxkl_avg']:.3g}, not 1 and 0; nothing updated. Likely causes: the policy is in "
                "train mode, or moved between rollout and update, or its forward depends on the other rows of a batch"
            )

    def minibatch_losses(
        self, rollout: Rollout, experience: Experience, metrics: Metrics
    ) -> Iterator[Tensor]:
        """The loss of each micro-batch; the parts add up to the minibatch's loss."""
        config = self.config
        weights = loss_weights(
            rollout.response_mask, config.aggregation, length=config.response_length
        )  # (B, R)
        for part, old, w in micro_batches(config.micro_batch_size, rollout, experience, weights):
            mask = part.response_mask
            counted, counted_weights = rows(old, mask), w[mask]  # (M,)

            def loss_of(logprobs, tokens, counted=counted, weights=counted_weights):
                weights = weights[None, tokens]
                mask = torch.ones_like(weights, dtype=torch.bool)
                return self.token_loss(
                    logprobs[None], rows(counted, (None, tokens)), mask, weights
                )[0]

            found = self.forward(part, loss_of if self.token_by_token else None)
            logprobs, entropy, values = found["logprobs"], found["entropy"], found.get("values")
            loss, stats = self.token_loss(logprobs, old, mask, w, entropy, values)
            if self.full_kl_in_loss:
                loss = loss + self.kl_coef.value * (self.full_kl(part, found["hidden"]) * w).sum()
            self.add_statistics(metrics, stats)
            yield loss

    def ptx_losses(self, size: int, metrics: Metrics) -> Iterator[Tensor]:
        """ptx_coef times the mean cross-entropy of so many ptx examples, drawn with replacement, by micro-batches."""
        if self.config.ptx_coef and not self.policy_rests:
            where = dict(generator=self.generator, device=self.device)
            batch = [
                self.ptx_examples[i]
                for i in torch.randint(len(self.ptx_examples), (size,), **where).tolist()
            ]
            count = sum(map(count_targets, batch))
            for tokens in self.token_batches(batch):
                with self.autocast():
                    loss = completion_loss(self.model, tokens, count)
                n = len(tokens.targets)
                if n:
                    metrics.add_mean("loss/ptx", loss * count / n, n)
                yield self.config.ptx_coef * loss

    @property
    def full_kl_in_loss(self) -> bool:
        return self.kl_in_loss and self.config.estimator == "full"

    @property
    def kl_in_loss(self) -> bool:
        return self.config.kl_in == "loss" and self.kl_coef.value > 0 and not self.policy_rests

    @property
    def token_by_token(self) -> bool:
        """Whether the loss falls apart into tokens and sees of the policy their log-probs alone."""
        return self.entropy_coef.value == 0

    def token_loss(
        self,
        logprobs: Tensor,
        old: Experience,
        mask: Tensor,
        weights: Tensor,
        entropy: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, PPOLossStats]:
        """The clipped loss of tokens (B, R), the KL's part in it, and statistics; without entropy not its bonus."""
        config, entropy_coef = self.config, self.entropy_coef.value if entropy is not None else 0.0
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        if not entropy_coef and entropy is not None:
            entropy = (
                entropy.detach()
            )  # for the statistics: else a gradient of zeros would be taken to the logits
        ratio_logprobs = self.ratio_logprobs(logprobs, old.old_logprobs, mask)
        loss, stats = ppo_loss(
            ratio_logprobs,
            old.old_logprobs,
            old.advantages,
            values,
            None if values is None else old.old_values,
            None if values is None else old.returns,
            mask,
            clip_range=(config.clip_range, high),
            value_clip_range=self.value_clip_range,
            vf_coef=self.vf_coef,
            entropy=entropy,
            entropy_coef=entropy_coef,
            dual_clip=config.dual_clip,
            weights=weights,
        )
        if ratio_logprobs is not logprobs:  # approximate KL is a token's all the same
            kl = kl_estimate(old.old_logprobs, logprobs.detach(), estimator="k3", mask=mask)
            stats = stats._replace(approx_kl=masked_mean(kl, mask))
        if self.kl_in_loss and not self.full_kl_in_loss:
            kl = kl_loss(
                logprobs, old.old_logprobs, old.ref_logprobs, mask, estimator=config.estimator
            )
            kl = kl if old.importance is None else kl * old.importance
            loss = loss + self.kl_coef.value * (kl * weights).sum()
        return loss, stats

    def ratio_logprobs(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The log-probs whose ratio to the old ones is clipped."""
        return logprobs

    def full_kl(self, rollout: Rollout, hidden: Tensor) -> Tensor:
        """Exact KL (B, R) of the response tokens, with gradient to the policy."""
        with self.reference.policy() as reference, self.autocast():
            ref_hidden = response_hidden(reference.trunk, rollout)
        with self.autocast():
            heads = self.model, self.reference.model
            return response_full_kl(*heads, rollout, self.config.temperature, hidden, ref_hidden)

    @staticmethod
    def add_statistics(metrics: Metrics, stats: PPOLossStats) -> None:
        for name, mean in {
            "loss/policy_avg": stats.policy_loss,
            "policy/approxkl_avg": stats.approx_kl,
            "policy/clipfrac_avg": stats.clip_frac,
            "policy/entropy_avg": stats.entropy,
            "policy/dual_clipfrac_avg": stats.dual_clip_frac,
            "val/ratio": stats.ratio,
            "ratio_squared": stats.ratio_squared,
        }.items():
            metrics.add_mean(name, mean, stats.count)
