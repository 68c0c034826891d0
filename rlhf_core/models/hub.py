"""The Hugging Face layout in and out: config.json + *.safetensors, single or sharded. No code runs, no pickle.

A family is a table: its config fields, what all its models share, its tensor names. A model belongs to the family
whose config.json, read back, gives the model's own config. Every tensor and every config field is used, known to say
nothing new, or an error.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.files import model_folder, read_object, replacing, write_json
from rlhf_core.models.config import TransformerConfig
from rlhf_core.models.safetensors import StoredTensor, stored_tensors, write_tensors

MAX_SHARD_BYTES = 5 * 2**30

_HEADS = {"lm_head": ["lm_head"], "score": ["score"]}
_ROPE_MODULES = {
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
_GPT2_MODULES = {
    "trunk.embed": ["transformer.wte"],
    "trunk.position": ["transformer.wpe"],
    "trunk.blocks.{i}.norm1": ["transformer.h.{i}.ln_1"],
    "trunk.blocks.{i}.attn.qkv": ["*transformer.h.{i}.attn.c_attn"],
    "trunk.blocks.{i}.attn.out": ["*transformer.h.{i}.attn.c_proj"],
    "trunk.blocks.{i}.norm2": ["transformer.h.{i}.ln_2"],
    "trunk.blocks.{i}.mlp.up": ["*transformer.h.{i}.mlp.c_fc"],
    "trunk.blocks.{i}.mlp.down": ["*transformer.h.{i}.mlp.c_proj"],
    "trunk.norm": ["transformer.ln_f"],
}
_ROPE_FIELDS = [  # ours, theirs, and what it is where config.json does not say; ... where it must
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
    (
        "dropout",
        "resid_pdrop",
        0.0,
    ),  # GPT-2's name: these families drop nothing else, and pass over it
]
_ATTENTION_BIAS = [("qkv_bias", "attention_bias", False), ("out_bias", "attention_bias", False)]
_GPT2_FIELDS = [
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
]


class _Family(NamedTuple):
    classes: tuple[str, str]  # theirs: the language model, the sequence classifier
    fields: list[tuple[str, str, object]]
    fixed: dict[
        str, object
    ]  # ours: what every model of the family has, where it is not the default
    modules: dict[
        str, list[str]
    ]  # ours: theirs, whose rows make it up; {i} is the layer, * a transposed matrix
    only: dict[str, object] = {}  # theirs: the one value that we compute  # noqa: RUF012


def _llama_like(architecture, fields, kv_heads=None, head_dim=None, **fixed) -> _Family:
    heads = [("num_kv_heads", "num_key_value_heads", kv_heads), ("head_dim", "head_dim", head_dim)]
    classes = f"{architecture}ForCausalLM", f"{architecture}ForSequenceClassification"
    fixed |= dict(positions="rope", norm="rmsnorm", gated_mlp=True)
    return _Family(classes, [*_ROPE_FIELDS, *heads, *fields], fixed, _ROPE_MODULES)


_WINDOW = ("sliding_window", "sliding_window", 4096)
_FAMILIES = {
    "gpt2": _Family(
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        _GPT2_FIELDS,
        dict(
            positions="learned",
            norm="layernorm",
            gated_mlp=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
        ),
        _GPT2_MODULES,
        dict(
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        ),
    ),
    "llama": _llama_like("Llama", [*_ATTENTION_BIAS, ("mlp_bias", "mlp_bias", False)]),
    "mistral": _llama_like("Mistral", [_WINDOW], kv_heads=8),
    "qwen2": _llama_like("Qwen2", [_WINDOW], kv_heads=32, qkv_bias=True),
    "qwen3": _llama_like(
        "Qwen3", [*_ATTENTION_BIAS, _WINDOW], kv_heads=32, head_dim=128, qk_norm=True
    ),
}
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DERIVED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
)  # buffers that some checkpoints carry
_OF_STEPS = "rlhf_core_of_steps"  # ours, of a RewardModel
# Fields that change no logit: of the files, of training, of sampling. Others that are set are refused by name.
_SAYS_NOTHING = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "use_cache", "initializer_range", "return_dict",
    "pretraining_tp", "n_ctx", "gradient_checkpointing", "reorder_and_upcast_attn", "finetuning_task", "problem_type",
    "id2label", "label2id", "num_labels", "_num_labels", "task_specific_params", "do_sample", "temperature", "top_k",
    "top_p", "num_beams", "repetition_penalty", "min_length", "max_length", "max_new_tokens", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "is_llama_config",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", _OF_STEPS,
}  # fmt: skip


class Pretrained:
    """Reads and writes a model with a `config`; one with a `score` head is a sequence classifier with one label."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, dtype: torch.dtype = torch.float32):
        """Read a folder in the Hugging Face layout, or the repository "owner/name" there; of one with adapters, their
        base with them. Errors: `hub.load`."""
        from rlhf_core.models import lora  # which needs this file

        return (
            lora.load_with_base(cls, source, dtype)
            if lora.is_adapter(source)
            else load(cls, source, dtype)
        )

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write a folder in the Hugging Face layout; of a model with adapters, these alone."""
        from rlhf_core.models import lora

        (lora.save_adapters if lora.has_adapters(self) else save)(self, path)


def load(
    cls: type[nn.Module], source: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A `cls` (Transformer, RewardModel or ValueModel) with the weights in `source`, as `dtype`, in eval mode.

    `source` is a folder, or "owner/name" on the Hugging Face hub, see `files.model_folder`. Names and shapes are
    checked before the first weight is read; each is read once, piece by piece, into its place.

    Raises FileNotFoundError for a missing file, ValueError for a config or tensor that does not fit, naming it.
    """
    path = model_folder(source)
    config = read_config(path)
    family = _FAMILIES[config.family]
    with torch.device("meta"):
        model = cls(config)
    stored = _find_tensors(path, family)
    if (
        hasattr(model, "score") and "score.bias" in stored
    ):  # of normalised scores; transformers reads the rest
        model.score.bias = nn.Parameter(torch.empty(1, device="meta"))
    if "score.weight" in stored and not hasattr(model, "score"):
        raise ValueError(f"{path}: a reward model, not a language model")
    used = set()
    for ours, parameter in model.state_dict().items():
        for name, part in _parts(ours, parameter, config, family):
            used.add(name)
            if name not in stored:
                hint = (
                    " (a causal language model, not a reward model)"
                    if ours == "score.weight"
                    else ""
                )
                raise ValueError(f"{path}: no tensor {name!r}{hint}")
            if stored[name].shape != part.shape:
                shapes = f"{stored[name].shape}, config.json says {tuple(part.shape)}"
                raise ValueError(f"{stored[name].file}: {name} has shape {shapes}")
    extra = sorted(name for name in stored.keys() - used if not name.endswith(_DERIVED))
    copies = [stored[name] for name in extra if name == "lm_head.weight" and config.tie_embeddings]
    if len(extra) > len(copies):
        unknown = next(name for name in extra if stored[name] not in copies)
        raise ValueError(
            f"{path}: {len(extra) - len(copies)} tensors that {cls.__name__} does not know, e.g. {unknown!r}"
        )
    state = {}
    for ours, parameter in model.state_dict().items():
        state[ours] = torch.empty(parameter.shape, dtype=dtype, device="cpu")
        for name, part in _parts(ours, state[ours], config, family):
            stored[name].copy_to(part)
    for head in copies:
        for first, rows in head.pieces():
            if not torch.equal(
                rows.to(dtype), state["trunk.embed.weight"][first : first + len(rows)]
            ):
                raise ValueError(
                    f"{head.file}: lm_head.weight is not the embedding, but config.json ties them"
                )
    if hasattr(model, "of_steps"):
        model.of_steps = bool(read_object(path / "config.json").get(_OF_STEPS))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def has_scalar_head(source: str | os.PathLike) -> bool:
    """Whether config.json in the folder or hub repository is of a sequence classifier, such as a reward model."""
    file = model_folder(source) / "config.json"
    architectures = read_object(file).get("architectures") or () if file.is_file() else ()
    return any("SequenceClassification" in name for name in architectures)


