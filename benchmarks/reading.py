"""What it costs to read a data file and to build a trainer, against `json.loads` of every line.

`python -m rlhf_core.benchmarks.reading` writes short rows to a temporary folder. For each trainer a
process of its own runs both sides in turns. A ratio divides medians. CPU time includes that of the
processes that help to encode.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rlhf_core import data, trainers
from rlhf_core.data.parallel import Parallel
from rlhf_core.data.store import Block, ExampleStore
from rlhf_core.models import RewardModel, Transformer, TransformerConfig

WORDS = ("the", "cat", "a", "bird", "sat", "flew", "over", "under", "green", "old", "happy", "sad")
FIELDS = {
    data.read_texts: ("prompt", "completion"),
    data.read_comparisons: ("prompt", "chosen", "rejected"),
    data.read_preferences: ("prompt", "chosen", "rejected"),
    data.read_prompt_rows: ("prompt",),
}
METHODS: dict[str, tuple] = {
    "sft": (data.read_texts, data.encode_text, trainers.SFTTrainer, trainers.SFTConfig),
    "reward": (
        *(data.read_comparisons, data.encode_preference),
        *(trainers.RewardTrainer, trainers.RewardConfig),
    ),
    "dpo": (
        *(data.read_preferences, data.encode_preference),
        *(trainers.DPOTrainer, trainers.DPOConfig),
    ),
    "ppo": (data.read_prompt_rows, data.encode_prompt_row, trainers.PPOTrainer, trainers.PPOConfig),
    "grpo": (
        *(data.read_prompt_rows, data.encode_prompt_row),
        *(trainers.GRPOTrainer, trainers.GRPOConfig),
    ),
}


def write_rows(path: Path, method: str, count: int) -> None:
    """Write JSON lines. Each field has 4 to 10 words."""
    rng, fields = random.Random(0), FIELDS[METHODS[method][0]]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {name: " ".join(rng.choices(WORDS, k=rng.randint(4, 10))) for name in fields}
            file.write(json.dumps(row) + "\n")


def parse(path: Path) -> None:
    """`json.loads` of every line."""
    with path.open("rb") as file:
        for line in file:
            json.loads(line)


def start(method: str, path: Path, tokenizer: data.Tokenizer) -> ExampleStore:
    """Read and encode the rows as the command line does, and build the trainer, which checks them.

    Returns:
        The rows.
    """
    reader, encode, trainer, config = METHODS[method]
    sampled = reader is data.read_prompt_rows
    limit: Any = () if sampled else (512,)
    rows = reader(path, None, Parallel(lambda row: encode(row, tokenizer, *limit)))
    sizes: Any = dict(hidden_size=8, num_layers=1, num_heads=1, max_positions=1024)
    kind: Any = RewardModel if method == "reward" else Transformer
    model = kind(TransformerConfig(vocab_size=tokenizer.vocab_size, **sizes))
    options = {"reward": lambda prompts, responses: [0.0] * len(prompts)} if sampled else {}
    _ = trainer(model, rows, config(), **options).digests  # of the data, which a run stores
    return rows


def measure(method: str, path: Path, folder: Path | None, rounds: int) -> dict[str, float]:
    """The figures of a method, in this process."""
    torch.set_num_threads(1)
    tokenizer = data.ByteTokenizer() if folder is None else data.load_tokenizer(folder)
    warm = path.with_suffix(".warm")
    write_rows(warm, method, 100)
    warnings.simplefilter("ignore")
    start(method, warm, tokenizer)  # imports what a trainer needs
    times: list[list[tuple[float, float]]] = [[], []]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        for side, found in enumerate(times):
            cpu, wall = sum(os.times()[:4]), time.perf_counter()
            rows = start(method, path, tokenizer) if side else parse(path)
            found.append((sum(os.times()[:4]) - cpu, time.perf_counter() - wall))
            if rows is not None:
                tokens = sum(len(block.ids) for block in rows.blocks if isinstance(block, Block))
                figures = {
                    "tokens a row": tokens / len(rows),
                    "bytes a token": rows.nbytes / tokens,
                }
            del rows
    theirs, ours = ([statistics.median(x) for x in zip(*found)] for found in times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "json CPU s": theirs[0],
        "CPU s": ours[0],
        "x CPU": ours[0] / theirs[0],
        "x wall": ours[1] / theirs[1],
        "peak MB": peak * (1 if sys.platform == "darwin" else 1024) / 1e6,
        **figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: bytes")
    arguments = parser.parse_args()
    print(f"{arguments.rows} rows, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with TemporaryDirectory() as folder:
        for method in arguments.methods:
            path = Path(folder) / f"{method}.jsonl"
            write_rows(path, method, arguments.rows)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (method, path, arguments.tokenizer, arguments.rounds))
            figures = "  ".join(f"{name} {value:.3g}" for name, value in row.items())
            print(f"{method:6}  {figures}", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
