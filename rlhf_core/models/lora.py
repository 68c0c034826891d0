"""Low-rank adapters (Hu et al. 2021): y = W x + (alpha / rank) B A dropout(x), with W frozen.

Files have PEFT's layout. An adapter belongs to a Hugging Face module ("q_proj"), which can be a
part of one of our modules (rows of attn.qkv). With its adapters off, a model computes exactly what
it did before it got them, so the reference policy needs no second copy. Left out: DoRA, biases that
train, ranks that differ between modules, and adapters of the embedding or the output head.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.checks import transform
from rlhf_core.files import Replacement, dump_json, parse_json, read_object, short
from rlhf_core.models.config import check_criteria
from rlhf_core.models.families import family_of
from rlhf_core.models.gather import (
    check_whole,
    class_of,
    is_wrapped,
    local,
    on_rank_0,
    reshard,
    rows_of,
    whole_copy,
    whole_tensor,
)
from rlhf_core.models.hub import HEADS_FILE, has_scalar_head, stale_adapters
from rlhf_core.models.safetensors import DTYPES, dump_tensors, stored_tensors, stored_texts
from rlhf_core.ops.low_rank import low_rank_linear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_ALL = "all-linear"  # PEFT's name for every linear layer except the output head
MAX_PATTERN, MAX_SECONDS = 1000, 5.0
_MATCH = (
    "import json, re, sys; pattern, names = json.load(sys.stdin); "
    "print(json.dumps([name for name in names if re.fullmatch(pattern, name)]))"
)
_SCORE = "base_model.model.score."
# Fields of adapter_config.json that must have one of these values, and fields with any value.
# Other fields must be off (false, null or empty), because they ask for something that is left out.
_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
_FREE = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "modules_to_save",
    "base_model_name_or_path", "task_type", "revision", "peft_version", "auto_mapping",
    "inference_mode", "fan_in_fan_out", "loftq_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig:
    """Which adapters to add.

    Attributes:
        rank: Rank of B A. More rank means more weights to train.
        alpha: B A is scaled by alpha / rank.
        dropout: Dropout on the input of adapters, in train mode (the trainers' option `dropout`).
        target_modules: Hugging Face names or their ends ("q_proj", "mlp.c_proj"). "all-linear"
            means every linear layer of the blocks. Any other string is a regular expression for
            the whole name.
        rslora: Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023).
        base: Folder or hub name of the model that the adapters belong to.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = _ALL
    rslora: bool = False
    base: str | None = None

    def __post_init__(self):
        if type(self.rank) is not int or self.rank <= 0:
            raise ValueError(f"rank must be a whole number > 0, got {short(self.rank)}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {short(value)}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be > 0, got {short(self.alpha)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {short(self.dropout)}")
        targets = self.target_modules
        targets = targets if isinstance(targets, list | tuple | set | frozenset) else [targets]
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ValueError(f"target_modules must be names, got {short(self.target_modules)}")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora must be true or false, got {short(self.rslora)}")
        base = self.base
        if base is not None and (not isinstance(base, str) or not 0 < len(base) <= MAX_PATTERN):
            raise ValueError(f"base must be a folder or a name, got {short(base)}")

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module):
    """Maps x (..., in) to scale * B A dropout(x) (..., out). B starts at 0, A as in nn.Linear."""

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, like: Tensor):
        super().__init__()
        self.config = config
        # An adapter of 16-bit weights trains in float32.
        kind = dict(dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.config.dropout, self.training).to(self.lora_A.dtype)
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.config.scale

    def product(self) -> Tensor:
        """The change of W, (out, in)."""
        return self.lora_B @ self.lora_A * self.config.scale


