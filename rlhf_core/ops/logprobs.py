"""Per-token log-probs of given targets, optionally with the entropy of their distribution.

    log_p = log_softmax(logits / temperature)    # (..., V), never stored by the fused backends
    logprobs = log_p.gather(-1, targets)         # (...)
    entropy = -sum(exp(log_p) * log_p)           # (...)

Backward (g, h are the gradients of logprobs and entropy, H the entropy, y the target):

    dlogits_j = (g * ([j == y] - p_j) - h * p_j * (log p_j + H)) / temperature

Nothing is shifted here: logits[..., t, :] belongs to targets[..., t].
"""

import math
from numbers import Real
from types import ModuleType

import torch
from torch import Tensor

from rlhf_core.checks import check_float, check_mask, describe, resolve, values_may_be_read
from rlhf_core.ops.derivatives import gradients, needs_reference


def token_logprobs_reference(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: (logprobs, entropy), float64 for float64 logits, else float32."""
    log_p = log_softmax_reference(logits, temperature, mask)  # (..., V)
    in_range = (targets >= 0) & (targets < logits.shape[-1])
    logprobs = log_p.gather(-1, targets.where(in_range, 0)[..., None])[..., 0]
    logprobs = logprobs.where(in_range, math.nan)
    impossible = log_p == -math.inf  # p log p is 0 there, not 0 * inf
    entropy = -(log_p.exp() * log_p.masked_fill(impossible, 0)).sum(dim=-1)
    if mask is not None:
        logprobs, entropy = logprobs.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)
    return logprobs, entropy


def log_softmax_reference(
    logits: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> Tensor:
    """log_softmax(logits / temperature); the logits of masked rows count as 0."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        z = z.masked_fill(~mask[..., None], 0)
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None].to(z.dtype)
    # Subtract the max first, so that an offset of 1e4 costs no digits.
    z = (z - z.detach().amax(dim=-1, keepdim=True)) / temperature
    return torch.log_softmax(z, dim=-1)


_INTEGERS = (torch.int64, torch.int32)


class _TokenLogprobs(torch.autograd.Function):
    """The fused form: forward reads (..., V) once, backward reads and writes it once."""

    @staticmethod
    def forward(ctx, impl, logits, targets, mask, temperature, with_entropy, inplace_backward):
        logprobs, entropy, lse = _launch(
            impl, logits, targets, mask, temperature, with_entropy, True
        )
        temperatures = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(logits, targets, mask, temperatures, entropy, lse)
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.inplace, ctx.overwritten = impl, inplace_backward, False
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs, dentropy):
        if ctx.overwritten:
            raise RuntimeError(
                "a second backward needs the logits, but the first one overwrote them: "
                "use inplace_backward=False"
            )
        logits, targets, mask, temperatures, entropy, lse = ctx.saved_tensors
        if needs_reference(dlogprobs, dentropy):
            temperature = ctx.temperature if temperatures is None else temperatures
            (dlogits,) = gradients(
                lambda z: token_logprobs_reference(z, targets, temperature, mask),
                (logits,),
                (True,),
                (dlogprobs, dentropy),
            )
            return None, dlogits, None, None, None, None, None
        rows = as_rows(logits, 3)
        if dlogprobs is None:
            dlogprobs = lse.new_zeros(()).expand(targets.shape)
        # Writing over the logits requires that rows do not overlap and are not a copy.
        inplace = ctx.inplace and rows.data_ptr() == logits.data_ptr() and not _overlaps(logits)
        dlogits = ctx.impl.token_logprobs_bwd(
            as_rows(dlogprobs, 2),
            as_rows(dentropy, 2),
            rows,
            as_rows(targets, 2),
            as_rows(mask, 2),
            ctx.temperature if temperatures is None else as_rows(temperatures, 2),
            entropy,
            lse,
            inplace,
        )
        if inplace:
            ctx.overwritten = True
            if logits._base is None:  # other ops that saved the logits must notice
                torch.autograd.graph.increment_version(logits)
        return None, dlogits.view(logits.shape), None, None, None, None, None


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-prob in nats of each target under softmax(logits / temperature).

    Args:
        logits: (..., V) float32, bfloat16 or float16; float64 uses the reference. Strided views
            need no copy.
        targets: (...) integer ids in [0, V); positions under a False mask may hold anything.
        temperature: > 0, that of the distribution sampled from; a number or a tensor that
            broadcasts to (...) and gets no gradient.
        mask: (...) bool, True where a position counts; None counts all. Elsewhere the result and
            the gradient are exactly 0.
        inplace_backward: if True, backward overwrites `logits` with the gradient, which saves a
            (..., V) buffer. Nothing else may use the logits afterwards. The reference backend and
            torch.compile ignore it.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (...) float32 (float64 for float64 logits), <= 0.

    Raises:
        ValueError or TypeError: with the offending value. On CUDA a counted target outside [0, V)
            gives NaN, because a check would synchronise. RLHF_CORE_DEBUG=1 makes it raise.
    """
    return _token_logprobs(logits, targets, temperature, mask, False, inplace_backward, backend)[0]


def token_logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropy of softmax(logits / temperature), both in nats.

    Both come from one read of the logits. Arguments and errors are those of `token_logprobs`.

    Returns:
        (logprobs, entropy), both (...), entropy >= 0.
    """
    return _token_logprobs(logits, targets, temperature, mask, True, inplace_backward, backend)


