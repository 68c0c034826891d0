"""Decode attention in Triton: one program per row and key/value head, for its query heads.

The formulas are those of `rlhf_core.ops.decode_attention`. A program stores its new key and value,
but starts its online softmax (Milakov & Gimelshein 2018) from the copies in registers. Its stores
thus need not be visible to the loads of its other threads, which stop before the new position.
Sums are float32 products and additions, as in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # products of queries and keys at a time: 32 per thread


@triton.jit
def _rotate(row_ptr, x, cos_ptr, sin_ptr, n, inside, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """x, the heads at row_ptr, rotated by the angles of position n, in float32."""
    x = x.to(tl.float32)
    if cos_ptr is not None:
        cols = tl.arange(0, BLOCK_K)
        left = cols < K // 2
        angle = n * (K // 2) + tl.where(left, cols, cols - K // 2)
        cos = tl.load(cos_ptr + angle, mask=cols < K, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=cols < K, other=0.0)
        partner = tl.where(left, cols + K // 2, cols - K // 2)
        other = tl.load(row_ptr + partner, mask=inside, other=0.0).to(tl.float32)
        x = x * cos + tl.where(left, -other, other) * sin
    return x


@triton.jit(
    do_not_specialize=[
        "q_stride", "k_stride", "v_stride", "N", "Hkv", "S", "window", "limit", "samples", "P",
    ]
)  # fmt: skip
def decode_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, lengths_ptr, slots_ptr, cos_ptr, sin_ptr,
    shared_keys_ptr, shared_values_ptr, shared_lengths_ptr, out_ptr,
    q_stride, k_stride, v_stride, N, Hkv, S, window, limit, samples, P, scale,
    GROUP: tl.constexpr, K: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b, h = program // Hkv, program % Hkv
    slot = tl.load(slots_ptr + b)
    fits = (slot >= 0) & (slot < N)
    n = tl.load(lengths_ptr + slot, mask=fits, other=0)
    if shared_keys_ptr is not None:
        shared = tl.load(shared_lengths_ptr + slot // samples, mask=fits, other=0)
        fits = fits & (shared >= 0) & (shared <= P)
        shared = tl.where(fits, shared, 0)
    else:
        shared = n * 0
    fits = fits & (n >= shared) & (n < shared + limit)
    slot, n = tl.where(fits, slot, 0), tl.where(fits, n, shared)

    cols, heads = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_G)
    is_col = cols < K
    k_row, v_row = k_ptr + b * k_stride + h * K, v_ptr + b * v_stride + h * K
    k = tl.load(k_row + cols, mask=is_col, other=0.0)
    k = _rotate(k_row, k, cos_ptr, sin_ptr, n, is_col, K, BLOCK_K).to(keys_ptr.dtype.element_ty)
    v = tl.load(v_row + cols, mask=is_col, other=0.0).to(values_ptr.dtype.element_ty)
    base, turn = (slot * Hkv + h) * S * K, shared + (n - shared) // S * S
    tl.store(keys_ptr + base + (n - turn) * K + cols, k, mask=is_col & fits)
    tl.store(values_ptr + base + (n - turn) * K + cols, v, mask=is_col & fits)

    inside = (heads < GROUP)[:, None] & is_col[None, :]
    of_heads = (h * GROUP + heads)[:, None] * K
    q_rows = q_ptr + b * q_stride + of_heads
    q = tl.load(q_rows + cols[None, :], mask=inside, other=0.0)
    q = _rotate(q_rows, q, cos_ptr, sin_ptr, n, inside, K, BLOCK_K) * scale  # (BLOCK_G, BLOCK_K)

    highest = tl.sum(q * k.to(tl.float32)[None, :], 1)  # (BLOCK_G,)
    total = tl.full([BLOCK_G], 1.0, tl.float32)
    out = tl.zeros([BLOCK_G, BLOCK_K], tl.float32) + v.to(tl.float32)[None, :]
    for start in range(tl.maximum(0, n + 1 - window), n, BLOCK_S):
        at = start + tl.arange(0, BLOCK_S)
        place = tl.where(at < turn, at - turn + S, at - turn)  # at % S, since n - S < at
        offsets = base + place[:, None] * K + cols[None, :]
        seen = ((at >= shared) & (at < n))[:, None] & is_col[None, :]
        # keys and values are (BLOCK_S, BLOCK_K), scores (BLOCK_G, BLOCK_S).
        keys = tl.load(keys_ptr + offsets, mask=seen, other=0.0).to(tl.float32)
        values = tl.load(values_ptr + offsets, mask=seen, other=0.0).to(tl.float32)
        if shared_keys_ptr is not None:
            offsets = (slot // samples * Hkv + h) * P * K + at[:, None] * K + cols[None, :]
            seen = (at < shared)[:, None] & is_col[None, :]
            keys += tl.load(shared_keys_ptr + offsets, mask=seen, other=0.0).to(tl.float32)
            values += tl.load(shared_values_ptr + offsets, mask=seen, other=0.0).to(tl.float32)
        scores = tl.sum(q[:, None, :] * keys[None, :, :], 2)
        scores = tl.where((at < n)[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        p, factor = tl.exp(scores - higher[:, None]), tl.exp(highest - higher)
        total = total * factor + tl.sum(p, 1)
        out = out * factor[:, None] + tl.sum(p[:, :, None] * values[None, :, :], 1)
        highest = higher
    out = tl.where(fits, out / total[:, None], float("nan"))
    tl.store(out_ptr + (b * Hkv * GROUP * K) + of_heads + cols[None, :], out, mask=inside)


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

    limit: number of tokens that a row may have beside shared ones. A row whose slot is out of range
    or full gives NaN and writes nothing.
    """
    B, H, K = q.shape
    N, Hkv, S, _ = keys.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    block_g, block_k = triton.next_power_of_2(H // Hkv), triton.next_power_of_2(K)
    block_s = max(1, min(128, TILE // (block_g * block_k)))
    samples, P = 1, 0
    if shared_keys is not None:
        samples, P = N // len(shared_keys), shared_keys.shape[2]
    if B:
        with torch.cuda.device_of(q):
            decode_attention_fwd_kernel[(B * Hkv,)](
                q, k, v, keys, values, lengths, slots, cos, sin,
                shared_keys, shared_values, shared_lengths, out,
                q.stride(0), k.stride(0), v.stride(0), N, Hkv, S,
                S + P if window is None else window, limit, samples, P, K**-0.5,
                GROUP=H // Hkv, K=K, BLOCK_G=block_g, BLOCK_K=block_k, BLOCK_S=block_s,
            )  # fmt: skip
    return out
