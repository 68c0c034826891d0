"""Files to rows: JSONL (plain or .gz) with text for SFT, preference pairs and prompts.

A bad line raises DataError with file, line and field, or goes to `on_bad`, which may count it and carry on.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")
OnBad = Callable[["DataError"], None]


class DataError(ValueError):
    """A line of a data file that cannot be used; the message names file, line and field."""


class Text(NamedTuple):
    """What SFT learns: `completion` after `prompt`, which may be empty."""

    prompt: str
    completion: str


class Preference(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def read_texts(path: str | os.PathLike, on_bad: OnBad | None = None) -> list[Text]:
    """Rows {"prompt", "completion" or "response"}, {"question", "answer"} or {"text"}."""

    def parse(row: dict) -> Text:
        if "text" in row:
            return Text("", _string(row, "text"))
        if "question" in row:
            return Text(_string(row, "question"), _string(row, "answer"))
        return Text(_string(row, "prompt"), _string(row, "completion" if "completion" in row else "response"))

    return list(_rows(path, parse, on_bad))


def read_preferences(path: str | os.PathLike, on_bad: OnBad | None = None) -> list[Preference]:
    """Rows {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} that share a dialogue up to its last
    "\\n\\nAssistant:" (Anthropic HH)."""

    def parse(row: dict) -> Preference:
        chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
        if chosen == rejected:
            raise ValueError("fields 'chosen' and 'rejected' are equal")
        if "prompt" in row:
            return Preference(_string(row, "prompt"), chosen, rejected)
        turn = "\n\nAssistant:"
        end = chosen.rfind(turn) + len(turn)
        if turn not in chosen or not rejected.startswith(chosen[:end]):
            raise ValueError("field 'prompt' is missing, and 'chosen' and 'rejected' share no dialogue")
        answers = {"chosen": chosen[end:], "rejected": rejected[end:]}
        return Preference(chosen[:end], _string(answers, "chosen"), _string(answers, "rejected"))

    return list(_rows(path, parse, on_bad))


def read_prompts(path: str | os.PathLike, on_bad: OnBad | None = None) -> list[str]:
    """Rows {"prompt"}, {"question"} or {"text"}; other fields are ignored. A .txt file holds one prompt a line."""
    if str(path).endswith((".txt", ".txt.gz")):
        return [line for _, line in _lines(path, on_bad)]

    def parse(row: dict) -> str:
        return _string(row, next((name for name in ("prompt", "question", "text") if name in row), "prompt"))

    return list(_rows(path, parse, on_bad))


def _string(row: dict, field: str) -> str:
    if field not in row:
        raise ValueError(f"field {field!r} is missing, the line has {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} must be a string, got {json.dumps(value)[:40]}")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise ValueError(f"field {field!r} holds a lone surrogate, which is no character") from None
    return value


def _rows(path: str | os.PathLike, parse: Callable[[dict], T], on_bad: OnBad | None) -> Iterator[T]:
    found = False
    for number, line in _lines(path, on_bad):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {line.strip()[:40]}")
            item = parse(row)
        except ValueError as error:
            reason = f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
            _report(DataError(f"{path}:{number}: {reason}"), on_bad)
            continue
        found = True
        yield item
    if not found:
        raise DataError(f"{path}: holds no usable line")


def _report(bad: DataError, on_bad: OnBad | None) -> None:
    if on_bad is None:
        raise bad from None
    on_bad(bad)


def _lines(path: str | os.PathLike, on_bad: OnBad | None) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    path = Path(path)
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    where = f"{error.reason} at byte {error.start} of the line"
                    _report(DataError(f"{path}:{number}: not UTF-8: {where}"), on_bad)
                    continue
                if text.strip():
                    yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: damaged gzip file: {error}") from None
