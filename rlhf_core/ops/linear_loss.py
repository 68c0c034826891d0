"""A loss of whole logits, from hidden states and the output head, without all (N, V) logits.

    logits = hidden @ weight.T              # (n, V), of one chunk of rows at a time
    loss, *outputs = losses(logits, rows)   # summed over the chunks; outputs are concatenated

`linear_token_loss` is for losses of the log-probs of given targets. This op is for those that look
at the whole distribution, such as the KL to another model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.checks import check_float
from rlhf_core.ops.derivatives import refuse_second
from rlhf_core.ops.linear_logprobs_blocks import CPU_WHOLE, GPU_WHOLE, add_product

# (logits (n, V) of a chunk, slice of its rows) -> loss (), and outputs with a row per row.
LogitLosses = Callable[[Tensor, slice], tuple[Tensor, ...]]


class _LinearLoss(torch.autograd.Function):
    """The gradients are computed in the forward pass, as in `linear_token_loss`."""

    @staticmethod
    def forward(ctx, hidden, weight, losses, size):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.empty_like(weight, dtype=wide) if needs_weight else None
        parts = []
        for rows in _chunks(len(hidden), size):
            logits = hidden[rows] @ weight.T
            with torch.enable_grad():
                loss, *outputs = losses(logits.requires_grad_(), rows)
                (dlogits,) = torch.autograd.grad(loss, logits)
            parts.append((loss.detach(), *(x.detach() for x in outputs)))
            if needs_hidden:
                torch.mm(dlogits, weight, out=dhidden[rows])
            if needs_weight:
                add_product(dweight, dlogits.T, hidden[rows], first=rows.start == 0)
        ctx.gradients = dhidden, None if dweight is None else dweight.to(weight.dtype)
        results = _joined(parts)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx, dloss, *_):
        refuse_second("linear_loss")
        if ctx.gradients is None:
            raise RuntimeError("linear_loss: backward was called twice; call it once")
        # Once ctx holds no reference to the gradients, autograd may add to them in place.
        found, ctx.gradients = ctx.gradients, None
        if dloss != 1:
            found = [x if x is None else x.mul_(dloss) for x in found]
        return *found, None, None


def linear_loss(
    hidden: Tensor, weight: Tensor, losses: LogitLosses, *, chunk_rows: int | None = None
) -> tuple[Tensor, ...]:
    """A loss of the logits hidden @ weight.T, with its gradients from the same pass.

    Chunk by chunk, the forward computes logits, loss and gradients: three matrix products.

    Args:
        hidden: (N, D) float32, float64, bfloat16 or float16.
        weight: (V, D) of the output head, in hidden's dtype (any under autocast). Each of the two
            that requires a gradient gets one.
        losses: maps the logits (n, V) of a chunk, and the slice of its rows, to the chunk's part of
            the loss, a scalar, and any number of outputs with at least one dimension. A row's loss
            must depend on no other row.
        chunk_rows: maximum number of rows whose logits exist at a time; None: those of 128 MB
            in float32, on GPU 512 MB.

    Returns:
        The loss () with gradient, and the outputs of all chunks, concatenated and detached.

    Raises:
        ValueError or TypeError: with the offending value.
        RuntimeError: backward was called twice.
    """
    for name, x in (("hidden", hidden), ("weight", weight)):
        check_float(name, x)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"hidden must be (N, D) and weight (V, D), got {shapes}")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight is {weight.dtype}, but hidden {hidden.dtype}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")
    most = GPU_WHOLE if hidden.is_cuda else CPU_WHOLE
    size = chunk_rows or max(1, most // len(weight))
    if not torch.is_grad_enabled():
        return _joined([losses(hidden[x] @ weight.T, x) for x in _chunks(len(hidden), size)])
    trains = hidden.requires_grad or weight.requires_grad
    if trains and len(hidden) and not torch.compiler.is_compiling():
        return _LinearLoss.apply(hidden, weight, losses, size)
    loss, *outputs = losses(F.linear(hidden, weight), slice(0, len(hidden)))
    return loss, *(x.detach() for x in outputs)


def _chunks(count: int, size: int) -> list[slice]:
    """Slices of `size` rows; one, which is empty, of no rows."""
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    losses, *columns = zip(*parts)
    return sum(losses), *map(torch.cat, columns)
