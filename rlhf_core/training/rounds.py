"""Methods made of rounds: sample with the policy, train it on the samples, repeat.

Round N has the folder round-N of `out`, with the model at its end. Every round has its own seed,
also for torch's global generator: rounds that a new process resumes are bit by bit those of an
unbroken run (on a CPU). A finished round is not repeated; a trainer inside a round resumes from its
own checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from rlhf_core import distributed
from rlhf_core.data import Tokenizer
from rlhf_core.feedback.candidates import Candidates, prompts_for
from rlhf_core.feedback.judges import JudgeScorer
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.files import read_object, replacing, subfolder, write_json
from rlhf_core.locks import hold
from rlhf_core.models import Transformer
from rlhf_core.models.gather import class_of, is_sharded, mesh_of_pieces
from rlhf_core.models.shard import shard_all
from rlhf_core.training import checkpoint, signals
from rlhf_core.training.held_out import evaluate_answers
from rlhf_core.training.reference import Reference
from rlhf_core.training.run_file import OLD_NAME, RunFile, recording
from rlhf_core.training.run_log import (
    SAMPLES,
    OnStep,
    append_rows,
    check_on_step,
    drop_later,
    notify,
    parse_line,
    preview,
    sample_rows,
)
from rlhf_core.training.trainer import Trainer

SETTINGS = "rounds.json"  # what the rounds depend on; older versions wrote train_config.json
SAMPLE_ROUNDS = "rounds between rows of the policy's responses in samples.jsonl; 0: none"
LAST = "last_round"  # its number, and its model's digest
# In a round's folder: what people compare, and all labels up to then as pairs.
CANDIDATES, PAIRS = "candidates.jsonl", "pairs.jsonl"
FREE = checkpoint.FREE | {"rounds", "versions", LAST}  # finished rounds do not depend on these
History = list[dict]
Config = TypeVar("Config")


def run_rounds(
    algorithm: str,
    model: Transformer,
    config,
    train_round: Callable[[int, Path | None, History], dict],
    *,
    fixed: dict[str, object],
    scorer: Scorer | JudgeScorer | None,
    tokenizer: Tokenizer | None,
    out: Path | None,
    resume: bool,
    on_step: OnStep | None = None,
    restore: Callable[[Path], None] = lambda folder: None,
) -> History:
    """Run the remaining rounds; returns the metrics of all, also written to `out`/metrics.jsonl.

    Args:
        config: a dataclass with `rounds`, `seed` and `copies`.
        train_round: trains the model in place, given the round's seed, its folder, and the metrics
            of the rounds before it.
        fixed: prompts and other objects by name, which a resumed run must share.
        scorer: of the samples; a resumed run must share it, too. None: people judge them.
        on_step: called as on_step(metrics, round) after each round of this process, once its files
            are written; as for `Trainer`.
        restore: reads what it needs from the folder of a finished round.

    Raises:
        BlockingIOError: another process or thread trains into `out`.
        KeyboardInterrupt: on Ctrl-C, SIGTERM or SIGHUP. A trainer inside a round leaves its
            checkpoint, as `Trainer.train` does; other work of a round is repeated when it resumes.
    """
    distributed.check_started()
    check_on_step(on_step)
    options = dict(fixed=fixed, scorer=scorer, tokenizer=tokenizer, resume=resume)
    options |= dict(on_step=on_step, restore=restore)
    if out is None:
        if resume:
            raise ValueError("a run without out cannot be resumed")
        return _run_rounds(algorithm, model, config, train_round, out=None, run=None, **options)
    out = out.absolute()  # a reward may call os.chdir
    with contextlib.ExitStack() as stack:
        stack.enter_context(signals.handled(signals.stop_at_once))
        run = RunFile(out, {})
        with distributed.together():
            if not distributed.rank():
                stack.enter_context(hold(out))
                run = stack.enter_context(recording(out))
        return _run_rounds(algorithm, model, config, train_round, out=out, run=run, **options)


def _run_rounds(
    algorithm, model, config, train_round, *,
    fixed, scorer, tokenizer, out, run, resume, on_step, restore,
) -> History:  # fmt: skip
    history: History = []
    models = () if scorer is None else scorer.models
    if out is not None:
        digests = {name: _digest(x) for name, x in {"model": model, **fixed}.items()}
        digests["reward models"] = _digest(*models)
        described = checkpoint.description([model, *models], tokenizer, scorer)
        settings = {
            "algorithm": algorithm,
            **asdict(config),
            **described,
            "digests": digests,
            "digest": _digest(model, *fixed.values(), *models),
        }
        settings = json.loads(json.dumps(settings))
        begun: tuple[History, str | None] = [], None
        with distributed.together():
            if not distributed.rank():
                begun = _begin(out, settings, resume)
        history, settings[LAST] = distributed.from_rank_0(begun)
    if len(history) > config.rounds:
        raise ValueError(f"{out}: {len(history)} rounds are done, this run ends at {config.rounds}")
    for number in range(1, len(history) + 1):
        folder = out / f"round-{number}"
        try:
            restore(folder)
            if number == len(history):
                mesh = mesh_of_pieces(model)
                model.load_state_dict(
                    class_of(model).from_pretrained(folder, mesh=mesh).state_dict()
                )
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{folder}: damaged, or of another run: {error!r}") from None
    if history and settings[LAST] not in (None, checkpoint.digest(model)):
        raise ValueError(
            f"{folder}: its model is not the one that the round has written (digest "
            f"{settings[LAST]:.8}, now {checkpoint.digest(model):.8}). Restore the folder, or "
            "start a new run"
        )
    judged = isinstance(scorer, JudgeScorer)  # by rank 0 alone
    shard_all([model] if judged else [model, *models], config.copies)
    writes = out is not None and not distributed.rank()
    if writes:
        facts = {"algorithm": algorithm, "steps_done": len(history), "total_steps": config.rounds}
        facts |= {"seed": config.seed, "options": asdict(config), **described}
        run.start({**facts, "device": str(model.device)}, resumed=resume)
    for number in range(len(history) + 1, config.rounds + 1):
        torch.manual_seed(config.seed + number)
        folder = None if out is None else subfolder(out, f"round-{number}")
        with hold(folder) if writes else contextlib.nullcontext(), distributed.together():
            metrics = train_round(config.seed + number, folder, history)
        history.append({"round": number, **metrics})
        with distributed.together():
            weights = None if out is None else checkpoint.digest(model)
            if writes:
                last = {"round": number, "digest": weights}
                write_json(out / SETTINGS, settings | {LAST: last})
                lines = "".join(json.dumps(line) + "\n" for line in history)
                with replacing(out / "metrics.jsonl") as file:
                    file.write(lines.encode())
                run.facts["steps_done"] = number
        with distributed.together():
            if not distributed.rank():
                print(f"{algorithm}: finished round {number}/{config.rounds}", file=sys.stderr)
            notify(on_step, history[-1], "round")
    with distributed.together():
        if writes or (is_sharded(model) and out is not None):
            model.save_pretrained(out)
        if writes:
            if tokenizer is not None:
                tokenizer.save(out)
            run.facts["status"] = "finished"
    return history


def held_out(
    model: Transformer, prompts: Sequence[Sequence[int]], config, *, scorer, **options
) -> Callable[[], dict[str, float]]:
    """A function that returns `evaluate_answers` of the prompts, compared with the model as it is.

    Without prompts it returns no metrics.
    """
    if not len(prompts):
        return dict
    scorer.check_columns(prompts)
    prompts = prompts_for(model, prompts, config).prompts
    options |= dict(scorer=scorer, reference=Reference(model))
    shard_all([options["reference"].model], config.copies)
    return lambda: evaluate_answers(model, prompts, config, **options)[0]


def log_samples(
    out: Path | None, number: int, samples: Candidates, config, tokenizer: Tokenizer | None
) -> None:
    """Write some of a round's responses to samples.jsonl, where sample_every asks for them."""
    every = config.sample_every
    if not every or (number > 1 and number % every) or distributed.rank():
        return
    rows = sample_rows("round", number, *samples.rows(), tokenizer)
    if out is not None:
        drop_later(out / SAMPLES, "round", number - 1)
        append_rows(out / SAMPLES, rows)
    if config.print_samples:
        print("\n".join(map(preview, rows)), file=sys.stderr)


