"""Model files that somebody damaged or made to do harm: each is refused by name, soon."""

import contextlib
import copy
import itertools
import json
import math
import random
import shutil
import time

import pytest
from helpers import GPT2, edit_json, tiny

from rlhf_core import cli
from rlhf_core.data import ByteTokenizer
from rlhf_core.models import ILQLModel, RewardModel, Transformer, hub, lora, safetensors
from rlhf_core.models.ilql import HEADS_FILE
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import read_tensors, stored_tensors, write_tensors

DEEP = "[" * 100_000 + "]" * 100_000
# As they stand in a file: json.dumps writes neither a number beyond float nor one this deep.
NASTY = [
    "null", "true", "false", "-1", "0", "1.5", str(2**63), "1" + "0" * 400, "1e999", "NaN",
    '""', '"a"', "[]", "{}", "[[]]", '[{"a": 1}]', '{"a": {}}', "[null]", '"\\u0000"', '"../../x"',
    json.dumps("x" * 100_000), DEEP,
]  # fmt: skip
FAMILY_OPTIONS = {
    "gpt2": GPT2,
    "llama": dict(family="llama"),
    "mistral": dict(family="mistral", sliding_window=4, num_kv_heads=1),
    "qwen2": dict(family="qwen2", qkv_bias=True),
    "qwen3": dict(family="qwen3", qk_norm=True),
}
# Fields that a file may have beside those that we write.
MORE_FIELDS = {
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32, "truncate": True},
    "layer_types": ["full_attention"] * 2,
    "is_causal": True,
}
MORE_ADAPTER_FIELDS = {
    "exclude_modules": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "init_lora_weights": True,
    "use_dora": False,
    "target_modules": ["q_proj", "v_proj"],
    "modules_to_save": ["score"],
}


def leaves(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*path, key))


def mutations(value):
    """JSON texts, each of `value` with one value replaced, and with each field left out."""
    for path, nasty in itertools.product(leaves(value), NASTY):
        if not path:
            yield nasty
            continue
        mutant = copy.deepcopy(value)
        *parents, last = path
        owner = mutant
        for key in parents:
            owner = owner[key]
        owner[last] = "@@"
        yield json.dumps(mutant).replace('"@@"', nasty)


