"""Copies of a model that follow it at a distance: the target heads of Q-learning, the masks of NLPO.

Their weights are buffers, as they are nothing that trains, nor what a checkpoint takes to stay as it is: a trainer that
holds such a copy adds what `weights` gives to its `state`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def lagging_copy(model: nn.Module) -> nn.Module:
    """A copy; parameters that do not train are shared, not copied, so of adapters their base."""
    shared = {
        id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad
    }
    slow = copy.deepcopy(model, shared)
    for part in slow.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return slow


def weights(slow: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Those of the copy that follow the model's, by name."""
    return {
        name: slow.get_buffer(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def follow(slow: nn.Module, model: nn.Module, share: float = 1.0) -> None:
    """Move the copy's weights towards the model's by this share of the way (Polyak averaging)."""
    parameters = dict(model.named_parameters())
    for name, weight in weights(slow, model).items():
        weight.lerp_(parameters[name], share)
