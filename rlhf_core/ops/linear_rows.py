"""A linear layer of a few rows, for decoding: y = x weight^T + bias.

A decoding step multiplies a few rows by every weight of the model, so it takes as long as reading
them. On CPUs torch's product takes two to four times that, unless the weights are copied into
oneDNN's own layout. This kernel reads them where they are. It adds products in float32; bfloat16
uses AMX or AVX-512 BF16 where the CPU has them.

Left out: gradients and GPUs, where torch's product is already as fast as the memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.checks import resolve

MOST_ROWS = 64  # from here on the arithmetic takes longer than reading the weights


def linear_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out), in x's dtype.

    torch computes it for more than MOST_ROWS rows, for inputs of several dtypes or devices, under
    autocast, if a gradient is needed, or if there is no fused launcher. The bits of a row depend
    neither on the other rows nor, on one CPU, on their number, except that another kernel takes
    over at 17 rows of float32, at five of bfloat16 with AMX, and torch beyond MOST_ROWS.
    """
    inputs = [t for t in (x, weight, bias) if t is not None]
    launch = getattr(resolve(backend, *inputs), "linear_rows_fwd", None)
    fits = (
        launch is not None
        and 0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and all(t.dtype == x.dtype and t.is_cpu for t in inputs)
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
    )
    if not fits:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = launch(rows if rows.stride(1) == 1 else rows.contiguous(), weight, bias)
    return y.unflatten(0, x.shape[:-1])