def refused_or_read(read, name, what):
    """Call `read`, which must succeed or raise an error that names the file, and not hang."""
    start = time.thread_time()
    try:
        read()
    except (ValueError, OSError, ImportError) as error:
        assert name in str(error), (error, what[:300])
        assert len(str(error)) < 2000, (str(error)[:300], what[:300])
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {what[:300]}") from error
    took = time.thread_time() - start
    assert took < 20, (took, what[:300])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of model."""
    root = tmp_path_factory.mktemp("models")
    for family, options in FAMILY_OPTIONS.items():
        tiny(**options).save_pretrained(root / family)
    tiny(RewardModel).save_pretrained(root / "reward")
    ILQLModel(tiny()).save_pretrained(root / "ilql")
    hub.save(tiny(), root / "shards", max_shard_bytes=4000)
    model = tiny()
    add_adapters(model, LoRAConfig(rank=2, base=str(root / "llama")))
    model.save_pretrained(root / "adapters")
    return root


def some(texts, count):
    texts = list(texts)
    return random.Random(0).sample(texts, min(count, len(texts)))


@contextlib.contextmanager
def kept(file):
    """Afterwards the file is as it was."""
    content = file.read_bytes() if file.exists() else None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)


def write_header(file, header, size=0):
    """A safetensors file with this header and `size` zero bytes of data."""
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# ---- any value in any field


@pytest.mark.parametrize("family", FAMILY_OPTIONS)
def test_no_value_in_a_config_gives_a_traceback(family, folders):
    file = folders / family / "config.json"
    config = json.loads(file.read_text()) | (MORE_FIELDS if family != "gpt2" else {})
    Transformer.from_pretrained(file.parent)
    with kept(file):
        for text in some(mutations(config), 50):
            file.write_text(text)
            refused_or_read(lambda: Transformer.from_pretrained(file.parent), "config.json", text)


@pytest.mark.parametrize(
    "kind, name, value, named",
    [
        ("llama", "generation_config.json", {"eos_token_id": [2]}, "generation_config.json"),
        ("reward", "config.json", {"rlhf_core_of_steps": True}, "config.json"),
        ("reward", "config.json", {"rlhf_core_criteria": {"a": 1.0}}, "config.json"),
        ("adapters", "adapter_config.json", MORE_ADAPTER_FIELDS, "adapter_"),
        ("shards", "model.safetensors.index.json", {}, "shards"),
    ],
)
def test_no_value_in_another_file_of_a_model_gives_a_traceback(kind, name, value, named, folders):
    model_type = RewardModel if kind == "reward" else Transformer
    file = folders / kind / name
    value = (json.loads(file.read_text()) if file.exists() else {}) | value
    if kind == "shards":  # all tensors are alike
        value["weight_map"] = dict(list(value["weight_map"].items())[:3])
    with kept(file):
        for text in some(mutations(value), 100):
            file.write_text(text)
            refused_or_read(lambda: model_type.from_pretrained(file.parent), named, text)


@pytest.mark.parametrize(
    "family, field, value, message",
    [
        ("gpt2", "n_layer", True, "n_layer must be a whole number > 0, got True"),
        ("llama", "hidden_act", [], r"activation \[\] is not supported, only silu"),
        ("llama", "eos_token_id", "a", 'eos_token_id must be an id or a list of ids, got "a"'),
        ("llama", "pad_token_id", 12, r"pad_token_id 12 is not in the vocabulary of 12: choose"),
        ("llama", "rope_theta", 0, "rope_theta must be > 0, got 0"),
        ("llama", "architectures", 5, "architectures must be a list of names, got 5"),
        ("llama", "attention_bias", 1, "attention_bias must be true or false, got 1"),
        ("qwen2", "layer_types", 5, "layer_types must be a list of 2 names, got 5"),
        ("qwen2", "max_window_layers", "a", "max_window_layers must be a whole number, got 'a'"),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 0}, "not numbers"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(family, field, value, message, folders):
    file = folders / family / "config.json"
    load = hub.has_scalar_head if field == "architectures" else Transformer.from_pretrained
    with kept(file):
        edit_json(file, **{field: value})
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
            load(file.parent)


def test_minus_one_is_no_padding(folders):
    """As some files of Llama say it."""
    file = folders / "llama" / "config.json"
    with kept(file):
        edit_json(file, pad_token_id=-1, eos_token_id=[2, -1])
        config = Transformer.from_pretrained(folders / "llama").config
    assert (config.pad_id, config.eos_ids) == (None, (2,))


# ---- sizes


@pytest.mark.parametrize("size", [10**5, 2**24, 2**31, 10**12, 10**299])
@pytest.mark.parametrize(
    "field",
    [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "intermediate_size", "max_position_embeddings", "sliding_window",
    ],
)  # fmt: skip
def test_a_huge_size_is_refused_before_anything_of_this_size_exists(field, size, folders):
    """Longer positions alone need no memory before they are used."""
    file = folders / "mistral" / "config.json"
    with kept(file):
        edit_json(file, **{field: size})
        start = time.thread_time()
        if field in ("max_position_embeddings", "sliding_window") and size <= 2**31:
            Transformer.from_pretrained(file.parent)
        else:
            with pytest.raises(ValueError, match=r"config\.json"):
                Transformer.from_pretrained(file.parent)
        assert time.thread_time() - start < 20  # work of this size would take longer


def test_layers_that_the_files_do_not_have_are_counted_before_they_are_built(folders):
    file = folders / "qwen2" / "config.json"
    with kept(file):
        edit_json(file, num_hidden_layers=10**5, layer_types=None)
        message = "config.json has 100000 layers, but the files have tensors of 2"
        with pytest.raises(ValueError, match=message):
            Transformer.from_pretrained(file.parent)


# ---- weights


@pytest.mark.parametrize(
    "header, size, message",
    [
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4, "cannot be read"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8, "cannot be read"),
        ({"a": entry([1], 4, 8)}, 8, "cannot be read"),
        ({"a": entry([-1], 0, 4)}, 4, "cannot be read"),
        ({"a": entry([2**62, 2**62], 0, 4)}, 4, "cannot be read"),
        ({"a": entry([1] * 1000, 0, 4)}, 4, "'a' has 1000 dimensions, not 8"),
        ({"__metadata__": {"a": "x" * 2000}}, 0, "the header has .* bytes, more than 1000"),
        ([[]], 0, "cannot be read"),
    ],
)
def test_a_header_that_lies_or_is_huge_is_refused(header, size, message, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    write_header(file, header, size)
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", 1000 if "more than" in message else 2**24)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        stored_tensors(file)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64", "BOOL", "C64", "F4", "F6_E2M3"])
@pytest.mark.parametrize("shape", [[12, 16], [0, 2**64 - 1], []])
def test_a_tensor_of_any_type_and_shape_gives_no_traceback(dtype, shape, folders):
    """C64 has more bytes, so its file is damaged as well."""
    file = folders / "llama" / "model.safetensors"
    names = list(stored_tensors(file))
    bits = {"I64": 64, "F4": 4, "F6_E2M3": 6}.get(dtype, 8)
    size = math.prod(shape) * bits // 8
    ends = [size * i for i in range(len(names) + 1)]
    with kept(file):
        entries = {n: entry(shape, *ends[i : i + 2], dtype) for i, n in enumerate(names)}
        write_header(file, entries, ends[-1])
        refused_or_read(lambda: Transformer.from_pretrained(file.parent), "safetensors", str(shape))


@pytest.mark.parametrize("beta", ["a", "nan", "-1", "1e999", None])
def test_a_beta_that_is_no_weight_is_refused(beta, folders):
    file = folders / "ilql" / HEADS_FILE
    with kept(file):
        _, tensors = read_tensors(file)
        write_tensors(file, tensors, {} if beta is None else {"beta": beta})
        with pytest.raises(ValueError, match=r"ilql\.safetensors: beta must be a finite number"):
            ILQLModel.from_pretrained(file.parent)


# ---- adapters


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("lora_alpha", "x", "lora_alpha must be a number, got 'x'"),
        ("lora_alpha", True, "lora_alpha must be a number, got True"),
        ("r", True, "r must be a whole number > 0, got True"),
        ("lora_dropout", None, "lora_dropout must be a number, got None"),
        ("use_rslora", "a", "use_rslora must be true or false, got 'a'"),
        ("target_modules", {"a": 1}, "target_modules must be names, got {'a': 1}"),
        ("target_modules", [""], r"target_modules must be names, got \[''\]"),
        ("target_modules", "(", r"target_modules '\(' is not a regular expression"),
        ("target_modules", "a" * 2000, "has 2000 characters, more than 1000"),
        ("modules_to_save", 5, "modules_to_save must be a list of names, got 5"),
        ("base_model_name_or_path", 5, "base_model_name_or_path must be a folder or a name, got 5"),
        ("base_model_name_or_path", "nowhere", "base_model_name_or_path: nowhere: no such folder"),
        ("layers_to_transform", 0, "layers_to_transform=0 is not supported"),
    ],
)
def test_a_wrong_field_of_adapters_is_named_with_its_value(field, value, message, folders):
    """PEFT adapts only layer 0 if layers_to_transform is 0, which is false."""
    file = folders / "adapters" / "adapter_config.json"
    with kept(file):
        edit_json(file, **{field: value})
        with pytest.raises((ValueError, FileNotFoundError), match=rf"config\.json: .*{message}"):
            Transformer.from_pretrained(file.parent)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r"(.*.*)*x", r"([a-z0-9._]+)+!", "(.|.)*!"])
def test_a_regular_expression_that_takes_for_ever_is_refused(pattern, folders, monkeypatch):
    monkeypatch.setattr(lora, "MAX_SECONDS", 1.0)
    file = folders / "adapters" / "adapter_config.json"
    with kept(file):
        edit_json(file, target_modules=pattern)
        with pytest.raises(ValueError, match=r"adapter_config\.json: target_modules"):
            Transformer.from_pretrained(file.parent)


# ---- fields that are false


@pytest.mark.parametrize("family", FAMILY_OPTIONS)
@pytest.mark.parametrize("value", [False, None, 0])
def test_attention_that_is_not_causal_is_refused(family, value, folders):
    """In all families `transformers` reads the field; if it is false, tokens see later ones."""
    file = folders / family / "config.json"
    with kept(file):
        edit_json(file, is_causal=value)
        with pytest.raises(ValueError, match=f"is_causal={value} is not supported in a {family}"):
            Transformer.from_pretrained(file.parent)
        edit_json(file, is_causal=True)
        Transformer.from_pretrained(file.parent)


@pytest.mark.parametrize("value, fits", [(None, True), (1.0, True), (0, False), (0.5, False)])
def test_rotating_only_a_part_of_a_head_is_refused(value, fits, folders):
    file = folders / "llama" / "config.json"
    with kept(file):
        edit_json(file, partial_rotary_factor=value)
        if fits:
            Transformer.from_pretrained(file.parent)
        else:
            with pytest.raises(ValueError, match=f"partial_rotary_factor={value} is not supported"):
                Transformer.from_pretrained(file.parent)


# ---- the command line


@pytest.mark.parametrize(
    "name, text",
    [("config.json", DEEP), ("config.json", '{"model_type": []}'), ("tokenizer.json", "5")],
)
def test_the_command_line_ends_with_status_2_and_one_line(name, text, tmp_path, folders, capsys):
    folder = shutil.copytree(folders / "llama", tmp_path / "model")
    ByteTokenizer().save(folder)
    (folder / name).write_text(text)
    assert cli.main(["generate", "--model", str(folder), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlhf-core generate: error: ") and name in error
    assert error.count("\n") == 1
