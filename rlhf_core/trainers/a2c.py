"""A2C (Mnih et al. 2016, section 4), as RL4LMs had it for text: PPO with one pass over a rollout and no clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_core.trainers.config import option
from rlhf_core.trainers.ppo import PPOConfig, PPOTrainer


@dataclass(frozen=True)
class A2CConfig(PPOConfig):
    """Of one update a rollout, at ratio 1 throughout, so that what bounds the ratio has no effect and is refused."""

    ppo_epochs: int = option(1, "one: the gradient is that of the policy that sampled")
    clip_range: float = option(math.inf, "none")
    value_clip_range: float = option(math.inf, "none")

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("ppo_epochs", 1), ("minibatch_size", None), ("dropout", False)):
            self.check(
                (name, getattr(self, name) == value, f"{value} in A2C, with another it is PPO")
            )

    @property
    def update_size(self) -> int:
        return self.rollout_size


class A2CTrainer(PPOTrainer):
    algorithm = "a2c"
