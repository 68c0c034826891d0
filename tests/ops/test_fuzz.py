"""Every op on random shapes, layouts, dtypes, masks, special values, settings against float64.

RLHF_CORE_FUZZ=N runs N examples per op on cpp, and an eighth of that in Triton's slow interpreter.
"""

import math
import os

import pytest
import torch
from op_helpers import assert_as_accurate

import rlhf_core

hypothesis = pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis")
st = hypothesis.strategies

EXAMPLES = int(os.environ.get("RLHF_CORE_FUZZ", 100))
INF, NAN = math.inf, math.nan
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
VOCABULARIES = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33, 64, 129, 300])
TOKENS = st.lists(st.integers(0, 4), max_size=3).map(tuple)  # (...)
OFFSETS = st.sampled_from([0, 0, 1e4, -1e4])
GRIDS = st.tuples(st.integers(0, 4), st.sampled_from([0, 1, 2, 5, 16, 17, 40]))  # (B, T)


def normal(draw, shape, dtype=torch.float32, specials=(), offset=None):
    """Values with a random scale and offset, and some special values."""
    offset = draw(OFFSETS) if offset is None else offset
    x = torch.randn(shape) * draw(st.sampled_from([1.0, 1e-3, 4.0, 30.0])) + offset
    if specials:
        rate, choice = draw(st.sampled_from([0, 0, 0.02, 0.3, 1])), torch.tensor(specials)
        x = torch.where(torch.rand(shape) < rate, choice[torch.randint(len(choice), shape)], x)
    return laid_out(draw, x.to(dtype))


def laid_out(draw, x):
    """x in another memory layout; an expanded one also changes values."""
    kinds = ["contiguous", "unaligned"]
    if x.ndim > 0:
        kinds += ["sliced", "every other", "wider", "last axis outermost"] + ["expanded"] * (
            len(x) > 0
        )
    kinds += ["transposed"] * (x.ndim > 1)
    kind = draw(st.sampled_from(kinds))
    if kind == "unaligned":
        return (
            torch.cat([x.flatten(), x.flatten()[:1].sum()[None].to(x.dtype)])
            .roll(1)[1:]
            .view(x.shape)
        )
    if kind == "sliced":
        return torch.cat([x, x, x])[len(x) : 2 * len(x)]
    if kind == "every other":
        return x.repeat_interleave(2, dim=0)[::2]
    if kind == "wider":
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    if kind == "last axis outermost":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if kind == "expanded":
        return x[:1].expand(x.shape)
    return x.transpose(0, 1).contiguous().transpose(0, 1) if kind == "transposed" else x


def upstreams(draw, shape):
    return laid_out(
        draw, torch.randn(shape) * (torch.rand(shape) < draw(st.sampled_from([1.0, 0.5])))
    )


def masks(draw, shape):
    return laid_out(draw, torch.rand(shape) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])))


def temperatures(draw, shape):
    """A number, or a tensor that broadcasts to shape."""
    if draw(st.booleans()):
        return draw(st.sampled_from([0.05, 0.7, 1.0, 1, 5.0]))
    kept = [n if draw(st.booleans()) else 1 for n in shape][draw(st.integers(0, len(shape))) :]
    return laid_out(draw, torch.rand(kept) * 2 + 0.3)


