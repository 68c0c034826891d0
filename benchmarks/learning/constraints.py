"""A task nearer to use: a short story with words and a length that the prompt asks for.

    12 words with water, happy.

The policy is pretrained here on TinyStories (Eldan & Li 2023) and Shakespeare, with a BPE
vocabulary of 6,400, and fine-tuned on passages of the stories. Gold checks words and length.
"""

from __future__ import annotations

import gzip
import random
import re
from itertools import combinations, pairwise
from pathlib import Path

import torch

from rlhf_core.data import (
    Example,
    Pair,
    Text,
    Tokenizer,
    encode_text,
    load_tokenizer,
    read_texts,
)
from rlhf_core.demo import Task
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.trainers import DPOConfig, PPOConfig, RewardConfig, SFTConfig, SFTTrainer

ROW = 128  # tokens of a row in pretraining
SHAKESPEARE = 100_000  # characters of the plays to pretrain on
RESPONSE = 24
LENGTHS = (7, 12)  # words that a prompt asks for
WORDS = (
    "happy", "time", "play", "friends", "help", "together", "home", "good", "look", "water", "find",
    "friend",
)  # fmt: skip
HELD_OUT = 16  # pairs of these words that only the evaluation asks for
PROMPTS = 40_960
PAIRS = 14_000  # beyond this many pairs, only those that differ in length are learned from


def prompt_of(words: tuple[str, str], length: int) -> str:
    return f"{length} words with {', '.join(words)}.\n"


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """One point for each asked word, and one for a length within a third of the asked one."""
    return [score(*row) for row in zip(prompts, responses)]


def score(prompt: str, response: str) -> float:
    used, fits = points(prompt, response)
    return float(used + fits)


def points(prompt: str, response: str) -> tuple[int, bool]:
    """How many of the asked words the response has, and whether its length is near the asked."""
    length, asked = re.search(r"(\d+) words with (.*)\.", prompt).groups()
    words = words_of(response)
    used = sum(word in words for word in asked.split(", "))
    return used, abs(len(words) - int(length)) <= int(length) / 3


def with_more_lengths(pairs: list[Pair], tokenizer: Tokenizer) -> list[Pair]:
    """The first PAIRS, and those of the others whose completions have as many asked words.

    Few pairs differ in length only, and a reward model learns lengths from them.
    """

    def used(prompt_ids: list[int], completion_ids: list[int]) -> int:
        return points(tokenizer.decode(prompt_ids), tokenizer.decode(completion_ids))[0]

    return pairs[:PAIRS] + [
        pair
        for pair in pairs[PAIRS:]
        if used(pair.prompt_ids, pair.chosen_ids) == used(pair.prompt_ids, pair.rejected_ids)
    ]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def constraints_task(data: Path, seed: int, folder: Path) -> Task:
    """The task, with the policy pretrained in the folder, or read from it."""
    rng = random.Random(seed)
    tokenizer = load_tokenizer(data / "tokenizers" / "minimind")
    stories = [story.completion for story in read_texts(data / "text" / "tinystories.jsonl.gz")]
    pairs = list(combinations(WORDS, 2))
    rng.shuffle(pairs)
    held_out, known = pairs[:HELD_OUT], pairs[HELD_OUT:]

    def prompts(pairs: list[tuple[str, str]]) -> list[list[int]]:
        texts = (prompt_of(pair, rng.choice(LENGTHS)) for pair in pairs)
        return [tokenizer.encode_prompt(text) for text in texts]

    passages = [passage for story in stories for passage in passages_of(story)]
    texts = [instruction(passage, held_out, rng) for passage in passages]
    return Task(
        name="constraints",
        gold=gold,
        tokenizer=tokenizer,
        policy=pretrained(data, tokenizer, stories, folder),
        sft_examples=[encode_text(text, tokenizer, ROW) for text in texts if text],
        prompts=prompts(rng.choices(known, k=PROMPTS)),
        eval_prompts=prompts(held_out * 12) * 2,
        eos_ids=tokenizer.eos_ids,
        response_length=RESPONSE,
        label_noise=0.0,
        sft=SFTConfig(
            lr=2e-3, batch_size=32, epochs=2, warmup_steps=20, lr_schedule="cosine", seed=seed
        ),
        reward=RewardConfig(lr=1e-3, batch_size=64, epochs=2, warmup_steps=10, seed=seed),
        ppo=PPOConfig(lr=1e-4, max_steps=50, kl_coef=0.06, response_length=RESPONSE, seed=seed),
        dpo=DPOConfig(lr=1e-4, batch_size=64, seed=seed),
    )


def passages_of(story: str) -> list[str]:
    """One or two sentences in a row of a length that prompts ask for; they may overlap."""
    sentences = re.split(r"(?<=[.!?])\s+", story)
    passages = sentences + [" ".join(pair) for pair in pairwise(sentences)]
    return [x for x in passages if LENGTHS[0] - 2 <= len(words_of(x)) <= LENGTHS[-1] + 2]


def instruction(passage: str, held_out: list[tuple[str, str]], rng: random.Random) -> Text | None:
    """A prompt that the passage answers, or None: two words of it and the length nearest to its.

    One is of WORDS; so is the other where the passage has another one.
    """
    words = words_of(passage)
    known = [word for word in WORDS if word in words]
    others = sorted({word for word in words if len(word) > 3} - set(known))
    if not known or len(known) + len(others) < 2:
        return None
    candidates = rng.sample(known, len(known)) + rng.sample(others, len(others))
    asked = tuple(rng.sample(candidates[:2], 2))
    if asked in held_out or asked[::-1] in held_out:
        return None
    length = min(LENGTHS, key=lambda length: abs(length - len(words)))
    return Text(prompt_of(asked, length), passage)


def pretrained(data: Path, tokenizer: Tokenizer, stories: list[str], folder: Path) -> Transformer:
    """A model of 1.9 M parameters after one pass over the texts; all seeds share it."""
    if (folder / "config.json").exists():
        return Transformer.from_pretrained(folder)
    with gzip.open(data / "text" / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        plays = file.read(SHAKESPEARE)
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        intermediate_size=512,
        max_positions=ROW,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    model = Transformer(config)
    ids = [i for text in (*stories, plays) for i in (*tokenizer.encode(text), tokenizer.eos_ids[0])]
    rows = [Example([], ids[start : start + ROW]) for start in range(0, len(ids), ROW)]
    settings = SFTConfig(lr=2e-3, lr_schedule="cosine", warmup_steps=20, batch_size=16)
    SFTTrainer(model, rows, settings).train()
    model.save_pretrained(folder)
    return model
