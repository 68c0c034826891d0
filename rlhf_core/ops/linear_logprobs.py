"""Token log-probs from hidden states and the output head, without the full (N, V) logits.

    logits = hidden @ weight.T + bias                     # (..., V), only a few rows at a time
    logprobs, entropy = token_logprobs_and_entropy(logits, targets)

linear_logprobs_blocks.py holds the loops over rows and vocabulary. vocab_parallel.py holds what the
ranks of a group send each other if they share the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_core import compiled
from rlhf_core.checks import check_float, check_mask, resolve
from rlhf_core.ops import linear_logprobs_blocks as blocks
from rlhf_core.ops.derivatives import gradients, needs_reference, refuse_second
from rlhf_core.ops.linear_logprobs_blocks import TokenStatistics
from rlhf_core.ops.logprobs import (
    check_target_range,
    check_targets,
    check_temperature,
    token_logprobs_reference,
)
from rlhf_core.ops.vocab_parallel import Shard, agree

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# (statistics of a chunk's targets, slice of its groups, *extras) -> loss (), and outputs with a row
# per group or target.
Losses = Callable[..., tuple[Tensor, ...]]


def linear_token_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    shard: Shard | None = None,
) -> TokenStatistics:
    """The definition: torch operations on the full logits."""
    shard = shard or Shard.whole(weight)
    hidden = shard.share(hidden)
    if mask is not None:  # otherwise a masked NaN would reach the gradient of the weight
        hidden = hidden.masked_fill(~mask[..., None], 0)
    logits = shard.gather(torch.nn.functional.linear(hidden, weight, bias))
    own = logits.gather(-1, targets.clamp(0, shard.size - 1)[..., None])[..., 0]
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
        forward, ctx.launch, ctx.reference = launch
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
    def backward(ctx, dlogprobs, dentropy, _):
        dhidden, hidden, weight, bias, targets, mask, temperatures, entropy, lse = ctx.saved_tensors
        temperature = ctx.temperature if temperatures is None else temperatures
        rest = (None,) * 7
        if dhidden is None and needs_reference(dlogprobs, dentropy):
            grads = gradients(
                lambda *head: ctx.reference(*head, targets, mask, temperature),
                (hidden, weight, bias),
                ctx.needs_input_grad[1:4],
                (dlogprobs, dentropy, None),
            )
            return None, *grads, *rest
        refuse_second("linear_token_logprobs with a frozen head")
        if dhidden is not None:
            return None, (dhidden * dlogprobs[:, None]).to(dhidden.dtype), None, None, *rest
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(dentropy)
        found = ctx.launch(
            dlogprobs, dentropy, hidden, weight, bias, targets, mask, temperature, entropy, lse,
            ctx.chunk_rows, list(ctx.needs_input_grad[1:4]),
        )  # fmt: skip
        return None, *found, *rest


class _LinearTokenLoss(torch.autograd.Function):
    """A loss of log-probs whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx, impl, shard, hidden, weight, bias, targets, temperature, losses, sizes,
        with_likeliest, *extras,
    ):  # fmt: skip
        results, ctx.gradients = blocks.loss_and_gradients(
            impl, hidden, weight, bias, targets, temperature, losses, sizes, with_likeliest,
            ctx.needs_input_grad[2:5], extras, shard,
        )  # fmt: skip
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx, dloss, *_):
        refuse_second("linear_token_loss")
        if ctx.gradients is None:
            raise RuntimeError("linear_token_loss: backward was called twice; call it once")
        # Once ctx holds no reference to the gradients, autograd may add to them in place.
        found, ctx.gradients = ctx.gradients, None
        if dloss != 1:
            found = [x if x is None else x.mul_(dloss) for x in found]
        return None, None, *found[:3], *(None,) * 5, *found[3:]


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
    group: ProcessGroup | None = None,
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
            0, with backend triton only: none. A kernel keeps float32 logits on the chip, and the
            backward pass holds 16384 columns of their gradient for 8192 rows.
        backend: "reference", "cpp", "triton", or None for the best one on the device.
        group: a process group of torch.distributed that shares the head, or None. weight and bias
            are then this rank's rows: consecutive ones, in the order of the ranks, at least one. V
            counts the rows of all ranks. All ranks pass the same hidden, targets and mask, get the
            same result, and pass the same gradient to backward. hidden then gets the gradient of
            one such loss, added up over the ranks in float32, and weight that of its rows.

    Returns:
        (...) float32 (float64 for float64 hidden), <= 0. The logits are rounded to hidden's dtype,
        unless chunk_rows is 0. A gradient with create_graph=True comes from the reference, which
        holds all logits.

    Raises:
        ValueError or TypeError: with the offending value. For a counted target out of range see
            `token_logprobs`. With a group every rank raises if one does, or if their calls differ.
    """
    return _linear(
        hidden, weight, targets, bias, temperature, mask, chunk_rows, False, False, backend, group
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
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets, and entropy of the same distribution, both in nats.

    Arguments and errors are those of `linear_token_logprobs`.

    Returns:
        (logprobs, entropy), both (...), entropy >= 0.
    """
    return _linear(
        hidden, weight, targets, bias, temperature, mask, chunk_rows, True, False, backend, group
    )[:2]


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> TokenStatistics:
    """Log-probs, entropy, and whether each target is the most likely token.

    Arguments and errors are those of `linear_token_logprobs_and_entropy`. The mean of `likeliest`
    over counted tokens is the accuracy of greedy decoding. All tokens that tie for first place
    count as most likely. Under a False mask `likeliest` is False.
    """
    return _linear(
        hidden, weight, targets, bias, temperature, mask, chunk_rows, True, True, backend, group
    )


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    losses: Losses,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    sizes: Tensor | None = None,
    likeliest: bool = False,
    extras: tuple[Tensor, ...] = (),
    backend: str | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """A loss of the targets' log-probs and entropy, with its gradients from the same pass.

    Chunk by chunk, the forward computes logits, statistics, loss and gradients, which takes three
    matrix products. `linear_token_logprobs` and a loss of its result take four.

    Args:
        hidden, weight, targets, bias, temperature, backend, group: as for `linear_token_logprobs`,
            with hidden (N, D), targets (N,) and a temperature that broadcasts to (N,). With a group
            every rank calls `losses` and must compute the same.
        losses: maps the statistics (n,) of a chunk's targets, and the slice of groups that the
            chunk holds, to the chunk's part of the loss, a scalar, and any number of outputs with
            at least one dimension. The loss must depend on the model only through log-probs,
            entropy and extras, and a group's loss on no other group. A chunk has up to
            128 MB of float32 logits, or one group if that is larger.
        sizes: (G,) int64, the number of targets in each group, in order; None: groups of one.
        likeliest: whether the statistics tell which targets are the most likely tokens.
        extras: (N,) tensors whose rows `losses` gets as further arguments, with gradient.

    Returns:
        The loss () with gradient, and the outputs of all chunks, concatenated and detached.

    Raises:
        ValueError or TypeError: as for `linear_token_logprobs`.
        RuntimeError: backward was called twice.
    """
    if group is not None and torch.compiler.is_compiling():
        settings = dict(bias=bias, temperature=temperature, sizes=sizes, likeliest=likeliest)
        settings |= dict(extras=extras, backend=backend, group=group)
        return compiled.eagerly(linear_token_loss, hidden, weight, targets, losses, **settings)
    call = dict(op="linear_token_loss", likeliest=likeliest)
    if group is not None:
        call["sizes"] = None if sizes is None else sizes.tolist()
    impl, shard, (hidden, weight, bias, targets, _, T) = _inputs(
        hidden, weight, targets, bias, temperature, None, backend, group, call
    )
    if sizes is not None and sizes.sum() != len(targets):
        raise ValueError(
            f"sizes add up to {int(sizes.sum())}, but there are {len(targets)} targets"
        )
    trains = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    trains = trains and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if trains and impl is not None and len(targets):
        return _LinearTokenLoss.apply(
            impl, shard, hidden, weight, bias, targets, T, losses, sizes, likeliest, *extras
        )
    statistics = _statistics(
        impl, shard, hidden, weight, bias, targets, None, T, None, True, likeliest
    )
    loss, *outputs = losses(statistics, slice(None), *extras)
    return loss, *(x.detach() for x in outputs)


