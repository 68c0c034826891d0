"""Data files to rows: JSON lines, a JSON array, CSV or plain lines, also as .gz; and Parquet.

The content decides before the name: a file that starts with { is JSON lines, whatever its name.
Every row comes with its place, which errors name. readers.py says what the fields of a row mean.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_core import distributed
from rlhf_core.files import parse_json, require

StrPath = str | os.PathLike
FORMATS = (
    "Rows are read from JSON lines, a JSON array, CSV with a header (.csv), all of them also as "
    ".gz, and Parquet (.parquet)"
)
_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**20  # bytes of an array that are scanned at once
_STRUCTURE = re.compile(rb'["\[\]{},]')
# Fields that are not text, so that their cells in a CSV file hold JSON.
_JSON_CELLS = {"messages", "conversations", "responses", "ranks", "steps", "completions", "labels"}
_JSON_CELLS |= {"label", "reward", "margin", "label_smoothing"}
_JSON_CELLS |= {"chosen_ratings", "rejected_ratings"}


class DataError(ValueError):
    """A line of a data file cannot be used. The message names file, line and field."""


Row = str | dict[str, Any] | DataError


def read_rows(path: StrPath, max_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and fields of every row of a `DataFile`. Raises DataError at a bad one."""
    file = DataFile(path, max_bytes)
    for place, row in file.rows():
        yield place, file.fields(place, row, None)


