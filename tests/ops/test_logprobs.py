"""token_logprobs and entropy on every backend, against float64 log_softmax of the same logits."""

import math

import pytest
import torch
from op_helpers import TOLERANCES, assert_as_accurate

from rlhf_core import token_logprobs, token_logprobs_and_entropy
from rlhf_core.ops.logprobs import token_logprobs_reference

INF, NAN = math.inf, math.nan
LONG = 3 * 2048 + 5  # several blocks of every kernel, and a tail
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(logits, targets, temperature=1.0, mask=None, g=None, h=None):
    """(logprobs, entropy, dlogits) in float64, by log_softmax and autograd."""
    z = logits.detach().double().requires_grad_()
    log_p = torch.log_softmax(z / temperature, dim=-1)
    logprobs = log_p.gather(-1, targets[..., None].long())[..., 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0)).sum(-1)
    if mask is not None:
        logprobs, entropy = logprobs * mask, entropy * mask
    g = torch.ones_like(logprobs) if g is None else g
    h = torch.ones_like(entropy) if h is None else h
    (logprobs * g).sum().add((entropy * h).sum()).backward()
    return logprobs.detach(), entropy.detach(), z.grad


def run(logits, targets, backend, g=None, h=None, **kwargs):
    """(logprobs, entropy, dlogits) of an op call with incoming gradients g and h, default ones."""
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, backend=backend, **kwargs)
    g = torch.ones_like(logprobs) if g is None else g
    h = torch.ones_like(entropy) if h is None else h
    torch.autograd.backward((logprobs, entropy), (g, h))
    return logprobs.detach(), entropy.detach(), logits.grad


def assert_matches_float64(logits, targets, backend, g=None, h=None, **kwargs):
    got = run(logits, targets, backend, g, h, **kwargs)
    truth = exact(logits, targets, g=g, h=h, **kwargs)
    reference = run(logits, targets, "reference", g, h, **kwargs)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == logits.dtype
    for x, r, t, kind in zip(got, reference, truth, ("value", "value", logits.dtype)):
        assert_as_accurate(x, r, t, kind)
    assert not (got[0] > 0).any() and not (got[1] < 0).any()
    return got


def rows(*shape, dtype=torch.float32, scale=4.0):
    logits = (torch.randn(*shape) * scale).to(dtype)
    return logits, torch.randint(0, shape[-1], shape[:-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 1000, LONG])
def test_values_entropy_and_gradient_match_float64_for_any_vocabulary(backend, vocab, dtype):
    logits, targets = rows(2, 3, vocab, dtype=dtype)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    g, h = torch.randn(2, 3), torch.randn(2, 3)  # a non-uniform upstream
    _, entropy, _ = assert_matches_float64(
        logits, targets, backend, g, h, temperature=0.7, mask=mask
    )
    assert (entropy <= math.log(vocab) + 1e-5).all()


@pytest.mark.parametrize("vocab", [50257, 129920, 151936])
def test_values_entropy_and_gradient_match_float64_at_the_vocabularies_of_real_models(
    backend, vocab
):
    logits, targets = rows(1, 2, vocab, dtype=torch.bfloat16)
    assert_matches_float64(logits, targets, backend)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 5.0])
