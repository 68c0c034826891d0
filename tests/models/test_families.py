"""Families: config.json is read and written field by field, and misfits are refused."""

import importlib
import inspect
import re

import pytest
import torch
from helpers import GPT2, edit_json
from helpers import tiny as any_tiny

from rlhf_core.models import Transformer, families, hub
from rlhf_core.ops.gated_activation import ACTIVATIONS


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
        lambda f: edit_config(f, model_type="gemma3"), ValueError,
        "model_type 'gemma3' is not supported, only gpt2, llama, mistral, qwen2, qwen3, gemma2, "
        "gemma3_text, phi3, olmo2, smollm3, granite",
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
        ValueError, r"partial_rotary_factor=0\.5 is not supported in a llama model",
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
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), [None, 8]),
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
                layer_types=["sliding_attention", "full_attention"],
            ),
            [8, None],
        ),
        (dict(use_sliding_window=True, sliding_window=8, max_window_layers="remove"), None),
        (dict(use_sliding_window="remove", sliding_window=8, max_window_layers=0), None),
        (dict(use_sliding_window="remove", sliding_window=8, max_window_layers="remove"), None),
    ],
)
def test_a_window_is_read_for_the_layers_that_have_it(fields, window, tmp_path, transformers):
    for traits in (dict(qkv_bias=True), dict(qk_norm=True)):  # Qwen2 and Qwen3
        tiny(**traits).save_pretrained(tmp_path)
        edit_config(tmp_path, **fields)
        wanted = tuple(window) if isinstance(window, list) else (window,) * 2
        config = hub.read_config(tmp_path)
        assert config.windows == wanted
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        kinds = [kind == "sliding_attention" for kind in theirs.layer_types]
        assert tuple(theirs.sliding_window if kind else None for kind in kinds) == wanted
        assert (
            families.read(families.family_of(config).write(config, torch.float32, False)) == config
        )


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


# ---- fields that real models have


def of_gpt2(width=768, layers=12, heads=12, **more):
    return more | dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new",
        attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1, bos_token_id=50256, eos_token_id=50256,
        initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=1024, n_positions=1024,
        n_embd=width, n_head=heads, n_layer=layers, vocab_size=50257, summary_activation=None,
        summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
        summary_use_proj=True, task_specific_params={"text-generation": {"do_sample": True}},
    )  # fmt: skip


def of_llama(kind, width, layers, heads, kv_heads, inner, vocab, positions, **more):
    return dict(
        model_type=kind, architectures=[f"{kind.title()}ForCausalLM"], hidden_size=width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocab, max_position_embeddings=positions,
        hidden_act="silu", rms_norm_eps=1e-5, initializer_range=0.02, use_cache=True,
        tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.37.2",
        bos_token_id=1, eos_token_id=2,
    ) | more  # fmt: skip


LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
OLD = dict(  # all fields of the first releases of transformers
    decoder_start_token_id=None, do_sample=False, early_stopping=False, finetuning_task=None,
    is_decoder=False, is_encoder_decoder=False, length_penalty=1.0, max_length=20, num_beams=1,
    num_return_sequences=1, output_attentions=False, output_hidden_states=False, output_past=True,
    pruned_heads={}, repetition_penalty=1.0, temperature=1.0, top_k=50, top_p=1.0,
    torchscript=False, use_bfloat16=False, xla_device=None,
)  # fmt: skip
QWEN_WINDOW = dict(sliding_window=4096, use_sliding_window=False, max_window_layers=28)
GEMMA = dict(
    attention_bias=False, attention_dropout=0.0, cache_implementation="hybrid", head_dim=256,
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, tie_word_embeddings=True,
)  # fmt: skip
PHI_CODE = dict(
    auto_map={
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    original_max_position_embeddings=4096, embd_pdrop=0.0, resid_pdrop=0.0, rope_theta=10000.0,
)  # fmt: skip
PHI3 = ("phi3", 3072, 32, 32, 32, 8192, 32064)
LLAMA2 = ("llama", 4096, 32, 32, 32, 11008, 32000, 4096)
LLAMA3 = ("llama", 4096, 32, 32, 8, 14336, 128256)
MISTRAL = ("mistral", 4096, 32, 32, 8, 14336)
QWEN7 = ("qwen2", 3584, 28, 28, 4, 18944, 152064)
REAL = {
    "gpt2-medium": of_gpt2(1024, 24, 16, n_special=0, predict_special_tokens=True),
    "gpt2-xl": of_gpt2(1600, 48, 25, output_past=True),
    "distilgpt2": of_gpt2(
        768, 6, _num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}
    ),
    "DialoGPT": of_gpt2(1024, 24, 16, **OLD),
    "Llama 1": of_llama(*LLAMA2[:-1], 2048, max_sequence_length=2048, pad_token_id=0),
    "Llama 2": of_llama(*LLAMA2, pretraining_tp=1, rope_scaling=None),
    "Vicuna 16k": of_llama(
        *LLAMA2, max_sequence_length=16384, rope_scaling={"factor": 4.0, "type": "linear"}
    ),
    "Alpaca": of_llama(*LLAMA2[:-1], 2048, hidden_act="swish", _flash_attn_2_enabled=True),
    "Llama 3": of_llama(*LLAMA3, 8192, attention_bias=False, rope_theta=5e5),
    "Llama 3.1": of_llama(
        *LLAMA3, 131072, eos_token_id=[128001, 128008, 128009], rope_scaling=LLAMA3_ROPE,
        rope_theta=5e5, mlp_bias=False, attention_dropout=0.0, head_dim=128,
        _attn_implementation_autoset=True, unsloth_fixed=True, unsloth_version="2025.1",
    ),
    "R1-Distill-Llama": of_llama(*LLAMA3, 131072, rope_scaling=LLAMA3_ROPE, rope_theta=5e5),
    "TinyLlama": of_llama("llama", 2048, 22, 32, 4, 5632, 32000, 2048, pretraining_tp=1),
    "SmolLM2": of_llama(
        "llama", 576, 30, 9, 3, 1536, 49152, 8192, is_llama_config=True, rope_interleaved=False,
        rope_theta=100000, tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "Mistral 7B v0.1": of_llama(*MISTRAL, 32000, 32768, sliding_window=4096, rope_theta=1e4),
    "Mistral 7B v0.3": of_llama(*MISTRAL, 32768, 32768, sliding_window=None, rope_theta=1e6),
    "Qwen2": of_llama(*QWEN7, 131072, **QWEN_WINDOW, rope_theta=1e6),
    "Qwen2.5-Math": of_llama(*QWEN7, 4096, **QWEN_WINDOW, use_mrope=False, rope_theta=1e4),
    "R1-Distill-Qwen": of_llama(*QWEN7, 131072, **QWEN_WINDOW, use_mrope=False, rope_theta=1e4),
    "Qwen2.5, saved again": of_llama(
        "qwen2", 896, 24, 14, 2, 4864, 151936, 32768, **QWEN_WINDOW | dict(sliding_window=None),
        layer_types=["full_attention"] * 24, rope_parameters={"rope_theta": 1e6}, dtype="float32",
        _attn_implementation="sdpa", loss_type="ForCausalLM",
    ),
    "Qwen3": of_llama(
        "qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, **QWEN_WINDOW | dict(sliding_window=None),
        attention_bias=False, head_dim=128, rope_scaling=None, rope_theta=1000000,
    ),
    "Gemma 2 2B": of_llama(
        "gemma2", 2304, 26, 8, 4, 9216, 256000, 8192, **GEMMA, hidden_act="gelu_pytorch_tanh",
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
        eos_token_id=[1, 107],
    ),
    "Gemma 3 1B": of_llama(
        "gemma3_text", 1152, 26, 4, 1, 6912, 262144, 32768, **GEMMA, attn_logit_softcapping=None,
        final_logit_softcapping=None, rope_local_base_freq=10000, rope_scaling=None,
        rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, eos_token_id=[1, 106],
    ),
    "Gemma 3 270M": of_llama(
        "gemma3_text", 640, 18, 4, 1, 2048, 262144, 32768, **GEMMA, _sliding_window_pattern=6,
        attn_logit_softcapping=None, final_logit_softcapping=None, rope_local_base_freq=10000.0,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3, rope_theta=1000000.0,
        rope_scaling=None, sliding_window=512, use_bidirectional_attention=False,
    ),
    "Phi-3 mini 4k": of_llama(*PHI3, 4096, **PHI_CODE, rope_scaling=None, sliding_window=2047),
    "Phi-3.5 mini": of_llama(
        *PHI3, 131072, **PHI_CODE, sliding_window=262144, attention_bias=False,
        rope_scaling=dict(type="longrope", long_factor=[2.0] * 48, short_factor=[1.0] * 48),
    ),
    "Phi-4 mini": of_llama(
        "phi3", 3072, 32, 24, 8, 8192, 200064, 131072, **PHI_CODE, sliding_window=262144,
        attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1,
        interpolate_factor=1, partial_rotary_factor=0.75, tie_word_embeddings=True,
        rope_scaling=dict(type="longrope", long_factor=[2.0] * 48, short_factor=[1.0] * 48),
    ),
    "OLMo 2 7B": of_llama(
        "olmo2", 4096, 32, 32, 32, 11008, 100352, 4096, attention_bias=False, rope_scaling=None,
        rope_theta=500000, rms_norm_eps=1e-6, bos_token_id=None, eos_token_id=100257,
    ),
    "SmolLM3 3B": of_llama(
        "smollm3", 2048, 36, 16, 4, 11008, 128256, 65536, attention_bias=False, mlp_bias=False,
        layer_types=["full_attention"] * 36, max_window_layers=28, no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9, pretraining_tp=2, rope_scaling=None, rope_theta=5e6,
        sliding_window=None, use_sliding_window=False, bos_token_id=None, use_cache=False,
    ),
    "Granite 3.1 2B": of_llama(
        "granite", 2048, 40, 32, 8, 8192, 49155, 131072, attention_bias=False, mlp_bias=False,
        attention_dropout=0.1, attention_multiplier=0.015625, embedding_multiplier=12.0,
        logits_scaling=8.0, residual_multiplier=0.22, rope_scaling=None, rope_theta=5e6,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip
WINDOWS = {
    "Mistral 7B v0.1": 4096, "Gemma 2 2B": 4096, "Gemma 3 1B": 512, "Gemma 3 270M": 512,
    "Phi-3 mini 4k": 2047, "Phi-3.5 mini": 262144, "Phi-4 mini": 262144,
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_the_fields_of_popular_models_are_read(name):
    fields = REAL[name]
    config = families.read(fields)
    assert config.family == fields["model_type"]
    assert config.sliding_window == WINDOWS.get(name)
    tanh = config.family in ("gpt2", "gemma2", "gemma3_text")
    assert config.activation == ("gelu_tanh" if tanh else "silu")
    family = families.FAMILIES[config.family]
    assert family.read(family.write(config, torch.float32, scalar_head=False)) == config


SMALL = {
    "gpt2": of_gpt2(16, 2, 2),
    **{
        kind: of_llama(kind, 16, 2, 2, 2, 32, 20, 16, pad_token_id=0)
        for kind in families.FAMILIES
        if kind != "gpt2"
    },
}
NO_LOGIT = dict(
    predict_special_tokens=True, output_past=True, max_sequence_length=2048, my_note="of 3 May",
    loss_type="ForCausalLM", _attn_implementation="sdpa", _attn_implementation_autoset=True,
    output_hidden_states=True, chunk_size_feed_forward=8, classifier_dropout=0.1, torchscript=True,
    no_repeat_ngram_size=3, model_max_length=512, unk_token_id=5,
)  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_fields_that_change_no_logit_are_ignored(family):
    assert families.read(SMALL[family] | NO_LOGIT) == families.read(SMALL[family])


@pytest.mark.parametrize("family", SMALL)
def test_fields_that_change_no_logit_change_none_in_transformers(family, transformers):
    logits = []
    attention = dict(_attn_implementation="eager" if family == "gemma2" else "sdpa")
    for more in ({}, NO_LOGIT | attention):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**SMALL[family] | more)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        logits.append(model(torch.arange(12)[None]).logits)
    assert torch.equal(*logits)


OWN = {  # fields that change the function in these families
    "gemma2": "final_logit_softcapping query_pre_attn_scalar",
    "gemma3_text": "final_logit_softcapping query_pre_attn_scalar sliding_window_pattern",
    "granite": "logits_scaling attention_multiplier residual_multiplier embedding_multiplier",
}


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(
    "field, value",
    [
        ("final_logit_softcapping", 30.0), ("query_pre_attn_scalar", 256), ("logit_scale", 0.0625),
        ("logits_scaling", 8.0), ("attention_multiplier", 0.1), ("residual_multiplier", 0.2),
        ("embedding_multiplier", 12.0), ("num_experts", 8), ("num_local_experts", 8),
        ("alibi", True), ("n_routed_experts", 8), ("q_lora_rank", 64), ("use_mrope", True),
        ("rope_interleaved", True), ("rotary_dim", 4), ("use_parallel_residual", True),
        ("parallel_attn", True), ("clip_qkv", 8), ("use_qk_norm", True), ("qk_layernorm", True),
        ("attention_chunk_size", 8), ("scale_emb", 12), ("no_rope_layers", [1]),
        ("per_layer_config", {"0": {}}), ("use_logn_attn", True), ("use_dynamic_ntk", True),
        ("use_bidirectional_attention", True), ("is_encoder_decoder", True),
        ("quantization_config", {"bits": 4}), ("compression_config", {"a": 1}),
        ("mup_enabled", True), ("vision_config", {"a": 1}), ("pruned_heads", {"0": [1]}),
        ("num_mtp_layers", 1), ("position_embedding_type", "relative_key"),
        ("sliding_window_pattern", 6), ("scale_depth", 1.4),
        ("layer_types", ["full_attention", "linear_attention"]),
        ("layer_types", "full_attention"),
        ("is_causal", False), ("auto_map", {"AutoModel": "m.M"}),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_function_elsewhere_is_refused(family, field, value):
    if field in OWN.get(family, ""):
        assert families.read(SMALL[family] | {field: value}) is not None
        return
    with pytest.raises(ValueError, match=field):
        families.read(SMALL[family] | {field: value})


@pytest.mark.parametrize("family", SMALL)
def test_layer_types_must_say_the_same_as_the_window(family):
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 2
    fields = SMALL[family] | ({} if family == "gpt2" else dict(sliding_window=None))
    config = families.read(fields)
    assert config.sliding_window is None
    assert families.read(fields | dict(layer_types=full)) == config
    if family == "mistral":
        config = families.read(fields | dict(sliding_window=8, layer_types=sliding))
        assert config.sliding_window == 8
        for window, kinds in ((8, full), (None, sliding), (None, full[:1])):
            with pytest.raises(ValueError, match=r"only 2 times '\w+_attention'"):
                families.read(fields | dict(sliding_window=window, layer_types=kinds))


# What transformers reads and we ignore, because no logit of a language model depends on it.
IGNORED = {
    "use_cache", "initializer_range", "pretraining_tp", "reorder_and_upcast_attn", "return_dict",
    "output_hidden_states", "dtype", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "transformers_version", "architectures", "num_labels", "use_return_dict",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "classifier_dropout", "_attn_implementation", "output_attentions",
    "_name_or_path", "_sliding_window_pattern",
    "mm_tokens_per_image", "image_token_id",  # of the models with images in Gemma 3's file
}  # fmt: skip


LONGROPE = dict(type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
USED = {  # without them other fields have no effect
    "qwen2": dict(use_sliding_window=True, max_window_layers=0),
    "qwen3": dict(use_sliding_window=True, max_window_layers=0),
    "smollm3": dict(use_sliding_window=True, no_rope_layers=[0, 1]),
    "phi3": dict(rope_scaling=LONGROPE),
}


@pytest.mark.parametrize("family", SMALL)
def test_every_field_that_transformers_reads_is_used_irrelevant_or_refused(family, transformers):
    name = family.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    pattern = r"config\.(\w+)|getattr\((?:self\.)?config, \"(\w+)\""
    read = {a or b for a, b in re.findall(pattern, inspect.getsource(module))}
    written = transformers.AutoConfig.for_model(family).to_dict()
    assert {"vocab_size", "tie_word_embeddings"} <= read | set(written)
    base = SMALL[family] | USED.get(family, {})

    def ignored(name):
        try:
            return all(
                families.read(base | {name: value}) == families.read(base)
                for value in ("odd", 7, True, 0.5, {"odd": 1})
            )
        except ValueError:
            return False

    assert {name for name in read | set(written) if ignored(name)} <= IGNORED


@pytest.mark.parametrize("name", families._ACTIVATIONS)
def test_an_activation_computes_what_transformers_computes(name, transformers):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    theirs = transformers.activations.ACT2FN[name](x)
    assert (ACTIVATIONS[families._ACTIVATIONS[name]](x) - theirs).abs().max() < 1e-8
