"""A linear layer with low-rank adapters: y = x W^T + b, plus scale x A^T B^T in some columns.

The adapters add to the layer's output in place, and their gradient to that of its input, so that
only the products read the activations. Left out: dropout, and adapters in another dtype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, columns, *matrices):
        A, B = torch.cat(matrices[::2]), matrices[1::2]  # (sum of ranks, in), (out, rank) each
        y, z = F.linear(x, weight, bias), (x @ A.T).mul_(scale)
        for own, b, part in zip(columns, B, z.split([b.shape[1] for b in B], dim=1)):
            y[:, own].addmm_(part, b.T)
        ctx.save_for_backward(x, weight, z, *matrices)
        ctx.scale, ctx.columns = scale, columns
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, z, *matrices = ctx.saved_tensors
        A, B = torch.cat(matrices[::2]), matrices[1::2]
        ranks = [b.shape[1] for b in B]
        if torch.is_grad_enabled():  # for a second derivative, which depends on x and A
            z = x @ A.T * ctx.scale
        parts = [dy[:, own] for own in ctx.columns]
        dz = torch.cat([part @ b for part, b in zip(parts, B)], dim=1) * ctx.scale
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = torch.addmm(dy @ weight, dz, A) if needs_x else None
        dmatrices = [None] * len(matrices)
        if any(ctx.needs_input_grad[5:]):
            dmatrices[::2] = (dz.T @ x).split(ranks)
            dmatrices[1::2] = [p.T @ part for p, part in zip(parts, z.split(ranks, dim=1))]
        dweight = dy.T @ x if needs_weight else None
        return dx, dweight, dy.sum(dim=0) if needs_bias else None, None, None, *dmatrices


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[slice, Tensor, Tensor]],
    scale: float,
) -> Tensor:
    """Return x weight^T + bias (..., out), with scale x A^T B^T added in each adapter's columns.

    Under autocast everything is cast to its dtype, and a cast weight is kept for the backward pass.

    Args:
        x: (..., in).
        weight, bias: (out, in) and (out,), in x's dtype, as are all matrices (any under autocast).
        adapters: columns of the output, A (rank, in) and B (columns, rank) of each adapter.
    """
    matrices = [matrix for _, *pair in adapters for matrix in pair]
    columns = [own for own, *_ in adapters]
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias, *matrices = (
            t if t is None else t.to(dtype) for t in (x, weight, bias, *matrices)
        )
    with torch.autocast(device, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        y = _LowRankLinear.apply(rows, weight, bias, scale, columns, *matrices)
    return y.unflatten(0, x.shape[:-1])
