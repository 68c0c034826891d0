"""The common start of all methods (policy, pairs, reward model), and how results are measured.

The start is made once for each task and seed, and kept in a folder.
"""

from __future__ import annotations

import contextlib
import copy
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.learning.constraints import constraints_task, with_more_lengths
from rlhf_core import rollout
from rlhf_core.data import Pair
from rlhf_core.demo import (
    Task,
    evaluated,
    fitted_reward_model,
    labelled_pairs,
    replies_task,
    split,
    stories_task,
    supervised,
)
from rlhf_core.evaluation import Evaluation, win_rate
from rlhf_core.files import read_json, write_json
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.trainers import Scorer

TASKS = ("replies", "stories", "constraints")


@dataclass
class Setup:
    """The start for one task and seed.

    `counting` counts the tokens that policies made by `policy` sample and train on.
    """

    task: Task
    seed: int
    base: Transformer  # after SFT, frozen; the reference of every method
    pairs: list[Pair]  # to train on
    reward_model: RewardModel
    sft_scores: Tensor  # (N,) gold scores of the base on task.eval_prompts
    tokens: dict[str, int] = field(default_factory=lambda: {"sampled": 0, "trained": 0})
    untimed_seconds: float = 0.0

    @property
    def shared(self) -> dict:
        """Arguments of every trainer that samples."""
        return dict(eos_ids=self.task.eos_ids, tokenizer=self.task.tokenizer)

    def policy(self) -> Transformer:
        """A copy of the base to train."""
        policy = copy.deepcopy(self.base).requires_grad_(True)

        def count(trunk, arguments, options, hidden):
            # A copy of the policy has the same hook.
            if torch.is_grad_enabled() and trunk is policy.trunk:
                self.tokens["trained"] += len(options["read"])

        policy.trunk.register_forward_hook(count, with_kwargs=True)
        return policy

    @contextlib.contextmanager
    def counting(self) -> Iterator[dict[str, int]]:
        """Count response tokens that are sampled, and those whose log-probs get a gradient."""
        self.tokens.update(sampled=0, trained=0)
        generate = rollout.generate

        def counted(*arguments, **options):
            response = generate(*arguments, **options)
            self.tokens["sampled"] += int(response.response_mask.sum())
            return response

        with mock.patch.object(rollout, "generate", counted):
            yield self.tokens

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Keep what is no part of a method, such as imports, out of its seconds."""
        started = time.process_time()
        yield
        self.untimed_seconds += time.process_time() - started

    def scores(
        self, prompts: list, responses: list, reward_model: RewardModel | None = None
    ) -> Tensor:
        """Scores (N,) of a reward model. The shared one has mean 0 and deviation 1 on the pairs."""
        return Scorer(
            reward_model or self.reward_model, pad_id=self.base.config.pad_id or 0, batch_size=128
        )(prompts, responses)

    def evaluate(self, policy: Transformer) -> Evaluation:
        return evaluated(self.task, self.base, policy, self.seed)


def add_arguments(parser: ArgumentParser, tasks: Iterable[str] = TASKS) -> None:
    """Add the arguments that all programs of this folder take."""
    parser.add_argument("--task", choices=tuple(tasks), default="replies", help="default: replies")
    parser.add_argument(
        "--data", type=Path, help="folder for all tasks but replies, as for rlhf-core demo --real"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each; default: 0 1 2"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/learning"), help="default: runs/learning"
    )


def check_data(parser: ArgumentParser, arguments: Namespace) -> None:
    if arguments.task != "replies" and arguments.data is None:
        parser.error(f"--task {arguments.task} needs --data")


def prepare(name: str, data: Path | None, seed: int, folder: Path) -> Setup:
    """Make the start of a task and seed, or read it from the folder if it is complete there.

    sft.json says how many CPU seconds it took, with the pretraining if there was any.
    """
    started = time.process_time()
    if name == "constraints":
        task = constraints_task(data, seed, folder.parent.parent / "pretrained")
    else:
        task = replies_task(seed) if name == "replies" else stories_task(data, seed)
    done = folder / "sft.json"
    if not done.exists():
        base, _ = supervised(task)
        pairs, _ = labelled_pairs(task, base, seed)
        if name == "constraints":
            pairs = with_more_lengths(pairs, task.tokenizer)
        reward_model, report = fitted_reward_model(task, base, *split(pairs), seed)
        base.save_pretrained(folder / "base")
        reward_model.save_pretrained(folder / "reward")
        write_json(folder / "pairs.json", split(pairs)[0])
        scores = evaluated(task, base, base, seed).scores.tolist()
        write_json(
            done,
            {
                "scores": scores,
                "reward_model_accuracy": report["eval_accuracy"],
                "seconds": time.process_time() - started,
            },
        )
    base = Transformer.from_pretrained(folder / "base").eval().requires_grad_(False)
    reward_model = RewardModel.from_pretrained(folder / "reward").eval().requires_grad_(False)
    pairs = [Pair(*row) for row in read_json(folder / "pairs.json")]
    return Setup(task, seed, base, pairs, reward_model, torch.tensor(read_json(done)["scores"]))


def measure(setup: Setup, method: Callable, settings: dict) -> dict:
    """Run a method and return its figures. gold_error is the standard error over prompts."""
    torch.manual_seed(setup.seed)
    started, setup.untimed_seconds = time.process_time(), 0.0
    with setup.counting() as tokens:
        found = method(setup, **settings)
    seconds = time.process_time() - started - setup.untimed_seconds
    tokens = dict(tokens)
    if not isinstance(found, Evaluation):
        found = setup.evaluate(found)
    prompts = setup.task.eval_prompts
    different = {tuple(prompt): [] for prompt in prompts}
    for prompt, score in zip(prompts, found.scores.tolist()):
        different[tuple(prompt)].append(score)
    means = torch.tensor([sum(scores) / len(scores) for scores in different.values()])
    return {
        "gold": found.scores.mean().item(),
        "gold_sd": found.scores.std().item(),
        "gold_error": (means.std() / len(means) ** 0.5).item(),
        "reward": setup.scores(prompts, found.response_ids).mean().item(),
        "kl": found.kl.mean().item(),
        "win_rate": win_rate(found.scores, setup.sft_scores),
        "length": found.lengths.float().mean().item(),
        **tokens,
        "seconds": seconds,
    }
