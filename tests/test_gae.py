"""gae on every backend, judged against the recursion in float64 over the compacted sequence."""

import math

import pytest
import torch
from conftest import assert_as_accurate

from rlhf_core import gae
from rlhf_core.ops.gae import gae_reference

GAMMA, LAM = 0.97, 0.9


def batch(B, T, keep=0.7):
    return torch.randn(B, T), torch.randn(B, T), torch.rand(B, T) < keep


def compacted(rewards, values, mask, gamma=GAMMA, lam=LAM, last_values=None):
    """(advantages, returns) in the inputs' dtype: each row's counted tokens alone, then put back. Differentiable."""
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
    """(advantages, returns, drewards, dvalues[, dlast_values]); compacted in float64 where backend is None."""
    dtype = torch.float64 if backend is None else torch.float32
    inputs = [x.to(dtype).clone().requires_grad_() for x in (rewards, values, last_values) if x is not None]
    last = inputs[2] if last_values is not None else None
    if backend is None:
        outputs = compacted(*inputs[:2], mask, gamma, lam, last)
    else:
        outputs = gae(*inputs[:2], mask, gamma=gamma, lam=lam, last_values=last, backend=backend)
    g, h = (1.0, 1.0) if upstream is None else (u.to(dtype) for u in upstream)
    grads = torch.autograd.grad((outputs[0] * g + outputs[1] * h).sum(), inputs, materialize_grads=True)
    return *(x.detach() for x in outputs), *grads


@pytest.mark.parametrize("with_last_values", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_a_mask_with_gaps_equals_the_compacted_sequence(backend, gamma, lam, with_last_values):
    rewards, values, mask = batch(4, 19)
    upstream = torch.randn(4, 19), torch.randn(4, 19)
    kwargs = {"gamma": gamma, "lam": lam, "last_values": torch.randn(4) if with_last_values else None}
    got = run(rewards, values, mask, backend, upstream, **kwargs)
    truth = run(rewards, values, mask, None, upstream, **kwargs)
    reference = run(rewards, values, mask, "reference", upstream, **kwargs)
    assert len(got) == len(truth)
    for x, r, t in zip(got, reference, truth):
        assert x.dtype == torch.float32
        assert_as_accurate(x, r, t)
    assert all((x[~mask] == 0).all() for x in got[:4])


@pytest.mark.parametrize("keep", [0.1, 1.0])
@pytest.mark.parametrize("T", [31, 32, 33, 64, 70])
def test_rows_longer_than_a_block_carry_their_state_on(backend, T, keep, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr("rlhf_core.kernels.gae.MAX_BLOCK", 32)
    rewards, values, mask = batch(2, T, keep)
    upstream = torch.randn(2, T), torch.randn(2, T)
    last_values = torch.randn(2)
    got = run(rewards, values, mask, backend, upstream, last_values)
    truth = run(rewards, values, mask, None, upstream, last_values)
    for x, t in zip(got, truth):
        assert_as_accurate(x, t, t)


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
    advantages, _ = gae(rewards, values, mask, gamma=GAMMA, lam=0.0, last_values=last_values, backend=backend)
    next_values = torch.cat([values[:, 1:], last_values[:, None]], dim=1)
    torch.testing.assert_close(advantages, rewards + GAMMA * next_values - values, rtol=1e-6, atol=1e-6)


def test_one_token_rows(backend):
    rewards, values = torch.tensor([[2.0], [3.0]]), torch.tensor([[0.5], [9.0]])
    mask = torch.tensor([[True], [False]])
    advantages, returns = gae(rewards, values, mask, last_values=torch.tensor([4.0, 7.0]), backend=backend)
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
    *outputs, dlast = run(torch.zeros(shape), torch.zeros(shape), mask, backend, last_values=last_values)
    assert all(x.shape == shape for x in outputs) and torch.equal(dlast, torch.zeros(shape[0]))


def test_padding_on_either_side_changes_nothing(backend):
    rewards, values, mask = batch(2, 9)
    last_values = torch.randn(2)
    want = run(rewards, values, mask, backend, last_values=last_values)
    for left, right in ((0, 5), (4, 0), (3, 30)):
        padded = [torch.nn.functional.pad(x, (left, right), value=v) for x, v in ((rewards, 9.0), (values, -9.0))]
        wide = run(*padded, torch.nn.functional.pad(mask, (left, right)), backend, last_values=last_values)
        for x, y in zip(wide, want):
            torch.testing.assert_close(x if x.ndim == 1 else x[:, left : left + 9], y, rtol=1e-6, atol=1e-6)


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
    advantages, returns = gae(rewards.requires_grad_(), values.requires_grad_(), mask, backend=backend)
    (advantages.sum() + returns.sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip((rewards, values, mask), before))


def test_reference_gradients_pass_gradcheck():
    torch.manual_seed(0)
    rewards, values, mask = batch(2, 5)
    inputs = [x.double().requires_grad_() for x in (rewards, values, torch.randn(2))]
    assert torch.autograd.gradcheck(lambda r, v, last: gae_reference(r, v, mask, GAMMA, LAM, last), inputs)


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
