"""Calibration of a reward model's margins."""

import math

import pytest
import torch

from rlhf_core.evaluation.calibration import (
    accuracy_by_subset,
    both_orders,
    fit_temperature,
    measure_calibration,
)


def test_calibration_agrees_with_scikit_learn(expected):
    group = expected["calibration"]
    found = measure_calibration(group["margins"], group["won"])
    names = dict(ece="ece_10_equal_width", temperature="best_temperature")
    for name, value in found._asdict().items():
        assert value == pytest.approx(group[names.get(name, name)], rel=1e-6), name


def test_calibrated_margins_are_calibrated_in_both_orders():
    """With the chosen response always first, every bin was won, and calibration looks bad."""
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    won = torch.rand(20_000, generator=generator) < torch.sigmoid(margins)
    chosen_first = margins.where(won, -margins)
    assert measure_calibration(*both_orders(chosen_first)).ece < 0.01
    assert measure_calibration(chosen_first, torch.ones(20_000)).ece > 0.2


def test_a_temperature_is_found_at_every_scale():
    margins = torch.tensor([3.0, 1.0, -1.0, 2.0], dtype=torch.float64)
    found = fit_temperature(margins)
    for scale in (1e-6, 1e6):
        assert fit_temperature(scale * margins) == pytest.approx(scale * found)
    assert fit_temperature(margins.abs()) == 0 and fit_temperature(-margins) == math.inf


def test_subsets_have_their_own_accuracy_and_ties_are_half_right():
    found = accuracy_by_subset([1.0, -1.0, 0.0, 2.0], ["b", "a", "b", "a"])
    assert list(found) == ["a", "b"]
    assert (found["a"].accuracy, found["b"].accuracy, found["b"].pairs) == (0.5, 0.75, 2)
    assert found["b"].interval[0] < 0.75 < found["b"].interval[1]


def test_malformed_margins_are_refused():
    with pytest.raises(ValueError, match="margins must be finite, and won must be 0 or 1"):
        measure_calibration([0.0, math.nan], [0, 1])
    with pytest.raises(ValueError, match="1 subsets for 2 margins"):
        accuracy_by_subset([0.0, 1.0], ["a"])
