"""Conversations to text with a model's Jinja template, run in the sandbox of sandbox.py.

The content of a message is always plain text. If it spells a special token, a shield is put inside
the token: a character that the conversation does not contain, to be removed by whoever encodes the
text. Templates can strip or split a message, but they cannot find a special token in it. Left out:
tools, documents and images.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.data.sandbox import environment, undeclared

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
Content = str | list[Message]  # text, or a conversation
MAX_TEMPLATE = 2**20  # characters
# Variables of templates that are not the user's to set.
_RESERVED = {"messages", "add_generation_prompt", "tools", "documents"}
_RESERVED |= {"generation_opening", "generation_closing"}


def texts_of(content: Content) -> list[str]:
    """The text, or that of each message of a conversation."""
    return [content] if isinstance(content, str) else [turn["content"] for turn in content]


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: With shields.
        spans: The [start, end) of each turn of the assistant.
        shield: The character to remove from the text.
    """

    text: str
    spans: list[tuple[int, int]]
    shield: str


class ChatTemplate:
    """A Jinja chat template of a Hugging Face tokenizer.

    `{% generation %} ... {% endgeneration %}` encloses the assistant's text. A template without it
    usually renders two prefixes of the whole conversation: the messages before a turn, with
    add_generation_prompt, and the messages up to and including the turn, which lies in between.
    Templates of reasoning models rewrite earlier turns (Qwen3), or drop the reasoning of all turns
    (DeepSeek-R1). Such a turn is found by its content. Reasoning that is dropped from the last turn
    is put back, after the generation prompt.

    Args:
        source: The template.
        file: Its file, which errors name.
        names: Text of each special token by its name ("bos_token", ...).
        special: All texts that encode as a special token.
        date: What `strftime_now` of templates writes. None means now.
        variables: Values of variables of the template, such as enable_thinking.
        dates: Gets what `strftime_now` writes, by its format.
    """

    def __init__(
        self,
        source: str,
        file: Path,
        names: dict[str, str],
        special: Iterable[str],
        date: datetime.date | None = None,
        variables: Mapping[str, Any] | None = None,
        dates: dict[str, str] | None = None,
    ):
        self._dates: dict[str, str] = {} if dates is None else dates
        self._date = date
        self.file, self._names = file, {**names, **(variables or {})}
        self.tagged = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) is not None
        spelled = "|".join(map(re.escape, special)) or "(?!)"
        self._spelled = re.compile(spelled)
        self._first_character = re.compile(f"(?=(?:{spelled}))(.)", re.DOTALL)
        if len(source) > MAX_TEMPLATE:
            raise ValueError(
                f"{file}: the chat template has {len(source)} characters, more than {MAX_TEMPLATE}"
            )
        self._environment = environment(self._strftime)
        self._template = self._run(lambda: self._environment.from_string(source))
        if variables:
            read = self._run(lambda: undeclared(self._environment, source))
            read -= {*_RESERVED, *names}
            for name in variables:
                if name not in read:
                    raise ValueError(
                        f"{file}: the chat template has no variable {name!r}. It reads "
                        f"{', '.join(sorted(read)) or 'none'}"
                    )

    def render(
        self, messages: Sequence[Message], *, start: int = 0, add_generation_prompt: bool = False
    ) -> Rendered:
        """Return the whole conversation, with the spans of the assistant in messages[start:].

        Raises:
            ValueError: The template fails, or the assistant's turns cannot be found.
        """
        used = {char for message in messages for value in message.values() for char in value}
        unused = (char for char in map(chr, range(0xFDD0, 0x110000)) if char not in used)
        shield, opening, closing = (next(unused, "") for _ in range(3))
        if not closing:
            raise ValueError("the conversation leaves no character unused")

        def shielded(text: str) -> str:
            return self._first_character.sub(lambda match: match[1] + shield, text)

        safe = [{key: shielded(value) for key, value in message.items()} for message in messages]

        def text(messages: list[Message], add_generation_prompt: bool = False) -> str:
            context = dict(self._names, messages=messages, tools=None, documents=None)
            context.update(generation_opening=opening, generation_closing=closing)
            return self._run(
                lambda: self._template.render(context, add_generation_prompt=add_generation_prompt)
            )

        whole = text(safe, add_generation_prompt)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.tagged:
            skipped = text(safe[:start]).count(opening) if any(i < start for i in turns) else 0
            whole, spans = _remove_marks(whole, opening, closing)
            return Rendered(whole, spans[skipped:], shield)
        spans = []
        for i in (i for i in turns if i >= start):
            before, after = text(safe[:i], add_generation_prompt=True), text(safe[: i + 1])
            prefixes = whole.startswith(before) and whole.startswith(after)
            if prefixes and len(before) <= len(after):
                spans.append((len(before), len(after)))
                continue
            marked = {**safe[i], "content": opening}
            found = _find_rewritten(
                whole,
                safe[i]["content"],
                opening,
                before=before,
                inside=text([*safe[:i], marked, *safe[i + 1 :]], add_generation_prompt),
                alone=text([*safe[:i], marked]),
                special=self._spelled,
            )
            if found is None:
                raise ValueError(
                    f"{self.file}: the chat template renders messages[:{i}] with the generation "
                    f"prompt, or messages[:{i + 1}], differently from the whole conversation. The "
                    "assistant's text cannot be found: enclose it in {% generation %} and "
                    "{% endgeneration %} in the template"
                )
            whole, span = found
            spans.append(span)
        return Rendered(whole, spans, shield)

    def _strftime(self, format: str) -> str:
        date = self._date and datetime.datetime(*self._date.timetuple()[:3])
        self._dates[format] = (date or datetime.datetime.now()).strftime(format)
        return self._dates[format]

    def _run(self, action):
        """Turn any exception of the template, which is foreign code, into an error of its file."""
        self._environment.start()
        try:
            return action()
        except ImportError:
            raise
        except Exception as error:
            where = f"{self.file}:{error.lineno}" if hasattr(error, "lineno") else str(self.file)
            kind = type(error).__name__
            raise ValueError(f"{where}: the chat template fails: {kind}: {error}") from None


