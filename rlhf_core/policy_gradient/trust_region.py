"""Steps within a trust region (Schulman et al. 2015, appendix C): the natural gradient F^-1 g by
conjugate gradients, and a line search.

F is the Fisher matrix of the policy, a mean over response tokens. With J the Jacobian of a token's
logits and p their softmax at the temperature T,

    F = E[ J^T (diag(p) - p p^T) J ] / T^2

It is the Hessian, at the old weights, of the KL of the old policy to the new one. A product with F
takes one forward pass in forward mode, for J v, and one backward pass. So nothing is differentiated
twice, which fused attention and activation checkpointing could not do. Left out: Kronecker factors.

A vector (n,) has the values of all weights that train; of a sharded model, those of this rank's
pieces. `dot_of` adds up the ranks' parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_core import distributed
from rlhf_core.checks import at_least_float32
from rlhf_core.data.batches import micro_batches
from rlhf_core.models import Transformer
from rlhf_core.models.gather import (
    is_piece,
    is_sharded,
    local,
    mesh_of_pieces,
    piece_of,
    reshard,
    whole_tensor,
    wrapped_parts,
)
from rlhf_core.models.transformer import LOGITS_AT_ONCE, in_chunks
from rlhf_core.ops import full_kl
from rlhf_core.rollout import Rollout, response_hidden, response_logprobs
from rlhf_core.training.metrics import Metrics

Weights = dict[str, Tensor]


class Outcome(NamedTuple):
    """What a step does."""

    kl: float  # mean per token of the old policy to the new one, nats
    gain: float  # of the surrogate
    metrics: Metrics


class _Holder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *arguments: Any) -> Any:
        return function(self.model, *arguments)


def call_with(
    model: nn.Module,
    weights: dict[str, Callable[[], Tensor]],
    function: Callable,
    *arguments: Any,
) -> Any:
    """function(model, *arguments), with other values for the named weights of the model.

    weights: Functions that make the whole value of a weight. A sharded model holds those of one
        block at a time.
    """
    if is_sharded(model):
        with _replaced(model, weights):
            return function(model, *arguments)
    named = {f"model.{name}": value() for name, value in weights.items()}
    return torch.func.functional_call(_Holder(model), named, (function, *arguments))


@contextlib.contextmanager
def _replaced(model: nn.Module, weights: dict[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Other weights for the forward passes of a sharded model, which must not need a gradient.

    FSDP2 puts the weights of a block into their place before its forward pass, and takes them away
    afterwards. Those outside the blocks stay in their place for the whole `with` block.
    """

    def place(values: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
        before = {}
        for name, value in values.items():
            path, _, own = name.rpartition(".")
            parameters = model.get_submodule(path)._parameters
            before[name] = partial(lambda x: x, parameters[own])
            parameters[own] = value()
        return before

    outside, hooks, wrapped = dict(weights), [], {*wrapped_parts(model)} - {model}
    for prefix, block in model.named_modules():
        if block in wrapped:
            names = [name for name in outside if name.startswith(f"{prefix}.")]
            own = {name: outside.pop(name) for name in names}
            hooks.append(block.register_forward_pre_hook(lambda *_, own=own: place(own) and None))
    model.unshard()
    before = place(outside)
    try:
        yield
    finally:
        place(before)
        for hook in hooks:
            hook.remove()


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name; of a sharded model this rank's pieces."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all values."""
    return torch.cat([local(x).reshape(-1) for x in tensors])


def unflat(vector: Tensor, like: Weights) -> Weights:
    """Parts of a vector with the names, shapes and dtypes of `like`."""
    parts, found = vector.split([local(x).numel() for x in like.values()]), {}
    for v, (name, x) in zip(parts, like.items()):
        v = v.view_as(local(x)).to(x.dtype)
        found[name] = piece_of(v, x.shape, x.device_mesh) if is_piece(x) else v
    return found


def dot_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The inner product of two vectors."""
    mesh = mesh_of_pieces(model)
    if mesh is None:
        return torch.dot

    def dot(a: Tensor, b: Tensor) -> Tensor:
        total = torch.dot(a, b)
        dist.all_reduce(total, group=mesh.get_group("shard"))
        return total

    return dot


def take_gradient(model: nn.Module) -> Tensor:
    """The gradient that backward passes of all ranks have left, as a vector; clears it."""
    parameters = trained_weights(model).values()
    if not is_sharded(model):
        distributed.add_gradients(list(parameters))
    vector = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    for p in parameters:
        p.grad = None
    return vector


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int,
    tolerance: float = 1e-5,
    dot: Callable[[Tensor, Tensor], Tensor] = torch.dot,
) -> tuple[Tensor, Tensor]:
    """Solve A x = b for a symmetric, positive definite A (Hestenes & Stiefel 1952).

    Args:
        product: maps v to A v.
        b: (n,).
        iterations: at most; each takes one product.
        tolerance: stop when |b - A x| is at most this share of |b|.
        dot: as `dot_of` gives it.

    Returns:
        x and A x, each (n,).
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    norm = dot(b, b)
    enough = tolerance**2 * norm
    for _ in range(iterations):
        if norm <= enough:
            break
        curved = product(direction)
        length = norm / dot(direction, curved)
        x += length * direction
        residual -= length * curved
        norm, before = dot(residual, residual), norm
        direction = residual + norm / before * direction
    return x, b - residual


def natural_step(
    product: Callable[[Tensor], Tensor],
    uphill: Tensor,
    *,
    max_kl: float,
    damping: float,
    iterations: int,
    dot: Callable[[Tensor, Tensor], Tensor] = torch.dot,
) -> Tensor:
    """The step s along (F + damping)^-1 g with s (F + damping) s / 2 = max_kl; 0 if g is 0.

    Args:
        product: maps v to F v.
        uphill: (n,), the gradient g of the function to raise.
        iterations, dot: of `conjugate_gradients`.
    """
    damped = lambda v: product(v) + damping * v  # noqa: E731
    direction, curved = conjugate_gradients(damped, uphill, iterations, dot=dot)
    curvature = dot(direction, curved)
    return direction * (2 * max_kl / curvature.where(curvature > 0, torch.inf)).sqrt()


def line_search(
    model: nn.Module,
    step: Tensor,
    measure: Callable[[Weights], Outcome],
    *,
    max_kl: float,
    tries: int,
    backtrack: float,
) -> tuple[float, Outcome | None]:
    """Move the weights that train by the longest part of the step that is good enough.

    Args:
        step: (n,), tried at the lengths 1, backtrack, backtrack^2, ... It is good enough if the KL
            is at most max_kl and the gain positive.
        measure: what the move from the given weights to the model's has done.

    Returns:
        The part of the step, and its outcome; 0 and None if no part will do. The weights are then
        what they were.
    """
    start = {name: p.detach().clone() for name, p in trained_weights(model).items()}
    for part in (backtrack**i for i in range(tries)):
        _move(model, start, part * step)
        outcome = measure(start)
        if outcome.kl <= max_kl and outcome.gain > 0:
            return part, outcome
    _move(model, start)
    return 0.0, None


@torch.no_grad()
def _move(model: nn.Module, start: Weights, step: Tensor | None = None) -> None:
    """Set the weights that train to `start`, plus a step."""
    steps = {} if step is None else unflat(step, start)
    for name, parameter in trained_weights(model).items():
        parameter.copy_(start[name] + steps[name] if steps else start[name])


@torch.no_grad()
def compare(
    model: Transformer, start: Weights, rollout: Rollout, temperature: float
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The policy with the weights `start` against the policy as it is.

    Returns:
        The exact KL (N,) of the first to the second at the response tokens, and the
        `response_logprobs` of both.
    """
    old_weights = {name: partial(whole_tensor, x) for name, x in start.items()}
    before = call_with(model, old_weights, response_hidden, rollout)
    now = response_hidden(model, rollout)

    def kl_of(before: Tensor, now: Tensor) -> tuple[Tensor]:
        logits = call_with(model, old_weights, Transformer.logits, before)
        return (full_kl(logits, model.logits(now), temperature=temperature),)

    (kl,) = in_chunks(kl_of, model.config.vocab_size, before, now)
    old = call_with(model, old_weights, response_logprobs, rollout, temperature, before)
    return kl, old, response_logprobs(model, rollout, temperature, now)


def fisher_product(
    model: Transformer,
    rollout: Rollout,
    vector: Tensor,
    *,
    tokens: int,
    temperature: float,
    micro_batch_size: int | None = None,
) -> Tensor:
    """F v for the weights that train, in their order; in the weights' own precision.

    Args:
        rollout: a product is a sum over its micro-batches. An idle rank adds nothing.
        vector: (n,), as `flat` gives it.
        tokens: response tokens of the rollouts of all ranks, the denominator of the mean.
        temperature: of the policy's softmax.
    """
    weights = trained_weights(model)
    tangents = unflat(vector, weights)
    derivative = partial(_derivative, model, weights, tangents)
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for (part,) in micro_batches(micro_batch_size, rollout):
        hidden = response_hidden(model, part)  # (N, D)
        leaf = hidden.detach().requires_grad_()
        dhidden = derivative(lambda m, r=part: response_hidden(m, r))
        for h, dh in zip(leaf.split(size), dhidden.split(size)):
            logits = model.logits(h)  # (n, V)
            dlogits = derivative(Transformer.logits, (h.detach(), dh))  # J v
            wide, dwide = at_least_float32(logits.detach(), dlogits)
            p = (wide / temperature).softmax(dim=-1)
            upstream = p * (dwide - (p * dwide).sum(dim=-1, keepdim=True))
            upstream = torch.zeros_like(upstream) if distributed.idle() else upstream
            logits.backward((upstream / (temperature**2 * tokens)).to(logits.dtype))
        if hidden.requires_grad:
            hidden.backward(leaf.grad)
    return take_gradient(model)


@torch.no_grad()
def _derivative(
    model: Transformer,
    weights: Weights,
    tangents: Weights,
    function: Callable,
    *inputs: tuple[Tensor, Tensor],
) -> Tensor:
    """The derivative of function(model, *inputs) along tangents of the weights and the inputs.

    inputs: pairs of a value and its tangent. Attention is plain, because the fused kinds have no
    forward mode.
    """

    def dual(name: str) -> Tensor:
        return forward_ad.make_dual(*(whole_tensor(x[name]).detach() for x in (weights, tangents)))

    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        moving = {name: partial(dual, name) for name in weights}
        duals = [forward_ad.make_dual(x, dx) for x, dx in inputs]
        value, tangent = forward_ad.unpack_dual(call_with(model, moving, function, *duals))
    return torch.zeros_like(value) if tangent is None else tangent
