"""Slices and devices of batches: NamedTuples of tensors, some of them None."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from rlhf_core import distributed

Tensors = TypeVar("Tensors", bound=NamedTuple)


def rows(batch: Tensors, index: Any) -> Tensors:
    """The batch with every tensor indexed by `index` along its first dimension."""
    return type(batch)(*(x if x is None else x[index] for x in batch))


def micro_batches(size: int | None, *batches: Tensor | Tensors) -> Iterator[tuple]:
    """Slices of at most `size` rows of tensors, or of NamedTuples of tensors, side by side.

    They cover this rank's share of the rows.
    """
    first = batches[0] if isinstance(batches[0], Tensor) else batches[0][0]
    for part in distributed.shares(len(first), size):
        yield tuple(x[part] if isinstance(x, Tensor) else rows(x, part) for x in batches)


def to_device(batch: Tensors, device: torch.device) -> Tensors:
    """The batch with every tensor on `device`."""
    return type(batch)(*(x if x is None else x.to(device) for x in batch))