def test_temperature_scores_and_measures_the_distribution_sampled_from(backend, temperature):
    logits, targets = rows(2, 2, 300)
    logprobs, entropy, _ = assert_matches_float64(logits, targets, backend, temperature=temperature)
    p = torch.softmax(logits.double() / temperature, dim=-1)  # what a sampler draws from
    drawn = p.gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(logprobs.double(), drawn.log(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_offset_common_to_all_logits_costs_no_digits(backend, dtype, offset):
    logits, targets = rows(2, 2, 1000)
    logits = (logits + offset).to(dtype)
    got = run(logits, targets, backend, temperature=0.9)
    truth = exact(logits, targets, temperature=0.9)
    for x, t in zip(got[:2], truth):
        torch.testing.assert_close(x.double(), t, rtol=0, atol=1e-5)


def adversarial_rows():
    """name -> a row of LONG logits for which a naive softmax fails."""
    ramp = torch.linspace(-3, 3, LONG)
    spike = ramp.clone()
    spike[-1] = 90.0
    late = torch.full((LONG,), -200.0)
    late[5000:] = ramp[5000:]
    early = torch.full((LONG,), -200.0)
    early[:100] = ramp[:100]
    holes = ramp.clone()
    holes[::3] = -INF
    first_blocks_empty = ramp.clone()
    first_blocks_empty[:4500] = -INF
    one_hot = torch.full((LONG,), -INF)
    one_hot[LONG // 2] = 3.0
    near_tie = torch.full((LONG,), -INF)
    near_tie[7], near_tie[LONG - 1] = 1.0, 1.0
    return {
        "spike in the tail": spike,
        "first blocks far below": late,
        "later blocks far below": early,
        "some -inf": holes,
        "first blocks all -inf": first_blocks_empty,
        "one-hot": one_hot,
        "two-hot": near_tie,
        "all negative": ramp - 50,
        "all equal": torch.zeros(LONG),
        "alternating extremes": torch.tensor([3e4, -3e4]).repeat(LONG)[:LONG],
    }


@pytest.mark.parametrize("nowhere", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_a_finite_stand_in_for_minus_infinity_is_as_good_anywhere_in_a_row(backend, nowhere):
    """Hugging Face masks logits with finfo.min."""
    for start, stop in ((0, 1), (0, 300), (0, 4096), (5, 6), (4500, 9000)):
        logits = torch.randn(1, 9001)
        logits[:, start:stop] = nowhere
        targets = torch.tensor([9000])
        want = token_logprobs_and_entropy(
            logits.masked_fill(logits == nowhere, -INF).double(), targets, backend="reference"
        )
        z = logits.requires_grad_()
        got = token_logprobs_and_entropy(z, targets, backend=backend)
        torch.testing.assert_close([x.double() for x in got], list(want), rtol=1e-6, atol=2e-6)
        sum(got).backward()
        assert z.grad.isfinite().all() and not z.grad[:, start:stop].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(adversarial_rows()))
def test_adversarial_rows_match_float64(backend, name, dtype):
    logits = adversarial_rows()[name].to(dtype).repeat(2, 1)
    possible = (logits[0] > -INF).nonzero()[:, 0]
    targets = torch.stack([possible[0], possible[-1]])
    _, _, dlogits = assert_matches_float64(logits, targets, backend, temperature=0.9)
    assert (dlogits[logits == -INF] == 0).all()


def test_a_target_that_cannot_be_drawn_has_logprob_minus_infinity_and_a_finite_gradient(backend):
    logits, _ = rows(2, 40)
    logits[:, 7] = -INF
    logprobs, _, dlogits = assert_matches_float64(logits, torch.tensor([7, 8]), backend)
    assert logprobs[0] == -INF and dlogits.isfinite().all()


def test_rounding_makes_no_log_prob_positive_and_no_entropy_negative(backend):
    n = 16
    logits = torch.full((n, 3000), -400.0)
    logits[:, 7] = 0.0
    logits[:, 2500] = torch.linspace(17, 88.5, n)  # far above the row's first block
    logits[1::2, 2501] = logits[1::2, 2500]  # alone in the even rows, one of two in the odd ones
    logprobs, entropy, _ = run(logits, torch.full((n,), 2500), backend)
    assert (logprobs <= 0).all() and (entropy >= 0).all()
    want = torch.tensor([0.0, math.log(2)]).repeat(n // 2)
    torch.testing.assert_close(entropy, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs, -want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", [0, 3000, LONG - 1])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_or_plus_infinity_anywhere_in_a_row_gives_nan_for_that_row_alone(backend, bad, where):
    logits, targets = rows(3, LONG)
    logits[1, where] = bad
    logprobs, entropy, dlogits = run(logits, targets, backend)
    for x in (logprobs, entropy, dlogits.sum(-1)):
        assert x.isnan().tolist() == [False, True, False]


def test_a_row_of_minus_infinities_gives_nan(backend):
    logits, targets = rows(2, 300)
    logits[1] = -INF
    logprobs, entropy, _ = run(logits, targets, backend)
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_near_certain_target_is_formed_before_rounding(backend, dtype):
    logits = torch.zeros(1, 64, dtype=dtype)
    logits[0, 5] = 12.0  # p = 0.9996, which bfloat16 would round to 1 and the gradient to 0
    got = run(logits, torch.tensor([5]), backend, h=torch.zeros(1))[2]
    truth = exact(logits, torch.tensor([5]), h=torch.zeros(1))[2]
    relative = TOLERANCES[dtype][0] + 1e-3
    torch.testing.assert_close(got[0, 5].double(), truth[0, 5], rtol=relative, atol=0)


def test_one_gradient_at_a_time(backend):
    logits, targets = rows(2, 3, 50)
    for g, h in ((1.0, 0.0), (0.0, 1.0)):
        z = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs_and_entropy(z, targets, backend=backend)
        (logprobs if g else entropy).sum().backward()  # the other output gets no gradient
        truth = exact(logits, targets, g=torch.full((2, 3), g), h=torch.full((2, 3), h))[2]
        torch.testing.assert_close(z.grad.double(), truth, rtol=1e-5, atol=1e-6)


def test_token_logprobs_alone_are_those_with_entropy(backend):
    logits, targets = rows(2, 3, LONG)
    alone = token_logprobs(logits, targets, backend=backend)
    assert torch.equal(alone, token_logprobs_and_entropy(logits, targets, backend=backend)[0])


def test_reference_gradients_pass_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(0, 5, (2, 3)), torch.rand(2, 3) < 0.7
    assert torch.autograd.gradcheck(
        lambda z: token_logprobs_reference(z, targets, 0.8, mask), logits
    )


def test_float64_stays_float64_by_default():
    logits = torch.randn(3, 11, dtype=torch.float64)
    logprobs = token_logprobs(logits, torch.tensor([0, 5, 10]))
    assert logprobs.dtype == torch.float64
    torch.testing.assert_close(
        logprobs, torch.log_softmax(logits, -1)[range(3), [0, 5, 10]], rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (1, 1)])
def test_any_number_of_leading_axes(backend, shape):
    logits, targets = rows(*shape, 33)
    mask = torch.rand(shape) < 0.7
    got = run(logits, targets, backend, mask=mask)
    flat = run(logits.reshape(-1, 33), targets.reshape(-1), backend, mask=mask.reshape(-1))
    for x, f in zip(got, flat):
        assert torch.equal(x, f.reshape(x.shape))
    assert_matches_float64(logits, targets, backend, mask=mask)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_an_empty_batch_gives_empty_results_and_gradients(backend, shape):
    logits = torch.zeros(*shape, 7, requires_grad=True)
    targets, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, mask=mask, backend=backend)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == shape and logits.grad.shape == (*shape, 7)


VIEWS = {
    "all but the last position": lambda x: x[:, :-1],
    "all but the first position": lambda x: x[:, 1:],
    "every other position": lambda x: x[:, ::2],
    "axes swapped": lambda x: x.transpose(0, 1),
    "expanded batch": lambda x: x[:1].expand(3, *x.shape[1:]),
    "part of a wider vocabulary": lambda x: x[..., :61],
    "vocabulary not innermost": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}


@pytest.mark.parametrize("view", list(VIEWS))
def test_a_strided_view_gives_the_bits_of_its_copy_and_the_gradient_of_its_base(backend, view):
    base = torch.randn(4, 5, 64)
    results = []
    for copy in (False, True):
        leaf = base.clone().requires_grad_()
        logits = VIEWS[view](leaf)
        logits = logits.contiguous() if copy else logits
        torch.manual_seed(1)
        targets = torch.randint(0, logits.shape[-1], logits.shape[:-1])
        logprobs, entropy = token_logprobs_and_entropy(
            logits, targets, temperature=0.9, backend=backend
        )
        # One upstream gradient is expanded, the other dense.
        (logprobs.sum() + (entropy * entropy).sum()).backward()
        results.append((logprobs, entropy, leaf.grad))
    for strided, contiguous in zip(*results):
        torch.testing.assert_close(strided, contiguous, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])


def test_unaligned_and_strided_targets_and_masks(backend):
    logits, _ = rows(2, 4, 50)
    ids = torch.randint(0, 50, (2, 5))
    masks = torch.rand(5, 2) < 0.7
    got = run(logits, ids[:, 1:], backend, mask=masks.T[:, 1:])
    want = run(logits, ids[:, 1:].clone(), backend, mask=masks.T[:, 1:].clone())
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    int32 = run(logits, ids[:, 1:].int(), backend, mask=masks.T[:, 1:])
    assert all(torch.equal(x, y) for x, y in zip(got, int32))


@pytest.mark.parametrize("count, stride", [(2, 2**31 + 8), (3, 2**30 + 8)])
def test_offsets_beyond_2_to_the_31(backend, count, stride, tmp_path):
    on_gpu = torch.cuda.is_available() and backend == "triton"
    # An offset that wraps around then reads the memory before, and does not crash.
    start = 0 if on_gpu else 2**31
    size = start + (count - 1) * stride + 64
    if on_gpu:
        memory = torch.zeros(size, dtype=torch.float16)
    else:  # a sparse file: only the pages that are touched exist
        memory = torch.from_file(
            str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16
        )
    small, targets = rows(count, 1, 64, dtype=torch.float16)
    want = run(small, targets, backend)
    for shape, strides in (((count, 1, 64), (stride, 64, 1)), ((1, count, 64), (64, stride, 1))):
        leaf = memory.as_strided(shape, strides, start)
        leaf.copy_(small.view(shape))
        leaf.requires_grad_()
        ids = targets.view(shape[:2])
        logprobs, entropy = token_logprobs_and_entropy(
            leaf, ids, inplace_backward=True, backend=backend
        )
        (grad,) = torch.autograd.grad((logprobs.sum(), entropy.sum()), leaf)
        for x, y in zip((logprobs, entropy, grad), want):
            assert torch.equal(x, y.view(x.shape))


@pytest.mark.parametrize("vocab", [63, 1000, LONG])
def test_a_rows_result_is_bitwise_independent_of_the_batch_around_it(backend, vocab):
    if backend == "reference":
        pytest.skip("torch's own softmax promises no such thing")
    logits, targets = rows(3, 4, vocab)
    together = run(logits, targets, backend)
    for b, t in ((0, 0), (1, 3), (2, 2)):
        alone = run(logits[b, t], targets[b, t], backend)
        assert all(torch.equal(x[b, t], y) for x, y in zip(together, alone))


def test_the_same_call_gives_the_same_bits(backend):
    logits, targets = rows(2, 3, LONG)
    first, second = run(logits, targets, backend), run(logits, targets, backend)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_inputs_are_bit_identical_after_forward_and_backward(backend):
    logits, targets = rows(2, 3, 300)
    mask = torch.tensor([[True, False, True]] * 2)
    before = [x.clone() for x in (logits, targets, mask)]
    leaf = logits.requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(leaf, targets, mask=mask, backend=backend)
    (logprobs.sum() + entropy.sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip((logits, targets, mask), before))


def test_two_losses_on_one_logits_tensor_add_their_gradients(backend):
    logits, targets = rows(2, 3, 300)
    other = (targets + 1) % 300
    leaf = logits.clone().requires_grad_()
    loss = token_logprobs(leaf, targets, backend=backend).sum() + (leaf * leaf).sum()
    loss = loss + token_logprobs(leaf, other, temperature=2.0, backend=backend).sum()
    loss.backward()
    zero = torch.zeros(2, 3)
    truth = (
        exact(logits, targets, h=zero)[2]
        + exact(logits, other, 2.0, h=zero)[2]
        + 2 * logits.double()
    )
    torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_inplace_backward_gives_the_same_gradient_in_the_logits_own_memory(
    backend, dtype, with_entropy
):
    logits, targets = rows(2, 3, LONG, dtype=dtype)
    mask = torch.tensor([[True, False, True]] * 2)
    grads = []
    for inplace in (False, True):
        hidden = logits.clone().requires_grad_()
        z = hidden * 1  # not a leaf, like the output of a head
        logprobs, entropy = token_logprobs_and_entropy(
            z, targets, mask=mask, inplace_backward=inplace, backend=backend
        )
        (logprobs.sum() + (entropy.sum() if with_entropy else 0)).backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)
    if backend != "reference":
        assert torch.equal(z, grads[1])


def test_inplace_backward_leaves_a_view_with_shared_memory_alone(backend):
    row, targets = rows(1, 3, 20)
    leaf = row.clone().requires_grad_()
    token_logprobs(
        leaf.expand(2, 3, 20), targets.expand(2, 3), inplace_backward=True, backend=backend
    ).sum().backward()
    truth = exact(row.expand(2, 3, 20), targets.expand(2, 3), h=torch.zeros(2, 3))[2].sum(
        0, keepdim=True
    )
    torch.testing.assert_close(leaf.grad.double(), truth, rtol=1e-6, atol=1e-6)


def test_logits_and_targets_that_do_not_fit_raise_with_both_shapes(backend):
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*\(2, 4\)"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64), backend=backend)
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        token_logprobs(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), backend=backend)


