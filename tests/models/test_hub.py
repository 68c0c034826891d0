"""Checkpoints: what is wrong with one is named, a failed save harms nothing, a real model is read as it is."""

import json
import os
import subprocess
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rlhf_core import token_logprobs
from rlhf_core.data import ByteTokenizer, Example, collate, load_tokenizer, read_texts
from rlhf_core.generation import generate
from rlhf_core.models import RewardModel, Transformer, TransformerConfig, hub

GPT2 = dict(
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, max_positions=16, eos_ids=(2, 3)
    )
    return Transformer(TransformerConfig(**(sizes | options)))


def same(a, b):
    return a.config == b.config and all(
        torch.equal(b.state_dict()[n], w) for n, w in a.state_dict().items()
    )


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps({name: value for name, value in config.items() if value != "remove"})
    )


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
    "a zipped pickle": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.00.pth"),
        FileNotFoundError,
        r"consolidated\.00\.pth is a pickle, which can run code on loading",
    ),
    "damaged weights": (
        lambda f: cut_in_half(f / "model.safetensors"),
        ValueError,
        r"model\.safetensors: cannot be read, damaged or cut short",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)})),
        ValueError,
        r"model\.safetensors: tensor 'model\.norm\.weight' is stored as I8",
    ),
    "damaged config": (lambda f: cut_in_half(f / "config.json"), ValueError, r"config\.json:\d+: not valid JSON"),
    "family": (lambda f: edit_config(f, model_type="mamba"), ValueError, "model_type 'mamba' is not supported"),
    "no family": (lambda f: edit_config(f, model_type="remove"), ValueError, r"model_type '\(no such field\)' is not"),
    "no size": (lambda f: edit_config(f, hidden_size="remove"), ValueError, "field 'hidden_size' is missing"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), ValueError, "activation 'relu' is not supported"),
    "gemma": (lambda f: edit_config(f, model_type="gemma2"), ValueError, "model_type 'gemma2' is not supported, only"),
    "rope scaling": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "longrope", "factor": 8.0}), ValueError, "'longrope'",
    ),
    "old rope scaling": (
        lambda f: edit_config(f, rope_scaling={"type": "su", "factor": 2.0}), ValueError, "rope scaling 'su'",
    ),
    "rope parameters": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), ValueError, "'yarn' needs",
    ),
    "rope of a part": (
        lambda f: edit_config(f, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ValueError,
        "'default' has no option 'partial_rotary_factor'",
    ),
    "rope by layer": (
        lambda f: edit_config(f, rope_parameters={"full_attention": {"rope_theta": 1e4}}), ValueError, "full_attention",
    ),
    "a field beyond the family": (
        lambda f: edit_config(f, attn_logit_softcapping=50.0),
        ValueError,
        r"attn_logit_softcapping=50\.0 is not supported in a llama model",
    ),
    "quantization": (lambda f: edit_config(f, quantization_config={"bits": 4}), ValueError, "quantization_config="),
    "remote code": (lambda f: edit_config(f, auto_map={"AutoModel": "m.M"}), ValueError, "auto_map="),
    "a window in llama": (lambda f: edit_config(f, sliding_window=8), ValueError, "sliding_window=8 is not supported"),
    "a size that is none": (lambda f: edit_config(f, hidden_size="16"), ValueError, r"config\.json: "),
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
    "two copies": (
        lambda f: edit_tensors(f, lambda t: t.update({"norm.weight": torch.ones(16)})),
        ValueError,
        r"tensor 'model\.norm\.weight' is there twice, in model\.safetensors and in model\.safetensors",
    ),
    "a head that is not tied": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.ones(20, 16)})),
        ValueError,
        r"lm_head\.weight is not the embedding, but config\.json ties them",
    ),
    "shape of a part": (
        lambda f: edit_config(f, num_key_value_heads=1),
        ValueError,
        r"self_attn\.k_proj\.weight has shape \(16, 16\), config\.json says \(8, 16\)",
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


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


def repeat_a_tensor(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = safetensors.torch.load_file(shards[0]) | safetensors.torch.load_file(shards[1])
    safetensors.torch.save_file(tensors, shards[1])


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


SHARD_FAULTS = {
    "missing shard": (
        lambda f: first_shard(f).unlink(), FileNotFoundError, r"model-00001-of-00012\.safetensors: no such file"
    ),
    "shard cut short": (lambda f: cut_in_half(first_shard(f)), ValueError, r"model-00001-of-00012\.safetensors: "),
    "tensor in two shards": (
        repeat_a_tensor,
        ValueError,
        r"tensor '.*' is there twice, in model-00001-of-00012\.safetensors and in model-00002-of-00012\.safetensors",
    ),
    "tensor not in its shard": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"model.norm.weight": first_shard(f).name})),
        ValueError,
        r"model-00001-of-00012\.safetensors: no tensor 'model\.norm\.weight', but model\.safetensors\.index\.json",
    ),
    "shard elsewhere": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
        FileNotFoundError,
        r"x\.safetensors: no such file in the folder",
    ),
    "no map": (lambda f: edit_index(f, lambda i: i.pop("weight_map")), ValueError, r"index\.json: no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_shards_that_do_not_fit_together_are_refused_by_name(fault, tmp_path):
    break_it, error, message = SHARD_FAULTS[fault]
    hub.save(tiny(), tmp_path, max_shard_bytes=3000)
    break_it(tmp_path)
    with pytest.raises(error, match=message):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2}),
        dict(rope_theta=7.0, rope_scaling={"rope_type": "linear", "factor": 2}),
        dict(
            rope_theta="remove",
            rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 7.0},
        ),
        dict(
            rope_theta=9.0, rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 7.0}
        ),
        dict(rope_theta=7.0, rope_parameters={"rope_type": "linear", "factor": 2}),
        dict(
            rope_theta=7.0,
            rope_scaling={"type": "linear", "factor": 2},
            rope_parameters={"rope_type": "default"},
        ),
    ],
)
def test_rope_is_read_as_every_version_of_transformers_writes_it(changes, tmp_path, transformers):
    tiny().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    config = hub.read_config(tmp_path)
    assert (config.rope_theta, config.rope_scaling) == (7.0, {"rope_type": "linear", "factor": 2})
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {
        name: value for name, value in theirs.items() if name != "type"
    } == config.rope_scaling | {"rope_theta": 7.0}


