"""A linear layer with low-rank adapters: its values, its gradients and their gradients."""

import torch
import torch.nn.functional as F

from rlhf_core.ops.low_rank import low_rank_linear


def inputs():
    torch.manual_seed(0)
    shapes = dict(x=(2, 3, 5), weight=(7, 5), bias=(7,), A=(2, 5), B=(3, 2), C=(1, 5), D=(4, 1))
    return {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def layer(x, weight, bias, A, B, C, D):
    return low_rank_linear(x, weight, bias, [(slice(0, 3), A, B), (slice(3, 7), C, D)], 0.5)


def test_values_and_gradients_are_those_of_the_definition():
    found, expected = inputs(), inputs()
    y = layer(**found)
    x, A, B, C, D = (expected[name] for name in "xABCD")
    change = torch.cat((B @ A, D @ C)) * 0.5
    z = F.linear(x, expected["weight"] + change, expected["bias"])
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    z.square().sum().backward()
    for name, value in found.items():
        torch.testing.assert_close(value.grad, expected[name].grad, rtol=1e-12, atol=1e-12)


def test_second_derivatives():
    assert torch.autograd.gradgradcheck(layer, tuple(inputs().values()))


def test_frozen_weights_get_no_gradient():
    given = inputs()
    for name in ("x", "weight", "bias"):
        given[name].requires_grad_(False)
    layer(**given).sum().backward()
    assert [name for name, value in given.items() if value.grad is not None] == ["A", "B", "C", "D"]


def test_under_autocast_the_products_are_rounded_and_the_gradients_are_not():
    given = {name: value.detach().float().requires_grad_() for name, value in inputs().items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(**given)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {value.grad.dtype for value in given.values()} == {torch.float32}
    torch.testing.assert_close(y.double(), layer(**inputs()), rtol=0.05, atol=0.05)
