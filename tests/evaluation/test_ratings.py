"""Win rates and Elo ratings."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.evaluation import elo, win_rate


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
    with pytest.raises(
        ValueError, match="player 0 has beaten player 2 neither directly nor through others"
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
