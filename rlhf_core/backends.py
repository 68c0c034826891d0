"""Which implementation of an op runs: reference (plain PyTorch), cpp (csrc/, CPU) or triton (kernels/, GPU).

A backend is a module of launchers, the same names and signatures in `rlhf_core.cpp` and `rlhf_core.kernels`. The op
asks `resolve` for one, by name or by the tensor's device, and runs its reference where the answer is None.
Nothing is imported, probed or printed before the first question.
"""

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MODULES = {"reference": None, "cpp": "rlhf_core.cpp", "triton": "rlhf_core.kernels"}
_REMEDY = {
    "cpp": "install a C++17 compiler and reinstall rlhf_core",
    "triton": "install triton (Linux) and use CUDA tensors",
}


class Status(NamedTuple):
    name: str
    available: bool
    reason: str


def resolve(backend: str | None, x: Tensor) -> ModuleType | None:
    """The module whose launchers run an op on x; None means the op's reference.

    backend None takes `RLHF_CORE_BACKEND` where set, else triton for CUDA tensors and cpp for CPU tensors, falling back
    to the reference (also for float64). A backend asked for by name is used or raises: ValueError for an
    unknown or unusable one, TypeError for a dtype it does not take.
    """
    name = backend if backend is not None else os.environ.get("RLHF_CORE_BACKEND") or None
    if name is None:
        if x.dtype not in FUSED_DTYPES or x.device.type not in ("cpu", "cuda"):
            return None
        return _load("triton")[0] if x.device.type == "cuda" else _cpp_or_warn()
    if name == "reference":
        return None
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(_MODULES)}")
    module, reason = _load(name)
    if module is None:
        raise ValueError(f"backend {name!r} was asked for but is not available: {reason}; {_REMEDY[name]}")
    device = x.device.type
    if name == "cpp" and device != "cpu":
        raise ValueError(f"backend 'cpp' takes CPU tensors, got one on {x.device}; move it or leave backend=None")
    if name == "triton" and device != "cuda" and not (device == "cpu" and _interpreting()):
        raise ValueError(f"backend 'triton' takes CUDA tensors, got one on {x.device}; move it or leave backend=None")
    if x.dtype not in FUSED_DTYPES:
        raise TypeError(f"backend {name!r} takes float32, bfloat16 or float16, got {x.dtype}; use backend='reference'")
    return module


def status() -> list[Status]:
    """Name, availability and reason of every backend."""
    rows = [Status("reference", True, "plain PyTorch, any device and float dtype")]
    for name in list(_MODULES)[1:]:
        module, reason = _load(name)
        if module is None:
            rows.append(Status(name, False, f"{reason}; {_REMEDY[name]}"))
        elif name == "cpp":
            rows.append(Status(name, True, f"rlhf_core._C, {module.isa()} code, {torch.get_num_threads()} threads"))
        elif torch.cuda.is_available():
            rows.append(Status(name, True, f"on {torch.cuda.get_device_name()}"))
        elif _interpreting():
            rows.append(Status(name, True, "interpreted on CPU (TRITON_INTERPRET=1)"))
        else:
            rows.append(Status(name, False, "no CUDA device found"))
    return rows


def report() -> None:
    """Print the table of backends: name, available, reason."""
    for name, available, reason in status():
        print(f"{name:<10} {'yes' if available else 'no':<4} {reason}")


def debug() -> bool:
    """Whether RLHF_CORE_DEBUG=1 asks for the checks that synchronise with the device."""
    return os.environ.get("RLHF_CORE_DEBUG") == "1"


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(_MODULES[name]), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


@functools.cache
def _cpp_or_warn() -> ModuleType | None:
    module, reason = _load("cpp")
    if module is None:
        text = f"rlhf_core's C++ kernels are not installed ({reason}): CPU tensors take slower plain PyTorch; "
        warnings.warn(text + _REMEDY["cpp"], RuntimeWarning, stacklevel=2)
    return module


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
