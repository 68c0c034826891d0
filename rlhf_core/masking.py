"""Masks: the one place that says what a mask means and how a masked statistic is formed.

A mask is boolean and True where a position counts. Masked positions may hold anything, NaN included, and never
reach a result. Every statistic is a sum and a count until the last moment, so that shards add up exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.checks import check_mask

AGGREGATIONS = ("token_mean", "sequence_mean")  # see loss_weights, which knows one more
IGNORE_INDEX = -100  # a label that is no target; the value that Hugging Face collators use


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True positions of mask (same shape), a scalar; 0 where nothing counts."""
    check_mask(x, mask)
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of the counted values: scalars that combine exactly."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    def combine(self, other: "Moments") -> "Moments":
        """Moments of both parts together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count.clamp_min(1)
        return Moments(
            count, self.mean + delta * share, self.m2 + other.m2 + delta**2 * self.count * share
        )


def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """Moments of x over the True positions of mask."""
    mean = masked_mean(x, mask)
    return Moments(mask.sum(), mean, ((x - mean).masked_fill(~mask, 0) ** 2).sum())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the counted tokens; 0 where the returns do not vary."""
    residual, total = masked_moments(returns - values, mask), masked_moments(returns, mask)
    return float(1 - residual.m2 / total.m2) if total.m2 > 0 else 0.0


def whiten(x: Tensor, mask: Tensor, *, moments: Moments | None = None, eps: float = 1e-8) -> Tensor:
    """Shift and scale x to mean 0 and (population) variance 1 over the True positions of mask; 0 elsewhere.

    `moments` takes the statistics of a larger whole of which x is a shard; by default x is the whole. With no
    counted value, one, or no variance at all, the result is 0 there, never NaN.
    """
    check_mask(x, mask)
    x = x.masked_fill(~mask, 0)  # first, so that a masked NaN reaches no gradient either
    count, mean, m2 = masked_moments(x, mask) if moments is None else moments
    variance = m2 / count.clamp_min(1)
    return ((x - mean) * torch.rsqrt(variance + eps)).masked_fill(~mask, 0)


def last_token_index(mask: Tensor) -> Tensor:
    """Index of the last True position of each row of mask (B, T), shape (B,); 0 for a row without one."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return (positions * mask).amax(dim=-1)


def loss_weights(
    mask: Tensor, aggregation: str = "token_mean", *, length: float | None = None
) -> Tensor:
    """Weights (B, T) that turn a per-token loss into a scalar: (loss * weights).sum().

    token_mean     every counted token of the batch weighs the same
    sequence_mean  every row weighs the same, its tokens share that weight
    sequence_sum   every counted token weighs 1 / length, a constant, in the mean over the rows (Liu et al. 2025)

    Weights of a whole minibatch, sliced together with it, make gradient accumulation exact: the micro-batch sums
    add up to the minibatch's loss whatever the split and the lengths.
    """
    weights = mask.float()
    if aggregation == "token_mean":
        return weights / weights.sum().clamp_min(1)
    if aggregation == "sequence_mean":
        lengths = weights.sum(dim=-1, keepdim=True)
        return weights / lengths.clamp_min(1) / (lengths > 0).sum().clamp_min(1)
    if aggregation == "sequence_sum" and length is not None:
        return weights / length / mask.any(dim=-1).sum().clamp_min(1)
    if aggregation == "sequence_sum":
        raise ValueError("aggregation 'sequence_sum' needs the length that its sums are divided by")
    raise ValueError(
        f"aggregation must be one of {', '.join(AGGREGATIONS)}, sequence_sum, got {aggregation!r}"
    )
