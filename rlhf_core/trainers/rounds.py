"""Methods made of rounds: sample with the policy, train it on that, and again; a finished round is not repeated.

Round N is in the folder round-N of `out`: what it trained, and so the policy at its end. Every round has its own seed,
of torch's global generator too, so that rounds that go on in a new process are those that never stopped, bit by bit on
a CPU; a trainer in a round goes on from its own checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import rlhf_core
from rlhf_core.data import Tokenizer
from rlhf_core.files import read_json, replacing, write_json
from rlhf_core.models import Transformer
from rlhf_core.trainers import checkpoint
from rlhf_core.trainers.common import Trainer

FREE = checkpoint.FREE | {"rounds", "versions"}  # rounds done do not depend on them
History = list[dict]


def run_rounds(
    algorithm: str,
    model: Transformer,
    config,
    train_round: Callable[[int, Path | None, History], dict],
    *,
    fixed: tuple,
    tokenizer: Tokenizer | None,
    out: Path | None,
    resume: bool,
    restore: Callable[[Path], None] = lambda folder: None,
) -> History:
    """Run the rounds that are left; returns the metrics of all, which are also in `out`/metrics.jsonl.

    config: a dataclass with `rounds` and `seed`.
    train_round: trains the model in place; gets the round's seed, its folder, and the metrics of the rounds before.
    fixed: prompts, models and else that the rounds depend on; of a run that is resumed they must be the same.
    restore: takes up what it needs from the folder of a round that was done before.
    """
    history: History = []
    if out is not None:
        digest = {
            "digest": _digest(model, *fixed),
            "versions": {"rlhf_core": rlhf_core.__version__},
        }
        history = _begin(
            out,
            json.loads(json.dumps({"algorithm": algorithm, **asdict(config), **digest})),
            resume,
        )
    elif resume:
        raise ValueError("there is no out to go on from")
    if len(history) > config.rounds:
        raise ValueError(f"{out}: {len(history)} rounds are done, this run ends at {config.rounds}")
    for number in range(1, len(history) + 1):
        restore(out / f"round-{number}")
    if history:
        model.load_state_dict(
            type(model).from_pretrained(out / f"round-{len(history)}").state_dict()
        )
    for number in range(len(history) + 1, config.rounds + 1):
        torch.manual_seed(config.seed + number)
        folder = None if out is None else out / f"round-{number}"
        history.append({"round": number, **train_round(config.seed + number, folder, history)})
        if out is not None:
            with replacing(out / "metrics.jsonl") as temporary:
                temporary.write_text(
                    "".join(json.dumps(line) + "\n" for line in history), encoding="utf-8"
                )
        print(f"{algorithm}: round {number}/{config.rounds} is done", file=sys.stderr)
    if out is not None:
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save(out)
    return history


def goes_on(trainer: Trainer) -> Trainer:
    """The trainer at the step of the checkpoint in its `out`, where there is one."""
    if trainer.out is not None and (trainer.out / checkpoint.NAME).is_file():
        trainer.resume()
    return trainer


def _begin(out: Path, run: dict, resume: bool) -> History:
    """The metrics of the rounds that are done; where the run is a new one, nothing to go on from is left of another."""
    file, metrics = out / "train_config.json", out / "metrics.jsonl"
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        for old in (metrics, *out.glob(f"round-*/{checkpoint.NAME}")):
            old.unlink(missing_ok=True)
        write_json(file, run)
    elif not file.is_file():
        raise FileNotFoundError(f"{file}: no run to go on from")
    then = read_json(file)
    for name in run:
        if then.get(name) != run[name] and name not in FREE:
            raise ValueError(f"{file}: of a run with {name}={then.get(name)!r}, not {run[name]!r}")
    return (
        [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    )


def _digest(*things) -> str:
    """SHA-256 of models' weights and of the repr of the rest."""
    total = hashlib.sha256()
    for thing in things:
        if isinstance(thing, nn.Module):
            for x in thing.state_dict().values():
                total.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            total.update(repr(thing).encode())
    return total.hexdigest()
