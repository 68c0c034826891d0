"""Token log-probs from hidden states and the output head, without the full (N, V) logits.

    logits = hidden @ weight.T + bias                     # (..., V), only a few rows at a time
    logprobs, entropy = token_logprobs_and_entropy(logits, targets)

linear_logprobs_blocks.py holds the loops over rows and vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core import backends, compiled
from rlhf_core.checks import check_float, check_mask
from rlhf_core.ops import linear_logprobs_blocks as blocks
from rlhf_core.ops.logprobs import (
    check_target_range,
    check_targets,
    check_temperature,
    token_logprobs_reference,
)


class TokenStatistics(NamedTuple):
    """Statistics of the model's distribution at each target token, all of shape (...)."""

    logprobs: Tensor  # nats
    entropy: Tensor  # nats
    likeliest: Tensor  # bool: no token is more likely than the target


def linear_token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
) -> TokenStatistics:
    """The definition: torch operations on the full logits."""
    if mask is not None:  # otherwise a masked NaN would reach the gradient of the weight
        hidden = hidden.masked_fill(~mask[..., None], 0)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    own = logits.gather(-1, targets.clamp(0, len(weight) - 1)[..., None])[..., 0]
    likeliest = (own == logits.amax(dim=-1)) & (
        torch.ones_like(own, dtype=torch.bool) if mask is None else mask
    )
    return TokenStatistics(*token_logprobs_reference(logits, targets, temperature, mask), likeliest)


compiled.operator(
    "linear_token_logprobs_fwd",
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, "
    f"{compiled.TEMPERATURE}, int chunk_rows, bool with_entropy, bool with_likeliest, "
    "bool with_dhidden",
    lambda hidden, weight, bias, targets, mask, temperature, rows, entropy, likeliest, dhidden: (
        hidden.new_empty(targets.shape, dtype=torch.float32),
        hidden.new_empty(targets.shape, dtype=torch.float32) if entropy else None,
        hidden.new_empty(targets.shape, dtype=torch.uint8) if likeliest else None,
        hidden.new_empty((*targets.shape, 2), dtype=torch.float32),
        torch.empty_like(hidden) if dhidden else None,
    ),
    blocks.forward,
)
compiled.operator(
    "linear_token_logprobs_bwd",
    "Tensor dlogprobs, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor? bias, "
    f"Tensor targets, Tensor? mask, {compiled.TEMPERATURE}, Tensor? entropy, Tensor lse, "
    "int chunk_rows, bool[] needs",
    lambda dlogprobs, dentropy, hidden, weight, bias, *rest: tuple(
        torch.empty_like(x) if needed else None
        for x, needed in zip((hidden, weight, bias), rest[-1])
    ),
    blocks.backward,
)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launch, hidden, weight, bias, targets, mask, temperature, chunk_rows, *flags):
        forward, ctx.launch = launch
        logprobs, entropy, likeliest, lse, dhidden = forward(
            hidden, weight, bias, targets, mask, temperature, chunk_rows, *flags
        )
        with_dhidden = dhidden is not None
        temperatures = temperature if isinstance(temperature, Tensor) else None
        again = (hidden, weight, bias, targets, mask, temperatures, entropy, lse)
        ctx.save_for_backward(dhidden, *(None if with_dhidden else x for x in again))
        ctx.set_materialize_grads(False)
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.chunk_rows = chunk_rows
        if likeliest is not None:
            ctx.mark_non_differentiable(likeliest)
        return logprobs, entropy, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropy, _):
        dhidden, hidden, weight, bias, targets, mask, temperatures, entropy, lse = ctx.saved_tensors
        rest = (None,) * 7
        if dhidden is not None:
            return None, (dhidden * dlogprobs[:, None]).to(dhidden.dtype), None, None, *rest
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(dentropy)
        temperature = ctx.temperature if temperatures is None else temperatures
        gradients = ctx.launch(
            dlogprobs, dentropy, hidden, weight, bias, targets, mask, temperature, entropy, lse,
            ctx.chunk_rows, list(ctx.needs_input_grad[1:4]),
        )  # fmt: skip
        return None, *gradients, *rest


