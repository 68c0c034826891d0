"""The public names of the trainers, each loaded from its file on first use."""

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors, which cannot follow __getattr__
    from rlhf_core.algorithms.a2c import A2CConfig, A2CTrainer
    from rlhf_core.algorithms.distill import DistillConfig, DistillTrainer
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
    from rlhf_core.algorithms.trpo import TRPOConfig, TRPOTrainer
    from rlhf_core.feedback.candidates import SamplingConfig, best_of_n
    from rlhf_core.feedback.rewards import Scorer

_HOME = {
    "algorithms.a2c": ["A2CConfig", "A2CTrainer"],
    "algorithms.distill": ["DistillConfig", "DistillTrainer"],
    "algorithms.dpo": ["DPOConfig", "DPOTrainer"],
    "algorithms.grpo": ["GRPOConfig", "GRPOTrainer"],
    "algorithms.ilql": ["ILQLConfig", "ILQLTrainer"],
    "algorithms.iterated_dpo": ["IteratedDPOConfig", "iterated_dpo"],
    "algorithms.iterated_rlhf": ["IteratedRLHFConfig", "iterated_rlhf"],
    "algorithms.kto": ["KTOConfig", "KTOTrainer"],
    "algorithms.nlpo": ["NLPOConfig", "NLPOTrainer"],
    "algorithms.online_dpo": ["OnlineDPOConfig", "OnlineDPOTrainer"],
    "algorithms.ppo": ["PPOConfig", "PPOTrainer"],
    "algorithms.reward": ["RewardConfig", "RewardTrainer"],
    "algorithms.rft": ["RFTConfig", "rft"],
    "algorithms.sft": ["SFTConfig", "SFTTrainer"],
    "algorithms.trpo": ["TRPOConfig", "TRPOTrainer"],
    "feedback.candidates": ["SamplingConfig", "best_of_n"],
    "feedback.rewards": ["Scorer"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_RENAMED = {"GroupConfig": "GRPOConfig", "GroupTrainer": "GRPOTrainer"}
__all__ = [  # a literal, because type checkers do not evaluate expressions
    "A2CConfig", "A2CTrainer", "DPOConfig", "DPOTrainer", "DistillConfig", "DistillTrainer",
    "GRPOConfig", "GRPOTrainer", "ILQLConfig", "ILQLTrainer", "IteratedDPOConfig",
    "IteratedRLHFConfig", "KTOConfig", "KTOTrainer", "NLPOConfig", "NLPOTrainer", "OnlineDPOConfig",
    "OnlineDPOTrainer", "PPOConfig", "PPOTrainer", "RFTConfig", "RewardConfig", "RewardTrainer",
    "SFTConfig", "SFTTrainer", "SamplingConfig", "Scorer", "TRPOConfig", "TRPOTrainer", "best_of_n",
    "iterated_dpo", "iterated_rlhf", "rft",
]  # fmt: skip


def __getattr__(name: str):
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(f"{name} is now {new}", DeprecationWarning, stacklevel=2)
        return __getattr__(new)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rlhf_core.trainers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rlhf_core.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next access finds it directly
    return value


def __dir__() -> list[str]:
    return __all__
