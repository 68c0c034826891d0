"""Constitutional AI: a model criticises and revises its own answers by principles.

Each round takes a principle at random: the model writes a critique of its answer, then a revision.
Revisions make data for SFT, and pairs against the first answers. A request is a message of the user
in a conversation; after a prompt of text it is the line "Critique request: ...".

Source: Bai et al. 2022, Constitutional AI, section 3.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_core.data import Tokenizer, encode_prompt
from rlhf_core.data.chat import Content, texts_of
from rlhf_core.feedback.candidates import SamplingConfig
from rlhf_core.files import read_json, read_text, shown
from rlhf_core.models import Transformer
from rlhf_core.rollout import sample

CONSTITUTION = Path(__file__).with_name("constitution.json")
RED_TEAM = Path(__file__).with_name("red_team.jsonl")  # prompts that ask for mild harm
SAFE_PROMPTS = Path(__file__).with_name("safe_prompts.jsonl")  # that only sound like it


class Principle(NamedTuple):
    """A principle as a question to a judge, and as requests for a critique and a revision."""

    name: str
    question: str
    critique: str
    revision: str


def read_principles(path: Path) -> list[Principle]:
    """The principles in a file: a JSON list of texts or objects, or text with one on each line.

    Raises:
        ValueError: an entry is neither a text nor an object with the fields of `Principle`.
    """
    if path.suffix == ".json":
        entries = read_json(path)
    else:
        entries = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: must hold a list of principles, got {shown(entries)}")
    principles = []
    for i, entry in enumerate(entries):
        if isinstance(entry, str):
            entry = {
                "name": entry,
                "question": entry,
                "critique": f"Say where the last answer falls short of this principle: {entry}",
                "revision": f"Rewrite the last answer so that it follows this principle: {entry}",
            }
        fields = [
            entry.get(name) if isinstance(entry, dict) else None for name in Principle._fields
        ]
        if not all(isinstance(text, str) and text.strip() for text in fields):
            raise ValueError(
                f"{path}: principle {i} must be a text, or an object with the texts "
                f"{', '.join(Principle._fields)}, got {shown(entry)}"
            )
        principles.append(Principle(*fields))
    return principles


class Written(NamedTuple):
    """What a model wrote; `read` and `written` count tokens."""

    text: str
    read: int
    written: int


@dataclass(frozen=True)
class Writer:
    """A model that answers prompts. Each answer has its own seed."""

    model: Transformer
    tokenizer: Tokenizer
    eos_ids: Sequence[int]
    config: SamplingConfig

    def __call__(self, prompts: Sequence[Content], seeds: Sequence[int]) -> list[Written | None]:
        """Answers to the prompts; None for a prompt that leaves no room for one."""
        config = self.config
        room = min(config.max_length, self.model.config.max_positions) - config.response_length
        encoded = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        places = [i for i, ids in enumerate(encoded) if len(ids) <= room]
        found: list[Written | None] = [None] * len(prompts)
        if not places:
            return found
        rollout = sample(
            self.model,
            [encoded[i] for i in places],
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            eos_ids=self.eos_ids,
            stop_strings=config.stop_strings,
            tokenizer=self.tokenizer,
            seeds=torch.tensor([seeds[i] for i in places]),
        )
        for i, ids in zip(places, rollout.responses()):
            found[i] = Written(self.tokenizer.decode(ids).strip(), len(encoded[i]), len(ids))
        return found


def revised(
    writer: Writer,
    prompts: Sequence[Content],
    principles: Sequence[Principle],
    rounds: int,
    first: int = 0,
) -> Iterator[tuple[int, list[list[dict[str, Any]]]]]:
    """Answer prompts, and revise the answers in rounds, batch by batch.

    Args:
        first: the prompt to begin with, a multiple of the config's batch_size.

    Yields:
        For each batch its first prompt, and for each prompt a list of one object: answer; rounds,
        each with principle, critique, revision, and `dropped`, why the revision is not used, or
        None; revision, the last one that is used, or None; tokens that were read and written.
    """
    size, seed = writer.config.batch_size, writer.config.seed
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**53, (len(prompts), 1 + 2 * rounds), generator=generator).tolist()
    for start in range(first, len(prompts), size):
        part = prompts[start : start + size]
        tokens = [{"read": 0, "written": 0} for _ in part]

        def write(asked: dict[int, Content], stage: int, start=start, tokens=tokens):
            """Texts by row. A row whose text would be empty, or has no room, has none."""
            own = [seeds[start + i][stage] for i in asked]
            found = {i: x for i, x in zip(asked, writer(list(asked.values()), own)) if x}
            for i, written in found.items():
                tokens[i]["read"] += written.read
                tokens[i]["written"] += written.written
            return {i: written.text for i, written in found.items() if written.text}

        latest = write(dict(enumerate(part)), 0)
        records = [
            {"answer": latest.get(i), "rounds": [], "revision": None} for i in range(len(part))
        ]
        for n in range(rounds):
            chosen = {
                i: random.Random(f"{seed} {start + i} {n}").choice(principles) for i in latest
            }
            asked = {
                i: _extended(part[i], text, "Critique", chosen[i].critique)
                for i, text in latest.items()
            }
            critiques = write(asked, 1 + 2 * n)
            asked = {
                i: _extended(asked[i], text, "Revision", chosen[i].revision)
                for i, text in critiques.items()
            }
            revisions = write(asked, 2 + 2 * n)
            for i, answer in latest.items():
                texts = {"critique": critiques.get(i), "revision": revisions.get(i)}
                echoes = (texts_of(part[i])[-1], texts["critique"], *chosen[i])
                fault = revision_fault(texts["revision"], answer, echoes)
                details = {"principle": chosen[i].name, **texts, "dropped": fault}
                records[i]["rounds"].append(details)
                if fault is None:
                    latest[i] = records[i]["revision"] = texts["revision"]
        yield start, [[record | {"tokens": count}] for record, count in zip(records, tokens)]


def revision_fault(revision: str | None, answer: str, echoes: Sequence[str | None]) -> str | None:
    """Why a revision is of no use, or None. Case, spaces and punctuation do not count.

    echoes: the prompt, the critique, the requests: texts that a revision may not start with.
    """
    words = _words(revision or "")
    if not words:
        return "no text, or no room for it"
    if words == _words(answer):
        return "repeats the answer"
    starts = (_words(text or "") for text in echoes)
    if any(start and words[: len(start)] == start for start in starts):
        return "echoes the prompt or a request"
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _extended(before: Content, text: str, kind: str, request: str) -> Content:
    """The conversation with the model's text, and a request for the next one."""
    if isinstance(before, str):
        return f"{before}{_space(before)}{text}\n\n{kind} request: {request}\n\n{kind}:"
    turns = [{"role": "assistant", "content": text}, {"role": "user", "content": request}]
    return [*before, *turns]


def _space(prompt: Content) -> str:
    """The separator between a prompt of text and the text after it."""
    return "" if not isinstance(prompt, str) or prompt[-1:].isspace() else " "


def training_rows(
    records: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for SFT, and pairs of a revision against the first answer.

    A last revision that is the first answer again makes a row of neither.
    """
    used = [x for x in records if x["revision"] and _words(x["revision"]) != _words(x["answer"])]
    texts, pairs = [], []
    for x in used:
        prompt, space = x["prompt"], _space(x["prompt"])
        chosen, rejected = space + x["revision"], space + x["answer"]
        texts.append({"prompt": prompt, "completion": chosen})
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return texts, pairs
