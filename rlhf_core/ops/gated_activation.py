"""The activation of a gated MLP: y = act(gate) * up, with gate and up side by side in one tensor.

SwiGLU has SiLU, GeGLU has GELU (Shazeer 2020). On CPU, torch passes over the memory five times
forward, and a dozen times backward. These kernels read each input and write each output once, and
round once: they compute in float32. They keep only their input for the backward pass.

Left out: a kernel for GPUs, and for GELU's exact form. There torch computes the reference.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.checks import resolve
from rlhf_core.ops.derivatives import gradients, needs_reference
from rlhf_core.ops.logprobs import as_rows

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def gated_activation_reference(gate_up: Tensor, activation: str) -> Tensor:
    """The definition. In 16 bits torch also rounds the activation itself."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, gate_up, activation):
        ctx.save_for_backward(gate_up)
        ctx.impl, ctx.activation = impl, activation
        y = impl.gated_activation_fwd(as_rows(gate_up, 3), activation)
        return y.view(*gate_up.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        (gate_up,) = ctx.saved_tensors
        if needs_reference(dy):

            def reference(gate_up):
                return (gated_activation_reference(gate_up, ctx.activation),)

            return None, *gradients(reference, (gate_up,), (True,), (dy,)), None
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = ctx.impl.gated_activation_bwd(as_rows(dy, 3), as_rows(gate_up, 3), ctx.activation)
        return None, dx.view(gate_up.shape), None


def gated_activation(
    gate_up: Tensor, activation: str = "silu", *, backend: str | None = None
) -> Tensor:
    """Return act(gate) * up (..., I), in the dtype of gate_up.

    Args:
        gate_up: (..., 2 I), the gate first; float32, bfloat16 or float16, else torch computes it.
        activation: "silu", "gelu_tanh", or "gelu", which torch computes.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be (..., 2 I), got {tuple(gate_up.shape)}")
    impl = resolve(backend, gate_up)
    if activation == "gelu" or not hasattr(impl, "gated_activation_fwd"):
        return gated_activation_reference(gate_up, activation)
    gate_up = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    return _GatedActivation.apply(impl, gate_up, activation)
