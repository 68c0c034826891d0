"""An output head whose rows lie on the ranks of a process group (Shoeybi et al. 2019).

Each rank holds some consecutive rows of the weight (V, D), in the order of the ranks, and all of
the hidden states (N, D). It computes the logits of its own rows. What the softmax needs of the
other ranks is their maximum and their sums: a few numbers for each token. Every rank then gets the
log-prob of every target, and computes the same loss of it. The gradient of its rows is its own; the
gradient of the hidden states is a sum over the ranks.

Left out: the split of a model into such parts, and the trunk below the head.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from textwrap import shorten
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

BAD = -1.0  # instead of the number of rows, from a rank whose inputs are bad
_OTHER = (
    "the {} differ between rank 0 and rank {} of the group: give all its ranks the same batch, and "
    "the same dropout"
)


class Shard(NamedTuple):
    """The rows of the output head that this rank holds."""

    first: int  # the token id of the first row
    size: int  # V, the rows of all ranks
    widest: int  # the most rows of any rank
    group: dist.ProcessGroup | None = None  # None: this rank holds the whole head

    @classmethod
    def whole(cls, weight: Tensor) -> Shard:
        return cls(0, len(weight), len(weight))

    def largest(self, x: Tensor) -> Tensor:
        """The maximum of x over the ranks. A NaN may be lost."""
        return self._all_reduce(x, "MAX")

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks."""
        return self._all_reduce(x, "SUM")

    def _all_reduce(self, x: Tensor, operation: str) -> Tensor:
        if self.group is not None:
            x = x.contiguous()  # the strides may differ between ranks
            dist.all_reduce(x, getattr(dist.ReduceOp, operation), self.group)
        return x

    def sum_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype in which the ranks' parts of a gradient of hidden add up."""
        return hidden.dtype if self.group is None else torch.float32

    def share(self, hidden: Tensor) -> Tensor:
        """The hidden states; their gradient is the sum of the ranks' gradients."""
        return hidden if self.group is None else _Share.apply(hidden, self)

    def gather(self, logits: Tensor) -> Tensor:
        """Logits (..., V) of all ranks from those of this rank's rows."""
        if self.group is None:
            return logits
        after = self.size - self.first - logits.shape[-1]
        return _Total.apply(F.pad(logits, (self.first, after)), self)


class _Share(torch.autograd.Function):
    """Each rank uses its copy of x for a part of the result. The parts' gradients add up."""

    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return _Total.apply(dx, ctx.shard), None


class _Total(torch.autograd.Function):
    """The sum of the ranks' x. All ranks hold it, and use it for the same result."""

    @staticmethod
    def forward(ctx, x, shard):
        ctx.shard = shard
        return shard.total(x.clone())

    @staticmethod
    def backward(ctx, dx):
        return _Share.apply(dx, ctx.shard), None


def agree(
    group: dist.ProcessGroup, check: Callable[[], tuple], call: dict[str, Any]
) -> tuple[tuple, Shard]:
    """Return the checked inputs and this rank's shard, once all ranks make the same call.

    A rank that raised, or called another op, would leave the others waiting. One all-gather of five
    numbers finds that. On CUDA it waits for the device.

    Args:
        group: The ranks that hold the head.
        check: Returns the backend and the inputs (hidden, weight, bias, targets, mask,
            temperature), with one row per target, or raises.
        call: Options that must be equal on all ranks, by name.

    Raises:
        Exception: What `check` raised.
        ValueError: Another rank's check raised, or the ranks' calls differ.
    """
    check_group(group)
    inputs = error = None
    row = torch.full((5,), BAD, dtype=torch.float64)
    try:
        inputs = check()
        call = call | _traits(*inputs)
        _, (hidden, weight, _, targets, mask, _) = inputs
        row[2:] = _sketch(hidden.detach(), targets, mask)
        row[0], row[1] = len(weight), zlib.crc32(repr(call).encode())
    except Exception as e:  # of any type: the other ranks must learn of it
        error = e
    row = row.to("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group)
    lengths, digests, ids, sketches, norms = torch.stack(rows).T.tolist()
    if BAD in lengths:
        _raise_first(error, group)
    if len({*digests}) > 1:
        _raise_difference(call, group)
    for rank in range(1, len(rows)):
        if ids[rank] != ids[0]:
            raise ValueError(_OTHER.format("targets or the mask", rank))
        # NaN on all ranks is for the caller to find.
        nan = math.isnan(sketches[rank]), math.isnan(sketches[0])
        if nan[0] != nan[1] or abs(sketches[rank] - sketches[0]) > 0.02 * norms[0]:
            raise ValueError(_OTHER.format("hidden states", rank))
    first = int(sum(lengths[: dist.get_rank(group)]))
    return inputs, Shard(first, int(sum(lengths)), int(max(lengths)), group)


def _traits(impl, inputs):
    """What must be equal on all ranks, by name, apart from values."""
    hidden, weight, bias, _, _, temperature = inputs
    trained = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return {
        "backend": "reference" if impl is None else impl.__name__,
        "dtype": str(hidden.dtype),
        "width of hidden states": hidden.shape[1],
        "number of targets": len(hidden),
        "presence of a bias": bias is not None,
        "temperature": temperature if isinstance(temperature, float) else "a tensor",
        "requires_grad of (hidden, weight, bias)": trained if torch.is_grad_enabled() else None,
    }


def _sketch(hidden, targets, mask):
    """Three numbers (float64) that tell batches apart: of the targets, of hidden, and its scale.

    The hidden states of ranks may differ in their rounding, but not by a percent.
    """
    places = 1 + torch.arange(len(targets), device=targets.device) % 997
    columns = torch.arange(hidden.shape[1], device=hidden.device).cos().to(hidden.dtype)
    ids, products = (targets + 1) * places, (hidden @ columns).double() * places
    if mask is not None:
        ids, products = ids.where(mask, 0), products.where(mask, 0)
    return torch.stack((ids.sum().double(), products.sum(), products.norm()))


def _raise_first(error, group):
    """Raise this rank's error, or a ValueError with that of the first rank that has one."""
    messages = _all(None if error is None else str(error), group)
    if error is not None:
        raise error
    rank = next(rank for rank, message in enumerate(messages) if message is not None)
    raise ValueError(f"rank {rank} of the group failed: {messages[rank]}")


def _raise_difference(call, group):
    """Raise a ValueError that names the first option that ranks do not share."""
    first, *others = _all(call, group)
    rank, name = next(
        (rank, name)
        for rank, other in enumerate(others, start=1)
        for name in first
        if other.get(name) != first[name]
    )
    here, there = (shorten(str(x.get(name)), 60) for x in (first, others[rank - 1]))
    raise ValueError(
        f"{name} must be equal on all ranks of the group: it is {here} on rank 0, but {there} on "
        f"rank {rank}"
    )


def _all(x, group):
    """The objects of all ranks, in a list."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, x, group)
    return found


def check_group(group: Any) -> None:
    """Raise unless group is a process group of torch.distributed that this process belongs to."""
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "this process is not a member of the group: call the op only on the ranks passed to "
            "new_group"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}; "
            "a DeviceMesh has get_group()"
        )
