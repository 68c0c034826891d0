"""Rows of data files to texts, preference pairs, ranked lists, solutions and prompts.

formats.py opens the files. Rows of Alpaca (instruction, input, output) and ShareGPT
(conversations with from and value) are read wherever prompt and completion, or messages, are.
`columns` names the column that holds a field, where their names differ: {"prompt": "question"}.

A conversation is a list of messages {"role", "content"}. Tools, images and other content are
rejected. A bad line raises a DataError, or is skipped after `on_bad` was called with this error.
`encode` is applied to every row, so that its ValueErrors name the line, too. The reader then
returns the results of `encode`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from rlhf_core.data.chat import Content, Message
from rlhf_core.data.formats import FORMATS, DataError, DataFile, Row, StrPath, names_in
from rlhf_core.data.parallel import Parallel, in_order
from rlhf_core.data.store import assemble, pack
from rlhf_core.files import short, shown

_ROLES = ("system", "user", "assistant")
_UNSUPPORTED = ("tools", "documents", "image", "images", "video", "videos", "audio", "audios")
_EMPTY: tuple = (None, "", [], {})  # what a field holds that asks for nothing; false and 0 do ask
MAX_LINE_BYTES = 2**24
_BATCH = 256, 2**19  # rows and characters that are encoded at a time, at most about
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SPEAKERS["system"] = "system"
# Fields of which a row uses one. A row with several uses the one that `columns` names.
_RIVALS = (
    ("messages", "text", "question", "prompt", "conversations", "instruction"),
    ("completion", "response", "output"),
    ("steps", "completions"),
)
_FOREIGN_FIELDS = {"conversations", "instruction", "system"}  # what `_canonical` looks for
_PARTNERS = {"completion": "prompt", "response": "prompt", "answer": "question"}
_PARTNERS |= {"input": "instruction", "output": "instruction"}
FIELDS = (
    *("prompt", "completion", "response", "messages", "question", "answer", "text", "chosen"),
    *("rejected", "margin", "label_smoothing", "label", "reward", "responses", "ranks", "steps"),
    *("completions", "labels", "system", "instruction", "input", "output", "conversations"),
    *("criterion", "chosen_ratings", "rejected_ratings"),
)

OnBad = Callable[[DataError], None] | None
Encode = Callable | None
Columns = Mapping[str, str] | None


class Text(NamedTuple):
    """A prompt, which may be empty, and a completion to learn. Both are text, or both are messages.

    Messages to learn begin with the assistant's turn. Only turns of the assistant are learned.
    """

    prompt: Content
    completion: Content


class Sample(NamedTuple):
    """A policy's response to a prompt, which may be empty, with its score, KL and length."""

    policy: str
    prompt: Content
    response: str
    score: float | None = None
    kl: float | None = None  # nats per response, to the reference
    tokens: int | None = None
    label: str | None = None  # of the prompt: "safe", "unsafe", or anything else
    criteria: dict[str, float] | None = None  # scores that the score is made of, by criterion


class Labelled(NamedTuple):
    """Prompt and completion as in `Text`, and whether the completion is desirable."""

    prompt: Content
    completion: Content
    label: bool


class Scored(NamedTuple):
    """Prompt and completion as in `Text`, and the reward of the completion."""

    prompt: Content
    completion: Content
    reward: float


class Preference(NamedTuple):
    """Two completions of one prompt. After a prompt of messages they can be text or messages.

    margin: How clearly the chosen completion won, at least 0.
    label_smoothing: Probability that the rejected completion is the better one, in [0, 0.5).
    criteria: For each criterion that the row labels, whether the chosen completion is better by it.
    """

    prompt: Content
    chosen: Content
    rejected: Content
    margin: float | None = None
    label_smoothing: float | None = None
    criteria: dict[str, bool] | None = None


class Ranking(NamedTuple):
    """Two or more responses to one prompt, best first."""

    prompt: Content
    responses: list[str]


class Candidates(NamedTuple):
    """A prompt and answers that people or models are to compare.

    id: As in the row, or None.
    responses: Each has its "text", and perhaps its origin: model, temperature, seed, ...
    ranks: One for each response, the lowest is the best, where the row has an order.
    warning: What to say before the row is shown, or None.
    """

    id: str | int | None
    prompt: Content
    responses: list[dict[str, Any]]
    ranks: list[float] | None = None
    warning: str | None = None


