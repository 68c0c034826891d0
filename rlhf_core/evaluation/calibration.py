"""How well a reward model's margins predict human choices: calibration and accuracy by subset.

Under Bradley-Terry the margin, chosen minus rejected score, is the log-odds that a person prefers
the chosen response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.evaluation.comparisons import Numbers, vectors
from rlhf_core.losses import preferred
from rlhf_core.significance import wilson_interval


class Calibration(NamedTuple):
    """Calibration of N predicted probabilities sigmoid(margin)."""

    ece: float  # expected calibration error: mean over bins of |share won - mean probability|
    mce: float  # the largest of these differences
    brier: float  # mean squared error of the probabilities
    log_loss: float  # nats
    accuracy: float  # a margin of 0 is half right
    auc: float | None  # None: all were won, or none
    temperature: float  # sigmoid(margin / temperature) has the lowest log loss: > 1, overconfident


class Accuracy(NamedTuple):
    """Share of pairs whose chosen response scores higher; a tie is half right."""

    pairs: int
    accuracy: float
    interval: tuple[float, float]  # Wilson's


def measure_calibration(margins: Numbers, won: Numbers, bins: int = 10) -> Calibration:
    """Calibration of margins (N,) in log-odds, by whether (N,) the first response won.

    The bins have equal width. Where the chosen response always comes first, pass `both_orders` of
    the margins; otherwise every bin has been won.
    """
    margins, won = vectors("margins and won", margins, won)
    if not margins.isfinite().all() or not ((won == 0) | (won == 1)).all():
        raise ValueError("margins must be finite, and won must be 0 or 1")
    p = torch.sigmoid(margins)
    signed = margins.where(won == 1, -margins)  # the log-odds of what happened
    place = (p * bins).long().clamp_max(bins - 1)
    counts = place.bincount(minlength=bins)
    gaps = place.bincount(won - p, minlength=bins).abs()  # times the count
    return Calibration(
        ece=(gaps.sum() / len(p)).item(),
        mce=(gaps / counts.clamp_min(1)).max().item(),
        brier=((p - won) ** 2).mean().item(),
        log_loss=F.binary_cross_entropy_with_logits(margins, won).item(),
        accuracy=preferred(signed, -signed).mean().item(),
        auc=_auc(margins, won),
        temperature=fit_temperature(signed),
    )


def both_orders(margins: Tensor) -> tuple[Tensor, Tensor]:
    """Margins (2 N,), and whether each was won, of pairs whose chosen response came first."""
    won = torch.cat((torch.ones_like(margins), torch.zeros_like(margins)))
    return torch.cat((margins, -margins)), won


def fit_temperature(margins: Tensor) -> float:
    """The temperature by which to divide margins (N,), winner minus loser, for the lowest log loss.

    It is 0 if no margin is negative, and infinite if the margins do not help.

    Source: Guo et al. 2017.
    """
    if margins.mean() <= 0:
        return float("inf")
    if (margins >= 0).all():
        return 0.0

    def slope(scale: float) -> float:
        """Derivative of the mean log-likelihood, which is concave in 1 / temperature."""
        return (margins * torch.sigmoid(-scale * margins)).mean().item()

    low, high = 0.0, 1.0
    while slope(high) > 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 2 / (low + high)


def accuracy_by_subset(margins: Numbers, subsets: Sequence[str]) -> dict[str, Accuracy]:
    """Accuracy of the margins (N,), chosen minus rejected, in each subset, in order of names."""
    margins = torch.as_tensor(margins, dtype=torch.float64)
    if len(subsets) != len(margins):
        raise ValueError(f"there are {len(subsets)} subsets for {len(margins)} margins")
    rows: dict[str, list[int]] = {}
    for row, subset in enumerate(subsets):
        rows.setdefault(subset, []).append(row)
    right, accuracies = preferred(margins, -margins), {}
    for subset in sorted(rows):
        n, count = len(rows[subset]), right[rows[subset]].double().sum().item()
        accuracies[subset] = Accuracy(n, count / n, wilson_interval(count, n))
    return accuracies


def _auc(margins: Tensor, won: Tensor) -> float | None:
    """The probability that a margin that won is above one that lost; equal ones count half."""
    n = won.sum().item()
    if n in (0, len(won)):
        return None
    _, place, counts = margins.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(dim=0) - (counts - 1) / 2)[place]  # from 1, ties share their mean
    return (ranks[won == 1].sum().item() - n * (n + 1) / 2) / (n * (len(won) - n))
