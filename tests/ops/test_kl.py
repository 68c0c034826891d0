"""kl_estimate and full_kl on every backend: values, gradients, cancellation, overflow and NaN."""

import math

import pytest
import torch
from op_helpers import assert_as_accurate, cases

from rlhf_core import full_kl, kl_estimate
from rlhf_core.ops.kl import full_kl_reference, kl_estimate_reference

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
    d = torch.tensor(
        [s * m for m in (1e-7, 1e-5, 1e-3, 0.03, 0.1, 0.1249, 0.1251, 0.2) for s in (1, -1)]
    )
    kl, grad, _ = run(d, "k3", backend)
    x = d.double()
    truth = sum((-x) ** n / math.factorial(n) for n in range(2, 20))
    torch.testing.assert_close(kl.double(), truth, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad.double(), -torch.expm1(-x), rtol=2e-5, atol=0)


def test_k2_k3_and_abs_are_never_negative_and_zero_only_at_zero(backend):
    d = torch.cat(
        [torch.linspace(-30, 30, 4001), torch.logspace(-6, 0, 50), -torch.logspace(-6, 0, 50)]
    )
    for estimator in ("k2", "k3", "abs"):
        kl, grad, _ = run(d, estimator, backend)
        assert (kl[d != 0] > 0).all() and (kl[d == 0] == 0).all() and (grad[d == 0] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_value_and_gradient_are_finite_at_differences_of_100(backend, estimator):
    for x in run(torch.tensor([100.0, -100.0, 87.0, -89.0, 1e4, -1e4]), estimator, backend):
        assert x.isfinite().all()


def test_k3_continues_along_its_tangent_below_minus_20(backend):
    d = torch.tensor([-19.999, -20.0, -20.001, -21.0, -50.0])
    kl, grad, _ = run(d, "k3", backend)
    x = d.double()
    edge = x.clamp_min(-20)
    value = torch.exp(-edge) * (1 + (edge - x)) - 1 + x
    torch.testing.assert_close(kl.double(), value, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), 1 - torch.exp(-edge), rtol=1e-5, atol=0)


