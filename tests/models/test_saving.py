"""A save replaces its own files and those that readers would take for them, and no others."""

import json
import os
import stat

import pytest
import safetensors.torch
import torch
from helpers import edit_json, make_ppo, make_trainer, snapshot, tiny

from rlhf_core.data import ByteTokenizer
from rlhf_core.data.tokenizer import JsonTokenizer, load_tokenizer
from rlhf_core.files import write_json
from rlhf_core.models import ILQLModel, RewardModel, Transformer, hub
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors

OTHERS = (
    "model-epoch1.safetensors",
    "models-2024.safetensors",
    "model_of_another_project.safetensors",
    "model-00001-of-00009.safetensors",
    "model.fp16.safetensors",
    "modelling.md",
    "adapter_model.bin",
    "adapter_notes.md",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "generation_config.json",
    "vocab.json",
    "checkpoint-100/model.safetensors",
    "round-trip/checkpoint",
    "critic/model-epoch1.safetensors",
    ".hidden.tmp",
    ".model.safetensors.1234.tmp",
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def full(tmp_path):
    """A folder with files of other people, and a check that all but some are there untouched."""
    out = tmp_path / "out"
    texts = {name: f"of somebody else: {name}" for name in OTHERS}
    texts["generation_config.json"] = json.dumps({"eos_token_id": 2, "temperature": 0.7})
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)

    def check(*replaced):
        for name, text in texts.items():
            assert name in replaced or (out / name).read_text() == text, name

    return out, check


def adapted(folder, model=None):
    """A model with trained adapters, whose base is in the folder."""
    model = tiny() if model is None else model
    (tiny() if model is None else model).save_pretrained(folder)
    add_adapters(model, LoRAConfig(rank=2, base=str(folder)))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model


def valued(lm):
    model = ILQLModel(lm, beta=0.7)
    torch.nn.init.normal_(model.target_q[0].out.weight)
    return model


