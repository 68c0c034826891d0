"""Masks and masked statistics. A mask is boolean, and True where a position counts.

Masked positions may hold anything, NaN included, and never reach a result. Every statistic is
kept as a sum and a count until the end, so that shards add up exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.checks import check_mask

AGGREGATIONS = ("token_mean", "sequence_mean")  # loss_weights also takes sequence_sum
IGNORE_INDEX = -100  # label of a position that is not a target, as in Hugging Face collators


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True positions of mask (same shape), a scalar; 0 if nothing counts."""
    check_mask(x, mask)
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations: scalars that combine exactly across shards."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def variance(self) -> Tensor:
        """Population variance; 0 if the values differ by no more than rounding."""
        variance = self.m2 / self.count
        return variance.where(variance > 1e-10 * (variance + self.mean**2), 0)

    def combine(self, other: "Moments") -> "Moments":
        """Moments of both parts together (Chan, Golub & LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count.clamp_min(1)
        m2 = self.m2 + other.m2 + delta**2 * self.count * share
        return Moments(count, self.mean + delta * share, m2)


def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """Moments of x over the True positions of mask (same shape)."""
    mean = masked_mean(x, mask)
    return Moments(mask.sum(), mean, ((x - mean).masked_fill(~mask, 0) ** 2).sum())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over counted tokens; 0 if returns are constant."""
    residual, total = masked_moments(returns - values, mask), masked_moments(returns, mask)
    return float(1 - residual.m2 / total.m2) if total.m2 > 0 else 0.0


def whiten(x: Tensor, mask: Tensor, *, moments: Moments | None = None, eps: float = 1e-8) -> Tensor:
    """x shifted and scaled to mean 0 and population variance 1 under mask; 0 elsewhere.

    Args:
        x: any shape, float.
        mask: bool, same shape, True where a position counts.
        moments: statistics of a larger batch of which x is a shard; None: those of x itself.
        eps: added to the variance. If nothing counts or nothing varies, the result is 0, not NaN.
    """
    check_mask(x, mask)
    x = x.masked_fill(~mask, 0)  # first, so that a masked NaN does not reach the gradient
    count, mean, m2 = masked_moments(x, mask) if moments is None else moments
    variance = m2 / count.clamp_min(1)
    return ((x - mean) * torch.rsqrt(variance + eps)).masked_fill(~mask, 0)


def tied(scores: Tensor, dim: int = -1) -> Tensor:
    """Whether the scores along a dimension are equal up to rounding: 1e-6 of the largest one."""
    spread = scores.amax(dim) - scores.amin(dim)
    return spread <= 1e-6 * scores.abs().amax(dim)


def last_token_index(mask: Tensor) -> Tensor:
    """Index (B,) of the last True position in each row of mask (B, T); 0 for a row without one."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return (positions * mask).amax(dim=-1)


def loss_weights(
    mask: Tensor, aggregation: str = "token_mean", *, length: float | None = None
) -> Tensor:
    """Weights (B, T) that reduce a per-token loss to a scalar: (loss * weights).sum().

    Compute the weights of a whole minibatch and slice them together with it. Then the losses of
    the micro-batches add up to that of the minibatch, for any split and any lengths.

    Args:
        mask: (B, T) bool, True where a token counts.
        aggregation: "token_mean": every counted token of the batch has the same weight.
            "sequence_mean": every row has the same weight, divided equally among its tokens.
            "sequence_sum": tokens weigh 1 / length, averaged over the rows (Liu et al. 2025).
        length: the constant for "sequence_sum"; other aggregations ignore it.

    Raises:
        ValueError: unknown aggregation, or "sequence_sum" without a length.
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
        raise ValueError("aggregation 'sequence_sum' needs a length to divide the sums by")
    raise ValueError(
        f"aggregation must be one of {', '.join(AGGREGATIONS)}, sequence_sum, got {aggregation!r}"
    )
