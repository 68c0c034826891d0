"""A linear layer of a few rows, for decoding: y = x weight^T + bias.

A decoding step multiplies a few rows by every weight of the model, so it takes as long as reading
them. On CPUs torch's product takes two to four times that, unless the weights are copied into
oneDNN's own layout. This kernel reads them where they are. It adds products in float32; bfloat16
uses AMX or AVX-512 BF16 where the CPU has them.

`quantize_rows` makes weights of 8 bits, a quarter of the bytes of float32, for a `PackedModel`.
Each output has a scale s = max |w| / 127, and its weights become round(w / s). With AMX, 5 to
64 rows of a bfloat16 model are rounded to bfloat16 before they meet these weights.

Left out: gradients and GPUs, where torch's product is already as fast as the memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.checks import resolve

MOST_ROWS = 64  # from here on the arithmetic takes longer than reading the weights
LEAST_SCALE = 1e-37  # of rows of zeros; its inverse is a finite float32


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


def quantize_rows(weight: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 rows (out, in) and float32 scales (out,), whose product is close to weight.

    An element's error is at most half its row's scale. A row with a NaN or an infinity gets a scale
    of NaN, so that its outputs are NaN.
    """
    weight = weight.detach().contiguous()
    launch = getattr(resolve(backend, weight), "quantize_rows_fwd", None)
    if launch is not None and weight.is_cpu:
        return launch(weight)
    scales = torch.linalg.vector_norm(weight.float(), math.inf, dim=1) / 127
    scales = scales.clamp_min(LEAST_SCALE).where(weight.isfinite().all(dim=1), math.nan)
    rows = (weight.float() * (1 / scales)[:, None]).round().nan_to_num()
    return rows.to(torch.int8), scales