MODELS = {
    "plain": lambda folder: tiny(seed=1),
    "reward": lambda folder: tiny(RewardModel, seed=1),
    "adapters": adapted,
    "reward adapters": lambda folder: adapted(folder, tiny(RewardModel)),
    "values": lambda folder: valued(tiny(seed=1)),
    "values on adapters": lambda folder: valued(adapted(folder)),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def same(a, b):
    a, b = snapshot(a), snapshot(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@models
def test_a_save_leaves_files_of_other_people(make, tmp_path, full):
    out, check = full
    model = make(tmp_path / "base")
    for _ in range(2):
        model.save_pretrained(out)
        ByteTokenizer().save(out)
        check(*([WEIGHTS] if (out / CONFIG).is_file() else []))
        assert same(type(model).from_pretrained(out), model)


@models
@pytest.mark.parametrize("then", MODELS.values(), ids=MODELS)
def test_a_model_saved_over_any_other_reads_back(make, then, tmp_path):
    make(tmp_path / "base").save_pretrained(tmp_path / "out")
    model = then(tmp_path / "base")
    model.save_pretrained(tmp_path / "out")
    assert same(type(model).from_pretrained(tmp_path / "out"), model)
    assert (tmp_path / "out" / hub.HEADS_FILE).exists() == isinstance(model, ILQLModel)
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


def test_shards_that_the_replaced_index_names_go_and_others_stay(tmp_path, full):
    out, check = full
    hub.save(tiny(), out, max_shard_bytes=3000)
    index = out / hub.INDEX_FILE
    value = json.loads(index.read_text())
    shards = set(value["weight_map"].values())
    assert len(shards) > 2
    (out / "model-00001-of-00077.safetensors").write_text("of another index")
    hostile = ("../secret", "train.jsonl", "model-epoch1.safetensors", "model-1-of-2.safetensors")
    value["weight_map"] |= dict.fromkeys(hostile, 5) | {name: name for name in hostile}
    index.write_text(json.dumps(value))
    (tmp_path / "secret").write_text("outside")
    hub.save(tiny(seed=1), out)
    assert not any((out / name).exists() for name in (*shards, index.name))
    assert (out / "model-00001-of-00077.safetensors").read_text() == "of another index"
    assert (tmp_path / "secret").read_text() == "outside"
    check()
    assert same(Transformer.from_pretrained(out), tiny(seed=1))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 5}', '{"weight_map": {"a": [1]}}'])
def test_an_index_that_cannot_be_read_is_replaced_too(index, tmp_path, full):
    out, check = full
    (out / "model.safetensors.index.json").write_text(index)
    tiny().save_pretrained(out)
    check()
    assert same(Transformer.from_pretrained(out), tiny())


def test_a_model_replaces_adapters_of_peft_by_their_two_names(tmp_path, full):
    out, check = full
    adapted(tmp_path / "base").save_pretrained(out)
    tiny(seed=1).save_pretrained(out)
    check(WEIGHTS)
    assert not (out / CONFIG).exists() and not (out / WEIGHTS).exists()
    assert same(Transformer.from_pretrained(out), tiny(seed=1))


@pytest.mark.parametrize("config", ['{"config": "pfeiffer"}', "[1]", "no JSON"])
@models
def test_an_adapter_config_that_is_not_pefts_is_refused_and_nothing_changes(
    make, config, tmp_path, full
):
    out, check = full
    (out / CONFIG).write_text(config)
    model, before = make(tmp_path / "base"), sorted(out.rglob("*"))
    with pytest.raises(FileExistsError, match=r"adapter_config\.json: readers .* is not PEFT's"):
        model.save_pretrained(out)
    check()
    assert sorted(out.rglob("*")) == before and (out / CONFIG).read_text() == config


def test_a_run_that_could_not_save_at_its_end_does_not_start(tmp_path, full):
    out, check = full
    trainer = make_trainer("sft", others=dict(out=out))
    (out / CONFIG).write_text("{}")
    with pytest.raises(FileExistsError, match="is not PEFT's"):
        trainer.train()
    check()
    assert trainer.steps_done == 0 and (out / CONFIG).read_text() == "{}"


def test_end_tokens_of_an_earlier_model_are_not_read_for_this_one(tmp_path):
    """A generation_config.json adds EOS ids; one that adds none is left alone."""
    file = tmp_path / "generation_config.json"
    write_json(file, {"eos_token_id": [2, -1], "top_p": 0.9})
    tiny(eos_ids=(2, 3)).save_pretrained(tmp_path)
    assert file.exists()
    write_json(file, {"eos_token_id": [2, 5]})
    tiny(eos_ids=(2, 3)).save_pretrained(tmp_path)
    assert Transformer.from_pretrained(tmp_path).config.eos_ids == (2, 3) and not file.exists()


# ---- tokenizers


@pytest.fixture
def json_folder(data_dir, tmp_path):
    """A folder with a tokenizer.json and a chat template."""
    source = JsonTokenizer(data_dir / "models" / "stories260k")
    source.save(tmp_path / "json")
    (tmp_path / "json" / "chat_template.jinja").write_text("of the first")
    edit_json(tmp_path / "json" / "tokenizer_config.json", chat_template="of the first")
    return tmp_path / "json"


def test_a_byte_tokenizer_saved_over_a_tokenizer_json_is_read_back(json_folder, full):
    out, check = full
    load_tokenizer(json_folder).save(out)
    ByteTokenizer().save(out)
    assert isinstance(load_tokenizer(out), ByteTokenizer)
    check("generation_config.json")
    load_tokenizer(json_folder).save(out)
    assert isinstance(load_tokenizer(out), JsonTokenizer)


def test_files_that_a_tokenizer_lacks_are_not_read_from_an_earlier_one(json_folder, tmp_path):
    out = tmp_path / "out"
    load_tokenizer(json_folder).save(out)
    assert (out / "chat_template.jinja").is_file()
    (json_folder / "chat_template.jinja").unlink()
    (out / "notes.md").write_text("of somebody else")
    load_tokenizer(json_folder).save(out)
    assert not (out / "chat_template.jinja").exists() and (out / "notes.md").exists()


def test_a_tokenizer_whose_folder_is_gone_removes_nothing(json_folder, tmp_path):
    out, tokenizer = tmp_path / "out", load_tokenizer(json_folder)
    tokenizer.save(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    json_folder.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"json/tokenizer\.json"):
        tokenizer.save(out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


# ---- what is written


def test_tensors_are_written_as_the_package_writes_them(tmp_path):
    bits = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    floats = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    dtypes = enumerate((*floats, *bits))
    tensors = {f"{i % 3} {dtype}": torch.ones(i, 3, dtype=dtype) for i, dtype in dtypes}
    tensors |= {
        'quoted "\t名前': torch.randn(4, 6).t(),
        "scalar": torch.tensor(3.5),
        "a": torch.ones(1),
    }
    write_tensors(tmp_path / "ours", tensors)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match=r"tensor 'z' has dtype .*complex64, which is not stored"):
        write_tensors(tmp_path / "ours", {"z": torch.ones(1, dtype=torch.complex64)})
    assert read_tensors(tmp_path / "ours")[1].keys() == tensors.keys()


@models
def test_every_file_of_a_model_has_the_mode_of_the_umask_and_keeps_one_that_was_set(make, tmp_path):
    model, before = make(tmp_path / "base"), os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "out")
        files = list((tmp_path / "out").iterdir())
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
        for file in files:
            file.chmod(0o604)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        model.save_pretrained(tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o604}


