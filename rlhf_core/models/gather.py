"""Whole tensors from the pieces of them that ranks hold, and pieces of whole tensors.

A weight in pieces is a DTensor. `from_pretrained(mesh=...)` makes such a model; `shard` (shard.py)
makes it compute, and cuts whole models. Every rank has to call the functions that make a tensor
whole, because they exchange data. A model of whole weights passes through unchanged, and no process
group is needed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_core import distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Module = TypeVar("Module", bound=nn.Module)
_NEXT, _DONE = "next", "done"  # what rank 0 says to the others; anything else is an error


def is_piece(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds some rows."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # takes a while to import

    return isinstance(tensor, DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of the model, or of a part of it, are in pieces."""
    return is_wrapped(model) or any(map(is_piece, model.parameters()))


def is_wrapped(model: nn.Module) -> bool:
    """Whether `shard` has made the model, or a part of it, compute with weights in pieces."""
    return next(wrapped_parts(model), None) is not None


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module without what `fully_shard` puts in front of it."""
    kind = type(module)
    return kind.__mro__[2] if kind.__mro__[1].__name__ == "FSDPModule" else kind


def check_whole(model: nn.Module, action: str) -> None:
    """Raise ValueError if the model is sharded. action: What it then cannot do, as "Merge ..."."""
    if is_sharded(model):
        raise ValueError(f"the weights of this {class_of(model).__name__} are sharded. {action}")


def reshard(*models: nn.Module) -> None:
    """Free the weights that a forward pass has gathered; `parameters()` are then the pieces.

    A backward pass does so itself. Without one the head and the embedding stay whole, and would
    be out of date after a step of the optimiser.
    """
    for model in models:
        for part in wrapped_parts(model):
            part.reshard()


def wrapped_parts(model: nn.Module) -> Iterator:
    """The modules whose weights FSDP2 gathers for a forward pass: blocks, and the model itself."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (part for part in model.modules() if isinstance(part, FSDPModule))


def rows_of(tensor: Tensor) -> slice:
    """The rows of the whole tensor that this rank holds; all of a tensor that is not a piece."""
    return own_rows(len(tensor), tensor.device_mesh if is_piece(tensor) else None)


def own_rows(n: int, mesh: DeviceMesh | None) -> slice:
    """The rows, of n, that this rank holds of a tensor in pieces on the mesh; all without one."""
    if mesh is None:
        return slice(0, n)
    return _rows(n, mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))


