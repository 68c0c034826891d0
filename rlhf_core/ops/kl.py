"""Per-token estimates of KL(policy || reference) from the log-probs of tokens that the policy sampled.

With d = logprobs - ref_logprobs (Schulman 2020, "Approximating KL Divergence"):

    k1 = d                    unbiased, high variance, either sign
    k2 = d^2 / 2              biased, low variance, >= 0
    k3 = exp(-d) - 1 + d      unbiased, low variance, >= 0
    abs = |d|

k3 is a difference of near-equal numbers around d = 0, so a series replaces it for |d| < 1/8; below d = -20 it goes on
along its tangent, so that value and gradient stay finite for any finite d.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core import backends
from rlhf_core.checks import at_least_float32, check_alike, check_float, check_mask

ESTIMATORS = ("k1", "k2", "k3", "abs")
K3_SERIES_BELOW = 0.125
K3_TANGENT_BELOW = -20.0


def kl_estimate_reference(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, mask: Tensor | None) -> Tensor:
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
    line = math.exp(-K3_TANGENT_BELOW) * (1 + K3_TANGENT_BELOW - d) - 1 + d
    return torch.where(small, series, torch.where(tangent, line, direct))


class _KLEstimate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, logprobs, ref_logprobs, mask, estimator):
        ctx.save_for_backward(logprobs, ref_logprobs, mask)
        ctx.impl, ctx.estimator = impl, estimator
        return impl.kl_estimate_fwd(logprobs, ref_logprobs, mask, estimator)

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl):
        logprobs, ref_logprobs, mask = ctx.saved_tensors
        grads = ctx.impl.kl_estimate_bwd(dkl.contiguous(), logprobs, ref_logprobs, mask, ctx.estimator)
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
        logprobs, ref_logprobs: (...) log-probs of the sampled tokens, float32, bfloat16, float16 or float64.
        estimator: "k1", "k2", "k3" or "abs"; see the module's formulas.
        mask: (...) bool, True where a token counts; elsewhere result and gradient are exactly 0.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (...) float32 (float64 for float64 input).

    Raises:
        ValueError or TypeError with the offending values.
    """
    for name, x in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs)):
        check_float(name, x)
    check_alike("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if mask is not None:
        check_mask(logprobs, mask)
    logprobs, ref_logprobs = at_least_float32(logprobs, ref_logprobs)
    impl = backends.resolve(backend, logprobs)
    if impl is None:
        return kl_estimate_reference(logprobs, ref_logprobs, estimator, mask)
    mask = None if mask is None else mask.contiguous()
    return _KLEstimate.apply(impl, logprobs.contiguous(), ref_logprobs.contiguous(), mask, estimator)
