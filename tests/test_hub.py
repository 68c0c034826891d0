"""Checkpoints: what is wrong with one is named, a failed save harms nothing, a real model is read as it is."""

import json
import re

import pytest
import safetensors.torch
import torch

from rlhf_core import token_logprobs
from rlhf_core.data import Example, collate, load_tokenizer, read_texts
from rlhf_core.generation import generate
from rlhf_core.models import RewardModel, Transformer, TransformerConfig, hub

GPT2 = dict(
    positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias=True, mlp_bias=True
)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, max_positions=16, eos_ids=(2, 3))
    return Transformer(TransformerConfig(**(sizes | options)))


def same(a, b):
    return a.config == b.config and all(torch.equal(b.state_dict()[n], w) for n, w in a.state_dict().items())


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value != "remove"}))


def edit_tensors(folder, change):
    """Rewrite model.safetensors after change(dict of tensors)."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"no model\.safetensors"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        FileNotFoundError,
        r"pytorch_model\.bin is a pickle",
    ),
    "damaged weights": (lambda f: cut_in_half(f / "model.safetensors"), ValueError, r"\.safetensors: cannot be read"),
    "damaged config": (lambda f: cut_in_half(f / "config.json"), ValueError, r"config\.json:\d+: not valid JSON"),
    "family": (lambda f: edit_config(f, model_type="mamba"), ValueError, "model_type 'mamba' is not supported"),
    "no family": (lambda f: edit_config(f, model_type="remove"), ValueError, "field 'model_type' is missing"),
    "no size": (lambda f: edit_config(f, hidden_size="remove"), ValueError, "field 'hidden_size' is missing"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), ValueError, "activation 'relu' is not supported"),
    "rope scaling": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "llama3", "factor": 8.0}), ValueError, "'llama3'",
    ),
    "old rope scaling": (
        lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2.0}), ValueError, "'linear'",
    ),
    "rope parameters": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ValueError, "'yarn'",
    ),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        ValueError,
        r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'",
    ),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        ValueError,
        r"Transformer does not know, e\.g\. 'model\.layers\.0\.self_attn\.q_norm\.weight'",
    ),
    "shape": (
        lambda f: edit_config(f, vocab_size=21),
        ValueError,
        r"model\.embed_tokens\.weight has shape \(20, 16\), config\.json says \(21, 16\)",
    ),
    "shape of a part": (
        lambda f: edit_config(f, num_key_value_heads=1),
        ValueError,
        r"self_attn\.q_proj\.weight \+ .*k_proj\.weight \+ .*v_proj\.weight has shape \(48, 16\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(fault, tmp_path):
    break_it, error, message = FAULTS[fault]
    tiny().save_pretrained(tmp_path)
    assert same(tiny(), Transformer.from_pretrained(tmp_path))
    break_it(tmp_path)
    with pytest.raises(error, match=message) as raised:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("switch, value", [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True)])
def test_a_gpt2_variant_that_computes_otherwise_is_refused(switch, value, tmp_path):
    tiny(**GPT2).save_pretrained(tmp_path)
    edit_config(tmp_path, **{switch: value})
    with pytest.raises(ValueError, match=f"{switch}={value} is not supported"):
        Transformer.from_pretrained(tmp_path)


def test_a_language_model_is_no_reward_model_and_the_other_way_round(tmp_path):
    tiny().save_pretrained(tmp_path / "policy")
    RewardModel.from_model(tiny()).save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"no tensor 'score\.weight' \(a causal language model, not a reward model\)"):
        RewardModel.from_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"Transformer does not know, e\.g\. 'score\.weight'"):
        Transformer.from_pretrained(tmp_path / "reward")


@pytest.mark.parametrize(
    "options",
    [dict(activation="gelu", mlp_bias=True, positions="learned"), GPT2 | dict(num_kv_heads=1)],
    ids=["mixed", "gpt2 with grouped heads"],
)
def test_a_model_of_no_family_is_not_written(options, tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face family"):
        tiny(**options).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", [dict(tie_embeddings=False), GPT2], ids=["llama", "gpt2"])
def test_shards_hold_every_tensor_once_and_read_back(family, tmp_path):
    model = tiny(**family)
    hub.save(model, tmp_path, max_shard_bytes=3000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    shards = {file: safetensors.torch.load_file(tmp_path / file) for file in files}
    held = [(name, file) for file, tensors in shards.items() for name in tensors]
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 3000
    assert dict(held) == index["weight_map"] and len(held) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in model.state_dict().values())
    assert same(model, Transformer.from_pretrained(tmp_path))
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=re.escape(files[1])):
        Transformer.from_pretrained(tmp_path)


def test_saving_over_another_layout_leaves_no_stale_weights(tmp_path):
    """Readers disagree on which wins, the single file or the index, so only one may be there."""
    hub.save(tiny(1), tmp_path)
    hub.save(tiny(2), tmp_path, max_shard_bytes=3000)
    assert not (tmp_path / "model.safetensors").exists()
    assert same(tiny(2), Transformer.from_pretrained(tmp_path))
    hub.save(tiny(3), tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert same(tiny(3), Transformer.from_pretrained(tmp_path))


@pytest.mark.parametrize("there_before", [False, True])
def test_a_failed_save_keeps_the_old_model_and_no_half_of_the_new(there_before, tmp_path, monkeypatch):
    if there_before:
        tiny(1).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fails(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        tiny(2).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_training_a_loaded_model_does_not_reach_its_file(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same(tiny(), Transformer.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", [{}, GPT2], ids=["llama", "gpt2"])
def test_checkpoints_of_base_models_and_with_derived_tensors_load(family, tmp_path):
    """GPT2Model and LlamaModel leave out the prefix; old checkpoints carry buffers and a second copy of the head."""
    model, prefix = tiny(**family), "transformer." if family else "model."
    model.save_pretrained(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        tensors["lm_head.weight"] = model.head_weight.detach().clone()
        tensors["h.0.attn.bias" if family else "layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(tmp_path, rename)
    assert same(model, Transformer.from_pretrained(tmp_path))


def test_dtype_is_that_asked_for(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.ones(1, 4, dtype=torch.long)).dtype == torch.bfloat16


# ---- a real model


@pytest.fixture(scope="module")
def stories(data_dir):
    folder = data_dir / "models" / "stories260k"
    return Transformer.from_pretrained(folder), load_tokenizer(folder)


def test_a_real_model_goes_on_as_its_authors_say(stories):
    model, tokenizer = stories
    prompt = tokenizer.encode_prompt("Once upon a time")
    response = generate(model, torch.tensor([prompt]), max_new_tokens=80, temperature=0, eos_ids=(1, 2))
    text = tokenizer.decode(prompt + response.response_ids[0].tolist())
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she "
        "saw a big, red ball. She wanted to play with it, but it was too high."
    )


@torch.no_grad()
def test_a_real_model_predicts_real_text(stories, data_dir):
    model, tokenizer = stories
    texts = read_texts(data_dir / "text" / "tinystories.jsonl.gz")[:50]
    rows = [Example(tokenizer.encode_prompt(""), tokenizer.encode(text.completion)[:511]) for text in texts]
    total = count = 0
    for start in range(0, 50, 25):
        batch = collate(rows[start : start + 25], tokenizer.pad_id)
        total -= token_logprobs(model(batch.input_ids), batch.targets, mask=batch.target_mask).sum()
        count += batch.target_mask.sum()
    assert 1.2 < total / count < 1.5
