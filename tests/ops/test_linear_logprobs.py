"""linear_token_logprobs: log-probs and gradients of an output head without its full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from torch.testing import assert_close

from rlhf_core import (
    backends,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    linear_token_statistics,
    token_logprobs_and_entropy,
)
from rlhf_core.ops import linear_logprobs, linear_logprobs_blocks

NAN = float("nan")


def case(rows=(3, 5), D=16, V=50, dtype=torch.float32, bias=True):
    hidden = torch.randn(*rows, D).to(dtype)
    weight = (torch.randn(V, D) / D**0.5).to(dtype)
    return (
        hidden,
        weight,
        torch.randn(V).to(dtype) if bias else None,
        torch.randint(V, rows),
        torch.rand(rows) < 0.6,
    )


def grads(f, *tensors):
    """Values of f, and gradients of a weighted sum of them (None if a tensor requires none)."""
    leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    g = torch.linspace(-1, 2, out[0].numel()).view(out[0].shape)
    sum(((i + 1) * g * x).sum() for i, x in enumerate(out)).backward()
    return [*out, *(x.grad for x in leaves if x is not None and x.requires_grad)]


@pytest.fixture(params=[None, 16], ids=["one block", "blocks of 16"])
def block(request, monkeypatch):
    """Size of a block of the vocabulary."""
    if request.param:
        monkeypatch.setattr(linear_logprobs_blocks, "CPU_BLOCK", request.param)
        monkeypatch.setattr(linear_logprobs_blocks, "GPU_BLOCK", request.param)


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0.7, "per row"])
def test_values_and_gradients_are_those_of_the_whole_logits(
    backend, block, chunk_rows, bias, temperature
):
    hidden, weight, b, targets, mask = case(bias=bias)
    if temperature == "per row":
        temperature = 0.5 + torch.rand(3, 1)

    def fused(h, w, b):
        return linear_token_logprobs_and_entropy(
            h,
            w,
            targets,
            bias=b,
            temperature=temperature,
            mask=mask,
            chunk_rows=chunk_rows,
            backend=backend,
        )

    def whole(h, w, b):
        T = temperature.to(h.dtype) if isinstance(temperature, torch.Tensor) else temperature
        return token_logprobs_and_entropy(
            F.linear(h, w, b), targets, temperature=T, mask=mask, backend="reference"
        )

    inputs = [x if x is None else x.requires_grad_() for x in (hidden, weight, b)]
    truth = grads(whole, *(x if x is None else x.double() for x in inputs))
    for got, float32, true in zip(grads(fused, *inputs), grads(whole, *inputs), truth):
        assert_as_accurate(got, float32, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_known_and_the_rest_is_as_without_it(backend, block, dtype):
    hidden, weight, b, targets, mask = case(dtype=dtype)
    logits = F.linear(hidden, weight, b)
    targets = torch.where(torch.rand(3, 5) < 0.5, logits.argmax(-1), targets)
    settings = dict(bias=b, mask=mask, temperature=0.7, chunk_rows=4, backend=backend)
    got = linear_token_statistics(hidden, weight, targets, **settings)
    hits = (logits.argmax(-1) == targets) & mask
    assert got.likeliest.dtype == torch.bool and 0 < hits.sum() < mask.sum()
    assert torch.equal(got.likeliest, hits)
    assert_close(
        got[:2],
        linear_token_logprobs_and_entropy(hidden, weight, targets, **settings),
        rtol=0,
        atol=0,
    )


def test_tokens_that_tie_for_the_first_place_are_all_likeliest_and_beside_nan_none_is(
    backend, block
):
    hidden, weight, targets = torch.ones(50, 1), torch.zeros(50, 1), torch.arange(50)
    weight[[15, 32]] = 1  # at block boundaries
    likeliest = linear_token_statistics(hidden, weight, targets, backend=backend).likeliest
    assert likeliest.nonzero()[:, 0].tolist() == [15, 32]
    weight[7] = NAN
    assert not linear_token_statistics(hidden, weight, targets, backend=backend).likeliest.any()


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_each_gradient_alone_is_the_same_and_what_is_frozen_gets_none(
    backend, block, needs, with_entropy
):
    hidden, weight, b, targets, mask = case()
    op = linear_token_logprobs_and_entropy if with_entropy else linear_token_logprobs

    def run(*needs):
        leaves = [x.clone().requires_grad_(bool(n)) for x, n in zip((hidden, weight, b), needs)]
        out = op(
            leaves[0], leaves[1], targets, bias=leaves[2], mask=mask, chunk_rows=4, backend=backend
        )
        total = sum(x.square().sum() for x in out) if with_entropy else out.square().sum()
        total.backward()
        return [x.grad for x in leaves]

    for needed, got, full in zip(needs, run(*needs), run(1, 1, 1)):
        if needed:
            assert_close(got, full, rtol=1e-5, atol=1e-6)
        else:
            assert got is None


def test_masked_rows_are_not_computed_and_their_junk_goes_nowhere(backend, block):
    hidden, weight, _, targets, mask = case()
    hidden[~mask] = NAN
    targets = targets.masked_fill(~mask, -100)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = linear_token_logprobs_and_entropy(
        hidden, weight, targets, mask=mask, backend=backend
    )
    (logprobs + entropy).sum().backward()
    for x in (logprobs, entropy, hidden.grad):
        assert not x[~mask].any() and x[mask].all() and x.isfinite().all()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 3)])
def test_nothing_to_compute_gives_zeros(backend, shape):
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight = torch.randn(5, 8, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64)
    out = linear_token_logprobs(
        hidden, weight, targets, mask=torch.zeros(shape, dtype=torch.bool), backend=backend
    )
    out.sum().backward()
    assert out.shape == shape and not out.any() and not hidden.grad.any() and not weight.grad.any()


def test_a_block_of_tokens_that_cannot_be_sampled_adds_nothing(backend, block):
    """As in a padded vocabulary: bias -inf in whole blocks, even the first and the target's own."""
    hidden, weight, b, targets, _ = case((2, 3))
    b[:20], b[33:], targets[:] = -math.inf, -math.inf, 25
    targets[0, 0] = 49
    weight.requires_grad_()
    got = linear_token_logprobs_and_entropy(hidden, weight, targets, bias=b, backend=backend)
    want = token_logprobs_and_entropy(
        F.linear(hidden, weight, b).double(), targets, backend="reference"
    )
    assert_close([x.double() for x in got], list(want), rtol=1e-6, atol=2e-6)
    assert got[0][0, 0] == -math.inf
    got[0][1].sum().backward()
    assert (
        weight.grad.isfinite().all() and not weight.grad[:20].any() and not weight.grad[33:].any()
    )


