"""KL in Triton: the estimators k1, k2, k3 and abs per token, and the exact KL of rows of logits.

The formulas are those of `rlhf_core.ops.kl`. Under a False mask the value and the gradient are 0,
whatever the inputs hold.

For the exact KL, one program per row reads both rows once forward and once backward. With x_j and d
of each row as in `rlhf_core.kernels.logprobs`, and s = sum 2^x_j (x_j - xref_j),

    kl = ln2 * (s / d + log2(dref / d))

The offsets are guessed from the first block of each row. If either guess was bad, the program sums
a second time with the offsets of the whole rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_core.kernels.logprobs import (
    D_MAX,
    LN_2,
    LOG2_E,
    as_bytes,
    row_max,
    row_temperature,
    store_zeros,
    stride_unit,
    strides,
    tensor_or_number,
)

SERIES_BELOW = tl.constexpr(0.125)  # |d| under which exp(-d) - 1 + d cancels
TANGENT_BELOW = tl.constexpr(-20.0)  # d under which k3 is replaced by its tangent
EXP_20 = tl.constexpr(math.exp(20.0))
BLOCK = 512  # 4 elements per thread: 128 bits of float32, 32 of the mask


@triton.jit
def k3_series(d):
    """exp(-d) - 1 + d for |d| < SERIES_BELOW."""
    return 0.5 * d * d * (1 - d / 3 + d * d / 12 - d * d * d / 60 + d * d * d * d / 360)


@triton.jit
def kl_value(d, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == "k1":
        kl = d
    elif ESTIMATOR == "k2":
        kl = 0.5 * d * d
    elif ESTIMATOR == "abs":
        kl = tl.abs(d)
    else:
        tangent = EXP_20 - 1 + TANGENT_BELOW + (EXP_20 - 1) * (TANGENT_BELOW - d)
        kl = tl.where(d < TANGENT_BELOW, tangent, tl.exp(-d) - 1 + d)
        kl = tl.where(tl.abs(d) < SERIES_BELOW, k3_series(d), kl)
    return kl


@triton.jit
def _kl_slope(d, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == "k1":
        slope = tl.full(d.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        slope = d
    elif ESTIMATOR == "abs":
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # 0 at 0, NaN at NaN
    else:
        series = d * (1 - d / 2 + d * d / 6 - d * d * d / 24 + d * d * d * d / 120)
        direct = 1 - tl.exp(tl.where(d < TANGENT_BELOW, -TANGENT_BELOW, -d))
        slope = tl.where(tl.abs(d) < SERIES_BELOW, series, direct)
    return slope


@triton.jit
def _load_d(logprobs_ptr, ref_ptr, mask_ptr, at, inside):
    # Also load masked elements, so that the loads stay wide.
    d = tl.load(logprobs_ptr + at, mask=inside) - tl.load(ref_ptr + at, mask=inside)
    counted = tl.full(d.shape, True, tl.int1)
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + at, mask=inside) != 0
    return tl.where(counted, d, 0.0), counted


@triton.jit
def _estimate(logprobs_ptr, ref_ptr, mask_ptr, kl_ptr, at, inside, ESTIMATOR: tl.constexpr):
    d, _ = _load_d(logprobs_ptr, ref_ptr, mask_ptr, at, inside)
    tl.store(kl_ptr + at, kl_value(d, ESTIMATOR), mask=inside)


@triton.jit
def _estimate_grad(
    dkl_ptr, logprobs_ptr, ref_ptr, mask_ptr, dlogprobs_ptr, dref_ptr, at, inside,
    ESTIMATOR: tl.constexpr,
):  # fmt: skip
    d, counted = _load_d(logprobs_ptr, ref_ptr, mask_ptr, at, inside)
    grad = tl.where(counted, tl.load(dkl_ptr + at, mask=inside) * _kl_slope(d, ESTIMATOR), 0.0)
    tl.store(dlogprobs_ptr + at, grad, mask=inside)
    tl.store(dref_ptr + at, -grad, mask=inside)


# Only the last block needs a mask. All others load 128 bits wide, for any n.
@triton.jit(do_not_specialize=["n"])
def kl_estimate_fwd_kernel(
    logprobs_ptr, ref_ptr, mask_ptr, kl_ptr, n, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _estimate(logprobs_ptr, ref_ptr, mask_ptr, kl_ptr, at, None, ESTIMATOR)
    else:
        _estimate(logprobs_ptr, ref_ptr, mask_ptr, kl_ptr, at, at < n, ESTIMATOR)


@triton.jit(do_not_specialize=["n"])
def kl_estimate_bwd_kernel(
    dkl_ptr, logprobs_ptr, ref_ptr, mask_ptr, dlogprobs_ptr, dref_ptr, n,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _estimate_grad(
            dkl_ptr, logprobs_ptr, ref_ptr, mask_ptr, dlogprobs_ptr, dref_ptr, at, None, ESTIMATOR
        )
    else:
        _estimate_grad(
            dkl_ptr, logprobs_ptr, ref_ptr, mask_ptr, dlogprobs_ptr, dref_ptr, at, at < n, ESTIMATOR
        )


@triton.jit
def _accumulate(z, zref, m, mref, scale, d, dref, s):
    x, xref = (z.to(tl.float32) - m) * scale, (zref.to(tl.float32) - mref) * scale
    e = tl.exp2(x)
    s = tl.where(e == 0, s, tl.fma(e, x - xref, s))  # p_j = 0 adds 0, not 0 * inf; d keeps NaN
    return d + e, dref + tl.exp2(xref), s


@triton.jit(
    do_not_specialize=[
        "T", "temp_sb", "temp_st", "z_sb", "z_st", "zref_sb", "zref_st", "mask_sb", "mask_st",
    ]
)  # fmt: skip
def full_kl_fwd_kernel(
    logits_ptr, ref_ptr, mask_ptr, temperature_ptr, kl_ptr, lse_ptr,
    T, V, temperature,
    temp_sb, temp_st, z_sb: tl.int64, z_st: tl.int64, zref_sb: tl.int64, zref_st: tl.int64,
    mask_sb, mask_st,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)  # strides times these exceed 2^31
    row_ptr = logits_ptr + (b * z_sb + t * z_st) * UNIT
    ref_row_ptr = ref_ptr + (b * zref_sb + t * zref_st) * UNIT
    cols = tl.arange(0, BLOCK)
    counted = True
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + b * mask_sb + t * mask_st) != 0
    n = tl.where(counted, V, 0)  # a masked row counts as empty: nothing is read
    whole = n // BLOCK * BLOCK
    temperature = row_temperature(temperature_ptr, temperature, b * temp_sb + t * temp_st)
    scale = tl.div_rn(LOG2_E, temperature)

    m, mref, d, dref, s = 0.0, 0.0, 0.0, 0.0, 0.0
    top, top_ref = -float("inf"), -float("inf")
    seen = tl.minimum(n, BLOCK)  # length of the rows that m and mref are computed from
    trying = True
    while trying:
        z = tl.load(row_ptr + cols, mask=cols < n, other=-float("inf"))  # -inf adds 0
        zref = tl.load(ref_row_ptr + cols, mask=cols < n, other=-float("inf"))
        m = tl.maximum(tl.max(z.to(tl.float32), 0), top)
        mref = tl.maximum(tl.max(zref.to(tl.float32), 0), top_ref)
        zeros = tl.zeros([BLOCK], tl.float32)
        d_lanes, dref_lanes, s_lanes = _accumulate(z, zref, m, mref, scale, zeros, zeros, zeros)
        for start in range(BLOCK, whole, BLOCK):
            z, zref = tl.load(row_ptr + start + cols), tl.load(ref_row_ptr + start + cols)
            d_lanes, dref_lanes, s_lanes = _accumulate(
                z, zref, m, mref, scale, d_lanes, dref_lanes, s_lanes
            )
        for start in range(tl.maximum(whole, BLOCK), n, BLOCK):  # once, unless BLOCK divides V
            z = tl.load(row_ptr + start + cols, mask=start + cols < n, other=-float("inf"))
            zref = tl.load(ref_row_ptr + start + cols, mask=start + cols < n, other=-float("inf"))
            d_lanes, dref_lanes, s_lanes = _accumulate(
                z, zref, m, mref, scale, d_lanes, dref_lanes, s_lanes
            )
        d, dref, s = tl.sum(d_lanes, 0), tl.sum(dref_lanes, 0), tl.sum(s_lanes, 0)
        trying = (seen < n) & ~((d < D_MAX) & (dref < D_MAX))  # NaN stops after the second pass
        if trying:
            top, top_ref = row_max(row_ptr, n, BLOCK), row_max(ref_row_ptr, n, BLOCK)
        seen = n

    kl = (s / d + tl.log2(dref / d)) * LN_2
    kl = tl.where(kl < 0, 0.0, kl)  # rounding only; unlike maximum(), keeps NaN
    row = row.to(tl.int64)
    tl.store(kl_ptr + row, tl.where(counted, kl, 0.0))
    tl.store(lse_ptr + 4 * row, tl.where(counted, m, 0.0))
    tl.store(lse_ptr + 4 * row + 1, tl.where(counted, tl.log2(d) * LN_2, 0.0))
    tl.store(lse_ptr + 4 * row + 2, tl.where(counted, mref, 0.0))
    tl.store(lse_ptr + 4 * row + 3, tl.where(counted, tl.log2(dref) * LN_2, 0.0))


@triton.jit
def _full_kl_grads(
    row_ptr, ref_row_ptr, drow_ptr, dref_row_ptr, at, inside,
    m, mref, scale, log2_d, log2_dref, kl2, level,
):  # fmt: skip
    z, zref = tl.load(row_ptr + at, mask=inside), tl.load(ref_row_ptr + at, mask=inside)
    x = (z.to(tl.float32) - m) * scale - log2_d  # log2 p
    xref = (zref.to(tl.float32) - mref) * scale - log2_dref
    p = tl.exp2(x)
    if drow_ptr is not None:
        dz = tl.where(p == 0, 0.0, p * (x - xref - kl2)) * (level * LN_2)
        tl.store(drow_ptr + at, dz, mask=inside)
    if dref_row_ptr is not None:
        tl.store(dref_row_ptr + at, (tl.exp2(xref) - p) * level, mask=inside)


@triton.jit(
    do_not_specialize=[
        "T", "temp_sb", "temp_st", "dkl_sb", "dkl_st", "z_sb", "z_st", "zref_sb", "zref_st",
        "mask_sb", "mask_st",
    ]
)  # fmt: skip
def full_kl_bwd_kernel(
    dkl_ptr, logits_ptr, ref_ptr, mask_ptr, temperature_ptr, kl_ptr, lse_ptr, dlogits_ptr, dref_ptr,
    T, V, temperature,
    temp_sb, temp_st, dkl_sb, dkl_st, z_sb: tl.int64, z_st: tl.int64,
    zref_sb: tl.int64, zref_st: tl.int64, mask_sb, mask_st,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    row = row.to(tl.int64)
    drow_ptr, dref_row_ptr = None, None
    if dlogits_ptr is not None:
        drow_ptr = dlogits_ptr + row * V
    if dref_ptr is not None:
        dref_row_ptr = dref_ptr + row * V
    counted = True
    if mask_ptr is not None:
        counted = tl.load(mask_ptr + b * mask_sb + t * mask_st) != 0
    g = tl.load(dkl_ptr + b * dkl_sb + t * dkl_st, mask=counted, other=0.0)
    if g != 0:
        row_ptr = logits_ptr + (b * z_sb + t * z_st) * UNIT
        ref_row_ptr = ref_ptr + (b * zref_sb + t * zref_st) * UNIT
        temperature = row_temperature(temperature_ptr, temperature, b * temp_sb + t * temp_st)
        scale, level = tl.div_rn(LOG2_E, temperature), g * tl.div_rn(1.0, temperature)
        m, mref = tl.load(lse_ptr + 4 * row), tl.load(lse_ptr + 4 * row + 2)
        log2_d = tl.load(lse_ptr + 4 * row + 1) / LN_2
        log2_dref = tl.load(lse_ptr + 4 * row + 3) / LN_2
        kl2 = tl.load(kl_ptr + row) / LN_2
        cols = tl.arange(0, BLOCK)
        whole = V // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            _full_kl_grads(
                row_ptr, ref_row_ptr, drow_ptr, dref_row_ptr, start + cols, None,
                m, mref, scale, log2_d, log2_dref, kl2, level,
            )  # fmt: skip
        _full_kl_grads(
            row_ptr, ref_row_ptr, drow_ptr, dref_row_ptr, whole + cols, whole + cols < V,
            m, mref, scale, log2_d, log2_dref, kl2, level,
        )  # fmt: skip
    else:
        if dlogits_ptr is not None:
            store_zeros(drow_ptr, V, BLOCK)
        if dref_ptr is not None:
            store_zeros(dref_row_ptr, V, BLOCK)


def kl_estimate_fwd(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str
) -> Tensor:
    """KL estimates, shaped like logprobs. All tensors are contiguous, float32 or bool."""
    kl = torch.empty_like(logprobs)
    _launch(kl_estimate_fwd_kernel, (logprobs, ref_logprobs, as_bytes(mask), kl), estimator)
    return kl


def kl_estimate_bwd(
    dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str
) -> tuple[Tensor, Tensor]:
    """(dlogprobs, dref_logprobs); the second is the negative of the first."""
    dlogprobs, dref_logprobs = torch.empty_like(logprobs), torch.empty_like(logprobs)
    _launch(
        kl_estimate_bwd_kernel,
        (dkl, logprobs, ref_logprobs, as_bytes(mask), dlogprobs, dref_logprobs),
        estimator,
    )
    return dlogprobs, dref_logprobs


def _launch(kernel, tensors: tuple[Tensor | None, ...], estimator: str) -> None:
    n = tensors[0].numel()
    if n == 0:
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(n, BLOCK),)](*tensors, n, ESTIMATOR=estimator, BLOCK=BLOCK)


def full_kl_fwd(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(kl (B, T), lse (B, T, 4)), float32. Both logits are (B, T, V), same dtype, last stride 1.

    lse holds the offset and log sum exp of token_logprobs_fwd, first of the policy's row, then of
    the reference's. Rows under a False mask are not read and give 0 everywhere.
    """
    B, T, V = logits.shape
    kl = torch.empty((B, T), dtype=torch.float32, device=logits.device)
    lse = torch.empty((B, T, 4), dtype=torch.float32, device=logits.device)
    if kl.numel() == 0:
        return kl, lse
    per_row, number = tensor_or_number(temperature)
    unit = stride_unit(logits, ref_logits)
    with torch.cuda.device_of(logits):
        full_kl_fwd_kernel[(B * T,)](
            logits, ref_logits, as_bytes(mask), per_row, kl, lse,
            T, V, number,
            *strides(per_row), *strides(logits, unit), *strides(ref_logits, unit), *strides(mask),
            **_tile(V, unit),
        )  # fmt: skip
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
    """(dlogits, dref_logits), contiguous (B, T, V) like logits, or None if not needed.

    Rows under a False mask, and rows with dkl 0, become 0 without reading their logits.
    """
    B, T, V = logits.shape
    dlogits, dref_logits = (
        torch.empty_like(logits, memory_format=torch.contiguous_format) if needed else None
        for needed in (needs_logits, needs_ref_logits)
    )
    if kl.numel() and (needs_logits or needs_ref_logits):
        per_row, number = tensor_or_number(temperature)
        unit = stride_unit(logits, ref_logits)
        with torch.cuda.device_of(logits):
            full_kl_bwd_kernel[(B * T,)](
                dkl, logits, ref_logits, as_bytes(mask), per_row, kl, lse, dlogits, dref_logits,
                T, V, number,
                *strides(per_row), *strides(dkl), *strides(logits, unit),
                *strides(ref_logits, unit), *strides(mask),
                **_tile(V, unit),
            )  # fmt: skip
    return dlogits, dref_logits


def _tile(V: int, unit: int) -> dict[str, int]:
    # As for token_logprobs, but two rows at a time need the registers of 8 warps. Narrow loads need
    # more registers, hence the smaller block.
    block = min(2048 if unit == 16 else 1024, max(256, triton.next_power_of_2(V)))
    return {"UNIT": unit, "BLOCK": block, "num_warps": 8}
