"""Each loss against its closed form, value and gradient."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import bradley_terry_loss, dpo_loss

NAN = float("nan")


def leaves(*columns):
    return [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in columns]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- pairs


def test_bradley_terry_value_and_gradient():
    chosen, rejected = leaves([1.0, -2.0, 0.5], [0.2, 1.0, 0.5])
    loss = bradley_terry_loss(chosen, rejected)
    margins = [0.8, -3.0, 0.0]
    assert_close(loss.tolist(), [-math.log(sigmoid(m)) for m in margins])
    loss.sum().backward()
    assert_close(chosen.grad.tolist(), [-sigmoid(-m) for m in margins])
    assert_close(rejected.grad.tolist(), [sigmoid(-m) for m in margins])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_value_and_gradient(beta):
    inputs = leaves([-4.0, -9.0], [-6.0, -3.0], [-5.0, -9.0], [-5.5, -8.0])
    loss, stats = dpo_loss(*inputs, beta=beta)
    margins = [beta * ((-4 + 5) - (-6 + 5.5)), beta * ((-9 + 9) - (-3 + 8))]
    assert_close(loss.tolist(), [-math.log(sigmoid(m)) for m in margins])
    assert_close(stats.chosen_rewards.tolist(), [beta, 0.0])
    assert_close(stats.rejected_rewards.tolist(), [beta * -0.5, beta * 5])
    assert not any(x.requires_grad for x in stats)
    loss.sum().backward()
    for x, sign in zip(inputs, (-1, 1, 1, -1)):
        assert_close(x.grad.tolist(), [sign * beta * sigmoid(-m) for m in margins])


def test_pair_losses_stay_finite_far_out():
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    for loss in (bradley_terry_loss(far, zero), dpo_loss(far, zero, zero, zero, beta=1.0)[0]):
        assert loss.tolist() == [0.0, 1e4]
        (gradient,) = torch.autograd.grad(loss.sum(), far)
        assert gradient.tolist() == [0.0, -1.0]


def test_dpo_of_the_reference_itself_is_log_two_to_the_last_bit():
    logps = torch.randn(50) * 100
    loss, stats = dpo_loss(logps, -logps, logps, -logps, beta=0.1)
    assert (loss == torch.tensor(2.0).log()).all() and not stats.chosen_rewards.any()
