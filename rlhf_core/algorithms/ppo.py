"""PPO for language models, with a critic.

Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022. `PPOTrainer.step` is the algorithm;
policy_gradient/trainer.py has the parts that it calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_core.files import subfolder
from rlhf_core.masking import explained_variance
from rlhf_core.models import RewardModel, Transformer, ValueModel
from rlhf_core.ops import ppo_advantages
from rlhf_core.options import option
from rlhf_core.policy_gradient.config import ONE_UPDATE, PolicyGradientConfig
from rlhf_core.policy_gradient.experience import Experience
from rlhf_core.policy_gradient.trainer import PolicyGradientTrainer
from rlhf_core.training.metrics import Metrics


@dataclass(frozen=True)
class PPOConfig(PolicyGradientConfig):
    """Advantages and critic of PPO."""

    lr: float = option(3e-6, "peak learning rate of policy and critic", within="(0, inf)")
    gamma: float = option(1.0, "discount per token", within="[0, 1]")
    lam: float = option(
        0.95, "GAE's lambda; higher has less bias and more variance", within="[0, 1]"
    )
    value_clip_range: float = option(
        0.2, "values are clipped to this distance from their old ones", within="(0, inf]"
    )
    vf_coef: float = option(0.1, "weight of the value loss", within="[0, inf)")
    critic: str = option(
        "separate",
        "separate: a model of its own; head: a value head on the policy's trunk, trained by both",
        choices=("separate", "head"),
    )
    critic_init: str = option(
        "reward",
        "a separate critic starts from the reward model, if that is one, or from the policy",
        choices=("reward", "policy"),
    )
    critic_lr: float | None = option(
        None, "peak learning rate of the critic's own weights; unset: lr", within="(0, inf)"
    )
    critic_warmup_steps: int = option(
        0, "rollouts at the start that train only the critic", within="[0, inf)"
    )

    def __post_init__(self):
        super().__post_init__()
        trains = self.vf_coef > 0 or not self.critic_warmup_steps
        self.check(("critic_warmup_steps", trains, "0 with vf_coef 0, when no critic trains"))
        self.warn_unused(
            ("value_clip_range", not self.at_ratio_1, ONE_UPDATE),
            ("critic_init", self.critic == "separate", "without a separate critic"),
            ("critic_lr", self.vf_coef > 0 or self.weight_decay > 0, "because vf_coef is 0"),
        )


class PPOTrainer(PolicyGradientTrainer):
    """Trains policy and critic. The other arguments are those of `PolicyGradientTrainer`.

    The default critic is a copy of the reward model or of the policy's trunk, or a head on that
    trunk (see critic and critic_init). With a head, one forward gives log-probs and values; if the
    policy also has adapters, all of PPO holds its weights once.
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
            from_reward = isinstance(reward, RewardModel) and config.critic_init == "reward"
            critic = ValueModel.from_model(reward if from_reward else model)
        if critic.shares_trunk_with(model) != (config.critic == "head"):
            trunk = "the policy's trunk" if config.critic == "separate" else "a trunk of its own"
            raise ValueError(f"critic is {config.critic!r}, but the critic passed has {trunk}")
        super().__init__(model, examples, config, reward=reward, critic=critic, **options)
        if self.out is not None:
            subfolder(self.out, "critic")  # refuses a link now, not at the end
        if self.total_steps <= config.critic_warmup_steps > 0:
            raise ValueError(
                f"critic_warmup_steps is {config.critic_warmup_steps}, but the run has only "
                f"{self.total_steps} steps"
            )

    @property
    def policy_trains(self) -> bool:
        return self.steps_done >= self.config.critic_warmup_steps

    def parameter_groups(self) -> list[dict]:
        policy = set(self.model.parameters())
        parameters = self.trained_parameters()
        return [
            {"params": [p for p in parameters if p in policy]},
            {
                "params": [p for p in parameters if p not in policy],
                "lr": self.config.critic_lr or self.config.lr,
            },
        ]

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """Sample a rollout, one response per prompt, and take the optimiser steps on it."""
        config, metrics = self.config, Metrics()

        # 1. Sample a response to every prompt.
        rollout = self.collect(batch)
        mask = rollout.response_mask  # (B, R)

        # 2. Score the responses; penalize, whiten and clip the scores.
        rewards = self.score(rollout, batch, metrics)  # (B,), or (B, R) from a reward per token
        shaped = self.shape(rewards, mask)

        # 3. Before any update: log-probs under policy and reference, and values, (B, R) each.
        predictions = self.predict(rollout)

        # 4. R = r - kl_coef * KL(policy || reference) at every token, the score at the last one;
        #    then GAE, returns, and whitened advantages.
        advantages, returns, _, _ = ppo_advantages(
            shaped,
            predictions.logprobs,
            predictions.ref_logprobs,
            predictions.values,
            mask,
            kl_coef=self.kl_coef.value if config.kl_in == "reward" else 0.0,
            kl_estimator="k1" if config.estimator == "full" else config.estimator,
            kl=predictions.kl if config.estimator == "full" else None,
            gamma=config.gamma,
            lam=config.lam,
        )

        # 5. Several epochs of clipped updates on the rollout, in minibatches.
        experience = Experience(
            predictions.logprobs,
            advantages,
            predictions.ref_logprobs,
            predictions.values,
            returns,
        )
        self.update(rollout, experience, metrics)

        # 6. Report, and steer the coefficients.
        explained = explained_variance(predictions.values, returns, mask)
        report = self.report(rollout, predictions, rewards, shaped, metrics)
        return report | {"val/explained_variance": explained}

    def save(self, path: Path) -> None:
        """Write the policy to `path` and the critic to its subfolder `critic`."""
        super().save(path)
        self.critic.save_pretrained(subfolder(path, "critic"))
