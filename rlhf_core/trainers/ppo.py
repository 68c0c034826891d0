"""PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022), with a critic.

A step samples responses, scores them, shapes the reward with the KL to the reference, estimates advantages and takes
`ppo_epochs` passes over them. `step` is the algorithm in numbered lines; on_policy.py has what it calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core.masking import explained_variance
from rlhf_core.models import RewardModel, Transformer, ValueModel
from rlhf_core.ops import ppo_advantages
from rlhf_core.ops.policy_loss import PPOLossStats
from rlhf_core.rollout import Rollout, response_values
from rlhf_core.trainers.clipped_updates import Experience
from rlhf_core.trainers.common import Metrics
from rlhf_core.trainers.config import ONE_UPDATE, OnPolicyConfig, option
from rlhf_core.trainers.on_policy import OnPolicyTrainer


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    lr: float = option(3e-6, "peak learning rate of AdamW, policy and critic")
    gamma: float = option(1.0, "discount, in [0, 1]")
    lam: float = option(0.95, "GAE's lambda, in [0, 1]")
    value_clip_range: float = option(0.2, "how far a value may move from its old one; inf: any way")
    vf_coef: float = option(0.1, "weight of the value loss")
    critic: str = option(
        "separate", "a model of its own, or head: on the policy's trunk, which then learns both"
    )
    critic_init: str = option(
        "reward", "of a separate critic: from the reward model where that is one, or policy"
    )
    critic_lr: float | None = option(
        None, "peak learning rate of what is the critic's alone; None: lr"
    )
    critic_warmup_steps: int = option(0, "rollouts at the start on which the critic alone learns")

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("value_clip_range", "critic_lr")
        self.check_choices(critic=("separate", "head"), critic_init=("reward", "policy"))
        self.check(
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"),
            ("lam", 0 <= self.lam <= 1, "in [0, 1]"),
            ("vf_coef", 0 <= self.vf_coef < math.inf, "at least 0"),
            ("critic_warmup_steps", self.critic_warmup_steps >= 0, "at least 0"),
        )
        self.check_effective(
            ("value_clip_range", not self.at_ratio_1, ONE_UPDATE),
            ("critic_init", self.critic == "separate", "without a separate critic"),
            ("critic_lr", self.vf_coef, "without vf_coef > 0"),
            ("critic_warmup_steps", self.vf_coef, "without vf_coef > 0"),
        )


class PPOTrainer(OnPolicyTrainer):
    """Arguments as for `OnPolicyTrainer`, and:

    critic: unless given, with critic="separate" a copy of the reward model where that is one (and critic_init says so),
        else of the policy's trunk with a fresh head; with critic="head" a fresh head on the policy's trunk. Then one
        forward gives log-probs and values, and the value loss, weighed by vf_coef, moves the trunk too. With adapters
        on the policy all of PPO holds its weights once.
    """

    algorithm = "ppo"

    def __init__(
        self,
        model: Transformer,
        examples,
        config: PPOConfig,
        *,
        reward,
        critic: ValueModel | None = None,
        **options,
    ):
        if critic is None and config.critic == "head":
            critic = ValueModel.from_model(model, share_trunk=True)
        elif critic is None:
            start = (
                reward
                if isinstance(reward, RewardModel) and config.critic_init == "reward"
                else model
            )
            critic = ValueModel.from_model(start)
        self.critic, self.one_trunk = critic, critic.trunk is model.trunk
        if self.one_trunk != (config.critic == "head"):
            trunk = "the policy's trunk" if self.one_trunk else "a trunk of its own"
            raise ValueError(f"critic={config.critic!r}, but the critic given is on {trunk}")
        super().__init__(model, examples, config, reward=reward, **options)
        if self.total_steps <= config.critic_warmup_steps > 0:
            raise ValueError(
                f"critic_warmup_steps {config.critic_warmup_steps} is all of the {self.total_steps} steps"
            )
        self.vf_coef = config.vf_coef
        self.value_clip_range = (
            None if config.value_clip_range == math.inf else config.value_clip_range
        )

    def trained_models(self) -> list[nn.Module]:
        return [self.model, self.critic]

    def parameter_groups(self) -> list[dict]:
        of_policy, parameters = set(self.model.parameters()), self.trained_parameters()
        policy, critic = ([p for p in parameters if (p in of_policy) == of] for of in (True, False))
        return [
            {"params": policy},
            {"params": critic, "lr": self.config.critic_lr or self.config.lr},
        ]

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """One rollout of a response to every prompt, and the optimiser steps on it."""
        config, metrics = self.config, Metrics()
        self.policy_rests = self.steps_done < config.critic_warmup_steps

        # 1. Sample a response to every prompt.
        rollout = self.sample(batch)
        mask = rollout.response_mask  # (B, R)

        # 2. Score every response.
        scores = self.score(rollout)  # (B,), or (B, R) from a reward of tokens
        shaped = self.shaped(scores, mask)

        # 3. Log-probs under the policy that sampled and under the reference, and the values, before any update.
        columns = self.predict(rollout)  # (B, R) each
        old_logprobs, ref_logprobs, old_values = (
            columns[name] for name in ("logprobs", "ref_logprobs", "values")
        )

        # 4. Rewards: the KL penalty on every token, the score on the last one; returns; advantages, whitened.
        advantages, returns, _, _ = ppo_advantages(
            shaped,
            old_logprobs,
            ref_logprobs,
            old_values,
            mask,
            kl_coef=self.kl_coef.value if config.kl_in == "reward" else 0.0,
            kl_estimator="k1" if config.estimator == "full" else config.estimator,
            kl=columns["kl"] if config.estimator == "full" else None,
            gamma=config.gamma,
            lam=config.lam,
        )

        # 5. Several passes of clipped updates over the same rollout, in minibatches.
        self.update(
            rollout,
            Experience(old_logprobs, advantages, ref_logprobs, old_values, returns),
            metrics,
        )

        # 6. Report; steer the coefficients.
        explained = {"val/explained_variance": explained_variance(old_values, returns, mask)}
        return self.report(rollout, columns, scores, shaped, metrics) | explained

    def forward(self, rollout: Rollout, loss_of: Callable | None = None) -> dict[str, Tensor]:
        """And values (B, R). In the critic's warm-up no gradient goes beyond them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.policy_rests):
            found = super().forward(rollout, loss_of)
        with self.autocast():
            values = response_values(
                self.critic, rollout, found["hidden"] if self.one_trunk else None
            )
        return found | {"values": values}

    @staticmethod
    def add_statistics(metrics: Metrics, stats: PPOLossStats) -> None:
        OnPolicyTrainer.add_statistics(metrics, stats)
        metrics.add_mean("loss/value_avg", stats.value_loss, stats.count)
        metrics.add_mean("val/clipfrac_avg", stats.value_clip_frac, stats.count)

    def save(self, path: Path) -> None:
        """The policy in `path`, the critic in its subfolder `critic`."""
        super().save(path)
        self.critic.save_pretrained(path / "critic")
