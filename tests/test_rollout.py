"""Rollouts: where log-probs and values are read. Padding changes nothing."""

import warnings

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.data import Example, collate
from rlhf_core.data.batches import rows
from rlhf_core.models import Transformer, TransformerConfig, ValueModel, packed_attention
from rlhf_core.rollout import (
    Rollout,
    _warn_of_truncation,
    join,
    response_hidden,
    response_logprobs,
    response_values,
    sample,
)
from rlhf_core.training.completions import target_logprobs, target_loss

GPT2 = dict(
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
FAMILIES = {"gpt2": GPT2, "llama": {}}
PROMPTS = [[5, 3, 7, 4], [8, 1], [6], [9, 9, 1]]
families = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def tiny(family="llama", seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=12, hidden_size=16, num_layers=2, num_heads=2, max_positions=64, eos_ids=(2,)
    )
    model = Transformer(TransformerConfig(**(sizes | FAMILIES[family] | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def rollout_of(model, **options):
    generator = torch.Generator().manual_seed(3)
    return sample(model, PROMPTS, max_new_tokens=6, temperature=1.5, generator=generator, **options)


def with_padding(rollout, left, right):
    """The same rollout with columns of arbitrary ids before the prompts and after the responses."""

    def pad(x, before, after, value):
        return torch.nn.functional.pad(x, (before, after), value=value)

    return Rollout(
        pad(rollout.prompt_ids, left, 0, 7),
        pad(rollout.prompt_mask, left, 0, False),
        pad(rollout.response_ids, 0, right, 2),  # an EOS, which must not count
        pad(rollout.response_mask, 0, right, False),
        pad(rollout.logprobs, 0, right, float("nan")),
        rollout.ended,
    )


@families
def test_log_probs_and_values_are_read_before_their_token(family):
    """Row 14: at position P - 1 + t of the row alone; index 0 depends on the prompt alone."""
    policy, critic = tiny(family), ValueModel.from_model(tiny(family, seed=1))
    rollout = rollout_of(policy)
    assert not rollout.response_mask.all() and not rollout.prompt_mask.all()
    logprobs, entropy = response_logprobs(policy, rollout, 0.7)
    values = response_values(critic, rollout)
    for b, (prompt, response) in enumerate(zip(PROMPTS, rollout.responses())):
        ids = torch.tensor([prompt + response])
        log_p = (policy(ids)[0] / 0.7).log_softmax(-1)
        value = critic(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        for t, token in enumerate(response):
            at = len(prompt) - 1 + t
            assert_close(logprobs[b, t], log_p[at, token], rtol=0, atol=1e-5)
            assert_close(
                entropy[b, t], -(log_p[at].exp() * log_p[at]).sum(), rtol=0, atol=1e-5
            )  # row 5
            assert_close(values[b, t], value[at], rtol=0, atol=1e-5)
        prompt_only = critic(ids[:, : len(prompt)], torch.ones(1, len(prompt), dtype=torch.bool))
        assert_close(values[b, 0], prompt_only[0, -1], rtol=0, atol=1e-5)


@families
@pytest.mark.parametrize("left, right", [(0, 5), (3, 0), (2, 4)])
def test_padding_columns_change_no_value_and_no_gradient(family, left, right):
    """Row 6."""
    rollout = rollout_of(tiny(family))
    results = []
    for padded in (rollout, with_padding(rollout, left, right)):
        policy, critic = tiny(family), ValueModel.from_model(tiny(family, seed=1))
        outputs = (*response_logprobs(policy, padded), response_values(critic, padded))
        assert all(not x.masked_fill(padded.response_mask, 0).any() for x in outputs)
        assert (outputs[1] >= 0).all()
        sum((x**2).sum() / padded.response_mask.sum() for x in outputs).backward()
        gradients = [p.grad for model in (policy, critic) for p in model.parameters()]
        results.append(([x[:, : rollout.response_ids.shape[1]] for x in outputs], gradients))
    for got, want in zip(*results):
        assert_close(got, want, rtol=1e-5, atol=1e-5)


@families
@pytest.mark.parametrize(
    "options",
    [{}, dict(sliding_window=4), dict(attention_softcap=5.0), dict(hidden_size=64, head_dim=64)],
    ids=str,
)
@pytest.mark.parametrize("num_samples", [1, 4])
def test_packed_rows_are_those_of_each_row_alone(family, options, num_samples, monkeypatch):
    """Values and gradients, with fewer tokens computed; adjacent rows share an equal prompt."""
    for name in ("CALL", "MASK"):  # small rows are packed as well
        monkeypatch.setattr(packed_attention, name, 0)
    model = tiny(family, **options)
    rollout = rollout_of(model, num_samples=num_samples)
    # A row without a response, and one whose response is much longer than the others.
    rollout = with_padding(rollout, 0, 20)
    rollout.response_mask[0] = False
    rollout.response_mask[-1] = True
    computed, forward = [], model.trunk.forward
    monkeypatch.setattr(
        model.trunk, "forward", lambda ids, *a, **k: computed.append(ids) or forward(ids, *a, **k)
    )
    cotangents, results = (
        torch.randn(int(rollout.response_mask.sum()), model.config.hidden_size),
        [],
    )
    size = len(rollout.response_ids)
    every, each = [slice(None)], [slice(i, i + 1) for i in range(size)]
    for parts in (every, each):
        model.zero_grad()
        found = torch.cat([response_hidden(model, rows(rollout, part)) for part in parts])
        (found * cotangents).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([found.detach(), *gradients])
    assert computed[0].numel() < 0.8 * size * max(ids.shape[1] for ids in computed[1:])
    assert len(results[0]) == len(results[1]) > 10
    for got, want in zip(*results):
        assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_a_rollout_gives_its_rows_without_padding():
    rollout = rollout_of(tiny())
    assert rollout.prompts() == PROMPTS
    for response, mask in zip(rollout.responses(), rollout.response_mask):
        assert len(response) == mask.sum() and 2 not in response[:-1]
        assert response[-1] == 2 or len(response) == 6
    assert (
        rollout.input_ids.shape
        == rollout.attention_mask.shape
        == (4, 4 + rollout.response_ids.shape[1])
    )


def test_sampling_takes_other_ends_than_the_models_own():
    rollout = rollout_of(tiny(), eos_ids=(4, 5))
    assert any(2 in response for response in rollout.responses())
    assert all(not {4, 5} & set(response[:-1]) for response in rollout.responses())


def test_several_samples_of_a_prompt_are_rows_next_to_each_other():
    seeds = torch.arange(8)
    rollout = sample(tiny(), PROMPTS, max_new_tokens=6, num_samples=2, seeds=seeds)
    assert rollout.prompts() == [prompt for prompt in PROMPTS for _ in range(2)]
    assert all(len(x) == 8 for x in rollout)
    for row, seed in enumerate(seeds):
        alone = sample(tiny(), [PROMPTS[row // 2]], max_new_tokens=6, seeds=seed[None])
        assert alone.responses() == rollout.responses()[row : row + 1]


@pytest.mark.parametrize("options", [dict(top_k=3), dict(top_p=0.5), dict(min_p=0.5)], ids=str)
def test_a_truncated_rollout_warns_once_and_records_what_it_was_sampled_from(options):
    """Row 19."""
    _warn_of_truncation.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = sample(tiny(), PROMPTS, max_new_tokens=6, seeds=torch.arange(4))
        assert not caught
        for _ in range(2):
            rollout = sample(tiny(), PROMPTS, max_new_tokens=6, seeds=torch.arange(4), **options)
    assert [str(warning.message)[:35] for warning in caught] == [
        "rollouts sampled with top_k, top_p "
    ]
    assert caught[0].filename == __file__
    assert_close(plain.logprobs, response_logprobs(tiny(), plain)[0].detach(), rtol=0, atol=1e-5)
    full = response_logprobs(tiny(), rollout)[0].detach()
    assert (rollout.logprobs >= full - 1e-5).all() and (rollout.logprobs - full).max() > 0.1


class Largest(TorchDispatchMode):
    """The largest memory of a tensor that any operation returns, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


def test_joined_rollouts_keep_their_rows():
    model, options = tiny(), dict(max_new_tokens=6, generator=torch.Generator().manual_seed(0))
    parts = [sample(model, prompts, **options) for prompts in ([[5, 4, 3]], [[8], [7, 9]])]
    assert len({x.response_ids.shape for x in parts}) == 2
    joined = join(*parts)
    for name in ("prompts", "responses"):
        assert getattr(joined, name)() == [row for x in parts for row in getattr(x, name)()]
    total = sum(x.logprobs.double().sum() for x in parts)
    assert joined.logprobs.double().sum() == pytest.approx(total.item(), abs=1e-12)
    assert joined.ended.tolist() == [end for x in parts for end in x.ended.tolist()]
    assert joined.prompt_mask[:, -1].all()  # still padded on the left


@pytest.mark.parametrize("scored", ["responses", "completions", "a loss of completions"])
def test_training_never_holds_the_logits_of_a_batch(scored):
    """Forward and backward hold less than a quarter of B T V: logits of counted positions only."""
    B, P, R, V = 4, 20, 40, 5000
    model = Transformer(TransformerConfig(V, hidden_size=8, num_layers=1, num_heads=2))
    ids, mask = torch.randint(V, (B, P + R)), torch.arange(R) < torch.tensor([[5], [10], [3], [1]])
    rows = [Example(row[:P].tolist(), row[P:][counts].tolist()) for row, counts in zip(ids, mask)]
    tokens = collate(rows, pad_id=0)
    with Largest() as largest:
        if scored == "responses":
            whole = torch.ones(B, P, dtype=torch.bool)
            rollout = Rollout(ids[:, :P], whole, ids[:, P:], mask, torch.zeros(B, R), mask[:, -1])
            logprobs, entropy = response_logprobs(model, rollout)
            loss = (logprobs + entropy).sum()
        elif scored == "completions":
            logprobs = target_logprobs(model, tokens)
            loss = logprobs.sum()
        else:
            loss, logprobs = target_loss(
                model, tokens, lambda found, _: (found.logprobs.sum(), found.logprobs)
            )
        loss.backward()
    assert logprobs[logprobs != 0].numel() == 19
    assert 4 * 8 * V <= largest.nbytes < 4 * B * (P + R) * V / 4