def _linear(
    hidden, weight, targets, bias, temperature, mask, chunk_rows, with_entropy, with_likeliest,
    backend, group,
):  # fmt: skip
    if group is not None and torch.compiler.is_compiling():
        return compiled.eagerly(
            _linear, hidden, weight, targets, bias, temperature, mask, chunk_rows, with_entropy,
            with_likeliest, backend, group,
        )  # fmt: skip
    call = dict(
        op="linear_token_logprobs", entropy=with_entropy, likeliest=with_likeliest,
        chunk_rows=chunk_rows,
    )  # fmt: skip
    impl, shard, inputs = _inputs(
        hidden, weight, targets, bias, temperature, mask, backend, group, call
    )
    statistics = _statistics(impl, shard, *inputs, chunk_rows, with_entropy, with_likeliest)
    return TokenStatistics(*(x if x is None else x.view(targets.shape) for x in statistics))


def _inputs(hidden, weight, targets, bias, temperature, mask, backend, group, call):
    """The backend, the rows of the head that are here, and the checked inputs.

    Args: call: options that must be equal on all ranks of a group.

    Returns: the inputs hidden, weight, bias, targets, mask, temperature have one row for each of
    the N targets.
    """
    check = partial(_checked, hidden, weight, targets, bias, temperature, mask, backend, call)
    if group is None:
        (impl, inputs), shard = check(), Shard.whole(weight)
    else:
        (impl, inputs), shard = agree(group, check, call)
    check_target_range(targets, shard.size, mask)
    return impl, shard, inputs


