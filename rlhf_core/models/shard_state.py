"""Weights and optimiser states of a sharded model in a folder, for any number of ranks.

Every rank writes its pieces, as PyTorch's distributed checkpoint does. Another number of ranks, or
one process without shards, reads them. state.json holds the SHA-256 of every file and is written
last, so a folder without it is not complete. The digests find damage, not forgery: the folder holds
a pickle of PyTorch's, so load only what you trust. All ranks must see the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core import distributed
from rlhf_core.files import read_object, short, write_json

DIGESTS = "state.json"


@torch.no_grad()
def save_state(
    folder: str | os.PathLike,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights and optimiser states into a folder. All ranks must call this.

    Args:
        folder: An earlier state in it is replaced.
        parameters: Trained weights by name. Call `reshard` before you list them.
        optimizer: Of these weights.
        state: Other tensors by name, equal on all ranks.

    Raises:
        OSError: A rank cannot write.
    """
    from torch.distributed.checkpoint import FileSystemWriter, save  # takes a while to import

    folder, rank = Path(folder), distributed.rank()
    tensors = _tensors(parameters, optimizer) | {f"state:{k}": x for k, x in (state or {}).items()}
    with distributed.together(local=True):
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for old in (folder / DIGESTS, folder / ".metadata", *folder.glob("__*_*.distcp")):
                old.unlink(missing_ok=True)
    with _naming(folder, "not written"):
        save(tensors, storage_writer=FileSystemWriter(folder), no_dist=distributed.size() == 1)
    with distributed.together(local=True):
        names = [x.name for x in folder.glob(f"__{rank}_*.distcp")] + [".metadata"] * (rank == 0)
        own = {name: _digest(folder / name) for name in names}
    digests = {name: x for part in distributed.gather_objects(own) for name, x in part.items()}
    with distributed.together(local=True):
        if rank == 0:
            write_json(folder / DIGESTS, {"files": digests})


@torch.no_grad()
def load_state(
    folder: str | os.PathLike,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Read what `save_state` wrote into weights, optimiser and `state`. All ranks must call this.

    Every file is checked before anything changes.

    Raises:
        FileNotFoundError: The folder holds no complete state.
        ValueError: A file is damaged, or the state belongs to other weights.
    """
    from torch.distributed.checkpoint import FileSystemReader, load

    folder = Path(folder)
    with distributed.together(local=True):
        _check_files(folder)
        reader = FileSystemReader(folder)
        stored = reader.read_metadata().state_dict_metadata
        targets = {f"weight:{name}": x.detach() for name, x in parameters.items()}
        targets |= {f"state:{name}": x for name, x in (state or {}).items()}
        moments = {}
        for key in stored:
            kind, _, name = key.partition(":")
            if kind not in ("weight", "state") and name in parameters:
                like = parameters[name].detach()
                is_moment = tuple(stored[key].size) == tuple(like.shape)
                moments[key] = torch.zeros_like(like) if is_moment else torch.zeros(())
        _check_fits(folder, stored, targets | moments)
    with _naming(folder, "not read"):
        load(targets | moments, storage_reader=reader, no_dist=distributed.size() == 1)
    for parameter in parameters.values():
        optimizer.state[parameter] = {}
    for key, value in moments.items():
        kind, _, name = key.partition(":")
        optimizer.state[parameters[name]][kind] = value


def _tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Weights, and the optimiser's state of each of them."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors |= {f"{kind}:{name}": x for kind, x in optimizer.state[parameter].items()}
        tensors[f"weight:{name}"] = parameter.detach()
    return tensors


def _check_files(folder: Path) -> None:
    """Raise an error unless this rank's share of the files is what was written."""
    if not (folder / DIGESTS).is_file():
        raise FileNotFoundError(
            f"{folder}: no {DIGESTS}, so there is no complete state of a sharded model"
        )
    digests = read_object(folder / DIGESTS).get("files")
    if not isinstance(digests, dict) or ".metadata" not in digests:
        raise ValueError(f"{folder / DIGESTS}: files must list digests, got {short(digests)}")
    size = distributed.size()
    for i, (name, digest) in enumerate(sorted(digests.items())):
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, but {DIGESTS} lists it")
        if (i % size == distributed.rank() or name == ".metadata") and _digest(file) != digest:
            raise ValueError(
                f"{file}: damaged: its digest is {_digest(file):.8}, but {short(digest)[1:9]} was "
                "written. Use a copy of the file, or an earlier checkpoint"
            )


def _check_fits(folder: Path, stored: Mapping, targets: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the state has the names, shapes and dtypes of the targets."""
    for name in sorted(targets.keys() - stored.keys()):
        raise ValueError(f"{folder}: tensor {name!r} is missing")
    for name in sorted(stored.keys() - targets.keys()):
        raise ValueError(f"{folder}: tensor {name!r} belongs to nothing in this run")
    for name, x in targets.items():
        found = tuple(stored[name].size), stored[name].properties.dtype
        if found != (tuple(x.shape), x.dtype):
            raise ValueError(
                f"{folder}: tensor {name!r} is {found[1]} {found[0]}, this run needs {x.dtype} "
                f"{tuple(x.shape)}"
            )


def _digest(file: Path) -> str:
    total = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(2**20):
            total.update(part)
    return total.hexdigest()


@contextlib.contextmanager
def _naming(folder: Path, what: str) -> Iterator[None]:
    """Turn the error that PyTorch raises on every rank, with a long report, into an OSError."""
    try:
        with warnings.catch_warnings():  # the caller asked for one process
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except BaseException as error:  # a CheckpointException is not an Exception
        failures = getattr(error, "failures", None)
        if not failures:
            raise
        rank, (cause, _) = next(iter(failures.items()))
        raise OSError(f"{folder}: {what}: rank {rank}: {cause}") from None
