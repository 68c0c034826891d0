"""The transformer, its scalar heads, and their files."""

from rlhf_core.models.heads import RewardModel, ValueModel
from rlhf_core.models.transformer import KVCache, Transformer, TransformerConfig, eval_mode

__all__ = ["KVCache", "RewardModel", "Transformer", "TransformerConfig", "ValueModel", "eval_mode"]
