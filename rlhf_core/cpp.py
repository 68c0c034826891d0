"""The CPU backend: allocates the outputs that `rlhf_core._C` fills. Only this file imports it.

It has the launchers of `rlhf_core.kernels`. Arguments are trusted except for the range of targets
and slots, because the ops have validated them and made the last axis contiguous. A launcher uses
`torch.get_num_threads()` threads; their number does not change the result. Outputs come from
`empty_like` where possible, because `empty` takes twice as long.
"""

import torch
from torch import Tensor

import rlhf_core._C as _C  # not "from rlhf_core import", whose error does not name a missing file

_C.use(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))  # gives access to tensor memory

_ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def isa() -> str:
    """The instruction set in use: the CPU's best, or the value of RLHF_CORE_CPU_ISA."""
    return _C.isa()


def cpu_features() -> dict[str, str]:
    """The values that RLHF_CORE_CPU_ISA may have on this machine, and the threading library."""
    return {"instruction sets": ", ".join(_C.available_isas()), "threading": _C.threading()}


def token_logprobs_fwd(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    with_entropy: bool,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logprobs (B, T), entropy (B, T) or None, lse (B, T, 2) or None), all float32.

    logits: (B, T, V); targets and mask: (B, T). A counted target outside [0, V) raises ValueError.
    """
    logprobs = torch.empty_like(targets, dtype=torch.float32, memory_format=torch.contiguous_format)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    lse = logprobs.new_empty((*logprobs.shape, 2)) if with_lse else None
    threads = torch.get_num_threads()
    _C.token_logprobs_fwd(logits, targets, mask, temperature, logprobs, entropy, lse, threads)
    return logprobs, entropy, lse


def token_logprobs_bwd(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    entropy: Tensor | None,
    lse: Tensor,
    inplace: bool,
) -> Tensor:
    """dlogits (B, T, V) in the logits' dtype, contiguous; with inplace it overwrites the logits."""
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    _C.token_logprobs_bwd(
        dlogprobs, dentropy, logits, targets, mask, temperature, entropy, lse, dlogits, threads
    )
    return dlogits


def full_kl_fwd(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(kl (B, T), lse (B, T, 4)), float32, of two logits (B, T, V)."""
    kl = logits.new_empty(logits.shape[:2], dtype=torch.float32)
    lse = kl.new_empty((*kl.shape, 4))
    _C.full_kl_fwd(logits, ref_logits, mask, temperature, kl, lse, torch.get_num_threads())
    return kl, lse


def full_kl_bwd(
    dkl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    kl: Tensor,
    lse: Tensor,
    needs_logits: bool,
    needs_ref_logits: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dlogits, dref_logits), contiguous, or None if not needed."""
    needs = (needs_logits, needs_ref_logits)
    grads = tuple(logits.new_empty(logits.shape) if needed else None for needed in needs)
    threads = torch.get_num_threads()
    _C.full_kl_bwd(dkl, logits, ref_logits, mask, temperature, kl, lse, *grads, threads)
    return grads


def kl_estimate_fwd(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str
) -> Tensor:
    """KL estimates, shaped like logprobs."""
    kl = torch.empty_like(logprobs)
    threads = torch.get_num_threads()
    _C.kl_estimate_fwd(logprobs, ref_logprobs, mask, _ESTIMATORS[estimator], kl, threads)
    return kl


def kl_estimate_bwd(
    dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str
) -> tuple[Tensor, Tensor]:
    """(dlogprobs, dref_logprobs)."""
    grads = torch.empty_like(logprobs), torch.empty_like(logprobs)
    _C.kl_estimate_bwd(
        dkl, logprobs, ref_logprobs, mask, _ESTIMATORS[estimator], *grads, torch.get_num_threads()
    )
    return grads


def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), shaped like rewards."""
    outputs = _per_token(2, rewards, cu_seqlens)
    threads = torch.get_num_threads()
    _C.gae_fwd(rewards, values, mask, gamma, lam, last_values, cu_seqlens, *outputs, threads)
    return outputs


def gae_bwd(
    dadvantages: Tensor,
    dreturns: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    has_last_values: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(drewards, dvalues, dlast_values or None)."""
    B = len(dreturns) if cu_seqlens is None else len(cu_seqlens) - 1
    dlast_values = dreturns.new_empty(B) if has_last_values else None
    grads = (*_per_token(2, dreturns, cu_seqlens), dlast_values)
    _C.gae_bwd(dadvantages, dreturns, mask, gamma, lam, cu_seqlens, *grads, torch.get_num_threads())
    return grads


def ppo_advantages_fwd(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: str,
    gamma: float,
    lam: float,
    whiten: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantages, returns, rewards, kl), shaped like logprobs."""
    outputs = _per_token(4, logprobs, cu_seqlens)
    _C.ppo_advantages_fwd(
        scores, logprobs, ref_logprobs, values, mask, kl_coef, _ESTIMATORS[estimator], gamma, lam,
        whiten, cu_seqlens, *outputs, torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def ppo_loss_fwd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
    weights: Tensor | None,
    sequence_mean: bool,
    clip_low: float,
    clip_high: float,
    value_clip_range: float | None,
    vf_coef: float,
    entropy_coef: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss (), scale (), stats (10,), dlogprobs, dvalues or None, dentropy or None).

    The gradients are those of loss / scale.
    """
    outputs = [logprobs.new_empty(shape) for shape in ((), (), (10,))]
    outputs += [None if x is None else torch.empty_like(x) for x in (logprobs, values, entropy)]
    _C.ppo_loss_fwd(
        logprobs, old_logprobs, advantages, values, old_values, returns, entropy, mask, weights,
        sequence_mean, clip_low, clip_high, value_clip_range, vf_coef, entropy_coef, dual_clip,
        *outputs, torch.get_num_threads(),
    )  # fmt: skip
    return tuple(outputs)


