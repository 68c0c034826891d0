"""Safetensors files, read piece by piece, so that a model is never in memory twice.

The package maps files into memory, and the pages that were read stay in memory until the file is
closed. The file is therefore opened again for every piece.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from rlhf_core.files import replacing, require

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The package's order of tensors in a file: wide ones first, so that all are aligned.
_WRITTEN = (
    (torch.int64, "I64"), (torch.float64, "F64"), (torch.float32, "F32"), (torch.int32, "I32"),
    (torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.int16, "I16"), (torch.int8, "I8"),
    (torch.uint8, "U8"), (torch.bool, "BOOL"),
)  # fmt: skip
PIECE_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 16 * 2**20  # some 100,000 tensors
MAX_DIMENSIONS = 8


class StoredTensor(NamedTuple):
    """A tensor in a file, not yet read."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def pieces(self, box: tuple[slice, ...] = ()) -> Iterator[tuple[int, Tensor]]:
        """Yield a few rows at a time, each time with the index of the first one.

        box: Rows, columns, ... to read, each with start and stop; all by default. The index counts
            the rows of the box.
        """
        if self.dtype not in DTYPES:
            stored = f"stored as {self.dtype}, not as {', '.join(DTYPES)}"
            raise ValueError(f"{self.file}: tensor {self.name!r} is {stored}")
        rows, *row = (*box, *(slice(0, size) for size in self.shape[len(box) :]))
        width = math.prod(part.stop - part.start for part in row)
        at_once = max(1, PIECE_BYTES // max(1, width * DTYPES[self.dtype].itemsize))
        for first in range(rows.start, rows.stop, at_once):
            some = slice(first, min(first + at_once, rows.stop))
            with _open(self.file) as file:
                yield first - rows.start, file.get_slice(self.name)[(some, *row)]

    def copy_to(self, target: Tensor, box: tuple[slice, ...] = ()) -> None:
        """Fill `target`, which has the shape of the box, any dtype and any strides."""
        for first, rows in self.pieces(box):
            target[first : first + len(rows)] = rows
            del rows  # before the file is closed, or its pages stay in memory


def stored_tensors(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name. Raises ValueError if the file is damaged."""
    path = Path(path)
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        stored = {
            name: StoredTensor(path, name, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }
    for name, tensor in stored.items():
        if len(tensor.shape) > MAX_DIMENSIONS:
            count = len(tensor.shape)
            raise ValueError(f"{path}: {name[:80]!r} has {count} dimensions, not {MAX_DIMENSIONS}")
    return stored


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

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    with replacing(path) as file:
        dump_tensors(file, tensors, texts)


def dump_tensors(
    file: BinaryIO,
    tensors: dict[str, Tensor],
    texts: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write to an open file, as `write_tensors`. Arguments and errors as for `TensorWriter`."""
    writer = TensorWriter(file, tensors, texts, dtype)
    for name in writer.starts:
        writer.write(name, tensors[name])


class TensorWriter:
    """Writes tensors into an open file, one by one, in any order.

    The bytes are those of the package, which would write to a file of its own, with mode 0600.

    Args:
        file: Empty.
        layout: A tensor of the shape and dtype of each tensor, by name. It may be on "meta".
        texts: Named texts of the header.
        dtype: Dtype of all tensors in the file. None means those of the layout.

    Raises:
        ValueError: A number is beyond the range of dtype.
    """

    def __init__(
        self,
        file: BinaryIO,
        layout: Mapping[str, Tensor],
        texts: dict[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.file, self.dtype = file, dtype
        self.starts: dict[str, int] = {}  # where each tensor starts, in the order of the file
        header, end = {"__metadata__": {"format": "pt", **(texts or {})}}, 0
        for written, stored in _WRITTEN:
            for name in sorted(x for x in layout if (dtype or layout[x].dtype) == written):
                start, end = end, end + layout[name].numel() * written.itemsize
                shape = list(layout[name].shape)
                header[name] = {"dtype": stored, "shape": shape, "data_offsets": [start, end]}
                self.starts[name] = start
        if len(self.starts) < len(layout):
            other = next(name for name in layout if name not in header)
            raise ValueError(
                f"tensor {other!r} has dtype {layout[other].dtype}, which is not stored"
            )
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self.starts = {name: 8 + len(text) + start for name, start in self.starts.items()}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any strides and on any device. It is copied at most once."""
        tensor = tensor.detach().cpu()
        written = tensor.to(self.dtype or tensor.dtype)
        if _overflows(tensor, written):
            largest = float(tensor.abs().max())
            raise ValueError(
                f"tensor {name!r} has a number of size {largest:.4g}, which {self.dtype} cannot "
                "hold. Save it as bfloat16 or float32"
            )
        self.file.seek(self.starts[name])
        self.file.write(written.contiguous().flatten().view(torch.uint8).numpy())


def _overflows(tensor: Tensor, written: Tensor) -> bool:
    """Whether a number became infinite. A few rows at a time: isfinite makes a copy of them."""
    if written.dtype == torch.promote_types(written.dtype, tensor.dtype):
        return False  # it holds every number of tensor.dtype
    rows = zip(*(torch.atleast_1d(x).split(64) for x in (tensor, written)))
    return not all(before.isfinite().equal(after.isfinite()) for before, after in rows)


@contextlib.contextmanager
def _open(path: Path) -> Iterator:
    """The open file. Errors of the package, and a header that is too long, are ValueErrors."""
    safetensors = require("safetensors", "train")
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if MAX_HEADER_BYTES < header <= os.path.getsize(path):
            raise ValueError(f"{path}: the header has {header} bytes, more than {MAX_HEADER_BYTES}")
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (OSError, RuntimeError, TypeError, IndexError, safetensors.SafetensorError) as error:
        what = str(error)[:200]
        raise ValueError(f"{path}: cannot be read, damaged or cut short: {what}") from None