class _LinearTokenLoss(torch.autograd.Function):
    """`_LinearTokenLogprobs` that computes the gradients of a known loss in the forward pass."""

    @staticmethod
    def forward(
        ctx, impl, hidden, weight, bias, targets, mask, temperature, chunk_rows, loss_of, sizes,
        *flags,
    ):  # fmt: skip
        logprobs, entropy, likeliest, lse, expected, ctx.gradients = blocks.forward_and_gradients(
            impl, hidden, weight, bias, targets, mask, temperature, loss_of, sizes, *flags,
            ctx.needs_input_grad[1:4],
        )  # fmt: skip
        temperatures = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(
            hidden, weight, bias, targets, mask, temperatures, entropy, lse, expected
        )
        ctx.set_materialize_grads(False)
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.impl, ctx.chunk_rows = impl, chunk_rows
        if likeliest is not None:
            ctx.mark_non_differentiable(likeliest)
        return logprobs, entropy, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropy, _):
        hidden, weight, bias, targets, mask, temperatures, entropy, lse, expected = (
            ctx.saved_tensors
        )
        # Once ctx holds no reference to the gradients, autograd may add to them in place.
        gradients, ctx.gradients = ctx.gradients, None
        as_expected = dentropy is None and torch.allclose(dlogprobs, expected, rtol=1e-6, atol=0)
        if gradients is None or not as_expected:
            temperature = ctx.temperature if temperatures is None else temperatures
            dlogprobs = torch.zeros_like(lse[:, 0]) if dlogprobs is None else dlogprobs
            gradients = blocks.backward(
                ctx.impl, dlogprobs, dentropy, hidden, weight, bias, targets, mask, temperature,
                entropy, lse, ctx.chunk_rows, ctx.needs_input_grad[1:4],
            )  # fmt: skip
        return None, *gradients, *(None,) * 8


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-prob in nats of each target under softmax((hidden @ weight.T + bias) / temperature).

    Extra memory is the logits of chunk_rows rows over one block of the vocabulary (2048 tokens, on
    GPU 16384), so at most chunk_rows * V. A 16-bit weight trained in several chunks also needs its
    gradient in float32. Only rows under a True mask are computed; on CUDA the forward and the
    backward pass each wait for the device to count them.

    Args:
        hidden: (..., D) float32, bfloat16 or float16; float64 goes through the reference, which
            holds all logits.
        weight, bias: (V, D) and (V,) of the output head, in hidden's dtype (any under autocast).
            Each of hidden, weight and bias that requires a gradient gets one.
        targets: (...) integer ids in [0, V); positions under a False mask may hold anything.
        temperature: > 0; a number or a tensor that broadcasts to (...) and gets no gradient.
        mask: (...) bool, True where a position counts; None counts all. Elsewhere the result and
            the gradient are exactly 0.
        chunk_rows: maximum number of rows whose logits exist at a time; None: 1024, on GPU 8192.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (...) float32 (float64 for float64 hidden), <= 0. The logits are rounded to hidden's dtype.

    Raises:
        ValueError or TypeError: with the offending value. For a counted target out of range see
            `token_logprobs`.
    """
    return _linear(
        hidden, weight, targets, bias, temperature, mask, chunk_rows, False, False, backend
    )[0]


def linear_token_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    loss_of: Callable[[Tensor, slice], Tensor] | None = None,
    sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets, and entropy of the same distribution, both in nats.

    Other arguments and all errors are those of `linear_token_logprobs`.

    Args:
        loss_of: function from the log-probs (n,) of some counted rows, and the slice of counted
            rows that they are, to the part of the loss that they contribute. Use it if a row's
            loss depends only on rows of its own group. The forward pass then also computes the
            gradients, which saves a quarter of the arithmetic. If backward receives another
            gradient, it starts from scratch: a wrong loss_of costs time, not correctness. Some
            rows' logits exist over the whole vocabulary: 30 MB, or one group if that is larger.
            On CUDA the forward and the backward pass each wait for the device once more.
        sizes: (G,) int64, number of counted rows in each group, in order. loss_of then gets whole
            groups and a slice of the groups. None: every row is a group.

    Returns:
        (logprobs, entropy), both (...), entropy >= 0.
    """
    return _linear(
        hidden, weight, targets, bias, temperature, mask, chunk_rows, True, False, backend,
        loss_of, sizes,
    )[:2]  # fmt: skip


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    loss_of: Callable[[Tensor, slice], Tensor] | None = None,
    sizes: Tensor | None = None,
    backend: str | None = None,
) -> TokenStatistics:
    """Log-probs, entropy, and whether each target is the most likely token.

    Arguments and errors are those of `linear_token_logprobs_and_entropy`. The mean of `likeliest`
    over counted tokens is the accuracy of greedy decoding. All tokens that tie for first place
    count as most likely. Under a False mask `likeliest` is False.
    """
    return _linear(
        hidden, weight, targets, bias, temperature, mask, chunk_rows, True, True, backend,
        loss_of, sizes,
    )  # fmt: skip


