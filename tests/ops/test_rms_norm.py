"""rms_norm on every backend: values and gradients against float64; saved tensors."""

import itertools
import math
from functools import partial

import pytest
import torch
from op_helpers import TOLERANCES, TRANSFORMS, transformed
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.ops.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-3
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
# of x and of the result
DTYPES = [(FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (FLOAT, BFLOAT), (FLOAT, HALF)]


def passes(function, x, weight, dy, *arguments, **options):
    """The result and the gradients of x and weight."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    y = function(x, weight, EPS, *arguments, **options)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def double(x, weight, dy):
    """`passes` of the formula in float64."""

    def formula(x, weight, eps):
        return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight

    return passes(formula, x.double(), weight.double(), dy.double())


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_rows_of_any_width_match_float64(backend, dtypes):
    dtype, out = dtypes
    # Widths below, at and above a vector of 4, 8 or 16 elements, and many vectors. Rows that fill
    # no chunk, one, and several.
    sizes = [(5, D) for D in (1, 3, 8, 15, 16, 17, 64, 100, 4096)] + [(64, 20), (200, 20)]
    for (rows, D), scale in itertools.product(sizes, (1e-2, 1, 30)):
        # At the smallest scale eps dominates, at the largest it does not matter.
        x, weight = (torch.randn(rows, D) * scale).to(dtype), torch.randn(D).to(dtype)
        dy = torch.randn(rows, D).to(out)
        found = passes(rms_norm, x, weight, dy, dtype=out, backend=backend)
        other = passes(rms_norm_reference, x, weight, dy, out)
        assert [t.dtype for t in found] == [out, dtype, dtype]
        for got, reference, exact in zip(found, other, double(x, weight, dy)):
            assert got.shape == exact.shape and got.is_contiguous()
            error, allowed = ((t - exact).abs().max() / exact.abs().max() for t in (got, reference))
            assert error <= allowed + TOLERANCES[got.dtype][0] and allowed < 0.01
            if D == 1:
                break  # the gradient of x is a small difference of equal terms


def test_a_weight_may_be_wider_than_the_input(backend):
    x, weight, dy = torch.randn(5, 20).bfloat16(), torch.randn(20), torch.randn(5, 20).bfloat16()
    found = passes(rms_norm, x, weight, dy, backend=backend)
    assert [t.dtype for t in found] == [BFLOAT, BFLOAT, FLOAT]
    for got, exact in zip(found, double(x, weight, dy)):
        assert_close(got.double(), exact, rtol=2**-8, atol=1e-5)


def test_strides_and_leading_axes_do_not_matter(backend):
    base, weight = torch.randn(3, 5, 4, 40), torch.randn(20)
    views = [base[0, ..., :20], base[1:, :, ::2, 20:], base[..., :20].transpose(0, 2)]
    views += [base[..., ::2], base[0, 0, 0, 7:27], base[:1, ..., :20].expand(3, 5, 4, 20)]
    tolerance = dict.fromkeys(("rtol", "atol"), 0 if backend == "cpp" else 1e-5)
    for x in [*views, base[:0, ..., :20]]:
        for dy in (torch.randn(*x.shape[:-1], 40)[..., ::2], torch.ones(()).expand(x.shape)):
            got = passes(rms_norm, x, weight, dy, backend=backend)
            want = passes(rms_norm, x.contiguous(), weight, dy.contiguous(), backend=backend)
            for a, b in zip(got, want):
                assert_close(a, b, **tolerance)


def test_the_bits_depend_neither_on_threads_nor_on_other_rows(backend):
    x, weight, dy = torch.randn(700, 300), torch.randn(300), torch.randn(700, 300)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(passes(rms_norm, x, weight, dy, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))
    alone = passes(rms_norm, x[7:8], weight, dy[7:8], backend=backend)
    assert all(torch.equal(a[7:8], b) for a, b in zip(found[0][:2], alone))


@pytest.mark.parametrize("special", [1e18, -1e18, 1e30, math.inf, -math.inf, math.nan, 1e-30, 0.0])
def test_huge_tiny_and_special_values_give_what_torch_gives(backend, special):
    for D in (3, 40):
        x, weight, dy = torch.randn(3, D), torch.randn(D), torch.randn(3, D)
        x[0] *= 1e-30
        x[1, 1] = special
        found = passes(rms_norm, x, weight, dy, backend=backend)
        want = passes(rms_norm_reference, x, weight, dy, FLOAT)
        for got, expected in zip(found, want):
            assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_only_the_inputs_are_kept_and_16_bits_are_rounded_once(backend, dtypes):
    dtype, out = dtypes
    x, weight, kept = torch.randn(4, 6).to(dtype).requires_grad_(), torch.randn(6), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rms_norm(x, weight, EPS, dtype=out)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]
    assert torch.equal(y, rms_norm(x.float(), weight, EPS).to(out))


def test_only_wanted_gradients_are_computed(backend):
    x, weight, dy = torch.randn(5, 20), torch.randn(20), torch.randn(5, 20)
    want = passes(rms_norm, x, weight, dy, backend=backend)[1:]
    for wanted in (0, 1):
        inputs = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight))]
        y = rms_norm(*inputs, EPS, backend=backend)
        assert torch.equal(*torch.autograd.grad(y, inputs[wanted], dy), want[wanted])


def test_derivatives_of_the_reference_and_second_derivatives(backend):
    x, weight = torch.randn(2, 3, 8, dtype=torch.double), torch.randn(8, dtype=torch.double)
    inputs, dy = (x.requires_grad_(), weight.requires_grad_()), torch.randn(2, 3, 8)
    assert gradcheck(lambda *inputs: rms_norm(*inputs, EPS), inputs)
    assert gradgradcheck(lambda *inputs: rms_norm(*inputs, EPS), inputs)

    def penalty(inputs, **options):
        y = rms_norm(*inputs, EPS, **options)
        first = torch.autograd.grad(y, inputs, dy.to(y.dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    single = [t.detach().float().requires_grad_() for t in inputs]
    for got, exact in zip(penalty(single, backend=backend), penalty(inputs)):
        assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_a_kernel_cannot_read_goes_to_torch(transform):
    torch.manual_seed(0)
    x, weight, tangent = torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 3, 8)

    apply = partial(transformed, transform, x=x, tangent=tangent)
    want = apply(lambda x: rms_norm_reference(x, weight, EPS, FLOAT))
    assert_close(apply(lambda x: rms_norm(x, weight, EPS)), want)


def test_a_forward_pass_has_the_same_bits_with_and_without_gradient():
    model = Transformer(
        TransformerConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, max_positions=9)
    )
    ids = torch.randint(30, (3, 9))
    with torch.no_grad():
        without = model(ids)
    assert torch.equal(without, model(ids).detach())
