"""Per-token KL estimates k1, k2, k3 and abs in Triton: one elementwise pass forward, one backward.

The formulas are those of `rlhf_core.ops.kl`, with d = logprobs - ref_logprobs. Under a False mask value and gradient
are 0, whatever the inputs hold there.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SERIES_BELOW = tl.constexpr(0.125)  # |d| under which exp(-d) - 1 + d cancels
TANGENT_BELOW = tl.constexpr(-20.0)  # d under which k3 goes on along its tangent
EXP_20 = tl.constexpr(math.exp(20.0))
BLOCK = 1024


@triton.jit
def _load_d(logprobs_ptr, ref_ptr, mask_ptr, at, inside):
    counted = inside
    if mask_ptr is not None:
        counted = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    d = tl.load(logprobs_ptr + at, mask=inside) - tl.load(ref_ptr + at, mask=inside)  # unmasked, hence 128 bits wide
    return tl.where(counted, d, 0.0), counted


@triton.jit
def kl_estimate_fwd_kernel(
    logprobs_ptr, ref_ptr, mask_ptr, kl_ptr, n, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d, _ = _load_d(logprobs_ptr, ref_ptr, mask_ptr, at, at < n)
    if ESTIMATOR == "k1":
        kl = d
    elif ESTIMATOR == "k2":
        kl = 0.5 * d * d
    elif ESTIMATOR == "abs":
        kl = tl.abs(d)
    else:
        series = 0.5 * d * d * (1 - d / 3 + d * d / 12 - d * d * d / 60 + d * d * d * d / 360)
        tangent = EXP_20 * (1 + (TANGENT_BELOW - d)) - 1 + d
        kl = tl.where(d < TANGENT_BELOW, tangent, tl.exp(-d) - 1 + d)
        kl = tl.where(tl.abs(d) < SERIES_BELOW, series, kl)
    tl.store(kl_ptr + at, kl, mask=at < n)


@triton.jit
def kl_estimate_bwd_kernel(
    dkl_ptr, logprobs_ptr, ref_ptr, mask_ptr, dlogprobs_ptr, dref_ptr, n, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d, counted = _load_d(logprobs_ptr, ref_ptr, mask_ptr, at, at < n)
    if ESTIMATOR == "k1":
        slope = 1.0
    elif ESTIMATOR == "k2":
        slope = d
    elif ESTIMATOR == "abs":
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))  # 0 at 0, NaN at NaN
    else:
        series = d * (1 - d / 2 + d * d / 6 - d * d * d / 24 + d * d * d * d / 120)
        direct = 1 - tl.exp(tl.where(d < TANGENT_BELOW, -TANGENT_BELOW, -d))
        slope = tl.where(tl.abs(d) < SERIES_BELOW, series, direct)
    grad = tl.where(counted, tl.load(dkl_ptr + at, mask=at < n) * slope, 0.0)
    tl.store(dlogprobs_ptr + at, grad, mask=at < n)
    tl.store(dref_ptr + at, -grad, mask=at < n)


def kl_estimate_fwd(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    """kl, shaped like logprobs; all tensors contiguous, float32 and bool."""
    kl = torch.empty_like(logprobs)
    _launch(kl_estimate_fwd_kernel, (logprobs, ref_logprobs, mask, kl), estimator)
    return kl


def kl_estimate_bwd(
    dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str
) -> tuple[Tensor, Tensor]:
    """(dlogprobs, dref_logprobs), the second the negative of the first."""
    dlogprobs, dref_logprobs = torch.empty_like(logprobs), torch.empty_like(logprobs)
    _launch(kl_estimate_bwd_kernel, (dkl, logprobs, ref_logprobs, mask, dlogprobs, dref_logprobs), estimator)
    return dlogprobs, dref_logprobs


def _launch(kernel, tensors: tuple[Tensor | None, ...], estimator: str) -> None:
    n = tensors[0].numel()
    if n == 0:
        return
    tensors = [x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in tensors]
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(n, BLOCK),)](*tensors, n, ESTIMATOR=estimator, BLOCK=BLOCK)
