"""Win rates and Elo ratings."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.evaluation import elo, win_rate
from rlhf_core.evaluation.ratings import davidson, rate_players


def test_a_tie_is_half_a_win():
    scores, other = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 2.0, 4.0, -1.0])
    assert win_rate(scores, other) == 0.625


def test_ten_wins_to_one_are_400_points_and_draws_count_half():
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
    """The gradient of the likelihood is 0, also for lopsided tables; known ratings come back."""
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
    assert_close(elo(7 * wins), truth, rtol=1e-9, atol=1e-7)  # the diagonal is ignored
    assert_close(elo(wins.fill_diagonal_(99)), truth, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("upset", [0, 1])
def test_ratings_are_found_for_a_long_ladder(upset):
    """Each of 150 players beats the one below a million to one; the lowest may beat the highest."""
    wins = torch.zeros(150, 150, dtype=torch.float64)
    wins.diagonal(-1).fill_(1e6)
    wins.diagonal(1).fill_(1)
    wins[0, -1] = upset
    odds = (1e6 - upset) / (1 + upset)  # by symmetry of the games around the circle
    want = torch.arange(150, dtype=torch.float64) * 400 * math.log10(odds)
    assert_close(elo(wins), want, rtol=1e-12, atol=1e-7)


def test_a_single_player_has_rating_0():
    assert elo([[0]]).tolist() == elo([[3]]).tolist() == [0]


def test_ratings_that_do_not_converge_are_an_error(monkeypatch):
    monkeypatch.setattr(
        torch.linalg, "solve", lambda _, slope: torch.arange(2.0, dtype=torch.float64)
    )
    with pytest.raises(ValueError, match="in 1000 steps"):
        elo(torch.ones(2, 2))


def test_players_who_beat_each_other_in_a_circle_are_equal():
    wins = torch.eye(40).roll(1, dims=1)
    assert_close(elo(wins), torch.zeros(40, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_player_who_never_lost_is_an_error_without_a_prior():
    wins = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 2, 0]])  # player 2 lost to none
    with pytest.raises(ValueError, match=r"player 2 never lost to players \[0, 1\], so no finite"):
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


def test_players_who_never_met_or_lost_are_named(expected):
    group = expected["bt_degenerate"]
    with pytest.raises(ValueError, match=r"player 0 never lost to players \[1, 2\]"):
        elo(group["undefeated"]["wins"])
    with pytest.raises(ValueError, match=r"players \[0, 1\] and players \[2, 3\] never met"):
        elo(group["disconnected"]["wins"])
    for degenerate in (group["undefeated"]["wins"], group["disconnected"]["wins"]):
        assert elo(degenerate, prior=1).abs().max() < 1000


@pytest.fixture
def games(expected, pandalm):
    """First player, second player and outcome of each game; and the players' names."""
    players = expected["bt_pandalm"]["players"]
    rows = [
        (*map(players.index, row["models"].split("_")), {0: 0.5, 1: 1.0, 2: 0.0}[row["majority"]])
        for row in pandalm
    ]
    return *zip(*rows), players


def test_ratings_and_their_errors_agree_with_other_libraries(expected, games):
    """choix, statsmodels, arena-rank; of the bootstrap's bounds, to their noise."""
    group, (*rows, players) = expected["bt_pandalm"], games
    anchor = players.index(group["anchor"])
    found = rate_players(*rows, len(players), anchor=anchor)
    centred = rate_players(*rows, len(players), anchor=None, resamples=2)
    for i, name in enumerate(players):
        rating = found.elo[i].item()
        assert rating == pytest.approx(group["elo_choix"][name], abs=1e-6)
        want = group["arena_rank_centred"][name]
        assert 1000 + centred.elo[i].item() == pytest.approx(want["rating"], abs=1e-6)
        half = 1.959964 * centred.standard_errors[i].item()
        assert half == pytest.approx(want["upper"] - want["rating"], rel=2e-4)
        if i != anchor:
            assert rating == pytest.approx(group["elo_statsmodels"][name], abs=1e-6)
            error = found.standard_errors[i].item()
            assert error == pytest.approx(group["sandwich_se_elo"][name], rel=1e-6)
            bounds = [found.lower[i].item(), found.upper[i].item()]
            tolerance = group["bootstrap_tolerance_elo"]
            assert bounds == pytest.approx(group["bootstrap_ci95_300"][name], abs=tolerance)
    wins = torch.tensor(group["wins_with_half_ties"])
    assert_close(elo(wins) - elo(wins)[anchor], found.elo)


