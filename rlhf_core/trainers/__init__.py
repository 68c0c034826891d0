"""One algorithm, one file."""

from rlhf_core.trainers.dpo import DPOConfig, DPOTrainer
from rlhf_core.trainers.kto import KTOConfig, KTOTrainer
from rlhf_core.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_core.trainers.reward import RewardConfig, RewardTrainer
from rlhf_core.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
