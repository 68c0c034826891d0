"""Model families: how a config.json and its tensor names map to a TransformerConfig and our names.

A family is one row of FAMILIES. It needs a hook only where its config.json cannot be read field by
field. A model belongs to a family if the family's config.json reads back as the model's config.
Left out: files (hub.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from rlhf_core.files import read_ids, short
from rlhf_core.models.config import TransformerConfig

# Buffers that some checkpoints carry; they can be computed from the config.
DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
OF_STEPS = "rlhf_core_of_steps"  # our own field of a RewardModel's config.json
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}  # each of ours is written as the first name that stands for it
# `transformers` ignores fields that a family does not have, and so do we. But a field whose name
# matches says that the model computes something else, as in another family or in code of its own.
_ARCHITECTURE = re.compile(
    "act|adapter|alibi|attention|attn|auto_map|bias|bidirect|block|causal|chunk|clamp|clip|compress"
    "|config|conv_|cross|d_model|decoder|dense|depth|dim|drop|emb|encoder|_eps|^eps$|expert"
    "|feed_forward|ffn|freq|gate|gating|glu|head|hidden|index|inner|intermediate|kernel|kv|layer"
    "|linear|logit|lora|mamba|mlp|moe|mtp|mult|mup|ngram|norm|ntk|parallel|pool|_pos|position"
    "|prefix_lm|proj|qk|quant|quer|relative|resid|rope|rotary|rout|scal|sink|softmax|sparse|ssm"
    "|state|theta|topk|width|window",
    re.IGNORECASE,
)
# Fields with such a name that change no logit: they are about kernels, outputs, other heads, files.
_IRRELEVANT = {
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention",
    "use_flash_attention_2", "reorder_and_upcast_attn", "chunk_size_feed_forward",
    "output_attentions", "output_hidden_states", "is_decoder", "classifier_dropout",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "decoder_start_token_id", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "is_llama_config", "transformers.js_config",
}  # fmt: skip
# Fields that `transformers` reads in every family, where only this value is supported.
_ONLY = {"is_causal": True, "partial_rotary_factor": 1.0}


@dataclass(frozen=True)
class Family:
    """A family of models. "Theirs" are the names that Hugging Face's files use.

    Attributes:
        name: Its `model_type`.
        language_model: Their class name of its language models.
        classifier: Their class name of its sequence classifiers, such as reward models.
        config_fields: (our field of TransformerConfig, their field, their default). A default of
            ... means that a config.json must have the field.
        fixed: Our config fields that have the same value in all its models.
        modules: Our module: their modules, whose rows make it up. {i} is the layer.
        transposed: Whether they store the matrices of a block transposed.
        only: Their fields of which only this value is supported.
        on_read: Hooks that rewrite a config.json in place before its fields are read.
        on_write: Hook that returns fields to add to a config.json.
    """

    name: str
    language_model: str
    classifier: str
    config_fields: list[tuple[str, str, object]]
    fixed: dict[str, object]
    modules: dict[str, list[str]]
    transposed: bool = False
    only: dict[str, object] = field(default_factory=dict)
    on_read: tuple[Callable[[dict], None], ...] = ()
    on_write: Callable[[TransformerConfig], dict] = lambda config: {}

    def read(self, config_json: dict) -> TransformerConfig:
        """Return the config of a config.json, whose fields are used, irrelevant, or rejected.

        Raises:
            ValueError: A field is missing, is not supported, or contradicts another one.
        """
        hf = dict(config_json)
        for hook in self.on_read:
            hook(hf)
        only = self.only | _ONLY
        known = {*(theirs for _, theirs, _ in self.config_fields), *only, *_IRRELEVANT}
        kinds = hf.pop("layer_types", None)
        for theirs, value in hf.items():
            unknown = value and theirs not in known and _ARCHITECTURE.search(theirs[:80])
            if unknown or value != only.get(theirs, value):
                raise ValueError(
                    f"{theirs[:80]}={short(value)} is not supported in a {self.name} model"
                )
        bos, eos, pad = (read_ids(hf, f"{kind}_token_id") for kind in ("bos", "eos", "pad"))
        options = dict(self.fixed, family=self.name, eos_ids=tuple(eos))
        options |= dict(bos_id=next(iter(bos), None), pad_id=next(iter(pad), None))
        for ours, theirs, default in self.config_fields:
            value = hf.get(theirs, default)
            if value is ...:
                raise ValueError(f"field {theirs!r} is missing")
            if ours == "activation":
                if not isinstance(value, str) or value not in _ACTIVATIONS:
                    supported = ", ".join(_ACTIVATIONS)
                    raise ValueError(
                        f"activation {short(value)} is not supported, only {supported}"
                    )
                value = _ACTIVATIONS[value]
            if options.setdefault(ours, value) != value:
                raise ValueError(
                    f"{theirs}={short(value)} contradicts another field, which sets {ours} to "
                    f"{short(options[ours])}; the two must be equal"
                )
        try:
            config = TransformerConfig(**options)
        except ValueError as error:  # which starts with our name of a field
            ours, _, rest = str(error).partition(" ")
            names = {ours: theirs for ours, theirs, _ in self.config_fields}
            names |= {"pad_id": "pad_token_id", "eos_ids": "eos_token_id", "bos_id": "bos_token_id"}
            raise ValueError(f"{names.get(ours, ours)} {rest}") from None
        count = config.num_layers
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        fits = isinstance(kinds, list) and len(kinds) == count and all(x == kind for x in kinds)
        if kinds and not fits:
            raise ValueError(
                f"layer_types={short(kinds)} is not supported in a {self.name} model, only {count} "
                f"times {kind!r}"
            )
        return config

    def write(self, config: TransformerConfig, dtype: torch.dtype, scalar_head: bool) -> dict:
        """Return the config.json of a model, without what the family cannot express."""
        eos = list(config.eos_ids)
        hf = {
            "model_type": self.name,
            "architectures": [self.classifier if scalar_head else self.language_model],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": config.bos_id,
            "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
            "pad_token_id": config.pad_id,
        }
        activation = next(x for x, ours in _ACTIVATIONS.items() if ours == config.activation)
        for ours, theirs, _ in self.config_fields:
            hf[theirs] = activation if ours == "activation" else getattr(config, ours)
        hf |= self.on_write(config)
        if scalar_head:
            hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return hf

    def rows(self, ours: str, total: int, config: TransformerConfig) -> dict[str, int]:
        """Their modules that make up our module `ours`, in order, and how many rows each has."""
        layer = ours.split(".")[2] if ours.startswith("trunk.blocks.") else ""
        key = ours.replace(f".{layer}.", ".{i}.", 1) if layer else ours
        names = self.modules.get(key, [key])  # the heads have the same name there and here
        theirs = [name.format(i=layer) for name in names]
        counts = config.qkv_sizes if len(theirs) == 3 else [total // len(theirs)] * len(theirs)
        return dict(zip(theirs, counts))

    def parts(self, ours: str, tensor: Tensor, config: TransformerConfig) -> dict[str, Tensor]:
        """Their tensors that make up our tensor `ours`, by name: views of it in their layout."""
        module, kind = ours.rsplit(".", 1)
        rows = self.rows(module, len(tensor), config)
        parts = tensor.split(list(rows.values()))
        if self.transposed and module.startswith("trunk.blocks."):
            parts = [part.t() for part in parts]  # a vector stays as it is
        return {f"{name}.{kind}": part for name, part in zip(rows, parts)}


def read(config_json: dict) -> TransformerConfig:
    """Return the TransformerConfig of a config.json of any family. Raises as `Family.read`."""
    name = config_json.get("model_type", "(no such field)")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type {short(name)} is not supported, only {', '.join(FAMILIES)}")
    return FAMILIES[name].read(config_json)


def family_of(config: TransformerConfig) -> Family:
    """Return the family that `config` names, or the first one that can express it.

    Raises:
        ValueError: There is none. The message lists the fields that each family would lose.
    """
    if config.family not in (None, *FAMILIES):
        raise ValueError(f"family {config.family!r} is not supported, only {', '.join(FAMILIES)}")
    misfits = []
    for family in [FAMILIES[config.family]] if config.family else FAMILIES.values():
        back = family.read(family.write(config, torch.float32, scalar_head=False))
        names = [x.name for x in fields(config) if x.compare]
        lost = [name for name in names if getattr(back, name) != getattr(config, name)]
        if not lost:
            return family
        misfits.append(f"{family.name} ({', '.join(lost)})")
    raise ValueError(
        f"no Hugging Face family fits this model; fields that do not fit: {'; '.join(misfits)}"
    )


def _flat_rope(hf: dict) -> None:
    """Read all of RoPE's settings into `rope_theta` and `rope_scaling`.

    Transformers 5 keeps them in `rope_parameters`. Old files say "type" for "rope_type".
    """
    if hf.get("partial_rotary_factor") is None:
        hf.pop("partial_rotary_factor", None)
    parameters, scaling = hf.pop("rope_parameters", None), hf.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {short(value)}")
    base = {"rope_theta": hf.get("rope_theta", 10000.0)}
    rope = base | (scaling or parameters or {})
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    hf["rope_theta"] = rope.pop("rope_theta")
    hf["rope_scaling"] = {"rope_type": kind, **rope} if kind != "default" or rope else None


def _one_window(hf: dict) -> None:
    """Read Qwen's three fields, which can give layers different windows, into `sliding_window`."""
    first, count = hf.pop("max_window_layers", 28), hf.get("num_hidden_layers", 0)
    kinds, used = hf.pop("layer_types", None), hf.pop("use_sliding_window", False)
    for name, value, kind in (
        ("max_window_layers", first, int),
        ("num_hidden_layers", count, int),
        ("use_sliding_window", used, bool),
    ):
        if type(value) is not kind:
            wanted = "true or false" if kind is bool else "a whole number"
            raise ValueError(f"{name} must be {wanted}, got {short(value)}")
    if kinds is not None and not isinstance(kinds, list):
        raise ValueError(f"layer_types must be a list, got {short(kinds)}")
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types holds {short(kind)}, which is not supported")
    sliding = [kind == "sliding_attention" for kind in kinds or ()]
    sliding = sliding or [False] * (first > 0) + [True] * (first < count)
    full = all(kind == "full_attention" for kind in kinds) if kinds else first >= count
    if not used or hf.get("sliding_window", 0) is None or full:
        hf["sliding_window"] = None
    elif not all(sliding):
        raise ValueError(
            "a sliding window in some layers only (max_window_layers, layer_types) is not supported"
        )


