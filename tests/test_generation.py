"""Sampling: the right distribution, the right ends, and independence of the padded batch."""

import copy
import itertools
import math

import pytest
import torch
from op_helpers import poison_uninitialised_memory
from torch.testing import assert_close

from rlhf_core import backends, generation
from rlhf_core.data.collate import left_pad
from rlhf_core.generation import DecodeStep, generate
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.packed_decode import PackedModel
from rlhf_core.models.transformer import Trunk
from rlhf_core.rollout import response_logprobs, sample

GPT2 = dict(
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
FAMILIES = {"gpt2": GPT2, "llama": dict(num_kv_heads=1, tie_embeddings=False)}
PROMPTS = [[5, 3, 7, 4, 6], [8, 1], [2], [9, 9, 9, 1]]
V = 12


@torch.no_grad()
def tiny(family="llama", **options):
    """A model with large weights, so that tokens differ in likelihood."""
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
    """Row 4: log-probs from sampling == from training == log_softmax(z / T) of each row alone."""
    model = tiny(family)
    rollout = sample(
        model,
        PROMPTS,
        max_new_tokens=8,
        temperature=temperature,
        eos_ids=(2, 3),
        generator=seeded(),
    )
    assert not rollout.response_mask.all()  # rows of unequal length
    recomputed, _ = response_logprobs(model, rollout, temperature)
    assert_close(rollout.logprobs, recomputed, rtol=0, atol=1e-5)
    for b, (prompt, response) in enumerate(zip(rollout.prompts(), rollout.responses())):
        logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        want = (logits / temperature).log_softmax(-1)[torch.arange(len(response)), response]
        assert_close(rollout.logprobs[b, : len(response)], want, rtol=0, atol=1e-5)
        assert not rollout.logprobs[b, len(response) :].any()


@families
@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=3),
        dict(top_p=0.6),
        dict(min_p=0.2),
        dict(repetition_penalty=1.5),
        dict(repetition_penalty=0.7, top_k=4),
        dict(min_new_tokens=4, eos_ids=(2, 3, 7)),
    ],
    ids=str,
)
def test_log_probs_are_of_what_was_sampled_from_and_the_full_ones_of_the_model(family, options):
    """Row 19: against a manual version of truncation, penalty, forbidden EOS; full ones without."""
    model, ids, mask = tiny(family), *left_pad(PROMPTS, 0)
    options = dict(temperature=0.7, num_samples=3, eos_ids=(2,)) | options
    got = generate(model, ids, attention_mask=mask, max_new_tokens=7, generator=seeded(), **options)
    assert not got.response_mask.all()
    assert (got.logprobs - got.full_logprobs).abs().max() > 0.05
    penalty, t_min = options.get("repetition_penalty", 1), options.get("min_new_tokens", 0)
    for row, (ids, mask) in enumerate(zip(got.response_ids.tolist(), got.response_mask)):
        response, prompt = ids[: int(mask.sum())], PROMPTS[row // 3]
        for t, token in enumerate(response):
            z = next_logits(model, prompt + response[:t])
            full = (z / 0.7).log_softmax(-1)
            seen = list({*prompt, *response[:t]})
            z[seen] = torch.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
            if t < t_min:
                z[list(options["eos_ids"])] = -math.inf
            p = (z / 0.7).softmax(-1)
            p[p < p.topk(options.get("top_k", V)).values[-1]] = 0
            ordered = p.sort(descending=True).values
            if "top_p" in options:
                p[p < ordered[(ordered.cumsum(0) < options["top_p"]).sum()]] = 0
            p[p < options.get("min_p", 0) * p.max()] = 0
            assert_close(got.logprobs[row, t], (p[token] / p.sum()).log(), rtol=0, atol=1e-5)
            assert_close(got.full_logprobs[row, t], full[token], rtol=0, atol=1e-5)
        assert not got.full_logprobs[row, len(response) :].any()


@families
def test_a_copy_in_bfloat16_samples_and_leaves_the_model_alone(family, monkeypatch):
    model = tiny(family)
    add_adapters(model, LoRAConfig(rank=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids, mask = left_pad(PROMPTS, 0)
    settings = dict(attention_mask=mask, max_new_tokens=8, eos_ids=(), seeds=torch.arange(4))
    found = generate(model, ids, weight_dtype="bfloat16", **settings)
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.bfloat16()
    want = generate(rounded, ids, **settings)
    exact = generate(model, ids, **settings)
    assert torch.equal(found.response_ids, want.response_ids)
    assert torch.equal(found.logprobs, want.logprobs)
    assert not torch.equal(found.logprobs, exact.logprobs)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())

    monkeypatch.setattr(backends, "multiplies_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="weight_dtype bfloat16: this CPU has no bfloat16"):
        generate(model, ids, weight_dtype="bfloat16", **settings)


def test_nothing_truncated_means_one_tensor_of_log_probs():
    model, ids = tiny(), torch.tensor([PROMPTS[0]])
    got = generate(model, ids, max_new_tokens=4, generator=seeded())
    assert got.full_logprobs is got.logprobs
    greedy = generate(model, ids, max_new_tokens=4, temperature=0)
    want = model(torch.cat((ids, greedy.response_ids), dim=1))[0, 4:-1].log_softmax(-1).amax(-1)
    assert_close(greedy.full_logprobs[0], want.detach(), rtol=0, atol=1e-5)


def test_a_16_bit_model_gives_float32_log_probs_of_its_own_logits():
    model = tiny().bfloat16()
    rollout = sample(model, PROMPTS, max_new_tokens=8, generator=seeded())
    assert rollout.logprobs.dtype == torch.float32
    assert_close(rollout.logprobs, response_logprobs(model, rollout)[0].float(), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=0.5),
        dict(temperature=2.0),
        dict(top_k=4),
        dict(top_p=0.6),
        dict(min_p=0.6),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_softmax(options):
    """Chi-square of 20,000 draws. With 11 degrees of freedom 99.9 % of samples are below 31."""
    model, n = tiny(), 20_000
    ids = torch.tensor([PROMPTS[0]]).expand(n, -1)
    got = (
        generate(model, ids, max_new_tokens=1, generator=seeded(), **options)
        .response_ids[:, 0]
        .bincount(minlength=V)
    )
    p = (next_logits(model, PROMPTS[0]) / options.get("temperature", 1.0)).softmax(-1)
    ordered, order = p.sort(descending=True)
    keep = torch.ones(V, dtype=torch.bool)
    keep[options.get("top_k", V) :] = False
    keep &= ordered.cumsum(0) - ordered < options.get("top_p", 1.0)
    keep &= ordered >= options.get("min_p", 0) * ordered[0]
    support = order[keep]
    p = torch.zeros(V).index_copy(0, support, ordered[keep] / ordered[keep].sum())
    assert len(support) == V or len(support) in range(2, 6)  # otherwise the case proves nothing
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
    got = generate(
        model, ids, attention_mask=mask, max_new_tokens=10, generator=seeded(), **options
    )
    assert got.response_ids.tolist() == [greedy_loop(model, prompt, 10) for prompt in PROMPTS]
    assert not got.logprobs.any()  # all mass on one token


@families
@pytest.mark.parametrize("options", [{}, dict(top_p=0.9, repetition_penalty=1.2)], ids=str)
def test_a_row_is_drawn_by_its_seed_whatever_else_is_in_the_batch(family, options):
    """Alone, in a batch, in another order, as one of several samples; rows end at varied times."""
    model, n = tiny(family), 3
    options = dict(max_new_tokens=12, eos_ids=(2, 3)) | options
    seeds = torch.tensor([5, -(2**63), 2**63 - 1, 0, 7, 7, 8, 9, 10, 11, 12, 13])

    def responses(prompts, seeds, **more):
        ids, mask = left_pad(prompts, 0)
        got = generate(model, ids, attention_mask=mask, seeds=seeds, **options, **more)
        return [row[mask].tolist() for row, mask in zip(got.response_ids, got.response_mask)]

    together = responses(PROMPTS, seeds, num_samples=n)
    assert len({len(response) for response in together}) > 3
    repeated = [prompt for prompt in PROMPTS for _ in range(n)]
    assert responses(repeated, seeds) == together
    assert [responses([prompt], seed[None])[0] for prompt, seed in zip(repeated, seeds)] == together
    order = torch.randperm(12, generator=seeded())
    assert responses([repeated[i] for i in order], seeds[order]) == [together[i] for i in order]


def test_a_seed_gives_the_same_numbers_and_another_others():
    model, ids = tiny(), torch.tensor([PROMPTS[0]]).expand(8, -1)
    a, b, c = (generate(model, ids, max_new_tokens=8, generator=seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a.response_ids, c.response_ids)
    torch.manual_seed(1)
    got = generate(model, ids, max_new_tokens=8)  # uses torch's global generator
    assert torch.equal(got.response_ids, a.response_ids)


def test_samples_of_a_prompt_share_one_pass_over_it(monkeypatch):
    model, calls = tiny("gpt2").double(), []  # in float64, which has no packed form
    prefill = Trunk.prefill
    monkeypatch.setattr(
        Trunk,
        "prefill",
        lambda self, ids, *rest: calls.append(ids.shape) or prefill(self, ids, *rest),
    )
    ids, mask = left_pad(PROMPTS, 0)
    got = generate(
        model, ids, attention_mask=mask, max_new_tokens=3, num_samples=5, generator=seeded()
    )
    assert calls == [(4, 5)] and got.response_ids.shape == (20, 3)
    assert len({tuple(row) for row in got.response_ids[:5].tolist()}) > 1  # each has its own seed


def test_the_cache_beyond_a_rows_length_is_never_read(monkeypatch):
    poison_uninitialised_memory(monkeypatch)
    ids, mask = left_pad(PROMPTS, 0)
    got = generate(
        tiny(), ids, attention_mask=mask, max_new_tokens=10, temperature=0, num_samples=2
    )
    want = [greedy_loop(tiny(), prompt, 10) for prompt in PROMPTS for _ in range(2)]
    assert got.response_ids.tolist() == want


# ---- ends


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("options", [{}, dict(top_k=5, repetition_penalty=1.3)], ids=str)
def test_a_row_that_has_ended_leaves_the_batch_and_the_others_alone(options, every, monkeypatch):
    """The model runs on one row per generated token, plus a few if ends are checked less often."""
    monkeypatch.setitem(generation.STEPS_PER_CHECK, "cpu", every)
    model, sizes, draw = tiny(), [], DecodeStep.draw
    monkeypatch.setattr(
        DecodeStep, "draw", lambda self, logits: sizes.append(len(logits)) or draw(self, logits)
    )
    seeds, ids = torch.arange(40), torch.tensor([PROMPTS[0]] * 40)
    whole = generate(model, ids, max_new_tokens=14, eos_ids=(), seeds=seeds, **options)
    assert sizes == [40] * 14
    sizes.clear()
    got = generate(model, ids, max_new_tokens=14, eos_ids=(2, 3), seeds=seeds, **options)
    lengths = got.response_mask.sum(dim=1)
    assert len(lengths.unique()) > 4
    made = int(lengths.sum())
    if every == 1:
        assert sum(sizes) == made
    else:  # rows leave once half of them have ended
        assert made < sum(sizes) < 40 * 14 and 1 < len(set(sizes)) < 5
        assert all(a == b or 2 * b <= a for a, b in itertools.pairwise(sizes))
    for row, length in enumerate(lengths):
        response = whole.response_ids[row].tolist()
        assert length == min(
            [t + 1 for t, token in enumerate(response) if token in (2, 3)], default=14
        )
        assert got.response_ids[row, :length].tolist() == response[:length]
        assert_close(got.logprobs[row, :length], whole.logprobs[row, :length], rtol=0, atol=1e-5)


class Pieces:
    """Tokens hold several characters or part of one; decoding strips a leading space."""

    texts = (
        b"a",
        b"b",
        b"ab",
        b" a",
        b"\xc3",
        b"\xa9",
        b"\xc3\xa9b",
        b"ba",
        b" ",
        b"c",
        b"bb",
        b"a b",
    )

    def decode(self, ids):
        return b"".join(self.texts[i] for i in ids).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("least", [0, 5])
@pytest.mark.parametrize(
    "strings", [["aab"], ["é"], [" a"], ["b ab", "bbab"], ["aa", "b", "éb a"]], ids=str
)
def test_a_stop_string_ends_a_row_at_the_token_that_completes_it(
    strings, least, every, monkeypatch
):
    monkeypatch.setitem(generation.STEPS_PER_CHECK, "cpu", every)
    model, seeds, ids = tiny(), torch.arange(60), torch.tensor([PROMPTS[0]] * 60)
    options = dict(
        max_new_tokens=16, min_new_tokens=least, eos_ids=(), temperature=2.0, seeds=seeds
    )
    whole = generate(model, ids, **options).response_ids.tolist()
    got = generate(model, ids, stop_strings=strings, tokenizer=Pieces(), **options)
    lengths = got.response_mask.sum(dim=1).tolist()
    assert len(set(lengths)) > 2
    for row, response in enumerate(whole):
        texts = [
            b"".join(Pieces.texts[i] for i in response[:t]).removeprefix(b" ") for t in range(17)
        ]
        ends = [
            t
            for t in range(max(1, least), 17)
            if any(
                texts[t].find(string.encode(), max(0, len(texts[t - 1]) + 1 - len(string.encode())))
                >= 0
                for string in strings
            )
        ]
        assert lengths[row] == min(ends, default=16) and got.ended[row] == bool(ends)
        assert got.response_ids[row, : lengths[row]].tolist() == response[: lengths[row]]


def test_no_response_ends_before_the_shortest_asked_for():
    model, ids = tiny(), torch.tensor([PROMPTS[0]] * 64)
    lengths = [
        generate(
            model,
            ids,
            max_new_tokens=9,
            min_new_tokens=least,
            eos_ids=(2, 3, 7),
            generator=seeded(),
        )
        .response_mask.sum(dim=1)
        .unique()
        .tolist()
        for least in (0, 4, 9)
    ]
    assert lengths[0][0] == 1 and lengths[1][0] == 5 and lengths[2] == [9]


@pytest.mark.parametrize("from_config", [True, False])
def test_any_of_several_ends_closes_its_row_and_is_counted(from_config):
    stops = (2, 3, 7)
    model = tiny(eos_ids=stops if from_config else (), pad_id=11)
    ids = torch.tensor([PROMPTS[0]]).expand(64, -1)
    eos_ids = None if from_config else stops
    got = generate(
        model, ids, max_new_tokens=6, eos_ids=eos_ids, temperature=2.0, generator=seeded()
    )
    ends = set()
    for row, mask, ended in zip(got.response_ids.tolist(), got.response_mask, got.ended):
        length = int(mask.sum())
        assert mask[:length].all()  # no gap
        assert not any(token in stops for token in row[: length - 1])
        assert row[length - 1] in stops or length == 6  # a truncated response gets no EOS
        assert ended == (row[length - 1] in stops)
        assert row[length:] == [11] * (len(row) - length)
        ends.add(row[length - 1])
    assert ends > set(stops)


def test_a_batch_stops_when_its_last_row_has_ended():
    model = tiny()
    first = greedy_loop(model, PROMPTS[0], 1)
    got = generate(
        model, torch.tensor([PROMPTS[0]] * 2), max_new_tokens=9, temperature=0, eos_ids=tuple(first)
    )
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
        (dict(min_p=1.1), r"min_p must be in \[0, 1\], got 1.1"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be finite and > 0, got 0.0"),
        (dict(repetition_penalty=math.nan), "repetition_penalty"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(min_new_tokens=-1), "min_new_tokens must be at least 0, got -1"),
        (dict(min_new_tokens=3), "min_new_tokens 3 exceeds max_new_tokens 2"),
        (dict(num_samples=0), "num_samples must be at least 1, got 0"),
        (dict(eos_ids=(12,)), r"eos_ids must be in \[0, 12\), got \[12\]"),
        (dict(stop_strings=["a"]), "stop_strings need a tokenizer"),
        (dict(stop_strings="a", tokenizer=Pieces()), "stop_strings must be a sequence of strings"),
        (dict(stop_strings=["a", ""], tokenizer=Pieces()), "none empty"),
        (
            dict(seeds=torch.arange(3)),
            r"seeds have shape \(3,\), but there are 2 prompts x 1 samples",
        ),
        (
            dict(max_new_tokens=20),
            "row 1: 5 prompt \\+ 20 new tokens exceed the model's 24 positions",
        ),
        (
            dict(prompt_ids=torch.zeros(2, 0, dtype=torch.long), attention_mask=None),
            "row 0: the prompt is empty",
        ),
        (dict(prompt_ids=torch.zeros(0, 5, dtype=torch.long)), "there are no prompts"),
        (
            dict(attention_mask=torch.tensor([[True] * 5, [False] * 5])),
            "row 1: the prompt is empty",
        ),
        (
            dict(attention_mask=torch.tensor([[True] * 5, [True] * 4 + [False]])),
            "row 1: .* padded on the left",
        ),
        (
            dict(attention_mask=torch.tensor([[True] * 5, [True, False, True, True, True]])),
            "row 1: .* on the left",
        ),
        (
            dict(attention_mask=torch.ones(2, 4, dtype=torch.bool)),
            r"shape \(2, 4\), prompt_ids \(2, 5\)",
        ),
    ],
)
def test_an_argument_out_of_range_is_refused(options, message):
    ids, mask = left_pad([[1, 2], PROMPTS[0]], 0)
    with pytest.raises(ValueError, match=message):
        generate(tiny(), **(dict(prompt_ids=ids, attention_mask=mask, max_new_tokens=2) | options))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_reported_with_row_and_token(temperature):
    model, ids = tiny(tie_embeddings=False), torch.tensor([[8, 1], [5, 3], [1, 5]])
    options = dict(max_new_tokens=10, temperature=temperature, eos_ids=(), seeds=torch.arange(3))
    clean = generate(model, ids, **options).response_ids[:, :-1].tolist()
    poison = next(token for token in clean[1] if token not in (8, 1, 5, 3, *clean[0]))
    with torch.no_grad():
        model.trunk.embed.weight[poison] = math.nan
    at = clean[1].index(poison) + 1
    with pytest.raises(
        FloatingPointError, match=f"row 1: the model's logits are not finite at token {at} of"
    ):
        generate(model, ids, **options)


def test_the_last_position_is_usable():
    assert generate(tiny(), torch.tensor([PROMPTS[0]]), max_new_tokens=19).response_ids.shape == (
        1,
        19,
    )


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_sampling_and_the_mode_comes_back(training, monkeypatch):
    model = tiny("gpt2", dropout=0.5).train(training)
    ids = torch.tensor([PROMPTS[0]])
    got = generate(model, ids, max_new_tokens=6, temperature=0)
    assert model.training == training and model.trunk.blocks[0].training == training
    assert got.response_ids[0].tolist() == greedy_loop(tiny("gpt2"), PROMPTS[0], 6)
    for kind in (Transformer, PackedModel):
        monkeypatch.setattr(kind, "decode", lambda *arguments: 1 / 0)
    model.train(training)
    with pytest.raises(ZeroDivisionError):
        generate(model, ids, max_new_tokens=6)
    assert model.training == training  # also after an error


# ---- a real model


@pytest.fixture(scope="module")
def stories(data_dir):
    return data_dir / "models" / "stories260k"


def test_greedy_decoding_equals_that_of_transformers(stories, transformers):
    ids = torch.randint(3, 500, (4, 9), generator=seeded())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories)
    want = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=64,
        min_new_tokens=64,
    )
    options = dict(max_new_tokens=64, min_new_tokens=64, temperature=0)
    assert torch.equal(
        generate(Transformer.from_pretrained(stories), ids, **options).response_ids, want[:, 9:]
    )


def test_the_repetition_penalty_equals_that_of_transformers(stories, transformers):
    ids = torch.randint(3, 500, (4, 9), generator=seeded())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories)
    options = dict(max_new_tokens=40, min_new_tokens=40, repetition_penalty=1.3)
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    got = generate(Transformer.from_pretrained(stories), ids, temperature=0, **options)
    assert torch.equal(got.response_ids, want[:, 9:])


def test_recorded_log_probs_of_a_real_model_are_those_of_the_training_forward(stories):
    """Equal up to the rounding of the training forward, which such large logits increase."""
    model, prompts = (
        Transformer.from_pretrained(stories),
        [[1, 403, 407], [1], [1, 9, 8, 7, 6, 5]] * 5,
    )
    rollout = sample(model, prompts, max_new_tokens=64, eos_ids=(1, 2), generator=seeded())
    with torch.no_grad():
        trained, _ = response_logprobs(model, rollout)
        truth, _ = response_logprobs(model.double(), rollout)
    rounding = float((trained - truth).abs().max())
    assert rounding < 5e-5
    assert_close(rollout.logprobs, trained, rtol=0, atol=1e-5 + rounding)
