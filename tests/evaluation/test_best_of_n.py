"""Best-of-n: its KL to the policy, and its curve of expected scores."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.evaluation import best_of_n_curve, best_of_n_kl


def test_the_kl_is_that_of_the_distribution_of_a_maximum():
    """Without ties the best of n has density n F^(n - 1) in the policy's uniform quantile F."""
    quantile = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (1, 2, 5, 64):
        density = n * quantile ** (n - 1)
        assert abs(best_of_n_kl(n) - torch.special.xlogy(density, density).mean().item()) < 1e-4
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n_kl(0)


def test_the_kl_is_an_upper_bound_when_responses_tie():
    # Of three responses, the best one last.
    probabilities = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    below = probabilities.cumsum(dim=0)
    for n in (2, 4, 9):
        best = below**n - (below - probabilities) ** n
        assert (best * (best / probabilities).log()).sum() < best_of_n_kl(n)


def brute_force(proxy, gold, n):
    """Mean gold of the best by proxy over every subset of n; of several best their mean."""
    means = []
    for row, values in zip(proxy.tolist(), gold.tolist()):
        for subset in itertools.combinations(range(len(row)), n):
            best = max(row[i] for i in subset)
            winners = [values[i] for i in subset if row[i] == best]
            means.append(sum(winners) / len(winners))
    return sum(means) / len(means)


@pytest.mark.parametrize("levels", [1000, 3, 1], ids=["no ties", "ties", "all tie"])
def test_the_curve_is_the_mean_over_all_subsets(levels):
    torch.manual_seed(levels)
    proxy, gold = torch.randint(levels, (3, 7)).float(), torch.randn(3, 7)
    want = torch.tensor([brute_force(proxy, gold, n) for n in range(1, 8)], dtype=torch.float64)
    assert_close(best_of_n_curve(proxy, gold), want, rtol=1e-6, atol=1e-6)
    if levels == 1:
        assert_close(want, gold.double().mean().expand(7), rtol=1e-6, atol=1e-6)


def test_the_curve_goes_from_the_mean_to_the_best():
    torch.manual_seed(0)
    proxy, gold = torch.randn(4, 2000), torch.randn(4, 2000)
    curve = best_of_n_curve(proxy, gold)
    assert_close(curve[0], gold.double().mean())
    assert_close(curve[-1], gold.double().gather(1, proxy.argmax(dim=1, keepdim=True)).mean())
    assert (best_of_n_curve(proxy, proxy).diff() > 0).all()
    assert_close(best_of_n_curve(proxy, torch.ones(4, 2000)), torch.ones(2000, dtype=torch.float64))


def test_bad_scores_are_refused():
    for proxy, gold, message in (
        (torch.ones(2, 3), torch.ones(2, 4), r"\(2, 3\) and \(2, 4\)"),
        (torch.ones(3), torch.ones(3), r"\(3,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), r"\(0, 3\)"),
        (torch.tensor([[1.0, math.nan]]), torch.ones(1, 2), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            best_of_n_curve(proxy, gold)
