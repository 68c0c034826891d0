"""Log-probs of an output head in Triton, whose logits stay on the chip.

Forward: a program takes some rows and one split of the vocabulary. It multiplies tile by tile on
the tensor cores, with sums in float32, and keeps the running maximum and sums of each row (Milakov
& Gimelshein 2018). The caller joins the splits as it joins the ranks of a group. Backward: a
program multiplies one tile again and stores its gradient, for the two matrix products that follow.

The order of a row's sums depends on V, D, dtype and GPU alone, so that a row gives the same bits in
any batch. What the kernels cost, and why they are cut so, is in docs/guides/kernels.md.

Left out: the products of the backward pass. Their sums run over all tokens or all rows, and do not
fit on the chip: the logits would have to be multiplied again for every slice of them that does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_core.kernels.logprobs import (
    LN_2,
    LOG2_E,
    X_MIN,
    logits_gradient,
    row_temperature,
    tensor_or_number,
)

SPLIT = 2048  # tokens that a program of the forward pass sums up
GROUP = tl.constexpr(16)  # blocks of rows that share the weights of a split in the L2 cache


@triton.jit
def _place(program, N, V, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """The rows and the first token of a program.

    Programs that run at a time cover a square of rows and tokens, so that both are read from L2.
    """
    row_blocks = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * tl.cdiv(V, WIDTH)
    first = program // in_group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    row = (first + program % in_group % size) * BLOCK_N
    return row + tl.arange(0, BLOCK_N), program % in_group // size * WIDTH


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, rows, cols, N, V, D, weight_stride,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The logits of rows and cols in float32. Beyond the end they are those of the last one."""
    at = tl.arange(0, BLOCK_D)
    rows, cols = tl.minimum(rows, N - 1).to(tl.int64), tl.minimum(cols, V - 1).to(tl.int64)
    hidden_ptr += rows[:, None] * D + at[None, :]
    weight_ptr += cols[None, :] * weight_stride + at[:, None]
    logits = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        h = tl.load(hidden_ptr + start, mask=(start + at < D)[None, :], other=0.0)
        w = tl.load(weight_ptr + start, mask=(start + at < D)[:, None], other=0.0)
        logits = tl.dot(h, w, logits, input_precision="ieee")
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + cols).to(tl.float32)[None, :]
    return logits


@triton.jit(do_not_specialize=["N", "V"])
def linear_logprobs_fwd_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, temperature_ptr, own_ptr, entropy_ptr, lse_ptr,
    N, V, D, weight_stride, temperature,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, begin = _place(tl.program_id(0), N, V, BLOCK_N, SPLIT)
    end = tl.minimum(begin + SPLIT, V)
    inside = rows < N
    y = tl.load(targets_ptr + rows, mask=inside, other=0)
    temperature = row_temperature(temperature_ptr, temperature, tl.minimum(rows, N - 1))
    scale = tl.zeros([BLOCK_N], tl.float32) + tl.div_rn(LOG2_E, temperature)

    # With x = (z - m) * scale as in `rlhf_core.kernels.logprobs`: d = sum 2^x, s = sum 2^x x.
    m = tl.full([BLOCK_N], -float("inf"), tl.float32)
    d = tl.zeros([BLOCK_N], tl.float32)
    s, own = d, d
    for start in tl.range(begin, end, BLOCK_V, flatten=True):
        cols = start + tl.arange(0, BLOCK_V)
        z = _logits(hidden_ptr, weight_ptr, bias_ptr, rows, cols, N, V, D, weight_stride, BLOCK_D)
        z = tl.where((cols < end)[None, :], z, -float("inf"))
        own += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
        higher = tl.maximum(m, tl.max(z, 1))
        offset = tl.where(higher == -float("inf"), 0.0, higher)
        x = (z - offset[:, None]) * scale[:, None]
        e = tl.exp2(x)
        shift = tl.maximum((m - offset) * scale, X_MIN)
        factor = tl.exp2(shift)
        if entropy_ptr is not None:
            s = (s + d * shift) * factor + tl.sum(e * tl.maximum(x, X_MIN), 1)
        d = d * factor + tl.sum(e, 1)
        m = higher
    log2_d = tl.log2(d)

    at = begin // SPLIT * N.to(tl.int64) + rows
    tl.store(own_ptr + at, own, mask=inside)
    if entropy_ptr is not None:
        entropy = (log2_d - s / d) * LN_2
        tl.store(entropy_ptr + at, tl.where(entropy < 0, 0.0, entropy), mask=inside)
    # The maximum loses a NaN if nothing else is above -inf.
    tl.store(lse_ptr + 2 * at, tl.where(d == d, m, d), mask=inside)
    tl.store(lse_ptr + 2 * at + 1, log2_d * LN_2, mask=inside)


