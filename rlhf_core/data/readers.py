"""Files to rows: JSONL (plain or .gz) with text or conversations for SFT, preference pairs, ranked lists, solutions in
steps, and prompts.

A conversation is a list of messages {"role", "content"}; tools, images and other content are refused by name. A bad
line raises DataError with file, line and field, or goes to `on_bad`, which may count it and carry on. `encode` is
applied to every row, so that its ValueErrors name the line too; the readers then return what it does.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from rlhf_core.data.chat import Message

_ROLES = ("system", "user", "assistant")
_UNSUPPORTED = ("tools", "documents", "image", "images", "video", "videos", "audio", "audios")

T = TypeVar("T")
OnBad = Callable[["DataError"], None]


class DataError(ValueError):
    """A line of a data file that cannot be used; the message names file, line and field."""


class Text(NamedTuple):
    """What SFT learns: `completion` after `prompt`, which may be empty. Messages after messages, where the
    completion begins with the assistant's turn and only the assistant's turns in it are learned, or text."""

    prompt: str | list[Message]
    completion: str | list[Message]


class Labelled(NamedTuple):
    """A `Text`'s prompt and completion, and whether the completion is desirable."""

    prompt: str | list[Message]
    completion: str | list[Message]
    label: bool


class Scored(NamedTuple):
    """A `Text`'s prompt and completion, and the completion's reward."""

    prompt: str | list[Message]
    completion: str | list[Message]
    reward: float


class Preference(NamedTuple):
    """Two completions of one prompt, which is text or messages; after messages they may be messages, too, of which the
    assistant's are compared. margin: how clearly the chosen one won, at least 0."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    margin: float | None = None


class Ranking(NamedTuple):
    """Two or more responses to one prompt, which is text or messages; the best one first."""

    prompt: str | list[Message]
    responses: list[str]


class Solution(NamedTuple):
    """A prompt, which is text or messages, the steps that solve it, without newlines inside, and of each of them how
    likely it is right: 1, 0, or between."""

    prompt: str | list[Message]
    steps: list[str]
    labels: list[float]


def read_texts(
    path: str | os.PathLike, on_bad: OnBad | None = None, encode: Callable | None = None
) -> list[Text]:
    """Rows {"messages"}, {"prompt", "completion" or "response"}, {"question", "answer"} or {"text"}. In `messages`
    every turn of the assistant counts. With a prompt of messages the completion is a string or messages."""

    def parse(row: dict) -> Text:
        if "messages" in row:
            messages = _conversation(row, "messages")
            first = next(
                (i for i, message in enumerate(messages) if message["role"] == "assistant"), None
            )
            if first is None:
                raise ValueError("field 'messages' holds no message of the assistant")
            return Text(messages[:first], messages[first:])
        if "text" in row:
            return Text("", _string(row, "text"))
        if "question" in row:
            return Text(_string(row, "question"), _string(row, "answer"))
        return _text(row)

    return list(_rows(path, parse, on_bad, encode))


def read_labelled(
    path: str | os.PathLike, on_bad: OnBad | None = None, encode: Callable | None = None
) -> list[Labelled]:
    """Rows {"prompt", "completion" or "response", "label"} or {"messages", "label"}, of which the last one is the
    completion; the label is true or 1 for desirable, false or 0."""

    def parse(row: dict) -> Labelled:
        label = row.get("label")
        if label not in (0, 1):
            raise ValueError(f"field 'label' must be true or false, got {json.dumps(label)[:40]}")
        return Labelled(*_text(row), bool(label))

    return list(_rows(path, parse, on_bad, encode))


def read_scored(
    path: str | os.PathLike, on_bad: OnBad | None = None, encode: Callable | None = None
) -> list[Scored]:
    """Rows {"prompt", "completion" or "response", "reward"} or {"messages", "reward"}, of which the last one is the
    completion; the reward is a finite number."""

    def parse(row: dict) -> Scored:
        reward = row.get("reward")
        if not _is_number(reward):
            raise ValueError(
                f"field 'reward' must be a finite number, got {json.dumps(reward)[:40]}"
            )
        return Scored(*_text(row), float(reward))

    return list(_rows(path, parse, on_bad, encode))


def read_preferences(
    path: str | os.PathLike, on_bad: OnBad | None = None, encode: Callable | None = None
) -> list[Preference]:
    """Rows {"prompt", "chosen", "rejected"}, where a prompt of messages has strings or messages after it; or {"chosen",
    "rejected"}: conversations that share their beginning, after which the assistant goes on, and ends, or strings that
    share a dialogue up to its last "\n\nAssistant:" (Anthropic HH). Each may have a "margin", a number."""
    return list(_rows(path, _preference, on_bad, encode))


def read_comparisons(
    path: str | os.PathLike, on_bad: OnBad | None = None, encode: Callable | None = None
) -> list[Preference | Ranking | Solution]:
    """Rows {"prompt" or "messages", "responses", "ranks"}, strings with a rank each, the lowest the best, none twice;
    {"prompt" or "messages", "steps" or "completions", "labels"}, strings with true or false each, or a number from 0
    to 1; any other row as for `read_preferences`."""

    def parse(row: dict) -> Preference | Ranking | Solution:
        if "labels" in row:
            return _solution(row)
        return _ranking(row) if "responses" in row else _preference(row)

    return list(_rows(path, parse, on_bad, encode))


def read_prompts(
    path: str | os.PathLike, on_bad: OnBad | None = None, encode: Callable | None = None
) -> list[str | list[Message]]:
    """Rows {"messages"}, {"prompt"}, {"question"} or {"text"}; other fields are ignored. Messages of the assistant at
    the end are left out: they are what the model is asked for. A .txt file holds one prompt a line."""
    if str(path).endswith((".txt", ".txt.gz")):
        return list(_rows(path, None, on_bad, encode))

    def parse(row: dict) -> str | list[Message]:
        field = next(
            (name for name in ("messages", "prompt", "question", "text") if name in row), "prompt"
        )
        if field != "messages" and not isinstance(row.get(field), list):
            return _string(row, field)
        messages = _conversation(row, field)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f"field {field!r} holds messages of the assistant only")
        return messages

    return list(_rows(path, parse, on_bad, encode))


def check_messages(value, field: str) -> list[Message]:
    """The messages, each of a role and a text and nothing else that says something; ValueError that names the field."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"field {field!r} must be a list of messages, got {repr(value)[:40]}")
    if not value:
        raise ValueError(f"field {field!r} holds no message")
    messages = []
    for i, message in enumerate(value):
        where = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(
                f"field {where!r} must be an object with role and content, got {repr(message)[:40]}"
            )
        role = _string(message, "role", where)
        if role not in _ROLES:
            raise ValueError(
                f"field '{where}.role' must be one of {', '.join(_ROLES)}, got {role!r}"
            )
        for name, extra in message.items():
            if name not in ("role", "content") and extra:
                raise ValueError(
                    f"field '{where}.{name}' is not supported: a message is a role and a text"
                )
        messages.append(
            {"role": role, "content": _string(message, "content", where, empty=role == "system")}
        )
    return messages


