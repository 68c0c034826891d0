"""The public names of the trainers, each loaded from its file on first use."""

import importlib
import warnings

_HOME = {
    "algorithms.a2c": ["A2CConfig", "A2CTrainer"],
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
    "feedback.candidates": ["SamplingConfig", "best_of_n"],
    "feedback.rewards": ["Scorer"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_RENAMED = {"GroupConfig": "GRPOConfig", "GroupTrainer": "GRPOTrainer"}
__all__ = sorted(_MODULE_OF)


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
