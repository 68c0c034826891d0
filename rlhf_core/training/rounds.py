"""Methods made of rounds: sample with the policy, train it on the samples, repeat.

Round N has the folder round-N of `out`, with the model at its end. Every round has its own seed,
also for torch's global generator: rounds that a new process resumes are bit by bit those of an
unbroken run (on a CPU). A finished round is not repeated; a trainer inside a round resumes from its
own checkpoint.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import rlhf_core
from rlhf_core.data import Tokenizer
from rlhf_core.files import read_json, replacing, write_json
from rlhf_core.models import Transformer
from rlhf_core.training import checkpoint
from rlhf_core.training.trainer import Trainer

FREE = checkpoint.FREE | {"rounds", "versions"}  # finished rounds do not depend on these
History = list[dict]
Config = TypeVar("Config")


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
    """Run the remaining rounds; returns the metrics of all, also written to `out`/metrics.jsonl.

    Args:
        config: a dataclass with `rounds` and `seed`.
        train_round: trains the model in place, given the round's seed, its folder, and the metrics
            of the rounds before it.
        fixed: prompts, models and other objects that a resumed run must share.
        restore: reads what it needs from the folder of a finished round.
    """
    history: History = []
    if out is not None:
        digest = {"digest": _digest(model, *fixed)}
        versions = {"versions": {"rlhf_core": rlhf_core.__version__}}
        run = {"algorithm": algorithm, **asdict(config), **digest, **versions}
        history = _begin(out, json.loads(json.dumps(run)), resume)
    elif resume:
        raise ValueError("a run without out cannot be resumed")
    if len(history) > config.rounds:
        raise ValueError(f"{out}: {len(history)} rounds are done, this run ends at {config.rounds}")
    for number in range(1, len(history) + 1):
        restore(out / f"round-{number}")
    if history:
        last = type(model).from_pretrained(out / f"round-{len(history)}")
        model.load_state_dict(last.state_dict())
    for number in range(len(history) + 1, config.rounds + 1):
        torch.manual_seed(config.seed + number)
        folder = None if out is None else out / f"round-{number}"
        history.append({"round": number, **train_round(config.seed + number, folder, history)})
        if out is not None:
            lines = "".join(json.dumps(line) + "\n" for line in history)
            with replacing(out / "metrics.jsonl") as temporary:
                temporary.write_text(lines, encoding="utf-8")
        print(f"{algorithm}: finished round {number}/{config.rounds}", file=sys.stderr)
    if out is not None:
        model.save_pretrained(out)
        if tokenizer is not None:
            tokenizer.save(out)
    return history


def with_seed(config: Config, seed: int) -> Config:
    """The config with another seed. Unlike `replace` it does not repeat the config's warnings."""
    config = copy.copy(config)
    object.__setattr__(config, "seed", seed)
    return config


def resumed(trainer: Trainer) -> Trainer:
    """The trainer, moved to the checkpoint in its `out` if there is one."""
    if trainer.out is not None and (trainer.out / checkpoint.NAME).is_file():
        trainer.resume()
    return trainer


def _begin(out: Path, run: dict, resume: bool) -> History:
    """The metrics of the finished rounds; a new run first removes those of an older one."""
    file, metrics = out / "train_config.json", out / "metrics.jsonl"
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        for old in (metrics, *out.glob(f"round-*/{checkpoint.NAME}")):
            old.unlink(missing_ok=True)
        write_json(file, run)
    elif not file.is_file():
        raise FileNotFoundError(f"{file}: there is no run to resume")
    then = read_json(file)
    for name in run:
        if then.get(name) != run[name] and name not in FREE:
            raise ValueError(
                f"{file}: the run was started with {name}={then.get(name)!r}, now {run[name]!r}. "
                "Resume with the old value, or start a new run"
            )
    if not metrics.is_file():
        return []
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _digest(*things) -> str:
    return checkpoint.digest(*(x if isinstance(x, nn.Module) else repr(x) for x in things))
