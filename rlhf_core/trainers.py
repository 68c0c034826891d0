"""The public names of the trainers, whose files are in algorithms/ and feedback/."""

import warnings

from rlhf_core.algorithms.a2c import A2CConfig, A2CTrainer
from rlhf_core.algorithms.dpo import DPOConfig, DPOTrainer
from rlhf_core.algorithms.grpo import GRPOConfig, GRPOTrainer
from rlhf_core.algorithms.ilql import ILQLConfig, ILQLTrainer
from rlhf_core.algorithms.iterated_dpo import IteratedDPOConfig, iterated_dpo
from rlhf_core.algorithms.iterated_rlhf import IteratedRLHFConfig, iterated_rlhf
from rlhf_core.algorithms.kto import KTOConfig, KTOTrainer
from rlhf_core.algorithms.nlpo import NLPOConfig, NLPOTrainer
from rlhf_core.algorithms.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from rlhf_core.algorithms.ppo import PPOConfig, PPOTrainer
from rlhf_core.algorithms.reward import RewardConfig, RewardTrainer
from rlhf_core.algorithms.rft import RFTConfig, rft
from rlhf_core.algorithms.sft import SFTConfig, SFTTrainer
from rlhf_core.feedback.candidates import SamplingConfig, best_of_n
from rlhf_core.feedback.rewards import Scorer

__all__ = [
    "A2CConfig", "A2CTrainer", "DPOConfig", "DPOTrainer", "GRPOConfig", "GRPOTrainer",
    "ILQLConfig", "ILQLTrainer", "IteratedDPOConfig", "IteratedRLHFConfig", "KTOConfig",
    "KTOTrainer", "NLPOConfig", "NLPOTrainer", "OnlineDPOConfig", "OnlineDPOTrainer", "PPOConfig",
    "PPOTrainer", "RFTConfig", "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer",
    "SamplingConfig", "Scorer", "best_of_n", "iterated_dpo", "iterated_rlhf", "rft",
]  # fmt: skip

_RENAMED = {"GroupConfig": GRPOConfig, "GroupTrainer": GRPOTrainer}


def __getattr__(name: str):
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"{name} is now {new.__name__}", DeprecationWarning, stacklevel=2)
        return new
    raise AttributeError(f"module 'rlhf_core.trainers' has no attribute {name!r}")