def _rows(n: int, pieces: int, place: int) -> slice:
    """As torch.chunk cuts n rows. The last pieces can be short or empty."""
    size = -(-n // pieces)
    return slice(min(place * size, n), min(place * size + size, n))


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a piece on every rank, without gradient; any other tensor as it is."""
    return tensor.detach().full_tensor() if is_piece(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a piece, which they share memory with; any other tensor as it is."""
    return tensor.to_local() if is_piece(tensor) else tensor


def piece_of(rows: Tensor, shape: torch.Size, mesh: DeviceMesh) -> Tensor:
    """The tensor of this shape in pieces on the mesh, given the `own_rows` of this rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    places, stride = (Replicate(), Shard(0)), torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, places, run_check=False, shape=shape, stride=stride)


def piece_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of a whole tensor, cut as `like`, if that is a piece of the same shape."""
    if is_piece(tensor) or not is_piece(like) or tensor.shape != like.shape:
        return tensor
    return piece_of(tensor[rows_of(like)].clone(), like.shape, like.device_mesh)


def mesh_of_pieces(model: nn.Module) -> DeviceMesh | None:
    """The mesh that the pieces of a model are on; None if its weights are whole."""
    reshard(model)
    return next((x.device_mesh for x in model.parameters() if is_piece(x)), None)


@torch.no_grad()
def copy_of(model: Module) -> Module:
    """Return a deep copy. That of a sharded model is in pieces, too; `shard` makes it compute."""
    if not is_sharded(model):
        return copy.deepcopy(model)
    reshard(model)
    return _plain(model, {}, lambda x: nn.Parameter(x.detach().clone(), x.requires_grad))


@contextlib.contextmanager
def whole(model: Module) -> Iterator[Module]:
    """Yield a plain copy of a sharded model with all weights on every rank, to sample from.

    The copy does not train. Its weights are gathered one tensor at a time, and freed at the end of
    the block. A model that is not sharded is yielded itself.
    """
    if not is_sharded(model):
        yield model
        return
    copy = whole_copy(model)
    try:
        yield copy
    finally:
        copy.to_empty(device="meta")  # so that whoever still holds the copy holds no memory


@torch.no_grad()
def whole_copy(model: Module) -> Module:
    """Return a plain copy of a sharded module, which does not train, with all weights.

    Tensors that are not pieces, such as buffers, are shared with the module.
    """
    reshard(model)
    return _plain(model, {}, lambda x: nn.Parameter(whole_tensor(x), requires_grad=False))


def _plain(
    module: nn.Module,
    done: dict[int, nn.Module],
    copied: Callable[[nn.Parameter], nn.Parameter],
) -> nn.Module:
    """`module` in its original class. Parts that it holds twice, the copy holds twice."""
    if id(module) in done:
        return done[id(module)]
    kind = class_of(module)
    plain = done[id(module)] = nn.Module.__new__(kind)
    nn.Module.__init__(plain)
    for name, value in vars(module).items():
        is_method = callable(getattr(kind, name, None))  # which fully_shard has wrapped
        is_state = "_fsdp_" in name or name.startswith("__composable_api")  # of fully_shard
        if name not in vars(plain) and not (is_method or is_state):
            vars(plain)[name] = value
    for name, part in module._modules.items():
        plain._modules[name] = None if part is None else _plain(part, done, copied)
    for name, tensor in module._parameters.items():
        plain._parameters[name] = None if tensor is None else copied(tensor)
    plain._buffers.update(module._buffers)
    plain._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    plain.training = module.training
    return plain


def on_rank_0(
    tensors: Mapping[str, Tensor], use: Callable[[Iterable[tuple[str, Tensor]]], None]
) -> None:
    """Call `use` with an iterator of (name, whole tensor), on rank 0 only if they are pieces.

    A tensor is sent when the iterator reaches it, and goes to the CPU. So rank 0 holds one whole
    tensor at a time, and the other ranks none. Without pieces, `use` gets the tensors as they are.

    Raises:
        Exception: What `use` has raised on rank 0, on every rank.
    """
    if not any(map(is_piece, tensors.values())):
        use(tensors.items())
    elif dist.get_rank() == 0:
        try:
            use(_received(tensors))
        except BaseException as error:
            _say((type(error), str(error)))
            raise
        _say(_DONE)
    else:
        _send(tensors)


def _received(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        _say(_NEXT)
        yield name, (_receive(tensor) if is_piece(tensor) else tensor.detach()).cpu()


def _send(tensors: Mapping[str, Tensor]) -> None:
    """Send this rank's pieces when rank 0 asks for them. Raises what rank 0 has met."""
    for tensor in tensors.values():
        word = _say()
        if word != _NEXT:
            break
        if is_piece(tensor):
            group, members = _holders(tensor)
            local = _bytes(tensor.to_local())
            if members[0] == 0 and len(local):
                dist.send(local, dst=0, group=group)
    else:
        word = _say()
    if word == _DONE:
        return
    raise distributed.error_of(0, *word)


def _receive(tensor: DTensor) -> Tensor:
    group, members = _holders(tensor)
    local = tensor.to_local()
    result = torch.empty(tensor.shape, dtype=local.dtype, device=local.device)
    for place, member in enumerate(members):
        rows = result[_rows(len(result), len(members), place)]
        if member == 0:
            rows.copy_(local)
        elif len(rows):
            dist.recv(_bytes(rows), src=member, group=group)
    return result


def _holders(tensor: DTensor) -> tuple[dist.ProcessGroup, list[int]]:
    """The ranks that hold the pieces of one copy of a tensor with this rank, in order of rows."""
    mesh = tensor.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    return group, dist.get_process_group_ranks(group)


def _bytes(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor in a dtype that every backend can send."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _say(word=None):
    """Rank 0's word, on every rank."""
    found = [word]
    dist.broadcast_object_list(found, src=0)
    return found[0]
