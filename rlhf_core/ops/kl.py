"""KL(policy || reference): per-token estimates from sampled tokens, and the exact value.

`kl_estimate`, with d = logprobs - ref_logprobs (Schulman 2020, "Approximating KL Divergence"):

    k1 = d                    unbiased, high variance, either sign
    k2 = d^2 / 2              biased, low variance, >= 0
    k3 = exp(-d) - 1 + d      unbiased, low variance, >= 0
    abs = |d|

Near d = 0, k3 is a difference of almost equal numbers, so a series replaces it for |d| < 1/8. Below
d = -20 its tangent replaces it, so that value and gradient are finite for any finite d.

`full_kl` sums over the vocabulary, with p and q the softmax of both logits over the temperature:

    kl = sum_j p_j (log p_j - log q_j)
    dlogits_j = g p_j (log p_j - log q_j - kl) / temperature
    dref_logits_j = g (q_j - p_j) / temperature

A token that the policy cannot sample (p_j = 0) adds 0. If q_j = 0 < p_j, the KL is inf.
"""

import math

import torch
from torch import Tensor

from rlhf_core.checks import at_least_float32, check_alike, check_float, check_mask, resolve
from rlhf_core.ops.derivatives import gradients, needs_reference
from rlhf_core.ops.logprobs import as_rows, check_temperature, log_softmax_reference

ESTIMATORS = ("k1", "k2", "k3", "abs")
K3_SERIES_BELOW = 0.125
K3_TANGENT_BELOW = -20.0


def kl_estimate_reference(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: str, mask: Tensor | None
) -> Tensor:
    """The definition, in the dtype of the inputs."""
    if mask is not None:
        logprobs, ref_logprobs = logprobs.masked_fill(~mask, 0), ref_logprobs.masked_fill(~mask, 0)
    d = logprobs - ref_logprobs
    kl = {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: _k3(d), "abs": d.abs}[estimator]()
    return kl if mask is None else kl.masked_fill(~mask, 0)


def _k3(d: Tensor) -> Tensor:
    small = d.abs() < K3_SERIES_BELOW
    tangent = d < K3_TANGENT_BELOW
    s = d.where(small, 0)
    series = s * s / 2 * (1 - s / 3 + s**2 / 12 - s**3 / 60 + s**4 / 360)
    direct = torch.exp(-d.where(~small & ~tangent, 0)) - 1 + d
    steepness = math.exp(-K3_TANGENT_BELOW) - 1
    line = steepness + K3_TANGENT_BELOW + steepness * (K3_TANGENT_BELOW - d)
    return torch.where(small, series, torch.where(tangent, line, direct))


