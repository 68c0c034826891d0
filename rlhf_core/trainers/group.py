"""Policy gradients without a critic: several responses to a prompt are compared with each other, and every token of one
has its advantage. GRPO (Shao et al. 2024), RLOO (Ahmadian et al. 2024), REINFORCE++ (Hu et al. 2025), ReMax (Li et al.
2023); they differ in the line that turns scores into advantages, `losses/advantages.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from rlhf_core.losses.advantages import grpo_advantages, reinforce_pp_advantages, remax_advantages, rloo_advantages
from rlhf_core.trainers.common import Metrics
from rlhf_core.trainers.config import OnPolicyConfig, option
from rlhf_core.trainers.on_policy import Experience, OnPolicyTrainer, scores_of

ADVANTAGES = ("grpo", "rloo", "reinforce_pp", "remax")


@dataclass(frozen=True)
class GroupConfig(OnPolicyConfig):
    """Dr. GRPO (Liu et al. 2025): normalize False, aggregation sequence_sum. DAPO's clip-higher (Yu et al. 2025):
    clip_range_high 0.28. GSPO (Zheng et al. 2025): ratio sequence, aggregation sequence_mean, clip ranges near 3e-4."""

    lr: float = option(1e-6, "peak learning rate of AdamW")
    batch_size: int = option(8, "prompts of a rollout")
    num_samples: int = option(8, "responses to each prompt")
    minibatch_size: int | None = option(None, "responses an optimiser step sees; None: all of the rollout's")
    ppo_epochs: int = option(1, "passes over each rollout")
    temperature: float = option(1.0, "of sampling, and so of every log-prob, entropy and KL, > 0")
    kl_coef: float = option(0.0, "weight of the KL to the reference")
    kl_in: str = option("loss", "where the KL counts: loss, with the KL's own gradient, or reward, before advantages")
    kl_estimator: str = option("k3", "k1, k2, k3, abs, or full: exact over the vocabulary; abs not in the loss")
    advantage: str = option("grpo", "grpo, rloo, reinforce_pp or remax: what a response's score is compared with")
    normalize: bool = option(True, "grpo divides by the group's standard deviation")
    ratio: str = option("token", "what is clipped: each token's ratio, or sequence: their geometric mean (GSPO)")

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(advantage=ADVANTAGES, ratio=("token", "sequence"))
        least = 2 if self.advantage in ("grpo", "rloo") else 1
        alone = self.advantage != "remax" or self.whiten_scores == "none"
        self.check(
            ("num_samples", self.num_samples >= least, f"at least {least} for {self.advantage}"),
            ("whiten_scores", alone, "none for remax, whose greedy responses it would scale otherwise"),
        )
        self.check_effective(("normalize", self.advantage == "grpo", f"on {self.advantage}, undivided as it is"))

    @property
    def rollout_size(self) -> int:
        return self.batch_size * self.num_samples

    @property
    def update_size(self) -> int:
        return self.minibatch_size or self.rollout_size


class GroupTrainer(OnPolicyTrainer):
    """Arguments as for `OnPolicyTrainer`. Metrics: also reward, reward_std (within groups), kl, clip_ratio,
    completions/mean_length, frac_reward_zero_std."""

    main_metric = "reward"

    @property
    def algorithm(self) -> str:
        return self.config.advantage

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """One rollout of a group of responses to every prompt, and the optimiser steps on it."""
        config, metrics = self.config, Metrics()

        # 1. Sample a group of responses to every prompt.
        rollout = self.sample(batch, config.num_samples)
        mask = rollout.response_mask  # (P n, R)

        # 2. Score every response.
        scores = self.score(rollout)
        shaped = self.shaped(scores, mask)

        # 3. Log-probs under the policy that sampled and under the reference, before any update.
        columns = self.predict(rollout)  # (P n, R) each

        # 4. A response's advantage over the others, the same for all its tokens.
        groups = scores_of(shaped).view(len(batch), config.num_samples)
        if config.kl_in == "reward":
            groups = groups - self.kl_coef.value * columns["kl"].sum(dim=1).view_as(groups)
        advantages = self.advantages(groups, batch)[..., None].flatten(0, 1) * mask  # (P n, R)

        # 5. Passes of clipped updates.
        self.update(rollout, Experience(columns["logprobs"], advantages, columns["ref_logprobs"]), metrics)

        # 6. Report.
        report = self.report(rollout, columns, scores, shaped, metrics)
        return report | self.group_report(scores_of(scores).view_as(groups), report)

    def advantages(self, scores: Tensor, batch: list[list[int]]) -> Tensor:
        """(P, n) of scores (P, n)."""
        if self.config.advantage == "grpo":
            return grpo_advantages(scores, normalize=self.config.normalize)
        if self.config.advantage == "rloo":
            return rloo_advantages(scores)
        if self.config.advantage == "reinforce_pp":
            return reinforce_pp_advantages(scores)
        greedy = self.sample(batch, temperature=0.0)
        greedy_scores = self.shaped(self.score(greedy), greedy.response_mask)
        return remax_advantages(scores, scores_of(greedy_scores))

    def group_report(self, scores: Tensor, report: dict[str, float]) -> dict[str, float]:
        """GRPO's metrics by their usual names, of scores (P, n); warns where no group says anything."""
        alike = (scores == scores[:, :1]).all(dim=1).float().mean().item()
        if alike == 1 and self.config.advantage in ("grpo", "rloo"):
            warnings.warn(
                f"step {self.steps_done + 1}: in every group all {scores.shape[1]} scores are alike, so that no "
                "advantage differs from 0: harder or easier prompts, a finer reward or a higher temperature would help",
                stacklevel=2,
            )
        return {
            "reward": report["objective/scores"],
            "reward_std": scores.std(dim=1).mean().item() if scores.shape[1] > 1 else 0.0,
            "frac_reward_zero_std": alike,
            "kl": report["objective/kl"] / report["response_length"],
            "clip_ratio": report["policy/clipfrac_avg"],
            "completions/mean_length": report["response_length"],
        }

    def ratio_logprobs(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """GSPO's (Zheng et al. 2025, eq. 7): every token of a response has the mean of their log ratios as its own."""
        if self.config.ratio == "token":
            return logprobs
        log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).sum(dim=1, keepdim=True)
        return old_logprobs.masked_fill(~mask, 0) + log_ratio / mask.sum(dim=1, keepdim=True).clamp_min(1)

    @property
    def token_by_token(self) -> bool:
        return super().token_by_token and self.config.ratio == "token"
