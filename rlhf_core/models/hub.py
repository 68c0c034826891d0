"""Model files in the Hugging Face layout: config.json and *.safetensors, single or sharded.

Reading runs no code and opens no pickle. Left out: the meaning of fields and names (families.py).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_core import distributed
from rlhf_core.files import (
    Replacement,
    dump_json,
    model_folder,
    read_ids,
    read_object,
    short,
)
from rlhf_core.models import families
from rlhf_core.models.config import TransformerConfig
from rlhf_core.models.gather import on_rank_0, own_rows, piece_of, reshard
from rlhf_core.models.safetensors import DTYPES, StoredTensor, TensorWriter, stored_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MAX_SHARD_BYTES = 5 * 2**30
HEADS_FILE = "model.ilql.safetensors"  # the heads of an ILQLModel
INDEX_FILE = "model.safetensors.index.json"


def load(
    cls: type[nn.Module],
    source: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Return a `cls` (Transformer, RewardModel or ValueModel) with the weights in `source`.

    Names and shapes are checked before the first weight is read. Each weight is read once, piece by
    piece, into its place. The model is in eval mode.

    Args:
        source: A folder, or "owner/name" on the Hugging Face hub: see `files.model_folder`.
        dtype: Dtype of the weights in memory.
        mesh: As for `from_pretrained`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A config field or a tensor does not fit; the message names it.
    """
    path = model_folder(source)
    config = read_config(path)
    family = families.FAMILIES[config.family]
    stored = _find_tensors(path, family)
    _check_layers(path, config, family, stored)
    with torch.device("meta"):
        model = cls(config)
    with _naming(path / "config.json"):
        _read_scores(model, read_object(path / "config.json"))
    if hasattr(model, "score") and "score.bias" in stored:  # normalized scores
        model.score.bias = nn.Parameter(torch.empty(model.score.out_features, device="meta"))
    if "score.weight" in stored and not hasattr(model, "score"):
        raise ValueError(f"{path}: a reward model, not a language model")
    used = set()
    for ours, parameter in model.state_dict().items():
        for name, part in family.parts(ours, parameter, config).items():
            used.add(name)
            if name not in stored:
                is_lm = ours == "score.weight"
                hint = " (a causal language model, not a reward model)" if is_lm else ""
                raise ValueError(f"{path}: no tensor {name!r}{hint}, which config.json asks for")
            if stored[name].shape != part.shape:
                shapes = f"{stored[name].shape}, config.json says {tuple(part.shape)}"
                raise ValueError(f"{stored[name].file}: {name} has shape {shapes}")
    extra = sorted(stored.keys() - used)
    extra = [name for name in extra if not name.endswith(families.DERIVED)]
    copy = (
        "lm_head.weight" if config.tie_embeddings else None
    )  # some files hold the embedding twice
    unknown = [name for name in extra if name != copy]
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} tensors that {cls.__name__} does not know, e.g. {unknown[0]!r}"
        )
    state = {}
    with contextlib.nullcontext() if mesh is None else distributed.together(local=True):
        for ours, parameter in model.state_dict().items():
            own = own_rows(len(parameter), mesh)
            shape = own.stop - own.start, *parameter.shape[1:]
            state[ours] = torch.empty(shape, dtype=dtype, device="cpu")
            boxes = family.boxes(ours, state[ours], own.start, len(parameter), config)
            for name, (part, box) in boxes.items():
                if part.numel():
                    stored[name].copy_to(part, box)
        for head in (stored[name] for name in extra):
            for first, rows in head.pieces((own_rows(config.vocab_size, mesh),)):
                embedding = state["trunk.embed.weight"][first : first + len(rows)]
                if not torch.equal(rows.to(dtype), embedding):
                    raise ValueError(
                        f"{head.file}: lm_head.weight is not the embedding, but config.json ties "
                        "them"
                    )
    if mesh is not None:
        shapes = {ours: parameter.shape for ours, parameter in model.state_dict().items()}
        state = {ours: piece_of(x, shapes[ours], mesh) for ours, x in state.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _read_scores(model: nn.Module, hf: dict) -> None:
    """Set what a config.json says of a reward model's scores."""
    if hasattr(model, "of_steps"):
        model.of_steps = hf.get(families.OF_STEPS, False)
        if not isinstance(model.of_steps, bool):
            raise ValueError(f"{families.OF_STEPS} must be a bool, got {short(model.of_steps)}")
        if families.CRITERIA in hf:
            model.set_criteria(hf[families.CRITERIA])
    elif families.CRITERIA in hf and hasattr(model, "score"):
        raise ValueError("a reward model of several criteria: load it as RewardModel")


def adopt(cls: type[nn.Module], theirs) -> nn.Module:
    """Return a `cls` with the weights of a loaded model of transformers: `from_transformers`."""
    name, hf = type(theirs).__name__, theirs.config.to_diff_dict()
    more = getattr(theirs, "generation_config", None)
    ids = [*read_ids(hf, "eos_token_id"), *read_ids(vars(more) if more else {}, "eos_token_id")]
    with _naming(name):
        config = families.read(hf | {"eos_token_id": list(dict.fromkeys(ids))})
        with torch.device("meta"):
            model = cls(config)
        _read_scores(model, hf)
    family, stored = families.FAMILIES[config.family], theirs.state_dict()
    state, unused = {}, set(stored)
    for ours, parameter in model.state_dict().items():
        parts = family.parts(ours, parameter, config)
        for part_name, part in parts.items():
            if part_name not in stored or stored[part_name].shape != part.shape:
                found = tuple(stored[part_name].shape) if part_name in stored else "none"
                raise ValueError(
                    f"{name}: {cls.__name__} needs a tensor {part_name!r} of shape "
                    f"{tuple(part.shape)}, found {found}"
                )
        unused -= parts.keys()
        (first, layout), *_ = parts.items()
        if len(parts) == 1 and layout.is_contiguous():
            state[ours] = stored[first]
            continue
        state[ours] = torch.empty_like(parameter, dtype=stored[first].dtype, device=theirs.device)
        for part_name, part in family.parts(ours, state[ours], config).items():
            part.copy_(stored[part_name])
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    unknown = [x for x in sorted(unused - tied) if not x.endswith(families.DERIVED)]
    if unknown:
        raise ValueError(f"{name}: {cls.__name__} does not know the tensor {unknown[0]!r}")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def stored_dtype(source: str | os.PathLike) -> torch.dtype:
    """Return the dtype in which a folder or hub repository stores most of its numbers."""
    path, numbers = model_folder(source), Counter()
    for tensor in _find_tensors(path, families.FAMILIES[read_config(path).family]).values():
        numbers[tensor.dtype] += math.prod(tensor.shape)
    return DTYPES[max(numbers, key=numbers.__getitem__)]


def has_scalar_head(source: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds a sequence classifier, such as a reward model."""
    file = model_folder(source) / "config.json"
    architectures = read_object(file).get("architectures") if file.is_file() else None
    names = [] if architectures is None else architectures
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: architectures must be a list of names, got {short(names)}")
    return any("SequenceClassification" in name for name in names)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    heads: tuple[dict[str, Tensor], dict[str, str]] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write model.safetensors (or shards and their index) and config.json into folder `path`.

    Files of an earlier model go where a reader would take them for this model's. A failed save
    leaves the folder as it was. All ranks of a sharded model must call this. Rank 0 writes, and
    holds one whole tensor at a time.

    Args:
        heads: Tensors and texts of HEADS_FILE, whose dtype stays.
        dtype: Dtype of the weights in the files. None means that in memory.

    Raises:
        ValueError: A weight is beyond the range of dtype.
    """
    path, config = Path(path), model.config
    dtype = dtype or next(model.parameters()).dtype
    family = families.family_of(config)
    hf = family.write(config, dtype, scalar_head=hasattr(model, "score"))
    if getattr(model, "of_steps", False):
        hf[families.OF_STEPS] = True
    if criteria := getattr(model, "criteria", None):
        hf[families.CRITERIA] = criteria
        hf["id2label"] = {str(i): name for i, name in enumerate(criteria)}
        hf["label2id"] = {name: i for i, name in enumerate(criteria)}
    reshard(model)
    tensors: dict[str, Tensor] = model.state_dict()
    layout: dict[str, Tensor] = {}
    for ours, parameter in tensors.items():
        layout |= family.parts(ours, torch.empty(parameter.shape, device="meta"), config)
    shards, room = [[]], max_shard_bytes
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in layout.items()}
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    file = "model.safetensors" if len(shards) == 1 else "model-{:05}-of-{:05}.safetensors"
    weight_map = {
        name: file.format(i, len(shards)) for i, names in enumerate(shards, 1) for name in names
    }
    head_tensors, texts = heads or ({}, {})

    def write(pairs: Iterable[tuple[str, Tensor]]) -> None:
        with Replacement(path) as files:
            files.remove(*stale_adapters(path), first=not (path / "config.json").exists())
            files.remove(*_stale_weights(path))
            if _ends_elsewhere(path / "generation_config.json", config):
                files.remove("generation_config.json")
            writers = {}
            for names in shards:
                part = {name: layout[name] for name in names}
                writer = TensorWriter(files.open(weight_map[names[0]]), part, dtype=dtype)
                writers |= dict.fromkeys(names, writer)
            if heads is not None:
                writer = TensorWriter(files.open(HEADS_FILE), head_tensors, texts)
                writers |= dict.fromkeys(head_tensors, writer)
            for ours, tensor in pairs:
                is_head = ours in head_tensors
                parts = {ours: tensor} if is_head else family.parts(ours, tensor, config)
                for name, part in parts.items():
                    files.current = path / weight_map.get(name, HEADS_FILE)
                    writers[name].write(name, part)
            if len(shards) > 1:
                value = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                dump_json(files.open(INDEX_FILE), value)
            dump_json(files.open("config.json"), hf)

    on_rank_0(tensors | head_tensors, write)


def stale_adapters(path: Path) -> list[str]:
    """The files of adapters in a folder, which readers prefer to those of a model.

    Raises:
        FileExistsError: adapter_config.json is not PEFT's.
    """
    file = path / "adapter_config.json"
    if not file.is_file():
        return []
    try:
        known = "peft_type" in read_object(file)
    except ValueError:
        known = False
    if not known:
        raise FileExistsError(
            f"{file}: readers would take this file for the model's, but it is not PEFT's. Move it, "
            "or choose another folder"
        )
    return [file.name, "adapter_model.safetensors"]


def _stale_weights(path: Path) -> list[str]:
    """An earlier model's weights: the names that `save` writes, and the shards of the index."""
    index = path / INDEX_FILE
    try:
        shards = read_object(index)["weight_map"].values() if index.is_file() else ()
    except (ValueError, KeyError, AttributeError):
        shards = ()
    pattern = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
    shards = {name for name in shards if isinstance(name, str) and pattern.fullmatch(name)}
    return ["model.safetensors", INDEX_FILE, HEADS_FILE, *sorted(shards)]


def _ends_elsewhere(generation: Path, config: TransformerConfig) -> bool:
    """Whether a generation_config.json would give the model more EOS ids."""
    try:
        ids = read_object(generation).get("eos_token_id") if generation.is_file() else None
    except ValueError:
        return False
    ids = ids if isinstance(ids, list) else [ids]
    return any(i not in (None, -1, *config.eos_ids) for i in ids)


def read_config(path: str | os.PathLike) -> TransformerConfig:
    """TransformerConfig of a folder's config.json.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: A field is not supported; the message names it.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; --model and from_pretrained take a Hugging Face model folder"
        )
    hf = read_object(file)
    generation = Path(path) / "generation_config.json"  # may name more EOS ids
    more = read_object(generation) if generation.is_file() else {}
    with _naming(generation):
        more = read_ids(more, "eos_token_id")
    with _naming(file):
        ids = dict.fromkeys([*read_ids(hf, "eos_token_id"), *more])
        return families.read(hf | {"eos_token_id": list(ids)})


@contextlib.contextmanager
def _naming(file: Path | str) -> Iterator[None]:
    """Put the name of a file, or of a class, before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check_layers(
    path: Path, config: TransformerConfig, family: families.Family, stored: dict[str, StoredTensor]
) -> None:
    """Raise ValueError if config.json has more layers than the files, before any are built."""
    prefix = family.modules["trunk.blocks.{i}.mlp.down"][0].split("{i}")[0]
    names = (name.removeprefix(prefix) for name in stored if name.startswith(prefix))
    layers = len({name.partition(".")[0] for name in names})
    if config.num_layers > layers:
        raise ValueError(
            f"{path}: config.json has {config.num_layers} layers, but the files have tensors of "
            f"{layers}"
        )


def _find_tensors(path: Path, family: families.Family) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its full name.

    Files of base models (GPT2Model, LlamaModel) leave out the prefix, which is added here.
    """
    prefix = family.modules["trunk.norm"][0].split(".")[0] + "."
    index = path / INDEX_FILE
    weight_map = {}
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{index}: no weight_map from tensors to files, got {short(weight_map)}"
            )
        for name, file in weight_map.items():
            if not isinstance(file, str) or len(file) > 255:
                raise ValueError(
                    f"{index}: the file of {name[:80]!r} is {short(file)}, no file name"
                )
    elif not (path / "model.safetensors").is_file():
        pickles = [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in path.glob(kind)]
        reason = "; {} is a pickle, which can run code on loading: convert it first"
        reason = reason.format(pickles[0]) if pickles else ""
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
                files = f"{found[name].file.name} and in {file}"
                raise ValueError(f"{path}: tensor {name!r} is there twice, in {files}")
            found[name] = tensor
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise ValueError(f"{path / file}: no tensor {name!r}, but {index.name} lists it there")
    return found
