"""kl_estimate on every backend: four estimators, their gradients, and where they must not cancel or overflow."""

import math

import pytest
import torch
from conftest import assert_as_accurate

from rlhf_core import kl_estimate
from rlhf_core.ops.kl import kl_estimate_reference

ESTIMATORS = ["k1", "k2", "k3", "abs"]
FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d**2 / 2,
    "k3": lambda d: torch.expm1(-d) + d,
    "abs": lambda d: d.abs(),
}


def run(d, estimator, backend, upstream=None, mask=None):
    """(kl, dlogprobs, dref_logprobs) with logprobs - ref_logprobs = d exactly."""
    logprobs, ref_logprobs = d.clone().requires_grad_(), torch.zeros_like(d, requires_grad=True)
    kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator, mask=mask, backend=backend)
    kl.backward(torch.ones_like(kl) if upstream is None else upstream)
    return kl.detach(), logprobs.grad, ref_logprobs.grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7), (2, 3, 5), (3, 1027)])
def test_values_and_gradients_match_the_float64_formula(backend, estimator, shape):
    d, upstream = torch.randn(shape) * 2, torch.randn(shape)
    kl, dlogprobs, dref = run(d, estimator, backend, upstream)
    exact = d.double().requires_grad_()
    truth = FORMULAS[estimator](exact)
    truth.backward(upstream.double())
    reference = run(d, estimator, "reference", upstream)
    assert kl.dtype == torch.float32 and kl.shape == shape
    assert_as_accurate(kl, reference[0], truth.detach(), "value")
    assert_as_accurate(dlogprobs, reference[1], exact.grad, torch.float32)
    assert torch.equal(dref, -dlogprobs)


def test_k3_keeps_its_digits_where_policy_and_reference_nearly_agree(backend):
    d = torch.tensor([s * m for m in (1e-7, 1e-5, 1e-3, 0.03, 0.1, 0.1249, 0.1251, 0.2) for s in (1, -1)])
    kl, grad, _ = run(d, "k3", backend)
    x = d.double()
    truth = sum((-x) ** n / math.factorial(n) for n in range(2, 20))
    torch.testing.assert_close(kl.double(), truth, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad.double(), -torch.expm1(-x), rtol=2e-5, atol=0)


def test_k2_k3_and_abs_are_never_negative_and_zero_only_at_zero(backend):
    d = torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-6, 0, 50), -torch.logspace(-6, 0, 50)])
    for estimator in ("k2", "k3", "abs"):
        kl, grad, _ = run(d, estimator, backend)
        assert (kl[d != 0] > 0).all() and (kl[d == 0] == 0).all() and (grad[d == 0] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_and_gradient_are_finite_at_differences_of_100(backend, estimator):
    for x in run(torch.tensor([100.0, -100.0, 87.0, -89.0, 1e4, -1e4]), estimator, backend):
        assert x.isfinite().all()


def test_k3_goes_on_along_its_tangent_below_minus_20(backend):
    d = torch.tensor([-19.999, -20.0, -20.001, -21.0, -50.0])
    kl, grad, _ = run(d, "k3", backend)
    x = d.double()
    edge = x.clamp_min(-20)
    value = torch.exp(-edge) * (1 + (edge - x)) - 1 + x
    torch.testing.assert_close(kl.double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), 1 - torch.exp(-edge), rtol=1e-5, atol=0)


def test_k1_and_k3_are_unbiased_and_k3_is_the_exact_kl_in_expectation(backend):
    p, q = torch.softmax(torch.randn(2, 7, dtype=torch.float64), -1)
    exact = (p * (p.log() - q.log())).sum()
    for estimator in ("k1", "k3"):
        kl = kl_estimate(p.log().float(), q.log().float(), estimator=estimator, backend=backend)
        torch.testing.assert_close((p * kl.double()).sum(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_nan_log_prob_that_counts_is_not_hidden(backend, estimator):
    kl, _, _ = run(torch.tensor([0.5, math.nan]), estimator, backend)
    assert kl.isnan().tolist() == [False, True]


def test_strided_inputs_and_expanded_gradients(backend):
    logprobs, ref = torch.randn(5, 6), torch.randn(6, 5)
    mask = torch.rand(6, 5) < 0.5
    leaf = logprobs.clone().requires_grad_()
    kl_estimate(leaf.T[:, 1:], ref[:, 1:], estimator="k3", mask=mask[:, 1:], backend=backend).sum().backward()
    dense = logprobs.T[:, 1:].clone().requires_grad_()
    kl = kl_estimate(dense, ref[:, 1:].clone(), estimator="k3", mask=mask[:, 1:].clone(), backend=backend)
    kl.backward(torch.ones_like(kl))
    assert torch.equal(leaf.grad.T[:, 1:], dense.grad) and (leaf.grad.T[:, 0] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_batch_gives_an_empty_result(backend, shape):
    kl, *grads = run(torch.zeros(shape), "k3", backend, mask=torch.zeros(shape, dtype=torch.bool))
    assert kl.shape == shape and all(x.shape == shape for x in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_promoted_before_the_difference(backend, dtype):
    a, b = (-torch.rand(50) * 5).to(dtype), (-torch.rand(50) * 5).to(dtype)
    kl = kl_estimate(a, b, estimator="k3", backend=backend)
    assert kl.dtype == torch.float32
    assert torch.equal(kl, kl_estimate(a.float(), b.float(), estimator="k3", backend=backend))


def test_inputs_are_left_alone(backend):
    logprobs, ref, mask = torch.randn(20), torch.randn(20), torch.rand(20) < 0.5
    before = [x.clone() for x in (logprobs, ref, mask)]
    kl_estimate(logprobs.requires_grad_(), ref, estimator="k3", mask=mask, backend=backend).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((logprobs, ref, mask), before))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_gradients_pass_gradcheck(estimator):
    torch.manual_seed(0)
    d = torch.tensor([-25.0, -5.0, -0.3, -0.05, 0.04, 0.3, 2.0], dtype=torch.float64)
    ref = torch.randn(7, dtype=torch.float64, requires_grad=True)
    logprobs = (ref.detach() + d).requires_grad_()
    mask = torch.tensor([True] * 6 + [False])
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate_reference(a, b, estimator, mask), (logprobs, ref))


def test_bad_input_raises_with_the_offending_value(backend):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        kl_estimate(x, torch.zeros(2, 4), backend=backend)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(x, x, estimator="k4", backend=backend)
    with pytest.raises(ValueError, match=r"mask.*\(3,\)"):
        kl_estimate(x, x, mask=torch.ones(3, dtype=torch.bool), backend=backend)
    with pytest.raises(TypeError, match=r"mask.*float32"):
        kl_estimate(x, x, mask=x, backend=backend)
    with pytest.raises(TypeError, match=r"ref_logprobs.*int64"):
        kl_estimate(x, x.long(), backend=backend)
    with pytest.raises(ValueError, match="meta"):
        kl_estimate(x, x.to("meta"), backend=backend)
