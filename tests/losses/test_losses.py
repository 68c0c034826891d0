"""Each loss against its closed form, value and gradient."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import (
    bradley_terry_loss,
    centering_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    length_desensitized_weights,
    margin_ranking_loss,
    orpo_loss,
    plackett_luce_loss,
    preferred,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_core.losses.kl import kl_loss
from rlhf_core.ops import full_kl, kl_estimate

NAN = float("nan")


def leaves(*columns):
    return [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in columns]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return math.log(sigmoid(x))


# ---- pairs: each loss is a function of the margin, chosen - rejected

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
    "dpo": (
        lambda c, r: dpo_loss(c, r, beta=0.5),
        lambda m: -log_sigmoid(0.5 * m),
        lambda m: -0.5 * sigmoid(-0.5 * m),
    ),
    "cdpo": (
        lambda c, r: dpo_loss(c, r, beta=0.5, label_smoothing=0.2),
        lambda m: -0.8 * log_sigmoid(0.5 * m) - 0.2 * log_sigmoid(-0.5 * m),
        lambda m: 0.5 * (0.2 - sigmoid(-0.5 * m)),
    ),
    "robust_dpo": (
        lambda c, r: robust_dpo_loss(c, r, beta=0.5, label_smoothing=0.2),
        lambda m: (-0.8 * log_sigmoid(0.5 * m) + 0.2 * log_sigmoid(-0.5 * m)) / 0.6,
        lambda m: -0.5 * (0.8 * sigmoid(-0.5 * m) + 0.2 * sigmoid(0.5 * m)) / 0.6,
    ),
    "ipo": (lambda c, r: ipo_loss(c, r, beta=0.5), lambda m: (m - 1) ** 2, lambda m: 2 * (m - 1)),
    "hinge": (
        lambda c, r: hinge_loss(c, r, beta=2.0),
        lambda m: max(0.0, 1 - 2 * m),
        lambda m: -2.0 if 2 * m < 1 else 0.0,
    ),
    "simpo": (
        lambda c, r: simpo_loss(c, r, beta=2.0, gamma=0.5),
        lambda m: -log_sigmoid(2 * m - 0.5),
        lambda m: -2 * sigmoid(0.5 - 2 * m),
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


@pytest.mark.parametrize("loss", [bradley_terry_loss, lambda c, r: dpo_loss(c, r, beta=1.0)])
def test_a_pair_loss_stays_finite_far_out(loss):
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    value = loss(far, torch.zeros(2))
    assert value.tolist() == [0.0, 1e4]
    (gradient,) = torch.autograd.grad(value.sum(), far)
    assert gradient.tolist() == [0.0, -1.0]


def test_dpo_of_the_reference_itself_is_log_two_to_the_last_bit():
    assert (dpo_loss(torch.zeros(50), torch.zeros(50), beta=0.1) == torch.tensor(2.0).log()).all()


def test_robust_dpo_is_unbiased_for_flipped_labels():
    """Its mean over labels flipped at that rate is DPO's loss of the clean label; cDPO's is not."""
    chosen, rejected = leaves(CHOSEN, REJECTED)
    settings = dict(beta=0.5, label_smoothing=0.2)
    clean, flipped = (
        robust_dpo_loss(chosen, rejected, **settings),
        robust_dpo_loss(rejected, chosen, **settings),
    )
    assert_close(0.8 * clean + 0.2 * flipped, dpo_loss(chosen, rejected, beta=0.5))


def test_a_margin_may_differ_by_pair():
    chosen, rejected = leaves(CHOSEN, REJECTED)
    margin = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    for loss in (bradley_terry_loss, margin_ranking_loss):
        each = [loss(c - m, r, margin=0.0) for c, r, m in zip(chosen, rejected, margin.tolist())]
        assert_close(loss(chosen, rejected, margin=margin), torch.stack(each))


def test_orpo_is_the_cross_entropy_and_the_log_sigmoid_of_the_odds_ratio():
    chosen, rejected = leaves([-0.3, -1.5], [-0.9, -0.2])
    loss = orpo_loss(chosen, rejected, orpo_lambda=0.4)

    def odds(logp):
        return math.exp(logp) / (1 - math.exp(logp))

    ratios = [odds(c) / odds(r) for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert_close(
        loss.tolist(), [-c - 0.4 * math.log(r / (1 + r)) for c, r in zip(chosen.tolist(), ratios)]
    )
    loss.sum().backward()
    # The slope of log odds is 1 / (1 - p).
    slope = [1 / (1 + ratio) / (1 - math.exp(c)) for ratio, c in zip(ratios, chosen.tolist())]
    assert_close(chosen.grad.tolist(), [-1 - 0.4 * s for s in slope])


def test_orpo_stays_finite_where_a_completion_is_certain():
    chosen, rejected = leaves([0.0, -1.0], [-1.0, 0.0])
    loss = orpo_loss(chosen, rejected, orpo_lambda=1.0)
    loss.sum().backward()
    assert all(x.isfinite().all() for x in (loss, chosen.grad, rejected.grad))


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


# ---- single completions


def test_kto_weighs_gains_and_losses_against_the_reference_point():
    (log_ratios,) = leaves([1.0, -2.0, 0.5])
    (kl,) = leaves(0.3)
    desirable = torch.tensor([True, False, False])
    loss = kto_loss(
        log_ratios, desirable, kl, beta=0.5, desirable_weight=1.5, undesirable_weight=0.7
    )
    gains = [0.5 * (1.0 - 0.3), -0.5 * (-2.0 - 0.3), -0.5 * (0.5 - 0.3)]
    assert_close(
        loss.tolist(),
        [w * (1 - sigmoid(g)) for w, g in zip((1.5, 0.7, 0.7), gains)],
        rtol=1e-6,
        atol=1e-6,
    )
    loss.sum().backward()
    slopes = [sigmoid(g) * sigmoid(-g) * 0.5 for g in gains]
    expected = [-1.5 * slopes[0], 0.7 * slopes[1], 0.7 * slopes[2]]
    assert_close(log_ratios.grad.tolist(), expected, rtol=1e-6, atol=1e-6)
    assert kl.grad is None


def test_length_desensitized_weighs_what_only_the_longer_completion_has():
    lengths = torch.tensor([[4, 2], [0, 1], [3, 3]])
    expected = [1, 1, 0.25, 0.25, 1, 1, 0.25, *[1] * 6]
    assert length_desensitized_weights(lengths, alpha=0.25).tolist() == expected


# ---- ranked lists


def test_plackett_luce_of_two_is_bradley_terry():
    scores = torch.randn(20, 2, dtype=torch.float64)
    both = torch.ones(20, 2, dtype=torch.bool)
    assert_close(plackett_luce_loss(scores, both), bradley_terry_loss(*scores.unbind(dim=1)))


def test_plackett_luce_probabilities_of_all_orders_add_up_to_one():
    scores = torch.randn(4, dtype=torch.float64)
    orders = torch.stack([scores[list(order)] for order in itertools.permutations(range(4))])
    loss = plackett_luce_loss(orders, torch.ones_like(orders, dtype=torch.bool))
    assert_close(loss.neg().exp().sum().item(), 1.0)


def test_plackett_luce_ignores_what_is_behind_a_lists_end():
    scores = torch.tensor(
        [[1.0, 0.5, -1.0, NAN], [0.3, NAN, NAN, NAN], [NAN] * 4], requires_grad=True
    )
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    loss = plackett_luce_loss(scores, mask)
    whole = plackett_luce_loss(scores[:1, :3], mask[:1, :3])
    assert_close(loss, torch.stack((whole[0], torch.tensor(0.0), torch.tensor(0.0))))
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient.isfinite().all() and not gradient[~mask].any()


# ---- the KL in the loss


@pytest.mark.parametrize("moved", [False, True], ids=["on-policy", "after updates"])
def test_the_kl_in_the_loss_has_the_gradient_of_the_exact_kl(moved):
    """Row 18: with a vocabulary of 7 the mean over samples is an exact weighted sum."""
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    old = (logits + 0.5 * torch.randn(7, dtype=torch.float64) * moved).log_softmax(0)
    logits.requires_grad_()
    exact = full_kl(logits[None], ref_logits[None])[0]
    (slope,) = torch.autograd.grad(exact, logits)

    def mean_over_samples(loss_of):
        columns = (x[None] for x in (logits.log_softmax(0), old, ref_logits.log_softmax(0)))
        mean = (old.exp() * loss_of(*columns, torch.ones(1, 7, dtype=torch.bool))[0]).sum()
        return mean.detach(), *torch.autograd.grad(mean, logits)

    for estimator in ("k1", "k3"):
        value, gradient = mean_over_samples(lambda *x, e=estimator: kl_loss(*x, estimator=e))
        assert_close(value, exact.detach())
        assert_close(gradient, slope)
    value, gradient = mean_over_samples(lambda *x: kl_loss(*x, estimator="k2"))
    assert_close(gradient, slope)
    assert not torch.allclose(value, exact.detach())  # as its docstring says
    for estimator in ("k1", "k3"):  # differentiated directly, it does not
        _, naive = mean_over_samples(
            lambda lp, _, ref, mask, e=estimator: kl_estimate(lp, ref, estimator=e, mask=mask)
        )
        assert (naive - slope).norm() > 0.1 * slope.norm()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_in_the_loss_stays_finite_far_out_and_what_is_masked_adds_nothing(estimator):
    logprobs = torch.tensor([[-100.0, -0.1, -3.0, math.nan]], requires_grad=True)
    old, ref = (
        torch.tensor([[-0.1, -200.0, -3.0, math.inf]]),
        torch.tensor([[-0.1, -100.0, -3.0, math.nan]]),
    )
    mask = torch.tensor([[True, True, True, False]])
    loss = kl_loss(logprobs, old, ref, mask, estimator=estimator)
    loss.sum().backward()
    assert loss.isfinite().all() and logprobs.grad.isfinite().all()
    assert loss[0, 2:].tolist() == [0, 0] and logprobs.grad[0, 3] == 0
