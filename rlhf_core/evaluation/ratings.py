"""Win rates, and Elo ratings from pairwise wins."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.losses import preferred


def win_rate(scores: Tensor, other: Tensor) -> float:
    """Share of rows (N,) where `scores` is higher than `other`; a tie is one half.

    Raises:
        ValueError: the shapes differ, or a score is not a number.
    """
    if scores.ndim != 1 or scores.shape != other.shape or not len(scores):
        shapes = f"{tuple(scores.shape)} and {tuple(other.shape)}"
        raise ValueError(f"scores must be two tensors (N,), N >= 1, got {shapes}")
    for name, x in (("scores", scores), ("other", other)):
        if x.isnan().any():
            raise ValueError(f"{name} is NaN at row {int(x.isnan().int().argmax())}")
    return float(preferred(scores, other).mean())


def elo(wins: Tensor, *, prior: float = 0.0) -> Tensor:
    """Elo ratings (K,) float64 of K players, 0 for the first: 400 more means ten wins to one.

    They maximize the Bradley-Terry likelihood (Bradley & Terry 1952), by Newton's method.

    Args:
        wins: (K, K), how often the row's player beat the column's; a draw is half a win for both.
            The diagonal is ignored.
        prior: draws added between every two players. It keeps the rating of a player who won, or
            lost, all games finite.

    Raises:
        ValueError: the ratings are not finite (some players never lost to the others), or Newton's
            method does not converge.
    """
    wins = torch.as_tensor(wins, dtype=torch.float64)
    if (
        wins.ndim != 2
        or wins.shape[0] != wins.shape[1]
        or not len(wins)
        or not (wins.isfinite() & (wins >= 0)).all()
    ):
        raise ValueError(f"wins must be a square matrix of numbers of at least 0, got {wins}")
    wins = (wins + prior / 2).fill_diagonal_(1)
    reached = (wins > 0).double()
    for _ in range(len(wins).bit_length()):  # paths of twice the length
        reached = (reached @ reached > 0).double()
    if not reached.all():
        one, other = (reached == 0).nonzero()[0].tolist()
        raise ValueError(
            f"player {one} has beaten player {other} neither directly nor through others, so no "
            "finite ratings have the highest likelihood. prior=1 adds a draw between every two"
        )
    games, strengths = wins + wins.T, wins.new_zeros(len(wins))

    def likelihood(strengths: Tensor) -> Tensor:
        return (wins * F.logsigmoid(strengths[:, None] - strengths)).sum()

    for _ in range(1000):
        expected = torch.sigmoid(strengths[:, None] - strengths)
        slope = (wins * expected.T - wins.T * expected).sum(dim=1)
        curvature = games * expected * expected.T
        step = torch.linalg.solve(curvature.sum(dim=1).diag() - curvature + curvature.mean(), slope)
        change, size = float(step.max() - step.min()), 1.0
        # A step of at most 1 always climbs: log sigmoid's third derivative is at most its second.
        while size * change > 1 and likelihood(strengths + size * step) < likelihood(strengths):
            size /= 2
        strengths += size * step
        if change < 1e-9:  # the next one's would be its square
            break
    else:
        raise ValueError(f"no convergence in 1000 steps, the last one of size {change:.3g}")
    return (strengths - strengths[0]) * 400 / math.log(10)