def save(model: nn.Module, path: str | os.PathLike, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write model.safetensors (or shards and their index) and config.json into folder `path`.

    Everything is written beside what is there, which is replaced at the end, config.json last.
    """
    path, config = Path(path), model.config
    hf = _to_hf(config, next(model.parameters()).dtype, scalar_head=hasattr(model, "score"))
    hf |= {_OF_STEPS: True} if getattr(model, "of_steps", False) else {}
    family = _FAMILIES[hf["model_type"]]
    tensors = {
        name: part
        for ours, p in model.state_dict().items()
        for name, part in _parts(ours, p, config, family)
    }
    shards, room = [[]], max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    file = "model.safetensors" if len(shards) == 1 else "model-{:05}-of-{:05}.safetensors"
    weight_map = {
        name: file.format(i, len(shards)) for i, names in enumerate(shards, 1) for name in names
    }
    index = path / "model.safetensors.index.json"

    path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as renamed_last_to_first:
        write_json(renamed_last_to_first.enter_context(replacing(path / "config.json")), hf)
        # Of an earlier save, which a reader might prefer.
        adapters = [path / "adapter_config.json", path / "adapter_model.safetensors"]
        stale = [
            *path.glob("model*.safetensors"),
            *([index] if len(shards) == 1 else []),
            *adapters,
        ]
        for old in stale:
            if old.name not in weight_map.values():
                renamed_last_to_first.callback(old.unlink, missing_ok=True)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            value = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(renamed_last_to_first.enter_context(replacing(index)), value)
        for names in shards:
            temporary = renamed_last_to_first.enter_context(replacing(path / weight_map[names[0]]))
            write_tensors(temporary, {name: tensors[name] for name in names})


def read_config(path: str | os.PathLike) -> TransformerConfig:
    """TransformerConfig of a folder's config.json; ValueError naming the field that is not supported."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; --model and from_pretrained take a Hugging Face model folder"
        )
    hf = read_object(file)
    generation = (
        Path(path) / "generation_config.json"
    )  # which may name more ids that end a response
    more = _ids(read_object(generation).get("eos_token_id")) if generation.is_file() else []
    hf["eos_token_id"] = list(dict.fromkeys([*_ids(hf.get("eos_token_id")), *more]))
    try:
        return _from_hf(hf)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def _from_hf(hf: dict) -> TransformerConfig:
    name = hf.get("model_type", "(no such field)")
    if name not in _FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported, only {', '.join(_FAMILIES)}")
    family, hf = _FAMILIES[name], dict(hf)
    names = {theirs for _, theirs, _ in family.fields}
    if "rope_theta" in names:
        _plain_rope(hf)
    if name in ("qwen2", "qwen3"):
        _plain_window(hf)
    for field, value in hf.items():
        if value != family.only.get(field, value) or (
            value and field not in {*names, *family.only, *_SAYS_NOTHING}
        ):
            raise ValueError(f"{field}={value!r} is not supported in a {name} model")
    options = dict(family.fixed, family=name, eos_ids=tuple(_ids(hf.get("eos_token_id"))))
    options |= dict(bos_id=hf.get("bos_token_id"), pad_id=hf.get("pad_token_id"))
    for ours, theirs, default in family.fields:
        value = hf.get(theirs, default)
        if value is ...:
            raise ValueError(f"field {theirs!r} is missing")
        if ours == "activation" and value not in _ACTIVATIONS:
            raise ValueError(
                f"activation {value!r} is not supported, only {', '.join(_ACTIVATIONS)}"
            )
        value = _ACTIVATIONS[value] if ours == "activation" else value
        if options.setdefault(ours, value) != value:
            raise ValueError(
                f"{theirs}={value} beside a {ours} of {options[ours]} is not supported"
            )
    return TransformerConfig(**options)