class PromptRow(NamedTuple):
    """A prompt, and the other columns of its row: rewards and judges get them by name.

    A prompt of messages is also the column `messages`.
    """

    prompt: Content
    columns: dict[str, Any]


class Solution(NamedTuple):
    """A prompt and the steps that solve it: a line each, labelled from 0 (wrong) to 1 (right)."""

    prompt: Content
    steps: list[str]
    labels: list[float]


def read_texts(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    """Read {"messages"}, {"prompt", "completion" or "response"}, {"question", "answer"}, {"text"}.

    In `messages` every turn of the assistant counts. After a prompt of messages, the completion is
    text or messages.

    Returns:
        `Text` rows, or what encode returns for each.
    """

    def parse(row: dict) -> Text:
        if "messages" in row:
            messages = _conversation(row, "messages")
            roles = [message["role"] for message in messages]
            if "assistant" not in roles:
                raise ValueError("field 'messages' has no message of the assistant")
            first = roles.index("assistant")
            return Text(messages[:first], messages[first:])
        if "text" in row:
            return Text("", _string(row, "text"))
        if "question" in row:
            return Text(_string(row, "question"), _string(row, "answer"))
        return _text(row)

    return _read(path, parse, on_bad, encode, columns)


def read_labelled(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    """Read {"prompt", "completion" or "response", "label"} or {"messages", "label"}.

    The last message is the completion. The label is true or 1 for desirable, else false or 0.

    Returns:
        `Labelled` rows, or what encode returns for each.
    """

    def parse(row: dict) -> Labelled:
        label = row.get("label")
        if label not in (0, 1):
            raise ValueError(f"field 'label' must be true or false, got {shown(label)}")
        return Labelled(*_text(row), bool(label))

    return _read(path, parse, on_bad, encode, columns)


def read_scored(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    """Read {"prompt", "completion" or "response", "reward"} or {"messages", "reward"}.

    The last message is the completion. The reward is a finite number.

    Returns:
        `Scored` rows, or what encode returns for each.
    """

    def parse(row: dict) -> Scored:
        reward: Any = row.get("reward")
        if not _is_number(reward):
            raise ValueError(f"field 'reward' must be a finite number, got {shown(reward)}")
        return Scored(*_text(row), float(reward))

    return _read(path, parse, on_bad, encode, columns)


def read_preferences(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    r"""Read {"prompt", "chosen", "rejected"} or {"chosen", "rejected"}.

    "margin" and "label_smoothing" are optional, see `Preference`.

    After a prompt of messages, the completions are strings or messages. Without a prompt they are
    conversations with the same beginning, after which the first and the last message are the
    assistant's, or strings that share a dialogue up to the last "\n\nAssistant:" (Anthropic HH).

    Returns:
        `Preference` rows, or what encode returns for each.
    """
    return _read(path, _preference, on_bad, encode, columns)


def iterate_preferences(
    path: StrPath, on_bad: OnBad = None, columns: Columns = None
) -> Iterator[tuple[dict[str, Any], Preference]]:
    """Yield fields and pair of every row of `read_preferences`, also if answers are empty or equal.

    The pairs are yielded while the file is read. Only a check of the data wants such rows.
    """
    return _rows(path, lambda row: (row, _preference(row, as_is=True)), on_bad, columns)


def read_comparisons(
    path: StrPath,
    on_bad: OnBad = None,
    encode: Encode = None,
    columns: Columns = None,
    criteria: Sequence[str] = (),
) -> list[Any]:
    """Read rankings and solutions, and any other row as `read_preferences` does.

    Rankings are {"prompt" or "messages", "responses", "ranks"}. The lowest rank is the best. Ties
    are rejected. Solutions are {"prompt" or "messages", "steps" or "completions", "labels"}. Labels
    are true, false or numbers from 0 to 1.

    Args:
        criteria: Names of criteria, which the rows of pairs label: a "criterion" that the choice is
            about, or "chosen_ratings" and "rejected_ratings", which have a number for each
            criterion. The higher one wins, and margin and label_smoothing then do not count. A row
            with neither is about the whole score. Without names these columns are ignored.

    Returns:
        `Preference`, `Ranking` or `Solution` rows, or what encode returns for each.
    """

    def parse(row: dict) -> Preference | Ranking | Solution:
        if "labels" in row:
            return _solution(row)
        if "responses" in row:
            return _ranking(row)
        return _with_criteria(row, criteria) if criteria else _preference(row)

    return _read(path, parse, on_bad, encode, columns)


def read_prompts(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    """As `read_prompt_rows`, without the other columns.

    Returns:
        Prompts, or what encode returns for each.
    """

    def prompt_of(row: PromptRow) -> Any:
        return row.prompt if encode is None else encode(row.prompt)

    return read_prompt_rows(path, on_bad, prompt_of, columns)


def read_prompt_rows(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    """Read {"messages"}, {"prompt"}, {"question"}, {"text"}, or a .txt file with a prompt per line.

    Messages of the assistant at the end are dropped. `columns` may also rename the other columns.

    Returns:
        `PromptRow` rows, or what encode returns for each.
    """
    if str(path).endswith((".txt", ".txt.gz")):
        if columns:
            raise DataError(f"{path}: a .txt file has no columns, got columns={dict(columns)}")

        def of_line(line: str) -> Any:
            row = PromptRow(line, {})
            return row if encode is None else encode(row)

        return _read(path, None, on_bad, of_line, columns)
    used = (*_RIVALS[0], "input", "system")
    renamed = {column: field for field, column in (columns or {}).items() if field not in used}
    columns = {field: column for field, column in (columns or {}).items() if field in used}

    def parse(row: dict) -> PromptRow:
        field = next(filter(row.__contains__, ("messages", "prompt", "question", "text")), "prompt")
        others = {renamed.get(name, name): x for name, x in row.items() if name != field}
        if field != "messages" and not isinstance(row.get(field), list):
            return PromptRow(_string(row, field), others)
        messages = _conversation(row, field)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise ValueError(f"field {field!r} has only messages of the assistant")
        return PromptRow(messages, others | {"messages": messages})

    return _read(path, parse, on_bad, encode, columns)


def read_samples(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    """Read {"policy" or "model", "prompt" or "messages", "response" or "completion"}.

    The other fields of `Sample` are optional.

    Returns:
        `Sample` rows, or what encode returns for each.
    """

    def parse(row: dict) -> Sample:
        numbers = {name: row.get(name) for name in ("score", "kl", "tokens")}
        for name, value in numbers.items():
            if value is not None and not _is_number(value):
                raise ValueError(f"field {name!r} must be a finite number, got {shown(value)}")
        policy = _string(row, "policy" if "policy" in row else "model")
        field = "completion" if "completion" in row else "response"
        response = _string(row, field, empty=True)
        others = dict(label=row.get("label"), criteria=_ratings(row, "criteria") or None)
        return Sample(policy, _prompt(row), response, **numbers, **others)

    return _read(path, parse, on_bad, encode, columns)


def read_candidates(
    path: StrPath, on_bad: OnBad = None, encode: Encode = None, columns: Columns = None
) -> list[Any]:
    """Read {"prompt" or "messages", "responses"} with optional "id", "ranks", "content_warning".

    A response is text, or an object with a field "text" and any others. Instead of "responses" a
    row may have "chosen" and "rejected", "response_a" and "response_b", or no answers at all. A
    content_warning is true, or text to show before the row.

    Returns:
        `Candidates` rows, or what encode returns for each.
    """

    def parse(row: dict) -> Candidates:
        warning = row.get("content_warning", False)
        if not isinstance(warning, bool | str):
            got = shown(warning)
            raise ValueError(f"field 'content_warning' must be true, false or text, got {got}")
        warning = "This item may be upsetting." if warning is True else warning or None
        name, ranks = row.get("id"), None
        if not (name is None or isinstance(name, str) or (type(name) is int and abs(name) < 2**63)):
            raise ValueError(f"field 'id' must be text or a whole number, got {shown(name)}")
        if name is not None:
            _string({"id": str(name)}, "id")
        if "responses" in row:
            prompt, responses = _prompt(row), row["responses"]
            if not isinstance(responses, list):
                raise ValueError(f"field 'responses' must be a list, got {shown(responses)}")
            responses = [x if isinstance(x, dict) else {"text": x} for x in responses]
            for i, response in enumerate(responses):
                _string(response, "text", f"responses[{i}]", empty=True)
            if "ranks" in row:
                ranks = _ranks(row["ranks"], len(responses))
        elif "response_a" in row or "response_b" in row:
            prompt = _prompt(row)
            texts = (_string(row, name, empty=True) for name in ("response_a", "response_b"))
            responses = [{"text": text} for text in texts]
        elif "chosen" in row or "rejected" in row:
            pair = _preference(row)
            prompt, ranks = pair.prompt, [1, 2]
            responses = [{"text": pair.chosen}, {"text": pair.rejected}]
        else:
            prompt, responses = _prompt(row), []
        return Candidates(name, prompt, responses, ranks, warning)

    return _read(path, parse, on_bad, encode, columns)


def check_messages(value, field: str, empty: bool = False) -> list[Message]:
    """Return the messages with only role and content. Raises ValueError if there is more.

    empty: Messages of the assistant may be empty.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"field {field!r} must be a list of messages, got {shown(value)}")
    if not value:
        raise ValueError(f"field {field!r} is an empty list")
    messages, silent = [], ("system", "assistant") if empty else ("system",)
    for i, message in enumerate(value):
        where = f"{field}[{i}]"
        if not isinstance(message, dict):
            raise ValueError(
                f"field {where!r} must be an object with role and content, got {shown(message)}"
            )
        role = _string(message, "role", where)
        if role not in _ROLES:
            roles = ", ".join(_ROLES)
            raise ValueError(f"field '{where}.role' must be one of {roles}, got {short(role)}")
        for name, extra in message.items():
            if name not in ("role", "content") and extra not in _EMPTY:
                raise ValueError(
                    f"field '{where}.{name[:80]}' is not supported, got {shown(extra)}: a message "
                    "has only role and content, and every turn of the assistant is learned"
                )
        content = _string(message, "content", where, empty=role in silent)
        messages.append({"role": role, "content": content})
    return messages


def _text(row: dict) -> Text:
    if "messages" in row:
        messages = _conversation(row, "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"field 'messages' must end with an answer of the assistant, got {roles}"
            )
        return Text(messages[:-1], messages[-1:])
    completion = "completion"
    if completion not in row:
        completion = "output" if "output" in row and "response" not in row else "response"
    if isinstance(row.get("prompt"), list):
        return Text(_conversation(row, "prompt"), _turns(row, completion))
    return Text(_string(row, "prompt"), _string(row, completion))


def _preference(row: dict, as_is: bool = False) -> Preference:
    """The pair of a row. as_is: The answers may be empty or equal."""
    if isinstance(row.get("prompt"), list):
        prompt, shared = _conversation(row, "prompt"), 0
        answers = {field: _turns(row, field, as_is) for field in ("chosen", "rejected")}
    elif isinstance(row.get("chosen"), list):
        answers = {field: _conversation(row, field, as_is) for field in ("chosen", "rejected")}
        both = list(answers.values())
        shared = next((i for i, (a, b) in enumerate(zip(*both)) if a != b), min(map(len, both)))
        shared -= both[0] == both[1]  # the last message is the answer
        prompt = both[0][:shared]
        contents = [message["content"] for message in prompt]
        if row.get("prompt") is not None and row["prompt"] not in contents:
            raise ValueError("field 'prompt' is not a message that 'chosen' and 'rejected' share")
    else:
        return _pair(row, *_strings(row, as_is), as_is)
    if not prompt:
        raise ValueError("fields 'chosen' and 'rejected' share no message")
    for field, messages in answers.items():
        roles = [message["role"] for message in messages[shared:]]
        if not roles or {roles[0], roles[-1]} != {"assistant"}:
            raise ValueError(
                f"field {field!r} must start and end with messages of the assistant after the "
                f"shared messages, got {', '.join(roles) or 'none'}"
            )
    turns = (messages[shared:] for messages in answers.values())
    chosen, rejected = (x[0]["content"] if len(x) == 1 else x for x in turns)
    return _pair(row, prompt, chosen, rejected, as_is)


def _with_criteria(row: dict, names: Sequence[str]) -> Preference:
    """The pair of a row, with the criteria that the row labels."""
    pair = _preference(row)
    if row.get("criterion") not in _EMPTY:
        name = _string(row, "criterion")
        chosen, rejected = {name: 1}, {name: 0}
    else:
        chosen, rejected = (_ratings(row, f"{side}_ratings") for side in ("chosen", "rejected"))
        if chosen.keys() != rejected.keys():
            raise ValueError(
                "fields 'chosen_ratings' and 'rejected_ratings' must rate the same criteria, got "
                f"{shown(chosen)} and {shown(rejected)}"
            )
        if chosen != rejected:
            pair = pair._replace(margin=None, label_smoothing=None)  # they are of the choice
    for name in chosen:
        if name not in names:
            raise ValueError(
                f"criterion {short(name)} is not one of {', '.join(names)}. Correct the name, or "
                "add it, with weight 0 if it is not to count"
            )
    better = {name: x > rejected[name] for name, x in chosen.items() if x != rejected[name]}
    return pair._replace(criteria=better or None)


def _ratings(row: dict, field: str) -> dict[str, float]:
    """The numbers in a field by criterion, without those that are null."""
    given = row.get(field) or {}
    if not isinstance(given, dict) or not all(x is None or _is_number(x) for x in given.values()):
        raise ValueError(f"field {field!r} must be an object of numbers, got {shown(given)}")
    return {name: x for name, x in given.items() if x is not None}


def _strings(row: dict, empty: bool) -> tuple[str, str, str]:
    chosen = _string(row, "chosen", empty=empty)
    rejected = _string(row, "rejected", empty=empty)
    if "prompt" in row:
        return _string(row, "prompt"), chosen, rejected
    turn = "\n\nAssistant:"
    end = chosen.rfind(turn) + len(turn)
    if turn not in chosen or not rejected.startswith(chosen[:end]):
        raise ValueError("field 'prompt' is missing, and 'chosen' and 'rejected' share no dialogue")
    answers = {"chosen": chosen[end:], "rejected": rejected[end:]}
    chosen_end, rejected_end = (_string(answers, field, empty=empty) for field in answers)
    return chosen[:end], chosen_end, rejected_end


def _pair(
    row: dict, prompt: Content, chosen: Content, rejected: Content, as_is: bool
) -> Preference:
    if chosen == rejected and not as_is:
        raise ValueError("fields 'chosen' and 'rejected' are equal")
    margin = row.get("margin")
    if margin is not None and not (_is_number(margin) and margin >= 0):
        raise ValueError(f"field 'margin' must be a number >= 0, got {shown(margin)}")
    smoothing = row.get("label_smoothing")
    if smoothing is not None and not (_is_number(smoothing) and 0 <= smoothing < 0.5):
        raise ValueError(
            f"field 'label_smoothing' must be a number in [0, 0.5), got {shown(smoothing)}: from "
            "0.5 on, the rejected completion is at least as good. Swap the two, or remove the row"
        )
    return Preference(prompt, chosen, rejected, margin, smoothing)


def _prompt(row: dict) -> Content:
    field = "messages" if "messages" in row else "prompt"
    return _conversation(row, field) if isinstance(row.get(field), list) else _string(row, field)


def _solution(row: dict) -> Solution:
    field, labels = "completions" if "completions" in row else "steps", row["labels"]
    if not isinstance(row.get(field), list) or not row[field]:
        got = shown(row.get(field))
        raise ValueError(f"field {field!r} must be a list of steps, got {got}")
    steps = [step.strip("\n") for step in _list_of_strings(row[field], field)]
    for i, step in enumerate(steps):
        if "\n" in step:
            raise ValueError(
                f"field '{field}.{i}' contains a newline, which ends a step: {step[:40]!r}"
            )
    valid = isinstance(labels, list) and len(labels) == len(steps)
    if not valid or not all(
        isinstance(label, bool) or (_is_number(label) and 0 <= label <= 1) for label in labels
    ):
        wanted = f"{len(steps)} of true, false or a number from 0 to 1"
        raise ValueError(f"field 'labels' must be {wanted}, got {shown(labels)}")
    return Solution(_prompt(row), steps, list(map(float, labels)))


def _ranking(row: dict) -> Ranking:
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        got = shown(responses)
        raise ValueError(f"field 'responses' must be a list of at least 2, got {got}")
    count, ranks = len(responses), _ranks(row.get("ranks"), len(responses))
    if len(set(ranks)) < count:
        raise ValueError(f"field 'ranks' has a tie, which gives no order: {shown(ranks)}")
    texts = _list_of_strings(responses, "responses")
    if len(set(texts)) < count:
        raise ValueError("field 'responses' has the same response twice")
    return Ranking(_prompt(row), [texts[i] for i in sorted(range(count), key=ranks.__getitem__)])


def _ranks(ranks, count: int) -> list[float]:
    if not isinstance(ranks, list) or len(ranks) != count or not all(map(_is_number, ranks)):
        raise ValueError(f"field 'ranks' must be a list of {count} numbers, got {shown(ranks)}")
    return ranks


def _list_of_strings(values: list, field: str) -> list[str]:
    return [_string({str(i): value}, str(i), field) for i, value in enumerate(values)]


def _is_number(value) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) < 2**127  # so that float32 holds it


def _conversation(row: dict, field: str, empty: bool = False) -> list[Message]:
    """The messages of a field. Rejects a row with tools, documents or media."""
    for name in _UNSUPPORTED:
        if row.get(name) not in _EMPTY:
            raise ValueError(f"field {name!r} is not supported: messages are plain text")
    if field not in row:
        raise ValueError(_missing(field, row))
    return check_messages(row[field], field, empty)


def _turns(row: dict, field: str, empty: bool = False) -> list[Message]:
    """A completion after messages: a string, or messages that begin with the assistant's."""
    if isinstance(row.get(field), str):
        return [{"role": "assistant", "content": _string(row, field, empty=empty)}]
    messages = _conversation(row, field, empty)
    if messages[0]["role"] != "assistant":
        raise ValueError(f"field '{field}[0].role' must be assistant, got {messages[0]['role']!r}")
    return messages


def _string(row: dict, field: str, where: str = "", empty: bool = False) -> str:
    """The text of a field. where: Which part of the line `row` is, for errors."""
    value = row.get(field)
    if isinstance(value, str) and value.isascii() and value and not value.isspace():
        return value  # what most rows hold, found at once
    name = f"{where}.{field}" if where else field
    if field not in row:
        raise ValueError(_missing(name, row))
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be a string, got {shown(value)}")
    if not value.strip() and not empty:
        raise ValueError(f"field {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair, which tokenizers reject
        raise ValueError(f"field {name!r} has a lone surrogate, which is not a character") from None
    return value


def _missing(name: str, row: dict) -> str:
    return f"field {name!r} is missing; the line has {names_in(row)}"


def _read(
    path: StrPath, parse: Callable | None, on_bad: OnBad, encode: Encode, columns: Columns
) -> list:
    """All good rows, as `_rows` yields them."""
    return assemble(chain.from_iterable(_batches(path, parse, on_bad, encode, columns)))


def _rows(path: StrPath, parse: Callable, on_bad: OnBad, columns: Columns) -> Iterator:
    """Yield every good row, parsed, while the file is read; on_bad hears of bad ones in between."""
    return chain.from_iterable(_batches(path, parse, on_bad, None, columns, list, most=1))


def _batches(
    path: StrPath,
    parse: Callable | None,
    on_bad: OnBad,
    encode: Encode,
    columns: Columns,
    packed: Callable[[list], Any] = pack,
    most: int = _BATCH[0],
) -> Iterator[Any]:
    """Yield the good rows, parsed and encoded, some at a time, packed.

    Bad rows are reported before the good ones of their batch.

    parse: None leaves every line as it is.
    most: rows of a batch.
    """
    alone, notes = not isinstance(encode, Parallel), ()
    if isinstance(encode, Parallel):
        encode, notes = encode.encode, encode.notes
    file = DataFile(path, MAX_LINE_BYTES)
    rows = file.rows(plain=parse is None)
    failures: list[Exception] = []  # of the file

    def raw() -> Iterator[list[tuple[str, Row]]]:
        batch, size = [], 0
        try:
            for row in rows:
                batch.append(row)
                size += len(row[1]) if isinstance(row[1], str) else _BATCH[1] // 64
                if len(batch) == most or size >= _BATCH[1]:
                    yield batch
                    batch, size = [], 0
        except Exception as error:
            failures.append(error)  # the rows before come first
        if batch:
            yield batch

    def work(batch: list[tuple[str, Row]]) -> tuple[Any, list[DataError]]:
        items, bad = [], []
        for place, row in batch:
            try:
                item: Any = row
                if parse is not None:
                    item = parse(_canonical(file.fields(place, row, columns), columns or {}))
                elif isinstance(row, DataError):
                    raise row
                items.append(item if encode is None else encode(item))
                continue
            except DataError as error:
                bad.append(error)
            except ValueError as error:
                bad.append(DataError(f"{place}: {error}"))
            if on_bad is None:
                break
        return packed(items) if items else None, bad

    found = False
    # On an error, processes, file and bar are closed before it is shown.
    with (
        contextlib.closing(rows),
        contextlib.closing(in_order(raw(), work, notes, alone)) as results,
    ):
        for items, bad in results:
            for error in bad:
                if on_bad is None:
                    raise error from None
                on_bad(error)
            if items is not None:
                found = True
                yield items
        if failures:
            raise failures[0]
    if not found:
        raise DataError(f"{path}: no usable line" + f". {FORMATS}" * (parse is not None))


def _canonical(row: dict, columns: Mapping[str, str]) -> dict:
    """The row with Alpaca's and ShareGPT's fields, and `system`, as prompt and messages."""
    if not columns and _FOREIGN_FIELDS.isdisjoint(row):
        return row
    named = set(columns)
    named |= {_PARTNERS[field] for field in columns if _PARTNERS.get(field) in row}
    for rivals in _RIVALS:
        if not named.isdisjoint(rivals):
            row = {name: row[name] for name in row if name in named or name not in rivals}
    others = ("messages", "text", "question", "prompt")
    if not any(name in row for name in others) and not _is_dialogue(row.get("chosen")):
        if "conversations" in row:
            messages = _sharegpt(row["conversations"])
            row = row | {"messages": check_messages(messages, "conversations")}
        elif "instruction" in row:
            if row.get("history") not in _EMPTY:
                raise ValueError("field 'history' is not supported: write the turns as messages")
            prompt, context = _string(row, "instruction"), row.get("input", row.get("context"))
            if context not in _EMPTY:
                context = _string({"input": context}, "input", empty=True).strip()
            row = row | {"prompt": f"{prompt}\n\n{context}" if context else prompt}
    return _with_system(row)


def _is_dialogue(chosen) -> bool:
    """Whether a completion has its prompt within."""
    return isinstance(chosen, list) or (isinstance(chosen, str) and "\n\nAssistant:" in chosen)


def _sharegpt(turns):
    """ShareGPT's turns as messages; a turn that has no `from` stays."""
    if not isinstance(turns, list):
        return turns
    messages = []
    for i, turn in enumerate(turns):
        if isinstance(turn, dict) and "from" in turn:
            speaker = turn["from"]
            if not isinstance(speaker, str) or speaker not in _SPEAKERS:
                wanted = ", ".join(_SPEAKERS)
                raise ValueError(
                    f"field 'conversations[{i}].from' must be one of {wanted}, got {shown(speaker)}"
                )
            others = {name: x for name, x in turn.items() if name not in ("from", "value")}
            turn = others | {"role": _SPEAKERS[speaker], "content": turn.get("value")}
        messages.append(turn)
    return messages


def _with_system(row: dict) -> dict:
    """The row with its field `system` as the first message of its conversation."""
    system = row.get("system")
    if system in _EMPTY:
        return row
    if not _string(row, "system", empty=True).strip():
        return row
    names = ["messages", "prompt"]
    names += ["chosen", "rejected"] * (not isinstance(row.get("prompt"), list))
    names = [name for name in names if isinstance(row.get(name), list) and row[name]]
    if not names:
        raise ValueError(
            f"field 'system' needs a conversation, but the prompt is plain text, got "
            f"{shown(system)}. Write the prompt as a list of messages, or remove 'system'"
        )
    row = dict(row)
    for name in names:
        first = row[name][0]
        if not (isinstance(first, dict) and first.get("role") == "system"):
            row[name] = [{"role": "system", "content": system}, *row[name]]
        elif first.get("content") != system:
            raise ValueError(
                f"field 'system' contradicts the system message in {name!r}, got {shown(system)}. "
                "Remove one of them"
            )
    return row
