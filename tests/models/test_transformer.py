"""The transformer against `transformers`, and against itself under padding, caching and saving."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import GPT2
from torch.testing import assert_close

from rlhf_core import last_token_index, token_logprobs
from rlhf_core.generation import generate
from rlhf_core.models import (
    KVCache,
    RewardModel,
    Transformer,
    TransformerConfig,
    ValueModel,
    hub,
    packed_decode,
    transformer,
)
from rlhf_core.models.families import family_of
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.masked import MaskedPolicy

SIZES = dict(
    vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_positions=96
)
IDS = dict(bos_id=1, eos_ids=(2,), pad_id=0)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
SHORT, LONG = [1.0, 1.3], [2.0, 5.0]
GEMMA = dict(
    norm="rmsnorm_plus_one", norm_places="both", activation="gelu_tanh", embed_scale=32**0.5,
    num_kv_heads=2, head_dim=8, sliding_window=5, attention_scale=24**-0.5,
)  # fmt: skip
THEIR_GEMMA = dict(num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=24)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=24)
# name: (their model_type, our config, their fields beyond those that every family shares)
FAMILIES = {
    "gpt2": ("gpt2", GPT2 | dict(norm_eps=1e-5), {}),
    "gpt2-untied": (
        "gpt2",
        GPT2 | dict(tie_embeddings=False, activation="gelu", norm_eps=1e-3),
        dict(tie_word_embeddings=False, activation_function="gelu", layer_norm_epsilon=1e-3),
    ),
    "llama": ("llama", dict(tie_embeddings=False), {}),
    "llama-gqa": (
        "llama",
        dict(num_kv_heads=2, head_dim=16, rope_theta=500.0),
        dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_theta=500.0),
    ),
    "llama-bias": (
        "llama",
        dict(num_kv_heads=1, qkv_bias=True, out_bias=True, mlp_bias=True, norm_eps=1e-3),
        dict(
            num_key_value_heads=1, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3,
            tie_word_embeddings=True,
        ),
    ),
    "llama3": ("llama", dict(tie_embeddings=False, rope_scaling=LLAMA3), dict(rope_scaling=LLAMA3)),
    "llama-linear": (
        "llama",
        dict(tie_embeddings=False, rope_scaling=dict(rope_type="linear", factor=3.0)),
        dict(rope_scaling=dict(rope_type="linear", factor=3.0)),
    ),
    "mistral": (
        "mistral",
        dict(num_kv_heads=2, tie_embeddings=False, sliding_window=4),
        dict(num_key_value_heads=2, sliding_window=4),
    ),
    "mistral-full": (
        "mistral",
        dict(num_kv_heads=2, tie_embeddings=False, family="mistral"),
        dict(num_key_value_heads=2, sliding_window=None),
    ),
    "qwen2": (
        "qwen2",
        dict(num_kv_heads=2, qkv_bias=True),
        dict(num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "qwen2-window-yarn": (
        "qwen2",
        dict(
            num_kv_heads=2, qkv_bias=True, tie_embeddings=False, sliding_window=5,
            rope_scaling=YARN,
        ),
        dict(
            num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=0,
            rope_scaling=YARN,
        ),
    ),
    "qwen3": (
        "qwen3",
        dict(num_kv_heads=2, head_dim=16, qk_norm=True),
        dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    ),
    "qwen3-bias": (
        "qwen3",
        dict(head_dim=16, qk_norm=True, qkv_bias=True, out_bias=True, tie_embeddings=False),
        dict(num_key_value_heads=4, head_dim=16, attention_bias=True),
    ),
    "qwen2-window-in-one-layer": (
        "qwen2",
        dict(
            num_kv_heads=2, qkv_bias=True, tie_embeddings=False, sliding_window=5, full_layers=(0,)
        ),
        dict(
            num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
    ),
    "gemma2": (
        "gemma2",
        GEMMA | dict(full_layers=(1,), attention_softcap=2.0, logit_softcap=3.0),
        THEIR_GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma2-untied": (
        "gemma2",
        GEMMA | dict(full_layers=(1,), attention_scale=None, qkv_bias=True, out_bias=True)
        | dict(tie_embeddings=False),
        THEIR_GEMMA | dict(attn_logit_softcapping=None, final_logit_softcapping=None)
        | dict(query_pre_attn_scalar=8, attention_bias=True, tie_word_embeddings=False),
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | dict(qk_norm=True, full_layers=(1,), local_rope_theta=500.0, rope_theta=9e5)
        | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
        THEIR_GEMMA | dict(sliding_window_pattern=2, rope_local_base_freq=500.0, rope_theta=9e5)
        | dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
    ),
    "phi3": (
        "phi3",
        dict(num_kv_heads=2, tie_embeddings=False, sliding_window=7, family="phi3"),
        dict(num_key_value_heads=2, sliding_window=7),
    ),
    "phi4-mini": (
        "phi3",
        dict(num_kv_heads=2, partial_rotary_factor=0.5)
        | dict(rope_scaling=dict(
            rope_type="longrope", short_factor=SHORT, long_factor=LONG,
            original_max_position_embeddings=80,
        )),
        dict(num_key_value_heads=2, partial_rotary_factor=0.5, tie_word_embeddings=True)
        | dict(original_max_position_embeddings=80)
        | dict(rope_scaling=dict(type="longrope", short_factor=SHORT, long_factor=LONG)),
    ),
    "olmo2": (
        "olmo2",
        dict(num_kv_heads=2, tie_embeddings=False, norm_places="post", qk_norm=True)
        | dict(qk_norm_whole=True),
        dict(num_key_value_heads=2),
    ),
    "smollm3": (
        "smollm3",
        dict(num_kv_heads=2, unrotated_layers=(1,), rope_theta=2e6),
        dict(num_key_value_heads=2, no_rope_layer_interval=2),
    ),
    "smollm3-window": (
        "smollm3",
        dict(unrotated_layers=(1,), full_layers=(0,), sliding_window=5, tie_embeddings=False),
        dict(
            num_key_value_heads=4, no_rope_layers=[1, 0], sliding_window=5,
            use_sliding_window=True, rope_theta=1e4, tie_word_embeddings=False,
        ),
    ),
    "granite": (
        "granite",
        dict(num_kv_heads=2, embed_scale=12.0, attention_scale=0.3, logit_divisor=1.5)
        | dict(residual_scale=0.22, out_bias=True, qkv_bias=True),
        dict(num_key_value_heads=2, embedding_multiplier=12.0, attention_multiplier=0.3)
        | dict(logits_scaling=1.5, residual_multiplier=0.22, attention_bias=True)
        | dict(tie_word_embeddings=True),
    ),
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)
KINDS = [
    "gpt2",
    "llama-gqa",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi4-mini",
    "olmo2",
    "granite",
]
kinds = pytest.mark.parametrize("family", KINDS)  # positions, windows, norms, caps, factors
TRAINED = 6  # tokens, beyond which "longrope" has its long factors
kinds_and_longrope = pytest.mark.parametrize("family", [*KINDS, "longrope"])


@torch.no_grad()
def shake(model):
    """Add noise: with small initial weights, zero biases and unit norms most errors hide."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def tiny(family, cls=Transformer, **options):
    if family == "longrope":
        scaling = FAMILIES["phi4-mini"][1]["rope_scaling"]
        scaling = scaling | dict(original_max_position_embeddings=TRAINED)
        family, options = "phi4-mini", dict(rope_scaling=scaling) | options
    torch.manual_seed(0)
    return shake(cls(TransformerConfig(**(SIZES | IDS | FAMILIES[family][1] | options))))