def _window_fields(config: TransformerConfig) -> dict:
    used = config.sliding_window is not None
    return {"use_sliding_window": used, "max_window_layers": 0 if used else config.num_layers}


def _llama_like(name: str, extra_fields, kv_heads=None, head_dim=None, hooks=None, **fixed):
    """A family with Llama's fields and tensor names. kv_heads, head_dim: their defaults."""
    heads = [("num_kv_heads", "num_key_value_heads", kv_heads), ("head_dim", "head_dim", head_dim)]
    return Family(
        name.lower(),
        f"{name}ForCausalLM",
        f"{name}ForSequenceClassification",
        [*_LLAMA_FIELDS, *heads, *extra_fields],
        fixed | dict(positions="rope", norm="rmsnorm", gated_mlp=True),
        _LLAMA_MODULES,
        **(hooks or dict(on_read=(_flat_rope,))),
    )


_LLAMA_FIELDS = [
    ("vocab_size", "vocab_size", ...),
    ("hidden_size", "hidden_size", ...),
    ("num_layers", "num_hidden_layers", ...),
    ("num_heads", "num_attention_heads", ...),
    ("intermediate_size", "intermediate_size", ...),
    ("max_positions", "max_position_embeddings", ...),
    ("rope_theta", "rope_theta", 10000.0),
    ("rope_scaling", "rope_scaling", None),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("activation", "hidden_act", ...),
    ("tie_embeddings", "tie_word_embeddings", False),
    ("attention_dropout", "attention_dropout", 0.0),
    ("dropout", "resid_pdrop", 0.0),  # GPT-2's field, which `transformers` ignores in these models
]
_LLAMA_MODULES = {
    "trunk.embed": ["model.embed_tokens"],
    "trunk.blocks.{i}.norm1": ["model.layers.{i}.input_layernorm"],
    "trunk.blocks.{i}.attn.qkv": [f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkv"],
    "trunk.blocks.{i}.attn.q_norm": ["model.layers.{i}.self_attn.q_norm"],
    "trunk.blocks.{i}.attn.k_norm": ["model.layers.{i}.self_attn.k_norm"],
    "trunk.blocks.{i}.attn.out": ["model.layers.{i}.self_attn.o_proj"],
    "trunk.blocks.{i}.norm2": ["model.layers.{i}.post_attention_layernorm"],
    "trunk.blocks.{i}.mlp.up": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
    "trunk.blocks.{i}.mlp.down": ["model.layers.{i}.mlp.down_proj"],
    "trunk.norm": ["model.norm"],
}
_GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    [
        ("vocab_size", "vocab_size", ...),
        ("hidden_size", "n_embd", ...),
        ("num_layers", "n_layer", ...),
        ("num_heads", "n_head", ...),
        ("intermediate_size", "n_inner", None),
        ("max_positions", "n_positions", ...),
        ("norm_eps", "layer_norm_epsilon", 1e-5),
        ("activation", "activation_function", "gelu_new"),
        ("tie_embeddings", "tie_word_embeddings", True),
        ("attention_dropout", "attn_pdrop", 0.1),
        ("dropout", "resid_pdrop", 0.1),
        ("dropout", "embd_pdrop", 0.1),
    ],
    dict(positions="learned", norm="layernorm", gated_mlp=False)
    | dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    {
        "trunk.embed": ["transformer.wte"],
        "trunk.position": ["transformer.wpe"],
        "trunk.blocks.{i}.norm1": ["transformer.h.{i}.ln_1"],
        "trunk.blocks.{i}.attn.qkv": ["transformer.h.{i}.attn.c_attn"],
        "trunk.blocks.{i}.attn.out": ["transformer.h.{i}.attn.c_proj"],
        "trunk.blocks.{i}.norm2": ["transformer.h.{i}.ln_2"],
        "trunk.blocks.{i}.mlp.up": ["transformer.h.{i}.mlp.c_fc"],
        "trunk.blocks.{i}.mlp.down": ["transformer.h.{i}.mlp.c_proj"],
        "trunk.norm": ["transformer.ln_f"],
    },
    transposed=True,
    only=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    | dict(add_cross_attention=False),
)
_BIAS = [("qkv_bias", "attention_bias", False), ("out_bias", "attention_bias", False)]
_WINDOW = ("sliding_window", "sliding_window", 4096)
_QWEN = dict(on_read=(_flat_rope, _one_window), on_write=_window_fields)
FAMILIES = {
    family.name: family
    for family in (
        _GPT2,
        _llama_like("Llama", [*_BIAS, ("mlp_bias", "mlp_bias", False)]),
        _llama_like("Mistral", [_WINDOW], kv_heads=8),
        _llama_like("Qwen2", [_WINDOW], kv_heads=32, hooks=_QWEN, qkv_bias=True),
        _llama_like("Qwen3", [*_BIAS, _WINDOW], 32, head_dim=128, hooks=_QWEN, qk_norm=True),
    )
}
