"""Attention of one decoding step: rotate, append to the key/value cache, attend over the cache.

The new token of row b goes to slot s = slots[b] of the cache, after n = lengths[s] tokens. R_n is
the rotation of a head by the angles of position n (Su et al. 2021, eq. 34; element i is paired with
i + K/2, as in Llama):

    keys[s, :, n], values[s, :, n] = R_n k_b, v_b
    out_b = softmax(R_n q_b keys[s, h, first : n + 1]^T / sqrt(K)) values[s, h, first : n + 1]
    first = max(0, n + 1 - window)

A slot has S places, and token n is at place n % S. Thus, if the window is at most S, the cache is a
ring: a new token takes the place of one that no window reaches any more.

Rows may share their first tokens, such as those of a prompt, which are then stored once: the first
L = shared_lengths[m] tokens of slot s, where m = s // (N / M), are at the places 0 to L - 1 of
shared row m of M, and token n is at place n - L of the slot.

Query head i reads key/value head h = i // (H / Hkv) (Ainslie et al. 2023).

Left out: gradients, and several tokens per row. Prompts use `scaled_dot_product_attention`.
"""

import math

import torch
from torch import Tensor

from rlhf_core.checks import (
    at_least_float32,
    check_float,
    describe,
    resolve,
    values_may_be_read,
)
from rlhf_core.ops.rotary import rotary_factors, rotary_reference

NO_LIMIT = 2**62  # of the tokens of a row whose cache is a ring and whose keys are not rotated


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
    shared_keys: Tensor | None = None,
    shared_values: Tensor | None = None,
    shared_lengths: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, in at least float32. Writes the new keys and values to the cache."""
    n = lengths[slots]  # (B,)
    dtype = q.dtype
    q, k = at_least_float32(q, k)
    if cos is not None:
        factors = rotary_factors(cos[n][:, None], sin[n][:, None])
        q, k = rotary_reference(q, *factors), rotary_reference(k, *factors)
    S, n = keys.shape[2], n[:, None]
    if shared_lengths is not None:
        owners = slots // (len(keys) // len(shared_lengths))
        shared = shared_lengths[owners][:, None]  # (B, 1)
        n = n - shared
    at = slots, slice(None), n[:, 0] % S
    keys[at], values[at] = k.to(keys.dtype), v.to(values.dtype)
    K, V = keys[slots], values[slots]  # (B, Hkv, S, K)
    age = (n - torch.arange(S, device=q.device)) % S  # (B, S), 0 at the new token's place
    unseen = age > n if window is None else age >= (n + 1).clamp_max(window)
    if shared_lengths is not None:
        K, V = torch.cat((shared_keys[owners], K), 2), torch.cat((shared_values[owners], V), 2)
        beyond = torch.arange(shared_keys.shape[2], device=q.device) >= shared
        unseen = torch.cat((beyond, unseen), 1)
    q, K, V = at_least_float32(q, K, V)
    q = q.unflatten(1, (K.shape[1], -1))
    scores = q @ K.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, Hkv, H / Hkv, S)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    p = scores.masked_fill(unseen[:, None, None], -math.inf).softmax(-1)
    return (p @ V.masked_fill(unseen[:, None, :, None], 0)).flatten(1, 2).to(dtype)


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
    shared: tuple[Tensor, Tensor, Tensor] | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of one new token per row over the cached tokens and itself.

    The new keys and values are written to the cache. `lengths` does not change, because one step
    calls this for every layer. There is no gradient.

    Args:
        q: (B, H, K) before rotation, float32, bfloat16 or float16; float64 uses the reference.
        k, v: (B, Hkv, K) in q's dtype, k before rotation; H must be a multiple of Hkv. Views of one
            (B, (H + 2 Hkv) K) projection need no copy.
        keys, values: (N, Hkv, S, K), contiguous, of one dtype, which may differ from q's. Cached
            keys are rotated.
        lengths: (N,) int64, number of tokens that each row of the cache has had. Places without a
            token may hold anything.
        slots: (B,) int64, each row's index into the cache, no two equal. Other cache rows are not
            touched.
        rope: cos and sin, (positions, K / 2) float32 for at least S positions; None: no rotation.
        window: number of tokens that a token attends to, itself included, >= 1; None: all. Up to S,
            a row may have more than S tokens, as many as `rope` has positions.
        shared: keys and values (M, Hkv, P, K), contiguous, in the cache's dtype, and lengths (M,)
            int64 of the first tokens of the rows, each shared by N / M rows; without a window.
            `lengths` count these tokens, and `rope` has P + S positions. None: nothing is shared.
        softcap: c > 0, which turns the scores into c tanh(scores / c) (Gemma 2); None: no limit.
            Only the reference has it.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (B, H, K) contiguous, in q's dtype. A row's bits do not depend on the other rows.

    Raises:
        ValueError or TypeError: with the offending value. On CUDA a row whose slot is out of range
            or full gives NaN and writes nothing, because a check would synchronise.
            RLHF_CORE_DEBUG=1 makes it raise.
    """
    _check(q, k, v, keys, values, lengths, slots, window)
    cos, sin = rope or (None, None)
    P = 0
    if shared is not None:
        _check_shared(*shared, keys, window)
        P = shared[0].shape[2]
    if cos is not None:
        _check_rope(cos, sin, keys, P)
    if softcap is not None:
        if backend not in (None, "reference") or not softcap > 0:
            raise ValueError(f"softcap {softcap} must be > 0, with the reference, not {backend!r}")
        backend = "reference"
    impl = resolve(backend, q, k, v, keys, values, cos, sin, *(shared or ()))
    limit = keys.shape[2]
    if window is not None and window <= limit:
        limit = NO_LIMIT if cos is None else len(cos)
    if impl is None or impl.__name__ != "rlhf_core.cpp":  # cpp checks while it reads them
        _check_slots(lengths, slots, limit, shared)
    q, k, v = (
        x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v)
    )
    args = (q, k, v, keys, values, lengths.contiguous(), slots.contiguous(), cos, sin, window)
    if impl is None:
        return decode_attention_reference(*args, *(shared or ()), softcap=softcap)
    return impl.decode_attention_fwd(*args, limit, *(shared or ()))


