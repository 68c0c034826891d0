"""The Triton backend: launchers with the names and signatures of `rlhf_core.cpp`, one file per op.

It imports only torch and triton. A launcher checks nothing, because the public functions in
`rlhf_core.ops` already have. It allocates outputs and launches one kernel on the tensors' device.
"""

# In the repository's root, `import kernels` finds this folder. Other libraries look there for an
# unrelated package of PyPI. Under that name the module is empty, so they report it as missing.
if __name__ == "rlhf_core.kernels":
    from rlhf_core.kernels.decode_attention import decode_attention_fwd
    from rlhf_core.kernels.gae import gae_bwd, gae_fwd, ppo_advantages_fwd
    from rlhf_core.kernels.kl import full_kl_bwd, full_kl_fwd, kl_estimate_bwd, kl_estimate_fwd
    from rlhf_core.kernels.linear_logprobs import linear_logprobs_bwd, linear_logprobs_fwd
    from rlhf_core.kernels.logprobs import token_logprobs_bwd, token_logprobs_fwd
    from rlhf_core.kernels.policy_loss import ppo_loss_fwd
    from rlhf_core.kernels.sampling import sample_tokens_fwd

    __all__ = [
        "decode_attention_fwd",
        "full_kl_bwd",
        "full_kl_fwd",
        "gae_bwd",
        "gae_fwd",
        "kl_estimate_bwd",
        "kl_estimate_fwd",
        "linear_logprobs_bwd",
        "linear_logprobs_fwd",
        "ppo_advantages_fwd",
        "ppo_loss_fwd",
        "sample_tokens_fwd",
        "token_logprobs_bwd",
        "token_logprobs_fwd",
    ]