def _text(row: dict) -> Text:
    if "messages" in row:
        messages = _conversation(row, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"field 'messages' must end with the assistant's answer to others, got {roles}"
            )
        return Text(messages[:-1], messages[-1:])
    completion = "completion" if "completion" in row else "response"
    if isinstance(row.get("prompt"), list):
        return Text(_conversation(row, "prompt"), _turns(row, completion))
    return Text(_string(row, "prompt"), _string(row, completion))


def _preference(row: dict) -> Preference:
    if isinstance(row.get("prompt"), list):
        prompt, shared = _conversation(row, "prompt"), 0
        answers = {field: _turns(row, field) for field in ("chosen", "rejected")}
    elif isinstance(row.get("chosen"), list):
        answers = {field: _conversation(row, field) for field in ("chosen", "rejected")}
        both = list(answers.values())
        shared = next((i for i, (a, b) in enumerate(zip(*both)) if a != b), min(map(len, both)))
        prompt = both[0][:shared]
        if row.get("prompt") is not None and all(
            row["prompt"] != message["content"] for message in prompt
        ):
            raise ValueError("field 'prompt' is no message that 'chosen' and 'rejected' share")
    else:
        prompt, *answers = _strings(row)
        return _pair(row, prompt, *answers)
    if not prompt:
        raise ValueError("fields 'chosen' and 'rejected' share no message")
    for field, messages in answers.items():
        roles = [message["role"] for message in messages[shared:]]
        if not roles or {roles[0], roles[-1]} != {"assistant"}:
            raise ValueError(
                f"field {field!r} must go on, and end, with messages of the assistant after what is shared, "
                f"got {', '.join(roles) or 'none'}"
            )
    turns = [messages[shared:] for messages in answers.values()]
    return _pair(row, prompt, *(x[0]["content"] if len(x) == 1 else x for x in turns))


def _strings(row: dict) -> tuple[str, str, str]:
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    if "prompt" in row:
        return _string(row, "prompt"), chosen, rejected
    turn = "\n\nAssistant:"
    end = chosen.rfind(turn) + len(turn)
    if turn not in chosen or not rejected.startswith(chosen[:end]):
        raise ValueError("field 'prompt' is missing, and 'chosen' and 'rejected' share no dialogue")
    answers = {"chosen": chosen[end:], "rejected": rejected[end:]}
    return chosen[:end], _string(answers, "chosen"), _string(answers, "rejected")