def test_the_expectations_of_k1_and_k3_are_full_kl(backend):
    log_p, log_q = torch.log_softmax(torch.randn(2, 7), -1)
    exact = full_kl(log_p, log_q, backend=backend)
    for estimator in ("k1", "k3"):
        kl = kl_estimate(log_p, log_q, estimator=estimator, backend=backend)
        torch.testing.assert_close((log_p.exp() * kl).sum(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_nan_log_prob_that_counts_is_not_hidden(backend, estimator):
    kl, _, _ = run(torch.tensor([0.5, math.nan]), estimator, backend)
    assert kl.isnan().tolist() == [False, True]


def test_strided_inputs_and_expanded_gradients(backend):
    logprobs, ref = torch.randn(5, 6), torch.randn(6, 5)
    mask = torch.rand(6, 5) < 0.5
    leaf = logprobs.clone().requires_grad_()
    kl_estimate(
        leaf.T[:, 1:], ref[:, 1:], estimator="k3", mask=mask[:, 1:], backend=backend
    ).sum().backward()
    dense = logprobs.T[:, 1:].clone().requires_grad_()
    kl = kl_estimate(
        dense, ref[:, 1:].clone(), estimator="k3", mask=mask[:, 1:].clone(), backend=backend
    )
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
    kl_estimate(
        logprobs.requires_grad_(), ref, estimator="k3", mask=mask, backend=backend
    ).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((logprobs, ref, mask), before))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reference_gradients_pass_gradcheck(estimator):
    torch.manual_seed(0)
    d = torch.tensor([-25.0, -5.0, -0.3, -0.05, 0.04, 0.3, 2.0], dtype=torch.float64)
    ref = torch.randn(7, dtype=torch.float64, requires_grad=True)
    logprobs = (ref.detach() + d).requires_grad_()
    mask = torch.tensor([True] * 6 + [False])
    assert torch.autograd.gradcheck(
        lambda a, b: kl_estimate_reference(a, b, estimator, mask), (logprobs, ref)
    )


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


def exact_kl(logits, ref_logits, temperature=1.0):
    """In float64; differentiable."""
    temperature = (
        temperature.double()[..., None] if isinstance(temperature, torch.Tensor) else temperature
    )
    log_p, log_q = (torch.log_softmax(z.double() / temperature, -1) for z in (logits, ref_logits))
    possible = log_p > -math.inf
    difference = torch.where(possible, log_p, 0) - torch.where(possible, log_q, 0)
    return (log_p.exp() * difference).sum(-1)


def run_full(logits, ref_logits, backend, upstream=None, temperature=1.0, mask=None):
    """(kl, dlogits, dref_logits); in float64 if backend is None."""
    leaves = [z.clone().requires_grad_() for z in (logits, ref_logits)]
    if backend is None:
        leaves = [z.detach().double().requires_grad_() for z in leaves]
        kl = exact_kl(*leaves, temperature)
    else:
        kl = full_kl(*leaves, temperature=temperature, mask=mask, backend=backend)
    kl.backward(torch.ones_like(kl) if upstream is None else upstream.to(kl.dtype))
    return kl.detach(), *(z.grad for z in leaves)


def check_full(logits, ref_logits, backend, temperature=1.0):
    upstream = torch.randn(logits.shape[:-1])
    got = run_full(logits, ref_logits, backend, upstream, temperature)
    reference = run_full(logits, ref_logits, "reference", upstream, temperature)
    truth = run_full(logits, ref_logits, None, upstream, temperature)
    assert got[0].dtype == torch.float32 and (got[0] >= 0).all()
    assert_as_accurate(got[0], reference[0], truth[0], "value")
    # dlogits is a difference of numbers as large as the kl, divided by the temperature
    smallest = torch.as_tensor(temperature).min().clamp_max(1).item()
    for x, r, t in zip(got[1:], reference[1:], truth[1:]):
        scale = truth[0].max().clamp_min(10).item() / 10 / smallest
        assert_as_accurate(x / scale, r / scale, t / scale, logits.dtype)


LENGTHS = [1, 2, 7, 128, 129, 1000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    "backend, V, dtype",
    cases(
        (LENGTHS, DTYPES),
        few=[*((V, DTYPES[i % 3]) for i, V in enumerate(LENGTHS)), (1000, torch.float32)],
    ),
    indirect=["backend"],
)
def test_full_kl_and_both_gradients_match_float64(backend, V, dtype):
    for scale, offset, temperature in (
        (1, 0, 1.0),
        (4, 0, 0.7),
        (3, 1e4, 1.3),
        (3, -1e4, 1.0),
        (0.01, 0, 1.0),
    ):
        logits, ref_logits = (torch.randn(2, 2, 2, V) * scale + offset).to(dtype)
        check_full(logits, ref_logits, backend, temperature)


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-4])
def test_full_kl_of_near_equal_rows_is_as_accurate_as_the_reference(backend, difference):
    logits = torch.randn(3, 2, 1000) * 4
    ref_logits = logits + torch.randn(3, 2, 1000) * difference
    truth = exact_kl(logits, ref_logits)
    got, reference = (full_kl(logits, ref_logits, backend=b) for b in (backend, "reference"))
    assert (got >= 0).all()
    assert (got - truth).abs().max() <= max((reference - truth).abs().max(), 5e-7)


def test_full_kl_of_equal_rows_is_exactly_zero_with_no_gradient(backend):
    logits = torch.randn(3, 2, 300) * 5
    logits[0, 0, 7:90] = -math.inf
    kl, dlogits, dref = run_full(logits, logits, backend)
    assert (kl == 0).all() and dlogits.abs().max() < 1e-6 and dref.abs().max() < 1e-6


def test_full_kl_is_at_least_zero_and_not_symmetric(backend):
    a, b = torch.randn(2, 4, 5, 33) * 3
    forward, backward = full_kl(a, b, backend=backend), full_kl(b, a, backend=backend)
    assert (forward > 0).all() and (forward - backward).abs().min() > 1e-4


def test_full_kl_ignores_tokens_that_neither_can_sample(backend):
    logits, ref_logits = torch.randn(2, 3, 2, 200)
    kept = torch.rand(200) < 0.5
    want = run_full(logits[..., kept], ref_logits[..., kept], backend)
    for nowhere in (-math.inf, -1e9, -1e30, torch.finfo(torch.float32).min):
        for x in (logits, ref_logits):
            x[..., ~kept] = nowhere
        got = run_full(logits, ref_logits, backend)
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
        for x, y in zip(got[1:], want[1:]):
            torch.testing.assert_close(x[..., kept], y, rtol=1e-5, atol=1e-6)
            assert (x[..., ~kept] == 0).all()


def test_full_kl_ignores_tokens_that_the_policy_alone_cannot_sample(backend):
    logits, ref_logits = torch.randn(2, 1, 2, 50)
    logits[..., ::3] = -math.inf
    check_full(logits, ref_logits, backend)


