"""Tensor functions with autograd: the hot path. Each file reads reference, autograd.Function, public function."""

from rlhf_core.ops.gae import gae
from rlhf_core.ops.kl import kl_estimate
from rlhf_core.ops.logprobs import token_logprobs, token_logprobs_and_entropy

__all__ = ["gae", "kl_estimate", "token_logprobs", "token_logprobs_and_entropy"]