def _checked(hidden, weight, targets, bias, temperature, mask, backend, call):
    """The backend and the inputs, as `_inputs`; the targets may be out of range."""
    chunk_rows = call.get("chunk_rows")
    if chunk_rows is not None and chunk_rows < 0:
        raise ValueError(f"chunk_rows must be >= 0, got {chunk_rows}")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None or name != "bias":
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
    impl = resolve(backend, hidden, weight, bias, temperature)
    name = "reference" if impl is None else impl.__name__
    if chunk_rows == blocks.ON_CHIP and name != "rlhf_core.kernels":
        raise ValueError(
            "chunk_rows=0 keeps the logits on the chip, which only backend 'triton' does, but "
            f"these tensors use {name}: use None or a number >= 1"
        )
    temperature = check_temperature(temperature, logits, impl)
    if mask is not None:
        check_mask(targets, mask)
    targets = targets.long()
    rows = [None if x is None else x.reshape(-1) for x in (targets, mask)]
    T = temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature
    return impl, (hidden.reshape(targets.numel(), hidden.shape[-1]), weight, bias, *rows, T)


def _statistics(
    impl, shard, hidden, weight, bias, targets, mask, temperature, chunk_rows, with_entropy,
    with_likeliest,
):  # fmt: skip
    """TokenStatistics (N,) of flat inputs."""
    if impl is None:
        return linear_token_logprobs_reference(
            hidden, weight, bias, targets, mask, temperature, shard
        )
    if chunk_rows is None:
        chunk_rows = blocks.GPU_CHUNK_ROWS if hidden.is_cuda else blocks.CPU_CHUNK_ROWS
    if torch.compiler.is_compiling():
        launch = impl.linear_token_logprobs_fwd, impl.linear_token_logprobs_bwd
        reference = linear_token_logprobs_reference
    else:
        launch = (
            partial(blocks.forward, impl, shard=shard),
            partial(blocks.backward, impl, shard=shard),
        )
        reference = partial(linear_token_logprobs_reference, shard=shard)
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen_head = torch.is_grad_enabled() and hidden.requires_grad and not head_trains
    # Ranks with unequal parts of the head would cut other chunks. The chip never holds a whole row.
    with_dhidden = hidden.is_cuda and frozen_head and not with_entropy and shard.group is None
    with_dhidden = with_dhidden and chunk_rows != blocks.ON_CHIP
    logprobs, entropy, likeliest = _LinearTokenLogprobs.apply(
        (*launch, reference), hidden, weight, bias, targets, mask, temperature, chunk_rows,
        with_entropy, with_likeliest, with_dhidden,
    )  # fmt: skip
    return TokenStatistics(logprobs, entropy, None if likeliest is None else likeliest.bool())
