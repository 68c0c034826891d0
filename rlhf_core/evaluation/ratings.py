"""Win rates, and ratings of players from their games, on Elo's scale: 400 more is ten wins to one.

Ratings maximize a likelihood, so the order and the names of the players do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.evaluation.comparisons import (
    Numbers,
    bootstrap,
    checked_outcomes,
    group_ids,
    percentile_interval,
    sandwich,
    vectors,
)
from rlhf_core.losses import preferred

POINTS = 400 / math.log(10)  # of Elo, for one unit of log-odds


class Ratings(NamedTuple):
    """Elo ratings of K players, with their errors."""

    elo: Tensor  # (K,) float64
    standard_errors: Tensor  # (K,) by the sandwich estimate, clustered
    lower: Tensor  # (K,) percentiles of the Bayesian bootstrap by cluster
    upper: Tensor  # (K,)


def win_rate(scores: Tensor, other: Tensor) -> float:
    """Share of rows (N,) where `scores` is higher than `other`; a tie is one half.

    Raises:
        ValueError: the shapes differ, or a score is not a number.
    """
    if scores.ndim != 1 or scores.shape != other.shape or not len(scores):
        shapes = f"{tuple(scores.shape)} and {tuple(other.shape)}"
        raise ValueError(f"scores must be two tensors (N,), N >= 1, got {shapes}")
    for name, x in (("scores", scores), ("other", other)):
        if x.isnan().any():
            raise ValueError(f"{name} is NaN at row {int(x.isnan().int().argmax())}")
    return float(preferred(scores, other).mean())


def elo(wins: Tensor, *, prior: float = 0.0) -> Tensor:
    """Elo ratings (K,) float64 of K players, 0 for the first.

    They maximize the Bradley-Terry likelihood (Bradley & Terry 1952), by Newton's method.

    Args:
        wins: (K, K), how often the row's player beat the column's; a draw is half a win for both.
            The diagonal is ignored.
        prior: draws added between every two players. It keeps the rating of a player who won, or
            lost, all games finite.

    Raises:
        ValueError: the ratings are not finite, because some players never met the others, or never
            lost to them; or Newton's method does not converge.
    """
    strengths = _strengths(_games(wins, prior))
    return (strengths - strengths[0]) * POINTS


def rate_players(
    first: Sequence[int],
    second: Sequence[int],
    outcomes: Numbers,
    players: int,
    *,
    anchor: int | None = 0,
    clusters: Sequence | None = None,
    prior: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Ratings:
    """`elo` from single games, with standard errors and intervals.

    Args:
        first, second: (N,), the players of each game, from 0 to players - 1.
        outcomes: (N,), 1 if the first one won, 0 if the second one did, 0.5 for a draw.
        anchor: the player whose rating is 0; None: the mean of all is 0.
        clusters: as for `compare`: the prompt of each game.
        prior: as for `elo`. In a bootstrap sample these draws have random weights, too, so that the
            interval of a player who won all games is wide.

    Raises:
        ValueError: as for `elo`.
    """
    first, second, outcomes = vectors("players and outcomes of games", first, second, outcomes)
    outcomes, both = checked_outcomes(outcomes), torch.stack((first, second)).long()
    if (both < 0).any() or (both >= players).any() or (first == second).any():
        raise ValueError(f"a game needs two different players from 0 to {players - 1}")
    groups = group_ids(clusters, len(outcomes))
    # The prior's draws are games of weight `prior`, each with a cluster of its own.
    pairs = torch.triu_indices(players, players, 1)[:, : None if prior else 0]
    first, second = torch.cat((both, pairs), dim=1)
    groups = torch.cat((groups, groups.max() + 1 + torch.arange(pairs.shape[1])))
    weights = torch.cat((torch.ones_like(outcomes), outcomes.new_full(pairs[0].shape, prior)))
    outcomes = torch.cat((outcomes, outcomes.new_full(pairs[0].shape, 0.5)))
    G, N = int(groups.max()) + 1, len(outcomes)
    cells = outcomes.new_zeros(G, players * players)  # wins in each cluster
    cells.index_put_((groups, first * players + second), weights * outcomes, accumulate=True)
    cells.index_put_((groups, second * players + first), weights * (1 - outcomes), accumulate=True)
    wins = _games(cells.sum(dim=0).view(players, players), 0.0)
    strengths = _strengths(wins)

    shift = torch.eye(players, dtype=torch.float64)
    shift -= 1 / players if anchor is None else shift[anchor].clone()
    residuals = weights * (outcomes - torch.sigmoid(strengths[first] - strengths[second]))
    scores = outcomes.new_zeros(N, players)
    rows = torch.arange(N)
    scores[rows, first], scores[rows, second] = residuals, -residuals
    covariance = shift @ sandwich(_curvature(wins, strengths), scores, groups) @ shift.T

    def ratings_of(weights: Tensor) -> Tensor:
        wins = (weights @ cells).view(-1, players, players)
        return _strengths(_games(wins, 0.0)) @ shift.T * POINTS

    samples = bootstrap(ratings_of, G, resamples, seed)
    bounds = [percentile_interval(samples[:, i], confidence) for i in range(players)]
    lower, upper = torch.tensor(bounds, dtype=torch.float64).unbind(dim=1)
    errors = covariance.diagonal().clamp_min(0).sqrt()
    return Ratings(shift @ strengths * POINTS, errors * POINTS, lower, upper)


def davidson(wins: Tensor, ties: Tensor, *, prior: float = 0.0) -> tuple[Tensor, float]:
    """Elo ratings (K,) float64, 0 for the first, where a tie is an outcome of its own.

    P(i beats j) and P(tie) are as s_i to v sqrt(s_i s_j), for strengths s = 10^(rating / 400).

    Args:
        wins: (K, K), how often the row's player beat the column's, without ties.
        ties: (K, K), symmetric: how often the two tied.
        prior: games added between every two players, a third of them each of the three outcomes.

    Returns:
        The ratings, and log v: equal players tie with the probability v / (2 + v).

    Raises:
        ValueError: as for `elo`. Finite ratings need more than there: a player who only won or tied
            against the others has none, and without ties, or with nothing else, v has no value.

    Source: Davidson 1970.
    """
    wins, ties = (torch.as_tensor(x, dtype=torch.float64) for x in (wins, ties))
    if ties.shape != wins.shape or not torch.equal(ties, ties.mT):
        raise ValueError("ties must be a symmetric matrix of the shape of wins")
    _games(wins + ties / 2, prior)  # raises
    K = len(wins)
    i, j = torch.triu_indices(K, K, 1)
    counts = torch.stack((wins[i, j], wins[j, i], ties[i, j]), dim=1) + prior / 3  # (pairs, 3)
    if not counts[:, :2].any() or not counts[:, 2].any():
        raise ValueError("Davidson's model needs wins and ties; without ties, use `elo`")
    # The logits of the three outcomes are linear in log v and the log-strengths, the first one 0.
    log_v, *players = torch.eye(K, dtype=torch.float64)
    players = torch.stack((torch.zeros_like(log_v), *players))
    features = torch.stack((players[i], players[j], (players[i] + players[j]) / 2 + log_v), dim=1)
    games, parameters = counts.sum(dim=1), log_v * 0
    for _ in range(200):
        p = (features @ parameters).softmax(dim=1)
        slope = torch.einsum("po,pof->f", counts - games[:, None] * p, features)
        means = torch.einsum("po,pof->pf", p, features)
        curvature = torch.einsum("p,po,pof,pog->fg", games, p, features, features)
        curvature -= torch.einsum("p,pf,pg->fg", games, means, means)
        step, failed = torch.linalg.solve_ex(curvature, slope)
        change = step.abs().max().item()
        if failed or math.isnan(change):
            break
        parameters = parameters + step / max(1, change)
        if change < 1e-9:
            return players @ parameters * POINTS, parameters[0].item()
    raise ValueError(
        "no finite ratings and tie parameter have the highest likelihood. prior=1 adds a game "
        "between every two players"
    )


def _games(wins: Tensor, prior: float) -> Tensor:
    """Checked wins (..., K, K) with the prior's draws; the diagonal is 1.

    Raises:
        ValueError: a matrix has no finite ratings with the highest likelihood.
    """
    wins = torch.as_tensor(wins, dtype=torch.float64)
    if (
        wins.ndim < 2
        or wins.shape[-1] != wins.shape[-2]
        or not wins.shape[-1]
        or not (wins.isfinite() & (wins >= 0)).all()
    ):
        raise ValueError(f"wins must be a square matrix of numbers of at least 0, got {wins}")
    wins = wins + prior / 2
    wins.diagonal(dim1=-2, dim2=-1).fill_(1)
    reached = _paths(wins > 0)
    if not reached.all():
        bad = (~reached).flatten(start_dim=-2).any(dim=-1)
        _refuse(wins[bad][0])
    return wins


def _paths(edges: Tensor) -> Tensor:
    """Which nodes reach which, from a bool matrix (..., K, K) whose diagonal is true."""
    reached = edges.double()
    for _ in range(edges.shape[-1].bit_length()):  # paths of twice the length
        reached = (reached @ reached > 0).double()
    return reached > 0


def _refuse(wins: Tensor) -> None:
    """Raise ValueError with the players by whom a matrix (K, K) has no finite ratings."""
    met = _paths((wins + wins.mT) > 0)[0]
    remedy = "no finite ratings have the highest likelihood. prior=1 adds a draw between every two"
    if not met.all():
        one, other = met.nonzero().flatten().tolist(), (~met).nonzero().flatten().tolist()
        raise ValueError(f"players {one} and players {other} never met, so {remedy}")
    reached = _paths(wins > 0)
    beaten = (reached & ~reached.mT).any(dim=0)  # by a player whom they never beat, directly or not
    top = int((~beaten).int().argmax())
    group = reached[top] & reached[:, top]
    best, rest = (x.nonzero().flatten().tolist() for x in (group, ~group))
    name = f"player {best[0]}" if len(best) == 1 else f"players {best}"
    raise ValueError(f"{name} never lost to players {rest}, so {remedy}")


def _strengths(wins: Tensor) -> Tensor:
    """The log-strengths (..., K), up to a constant, of highest likelihood for wins of `_games`."""
    strengths = wins.new_zeros(wins.shape[:-1])

    def likelihood(strengths: Tensor) -> Tensor:
        return (wins * F.logsigmoid(_differences(strengths))).sum(dim=(-2, -1))

    for _ in range(1000):
        expected = torch.sigmoid(_differences(strengths))
        slope = (wins * expected.mT - wins.mT * expected).sum(dim=-1)
        curvature = _curvature(wins, strengths)
        # The likelihood ignores a constant; this fixes it.
        curvature += (wins * expected * expected.mT).mean(dim=(-2, -1), keepdim=True)
        step = torch.linalg.solve(curvature, slope)
        change, size = step.amax(dim=-1) - step.amin(dim=-1), wins.new_ones(wins.shape[:-2])
        # A step of at most 1 always climbs: log sigmoid's third derivative is at most its second.
        before = likelihood(strengths)
        while True:
            new = strengths + size[..., None] * step
            falls = (size * change > 1) & (likelihood(new) < before)
            if not falls.any():
                break
            size = torch.where(falls, size / 2, size)
        strengths = new
        if change.max() < 1e-9:  # the next one's would be its square
            return strengths
    raise ValueError(f"no convergence in 1000 steps, the last one of size {change.max():.3g}")


def _curvature(wins: Tensor, strengths: Tensor) -> Tensor:
    """Hessian (..., K, K) of the negative log-likelihood; its null space is the constant."""
    expected = torch.sigmoid(_differences(strengths))
    weights = (wins + wins.mT) * expected * expected.mT
    return weights.sum(dim=-1).diag_embed() - weights


def _differences(strengths: Tensor) -> Tensor:
    return strengths[..., :, None] - strengths[..., None, :]
