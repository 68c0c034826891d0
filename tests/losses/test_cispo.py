"""CISPO against its paper's equations."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import cispo_loss

NAN = float("nan")


@pytest.mark.parametrize("low, high", [(0.2, 0.28), (1.0, 2.0)])
def test_the_gradient_is_the_clipped_ratio_times_the_advantage(low, high):
    """MiniMax-M1, eq. 4 and 5, in float64; whatever masked places hold."""
    torch.manual_seed(0)
    old, A = torch.randn(2, 3, 5, dtype=torch.float64)
    new = old + torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    masked = [x.masked_fill(~mask, NAN) for x in (new, old, A)]
    logprobs = masked[0].requires_grad_()
    loss, clipped = cispo_loss(logprobs, *masked[1:], mask, clip_ranges=(low, high))
    ratio = (new - old).exp()
    weight = ratio.where(ratio > 1 - low, 1 - low).where(ratio < 1 + high, 1 + high)
    assert_close(loss, (-weight * A * new).masked_fill(~mask, 0), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert_close(gradient, (-weight * A).masked_fill(~mask, 0), rtol=1e-12, atol=1e-12)
    assert torch.equal(clipped, mask & ((ratio < 1 - low) | (ratio > 1 + high)))
    assert clipped.any() and gradient[clipped].all()