class LoRALinear(nn.Linear):
    """A linear layer with adapters, each of which adds to its own rows of the output.

    The weight and the bias keep their names, so files of the base model still fit.
    """

    def __init__(self, linear: nn.Linear, sizes: dict[str, int]):
        """sizes: the Hugging Face modules that make up the rows, in order: their row counts."""
        features = linear.in_features, linear.out_features
        super().__init__(*features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.sizes = linear.weight, linear.bias, sizes
        self.adapters = nn.ModuleDict()

    def base(self, x: Tensor) -> Tensor:
        """The layer without its adapters."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        if self._one_op(x):
            adapters, scale, end = [], 1.0, 0
            for name, size in self.sizes.items():
                start, end = end, end + size
                if name in self.adapters:
                    own = self.adapters[name]
                    adapters.append((slice(start, end), own.lora_A, own.lora_B))
                    scale = own.config.scale
            return low_rank_linear(x, self.weight, self.bias, adapters, scale)
        y = self.base(x)
        if not self.adapters:
            return y
        parts = [
            part + self.adapters[name](x) if name in self.adapters else part
            for name, part in zip(self.sizes, y.split(list(self.sizes.values()), dim=-1))
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(y.dtype)

    def _one_op(self, x: Tensor) -> bool:
        """Whether `low_rank_linear` can compute the layer."""
        if not self.adapters or "base" in vars(self):  # `packed_for_decoding` has another base
            return False
        if not torch.compiler.is_compiling() and transform():
            return False
        adapters = list(self.adapters.values())
        if any(adapter.training and adapter.config.dropout for adapter in adapters):
            return False
        dtypes = {adapter.lora_A.dtype for adapter in adapters} | {self.weight.dtype}
        under_autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in dtypes
        return under_autocast or dtypes == {x.dtype}

    def product(self) -> Tensor:
        """The change of the weight, (out, in)."""
        parts = []
        for name, size in self.sizes.items():
            zeros = self.weight.new_zeros(size, self.in_features)
            parts.append(self.adapters[name].product() if name in self.adapters else zeros)
        return torch.cat(parts)


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Add adapters, which change no output yet, to a Transformer, RewardModel or ValueModel.

    Afterwards the adapters and a scalar head train. Nothing else does.

    Raises:
        ValueError: The model has adapters already or lacks a target; the message lists its modules.
    """
    if has_adapters(model):
        raise ValueError("the model already has adapters; call merge_adapters first")
    if is_wrapped(model):
        raise ValueError(f"this {class_of(model).__name__} is sharded. Add adapters before")
    targets = _targets(model, config.target_modules)
    for ours, linear, sizes in _linears(model):
        if targets & sizes.keys():
            layer = LoRALinear(linear, {_last(name): size for name, size in sizes.items()})
            for name in (name for name in sizes if name in targets):
                adapter = Adapter(layer.in_features, sizes[name], config, layer.weight)
                layer.adapters[_last(name)] = adapter
            model.set_submodule(ours, layer.train(model.training))
    freeze_base(model)


def freeze_base(model: nn.Module) -> None:
    """Let only adapters and a scalar head train."""
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, Adapter) or name == "score":
            module.requires_grad_(True)


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters, even if they are off."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def adapter_config(model: nn.Module) -> LoRAConfig:
    """Return the LoRAConfig of a model's adapters. Raises ValueError if it has none."""
    for module in model.modules():
        if isinstance(module, Adapter):
            return module.config
    raise ValueError("the model has no adapters")


@contextlib.contextmanager
def adapters_off(
    model: nn.Module, instead: Sequence[nn.ModuleDict] | None = None
) -> Iterator[None]:
    """Switch a model's adapters off in a `with` block, or replace them with `frozen_adapters`.

    Raises:
        ValueError: The model has no adapters, so it would be its own reference.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not layers:
        raise ValueError("the model has no adapters to switch off")
    own = [layer.adapters for layer in layers]
    try:
        for layer, adapters in zip(layers, instead or [nn.ModuleDict()] * len(layers)):
            layer.adapters = adapters
        yield
    finally:
        for layer, adapters in zip(layers, own):
            layer.adapters = adapters


def frozen_adapters(model: nn.Module) -> list[nn.ModuleDict] | None:
    """Return a copy of the adapters for `adapters_off`, or None if they have no effect yet."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    adapters = [adapter for layer in layers for adapter in layer.adapters.values()]
    if not any(whole_tensor(adapter.lora_B).any() for adapter in adapters):
        return None
    copies = [copy.deepcopy(whole_copy(layer.adapters)) for layer in layers]
    return [adapters.requires_grad_(False).eval() for adapters in copies]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Fold the adapters into the weights. The result is a plain model, equal up to rounding.

    All its weights train again.

    Raises:
        ValueError: The model has no adapters.
    """
    adapter_config(model)  # raises
    check_whole(model, "Merge adapters before you shard it, or save it and merge the files")
    for ours, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            layer.weight += layer.product()
            sizes = layer.in_features, layer.out_features
            linear = nn.Linear(*sizes, layer.bias is not None, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            model.set_submodule(ours, linear.train(layer.training))
    model.requires_grad_(True)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that `merge_adapters` would leave. The model stays as it is."""
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
    }
    return {
        name: x + layers[name].product() if name in layers else x
        for name, x in model.state_dict().items()
        if ".adapters." not in name
    }


