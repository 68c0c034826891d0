"""Policy gradients without a critic: several responses to a prompt are compared with each other, and every token of one
has its advantage. GRPO (Shao et al. 2024), RLOO (Ahmadian et al. 2024), REINFORCE++ (Hu et al. 2025), ReMax (Li et al.
2023); they differ in the line that turns scores into advantages, `losses/advantages.py`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from rlhf_core.losses.advantages import ESTIMATORS
from rlhf_core.trainers.clipped_updates import Experience
from rlhf_core.trainers.common import Metrics
from rlhf_core.trainers.config import ONE_UPDATE, OnPolicyConfig, option
from rlhf_core.trainers.on_policy import OnPolicyTrainer, scores_of


@dataclass(frozen=True)
class GroupConfig(OnPolicyConfig):
    """Dr. GRPO (Liu et al. 2025): normalize False, aggregation sequence_sum. With several updates a rollout, DAPO's
    clip-higher (Yu et al. 2025): clip_range_high 0.28; GSPO (Zheng et al. 2025): ratio sequence, aggregation
    sequence_mean, clip ranges near 3e-4."""

    lr: float = option(1e-6, "peak learning rate of AdamW")
    batch_size: int = option(8, "prompts of a rollout")
    num_samples: int = option(8, "responses to each prompt")
    minibatch_size: int | None = option(
        None, "responses an optimiser step sees; None: all of the rollout's"
    )
    ppo_epochs: int = option(1, "passes over each rollout")
    temperature: float = option(1.0, "of sampling, and so of every log-prob, entropy and KL, > 0")
    kl_coef: float = option(0.0, "weight of the KL to the reference")
    kl_in: str = option(
        "loss",
        "where the KL counts: loss, with the KL's own gradient, or reward, before advantages",
    )
    advantage: str = option(
        "grpo", "grpo, rloo, reinforce_pp or remax: what a response's score is compared with"
    )
    normalize: bool = option(True, "grpo divides by the group's standard deviation")
    ratio: str = option(
        "token", "what is clipped: each token's ratio, or sequence: their geometric mean (GSPO)"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(advantage=tuple(ESTIMATORS), ratio=("token", "sequence"))
        least = 2 if self.advantage in ("grpo", "rloo") else 1
        alone = self.advantage != "remax" or self.whiten_scores == "none"
        self.check(
            ("num_samples", self.num_samples >= least, f"at least {least} for {self.advantage}"),
            (
                "whiten_scores",
                alone,
                "none for remax, whose greedy responses it would scale otherwise",
            ),
        )
        divided = self.advantage == "reinforce_pp" or (self.advantage == "grpo" and self.normalize)
        beside = self.score_clip is not None or (self.kl_in == "reward" and self.kl_coef > 0)
        by_token = (
            self.advantage in ("remax", "reinforce_pp")
            and self.kl_in == "reward"
            and self.kl_coef > 0
        )
        by_token = (
            by_token or self.importance_cap is not None
        )  # then a token's advantage is its own
        self.check_effective(
            ("ratio", by_token or not self.at_ratio_1, ONE_UPDATE),
            ("normalize", self.advantage == "grpo", f"on {self.advantage}, undivided as it is"),
            (
                "whiten_scores",
                beside or not divided,
                f"on {self.advantage}, which divides by a deviation anyway",
            ),
            (
                "whiten_mean",
                self.score_clip is not None,
                "on advantages, which are centred, without score_clip",
            ),
        )

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

        # 4. A response's advantage over the others.
        groups = len(batch), config.num_samples
        kl = columns["kl"] * (self.kl_coef.value if config.kl_in == "reward" else 0.0)
        tokens = (
            x.unflatten(0, groups) for x in (scores_of(shaped), kl, mask)
        )  # (P, n), (P, n, R) twice
        advantages = self.advantages(*tokens, batch).flatten(0, 1)  # (P n, R)

        # 5. Passes of clipped updates.
        self.update(
            rollout, Experience(columns["logprobs"], advantages, columns["ref_logprobs"]), metrics
        )

        # 6. Report.
        report = self.report(rollout, columns, scores, shaped, metrics)
        return report | self.group_report(scores_of(scores).view(groups), advantages, report)

    def advantages(
        self, scores: Tensor, kl: Tensor, mask: Tensor, batch: list[list[int]]
    ) -> Tensor:
        """(P, n, R); arguments as in losses/advantages.py."""
        own = {"normalize": self.config.normalize} if self.config.advantage == "grpo" else {}
        if self.config.advantage == "remax":
            greedy = self.sample(batch, temperature=0.0)
            own["greedy_scores"] = scores_of(self.shaped(self.score(greedy), greedy.response_mask))
        return ESTIMATORS[self.config.advantage](scores, kl, mask, **own)

    def group_report(
        self, scores: Tensor, advantages: Tensor, report: dict[str, float]
    ) -> dict[str, float]:
        """GRPO's metrics by their usual names, of scores (P, n); warns where nothing is to be learned."""
        alike = (scores == scores[:, :1]).all(dim=1).float().mean().item()
        if not advantages.any():
            warnings.warn(
                f"step {self.steps_done + 1}: no response scores otherwise than what it is compared with, so that all "
                "advantages are 0: harder or easier prompts, a finer reward or a higher temperature would help",
                stacklevel=2,
            )
        kl = (
            {"kl": report["objective/kl"] / report["response_length"]}
            if "objective/kl" in report
            else {}
        )
        return kl | {
            "reward": report["objective/scores"],
            "reward_std": scores.std(dim=1).mean().item() if scores.shape[1] > 1 else 0.0,
            "frac_reward_zero_std": alike,
            "clip_ratio": report["policy/clipfrac_avg"],
            "completions/mean_length": report["response_length"],
        }

    def ratio_logprobs(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """GSPO's (Zheng et al. 2025, eq. 7): every token of a response has the mean of their log ratios as its own."""
        if self.config.ratio == "token":
            return logprobs
        log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).sum(dim=1, keepdim=True)
        return old_logprobs.masked_fill(~mask, 0) + log_ratio / mask.sum(
            dim=1, keepdim=True
        ).clamp_min(1)

    @property
    def token_by_token(self) -> bool:
        return super().token_by_token and self.config.ratio == "token"
