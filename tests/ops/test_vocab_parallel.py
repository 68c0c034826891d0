"""An output head whose rows lie on several processes: the same values and gradients as on one.

Starting a group takes seconds, so each test runs all its cases on one group.
"""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks
from op_helpers import assert_as_accurate
from torch.testing import assert_close

from rlhf_core import (
    linear_token_logprobs,
    linear_token_logprobs_and_entropy,
    linear_token_loss,
    linear_token_statistics,
)
from rlhf_core.ops import linear_logprobs_blocks

pytestmark = pytest.mark.slow
D = 16


def rows_of(rank, world, V):
    """The rows of the head on a rank: three on the first one, equal parts of the rest."""
    cuts = [0, *(3 + (V - 3) * i // (world - 1) for i in range(world))]
    return slice(cuts[rank], cuts[rank + 1])


def case(V=97, scale=1.0, dtype=torch.float32, N=40):
    """hidden, weight, bias, targets (the first ones are of the first rank), mask, temperatures."""
    torch.manual_seed(V)
    hidden = (torch.randn(N, D) * scale).to(dtype)
    weight, bias = (torch.randn(V, D) / D**0.5).to(dtype), torch.randn(V).to(dtype)
    targets, mask = torch.randint(V, (N,)), torch.rand(N) < 0.7
    targets[:3], mask[:3] = torch.tensor([0, 2, 3]), True
    return hidden, weight, bias, targets, mask, 0.5 + torch.rand(N)


def gradients(results, leaves):
    """The results and the gradients of a weighted sum of them."""
    results = results if isinstance(results, tuple) else (results,)
    g = torch.linspace(-1, 2, len(results[0])).to(results[0])
    loss = sum(((i + 1) * g * x).sum() for i, x in enumerate(results))
    return [*(x.detach() for x in results), *torch.autograd.grad(loss, leaves)]


def computed(inputs, op, temperature, here=slice(None), dtype=None, **options):
    """Results of the op, and gradients of hidden, weight and bias, for some rows of the head."""
    hidden, weight, bias, targets, mask, temperatures = inputs
    hidden = hidden.masked_fill(~mask[:, None], math.nan)
    targets = targets.masked_fill(~mask, -100)
    leaves = [x.to(dtype or x.dtype).clone() for x in (hidden, weight[here], bias[here])]
    leaves = [x.requires_grad_() for x in leaves]
    temperature = temperatures.to(leaves[0]) if temperature == "per row" else temperature
    options |= dict(bias=leaves[2], temperature=temperature, mask=mask)
    return gradients(op(*leaves[:2], targets, **options), leaves)


OPS = (linear_token_logprobs, linear_token_logprobs_and_entropy)
CASES = [
    *itertools.product(
        ("reference", "cpp"), OPS, (97, 5003), (1.0, 100.0), (0.7, "per row"), (16,)
    ),
    *(("triton", op, 97, 1.0, T, 16) for op, T in zip(OPS, (0.7, "per row"))),
    ("triton", OPS[1], 97, 1.0, 0.7, 0),
]


def compute_on_ranks(rank, world):
    return [
        computed(
            case(V, scale), op, T, rows_of(rank, world, V), backend=backend,
            chunk_rows=chunk_rows, group=dist.group.WORLD,
        )
        for backend, op, V, scale, T, chunk_rows in CASES
    ]  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
def test_values_and_gradients_are_as_accurate_as_those_of_the_whole_head(world, tmp_path):
    ranks = run_ranks(compute_on_ranks, world, tmp_path)
    for (backend, op, V, scale, T, _), *found in zip(CASES, *ranks, strict=True):
        inputs = case(V, scale)
        truth = computed(inputs, op, T, dtype=torch.float64)
        single = computed(inputs, op, T, backend=backend)
        n = len(truth) - 3  # results; then the gradients of hidden, weight and bias
        for other in found[1:]:
            assert_close(other[: n + 1], found[0][: n + 1], rtol=0, atol=0)
        got = [*found[0][: n + 1], *(torch.cat([x[i] for x in found]) for i in (n + 1, n + 2))]
        for x, float32, true in zip(got, single, truth, strict=True):
            unit = true.abs().max().clamp_min(1)
            assert_as_accurate(x / unit, float32 / unit, true / unit)


# ---- linear_token_loss

SIZES = (5, 0, 9, 1, 14, 11)


def grouped_losses(found, groups, x):
    """A loss that depends on all its arguments, and three outputs."""
    rows = found.logprobs * x + 0.3 * found.entropy.square()
    scale = 1.0 + torch.arange(len(SIZES))[groups]
    sums = torch.stack([part.sum() for part in rows.split(list(SIZES[groups]))])
    return (scale * sums.square()).sum() / 100, sums, rows, found.likeliest


def loss_and_gradients(inputs, here=slice(None), dtype=None, **options):
    hidden, weight, bias, targets, _, temperatures = inputs
    leaves = [hidden, weight[here], bias[here], torch.linspace(-1, 1, len(hidden))]
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in leaves]
    loss, *outputs = linear_token_loss(
        *leaves[:2], targets, grouped_losses, bias=leaves[2], extras=(leaves[3],), likeliest=True,
        temperature=temperatures, sizes=torch.tensor(SIZES), **options,
    )  # fmt: skip
    return [loss.detach(), *outputs, *torch.autograd.grad(loss, leaves)]


def compute_losses_on_ranks(rank, world):
    linear_logprobs_blocks.CPU_WHOLE = 15 * 47  # about three chunks
    options = dict(here=rows_of(rank, world, 97), group=dist.group.WORLD)
    return [
        loss_and_gradients(likely(case()), backend=backend, **options)
        for backend in ("reference", "cpp", "triton")
    ]


def likely(inputs):
    """The same with the most likely token as every other target."""
    hidden, weight, bias, targets, *rest = inputs
    best = torch.nn.functional.linear(hidden, weight, bias).argmax(-1)
    return hidden, weight, bias, best.where(torch.arange(len(best)) % 2 == 0, targets), *rest


def test_a_loss_and_its_gradients_are_those_of_the_whole_head(tmp_path):
    ranks = run_ranks(compute_losses_on_ranks, 3, tmp_path)
    truth = loss_and_gradients(likely(case()), dtype=torch.float64)
    assert 0.4 < truth[3].float().mean() < 0.9  # likeliest
    for backend, *found in zip(("reference", "cpp", "triton"), *ranks, strict=True):
        single = loss_and_gradients(likely(case()), backend=backend)
        for other in found[1:]:
            for i in (0, 1, 2, 3, 4, 7):  # all but the gradients of weight and bias
                assert_close(other[i], found[0][i], rtol=0, atol=0)
        got = list(found[0])
        got[5:7] = (torch.cat([x[i] for x in found]) for i in (5, 6))
        assert torch.equal(got[3], truth[3])
        for x, float32, true in zip(got, single, truth, strict=True):
            unit = true.double().abs().max()
            assert_as_accurate(x / unit, float32 / unit, true / unit)


# ---- what ranks send, and what lies across their borders


def traffic_of_ranks(rank, world):
    """What each all-reduce of a forward, of a backward, of a loss adds up: (operation, numbers)."""
    sent, all_reduce = [], dist.all_reduce

    def counted(x, op, group):
        sent.append((str(op).split(".")[-1], x.numel()))
        all_reduce(x, op, group)

    dist.all_reduce = counted
    hidden, weight, _, targets, *_ = case()
    here, group = rows_of(rank, world, 97), dist.group.WORLD
    hidden, head = hidden.requires_grad_(), weight[here].requires_grad_()
    found = linear_token_logprobs_and_entropy(hidden, head, targets, group=group)
    forward = list(sent)
    sum(x.sum() for x in found).backward()
    backward = sent[len(forward) :]
    linear_token_logprobs(hidden.detach(), head, targets, group=group).sum().backward()
    frozen = sent[len(forward) + len(backward) :]
    return forward, backward, frozen


def test_a_few_numbers_per_token_are_sent_and_one_gradient_of_the_hidden_states(tmp_path):
    N = 40
    for forward, backward, frozen in run_ranks(traffic_of_ranks, 2, tmp_path):
        assert forward == [("MAX", N), ("SUM", 3 * N)]
        assert backward == [("SUM", N * D)]
        assert frozen == [("MAX", N), ("SUM", 2 * N)]


def statistics_on_ranks(rank, world, inputs, rows):
    group, results = dist.group.WORLD, []
    for backend, (hidden, weight, bias, targets) in itertools.product(("reference", "cpp"), inputs):
        here = slice(*rows[rank : rank + 2])
        hidden, head = hidden.requires_grad_(), weight[here].clone().requires_grad_()
        found = linear_token_statistics(
            hidden, head, targets, bias=bias[here], group=group, backend=backend
        )
        both = torch.autograd.grad(found.logprobs.sum(), (hidden, head))
        results.append([*(x.detach() for x in found), *both])
    return results


def test_ties_nan_and_impossible_tokens_are_those_of_the_whole_head(tmp_path):
    """Rank 0 has the tokens 0 to 3, rank 1 the tokens 4 to 9."""
    targets = torch.arange(10)
    weight, zero = torch.zeros(10, D), torch.zeros(10)
    ties = weight.clone()
    ties[[1, 3, 4]] = 1
    nan = weight.clone()
    nan[2, 0] = math.nan
    first, second = zero.clone(), zero.clone()
    first[:4] = second[4:] = -math.inf  # a rank without probability
    offset = 1e4 + torch.linspace(0, 1, 10)
    inputs = [
        (torch.ones(10, D), w, b, targets)
        for w, b in ((ties, zero), (nan, zero), (weight, first), (weight, second), (weight, offset))
    ]
    ranks = run_ranks(statistics_on_ranks, 2, tmp_path, inputs, [0, 4, 10])
    for got in zip(*ranks):
        for x, y in zip(got[0][:4], got[1][:4]):
            assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    for (hidden, weight, bias, _), *found in zip(inputs * 2, *ranks):
        leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        want = linear_token_statistics(*leaves, targets, bias=bias.double())
        wanted = [*want, *torch.autograd.grad(want.logprobs.sum(), leaves)]
        got = [*found[0][:4], torch.cat([x[4] for x in found])]
        for x, y in zip(got, wanted, strict=True):
            assert_close(x.double(), y.double(), rtol=1e-6, atol=2e-6, equal_nan=True)
    assert ranks[0][0][2].nonzero().flatten().tolist() == [1, 3, 4]
    assert not ranks[0][1][2].any()


def odd_calls_on_ranks(rank, world):
    """Second derivatives, 16 bits, no counted token, no token, one rank alone, torch.compile."""
    here, group = rows_of(rank, world, 97), dist.group.WORLD
    hidden, weight, _, targets, mask, _ = case()
    found = {}

    def call(hidden, head, **options):
        return linear_token_logprobs(hidden, head, targets, group=group, mask=mask, **options)

    def leaves(dtype=torch.float32):
        return [x.to(dtype).clone().requires_grad_() for x in (hidden, weight[here])]

    for backend in ("reference", "cpp"):
        both = leaves()
        first = torch.autograd.grad(call(*both, backend=backend).sum(), both[0], create_graph=True)
        found[f"second {backend}"] = torch.autograd.grad(first[0].square().sum(), both)
    both = leaves(torch.bfloat16)
    results = call(*both)
    found["bfloat16"] = [results, *torch.autograd.grad(results.sum(), both)]
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = [call(*leaves())]
    both = leaves()
    if rank == 1:  # the same values, with other strides
        both[0] = hidden.T.contiguous().T.requires_grad_()
    results = call(*both)
    found["strides"] = [results, *torch.autograd.grad(results.sum(), both)]
    both = leaves()
    nothing = linear_token_logprobs(
        *both, targets, group=group, mask=torch.zeros_like(mask), temperature=torch.ones(len(mask))
    )
    found["nothing"] = [nothing, *torch.autograd.grad(nothing.sum(), both)]
    empty = torch.zeros(2, 0, D, requires_grad=True)
    none = linear_token_logprobs(empty, both[1], targets[:0].view(2, 0), group=group)
    found["none"] = [none, *torch.autograd.grad(none.sum(), (empty, both[1]))]
    alone = [dist.new_group([r]) for r in range(world)][rank]
    found["alone"] = [linear_token_logprobs(hidden, weight, targets, group=alone)]
    compiled = torch.compile(lambda *both: call(*both).square().sum(), backend="eager")
    found["compiled"] = torch.autograd.grad(compiled(*both), both)
    return {name: [x.detach() for x in results] for name, results in found.items()}


def test_second_derivatives_16_bits_empty_batches_and_compiled_code(tmp_path):
    ranks = run_ranks(odd_calls_on_ranks, 2, tmp_path)
    hidden, weight, _, targets, mask, _ = case()

    def joined(name, at):
        return torch.cat([found[name][at] for found in ranks])

    def truth(dtype=torch.float64, power=1):
        both = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
        results = linear_token_logprobs(*both, targets, mask=mask)
        return both, results, torch.autograd.grad((results**power).sum(), both, create_graph=True)

    both, _, first = truth()
    want = torch.autograd.grad(first[0].square().sum(), both)
    for name in ("second reference", "second cpp"):
        got = ranks[0][name][0], joined(name, 1)
        assert_close([x.double() for x in got], list(want), rtol=1e-4, atol=1e-4)
    _, results, grads = truth(torch.bfloat16)
    got = ranks[0]["bfloat16"]
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for x, true in zip((*got[:2], joined("bfloat16", 2)), (results, *grads)):
        assert (x.double() - true).norm() <= 4 * torch.finfo(torch.bfloat16).eps * true.norm()
    assert_close(ranks[1]["autocast"][0], got[0], rtol=0, atol=0)
    assert not any(x.any() for name in ("nothing", "none") for x in ranks[0][name])
    assert ranks[0]["none"][0].shape == (2, 0)
    for found in ranks:
        assert_close(found["alone"][0], linear_token_logprobs(hidden, weight, targets))
    _, results, grads = truth()
    for found in ranks:
        got = [*found["strides"][:2], joined("strides", 2)]
        assert_close([x.double() for x in got], [results, *grads], rtol=1e-5, atol=1e-5)
    _, _, grads = truth(power=2)
    got = [ranks[0]["compiled"][0], joined("compiled", 1)]
    assert_close([x.double() for x in got], list(grads), rtol=1e-5, atol=1e-5)


# ---- bad input


def wrong_calls(rank, world):
    """The errors of calls that one rank or all make wrongly, and then a good call's result."""
    hidden, weight, bias, targets, mask, _ = case()
    here, group = rows_of(rank, world, 97), dist.group.WORLD
    head, group_of_first = weight[here], dist.new_group([0])
    good = dict(hidden=hidden, weight=head, targets=targets, group=group)
    on_last = {
        "width": dict(weight=head[:, :7]),
        "widths": dict(weight=head[:, :7], hidden=hidden[:, :7]),
        "dtype": dict(weight=head.double()),
        "dtypes": dict(weight=head.bfloat16(), hidden=hidden.bfloat16()),
        "no rows": dict(weight=head[:0]),
        "not a tensor": dict(hidden=None),
        "chunk": dict(chunk_rows=-1),
        "chunks": dict(chunk_rows=7),
        "temperature": dict(temperature=0.5),
        "bias": dict(bias=bias[here]),
        "count": dict(hidden=hidden[:9], targets=targets[:9]),
        "gradient": dict(hidden=hidden.clone().requires_grad_()),
        "backend": dict(backend="reference"),
        "hidden": dict(hidden=hidden.flip(0)),
        "nan": dict(hidden=hidden / 0),
        "order": dict(targets=targets.flip(0)),
        "mask": dict(mask=mask),
        "op": dict(op=linear_token_logprobs_and_entropy),
        "sizes": dict(op=a_loss, sizes=[20, 20]),
    }
    on_all = {
        "target": dict(targets=torch.full_like(targets, 97)),
        "negative": dict(targets=torch.full_like(targets, -1)),
        "type": dict(group="tensor parallel"),
        "sum": dict(op=a_loss, sizes=[1]),
    }
    on_first = {"sizes": dict(op=a_loss, sizes=[21, 19])}
    errors = {}
    for name in [*on_last, *on_all]:
        own = on_last if rank == world - 1 else on_first
        options = good | own.get(name, {}) | on_all.get(name, {})
        try:
            options.pop("op", linear_token_logprobs)(**options)
        except Exception as e:
            errors[name] = f"{type(e).__name__}: {e}"
    if rank > 0:
        with pytest.raises(ValueError, match="not a member of the group: call the op only on"):
            linear_token_logprobs(**(good | dict(group=group_of_first)))
    return errors, linear_token_logprobs(**good)


def a_loss(hidden, weight, targets, sizes, group):
    return linear_token_loss(
        hidden, weight, targets, lambda found, _: (found.logprobs.sum(),),
        sizes=torch.tensor(sizes), group=group,
    )  # fmt: skip


def test_bad_input_on_a_rank_is_an_error_on_every_rank(tmp_path):
    (first, result), *others, (last, _) = run_ranks(wrong_calls, 3, tmp_path)
    hidden, weight, _, targets, *_ = case()
    assert_close(result, linear_token_logprobs(hidden, weight, targets))  # the group still works
    for name, texts in {
        "width": ["rank 2 of the group failed: hidden must be (..., D)", "(40, 16) and (47, 7)"],
        "widths": ["width of hidden states must be equal on all ranks", "16 on rank 0, but 7 on"],
        "dtype": ["rank 2 of the group failed: weight is torch.float64"],
        "dtypes": ["dtype must be equal", "torch.float32 on rank 0, but torch.bfloat16 on rank 2"],
        "no rows": ["rank 2 of the group failed: logits must be (..., V)"],
        "not a tensor": ["rank 2 of the group failed: hidden must be a float tensor, got NoneType"],
        "chunk": ["rank 2 of the group failed: chunk_rows must be >= 0, got -1"],
        "chunks": ["chunk_rows must be equal", "None on rank 0, but 7 on rank 2"],
        "temperature": ["temperature must be equal", "1.0 on rank 0, but 0.5 on rank 2"],
        "bias": ["presence of a bias must be equal", "False on rank 0, but True on rank 2"],
        "count": ["number of targets must be equal", "40 on rank 0, but 9 on rank 2"],
        "gradient": ["requires_grad of (hidden, weight, bias) must be equal"],
        "backend": ["backend must be equal", "rlhf_core.cpp on rank 0, but reference on rank 2"],
        "hidden": ["the hidden states differ between rank 0 and rank 2"],
        "nan": ["the hidden states differ between rank 0 and rank 2"],
        "order": ["the targets or the mask differ between rank 0 and rank 2"],
        "mask": ["the targets or the mask differ between rank 0 and rank 2"],
        "op": ["entropy must be equal", "False on rank 0, but True on rank 2"],
        "sizes": ["sizes must be equal", "[21, 19] on rank 0, but [20, 20] on rank 2"],
        "target": ["target 97 at (0,) is outside [0, 97)"],
        "negative": ["target -1 at (0,) is outside [0, 97)"],
        "type": ["group must be a torch.distributed.ProcessGroup, got str"],
        "sum": ["sizes add up to 1, but there are 40 targets"],
    }.items():
        kind = "TypeError: " if name == "type" else "ValueError: "
        for errors in (first, *(errors for errors, _ in others)):
            assert errors[name].startswith(kind), errors[name]
            assert all(text in errors[name] for text in texts), errors[name]
        own = {"dtype": "TypeError", "not a tensor": "TypeError"}
        assert last[name].startswith(own.get(name, kind)), last[name]
        assert last[name].split(": ", 1)[1][:40] in first[name]
    assert first.keys() == last.keys()
