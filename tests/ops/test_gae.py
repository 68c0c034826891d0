"""gae and ppo_advantages on every backend, against the float64 recursion over compacted rows."""

import itertools
import math

import pytest
import torch
from op_helpers import assert_as_accurate, cases, interpreted

from rlhf_core import gae, kl_estimate, ppo_advantages
from rlhf_core.ops.gae import gae_reference

GAMMA, LAM = 0.97, 0.9


@pytest.fixture
def small_blocks(backend, monkeypatch):
    """Blocks of 32 tokens in Triton, instead of 1024, so that short sequences span several."""
    if backend == "triton":
        monkeypatch.setattr(
            "rlhf_core.kernels.gae._tile", lambda length: {"BLOCK": 32, "num_warps": 1}
        )


def batch(B, T, keep=0.7):
    return torch.randn(B, T), torch.randn(B, T), torch.rand(B, T) < keep


def compacted(rewards, values, mask, gamma=GAMMA, lam=LAM, last_values=None):
    """(advantages, returns): each row's counted tokens, compacted and put back. Differentiable."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        steps = mask[b].nonzero()[:, 0].tolist()
        advantage, next_value = 0.0, 0.0 if last_values is None else last_values[b]
        for t in reversed(steps):
            advantage = rewards[b, t] + gamma * next_value - values[b, t] + gamma * lam * advantage
            advantages = advantages.index_put((torch.tensor(b), torch.tensor(t)), advantage)
            next_value = values[b, t]
    return advantages, advantages + values.masked_fill(~mask, 0)


def run(rewards, values, mask, backend, upstream=None, last_values=None, gamma=GAMMA, lam=LAM):
    """(advantages, returns, drewards, dvalues[, dlast_values]); backend None: compacted float64."""
    dtype = torch.float64 if backend is None else torch.float32
    inputs = [
        x.to(dtype).clone().requires_grad_()
        for x in (rewards, values, last_values)
        if x is not None
    ]
    last = inputs[2] if last_values is not None else None
    if backend is None:
        outputs = compacted(*inputs[:2], mask, gamma, lam, last)
    else:
        outputs = gae(*inputs[:2], mask, gamma=gamma, lam=lam, last_values=last, backend=backend)
    g, h = (1.0, 1.0) if upstream is None else (u.to(dtype) for u in upstream)
    grads = torch.autograd.grad(
        (outputs[0] * g + outputs[1] * h).sum(), inputs, materialize_grads=True
    )
    return *(x.detach() for x in outputs), *grads


DISCOUNTS = [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)]


@pytest.mark.parametrize(
    "backend, discount, with_last_values",
    cases(
        (DISCOUNTS, [False, True]),
        few=[(x, i % 2 == 0) for i, x in enumerate(DISCOUNTS)],
    ),
    indirect=["backend"],
)
def test_a_mask_with_gaps_equals_the_compacted_sequence(backend, discount, with_last_values):
    gamma, lam = discount
    rewards, values, mask = batch(4, 19)
    upstream = torch.randn(4, 19), torch.randn(4, 19)
    kwargs = {
        "gamma": gamma,
        "lam": lam,
        "last_values": torch.randn(4) if with_last_values else None,
    }
    got = run(rewards, values, mask, backend, upstream, **kwargs)
    truth = run(rewards, values, mask, None, upstream, **kwargs)
    reference = run(rewards, values, mask, "reference", upstream, **kwargs)
    assert len(got) == len(truth)
    for x, r, t in zip(got, reference, truth):
        assert x.dtype == torch.float32
        assert_as_accurate(x, r, t)
    assert all((x[~mask] == 0).all() for x in got[:4])


@pytest.mark.parametrize(
    "backend, T, keep",
    cases(
        ([31, 32, 33, 64, 70], [0.1, 1.0]),
        few=[(31, 1.0), (32, 0.1), (33, 1.0), (64, 1.0), (70, 0.1)],
    ),
    indirect=["backend"],
)
def test_rows_longer_than_a_block_carry_their_state_on(backend, T, keep, small_blocks):
    rewards, values, mask = batch(2, T, keep)
    upstream = torch.randn(2, T), torch.randn(2, T)
    last_values = torch.randn(2)
    got = run(rewards, values, mask, backend, upstream, last_values)
    truth = run(rewards, values, mask, None, upstream, last_values)
    for x, t in zip(got, truth):
        assert_as_accurate(x, t, t)
    scores, (logprobs, ref_logprobs) = torch.randn(2), torch.randn(2, 2, T)
    settings = {"kl_coef": 0.1, "gamma": GAMMA, "lam": LAM}
    got = ppo_advantages(scores, logprobs, ref_logprobs, values, mask, backend=backend, **settings)
    want = ppo_advantages(
        scores, logprobs, ref_logprobs, values, mask, backend="reference", **settings
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_at_lam_1_an_advantage_is_the_discounted_return_minus_the_value(backend):
    rewards, values, mask = batch(3, 12, keep=1.0)
    advantages, returns = gae(rewards, values, mask, gamma=GAMMA, lam=1.0, backend=backend)
    discounts = GAMMA ** (torch.arange(12)[None, :] - torch.arange(12)[:, None]).float()
    future = torch.einsum("bs,ts->bt", rewards, torch.triu(discounts))
    torch.testing.assert_close(returns, future, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantages, future - values, rtol=1e-5, atol=1e-5)


def test_at_lam_0_an_advantage_is_the_one_step_error(backend):
    rewards, values, mask = batch(3, 12, keep=1.0)
    last_values = torch.randn(3)
    advantages, _ = gae(
        rewards, values, mask, gamma=GAMMA, lam=0.0, last_values=last_values, backend=backend
    )
    next_values = torch.cat([values[:, 1:], last_values[:, None]], dim=1)
    torch.testing.assert_close(
        advantages, rewards + GAMMA * next_values - values, rtol=1e-6, atol=1e-6
    )


def test_one_token_rows(backend):
    rewards, values = torch.tensor([[2.0], [3.0]]), torch.tensor([[0.5], [9.0]])
    mask = torch.tensor([[True], [False]])
    advantages, returns = gae(
        rewards, values, mask, last_values=torch.tensor([4.0, 7.0]), backend=backend
    )
    assert advantages.tolist() == [[5.5], [0.0]] and returns.tolist() == [[6.0], [0.0]]


def test_a_row_that_counts_nothing_is_zero_and_gives_its_last_value_no_gradient(backend):
    rewards, values, mask = batch(3, 6, keep=1.0)
    mask[1] = False
    *outputs, dlast = run(rewards, values, mask, backend, last_values=torch.randn(3))
    assert all((x[1] == 0).all() for x in outputs) and dlast[1] == 0 and (dlast[[0, 2]] != 0).all()
    outputs = run(rewards, values, torch.zeros_like(mask), backend, last_values=torch.randn(3))
    assert all((x == 0).all() for x in outputs)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_an_empty_batch_gives_empty_results_and_gradients(backend, shape):
    mask, last_values = torch.zeros(shape, dtype=torch.bool), torch.randn(shape[0])
    *outputs, dlast = run(
        torch.zeros(shape), torch.zeros(shape), mask, backend, last_values=last_values
    )
    assert all(x.shape == shape for x in outputs) and torch.equal(dlast, torch.zeros(shape[0]))


def test_padding_on_either_side_changes_nothing(backend):
    rewards, values, mask = batch(2, 9)
    last_values = torch.randn(2)
    want = run(rewards, values, mask, backend, last_values=last_values)
    for left, right in ((0, 5), (4, 0), (3, 30)):
        padded = [
            torch.nn.functional.pad(x, (left, right), value=v)
            for x, v in ((rewards, 9.0), (values, -9.0))
        ]
        wide = run(
            *padded, torch.nn.functional.pad(mask, (left, right)), backend, last_values=last_values
        )
        for x, y in zip(wide, want):
            torch.testing.assert_close(
                x if x.ndim == 1 else x[:, left : left + 9], y, rtol=1e-6, atol=1e-6
            )


def test_a_rows_result_is_bitwise_independent_of_the_batch_around_it(backend):
    rewards, values, mask = batch(4, 21)
    together = run(rewards, values, mask, backend)
    alone = run(rewards[2:3], values[2:3], mask[2:3], backend)
    assert all(torch.equal(x[2:3], y) for x, y in zip(together, alone))


def test_strided_inputs_and_expanded_gradients(backend):
    rewards, values, mask = batch(7, 4)
    got = []
    for copy in (False, True):
        leaves = [x.clone().requires_grad_() for x in (rewards, values)]
        views = [x.T[:, ::2].contiguous() if copy else x.T[:, ::2] for x in (*leaves, mask)]
        advantages, returns = gae(*views, backend=backend)
        (advantages.sum() + returns.sum()).backward()
        got.append((advantages, returns, *(x.grad for x in leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*got))


def test_half_precision_inputs_are_promoted(backend):
    rewards, values, mask = batch(2, 6)
    rewards, values = rewards.bfloat16(), values.half()
    got = gae(rewards, values, mask, backend=backend)
    want = gae(rewards.float(), values.float(), mask, backend=backend)
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(got, want))


def test_inputs_are_left_alone(backend):
    rewards, values, mask = batch(2, 6)
    before = [x.clone() for x in (rewards, values, mask)]
    advantages, returns = gae(
        rewards.requires_grad_(), values.requires_grad_(), mask, backend=backend
    )
    (advantages.sum() + returns.sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip((rewards, values, mask), before))


def test_reference_gradients_pass_gradcheck():
    torch.manual_seed(0)
    rewards, values, mask = batch(2, 5)
    inputs = [x.double().requires_grad_() for x in (rewards, values, torch.randn(2))]
    assert torch.autograd.gradcheck(
        lambda r, v, last: gae_reference(r, v, mask, GAMMA, LAM, last, None), inputs
    )
    cu_seqlens = torch.tensor([1, 4, 4, 9])
    inputs = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (10, 10, 3)]
    mask = torch.rand(10) < 0.7
    assert torch.autograd.gradcheck(
        lambda r, v, last: gae_reference(r, v, mask, GAMMA, LAM, last, cu_seqlens), inputs
    )


def test_bad_input_raises_with_the_offending_value(backend):
    rewards, values, mask = batch(2, 3)
    with pytest.raises(ValueError, match=r"values.*\(2, 4\)"):
        gae(rewards, torch.zeros(2, 4), mask, backend=backend)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        gae(rewards.flatten(), values.flatten(), mask.flatten(), backend=backend)
    with pytest.raises(ValueError, match=r"last_values.*\(3,\)"):
        gae(rewards, values, mask, last_values=torch.zeros(3), backend=backend)
    with pytest.raises(TypeError, match=r"response_mask.*float32"):
        gae(rewards, values, mask.float(), backend=backend)
    with pytest.raises(TypeError, match=r"rewards.*int64"):
        gae(rewards.long(), values, mask, backend=backend)
    with pytest.raises(ValueError, match="meta"):
        gae(rewards, values.to("meta"), mask, backend=backend)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_discounts_outside_0_to_1_raise(backend, name, bad):
    rewards, values, mask = batch(2, 3)
    with pytest.raises(ValueError, match=f"{name}.*{bad}"):
        gae(rewards, values, mask, backend=backend, **{name: bad})


LENGTHS = [0, 1, 5, 37, 0, 2, 64, 1, 0]


def lengths_of(backend):
    """LENGTHS; in the interpreter less than 32 tokens in all, which fit the smaller block."""
    return [0, 1, 5, 13, 0, 2, 1, 0] if interpreted(backend) else LENGTHS


def packed_batch(lengths, *num_features):
    """(rows, packed, cu_seqlens): lists of random tensors and the mask, as (B, T) and as (N,).

    Before and after the sequences there are tokens outside all of them.
    """
    T, before, after = max(lengths, default=0), 3, 2
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) + before
    inside = torch.arange(T) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    rows = [torch.randn(len(lengths), T) for _ in range(*num_features)]
    rows.append((torch.rand(len(lengths), T) < 0.7) & inside)
    packed = [torch.cat([x.new_ones(before), x[inside], x.new_ones(after)]) for x in rows]
    return rows, packed, cu_seqlens


def laid_out(x, cu_seqlens, like):
    """Packed (N,) as rows (B, T), 0 outside. Tokens outside all sequences must be 0."""
    out = torch.zeros_like(like)
    for b, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        out[b, : stop - start] = x[start:stop]
    assert (x[: cu_seqlens[0]] == 0).all() and (x[cu_seqlens[-1] :] == 0).all()
    return out


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_packed_sequences_give_the_bits_of_the_rows(backend, dtype):
    rows, packed, cu_seqlens = packed_batch(lengths_of(backend), 4)
    last_values = torch.randn(len(cu_seqlens) - 1)
    got = []
    for (rewards, values, g, h, mask), offsets in ((rows, None), (packed, cu_seqlens.to(dtype))):
        leaves = [x.clone().requires_grad_() for x in (rewards, values, last_values)]
        outputs = gae(
            *leaves[:2],
            mask,
            gamma=GAMMA,
            lam=LAM,
            last_values=leaves[2],
            cu_seqlens=offsets,
            backend=backend,
        )
        grads = torch.autograd.grad((outputs[0] * g + outputs[1] * h).sum(), leaves)
        got.append([x.detach() for x in (*outputs, *grads)])
    (*want, dlast), (*packed_got, packed_dlast) = got
    assert torch.equal(packed_dlast, dlast)
    for x, y in zip(packed_got, want):
        assert torch.equal(laid_out(x, cu_seqlens, y), y)


def test_packed_sequences_longer_than_a_block_carry_their_state_on(backend, small_blocks):
    (*rows, mask), (*packed, packed_mask), cu_seqlens = packed_batch([40, 3, 64], 2)
    settings = dict(gamma=GAMMA, lam=LAM, last_values=torch.randn(3), backend=backend)
    want = gae(*rows, mask, **settings)
    got = gae(*packed, packed_mask, cu_seqlens=cu_seqlens, **settings)
    for x, y in zip(got, want):
        torch.testing.assert_close(laid_out(x, cu_seqlens, y), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [7]], ids=str)
def test_packed_input_of_few_or_empty_sequences(backend, lengths):
    (rewards, values, mask), packed, cu_seqlens = packed_batch(lengths, 2)
    advantages, returns = gae(*packed, cu_seqlens=cu_seqlens, backend=backend)
    want = gae(rewards, values, mask, backend=backend)
    assert torch.equal(laid_out(advantages, cu_seqlens, want[0]), want[0])
    assert torch.equal(laid_out(returns, cu_seqlens, want[1]), want[1])
    for x in gae(
        *(x[:0] for x in packed), cu_seqlens=torch.zeros_like(cu_seqlens), backend=backend
    ):
        assert x.shape == (0,)


def test_tokens_outside_every_sequence_change_nothing(backend):
    _, (rewards, values, mask), cu_seqlens = packed_batch(lengths_of(backend), 2)
    want = gae(rewards, values, mask, cu_seqlens=cu_seqlens, backend=backend)
    for x in (rewards, values):
        x[: cu_seqlens[0]] = x[cu_seqlens[-1] :] = math.nan
    got = gae(rewards, values, mask, cu_seqlens=cu_seqlens, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want))


@pytest.mark.parametrize("bad", [[0, 3, 2], [-1, 3, 6], [0, 3, 7], [[0, 6]], []], ids=str)
def test_bad_cu_seqlens_raise(backend, bad):
    x, mask = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    with pytest.raises(ValueError, match="cu_seqlens"):
        gae(x, x, mask, cu_seqlens=torch.tensor(bad, dtype=torch.int64), backend=backend)
    with pytest.raises(TypeError, match=r"cu_seqlens.*float32"):
        gae(x, x, mask, cu_seqlens=torch.zeros(2), backend=backend)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        gae(
            x.view(2, 3),
            x.view(2, 3),
            mask.view(2, 3),
            cu_seqlens=torch.tensor([0, 6]),
            backend=backend,
        )


def advantages_batch(B, T, keep=0.7):
    """scores, logprobs, ref_logprobs, values, mask"""
    logprobs = -torch.rand(B, T) * 3
    return (
        torch.randn(B),
        logprobs,
        logprobs + torch.randn(B, T) * 0.3,
        torch.randn(B, T),
        torch.rand(B, T) < keep,
    )


def advantages_by_hand(scores, logprobs, ref_logprobs, values, mask, kl_coef, estimator, whiten):
    """(advantages, returns, rewards, kl), in float64."""
    scores, logprobs, ref_logprobs, values = (
        x.double() for x in (scores, logprobs, ref_logprobs, values)
    )
    d = logprobs - ref_logprobs
    kl = {"k1": d, "k2": d**2 / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[
        estimator
    ].masked_fill(~mask, 0)
    rewards = -kl_coef * kl
    for b, counted in enumerate(mask):
        if counted.any():
            rewards[b, counted.nonzero().max()] += scores[b]
    advantages, returns = compacted(rewards, values, mask)
    if whiten and mask.any():
        kept = advantages[mask]
        advantages[mask] = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt()
    return advantages, returns, rewards, kl


@pytest.mark.parametrize(
    "backend, estimator, whiten",
    cases(
        (["k1", "k2", "k3", "abs"], [False, True]),
        few=[("k1", False), ("k2", True), ("k3", False), ("abs", True)],
    ),
    indirect=["backend"],
)
def test_ppo_advantages_are_kl_score_gae_and_whitening(backend, estimator, whiten):
    settings = {"kl_coef": 0.3, "whiten": whiten}
    for shape in ((4, 19), (1, 1), (3, 70)):
        inputs = advantages_batch(*shape)
        inputs[-1][0, 0] = True
        truth = advantages_by_hand(*inputs, estimator=estimator, **settings)
        settings |= {"kl_estimator": estimator, "gamma": GAMMA, "lam": LAM}
        got = ppo_advantages(*inputs, backend=backend, **settings)
        reference = ppo_advantages(*inputs, backend="reference", **settings)
        settings = {"kl_coef": 0.3, "whiten": whiten}
        for x, r, t in zip(got, reference, truth):
            assert x.dtype == torch.float32 and (x[~inputs[-1]] == 0).all()
            assert_as_accurate(x, r, t)


def test_rewards_add_up_to_the_score_minus_the_kl_and_the_last_counted_token_carries_it(backend):
    scores, logprobs, ref_logprobs, values, _ = advantages_batch(4, 8)
    lengths = torch.tensor([[3], [8], [1], [0]])  # short, full width, EOS first, nothing
    mask = torch.arange(8) < lengths
    scores[3] = math.nan  # a sequence without tokens
    got = ppo_advantages(scores, logprobs, ref_logprobs, values, mask, kl_coef=0.5, backend=backend)
    torch.testing.assert_close(got.rewards.sum(1)[:3], (scores - 0.5 * got.kl.sum(1))[:3])
    assert all((x[3] == 0).all() for x in got)
    without = ppo_advantages(
        torch.zeros(4), logprobs, ref_logprobs, values, mask, kl_coef=0.5, backend=backend
    )
    assert (got.rewards != without.rewards).nonzero().tolist() == [[0, 2], [1, 7], [2, 0]]


def test_ppo_advantages_agree_with_the_ops_that_they_replace(backend, small_blocks):
    scores, logprobs, ref_logprobs, values, mask = advantages_batch(5, 33)
    got = ppo_advantages(
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask,
        kl_coef=0.1,
        kl_estimator="k3",
        whiten=False,
        backend=backend,
    )
    torch.testing.assert_close(
        got.kl,
        kl_estimate(logprobs, ref_logprobs, estimator="k3", mask=mask, backend=backend),
        rtol=1e-6,
        atol=1e-7,
    )
    want = gae(got.rewards, values, mask, backend=backend)
    torch.testing.assert_close((got.advantages, got.returns), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whiten", [False, True])
def test_ppo_advantages_of_packed_sequences_are_those_of_the_rows(backend, whiten):
    rows, packed, cu_seqlens = packed_batch(lengths_of(backend), 3)
    scores = torch.randn(len(cu_seqlens) - 1)
    settings = {"kl_coef": 0.2, "whiten": whiten, "backend": backend}
    want = ppo_advantages(scores, *rows, **settings)
    for x in packed[:-1]:
        x[: cu_seqlens[0]] = x[cu_seqlens[-1] :] = math.nan
    got = ppo_advantages(scores, *packed, cu_seqlens=cu_seqlens, **settings)
    for x, y in zip(got, want):
        assert torch.equal(laid_out(x, cu_seqlens, y), y)


def test_whitened_advantages_have_mean_0_and_variance_1_at_any_offset(backend, small_blocks):
    scores, logprobs, _, values, mask = advantages_batch(6, 40)
    scores += 1000  # with lam 1 all advantages are close to it
    got = ppo_advantages(
        scores, logprobs, logprobs, values, mask, kl_coef=0.0, lam=1.0, backend=backend
    )
    kept = got.advantages[mask].double()
    assert abs(kept.mean()) < 1e-4 and abs(kept.var(unbiased=False) - 1) < 1e-3
    assert (got.advantages[~mask] == 0).all()


def test_whitening_one_advantage_or_equal_ones_or_none_gives_zeros(backend):
    x = torch.zeros(3, 5)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    for counted in ([], [(1, 2)], [(0, 1), (0, 3), (2, 4)]):
        for i, j in counted:
            mask[i, j] = True
        got = ppo_advantages(
            torch.full((3,), 7.25), x, x, x, mask, kl_coef=0.1, lam=1.0, backend=backend
        )
        assert (got.advantages == 0).all() and (got.returns[mask] == 7.25).all()


def test_what_masked_inputs_hold_changes_no_bit_of_ppo_advantages(backend):
    scores, *tokens, mask = advantages_batch(4, 21)
    want = ppo_advantages(scores, *tokens, mask, kl_coef=0.1, kl_estimator="k3", backend=backend)
    for bad in (100.0, math.inf, math.nan):
        dirty = [x.masked_fill(~mask, bad) for x in tokens]
        got = ppo_advantages(scores, *dirty, mask, kl_coef=0.1, kl_estimator="k3", backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(got, want))


def test_padding_columns_change_no_advantage(backend):
    scores, *tokens, mask = advantages_batch(3, 9)
    want = ppo_advantages(scores, *tokens, mask, kl_coef=0.1, backend=backend)
    padded = [torch.nn.functional.pad(x, (0, 20)) for x in (*tokens, mask)]
    got = ppo_advantages(scores, *padded, kl_coef=0.1, backend=backend)
    for x, y in zip(got, want):
        torch.testing.assert_close(x[:, :9], y, rtol=1e-5, atol=1e-6)


def test_a_rows_unwhitened_advantages_are_bitwise_independent_of_the_batch(backend):
    inputs = advantages_batch(4, 21)
    together = ppo_advantages(*inputs, kl_coef=0.1, whiten=False, backend=backend)
    alone = ppo_advantages(*(x[2:3] for x in inputs), kl_coef=0.1, whiten=False, backend=backend)
    assert all(torch.equal(x[2:3], y) for x, y in zip(together, alone))


def test_inputs_that_need_a_gradient_get_it_through_ppo_advantages(backend):
    inputs = advantages_batch(3, 7)
    want = ppo_advantages(*inputs, kl_coef=0.1, backend=backend)
    values = inputs[3].clone().requires_grad_()
    got = ppo_advantages(*inputs[:3], values, inputs[4], kl_coef=0.1, backend=backend)
    torch.testing.assert_close([x.detach() for x in got], list(want), rtol=1e-5, atol=1e-5)
    got.returns.sum().backward()
    assert (values.grad[inputs[4]] != 0).any() and (values.grad[~inputs[4]] == 0).all()
    with torch.no_grad():
        ppo_advantages(*inputs[:3], values, inputs[4], kl_coef=0.1, backend=backend)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_ppo_advantages_of_an_empty_batch_are_empty(backend, shape):
    for x in ppo_advantages(*advantages_batch(*shape), kl_coef=0.1, backend=backend):
        assert x.shape == shape


def test_ppo_advantages_are_bitwise_independent_of_the_number_of_threads():
    pytest.importorskip("rlhf_core.cpp", reason="the C++ extension is not built")
    inputs = advantages_batch(500, 501)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ppo_advantages(*inputs, kl_coef=0.1, kl_estimator="k3", backend="cpp"))
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results))


def test_ppo_advantages_leave_their_inputs_alone_and_take_half_precision(backend):
    scores, logprobs, ref_logprobs, values, mask = advantages_batch(3, 7)
    halves = scores.half(), logprobs.bfloat16(), ref_logprobs.bfloat16(), values.half()
    before = [x.clone() for x in halves]
    got = ppo_advantages(*halves, mask, kl_coef=0.1, backend=backend)
    want = ppo_advantages(*(x.float() for x in halves), mask, kl_coef=0.1, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want))
    assert all(torch.equal(x, y) for x, y in zip(halves, before))


def test_bad_input_to_ppo_advantages_raises_with_the_offending_value(backend):
    scores, logprobs, ref_logprobs, values, mask = advantages_batch(3, 7)
    with pytest.raises(ValueError, match=r"scores.*\(4,\)"):
        ppo_advantages(
            torch.zeros(4), logprobs, ref_logprobs, values, mask, kl_coef=0.1, backend=backend
        )
    with pytest.raises(ValueError, match="k4"):
        ppo_advantages(
            scores,
            logprobs,
            ref_logprobs,
            values,
            mask,
            kl_coef=0.1,
            kl_estimator="k4",
            backend=backend,
        )
    with pytest.raises(ValueError, match=r"ref_logprobs.*\(3, 6\)"):
        ppo_advantages(
            scores, logprobs, ref_logprobs[:, 1:], values, mask, kl_coef=0.1, backend=backend
        )
    with pytest.raises(TypeError, match=r"response_mask.*float32"):
        ppo_advantages(
            scores, logprobs, ref_logprobs, values, mask.float(), kl_coef=0.1, backend=backend
        )
    with pytest.raises(ValueError, match=r"lam.*1.5"):
        ppo_advantages(
            scores, logprobs, ref_logprobs, values, mask, kl_coef=0.1, lam=1.5, backend=backend
        )
