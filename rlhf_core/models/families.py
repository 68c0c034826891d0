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
from rlhf_core.models.config import MAX_LENGTH, MAX_SIZE, TransformerConfig

# Buffers that some checkpoints carry; they can be computed from the config.
DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
OF_STEPS = "rlhf_core_of_steps"  # our own fields of a RewardModel's config.json
CRITERIA = "rlhf_core_criteria"  # the weight of each head, by its name
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
        on_read: Hooks that rewrite a config.json in place before its fields are read. They may
            return fields of TransformerConfig.
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
    on_read: tuple[Callable[[dict], dict | None], ...] = ()
    on_write: Callable[[TransformerConfig], dict] = lambda config: {}

    def read(self, config_json: dict) -> TransformerConfig:
        """Return the config of a config.json, whose fields are used, irrelevant, or rejected.

        Raises:
            ValueError: A field is missing, is not supported, or contradicts another one.
        """
        hf, options = dict(config_json), dict(self.fixed, family=self.name)
        for hook in self.on_read:
            options |= hook(hf) or {}
        used = {theirs for _, theirs, _ in self.config_fields}
        only = self.only | {name: value for name, value in _ONLY.items() if name not in used}
        known = {*used, *only, *_IRRELEVANT}
        kinds = hf.pop("layer_types", None)
        for theirs, value in hf.items():
            unknown = value and theirs not in known and _ARCHITECTURE.search(theirs[:80])
            if unknown or value != only.get(theirs, value):
                raise ValueError(
                    f"{theirs[:80]}={short(value)} is not supported in a {self.name} model"
                )
        bos, eos, pad = (read_ids(hf, f"{kind}_token_id") for kind in ("bos", "eos", "pad"))
        options |= dict(eos_ids=tuple(eos))
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
        boxes = self.boxes(ours, tensor, 0, len(tensor), config)
        return {name: part for name, (part, _) in boxes.items()}

    def boxes(
        self, ours: str, tensor: Tensor, first: int, total: int, config: TransformerConfig
    ) -> dict[str, tuple[Tensor, tuple[slice, ...]]]:
        """As `parts`, where `tensor` has only some rows of the `total`, from row `first` on.

        With each view comes the box of their tensor that it corresponds to; both may be empty.
        """
        module, kind = ours.rsplit(".", 1)
        matrix = tensor.ndim > 1  # a vector is never transposed
        transposed = self.transposed and matrix and module.startswith("trunk.blocks.")
        found, start = {}, 0
        for name, count in self.rows(module, total, config).items():
            ends = (min(max(x - start, 0), count) for x in (first, first + len(tensor)))
            box = slice(*ends)
            part = tensor[max(start - first, 0) :][: box.stop - box.start]
            if transposed:
                found[f"{name}.{kind}"] = part.t(), (slice(0, tensor.shape[1]), box)
            else:
                found[f"{name}.{kind}"] = part, (box,)
            start += count
        return found


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
        names = [x.name for x in fields(config) if x.compare]
        try:
            back = family.read(family.write(config, torch.float32, scalar_head=False))
        except (ValueError, ArithmeticError) as error:  # the family forbids this value
            misfits.append(f"{family.name} ({error})")
            continue
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
    parameters, scaling = hf.pop("rope_parameters", None), hf.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {short(value)}")
    base = {"rope_theta": hf.get("rope_theta", 10000.0)}
    rope = base | (scaling or parameters or {})
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    hf["rope_theta"] = rope.pop("rope_theta")
    share = rope.pop("partial_rotary_factor", hf.pop("partial_rotary_factor", None))
    if share is not None:
        hf["partial_rotary_factor"] = share
    hf["rope_scaling"] = {"rope_type": kind, **rope} if kind != "default" or rope else None


def _layer_count(hf: dict) -> int:
    count = hf.get("num_hidden_layers")
    if type(count) is not int or not 0 < count <= MAX_SIZE:
        raise ValueError(f"num_hidden_layers must be a whole number > 0, got {short(count)}")
    return count


