"""Shaping of rewards, and steered coefficients."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.masking import masked_moments
from rlhf_core.policy_gradient.shaping import Coefficient, penalized, scaled


def test_a_coefficient_is_steered_to_its_target():
    """By hand: value *= 1 + clip(kl / target - 1, +-0.2) * n / horizon."""
    kl = Coefficient(0.05, 6.0, 10000)
    kl.update(6.6, 64)
    assert kl.value == pytest.approx(0.05 * (1 + 0.1 * 64 / 10000))
    kl.update(60.0, 64)
    assert kl.value == pytest.approx(0.05 * (1 + 0.1 * 64 / 10000) * (1 + 0.2 * 64 / 10000))
    entropy = Coefficient(0.01, 2.0, 1000, sign=-1)
    entropy.update(1.0, 100)
    assert entropy.value == pytest.approx(0.01 * 1.02)
    fixed = Coefficient(0.05, None, 10000)
    fixed.update(60.0, 64)
    assert fixed.value == 0.05


def test_penalties_are_subtracted_at_the_last_counted_token():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ended, others = torch.tensor([True, False]), dict(overlong_buffer=None, response_length=3)
    settings = dict(length_penalty=0.5, missing_eos_penalty=2.0, **others)
    of_responses, per_token = torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0, 2], [3, 0, 0]])
    assert penalized(of_responses, mask, ended, **settings).tolist() == [-0.5, -1.5]
    assert penalized(per_token, mask, ended, **settings).tolist() == [[1, 0, 0.5], [0.5, 0, 0]]
    none = dict(length_penalty=0.0, missing_eos_penalty=None)
    assert torch.equal(penalized(per_token, mask, ended, **none, **others), per_token)


def test_the_overlong_penalty_grows_from_0_to_1_over_the_buffer():
    """DAPO's eq. 13 by hand: length 10, a buffer of 4."""
    lengths = torch.tensor([1, 6, 7, 9, 10])
    mask = torch.arange(10) < lengths[:, None]
    got = penalized(
        torch.full((5,), 2.0),
        mask,
        lengths < 10,
        length_penalty=0.0,
        missing_eos_penalty=None,
        overlong_buffer=4,
        response_length=10,
    )
    assert got.tolist() == [2, 2, 1.75, 1.25, 1]


@pytest.mark.parametrize("subtract_mean", [False, True])
def test_scaled_scores_have_deviation_1_and_equal_ones_keep_their_scale(subtract_mean):
    mask = torch.tensor([[True, True], [True, False]])
    scores, per_token = torch.tensor([1.0, 5.0]), torch.tensor([[-2.0, 3.0], [5.0, 0.0]])
    moments = masked_moments(scores.double(), torch.ones(2, dtype=torch.bool))
    got = scaled(scores, mask, moments, subtract_mean=subtract_mean)
    assert got.std(correction=0) == 1 and got.mean() == (0 if subtract_mean else 1.5)
    tokens = scaled(per_token, mask, moments, subtract_mean=subtract_mean)
    assert_close(tokens.sum(dim=1), got)  # the mean is subtracted at the last token
    assert tokens[0, 0] == -1 and tokens[1, 1] == 0
    equal = masked_moments(torch.full((2,), 3.0, dtype=torch.float64), mask[0])
    got = scaled(torch.full((2,), 3.0), mask, equal, subtract_mean=subtract_mean)
    assert got.tolist() == [0.0 if subtract_mean else 3.0] * 2
