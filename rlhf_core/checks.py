"""Validation of public arguments. Errors name the argument and show the value."""

from typing import Any

import torch
from torch import Tensor

from rlhf_core import backends


def check_float(name: str, x: Any) -> None:
    """Raise TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {describe(x)}")


def check_mask(like: Tensor, mask: Any, name: str = "mask") -> None:
    """Raise unless mask is a boolean tensor with the shape and device of `like`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {describe(mask)}")
    check_alike(name, mask, "its values", like)


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have the same shape and device."""
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

    True on CPU, elsewhere only with RLHF_CORE_DEBUG=1; always False under torch.compile.
    """
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or backends.debug())
