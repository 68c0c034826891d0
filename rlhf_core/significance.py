"""Tests and intervals of counted wins and losses."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share; half a success for a tie is allowed.

    Source: Wilson 1927.
    """
    _check_share(successes, n)
    z = normal_quantile(0.5 + confidence / 2)
    share, scale = successes / n, 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float | None:
    """Two-sided exact p of the hypothesis that a win is as likely as a loss; None for only ties.

    McNemar's exact test of paired right and wrong answers is the same: `wins` counts the items that
    only the first model solved, `losses` those that only the second one solved.
    """
    if wins == losses == 0:
        return None
    n, most = wins + losses, max(wins, losses)
    _check_share(wins, n)
    k = torch.arange(most, n + 1, dtype=torch.float64)
    total = torch.tensor(n + 1, dtype=torch.float64)
    choose = torch.lgamma(total) - torch.lgamma(k + 1) - torch.lgamma(total - k)
    return min(1.0, 2 * float((choose - n * math.log(2)).exp().sum()))


def normal_quantile(p: float) -> float:
    """The value that a standard normal variable stays below with probability p."""
    if not 0 < p < 1:
        raise ValueError(f"confidence, power and alpha must be between 0 and 1, got {p}")
    return NormalDist().inv_cdf(p)


def _check_share(successes: float, n: float) -> None:
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"there are {successes} successes in {n}; give 0 <= successes <= n, n > 0")
