"""The transformer against `transformers`, and against itself under padding, caching and saving."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_core import last_token_index, token_logprobs
from rlhf_core.models import KVCache, RewardModel, Transformer, TransformerConfig, ValueModel, hub

SIZES = dict(vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_positions=32)
IDS = dict(bos_id=1, eos_ids=(2,), pad_id=0)
GPT2 = dict(
    positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias=True, mlp_bias=True
)
FAMILIES = {
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | dict(tie_embeddings=False, activation="gelu"),
    "llama": dict(tie_embeddings=False),
    "llama-gqa": dict(num_kv_heads=2, head_dim=16, rope_theta=500.0),
    "llama-bias": dict(num_kv_heads=1, attention_bias=True, mlp_bias=True, norm_eps=1e-3),
}
families = pytest.mark.parametrize("family", FAMILIES)
learned_and_rotary = pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])


@torch.no_grad()
def shake(model):
    """Initial weights are so small that any two wirings of them nearly agree; biases are 0 and norms 1."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def tiny(family, cls=Transformer, **options):
    torch.manual_seed(0)
    return shake(cls(TransformerConfig(**(SIZES | IDS | FAMILIES[family] | options))))


def padded(side, lengths=(9, 5, 1), width=9):
    """Random ids and a mask with each row's padding on that side."""
    ids = torch.randint(3, SIZES["vocab_size"], (len(lengths), width), generator=torch.Generator().manual_seed(1))
    place = torch.arange(width) if side == "right" else torch.arange(width).flip(0)
    return ids, place < torch.tensor(lengths)[:, None]


# ---- transformers


@pytest.fixture
def transformers(monkeypatch):
    """`python -m pytest` puts the repository on the path, whose kernels/ would pass for a package they look for."""
    root = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != root])
    return pytest.importorskip("transformers")


def hf_configs(transformers):
    common = dict(vocab_size=40, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    gpt2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=32, **common)
    llama = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=32
    )
    return {
        "gpt2": transformers.GPT2Config(**gpt2),
        "gpt2-untied": transformers.GPT2Config(
            **gpt2, n_inner=48, tie_word_embeddings=False, activation_function="gelu", layer_norm_epsilon=1e-3
        ),
        "llama": transformers.LlamaConfig(**llama, **common),
        "llama-gqa": transformers.LlamaConfig(
            **llama, **common, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_theta=500.0
        ),
        "llama-bias": transformers.LlamaConfig(
            **llama, **common, num_key_value_heads=1, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3
        ),
    }


@torch.no_grad()
@families
def test_their_checkpoint_gives_their_logits(family, tmp_path, transformers):
    config = hf_configs(transformers)[family]
    theirs = shake(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(tmp_path)
    ours = Transformer.from_pretrained(tmp_path)
    for side in ("left", "right"):
        ids, mask = padded(side)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        want = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
        assert_close(ours(ids, mask)[mask], want[mask], rtol=0, atol=1e-5)
    assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@families
def test_our_checkpoint_gives_them_our_weights_and_logits(family, tmp_path, transformers):
    ours = tiny(family)
    hub.save(ours, tmp_path / "ours", max_shard_bytes=20_000)  # several shards
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids, _ = padded("right")
    assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = Transformer.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@torch.no_grad()
@learned_and_rotary
def test_our_reward_model_is_their_sequence_classifier(family, tmp_path, transformers):
    ours = tiny(family, RewardModel)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids, mask = padded("right")
    want = theirs(ids.masked_fill(~mask, 0), attention_mask=mask.long()).logits
    assert theirs.config.num_labels == 1
    assert_close(ours(ids, mask), want[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_real_model_saved_by_us_gives_their_logits(data_dir, tmp_path, transformers):
    ours = Transformer.from_pretrained(data_dir / "models" / "stories260k")
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 512, (2, 64))
    assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)  # logits reach 20 here


# ---- padding


@torch.no_grad()
@families
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
    assert_close(model(torch.cat((row, junk), 1))[0, :9], want, rtol=0, atol=1e-5)  # no mask: padding is on the right


@learned_and_rotary
def test_padding_takes_no_gradient_and_gives_no_nan(family):
    model = tiny(family)
    ids, mask = padded("left")
    ids = ids.masked_fill(~mask, 39)
    model(ids, mask)[mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if not model.config.tie_embeddings:
        assert not model.trunk.embed.weight.grad[39].any()


# ---- cache


@torch.no_grad()
@learned_and_rotary
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 1, 1, 1, 1], [4, 5], [1, 8], [3, 1, 5]], ids=str)
@pytest.mark.parametrize("side", [None, "left"])
def test_decoding_with_a_cache_equals_the_full_forward(family, chunks, side):
    model = tiny(family)
    ids, mask = padded(side or "right")
    mask = mask if side else None
    cache = KVCache(model.config, len(ids), 12, model.head_weight)
    got, end = [], 0
    for size in chunks:
        end += size
        got.append(model(ids[:, end - size : end], None if mask is None else mask[:, :end], cache))
    assert cache.length == 9
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    assert_close(torch.cat(got, 1)[counted], model(ids, mask)[counted], rtol=0, atol=1e-5)