def _windows(hf: dict, sliding: list[bool]) -> dict:
    """Read which layers have the window: those of `layer_types`, or else of `sliding`."""
    kinds, count = hf.pop("layer_types", None), _layer_count(hf)
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != count:
            raise ValueError(f"layer_types must be a list of {count} names, got {short(kinds)}")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"layer_types holds {short(kind)}, which is not supported")
        sliding = [kind == "sliding_attention" for kind in kinds]
    if hf.get("sliding_window") is None or not any(sliding):
        hf["sliding_window"] = None
        return {}
    return dict(full_layers=tuple(i for i, slides in enumerate(sliding) if not slides))


def _layer_types(config: TransformerConfig) -> dict:
    names = ["full_attention" if x is None else "sliding_attention" for x in config.windows]
    return {"layer_types": names}


def _take(hf: dict, name: str, default, kind: type):
    """Take a field of a config.json away and return it."""
    value = hf.pop(name, default)
    if type(value) is not kind:
        wanted = "true or false" if kind is bool else "a whole number"
        raise ValueError(f"{name} must be {wanted}, got {short(value)}")
    return value


def _qwen(hf: dict) -> dict:
    first = _take(hf, "max_window_layers", 28, int)
    used = _take(hf, "use_sliding_window", False, bool)
    hf.setdefault("sliding_window", 4096)
    if not used:
        hf["sliding_window"] = None
    return _windows(hf, [i >= first for i in range(_layer_count(hf))])


def _qwen_fields(config: TransformerConfig) -> dict:
    used = config.sliding_window is not None
    fields = {"use_sliding_window": used, "max_window_layers": 0 if used else config.num_layers}
    return fields | (_layer_types(config) if config.full_layers else {})


def _gemma(hf: dict, full_every: int = 2) -> dict:
    hf.pop("hidden_act", None)  # `transformers` reads hidden_activation
    width, scalar = hf.get("hidden_size"), hf.pop("query_pre_attn_scalar", 256)
    for name, value in (("hidden_size", width), ("query_pre_attn_scalar", scalar)):
        if type(value) not in (int, float) or not 0 < value < MAX_LENGTH:
            raise ValueError(f"{name} must be a number > 0, got {short(value)}")
    hf.setdefault("sliding_window", 4096)
    windows = _windows(hf, [(i + 1) % full_every > 0 for i in range(_layer_count(hf))])
    return windows | dict(attention_scale=scalar**-0.5, embed_scale=width**0.5)


def _gemma3(hf: dict) -> dict:
    hf.pop("_sliding_window_pattern", None)  # a copy of the other one
    every = _take(hf, "sliding_window_pattern", 6, int)
    if every < 1:
        raise ValueError(f"sliding_window_pattern must be > 0, got {every}")
    hf.setdefault("rope_theta", 1e6)
    parameters = hf.get("rope_parameters")
    if isinstance(parameters, dict) and parameters.keys() & {"full_attention", "sliding_attention"}:
        parts = {name: value or {} for name, value in parameters.items()}
        for name, value in parts.items():
            if not isinstance(value, dict):
                raise ValueError(f"rope_parameters[{name!r}] must be an object, got {short(value)}")
        local = dict(parts.pop("sliding_attention", {}))
        hf["rope_parameters"] = parts.pop("full_attention", {}) | parts
        hf["rope_local_base_freq"] = local.pop("rope_theta", 10000.0)
        if local.pop("rope_type", "default") != "default" or local:
            raise ValueError("rope_parameters scale the layers with a window, not supported")
    return _gemma(hf, every)


def _gemma_fields(config: TransformerConfig) -> dict:
    scale = config.attention_scale or config.head_dim**-0.5
    return {"query_pre_attn_scalar": round(scale**-2)} | _layer_types(config)


_TRAINED = "original_max_position_embeddings"


