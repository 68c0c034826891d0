"""Families: config.json is read and written field by field, and misfits are refused."""

import pytest
from helpers import GPT2, edit_json
from helpers import tiny as any_tiny

from rlhf_core.models import Transformer, hub


def tiny(**options):
    return any_tiny(noise=0, vocab_size=20, max_positions=16, **options)


def edit_config(folder, **changes):
    edit_json(folder / "config.json", **changes)


FAULTS = {
    "family": (
        lambda f: edit_config(f, model_type="mamba"), ValueError,
        "model_type 'mamba' is not supported",
    ),
    "no family": (
        lambda f: edit_config(f, model_type="remove"), ValueError,
        r"model_type '\(no such field\)' is not",
    ),
    "no size": (
        lambda f: edit_config(f, hidden_size="remove"), ValueError,
        "field 'hidden_size' is missing",
    ),
    "activation": (
        lambda f: edit_config(f, hidden_act="relu"), ValueError,
        "activation 'relu' is not supported",
    ),
    "gemma": (
        lambda f: edit_config(f, model_type="gemma2"), ValueError,
        "model_type 'gemma2' is not supported, only",
    ),
    "rope scaling": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "longrope", "factor": 8.0}), ValueError,
        "'longrope'",
    ),
    "old rope scaling": (
        lambda f: edit_config(f, rope_scaling={"type": "su", "factor": 2.0}), ValueError,
        "rope scaling 'su'",
    ),
    "rope parameters": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        ValueError, "'yarn' needs",
    ),
    "rope of a part": (
        lambda f: edit_config(f, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ValueError, "'default' has no option 'partial_rotary_factor'",
    ),
    "rope by layer": (
        lambda f: edit_config(f, rope_parameters={"full_attention": {"rope_theta": 1e4}}),
        ValueError, "full_attention",
    ),
    "a field beyond the family": (
        lambda f: edit_config(f, attn_logit_softcapping=50.0), ValueError,
        r"attn_logit_softcapping=50\.0 is not supported in a llama model",
    ),
    "quantization": (
        lambda f: edit_config(f, quantization_config={"bits": 4}), ValueError,
        "quantization_config=",
    ),
    "remote code": (
        lambda f: edit_config(f, auto_map={"AutoModel": "m.M"}), ValueError, "auto_map=",
    ),
    "a window in llama": (
        lambda f: edit_config(f, sliding_window=8), ValueError, "sliding_window=8 is not supported",
    ),
    "a size that is none": (
        lambda f: edit_config(f, hidden_size="16"), ValueError, r"config\.json: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_config_that_no_family_covers_is_refused_by_field(fault, tmp_path):
    break_it, error, message = FAULTS[fault]
    tiny().save_pretrained(tmp_path)
    hub.read_config(tmp_path)
    break_it(tmp_path)
    with pytest.raises(error, match=message) as raised:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


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
    theirs.pop("type", None)
    assert theirs == config.rope_scaling | {"rope_theta": 7.0}


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
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers="remove"), None),
        (dict(use_sliding_window="remove", sliding_window=8, max_window_layers=0), None),
        (dict(use_sliding_window="remove", sliding_window=8, max_window_layers="remove"), None),
    ],
)
def test_a_window_is_read_where_all_layers_have_it(fields, window, tmp_path):
    for traits in (dict(qkv_bias=True), dict(qk_norm=True)):  # Qwen2 and Qwen3
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


def test_dropout_without_a_field_in_the_family_is_written_and_read_back(tmp_path, transformers):
    config = tiny(dropout=0.3, attention_dropout=0.2).config
    tiny(dropout=0.3, attention_dropout=0.2).save_pretrained(tmp_path)
    assert hub.read_config(tmp_path) == config
    assert transformers.AutoConfig.from_pretrained(tmp_path).attention_dropout == 0.2


def test_dropouts_that_differ_between_fields_are_refused(tmp_path):
    tiny(**GPT2).save_pretrained(tmp_path)
    edit_config(tmp_path, resid_pdrop=0.1, embd_pdrop=0.2)
    with pytest.raises(
        ValueError, match=r"embd_pdrop=0\.2 contradicts another field, which sets dropout to 0\.1"
    ):
        hub.read_config(tmp_path)


@pytest.mark.parametrize(
    "switch, value", [("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True)]
)
def test_a_gpt2_variant_with_other_attention_is_refused(switch, value, tmp_path):
    tiny(**GPT2).save_pretrained(tmp_path)
    edit_config(tmp_path, **{switch: value})
    with pytest.raises(ValueError, match=f"{switch}={value} is not supported in a gpt2 model"):
        Transformer.from_pretrained(tmp_path)


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
def test_a_model_that_fits_no_family_is_not_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny(**options).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
