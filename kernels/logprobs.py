"""Token log-probs and entropy in Triton: one program per row, every logit read once forward, once backward.

With x_j = (z_j - m) * log2(e) / temperature for some offset m, d = sum 2^x_j and s = sum 2^x_j x_j:

    log_p_j = ln2 * (x_j - log2 d)        entropy = ln2 * (log2 d - s / d)

Any m will do that neither overflows nor underflows d. The forward therefore takes the max of the row's first block
and runs a loop without running max, rescaling, reduction or barrier; only where d shows that m was a bad guess does
the program look for the row's own max and sum again. Which way a row goes depends on that row alone. x subtracts
before it scales, so an offset common to all logits costs no digits; for the same reason logsumexp is kept as two
numbers, (m, ln2 * log2 d). Left out: wide loads where V % 16 != 0. Peeling rows to alignment would tie the order of a
row's sum to its address, and its last bits to its place in the batch.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
# 2^x is 0 in float32 long before x = -1024. Clamping there keeps 0 * -inf out of the entropy.
X_MIN = tl.constexpr(-1024.0)
# Every row holds its m, so d >= 1. Up to here sum 2^x x is far from overflow and log2 d has digits to spare.
D_MAX = tl.constexpr(2.0**40)


@triton.jit
def _accumulate(z, m, scale, d, s, WITH_ENTROPY: tl.constexpr):
    x = (z.to(tl.float32) - m) * scale
    e = tl.exp2(x)
    d += e
    if WITH_ENTROPY:
        s = tl.fma(e, tl.maximum(x, X_MIN), s)
    return d, s


@triton.jit
def _row_sums(row_ptr, m, scale, V, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    d = tl.zeros([BLOCK], tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        d, s = _accumulate(tl.load(row_ptr + start + cols), m, scale, d, s, WITH_ENTROPY)
    tail = tl.load(row_ptr + whole + cols, mask=whole + cols < V, other=-float("inf"))  # -inf adds 0
    d, s = _accumulate(tail, m, scale, d, s, WITH_ENTROPY)
    return tl.sum(d, 0), tl.sum(s, 0)


@triton.jit
def _row_max(row_ptr, V, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(row_ptr + start + cols, mask=start + cols < V, other=-float("inf"))
        top = tl.maximum(top, z.to(tl.float32))
    return tl.max(top, 0)


@triton.jit(do_not_specialize=["T", "targets_sb", "targets_st", "mask_sb", "mask_st"])
def token_logprobs_fwd_kernel(
    logits_ptr, targets_ptr, mask_ptr, logprobs_ptr, entropy_ptr, lse_ptr,
    T, V, scale,
    logits_sb, logits_st, targets_sb, targets_st, mask_sb, mask_st,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)  # strides times these pass 2^31
    row_ptr = logits_ptr + b * logits_sb + t * logits_st
    counted = True
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + b * mask_sb + t * mask_st) != 0
    n = tl.where(counted, V, 0)  # a masked row is an empty one: nothing is read

    m, d, s = 0.0, 0.0, 0.0
    seen = tl.minimum(n, BLOCK)  # as much of the row as the guess m knows
    trying = True
    while trying:
        m = _row_max(row_ptr, seen, BLOCK)
        d, s = _row_sums(row_ptr, m, scale, n, WITH_ENTROPY, BLOCK)
        trying = (seen < n) & ~(d < D_MAX)  # a NaN in d comes back in the second sum if it is the row's own
        seen = n
    log2_d = tl.log2(d)

    y = tl.load(targets_ptr + b * targets_sb + t * targets_st)
    z_y = tl.load(row_ptr + y, mask=(y >= 0) & (y < n), other=float("nan")).to(tl.float32)
    logprob = ((z_y - m) * scale - log2_d) * LN_2
    logprob = tl.where(logprob > 0, 0.0, logprob)  # rounding only; unlike minimum(), lets NaN through
    row = row.to(tl.int64)
    tl.store(logprobs_ptr + row, tl.where(counted, logprob, 0.0))
    if WITH_ENTROPY:
        entropy = (log2_d - s / d) * LN_2
        entropy = tl.where(entropy < 0, 0.0, entropy)
        tl.store(entropy_ptr + row, tl.where(counted, entropy, 0.0))
    tl.store(lse_ptr + 2 * row, tl.where(counted, m, 0.0))
    tl.store(lse_ptr + 2 * row + 1, tl.where(counted, log2_d * LN_2, 0.0))


@triton.jit
def _dlogits(z, cols, m, scale, log2_d, y, at_target, level, slope, WITH_ENTROPY: tl.constexpr):
    x = (z.to(tl.float32) - m) * scale - log2_d  # log2 p
    factor = tl.fma(tl.maximum(x, X_MIN), slope, level) if WITH_ENTROPY else level
    return tl.fma(tl.exp2(x), factor, tl.where(cols == y, at_target, 0.0))  # rounded once, where it is stored


@triton.jit(
    do_not_specialize=["T", "targets_sb", "targets_st", "mask_sb", "mask_st", "dlp_sb", "dlp_st", "dent_sb", "dent_st"]
)
def token_logprobs_bwd_kernel(
    dlogprobs_ptr, dentropy_ptr, logits_ptr, targets_ptr, mask_ptr, entropy_ptr, lse_ptr, dlogits_ptr,
    T, V, scale, inverse_temperature,
    dlp_sb, dlp_st, dent_sb, dent_st, logits_sb, logits_st, targets_sb, targets_st, mask_sb, mask_st,
    dlogits_sb, dlogits_st,
    BLOCK: tl.constexpr,
):  # fmt: skip
    WITH_ENTROPY: tl.constexpr = dentropy_ptr is not None
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    row = row.to(tl.int64)
    cols = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    out_ptr = dlogits_ptr + b * dlogits_sb + t * dlogits_st
    counted = True
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + b * mask_sb + t * mask_st) != 0
    g = tl.load(dlogprobs_ptr + b * dlp_sb + t * dlp_st, mask=counted, other=0.0)
    h = 0.0
    if WITH_ENTROPY:
        h = tl.load(dentropy_ptr + b * dent_sb + t * dent_st, mask=counted, other=0.0)

    if (g != 0) | (h != 0):
        row_ptr = logits_ptr + b * logits_sb + t * logits_st
        m = tl.load(lse_ptr + 2 * row)
        log2_d = tl.load(lse_ptr + 2 * row + 1) / LN_2
        y = tl.load(targets_ptr + b * targets_sb + t * targets_st)
        # dz_j = p_j (level + slope log2 p_j) + [j == y] at_target
        level, slope, at_target = -g, 0.0, g * inverse_temperature
        if WITH_ENTROPY:
            level -= h * tl.load(entropy_ptr + row)
            slope = -h * LN_2 * inverse_temperature
        level *= inverse_temperature
        if (y < 0) | (y >= V):
            level = float("nan")  # no target, no log-prob, and no gradient that could pass for one
        y = y.to(tl.int32)
        for start in range(0, whole, BLOCK):
            z = tl.load(row_ptr + start + cols)
            dz = _dlogits(z, start + cols, m, scale, log2_d, y, at_target, level, slope, WITH_ENTROPY)
            tl.store(out_ptr + start + cols, dz)
        z = tl.load(row_ptr + whole + cols, mask=whole + cols < V, other=0.0)
        dz = _dlogits(z, whole + cols, m, scale, log2_d, y, at_target, level, slope, WITH_ENTROPY)
        tl.store(out_ptr + whole + cols, dz, mask=whole + cols < V)
    else:
        zeros = tl.zeros([BLOCK], dlogits_ptr.dtype.element_ty)
        for start in range(0, whole, BLOCK):
            tl.store(out_ptr + start + cols, zeros)
        tl.store(out_ptr + whole + cols, zeros, mask=whole + cols < V)


def token_logprobs_fwd(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logprobs, entropy or None, lse): float32 (B, T), (B, T), (B, T, 2) for logits (B, T, V) with last stride 1.

    lse holds each row's offset m, in units of logits, and log sum exp((z - m) / temperature). Rows under a False mask
    are not read and give 0 everywhere; a counted target outside [0, V) gives NaN.
    """
    B, T, V = logits.shape
    logprobs = torch.empty((B, T), dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    lse = torch.empty((B, T, 2), dtype=torch.float32, device=logits.device)
    if logprobs.numel() == 0:
        return logprobs, entropy, lse
    with torch.cuda.device_of(logits):
        token_logprobs_fwd_kernel[(B * T,)](
            logits, targets, _bytes(mask), logprobs, entropy, lse,
            T, V, LOG2_E / temperature,
            *logits.stride()[:2], *targets.stride(), *_strides(mask),
            WITH_ENTROPY=with_entropy, **_tile(V),
        )  # fmt: skip
    return logprobs, entropy, lse


def token_logprobs_bwd(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    entropy: Tensor | None,
    lse: Tensor,
    dlogits: Tensor,
) -> None:
    """Write the gradient (B, T, V) into dlogits, which may be the very logits.

    Rows under a False mask, and rows whose incoming gradients are 0, become 0 without a look at their logits.
    """
    B, T, V = logits.shape
    if dlogprobs.numel() == 0:
        return
    with torch.cuda.device_of(logits):
        token_logprobs_bwd_kernel[(B * T,)](
            dlogprobs, dentropy, logits, targets, _bytes(mask), entropy, lse, dlogits,
            T, V, LOG2_E / temperature, 1 / temperature,
            *dlogprobs.stride(), *_strides(dentropy), *logits.stride()[:2], *targets.stride(), *_strides(mask),
            *dlogits.stride()[:2],
            **_tile(V),
        )  # fmt: skip


def _tile(V: int) -> dict[str, int]:
    # A function of V alone, so that a row gives the same bits in any batch. 2048 x 4 spills nowhere on sm_80 to sm_100
    # and keeps two (16-bit) or four (float32) 128-bit loads a thread in flight. Rows that cannot be loaded that wide
    # need an address per element, hence the registers of 8 warps.
    block = min(2048, max(256, triton.next_power_of_2(V)))
    return {"BLOCK": block, "num_warps": 4 if V % 16 == 0 else 8}


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else x.stride()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
