"""Losses of reward models against their closed forms, value and gradient."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import (
    bradley_terry_loss,
    centering_loss,
    margin_ranking_loss,
    plackett_luce_loss,
    preferred,
)

NAN = float("nan")


def leaves(*columns):
    return [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in columns]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return math.log(sigmoid(x))


# Each loss of a pair is a function of the margin, chosen - rejected.
CHOSEN, REJECTED = [1.0, -0.4, 0.25], [0.2, 0.8, 0.25]
MARGINS = [a - b for a, b in zip(CHOSEN, REJECTED)]
PAIR_LOSSES = {  # name: (loss, its value and its slope at a margin m)
    "bradley_terry": (bradley_terry_loss, lambda m: -log_sigmoid(m), lambda m: -sigmoid(-m)),
    "bradley_terry with a margin": (
        lambda c, r: bradley_terry_loss(c, r, margin=0.5),
        lambda m: -log_sigmoid(m - 0.5),
        lambda m: -sigmoid(0.5 - m),
    ),
    "bradley_terry with noise": (
        lambda c, r: bradley_terry_loss(c, r, label_smoothing=0.1),
        lambda m: -0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m),
        lambda m: 0.1 - sigmoid(-m),
    ),
    "margin_ranking": (
        lambda c, r: margin_ranking_loss(c, r, margin=0.5),
        lambda m: max(0.0, 0.5 - m),
        lambda m: -1.0 if m < 0.5 else 0.0,
    ),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_loss_has_its_closed_form_and_gradient(name):
    loss, value, slope = PAIR_LOSSES[name]
    chosen, rejected = leaves(CHOSEN, REJECTED)
    got = loss(chosen, rejected)
    assert_close(got.tolist(), [value(m) for m in MARGINS])
    got.sum().backward()
    assert_close(chosen.grad.tolist(), [slope(m) for m in MARGINS])
    assert_close(rejected.grad.tolist(), [-slope(m) for m in MARGINS])


def test_bradley_terry_stays_finite_far_out():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    value = bradley_terry_loss(far, torch.zeros(2))
    assert value.tolist() == [0.0, 1e4]
    (gradient,) = torch.autograd.grad(value.sum(), far)
    assert gradient.tolist() == [0.0, -1.0]


def test_a_margin_may_differ_by_pair():
    chosen, rejected = leaves(CHOSEN, REJECTED)
    margin = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    for loss in (bradley_terry_loss, margin_ranking_loss):
        each = [loss(c - m, r, margin=0.0) for c, r, m in zip(chosen, rejected, margin.tolist())]
        assert_close(loss(chosen, rejected, margin=margin), torch.stack(each))


def test_centering_is_least_where_a_pair_cancels():
    chosen, rejected = leaves([2.0, 1.0], [-2.0, 0.5])
    loss = centering_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2.25]
    assert chosen.grad.tolist() == rejected.grad.tolist() == [0.0, 3.0]


def test_a_tie_counts_one_half():
    assert preferred(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [
        1.0,
        0.5,
        0.0,
    ]


def test_plackett_luce_of_two_is_bradley_terry():
    scores = torch.randn(20, 2, dtype=torch.float64)
    both = torch.ones(20, 2, dtype=torch.bool)
    assert_close(plackett_luce_loss(scores, both), bradley_terry_loss(*scores.unbind(dim=1)))


def test_plackett_luce_probabilities_of_all_orders_add_up_to_one():
    scores = torch.randn(4, dtype=torch.float64)
    orders = torch.stack([scores[list(order)] for order in itertools.permutations(range(4))])
    loss = plackett_luce_loss(orders, torch.ones_like(orders, dtype=torch.bool))
    assert_close(loss.neg().exp().sum().item(), 1.0)


def test_plackett_luce_ignores_scores_after_a_lists_end():
    scores = torch.tensor(
        [[1.0, 0.5, -1.0, NAN], [0.3, NAN, NAN, NAN], [NAN] * 4], requires_grad=True
    )
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    loss = plackett_luce_loss(scores, mask)
    whole = plackett_luce_loss(scores[:1, :3], mask[:1, :3])
    assert_close(loss, torch.stack((whole[0], torch.tensor(0.0), torch.tensor(0.0))))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient.isfinite().all() and not gradient[~mask].any()
