"""RMS norm, y = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, eq. 4).

On CPU torch passes over the memory six times forward and a dozen times backward. These kernels
pass once each way, and keep x only. With s = 1 / sqrt(mean(x^2) + eps) and g = dy weight:

    dx = s (g - x s^2 mean(g x))
    dweight = sum of dy x s over the rows

Under autocast y is written in the dtype in which a linear layer reads it.

Left out: a kernel for GPUs, where torch has its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.backends import FUSED_DTYPES
from rlhf_core.checks import at_least_float32, resolve
from rlhf_core.ops.derivatives import gradients, needs_reference
from rlhf_core.ops.logprobs import as_rows


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The definition, by torch."""
    if x.dtype != weight.dtype:
        x, weight = at_least_float32(x, weight)
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, x, weight, eps, dtype):
        ctx.save_for_backward(x, weight)
        ctx.impl, ctx.eps, ctx.dtype = impl, eps, dtype
        return impl.rms_norm_fwd(as_rows(x, 3), weight, eps, dtype).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        if needs_reference(dy):

            def reference(x, weight):
                return (rms_norm_reference(x, weight, ctx.eps, ctx.dtype),)

            return None, *gradients(reference, (x, weight), needs, (dy,)), None, None
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        rows = as_rows(dy, 3), as_rows(x, 3)
        dx, dweight = ctx.impl.rms_norm_bwd(*rows, weight, ctx.eps, needs[1])
        return None, dx.view(x.shape), dweight, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """x (..., D) normalised along D, times weight (D,). It is computed in float32 and rounded once.

    torch computes float64, and inputs that no kernel can read.

    Args:
        x: (..., D) of any float dtype.
        weight: (D,) of any float dtype.
        dtype: of the result; None for that of x.
    """
    dtype, impl = dtype or x.dtype, resolve(backend, x, weight)
    fits = (
        hasattr(impl, "rms_norm_fwd")
        and weight.is_cpu
        and weight.shape == x.shape[-1:]
        and weight.dtype in FUSED_DTYPES
        and (dtype == x.dtype or (x.dtype == torch.float32 and dtype in FUSED_DTYPES))
    )
    if not fits:
        return rms_norm_reference(x, weight, eps, dtype)
    x, weight = x if x.stride(-1) == 1 else x.contiguous(), weight.float().contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(impl, x, weight, eps, dtype)
    # Without autograd.Function, which would double the time of a decoding step's few rows.
    return impl.rms_norm_fwd(as_rows(x, 3), weight, eps, dtype).view(x.shape)