@models
def test_a_save_that_fails_anywhere_leaves_the_old_model(make, tmp_path, monkeypatch):
    out, old = tmp_path / "out", valued(tiny())
    old.save_pretrained(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    model, replace, fsync = make(tmp_path / "base"), os.replace, os.fsync
    for number in range(1, 30):
        calls = []

        def counted(call, calls=calls, number=number):
            def counting(*arguments):
                calls.append(call)
                if len(calls) == number:
                    raise OSError(28, "No space left on device")
                return call(*arguments)

            return counting

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(replace))
            patch.setattr(os, "fsync", counted(fsync))
            try:
                model.save_pretrained(out)
            except OSError as error:
                assert "No space left" in str(error) and str(out) in str(error)
            else:
                break
        assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert 4 < number < 29 and same(type(model).from_pretrained(out), model)


# ---- links in the folder of a run


FILES = ["metrics.jsonl", "run.json", "model.safetensors", "config.json"]
FILES += ["tokenizer_config.json", "checkpoint"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_run_replaces_links_and_leaves_their_targets(name, link, tmp_path):
    out, target = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    target.write_text("of somebody else\n")
    link(target, out / name)
    others = dict(out=out, tokenizer=ByteTokenizer())
    history = make_trainer("sft", batch_size=4, save_every=1, others=others).train()
    assert target.read_text() == "of somebody else\n" and not (out / name).is_symlink()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_run_that_resumes_from_linked_metrics_leaves_their_target(link, tmp_path):
    """Copies of a folder by links (cp -al) are not cut when the run resumes."""
    make_trainer("sft", batch_size=4, save_every=1, others=dict(out=tmp_path / "out")).train()
    file, copy = tmp_path / "out" / "metrics.jsonl", tmp_path / "copy.jsonl"
    text = file.read_text()
    file.rename(copy)
    copy.write_text(text + '{"step": 3}\n')
    link(copy, file)
    trainer = make_trainer("sft", batch_size=4, save_every=1, others=dict(out=tmp_path / "out"))
    trainer.resume()
    trainer.train()
    assert copy.read_text() == text + '{"step": 3}\n' and file.read_text() == text


def test_a_critic_folder_that_is_a_link_is_refused_before_training(tmp_path):
    (tmp_path / "out").mkdir()
    tiny().save_pretrained(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "critic").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError, match="critic is a link to"):
        make_ppo(others=dict(out=tmp_path / "out"))
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == before


# ---- the dtype in the files


def test_16_bit_files_hold_the_rounded_weights_and_untouched_ones_survive_exactly(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny()
    for dtype in (torch.bfloat16, torch.float16):
        model.save_pretrained(tmp_path / "a", dtype)
        again = Transformer.from_pretrained(tmp_path / "a")
        for name, weight in again.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name].to(dtype).float())
        again.save_pretrained(tmp_path / "b", dtype)
        bytes_of = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
        assert bytes_of[0] == bytes_of[1]
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
        assert {x.dtype for x in peer.parameters()} == {dtype}
        assert hub.stored_dtype(tmp_path / "b") == dtype


def test_shards_are_measured_in_the_dtype_that_is_written(tmp_path):
    model = tiny()
    hub.save(model, tmp_path, max_shard_bytes=4000, dtype=torch.bfloat16)
    index = json.loads((tmp_path / hub.INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 2 * sum(x.numel() for x in model.parameters())
    for file in set(index["weight_map"].values()):
        tensors = safetensors.torch.load_file(tmp_path / file).values()
        assert sum(x.nbytes for x in tensors) <= 4000 or len(tensors) == 1
        assert {x.dtype for x in tensors} == {torch.bfloat16}


def test_adapters_and_a_language_model_with_values_are_saved_in_16_bits(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    add_adapters(model, LoRAConfig(rank=2, base=str(tmp_path / "base")))
    model.save_pretrained(tmp_path / "adapters", torch.bfloat16)
    tensors = safetensors.torch.load_file(tmp_path / "adapters" / WEIGHTS).values()
    assert {x.dtype for x in tensors} == {torch.bfloat16}
    Transformer.from_pretrained(tmp_path / "adapters")
    ILQLModel(tiny()).save_pretrained(tmp_path / "ilql", torch.bfloat16)
    assert hub.stored_dtype(tmp_path / "ilql") == torch.bfloat16
    assert ILQLModel.from_pretrained(tmp_path / "ilql").v[0].weight.dtype == torch.float32
    heads = safetensors.torch.load_file(tmp_path / "ilql" / hub.HEADS_FILE).values()
    assert {x.dtype for x in heads} == {torch.float32}


def test_a_weight_beyond_the_range_of_the_dtype_is_refused_and_the_folder_stays(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.trunk.embed.weight[0, 0] = -70000.0
    with pytest.raises(ValueError, match=r"a number of size 7e\+04, which torch\.float16 cannot"):
        model.save_pretrained(tmp_path, torch.float16)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path, torch.bfloat16)