def run(call, leaves, upstream, backend, dtype=None):
    """(outputs, gradients); the leaves in another dtype if one is given."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    outputs = call(*leaves, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [g.to(x.dtype) for g, x in zip(upstream, outputs)]
    grads = torch.autograd.grad(outputs[: len(upstream)], leaves, upstream, materialize_grads=True)
    return [x.detach() for x in outputs], grads


def check(
    call, leaves, upstream, backend, scale=lambda *truth: 1.0, comparable=None, gradient_scale=None
):
    """Compare values everywhere, and gradients where `comparable(*values)` is True.

    Errors of values are in units of scale(*values), those of gradients in units of
    gradient_scale(*values).
    """
    got, reference = (run(call, leaves, upstream, b) for b in (backend, "reference"))
    truth = run(call, leaves, upstream, "reference", torch.float64)
    unit = scale(*truth[0])
    for x, r, t in zip(got[0], reference[0], truth[0], strict=True):
        assert x.dtype == torch.float32 and x.shape == t.shape
        assert_as_accurate(x / unit, r / unit, t / unit)
    unit = unit if gradient_scale is None else gradient_scale(*truth[0])
    where = torch.ones((), dtype=torch.bool) if comparable is None else comparable(*truth[0])
    for leaf, x, r, t in zip(leaves, got[1], reference[1], truth[1], strict=True):
        assert x.dtype == leaf.dtype and x.shape == leaf.shape
        keep = (
            where[..., None].expand(x.shape)
            if where.ndim < x.ndim and where.ndim
            else where.expand(x.shape)
        )
        keep = keep & ~(t.abs() > 0.99 * torch.finfo(leaf.dtype).max)
        assert_as_accurate(*((y / unit).masked_fill(~keep, 0) for y in (x, r, t)), leaf.dtype)
    return got


def fuzz_token_logprobs(draw, backend, op=rlhf_core.token_logprobs_and_entropy):
    shape, V = draw(TOKENS), draw(VOCABULARIES)
    logits = normal(draw, (*shape, V), draw(DTYPES), (-INF, -INF, -INF, INF, NAN))
    targets, mask = torch.randint(V, shape), draw(st.sampled_from([None, masks(draw, shape)]))
    if mask is not None and V % 2:
        targets = targets.masked_fill(~mask, -100)
    targets = laid_out(draw, targets.to(draw(st.sampled_from([torch.int64, torch.int32]))))
    if mask is not None and ((targets < 0) & mask).any():  # expanded, although the mask is not
        targets = targets.clamp_min(0)
    T = temperatures(draw, shape)
    g, h = upstreams(draw, shape), upstreams(draw, shape)
    unit = (1 + g.abs().clamp_max(1e9) + h.abs() * (1 + math.log(V))) * (1 + 1 / torch.as_tensor(T))

    def call(z, backend):
        return op(z, targets, temperature=T, mask=mask, backend=backend)

    check(
        call, [logits], [g, h], backend,
        comparable=lambda logprobs, entropy: entropy.isfinite(),
        gradient_scale=lambda *_: unit[..., None],
    )  # fmt: skip
    if mask is None:  # without gradient or entropy the code path differs
        alone = rlhf_core.token_logprobs(logits, targets, temperature=T, backend=backend)
        torch.testing.assert_close(alone, call(logits, backend)[0], rtol=0, atol=0, equal_nan=True)


def fuzz_linear_token_logprobs(draw, backend):
    shape, V, D, dtype = (
        draw(TOKENS),
        draw(VOCABULARIES),
        draw(st.sampled_from([1, 5, 16])),
        draw(DTYPES),
    )
    hidden, weight = (laid_out(draw, torch.randn(n).to(dtype)) for n in ((*shape, D), (V, D)))
    bias = draw(st.sampled_from([None, laid_out(draw, torch.randn(V).to(dtype))]))
    if bias is not None and V > 2 and draw(st.booleans()):
        bias = bias.clone()
        bias[1] = -INF
    mask = draw(st.sampled_from([None, masks(draw, shape)]))
    if mask is not None:
        hidden = hidden.masked_fill(~mask[..., None], draw(st.sampled_from([0.0, NAN, INF])))
    targets, T = torch.randint(V, shape), temperatures(draw, shape)
    chunk_rows = draw(st.sampled_from([None, 1, 3, *([0] if backend == "triton" else [])]))
    with_entropy = draw(st.booleans())
    g, h = upstreams(draw, shape), upstreams(draw, shape)
    op = (
        rlhf_core.linear_token_logprobs_and_entropy
        if with_entropy
        else rlhf_core.linear_token_logprobs
    )

    def call(hidden, weight, bias=None, *, backend):
        settings = dict(temperature=T, mask=mask, backend=backend)
        settings["chunk_rows"] = chunk_rows if backend != "reference" else None
        return op(hidden, weight, targets, bias=bias, **settings)

    # Effect of rounding each logit to its dtype, for any order of summing its products.
    rounding = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    unit = (
        10
        * (1 + rounding)
        * (1 + D)
        * (1 + (1 / torch.as_tensor(T)).sum().item())
        * (2 + math.prod(shape))
    )
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    check(call, leaves, [g, h] if with_entropy else [g], backend, scale=lambda *_: unit)


def fuzz_full_kl(draw, backend):
    shape, V, dtype, offset = draw(TOKENS), draw(VOCABULARIES), draw(DTYPES), draw(OFFSETS)
    logits, ref_logits = (
        normal(draw, (*shape, V), dtype, (-INF, -INF, -INF, INF, NAN), offset) for _ in range(2)
    )
    if draw(st.booleans()):
        ref_logits = logits + torch.randn(logits.shape).to(dtype) * draw(
            st.sampled_from([0, 1e-3, 1])
        )
    mask, T, g = (
        draw(st.sampled_from([None, masks(draw, shape)])),
        temperatures(draw, shape),
        upstreams(draw, shape),
    )
    finite = logits[logits.isfinite()].float()
    if (
        finite.numel() and finite.max() - finite.min() > 60 * torch.as_tensor(T).min()
    ):  # p may be 0 in float32 alone
        ref_logits = torch.where((ref_logits == -INF) & (logits != -INF), 0, ref_logits)

    difference = largest(logits.float() - ref_logits.float())  # log p - log q is computed from it
    unit = (1 + g.abs()) * (1 + 1 / torch.as_tensor(T))

    def call(z, ref, backend):
        return rlhf_core.full_kl(z, ref, temperature=T, mask=mask, backend=backend)

    check(
        call, [logits, ref_logits], [g], backend, comparable=lambda kl: kl.isfinite(),
        gradient_scale=lambda kl: ((difference + kl.nan_to_num(0, 0)) * unit)[..., None],
    )  # fmt: skip


def fuzz_kl_estimate(draw, backend):
    shape, estimator = draw(TOKENS), draw(st.sampled_from(["k1", "k2", "k3", "abs"]))
    specials = (NAN,) if estimator == "k3" else (-INF, INF, NAN)
    logprobs, ref_logprobs = (normal(draw, shape, draw(DTYPES), specials) for _ in range(2))
    mask, g = draw(st.sampled_from([None, masks(draw, shape)])), upstreams(draw, shape)

    def call(a, b, backend):
        return rlhf_core.kl_estimate(a, b, estimator=estimator, mask=mask, backend=backend)

    finite = logprobs.isfinite() & ref_logprobs.isfinite()
    check(
        call, [logprobs, ref_logprobs], [g], backend, comparable=lambda kl: finite,
        gradient_scale=lambda kl: (1 + g.abs()) * (1 + logprobs.float().abs().nan_to_num(0, 0)),
    )  # fmt: skip


def sequences(draw):
    """Shape of the tokens, number of sequences and cu_seqlens: rows (B, T), or packed (N,)."""
    if draw(st.booleans()):
        return (shape := draw(GRIDS)), shape[0], None
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 33]), max_size=4))
    before, after = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    cu_seqlens = (
        torch.tensor([before, *lengths])
        .cumsum(0)
        .to(draw(st.sampled_from([torch.int32, torch.int64])))
    )
    return (before + sum(lengths) + after,), len(lengths), cu_seqlens


DISCOUNTS = st.sampled_from([0.0, 0.5, 0.97, 1.0])


def largest(*tensors):
    return max([1.0, *(x[x.isfinite()].abs().max().item() for x in tensors if x.isfinite().any())])


def fuzz_gae(draw, backend):
    shape, B, cu_seqlens = sequences(draw)
    rewards, values = (normal(draw, shape, draw(DTYPES), (NAN,)) for _ in range(2))
    last_values, mask = normal(draw, (B,)), masks(draw, shape)
    settings = dict(gamma=draw(DISCOUNTS), lam=draw(DISCOUNTS), cu_seqlens=cu_seqlens)
    g, h = upstreams(draw, shape), upstreams(draw, shape)
    bounded = draw(st.booleans())

    def call(rewards, values, last_values=None, *, backend):
        return rlhf_core.gae(
            rewards, values, mask, last_values=last_values, backend=backend, **settings
        )

    unit = largest(rewards, values, last_values) * 10
    check(
        call, [rewards, values, last_values] if bounded else [rewards, values], [g, h], backend,
        scale=lambda *truth: unit + largest(*truth),
        gradient_scale=lambda *_: 10 * math.prod(shape) * largest(g, h),
    )  # fmt: skip


def fuzz_ppo_advantages(draw, backend):
    shape, B, cu_seqlens = sequences(draw)
    scores, values = (
        normal(draw, (B,), draw(DTYPES), (NAN,)),
        normal(draw, shape, draw(DTYPES), (NAN,)),
    )
    logprobs = laid_out(draw, -3 * torch.rand(shape)).to(draw(DTYPES))
    ref_logprobs = laid_out(draw, logprobs + 0.3 * torch.randn(shape)).to(draw(DTYPES))
    tokens, mask = (scores, logprobs, ref_logprobs, values), masks(draw, shape)
    settings = dict(kl_coef=draw(st.sampled_from([0.0, 0.1, 10.0])), cu_seqlens=cu_seqlens)
    settings |= dict(kl_estimator=draw(st.sampled_from(["k1", "k2", "k3", "abs"])))
    settings |= dict(gamma=draw(DISCOUNTS), lam=draw(DISCOUNTS), whiten=draw(st.booleans()))

    def call(tokens, backend):
        return rlhf_core.ppo_advantages(*tokens, mask, backend=backend, **settings)

    got, reference = call(tokens, backend), call(tokens, "reference")
    tokens = [x.double() for x in tokens]
    truth = call(tokens, "reference")
    settings["whiten"] = False
    unit = largest(*call(tokens, "reference")) * 10
    for name, x, r, t in zip(got._fields, got, reference, truth):
        unit_here = unit
        if name == "advantages":
            kept = call(tokens, "reference").advantages[mask]
            spread = kept.var(unbiased=False) if kept.numel() else torch.zeros(())
            unit_here *= 1 + torch.rsqrt(spread.nan_to_num(1) + 1e-8).item()
        assert_as_accurate(x / unit_here, r / unit_here, t / unit_here)


def fuzz_ppo_loss(draw, backend):
    shape = draw(GRIDS)
    old_values, returns, step = (
        (torch.randn(shape) * 64).round() / 64 for _ in range(3)
    )  # see test_policy_loss
    old_logprobs = -3 * torch.rand(shape)
    logprobs = old_logprobs + torch.randn(shape) * draw(st.sampled_from([0, 0.3, 3, 30]))
    advantages, entropy = normal(draw, shape, specials=(NAN,)), 2 * torch.rand(shape)
    leaves = [laid_out(draw, x) for x in (logprobs, old_values + step / 4, entropy)]
    old_logprobs, old_values, returns = (
        laid_out(draw, x) for x in (old_logprobs, old_values, returns)
    )
    mask, weights = (
        masks(draw, shape),
        draw(st.sampled_from([None, laid_out(draw, torch.rand(shape))])),
    )
    settings = dict(
        clip_range=draw(st.sampled_from([0.2, 5.0, (0.2, 0.9), (1.0, math.inf)])),
        vf_coef=draw(st.sampled_from([0.0, 0.5])),
    )
    settings |= dict(
        value_clip_range=draw(st.sampled_from([None, 0.25])), entropy_coef=0.1, weights=weights
    )
    settings |= dict(dual_clip=draw(st.sampled_from([None, 3.0])))
    settings |= dict(aggregation=draw(st.sampled_from(["token_mean", "sequence_mean"])))

    def call(logprobs, values, entropy, backend):
        loss, stats = rlhf_core.ppo_loss(
            logprobs, old_logprobs, advantages, values, old_values, returns, mask,
            entropy=entropy, backend=backend, **settings,
        )  # fmt: skip
        return loss, *stats

    check(call, leaves, [torch.tensor(-1.5)], backend)


CHECKS = {
    name.removeprefix("fuzz_"): x for name, x in list(globals().items()) if name.startswith("fuzz_")
}


@pytest.mark.parametrize("op", CHECKS)
@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_random_inputs_are_as_accurate_as_the_reference(backend, op):
    number = EXAMPLES if backend == "cpp" or torch.cuda.is_available() else max(1, EXAMPLES // 8)

    @hypothesis.settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data(), st.integers(0, 2**32 - 1))
    def examples(data, seed):
        torch.manual_seed(seed)
        CHECKS[op](data.draw, backend)

    examples()


# ---- what fuzzing has found


def test_the_gradient_of_full_kl_keeps_its_digits_where_policy_and_reference_differ_by_an_offset(
    backend,
):
    logits, ref_logits = torch.randn(2, 3, 50)
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ref_logits = ref_logits + 1e3
    rlhf_core.full_kl(leaf, ref_logits, backend=backend).sum().backward()
    rlhf_core.full_kl(truth, ref_logits.double(), backend="reference").sum().backward()
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=2e-6, atol=2e-6)


def test_full_kl_is_not_nan_where_p_rounds_to_0_and_q_is_0(backend):
    logits, ref_logits = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -INF]])
    assert rlhf_core.full_kl(logits, ref_logits, backend=backend) == 0


def test_k3_of_a_token_that_the_policy_cannot_sample_is_inf_not_nan(backend):
    kl = rlhf_core.kl_estimate(
        torch.tensor([-INF, -1.0]), torch.tensor([-1.0, INF]), estimator="k3", backend=backend
    )
    assert kl.tolist() == [INF, INF]


def test_gae_of_no_packed_token_has_a_gradient(backend):
    x, mask = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.bool)
    advantages, returns = rlhf_core.gae(
        x, x * 1, mask, cu_seqlens=torch.tensor([0]), backend=backend
    )
    (advantages + returns).sum().backward()
    assert x.grad.shape == (0,)


def test_hidden_states_of_width_0_leave_the_bias(backend):
    bias = torch.randn(5)
    args = torch.zeros(3, 0), torch.zeros(5, 0), torch.tensor([0, 1, 4])
    got = rlhf_core.linear_token_logprobs(*args, bias=bias, backend=backend)
    torch.testing.assert_close(got, torch.log_softmax(bias, -1)[args[2]])