def padded(side, lengths=(9, 5, 1), width=9):
    """Random ids and a mask with each row's padding on that side."""
    ids = torch.randint(
        3, SIZES["vocab_size"], (len(lengths), width), generator=torch.Generator().manual_seed(1)
    )
    place = torch.arange(width) if side == "right" else torch.arange(width).flip(0)
    return ids, place < torch.tensor(lengths)[:, None]


# ---- transformers


def theirs_of(family, transformers):
    """Their model of a family, with random weights."""
    model_type, _, fields = FAMILIES[family]
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=96)
    if model_type != "gpt2":
        sizes = dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=96
        )
        sizes |= dict(intermediate_size=48, rms_norm_eps=1e-5)
    common = dict(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(sizes | common | fields))
    return shake(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama-gqa", "gemma2-untied", "gemma3", "phi4-mini"])
def test_their_loaded_model_becomes_ours_and_shares_what_has_one_layout(family, transformers):
    theirs = theirs_of(family, transformers)
    ours, (ids, _) = Transformer.from_transformers(theirs), padded("right")
    assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    assert all(weight.requires_grad for weight in ours.parameters())
    tensors = dict(theirs.named_parameters())
    places = {tensor.data_ptr() for tensor in tensors.values()}
    shared = {name for name, w in ours.named_parameters() if w.data_ptr() in places}
    assert {"trunk.embed.weight", "trunk.norm.weight"} <= shared
    copied = ours.state_dict().keys() - shared
    if family == "phi4-mini":
        assert not copied
    elif family == "gpt2":
        assert copied == {n for n in copied if n.endswith("weight") and "norm" not in n}
    else:
        ends = ("attn.qkv.weight", "attn.qkv.bias", "mlp.up.weight")
        assert copied and all(name.endswith(ends) for name in copied)


def test_a_loaded_classifier_becomes_a_reward_model_and_a_misfit_is_named(transformers):
    theirs = theirs_of("llama", transformers)
    with pytest.raises(ValueError, match=r"RewardModel needs a tensor 'score.weight' of shape"):
        RewardModel.from_transformers(theirs)
    config = copy.deepcopy(theirs.config)
    config.num_labels = 1
    scorer = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    (ids, mask), ours = padded("right"), RewardModel.from_transformers(scorer)
    want = scorer(ids.masked_fill(~mask, 0), attention_mask=mask.long()).logits[:, 0]
    assert_close(ours(ids, mask), want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"Transformer needs a tensor 'lm_head\.weight'"):
        Transformer.from_transformers(scorer)
    theirs.generation_config.eos_token_id = [2, 7]
    assert Transformer.from_transformers(theirs).config.eos_ids == (2, 7)
    theirs.config.attn_logit_softcapping = 50.0
    message = r"^LlamaForCausalLM: attn_logit_softcapping=50\.0 is not supported in a llama model"
    with pytest.raises(ValueError, match=message):
        Transformer.from_transformers(theirs)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "gemma2"])
