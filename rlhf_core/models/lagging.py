"""Copies of a model that follow it slowly: the target heads of Q-learning, the masks of NLPO.

Their weights are buffers, because they do not train, but change. A checkpoint needs them: a trainer
that has such a copy adds its `weights` to its `state`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rlhf_core.models.gather import is_sharded, whole_copy, whole_tensor


def lagging_copy(model: nn.Module) -> nn.Module:
    """Return a copy. It shares parameters that do not train, such as the base of adapters.

    The copy of a sharded model shares none: it is whole on every rank.
    """
    shared = {id(x): x for x in model.parameters() if not x.requires_grad}
    slow = whole_copy(model) if is_sharded(model) else copy.deepcopy(model, shared)
    for part in slow.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return slow


def weights(slow: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the copy that follow the model, by name."""
    return {name: slow.get_buffer(name) for name, x in model.named_parameters() if x.requires_grad}


@torch.no_grad()
def follow(slow: nn.Module, model: nn.Module, share: float = 1.0) -> None:
    """Move the copy's weights towards the model's by a share of 0 to 1 (Polyak averaging)."""
    parameters = dict(model.named_parameters())
    for name, weight in weights(slow, model).items():
        weight.lerp_(whole_tensor(parameters[name]), share)