def test_a_nan_stays_in_its_row(backend, block):
    hidden, weight, _, targets, _ = case((2, 3), bias=False)
    hidden[0, 1, 2] = NAN
    for x in linear_token_logprobs_and_entropy(hidden, weight, targets, backend=backend):
        assert x.isnan().tolist() == [[False, True, False], [False] * 3]


def test_a_common_offset_costs_no_digits(backend, block):
    hidden, weight, b, targets, _ = case((2, 3))
    b = b * 0 + 1e4
    got = linear_token_logprobs_and_entropy(hidden, weight, targets, bias=b, backend=backend)
    logits = torch.addmm(b, hidden.flatten(0, 1), weight.T).view(2, 3, -1)
    want = token_logprobs_and_entropy(logits.double(), targets, backend="reference")
    assert_close([x.double() for x in got], list(want), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_of_the_weight_add_up_in_float32(backend, dtype):
    hidden, weight, _, targets, _ = case((64,), V=9, dtype=dtype)
    weight.requires_grad_()
    linear_token_logprobs(hidden, weight, targets, chunk_rows=1, backend=backend).sum().backward()
    truth = weight.detach().double().requires_grad_()
    linear_token_logprobs(hidden.double(), truth, targets, backend="reference").sum().backward()
    assert weight.grad.dtype == dtype
    assert_close(weight.grad.double(), truth.grad, rtol=0.02, atol=0.1)


def test_autocast_brings_hidden_and_weight_together():
    hidden, weight, _, targets, _ = case(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_token_logprobs(hidden, weight.requires_grad_(), targets)
    want = linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert_close(got, want, rtol=0, atol=0)
    got.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_grows_with_the_chunk_not_with_the_rows(frozen):
    """Peak memory besides inputs, results, gradients: chunk_rows * V logits, and O(1) per row."""
    N, D, V, chunk_rows = 512, 8, 6000, 16
    hidden, weight, _, targets, _ = case((N,), D, V, bias=False)
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        linear_token_logprobs(hidden, weight, targets, chunk_rows=chunk_rows).sum().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    gradients = 4 * (hidden.numel() + (0 if frozen else weight.numel()))
    assert gradients < peak <= 4 * chunk_rows * V + gradients + 64 * 4 * N < 4 * N * V / 2


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(hidden=torch.zeros(2, 4, 3)), ValueError, r"\(2, 4, 3\) and \(7, 5\)"),
        (dict(weight=torch.zeros(7, 5, dtype=torch.float64)), TypeError, "float64"),
        (dict(bias=torch.zeros(5)), ValueError, r"\(7,\), got \(5,\)"),
        (dict(targets=torch.zeros(2, 4)), TypeError, "float32"),
        (dict(targets=torch.full((2, 4), 7)), ValueError, r"target 7 at \(0, 0\)"),
        (dict(chunk_rows=0), ValueError, "chunk_rows must be >= 1, got 0"),
        (dict(temperature=torch.zeros(2, 4)), ValueError, "got 0.0"),
        (
            dict(temperature=torch.ones(3, 4)),
            ValueError,
            r"\(3, 4\) does not broadcast to \(2, 4\)",
        ),
        (dict(temperature=torch.ones(1, requires_grad=True)), ValueError, "detach"),
        (dict(mask=torch.ones(2, 4)), TypeError, "bool"),
    ],
)
def test_bad_input_is_named(change, error, words):
    good = dict(
        hidden=torch.zeros(2, 4, 5),
        weight=torch.zeros(7, 5),
        targets=torch.zeros(2, 4, dtype=torch.int64),
    )
    with pytest.raises(error, match=words):
        linear_token_logprobs(**(good | change))


