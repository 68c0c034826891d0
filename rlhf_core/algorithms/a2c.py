"""A2C (Mnih et al. 2016, section 4), as in RL4LMs: PPO with one update per rollout and no clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_core.algorithms.ppo import PPOConfig, PPOTrainer
from rlhf_core.options import option


@dataclass(frozen=True)
class A2CConfig(PPOConfig):
    """PPO's options. Each rollout gets one update at ratio 1, so clip ranges have no effect."""

    ppo_epochs: int = option(1, "A2C passes once over each rollout")
    clip_range: float = option(math.inf, "A2C does not clip", within="(0, inf]")
    value_clip_range: float = option(math.inf, "A2C does not clip", within="(0, inf]")

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("ppo_epochs", 1), ("minibatch_size", None), ("dropout", False)):
            self.check((name, getattr(self, name) == value, f"{value} in A2C; otherwise use PPO"))

    @property
    def update_size(self) -> int:
        return self.rollout_size


class A2CTrainer(PPOTrainer):
    """Arguments and metrics as for `PPOTrainer`."""

    algorithm = "a2c"
