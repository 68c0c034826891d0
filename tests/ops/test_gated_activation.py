"""gated_activation on every backend: values and gradients against float64; saved tensors."""

import math
from functools import partial

import pytest
import torch
from op_helpers import TRANSFORMS, assert_as_accurate, transformed
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from rlhf_core.ops.gated_activation import (
    ACTIVATIONS,
    gated_activation,
    gated_activation_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def value_and_gradient(function, gate_up, dy, *arguments, **options):
    gate_up = gate_up.detach().requires_grad_()
    y = function(gate_up, *arguments, **options)
    return y.detach(), *torch.autograd.grad(y, gate_up, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_of_any_width_match_float64(backend, activation, dtype):
    # Widths below, at and above one and two vectors of 4, 8 or 16 elements, and many vectors.
    for width in (1, 3, 8, 15, 16, 17, 31, 32, 33, 100, 1000):
        gate_up, dy = (torch.randn(3, n * width).to(dtype) * 4 for n in (2, 1))
        found = value_and_gradient(gated_activation, gate_up, dy, activation, backend=backend)
        other = value_and_gradient(gated_activation_reference, gate_up, dy, activation)
        truth = value_and_gradient(
            gated_activation_reference, gate_up.double(), dy.double(), activation
        )
        for got, reference, exact in zip(found, other, truth):
            assert got.dtype == dtype and got.is_contiguous()
            assert_as_accurate(got, reference, exact, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_any_size_match_float64_and_special_ones_torch(backend, activation):
    sizes = [0.0, 1e-45, 1e-38, 1e-20, 1e-3, 5, 20, 87, 88.1, 88.8, 104, 1e3, 1e10, 1e18, 1e38]
    gates = torch.tensor([*sizes, *(-size for size in sizes)])
    gate_up, dy = torch.stack((gates, torch.ones_like(gates)), dim=1), torch.ones(len(gates), 1)
    if activation == "gelu_tanh":  # its gradient needs the square of the gate, also in torch
        gate_up = gate_up[gates.abs() <= 1e18]
        dy = dy[: len(gate_up)]
    found = value_and_gradient(gated_activation, gate_up, dy, activation, backend=backend)
    truth = value_and_gradient(
        gated_activation_reference, gate_up.double(), dy.double(), activation
    )
    cancels = activation == "gelu" or (activation == "gelu_tanh" and backend != "cpp")
    atol = 1e-6 if cancels else 1e-35  # torch subtracts from 1 what is almost 1
    for got, exact in zip(found, truth):
        assert_close(got.double(), exact, rtol=2e-6, atol=atol)

    special = [math.inf, -math.inf, math.nan, 2.0]
    gate_up = torch.cartesian_prod(*[torch.tensor(special)] * 2)
    dy = torch.ones(len(gate_up), 1)
    for got, want in zip(
        value_and_gradient(gated_activation, gate_up, dy, activation, backend=backend),
        value_and_gradient(gated_activation_reference, gate_up, dy, activation),
    ):
        assert_close(got, want, equal_nan=True)


def test_strides_and_leading_axes_do_not_matter(backend):
    base = torch.randn(3, 5, 4, 40)
    views = [base[0], base[1:, :, ::2, 6:], base.transpose(0, 2), base[..., ::2], base[0, 0, 0]]
    views += [base[:1].expand(3, 5, 4, 40), base[:0], base[..., :0]]
    for view in views:
        shape = *view.shape[:-1], view.shape[-1] // 2
        for dy in (torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2], torch.ones(()).expand(shape)):
            got = value_and_gradient(gated_activation, view, dy, backend=backend)
            want = value_and_gradient(
                gated_activation, view.contiguous(), dy.contiguous(), backend=backend
            )
            assert got[0].shape == shape and got[1].shape == view.shape
            assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_the_bits_depend_neither_on_threads_nor_on_other_rows(backend):
    gate_up, dy = torch.randn(300, 2000), torch.randn(300, 1000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(value_and_gradient(gated_activation, gate_up, dy, backend=backend))
    finally:
        torch.set_num_threads(before)
    found.append(value_and_gradient(gated_activation, gate_up[7:8], dy[7:8], backend=backend))
    one, two, alone = found
    for a, b, c in zip(one, two, alone):
        assert torch.equal(a, b) and torch.equal(a[7:8], c)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_input_is_kept_and_16_bits_are_rounded_once(backend, dtype):
    kept = []
    gate_up = torch.randn(4, 6).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = gated_activation(gate_up)
    assert [x.data_ptr() for x in kept] == [gate_up.data_ptr()]
    assert torch.equal(y, gated_activation(gate_up.float()).to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_the_reference_and_second_derivatives(backend, activation):
    gate_up, dy = torch.randn(2, 3, 8, dtype=torch.double), torch.randn(2, 3, 4)
    gate_up.requires_grad_()
    assert gradcheck(gated_activation, (gate_up, activation))
    assert gradgradcheck(gated_activation, (gate_up, activation))

    def penalty(gate_up, **options):
        y = gated_activation(gate_up, activation, **options)
        (first,) = torch.autograd.grad(y, gate_up, dy.to(y.dtype), create_graph=True)
        return torch.autograd.grad(first.square().sum(), gate_up)[0]

    single = gate_up.detach().float().requires_grad_()
    assert_close(penalty(single, backend=backend).double(), penalty(gate_up), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_kernel_cannot_read_goes_to_torch(transform):
    torch.manual_seed(0)
    gate_up, tangent = torch.randn(2, 3, 8).unbind()

    apply = partial(transformed, transform, x=gate_up, tangent=tangent)
    want = apply(lambda x: gated_activation_reference(x, "silu"))
    assert torch.equal(apply(gated_activation), want)


def test_an_odd_number_of_columns_is_named(backend):
    with pytest.raises(ValueError, match=r"gate_up must be \(\.\.\., 2 I\), got \(2, 5\)"):
        gated_activation(torch.zeros(2, 5), backend=backend)
