"""linear_token_logprobs: log-probs and gradients of an output head without its full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_helpers import assert_as_accurate, cases
from torch.testing import assert_close

from rlhf_core import (
    backends,
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    linear_token_loss,
    linear_token_statistics,
    token_logprobs_and_entropy,
)
from rlhf_core.ops import linear_logprobs_blocks

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


@pytest.mark.parametrize(
    "backend, chunk_rows, bias, temperature",
    cases(
        ([1, 4, None], [False, True], [0.7, "per row"]),
        few=[(4, False, "per row"), (4, True, 0.7)],
    ),
    indirect=["backend"],
)
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
def test_likeliest_marks_argmax_targets_and_leaves_the_rest_unchanged(backend, block, dtype):
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


def test_all_tokens_that_tie_for_first_place_are_likeliest_and_none_next_to_nan(backend, block):
    targets = torch.tensor([0, 7, 14, 15, 16, 31, 32, 33, 49])
    hidden, weight = torch.ones(len(targets), 1), torch.zeros(50, 1)
    weight[[15, 32]] = 1  # at block boundaries
    likeliest = linear_token_statistics(hidden, weight, targets, backend=backend).likeliest
    assert targets[likeliest].tolist() == [15, 32]
    weight[7] = NAN
    assert not linear_token_statistics(hidden, weight, targets, backend=backend).likeliest.any()


@pytest.mark.parametrize(
    "backend, needs, with_entropy",
    cases(
        ([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1)], [False, True]),
        few=[((1, 0, 0), False), ((1, 0, 0), True), ((0, 1, 0), False)],
    ),
    indirect=["backend"],
)
def test_each_gradient_alone_is_the_same_and_frozen_tensors_get_none(
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


def test_masked_rows_are_not_computed_and_their_values_change_nothing(backend, block):
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
        (dict(hidden=None), TypeError, "hidden must be a float tensor, got NoneType"),
        (dict(hidden=torch.zeros(2, 4, 3)), ValueError, r"\(2, 4, 3\) and \(7, 5\)"),
        (dict(weight=torch.zeros(7, 5, dtype=torch.float64)), TypeError, "float64"),
        (dict(bias=torch.zeros(5)), ValueError, r"\(7,\), got \(5,\)"),
        (dict(targets=torch.zeros(2, 4)), TypeError, "float32"),
        (dict(targets=torch.full((2, 4), 7)), ValueError, r"target 7 at \(0, 0\)"),
        (dict(chunk_rows=-1), ValueError, "chunk_rows must be >= 0, got -1"),
        (dict(chunk_rows=0, backend="reference"), ValueError, "'triton' does, .* use reference"),
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


def test_with_a_frozen_head_the_forward_can_return_the_gradient(backend, block):
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


# ---- logits that stay on the chip


@pytest.fixture
def splits(monkeypatch):
    """Small splits, of two tiles each, and small blocks in the backward pass."""
    kernel = pytest.importorskip("rlhf_core.kernels.linear_logprobs")
    monkeypatch.setattr(kernel, "SPLIT", 256)
    for name in ("CPU_BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(linear_logprobs_blocks, name, 144)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_chip_values_and_gradients_are_as_accurate_as_those_of_logits_in_memory(
    backend, dtype, splits
):
    """No length is a multiple of a tile. 70 rows and 300 tokens have tiles beyond the first."""
    hidden, weight, b, targets, mask = case((70,), D=21, V=300, dtype=dtype)
    inputs = [x.requires_grad_() for x in (hidden, weight, b)]
    settings = dict(mask=mask, temperature=0.5 + torch.rand(70))
    targets = targets.masked_fill(~mask, -100)

    def on_chip(h, w, b):
        return linear_token_logprobs_and_entropy(
            h, w, targets, bias=b, backend=backend, chunk_rows=0, **settings
        )

    def in_memory(h, w, b):
        return linear_token_logprobs_and_entropy(
            h, w, targets, bias=b, backend="reference", **settings
        )

    truth = grads(in_memory, *(x.double() for x in inputs))
    on_chip, in_memory = grads(on_chip, *inputs), grads(in_memory, *inputs)
    for i, (got, other, true) in enumerate(zip(on_chip, in_memory, truth, strict=True)):
        assert got.dtype == other.dtype
        if dtype == torch.float32:
            assert_as_accurate(got, other, true)
        else:  # the logits are not rounded, the gradients are
            error, allowed = ((x.double() - true).norm() / true.norm() for x in (got, other))
            assert error <= (1e-6 if i < 2 else min(allowed, 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_on_chip_extreme_logits_are_those_of_the_reference(backend, splits):
    """A split without probability, targets without any, an offset, a NaN."""
    hidden, weight, b, targets, _ = case((6,), V=300)
    b += 1e4
    b[:256], b[290] = -math.inf, -math.inf
    targets[:] = torch.tensor([257, 290, 3, 299, 257, 280])
    hidden[3, 2] = NAN
    targets[4] = F.linear(hidden, weight, b)[4].argmax()
    settings = dict(bias=b, backend=backend, chunk_rows=0)
    got = linear_token_statistics(hidden, weight, targets, **settings)
    want = linear_token_logprobs_and_entropy(
        hidden.double(), weight.double(), targets, bias=b.double(), backend="reference"
    )
    assert_close([x.double() for x in got[:2]], list(want), rtol=1e-5, atol=2e-3, equal_nan=True)
    assert got.logprobs[1:3].tolist() == [-math.inf] * 2 and got.logprobs[3].isnan()
    assert got.likeliest[4] and not got.likeliest[1:4].any()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_on_chip_rows_give_the_same_bits_in_any_batch_and_zeros_without_a_gradient(backend, splits):
    hidden, weight, _, targets, _ = case((70,), V=300, bias=False)
    settings = dict(backend=backend, chunk_rows=0)
    every = linear_token_logprobs_and_entropy(hidden, weight, targets, **settings)
    some = linear_token_logprobs_and_entropy(hidden[65:], weight, targets[65:], **settings)
    assert_close([x[65:] for x in every], list(some), rtol=0, atol=0)
    hidden[1] = NAN
    hidden.requires_grad_()
    logprobs = linear_token_logprobs(hidden, weight, targets, **settings)
    logprobs[torch.arange(70) != 1].sum().backward()
    assert not hidden.grad[1].any() and hidden.grad[0].all() and hidden.grad.isfinite().all()


# ---- linear_token_loss

N = 11
SIZES = (0, 3, 0, 1, 5, 0, 2, 0)  # groups without a target lie first, between and last


def loss_case(dtype=torch.float32):
    """Leaves (hidden, weight, bias, two extras), targets, temperature (N,)."""
    hidden, weight, b, targets, _ = case((N,), dtype=dtype)
    extras = torch.randn(N), torch.randn(N, 2)
    leaves = [x.requires_grad_() for x in (hidden, weight, b, *extras)]
    return leaves, targets, torch.linspace(0.5, 2, N)


@pytest.fixture
def chunk(monkeypatch):
    """Sets how many whole rows of logits a chunk may have."""

    def set_chunk(most, V=50):
        for name in ("CPU_WHOLE", "GPU_WHOLE"):
            monkeypatch.setattr(linear_logprobs_blocks, name, most * V)

    return set_chunk


def grouped_losses(sizes, seen=None):
    """Losses in which every target of a group matters to the others: squared sums of a group.

    They depend on the log-probs, the entropy and two extras, and differ from group to group.
    """
    sizes = torch.ones(N, dtype=torch.int64) if sizes is None else torch.tensor(sizes)

    def losses(found, groups, x, y):
        seen is None or seen.append(len(found.logprobs))
        counts = sizes[groups].tolist()
        scale = torch.arange(1, 1 + len(sizes))[groups]
        rows = found.logprobs + 0.3 * found.entropy * x + y.square().sum(dim=-1)
        sums = torch.stack([part.sum() for part in rows.split(counts)])
        return (scale * sums.square()).sum(), sums, torch.stack((rows, x), dim=-1)

    return losses


def outputs_and_gradients(results, leaves):
    assert not any(x.requires_grad for x in results[1:])
    return [*results, *torch.autograd.grad(results[0], leaves)]


def plainly(leaves, targets, temperature, losses):
    """The loss from whole logits, log_softmax and autograd, in the dtype of the leaves."""
    hidden, weight, b, *extras = leaves
    z = F.linear(hidden, weight, b) / temperature.to(hidden.dtype)[:, None]
    log_p = z.log_softmax(-1)
    found = linear_logprobs_blocks.TokenStatistics(
        log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    )
    loss, *outputs = losses(found, slice(None), *extras)
    return outputs_and_gradients((loss, *(x.detach() for x in outputs)), leaves)


@pytest.mark.parametrize("most", [1, 4, 100])
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["every target alone", "groups"])
def test_a_loss_its_outputs_and_all_gradients_match_float64(backend, most, sizes, chunk):
    """Groups stay whole, whatever fits a chunk, and outputs come in the order of the rows."""
    leaves, targets, T = loss_case()
    chunk(most)
    seen = []
    got = linear_token_loss(
        *leaves[:2], targets, grouped_losses(sizes, seen), bias=leaves[2], temperature=T,
        sizes=None if sizes is None else torch.tensor(sizes), extras=tuple(leaves[3:]),
        backend=backend,
    )  # fmt: skip
    got = outputs_and_gradients(got, leaves)
    losses = grouped_losses(sizes)
    truth = plainly([x.detach().double().requires_grad_() for x in leaves], targets, T, losses)
    assert [x.shape for x in got] == [x.shape for x in truth]
    for x, float32, true in zip(got, plainly(leaves, targets, T, losses), truth):
        unit = true.abs().max()
        assert_as_accurate(x / unit, float32 / unit, true / unit)
    if backend == "reference":
        assert seen == [N]
    elif sizes is None:
        assert seen == {1: [1] * N, 4: [4, 4, 3], 100: [N]}[most]
    else:
        assert seen == {1: [3, 1, 5, 2], 4: [4, 5, 2], 100: [N]}[most]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradients_of_a_loss_have_the_dtypes_of_their_tensors(backend, dtype, chunk):
    leaves, targets, T = loss_case(dtype)
    chunk(1)
    losses = grouped_losses(None)
    got = linear_token_loss(
        *leaves[:2], targets, losses, bias=leaves[2], temperature=T, extras=tuple(leaves[3:]),
        backend=backend,
    )  # fmt: skip
    got = outputs_and_gradients(got, leaves)
    assert [x.dtype for x in got] == [torch.float32] * 3 + [dtype] * 3 + [torch.float32] * 2
    truth = plainly([x.detach().double().requires_grad_() for x in leaves], targets, T, losses)
    for x, true in zip(got, truth):
        assert (x.double() - true).norm() <= 4 * torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_the_gradients_of_a_loss_in_16_bits_add_up_in_float32(backend, chunk):
    """A bfloat16 sum of 512 equal numbers would stop growing half-way."""
    hidden, targets = torch.ones(512, 1).bfloat16(), torch.zeros(512, dtype=torch.int64)
    head = torch.zeros(4, 1).bfloat16().requires_grad_(), torch.zeros(4).bfloat16().requires_grad_()
    chunk(1, V=4)
    loss, *_ = linear_token_loss(
        hidden, head[0], targets, lambda found, _: (found.logprobs.sum(),), bias=head[1],
        backend=backend,
    )  # fmt: skip
    loss.backward()
    for x in head:
        assert x.grad.flatten().tolist() == [512 * 0.75, *[-512 * 0.25] * 3]


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_gradient_of_a_loss_alone_is_the_same_and_frozen_tensors_get_none(
    backend, needs, chunk
):
    leaves, targets, T = loss_case()
    chunk(4)

    def run(*needs):
        own = [x.detach().clone().requires_grad_(bool(n)) for x, n in zip(leaves, (*needs, 1, 1))]
        loss, *_ = linear_token_loss(
            *own[:2], targets, grouped_losses(None), bias=own[2], temperature=T,
            extras=tuple(own[3:]), backend=backend,
        )  # fmt: skip
        loss.backward()
        return [x.grad for x in own]

    for needed, got, full in zip((*needs, 1, 1), run(*needs), run(1, 1, 1)):
        if needed:
            assert_close(got, full, rtol=1e-5, atol=1e-6)
        else:
            assert got is None


def logprobs_only(found, groups, *extras):
    return (found.logprobs.square().sum(),)


def entropy_only(found, groups, *extras):
    return (found.entropy.square().sum(),)


def extras_only(found, groups, x, y):
    return (x.square().sum(),)


@pytest.mark.parametrize("losses", [logprobs_only, entropy_only, extras_only])
def test_inputs_that_a_loss_does_not_use_get_a_gradient_of_zero(backend, losses, chunk):
    leaves, targets, T = loss_case()
    chunk(4)
    loss, *_ = linear_token_loss(
        *leaves[:2], targets, losses, bias=leaves[2], temperature=T, extras=tuple(leaves[3:]),
        backend=backend,
    )  # fmt: skip
    got = torch.autograd.grad(loss, leaves, materialize_grads=True)
    truth = [x.detach().double().requires_grad_() for x in leaves]
    hidden, weight, b, *extras = truth
    log_p = (F.linear(hidden, weight, b) / T.double()[:, None]).log_softmax(-1)
    found = linear_logprobs_blocks.TokenStatistics(
        log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    )
    want = torch.autograd.grad(
        losses(found, slice(None), *extras)[0], truth, materialize_grads=True
    )
    assert_close([x.double() for x in got], list(want), rtol=1e-5, atol=1e-5)


def test_the_gradients_of_a_loss_scale_with_the_upstream_one_and_add_up(backend, chunk):
    leaves, targets, T = loss_case()
    chunk(4)

    def loss():
        settings = dict(bias=leaves[2], temperature=T, extras=tuple(leaves[3:]), backend=backend)
        return linear_token_loss(*leaves[:2], targets, grouped_losses(None), **settings)[0]

    once = [x.clone() for x in torch.autograd.grad(loss(), leaves)]
    (-2.5 * loss()).backward()
    loss().backward()
    assert_close([x.grad for x in leaves], [-1.5 * x for x in once], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_a_second_backward_through_a_loss_raises(backend):
    leaves, targets, _ = loss_case()
    loss, *_ = linear_token_loss(*leaves[:2], targets, logprobs_only, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


@pytest.mark.parametrize("sizes", [None, (), (0, 0)])
def test_a_loss_of_no_targets_calls_its_function_once_and_has_gradients_of_zero(backend, sizes):
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    extra = torch.zeros(0, requires_grad=True)
    calls = []

    def losses(found, groups, x):
        calls.append(groups)
        return (found.logprobs * x + found.entropy).sum(), found.logprobs

    loss, logprobs = linear_token_loss(
        hidden, weight, torch.zeros(0, dtype=torch.int64), losses, extras=(extra,),
        sizes=None if sizes is None else torch.tensor(sizes, dtype=torch.int64), backend=backend,
    )  # fmt: skip
    loss.backward()
    assert loss == 0 and logprobs.shape == (0,) and calls == [slice(None)]
    assert hidden.grad.shape == (0, 8) and not weight.grad.any() and extra.grad.shape == (0,)


def test_a_loss_gets_the_likeliest_targets_if_it_asks(backend, chunk):
    leaves, targets, T = loss_case()
    logits = F.linear(*(x.detach() for x in leaves[:3]))
    targets = torch.where(torch.arange(N) % 2 == 0, logits.argmax(-1), targets)
    want = (logits.argmax(-1) == targets).tolist()
    assert 0 < sum(want) < N
    for most, trains in ((4, True), (100, True), (4, False)):
        chunk(most)
        for asked in (False, True):
            with torch.set_grad_enabled(trains):
                _, found = linear_token_loss(
                    *leaves[:2], targets,
                    lambda found, groups, asked=asked: (
                        found.logprobs.sum(),
                        found.likeliest if asked else torch.tensor([found.likeliest is None]),
                    ),
                    bias=leaves[2], temperature=T, likeliest=asked, backend=backend,
                )  # fmt: skip
            if asked:
                assert found.tolist() == want and found.dtype == torch.bool
            else:  # the reference computes them anyway
                assert found.all() or backend == "reference"


def test_without_gradient_a_loss_is_the_same_and_its_function_runs_once(backend, chunk):
    leaves, targets, T = loss_case()
    chunk(4)
    seen = []

    def run(losses, leaves):
        settings = dict(bias=leaves[2], temperature=T, extras=tuple(leaves[3:]), backend=backend)
        return linear_token_loss(
            *leaves[:2], targets, losses, sizes=torch.tensor(SIZES), **settings
        )

    want = run(grouped_losses(SIZES), leaves)
    with torch.no_grad():
        got = run(grouped_losses(SIZES, seen), leaves)
    frozen = run(grouped_losses(SIZES, seen), [x.detach() for x in leaves])
    assert seen == [N, N] and not any(x.requires_grad for x in (*got, *frozen))
    for x, y, true in zip(got, frozen, want):
        assert_close(x, true.detach(), rtol=1e-5, atol=1e-5)
        assert_close(y, true.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_a_loss_holds_the_logits_of_one_chunk_at_a_time(backend, chunk):
    N, D, V, most = 512, 8, 6000, 16
    hidden, weight, _, targets, _ = case((N,), D, V, bias=False)
    hidden.requires_grad_(), weight.requires_grad_()
    chunk(most, V)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        linear_token_loss(hidden, weight, targets, logprobs_only, backend=backend)[0].backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    gradients = 4 * (hidden.numel() + weight.numel())
    assert gradients < peak <= 4 * most * V + gradients + 64 * 4 * N < 4 * N * V / 2


def test_groups_that_are_not_all_the_targets_are_rejected():
    hidden, weight, _, targets, _ = case((15,))
    with pytest.raises(ValueError, match="sizes add up to 14, but there are 15 targets"):
        linear_token_loss(hidden, weight, targets, logprobs_only, sizes=torch.tensor([7, 7]))
