"""The state of a run in one file, from which a new process continues bit by bit (on a CPU).

A checkpoint is a safetensors file. Trained weights, optimiser state, generators and counters are
tensors; the rest is JSON in the header. Weights that do not train (the base of adapters, the
reference, the reward model) and the data are stored as digests only: build the trainer from the
original model, then `load` moves it to the checkpoint's step.

Left out: state that a reward callable may keep, and generators of other libraries.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.models.safetensors import read_tensors, write_tensors

NAME, ERROR_NAME = "checkpoint", "checkpoint-error"
# Options that may differ when a run is resumed: finished steps do not depend on them ...
FREE = {"log_every", "eval_every", "save_every", "reference_logprobs"}
# ... or only through the slope of a linear schedule, which gives a warning.
LENGTH = {"epochs", "max_steps"}


def save(
    path: Path,
    run: dict[str, Any],
    state: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint; it replaces the file at `path` once it is complete.

    Args:
        run: JSON values: steps_done, total_steps, settings (name to value), digests.
        state: generators and counters.
        parameters: trained weights by name.
    """
    tensors = dict(state)
    for name, parameter in parameters.items():
        tensors |= {f"{kind}:{name}": x for kind, x in optimizer.state[parameter].items()}
        tensors[f"weight:{name}"] = parameter
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"run": json.dumps(run)})


def load(
    path: Path,
    run: dict[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    load_state: Callable[[dict[str, Tensor]], None],
) -> int:
    """Read a checkpoint into parameters, optimiser and, through `load_state`, the trainer's state.

    Args:
        run: that of the trainer, as for `save`; only FREE and LENGTH settings may differ.

    Returns:
        The number of steps done.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: it is damaged or belongs to another run; the message names the difference, and
            the trainer is unchanged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no checkpoint to resume from")
    header, stored = read_tensors(path)
    if "run" not in header:
        raise ValueError(f"{path}: this safetensors file is not a checkpoint of a run")
    then = json.loads(header["run"])
    _check_same_run(path, then, run)
    for name, parameter in parameters.items():
        if f"weight:{name}" not in stored or stored[f"weight:{name}"].shape != parameter.shape:
            raise ValueError(f"{path}: no weight {name!r} of shape {tuple(parameter.shape)}")
    load_state(stored)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[f"weight:{name}"])
    for key, value in stored.items():
        kind, _, name = key.partition(":")
        if name in parameters and kind != "weight":
            parameter = parameters[name]
            # Moments take the memory layout of their weight.
            like = parameter if value.shape == parameter.shape else value
            copy = torch.empty_like(like, dtype=value.dtype, device=parameter.device).copy_(value)
            optimizer.state[parameter][kind] = copy
    return then["steps_done"]


def _check_same_run(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    for name in then["settings"] | now["settings"]:
        old, new = then["settings"].get(name), now["settings"].get(name)
        if old != new and name not in FREE | LENGTH:
            raise ValueError(
                f"{path}: the checkpoint was written with {name}={old!r}, this run has {new!r}. "
                "Resume with the old value, or start a new run"
            )
    for name, digest in now["digests"].items():
        if digest != then["digests"][name]:
            raise ValueError(
                f"{path}: the checkpoint was written by a run with different {name} (digest "
                f"{then['digests'][name]:.8}, now {digest:.8}). Build the trainer from the same"
            )
    steps, total = then["steps_done"], now["total_steps"]
    if total < steps:
        raise ValueError(f"{path}: the checkpoint is at step {steps}, this run ends at {total}")
    settings = now["settings"]
    decays = settings["lr_schedule"] == "linear" and steps > settings["warmup_steps"]
    if decays and total != then.get("total_steps", total):
        warnings.warn(
            f"{path}: the first {steps} steps used a linear schedule over {then['total_steps']} "
            f"steps, the following ones use one over {total}",
            stacklevel=4,
        )


def digest(*parts: nn.Module | Tensor | str) -> str:
    """SHA-256 (hex) over modules (all their tensors), tensors and strings, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(part.encode())
            continue
        for x in part.state_dict().values() if isinstance(part, nn.Module) else [part]:
            total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


@contextlib.contextmanager
def delayed_interrupt(active: bool) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function return True; the second interrupts.

    It works in the main thread only, and leaves other signal handlers alone.
    """
    caught = []

    def note(signum, frame):
        caught.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    active = active and threading.current_thread() is threading.main_thread()
    active = active and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if active:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(caught)
    finally:
        if active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
