"""Tensors in safetensors files, read piece by piece, so that a model is never held twice.

The package maps files into memory, and pages that were read count as memory in use until the file is closed: so it is
opened for every piece.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.files import replacing, require

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_BYTES = 16 * 2**20


class StoredTensor(NamedTuple):
    """One tensor of a file, not read yet."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Its rows a few at a time, and the index of the first of them."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file}: tensor {self.name!r} is stored as {self.dtype}, not as {', '.join(DTYPES)}"
            )
        rows, *row = self.shape
        at_once = max(1, PIECE_BYTES // max(1, math.prod(row) * DTYPES[self.dtype].itemsize))
        for first in range(0, rows, at_once):
            with _open(self.file) as file:
                yield first, file.get_slice(self.name)[first : first + at_once]

    def copy_to(self, target: Tensor) -> None:
        """Fill target, of this shape, any dtype and any strides."""
        for first, rows in self.pieces():
            target[first : first + len(rows)] = rows
            del rows  # before the file is closed: else its pages stay


def stored_tensors(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of a file by name; ValueError naming the file where its bytes are not what its header says."""
    path = Path(path)
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(path, name, x.get_dtype(), tuple(x.get_shape()))
            for name, x in slices.items()
        }


def stored_texts(path: str | os.PathLike) -> dict[str, str]:
    """The texts in a file by name; ValueError as for `stored_tensors`."""
    with _open(Path(path)) as file:
        return file.metadata() or {}


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A whole file: the texts and the tensors that `write_tensors` wrote; ValueError as for `stored_tensors`."""
    with _open(Path(path)) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], texts: dict[str, str] | None = None
) -> None:
    """Write tensors, of any strides and on any device, and named texts into one file, atomically; contiguous tensors
    are not copied. OSError, naming the file, where the disk refuses."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    package, save_file = (
        require("safetensors", "train"),
        require("safetensors.torch", "train").save_file,
    )
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(texts or {})})
        except package.SafetensorError as error:  # in place of an OSError, such as a full disk
            raise OSError(f"{path}: not written: {error}") from None


def _open(path: Path):
    safetensors = require("safetensors", "train")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read, damaged or cut short: {error}") from None
