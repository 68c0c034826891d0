"""Named means that add up exactly over unequal micro-batches."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from rlhf_core import distributed


class Metrics:
    """Means kept as sums and counts until they are read. An idle rank adds nothing."""

    def __init__(self):
        self._sums: dict[str, list] = {}
        self._whole: set[str] = set()  # names of values that come in parts, see `add_part`

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Add the values under a True mask of the same shape, or all values."""
        values = values.detach().float()
        count = values.numel() if mask is None else mask.sum()
        total = values.sum() if mask is None else values.masked_fill(~mask, 0).sum()
        self._add(name, total, count)

    def add_mean(self, name: str, mean: Tensor, count: Tensor | int) -> None:
        """Add `count` values whose mean is known."""
        self._add(name, mean.detach() * count, count)

    def add_part(self, name: str, part: Tensor) -> None:
        """Add a part of one value, such as a micro-batch's part of a minibatch's loss."""
        if not distributed.idle():
            self._whole.add(name)
            self._sums.setdefault(name, [0, 1])[0] += part.detach()

    def _add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        if distributed.idle():
            return
        entry = self._sums.setdefault(name, [0, 0])
        entry[0] += total
        entry[1] += count

    def merge(self, other: Metrics) -> None:
        """Add everything that `other` holds."""
        for name, (total, count) in other._sums.items():
            self._add(name, total, count)

    def over_ranks(self) -> Metrics:
        """What all ranks have added, each of its own rows; the same on every rank."""
        if distributed.size() == 1:
            return self
        own = {
            name: (float(x), float(n), name in self._whole) for name, (x, n) in self._sums.items()
        }
        merged = Metrics()
        for sums in distributed.gather_objects(own):
            for name, (total, count, whole) in sums.items():
                if whole:
                    merged._sums.setdefault(name, [0, count])[0] += total
                else:
                    merged._add(name, total, count)
        return merged

    def means(self) -> dict[str, float]:
        """The means; a name whose masks were all False is left out."""
        return {n: float(total) / float(count) for n, (total, count) in self._sums.items() if count}


def peak_memory(device: torch.device) -> float:
    """Peak of the process so far in MB: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