def test_ratings_do_not_depend_on_the_order_of_players_or_games(games):
    first, second, outcomes, _ = games
    found = rate_players(first, second, outcomes, 5, resamples=2)
    renamed = [4, 2, 0, 1, 3]
    swapped = rate_players(
        [renamed[i] for i in reversed(second)],
        [renamed[i] for i in reversed(first)],
        [1 - x for x in reversed(outcomes)],
        5,
        anchor=4,
        resamples=2,
    )
    assert_close(swapped.elo[renamed], found.elo)
    assert_close(swapped.standard_errors[renamed], found.standard_errors)


def test_repeated_games_of_a_prompt_make_no_rating_surer(games):
    first, second, outcomes, _ = games
    once = rate_players(first, second, outcomes, 5, resamples=2)
    prompts = [*range(len(first))] * 4
    again = rate_players(first * 4, second * 4, outcomes * 4, 5, clusters=prompts, resamples=2)
    assert_close(again.standard_errors, once.standard_errors)


def test_no_bootstrap_sample_has_an_undefeated_player():
    """A player who lost once in 40 games lost in every sample."""
    found = rate_players([0] * 40, [1] * 40, [0.0] * 39 + [1.0], 2)
    assert 0 < found.lower[1] < found.elo[1] < found.upper[1] < 2000
    with pytest.raises(ValueError, match="player 1 never lost"):
        rate_players([0] * 40, [1] * 40, [0.0] * 40, 2)


def test_the_prior_makes_the_rating_of_an_undefeated_player_finite_and_unsure():
    found = rate_players([0] * 40, [1] * 40, [0.0] * 40, 2, prior=1)
    assert_close(found.elo, elo([[0, 0], [40, 0]], prior=1))
    assert found.lower[1] < found.elo[1] - 100 and found.elo[1] + 300 < found.upper[1] < 2000


def test_davidsons_ties_agree_with_scipy(expected, games):
    """scipy's BFGS stops 1e-5 before the maximum, where our slope is 0."""
    group, (first, second, outcomes, players) = expected["bt_pandalm"], games
    wins, ties = torch.zeros(2, 5, 5, dtype=torch.float64)
    for i, j, outcome in zip(first, second, outcomes):
        if outcome == 0.5:
            ties[i, j] += 1
            ties[j, i] += 1
        else:
            wins[(i, j) if outcome else (j, i)] += 1
    assert (ties.sum() / 2, wins.sum() + ties.sum() / 2) == (group["ties"], group["games"])
    ratings, log_tie = davidson(wins, ties)
    ratings -= ratings[players.index(group["anchor"])].clone()
    for name, want in group["davidson"]["elo"].items():
        assert ratings[players.index(name)].item() == pytest.approx(want, abs=1e-4)
    assert log_tie == pytest.approx(group["davidson"]["log_tie_parameter"], abs=1e-6)
    with pytest.raises(ValueError, match="needs wins and ties"):
        davidson(wins, 0 * ties)


def test_davidsons_ratings_are_finite_or_an_error_that_names_the_prior():
    """Who wins or ties, and never loses, explains it ever better with a higher rating and v."""
    wins, ties = [[0, 5], [0, 0]], [[0, 600], [600, 0]]
    with pytest.raises(ValueError, match="no finite ratings and tie parameter"):
        davidson(wins, ties)
    ratings, _ = davidson(wins, ties, prior=1)
    assert -1000 < ratings[1] < 0
    ratings, log_tie = davidson([[0, 1], [3, 0]], [[0, 1469], [1469, 0]])  # nearly always ties
    assert ratings[1].item() == pytest.approx(400 * math.log10(3))
    assert log_tie == pytest.approx(math.log(1469 / 3**0.5))


def test_equal_players_tie_as_often_as_the_tie_parameter_says():
    ratings, log_tie = davidson([[0, 6], [6, 0]], [[0, 8], [8, 0]])
    v = math.exp(log_tie)
    assert ratings.abs().max() < 1e-9 and v / (2 + v) == pytest.approx(0.4)


@pytest.mark.parametrize("first, second", [([0], [0]), ([0], [2]), ([-1], [0])])
def test_games_between_unknown_players_are_refused(first, second):
    with pytest.raises(ValueError, match="two different players from 0 to 1"):
        rate_players(first, second, [1.0], 2)