class DataFile:
    """A data file, whose `rows` are read in one pass."""

    def __init__(self, path: StrPath, max_bytes: int):
        """max_bytes: The longest row."""
        self.path, self.max_bytes = Path(path), max_bytes
        self.name = str(self.path)
        self.number, self.unit = 0, ":"  # of the line or row that was read last
        self.cells = False  # whether the fields are cells of a CSV file

    def fields(self, place: str, row: Row, columns: Mapping[str, str] | None) -> dict[str, Any]:
        """The fields of a row, without those that are null or an empty cell.

        columns: The column that holds a field, where their names differ: {"prompt": "question"}.

        Raises:
            DataError: The row cannot be used.
        """
        if isinstance(row, DataError):
            raise row
        try:
            row = _object(row) if isinstance(row, str) else row
            row = _renamed(row, columns) if columns else row
            if self.cells:
                row = {name: _cell(name, text) for name, text in row.items()}
        except ValueError as error:
            invalid = "not valid JSON: " if isinstance(error, json.JSONDecodeError) else ""
            raise self._fault(place, f"{invalid}{error}", hint=bool(invalid)) from None
        if None in row.values():
            return {name: value for name, value in row.items() if value is not None}
        return row

    def rows(self, plain: bool = False) -> Iterator[tuple[str, Row]]:
        """Yield place and content of every row, or of every line of plain text that is not blank.

        The content is a string of JSON, fields by their names, or the error of a row that cannot
        be read.

        Raises:
            DataError: The file is damaged, so that no further row can be found.
            ImportError: The file is Parquet, and pyarrow is not installed.
        """
        zipped = self.path.suffix == ".gz"
        try:
            with (
                open(self.path, "rb") as stored,
                gzip.open(stored) if zipped else stored as self.file,
            ):
                rows = (self._lines if plain else self._method(zipped))()
                yield from _with_bar(rows, stored, self.path.name)
        except (FileNotFoundError, IsADirectoryError) as error:
            found = f"{error.strerror[:1].lower()}{error.strerror[1:]}"
            raise type(error)(f"{self.path}: {found}. {FORMATS}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            place = self._place(self.number + 1)
            raise DataError(f"{place}: damaged gzip file: {error}") from None

    def _fault(self, place: str, fault: str, hint: bool = False) -> DataError:
        """The error of a row. If the first line may be of another format, it names the formats."""
        hint = hint and place == f"{self.path}:1"
        return DataError(f"{place}: {fault}. {FORMATS}" if hint else f"{place}: {fault}")

    def _place(self, number: int) -> str:
        return f"{self.name}{self.unit}{number}"

    def _method(self, zipped: bool) -> Callable[[], Iterator[tuple[str, Row]]]:
        """The method that reads the rows, by the first bytes of the file and by its name."""
        start = self.file.peek(4096).removeprefix(_BOM).lstrip()
        suffix = (self.path.with_suffix("") if zipped else self.path).suffix
        if start.startswith(b"{"):
            return self._lines
        if start.startswith(b"[") and start[1:].lstrip().startswith(b"{"):
            return self._array_or_lines
        if start.startswith(b"PAR1") or suffix == ".parquet":
            return self._table
        return self._csv if suffix == ".csv" else self._lines

    # ---- lines

    def _raw_lines(self, before: Iterable[bytes] = ()) -> Iterator[bytes]:
        """Every line, cut to one byte more than is allowed."""
        read = iter(partial(self.file.readline, self.max_bytes + 1), b"")
        for raw in itertools.chain(before, read):
            self.number += 1
            rest = raw if len(raw) > self.max_bytes else b""
            while rest and not rest.endswith(b"\n"):
                rest = self.file.readline(self.max_bytes)
            yield raw.removeprefix(_BOM) if self.number == 1 else raw

    def _lines(self, before: Iterable[bytes] = ()) -> Iterator[tuple[str, Row]]:
        for raw in self._raw_lines(before):
            place = f"{self.name}:{self.number}"
            if len(raw) > self.max_bytes:
                limit = f"the line has more than {self.max_bytes} bytes"
                yield place, self._fault(place, f"{limit}; split it into rows")
                continue
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {error.start} of the line"
                yield place, self._fault(place, f"not UTF-8: {where}", hint=True)
                continue
            if text and not text.isspace():
                yield place, text

    # ---- a JSON array

    def _array_or_lines(self) -> Iterator[tuple[str, Row]]:
        """The rows of an array. An array that is one of several lines is one bad line of many."""
        read = [self.file.readline(self.max_bytes + 1)]
        while read[-1].isspace():
            read.append(self.file.readline(self.max_bytes + 1))
        first = read[-1]
        if len(first) <= self.max_bytes and first.rstrip().endswith(b"]"):
            while len(read) < 1000 and (line := self.file.readline(self.max_bytes + 1)):
                read.append(line)
                if not line.isspace():
                    break
            if read[-1] is not first and not read[-1].isspace() and _is_json(first):
                return self._lines(read)
        return self._array(read)

    def _array(self, before: Iterable[bytes]) -> Iterator[tuple[str, Row]]:
        """The rows between the commas of the outermost array, of which one is held at a time."""
        depth, at, quoted, row = 0, 0, False, bytearray()
        line, over = 1, 0  # where the row begins, and how many lines it goes over
        chunks = itertools.chain(before, iter(lambda: self.file.read(_CHUNK), b""))
        for chunk in chunks:
            begin = 0
            while True:
                if quoted:
                    end = chunk.find(b'"', at)
                    inside = chunk[at : end if end >= 0 else None]
                    escaped = (len(inside) - len(inside.rstrip(b"\\"))) % 2
                    if end < 0:
                        at = len(chunk) + escaped  # the first byte of the next chunk
                        break
                    quoted, at = bool(escaped), end + 1
                    continue
                match = _STRUCTURE.search(chunk, at)
                if match is None:
                    break
                token, at = match[0], match.end()
                quoted = token == b'"'
                depth += (token in b"[{") - (token in b"]}")
                starts = depth == 1 and token == b"["
                if starts or depth == 0 or (depth == 1 and token == b","):
                    part = chunk[begin : match.start()]
                    row += part
                    blank = not row.strip()
                    if not (starts or (depth == 0 and self.number == 0 and blank)):
                        yield from self._row(row, line)
                    line += over + part.count(b"\n")
                    row, begin, over = bytearray(), at, 0
                if depth == 0:
                    if any(part.strip() for part in itertools.chain([chunk[at:]], chunks)):
                        place = self._place(self.number)
                        raise DataError(f"{place}: the array ends here, but the file goes on")
                    return
            at = max(at - len(chunk), 0)
            row += chunk[begin:]
            over += chunk.count(b"\n", begin)
            del row[self.max_bytes + 1 :]
        self.unit = f":{line + over}: row "
        place = self._place(self.number + 1)
        raise DataError(f"{place}: the file ends within the array; it may be cut off")

    def _row(self, raw: bytearray, line: int) -> Iterator[tuple[str, Row]]:
        self.number += 1
        line += raw.count(b"\n", 0, len(raw) - len(raw.lstrip()))
        self.unit = f":{line}: row "
        place = self._place(self.number)
        if len(raw) > self.max_bytes:
            yield place, self._fault(place, f"the row has more than {self.max_bytes} bytes")
            return
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {error.start} of the row"
            yield place, self._fault(place, f"not UTF-8: {where}")
            return
        yield place, text

    # ---- CSV

    def _csv(self) -> Iterator[tuple[str, Row]]:
        """Rows by the names in the header. A row is at the line where it begins."""
        self.cells, header, faults, size = True, None, [], 0

        def texts() -> Iterator[str]:
            nonlocal size
            for raw in self._raw_lines():
                size += len(raw)
                if size > self.max_bytes:
                    limit = f"the row has more than {self.max_bytes} bytes"
                    raise DataError(f"{place}: {limit}, or a quote in it is not closed")
                text = raw.decode("utf-8", errors="replace")
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    faults.append(f"not UTF-8: {error.reason} at byte {error.start} of the line")
                yield text

        lines = csv.reader(texts(), strict=True)
        while True:
            place, size = self._place(self.number + 1), 0
            faults.clear()
            default = csv.field_size_limit(self.max_bytes)  # one limit for the whole process
            try:
                cells = next(lines, None)
            except csv.Error as error:
                if "end of data" in str(error):
                    raise DataError(f"{place}: a quote is not closed until the file ends") from None
                cells = []
                faults.append(f"not valid CSV: {error}")
            finally:
                csv.field_size_limit(default)
            if cells is None:
                return
            if cells and header and len(cells) != len(header):
                faults.append(f"the row has {len(cells)} cells, the header has {len(header)}")
            if header is None:
                header = [name.strip() for name in cells] or None
                named = Counter(filter(None, header or ()))
                twice = [name for name, count in named.items() if count > 1]
                if twice:
                    faults.append(f"the header has {twice[0][:80]!r} twice")
                if faults:
                    raise DataError(f"{place}: {faults[0]}")
            elif faults:
                yield place, self._fault(place, faults[0])
            elif cells:
                yield place, {name: cell or None for name, cell in zip(header, cells) if name}

    # ---- Parquet

    def _table(self) -> Iterator[tuple[str, Row]]:
        try:
            parquet = require("pyarrow.parquet", "data")
        except ImportError as error:
            raise ImportError(f"{self.path}: to read Parquet, {error}") from None
        from pyarrow import ArrowException

        self.unit = ": row "
        try:
            # A column is read through a small buffer, and not whole.
            table = parquet.ParquetFile(
                self.file, buffer_size=2**16, thrift_container_size_limit=2**17
            )
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
            batches = table.iter_batches(batch_size=64)
            while (batch := next(batches, None)) is not None:
                yield from self._batch(batch, names)
        except DataError:
            raise
        except (ArrowException, OSError, ValueError, RecursionError) as error:
            reason = f"{error}".partition("\n")[0]
            place = self._place(self.number + 1)
            raise DataError(f"{place}: damaged Parquet file: {reason}. {FORMATS}") from None

    def _batch(self, batch, names: list[str]) -> Iterator[tuple[str, Row]]:
        for i in range(batch.num_rows):
            self.number += 1
            place = self._place(self.number)
            row = batch.slice(i, 1)
            if batch.nbytes > self.max_bytes < row.nbytes:
                yield place, self._fault(place, f"the row has more than {self.max_bytes} bytes")
                continue
            try:
                fields = {name: _value(row.column(k)[0]) for k, name in enumerate(names)}
            except UnicodeDecodeError as error:
                yield place, self._fault(place, f"not UTF-8: {error.reason}")
                continue
            yield place, fields


def _with_bar(rows: Iterator, file: BinaryIO, name: str) -> Iterator:
    """The rows. On a terminal, a bar shows how much of the file is read, after the first second."""
    if not sys.stderr.isatty() or distributed.rank() or not file.seekable():
        return rows
    try:
        from tqdm import tqdm
    except ImportError:  # it is optional
        return rows
    options = dict(total=os.fstat(file.fileno()).st_size, unit="B", unit_scale=True, delay=1)
    return _counted(rows, file, tqdm(desc=name, leave=False, file=sys.stderr, **options))


def _counted(rows: Iterator, file: BinaryIO, bar: Any) -> Iterator:
    with bar:
        for i, row in enumerate(rows):
            if i % 64 == 0:
                bar.update(file.tell() - bar.n)
            yield row


def _value(scalar) -> Any:
    """The value in Python; None for a time or number that Python cannot hold."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, ImportError):
        return None


def _is_json(raw: bytes) -> bool:
    try:
        parse_json(raw.decode("utf-8", errors="replace").removeprefix("\ufeff"))
        return True
    except ValueError:
        return False


def _object(text: str) -> dict[str, Any]:
    row = parse_json(text)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {text.strip()[:40]}")
    return row


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for column in columns.values():
        if column not in row:
            raise ValueError(f"column {column!r} is missing; the line has {names_in(row)}")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {field: row[column] for field, column in columns.items()}


def _cell(name: str, text: str | None) -> Any:
    """The value of a cell: text, or JSON for fields that are not text."""
    if text is None or name not in _JSON_CELLS:
        return text
    try:
        return parse_json(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text  # the reader names the field


def names_in(row: dict[str, Any]) -> str:
    """The names of a row's fields for an error."""
    return ", ".join(map(repr, row))[:200] or "none"
