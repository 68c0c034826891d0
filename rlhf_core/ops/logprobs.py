"""Per-token log-probs of given targets, with the entropy of their distribution where asked.

    log_p = log_softmax(logits / temperature)        # (..., V), which the fused backends never store
    logprobs = log_p.gather(-1, targets)             # (...)
    entropy = -sum(exp(log_p) * log_p)               # (...)

Backward (g, h are the gradients of logprobs and entropy, H the entropy, y the target):

    dlogits_j = (g * ([j == y] - p_j) - h * p_j * (log p_j + H)) / temperature

Nothing here shifts: logits[..., t, :] and targets[..., t] belong together.
"""

import math
from numbers import Real

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core import backends
from rlhf_core.checks import check_float, check_mask, describe


def token_logprobs_reference(
    logits: Tensor, targets: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: (logprobs, entropy), float64 for float64 logits, else float32."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    z = z.masked_fill(~counted[..., None], 0)
    z = (z - z.detach().amax(dim=-1, keepdim=True)) / temperature  # max first: an offset of 1e4 costs no digits
    log_p = torch.log_softmax(z, dim=-1)  # (..., V)

    in_range = (targets >= 0) & (targets < logits.shape[-1])
    logprobs = log_p.gather(-1, targets.where(in_range, 0)[..., None])[..., 0]
    logprobs = logprobs.where(in_range, math.nan)
    impossible = log_p == -math.inf  # p log p is 0 there, not 0 * inf
    entropy = -(log_p.exp() * log_p.masked_fill(impossible, 0)).sum(dim=-1)
    return logprobs.masked_fill(~counted, 0), entropy.masked_fill(~counted, 0)


class _TokenLogprobs(torch.autograd.Function):
    """The fused form: (..., V) is read once forward, read and written once backward."""

    @staticmethod
    def forward(ctx, impl, logits, targets, mask, temperature, with_entropy, inplace_backward):
        rows = None if mask is None else _as_rows(mask, 2)
        logprobs, entropy, lse = impl.token_logprobs_fwd(
            _as_rows(logits, 3), _as_rows(targets, 2), rows, temperature, with_entropy
        )
        ctx.save_for_backward(logits, targets, mask, entropy, lse)
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.temperature, ctx.inplace = impl, temperature, inplace_backward
        return logprobs.view(targets.shape), None if entropy is None else entropy.view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropy):
        logits, targets, mask, entropy, lse = ctx.saved_tensors
        rows = _as_rows(logits, 3)
        if dlogprobs is None:
            dlogprobs = lse.new_zeros(()).expand(targets.shape)
        # Writing over the logits needs them to own their memory row by row, not an expanded or copied view.
        inplace = ctx.inplace and 0 not in logits.stride() and rows.data_ptr() == logits.data_ptr()
        dlogits = logits.detach() if inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.impl.token_logprobs_bwd(
            _as_rows(dlogprobs, 2),
            None if dentropy is None else _as_rows(dentropy, 2),
            rows,
            _as_rows(targets, 2),
            None if mask is None else _as_rows(mask, 2),
            ctx.temperature,
            entropy,
            lse,
            _as_rows(dlogits, 3),
        )
        return None, dlogits, None, None, None, None, None


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-prob in nats of each target under softmax(logits / temperature).

    Args:
        logits: (..., V) float32, bfloat16, float16 (float64 through the reference); strided views cost no copy.
        targets: (...) integer ids in [0, V); positions under a False mask may hold anything.
        temperature: > 0, that of the distribution sampled from.
        mask: (...) bool, True where a position counts; None counts all. Elsewhere result and gradient are exactly 0.
        inplace_backward: let backward write the gradient over `logits`, which saves a (..., V) buffer; nothing else
            may need the logits afterwards. The reference backend has no such buffer to save and ignores it.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (...) float32 (float64 for float64 logits), <= 0.

    Raises:
        ValueError or TypeError with the offending values. On CUDA a counted target outside [0, V) gives NaN, since
        looking at it would synchronise; RLHF_CORE_DEBUG=1 makes it raise.
    """
    return _token_logprobs(logits, targets, temperature, mask, False, inplace_backward, backend)[0]


def token_logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and, from the same read of the logits, the entropy in nats of softmax(logits / temperature).

    Arguments and errors are those of `token_logprobs`. Returns (logprobs, entropy), both (...), entropy >= 0.
    """
    return _token_logprobs(logits, targets, temperature, mask, True, inplace_backward, backend)


def _token_logprobs(logits, targets, temperature, mask, with_entropy, inplace_backward, backend):
    _check(logits, targets, temperature, mask)
    impl = backends.resolve(backend, logits)
    if (impl is None or impl.__name__ != "rlhf_core.cpp") and (logits.device.type == "cpu" or backends.debug()):
        _check_target_range(targets, logits.shape[-1], mask)  # the C++ kernel looks while it reads them
    if targets.dtype != torch.int64:
        targets = targets.long()
    if impl is None:
        return token_logprobs_reference(logits, targets, temperature, mask)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return _TokenLogprobs.apply(impl, logits, targets, mask, float(temperature), with_entropy, inplace_backward)


def _as_rows(x: Tensor, ndim: int) -> Tensor:
    """x with exactly ndim axes: leading ones added, or the leading ones merged (a copy only where strides force it)."""
    while x.ndim < ndim:
        x = x[None]
    return x if x.ndim == ndim else x.flatten(0, x.ndim - ndim)


def _check(logits: Tensor, targets: Tensor, temperature: float, mask: Tensor | None) -> None:
    check_float("logits", logits)
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {describe(targets)}")
    if logits.ndim == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits (..., V) and targets (...) do not fit: {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets are on {targets.device}, logits on {logits.device}")
    if not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if mask is not None:
        check_mask(targets, mask)


def _check_target_range(targets: Tensor, vocab_size: int, mask: Tensor | None) -> None:
    bad = (targets < 0) | (targets >= vocab_size)
    if mask is not None:
        bad &= mask
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"target {targets[position].item()} at {position} is outside [0, {vocab_size}); "
            "positions without a target need mask=targets != IGNORE_INDEX"
        )