def save_adapters(
    model: nn.Module,
    path: str | os.PathLike,
    heads: tuple[dict[str, Tensor], dict[str, str]] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapters and a scalar head in PEFT's layout; `heads` and `dtype` as for `hub.save`.

    The files are adapter_model.safetensors and adapter_config.json. A model in the folder stays. A
    failed save leaves the folder as it was. All ranks of a sharded model must call this.
    """
    config, path = adapter_config(model), Path(path)
    texts = {"of_steps": json.dumps(model.of_steps)} if hasattr(model, "of_steps") else {}
    if criteria := getattr(model, "criteria", None):
        texts["criteria"] = json.dumps(criteria)
    targets, scalar = config.target_modules, hasattr(model, "score")
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "use_rslora": config.rslora,
        "modules_to_save": ["score"] if scalar else None,
        "fan_in_fan_out": family_of(model.config).transposed,
        "bias": "none",
        "inference_mode": True,
    }
    reshard(model)
    tensors, (head_tensors, head_texts) = _tensors(model), heads or ({}, {})

    def write(pairs: Iterable[tuple[str, Tensor]]) -> None:
        whole = dict(pairs)
        with Replacement(path) as files:
            files.remove(HEADS_FILE, *stale_adapters(path))
            dump_json(files.open(CONFIG_FILE), fields)
            if heads is not None:
                part = {name: whole[name] for name in head_tensors}
                dump_tensors(files.open(HEADS_FILE), part, head_texts)
            part = {name: whole[name] for name in tensors}
            dump_tensors(files.open(WEIGHTS_FILE), part, texts, dtype)

    on_rank_0(tensors | head_tensors, write)


@torch.no_grad()
def load_adapters(model: nn.Module, path: str | os.PathLike) -> None:
    """Load adapters and a scalar head from a folder in PEFT's layout. Afterwards only they train.

    A failed call leaves the model as it was.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A config field is not supported, or a tensor is missing, unknown or of another
            shape; the message names it.
    """
    config, file = read_adapter_config(path), Path(path) / WEIGHTS_FILE
    if not file.is_file():
        pickle = file.with_suffix(".bin")
        reason = f"; {pickle.name} is a pickle, which can run code on loading: convert it first"
        raise FileNotFoundError(f"{file}: no such file{reason if pickle.is_file() else ''}")
    found = stored_tensors(file)
    try:
        targets = _targets(model, config.target_modules)
    except ValueError as error:
        raise ValueError(f"{Path(path) / CONFIG_FILE}: {error}") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in _head(model).items()}
    texts, criteria = stored_texts(file), None
    if hasattr(model, "set_criteria") and "criteria" in texts:
        try:
            check_criteria(criteria := parse_json(texts["criteria"]))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        shapes = {name: (len(criteria), *shape[1:]) for name, shape in shapes.items()}
    if shapes and f"{_SCORE}bias" in found:
        shapes[f"{_SCORE}bias"] = shapes[f"{_SCORE}weight"][:1]
    for _, linear, sizes in _linears(model):
        for name in (name for name in sizes if name in targets):
            a, b = _names(name)
            shapes |= {a: (config.rank, linear.in_features), b: (sizes[name], config.rank)}
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(f"{file}: no tensor {name!r}")
        if found[name].shape != shape or found[name].dtype not in DTYPES:
            got = f"{found[name].dtype} {found[name].shape}"
            needs = f"with r={config.rank} this model needs floats {shape}"
            raise ValueError(f"{file}: {name!r} is {got}; {needs}")
    unknown = sorted(found.keys() - shapes.keys())
    if unknown:
        raise ValueError(
            f"{file}: {len(unknown)} tensors that do not belong to this model, e.g. {unknown[0]!r}"
        )
    if criteria is not None:
        model.set_criteria(criteria)
    if f"{_SCORE}bias" in shapes:
        like, size = model.score.weight, model.score.out_features
        model.score.bias = nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device))
    add_adapters(model, config)
    for name, parameter in _tensors(model).items():
        found[name].copy_to(local(parameter), (rows_of(parameter),))
    if hasattr(model, "of_steps"):
        text = texts.get("of_steps", json.dumps(model.of_steps))
        if text not in ("true", "false"):
            raise ValueError(f"{file}: of_steps must be true or false, got {short(text)}")
        model.of_steps = text == "true"


def is_adapter(source: str | os.PathLike) -> bool:
    """Whether a folder holds adapters instead of a model."""
    return (Path(source) / CONFIG_FILE).is_file()


def is_reward_model(source: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds a reward model or the adapters of one."""
    if is_adapter(source):
        return read_object(Path(source) / CONFIG_FILE).get("task_type") == "SEQ_CLS"
    return has_scalar_head(source)


def read_adapter_config(path: str | os.PathLike) -> LoRAConfig:
    """Return the LoRAConfig of a folder's adapter_config.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A field is missing or not supported; the message names it.
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    fields = read_object(file)
    for name, value in fields.items():
        allowed = _ALLOWED.get(name)
        unknown = name not in _FREE and (value or type(value) in (int, float))
        if value not in allowed if allowed else unknown:
            only = f", only {allowed}" if allowed else ""
            raise ValueError(f"{file}: {name[:80]}={short(value)} is not supported{only}")
    # PEFT lists both names of the head, although a model has one of them.
    saved = fields.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{file}: modules_to_save must be a list of names, got {short(saved)}")
    others = set(saved) - {"score", "classifier"}
    if others:
        raise ValueError(
            f"{file}: modules_to_save with {short(min(others))} is not supported, only 'score'"
        )
    for name in ("peft_type", "r", "lora_alpha", "target_modules"):
        if name not in fields:
            raise ValueError(f"{file}: field {name!r} is missing")
    names = dict(rank="r", alpha="lora_alpha", dropout="lora_dropout", rslora="use_rslora")
    names |= dict(target_modules="target_modules", base="base_model_name_or_path")
    given = {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}
    try:
        return LoRAConfig(**given)
    except ValueError as error:  # which starts with our name of a field
        ours, _, rest = str(error).partition(" ")
        raise ValueError(f"{file}: {names.get(ours, ours)} {rest}") from None


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear, dict[str, int]]]:
    """The linear layers of the blocks: name, layer, row counts of its Hugging Face modules."""
    family = family_of(model.config)
    for ours, module in model.named_modules():
        if ours.startswith("trunk.blocks.") and isinstance(module, nn.Linear):
            yield ours, module, family.rows(ours, module.out_features, model.config)


def _targets(model: nn.Module, wanted: str | Sequence[str]) -> set[str]:
    """Full Hugging Face names of the modules that `target_modules` selects."""
    names = [name for _, _, sizes in _linears(model) for name in sizes]
    if wanted == _ALL:
        return set(names)
    if isinstance(wanted, str):
        found = {wanted: _matching(wanted, names)}
    else:
        found = {end: {name for name in names if f".{name}".endswith(f".{end}")} for end in wanted}
    for target, hits in found.items():
        if not hits:
            there = ", ".join(sorted(set(map(_last, names))))
            raise ValueError(
                f"target_modules: the model has no module {short(target)} to adapt, only {there}"
            )
    return set.union(*found.values())


def _matching(pattern: str, names: list[str]) -> set[str]:
    """The names that a regular expression matches as a whole.

    It runs in another process, because some patterns take forever and Python cannot stop them.
    """
    try:
        if len(pattern) > MAX_PATTERN:
            raise re.error(f"it has {len(pattern)} characters, more than {MAX_PATTERN}")
        re.compile(pattern)
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([pattern, names]),
            capture_output=True,
            text=True,
            timeout=MAX_SECONDS,
            check=True,
        )
    except (re.error, RecursionError, OverflowError) as error:
        reason = f"is not a regular expression: {error}"
    except subprocess.TimeoutExpired:
        reason = f"takes more than {MAX_SECONDS} s to match: simplify it"
    except subprocess.CalledProcessError as error:
        reason = f"cannot be matched: {error}"
    else:
        return set(json.loads(done.stdout))
    raise ValueError(f"target_modules {short(pattern)} {reason}")


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters and the scalar head by their names in PEFT's files."""
    tensors = _head(model)
    for _, layer, sizes in _linears(model):
        for name in sizes if isinstance(layer, LoRALinear) else ():
            if _last(name) in layer.adapters:
                adapter = layer.adapters[_last(name)]
                tensors |= zip(_names(name), (adapter.lora_A, adapter.lora_B))
    return tensors


def _head(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scalar head, if there is one, by the names in PEFT's files."""
    parameters = model.score.named_parameters() if hasattr(model, "score") else ()
    return {_SCORE + kind: parameter for kind, parameter in parameters}


def _names(module: str) -> list[str]:
    return [f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB"]


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
