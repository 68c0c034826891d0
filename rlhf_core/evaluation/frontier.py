"""Which policies no other one beats on every objective, and how much they cover together.

An objective is a column, and higher is better: harmlessness and helpfulness, for example.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

Points = Tensor | Sequence[Sequence[float]]


def pareto_frontier(points: Points, duplicates: bool = True) -> Tensor:
    """Which of N points (N,) bool no other point dominates: is as good everywhere, better once.

    Args:
        points: (N, M), M objectives to maximize.
        duplicates: whether equal points of the frontier all belong to it; False: the first one.
    """
    points = _checked(points)
    as_good = (points[:, None] >= points).all(dim=2)  # (N, N) row against column
    better = as_good & (points[:, None] > points).any(dim=2)
    frontier = ~better.any(dim=0)
    if not duplicates:
        frontier &= ~(as_good & as_good.T).triu(diagonal=1).any(dim=0)
    return frontier


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """The volume of all that lies above the reference and below at least one of the points.

    Args:
        points: (N, M), M objectives to maximize. Points that are not above the reference in all
            objectives add nothing.
        reference: (M,), the worst values that count.

    Source: Zitzler & Thiele 1998; computed slice by slice, as in While et al. 2006.
    """
    points = _checked(points)
    reference = torch.as_tensor(reference, dtype=torch.float64)
    if reference.shape != points.shape[1:] or not reference.isfinite().all():
        raise ValueError(
            f"the reference must be {points.shape[1]} finite numbers, got {reference.tolist()}"
        )
    points = points - reference
    return _volume(points[(points > 0).all(dim=1)])


def _volume(points: Tensor) -> float:
    """The volume between 0 and points that are all positive."""
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return points.max().item()
    points = points[points[:, -1].argsort(descending=True)]
    heights = [*points[:, -1].tolist(), 0.0]
    slices = (  # a slice goes from the height of the next point to that of this one
        (top - bottom) * _volume(points[: i + 1, :-1])
        for i, (top, bottom) in enumerate(itertools.pairwise(heights))
        if top > bottom
    )
    return sum(slices)


def _checked(points: Points) -> Tensor:
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.ndim != 2 or not points.numel() or not points.isfinite().all():
        raise ValueError(f"points must be (N, M), N and M >= 1, and finite, got {points.tolist()}")
    return points
