"""Evaluation: of a policy's own samples, of policies against each other, of the best of n by a proxy."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer
from rlhf_core.evaluation import best_of_n_curve, best_of_n_kl, elo, evaluate_policy, win_rate
from rlhf_core.models import Transformer, TransformerConfig


@torch.no_grad()
def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=259, hidden_size=16, num_layers=2, num_heads=2, max_positions=64, eos_ids=(2,)
    )
    model = Transformer(TransformerConfig(**(sizes | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


# ---- a policy


def scores_of(prompts, responses):
    return [float(len(response)) for response in responses]


def evaluated(policy, reference, **options):
    prompts = [[257, *b"hello"], [257, *b"ok"], [257]]
    options = dict(max_new_tokens=5) | options
    return evaluate_policy(policy, reference, prompts, scores_of, ByteTokenizer(), **options)


def test_evaluation_gives_a_score_and_a_kl_for_every_prompt():
    policy, other = (tiny(seed, eos_ids=(258,)) for seed in (0, 1))
    same = evaluated(policy, policy)
    assert len(same.responses) == len(same.scores) == len(same.kl) == len(same.lengths) == 3
    assert same.scores.tolist() == scores_of([], same.responses)
    assert_close(same.kl, torch.zeros(3), rtol=0, atol=1e-5)
    assert evaluated(policy, other).kl.mean() > 1
    assert (
        evaluated(policy, other, seed=0).responses
        == same.responses
        != evaluated(policy, other, seed=1).responses
    )


def test_evaluation_counts_the_tokens_of_a_response_and_its_end():
    never, always = (
        evaluated(tiny(), tiny(), eos_ids=eos_ids) for eos_ids in ((), tuple(range(259)))
    )
    assert never.lengths.tolist() == [5, 5, 5] and always.lengths.tolist() == [1, 1, 1]


def test_evaluation_leaves_dropout_out_whatever_the_mode():
    policy, reference = (tiny(dropout=0.5) for _ in range(2))
    want = evaluated(policy, reference)
    got = evaluated(policy.train(), reference.train())
    assert_close(got.kl, want.kl, rtol=0, atol=1e-5)
    assert policy.training and reference.training


def test_evaluation_does_not_depend_on_the_batch_size():
    """Row 32; every prompt has a seed of its own."""
    policy, reference = (tiny(seed) for seed in (0, 1))
    a, b = (evaluated(policy, reference, batch_size=size) for size in (1, 3))
    assert a.responses == b.responses
    assert_close(a.scores, b.scores)
    assert torch.equal(a.lengths, b.lengths)
    assert_close(a.kl, b.kl, rtol=1e-4, atol=1e-4)


def test_a_tie_is_half_a_win():
    assert (
        win_rate(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0])) == 0.625
    )


# ---- Elo


def test_two_players_are_four_hundred_apart_at_ten_to_one_and_draws_count_half():
    assert_close(
        elo(torch.tensor([[0, 10], [100, 0]])), torch.tensor([0, 400.0], dtype=torch.float64)
    )
    wins = torch.tensor([[0, 3 + 2.5], [9 + 2.5, 0]])  # 3 won, 9 lost, 5 drawn
    assert_close(elo(wins), torch.tensor([0, 400 * math.log10(11.5 / 5.5)], dtype=torch.float64))
    wins = torch.tensor([[0, 0], [3, 0]])
    assert_close(
        elo(wins, prior=1), torch.tensor([0, 400 * math.log10(3.5 / 0.5)], dtype=torch.float64)
    )


def test_ratings_expect_the_wins_that_each_player_had():
    """The likelihood's gradient is 0, in lopsided tables too, and for tables made of ratings it gives these back."""
    torch.manual_seed(0)
    for wins in (
        torch.randint(1, 9, (6, 6)),
        torch.rand(5, 5) ** 12 + 1e-9,
        torch.tensor([[0, 1e6, 0], [0, 0, 1], [1, 0, 0]]),
        torch.tensor(
            [[0, 30, 1e5, 4], [4e-3, 0, 1e5, 4e4], [0.02, 0.06, 0, 0.6], [0.4, 40, 1e6, 0]]
        ),
    ):
        wins = wins.double().fill_diagonal_(0)
        ratings = elo(wins)
        expected = 1 / (1 + 10 ** ((ratings - ratings[:, None]) / 400))
        assert_close(
            (wins + wins.T).mul(expected).fill_diagonal_(0).sum(dim=1),
            wins.sum(dim=1),
            rtol=1e-9,
            atol=1e-12,
        )
    truth = torch.tensor([0.0, 350.0, -80.0, 1200.0], dtype=torch.float64)
    wins = 1 / (1 + 10 ** ((truth - truth[:, None]) / 400))
    assert_close(elo(7 * wins), truth, rtol=1e-9, atol=1e-7)  # its diagonal says nothing
    assert_close(elo(wins.fill_diagonal_(99)), truth, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("upset", [0, 1])
def test_ratings_are_found_however_long_the_ladder(upset):
    """150 players, each of whom beats the one below a million to one, and perhaps the lowest one once the highest."""
    wins = torch.zeros(150, 150, dtype=torch.float64)
    wins.diagonal(-1).fill_(1e6)
    wins.diagonal(1).fill_(1)
    wins[0, -1] = upset
    odds = (1e6 - upset) / (1 + upset)  # the slopes of all games around the circle are alike
    want = torch.arange(150, dtype=torch.float64) * 400 * math.log10(odds)
    assert_close(elo(wins), want, rtol=1e-12, atol=1e-7)


def test_a_player_alone_has_the_rating_0():
    assert elo([[0]]).tolist() == elo([[3]]).tolist() == [0]


def test_ratings_that_are_not_found_are_not_told(monkeypatch):
    monkeypatch.setattr(
        torch.linalg, "solve", lambda _, slope: torch.arange(2.0, dtype=torch.float64)
    )
    with pytest.raises(
        ValueError, match="no likeliest ratings found in 1000 steps, the last one of 1"
    ):
        elo(torch.ones(2, 2))


def test_players_who_beat_each_other_in_a_long_circle_are_alike():
    wins = torch.eye(40).roll(1, dims=1)
    assert_close(elo(wins), torch.zeros(40, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_player_who_never_lost_is_named_unless_a_draw_is_added():
    wins = torch.tensor(
        [[0, 1, 0], [1, 0, 0], [0, 2, 0]]
    )  # the last one has beaten one, and lost to none
    with pytest.raises(
        ValueError, match="player 0 has beaten player 2 neither itself nor through others"
    ):
        elo(wins)
    ratings = elo(wins, prior=1)
    assert ratings[2] > ratings[0] > ratings[1]
    for bad in (
        torch.ones(2, 3),
        -torch.ones(2, 2),
        torch.full((2, 2), math.nan),
        torch.ones(0, 0),
    ):
        with pytest.raises(ValueError, match="wins must be a square matrix"):
            elo(bad)


# ---- best of n


def test_the_kl_of_best_of_n_is_that_of_the_distribution_of_a_maximum():
    """Without ties the best of n has density n F^(n - 1) against the policy's uniform quantile F."""
    quantile = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    for n in (1, 2, 5, 64):
        density = n * quantile ** (n - 1)
        assert abs(best_of_n_kl(n) - torch.special.xlogy(density, density).mean().item()) < 1e-4
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_n_kl(0)


def test_the_kl_is_an_upper_bound_where_responses_tie():
    probabilities = torch.tensor(
        [0.2, 0.5, 0.3], dtype=torch.float64
    )  # of three responses, the best one last
    below = probabilities.cumsum(dim=0)
    for n in (2, 4, 9):
        best = below**n - (below - probabilities) ** n
        assert (best * (best / probabilities).log()).sum() < best_of_n_kl(n)


def brute_force(proxy, gold, n):
    """Mean gold of the best by proxy over every subset of n and, where several are the best, over these."""
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


def test_the_curve_ends_at_the_mean_and_at_the_best_however_many_samples_there_are():
    torch.manual_seed(0)
    proxy, gold = torch.randn(4, 2000), torch.randn(4, 2000)
    curve = best_of_n_curve(proxy, gold)
    assert_close(curve[0], gold.double().mean())
    assert_close(curve[-1], gold.double().gather(1, proxy.argmax(dim=1, keepdim=True)).mean())
    assert (best_of_n_curve(proxy, proxy).diff() > 0).all()
    assert_close(best_of_n_curve(proxy, torch.ones(4, 2000)), torch.ones(2000, dtype=torch.float64))


def test_the_curve_refuses_what_has_no_order():
    for proxy, gold, message in (
        (torch.ones(2, 3), torch.ones(2, 4), r"\(2, 3\) and \(2, 4\)"),
        (torch.ones(3), torch.ones(3), r"\(3,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), r"\(0, 3\)"),
        (torch.tensor([[1.0, math.nan]]), torch.ones(1, 2), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            best_of_n_curve(proxy, gold)
