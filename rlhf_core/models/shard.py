"""Weights, gradients and optimiser states in pieces: each rank holds some rows of every tensor.

`shard` applies FSDP2 (Zhao et al. 2023; `torch.distributed.fsdp.fully_shard`). The weights of a
block are gathered for its forward and its backward pass. Those outside the blocks stay gathered
from a forward pass to the backward pass, because the head reads them in between. Gradients are
summed over ranks, not averaged: a rank computes its part of one loss, whose denominators count all
ranks.

Left out: tensor and pipeline parallelism, and buffers. Every rank holds the copies that follow a
model slowly (lagging.py) as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from rlhf_core import distributed
from rlhf_core.models.gather import class_of, is_piece, is_sharded, is_wrapped, reshard, whole
from rlhf_core.models.heads import EnsembleReward
from rlhf_core.models.transformer import Trunk, TrunkModel

__all__ = ["is_sharded", "mesh_of", "reshard", "shard", "whole"]

_owners: WeakKeyDictionary[Trunk, ref[TrunkModel]] = WeakKeyDictionary()  # of sharded trunks


def mesh_of(copies: int = 1) -> DeviceMesh:
    """Return the mesh (copies, ranks / copies) of all ranks, on GPUs if they exchange data there.

    With as many copies as ranks, each rank has a copy: data parallelism.

    Raises:
        ValueError: The number of ranks is not a multiple of `copies`.
    """
    ranks = dist.get_world_size()
    if copies < 1 or ranks % copies:
        raise ValueError(f"{ranks} ranks cannot hold {copies} copies of a model; choose a divisor")
    return _mesh((copies, ranks // copies), dist.group.WORLD)


@cache
def _mesh(shape: tuple[int, int], group: dist.ProcessGroup) -> DeviceMesh:
    """group: the default one. Its ranks make new groups for every mesh, so they share one."""
    device = "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the weights of a model into pieces, in place. Build its optimiser afterwards.

    Weights that were read in pieces stay as they are. Sample from a sharded model `with
    whole(model) as plain`. Add adapters, merge them, add tokens and freeze layers before.

    Args:
        model: Transformer, RewardModel, EnsembleReward, ValueModel or ILQLModel. If a ValueModel
            shares the trunk of another model, shard that one first.
        mesh: All ranks, as `mesh_of` returns it.

    Raises:
        ValueError: The model is sharded already, or the mesh leaves out a rank, or differs from
            that of weights that were read in pieces.
    """
    if mesh.mesh_dim_names != ("replicate", "shard") or mesh.size() != dist.get_world_size():
        raise ValueError(
            f"the mesh is {tuple(mesh.shape)} with the names {mesh.mesh_dim_names}, and there are "
            f"{dist.get_world_size()} ranks. Use mesh_of, which makes a mesh of all ranks"
        )
    if isinstance(model, EnsembleReward):
        for part in model.models:
            shard(part, mesh)
        return
    if not isinstance(model, TrunkModel):
        raise ValueError(f"{type(model).__name__} cannot be sharded, only models with a trunk")
    owner, roots = _owners.get(model.trunk, lambda: None)(), _uncut(model)
    if not roots:
        raise ValueError(f"this {class_of(model).__name__} is sharded already")
    pieces = [x for root in roots for x in _take_pieces(root, mesh)]
    if owner is not None:
        model.hidden_states = owner.hidden_states  # which gathers what it needs
    else:
        _owners[model.trunk] = ref(model)
        for block in model.trunk.blocks:
            fully_shard(block, mesh=mesh)
    for root in roots:
        fully_shard(root, mesh=mesh)
        for part in root.modules():
            if isinstance(part, FSDPModule):  # the settings are not recursive
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
    for part, name, piece in pieces:
        setattr(part, name, piece)
    if owner is None:
        register_fsdp_forward_method(model, "hidden_states")


def shard_all(models: Iterable[nn.Module], copies: int | None) -> None:
    """Shard the models of a run that are not yet sharded; ranks then keep step.

    Args:
        models: those without a trunk are ignored.
        copies: as for `mesh_of`. None, or a single process: nothing happens.
    """
    if copies is None or distributed.size() == 1:
        return
    mesh = mesh_of(copies)
    for model in dict.fromkeys(models):
        for part in model.models if isinstance(model, EnsembleReward) else [model]:
            if isinstance(part, TrunkModel) and _uncut(part):
                shard(part, mesh)
    distributed.set_lockstep(True)


def _uncut(model: TrunkModel) -> list[nn.Module]:
    """What is left to be cut: the model, or what it adds to a sharded model's trunk, or nothing."""
    owner = _owners.get(model.trunk, lambda: None)()
    if owner is None:
        return [model]
    if owner is model:
        return []
    parts = [part for part in model.children() if part is not model.trunk]
    return [] if any(map(is_wrapped, parts)) else parts


def _take_pieces(root: nn.Module, mesh: DeviceMesh) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Replace pieces by whole tensors without memory, which FSDP2 cuts; return them with places."""
    taken = []
    for part in root.modules():
        for name, x in list(part.named_parameters(recurse=False)):
            if not is_piece(x):
                continue
            if x.device_mesh != mesh:
                raise ValueError(
                    f"the weights were read in pieces on a mesh of {tuple(x.device_mesh.shape)}, "
                    f"this one is {tuple(mesh.shape)}. Use the same mesh"
                )
            taken.append((part, name, x))
            empty = torch.empty(x.shape, dtype=x.dtype, device="meta")
            setattr(part, name, nn.Parameter(empty, x.requires_grad))
    return taken
