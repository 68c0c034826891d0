"""Iterated online RLHF (Bai et al. 2022, section 4.5): pairs from the policy, a judge, a new reward model, PPO, again.

Each round's reward model starts from the first policy and learns from all pairs so far, so that it has seen what the
policy does now; PPO goes on from the policy of the round before and is compared with the first. What the rounds have
brought is told by Elo ratings from the judge.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.data import Pair, Tokenizer
from rlhf_core.evaluation import elo
from rlhf_core.files import read_json, write_json
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.trainers.config import Options
from rlhf_core.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_core.trainers.reference import frozen_copy
from rlhf_core.trainers.reward import RewardConfig, RewardTrainer
from rlhf_core.trainers.rounds import goes_on, run_rounds
from rlhf_core.trainers.selection import (
    Candidates,
    Judge,
    SamplingConfig,
    candidates,
    judged,
    scorer_of,
)

SAMPLES = "samples.json"  # of a round, in its folder: what the next ones need


@dataclass(frozen=True)
class IteratedRLHFConfig(Options):
    """The seeds of sampling, reward and ppo have no say: each round has its own."""

    rounds: int = 3
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(num_samples=2)
    )  # of pairs and of answers
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    seed: int = 0

    def __post_init__(self):
        self.check_positive("rounds")
        if self.sampling.num_samples < 2:
            raise ValueError(
                f"sampling.num_samples must be at least 2 for a pair, got {self.sampling.num_samples}"
            )


def iterated_rlhf(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: IteratedRLHFConfig,
    *,
    judge: Judge,
    pairs: Sequence[Pair] = (),
    eval_prompts: Sequence[Sequence[int]] = (),
    eos_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
) -> list[dict]:
    """Train the model in place by rounds of reward model and PPO; returns the metrics of each round.

    judge, eos_ids, tokenizer: as for `OnlineDPOTrainer`. pairs: of before, in every round's mixture.
    eval_prompts: each policy answers them once, and the judge compares it with every policy before it, in both orders,
        so that one who prefers what it reads first favours neither: round K asks it for 2 K answers a prompt.
    out: folder for the model, metrics.jsonl with a line a round and, in round-1, round-2, ..., that round's policy,
        reward model, pairs and answers. resume: go on from there after the last whole round.

    Metrics: PPO's last step's; reward/..., the reward model's; pairs, all so far; ties, the share of this round's
    prompts whose responses tie; with eval_prompts wins against each policy before, the first one first, and elo, the
    ratings of all so far, the first policy's 0 and one draw added between every two.
    """
    first, out = frozen_copy(model), None if out is None else Path(out)
    scorer = scorer_of(model, config.sampling, judge=judge, tokenizer=tokenizer)

    def sampled(
        prompts: Sequence[Sequence[int]], scorer: Callable, seed: int, num_samples: int
    ) -> Candidates:
        settings, generator = (
            replace(config.sampling, num_samples=num_samples),
            torch.Generator().manual_seed(seed),
        )
        return candidates(model, prompts, scorer, settings, eos_ids=eos_ids, generator=generator)

    def answer() -> list[list[int]]:
        """One response of the policy to each of eval_prompts, with the same seeds for every policy."""
        if not len(eval_prompts):
            return []
        found = sampled(
            eval_prompts, lambda _, responses: torch.zeros(len(responses)), config.seed, 1
        )
        return [responses[0] for responses in found.responses]

    def wins_of(new: list[list[int]], old: list[list[int]]) -> float:
        """Of the policy that gave the new answers against that of the old ones."""
        first, last = (
            judged(judge, eval_prompts, *both, tokenizer=tokenizer)
            for both in ((new, old), (old, new))
        )
        return ((first + 1 - last) / 2).sum().item()

    known, answers = list(pairs), [answer()]  # all pairs so far; the answers of each policy so far

    def train_round(seed: int, folder: Path | None, history: list[dict]) -> dict:
        # 1. Pairs from the policy, labelled by the judge.
        found = sampled(prompts, scorer, seed, config.sampling.num_samples)
        new = found.pairs()
        known.extend(new)

        # 2. A reward model from all pairs so far.
        reward_model = RewardModel.from_model(first)
        settings = dict(tokenizer=tokenizer, out=folder and folder / "reward")
        fitted = RewardTrainer(
            reward_model, known, replace(config.reward, seed=seed), **settings
        ).train()[-1]

        # 3. PPO against it, from the policy as it is.
        settings = dict(
            reward=reward_model, reference=first, eos_ids=eos_ids, tokenizer=tokenizer, out=folder
        )
        report = goes_on(
            PPOTrainer(model, prompts, replace(config.ppo, seed=seed), **settings)
        ).train()[-1]
        report |= {f"reward/{name}": value for name, value in fitted.items()}
        report |= {"pairs": len(known), "ties": (found.margins() == 0).double().mean().item()}

        # 4. The policy against all before it.
        answers.append(answer())
        if folder is not None:
            write_json(folder / SAMPLES, {"pairs": new, "answers": answers[-1]})
        if len(eval_prompts):
            report["wins"] = [wins_of(answers[-1], old) for old in answers[:-1]]
            report["elo"] = ratings(
                [*(line["wins"] for line in history), report["wins"]], len(eval_prompts)
            ).tolist()
        return report

    def restore(folder: Path) -> None:
        samples = read_json(folder / SAMPLES)
        known.extend(Pair(*row) for row in samples["pairs"])
        answers.append(samples["answers"])

    fixed = list(prompts), list(pairs), list(eval_prompts), eos_ids
    options = dict(fixed=fixed, tokenizer=tokenizer, out=out, resume=resume, restore=restore)
    return run_rounds("iterated_rlhf", model, config, train_round, **options)


def ratings(wins: list[list[float]], games: int) -> Tensor:
    """Elo (K + 1,) of a first player and K more, whose wins against each player before them are given, in that many
    games."""
    table = torch.zeros(len(wins) + 1, len(wins) + 1, dtype=torch.float64)
    for player, row in enumerate(wins, 1):
        table[player, :player] = torch.tensor(row, dtype=torch.float64)
        table[:player, player] = games - table[player, :player]
    return elo(table, prior=1)
