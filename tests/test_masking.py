"""Masks: masked values change no bit of any result or gradient, and their outputs are 0."""

import math

import pytest
import torch

from rlhf_core import (
    IGNORE_INDEX,
    gae,
    kl_estimate,
    last_token_index,
    loss_weights,
    masked_mean,
    token_logprobs,
    token_logprobs_and_entropy,
    whiten,
)
from rlhf_core.masking import masked_moments

JUNK = [100.0, math.inf, -math.inf, math.nan]
SHAPE = (3, 8)


def masked_calls(backend):
    """name -> (function of the mask and float tensors (B, T, ...), their number, trailing shape)"""
    targets = torch.randint(0, 33, SHAPE)
    return {
        "token_logprobs": (
            lambda mask, x: token_logprobs_and_entropy(
                x, targets, temperature=0.7, mask=mask, backend=backend
            ),
            1,
            (33,),
        ),
        "kl k1": (
            lambda mask, x, y: (kl_estimate(x, y, estimator="k1", mask=mask, backend=backend),),
            2,
            (),
        ),
        "kl k2": (
            lambda mask, x, y: (kl_estimate(x, y, estimator="k2", mask=mask, backend=backend),),
            2,
            (),
        ),
        "kl k3": (
            lambda mask, x, y: (kl_estimate(x, y, estimator="k3", mask=mask, backend=backend),),
            2,
            (),
        ),
        "kl abs": (
            lambda mask, x, y: (kl_estimate(x, y, estimator="abs", mask=mask, backend=backend),),
            2,
            (),
        ),
        "gae": (lambda mask, x, y: gae(x, y, mask, gamma=0.97, lam=0.9, backend=backend), 2, ()),
    }


STATISTICS = {
    "whiten": (lambda mask, x: (whiten(x, mask),), 1, ()),
    "masked_mean": (lambda mask, x: (masked_mean(x, mask) * mask,), 1, ()),
}


@pytest.mark.parametrize("op", list(masked_calls(None)))
def test_masked_values_change_nothing_bitwise_and_come_out_as_zero(backend, op):
    assert_masked_values_do_not_matter(*masked_calls(backend)[op])


@pytest.mark.parametrize("name", list(STATISTICS))
def test_masked_values_change_no_statistic_and_none_of_its_gradients(name):
    torch.manual_seed(0)
    assert_masked_values_do_not_matter(*STATISTICS[name])


def assert_masked_values_do_not_matter(call, arity, trailing):
    mask = torch.rand(SHAPE) < 0.6
    mask[0, :3], mask[1, -3:], mask[2] = False, False, False
    clean = [torch.randn(*SHAPE, *trailing) for _ in range(arity)]
    wanted = None
    for junk in [0.0, *JUNK]:
        inputs = [x.clone() for x in clean]
        for x in inputs:
            x[~mask] = junk
            x.requires_grad_()
        outputs = call(mask, *inputs)
        # A gradient that arrives at a masked position must stop there.
        upstream = [torch.where(mask, 1.0, 7.0) for _ in outputs]
        grads = torch.autograd.grad(outputs, inputs, upstream)
        results = [x.detach() for x in (*outputs, *grads)]
        assert all((x[~mask] == 0).all() for x in results)
        wanted = wanted or results
        assert all(torch.equal(x, w) for x, w in zip(results, wanted)), f"masked {junk} got through"


@pytest.mark.parametrize("op", list(masked_calls(None)))
def test_a_batch_that_counts_nothing_gives_zeros_and_zero_gradients(backend, op):
    call, arity, trailing = masked_calls(backend)[op]
    inputs = [torch.full((*SHAPE, *trailing), math.nan, requires_grad=True) for _ in range(arity)]
    outputs = call(torch.zeros(SHAPE, dtype=torch.bool), *inputs)
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), inputs)
    assert all((x == 0).all() for x in (*outputs, *grads))