def test_full_kl_is_inf_where_the_reference_cannot_sample_what_the_policy_can(backend):
    for V in (2, 40, 5000):
        logits, ref_logits = torch.randn(2, 1, 2, V)
        for position in {0, V // 2, V - 1}:
            impossible = ref_logits.clone()
            impossible[0, 1, position] = -math.inf
            kl = full_kl(logits, impossible, backend=backend)
            assert kl[0, 0].isfinite() and kl[0, 1] == math.inf


def test_full_kl_of_a_one_hot_policy_is_minus_the_references_log_prob(backend):
    logits, ref_logits = torch.full((1, 2, 40), -math.inf), torch.randn(1, 2, 40)
    logits[..., 17] = 3.0
    want = -torch.log_softmax(ref_logits, -1)[..., 17]
    torch.testing.assert_close(
        full_kl(logits, ref_logits, backend=backend), want, rtol=1e-6, atol=1e-6
    )
    assert (full_kl(logits, logits, backend=backend) == 0).all()


@pytest.mark.parametrize("height", [12.0, 300.0, 3e4])
def test_full_kl_finds_maxima_that_come_late(backend, height):
    for position, ref_position in ((300, 9000), (9000, 300), (4096, 4096), (9999, 0)):
        logits, ref_logits = torch.randn(2, 1, 1, 10_000)
        logits[..., position] = height
        ref_logits[..., ref_position] = height
        check_full(logits, ref_logits, backend)


@pytest.mark.parametrize("nowhere", [-math.inf, -1e9, -7e8, -1e30, torch.finfo(torch.float32).min])
def test_full_kl_of_rows_whose_first_blocks_are_all_masked_out(backend, nowhere):
    for length in (300, 4096, 5000):
        logits, ref_logits = torch.randn(2, 1, 2, 10_000)
        for masked in (logits, ref_logits):  # the policy's row, then both
            masked[..., :length] = nowhere
            want = exact_kl(*(z.masked_fill(z == nowhere, -math.inf) for z in (logits, ref_logits)))
            torch.testing.assert_close(
                full_kl(logits, ref_logits, backend=backend).double(), want, rtol=1e-6, atol=5e-6
            )


def test_full_kl_of_a_nan_logit_that_counts_is_nan_in_its_row_only(backend):
    for V in (5, 5000):
        for side in (0, 1):
            for bad in (math.nan, math.inf):
                pair = torch.randn(2, 1, 3, V)
                pair[side, 0, 1, V - 1] = bad
                assert full_kl(*pair, backend=backend).isnan().tolist() == [[False, True, False]]
        pair[1, 0, 2] = -math.inf
        assert full_kl(*pair, backend=backend)[0, 2].isnan()


def test_full_kl_and_its_gradients_are_zero_where_the_mask_is_false(backend):
    logits, ref_logits = torch.randn(2, 3, 4, 30)
    mask = torch.rand(3, 4) < 0.5
    upstream = torch.randn(3, 4)
    want = run_full(logits, ref_logits, backend, upstream)
    for bad in (math.nan, math.inf, -math.inf, 100.0):
        dirty = [z.masked_fill(~mask[..., None], bad) for z in (logits, ref_logits)]
        got = run_full(*dirty, backend, upstream, mask=mask)
        for x, y in zip(got, want):
            assert torch.equal(x[mask], y[mask]) and (x[~mask] == 0).all()
    got = run_full(*dirty, backend, upstream.fill_(math.nan), mask=torch.zeros_like(mask))
    assert all((x == 0).all() for x in got)


def test_full_kl_takes_a_temperature_per_row(backend):
    logits, ref_logits = torch.randn(2, 3, 4, 30) * 3
    for temperature in (torch.rand(3, 4) + 0.5, torch.rand(3, 1) + 0.5, (torch.rand(4, 3) + 0.5).T):
        check_full(logits, ref_logits, backend, temperature.expand(3, 4))
        together = run_full(logits, ref_logits, backend, temperature=temperature)
        one = run_full(
            logits[1:2, 2:3],
            ref_logits[1:2, 2:3],
            backend,
            temperature=temperature.expand(3, 4)[1, 2].item(),
        )
        for x, y in zip(together, one):
            torch.testing.assert_close(x[1:2, 2:3], y, rtol=1e-6, atol=1e-6)


def test_full_kl_gives_a_gradient_to_either_side_alone(backend):
    logits, ref_logits = torch.randn(2, 2, 3, 40)
    _, *want = run_full(logits, ref_logits, backend)
    for side in (0, 1):
        leaves = [logits.clone(), ref_logits.clone()]
        leaves[side].requires_grad_()
        full_kl(*leaves, backend=backend).sum().backward()
        assert torch.equal(leaves[side].grad, want[side]) and leaves[1 - side].grad is None


def test_full_kl_of_strided_rows_and_expanded_gradients(backend):
    base, ref_base = torch.randn(3, 6, 40), torch.randn(6, 3, 40)
    mask = torch.rand(3, 10)[:, ::2] < 0.7
    got = []
    for copy in (False, True):
        leaves = [z.clone().requires_grad_() for z in (base, ref_base)]
        views = [leaves[0][:, :-1], leaves[1].transpose(0, 1)[:, 1:]]
        views = [z.contiguous() if copy else z for z in views]
        full_kl(*views, mask=mask, backend=backend).sum().backward()
        got.append([z.grad for z in leaves])
    assert all(torch.equal(x, y) for x, y in zip(*got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_full_kl_is_bitwise_independent_of_the_batch_around_it(backend, dtype):
    logits, ref_logits = torch.randn(2, 3, 2, 777).to(dtype)
    together = run_full(logits, ref_logits, backend)
    alone = run_full(logits[1:2, 1:], ref_logits[1:2, 1:], backend)
    assert all(torch.equal(x[1:2, 1:], y) for x, y in zip(together, alone))


def test_full_kl_is_bitwise_independent_of_the_number_of_threads():
    cpp = pytest.importorskip("rlhf_core.cpp", reason="the C++ extension is not built")
    logits, ref_logits = torch.randn(2, 4, 40, 5003)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        kl, lse = cpp.full_kl_fwd(logits, ref_logits, None, 1.0)
        results.append(
            [kl, lse, *cpp.full_kl_bwd(kl, logits, ref_logits, None, 1.0, kl, lse, True, True)]
        )
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results))


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0, 5), (0, 5)])
def test_full_kl_of_an_empty_batch_is_empty(backend, shape):
    kl, *grads = run_full(torch.zeros(shape), torch.zeros(shape), backend)
    assert kl.shape == shape[:-1] and all(x.shape == shape for x in grads)


