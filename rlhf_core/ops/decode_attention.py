"""One decoding step's attention: rotate, append to the key/value cache, attend over what is in it.

For the new token of row b, in slot s = slots[b] of the cache behind n = lengths[s] tokens, with R_n the rotation of a
head by the angles of position n (Su et al. 2021, eq. 34; element i is paired with i + K/2, as in Llama):

    keys[s, :, n], values[s, :, n] = R_n k_b, v_b
    out_b = softmax(R_n q_b keys[s, h, first : n + 1]^T / sqrt(K)) values[s, h, first : n + 1]
    first = max(0, n + 1 - window)

Query head i reads key/value head h = i // (H / Hkv) (Ainslie et al. 2023). Left out: gradients, and more than one token
a row; prompts go through `scaled_dot_product_attention`.
"""

import math

import torch
from torch import Tensor

from rlhf_core import backends
from rlhf_core.checks import at_least_float32, check_float, describe, values_may_be_read


def decode_attention_reference(
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
) -> Tensor:
    """The definition, in float32 at least; writes the new keys and values to the cache."""
    n = lengths[slots]  # (B,)
    dtype = q.dtype
    q, k = at_least_float32(q, k)
    if cos is not None:
        q, k = (_rotate(x, cos[n][:, None], sin[n][:, None]) for x in (q, k))
    keys[slots, :, n], values[slots, :, n] = k.to(keys.dtype), v.to(values.dtype)
    q, K, V = at_least_float32(q, keys[slots], values[slots])  # (B, H, K), (B, Hkv, S, K) twice
    positions = torch.arange(keys.shape[2], device=q.device)
    unseen = positions > n[:, None]
    if window is not None:
        unseen |= positions <= n[:, None] - window
    scores = (
        q.unflatten(1, (K.shape[1], -1)) @ K.transpose(2, 3) / math.sqrt(q.shape[-1])
    )  # (B, Hkv, H / Hkv, S)
    p = scores.masked_fill(unseen[:, None, None], -math.inf).softmax(-1)
    return (p @ V.masked_fill(unseen[:, None, :, None], 0)).flatten(1, 2).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    slots: Tensor,
    *,
    rope: tuple[Tensor, Tensor] | None,
    window: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one new token per row over the cached ones and itself; it joins them in the cache.

    The cache is modified, but not `lengths`: one step calls this for every layer. There is no gradient.

    Args:
        q: (B, H, K), not yet rotated, float32, bfloat16 or float16 (float64 through the reference).
        k, v: (B, Hkv, K) of q's dtype, k not yet rotated; H is a multiple of Hkv. Views of one (B, (H + 2 Hkv) K)
            projection cost no copy.
        keys, values: (N, Hkv, S, K), contiguous, of one dtype, which may be another than q's; keys are rotated ones.
        lengths: (N,) int64, tokens that each row of the cache holds; what lies behind them may be anything.
        slots: (B,) int64, each row's place in the cache; no two alike. The other rows of the cache are not touched.
        rope: cos and sin (positions, K / 2) float32 of at least S positions; None: no rotation.
        window: how many tokens a token sees, itself included, >= 1; None: all.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (B, H, K) contiguous, of q's dtype. A row's bits do not depend on the other rows.

    Raises:
        ValueError or TypeError with the offending values. On CUDA a row whose slot is outside [0, N), or has no room
        left, gives NaN and changes nothing, since looking at it would synchronise; RLHF_CORE_DEBUG=1 makes it raise.
    """
    _check(q, k, v, keys, values, lengths, slots, window)
    cos, sin = rope or (None, None)
    if cos is not None:
        _check_rope(cos, sin, keys)
    impl = backends.resolve(backend, q)
    if impl is None or impl.__name__ != "rlhf_core.cpp":  # which looks while it reads them
        _check_slots(lengths, slots, keys.shape[2])
    q, k, v = (
        x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v)
    )
    args = (q, k, v, keys, values, lengths.contiguous(), slots.contiguous(), cos, sin, window)
    return decode_attention_reference(*args) if impl is None else impl.decode_attention_fwd(*args)


def _check(q, k, v, keys, values, lengths, slots, window):
    check_float("q", q)
    check_float("keys", keys)
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(
            f"q, k and v must have one dtype, got {describe(q)}, {describe(k)} and {describe(v)}"
        )
    if keys.dtype != values.dtype or (keys.dtype == torch.float64) != (q.dtype == torch.float64):
        dtypes = f"{describe(keys)} and {describe(values)}"
        raise TypeError(
            f"keys and values must have one dtype, float64 where q {describe(q)} has it, got {dtypes}"
        )
    for name, x in (("lengths", lengths), ("slots", slots)):
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {describe(x)}")
    if q.ndim != 3 or keys.ndim != 4:
        raise ValueError(
            f"q must be (B, H, K) and keys (N, Hkv, S, K), got {tuple(q.shape)} and {tuple(keys.shape)}"
        )
    (B, H, K), (N, Hkv, S, _) = q.shape, keys.shape
    wanted = (B, Hkv, K), (B, Hkv, K), (N, Hkv, S, K), (N, Hkv, S, K), (N,), (B,)
    shapes = k.shape, v.shape, keys.shape, values.shape, lengths.shape, slots.shape
    if shapes != wanted or not Hkv or H % Hkv or not K:
        names = ("k", "v", "keys", "values", "lengths", "slots")
        found = ", ".join(
            f"{name} {tuple(shape)}" for name, shape in zip(("q", *names), (q.shape, *shapes))
        )
        raise ValueError(
            f"these shapes do not fit q (B, H, K) and keys (N, Hkv, S, K), Hkv dividing H: {found}"
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError(
            f"keys and values must be contiguous, got strides {keys.stride()} and {values.stride()}"
        )
    for name, x in (
        ("k", k),
        ("v", v),
        ("keys", keys),
        ("values", values),
        ("lengths", lengths),
        ("slots", slots),
    ):
        if not (x.is_cpu and q.is_cpu) and x.device != q.device:  # a device object takes its time
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, got {window}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "decode_attention has no gradient, and q, k or v requires one: use torch.no_grad()"
        )


def _check_rope(cos, sin, keys):
    S, K = keys.shape[2:]
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"rope must be float32, got {describe(cos)} and {describe(sin)}")
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] < S or 2 * cos.shape[1] != K:
        shapes = f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(
            f"rope must be (positions, K / 2) twice, with K {K} and at least {S} positions, got {shapes}"
        )
    if not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError(f"rope must be contiguous, got strides {cos.stride()} and {sin.stride()}")
    if cos.device != keys.device or sin.device != keys.device:
        raise ValueError(f"rope is on {cos.device} and {sin.device}, keys are on {keys.device}")


def _check_slots(lengths, slots, S):
    if not values_may_be_read(slots):
        return
    lengths, seen = lengths.tolist(), set()
    for b, slot in enumerate(slots.tolist()):
        if not 0 <= slot < len(lengths):
            raise ValueError(f"row {b}: slot {slot} is outside [0, {len(lengths)})")
        if slot in seen:
            raise ValueError(f"row {b}: slot {slot} is an earlier row's")
        if not 0 <= lengths[slot] < S:
            raise ValueError(
                f"row {b}: slot {slot} has length {lengths[slot]}, no room for another token in {S}"
            )
        seen.add(slot)
