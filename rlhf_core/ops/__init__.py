"""Tensor functions of the hot path. Each file: reference, autograd.Function, public function."""

from rlhf_core.ops.decode_attention import decode_attention
from rlhf_core.ops.gae import gae, ppo_advantages
from rlhf_core.ops.kl import full_kl, kl_estimate
from rlhf_core.ops.linear_logprobs import (
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    linear_token_loss,
    linear_token_statistics,
)
from rlhf_core.ops.logprobs import token_logprobs, token_logprobs_and_entropy
from rlhf_core.ops.policy_loss import ppo_loss
from rlhf_core.ops.sampling import sample_tokens

__all__ = [
    "decode_attention",
    "full_kl",
    "gae",
    "kl_estimate",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "linear_token_loss",
    "linear_token_statistics",
    "ppo_advantages",
    "ppo_loss",
    "sample_tokens",
    "token_logprobs",
    "token_logprobs_and_entropy",
]
