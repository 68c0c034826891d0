"""Conversations to text: a model's Jinja template in jinja2's sandbox, and which of its text the assistant wrote.

What a message says is text, whatever it spells: a special token in it gets a character in its middle that stands
nowhere else in the conversation, which whoever encodes the text takes out again. A template may strip or split a
message; one that looks for a special token in it does not find it. Leaves out tools, documents and images.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_core.files import require

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


class Rendered(NamedTuple):
    """A conversation's text, the [start, end) of what the assistant wrote, and the character to take out again."""

    text: str
    spans: list[tuple[int, int]]
    shield: str


class ChatTemplate:
    """A Jinja chat template as Hugging Face's tokenizers carry it.

    The assistant's text is what `{% generation %} ... {% endgeneration %}` encloses. A template without this tag
    must render the messages before an assistant's turn, with add_generation_prompt, and those up to and with it, as
    prefixes of the whole; the turn is what lies between.

    source: the template. file: named in errors. names: text of each special token by its name ("bos_token", ...).
    special: every text that encodes as a special token.
    """

    def __init__(self, source: str, file: Path, names: dict[str, str], special: Iterable[str]):
        self.file, self._names = file, names
        self.tagged = re.search(r"{%[-+]?\s*generation\s*[-+]?%}", source) is not None
        spelled = "|".join(map(re.escape, special)) or "(?!)"
        self._first_character = re.compile(f"(?=(?:{spelled}))(.)", re.DOTALL)
        self._template = self._run(lambda: _environment().from_string(source))

    def render(
        self, messages: Sequence[Message], *, start: int = 0, add_generation_prompt: bool = False
    ) -> Rendered:
        """The whole conversation, with the spans of the assistant's turns in messages[start:]. ValueError, naming
        the template's file, where the template fails or its turns cannot be told apart."""
        said = "".join(value for message in messages for value in message.values())
        absent = (char for char in map(chr, range(0xFDD0, 0x110000)) if char not in said)
        shield, opening, closing = (next(absent) for _ in range(3))
        shielded = [
            {
                key: self._first_character.sub(lambda match: match[1] + shield, value)
                for key, value in message.items()
            }
            for message in messages
        ]

        def text(count: int, add_generation_prompt: bool = False) -> str:
            context = dict(messages=shielded[:count], tools=None, documents=None, **self._names)
            context.update(generation_opening=opening, generation_closing=closing)
            return self._run(
                lambda: self._template.render(context, add_generation_prompt=add_generation_prompt)
            )

        whole = text(len(messages), add_generation_prompt)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.tagged:
            skipped = text(start).count(opening) if any(i < start for i in turns) else 0
            whole, spans = _take_out(whole, opening, closing)
            return Rendered(whole, spans[skipped:], shield)
        spans = []
        for i in (i for i in turns if i >= start):
            before, after = text(i, add_generation_prompt=True), text(i + 1)
            if not (
                whole.startswith(before) and whole.startswith(after) and len(before) <= len(after)
            ):
                raise ValueError(
                    f"{self.file}: the chat template renders messages[:{i}] with the generation prompt, or "
                    f"messages[:{i + 1}], otherwise than in the whole conversation, so what the assistant wrote is not "
                    "known: enclose it in {% generation %} and {% endgeneration %} in the template"
                )
            spans.append((len(before), len(after)))
        return Rendered(whole, spans, shield)

    def _run(self, action):
        """A template is a program from elsewhere: whatever it raises is an error of its file."""
        try:
            return action()
        except ImportError:
            raise
        except Exception as error:
            where = f"{self.file}:{error.lineno}" if hasattr(error, "lineno") else str(self.file)
            kind = type(error).__name__
            raise ValueError(f"{where}: the chat template fails: {kind}: {error}") from None


def _take_out(text: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """Text without the two marks, and the spans that they enclosed."""
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


@functools.cache
def _environment():
    """jinja2's sandbox with what Hugging Face's templates rely on."""
    sandbox, ext, nodes = (
        require(f"jinja2.{name}", "train") for name in ("sandbox", "ext", "nodes")
    )

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}: the body, between two marks from the context."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opening, closing = (
                nodes.Output([nodes.Name(f"generation_{side}", "load")], lineno=line)
                for side in ("opening", "closing")
            )
            return [opening, *body, closing]

    def raise_exception(message):
        raise require("jinja2", "train").TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment
