"""Selection of the implementation of an op: reference, cpp (csrc/, CPU) or triton (kernels/, GPU).

A backend is a module of launchers; `rlhf_core.cpp` and `rlhf_core.kernels` have the same names and
signatures. An op calls `resolve` with a backend's name or None, and runs its reference if the
result is None. Nothing is imported, probed or printed before the first call.
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
# Read only once: a lookup costs a tenth of a small op.
DEFAULT = os.environ.get("RLHF_CORE_BACKEND") or None

_MODULES = {"reference": None, "cpp": "rlhf_core.cpp", "triton": "rlhf_core.kernels"}
_REMEDY = {
    "cpp": "install a C++17 compiler and reinstall rlhf_core",
    "triton": "install triton (Linux) and use CUDA tensors",
}


class Status(NamedTuple):
    name: str
    available: bool
    reason: str


def resolve(backend: str | None, x: Tensor) -> ModuleType | type | None:
    """The launchers that run an op on x; None for the op's reference.

    Args:
        backend: a name, or None for the value of `RLHF_CORE_BACKEND` at import. If that is not set
            either, CUDA tensors use triton and CPU tensors cpp; if these are missing, and for
            float64, the reference is used.

    Raises:
        ValueError: the named backend is unknown or cannot run here.
        TypeError: it does not support x's dtype.
    """
    name = _choose(backend, x.dtype, "cpu" if x.is_cpu else x.device.type)
    if name == "reference":
        return None
    if torch.compiler.is_compiling():
        from rlhf_core import compiled

        return compiled.launchers(_MODULES[name])
    return _load(name)[0]


def _choose(backend: str | None, dtype: torch.dtype, device: str) -> str:
    name = DEFAULT if backend is None else backend
    if name is None:
        if dtype not in FUSED_DTYPES or device not in ("cpu", "cuda"):
            return "reference"
        name = "triton" if device == "cuda" else "cpp"
        if _load(name)[0] is not None:
            return name
        if name == "cpp":
            _warn_without_cpp()
        return "reference"
    if name == "reference":
        return name
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(_MODULES)}")
    module, reason = _load(name)
    if module is None:
        raise ValueError(
            f"backend {name!r} was asked for but is not available: {reason}; {_REMEDY[name]}"
        )
    if name == "cpp" and device != "cpu":
        raise ValueError(
            f"backend 'cpp' needs CPU tensors, got one on {device}: move it or use backend=None"
        )
    if name == "triton" and device != "cuda" and not (device == "cpu" and _interpreting()):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, got one on {device}: move it or use backend=None"
        )
    if dtype not in FUSED_DTYPES:
        raise TypeError(
            f"backend {name!r} needs float32, bfloat16 or float16, got {dtype}: "
            "use backend='reference'"
        )
    return name


# Like torch.compiler.assume_constant_result, which takes a second to import.
_choose._dynamo_marked_constant = True


def status() -> list[Status]:
    """Name, availability and reason of every backend."""
    return [_status(name) for name in _MODULES]


def of_device(device: str) -> Status:
    """The backend that `resolve` picks for float32 tensors on a type of device, such as "cpu"."""
    return _status(_choose(None, torch.float32, device))


def _status(name: str) -> Status:
    if name == "reference":
        return Status(name, True, "plain PyTorch, any device and float dtype")
    module, reason = _load(name)
    if module is None:
        return Status(name, False, f"{reason}; {_REMEDY[name]}")
    if name == "cpp":
        threads = torch.get_num_threads()
        return Status(name, True, f"rlhf_core._C, {module.isa()} code, {threads} threads")
    if torch.cuda.is_available():
        return Status(name, True, f"on {torch.cuda.get_device_name()}")
    if _interpreting():
        return Status(name, True, "interpreted on CPU (TRITON_INTERPRET=1)")
    return Status(name, False, "no CUDA device found")


@functools.cache
def multiplies_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32 on a type of device."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def report() -> None:
    """Print a table of the backends: name, available, reason."""
    for name, available, reason in status():
        print(f"{name:<10} {'yes' if available else 'no':<4} {reason}")


def debug() -> bool:
    """Whether RLHF_CORE_DEBUG=1 enables checks that synchronise with the device."""
    return os.environ.get("RLHF_CORE_DEBUG") == "1"


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(_MODULES[name]), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


@functools.cache
def _warn_without_cpp() -> None:
    text = f"rlhf_core's C++ kernels are not installed ({_load('cpp')[1]}), so CPU ops run slower: "
    warnings.warn(text + _REMEDY["cpp"], RuntimeWarning, stacklevel=2)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
