"""The state of a run in one file, from which a new process goes on as if nothing had happened: on a CPU bit by bit.

It is a safetensors file: what trains, its optimizer state, the generators and counters are tensors, the rest is JSON in
the header. Of what does not train (the base of adapters, the reference, the reward model) and of the data there are
digests alone: the trainer is built as at first, of the original model, then `load` moves it to the checkpoint's step.
Left out: the state that a reward callable may keep, and generators of other libraries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlhf_core.models.lora import adapter_config, has_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors

if TYPE_CHECKING:
    from rlhf_core.trainers.common import Trainer

NAME, ERROR_NAME = "checkpoint", "checkpoint-error"
FREE = {
    "log_every",
    "eval_every",
    "save_every",
    "reference_logprobs",
}  # steps done do not depend on them
LENGTH = {
    "epochs",
    "max_steps",
}  # nor on these, but that a linear schedule falls over all steps of the run: a warning


def save(trainer: Trainer, name: str = NAME) -> Path:
    """Write the trainer's state to the file `name` in its `out`, which replaces the one before once it is whole."""
    path = trainer.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = {"steps_done": trainer.steps_done, "total_steps": trainer.total_steps}
    run = {**steps, "settings": _settings(trainer), "digests": trainer.digests}
    tensors = trainer.state()
    for name, parameter in _parameters(trainer).items():
        tensors |= {f"{kind}:{name}": x for kind, x in trainer.optimizer.state[parameter].items()}
        tensors[f"weight:{name}"] = parameter
    write_tensors(path, tensors, {"run": json.dumps(run)})
    return path


def load(trainer: Trainer) -> None:
    """Move a trainer that is built as at first to the state in its `out`.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of another run, saying in what they
    differ; the trainer is then as it was. Of the config, what is in FREE and LENGTH may change; a warning says where
    this run would have given the steps that are done other learning rates.
    """
    path = trainer.out / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to go on from")
    header, stored = read_tensors(path)
    if "run" not in header:
        raise ValueError(f"{path}: a safetensors file, but no checkpoint of a run")
    run, settings = json.loads(header["run"]), _settings(trainer)
    for name in run["settings"] | settings:
        then, now = run["settings"].get(name), settings.get(name)
        if then != now and name not in FREE | LENGTH:
            raise ValueError(f"{path}: of a run with {name}={then!r}, not {now!r}")
    for name, digest in trainer.digests.items():
        if digest != run["digests"][name]:
            raise ValueError(
                f"{path}: the {name} of that run were others; build the trainer of the same ones"
            )
    if trainer.total_steps < run["steps_done"]:
        raise ValueError(
            f"{path}: at step {run['steps_done']}, this run ends at {trainer.total_steps}"
        )
    parameters = _parameters(trainer)
    for name, parameter in parameters.items():
        if f"weight:{name}" not in stored or stored[f"weight:{name}"].shape != parameter.shape:
            raise ValueError(f"{path}: no {name!r} of shape {tuple(parameter.shape)}")
    trainer.load_state(stored)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[f"weight:{name}"])
    for key, value in stored.items():
        kind, _, name = key.partition(":")
        if name in parameters and kind != "weight":
            parameter = parameters[name]
            like = (
                parameter if value.shape == parameter.shape else value
            )  # moments lie as the weight does
            kept = torch.empty_like(like, dtype=value.dtype, device=parameter.device).copy_(value)
            trainer.optimizer.state[parameter][kind] = kept
    trainer.steps_done = run["steps_done"]
    falls = (
        trainer.config.lr_schedule == "linear" and trainer.steps_done > trainer.config.warmup_steps
    )
    if falls and trainer.total_steps != run.get("total_steps", trainer.total_steps):
        warnings.warn(
            f"{path}: its {trainer.steps_done} steps had the learning rates of a linear schedule over "
            f"{run['total_steps']} steps, those that follow have one over {trainer.total_steps}",
            stacklevel=3,
        )


def digests(trainer: Trainer) -> dict[str, str]:
    """SHA-256 of the examples, and of each weight of trainer, reference and reward model that no step moves."""
    data, weights = hashlib.sha256(), hashlib.sha256()
    for example in (*trainer.examples, *getattr(trainer, "ptx_examples", ())):
        data.update(repr(example).encode())
    held, reference, scorer = (
        list(vars(trainer).values()),
        *(getattr(trainer, x, None) for x in ("reference", "scorer")),
    )
    if reference is not None and not reference.moves:
        held += [reference.model, *(reference.adapters or ())]
    if scorer is not None:
        held += scorer.models
    trained = set(map(id, trainer.trained_parameters()))
    for parameter in nn.ModuleList(x for x in held if isinstance(x, nn.Module)).parameters():
        if id(parameter) not in trained:
            weights.update(
                parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            )
    return {"examples": data.hexdigest(), "frozen weights": weights.hexdigest()}


def _settings(trainer: Trainer) -> dict:
    """What the run depends on beside its tensors, as JSON gives it back."""
    settings = {"algorithm": trainer.algorithm, **asdict(trainer.config), **trainer.settings()}
    if has_adapters(trainer.model):
        lora = asdict(adapter_config(trainer.model))
        settings["lora"] = {
            name: value for name, value in lora.items() if name != "base"
        }  # a path, which may change
    return json.loads(json.dumps(settings))


def _parameters(trainer: Trainer) -> dict[str, nn.Parameter]:
    """What trains, each once, by the index of its model and its name there."""
    named = {}
    for i, model in enumerate(trainer.trained_models()):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                named.setdefault(parameter, f"{i}.{name}")
    return {name: parameter for parameter, name in named.items()}


@contextlib.contextmanager
def interrupts_wait(active: bool) -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C only turns what is yielded true, a second one interrupts; main thread only."""
    caught = []

    def note(signum, frame):
        caught.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    active = active and threading.current_thread() is threading.main_thread()
    active = active and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if active:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(caught)
    finally:
        if active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