def _linear(
    hidden, weight, targets, bias, temperature, mask, chunk_rows, with_entropy, with_likeliest,
    backend, loss_of=None, sizes=None,
):  # fmt: skip
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            check_float(name, x)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}, but hidden {hidden.dtype} on {hidden.device}"
            )
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "hidden must be (..., D) and weight (V, D), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    # A tensor of the logits' shape for the checks, without their memory.
    logits = hidden.new_empty(()).expand(*hidden.shape[:-1], len(weight))
    check_targets(targets, logits)
    temperature = check_temperature(temperature, logits)
    if mask is not None:
        check_mask(targets, mask)
    if sizes is not None and sizes.sum() != (targets.numel() if mask is None else mask.sum()):
        raise ValueError(f"sizes add up to {int(sizes.sum())}, not to the number of counted rows")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be >= 1, got {chunk_rows}")
    impl = backends.resolve(backend, hidden)
    check_target_range(targets, len(weight), mask)
    targets = targets.long()
    if impl is None:
        return linear_token_logprobs_reference(hidden, weight, bias, targets, mask, temperature)

    if chunk_rows is None:
        chunk_rows = blocks.GPU_CHUNK_ROWS if hidden.is_cuda else blocks.CPU_CHUNK_ROWS
    launch = (partial(blocks.forward, impl), partial(blocks.backward, impl))
    if torch.compiler.is_compiling():
        launch = (impl.linear_token_logprobs_fwd, impl.linear_token_logprobs_bwd)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen_head = torch.is_grad_enabled() and hidden.requires_grad and not head_trains
    with_dhidden = hidden.is_cuda and frozen_head and not with_entropy
    rows = [None if x is None else x.reshape(-1) for x in (targets, mask)]
    T = temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature
    inputs = (hidden.reshape(targets.numel(), hidden.shape[-1]), weight, bias, *rows, T, chunk_rows)
    trains = torch.is_grad_enabled() and (hidden.requires_grad or head_trains)
    if loss_of is not None and trains and not torch.compiler.is_compiling():
        results = _LinearTokenLoss.apply(
            impl, *inputs, loss_of, sizes, with_entropy, with_likeliest
        )
    else:
        results = _LinearTokenLogprobs.apply(
            launch, *inputs, with_entropy, with_likeliest, with_dhidden
        )
    logprobs, entropy, likeliest = (None if x is None else x.view(targets.shape) for x in results)
    return TokenStatistics(logprobs, entropy, None if likeliest is None else likeliest.bool())
