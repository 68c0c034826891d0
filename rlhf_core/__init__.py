"""rlhf_core: reinforcement learning from human feedback, compact and from scratch.

The public names load on first use, so that `import rlhf_core` does no work and needs neither
triton, a GPU nor the compiled extension. Type checkers and editors read the same names from the
imports below, which never run.
"""
# ruff: noqa: F403, F405, I001

import importlib

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers read it as true; importing it from typing would cost time
if TYPE_CHECKING:
    from rlhf_core import backends
    from rlhf_core.data import (
        ByteTokenizer, Preference, Prompt, Text, encode_preference, encode_prompt, encode_text,
        load_tokenizer,
    )  # fmt: skip
    from rlhf_core.feedback.ai_judge import AIJudge
    from rlhf_core.generation import generate
    from rlhf_core.masking import IGNORE_INDEX, last_token_index, loss_weights, masked_mean, whiten
    from rlhf_core.models import RewardModel, Transformer, TransformerConfig, ValueModel
    from rlhf_core.ops import (
        decode_attention, full_kl, gae, kl_estimate, linear_token_logprobs,
        linear_token_logprobs_and_entropy, linear_token_loss, linear_token_statistics,
        ppo_advantages, ppo_loss, sample_tokens, token_logprobs, token_logprobs_and_entropy,
    )  # fmt: skip
    from rlhf_core.rollout import Rollout
    from rlhf_core.trainers import *

_HOME = {
    "rlhf_core.data": [
        "ByteTokenizer", "Preference", "Prompt", "Text", "encode_preference", "encode_prompt",
        "encode_text", "load_tokenizer",
    ],
    "rlhf_core.feedback.ai_judge": ["AIJudge"],
    "rlhf_core.generation": ["generate"],
    "rlhf_core.masking": [
        "IGNORE_INDEX", "last_token_index", "loss_weights", "masked_mean", "whiten",
    ],
    "rlhf_core.models": ["RewardModel", "Transformer", "TransformerConfig", "ValueModel"],
    "rlhf_core.ops": [
        "decode_attention", "full_kl", "gae", "kl_estimate", "linear_token_logprobs",
        "linear_token_logprobs_and_entropy", "linear_token_loss", "linear_token_statistics",
        "ppo_advantages", "ppo_loss", "sample_tokens", "token_logprobs",
        "token_logprobs_and_entropy",
    ],
    "rlhf_core.rollout": ["Rollout"],
    "rlhf_core.trainers": [
        "A2CConfig", "A2CTrainer", "DPOConfig", "DPOTrainer", "DistillConfig", "DistillTrainer",
        "GRPOConfig", "GRPOTrainer", "ILQLConfig", "ILQLTrainer", "IteratedDPOConfig",
        "IteratedRLHFConfig", "KTOConfig", "KTOTrainer", "NLPOConfig", "NLPOTrainer",
        "OnlineDPOConfig", "OnlineDPOTrainer", "PPOConfig", "PPOTrainer", "RFTConfig",
        "RewardConfig", "RewardTrainer", "SFTConfig", "SFTTrainer", "SamplingConfig", "Scorer",
        "TRPOConfig", "TRPOTrainer", "best_of_n", "iterated_dpo", "iterated_rlhf", "rft",
    ],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = [  # a literal, because type checkers do not evaluate expressions
    "IGNORE_INDEX", "A2CConfig", "A2CTrainer", "AIJudge", "ByteTokenizer", "DPOConfig",
    "DPOTrainer", "DistillConfig", "DistillTrainer", "GRPOConfig", "GRPOTrainer", "ILQLConfig",
    "ILQLTrainer", "IteratedDPOConfig", "IteratedRLHFConfig", "KTOConfig", "KTOTrainer",
    "NLPOConfig", "NLPOTrainer", "OnlineDPOConfig", "OnlineDPOTrainer", "PPOConfig", "PPOTrainer",
    "Preference", "Prompt", "RFTConfig", "RewardConfig", "RewardModel", "RewardTrainer", "Rollout",
    "SFTConfig", "SFTTrainer", "SamplingConfig", "Scorer", "TRPOConfig", "TRPOTrainer", "Text",
    "Transformer", "TransformerConfig", "ValueModel", "__version__", "backends", "best_of_n",
    "decode_attention", "encode_preference", "encode_prompt", "encode_text", "full_kl", "gae",
    "generate", "iterated_dpo", "iterated_rlhf", "kl_estimate", "last_token_index",
    "linear_token_logprobs", "linear_token_logprobs_and_entropy", "linear_token_loss",
    "linear_token_statistics", "load_tokenizer", "loss_weights", "masked_mean", "ppo_advantages",
    "ppo_loss", "rft", "sample_tokens", "token_logprobs", "token_logprobs_and_entropy", "whiten",
]  # fmt: skip


def __getattr__(name: str):
    if name == "backends":
        return importlib.import_module("rlhf_core.backends")
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value  # the next access finds it directly
        return value
    raise AttributeError(f"module 'rlhf_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
