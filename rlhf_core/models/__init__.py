"""The transformer, its heads, and their files."""

from rlhf_core.models.heads import EnsembleReward, RewardModel, ValueModel, load_reward
from rlhf_core.models.ilql import ILQLModel
from rlhf_core.models.transformer import KVCache, Transformer, TransformerConfig, eval_mode

__all__ = [
    "EnsembleReward",
    "ILQLModel",
    "KVCache",
    "RewardModel",
    "Transformer",
    "TransformerConfig",
    "ValueModel",
    "eval_mode",
    "load_reward",
]