def _phi3(hf: dict) -> None:
    """Read longrope, whose trained length is a field of its own."""
    code = hf.pop("auto_map", None)  # the code that became the phi3 of `transformers`
    values = code.values() if isinstance(code, dict) else ()
    files = {str(name).split("--")[-1].split(".")[0] for name in values}
    if code and not files <= {"configuration_phi3", "modeling_phi3", "Xenova/gpt-4o"}:
        hf["auto_map"] = code
    scaling, trained = hf.get("rope_scaling"), _take(hf, _TRAINED, 4096, int)
    if scaling is None:
        return
    if scaling.get("rope_type") not in ("su", "yarn", "longrope"):
        raise ValueError(f"rope scaling {short(scaling.get('rope_type'))} is not one of Phi-3's")
    scaling = hf["rope_scaling"] = scaling | {"rope_type": "longrope", _TRAINED: trained}
    longest = hf.get("max_position_embeddings")
    if type(longest) is not int or not 0 < trained <= MAX_LENGTH or not 0 < longest <= MAX_LENGTH:
        found = f"max_position_embeddings={short(longest)}, {_TRAINED}={trained}"
        raise ValueError(f"{found} must be whole numbers > 0")
    factor = scaling.pop("factor", None)
    if factor not in (None, longest / trained):
        found = f"rope scaling factor {short(factor)}"
        raise ValueError(f"{found} is not max_position_embeddings={longest} / {_TRAINED}={trained}")


def _phi3_fields(config: TransformerConfig) -> dict:
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "longrope":
        return {}
    factors = {name: value for name, value in scaling.items() if name != _TRAINED}
    return {"rope_scaling": factors, _TRAINED: scaling.get(_TRAINED, config.max_positions)}


def _smollm3(hf: dict) -> dict:
    hf.pop("max_window_layers", None)  # Qwen's field, which `transformers` ignores here
    hf.setdefault("rope_theta", 2e6)
    count = _layer_count(hf)
    every, rotated = _take(hf, "no_rope_layer_interval", 4, int), hf.pop("no_rope_layers", None)
    if every < 1:
        raise ValueError(f"no_rope_layer_interval must be > 0, got {every}")
    if rotated is None:
        rotated = [int((i + 1) % every != 0) for i in range(count)]
    fits = isinstance(rotated, list) and len(rotated) >= count
    if not fits or not all(x in (0, 1) for x in rotated):
        raise ValueError(f"no_rope_layers must be a list of {count} 0 or 1, got {short(rotated)}")
    if not _take(hf, "use_sliding_window", False, bool):
        hf["sliding_window"] = None
    windows = _windows(hf, [not x for x in rotated[:count]])
    return windows | dict(unrotated_layers=tuple(i for i in range(count) if not rotated[i]))


def _smollm3_fields(config: TransformerConfig) -> dict:
    rotated = [int(i not in config.unrotated_layers) for i in range(config.num_layers)]
    used = config.sliding_window is not None
    return {"no_rope_layers": rotated, "use_sliding_window": used} | _layer_types(config)


def _granite_fields(config: TransformerConfig) -> dict:
    return {"attention_multiplier": config.attention_scale or config.head_dim**-0.5}


