"""Token log-probs and entropy in Triton: one program per row reads each logit once per pass.

With x_j = (z_j - m) * log2(e) / temperature for some offset m, d = sum 2^x_j and s = sum 2^x_j x_j:

    log_p_j = ln2 * (x_j - log2 d)        entropy = ln2 * (log2 d - s / d)

Any m works if d neither overflows nor underflows. The forward pass therefore takes the max of the
row's first block, and its loop needs no running max, rescaling, reduction or barrier. Only if d
shows that m was a bad guess, the program finds the max of the whole row and sums again. This
decision depends on the row alone. x subtracts before it scales, so an offset common to all logits
costs no digits. For the same reason logsumexp is kept as two numbers, (m, ln2 * log2 d).

Left out: wide loads if V % 16 != 0. Peeling rows to alignment would tie the order of a row's sum to
its address, and so its last bits to its place in the batch. With narrow loads a 16-bit logit with
entropy takes 10 instructions instead of 8. An H200 has time for 14 while its memory delivers one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
# 2^x is 0 in float32 long before x = -1024. Clamping there keeps 0 * -inf out of the entropy.
X_MIN = tl.constexpr(-1024.0)
# m occurs in the row's first block, so d >= 1. Up to this bound sum 2^x x is far from overflow, and
# log2 d has digits to spare.
D_MAX = tl.constexpr(2.0**40)


@triton.jit
def row_temperature(temperature_ptr, number, at):
    temperature = number
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + at)
    return temperature


@triton.jit
def row_max(row_ptr, V, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        z = tl.load(row_ptr + start + cols, mask=start + cols < V, other=-float("inf"))
        top = tl.maximum(top, z.to(tl.float32))
    return tl.max(top, 0)


@triton.jit
def _accumulate(z, m, scale, d, s, WITH_ENTROPY: tl.constexpr):
    x = (z.to(tl.float32) - m) * scale
    e = tl.exp2(x)
    d += e
    if WITH_ENTROPY:
        s = tl.fma(e, tl.maximum(x, X_MIN), s)
    return d, s


@triton.jit(
    do_not_specialize=[
        "T", "temp_sb", "temp_st", "z_sb", "z_st", "targets_sb", "targets_st", "mask_sb", "mask_st",
    ]
)  # fmt: skip
def token_logprobs_fwd_kernel(
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr, logprobs_ptr, entropy_ptr, lse_ptr,
    T, V, temperature,
    temp_sb, temp_st, z_sb: tl.int64, z_st: tl.int64, targets_sb, targets_st, mask_sb, mask_st,
    WITH_ENTROPY: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)  # strides times these exceed 2^31
    row_ptr = logits_ptr + (b * z_sb + t * z_st) * UNIT
    cols = tl.arange(0, BLOCK)
    counted = True
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + b * mask_sb + t * mask_st) != 0
    n = tl.where(counted, V, 0)  # a masked row counts as empty: nothing is read
    whole = n // BLOCK * BLOCK
    temperature = row_temperature(temperature_ptr, temperature, b * temp_sb + t * temp_st)
    scale = tl.div_rn(LOG2_E, temperature)

    m, d, s = 0.0, 0.0, 0.0
    top = -float("inf")
    seen = tl.minimum(n, BLOCK)  # length of the row that m is computed from
    trying = True
    while trying:
        first = tl.load(row_ptr + cols, mask=cols < n, other=-float("inf"))  # -inf adds 0
        m = tl.maximum(tl.max(first.to(tl.float32), 0), top)
        zeros = tl.zeros([BLOCK], tl.float32)
        d_lanes, s_lanes = _accumulate(first, m, scale, zeros, zeros, WITH_ENTROPY)
        for start in range(BLOCK, whole, BLOCK):
            z = tl.load(row_ptr + start + cols)
            d_lanes, s_lanes = _accumulate(z, m, scale, d_lanes, s_lanes, WITH_ENTROPY)
        for start in range(tl.maximum(whole, BLOCK), n, BLOCK):  # once, unless BLOCK divides V
            z = tl.load(row_ptr + start + cols, mask=start + cols < n, other=-float("inf"))
            d_lanes, s_lanes = _accumulate(z, m, scale, d_lanes, s_lanes, WITH_ENTROPY)
        d, s = tl.sum(d_lanes, 0), tl.sum(s_lanes, 0)
        trying = (seen < n) & ~(d < D_MAX)  # also on NaN, which a bad m can cause
        if trying:
            top = row_max(row_ptr, n, BLOCK)
        seen = n
    log2_d = tl.log2(d)

    y = tl.load(targets_ptr + b * targets_sb + t * targets_st)
    z_y = tl.load(row_ptr + y, mask=(y >= 0) & (y < n), other=float("nan")).to(tl.float32)
    logprob = ((z_y - m) * scale - log2_d) * LN_2
    logprob = tl.where(logprob > 0, 0.0, logprob)  # rounding only; unlike minimum(), keeps NaN
    row = row.to(tl.int64)
    tl.store(logprobs_ptr + row, tl.where(counted, logprob, 0.0))
    if WITH_ENTROPY:
        entropy = (log2_d - s / d) * LN_2
        entropy = tl.where(entropy < 0, 0.0, entropy)
        tl.store(entropy_ptr + row, tl.where(counted, entropy, 0.0))
    if lse_ptr is not None:
        m = tl.where(z_y == z_y, m, z_y)  # target out of range: NaN in the gradient too
        tl.store(lse_ptr + 2 * row, tl.where(counted, m, 0.0))
        tl.store(lse_ptr + 2 * row + 1, tl.where(counted, log2_d * LN_2, 0.0))


@triton.jit
def store_zeros(row_ptr, V, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], row_ptr.dtype.element_ty)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(row_ptr + start + cols, zeros)
    tl.store(row_ptr + whole + cols, zeros, mask=whole + cols < V)


@triton.jit
def logits_gradient(
    z, cols, m, scale, log2_d, y, at_target, level, slope, WITH_ENTROPY: tl.constexpr
):
    x = (z.to(tl.float32) - m) * scale - log2_d  # log2 p
    factor = tl.fma(tl.maximum(x, X_MIN), slope, level) if WITH_ENTROPY else level
    # Rounded only once, when it is stored.
    return tl.fma(tl.exp2(x), factor, tl.where(cols == y, at_target, 0.0))


@triton.jit(
    do_not_specialize=[
        "T", "temp_sb", "temp_st", "dlp_sb", "dlp_st", "dent_sb", "dent_st", "z_sb", "z_st",
        "targets_sb", "targets_st", "mask_sb", "mask_st", "dz_sb", "dz_st",
    ]
)  # fmt: skip
def token_logprobs_bwd_kernel(
    dlogprobs_ptr, dentropy_ptr, logits_ptr, targets_ptr, mask_ptr, temperature_ptr, entropy_ptr,
    lse_ptr, dlogits_ptr,
    T, V, temperature,
    temp_sb, temp_st, dlp_sb, dlp_st, dent_sb, dent_st, z_sb: tl.int64, z_st: tl.int64,
    targets_sb, targets_st, mask_sb, mask_st, dz_sb: tl.int64, dz_st: tl.int64,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WITH_ENTROPY: tl.constexpr = dentropy_ptr is not None
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    row = row.to(tl.int64)
    cols = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    out_ptr = dlogits_ptr + (b * dz_sb + t * dz_st) * UNIT
    counted = True
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + b * mask_sb + t * mask_st) != 0
    g = tl.load(dlogprobs_ptr + b * dlp_sb + t * dlp_st, mask=counted, other=0.0)
    h = 0.0
    if WITH_ENTROPY:
        h = tl.load(dentropy_ptr + b * dent_sb + t * dent_st, mask=counted, other=0.0)

    if (g != 0) | (h != 0):
        row_ptr = logits_ptr + (b * z_sb + t * z_st) * UNIT
        temperature = row_temperature(temperature_ptr, temperature, b * temp_sb + t * temp_st)
        scale, inverse = tl.div_rn(LOG2_E, temperature), tl.div_rn(1.0, temperature)
        m = tl.load(lse_ptr + 2 * row)
        log2_d = tl.load(lse_ptr + 2 * row + 1) / LN_2
        y = tl.load(targets_ptr + b * targets_sb + t * targets_st)
        # dz_j = p_j (level + slope log2 p_j) + [j == y] at_target
        level, slope, at_target = -g, 0.0, g * inverse
        if WITH_ENTROPY:
            level -= h * tl.load(entropy_ptr + row)
            slope = -h * LN_2 * inverse
        level *= inverse
        y = y.to(tl.int32)  # outside [0, V): in another block of the vocabulary
        for start in range(0, whole, BLOCK):
            z = tl.load(row_ptr + start + cols)
            dz = logits_gradient(
                z, start + cols, m, scale, log2_d, y, at_target, level, slope, WITH_ENTROPY
            )
            tl.store(out_ptr + start + cols, dz)
        z = tl.load(row_ptr + whole + cols, mask=whole + cols < V, other=0.0)
        dz = logits_gradient(
            z, whole + cols, m, scale, log2_d, y, at_target, level, slope, WITH_ENTROPY
        )
        tl.store(out_ptr + whole + cols, dz, mask=whole + cols < V)
    else:
        store_zeros(out_ptr, V, BLOCK)


def token_logprobs_fwd(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    with_entropy: bool,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logprobs (B, T), entropy (B, T) or None, lse (B, T, 2) or None), float32.

    logits: (B, T, V) with last stride 1. lse holds each row's offset m, in units of logits, and
    log sum exp((z - m) / temperature). Rows under a False mask are not read and give 0 everywhere.
    A counted target outside [0, V) gives NaN.
    """
    B, T, V = logits.shape
    logprobs = torch.empty((B, T), dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    lse = torch.empty((B, T, 2), dtype=torch.float32, device=logits.device) if with_lse else None
    if logprobs.numel() == 0:
        return logprobs, entropy, lse
    per_row, number = tensor_or_number(temperature)
    unit = stride_unit(logits)
    with torch.cuda.device_of(logits):
        token_logprobs_fwd_kernel[(B * T,)](
            logits, targets, as_bytes(mask), per_row, logprobs, entropy, lse,
            T, V, number,
            *strides(per_row), *strides(logits, unit), *strides(targets), *strides(mask),
            WITH_ENTROPY=with_entropy, **_tile(V, unit),
        )  # fmt: skip
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
    """dlogits (B, T, V), contiguous; with inplace the gradient overwrites logits and is returned.

    Rows under a False mask, or whose incoming gradients are 0, become 0 without reading the logits.
    """
    B, T, V = logits.shape
    dlogits = logits if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
    if dlogprobs.numel() == 0:
        return dlogits
    per_row, number = tensor_or_number(temperature)
    unit = stride_unit(logits, dlogits)
    with torch.cuda.device_of(logits):
        token_logprobs_bwd_kernel[(B * T,)](
            dlogprobs, dentropy, logits, targets, as_bytes(mask), per_row, entropy, lse, dlogits,
            T, V, number,
            *strides(per_row), *strides(dlogprobs), *strides(dentropy), *strides(logits, unit),
            *strides(targets), *strides(mask), *strides(dlogits, unit), **_tile(V, unit),
        )  # fmt: skip
    return dlogits


def _tile(V: int, unit: int) -> dict[str, int]:
    # It depends on V and alignment only, so that a row gives the same bits in any batch. 2048 x 4
    # does not spill on sm_80 to sm_100, and keeps two (16-bit) or four (float32) 128-bit loads per
    # thread in flight. Narrower loads need an address per element, hence the registers of 8 warps.
    block = min(2048, max(256, triton.next_power_of_2(V)))
    return {"UNIT": unit, "BLOCK": block, "num_warps": 4 if unit == 16 else 8}


def stride_unit(*rows: Tensor) -> int:
    """Unit of the strides passed to kernels: 16 if all rows (.., V) can load 128 bits wide, else 1.

    With plain strides, kernels would recompile whenever a length changes their divisibility by 16.
    """
    return 16 if all(n % 16 == 0 for x in rows for n in (x.shape[-1], *x.stride()[:2])) else 1


def strides(x: Tensor | None, unit: int = 1) -> tuple[int, int]:
    """Strides of the two leading axes, in units of `unit` elements."""
    return (0, 0) if x is None else (x.stride(0) // unit, x.stride(1) // unit)


def tensor_or_number(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    return (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