@pytest.mark.parametrize(
    "fields, window",
    [
        (dict(use_sliding_window=False, sliding_window=8, max_window_layers=0), None),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=0), 8),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=2), None),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), "some layers only"),
        (dict(use_sliding_window=True, sliding_window=None, max_window_layers=1), None),
        (dict(use_sliding_window=True, sliding_window=8, layer_types=["sliding_attention"] * 2), 8),
        (
            dict(
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["full_attention"] * 2,
                max_window_layers=0,
            ),
            None,
        ),
        (
            dict(
                use_sliding_window=True,
                sliding_window=8,
                layer_types=["full_attention", "sliding_attention"],
            ),
            "some",
        ),
        (dict(use_sliding_window="remove", sliding_window=8, max_window_layers="remove"), None),
    ],
)
@pytest.mark.parametrize(
    "traits", [dict(qkv_bias=True), dict(qk_norm=True)], ids=["qwen2", "qwen3"]
)
def test_a_window_is_read_where_all_layers_have_it(traits, fields, window, tmp_path):
    tiny(**traits).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    if isinstance(window, str):
        with pytest.raises(ValueError, match=window):
            hub.read_config(tmp_path)
    else:
        assert hub.read_config(tmp_path).sliding_window == window


def test_every_id_that_ends_a_response_is_read(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7], "bos_token_id": 1}')
    assert hub.read_config(tmp_path).eos_ids == (2, 3, 7)
    edit_config(tmp_path, eos_token_id=None)
    assert hub.read_config(tmp_path).eos_ids == (3, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert hub.read_config(tmp_path).eos_ids == (9,)


def test_dropout_that_a_family_has_not_comes_back_and_they_read_the_rest(tmp_path, transformers):
    config = tiny(dropout=0.3, attention_dropout=0.2).config
    tiny(dropout=0.3, attention_dropout=0.2).save_pretrained(tmp_path)
    assert hub.read_config(tmp_path) == config
    assert transformers.AutoConfig.from_pretrained(tmp_path).attention_dropout == 0.2


def test_dropouts_that_one_number_cannot_say_are_refused(tmp_path):
    tiny(**GPT2).save_pretrained(tmp_path)
    edit_config(tmp_path, resid_pdrop=0.1, embd_pdrop=0.2)
    with pytest.raises(
        ValueError, match=r"embd_pdrop=0\.2 contradicts another field, which sets dropout to 0\.1"
    ):
        hub.read_config(tmp_path)


@pytest.mark.parametrize(
    "switch, value", [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True)]
)
def test_a_gpt2_variant_that_computes_otherwise_is_refused(switch, value, tmp_path):
    tiny(**GPT2).save_pretrained(tmp_path)
    edit_config(tmp_path, **{switch: value})
    with pytest.raises(ValueError, match=f"{switch}={value} is not supported in a gpt2 model"):
        Transformer.from_pretrained(tmp_path)


