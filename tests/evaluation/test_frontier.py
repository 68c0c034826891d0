"""Pareto frontiers and their hypervolume."""

import pytest
import torch

from rlhf_core.evaluation.frontier import hypervolume, pareto_frontier


def test_frontiers_agree_with_moocore(expected):
    for case in expected["pareto"]["cases"].values():
        points = case["points"]
        assert hypervolume(points, case["reference"]) == pytest.approx(case["hypervolume"], 1e-6)
        assert pareto_frontier(points, duplicates=False).tolist() == case["nondominated"]
        assert pareto_frontier(points).tolist() == case["nondominated_keep_weakly"]


def test_the_volume_of_three_objectives_is_that_of_a_grid():
    points = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = (points * 10).round() / 10
    cells = torch.cartesian_prod(*[torch.arange(10, dtype=torch.float64) / 10 + 0.05] * 3)
    covered = (cells[:, None] < points).all(dim=2).any(dim=1)
    assert hypervolume(points, [0, 0, 0]) == pytest.approx(covered.double().mean().item())


def test_malformed_points_are_refused():
    with pytest.raises(ValueError, match=r"must be \(N, M\), N and M >= 1, and finite"):
        pareto_frontier([[0.1, float("nan")]])
    with pytest.raises(ValueError, match="the reference must be 2 finite numbers"):
        hypervolume([[0.1, 0.2]], [0])