@pytest.mark.parametrize("chunk_rows", [4, 64])
def test_a_second_backward_gives_the_same_gradient(backend, block, chunk_rows):
    hidden, weight, _, targets, mask = case(bias=False)
    weight.requires_grad_()
    logprobs = linear_token_logprobs(
        hidden, weight, targets, mask=mask, chunk_rows=chunk_rows, backend=backend
    )
    first, second = (
        torch.autograd.grad(logprobs.sum(), weight, retain_graph=True)[0] for _ in range(2)
    )
    assert_close(first, second, rtol=0, atol=0)


def test_with_a_frozen_head_the_forward_can_say_the_gradient(backend, block):
    """The path that CUDA takes: dhidden for a gradient of 1 at each log-prob."""
    hidden, weight, b, targets, mask = case((11,), bias=True)
    impl = backends.resolve(backend, hidden)
    if impl is None:
        pytest.skip("the reference has no launchers")
    got = linear_logprobs_blocks.forward(
        impl, hidden, weight, b, targets, mask, 0.7, 4, False, False, True
    )
    leaf = hidden.double().requires_grad_()
    settings = dict(bias=b.double(), mask=mask, temperature=0.7, backend="reference")
    want = linear_token_logprobs(leaf, weight.double(), targets, **settings)
    want.sum().backward()
    assert_close(got[0].double(), want, rtol=1e-6, atol=2e-6)
    assert_close(got[4].double(), leaf.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("most", [1, 4, 100])
@pytest.mark.parametrize("sizes", [None, (3, 0, 1, 5)])
def test_a_loss_known_in_advance_gives_the_same_gradients_without_a_second_pass(
    backend, most, sizes, monkeypatch
):
    hidden, weight, b, targets, _ = case()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask.view(-1)[[0, 4, 5, 9, 13, 14]] = False
    hidden[~mask] = NAN
    weights = torch.linspace(-1, 2, 9)
    groups = (
        torch.arange(9)
        if sizes is None
        else torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    )
    seen = []
    for x in (hidden, weight, b):
        x.requires_grad_()

    def loss(logprobs, part=slice(None)):
        """Sum over the groups of their squared weighted sums."""
        seen.append(len(logprobs))
        some = torch.isin(groups, torch.arange(9 if sizes is None else 4)[part])
        return torch.zeros(9).index_add(0, groups[some], weights[some] * logprobs).square().sum()

    def step(**known):
        found = linear_token_statistics(
            hidden, weight, targets, bias=b, temperature=torch.linspace(0.5, 2, 3)[:, None],
            mask=mask, backend=backend, **known,
        )  # fmt: skip
        return [*found, *torch.autograd.grad(loss(found.logprobs[mask]), (hidden, weight, b))]

    expected = step()
    for name in ("CPU_WHOLE", "GPU_WHOLE"):
        monkeypatch.setattr(linear_logprobs_blocks, name, most * len(weight))
    if backend != "reference":
        monkeypatch.setattr(linear_logprobs_blocks, "backward", None)
        monkeypatch.setattr(linear_logprobs, "partial", lambda *args: None)
    seen.clear()
    for got, true in zip(
        step(loss_of=loss, sizes=None if sizes is None else torch.tensor(sizes)), expected
    ):
        assert_close(got, true, rtol=1e-5, atol=1e-6)
    if backend != "reference":
        parts = (
            {1: [3, 1, 5], 4: [4, 5], 100: [9]} if sizes else {1: [1] * 9, 4: [4, 4, 1], 100: [9]}
        )
        assert seen[:-1] == parts[most]  # groups stay whole; the last call is the step's own


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_a_loss_that_comes_out_otherwise_still_gets_its_gradient(backend):
    hidden, weight, b, targets, _ = case()

    def run(f, **known):
        h, w, c = (x.clone().requires_grad_() for x in (hidden, weight, b))
        logprobs, entropy = linear_token_logprobs_and_entropy(h, w, targets, bias=c, **known)
        loss = f(logprobs, entropy)
        loss.backward(retain_graph=True)
        once = [x.grad.clone() for x in (h, w, c)]
        loss.backward()
        assert_close([x.grad for x in (h, w, c)], [2 * x for x in once], rtol=1e-5, atol=1e-6)
        return once

    def expected(logprobs, rows):
        return logprobs.sum()

    for f in (
        lambda p, H: p.sum(),
        lambda p, H: 1.001 * p.sum(),
        lambda p, H: H.sum(),
        lambda p, H: (p + H).sum(),
    ):
        assert_close(run(f, loss_of=expected), run(f), rtol=1e-5, atol=1e-6)


def test_groups_that_are_not_the_counted_rows_are_refused():
    hidden, weight, _, targets, _ = case()
    with pytest.raises(ValueError, match="sizes add up to 14"):
        linear_token_statistics(
            hidden, weight, targets, loss_of=lambda p, rows: p.sum(), sizes=torch.tensor([7, 7])
        )
