"""A context in front of the prompt, which a teacher reads and a student does not.

In front of plain text it is a prefix. In front of a conversation it is a system message, or some
messages, such as examples of good answers. A sequence that is too long loses the start of its
prompt, then the end of its completion, never a part of the context.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_core.data.chat import Content, Message
from rlhf_core.data.encode import Example, encode_prompt, encode_text, fit
from rlhf_core.data.readers import PromptRow, Text, check_messages
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.files import parse_json, read_text


def read_context(path: Path) -> Content:
    """Return the context in a file: the messages of a .json file, else the text as it is.

    Raises:
        ValueError: The file is empty, not UTF-8, or holds no messages; the message names it.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: the context is empty")
    if path.suffix != ".json":
        return text
    try:
        return check_messages(parse_json(text), "context")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def in_context(prompt: list[Message], context: Content) -> list[Message]:
    """Return a conversation with the context in front.

    A conversation has one system message at most, so those of context and prompt become one. It
    comes first.
    """
    if isinstance(context, str):
        context = [{"role": "system", "content": context.strip()}]
    systems = [messages[0] for messages in (context, prompt) if _starts_with_system(messages)]
    turns = [*context[_starts_with_system(context) :], *prompt[_starts_with_system(prompt) :]]
    if not systems:
        return turns
    content = "\n\n".join(message["content"] for message in systems)
    return [{"role": "system", "content": content}, *turns]


def encode_prompt_in_context(
    row: PromptRow, tokenizer: Tokenizer, context: Content | None
) -> Example:
    """Return an `Example` without completion: the prompt, and the teacher's with the context."""
    prompt = encode_prompt(row.prompt, tokenizer)
    if context is None:
        return Example(prompt, [])
    if isinstance(row.prompt, str):
        teacher_prompt = _prefixed(row.prompt, context, tokenizer)
    else:
        teacher_prompt = encode_prompt(in_context(row.prompt, context), tokenizer)
    return Example(prompt, [], teacher_prompt_ids=teacher_prompt)


def encode_in_context(
    text: Text, tokenizer: Tokenizer, max_length: int, context: Content | None
) -> Example:
    """Tokenise a prompt and a completion as `encode_text`, and the teacher's prompt.

    Args:
        max_length: Tokens of context, prompt and completion together; `fit_both` cuts to it.

    Raises:
        ValueError: The context leaves no room, is a conversation before plain text, or changes the
            tokens that the chat template makes of the completion.
    """
    if context is None:
        return encode_text(text, tokenizer, max_length)
    example = encode_text(text, tokenizer, sys.maxsize)
    if isinstance(text.prompt, str):
        teacher_prompt = _prefixed(text.prompt, context, tokenizer)
    else:
        prompted = Text(in_context(text.prompt, context), text.completion)
        taught = encode_text(prompted, tokenizer, sys.maxsize)
        if taught[1:3] != example[1:3]:
            raise ValueError("the chat template renders the completion differently with a context")
        teacher_prompt = taught.prompt_ids
    example = example._replace(teacher_prompt_ids=teacher_prompt)
    return fit_both(example, max_length, tokenizer.bos_id)


def fit_both(example: Example, max_length: int, bos_id: int | None) -> Example:
    """Cut an example so that neither student nor teacher reads more than max_length tokens.

    The student's sequence is cut as by `fit`. The teacher's prompt loses as many tokens of its
    prompt, right after the context.

    Raises:
        ValueError: The context leaves room for less than two tokens.
    """
    prompt, teacher_prompt = example.prompt_ids, example.teacher_prompt_ids or example.prompt_ids
    context = max(len(teacher_prompt) - len(prompt), 0)
    room = max_length - context
    if room < 2:
        raise ValueError(
            f"the context has {context} tokens, which leaves no room for prompt and completion in "
            f"{max_length} tokens. Shorten it, or raise max_length if the models have more"
        )
    kept, (ids,) = fit(prompt, [example.completion_ids], room, bos_id)
    mask = example.completion_mask
    cut = example._replace(
        prompt_ids=kept,
        completion_ids=ids,
        completion_mask=None if mask is None else mask[: len(ids)],
    )
    return cut_teacher_prompt(cut, example)


def cut_teacher_prompt(cut: Example, whole: Example) -> Example:
    """Return `cut`, whose prompt was cut, with the teacher's prompt cut by as many tokens."""
    teacher_prompt, prompt = whole.teacher_prompt_ids, whole.prompt_ids
    if teacher_prompt is None:
        return cut
    pairs = zip(reversed(prompt), reversed(teacher_prompt))
    shared = next(
        (n for n, (a, b) in enumerate(pairs) if a != b), min(map(len, (prompt, teacher_prompt)))
    )
    start = len(teacher_prompt) - shared
    lost = len(prompt) - len(cut.prompt_ids)
    return cut._replace(teacher_prompt_ids=teacher_prompt[:start] + teacher_prompt[start + lost :])


def _prefixed(prompt: str, context: Content, tokenizer: Tokenizer) -> list[int]:
    if not isinstance(context, str):
        raise ValueError(
            "the context is a conversation, but the prompt is plain text. Write the context as "
            "text, or the prompt as messages"
        )
    own = tokenizer.encode_completion(prompt) if prompt else []
    return [*tokenizer.encode_prompt(context), *own]


def _starts_with_system(messages: list[Message]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"
