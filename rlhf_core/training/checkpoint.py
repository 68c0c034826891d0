"""The state of a run, from which a new process continues bit by bit (on a CPU).

A checkpoint is a folder checkpoint-STEP: the model at that step, which other programs load, and the
trainer's state in one safetensors file. There, trained weights, optimiser state, generators and
counters are tensors; the rest is JSON in the header. Weights that do not train (the base of
adapters, the reference, the reward model) and the data are stored as digests only: build the
trainer from the original model, then `load` moves it to the checkpoint's step.

The header describes what the run depends on (settings, models, reward, tokenizer, data), and holds
a digest of the file's own tensors. `load` compares all of it before it changes anything.

Left out: state that a reward callable may keep, and generators of other libraries.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core import distributed
from rlhf_core.data import Tokenizer
from rlhf_core.files import remove_folder, remove_leftover_folders
from rlhf_core.models.gather import is_piece, piece_like, reshard, whole_tensor
from rlhf_core.models.lora import adapter_config, has_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors
from rlhf_core.models.shard_state import load_state as load_pieces
from rlhf_core.models.shard_state import save_state
from rlhf_core.training.run_file import masked

NAME, ERROR_NAME, BEST_NAME = "checkpoint", "checkpoint-error", "checkpoint-best"
STATE = "state.safetensors"  # the trainer's state in the folder of a checkpoint
PIECES = "pieces"  # beside it: weights and optimiser states of a sharded run
# Options that may differ when a run is resumed: finished steps do not depend on them ...
FREE = {"log_every", "eval_every", "save_every", "keep", "reference_logprobs"}
FREE |= {"keep_best", "sample_every", "print_samples", "shard", "mesh"}
# ... or only through the slope of a decaying schedule, which gives a warning.
LENGTH = {"epochs", "max_steps"}
MISSING = object()
# Entries in which a missing part is a difference.
DESCRIBED = {"digests", "models", "feedback", "tokenizer", "template_dates"}
DATED = (
    ". The chat template writes today's date into the examples: pass the date of the first run as "
    "--template-date YYYY-MM-DD, or as template_date of load_tokenizer"
)
OPTIONAL = {"generator_cuda"}  # its device may differ when a run is resumed


def find(out: Path) -> list[Path]:
    """The state files of the checkpoints in a run's folder, the newest last.

    An older version wrote a single file, which counts as the oldest.
    """
    steps = {int(path.name.removeprefix(f"{NAME}-")): path / STATE for path in _folders(out)}
    states = [steps[step] for step in sorted(steps) if steps[step].is_file()]
    return [out / NAME] * (out / NAME).is_file() + states


def in_pieces(out: Path) -> bool:
    """Whether the newest checkpoint in a run's folder holds the pieces of sharded weights."""
    return any(map(_has_pieces, find(out)[-1:]))


def _has_pieces(state: Path) -> bool:
    return state.name == STATE and (state.parent / PIECES).is_dir()


def remove(states: Sequence[Path]) -> None:
    """Remove the checkpoints of these state files."""
    for state in states:
        remove_folder(_place(state))


def begin(out: Path, steps_done: int) -> None:
    """Remove what earlier runs and killed processes left in the folder of a run that starts.

    Raises:
        FileExistsError: a folder with the name of a checkpoint is not one.
    """
    for path in (*_folders(out), out / BEST_NAME):
        check_ours(path)
    remove_leftover_folders(out)
    error = out / ERROR_NAME
    if error.is_file() or (error / STATE).is_file():
        remove_folder(error)
    if not steps_done:
        best = out / BEST_NAME / STATE
        remove([*find(out), *[best] * best.is_file()])


def check_ours(path: Path) -> None:
    """Raise FileExistsError if there is something else at the path of a checkpoint."""
    if path.exists() and not (path / STATE).is_file():
        raise FileExistsError(
            f"{path}: not a checkpoint of a run: {STATE} is missing. Move it, or choose another "
            "folder"
        )


def _place(state: Path) -> Path:
    """The path of a checkpoint, given that of its state file."""
    return state if state.name == NAME else state.parent


def _folders(out: Path) -> list[Path]:
    pattern = re.compile(rf"{NAME}-(0|[1-9]\d*)")
    return [path for path in out.glob(f"{NAME}-*") if pattern.fullmatch(path.name)]


