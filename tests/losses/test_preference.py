"""Preference losses against their closed forms, value and gradient."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    length_desensitized_weights,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)


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


def test_dpo_stays_finite_far_out():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    value = dpo_loss(far, torch.zeros(2), beta=1.0)
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


def test_length_desensitized_weights_apply_to_the_longer_completions_extra_tokens():
    lengths = torch.tensor([[4, 2], [0, 1], [3, 3]])
    expected = [1, 1, 0.25, 0.25, 1, 1, 0.25, *[1] * 6]
    assert length_desensitized_weights(lengths, alpha=0.25).tolist() == expected