def _check(q, k, v, keys, values, lengths, slots, window):
    check_float("q", q)
    check_float("keys", keys)
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(
            f"q, k and v must have one dtype, got {describe(q)}, {describe(k)} and {describe(v)}"
        )
    if keys.dtype != values.dtype or (keys.dtype == torch.float64) != (q.dtype == torch.float64):
        raise TypeError(
            "keys and values must have one dtype, float64 if and only if q has it, got "
            f"{describe(keys)} and {describe(values)}, q {describe(q)}"
        )
    for name, x in (("lengths", lengths), ("slots", slots)):
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {describe(x)}")
    if q.ndim != 3 or keys.ndim != 4:
        raise ValueError(
            "q must be (B, H, K) and keys (N, Hkv, S, K), got "
            f"{tuple(q.shape)} and {tuple(keys.shape)}"
        )
    (B, H, K), (N, Hkv, S, _) = q.shape, keys.shape
    wanted = (B, Hkv, K), (B, Hkv, K), (N, Hkv, S, K), (N, Hkv, S, K), (N,), (B,)
    shapes = k.shape, v.shape, keys.shape, values.shape, lengths.shape, slots.shape
    others = dict(k=k, v=v, keys=keys, values=values, lengths=lengths, slots=slots)
    if shapes != wanted or not Hkv or H % Hkv or not K:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in {"q": q, **others}.items())
        raise ValueError(
            "shapes do not match q (B, H, K), k and v (B, Hkv, K), keys and values (N, Hkv, S, K), "
            f"lengths (N,), slots (B,) with Hkv dividing H: got {got}"
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError(
            f"keys and values must be contiguous, got strides {keys.stride()} and {values.stride()}"
        )
    for name, x in others.items():
        if not (x.is_cpu and q.is_cpu) and x.device != q.device:  # reading .device is slow
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1, got {window}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "decode_attention has no gradient, but q, k or v requires one: use torch.no_grad()"
        )


def _check_shared(shared_keys, shared_values, shared_lengths, keys, window):
    M, P = len(shared_keys), shared_keys.shape[2] if shared_keys.ndim == 4 else 0
    N, Hkv, _, K = keys.shape
    fits = (
        (window is None and M and P and N % M == 0)
        and shared_keys.shape == shared_values.shape == (M, Hkv, P, K)
        and shared_keys.dtype == shared_values.dtype == keys.dtype
        and shared_keys.is_contiguous()
        and shared_values.is_contiguous()
        and (shared_lengths.shape, shared_lengths.dtype) == ((M,), torch.int64)
        and shared_lengths.is_contiguous()
        and {x.device for x in (shared_keys, shared_values, shared_lengths)} == {keys.device}
    )
    if not fits:
        got = ", ".join(map(describe, (shared_keys, shared_values, shared_lengths)))
        raise ValueError(
            "shared must be contiguous keys and values (M, Hkv, P, K) like the cache, and int64 "
            f"lengths (M,), with M dividing N and no window. Got {got}, keys {describe(keys)}, "
            f"window {window}"
        )


def _check_rope(cos, sin, keys, P):
    S, K = keys.shape[2:]
    S += P
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"rope must be float32, got {describe(cos)} and {describe(sin)}")
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] < S or 2 * cos.shape[1] != K:
        raise ValueError(
            f"rope must be two tensors (positions, K / 2) with K {K} and at least {S} positions, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError(f"rope must be contiguous, got strides {cos.stride()} and {sin.stride()}")
    if cos.device != keys.device or sin.device != keys.device:
        raise ValueError(f"rope is on {cos.device} and {sin.device}, keys are on {keys.device}")


def _check_slots(lengths, slots, limit, shared):
    if not values_may_be_read(slots):
        return
    lengths, seen = lengths.tolist(), set()
    firsts, samples, P = [0], max(1, len(lengths)), 0
    if shared is not None:
        firsts, samples = shared[2].tolist(), len(lengths) // len(shared[2])
        P = shared[0].shape[2]
    for b, slot in enumerate(slots.tolist()):
        if not 0 <= slot < len(lengths):
            raise ValueError(f"row {b}: slot {slot} is outside [0, {len(lengths)})")
        if slot in seen:
            raise ValueError(f"row {b}: slot {slot} is an earlier row's")
        first = firsts[slot // samples]
        if not (0 <= first <= P and first <= lengths[slot] < first + limit):
            raise ValueError(
                f"row {b}: slot {slot} has length {lengths[slot]}, no room for another token in "
                f"{first + limit}"
            )
        seen.add(slot)
