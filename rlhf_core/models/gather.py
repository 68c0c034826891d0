"""Whole tensors from the pieces of them that the ranks of a sharded model hold: see shard.py.

Every rank has to call these functions, because they exchange data. A model that is not sharded
passes through unchanged, and no process group is needed. Left out: how a model is cut into pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_core import distributed

if TYPE_CHECKING:
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
    """Whether `shard` has cut the model, or a part of it, into pieces."""
    return next(_sharded_parts(model), None) is not None


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
        for part in _sharded_parts(model):
            part.reshard()


def _sharded_parts(model: nn.Module) -> Iterator:
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from (part for part in model.modules() if isinstance(part, FSDPModule))


def rows_of(tensor: Tensor) -> slice:
    """The rows of the whole tensor that this rank holds; all of a tensor that is not a piece."""
    if not is_piece(tensor):
        return slice(0, len(tensor))
    mesh = tensor.device_mesh
    return _rows(len(tensor), mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))


def _rows(n: int, pieces: int, place: int) -> slice:
    """As torch.chunk cuts n rows. The last pieces can be short or empty."""
    size = -(-n // pieces)
    return slice(min(place * size, n), min(place * size + size, n))


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a piece on every rank, without gradient; any other tensor as it is."""
    return tensor.detach().full_tensor() if is_piece(tensor) else tensor


def piece_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of a whole tensor, cut as `like`, if that is a piece of the same shape."""
    if not is_piece(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)


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
    return _plain(model, {})


def _plain(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """`module` in its original class. Parts that it holds twice, the copy holds twice."""
    if id(module) in done:
        return done[id(module)]
    kind = class_of(module)
    plain = done[id(module)] = nn.Module.__new__(kind)
    nn.Module.__init__(plain)
    for name, value in vars(module).items():
        is_method = callable(getattr(kind, name, None))  # which fully_shard has wrapped
        if name not in vars(plain) and not is_method:
            vars(plain)[name] = value
    for name, part in module._modules.items():
        plain._modules[name] = None if part is None else _plain(part, done)
    for name, tensor in module._parameters.items():
        if tensor is not None:
            tensor = nn.Parameter(whole_tensor(tensor), requires_grad=False)
        plain._parameters[name] = tensor
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
