"""Derivatives that the fused backward passes lack: gradients that can be differentiated again.

A fused backward pass returns constants. With create_graph=True the gradient must instead be a
function of the op's inputs, so it comes from the reference. An op without that raises.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_core.checks import is_plain


def needs_reference(*upstream: Tensor | None) -> bool:
    """Whether a backward pass must use the reference.

    True if its result may be differentiated again, or if a kernel cannot read an upstream gradient.
    False under torch.compile, which refuses second derivatives itself.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or not all(g is None or is_plain(g) for g in upstream)


def gradients(
    reference: Callable[..., tuple[Tensor | None, ...]],
    inputs: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    upstream: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Gradients of a reference's outputs with respect to the inputs that need one, else None.

    They can be differentiated again if grad mode is enabled.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: if one input depends on another, the gradient must not follow that path.
        inputs = [x if x is None else x.view_as(x) for x in inputs]
        pairs = [(y, g) for y, g in zip(reference(*inputs), upstream) if g is not None]
        wanted = [x for x, needed in zip(inputs, needs) if needed]
        outputs, upstream = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=again))
    return [next(found) if needed else None for needed in needs]


def refuse_second(op: str) -> None:
    """Raise RuntimeError if the gradient of an op may be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"the fused {op} has no second derivative, which create_graph=True asks for: "
            "leave it out, or use backend='reference'"
        )
