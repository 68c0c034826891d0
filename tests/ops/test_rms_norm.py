"""rms_norm on every backend against float64. Training must never use the fused code."""

import itertools

import pytest
import torch
from op_helpers import assert_as_accurate

from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.ops.rms_norm import rms_norm

EPS = 1e-3


def truth(x, weight):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_any_width_match_float64(backend, dtype):
    # Widths below, at and above a vector of 4, 8 or 16 elements, and many vectors.
    for D, scale in itertools.product((1, 3, 8, 15, 16, 17, 64, 100, 4096), (1e-2, 1, 30)):
        # At the smallest scale eps dominates, at the largest it does not matter.
        x, weight = (torch.randn(5, D) * scale).to(dtype), torch.randn(D).to(dtype)
        out = rms_norm(x, weight, EPS, backend=backend)
        other = rms_norm(x, weight, EPS, backend="reference")
        assert out.shape == x.shape and out.is_contiguous()
        kind = "value" if dtype == torch.float32 else dtype
        assert_as_accurate(out, other, truth(x, weight), kind)


def test_strides_do_not_matter(backend):
    x, weight = torch.randn(7, 40), torch.randn(20)
    for view in (x[:, :20], x[::2, 20:], x[:, ::2], x[:1, :20].expand(7, 20)):
        got = rms_norm(view, weight, EPS, backend=backend)
        assert torch.equal(got, rms_norm(view.contiguous(), weight, EPS, backend=backend))


def test_inputs_that_the_kernel_does_not_take_go_to_torch(backend):
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    want = torch.nn.functional.rms_norm(x, (8,), weight, EPS)
    assert torch.equal(rms_norm(x, weight, EPS, backend=backend), want)
    mixed = rms_norm(x[0].bfloat16(), weight, EPS, backend=backend)
    assert torch.equal(mixed, torch.nn.functional.rms_norm(x[0].bfloat16(), (8,), weight, EPS))


def test_a_gradient_is_that_of_torch(backend):
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    for leaf in (x, weight):
        (got,) = torch.autograd.grad(rms_norm(x, weight, EPS, backend=backend).sin().sum(), leaf)
        (want,) = torch.autograd.grad(truth(x, weight).sin().sum(), leaf)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_forward_pass_has_the_same_bits_with_and_without_gradient():
    model = Transformer(
        TransformerConfig(vocab_size=30, hidden_size=16, num_layers=2, num_heads=2, max_positions=9)
    )
    ids = torch.randint(30, (3, 9))
    with torch.no_grad():
        without = model(ids)
    assert torch.equal(without, model(ids).detach())
