"""rlhf_core: reinforcement learning from human feedback, compact and from scratch.

The public names load on first use, so that `import rlhf_core` does no work and needs neither
triton, a GPU nor the compiled extension.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "rlhf_core.data": [
        "ByteTokenizer", "Preference", "Text", "encode_preference", "encode_prompt", "encode_text",
        "load_tokenizer",
    ],
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
        "DPOConfig", "DPOTrainer", "PPOConfig", "PPOTrainer", "RewardConfig", "RewardTrainer",
        "SFTConfig", "SFTTrainer",
    ],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", "backends", *sorted(_MODULE_OF)]


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