def _plain_rope(hf: dict) -> None:
    """transformers 5 has all in rope_parameters, earlier versions beside each other; "type" is an old "rope_type"."""
    parameters = hf.pop("rope_parameters", None)
    rope = {
        "rope_theta": hf.get("rope_theta", 10000.0),
        **(hf.get("rope_scaling") or parameters or {}),
    }
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    hf["rope_theta"] = rope.pop("rope_theta")
    hf["rope_scaling"] = {"rope_type": kind, **rope} if kind != "default" or rope else None


def _plain_window(hf: dict) -> None:
    """One window for all layers, from Qwen's three fields that could give it to some of them."""
    first, kinds, layers = (
        hf.pop("max_window_layers", 28),
        hf.pop("layer_types", None),
        hf.get("num_hidden_layers", 0),
    )
    kinds = kinds or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    used = hf.pop("use_sliding_window", False) and hf.get("sliding_window", 0) is not None
    if not used or set(kinds) == {"full_attention"}:
        hf["sliding_window"] = None
    elif set(kinds) != {"sliding_attention"}:
        raise ValueError(
            "a sliding window in some layers only (max_window_layers, layer_types) is not supported"
        )


def _ids(value) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _to_hf(config: TransformerConfig, dtype: torch.dtype, scalar_head: bool) -> dict:
    """config.json of the model's family; of the first that fits where it has none."""
    if config.family not in (None, *_FAMILIES):
        raise ValueError(f"family {config.family!r} is not supported, only {', '.join(_FAMILIES)}")
    misfits = []
    for name in [config.family] if config.family else _FAMILIES:
        family = _FAMILIES[name]
        hf = {
            "model_type": name,
            "architectures": [family.classes[scalar_head]],
            "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": config.bos_id,
            "eos_token_id": list(config.eos_ids)
            if len(config.eos_ids) > 1
            else next(iter(config.eos_ids), None),
            "pad_token_id": config.pad_id,
        }
        activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[
            config.activation
        ]
        hf |= {
            theirs: activation if ours == "activation" else getattr(config, ours)
            for ours, theirs, _ in family.fields
        }
        if name in ("qwen2", "qwen3"):
            windows = config.sliding_window is not None
            hf |= {
                "use_sliding_window": windows,
                "max_window_layers": 0 if windows else config.num_layers,
            }
        if scalar_head:
            hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        back = _from_hf(hf)
        lost = [
            ours.name
            for ours in fields(config)
            if getattr(back, ours.name) != getattr(config, ours.name)
        ]
        if not set(lost) - {"family"}:
            return hf
        misfits.append(f"{name} ({', '.join(name for name in lost if name != 'family')})")
    raise ValueError(
        f"no Hugging Face family has such models; what does not fit: {'; '.join(misfits)}"
    )


