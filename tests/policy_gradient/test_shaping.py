"""Shaping of rewards, and steered coefficients."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.masking import masked_moments
from rlhf_core.policy_gradient.experience import Experience
from rlhf_core.policy_gradient.report import add_importance
from rlhf_core.policy_gradient.shaping import (
    Coefficient,
    importance_ratio,
    importance_weight,
    penalized,
    scaled,
    weighted,
)
from rlhf_core.training.metrics import Metrics


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


# ---- importance weights

TRAINED = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, math.nan]])
SAMPLED = torch.tensor([[-1.5, -0.5, -0.6], [-1.0, -1.2, 7.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
RATIOS = [[math.exp(0.5), math.exp(-1.5), math.exp(0.1)], [math.exp(-2.0), math.exp(0.2), 1.0]]
SEQUENCES = [[math.exp(0.5 - 1.5 + 0.1)], [math.exp(-2.0 + 0.2)]]


def test_the_ratio_is_that_of_a_token_or_the_product_over_its_response():
    """Float64 by hand; what the mask hides is 1, whatever it held."""
    token = importance_ratio(TRAINED.double(), SAMPLED.double(), MASK, "token")
    assert_close(token, torch.tensor(RATIOS, dtype=torch.float64), rtol=1e-7, atol=0)
    sequence = importance_ratio(TRAINED.double(), SAMPLED.double(), MASK, "sequence")
    assert_close(sequence, torch.tensor(SEQUENCES, dtype=torch.float64), rtol=1e-7, atol=0)
    assert_close(importance_ratio(TRAINED, SAMPLED, MASK, "sequence"), sequence.float())


def test_weights_beyond_the_bounds_are_truncated_or_masked():
    ratio = torch.tensor([0.1, 0.5, 1.0, 2.0, 2.1, math.inf])
    assert importance_weight(ratio, 0.5, 2.0, "truncate").tolist() == [0.5, 0.5, 1, 2, 2, 2]
    assert importance_weight(ratio, 0.5, 2.0, "mask").tolist() == [0, 0.5, 1, 2, 0, 0]
    assert importance_weight(ratio[:1], 0.0, 2.0, "mask").tolist() == ratio[:1].tolist()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_multiply_the_advantages_of_their_tokens(level):
    ratio = importance_ratio(TRAINED, SAMPLED, MASK, level)
    advantages = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 0.0]])
    old = weighted(Experience(TRAINED, advantages, TRAINED), ratio)
    assert_close(old.advantages, advantages * ratio)
    assert old.importance.shape == advantages.shape


@pytest.mark.parametrize("level, count", [("token", 5), ("sequence", 2)])
def test_metrics_of_the_weights_count_tokens_or_responses(level, count):
    ratio = importance_ratio(TRAINED, SAMPLED, MASK, level)
    weight, metrics = importance_weight(ratio, 0.3, 1.2, "truncate"), Metrics()
    add_importance(metrics, ratio, weight, MASK, 0.3, 1.2)
    raw = [x for row, keep in zip(RATIOS, MASK.tolist()) for x, k in zip(row, keep) if k]
    raw = raw if level == "token" else [x for row in SEQUENCES for x in row]
    cut = [min(max(x, 0.3), 1.2) for x in raw]
    assert len(raw) == count
    assert metrics.means() == pytest.approx(
        {
            "importance/weight": sum(cut) / count,
            "weight_squared": sum(x * x for x in cut) / count,
            "importance/above_cap": sum(x > 1.2 for x in raw) / count,
            "importance/below_floor": sum(x < 0.3 for x in raw) / count,
        }
    )