def test_new_ids_get_the_mean_of_the_rows_and_change_no_old_logit(family, tmp_path):
    model, (ids, _) = tiny(family), padded("right")
    old = model(ids).detach()
    rows = {name: w.detach().clone() for name, w in model.named_parameters() if w.shape[0] == 40}
    model.resize_embeddings(43)
    assert model.config.vocab_size == 43
    assert_close(model(ids)[..., :40], old, rtol=0, atol=1e-6)
    tables = [name for name in rows if "embed" in name or "lm_head" in name]
    assert len(tables) == 2 - model.config.tie_embeddings
    for name in tables:
        weight = model.get_parameter(name)
        assert weight.requires_grad and torch.equal(weight[:40], rows[name])
        assert_close(weight[40:], rows[name].mean(0).expand(3, -1))
    model.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids + 3), model(ids + 3))
    with pytest.raises(ValueError, match="vocab_size 40 is smaller than the model's 43"):
        model.resize_embeddings(40)


@families
def test_their_checkpoint_gives_their_logits_loss_and_gradients(family, tmp_path, transformers):
    theirs = theirs_of(family, transformers)
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    table = family_of(ours.config)
    with torch.no_grad():
        assert_close(ours(padded("left")[0]), theirs(padded("left")[0]).logits, rtol=0, atol=1e-5)
    for side in ("left", "right"):
        ids, mask = padded(side)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        want, got = (
            theirs(ids, attention_mask=mask.long(), position_ids=positions).logits,
            ours(ids, mask),
        )
        assert_close(got[mask], want[mask], rtol=0, atol=1e-5)
        counted = mask[:, :-1] & mask[:, 1:]
        losses = [F.cross_entropy(x[:, :-1][counted], ids[:, 1:][counted]) for x in (want, got)]
        assert_close(*losses, rtol=0, atol=1e-5)
        for model, loss in zip((theirs, ours), losses):
            model.zero_grad()
            loss.backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        for name, parameter in ours.named_parameters():
            for part, gradient in table.parts(name, parameter.grad, ours.config).items():
                assert gradients[part].abs().max() > 1e-4, f"{part} takes no part"
                assert_close(
                    gradient,
                    gradients.pop(part),
                    rtol=1e-4,
                    atol=1e-6,
                    msg=lambda m, n=part: f"{n}: {m}",
                )
        assert not gradients


@torch.no_grad()
@families
def test_our_greedy_generation_is_theirs_for_64_tokens(family, tmp_path, transformers):
    theirs = theirs_of(family, transformers)
    theirs.save_pretrained(tmp_path)
    prompts, mask = padded("left")
    settings = dict(do_sample=False, min_new_tokens=64, max_new_tokens=64, eos_token_id=None)
    want = theirs.generate(prompts.masked_fill(~mask, 0), attention_mask=mask.long(), **settings)[
        :, 9:
    ]
    model = Transformer.from_pretrained(tmp_path)
    assert want.shape == (3, 64) and len(want.unique()) > 1
    got = generate(
        model, prompts, attention_mask=mask, max_new_tokens=64, temperature=0, eos_ids=()
    )
    assert torch.equal(got.response_ids, want)