def test_wrong_dtypes_raise_type_errors(backend):
    logits, targets = rows(2, 3, 5)
    with pytest.raises(TypeError, match=r"logits.*int64"):
        token_logprobs(logits.long(), targets, backend=backend)
    with pytest.raises(TypeError, match=r"targets.*float32"):
        token_logprobs(logits, targets.float(), backend=backend)
    with pytest.raises(TypeError, match=r"mask.*int64"):
        token_logprobs(logits, targets, mask=torch.ones(2, 3, dtype=torch.int64), backend=backend)
    with pytest.raises(ValueError, match=r"mask.*\(3, 2\)"):
        token_logprobs(logits, targets, mask=torch.ones(3, 2, dtype=torch.bool), backend=backend)


def test_targets_on_another_device_raise(backend):
    with pytest.raises(ValueError, match="meta"):
        token_logprobs(
            torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64, device="meta"), backend=backend
        )


@pytest.mark.parametrize("bad", [-1, 5, -100, 2**40])
def test_a_counted_target_outside_the_vocabulary_raises_with_its_value(backend, bad, monkeypatch):
    monkeypatch.setenv("RLHF_CORE_DEBUG", "1")  # otherwise GPU values are not checked
    with pytest.raises(ValueError, match=rf"{bad}\b.*\[0, 5\)"):
        token_logprobs(torch.zeros(3, 5), torch.tensor([0, bad, 4]), backend=backend)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_a_temperature_that_is_not_positive_and_finite_raises(backend, temperature):
    logits, targets = rows(2, 5)
    with pytest.raises(ValueError, match=f"temperature.*{temperature}"):
        token_logprobs(logits, targets, temperature=temperature, backend=backend)