def _parts(
    ours: str, tensor: Tensor, config: TransformerConfig, family: _Family
) -> list[tuple[str, Tensor]]:
    """The checkpoint tensors that make up one of ours: name, and view of ours in their layout."""
    module, kind = ours.rsplit(".", 1)
    layer = module.split(".")[2] if module.startswith("trunk.blocks.") else ""
    theirs = (family.modules | _HEADS)[
        module.replace(f".{layer}.", ".{i}.", 1) if layer else module
    ]
    rows = config.qkv_sizes if len(theirs) == 3 else [len(tensor) // len(theirs)] * len(theirs)
    return [
        (
            f"{name.lstrip('*').format(i=layer)}.{kind}",
            part.t() if name[0] == "*" and kind == "weight" else part,
        )
        for name, part in zip(theirs, tensor.split(rows))
    ]


def modules_of(ours: str, layer: nn.Linear, config: TransformerConfig) -> dict[str, int]:
    """The Hugging Face modules that the rows of our linear layer `ours` are, in order, and how many each has."""
    family = _FAMILIES[_to_hf(config, layer.weight.dtype, scalar_head=False)["model_type"]]
    parts = _parts(f"{ours}.weight", layer.weight, config, family)
    rows = [layer.out_features] if len(parts) == 1 else [len(part) for _, part in parts]
    return {name.removesuffix(".weight"): size for (name, _), size in zip(parts, rows)}


def _find_tensors(path: Path, family: _Family) -> dict[str, StoredTensor]:
    """Every tensor of a folder under its full name: base models (GPT2Model, LlamaModel) leave out the prefix."""
    prefix = family.modules["trunk.norm"][0].split(".")[0] + "."
    index = path / "model.safetensors.index.json"
    weight_map = {}
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: no weight_map")
    elif not (path / "model.safetensors").is_file():
        pickles = [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind)]
        reason = (
            f"; {pickles[0]} is a pickle, which can run code on loading: convert it first"
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{path}: no model.safetensors{reason}")
    headers, found = {}, {}
    for file in sorted(set(weight_map.values())) or ["model.safetensors"]:
        if Path(file).name != file or not (path / file).is_file():
            raise FileNotFoundError(
                f"{path / file}: no such file in the folder, but {index.name} names it"
            )
        headers[file] = stored_tensors(path / file)
        for name, tensor in headers[file].items():
            name = name if name.startswith((prefix, "lm_head.", "score.")) else prefix + name
            if name in found:
                raise ValueError(
                    f"{path}: tensor {name!r} is there twice, in {found[name].file.name} and in {file}"
                )
            found[name] = tensor
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(f"{path / file}: no tensor {name!r}, but {index.name} says so")
    return found