def test_an_ignored_label_under_a_false_mask_is_no_target(backend):
    logits, labels = torch.randn(2, 4, 9), torch.randint(0, 9, (2, 4))
    labels[:, 2:] = IGNORE_INDEX
    mask = labels != IGNORE_INDEX
    logprobs = token_logprobs(logits.requires_grad_(), labels, mask=mask, backend=backend)
    logprobs.sum().backward()
    want = torch.log_softmax(logits, -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(logprobs[:, :2], want[:, :2])
    assert (
        (logprobs[:, 2:] == 0).all()
        and (logits.grad[:, 2:] == 0).all()
        and (logits.grad[:, :2] != 0).any()
    )


def test_appending_padding_changes_no_log_prob_kl_or_gradient(backend):
    logits, targets = torch.randn(2, 5, 33), torch.randint(0, 33, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    got = []
    for pad in (0, 3):
        z = torch.nn.functional.pad(logits, (0, 0, 0, pad), value=50.0).requires_grad_()
        y, m = (torch.nn.functional.pad(x, (0, pad)) for x in (targets, mask))
        logprobs, entropy = token_logprobs_and_entropy(z, y, mask=m, backend=backend)
        kl = kl_estimate(logprobs, logprobs.detach() + 0.3, estimator="k3", mask=m, backend=backend)
        (masked_mean(kl, m) + masked_mean(entropy, m)).backward()
        got.append([x[:, :5] for x in (logprobs, entropy, kl, z.grad)])
        assert (z.grad[:, 5:] == 0).all()
    assert all(torch.equal(x, y) for x, y in zip(*got))


def test_masked_mean_is_the_mean_of_counted_values():
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, math.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(x, mask) == 3
    assert masked_mean(x, torch.zeros_like(mask)) == 0


def test_whitened_values_have_masked_mean_0_and_variance_1():
    torch.manual_seed(0)
    x, mask = torch.randn(6, 20) * 3 + 100, torch.rand(6, 20) < 0.6
    white = whiten(x, mask)
    torch.testing.assert_close(masked_mean(white, mask), torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(masked_mean(white**2, mask), torch.tensor(1.0), rtol=0, atol=1e-5)
    assert (white[~mask] == 0).all()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_whitening_stays_finite_when_almost_nothing_counts_or_nothing_varies(count):
    x, mask = torch.full((2, 3), 5.0), torch.zeros(2, 3, dtype=torch.bool)
    mask.view(-1)[:count] = True
    assert (whiten(x, mask) == 0).all()


def test_shards_whiten_like_the_whole():
    torch.manual_seed(0)
    x, mask = torch.randn(7, 11) + 3, torch.rand(7, 11) < 0.5
    mask[2] = False  # a shard may count nothing
    shards = [slice(0, 2), slice(2, 3), slice(3, 7)]
    moments = [masked_moments(x[s], mask[s]) for s in shards]
    together = moments[0].combine(moments[1]).combine(moments[2])
    parts = torch.cat([whiten(x[s], mask[s], moments=together) for s in shards])
    torch.testing.assert_close(parts, whiten(x, mask), rtol=1e-5, atol=1e-6)


def test_last_token_index_is_the_last_counted_position_even_after_gaps():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert last_token_index(mask).tolist() == [2, 3, 0, 0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_weights_of_micro_batches_add_up_to_the_minibatch(aggregation):
    torch.manual_seed(0)
    loss, mask = (
        torch.randn(8, 6),
        torch.arange(6) < torch.tensor([6, 1, 3, 0, 2, 6, 5, 4])[:, None],
    )
    weights = loss_weights(mask, aggregation)
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    rows = [loss[i][mask[i]] for i in range(8) if mask[i].any()]
    want = (
        torch.cat(rows).mean()
        if aggregation == "token_mean"
        else torch.stack([r.mean() for r in rows]).mean()
    )
    for size in (1, 2, 8):
        parts = [(loss[i : i + size] * weights[i : i + size]).sum() for i in range(0, 8, size)]
        torch.testing.assert_close(sum(parts), want)
    assert (loss_weights(torch.zeros_like(mask), aggregation) == 0).all()


def test_bad_masks_and_aggregations_raise_with_the_offending_value():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="int64"):
        masked_mean(x, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        whiten(x, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="mean_of_means"):
        loss_weights(x > 0, "mean_of_means")
