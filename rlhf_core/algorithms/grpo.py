"""Policy gradients without a critic: the responses to a prompt are compared with each other.

GRPO (Shao et al. 2024), RLOO (Ahmadian et al. 2024), REINFORCE++ (Hu et al. 2025) and ReMax (Li et
al. 2023) differ in how scores become advantages, see losses/advantages.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.data.batches import rows
from rlhf_core.feedback.candidates import ALL_TIED
from rlhf_core.feedback.rewards import scores_of
from rlhf_core.losses.advantages import ESTIMATORS
from rlhf_core.losses.cispo import cispo_loss
from rlhf_core.masking import masked_mean, tied
from rlhf_core.ops.policy_loss import PPOLossStats
from rlhf_core.options import option
from rlhf_core.policy_gradient.config import (
    KL_COEF,
    ONE_UPDATE,
    TEMPERATURE,
    PolicyGradientConfig,
)
from rlhf_core.policy_gradient.experience import Experience
from rlhf_core.policy_gradient.trainer import PolicyGradientTrainer
from rlhf_core.rollout import Rollout, join
from rlhf_core.training.metrics import Metrics


@dataclass(frozen=True)
class GRPOConfig(PolicyGradientConfig):
    """Groups and advantages of GRPO, RLOO, REINFORCE++ and ReMax.

    Dr. GRPO (Liu et al. 2025): normalize False, aggregation sequence_sum. DAPO (Yu et al. 2025):
    mask_truncated or overlong_buffer, dynamic_sampling and, with several updates per rollout,
    clip_range_high 0.28. GSPO (Zheng et al. 2025), likewise: ratio sequence, aggregation
    sequence_mean, clip ranges near 3e-4.
    """

    lr: float = option(1e-6, "peak learning rate of AdamW", within="(0, inf)")
    batch_size: int = option(8, "prompts of a rollout", within="[1, inf)")
    num_samples: int = option(8, "responses to each prompt", within="[1, inf)")
    minibatch_size: int | None = option(
        None, "responses of an optimiser step; unset: the whole rollout"
    )
    ppo_epochs: int = option(1, "passes over each rollout", within="[1, inf)")
    temperature: float = option(1.0, TEMPERATURE, within="(0, inf)")
    kl_coef: float = option(0.0, KL_COEF, within="[0, inf)")
    kl_in: str = option(
        "loss",
        "where the KL penalty enters: the loss, with its own gradient, or the reward, before the "
        "advantages",
        choices=("loss", "reward"),
    )
    advantage: str = option("grpo", "how scores become advantages", choices=tuple(ESTIMATORS))
    normalize: bool = option(True, "grpo divides by the standard deviation of the group's scores")
    dynamic_sampling: int = option(
        0,
        "groups whose scores all tie are replaced by groups of other prompts, drawn at random, up "
        "to this many times a step (DAPO)",
        within="[0, inf)",
    )
    loss: str = option(
        "clip",
        "clip: PPO's clipped ratio; cispo: log-probs weighted by the clipped ratio, whose gradient "
        "no token loses (MiniMax-M1 2025)",
        choices=("clip", "cispo"),
    )
    ratio: str = option(
        "token",
        "the clipped ratio: that of each token, or the geometric mean of the sequence's (GSPO)",
        choices=("token", "sequence"),
    )

    def __post_init__(self):
        super().__post_init__()
        has_groups = self.num_samples > 1
        least = 2 if self.advantage in ("grpo", "rloo") else 1
        unscaled = self.advantage != "remax" or self.whiten_scores == "none"
        self.check(
            ("num_samples", self.num_samples >= least, f"at least {least} for {self.advantage}"),
            ("dynamic_sampling", has_groups or not self.dynamic_sampling, "0 for groups of 1"),
            ("ratio", self.loss == "clip" or self.ratio == "token", "token with loss cispo"),
            ("whiten_scores", unscaled, "none for remax: greedy responses would scale differently"),
        )
        kl_in_reward = self.kl_in == "reward" and self.kl_coef > 0
        divides = self.advantage == "reinforce_pp" or (self.advantage == "grpo" and self.normalize)
        scale_matters = self.score_clip is not None or kl_in_reward or not divides
        token_weights = self.importance_cap is not None and self.importance_level == "token"
        per_token = token_weights or (kl_in_reward and self.advantage in ("remax", "reinforce_pp"))
        self.warn_unused(
            ("loss", not self.at_ratio_1, ONE_UPDATE),
            ("ratio", per_token or not self.at_ratio_1, ONE_UPDATE),
            ("dual_clip", self.loss == "clip" or self.at_ratio_1, "with loss cispo"),
            ("normalize", self.advantage == "grpo", f"on {self.advantage}, which never divides"),
            ("whiten_scores", scale_matters, f"on {self.advantage}, which divides scores itself"),
            (
                "whiten_mean",
                self.score_clip is not None,
                "on centred advantages without score_clip",
            ),
        )

    @property
    def rollout_size(self) -> int:
        return self.batch_size * self.num_samples

    @property
    def update_size(self) -> int:
        return self.minibatch_size or self.rollout_size

    @property
    def one_pass(self) -> bool:
        """Whether nothing before the one update needs the policy's log-probs, so that its own
        forward pass, detached, gives the old ones."""
        kl_in_reward = self.kl_in == "reward" and self.kl_coef > 0
        return self.at_ratio_1 and not (kl_in_reward or self.mask_truncated)


class GRPOTrainer(PolicyGradientTrainer):
    """Arguments as for `PolicyGradientTrainer`, without a critic.

    Further metrics: reward, reward_std (within groups), kl, clip_ratio, completions/mean_length,
    frac_reward_zero_std; with dynamic_sampling, resampled_groups.
    """

    main_metric = "reward"

    @property
    def algorithm(self) -> str:
        return self.config.advantage

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """Sample a rollout, a group of responses per prompt, and take the optimiser steps on it."""
        config, metrics = self.config, Metrics()

        # 1. Sample a group of n responses to each of P prompts; score and penalize them.
        batch, rollout, rewards = self.sample_groups(batch, metrics)
        mask = rollout.response_mask  # (P n, R); rewards are (P n,), or (P n, R) if per token

        # 2. Whiten and clip the scores.
        shaped = self.shape(rewards, mask)

        # 3. Before any update: log-probs under policy and reference, (P n, R) each. If there is one
        #    update, its own forward pass can give those of the policy.
        predictions = None if config.one_pass else self.predict(rollout)
        if predictions is None:
            old, reference = None, self.predict_reference(rollout)
            kl = torch.zeros(mask.shape, device=self.device)
        else:
            old, reference, kl = predictions.logprobs, predictions.ref_logprobs, predictions.kl

        # 4. The advantage of each response over the others of its group.
        sizes = len(batch), config.num_samples
        kl = kl * (self.kl_coef.value if config.kl_in == "reward" else 0.0)
        grouped = [x.unflatten(0, sizes) for x in (scores_of(shaped), kl, mask)]
        advantages = self.advantages(*grouped, batch).flatten(0, 1)  # (P n, R)

        # 5. Epochs of clipped updates.
        self.update(rollout, Experience(old, advantages, reference), metrics)

        # 6. Report.
        if predictions is None:
            predictions = self.predictions_of_update(rollout, reference)
        report = self.report(rollout, predictions, rewards, shaped, metrics)
        return report | self.group_report(scores_of(rewards).view(sizes), advantages, report)

    def sample_groups(
        self, batch: list[list[int]], metrics: Metrics
    ) -> tuple[list[list[int]], Rollout, Tensor]:
        """P prompts, a group of responses to each, and their rewards.

        With dynamic_sampling, groups that tie make room for those of other prompts.
        """
        n = self.config.num_samples
        rollout = self.collect(batch, n)
        rewards = self.score(rollout, batch, metrics)
        for _ in range(self.config.dynamic_sampling):
            tie = tied(scores_of(rewards).view(-1, n))  # (P,)
            metrics.add_part("resampled_groups", tie.sum())
            if not tie.any():
                break
            where = dict(generator=self.generator, device=self.device)
            index = torch.randint(len(self.examples), (int(tie.sum()),), **where).tolist()
            others = [self.examples[i] for i in index]
            fresh, keep = self.sample(others, n), ~tie.repeat_interleave(n)
            parts = [rewards[keep], self.score(fresh, others, metrics)]
            batch = [prompt for prompt, ties in zip(batch, tie.tolist()) if not ties] + others
            rollout = join(rows(rollout, keep), fresh)
            if rewards.ndim == 2:
                R = rollout.response_ids.shape[1]
                parts = [F.pad(x, (0, R - x.shape[1])) for x in parts]
            rewards = torch.cat(parts)
        return batch, rollout, rewards

    def advantages(
        self, scores: Tensor, kl: Tensor, mask: Tensor, batch: list[list[int]]
    ) -> Tensor:
        """Advantages (P, n, R); arguments as in losses/advantages.py."""
        options = {}
        if self.config.advantage == "grpo":
            options["normalize"] = self.config.normalize
        if self.config.advantage == "remax":
            greedy = self.sample(batch, temperature=0.0)
            shaped = self.shape(self.score(greedy, batch), greedy.response_mask)
            options["greedy_scores"] = scores_of(shaped)
        return ESTIMATORS[self.config.advantage](scores, kl, mask, **options)

    def group_report(
        self, scores: Tensor, advantages: Tensor, report: dict[str, float]
    ) -> dict[str, float]:
        """GRPO's usual metrics of scores (P, n); warns if all advantages are 0."""
        if not advantages.any():
            self.warn_once(ALL_TIED)
        kl = {}
        if "objective/kl" in report:
            kl["kl"] = report["objective/kl"] / report["response_length"]
        return kl | {
            "reward": report["objective/scores"],
            "reward_std": scores.std(dim=1).mean().item() if scores.shape[1] > 1 else 0.0,
            "frac_reward_zero_std": tied(scores).float().mean().item(),
            "clip_ratio": report.get("policy/clipfrac_avg", 0.0),
            "completions/mean_length": report["response_length"],
        }

    def surrogate(
        self, logprobs: Tensor, entropy: Tensor, old: Experience, mask: Tensor, weights: Tensor
    ) -> tuple[Tensor, PPOLossStats]:
        """With loss cispo, PPO's op adds only the entropy bonus and the statistics."""
        if self.config.loss == "clip":
            return super().surrogate(logprobs, entropy, old, mask, weights)
        none = old._replace(advantages=torch.zeros_like(old.advantages))
        bonus, stats = super().surrogate(logprobs.detach(), entropy, none, mask, weights)
        loss, clipped = cispo_loss(
            logprobs, old.old_logprobs, old.advantages, mask, clip_ranges=self.config.clip_ranges
        )
        stats = stats._replace(clip_frac=masked_mean(clipped.float(), mask))
        return (loss * weights).sum() + bonus, stats

    def ratio_logprobs(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """With ratio sequence every token gets its response's mean log-ratio (GSPO, eq. 7)."""
        if self.config.ratio == "token":
            return logprobs
        log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).sum(dim=1, keepdim=True)
        mean = log_ratio / mask.sum(dim=1, keepdim=True).clamp_min(1)
        return old_logprobs.masked_fill(~mask, 0) + mean
