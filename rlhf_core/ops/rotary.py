"""Rotary positions (Su et al. 2021). As in Llama, elements i and i + R/2 of a head are a pair.

With the factors cos = (c, c) and sin = (-s, s) of a position, which `rotary_factors` makes,

    y_i = x_i cos_i + x_(i + R/2) sin_i
    dx = dy rotated back, by the factors cos and -sin

On CPU torch passes over x three times, and five times for the gradient. Each is one pass here.

Left out: gradients of the factors; a kernel for GPUs.
"""

import torch
from torch import Tensor

from rlhf_core.checks import resolve
from rlhf_core.ops.logprobs import as_rows


def rotary_factors(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (..., R) of an element and its partner, from tables (..., R/2)."""
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, computed in the wider dtype of x and the factors."""
    R, K = cos.shape[-1], x.shape[-1]
    if R < K:
        return torch.cat((rotary_reference(x[..., :R], cos, sin), x[..., R:]), -1)
    return torch.addcmul(x * cos, x.roll(R // 2, dims=-1), sin).to(x.dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        factors = (as_rows(t[..., 0, :].expand(*x.shape[:-2], -1), 3) for t in (cos, sin))
        return impl.rotary_fwd(as_rows(x.flatten(-2), 3), *factors, x.shape[-1]).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return None, rotary(dy, cos, -sin), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Return x (..., H, K) rotated, in its dtype. The elements of a head from R on stay.

    Args:
        x: (..., H, K) of any float dtype.
        cos, sin: (..., 1, R) factors of the positions, which broadcast to x and get no gradient.
    """
    impl = resolve(backend, x, cos, sin)
    if not hasattr(impl, "rotary_fwd"):
        return rotary_reference(x, cos, sin)
    return _Rotary.apply(impl, x if x.stride(-1) == 1 else x.contiguous(), cos.float(), sin.float())
