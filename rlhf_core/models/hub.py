"""The Hugging Face layout in and out: config.json + *.safetensors, single or sharded. No code runs, no pickle.

Families: gpt2 and llama. `_MODULES` maps our modules to theirs; several of theirs are the rows of one of ours
(q, k, v -> qkv; gate, up -> up). Every tensor of a checkpoint is used, known to be derived, or an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core.files import read_json, replacing, require, write_json
from rlhf_core.models.transformer import Transformer, TransformerConfig

MAX_SHARD_BYTES = 5 * 2**30

# ours -> theirs, per family; {i} is the layer. GPT-2 stores its matrices transposed (Conv1D), starred here.
_MODULES = {
    "llama": {
        "trunk.embed": ["model.embed_tokens"],
        "trunk.blocks.{i}.norm1": ["model.layers.{i}.input_layernorm"],
        "trunk.blocks.{i}.attn.qkv": [f"model.layers.{{i}}.self_attn.{p}_proj" for p in "qkv"],
        "trunk.blocks.{i}.attn.out": ["model.layers.{i}.self_attn.o_proj"],
        "trunk.blocks.{i}.norm2": ["model.layers.{i}.post_attention_layernorm"],
        "trunk.blocks.{i}.mlp.up": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
        "trunk.blocks.{i}.mlp.down": ["model.layers.{i}.mlp.down_proj"],
        "trunk.norm": ["model.norm"],
        "lm_head": ["lm_head"],
        "score": ["score"],
    },
    "gpt2": {
        "trunk.embed": ["transformer.wte"],
        "trunk.position": ["transformer.wpe"],
        "trunk.blocks.{i}.norm1": ["transformer.h.{i}.ln_1"],
        "trunk.blocks.{i}.attn.qkv": ["*transformer.h.{i}.attn.c_attn"],
        "trunk.blocks.{i}.attn.out": ["*transformer.h.{i}.attn.c_proj"],
        "trunk.blocks.{i}.norm2": ["transformer.h.{i}.ln_2"],
        "trunk.blocks.{i}.mlp.up": ["*transformer.h.{i}.mlp.c_fc"],
        "trunk.blocks.{i}.mlp.down": ["*transformer.h.{i}.mlp.c_proj"],
        "trunk.norm": ["transformer.ln_f"],
        "lm_head": ["lm_head"],
        "score": ["score"],
    },
}
_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers that some checkpoints carry
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_GPT2 = dict(
    positions="learned", norm="layernorm", gated_mlp=False, attention_bias=True, mlp_bias=True, rope_theta=10000.0
)
_LLAMA = dict(positions="rope", norm="rmsnorm", gated_mlp=True)


def load(cls: type[nn.Module], path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A `cls` (Transformer, RewardModel or ValueModel) with the weights in folder `path`, as `dtype`, in eval mode.

    Raises FileNotFoundError for a missing file, ValueError for a config or tensor that does not fit, naming it.
    """
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = cls(config)
    state = {}
    with _open_tensors(path) as tensors:
        names = {_canonical(name, config): name for name in tensors}
        for ours, parameter in model.state_dict().items():
            theirs = _their_names(ours, config)
            missing = [name for name, _ in theirs if name not in names]
            if missing:
                hint = " (a causal language model, not a reward model)" if ours == "score.weight" else ""
                raise ValueError(f"{path}: no tensor {missing[0]!r}{hint}")
            parts = [tensors.get(names.pop(name), transposed) for name, transposed in theirs]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            if tensor.shape != parameter.shape:
                shapes = f"{tuple(tensor.shape)}, config.json says {tuple(parameter.shape)}"
                raise ValueError(f"{path}: {' + '.join(name for name, _ in theirs)} has shape {shapes}")
            state[ours] = tensor.to(dtype)
    unused = sorted(name for name in names.values() if not _derived(name, config))
    if unused:
        raise ValueError(f"{path}: {len(unused)} tensors that {cls.__name__} does not know, e.g. {unused[0]!r}")
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def save(model: nn.Module, path: str | os.PathLike, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write model.safetensors (or shards and their index) and, last, config.json into folder `path`."""
    safetensors = require("safetensors.torch", "train")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = {}
    for ours, parameter in model.state_dict().items():
        theirs = _their_names(ours, config)
        sizes = _row_sizes(ours, config) if len(theirs) > 1 else [len(parameter)]
        for (name, transposed), part in zip(theirs, parameter.detach().cpu().split(sizes)):
            # A copy: rows of one tensor would otherwise be refused as shared memory.
            tensors[name] = part.t().contiguous() if transposed else part.clone(memory_format=torch.contiguous_format)

    shards = [[]]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    single = len(shards) == 1
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with replacing(path / file) as temporary:
            safetensors.save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    if single:
        index.unlink(missing_ok=True)
    else:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in path.glob("model*.safetensors"):  # of an earlier save, which a reader might prefer
        if file.name not in weight_map.values():
            file.unlink()
    write_json(path / "config.json", _to_hf(config, next(model.parameters()).dtype, not isinstance(model, Transformer)))


def read_config(path: str | os.PathLike) -> TransformerConfig:
    """TransformerConfig of a folder's config.json; ValueError naming the field that is not supported."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --model and from_pretrained take a Hugging Face model folder")
    hf = read_json(file)

    def need(name):
        if name not in hf:
            raise ValueError(f"{file}: field {name!r} is missing")
        return hf[name]

    family = need("model_type")
    eos = hf.get("eos_token_id")
    ids = dict(
        bos_id=hf.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_id=hf.get("pad_token_id"),
    )
    if family == "llama":
        activation = need("hidden_act")
        rope = {"rope_theta": hf.get("rope_theta", 10000.0)} | (hf.get("rope_parameters") or {})
        scaling = hf.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or rope.get("rope_type") or "default"
        if kind != "default":
            raise ValueError(f"{file}: rope scaling {kind!r} is not supported, only plain rotary positions")
        sizes = dict(
            hidden_size=need("hidden_size"),
            num_layers=need("num_hidden_layers"),
            num_heads=need("num_attention_heads"),
            num_kv_heads=hf.get("num_key_value_heads"),
            head_dim=hf.get("head_dim"),
            intermediate_size=need("intermediate_size"),
            max_positions=need("max_position_embeddings"),
            rope_theta=rope["rope_theta"],
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            attention_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            dropout=hf.get("attention_dropout", 0.0),
            **_LLAMA,
        )
    elif family == "gpt2":
        activation = hf.get("activation_function", "gelu_new")
        for switch, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
            if hf.get(switch, plain) != plain:
                raise ValueError(f"{file}: {switch}={hf[switch]} is not supported")
        sizes = dict(
            hidden_size=need("n_embd"),
            num_layers=need("n_layer"),
            num_heads=need("n_head"),
            intermediate_size=hf.get("n_inner"),
            max_positions=need("n_positions"),
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            tie_embeddings=hf.get("tie_word_embeddings", True),
            dropout=hf.get("resid_pdrop", 0.1),
            **_GPT2,
        )
    else:
        raise ValueError(f"{file}: model_type {family!r} is not supported, only {', '.join(_MODULES)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{file}: activation {activation!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    return TransformerConfig(vocab_size=need("vocab_size"), activation=_ACTIVATIONS[activation], **sizes, **ids)


def _family(config: TransformerConfig) -> str:
    for family, traits in (("gpt2", _GPT2), ("llama", _LLAMA)):
        plain_heads = config.qkv_sizes == (config.hidden_size,) * 3
        if all(getattr(config, name) == value for name, value in traits.items()) and (plain_heads or family != "gpt2"):
            return family
    raise ValueError(f"no Hugging Face family has this mix of positions, norm, MLP, biases and heads: {config}")


def _to_hf(config: TransformerConfig, dtype: torch.dtype, scalar_head: bool) -> dict:
    family = _family(config)
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[config.activation]
    hf = {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) > 1 else next(iter(config.eos_ids), None),
        "pad_token_id": config.pad_id,
    }
    if family == "llama":
        hf |= {
            "architectures": ["LlamaForSequenceClassification" if scalar_head else "LlamaForCausalLM"],
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_positions,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.norm_eps,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "attention_dropout": config.dropout,
            "hidden_act": activation,
        }
    else:
        hf |= {
            "architectures": ["GPT2ForSequenceClassification" if scalar_head else "GPT2LMHeadModel"],
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.intermediate_size,
            "n_positions": config.max_positions,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": activation,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        }
    if scalar_head:
        hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf


def _their_names(ours: str, config: TransformerConfig) -> list[tuple[str, bool]]:
    """The checkpoint tensors that make up one of our parameters, and whether each is stored transposed."""
    module, kind = ours.rsplit(".", 1)
    layer = module.split(".")[2] if module.startswith("trunk.blocks.") else ""
    pattern = module.replace(f".{layer}.", ".{i}.", 1) if layer else module
    theirs = _MODULES[_family(config)][pattern]
    return [(f"{name.lstrip('*').format(i=layer)}.{kind}", name[0] == "*" and kind == "weight") for name in theirs]


def _row_sizes(ours: str, config: TransformerConfig) -> list[int]:
    return list(config.qkv_sizes) if ".qkv." in ours else [config.intermediate_size] * 2


def _canonical(name: str, config: TransformerConfig) -> str:
    """A tensor's name with the prefix that base-model checkpoints (GPT2Model, LlamaModel) leave out."""
    prefix = {"gpt2": "transformer.", "llama": "model."}[_family(config)]
    return name if name.startswith((prefix, "lm_head.", "score.")) else prefix + name


def _derived(name: str, config: TransformerConfig) -> bool:
    """Whether a checkpoint's tensor says nothing new: a buffer, or a second copy of the tied embedding."""
    return name.endswith(_DERIVED) or (name == "lm_head.weight" and config.tie_embeddings)


class _Tensors:
    """Tensor name -> tensor over one or several safetensors files, each read when asked for."""

    def __init__(self, files: dict):
        self.files = files  # name -> open file

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def get(self, name: str, transposed: bool) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        return tensor.t().contiguous() if transposed else tensor


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[_Tensors]:
    safetensors = require("safetensors", "train")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    elif (path / "model.safetensors").is_file():
        files = ["model.safetensors"]
    else:
        pickles = [file.name for file in path.glob("*.bin")]
        reason = f"; {pickles[0]} is a pickle, which can run code on loading: convert it first" if pickles else ""
        raise FileNotFoundError(f"{path}: no model.safetensors{reason}")
    with contextlib.ExitStack() as stack:
        owner = {}
        for file in files:
            try:
                opened = stack.enter_context(safetensors.safe_open(path / file, framework="pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ValueError(f"{path / file}: cannot be read: {error}") from None
            owner |= dict.fromkeys(opened.keys(), opened)
        yield _Tensors(owner)