@triton.jit(do_not_specialize=["N", "V"])
def linear_logprobs_bwd_kernel(
    dlogprobs_ptr, dentropy_ptr, hidden_ptr, weight_ptr, bias_ptr, targets_ptr, temperature_ptr,
    entropy_ptr, lse_ptr, dlogits_ptr,
    N, V, D, weight_stride, dlogits_stride, temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    WITH_ENTROPY: tl.constexpr = dentropy_ptr is not None
    rows, start = _place(tl.program_id(0), N, V, BLOCK_N, BLOCK_V)
    cols = start + tl.arange(0, BLOCK_V)
    z = _logits(hidden_ptr, weight_ptr, bias_ptr, rows, cols, N, V, D, weight_stride, BLOCK_D)

    inside = rows < N
    g = tl.load(dlogprobs_ptr + rows, mask=inside, other=0.0)
    temperature = row_temperature(temperature_ptr, temperature, tl.minimum(rows, N - 1))
    scale, inverse = tl.div_rn(LOG2_E, temperature), tl.div_rn(1.0, temperature)
    m = tl.load(lse_ptr + 2 * rows, mask=inside, other=0.0)
    log2_d = tl.load(lse_ptr + 2 * rows + 1, mask=inside, other=0.0) / LN_2
    y = tl.load(targets_ptr + rows, mask=inside, other=-1).to(tl.int32)
    level, slope, at_target = -g, g * 0.0, g * inverse
    counts = g != 0
    if WITH_ENTROPY:
        h = tl.load(dentropy_ptr + rows, mask=inside, other=0.0)
        counts |= h != 0
        level -= h * tl.load(entropy_ptr + rows, mask=inside, other=0.0)
        slope = -h * LN_2 * inverse
    level *= inverse
    scale = tl.zeros([BLOCK_N], tl.float32) + scale
    dz = logits_gradient(
        z, cols[None, :], m[:, None], scale[:, None], log2_d[:, None], y[:, None],
        at_target[:, None], level[:, None], slope[:, None], WITH_ENTROPY,
    )  # fmt: skip
    dz = tl.where(counts[:, None], dz, 0.0)  # also next to a NaN
    out_ptr = dlogits_ptr + rows.to(tl.int64)[:, None] * dlogits_stride + cols[None, :]
    tl.store(out_ptr, dz, mask=inside[:, None] & (cols < dlogits_stride)[None, :])


def linear_logprobs_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Statistics of the softmax over each of the S splits of the vocabulary, float32.

    hidden: (n, D); weight: (V, D); targets and a temperature per row: n elements, contiguous.

    Returns: the target's logit (S, n), 0 outside of its split; whether the split has the target
    (S, n), bool; the entropy (S, n) or None; lse (S, n, 2) as from `token_logprobs_fwd`, with an
    offset of -inf where all logits are.
    """
    (n, D), V = hidden.shape, len(weight)
    hidden, weight = hidden.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    splits = triton.cdiv(V, SPLIT)
    own = torch.empty((splits, n), dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(own) if with_entropy else None
    lse = own.new_empty((splits, n, 2))
    per_row, number = tensor_or_number(temperature)
    tile = _tile(hidden, wide=bias is None)  # a bias takes registers, too
    if n:
        with torch.cuda.device_of(hidden):
            linear_logprobs_fwd_kernel[(triton.cdiv(n, tile["BLOCK_N"]) * splits,)](
                hidden, weight, bias, targets, per_row, own, entropy, lse,
                n, V, D, weight.stride(0), number, SPLIT=SPLIT, **tile,
            )  # fmt: skip
    begin = torch.arange(0, V, SPLIT, device=hidden.device)[:, None]
    has_target = (targets >= begin) & (targets < (begin + SPLIT).clamp_max(V))
    return own, has_target, entropy, lse


def linear_logprobs_bwd(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    entropy: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """dlogits (n, V) in hidden's dtype for the rows of weight, which may be a part of the head.

    The other tensors are as for `linear_logprobs_fwd`, or have n elements. A target outside of
    [0, V) is in another part. lse and entropy are those over all parts. Rows whose incoming
    gradients are 0 become 0.
    """
    (n, D), V = hidden.shape, len(weight)
    hidden, weight = hidden.contiguous(), weight if weight.stride(1) == 1 else weight.contiguous()
    width = triton.cdiv(V, 16) * 16  # aligned rows, because narrow stores would spill registers
    dlogits = hidden.new_empty((n, width))
    per_row, number = tensor_or_number(temperature)
    tile = _tile(hidden)
    if n:
        programs = triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(V, tile["BLOCK_V"])
        with torch.cuda.device_of(hidden):
            linear_logprobs_bwd_kernel[(programs,)](
                dlogprobs, dentropy, hidden, weight, bias, targets, per_row, entropy, lse, dlogits,
                n, V, D, weight.stride(0), width, number, **tile,
            )  # fmt: skip
    return dlogits[:, :V]


def _tile(hidden: Tensor, wide: bool = True) -> dict[str, int]:
    """The largest tiles that compile without spills and fit into shared memory.

    wide: whether Hopper may take 256 tokens.
    """
    if hidden.dtype == torch.float32:  # on the CUDA cores, as torch multiplies without TF32
        return dict(BLOCK_N=64, BLOCK_V=128, BLOCK_D=16, num_warps=8, num_stages=3)
    major = compute_capability(hidden)
    if major == 9 and wide:
        return dict(BLOCK_N=128, BLOCK_V=256, BLOCK_D=64, num_warps=8, num_stages=4)
    return dict(BLOCK_N=128, BLOCK_V=128, BLOCK_D=64, num_warps=8, num_stages=3 if major else 2)


def compute_capability(x: Tensor) -> int:
    """The major one of x's device; 0 for AMD, and for Triton's interpreter."""
    if torch.version.hip or not x.is_cuda:
        return 0
    return torch.cuda.get_device_capability(x.device)[0]
