"""Checkpoints: errors name the fault, a failed save harms nothing, a real model is read whole."""

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
from helpers import GPT2, edit_json
from helpers import tiny as any_tiny

from rlhf_core import token_logprobs
from rlhf_core.data import ByteTokenizer, Example, collate, load_tokenizer, read_texts
from rlhf_core.generation import generate
from rlhf_core.models import RewardModel, Transformer, ValueModel, hub


def tiny(seed=0, **options):
    return any_tiny(seed=seed, noise=0, vocab_size=20, max_positions=16, **options)


def edit_config(folder, **changes):
    edit_json(folder / "config.json", **changes)


def same(a, b):
    return a.config == b.config and all(
        torch.equal(b.state_dict()[n], w) for n, w in a.state_dict().items()
    )


def edit_tensors(folder, change):
    """Rewrite model.safetensors after change(dict of tensors)."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def add_tensor(folder, name, tensor):
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config\.json"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"no model\.safetensors",
    ),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), FileNotFoundError,
        r"pytorch_model\.bin is a pickle",
    ),
    "a zipped pickle": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.00.pth"), FileNotFoundError,
        r"consolidated\.00\.pth is a pickle, which can run code on loading",
    ),
    "damaged weights": (
        lambda f: cut_in_half(f / "model.safetensors"), ValueError,
        r"model\.safetensors: cannot be read, damaged or cut short",
    ),
    "integers": (
        lambda f: add_tensor(f, "model.norm.weight", torch.ones(16, dtype=torch.int8)),
        ValueError,
        r"model\.safetensors: tensor 'model\.norm\.weight' is stored as I8",
    ),
    "damaged config": (
        lambda f: cut_in_half(f / "config.json"), ValueError, r"config\.json:\d+: not valid JSON",
    ),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), ValueError,
        r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'",
    ),
    "unknown tensor": (
        lambda f: add_tensor(f, "model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
        ValueError,
        r"Transformer does not know, e\.g\. 'model\.layers\.0\.self_attn\.q_norm\.weight'",
    ),
    "shape": (
        lambda f: edit_config(f, vocab_size=21), ValueError,
        r"model\.embed_tokens\.weight has shape \(20, 16\), config\.json says \(21, 16\)",
    ),
    "two copies": (
        lambda f: add_tensor(f, "norm.weight", torch.ones(16)),
        ValueError,
        r"'model\.norm\.weight' is there twice, in model\.safetensors and in model\.safetensors",
    ),
    "a head that is not tied": (
        lambda f: add_tensor(f, "lm_head.weight", torch.ones(20, 16)),
        ValueError, r"lm_head\.weight is not the embedding, but config\.json ties them",
    ),
    "shape of a part": (
        lambda f: edit_config(f, num_key_value_heads=1), ValueError,
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


def name_shard(folder, shard):
    """Let the index name another file for one tensor."""
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": shard}))


SHARD_FAULTS = {
    "missing shard": (
        lambda f: first_shard(f).unlink(), FileNotFoundError,
        r"model-00001-of-00012\.safetensors: no such file",
    ),
    "shard cut short": (
        lambda f: cut_in_half(first_shard(f)), ValueError, r"model-00001-of-00012\.safetensors: ",
    ),
    "tensor in two shards": (
        repeat_a_tensor,
        ValueError,
        r"is there twice, in model-00001-of-00012\.safetensors and in model-00002-of-00012\.",
    ),
    "tensor not in its shard": (
        lambda f: name_shard(f, first_shard(f).name),
        ValueError,
        r"of-00012\.safetensors: no tensor 'model\.norm\.weight', but model\.safetensors\.index",
    ),
    "shard elsewhere": (
        lambda f: name_shard(f, "../x.safetensors"),
        FileNotFoundError,
        r"x\.safetensors: no such file in the folder",
    ),
    "no map": (
        lambda f: edit_index(f, lambda i: i.pop("weight_map")), ValueError,
        r"index\.json: no weight_map",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_shards_that_do_not_fit_together_are_refused_by_name(fault, tmp_path):
    break_it, error, message = SHARD_FAULTS[fault]
    hub.save(tiny(), tmp_path, max_shard_bytes=3000)
    break_it(tmp_path)
    with pytest.raises(error, match=message):
        Transformer.from_pretrained(tmp_path)


def test_normalised_scores_are_stored_and_transformers_reads_all_but_their_mean(
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


def test_of_steps_is_stored_and_transformers_reads_the_folder(tmp_path, transformers):
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


def test_criteria_are_labels_of_a_classifier_in_transformers(tmp_path, transformers):
    model = RewardModel.from_model(tiny(pad_id=0))
    model.set_criteria({"helpful": 1.0, "harmless": -2.0})
    model.score.weight.data += torch.randn(2, model.config.hidden_size)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 2
    assert theirs.config.id2label == {0: "helpful", 1: "harmless"}
    assert theirs.config.label2id == {"helpful": 0, "harmless": 1}
    ids, mask = torch.tensor([[7, 8, 9], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool)
    logits = theirs(ids).logits
    torch.testing.assert_close(logits @ torch.tensor([1.0, -2.0]), model(ids, mask))
    theirs.save_pretrained(tmp_path / "theirs")
    again = RewardModel.from_pretrained(tmp_path / "theirs")
    for back in (
        RewardModel.from_pretrained(tmp_path),
        again,
        RewardModel.from_transformers(theirs),
    ):
        assert same(back, model) and dict(back.criteria) == {"helpful": 1.0, "harmless": -2.0}
    model.normalize(torch.tensor([0.5, -1.0]), 2.0)
    model.save_pretrained(tmp_path)
    assert same(RewardModel.from_pretrained(tmp_path), model)
    shifted = (logits - torch.tensor([0.5, -1.0])) / 2
    torch.testing.assert_close(shifted @ torch.tensor([1.0, -2.0]), model(ids, mask))


def test_a_model_adopted_from_transformers_scores_steps_if_its_config_says_so(
    tmp_path, transformers
):
    model = RewardModel.from_model(tiny(pad_id=0))
    model.of_steps = True
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert RewardModel.from_transformers(theirs).of_steps


def test_a_critic_is_made_of_criteria_but_not_read_from_their_files(tmp_path):
    model = RewardModel.from_model(tiny(pad_id=0))
    model.set_criteria({"helpful": 1.0, "harmless": -2.0})
    model.score.weight.data += torch.randn(2, model.config.hidden_size)
    model.normalize(torch.tensor([0.5, -1.0]), 2.0)
    ids, mask = torch.tensor([[7, 8, 9], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.bool)
    critic = ValueModel.from_model(model)
    torch.testing.assert_close(critic(ids, mask)[:, -1], model(ids, mask))
    assert (
        critic.score.weight.shape == (1, model.config.hidden_size) and critic.score.bias.ndim == 1
    )
    copy = RewardModel.from_model(model)
    assert copy.criteria == model.criteria
    torch.testing.assert_close(copy(ids, mask), model(ids, mask), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: a reward model of several criteria: load"):
        ValueModel.from_pretrained(tmp_path)


def test_a_language_model_is_not_a_reward_model_nor_the_reverse(tmp_path):
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
    hub.save(tiny(seed=1), tmp_path)
    hub.save(tiny(seed=2), tmp_path, max_shard_bytes=3000)
    assert not (tmp_path / "model.safetensors").exists()
    assert same(tiny(seed=2), Transformer.from_pretrained(tmp_path))
    hub.save(tiny(seed=3), tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert same(tiny(seed=3), Transformer.from_pretrained(tmp_path))


@pytest.mark.parametrize("files", [0, 1, 5])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_failed_save_keeps_the_old_model_and_no_half_of_the_new(
    there_before, files, tmp_path, monkeypatch
):
    """Whichever file the disk is full at; the shards of both have the same names."""
    if there_before:
        hub.save(tiny(seed=1), tmp_path, max_shard_bytes=3000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    written = []

    def full_disk(descriptor):
        written.append(descriptor)
        if len(written) > files:
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        hub.save(tiny(seed=2), tmp_path, max_shard_bytes=3000)
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
    """Base models have names without prefix; old checkpoints add buffers and a copy of the head."""
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


def test_weights_are_loaded_in_the_requested_dtype(tmp_path):
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


def test_a_name_on_the_hub_is_fetched_unless_a_folder_has_it(tmp_path, hub_package, monkeypatch):
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
    tiny(seed=1).save_pretrained("org/name-1.5B")
    assert same(tiny(seed=1), Transformer.from_pretrained("org/name-1.5B")) and len(asked) == 3


@pytest.mark.parametrize(
    "path", ["missing", "/missing/folder", "./runs/sft", "../runs/sft", "a/b/c", "runs/"]
)
def test_a_path_that_cannot_be_a_hub_name_is_a_missing_folder(
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
    start = "org/name: no such folder, and not fetched from the Hugging Face hub (offline?): "
    assert str(raised.value) == start + "Name or service not known"


def test_a_name_without_the_package_says_which_extra_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"org/name: no such folder; .*pip install 'rlhf-core\[hub\]'"
    ):
        Transformer.from_pretrained("org/name")


@pytest.mark.slow
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


def test_a_real_model_continues_as_its_authors_say(stories):
    model, tokenizer = stories
    prompt = tokenizer.encode_prompt("Once upon a time")
    response = generate(
        model, torch.tensor([prompt]), max_new_tokens=80, temperature=0, eos_ids=(1, 2)
    )
    text = tokenizer.decode(prompt + response.response_ids[0].tolist())
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )


@pytest.mark.slow
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