@torch.no_grad()
@families
def test_our_checkpoint_gives_them_our_weights_and_logits(family, tmp_path, transformers):
    ours = tiny(family)
    hub.save(ours, tmp_path / "ours", max_shard_bytes=20_000)  # several shards
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert theirs.config.model_type == FAMILIES[family][0]
    ids, _ = padded("right")
    assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = Transformer.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config and back.config.family == FAMILIES[family][0]
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@torch.no_grad()
@families
def test_our_reward_model_is_their_sequence_classifier(family, tmp_path, transformers):
    ours = tiny(family, RewardModel)
    ours.save_pretrained(tmp_path / "ours")
    if family == "granite":
        assert not hasattr(transformers, "GraniteForSequenceClassification")
        pytest.skip("transformers has no sequence classifier of Granite")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    ids, mask = padded("right")
    want = theirs(ids.masked_fill(~mask, 0), attention_mask=mask.long()).logits
    assert theirs.config.num_labels == 1
    assert_close(ours(ids, mask), want[:, 0], rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = RewardModel.from_pretrained(tmp_path / "theirs")
    assert all(
        torch.equal(back.state_dict()[name], weight) for name, weight in ours.state_dict().items()
    )


@torch.no_grad()
def test_a_real_model_saved_by_us_gives_their_logits(data_dir, tmp_path, transformers):
    ours = Transformer.from_pretrained(data_dir / "models" / "stories260k")
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 512, (2, 64))
    assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)  # logits reach 20 here


# ---- padding


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "longrope"])
@pytest.mark.parametrize("k", [1, 7])
def test_padding_on_either_side_changes_no_logit(family, k):
    model = tiny(family)
    row, mask = padded("right", lengths=(9,))
    junk, no = torch.full((1, k), 3), torch.zeros(1, k, dtype=torch.bool)
    want = model(row)[0]
    for ids, seen in (
        (row, mask),
        (torch.cat((junk, row), 1), torch.cat((no, mask), 1)),
        (torch.cat((row, junk), 1), torch.cat((mask, no), 1)),
    ):
        got = model(ids, seen)[seen]
        assert_close(got, want, rtol=0, atol=1e-5)
        targets = row[0].roll(-1)
        assert_close(token_logprobs(got, targets), token_logprobs(want, targets), rtol=0, atol=1e-5)
    assert_close(
        model(torch.cat((row, junk), 1))[0, :9], want, rtol=0, atol=1e-5
    )  # no mask: padding is on the right


@kinds
def test_padding_takes_no_gradient_and_gives_no_nan(family):
    model = tiny(family)
    ids, mask = padded("left")
    ids = ids.masked_fill(~mask, 39)
    model(ids, mask)[mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if not model.config.tie_embeddings:
        assert not model.trunk.embed.weight.grad[39].any()


# ---- packed rows


def layouts():
    """Sequences as places in a row of 12 tokens: in turn, or two that share their first tokens."""
    return {
        "packed": [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]],
        "tree": [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 7, 8]],
    }


@kinds_and_longrope
@pytest.mark.parametrize("layout", ["packed", "tree"])
def test_sequences_in_one_row_have_the_logits_and_gradients_of_rows_of_their_own(family, layout):
    model = tiny(family)
    ids = padded("right", lengths=(12,), width=12)[0]
    sequences = layouts()[layout]
    positions, visible = torch.zeros(1, 12, dtype=torch.long), torch.eye(12, dtype=torch.bool)[None]
    for places in sequences:
        positions[0, places] = torch.arange(len(places))
        for at, place in enumerate(places):
            visible[0, place, places[: at + 1]] = True
    weights = torch.randn(40, generator=torch.Generator().manual_seed(2))
    together = model(ids, positions=positions, visible=visible)[0]
    alone = [model(ids[:, places])[0] for places in sequences]
    for places, logits in zip(sequences, alone):
        assert_close(together[places], logits, rtol=0, atol=1e-5)
    gradients = []
    for parts in ([together[places] for places in sequences], alone):
        loss = sum((logits @ weights).sum() for logits in parts)
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name in gradients[0]:
        assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-4)


