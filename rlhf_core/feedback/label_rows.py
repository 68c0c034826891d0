"""Labels of several people, read from a file of rows or from the database of `annotate`.

Three layouts of rows: one label a row (item, annotator, label), a column for each annotator, or a
column that lists the labels of all annotators.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.data.formats import DataError, names_in, read_rows
from rlhf_core.data.readers import MAX_LINE_BYTES
from rlhf_core.feedback.annotation.items import outcomes
from rlhf_core.feedback.annotation.labels import read_labels, seconds_of
from rlhf_core.files import shown

DATABASES = (".sqlite", ".sqlite3", ".db")


class LabelRow(NamedTuple):
    """One label. Its time is in seconds since 1970, or in the unit of the file."""

    item: Hashable
    annotator: Hashable
    label: Hashable
    time: float | None = None


class LabelColumns(NamedTuple):
    """Names of the columns. None: item, or else id; annotator; label, or else labels; no time.

    annotators: A column for each of them, instead of `annotator` and `label`.
    """

    item: str | None = None
    annotator: str | None = None
    label: str | None = None
    time: str | None = None
    annotators: Sequence[str] = ()


_USUAL = LabelColumns()


def is_database(path: Path) -> bool:
    """Whether a file is one of SQLite, by its first bytes or by its name."""
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(16) == b"SQLite format 3\0":
                return True
    return path.suffix in DATABASES


def read_label_rows(
    path: Path, columns: LabelColumns = _USUAL, numeric: bool = False
) -> Iterator[LabelRow]:
    """Yield the labels of a file of rows, without those that are null or an empty cell.

    Args:
        path: JSON lines, a JSON array, CSV or Parquet.
        columns: where the fields are.
        numeric: read text as numbers.

    Raises:
        DataError: a row lacks a column, or a label is no text or number (or, numeric, no number).
    """
    first, found = "", set()
    for number, (place, row) in enumerate(read_rows(path, MAX_LINE_BYTES), 1):
        first = first or f"{place}: the row has {names_in(row)}"
        column = columns.label or ("label" if "label" in row else "labels")
        name = columns.item or ("id" if "id" in row and "item" not in row else "item")
        has_item = columns.item is not None or name in row  # else a row of labels is the item
        labels: dict[Hashable, Any] = {}
        if columns.annotators:
            labels = {name: row[name] for name in columns.annotators if name in row}
            found |= labels.keys()
        elif column in row:
            found.add(columns.label or "label")
            if isinstance(row[column], list):
                labels = {str(n): label for n, label in enumerate(row[column], 1)}
            else:
                labels = {_key(row, columns.annotator or "annotator", place): row[column]}
                has_item = True
        item = _key(row, name, place) if has_item else f"row {number}"
        time = _time(row.get(columns.time), place)
        found |= {columns.time} & row.keys()
        for annotator, label in labels.items():
            if label is not None:
                yield LabelRow(item, annotator, _scalar(label, f"{place}: a label", numeric), time)
    wanted = columns.annotators or [columns.label or "label"]
    missing = [name for name in (*wanted, columns.time) if name and name not in found]
    if missing:
        raise DataError(f"{path}: no row has a column {missing[0]!r}. {first or 'It is empty'}")


def read_database(path: Path, criterion: str | None = None) -> tuple[list[LabelRow], str]:
    """The labels in a database of `annotate`, without gold questions, skips and undone labels.

    A ranking counts as a choice for each two of its responses.

    Args:
        path: the database.
        criterion: read the ratings of each response by this criterion instead.

    Returns:
        The labels, and the level they have: nominal or ordinal.

    Raises:
        ValueError: the database is damaged or something else, or has no such labels.
    """
    contents = read_labels(path)
    mode, criteria = contents.settings.mode, contents.settings.criteria
    if criterion is not None and criterion not in criteria:
        known = ", ".join(criteria) or "none"
        raise ValueError(f"{path}: there are no ratings of {criterion!r}; its criteria: {known}")
    if criterion is None and mode == "write":
        raise ValueError(f"{path}: holds texts that people wrote, which have no agreement")
    rows = []
    for row in contents.labels():
        item, choice = row["item"], row["choice"]
        parts = {item: choice}
        if criterion is not None:
            parts = {f"{item}:{i}": x for i, x in enumerate(row["ratings"][criterion])}
        elif mode == "rank":
            parts = {f"{item}:{i}-{j}": x for (i, j), x in outcomes(mode, choice).items()}
        when = _time(row["time"], str(path))
        rows += [LabelRow(name, row["annotator"], label, when) for name, label in parts.items()]
    return rows, "nominal" if criterion is None and mode != "likert8" else "ordinal"


class LabelTable(NamedTuple):
    """Labels as the coefficients of agreement.py take them, a list for each annotator.

    repeats: how many labels another one by the same annotator for the same item has replaced.
    """

    ratings: list[list[Hashable | None]]
    times: list[list[float | None]] | None
    annotators: list
    items: list
    repeats: int


def table_of(rows: Sequence[LabelRow]) -> LabelTable:
    """The last label of each annotator for each item; times are None if a label has none."""
    last = {(row.item, row.annotator): row for row in rows}
    items = list(dict.fromkeys(item for item, _ in last))
    annotators = list(dict.fromkeys(annotator for _, annotator in last))
    by_annotator = [[last.get((item, name)) for item in items] for name in annotators]
    ratings = [[row and row.label for row in one] for one in by_annotator]
    times = None
    if all(row.time is not None for row in last.values()):
        times = [[row and row.time for row in one] for one in by_annotator]
    return LabelTable(ratings, times, annotators, items, len(rows) - len(last))


def _key(row: dict[str, Any], column: str, place: str) -> Hashable:
    if column not in row:
        raise DataError(f"{place}: column {column!r} is missing; the row has {names_in(row)}")
    return _scalar(row[column], f"{place}: column {column!r}")


def _scalar(value: Any, what: str, numeric: bool = False) -> Hashable:
    """A value that is text or a number; with `numeric`, text is read as a number."""
    try:
        if isinstance(value, str | int | float):
            return float(value) if numeric and isinstance(value, str) else value
    except ValueError:
        pass
    wanted = "a number" if numeric else "text or a number"
    raise DataError(f"{what} must be {wanted}, got {shown(value)}")


def _time(value: Any, place: str) -> float | None:
    """A number, or the seconds since 1970 of a date; None if there is none."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    try:
        return seconds_of(str(value))
    except ValueError:
        raise DataError(
            f"{place}: a time must be a number or a date such as 2026-01-31T12:00:00, got "
            f"{shown(value)}"
        ) from None
