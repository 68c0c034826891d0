"""`linear_loss`: a loss of whole logits, chunk by chunk, with its gradients."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.ops.linear_loss import linear_loss

N, D, V = 7, 5, 11


def inputs(dtype=torch.float64, rows=N):
    torch.manual_seed(0)
    return torch.randn(rows, D, dtype=dtype), torch.randn(V, D, dtype=dtype)


def losses(logits, rows):
    """A loss that looks at all of a row's logits; its values, and the rows that it saw."""
    weights = torch.arange(1, N + 1, dtype=logits.dtype)[rows]
    values = (logits.softmax(dim=-1) * logits.cos()).sum(dim=-1) * weights
    return values.sum(), values, torch.arange(N)[rows]


def definition(hidden, weight):
    return losses(hidden @ weight.T, slice(0, len(hidden)))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
def test_loss_outputs_and_gradients_are_those_of_autograd_for_every_chunk(chunk_rows, trained):
    found = []
    for compute in (definition, lambda *x: linear_loss(x[0], x[1], losses, chunk_rows=chunk_rows)):
        hidden, weight = inputs()
        hidden.requires_grad_(trained != "weight")
        weight.requires_grad_(trained != "hidden")
        loss, values, rows = compute(hidden, weight)
        (3 * loss).backward()
        found.append((loss.detach(), values.detach(), rows, hidden.grad, weight.grad))
    for want, got in zip(*found):
        assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_without_gradient_the_values_are_the_same():
    hidden, weight = inputs()
    want = definition(hidden, weight)
    with torch.no_grad():
        got = linear_loss(hidden, weight.requires_grad_(), losses, chunk_rows=2)
    assert not got[0].requires_grad
    for x, y in zip(got, want):
        assert_close(x, y)


def test_outputs_are_detached_and_at_most_chunk_rows_logits_exist():
    sizes = []

    def noted(logits, rows):
        sizes.append(len(logits))
        return losses(logits, rows)

    hidden, weight = (x.requires_grad_() for x in inputs())
    loss, values, _ = linear_loss(hidden, weight, noted, chunk_rows=3)
    assert loss.requires_grad and not values.requires_grad and sizes == [3, 3, 1]


def test_no_rows_give_a_loss_of_0_with_a_gradient_of_0():
    hidden, weight = (x.requires_grad_() for x in inputs(rows=0))
    loss, values, _ = linear_loss(hidden, weight, losses)
    loss.backward()
    assert loss == 0 and values.shape == (0,) and hidden.grad.shape == (0, D)
    assert not weight.grad.any()
    with torch.no_grad():
        assert linear_loss(hidden, weight, losses)[0] == 0


def test_under_autocast_logits_are_bfloat16_and_weights_get_float32_gradients():
    hidden, weight = (x.requires_grad_() for x in inputs(torch.float32))
    seen = []

    def noted(logits, rows):
        seen.append(logits.dtype)
        return losses(logits.float(), rows)

    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = linear_loss(hidden, weight, noted, chunk_rows=4)
    loss.backward()
    want = [x.detach().requires_grad_() for x in (hidden, weight)]
    definition(*want)[0].backward()
    assert seen == [torch.bfloat16] * 2
    for got, truth in zip((hidden, weight), want):
        assert got.grad.dtype == torch.float32
        assert (got.grad - truth.grad).norm() < 0.05 * truth.grad.norm()


def test_a_second_backward_and_a_second_derivative_are_refused():
    hidden, weight = (x.requires_grad_() for x in inputs())
    loss, *_ = linear_loss(hidden, weight, losses)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()
    loss, *_ = linear_loss(hidden, weight, losses)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(hidden=torch.zeros(2, 4)), ValueError, r"hidden must be \(N, D\).*\(2, 4\)"),
        (dict(hidden=torch.zeros(1, 2, D)), ValueError, r"hidden must be \(N, D\)"),
        (dict(hidden=torch.zeros(2, D, dtype=torch.long)), TypeError, "hidden"),
        (dict(hidden=torch.zeros(2, D)), TypeError, "weight is torch.float64, but hidden"),
        (dict(chunk_rows=0), ValueError, "chunk_rows must be >= 1, got 0"),
    ],
)
def test_bad_input_is_named(change, error, message):
    hidden, weight = inputs()
    arguments = dict(hidden=hidden, weight=weight, losses=losses) | change
    with pytest.raises(error, match=message):
        linear_loss(**arguments)