def with_seed(config: Config, seed: int) -> Config:
    """The config with another seed. Unlike `replace` it does not repeat the config's warnings."""
    config = copy.copy(config)
    object.__setattr__(config, "seed", seed)
    return config


def resumed(trainer: Trainer) -> Trainer:
    """The trainer, moved to the checkpoint in its `out` if there is one."""
    if trainer.out is not None and distributed.from_rank_0(bool(checkpoint.find(trainer.out))):
        trainer.resume()
    return trainer


def _begin(out: Path, settings: dict, resume: bool) -> tuple[History, str | None]:
    """Metrics of the finished rounds, and their last model's digest; a new run has none.

    A new run removes those of an older one.
    """
    file, metrics = out / SETTINGS, out / "metrics.jsonl"
    if resume and not file.is_file():
        file = out / OLD_NAME
    if not resume:
        metrics.unlink(missing_ok=True)
        for folder in out.glob("round-*"):
            if re.fullmatch(r"round-[1-9]\d*", folder.name) and not folder.is_symlink():
                checkpoint.remove(checkpoint.find(folder))
                for name in (CANDIDATES, PAIRS):
                    (folder / name).unlink(missing_ok=True)
        write_json(file, settings)
    elif not file.is_file():
        raise FileNotFoundError(f"{out}: there is no run to resume")
    then = read_object(file)
    checkpoint.check_settings(file, then, settings, FREE, "the run was started with")
    if not metrics.is_file():
        return [], None
    lines = metrics.read_text(encoding="utf-8").splitlines()
    history = [parse_line(metrics, i, line, "round") for i, line in enumerate(lines, 1)]
    last = then.get(LAST)  # of a round whose line in metrics.jsonl may be missing
    if not isinstance(last, dict) or last.get("round") != len(history):
        return history, None
    return history, str(last.get("digest"))


def _digest(*things) -> str:
    return checkpoint.digest(*(x if isinstance(x, nn.Module) else repr(x) for x in things))