class _KLEstimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, logprobs, ref_logprobs, mask, estimator):
        ctx.save_for_backward(logprobs, ref_logprobs, mask)
        ctx.impl, ctx.estimator = impl, estimator
        return impl.kl_estimate_fwd(logprobs, ref_logprobs, mask, estimator)

    @staticmethod
    def backward(ctx, dkl):
        logprobs, ref_logprobs, mask = ctx.saved_tensors
        if needs_reference(dkl):
            grads = gradients(
                lambda p, q: (kl_estimate_reference(p, q, ctx.estimator, mask),),
                (logprobs, ref_logprobs),
                ctx.needs_input_grad[1:3],
                (dkl,),
            )
            return None, *grads, None, None
        dkl = dkl.contiguous()
        grads = ctx.impl.kl_estimate_bwd(dkl, logprobs, ref_logprobs, mask, ctx.estimator)
        return None, *grads, None, None


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k1",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference) in nats, from samples of the policy.

    Args:
        logprobs, ref_logprobs: (...) float, log-probs of the sampled tokens in nats.
        estimator: "k1", "k2", "k3" or "abs"; see the formulas of this module.
        mask: (...) bool, True where a token counts; None counts all. Elsewhere the result and the
            gradient are exactly 0.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (...) float32 (float64 for float64 input).

    Raises:
        ValueError or TypeError: with the offending value.
    """
    for name, x in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs)):
        check_float(name, x)
    check_alike("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    check_estimator(estimator)
    if mask is not None:
        check_mask(logprobs, mask)
    logprobs, ref_logprobs = at_least_float32(logprobs, ref_logprobs)
    impl = resolve(backend, logprobs, ref_logprobs)
    if impl is None:
        return kl_estimate_reference(logprobs, ref_logprobs, estimator, mask)
    mask = None if mask is None else mask.contiguous()
    return _KLEstimate.apply(
        impl, logprobs.contiguous(), ref_logprobs.contiguous(), mask, estimator
    )


def check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"unknown estimator {estimator!r}, expected one of {', '.join(ESTIMATORS)}"
        )


def full_kl_reference(
    logits: Tensor, ref_logits: Tensor, temperature: float | Tensor, mask: Tensor | None
) -> Tensor:
    """The definition, float64 for float64 logits, else float32."""
    log_p, log_q = (log_softmax_reference(z, temperature, mask) for z in (logits, ref_logits))
    p = log_p.exp()  # (..., V)
    impossible = p == 0  # p (log p - log q) is 0 there, not 0 * inf
    kl = (p * (log_p.masked_fill(impossible, 0) - log_q.masked_fill(impossible, 0))).sum(dim=-1)
    kl = kl - kl.detach().clamp_max(0)  # remove rounding below 0, keep the gradient
    return kl if mask is None else kl.masked_fill(~mask, 0)


class _FullKL(torch.autograd.Function):
    """The fused form: each pass reads both logits once; backward writes each gradient once."""

    @staticmethod
    def forward(ctx, impl, logits, ref_logits, mask, temperature):
        kl, lse = impl.full_kl_fwd(
            as_rows(logits, 3), as_rows(ref_logits, 3), as_rows(mask, 2), as_rows(temperature, 2)
        )
        temperatures = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(logits, ref_logits, mask, temperatures, kl, lse)
        ctx.impl, ctx.temperature = impl, None if isinstance(temperature, Tensor) else temperature
        return kl.view(logits.shape[:-1])

    @staticmethod
    def backward(ctx, dkl):
        logits, ref_logits, mask, temperatures, kl, lse = ctx.saved_tensors
        if needs_reference(dkl):
            temperature = ctx.temperature if temperatures is None else temperatures
            grads = gradients(
                lambda z, ref: (full_kl_reference(z, ref, temperature, mask),),
                (logits, ref_logits),
                ctx.needs_input_grad[1:3],
                (dkl,),
            )
            return None, *grads, None, None
        temperature = ctx.temperature if temperatures is None else as_rows(temperatures, 2)
        rows = (as_rows(dkl, 2), as_rows(logits, 3), as_rows(ref_logits, 3), as_rows(mask, 2))
        grads = ctx.impl.full_kl_bwd(*rows, temperature, kl, lse, *ctx.needs_input_grad[1:3])
        grads = (None if grad is None else grad.view(logits.shape) for grad in grads)
        return None, *grads, None, None


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Exact KL of softmax(logits / temperature) from the reference's, for every row, in nats.

    Args:
        logits, ref_logits: (..., V) of policy and reference, float32, bfloat16 or float16; float64
            uses the reference backend. Strided views need no copy, unequal dtypes need one. Either
            may require a gradient.
        temperature: > 0; a number or a tensor that broadcasts to (...) and gets no gradient.
        mask: (...) bool, True where a position counts; None counts all. Elsewhere the result and
            the gradient are exactly 0.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (...) float32 (float64 for float64 logits), >= 0; inf if the policy can sample a token that
        the reference cannot.

    Raises:
        ValueError or TypeError: with the offending value.
    """
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        check_float(name, x)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (..., V) with V > 0, got {tuple(logits.shape)}")
    check_alike("ref_logits", ref_logits, "logits", logits)
    if logits.dtype != ref_logits.dtype:
        dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
        logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    impl = resolve(backend, logits, ref_logits, temperature)
    temperature = check_temperature(temperature, logits, impl)
    if mask is not None:
        check_mask(logits[..., 0], mask)
    if impl is None:
        return full_kl_reference(logits, ref_logits, temperature, mask)
    logits, ref_logits = (z if z.stride(-1) == 1 else z.contiguous() for z in (logits, ref_logits))
    return _FullKL.apply(impl, logits, ref_logits, mask, temperature)
