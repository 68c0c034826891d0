"""rotary on every backend: values and gradients against float64; saved tensors."""

import math
from functools import partial

import pytest
import torch
from op_helpers import TOLERANCES, TRANSFORMS, transformed
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from rlhf_core.ops.rotary import rotary, rotary_factors, rotary_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(*shape):
    angles = torch.rand(shape) * 7
    return rotary_factors(angles.cos(), angles.sin())


def passes(function, x, rope, dy, **options):
    x = x.detach().requires_grad_()
    y = function(x, *rope, **options)
    return y.detach(), *torch.autograd.grad(y, x, dy)


def truth(x, rope, dy):
    """`passes` of the rotation in float64, as a product of complex numbers."""

    def turned(x, cos, sin):
        half = cos.shape[-1] // 2
        turn = torch.complex(cos[..., :half], sin[..., half:])
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)

    return passes(turned, x.double(), [t.double() for t in rope], dy.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_heads_of_any_size_match_float64(backend, dtype, shared):
    # All of a head, or its first elements; halves below, at and above a vector.
    for K, R in ((2, 2), (6, 6), (8, 4), (20, 10), (32, 32), (64, 64), (80, 68), (128, 96)):
        x, dy = torch.randn(2, 2, 5, 3, K).to(dtype)
        rope = factors(1 if shared else 2, 5, 1, R // 2)
        found = passes(rotary, x, rope, dy, backend=backend)
        for got, reference, exact in zip(
            found, passes(rotary_reference, x, rope, dy), truth(x, rope, dy)
        ):
            assert got.dtype == dtype and got.is_contiguous()
            error, allowed = ((t - exact).abs().max() / exact.abs().max() for t in (got, reference))
            assert error <= allowed + TOLERANCES[dtype][0] and allowed < 0.01
            if backend == "cpp" and dtype != torch.float32:  # rounded once
                assert_close(got.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_gradient_is_the_inverse_rotation(backend):
    x, rope = torch.randn(2, 5, 3, 8), factors(1, 5, 1, 3)
    assert_close(passes(rotary, x, rope, rotary(x, *rope, backend=backend), backend=backend)[1], x)


def test_strides_and_leading_axes_do_not_matter(backend):
    base = torch.randn(4, 6, 5, 40)
    for x in (
        base[..., 1:4, :16],  # some heads of a packed projection
        base.transpose(1, 2)[..., ::2],
        base[::2, :, 2:, 20:],
        base[:1].expand(3, 6, 5, 40),
        base[0],
        base[:0],
        base[:, :0],
    ):
        rope = factors(*x.shape[-3:-2], 1, 7)
        for dy in (torch.randn(x.shape), torch.ones(()).expand(x.shape)):
            got = passes(rotary, x, rope, dy, backend=backend)
            want = passes(rotary, x.contiguous(), rope, dy.contiguous(), backend=backend)
            assert all(a.shape == x.shape and torch.equal(a, b) for a, b in zip(got, want))


def test_special_values_stay_in_their_pair(backend):
    for special in (math.inf, -math.inf, math.nan, 1e38):
        x, rope = torch.randn(1, 3, 2, 20), factors(1, 3, 1, 9)
        x[0, 1, 1, 2] = special
        for got, exact in zip(
            passes(rotary, x, rope, x, backend=backend), passes(rotary_reference, x, rope, x)
        ):
            assert_close(got, exact, equal_nan=True)


def test_the_bits_do_not_depend_on_threads(backend):
    x, rope, dy = torch.randn(4, 300, 4, 64), factors(1, 300, 1, 32), torch.randn(4, 300, 4, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(passes(rotary, x, rope, dy, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_only_the_factors_are_kept(backend):
    kept, rope = [], factors(1, 5, 1, 4)
    x = torch.randn(2, 5, 3, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary(x, *rope)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in rope]


def test_derivatives_of_the_reference_and_second_derivatives(backend):
    rope = factors(1, 3, 1, 3)
    x = torch.randn(2, 3, 2, 8, dtype=torch.double).requires_grad_()
    assert gradcheck(rotary, (x, *rope)) and gradgradcheck(rotary, (x, *rope))

    def penalty(x, **options):
        loss = rotary(x, *rope, **options).pow(3).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    single = x.detach().float().requires_grad_()
    assert_close(penalty(single, backend=backend).double(), penalty(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_kernel_cannot_read_goes_to_torch(transform):
    torch.manual_seed(0)
    x, tangent, rope = *torch.randn(2, 2, 5, 3, 8), factors(5, 1, 4)

    apply = partial(transformed, transform, x=x, tangent=tangent)
    want = apply(lambda x: rotary_reference(x, *rope))
    assert_close(apply(lambda x: rotary(x, *rope)), want)
