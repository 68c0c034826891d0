"""The KL as a loss term: its value and gradient against the exact KL."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import kl_loss
from rlhf_core.ops import full_kl, kl_estimate


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