def test_full_kl_of_any_number_of_axes_and_of_unequal_dtypes(backend):
    logits, ref_logits = torch.randn(2, 2, 3, 4, 9)
    want = full_kl(logits, ref_logits, backend=backend)
    assert want.shape == (2, 3, 4)
    for index in ((), (0,), (1, 2), (1, 2, 3)):
        assert torch.equal(full_kl(logits[index], ref_logits[index], backend=backend), want[index])
    half = ref_logits.bfloat16()
    assert torch.equal(
        full_kl(logits, half, backend=backend), full_kl(logits, half.float(), backend=backend)
    )


def test_full_kl_leaves_its_inputs_alone_and_gradients_of_two_losses_add(backend):
    logits, ref_logits = torch.randn(2, 2, 3, 20)
    _, once, _ = run_full(logits, ref_logits, backend)
    leaf, before = logits.clone().requires_grad_(), ref_logits.clone()
    (
        full_kl(leaf, ref_logits, backend=backend) + full_kl(leaf, ref_logits, backend=backend)
    ).sum().backward()
    assert torch.equal(leaf.detach(), logits) and torch.equal(ref_logits, before)
    assert torch.equal(leaf.grad, 2 * once)


def test_full_kl_reference_gradients_pass_gradcheck():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[True, True, False], [True, False, True]])
    for temperature in (0.7, torch.rand(2, 3, dtype=torch.float64) + 0.5):
        assert torch.autograd.gradcheck(
            lambda a, b, T=temperature: full_kl_reference(a, b, T, mask), inputs
        )


def test_bad_input_to_full_kl_raises_with_the_offending_value(backend):
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"ref_logits.*\(2, 3, 5\)"):
        full_kl(x, torch.zeros(2, 3, 5), backend=backend)
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        full_kl(torch.zeros(2, 0), torch.zeros(2, 0), backend=backend)
    with pytest.raises(ValueError, match="-1"):
        full_kl(x, x, temperature=-1.0, backend=backend)
    with pytest.raises(ValueError, match=r"mask.*\(3,\)"):
        full_kl(x, x, mask=torch.ones(3, dtype=torch.bool), backend=backend)
    with pytest.raises(TypeError, match=r"ref_logits.*int64"):
        full_kl(x, x.long(), backend=backend)


def test_full_kl_ignores_what_the_policy_cannot_sample_in_float32(backend):
    """p underflows to 0 and q is 0: adds 0, not 0 * inf."""
    logits, ref_logits = torch.tensor([[0.0, 0.0, -200.0]]), torch.tensor([[0.0, 1.0, -math.inf]])
    want = full_kl(logits[:, :2], ref_logits[:, :2], backend="reference")
    torch.testing.assert_close(full_kl(logits, ref_logits, backend=backend), want)