def _find_rewritten(
    whole: str,
    content: str,
    mark: str,
    *,
    before: str,
    inside: str,
    alone: str,
    special: re.Pattern[str],
) -> tuple[str, tuple[int, int]] | None:
    """Return the conversation, and the span of a turn that is rendered otherwise alone.

    Args:
        whole: The conversation.
        content: The content of the turn.
        mark: A character that shows where the content is: it replaces it in inside and alone.
        before: The messages before the turn, with the generation prompt.
        inside: `whole`, with the mark.
        alone: The messages up to and including the turn, with the mark.
        special: Matches the special tokens.
    """
    head, _, tail = inside.partition(mark)
    start, end = len(head), len(whole) - len(tail)
    if inside.count(mark) != 1 or head + whole[start:end] + tail != whole:
        return None
    dropped = whole[start:end].strip() != content.strip()
    if inside == alone and dropped and before.startswith(head):
        # The model writes the reasoning after the generation prompt, which can open it: "<think>".
        content = content.lstrip().removeprefix(before[start:].strip()).lstrip("\n")
        start, end = len(before), len(before) + len(content)
        whole = before + content + tail
    elif whole.startswith(before):
        start = min(start, len(before))
    own = alone.partition(mark)[2]  # what ends the turn, such as EOS, unless `tail` omits it
    differ = (i for i, (one, other) in enumerate(zip(own, tail)) if one != other)
    same = next(differ, min(len(own), len(tail)))
    cut = (token.start() for token in special.finditer(tail) if token.start() < same < token.end())
    return whole, (start, end + next(cut, same))


def _remove_marks(text: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without the two marks, and the spans that they enclosed."""
    spans, pieces, length = [], [], 0
    for piece in re.split(f"([{opening}{closing}])", text):
        if piece == opening:
            start = length
        elif piece == closing:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans
