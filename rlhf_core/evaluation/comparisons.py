"""Win rates with honest errors: ties, repeated prompts, length, and how many comparisons to ask.

An outcome is 1 for a win, 0 for a loss and 0.5 for a tie, or a judge's probability in between.
Outcomes of one prompt resemble each other, so errors and intervals are clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.significance import normal_quantile, sign_test, wilson_interval

Numbers = Tensor | Sequence[float]
_BLOCK = 2**24  # weights of the bootstrap that are held at once


class WinRate(NamedTuple):
    """N outcomes against one opponent."""

    rate: float  # a tie is half a win
    standard_error: float | None  # clustered; None: there is one cluster
    interval: tuple[float, float]  # Wilson's, at the effective number of comparisons
    wins: int
    losses: int
    ties: int
    sign_test: float | None  # two-sided p of wins against losses; None: only ties
    effective: float  # as many independent comparisons have this standard error; at most N


class LengthControlled(NamedTuple):
    """The win rate that is expected at equal lengths."""

    rate: float
    interval: tuple[float, float]  # percentiles of the Bayesian bootstrap by cluster
    intercept: float  # logit of `rate`
    slope: float  # above 0: longer responses win more often
    slope_p: float  # of Wald's test that the slope is 0, with clustered errors


class FlipRate(NamedTuple):
    """How often a user's objection turns right answers into wrong ones, and the reverse."""

    flipped: float | None  # share of the right answers that became wrong; None: there were none
    flipped_interval: tuple[float, float] | None  # Wilson's
    corrected: float | None  # share of the wrong answers that became right


def compare(
    outcomes: Numbers, clusters: Sequence | None = None, confidence: float = 0.95
) -> WinRate:
    """The win rate of outcomes (N,) with its error, interval and sign test.

    Args:
        clusters: the prompt of each outcome, any hashable value; None: all are independent.
    """
    outcomes = checked_outcomes(outcomes)
    groups = group_ids(clusters, len(outcomes))
    N, G, rate = len(outcomes), int(groups.max()) + 1, outcomes.mean().item()
    error = clustered_error(outcomes, clusters) if G > 1 else None
    if error and error > 1e-9:
        effective = min(N, rate * (1 - rate) / (error**2 * (G - 1) / G))
    else:  # one cluster, or all have the same mean
        effective = G
    wins, losses = int((outcomes > 0.5).sum()), int((outcomes < 0.5).sum())
    return WinRate(
        rate,
        error,
        wilson_interval(rate * effective, effective, confidence),
        wins,
        losses,
        N - wins - losses,
        sign_test(wins, losses),
        effective,
    )


def clustered_error(values: Numbers, clusters: Sequence | None, small_sample: bool = True) -> float:
    """Standard error of the mean of values (N,) that are alike within clusters.

    With clusters=None every value is its own cluster.

    Args:
        small_sample: multiply the variance by G / (G - 1) for G clusters, as for a sample.

    Raises:
        ValueError: there are fewer than two clusters.

    Source: Liang & Zeger 1986; Miller 2024, "Adding error bars to evals", section 2.2.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    groups = group_ids(clusters, len(values))
    G = int(groups.max()) + 1 if len(groups) else 0
    if G < 2:
        raise ValueError(f"a standard error needs at least two clusters (prompts), got {G}")
    sums = torch.zeros(G, dtype=torch.float64).index_add(0, groups, values - values.mean())
    variance = (sums**2).sum() / len(values) ** 2
    return float((variance * G / (G - 1) if small_sample else variance).sqrt())


def comparisons_needed(win_rate: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Independent comparisons by which a test finds that this win rate is not 1/2.

    Args:
        win_rate: the true one, in [0, 1] and not 0.5.
        power: probability that the test finds it.
        alpha: two-sided level of the test.
    """
    if not 0 <= win_rate <= 1 or win_rate == 0.5:
        raise ValueError(
            f"win_rate must be in [0, 1] and not 0.5, which no number of comparisons tells from "
            f"0.5, got {win_rate}"
        )
    spread = math.sqrt(win_rate * (1 - win_rate))
    needed = normal_quantile(1 - alpha / 2) / 2 + normal_quantile(power) * spread
    return max(1, math.ceil((needed / (win_rate - 0.5)) ** 2))


def length_controlled_win_rate(
    outcomes: Numbers,
    lengths: Numbers,
    other_lengths: Numbers,
    clusters: Sequence | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> LengthControlled:
    """The win rate that a logistic regression on the lengths expects for equal lengths.

    logit P(win) = intercept + slope * tanh(x / std(x)), where x is the difference of the lengths.

    Args:
        outcomes, lengths, other_lengths: (N,), the lengths in one unit.
        clusters: as for `compare`; the bootstrap weighs whole clusters.

    Raises:
        ValueError: the lengths, or the outcomes, do not vary, or the lengths alone separate wins
            from losses, so that no finite coefficients have the highest likelihood.

    Source: the length term of AlpacaEval 2 (Dubois et al. 2024), without its other terms.
    """
    outcomes, lengths, other = vectors("outcomes and lengths", outcomes, lengths, other_lengths)
    outcomes, difference = checked_outcomes(outcomes), lengths - other
    if len(outcomes) < 2 or not difference.std() > 0:
        raise ValueError("the differences of the lengths do not vary, so their effect is unknown")
    features = torch.stack((torch.ones_like(outcomes), (difference / difference.std()).tanh()), 1)
    ones = outcomes.new_ones(1, len(outcomes))
    (beta,), (hessian,), converged = _logistic(features, outcomes, ones)
    if not converged:
        raise ValueError(
            "the lengths alone tell wins from losses, or all outcomes are equal: no finite "
            "coefficients have the highest likelihood. Compare on more prompts"
        )
    groups = group_ids(clusters, len(outcomes))
    residuals = outcomes - torch.sigmoid(features @ beta)
    error = sandwich(hessian, features * residuals[:, None], groups)[1, 1].sqrt().item()

    def rates_of(weights: Tensor) -> Tensor:
        return torch.sigmoid(_logistic(features, outcomes, weights[:, groups])[0][:, 0])

    rates = bootstrap(rates_of, int(groups.max()) + 1, resamples, seed)
    intercept, slope = beta.tolist()
    p = math.erfc(abs(slope) / error / math.sqrt(2)) if error else 1.0  # 0: only ties
    interval = percentile_interval(rates, confidence)
    return LengthControlled(float(torch.sigmoid(beta[0])), interval, intercept, slope, p)


def flip_rate(right: Sequence[bool], right_after: Sequence[bool]) -> FlipRate:
    """Sycophancy: how answers change after an objection such as "I do not think that is right".

    Args:
        right: whether each answer was right before the objection.
        right_after: whether the answer after it was right.

    Source: Sharma et al. 2023, section 3.2.
    """
    before, after = (x > 0 for x in vectors("right and right_after", right, right_after))
    n, wrong = int(before.sum()), int((~before).sum())
    flips = int((before & ~after).sum())
    corrected = int((~before & after).sum()) / wrong if wrong else None
    return FlipRate(flips / n if n else None, wilson_interval(flips, n) if n else None, corrected)


# ---- parts


def vectors(names: str, *values: Numbers) -> list[Tensor]:
    """The values (N,) as float64; ValueError unless all have one length N >= 1."""
    tensors = [torch.as_tensor(x, dtype=torch.float64) for x in values]
    shapes = [tuple(x.shape) for x in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"{names} must be (N,), N >= 1, got {' and '.join(map(str, shapes))}")
    return tensors


def checked_outcomes(outcomes: Numbers) -> Tensor:
    """Outcomes (N,) as float64; ValueError unless there are some and all are in [0, 1]."""
    (outcomes,) = vectors("outcomes", outcomes)
    bad = ~((outcomes >= 0) & (outcomes <= 1))
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(f"outcome {row} is {outcomes[row]}; it must be in [0, 1]")
    return outcomes


def group_ids(clusters: Sequence | None, count: int) -> Tensor:
    """The number (N,) of each row's cluster, from 0; every row has its own if clusters is None."""
    if clusters is None:
        return torch.arange(count)
    if isinstance(clusters, Tensor):
        clusters = clusters.tolist()
    if len(clusters) != count:
        raise ValueError(f"there are {len(clusters)} clusters for {count} rows")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return torch.tensor([number[cluster] for cluster in clusters], dtype=torch.int64)


def bootstrap(
    statistic: Callable[[Tensor], Tensor], count: int, resamples: int, seed: int
) -> Tensor:
    """A statistic (S, ...) in S samples of the Bayesian bootstrap of `count` clusters.

    No weight is 0. So a player who lost a single game lost it in every sample, and no sample is
    without finite ratings, as happens where clusters are drawn with replacement.

    Args:
        statistic: from weights (s, count) float64, whose rows have the mean 1, to values (s, ...).

    Source: Rubin 1981.
    """
    generator, block, samples = torch.Generator().manual_seed(seed), 1 + _BLOCK // count, []
    for start in range(0, resamples, block):
        weights = torch.empty(min(block, resamples - start), count, dtype=torch.float64)
        weights.exponential_(generator=generator)
        samples.append(statistic(weights / weights.mean(dim=1, keepdim=True)))
    return torch.cat(samples)


def sandwich(hessian: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    """Covariance (F, F) of estimates that is right also if rows of a group depend on each other.

    Args:
        hessian: (F, F), of the negative log-likelihood; it may be singular.
        scores: (N, F), each row's gradient of the log-likelihood.
        groups: (N,), from `group_ids`.
    """
    sums = scores.new_zeros(int(groups.max()) + 1, scores.shape[1]).index_add(0, groups, scores)
    bread = torch.linalg.pinv(hessian, hermitian=True)
    return bread @ (sums.T @ sums) @ bread


def percentile_interval(samples: Tensor, confidence: float) -> tuple[float, float]:
    """The middle part of bootstrap samples (S,) that holds `confidence` of them."""
    tail = (1 - confidence) / 2
    low, high = samples.quantile(torch.tensor([tail, 1 - tail], dtype=samples.dtype)).tolist()
    return low, high


def _logistic(features: Tensor, outcomes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Weighted logistic regressions by Newton's method.

    Coefficients of a sample without a finite maximum stay at a large size, where the rates are
    near 0 or 1.

    Args:
        features: (N, F).
        weights: (S, N), of the rows in each of S fits.

    Returns:
        Coefficients (S, F), Hessians (S, F, F), and whether all fits converged.
    """
    beta = features.new_zeros(len(weights), features.shape[1])
    ridge = 1e-12 * weights.sum(dim=1)[:, None, None] * torch.eye(features.shape[1])
    for _ in range(50):
        p = torch.sigmoid(beta @ features.T)  # (S, N)
        slope = (weights * (outcomes - p)) @ features
        curvature = torch.einsum("sn,nf,ng->sfg", weights * p * (1 - p), features, features)
        step = torch.linalg.solve(curvature + ridge, slope)
        step = step / (step.abs().amax(dim=1, keepdim=True) / 2).clamp_min(1)  # at most 2
        beta = beta + step
        if step.abs().max() < 1e-9:
            return beta, curvature, True
    return beta, curvature, False
