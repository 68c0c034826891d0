"""linear_rows on every backend against float64, and what it leaves to torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from rlhf_core.ops.linear_rows import MOST_ROWS, linear_rows, quantize_rows


def truth(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 7, 8, 9, 16, 17, 33, 50, MOST_ROWS])
def test_layers_of_any_shape_match_float64(backend, dtype, rows):
    # Sizes below, at and above a vector of 4, 8 or 16, a tile of outputs, and AMX's 16 and 32.
    for (inputs, outputs), with_bias in itertools.product(
        ((1, 1), (3, 17), (16, 2), (31, 16), (32, 33), (48, 5), (100, 40), (896, 19)), (0, 1)
    ):
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        bias = torch.randn(outputs).to(dtype) if with_bias else None
        got = linear_rows(x, weight, bias, backend=backend)
        want = truth(x, weight, bias)
        assert got.shape == want.shape and got.dtype == dtype
        # Half the last bit of a 16-bit output, and float32 sums of products in another order.
        half_bit = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        size = x.double().abs() @ weight.double().abs().T
        assert ((got - want).abs() <= half_bit * want.abs() + 2e-6 * (1 + size)).all()


def test_sums_are_as_accurate_as_torchs(backend):
    x, weight, bias = torch.randn(8, 4864), torch.randn(64, 4864), torch.randn(64)
    want = truth(x, weight, bias)
    error, theirs = (
        (y - want).abs().max()
        for y in (linear_rows(x, weight, bias, backend=backend), F.linear(x, weight, bias))
    )
    assert error <= 4 * theirs  # in 4 lanes each sum is four times as long as in 16


def test_leading_axes_and_strides_do_not_matter(backend):
    x, weight = torch.randn(6, 80), torch.randn(5, 40)
    for view in (x[:, :40], x[::2, 40:], x[:, ::2], x[:1, :40].expand(6, 40)):
        got = linear_rows(view, weight, backend=backend)
        assert torch.equal(got, linear_rows(view.contiguous(), weight, backend=backend))
    got = linear_rows(x.view(2, 3, 2, 40), weight, backend=backend)
    assert torch.equal(got.view(12, 5), linear_rows(x.view(12, 40), weight, backend=backend))
    turned = weight.T.contiguous().T  # the same weights, stored by columns
    got = linear_rows(x[:, :40], turned, backend=backend)
    torch.testing.assert_close(got, F.linear(x[:, :40], weight))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("sizes", [(1, 2, 3, 5, 5), (17, 20, 27)], ids=str)
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(backend, sizes):
    """Up to 16 rows, and beyond: see csrc/linear_rows.h."""
    x, weight, before = torch.randn(sum(sizes), 300), torch.randn(777, 300), torch.get_num_threads()
    torch.set_num_threads(2)
    together = linear_rows(x, weight, backend=backend)
    torch.set_num_threads(1)
    parts = [linear_rows(part, weight, backend=backend) for part in x.split(sizes)]
    torch.set_num_threads(before)
    assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_8_bit_weights_are_within_half_a_scale_and_the_same_on_every_backend(backend, dtype):
    for inputs, outputs in ((1, 1), (3, 9), (16, 5), (37, 7)):
        weight = (torch.randn(outputs, inputs) * torch.rand(outputs, 1)).to(dtype)
        weight[0] = 0
        rows, scales = quantize_rows(weight, backend=backend)
        assert rows.dtype == torch.int8 and scales.dtype == torch.float32
        error = (rows.double() * scales.double()[:, None] - weight.double()).abs()
        assert (error <= scales[:, None] * 0.5001).all() and not error[0].any()
        assert torch.equal(rows.abs().amax(dim=1) == 127, weight.abs().amax(dim=1) > 0)
        want = quantize_rows(weight, backend="reference")
        assert all(map(torch.equal, (rows, scales), want))
    weight[1, 3], weight[2, 36] = torch.nan, torch.inf
    found = quantize_rows(weight, backend=backend)[1].isnan()
    assert found.nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 50, MOST_ROWS + 1])
def test_layers_of_8_bits_match_float64(backend, rows):
    from rlhf_core import cpp

    for (inputs, outputs), with_bias in itertools.product(
        ((1, 1), (3, 17), (16, 2), (31, 16), (48, 5), (100, 40), (896, 19)), (0, 1)
    ):
        x, (weight, scales) = torch.randn(rows, inputs), quantize_rows(torch.randn(outputs, inputs))
        bias = torch.randn(outputs) if with_bias else None
        got = cpp.linear_rows_fwd(x, weight, bias, scales)
        exact = weight.double() * scales.double()[:, None]
        size = x.double().abs() @ exact.abs().T
        assert ((got - truth(x, exact, bias)).abs() <= 2e-6 * (1 + size)).all()


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("sizes", [(1, 2, 3, 5, 5), (17, 20)], ids=str)
def test_a_row_of_8_bit_layers_has_the_same_bits_in_any_batch(backend, sizes):
    from rlhf_core import cpp

    x, (weight, scales) = torch.randn(sum(sizes), 300), quantize_rows(torch.randn(77, 300))
    parts = [cpp.linear_rows_fwd(part, weight, None, scales) for part in x.split(sizes)]
    assert torch.equal(torch.cat(parts), cpp.linear_rows_fwd(x, weight, None, scales))


def test_what_the_kernel_does_not_take_goes_to_torch(backend):
    x, weight, bias = torch.randn(MOST_ROWS + 1, 8), torch.randn(4, 8), torch.randn(4)
    for rows in (x, x[:0]):
        got = linear_rows(rows, weight, bias, backend=backend)
        assert torch.equal(got, F.linear(rows, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_rows(x[:2], weight, backend=backend).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        linear_rows(x[:2].bfloat16(), weight, backend=backend)


def test_a_gradient_is_that_of_torch(backend):
    leaves = [t.requires_grad_() for t in (torch.randn(3, 8), torch.randn(4, 8), torch.randn(4))]
    got = torch.autograd.grad(linear_rows(*leaves, backend=backend).sin().sum(), leaves)
    want = torch.autograd.grad(F.linear(*leaves).sin().sum(), leaves)
    assert all(map(torch.equal, got, want))
