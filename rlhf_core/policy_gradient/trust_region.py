"""Steps within a trust region (Schulman et al. 2015, appendix C): the natural gradient F^-1 g by
conjugate gradients, and a line search.

F is the Fisher matrix of the policy, a mean over response tokens. With J the Jacobian of a token's
logits and p their softmax at the temperature T,

    F = E[ J^T (diag(p) - p p^T) J ] / T^2

It is the Hessian, at the old weights, of the KL of the old policy to the new one. A product with F
takes one forward pass in forward mode, for J v, and one backward pass. So nothing is differentiated
twice, which fused attention and activation checkpointing could not do. Left out: Kronecker factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_core import distributed
from rlhf_core.checks import at_least_float32
from rlhf_core.models import Transformer
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


def call_with(model: nn.Module, weights: Weights, function: Callable, *arguments: Any) -> Any:
    """function(model, *arguments), with other values for the named weights of the model."""
    named = {f"model.{name}": x for name, x in weights.items()}
    return torch.func.functional_call(_Holder(model), named, (function, *arguments))


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector of all values."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unflat(vector: Tensor, like: Weights) -> Weights:
    """Parts of a vector with the names, shapes and dtypes of `like`."""
    parts = vector.split([x.numel() for x in like.values()])
    return {name: v.view_as(x).to(x.dtype) for v, (name, x) in zip(parts, like.items())}


def take_gradient(model: nn.Module) -> Tensor:
    """The gradient that backward passes of all ranks have left, as a vector; clears it."""
    parameters = trained_weights(model).values()
    distributed.add_gradients(list(parameters))
    vector = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
    for p in parameters:
        p.grad = None
    return vector


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Solve A x = b for a symmetric, positive definite A (Hestenes & Stiefel 1952).

    Args:
        product: maps v to A v.
        b: (n,).
        iterations: at most; each takes one product.
        tolerance: stop when |b - A x| is at most this share of |b|.

    Returns:
        x and A x, each (n,).
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    norm, enough = b @ b, tolerance**2 * (b @ b)
    for _ in range(iterations):
        if norm <= enough:
            break
        curved = product(direction)
        length = norm / (direction @ curved)
        x += length * direction
        residual -= length * curved
        norm, before = residual @ residual, norm
        direction = residual + norm / before * direction
    return x, b - residual


def natural_step(
    product: Callable[[Tensor], Tensor],
    uphill: Tensor,
    *,
    max_kl: float,
    damping: float,
    iterations: int,
) -> Tensor:
    """The step s along (F + damping)^-1 g with s (F + damping) s / 2 = max_kl; 0 if g is 0.

    Args:
        product: maps v to F v.
        uphill: (n,), the gradient g of the function to raise.
        iterations: of `conjugate_gradients`.
    """
    direction, curved = conjugate_gradients(lambda v: product(v) + damping * v, uphill, iterations)
    curvature = direction @ curved
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
    before, now = call_with(model, start, response_hidden, rollout), response_hidden(model, rollout)

    def kl_of(before: Tensor, now: Tensor) -> tuple[Tensor]:
        logits = call_with(model, start, Transformer.logits, before)
        return (full_kl(logits, model.logits(now), temperature=temperature),)

    (kl,) = in_chunks(kl_of, model.config.vocab_size, before, now)
    old = call_with(model, start, response_logprobs, rollout, temperature, before)
    return kl, old, response_logprobs(model, rollout, temperature, now)


def fisher_product(
    model: Transformer,
    rollouts: Iterable[Rollout],
    vector: Tensor,
    *,
    tokens: int,
    temperature: float,
) -> Tensor:
    """F v for the weights that train, in their order; in the weights' own precision.

    Args:
        rollouts: micro-batches; a product is a sum over them.
        vector: (n,), as `flat` gives it.
        tokens: response tokens of all micro-batches, the denominator of the mean.
        temperature: of the policy's softmax.
    """
    tangents = unflat(vector, trained_weights(model))
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for rollout in rollouts:
        hidden = response_hidden(model, rollout)  # (N, D)
        leaf = hidden.detach().requires_grad_()
        dhidden = _derivative(model, tangents, lambda m, r=rollout: response_hidden(m, r))
        for h, dh in zip(leaf.split(size), dhidden.split(size)):
            logits = model.logits(h)  # (n, V)
            dlogits = _derivative(model, tangents, Transformer.logits, (h.detach(), dh))  # J v
            wide, dwide = at_least_float32(logits.detach(), dlogits)
            p = (wide / temperature).softmax(dim=-1)
            upstream = p * (dwide - (p * dwide).sum(dim=-1, keepdim=True))
            logits.backward((upstream / (temperature**2 * tokens)).to(logits.dtype))
        if hidden.requires_grad:
            hidden.backward(leaf.grad)
    return take_gradient(model)


@torch.no_grad()
def _derivative(
    model: Transformer, tangents: Weights, function: Callable, *inputs: tuple[Tensor, Tensor]
) -> Tensor:
    """The derivative of function(model, *inputs) along tangents of the weights and the inputs.

    inputs: pairs of a value and its tangent. Attention is plain, because the fused kinds have no
    forward mode.
    """
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        weights = {
            name: forward_ad.make_dual(p.detach(), tangents[name])
            for name, p in trained_weights(model).items()
        }
        duals = [forward_ad.make_dual(x, dx) for x, dx in inputs]
        value, tangent = forward_ad.unpack_dual(call_with(model, weights, function, *duals))
    return torch.zeros_like(value) if tangent is None else tangent
