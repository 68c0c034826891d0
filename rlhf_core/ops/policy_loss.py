"""PPO's loss (Schulman et al. 2017): clipped surrogate, clipped value error, entropy bonus.

For every counted token, with ratio = exp(logprobs - old_logprobs) and A its advantage:

    policy = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))               eq. 7, negated
    policy = min(policy, -A dual_clip) where A < 0                          Ye et al. 2020, eq. 5
    near   = clip(values, old_values - value_clip_range, old_values + value_clip_range)
    value  = max((values - returns)^2, (near - returns)^2) / 2              openai/baselines ppo2
    loss   = sum of weights * (policy + vf_coef value - entropy_coef entropy)               eq. 9

The loss is a scalar, so the fused form computes loss, gradients and statistics in one pass, and its
backward only scales the gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.checks import at_least_float32, check_alike, check_float, check_mask, resolve
from rlhf_core.masking import AGGREGATIONS, loss_weights, masked_mean
from rlhf_core.ops.derivatives import refuse_second

# e^20 is far beyond any clip range. e^89 would overflow, and a zero advantage would give 0 * inf.
MAX_LOG_RATIO = 20.0


class PPOLossStats(NamedTuple):
    """Means over the counted tokens, and their count: detached scalars.

    To combine the statistics of several parts, weight the means by count.
    """

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl: Tensor  # estimate of KL(old || new): ratio - 1 - log_ratio (Schulman 2020, k3)
    clip_frac: Tensor  # share of tokens where the clipped branch is the larger loss
    value_clip_frac: Tensor
    ratio: Tensor
    ratio_squared: Tensor
    dual_clip_frac: Tensor
    count: Tensor


def ppo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
    weights: Tensor | None,
    sequence_mean: bool,
    clip_low: float,
    clip_high: float,
    value_clip_range: float | None,
    vf_coef: float,
    entropy_coef: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """The definition: the loss and the ten statistics."""
    if weights is None:
        weights = loss_weights(mask, AGGREGATIONS[sequence_mean])
    log_ratio, A, w = (
        x.masked_fill(~mask, 0) for x in (logprobs - old_logprobs, advantages, weights)
    )
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped, clipped = -A * ratio, -A * ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = torch.maximum(unclipped, clipped)  # on a tie (ratio 1) half the gradient each
    dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        dual_clipped = (A < 0) & (policy > -A * dual_clip)
        policy = torch.where(dual_clipped, -A * dual_clip, policy)

    value, value_clipped = torch.zeros_like(policy), torch.zeros_like(mask)
    if values is not None:
        values, old_values, returns = (
            x.masked_fill(~mask, 0) for x in (values, old_values, returns)
        )
        value = far = (values - returns) ** 2
        if value_clip_range is not None:
            near = values.clamp(old_values - value_clip_range, old_values + value_clip_range)
            near = (near - returns) ** 2
            value, value_clipped = torch.maximum(far, near), near > far
        value = value / 2

    entropy = torch.zeros_like(policy) if entropy is None else entropy.masked_fill(~mask, 0)
    loss = ((policy + vf_coef * value - entropy_coef * entropy) * w).sum()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).clamp_min(0)
        stats = [policy, value, entropy, approx_kl, clipped > unclipped, value_clipped]
        stats += [ratio, ratio**2, dual_clipped]
        means = [masked_mean(x.to(logprobs.dtype), mask) for x in stats]
        return loss, torch.stack([*means, mask.sum().to(logprobs.dtype)])


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, *args):
        loss, scale, stats, *gradients = impl.ppo_loss_fwd(*args)
        ctx.save_for_backward(scale, *gradients)
        ctx.mark_non_differentiable(stats)
        ctx.num_args = len(args)
        return loss, stats

    @staticmethod
    def backward(ctx, dloss, _):
        refuse_second("ppo_loss")
        scale, *gradients = ctx.saved_tensors
        scale = scale * dloss
        dargs = [None] * ctx.num_args
        for i, gradient in zip((0, 3, 6), gradients):  # logprobs, values, entropy
            if ctx.needs_input_grad[1 + i]:
                dargs[i] = scale * gradient
        return None, *dargs


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    response_mask: Tensor,
    *,
    clip_range: float | tuple[float, float],
    value_clip_range: float | None,
    vf_coef: float,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    weights: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PPOLossStats]:
    """PPO's loss and its statistics, from one pass over the tokens.

    Gradients flow to logprobs, values and entropy. The other tensors are constants.

    Args:
        logprobs, old_logprobs: (B, R), nats, of the current policy and of the sampling policy.
        advantages: (B, R).
        values, old_values, returns: (B, R); all None for a loss without a critic.
        response_mask: (B, R) bool, True where a token counts; elsewhere inputs may hold anything.
        clip_range: (low, high), each > 0, or one number for both. The ratio is clipped to
            [1 - low, 1 + high]. A low >= 1 or an infinite high never clips. A high above low is
            clip-higher (Yu et al. 2025, section 3.1).
        value_clip_range: > 0, maximum useful change of a value from its old one; None: no clipping.
        vf_coef: weight of the value loss.
        entropy: (B, R), for the bonus and the statistics.
        entropy_coef: weight of the entropy bonus.
        dual_clip: > 1, bound on the loss of a token with A < 0, in units of |A|; None: no bound.
        aggregation: "token_mean" or "sequence_mean", see `loss_weights`.
        weights: (B, R), replace the aggregation. With slices of a minibatch's `loss_weights` the
            losses of its micro-batches add up to its own.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (loss, PPOLossStats), scalars in float32 (float64 for float64 input).

    Raises:
        ValueError or TypeError: with the offending value.
    """
    tensors = dict(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    tensors |= dict(
        values=values, old_values=old_values, returns=returns, entropy=entropy, weights=weights
    )
    for name, x in tensors.items():
        if x is not None:
            check_float(name, x)
            check_alike(name, x, "logprobs", logprobs)
    check_mask(logprobs, response_mask, "response_mask")
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs must be (B, R), got {tuple(logprobs.shape)}")
    if len({x is None for x in (values, old_values, returns)}) > 1:
        raise ValueError("values, old_values and returns must all be given or all be None")
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"entropy_coef {entropy_coef} needs the entropy: pass entropy=")
    bounds = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    widths = bounds if value_clip_range is None else (*bounds, value_clip_range)
    if len(bounds) != 2 or not all(x > 0 for x in widths):
        raise ValueError(f"clip ranges must be > 0, got {clip_range} and {value_clip_range}")
    if not (dual_clip is None or dual_clip > 1):
        raise ValueError(f"dual_clip must be > 1, got {dual_clip}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}"
        )

    given = [name for name, x in tensors.items() if x is not None]
    tensors |= dict(zip(given, at_least_float32(*(tensors[name] for name in given))))
    *tensors, weights = tensors.values()
    args = (*tensors, response_mask, weights, aggregation == "sequence_mean")
    args += (*bounds, value_clip_range, vf_coef, entropy_coef, dual_clip)
    impl = resolve(backend, *tensors, weights)
    if impl is None:
        loss, stats = ppo_loss_reference(*args)
    else:
        loss, stats = _PPOLoss.apply(
            impl, *(x.contiguous() if isinstance(x, Tensor) else x for x in args)
        )
    return loss, PPOLossStats(*stats.unbind())
