"""Sampling: from the distribution it says, ended where it says, the same alone and in a padded batch."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.data.collate import left_pad
from rlhf_core.generation import generate
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.rollout import response_logprobs, sample

GPT2 = dict(
    positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias=True, mlp_bias=True
)
FAMILIES = {"gpt2": GPT2, "llama": dict(num_kv_heads=1, tie_embeddings=False)}
PROMPTS = [[5, 3, 7, 4, 6], [8, 1], [2], [9, 9, 9, 1]]
V = 12


@torch.no_grad()
def tiny(family="llama", **options):
    """Weights far from 0, so that tokens differ in likelihood."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=16, num_layers=2, num_heads=2, max_positions=24)
    model = Transformer(TransformerConfig(**(sizes | FAMILIES[family] | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def next_logits(model, prompt):
    return model.eval()(torch.tensor([prompt]))[0, -1]


families = pytest.mark.parametrize("family", FAMILIES)


# ---- log-probs


@families
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_recorded_log_probs_are_those_of_the_training_forward(family, temperature):
    """Row 4: recorded while sampling == recomputed in training == log_softmax(z / T) of each row alone."""
    model = tiny(family)
    rollout = sample(model, PROMPTS, max_new_tokens=8, temperature=temperature, eos_ids=(2, 3), generator=seeded())
    assert not rollout.response_mask.all()  # rows of unequal length
    recomputed, _ = response_logprobs(model, rollout, temperature)
    assert_close(rollout.logprobs, recomputed, rtol=0, atol=1e-5)
    for b, (prompt, response) in enumerate(zip(rollout.prompts(), rollout.responses())):
        logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        want = (logits / temperature).log_softmax(-1)[torch.arange(len(response)), response]
        assert_close(rollout.logprobs[b, : len(response)], want, rtol=0, atol=1e-5)
        assert not rollout.logprobs[b, len(response) :].any()


def test_log_probs_are_of_the_truncated_distribution_where_there_is_one():
    """Row 19: the distribution sampled from, renormalised over what top_k left."""
    model = tiny()
    got = generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=1, top_k=3, temperature=0.7, generator=seeded())
    top = (next_logits(model, PROMPTS[0]) / 0.7).topk(3)
    want = top.values.log_softmax(-1)[top.indices == got.response_ids[0, 0]]
    assert_close(got.logprobs[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, dict(temperature=0.5), dict(temperature=2.0), dict(top_k=4), dict(top_p=0.6)], ids=str
)
def test_frequencies_are_those_of_the_softmax(options):
    """Chi-square over 20,000 draws of one token; 12 tokens have 11 degrees of freedom, 99.9 % of samples are < 31."""
    model, n = tiny(), 20_000
    ids = torch.tensor([PROMPTS[0]]).expand(n, -1)
    got = generate(model, ids, max_new_tokens=1, generator=seeded(), **options).response_ids[:, 0].bincount(minlength=V)
    p = (next_logits(model, PROMPTS[0]) / options.get("temperature", 1.0)).softmax(-1)
    ordered, order = p.sort(descending=True)
    keep = torch.ones(V, dtype=torch.bool)
    keep[options.get("top_k", V) :] = False
    keep &= ordered.cumsum(0) - ordered < options.get("top_p", 1.0)
    support = order[keep]
    p = torch.zeros(V).index_copy(0, support, ordered[keep] / ordered[keep].sum())
    assert len(support) == V or len(support) in range(2, 6)  # else the case would show nothing
    assert not got[p == 0].any()
    expected = n * p[p > 0]
    assert ((got[p > 0] - expected) ** 2 / expected).sum() < 31


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    model = tiny()
    p = next_logits(model, PROMPTS[0]).softmax(-1)
    best = p.argmax()
    ids = torch.tensor([PROMPTS[0]]).expand(500, -1)
    for top_p, support in ((float(p[best]) * 0.9, 1), (float(p[best]) * 1.01, 2)):
        got = generate(model, ids, max_new_tokens=1, top_p=top_p, generator=seeded())
        assert len(got.response_ids.unique()) == support and best in got.response_ids


# ---- greedy, batches, seeds


@torch.no_grad()
def greedy_loop(model, prompt, steps, eos_ids=()):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model.eval()(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt) :]


@families
@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=1), dict(top_p=1e-6)], ids=str)
def test_greedy_in_a_padded_batch_is_the_argmax_loop_of_each_row_alone(family, options):
    model = tiny(family)
    ids, mask = left_pad(PROMPTS, 0)
    got = generate(model, ids, attention_mask=mask, max_new_tokens=10, generator=seeded(), **options)
    assert got.response_ids.tolist() == [greedy_loop(model, prompt, 10) for prompt in PROMPTS]
    assert not got.logprobs.any()  # all mass on one token


