"""Advantages from other responses' scores, against the papers' formulas in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses.advantages import (
    grpo_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)

P, N, R = 5, 8, 6


def mean(x):
    return math.fsum(x) / len(x)


def deviation(x, freedom):
    return math.sqrt(math.fsum((y - mean(x)) ** 2 for y in x) / (len(x) - freedom))


def tokens(scores, kl=0.0, seed=3):
    """KL and mask (P, n, R) of responses of 1 to R tokens, for scores (P, n)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, R + 1, scores.shape, generator=generator)
    mask = torch.arange(R) < lengths[..., None]
    return kl * torch.rand(mask.shape, generator=generator) * mask, mask


def of_groups(estimate, baseline):
    """Applies a formula of the scores minus KL to all tokens of each response."""

    def formula(scores, kl, mask):
        scores = [[s - math.fsum(k) for s, k in zip(*row)] for row in zip(scores, kl)]
        return [[[baseline(row, i)] * R for i in range(N)] for row in scores]

    return estimate, formula


def reinforce_pp(scores, kl, mask):
    to_come = [
        [[s - mean(row) - math.fsum(k[t:]) for t in range(R)] for s, k in zip(row, ks)]
        for row, ks in zip(scores, kl)
    ]
    counted = [
        x for xs, ms in zip(to_come, mask) for x1, m1 in zip(xs, ms) for x, m in zip(x1, m1) if m
    ]
    return [
        [[(x - mean(counted)) / deviation(counted, 0) for x in xs] for xs in row] for row in to_come
    ]


BASELINES = {  # estimator, and the papers' version for scores (P, n), KL and mask (P, n, R)
    "grpo": of_groups(grpo_advantages, lambda s, i: (s[i] - mean(s)) / (deviation(s, 1) + 1e-4)),
    "dr. grpo": of_groups(
        lambda *x: grpo_advantages(*x, normalize=False), lambda s, i: s[i] - mean(s)
    ),
    "rloo": of_groups(rloo_advantages, lambda s, i: s[i] - mean(s[:i] + s[i + 1 :])),
    "reinforce++": (reinforce_pp_advantages, reinforce_pp),
    "remax": (
        lambda *x: remax_advantages(*x, greedy_scores=torch.arange(100.0, 100 + P)),
        lambda scores, kl, mask: [
            [[s - 100 - p - math.fsum(k[t:]) for t in range(R)] for s, k in zip(scores[p], kl[p])]
            for p in range(P)
        ],
    ),
}


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_every_baseline_is_its_papers(method, dtype, weight):
    """Row 26: a 16-bit score is promoted before any subtraction; other groups do not matter."""
    advantages_of, formula = BASELINES[method]
    torch.manual_seed(0)
    scores = (torch.randn(P, N) * 3 + 100).to(dtype)
    kl, mask = tokens(scores, weight)
    found = advantages_of(scores, kl, mask)
    want = torch.tensor(formula(scores.tolist(), kl.tolist(), mask.tolist())).masked_fill(~mask, 0)
    assert found.dtype == torch.float32
    assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["grpo", "dr. grpo", "rloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_whose_scores_are_alike_has_no_advantage(method, dtype):
    """Row 26: exactly 0, although the mean of three 0.1 is not 0.1; alone or with another group."""
    advantages_of, _ = BASELINES[method]
    for value in (0.1, 1e6 + 0.1, -7.7):
        alike, differs = (
            torch.full((1, 3), value, dtype=dtype),
            torch.tensor([[1.0, 2.0, 4.0]], dtype=dtype),
        )
        assert not advantages_of(alike, *tokens(alike)).any()
        both = torch.cat((alike, differs))
        _, mask = tokens(both)
        found = advantages_of(both, *tokens(both))
        assert found.isfinite().all() and not found[0].any() and found[1][mask[1]].all()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1])
def test_a_batch_whose_scores_are_all_alike_has_no_advantage_to_whiten(n, value):
    """Row 26."""
    scores = torch.full((4, n), value)
    assert not reinforce_pp_advantages(scores, *tokens(scores)).any()


def test_one_response_a_prompt_is_whitened_over_the_batch_or_compared_with_the_greedy_one():
    scores = torch.tensor([[1.0], [4.0], [1.0]], dtype=torch.bfloat16)
    kl, mask = torch.zeros(3, 1, 1), torch.ones(3, 1, 1, dtype=torch.bool)
    want = torch.tensor([-1.0, 2.0, -1.0]) / math.sqrt(2)
    assert_close(reinforce_pp_advantages(scores, kl, mask).flatten(), want)
    greedy = torch.tensor([0.5, 4.0, 1.5], dtype=torch.bfloat16)
    found = remax_advantages(scores, kl, mask, greedy_scores=greedy)
    assert found.flatten().tolist() == [0.5, 0.0, -0.5] and found.dtype == torch.float32


def test_reinforce_pp_whitens_tokens_not_responses():
    scores, mask = (
        torch.tensor([[1.0], [0.0]]),
        torch.tensor([[[True] * 3], [[True, False, False]]]),
    )
    found = reinforce_pp_advantages(scores, torch.zeros(2, 1, 3), mask)
    assert_close(found[:, 0, 0], torch.tensor([0.25, -0.75]) / math.sqrt(3 / 16))


@pytest.mark.parametrize("advantages_of", [grpo_advantages, rloo_advantages])
def test_a_group_of_one_has_no_baseline(advantages_of):
    scores = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"n >= 2 responses per prompt, got \(4, 1\)"):
        advantages_of(scores, *tokens(scores))