# ---- activation checkpointing


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_recomputes_blocks_and_keeps_gradients_bit_for_bit(family, dropout):
    ids, mask = padded("left")
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny(family, dropout=dropout, attention_dropout=dropout).train()
        model.trunk.checkpointing = checkpointing
        count = lambda *_, on=checkpointing: calls.append(on)  # noqa: E731
        model.trunk.blocks[0].register_forward_pre_hook(count)
        torch.manual_seed(1)
        model(ids, mask)[mask].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert calls == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ---- autocast


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3", "olmo2"])
def test_under_autocast_norms_round_what_their_linear_layers_would_round(family, monkeypatch):
    model, ids, found = tiny(family), padded("right")[0], []
    for normed in (transformer._normed, lambda norm, x: norm(x)):
        monkeypatch.setattr(transformer, "_normed", normed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids).float().square().sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# ---- torch.compile


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_compiled_graph_gives_values_and_gradients_of_eager_mode(family, autocast):
    torch._dynamo.reset()
    model, ids = tiny(family), padded("right")[0]
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = run(ids)
        gradients = torch.autograd.grad(logits.float().square().sum(), [*model.parameters()])
        found.append([x / x.abs().max() for x in (logits.detach().float(), *gradients)])
    for x, y in zip(*found):
        assert (x - y).abs().max() < (0.03 if autocast else 1e-5)


# ---- cache


@torch.no_grad()
@kinds
@pytest.mark.parametrize("prompt", [1, 4, 8])
def test_prefill_and_decode_give_the_hidden_states_of_the_full_forward(family, prompt):
    """Rows of several lengths, two samples a prompt, rows that end early; unused cache is NaN."""
    model = tiny(family)
    trunk, samples = model.trunk, padded("right", lengths=(12,) * 6, width=12)[0]
    samples[1::2, :prompt] = samples[::2, :prompt]  # prompt b goes to rows 2b and 2b + 1
    lengths = torch.tensor([prompt, max(1, prompt - 3), 1])
    cache = KVCache(model.config, 3, prompt, model.head_weight)
    for pair in cache.layers:
        for store in pair:
            store.fill_(torch.nan)
    want = trunk(samples)
    ends = lengths.repeat_interleave(2)
    assert_close(
        trunk.prefill(samples[::2, :prompt], lengths, cache),
        want[::2][torch.arange(3), lengths - 1],
    )
    cache = cache.continued(2, prompt + 11)
    for store in cache.stores.get(None, ()):
        assert store.shape[3] == 11  # the prompt is stored once
        store.fill_(torch.nan)
    while len(slots := (ends < torch.tensor([12, 5, 12, 9, 12, 12])).nonzero()[:, 0].flip(0)):
        assert torch.equal(cache.lengths, ends)
        got = trunk.decode(samples[slots, ends[slots]], cache, slots)
        assert_close(got, want[slots, ends[slots]], rtol=0, atol=1e-5)
        ends[slots] += 1


WINDOWED = ["mistral", "qwen2-window-in-one-layer", "gemma2", "gemma3", "phi3", "smollm3-window"]


@pytest.mark.parametrize("adapted", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("form", ["modules", "packed", "in place"])
@pytest.mark.parametrize("family", WINDOWED)
def test_windows_in_the_cache_sample_what_a_full_cache_samples(family, form, adapted, monkeypatch):
    """Prompts shorter and longer than the window, left-padded; rows that end; three samples."""
    if form == "modules":
        monkeypatch.setattr(packed_decode, "_fits", lambda *arguments: False)
    elif form == "in place":
        monkeypatch.setattr(packed_decode, "MOST_PACKED", 0)
    model, (ids, mask) = tiny(family), padded("left", lengths=(14, 9, 5, 1), width=14)
    if adapted:
        add_adapters(model, LoRAConfig(rank=2))
        shake(model)
    options = dict(attention_mask=mask, max_new_tokens=40, eos_ids=(2, 3, 4), num_samples=3)
    got = generate(model, ids, **options, seeds=torch.arange(12))
    assert len(got.response_mask.sum(dim=1).unique()) > 3

    def full_cache(self, *sizes):
        cache = KVCache(replace(self.config, sliding_window=None), *sizes, self.trunk.embed.weight)
        cache.stores[self.config.sliding_window] = cache.stores[None]
        return cache

    monkeypatch.setattr(Transformer, "new_cache", full_cache)
    ids, mask = (x.repeat_interleave(3, dim=0) for x in (ids, mask))
    options |= dict(attention_mask=mask, num_samples=1)
    want = generate(model, ids, **options, seeds=torch.arange(12))
    assert torch.equal(got.response_ids, want.response_ids)
    assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "longrope"])