@torch.no_grad()
def test_causality():
    """A later token changes no earlier logit."""
    model = tiny("llama")
    ids, _ = padded("right")
    other = ids.clone()
    other[:, 5] += 1
    same = (model(ids) == model(other)).all(dim=-1).all(dim=0)
    assert same[:5].all() and not same[5:].any()


# ---- heads, dropout, limits


@torch.no_grad()
@learned_and_rotary
@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_is_read_at_the_last_attended_token(family, side):
    """Row 10: ids that look like padding or an end in mid-sequence, or as the last token, do not move it."""
    reward = tiny(family, RewardModel)
    critic = ValueModel.from_model(reward)
    ids, mask = padded(side)
    ids[0, 2:5] = torch.tensor([0, 2, 0])  # pad, EOS, pad in mid-sequence
    ids[0, 8] = 0
    scores, last = reward(ids, mask), last_token_index(mask)
    assert_close(scores, critic(ids, mask)[torch.arange(3), last], rtol=0, atol=1e-6)
    for row in range(3):
        alone = ids[row, mask[row]][None]
        assert_close(reward(alone, torch.ones_like(alone, dtype=torch.bool))[0], scores[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_head_from_a_model_copies_it_and_trains():
    policy = tiny("llama").requires_grad_(False)
    reward = RewardModel.from_model(policy)
    critic = ValueModel.from_model(reward)
    assert torch.equal(critic.score.weight, reward.score.weight)
    assert torch.equal(critic.trunk.embed.weight, policy.trunk.embed.weight)
    assert all(p.requires_grad for p in (*reward.parameters(), *critic.parameters()))  # even from a frozen one
    critic.trunk.embed.weight.zero_()
    critic.score.weight.zero_()
    assert policy.trunk.embed.weight.any() and reward.score.weight.any()


@torch.no_grad()
@learned_and_rotary
def test_dropout_acts_in_train_mode_only(family):
    model, ids = tiny(family, dropout=0.5), padded("right")[0]
    assert torch.equal(model(ids), model(ids))
    assert_close(model(ids), tiny(family)(ids), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(ids), model(ids))


@learned_and_rotary
def test_a_sequence_beyond_the_positions_is_refused(family):
    model = tiny(family)
    ids = torch.ones(1, 33, dtype=torch.long)
    with pytest.raises(ValueError, match="33 tokens is longer than the model's 32"):
        model(ids)
    cache = KVCache(model.config, 1, 64, model.head_weight)
    model(ids[:, :32], None, cache)
    with pytest.raises(ValueError, match="33 tokens"):
        model(ids[:, :1], None, cache)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 4\), not \(3, 9\)"):
        tiny("llama")(padded("left")[0], torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(positions="alibi"), "positions must be one of rope, learned, got 'alibi'"),
        (dict(norm="batchnorm"), "norm must be"),
        (dict(activation="relu"), "activation must be"),
        (dict(vocab_size=0), "vocab_size must be positive, got 0"),
        (dict(num_layers=0), "num_layers"),
        (dict(num_heads=4, num_kv_heads=3), "num_heads 4 is no multiple of num_kv_heads 3"),
        (dict(num_heads=4, hidden_size=30), "hidden_size 30 is no multiple of num_heads 4"),
        (dict(hidden_size=12, num_heads=4), "even head_dim, got 3"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SIZES | options))