def _pair(
    row: dict,
    prompt: str | list[Message],
    chosen: str | list[Message],
    rejected: str | list[Message],
) -> Preference:
    if chosen == rejected:
        raise ValueError("fields 'chosen' and 'rejected' are equal")
    margin = row.get("margin")
    if margin is not None and not (_is_number(margin) and margin >= 0):
        raise ValueError(
            f"field 'margin' must be a number, at least 0, got {json.dumps(margin)[:40]}"
        )
    return Preference(prompt, chosen, rejected, margin)


def _prompt(row: dict) -> str | list[Message]:
    field = "messages" if "messages" in row else "prompt"
    return _conversation(row, field) if isinstance(row.get(field), list) else _string(row, field)


def _solution(row: dict) -> Solution:
    field, labels = "completions" if "completions" in row else "steps", row["labels"]
    if not isinstance(row.get(field), list) or not row[field]:
        raise ValueError(
            f"field {field!r} must be a list of steps, got {json.dumps(row.get(field))[:40]}"
        )
    steps = [
        _string({str(i): step}, str(i), field).strip("\n") for i, step in enumerate(row[field])
    ]
    for i, step in enumerate(steps):
        if "\n" in step:
            raise ValueError(
                f"field '{field}.{i}' holds a newline, which ends a step: {step[:40]!r}"
            )
    valid = isinstance(labels, list) and len(labels) == len(steps)
    if not valid or not all(
        isinstance(label, bool) or (_is_number(label) and 0 <= label <= 1) for label in labels
    ):
        wanted = f"{len(steps)} times true, false or a number from 0 to 1"
        raise ValueError(f"field 'labels' must hold {wanted}, got {json.dumps(labels)[:40]}")
    return Solution(_prompt(row), steps, list(map(float, labels)))


def _ranking(row: dict) -> Ranking:
    responses, ranks = row["responses"], row.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(
            f"field 'responses' must be a list of at least 2, got {json.dumps(responses)[:40]}"
        )
    if (
        not isinstance(ranks, list)
        or len(ranks) != len(responses)
        or not all(map(_is_number, ranks))
    ):
        raise ValueError(
            f"field 'ranks' must hold {len(responses)} numbers, got {json.dumps(ranks)[:40]}"
        )
    if len(set(ranks)) < len(ranks):
        raise ValueError(f"field 'ranks' holds a tie, which has no order: {json.dumps(ranks)[:40]}")
    texts = [_string({str(i): text}, str(i), "responses") for i, text in enumerate(responses)]
    if len(set(texts)) < len(texts):
        raise ValueError("field 'responses' holds one of them twice")
    return Ranking(
        _prompt(row), [texts[i] for i in sorted(range(len(ranks)), key=ranks.__getitem__)]
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _conversation(row: dict, field: str) -> list[Message]:
    """The messages of a field, in a row that has no part beside text."""
    for name in _UNSUPPORTED:
        if row.get(name):
            raise ValueError(f"field {name!r} is not supported: messages are text without tools")
    if field not in row:
        raise ValueError(f"field {field!r} is missing, the line has {', '.join(map(repr, row))}")
    return check_messages(row[field], field)


def _turns(row: dict, field: str) -> list[Message]:
    """What the assistant goes on with after messages: a string, or messages that begin with its own."""
    if isinstance(row.get(field), str):
        return [{"role": "assistant", "content": _string(row, field)}]
    messages = _conversation(row, field)
    if messages[0]["role"] != "assistant":
        raise ValueError(f"field '{field}[0].role' must be assistant, got {messages[0]['role']!r}")
    return messages


def _string(row: dict, field: str, where: str = "", empty: bool = False) -> str:
    """The text of a field, of the row or of its part `where`."""
    name = f"{where}.{field}" if where else field
    if field not in row:
        raise ValueError(
            f"field {name!r} is missing, the line has {', '.join(map(repr, row)) or 'none'}"
        )
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be a string, got {json.dumps(value)[:40]}")
    if not value.strip() and not empty:
        raise ValueError(f"field {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise ValueError(f"field {name!r} holds a lone surrogate, which is no character") from None
    return value


def _rows(
    path: str | os.PathLike,
    parse: Callable[[dict], T] | None,
    on_bad: OnBad | None,
    encode: Callable | None,
) -> Iterator:
    """Every good line, parsed from JSON, or as it is where there is no `parse`."""
    found = False
    for number, line in _lines(path, on_bad):
        try:
            item = line if parse is None else parse(_object(line))
            item = item if encode is None else encode(item)
        except ValueError as error:
            reason = (
                f"not valid JSON: {error}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            _report(DataError(f"{path}:{number}: {reason}"), on_bad)
            continue
        found = True
        yield item
    if not found:
        raise DataError(f"{path}: holds no usable line")


def _object(line: str) -> dict:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {line.strip()[:40]}")
    return row


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
