"""Lower-precision copies of frozen weights, which autocast would make anew in every forward pass.

Autocast keeps its copies of weights that train until its block ends, and copies frozen ones at each
use. With adapters nearly all weights are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rlhf_core.models.transformer import TrunkModel


class FrozenCopies:
    """Copies of the frozen matrices of models, each made at its first use and whenever it changed.

    They take the bytes that autograd would keep of autocast's copies, for as long as this object.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._found: dict[Tensor, tuple[int, Tensor]] = {}  # by weight: its version and copy

    def _copy(self, weight: Tensor) -> Tensor:
        version, copy = self._found.get(weight, (None, weight))
        if version != weight._version:
            copy = weight.detach().to(self.dtype)
            self._found[weight] = weight._version, copy
        return copy

    @contextlib.contextmanager
    def used_by(self, model: TrunkModel) -> Iterator[None]:
        """Let the trunk's linear layers and the output head of a whole model read the copies.

        What they compute under autocast stays the same to the last bit. The head's own weight,
        which not only products read, and scalar heads, which compute in float32, stay as they are.
        """
        head = getattr(model, "head_weight", None)
        linears = [module for module in model.trunk.modules() if isinstance(module, nn.Linear)]
        replaced = [(linear, linear.weight) for linear in linears if self._replaces(linear.weight)]
        try:
            for linear, weight in replaced:
                linear._parameters["weight"] = self._copy(weight)
            if head is not None and self._replaces(head):
                model.head_copy = self._copy(head)
            yield
        finally:
            for linear, weight in replaced:
                linear._parameters["weight"] = weight
            if head is not None:
                model.head_copy = None

    def _replaces(self, weight: Tensor) -> bool:
        whole = type(weight) is nn.Parameter  # not a piece on this rank
        return whole and not weight.requires_grad and weight.dtype == torch.float32