def test_a_seed_gives_the_same_numbers_and_another_others():
    model, ids = tiny(), torch.tensor([PROMPTS[0]]).expand(8, -1)
    a, b, c = (generate(model, ids, max_new_tokens=8, generator=seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a.response_ids, c.response_ids)
    torch.manual_seed(1)
    assert torch.equal(generate(model, ids, max_new_tokens=8).response_ids, a.response_ids)  # torch's own generator


# ---- ends


@pytest.mark.parametrize("from_config", [True, False])
def test_any_of_several_ends_closes_its_row_and_is_counted(from_config):
    stops = (2, 3, 7)
    model = tiny(eos_ids=stops if from_config else (), pad_id=11)
    ids = torch.tensor([PROMPTS[0]]).expand(64, -1)
    eos_ids = None if from_config else stops
    got = generate(model, ids, max_new_tokens=6, eos_ids=eos_ids, temperature=2.0, generator=seeded())
    ends = set()
    for row, mask in zip(got.response_ids.tolist(), got.response_mask):
        length = int(mask.sum())
        assert mask[:length].all()  # no gap
        assert not any(token in stops for token in row[: length - 1])
        assert row[length - 1] in stops or length == 6  # cut off: its own length counts, no EOS is invented
        assert row[length:] == [11] * (len(row) - length)
        ends.add(row[length - 1])
    assert ends > set(stops)


def test_a_batch_stops_when_its_last_row_has_ended():
    model = tiny()
    first = greedy_loop(model, PROMPTS[0], 1)
    got = generate(model, torch.tensor([PROMPTS[0]] * 2), max_new_tokens=9, temperature=0, eos_ids=tuple(first))
    assert got.response_ids.tolist() == [first] * 2 and got.response_mask.all()


def test_no_ends_means_full_width():
    got = generate(tiny(eos_ids=tuple(range(V))), torch.tensor([[1]]), max_new_tokens=5, eos_ids=())
    assert got.response_mask.tolist() == [[True] * 5]


# ---- arguments


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-0.1), "temperature must be finite and >= 0, got -0.1"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), "top_p"),
        (dict(max_new_tokens=0), "max_new_tokens = 0"),
        (dict(max_new_tokens=20), "5 prompt \\+ 20 new tokens exceed the model's 24 positions"),
        (dict(prompt_ids=torch.zeros(1, 0, dtype=torch.long)), "P = 0"),
        (dict(attention_mask=torch.tensor([[True, True, True, True, False]])), "padded on the left"),
        (dict(attention_mask=torch.zeros(1, 5, dtype=torch.bool)), "padded on the left"),
    ],
)
def test_an_argument_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **(dict(prompt_ids=torch.tensor([PROMPTS[0]]), max_new_tokens=2) | options))


def test_the_last_position_is_usable():
    assert generate(tiny(), torch.tensor([PROMPTS[0]]), max_new_tokens=19).response_ids.shape == (1, 19)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_sampling_and_the_mode_comes_back(training, monkeypatch):
    model = tiny(dropout=0.5).train(training)
    ids = torch.tensor([PROMPTS[0]])
    got = generate(model, ids, max_new_tokens=6, temperature=0)
    assert model.training == training and model.trunk.blocks[0].training == training
    assert got.response_ids[0].tolist() == greedy_loop(tiny(), PROMPTS[0], 6)
    monkeypatch.setattr(type(model), "logits", lambda self, hidden: 1 / 0)
    model.train(training)
    with pytest.raises(ZeroDivisionError):
        generate(model, ids, max_new_tokens=6)
    assert model.training == training  # after an error too
