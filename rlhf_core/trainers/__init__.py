"""One algorithm, one file."""

from rlhf_core.trainers.a2c import A2CConfig, A2CTrainer
from rlhf_core.trainers.dpo import DPOConfig, DPOTrainer
from rlhf_core.trainers.group import GroupConfig, GroupTrainer
from rlhf_core.trainers.ilql import ILQLConfig, ILQLTrainer
from rlhf_core.trainers.iterated import IteratedRLHFConfig, iterated_rlhf
from rlhf_core.trainers.kto import KTOConfig, KTOTrainer
from rlhf_core.trainers.nlpo import NLPOConfig, NLPOTrainer
from rlhf_core.trainers.online_dpo import (
    IteratedDPOConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    iterated_dpo,
)
from rlhf_core.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_core.trainers.reward import RewardConfig, RewardTrainer
from rlhf_core.trainers.rft import RFTConfig, rft
from rlhf_core.trainers.scoring import Scorer
from rlhf_core.trainers.selection import SamplingConfig, best_of_n
from rlhf_core.trainers.sft import SFTConfig, SFTTrainer

__all__ = [
    "A2CConfig",
    "A2CTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GroupConfig",
    "GroupTrainer",
    "ILQLConfig",
    "ILQLTrainer",
    "IteratedDPOConfig",
    "IteratedRLHFConfig",
    "KTOConfig",
    "KTOTrainer",
    "NLPOConfig",
    "NLPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RFTConfig",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SamplingConfig",
    "Scorer",
    "best_of_n",
    "iterated_dpo",
    "iterated_rlhf",
    "rft",
]
