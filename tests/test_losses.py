"""Each loss against its closed form, value and gradient; masked positions give exactly 0, whatever they hold."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import bradley_terry_loss, clipped_policy_loss, clipped_value_loss, dpo_loss
from rlhf_core.masking import loss_weights

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


# ---- PPO

ALL = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient, clipped",
    [  # gradient with respect to the log-prob: -A * ratio, or 0 where the clipped branch is the worse one
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 2.0, -2.4, 0.0, 1),
        (0.5, 2.0, -1.0, -1.0, 0),
        (0.9, -2.0, 1.8, 1.8, 0),
        (0.5, -2.0, 1.6, 0.0, 1),
        (1.5, -2.0, 3.0, 3.0, 0),
        (1.0, 2.0, -2.0, -2.0, 0),  # a tie of both branches: the whole gradient, not half
        (1.0, -2.0, 2.0, 2.0, 0),
    ],
)
def test_clipped_policy_value_and_gradient(ratio, advantage, loss, gradient, clipped):
    new, old = leaves([[math.log(ratio) - 3.0]], [[-3.0]])
    got, stats = clipped_policy_loss(new, old, torch.tensor([[advantage]]), ALL, clip_range=0.2)
    got.sum().backward()
    assert_close([got.item(), new.grad.item(), stats.ratio.item()], [loss, gradient, ratio], rtol=0, atol=1e-6)
    assert_close(stats.approx_kl.item(), ratio - 1 - math.log(ratio), rtol=0, atol=1e-6)
    assert stats.clipped.item() == clipped and not any(x.requires_grad for x in stats)


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1000.0])
@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_a_ratio_that_overflows_gives_finite_numbers(log_ratio, advantage):
    """Row 17: and no gradient where the advantage is 0."""
    new = torch.tensor([[log_ratio]], requires_grad=True)
    advantages = torch.tensor([[advantage]])
    loss, stats = clipped_policy_loss(new, torch.zeros(1, 1), advantages, ALL, clip_range=0.2)
    loss.sum().backward()
    assert loss.isfinite().all() and new.grad.isfinite().all() and all(x.isfinite().all() for x in stats)
    if advantage == 0:
        assert loss.item() == 0 and new.grad.item() == 0


@pytest.mark.parametrize(
    "value, old, target, loss, gradient, clipped",
    [
        (1.1, 1.0, 3.0, 1.805, -1.9, 0),  # inside the range: half the squared error
        (2.0, 1.0, 3.0, 1.62, 0.0, 1),  # moved too far towards the target: the clipped value 1.2 counts
        (0.0, 1.0, 3.0, 4.5, -3.0, 0),  # moved away from it: the value itself is worse
    ],
)
def test_clipped_value_loss_and_gradient(value, old, target, loss, gradient, clipped):
    new, before, returns = leaves([[value]], [[old]], [[target]])
    got, where = clipped_value_loss(new, before, returns, ALL, clip_range=0.2)
    got.sum().backward()
    assert_close([got.item(), new.grad.item(), where.item()], [loss, gradient, float(clipped)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf, 100.0])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_masked_positions_are_exactly_zero_whatever_they_hold(junk, aggregation):
    mask = torch.tensor([[True, True, False], [False, False, False]])
    columns = [torch.randn(2, 3).masked_fill(~mask, junk) for _ in range(3)]
    for loss_function in (clipped_policy_loss, clipped_value_loss):
        new = columns[0].clone().requires_grad_()
        loss, stats = loss_function(new, *columns[1:], mask, clip_range=0.2)
        stats = [stats] if isinstance(stats, torch.Tensor) else stats
        (loss * loss_weights(mask, aggregation)).sum().backward()
        for x in (loss, new.grad, *stats):
            assert not x[~mask].any() and x.isfinite().all()