def _llama_like(
    name, extra_fields, kv_heads=None, head_dim=None, model_type=None, classifier=None,
    modules=None, defaults=None, only=None, on_read=(_flat_rope,), on_write=lambda config: {},
    **fixed,
):  # fmt: skip
    """A family with Llama's fields and tensor names, but for what the arguments change.

    kv_heads, head_dim: Their defaults.
    modules: As in `Family`. None takes one away.
    defaults: (their field, their default) of our fields in _LLAMA_FIELDS.
    """
    defaults = defaults or {}
    rows = [
        (ours, *defaults[ours]) if ours in defaults else (ours, theirs, default)
        for ours, theirs, default in _LLAMA_FIELDS
    ]
    heads = [("num_kv_heads", "num_key_value_heads", kv_heads), ("head_dim", "head_dim", head_dim)]
    return Family(
        model_type or name.lower(),
        f"{name}ForCausalLM",
        classifier or f"{name}ForSequenceClassification",
        [*rows, *heads, *extra_fields],
        dict(positions="rope", norm="rmsnorm", gated_mlp=True) | fixed,
        {ours: theirs for ours, theirs in (_LLAMA_MODULES | (modules or {})).items() if theirs},
        only=only or {},
        on_read=on_read,
        on_write=on_write,
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
_MLP_BIAS = ("mlp_bias", "mlp_bias", False)
_WINDOW = ("sliding_window", "sliding_window", 4096)
_NO_WINDOW = ("sliding_window", "sliding_window", None)
_ATTENTION_CAP = ("attention_softcap", "attn_logit_softcapping", 50.0)
_LOCAL_THETA = ("local_rope_theta", "rope_local_base_freq", 10000.0)
_PARTIAL = ("partial_rotary_factor", "partial_rotary_factor", 1.0)
_QWEN = dict(on_read=(_flat_rope, _qwen), on_write=_qwen_fields)
_PRE_NORMS = ("trunk.blocks.{i}.norm1", "trunk.blocks.{i}.norm2")
_NORMS = [f"model.layers.{{i}}.{x}_layernorm" for x in ("post_attention", "post_feedforward")]
_POST_NORMS = {"trunk.blocks.{i}.post_norm1": _NORMS[:1], "trunk.blocks.{i}.post_norm2": _NORMS[1:]}
_GEMMA = dict(
    defaults=dict(
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        tie_embeddings=("tie_word_embeddings", True),
    ),
    modules=_POST_NORMS
    | {"trunk.blocks.{i}.norm2": ["model.layers.{i}.pre_feedforward_layernorm"]},
    kv_heads=4,
    head_dim=256,
    norm="rmsnorm_plus_one",
    norm_places="both",
    on_write=_gemma_fields,
)
FAMILIES = {
    family.name: family
    for family in (
        _GPT2,
        _llama_like("Llama", [*_BIAS, _MLP_BIAS]),
        _llama_like("Mistral", [_WINDOW], kv_heads=8),
        _llama_like("Qwen2", [_WINDOW], kv_heads=32, **_QWEN, qkv_bias=True),
        _llama_like("Qwen3", [*_BIAS, _WINDOW], 32, head_dim=128, **_QWEN, qk_norm=True),
        _llama_like(
            "Gemma2",
            [*_BIAS, _WINDOW, _ATTENTION_CAP, ("logit_softcap", "final_logit_softcapping", 30.0)],
            on_read=(_flat_rope, _gemma),
            **_GEMMA,
        ),
        _llama_like(
            "Gemma3",
            [*_BIAS, _WINDOW, _LOCAL_THETA, ("logit_softcap", "final_logit_softcapping", None)],
            model_type="gemma3_text",
            classifier="Gemma3TextForSequenceClassification",
            on_read=(_gemma3, _flat_rope),
            only={"attn_logit_softcapping": None},
            qk_norm=True,
            **_GEMMA,
        ),
        _llama_like(
            "Phi3",
            [_NO_WINDOW, _PARTIAL, ("dropout", "embd_pdrop", 0.0)],
            modules={
                "trunk.blocks.{i}.attn.qkv": ["model.layers.{i}.self_attn.qkv_proj"],
                "trunk.blocks.{i}.mlp.up": ["model.layers.{i}.mlp.gate_up_proj"],
            },
            defaults=dict(norm_eps=("rms_norm_eps", 1e-5)),
            on_read=(_flat_rope, _phi3),
            on_write=_phi3_fields,
            only=dict(full_attn_mod=1, interpolate_factor=1),
        ),
        _llama_like(
            "Olmo2",
            _BIAS,
            modules=_POST_NORMS | dict.fromkeys(_PRE_NORMS),
            defaults=dict(norm_eps=("rms_norm_eps", 1e-5)),
            norm_places="post",
            qk_norm=True,
            qk_norm_whole=True,
        ),
        _llama_like(
            "SmolLM3",
            [*_BIAS, _MLP_BIAS, _NO_WINDOW],
            kv_heads=4,
            defaults=dict(tie_embeddings=("tie_word_embeddings", True)),
            on_read=(_smollm3, _flat_rope),
            on_write=_smollm3_fields,
        ),
        _llama_like(
            "Granite",
            [
                *_BIAS,
                _MLP_BIAS,
                ("embed_scale", "embedding_multiplier", 1.0),
                ("residual_scale", "residual_multiplier", 1.0),
                ("attention_scale", "attention_multiplier", 1.0),
                ("logit_divisor", "logits_scaling", 1.0),
            ],
            on_write=_granite_fields,
        ),
    )
}
