"""Advantages from the scores of other responses, against their papers' formulas row by row in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses.advantages import grpo_advantages, reinforce_pp_advantages, remax_advantages, rloo_advantages

BASELINES = {  # scores (P, n) as lists -> what the papers subtract and divide by, response by response
    "grpo": (grpo_advantages, lambda s, row, i: (s[row][i] - mean(s[row])) / (deviation(s[row], 1) + 1e-4)),
    "dr. grpo": (lambda s: grpo_advantages(s, normalize=False), lambda s, row, i: s[row][i] - mean(s[row])),
    "rloo": (rloo_advantages, lambda s, row, i: s[row][i] - mean(s[row][:i] + s[row][i + 1 :])),
    "reinforce++": (reinforce_pp_advantages, lambda s, row, i: (s[row][i] - mean(s[row])) / deviation(centred(s), 0)),
}


def mean(x):
    return math.fsum(x) / len(x)


def deviation(x, freedom):
    return math.sqrt(math.fsum((y - mean(x)) ** 2 for y in x) / (len(x) - freedom))


def centred(scores):
    return [y - mean(row) for row in scores for y in row]


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_baseline_is_its_papers(method, dtype):
    """Row 26: a 16-bit score is promoted before anything is subtracted; a group's other rows do not matter."""
    advantages_of, formula = BASELINES[method]
    torch.manual_seed(0)
    scores = (torch.randn(5, 8) * 3 + 100).to(dtype)
    found = advantages_of(scores)
    exact = scores.tolist()
    assert found.dtype == torch.float32
    assert_close(found.tolist(), [[formula(exact, row, i) for i in range(8)] for row in range(5)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_whose_scores_are_alike_has_no_advantage(method, dtype):
    """Row 26: exactly 0, though the mean of three times 0.1 is not 0.1; beside a group that differs, and alone."""
    advantages_of, _ = BASELINES[method]
    for value in (0.1, 1e6 + 0.1, -7.7):
        alike, differs = torch.full((1, 3), value, dtype=dtype), torch.tensor([[1.0, 2.0, 4.0]], dtype=dtype)
        assert not advantages_of(alike).any()
        found = advantages_of(torch.cat((alike, differs)))
        assert found.isfinite().all() and not found[0].any() and found[1].all()


def test_one_response_a_prompt_is_whitened_over_the_batch_or_compared_with_the_greedy_one():
    scores = torch.tensor([[1.0], [4.0], [1.0]], dtype=torch.bfloat16)
    assert_close(reinforce_pp_advantages(scores), torch.tensor([[-1.0], [2.0], [-1.0]]) / math.sqrt(2))
    assert not reinforce_pp_advantages(torch.full((3, 1), 0.1)).any()
    greedy = torch.tensor([0.5, 4.0, 1.5], dtype=torch.bfloat16)
    assert remax_advantages(scores, greedy).tolist() == [[0.5], [0.0], [-0.5]]
    assert remax_advantages(scores, greedy).dtype == torch.float32


@pytest.mark.parametrize("advantages_of", [grpo_advantages, rloo_advantages, reinforce_pp_advantages])
@pytest.mark.parametrize("shape", [(4,), (4, 0)])
def test_scores_that_are_no_groups_are_refused(advantages_of, shape):
    with pytest.raises(ValueError, match=r"needs scores \(P, n\) of n >= 2 responses a prompt, got shape \(4"):
        advantages_of(torch.zeros(shape))


@pytest.mark.parametrize("advantages_of", [grpo_advantages, rloo_advantages])
def test_a_group_of_one_has_no_baseline(advantages_of):
    with pytest.raises(ValueError, match=r"of n >= 2 responses a prompt, got shape \(4, 1\)"):
        advantages_of(torch.zeros(4, 1))