def test_normalised_scores_are_stored_and_transformers_reads_them_but_for_their_mean(
    tmp_path, transformers
):
    torch.manual_seed(0)
    model = RewardModel.from_model(tiny(pad_id=0))
    plain = model(torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.bool))
    model.normalize(0.5, 0.25)
    model.save_pretrained(tmp_path)
    ids, mask = torch.tensor([[7, 8, 9], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(model(ids, mask)[:1], (plain - 0.5) / 0.25)
    assert same(RewardModel.from_pretrained(tmp_path), model)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits[
        :, 0
    ]
    torch.testing.assert_close(theirs - 0.5 / 0.25, model(ids, mask))


def test_a_folder_says_that_its_scores_are_of_steps_and_transformers_reads_it(
    tmp_path, transformers
):
    model = RewardModel.from_model(tiny(pad_id=0))
    for of_steps in (True, False):
        model.of_steps = of_steps
        model.save_pretrained(tmp_path)
        assert RewardModel.from_pretrained(tmp_path).of_steps is of_steps
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        ids = torch.tensor([[7, 8, 9]])
        torch.testing.assert_close(
            theirs(ids).logits[:, 0], model(ids, torch.ones(1, 3, dtype=torch.bool))
        )


def test_a_language_model_is_no_reward_model_and_the_other_way_round(tmp_path):
    tiny().save_pretrained(tmp_path / "policy")
    RewardModel.from_model(tiny()).save_pretrained(tmp_path / "reward")
    with pytest.raises(
        ValueError,
        match=r"no tensor 'score\.weight' \(a causal language model, not a reward model\)",
    ):
        RewardModel.from_pretrained(tmp_path / "policy")
    with pytest.raises(
        ValueError, match=f"{tmp_path / 'reward'}: a reward model, not a language model"
    ):
        Transformer.from_pretrained(tmp_path / "reward")
    RewardModel.from_model(tiny(tie_embeddings=False)).save_pretrained(tmp_path / "reward")
    edit_tensors(
        tmp_path / "reward", lambda tensors: tensors.update({"lm_head.weight": torch.ones(20, 16)})
    )
    with pytest.raises(ValueError, match=r"RewardModel does not know, e\.g\. 'lm_head\.weight'"):
        RewardModel.from_pretrained(tmp_path / "reward")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(activation="gelu", mlp_bias=True, positions="learned"),
            r"gpt2 \(norm, gated_mlp, .*llama \(positions\)",
        ),
        (GPT2 | dict(num_kv_heads=1), r"gpt2 \(num_kv_heads\)"),
        (dict(qkv_bias=True, mlp_bias=True), r"qwen2 \(mlp_bias\)"),
        (
            dict(sliding_window=4, family="llama"),
            r"fields that do not fit: llama \(sliding_window\)$",
        ),
        (dict(family="gemma"), "family 'gemma' is not supported"),
    ],
    ids=[
        "mixed",
        "gpt2 with grouped heads",
        "qwen2 with more biases",
        "llama with a window",
        "unknown",
    ],
)
def test_a_model_of_no_family_is_not_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
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