def decode_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    window: int | None,
    limit: int,
    shared_keys: Tensor | None = None,
    shared_values: Tensor | None = None,
    shared_lengths: Tensor | None = None,
) -> Tensor:
    """Attention output (B, H, K) in q's dtype. The new tokens are written to keys and values.

    limit: number of tokens that a row may have beside shared ones. A slot that is out of range,
    used twice or full raises ValueError.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _C.decode_attention_fwd(
        q, k, v, keys, values, lengths, slots, cos, sin, window, limit,
        shared_keys, shared_values, shared_lengths, out, torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x (B, T, D) normalised, times weight (D,) float32, contiguous.

    dtype: of the result; x's, or any if x is float32.
    """
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    _C.rms_norm_fwd(x, weight, eps, y, torch.get_num_threads())
    return y


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, eps: float, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx (B, T, D) contiguous in x's dtype, dweight (D,) float32 or None)."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight) if needs_weight else None
    _C.rms_norm_bwd(dy, x, weight, eps, dx, dweight, torch.get_num_threads())
    return dx, dweight


def gated_activation_fwd(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up (B, T, I), contiguous, in the dtype of gate_up (B, T, 2 I)."""
    B, T, width = gate_up.shape
    y = gate_up.new_empty(B, T, width // 2)
    _C.gated_activation_fwd(gate_up, _ACTIVATIONS[activation], y, torch.get_num_threads())
    return y


def gated_activation_bwd(dy: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """dgate_up (B, T, 2 I), contiguous, in the dtype of dy (B, T, I) and gate_up."""
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads()
    _C.gated_activation_bwd(dy, gate_up, _ACTIVATIONS[activation], dgate_up, threads)
    return dgate_up


def rotary_fwd(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Heads x (B, T, H K) rotated, contiguous, by float32 factors cos and sin (B, T, R <= K)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.rotary_fwd(x, cos, sin, head_dim, y, torch.get_num_threads())
    return y


def linear_rows_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None
) -> Tensor:
    """x (n, in) times weight (out, in) transposed, plus bias (out,): (n, out), all in one dtype.

    With scales (out,) the weight is int8, its rows times the scales, and all else is float32.
    """
    y = x.new_empty(len(x), len(weight))
    _C.linear_rows_fwd(x, weight, scales, bias, y, torch.get_num_threads())
    return y


def quantize_rows_fwd(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows (out, in) and float32 scales (out,) of a weight, see `ops.linear_rows`."""
    rows = torch.empty_like(weight, dtype=torch.int8)
    scales = weight.new_empty(len(weight), dtype=torch.float32)
    _C.quantize_rows_fwd(weight, rows, scales, torch.get_num_threads())
    return rows, scales


def packed_decode_fwd(
    tokens: Tensor,
    counts: Tensor | None,
    embedding: Tensor,
    weights: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    window: int | None,
    limit: int,
    shared_keys: Tensor | None,
    shared_values: Tensor | None,
    shared_lengths: Tensor | None,
    heads: int,
    intermediate: int,
    rank: int,
    activation: str,
    gated: bool,
    eps: float,
    packed_size: int,
) -> Tensor:
    """Logits (B, V) float32 after each row's last token.

    tokens: (B,), or (B, T) with counts (B,) of valid tokens per row. The tokens are added to keys
    and values (L, N, Hkv, S, K) and to lengths. limit: number of tokens that a row may have beside
    shared ones, whose keys and values are (L, M, Hkv, P, K).
    weights: int64 addresses, in the order of csrc/kernels.h, of tensors that the caller keeps.
    packed_size: the number of weights in panels; 0 means that weights are in place, which takes one
    token per row. A token or slot that is out of range, or a slot without room, raises ValueError.
    """
    logits = embedding.new_empty(len(tokens), len(embedding), dtype=torch.float32)
    _C.packed_decode_fwd(
        tokens, counts, embedding, weights, keys, values, lengths, slots, cos, sin, window, limit,
        shared_keys, shared_values, shared_lengths, heads, intermediate, rank,
        _ACTIVATIONS[activation], gated, eps, packed_size, logits, torch.get_num_threads(),
    )  # fmt: skip
    return logits


def sample_tokens_fwd(
    logits: Tensor,
    seeds: Tensor,
    counters: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, logprobs, full_logprobs), each (B,), of logits (B, V).

    full_logprobs is None if there is no truncation.
    """
    tokens = torch.empty_like(seeds)
    logprobs = torch.empty_like(seeds, dtype=torch.float32)
    full_logprobs = None if top_k is top_p is min_p is None else torch.empty_like(logprobs)
    _C.sample_tokens_fwd(
        logits, seeds, counters, temperature, top_k, top_p, min_p,
        tokens, logprobs, full_logprobs, torch.get_num_threads(),
    )  # fmt: skip
    return tokens, logprobs, full_logprobs


def _per_token(count: int, like: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """Outputs to fill. With cu_seqlens they start at 0, for tokens outside all sequences."""
    make = torch.empty_like if cu_seqlens is None else torch.zeros_like
    return tuple(make(like) for _ in range(count))
