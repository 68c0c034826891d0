"""Validation at the public door: errors that name the argument and show what came."""

from typing import Any

import torch
from torch import Tensor

from rlhf_core import backends


def check_float(name: str, x: Any) -> None:
    """Raise TypeError unless x is a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {describe(x)}")


def check_mask(like: Tensor, mask: Any, name: str = "mask") -> None:
    """Raise unless mask is a boolean tensor of `like`'s shape on its device."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {describe(mask)}")
    check_alike(name, mask, "its values", like)


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have one shape and one device."""
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {other_name} {tuple(other.shape)}")
    if (
        not (x.is_cpu and other.is_cpu) and x.device != other.device
    ):  # a device object takes its time
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}")


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """All tensors in float64 where one is, else in float32."""
    dtypes = {x.dtype for x in tensors}
    if dtypes == {torch.float32}:
        return list(tensors)
    return [x.to(torch.float64 if torch.float64 in dtypes else torch.float32) for x in tensors]


def describe(x: Any) -> str:
    """A tensor's dtype, any other object's type."""
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def values_may_be_read(x: Tensor) -> bool:
    """Whether a check may look at x's values: on CPU, elsewhere under RLHF_CORE_DEBUG=1, never under torch.compile."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or backends.debug())