def test_saving_over_another_layout_leaves_no_stale_weights(tmp_path):
    """Readers disagree on which wins, the single file or the index, so only one may be there."""
    hub.save(tiny(1), tmp_path)
    hub.save(tiny(2), tmp_path, max_shard_bytes=3000)
    assert not (tmp_path / "model.safetensors").exists()
    assert same(tiny(2), Transformer.from_pretrained(tmp_path))
    hub.save(tiny(3), tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert same(tiny(3), Transformer.from_pretrained(tmp_path))


@pytest.mark.parametrize("files", [0, 1, 5])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_failed_save_keeps_the_old_model_and_no_half_of_the_new(
    there_before, files, tmp_path, monkeypatch
):
    """Whichever file the disk is full at; the shards of both have the same names."""
    if there_before:
        hub.save(tiny(1), tmp_path, max_shard_bytes=3000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    written = []

    def full_disk(descriptor):
        written.append(descriptor)
        if len(written) > files:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        hub.save(tiny(2), tmp_path, max_shard_bytes=3000)
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
    model, prefix = tiny(**family), "transformer." if family else "model."  # tied
    model.save_pretrained(tmp_path)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        tensors["lm_head.weight"] = model.head_weight.detach().clone()
        tensors["h.0.attn.bias" if family else "layers.0.self_attn.rotary_emb.inv_freq"] = (
            torch.ones(4)
        )

    edit_tensors(tmp_path, rename)
    assert same(model, Transformer.from_pretrained(tmp_path))


def test_dtype_is_that_asked_for(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.ones(1, 4, dtype=torch.long)).dtype == torch.bfloat16


# ---- names on the hub


@pytest.fixture
def hub_package(monkeypatch):
    """A huggingface_hub whose snapshot_download is set by the test."""
    package = types.ModuleType("huggingface_hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    return package


def test_a_name_on_the_hub_is_fetched_where_no_folder_has_it(tmp_path, hub_package, monkeypatch):
    asked = []
    hub_package.snapshot_download = lambda name, allow_patterns: (
        asked.append((name, allow_patterns)) or str(tmp_path)
    )
    tiny().save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    assert same(tiny(), Transformer.from_pretrained("org/name-1.5B"))
    assert same(
        tiny(), Transformer.from_pretrained(Path("org/name-1.5B"))
    )  # as the command line gives it
    assert isinstance(load_tokenizer("org/name-1.5B"), ByteTokenizer)
    assert [name for name, _ in asked] == ["org/name-1.5B"] * 3
    patterns = asked[0][1]
    files = [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
        "model-00001-of-2.safetensors",
    ]
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in files)
    others = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "modeling.py",
        "tf_model.h5",
        "original/params.pth",
    ]
    assert not any(fnmatch(file, pattern) for pattern in patterns for file in others)
    monkeypatch.chdir(tmp_path)
    tiny(1).save_pretrained("org/name-1.5B")
    assert same(tiny(1), Transformer.from_pretrained("org/name-1.5B")) and len(asked) == 3


@pytest.mark.parametrize(
    "path", ["missing", "/missing/folder", "./runs/sft", "../runs/sft", "a/b/c", "runs/"]
)
def test_a_path_that_is_no_name_on_the_hub_is_a_missing_folder(
    path, tmp_path, hub_package, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=f"{path}: no such folder, and not a .* hub repository such as owner/name",
    ):
        Transformer.from_pretrained(path)


def test_a_name_that_cannot_be_fetched_says_so_in_one_line(hub_package):
    def offline(name, allow_patterns):
        raise OSError("Name or service not known\nPlease check your connection")

    hub_package.snapshot_download = offline
    with pytest.raises(FileNotFoundError) as raised:
        Transformer.from_pretrained("org/name")
    start = "org/name: no such folder, and not fetched from the Hugging Face hub (offline?): Name or service not known"
    assert str(raised.value) == start


def test_a_name_without_the_package_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"org/name: no such folder; .*pip install 'rlhf-core\[hub\]'"
    ):
        Transformer.from_pretrained("org/name")


def test_the_package_itself_reports_a_name_that_it_cannot_fetch(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    command = [
        sys.executable,
        "-c",
        "from rlhf_core.data import load_tokenizer; load_tokenizer('org/no-such-name')",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "FileNotFoundError: org/no-such-name: no such folder, and not fetched" in done.stderr


# ---- a real model


@pytest.fixture(scope="module")
def stories(data_dir):
    folder = data_dir / "models" / "stories260k"
    return Transformer.from_pretrained(folder), load_tokenizer(folder)


def test_a_real_model_goes_on_as_its_authors_say(stories):
    model, tokenizer = stories
    prompt = tokenizer.encode_prompt("Once upon a time")
    response = generate(
        model, torch.tensor([prompt]), max_new_tokens=80, temperature=0, eos_ids=(1, 2)
    )
    text = tokenizer.decode(prompt + response.response_ids[0].tolist())
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she "
        "saw a big, red ball. She wanted to play with it, but it was too high."
    )


@torch.no_grad()
def test_a_real_model_predicts_real_text(stories, data_dir):
    model, tokenizer = stories
    texts = read_texts(data_dir / "text" / "tinystories.jsonl.gz")[:50]
    rows = [
        Example(tokenizer.encode_prompt(""), tokenizer.encode(text.completion)[:511])
        for text in texts
    ]
    total = count = 0
    for start in range(0, 50, 25):
        batch = collate(rows[start : start + 25], tokenizer.pad_id)
        logits = model(batch.input_ids).flatten(0, 1)[batch.read]
        total -= token_logprobs(logits, batch.targets).sum()
        count += len(batch.targets)
    assert 1.2 < total / count < 1.5