def test_causality(family):
    """A later token changes no earlier logit."""
    model = tiny(family)
    ids, _ = padded("right")
    other = ids.clone()
    other[:, 5] += 1
    same = (model(ids) == model(other)).all(dim=-1).all(dim=0)
    assert same[:5].all() and not same[5:].any()


# ---- longrope beyond the trained length


def long_pair(folder, transformers, **options):
    """The longrope model, and the same one in transformers."""
    ours = tiny("longrope", **options)
    ours.save_pretrained(folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    )


@pytest.mark.parametrize("length", [1, TRAINED - 1, TRAINED, TRAINED + 1, 20])
def test_longrope_predicts_each_token_as_transformers_does_from_those_before(
    length, tmp_path, transformers
):
    """A token up to the trained length has the short factors, as in generation, in any row."""
    ours, theirs = long_pair(tmp_path, transformers)
    ids = torch.randint(3, 40, (2, length))
    got, whole, start = ours(ids), theirs(ids).logits, theirs(ids[:, :TRAINED]).logits
    assert_close(got[:, :TRAINED], start, rtol=0, atol=1e-5)
    assert_close(got[:, TRAINED:], whole[:, TRAINED:], rtol=0, atol=1e-5)
    if length > TRAINED:
        assert (whole[:, :TRAINED] - start).abs().max() > 0.1  # the factors matter
    weights = torch.randn(40)
    late = slice(TRAINED if length > TRAINED else 0, None)
    for logits in (got, whole):
        (logits[:, late] @ weights).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    table = family_of(ours.config)
    for name, parameter in ours.named_parameters():
        for part, gradient in table.parts(name, parameter.grad, ours.config).items():
            assert_close(gradient, gradients[part], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_longrope_samples_as_transformers_does_across_the_trained_length(
    window, tmp_path, transformers
):
    """Both compute a row's cache again where the row passes the trained length."""
    ours, theirs = long_pair(tmp_path, transformers, sliding_window=window)
    lengths = (1, TRAINED - 1, TRAINED, TRAINED + 1, 14)
    prompts, mask = padded("left", lengths=lengths, width=14)
    settings = dict(do_sample=False, min_new_tokens=30, max_new_tokens=30, eos_token_id=None)
    rows = [row[seen][None] for row, seen in zip(prompts, mask)]
    want = [theirs.generate(row, **settings)[0, row.shape[1] :] for row in rows]
    options = dict(max_new_tokens=30, temperature=0, eos_ids=())
    got = generate(ours, prompts, attention_mask=mask, **options)
    assert torch.equal(got.response_ids, torch.stack(want))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_longrope_samples_with_the_log_probs_of_training(masked):
    """In a batch of rows that pass the trained length at other times, or end, or never pass it."""
    model = tiny("longrope")
    policy = MaskedPolicy(model, 0.9, 1.0) if masked else model
    if masked:
        shake(model)
    prompts, mask = padded("left", lengths=(9, TRAINED, 3, 1), width=9)
    seeds, options = torch.arange(12), dict(max_new_tokens=12, eos_ids=tuple(range(2, 9)))
    got = generate(policy, prompts, attention_mask=mask, num_samples=3, seeds=seeds, **options)
    assert len(got.response_mask.sum(dim=1).unique()) > 3
    for n in range(12):
        prompt, length = prompts[n // 3][mask[n // 3]], int(got.response_mask[n].sum())
        response = got.response_ids[n, :length]
        ids = torch.cat((prompt, response))[None, :-1]
        if masked:
            logits = policy.logits(*(x.hidden_states(ids)[0] for x in (model, policy.lagging)))
        else:
            logits = model(ids)[0]
        want = token_logprobs(logits[len(prompt) - 1 :], response)
        assert_close(got.logprobs[n, :length], want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_rows_beyond_the_trained_length_take_two_passes():
    everything = torch.ones(1, 20, 20, dtype=torch.bool).tril()
    for family, length, passes in (("longrope", TRAINED, 1), ("longrope", 20, 2), ("llama", 20, 1)):
        model, calls = tiny(family, max_positions=19), []
        model.trunk.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        positions = torch.arange(length)[None] % 10  # a packed row can be longer than max_positions
        visible = everything[:, :length, :length]
        model(torch.ones_like(positions), positions=positions, visible=visible)
        assert len(calls) == passes


# ---- heads, dropout, limits


@torch.no_grad()
@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_is_read_at_the_last_attended_token(family, side):
    """Row 10: padding ids and EOS in mid-sequence, or as the last token, do not move it."""
    reward = tiny(family, RewardModel)
    critic = ValueModel.from_model(reward)
    ids, mask = padded(side)
    ids[0, 2:5] = torch.tensor([0, 2, 0])  # pad, EOS, pad in mid-sequence
    ids[0, 8] = 0
    scores, last = reward(ids, mask), last_token_index(mask)
    assert_close(scores, critic(ids, mask)[torch.arange(3), last], rtol=0, atol=1e-6)
    for row in range(3):
        alone = ids[row, mask[row]][None]
        assert_close(
            reward(alone, torch.ones_like(alone, dtype=torch.bool))[0],
            scores[row],
            rtol=0,
            atol=1e-5,
        )


@torch.no_grad()
def test_a_head_from_a_model_copies_it_and_trains():
    policy = tiny("llama").requires_grad_(False)
    reward = RewardModel.from_model(policy)
    critic = ValueModel.from_model(reward)
    assert torch.equal(critic.score.weight, reward.score.weight)
    assert torch.equal(critic.trunk.embed.weight, policy.trunk.embed.weight)
    assert all(
        p.requires_grad for p in (*reward.parameters(), *critic.parameters())
    )  # even from a frozen one
    critic.trunk.embed.weight.zero_()
    critic.score.weight.zero_()
    assert policy.trunk.embed.weight.any() and reward.score.weight.any()


@torch.no_grad()
@kinds
@pytest.mark.parametrize("where", ["dropout", "attention_dropout"])
def test_dropout_acts_in_train_mode_only(family, where):
    model, ids = tiny(family, **{where: 0.5}), padded("right")[0]
    assert torch.equal(model(ids), model(ids))
    assert_close(model(ids), tiny(family)(ids), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(ids), model(ids))


@kinds
def test_a_sequence_beyond_the_positions_is_refused(family):
    model = tiny(family, max_positions=32)
    with pytest.raises(ValueError, match="33 tokens is longer than the model's 32"):
        model(torch.ones(1, 33, dtype=torch.long))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 4\), not \(3, 9\)"):
        tiny("llama")(padded("left")[0], torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(positions="alibi"), "positions must be one of rope, learned, got 'alibi'"),
        (dict(norm="batchnorm"), "norm must be"),
        (dict(norm_places="sandwich"), "norm_places must be one of pre, post, both"),
        (dict(full_layers=(2,)), r"full_layers must be indices of layers, got \(2,\)"),
        (dict(partial_rotary_factor=0.1), "even number of elements of a head, got 0"),
        (dict(logit_softcap=0.0), "logit_softcap must be a finite number > 0, got 0.0"),
        (dict(activation="relu"), "activation must be"),
        (dict(vocab_size=0), "vocab_size must be a whole number > 0, got 0"),
        (dict(num_layers=0), "num_layers"),
        (dict(vocab_size="512"), "vocab_size must be a whole number > 0, got '512'"),
        (dict(num_heads="4"), "num_heads must be a whole number > 0, got '4'"),
        (dict(hidden_size=8.0), "hidden_size must be a whole number > 0, got 8.0"),
        (dict(max_positions=None), "max_positions must be a whole number > 0, got None"),
        (dict(norm_eps="1e-5"), "norm_eps must be a finite number >= 0, got '1e-5'"),
        (dict(num_heads=4, num_kv_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
        (dict(num_heads=4, hidden_size=30), "hidden_size 30 is not a multiple of num_heads 4"),
        (
            dict(hidden_size=12, num_heads=4),
            "even number of elements of a head, got 3 of head_dim 3",
        ),
        (dict(sliding_window=0), "sliding_window must be a whole number > 0, got 0"),
        (
            dict(rope_scaling=dict(rope_type="longrope", factor=2.0)),
            "rope scaling 'longrope' needs a list of 4 numbers as 'short_factor', got None",
        ),
    ],
)
def test_a_contradictory_config_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SIZES | options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tokens_at_read_have_the_hidden_states_and_gradients_of_all(checkpointing):
    torch.manual_seed(0)
    trunk = Transformer(TransformerConfig(30, hidden_size=16, num_layers=2, num_heads=2)).trunk
    trunk.checkpointing = checkpointing
    ids, read = torch.randint(30, (3, 7)), torch.tensor([2, 20, 9, 9])
    mask = torch.tensor([[True] * 7, [False] * 2 + [True] * 5, [True] * 7])

    def run(**options):
        hidden = trunk(ids, mask, **options)
        hidden = hidden if options else hidden.flatten(0, 1)[read]
        return hidden, *torch.autograd.grad(
            (hidden * torch.arange(1.0, 65).view(4, 16)).sum(), list(trunk.parameters())
        )

    rows = []
    hook = trunk.blocks[1].mlp.register_forward_hook(
        lambda module, inputs, out: rows.append(out.numel() // 16)
    )
    part, whole = run(read=read), run()
    hook.remove()
    assert set(rows[: len(rows) // 2]) == {4} and set(rows[len(rows) // 2 :]) == {21}
    for got, want in zip(part, whole):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- what code outside models/ uses instead of the trunk and the head


@kinds
def test_token_logprobs_are_those_of_the_logits(family):
    model, (ids, mask) = tiny(family), padded("right")
    hidden = model.hidden_states(ids, mask)[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    got = model.token_logprobs(hidden, targets, temperature=0.7)
    log_p = (model(ids, mask)[:, :-1].flatten(0, 1) / 0.7).log_softmax(-1)
    assert_close(got.logprobs, log_p.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
    assert_close(got.entropy, -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-5)


@kinds
def test_token_loss_has_the_gradients_of_the_logits(family):
    ids, _ = padded("right")
    gradients = []
    for fused in (True, False):
        model = tiny(family)
        hidden, targets = model.hidden_states(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        if fused:
            (loss,) = model.token_loss(hidden, targets, lambda tokens, _: (-tokens[0].sum(),))
        else:
            loss = F.cross_entropy(model.logits(hidden), targets, reduction="sum")
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(*gradients, rtol=1e-4, atol=1e-4)


@kinds
def test_target_and_mean_logits_are_those_of_the_logits(family):
    model, hidden = tiny(family), torch.randn(5, 32)
    targets = torch.tensor([0, 7, 39, 7, 1])
    target, mean = model.target_and_mean_logits(hidden, targets)
    logits = model.logits(hidden)
    assert_close(target, logits[range(5), targets], rtol=0, atol=1e-5)
    assert_close(mean, logits.mean(-1), rtol=0, atol=1e-5)


def test_models_know_whether_they_share_a_trunk():
    policy = tiny("llama")
    on_it, beside_it = (ValueModel.from_model(policy, share_trunk=on) for on in (True, False))
    assert policy.shares_trunk_with(policy) and on_it.shares_trunk_with(policy)
    assert not beside_it.shares_trunk_with(policy) and not beside_it.shares_trunk_with(on_it)


def test_a_new_cache_has_the_sizes_device_and_dtype_of_the_model():
    model = tiny("llama-gqa").to(torch.bfloat16)
    cache = model.new_cache(3, 11)
    for store in (x for pair in cache.layers for x in pair):
        assert store.shape == (3, 2, 11, 16)
        assert store.dtype == torch.bfloat16 and store.device == model.device
    assert len(cache.layers) == 2 and cache.lengths.tolist() == [0, 0, 0]


def test_a_layer_with_a_window_keeps_only_its_window():
    model = tiny("gemma3")  # layer 0 has a window of 5, layer 1 none
    for length, sizes in ((3, [3, 3]), (5, [5, 5]), (50, [5, 50])):
        cache = model.new_cache(2, length)
        assert [store.shape[2] for pair in cache.layers for store in pair] == [
            size for size in sizes for _ in range(2)
        ]


@kinds
@pytest.mark.parametrize("freeze_layers", [0, 1, 2])
def test_prepare_training_freezes_embeddings_and_the_lowest_blocks(family, freeze_layers):
    model = tiny(family, tie_embeddings=False)
    model.prepare_training(freeze_layers=freeze_layers, activation_checkpointing=True)
    assert model.trunk.checkpointing
    frozen = {
        name.split(".weight")[0] for name, p in model.named_parameters() if not p.requires_grad
    }
    parts = {".".join(name.split(".")[:3]).split(".weight")[0] for name in frozen}
    embeddings = {"trunk.embed"} | ({"trunk.position"} if family == "gpt2" else set())
    blocks = {f"trunk.blocks.{i}" for i in range(freeze_layers)}
    assert parts == (embeddings | blocks if freeze_layers else set())


def test_more_frozen_layers_than_blocks_are_refused():
    with pytest.raises(ValueError, match="freeze_layers is 3, but the model has 2 blocks"):
        tiny("llama").prepare_training(freeze_layers=3, activation_checkpointing=False)
