"""Validation of public arguments. Errors name the argument and show the value.

A fused kernel reads a tensor's memory behind torch's back. `resolve` therefore gives it plain
tensors only, outside of torch's tracing and function transforms; the rest goes to the reference.
"""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlhf_core import backends

_PLAIN = {Tensor, torch.nn.Parameter}
_DENSE = torch.strided
_FOREIGN = {  # class of transformers or peft -> how to get ours
    "PreTrainedModel": "pass {}.from_transformers(model)",
    "PeftModel": "use its save_pretrained(folder), then {}.from_pretrained(folder)",
    "PreTrainedTokenizerBase": "use its save_pretrained(folder), then "
    "rlhf_core.load_tokenizer(folder)",
}
_NUMBERS = {float, int, bool, type(None)}
_forward_ad = torch.autograd.forward_ad
_in_torch_func = torch._C._are_functorch_transforms_active
_in_jit_trace = torch._C._is_tracing
_num_modes = torch._C._len_torch_dispatch_stack


def resolve(backend: str | None, *tensors: Any) -> ModuleType | type | None:
    """`backends.resolve` for an op on these float tensors (or numbers, or None).

    The first one's device and dtype decide. Tensor subclasses, tensors with the negative bit, and
    all tensors within torch.func, forward-mode AD, torch.jit.trace or make_fx go to the reference.

    Raises:
        TypeError: the named backend cannot read a tensor.
        ValueError or TypeError: those of `backends.resolve`.
    """
    impl = backends.resolve(backend, tensors[0])
    if type(impl) is not ModuleType:  # the reference, or operators, which torch sees
        return impl
    found = transform()
    for x in tensors:
        kind = type(x)
        if kind in _PLAIN:
            if x.is_neg():
                found = "a negative view (see resolve_neg)"
        elif kind not in _NUMBERS and isinstance(x, Tensor):  # isinstance is slow on numbers
            found = f"a {kind.__name__}"
    if not found:
        return impl
    if backend is None and backends.DEFAULT is None:
        return None
    raise TypeError(
        f"backend {backend or backends.DEFAULT!r} reads plain tensors, got {found}: "
        "use backend='reference'"
    )


def is_plain(x: Tensor) -> bool:
    """Whether a kernel finds x's values in its memory."""
    return type(x) in _PLAIN and not x.is_neg()


def transform() -> str | None:
    """The transform or trace of torch that the calling code runs in, or None."""
    if _in_torch_func():
        return "tensors in a torch.func transform"
    if _forward_ad._current_level >= 0:
        return "tensors in forward-mode AD"
    if _in_jit_trace():
        return "tensors in torch.jit.trace"
    if _num_modes():
        modes = torch._C._TorchDispatchModeKey
        if any(torch._C._get_dispatch_mode(mode) for mode in (modes.PROXY, modes.FAKE)):
            return "tensors in make_fx or FakeTensorMode"
    return None


def check_float(name: str, x: Any) -> None:
    """Raise TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {describe(x)}")
    check_dense(name, x)


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError if x is sparse or nested."""
    if x.is_nested or x.layout is not _DENSE:
        kind = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be dense, got {kind}: convert it")


def check_mask(like: Tensor, mask: Any, name: str = "mask") -> None:
    """Raise unless mask is a boolean tensor with the shape and device of `like`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {describe(mask)}")
    check_dense(name, mask)
    check_alike(name, mask, "its values", like)


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have the same shape and device."""
    if x is other:
        return
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {other_name} {tuple(other.shape)}")
    # Test is_cpu first: reading .device is slow.
    if not (x.is_cpu and other.is_cpu) and x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}")


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """All tensors as float64 if any of them is, otherwise as float32."""
    dtypes = {x.dtype for x in tensors}
    if dtypes == {torch.float32}:
        return list(tensors)
    return [x.to(torch.float64 if torch.float64 in dtypes else torch.float32) for x in tensors]


def describe(x: Any) -> str:
    """The dtype of a tensor, or the type of any other object."""
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def values_may_be_read(x: Tensor) -> bool:
    """Whether a check may read x's values, which synchronises with a device unless x is on CPU.

    True on CPU, elsewhere only with RLHF_CORE_DEBUG=1; always False where torch traces the code,
    and for tensor subclasses.
    """
    if torch.compiler.is_compiling() or transform() or not is_plain(x):
        return False
    return x.device.type == "cpu" or backends.debug()


def check_own(*things: Any) -> None:
    """Raise TypeError for a model or tokenizer of transformers or peft, with what to call."""
    for thing in things:
        if fault := _foreign(type(thing)):
            raise TypeError(fault)


@functools.lru_cache(maxsize=256)  # encoding asks for every row
def _foreign(kind: type) -> str | None:
    for base in kind.__mro__:
        library, name = base.__module__.split(".")[0], kind.__name__
        if library in ("transformers", "peft") and base.__name__ in _FOREIGN:
            ours = "RewardModel" if name.endswith("SequenceClassification") else "Transformer"
            return f"{name} is a class of {library}; {_FOREIGN[base.__name__].format(ours)}"
    return None
