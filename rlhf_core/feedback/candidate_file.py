"""A file of candidates: sampled answers to each prompt, for people to compare or rewards to rank.

`data.read_candidates` reads it. The file grows batch by batch. A process that is killed leaves
whole rows and at most one cut line. The next process continues with the same answers.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_core.data import Tokenizer
from rlhf_core.data.readers import PromptRow
from rlhf_core.feedback.candidates import SamplingConfig
from rlhf_core.files import naming, open_for_append, shown
from rlhf_core.generation import Engine
from rlhf_core.models import Transformer
from rlhf_core.rollout import response_logprobs, sample

# Columns of the prompts' file that would mean something else beside candidates or pairs.
_OWN = {"id", "messages", "responses", "ranks", "response_a", "response_b", "chosen", "rejected"}
_OWN |= {"margin", "label_smoothing", "completion", "response", "output", "labels", "steps", "run"}


class Source(NamedTuple):
    """A model that answers: its name in the file, what it answers to, and how."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    eos_ids: Sequence[int]
    prompts: Sequence[Sequence[int]]  # token ids of each row's prompt
    temperatures: Sequence[float]  # 0 is greedy
    num_samples: int  # at each temperature
    engine: Engine | None = None  # samples in place of `generate`


def sampled(
    sources: Sequence[Source], config: SamplingConfig, first: int = 0
) -> Iterator[tuple[int, list[list[dict[str, Any]]]]]:
    """Sample answers to each prompt from each model at each of its temperatures.

    Every answer has its own seed, so batch_size changes nothing but rounding.

    Args:
        first: The prompt to begin with, a multiple of batch_size.

    Yields:
        For each batch its first prompt, and for each prompt its answers: text; model; temperature;
        seed; logprob, the sum of the tokens' log-probs in nats under the model at temperature 1;
        tokens, EOS included; ended, whether EOS or a stop string came before response_length.
    """
    count = len(sources[0].prompts)
    generator = torch.Generator().manual_seed(config.seed)
    # JSON readers that hold numbers as float64 keep seeds below 2**53.
    seeds = [
        torch.randint(
            2**53, (count, len(source.temperatures), source.num_samples), generator=generator
        )
        for source in sources
    ]
    for start in range(first, count, config.batch_size):
        part = slice(start, start + config.batch_size)
        answers: list[list[dict[str, Any]]] = [[] for _ in range(count)[part]]
        for source, own_seeds in zip(sources, seeds):
            for t, temperature in enumerate(source.temperatures):
                batch = _sample(source, config, part, temperature, own_seeds[part, t].flatten())
                for i, answer in enumerate(batch):
                    answers[i // source.num_samples].append(answer)
        yield start, answers


def _sample(
    source: Source, config: SamplingConfig, part: slice, temperature: float, seeds: torch.Tensor
) -> Iterator[dict[str, Any]]:
    rollout = sample(
        source.model,
        source.prompts[part],
        max_new_tokens=config.response_length,
        num_samples=source.num_samples,
        temperature=temperature,
        eos_ids=source.eos_ids,
        stop_strings=config.stop_strings,
        tokenizer=source.tokenizer,
        seeds=seeds,
        engine=source.engine,
    )
    with torch.no_grad():
        logprobs = response_logprobs(source.model, rollout)[0].double().sum(dim=1)
    rows = zip(rollout.responses(), seeds.tolist(), logprobs.tolist(), rollout.ended.tolist())
    for ids, seed, logprob, ended in rows:
        yield {
            "text": source.tokenizer.decode(ids),
            "model": source.name,
            "temperature": temperature,
            "seed": seed,
            "logprob": round(logprob, 4),
            "tokens": len(ids),
            "ended": ended,
        }


def merged(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers with distinct texts. The first of each has the `count` of all."""
    first: dict[str, dict[str, Any]] = {}
    for answer in answers:
        first.setdefault(answer["text"], answer | {"count": 0})["count"] += 1
    return list(first.values())


def gibberish(answer: dict[str, Any], least: float | None) -> str | None:
    """Why an answer is likely gibberish, or None.

    least: the lowest mean log-prob of a token, in nats, that is not; None: nothing is gibberish.
    """
    if least is None:
        return None
    if answer["logprob"] < least * answer["tokens"]:
        return "low log-prob"
    return None if answer["ended"] else "no EOS"


def candidate_row(
    row: dict[str, Any], answers: list[dict[str, Any]], least: float | None = None
) -> dict[str, Any]:
    """A prompt with its distinct answers. Those that are `gibberish` go to "dropped", with why."""
    reasons = [(answer, gibberish(answer, least)) for answer in merged(answers)]
    dropped = [answer | {"reason": reason} for answer, reason in reasons if reason]
    row = row | {"responses": [answer for answer, reason in reasons if reason is None]}
    return row if least is None else row | {"dropped": dropped}


def pair_rows(
    row: dict[str, Any], answers: list[dict[str, Any]], least: float | None = None
) -> list[dict[str, Any]]:
    """Pairs of the first answer, a teacher's, with every other distinct one, which counts as worse.

    Answers that are empty or `gibberish` are not used.
    """
    chosen, *others = answers
    pairs = []
    for rejected in merged(others):
        both = (chosen, rejected)
        bad = any(not x["text"].strip() or gibberish(x, least) for x in both)
        if not bad and rejected["text"] != chosen["text"]:
            pairs.append(
                row
                | {"chosen": chosen["text"], "rejected": rejected["text"]}
                | {"chosen_by": _origin(chosen), "rejected_by": _origin(rejected)}
            )
    return pairs


def _origin(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "text"}


def prompt_rows(path: Path, rows: dict[int, PromptRow], run: str) -> list[dict[str, Any]]:
    """The start of each prompt's rows in the file: id, prompt, other columns, and the run's digest.

    Args:
        path: The prompts' file, for errors.
        rows: The prompts by their number from 0, which is the id of those that have none.

    Raises:
        ValueError: two prompts have one id.
    """
    begun: dict[Any, dict[str, Any]] = {}
    for i, row in rows.items():
        others = {name: value for name, value in row.columns.items() if name not in _OWN}
        name = row.columns.get("id", i)
        if not isinstance(name, str | int) or name in begun:
            raise ValueError(
                f"{path}: id {shown(name)} of prompt {i} is not a new text or number. Make the "
                "ids unique, or remove them"
            )
        begun[name] = {"id": name, "prompt": row.prompt, **others, "run": run}
    return list(begun.values())


@contextlib.contextmanager
def appending(
    out: Path, begun: Sequence[dict[str, Any]], size: int
) -> Iterator[tuple[Callable[[Iterable[dict[str, Any]]], None], int]]:
    """Yield a function that writes the rows of a batch to a file, and the first prompt to sample.

    Args:
        out: The file. A last batch that may not be whole is written again.
        begun: As of `prompt_rows`.
        size: Prompts of a batch.

    Raises:
        ValueError: The file has other rows than those of this run.
    """
    with naming(out), open_for_append(out) as file:

        def write(rows: Iterable[dict[str, Any]]) -> None:
            file.writelines(_line(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

        offset, first = _resume_point(out, begun, size)
        file.truncate(offset)
        yield write, first


def _resume_point(out: Path, begun: Sequence[dict[str, Any]], size: int) -> tuple[int, int]:
    """Where in the file the last batch begins, in bytes, and its first prompt."""
    places, at, offset, first = {row["id"]: i for i, row in enumerate(begun)}, 0, 0, 0
    remedy, run = "Choose another --out, or pass --overwrite", begun[0]["run"]
    with open(out, "rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else _cut_row(line, begun)
                place = places[row["id"]]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(
                    f"{out} exists, and is no unfinished file of this command and these prompts. "
                    f"{remedy}"
                ) from None
            if row.get("run") != run:
                raise ValueError(
                    f"{out} was written with other prompts, models or settings (run "
                    f"{shown(row.get('run'))}, now {shown(run)}). {remedy}"
                )
            if at == 0 or place - place % size > first:
                offset, first = at, place - place % size
            at += len(line)
    return offset, first


def _cut_row(line: bytes, begun: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row that a kill cut. Raises ValueError if it is no row of this run."""
    for row in begun:
        start = _line(row)[:-1].encode()
        if line.startswith(start) or start.startswith(line):
            return row
    raise ValueError


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)