def save(
    path: Path,
    run: dict[str, Any],
    state: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state file of a checkpoint to `path`, and pieces of weights beside it.

    Args:
        run: JSON values: steps_done, total_steps, settings (name to value), digests.
        state: generators and counters.
        parameters: trained weights by name.
    """
    tensors = dict(state)
    if any(map(is_piece, parameters.values())):
        save_state(path.parent / PIECES, parameters, optimizer)
        parameters = {}
    if distributed.rank():
        return
    for name, parameter in parameters.items():
        tensors |= {f"{kind}:{name}": x for kind, x in optimizer.state[parameter].items()}
        tensors[f"weight:{name}"] = parameter
    tensors = {name: x.detach().cpu() for name, x in tensors.items()}
    run = run | {"tensors": _digest_of_tensors(tensors)}
    write_tensors(path, tensors, {"run": json.dumps(run)})


def load(
    out: Path,
    run: dict[str, Any],
    state: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    load_state: Callable[[dict[str, Tensor]], None],
) -> int:
    """Read the newest checkpoint into parameters, optimiser and, through `load_state`, the trainer.

    Args:
        out: folder of the run.
        run: that of the trainer, as for `save`; only FREE and LENGTH settings may differ.
        state: that of the trainer; the checkpoint must hold the same names, shapes and dtypes.

    Returns:
        The number of steps done.

    Raises:
        FileNotFoundError: there is no checkpoint in `out`.
        ValueError: it is damaged or belongs to another run; the message names the difference, and
            the trainer is unchanged.
    """
    *older, path = find(out) or [None]
    if path is None:
        raise FileNotFoundError(f"{out}: there is no checkpoint to resume from")
    try:
        then, stored = _read(path)
    except ValueError as error:
        if not older:
            raise
        remedy = f"Or remove {_place(path)} to resume from {_place(older[-1]).name}"
        raise ValueError(f"{error}. {remedy}") from None
    _check_same_run(path, then, run)
    if _has_pieces(path):
        _check_tensors(path, stored, state, {})
        load_pieces(path.parent / PIECES, parameters, optimizer)
        load_state(stored)
        return then["steps_done"]
    _check_tensors(path, stored, state, parameters)
    load_state(stored)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(piece_like(stored[f"weight:{name}"], parameter))
    for key, value in stored.items():
        kind, _, name = key.partition(":")
        if name in parameters and kind != "weight":
            parameter = parameters[name]
            # Moments take the memory layout of their weight.
            like = parameter if value.shape == parameter.shape else value
            copy = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            optimizer.state[parameter][kind] = copy.copy_(piece_like(value, parameter))
    return then["steps_done"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of the run and the tensors in a state file; ValueError if it is damaged."""
    header, stored = read_tensors(path)
    then = _run_of(path, header)
    if then.get("tensors") not in (None, _digest_of_tensors(stored)):
        raise ValueError(
            f"{path}: damaged: its tensors have the digest {_digest_of_tensors(stored):.8}, but "
            f"{then['tensors']:.8} was written. Use a copy of the file, or start a new run"
        )
    return then, stored


def _run_of(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """The description of the run in a header, with every field of its type."""
    if "run" not in header:
        raise ValueError(f"{path}: this safetensors file is not a checkpoint of a run")
    try:
        run = json.loads(header["run"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: the run in its header is not JSON: {error}") from None
    if not isinstance(run, dict):
        raise ValueError(f"{path}: damaged: the run in its header is {run!r:.40}, not an object")
    needed = {"steps_done": int, "settings": dict, "digests": dict}
    for name, kind in (needed | {"total_steps": int, "tensors": str}).items():
        value = run.get(name)
        if type(value) is not kind and (name in needed or name in run):
            raise ValueError(
                f"{path}: damaged: {name} is {value!r:.40}, not of type {kind.__name__}"
            )
    steps, total = run["steps_done"], run.get("total_steps", run["steps_done"])
    if not 0 <= steps <= total:
        raise ValueError(f"{path}: damaged: steps_done is {steps!r:.40}, of {total!r:.40} steps")
    return run


def _check_tensors(
    path: Path,
    stored: dict[str, Tensor],
    state: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
) -> None:
    """Raise ValueError unless the tensors have the names, shapes and dtypes that the run needs."""
    expected: dict[str, Tensor] = dict(state)
    needed = state.keys() - OPTIONAL
    for name, parameter in parameters.items():
        # AdamW gives a weight its moments with its first gradient: all of them, or none.
        moments = {f"{kind}:{name}": parameter for kind in ("exp_avg", "exp_avg_sq")}
        moments[f"step:{name}"] = torch.zeros((), dtype=torch.float32)
        expected |= moments | {f"weight:{name}": parameter}
        needed |= {f"weight:{name}"} | (moments.keys() if moments.keys() & stored.keys() else set())
    for name in sorted(needed - stored.keys()):
        raise ValueError(f"{path}: tensor {name!r} is missing")
    for name, x in stored.items():
        if name not in expected:
            if name in OPTIONAL:
                continue
            raise ValueError(f"{path}: tensor {name!r} belongs to nothing in this run")
        if (x.dtype, x.shape) != (expected[name].dtype, expected[name].shape):
            raise ValueError(
                f"{path}: tensor {name!r} is {_form(x)}, this run needs {_form(expected[name])}"
            )
        if not _is_sound(name, x):
            raise ValueError(f"{path}: damaged: tensor {name!r} holds values that no run has")


def _is_sound(name: str, x: Tensor) -> bool:
    if name.startswith("exp_avg_sq:"):
        return bool((x >= 0).all())
    if name.startswith("step:"):
        return bool(x >= 1) and bool(x.isfinite())
    if x.dtype == torch.uint8:  # a generator, whose state is read without checks later
        try:
            torch.Generator("cpu" if len(x) > 16 else "cuda").set_state(x)
        except RuntimeError:
            return False
    return not x.is_floating_point() or bool(x.isfinite().all())


def _form(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _check_same_run(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    check_settings(
        path, then["settings"], now["settings"], FREE | LENGTH, "the checkpoint was written with"
    )
    for name, digest in now["digests"].items():
        old = then["digests"].get(name)
        if not isinstance(old, str):
            raise ValueError(f"{path}: damaged: the digest of its {name} is {old!r:.40}")
        if digest != old:
            dated = name == "examples" and now["settings"].get("template_dates")
            raise ValueError(
                f"{path}: the checkpoint was written by a run with different {name} (digest "
                f"{old:.8}, now {digest:.8}). Build the trainer from the same{DATED * bool(dated)}"
            )
    steps, total = then["steps_done"], now["total_steps"]
    if total < steps:
        raise ValueError(f"{path}: the checkpoint is at step {steps}, this run ends at {total}")
    settings = now["settings"]
    schedule = settings["lr_schedule"]
    decays = schedule != "constant" and steps > settings["warmup_steps"]
    if decays and total != then.get("total_steps", total):
        warnings.warn(
            f"{path}: the first {steps} steps used a {schedule} schedule over "
            f"{then['total_steps']} steps, the following ones use one over {total}",
            stacklevel=4,
        )


def check_settings(
    path: Path, then: dict[str, Any], now: dict[str, Any], free: set[str], what: str
) -> None:
    """Raise ValueError for the first setting that differs, by its path in nested settings.

    Settings in `free` may differ. Options and descriptions that an older version lacked are not
    compared.
    """
    for name, old, new in _differences(then, now):
        top = name.split(".")[0]
        newer = old is MISSING and name != "algorithm" and not (top in then and top in DESCRIBED)
        if top not in free and not newer:
            old = None if old is MISSING else old
            raise ValueError(
                f"{path}: {what} {name}={old!r:.100}, this run has {new!r:.100}. Resume with the "
                f"old value, or start a new run{DATED * (top == 'template_dates')}"
            )


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in old | new:
        a, b = old.get(name, MISSING), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name}", a, b


def description(
    models: Sequence[nn.Module], tokenizer: Tokenizer | None, scorer: Any = None
) -> dict[str, Any]:
    """What a run depends on apart from its options, weights and data, as settings in JSON.

    Args:
        models: all that take part; an ensemble counts as its models. Bare adapters are ignored.
        scorer: a `Scorer` or `JudgeScorer`.
    """
    parts = [part for model in models for part in getattr(model, "models", [model])]
    parts = list({id(part): part for part in parts if hasattr(part, "config")}.values())
    dates = getattr(tokenizer, "template_dates", None)
    settings = {
        "feedback": None if scorer is None else scorer.describe(),
        "models": {f"{i} {type(x).__name__}": _model_settings(x) for i, x in enumerate(parts)},
        "tokenizer": None if tokenizer is None else _tokenizer_digest(tokenizer),
        "template_dates": dates or None,
    }
    return masked(json.loads(json.dumps(settings)))


def _model_settings(model: nn.Module) -> dict[str, Any]:
    settings = asdict(model.config)
    del settings["family"]  # names in files
    if hasattr(model, "of_steps"):
        settings["of_steps"] = model.of_steps
    if criteria := getattr(model, "criteria", None):
        settings["criteria"] = criteria
    if has_adapters(model):
        settings["lora"] = asdict(adapter_config(model))
        del settings["lora"]["base"]  # a path, which may change
    return settings


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of the class and the files of a tokenizer, its chat template included."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        parts = [part for path in files for part in (path.name, path.read_bytes().hex())]
    return digest(type(tokenizer).__name__, *parts)


def _digest_of_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    return digest(*(y for name, x in sorted(tensors.items()) for y in (f"{name} {_form(x)}", x)))


def digest(*parts: nn.Module | Tensor | str) -> str:
    """SHA-256 (hex) over modules (all their tensors), tensors and strings, in order.

    Weights in pieces count as whole ones; all ranks must then call this, and each holds one whole
    tensor at a time.
    """
    return digest_of(parts)


def digest_of(parts: Iterable[nn.Module | Tensor | str]) -> str:
    """As `digest`, of parts that are made one after the other."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(part.encode())
            continue
        if isinstance(part, nn.Module):
            reshard(part)
        for x in part.state_dict().values() if isinstance(part, nn.Module) else [part]:
            x = whole_tensor(x).detach().cpu()
            total.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
