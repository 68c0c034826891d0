"""Safetensors files, read piece by piece, so that a model is never in memory twice.

The package maps files into memory, and the pages that were read stay in memory until the file is
closed. The file is therefore opened again for every piece.
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
    """A tensor in a file, not yet read."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield a few rows at a time, each time with the index of the first one."""
        if self.dtype not in DTYPES:
            stored = f"stored as {self.dtype}, not as {', '.join(DTYPES)}"
            raise ValueError(f"{self.file}: tensor {self.name!r} is {stored}")
        rows, *row = self.shape
        at_once = max(1, PIECE_BYTES // max(1, math.prod(row) * DTYPES[self.dtype].itemsize))
        for first in range(0, rows, at_once):
            with _open(self.file) as file:
                yield first, file.get_slice(self.name)[first : first + at_once]

    def copy_to(self, target: Tensor) -> None:
        """Fill `target`, which has this shape, any dtype and any strides."""
        for first, rows in self.pieces():
            target[first : first + len(rows)] = rows
            del rows  # before the file is closed, or its pages stay in memory


def stored_tensors(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name. Raises ValueError if the file is damaged."""
    path = Path(path)
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(path, name, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def stored_texts(path: str | os.PathLike) -> dict[str, str]:
    """Return the texts in a file by name. Raises ValueError if the file is damaged."""
    with _open(Path(path)) as file:
        return file.metadata() or {}


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the texts and tensors that `write_tensors` wrote. Raises ValueError if damaged."""
    with _open(Path(path)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata() or {}, tensors


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], texts: dict[str, str] | None = None
) -> None:
    """Write tensors, of any strides and on any device, and named texts into one file, atomically.

    Contiguous tensors on the CPU are not copied.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    package = require("safetensors", "train")
    save_file = require("safetensors.torch", "train").save_file
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(texts or {})})
        except package.SafetensorError as error:  # the package raises it for a full disk, too
            raise OSError(f"{path}: not written: {error}") from None


def _open(path: Path):
    safetensors = require("safetensors", "train")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read, damaged or cut short: {error}") from None