def _token_logprobs(logits, targets, temperature, mask, with_entropy, inplace_backward, backend):
    check_float("logits", logits)
    check_targets(targets, logits)
    impl = resolve(backend, logits, temperature)
    temperature = check_temperature(temperature, logits, impl)
    if mask is not None:
        check_mask(targets, mask)
    if not checks_values(impl):
        check_target_range(targets, logits.shape[-1], mask)
    if targets.dtype != torch.int64:
        targets = targets.long()
    if impl is None:
        return token_logprobs_reference(logits, targets, temperature, mask)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    # Without a gradient skip autograd, which costs more than a small op itself.
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return _launch(impl, logits, targets, mask, temperature, with_entropy, False)[:2]
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    return _TokenLogprobs.apply(
        impl, logits, targets, mask, temperature, with_entropy, inplace_backward
    )


def _launch(impl, logits, targets, mask, temperature, with_entropy, with_lse):
    """logprobs (...), entropy (...) or None, lse or None."""
    if logits.ndim == 3:
        return impl.token_logprobs_fwd(logits, targets, mask, temperature, with_entropy, with_lse)
    rows = (as_rows(logits, 3), as_rows(targets, 2), as_rows(mask, 2), as_rows(temperature, 2))
    logprobs, entropy, lse = impl.token_logprobs_fwd(*rows, with_entropy, with_lse)
    entropy = None if entropy is None else entropy.view(targets.shape)
    return logprobs.view(targets.shape), entropy, lse


def as_rows(x: Tensor | float | None, ndim: int) -> Tensor | float | None:
    """x with exactly ndim axes: leading axes are added or merged (copied only if strides force it).

    Values other than tensors are returned unchanged.
    """
    if not isinstance(x, Tensor) or x.ndim == ndim:
        return x
    return x.flatten(0, x.ndim - ndim) if x.ndim > ndim else x[(None,) * (ndim - x.ndim)]


def _overlaps(x: Tensor) -> bool:
    """Whether x may hold one element of memory twice."""
    end = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride < end:
            return True
        end += stride * (size - 1)
    return False


def checks_values(impl: ModuleType | type | None) -> bool:
    """Whether a backend itself raises on targets and temperatures out of range, as cpp does."""
    return impl is not None and impl.__name__ == "rlhf_core.cpp"


def check_targets(targets: Tensor, logits: Tensor) -> None:
    """Raise unless targets are integers of shape (...), for logits of shape (..., V)."""
    if not isinstance(targets, Tensor) or targets.dtype not in _INTEGERS:
        raise TypeError(f"targets must be int64 or int32, got {describe(targets)}")
    shape = logits.shape
    if not shape or shape[-1] == 0 or shape[:-1] != targets.shape:
        raise ValueError(
            "logits must be (..., V) and targets (...), got "
            f"{tuple(shape)} and {tuple(targets.shape)}"
        )
    # Test is_cpu first: reading .device is slow.
    if not (targets.is_cpu and logits.is_cpu) and targets.device != logits.device:
        raise ValueError(f"targets are on {targets.device}, logits on {logits.device}")


def check_temperature(
    temperature: float | Tensor, logits: Tensor, impl: ModuleType | type | None
) -> float | Tensor:
    """The temperature as a float, or as a tensor expanded to the rows of logits (..., V).

    Where its values may not be read, and impl does not check them, bad ones become NaN.
    """
    # Test float first, because isinstance is slow for Tensor and for Real.
    if isinstance(temperature, float) or not isinstance(temperature, Tensor):
        if not isinstance(temperature, (float, Real)):
            raise TypeError(
                f"temperature must be a number or a float tensor, got {type(temperature).__name__}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be finite and > 0, got {temperature}")
        return float(temperature)
    check_float("temperature", temperature)
    if temperature.requires_grad:
        raise ValueError("temperature gets no gradient: detach it")
    if temperature.device != logits.device:
        raise ValueError(f"temperature is on {temperature.device}, logits on {logits.device}")
    readable = values_may_be_read(temperature)
    if readable or not checks_values(impl):
        good = (temperature > 0) & (temperature < math.inf)
        if not readable:
            temperature = temperature.where(good, math.nan)
        elif not good.all():
            raise ValueError(
                f"temperature must be finite and > 0, got {temperature[~good][0].item()}"
            )
    try:
        temperature = temperature.expand(logits.shape[:-1])
    except RuntimeError:
        shapes = f"{tuple(temperature.shape)} does not broadcast to {tuple(logits.shape[:-1])}"
        raise ValueError(f"temperature of shape {shapes}") from None
    return temperature.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


def check_target_range(targets: Tensor, vocab_size: int, mask: Tensor | None) -> None:
    """Raise ValueError for a counted target outside [0, vocab_size), unless that synchronises."""
    if not values_may_be_read(targets):
        return
    bad = (targets < 0) | (targets >= vocab_size)
    if mask is not None:
        bad &= mask
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"target {targets[position].item()} at {position} is outside [0, {vocab_size}); "
            "for positions without a target pass mask=targets != IGNORE_INDEX"
        )
