"""Iterated online RLHF: rounds of judged pairs, a reward model and PPO (Bai et al. 2022, 4.5).

Each round's reward model starts from the first policy and learns from all pairs so far, so it has
seen what the policy does now. PPO continues from the policy of the round before, with the first
policy as reference. Elo ratings from the judge show the progress of the rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.algorithms.ppo import PPOConfig, PPOTrainer
from rlhf_core.algorithms.reward import RewardConfig, RewardTrainer
from rlhf_core.data import Example, Pair, Tokenizer
from rlhf_core.evaluation import elo
from rlhf_core.feedback.candidates import (
    Candidates,
    SamplingConfig,
    candidates,
    make_scorer,
    prompts_for,
)
from rlhf_core.feedback.judges import Judge, judged_in_both_orders
from rlhf_core.files import read_json, subfolder, write_json
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.options import Options, option
from rlhf_core.training.reference import frozen_copy
from rlhf_core.training.rounds import resumed, run_rounds, with_seed

SAMPLES = "samples.json"  # in a round's folder: its pairs and answers, for the later rounds


@dataclass(frozen=True)
class IteratedRLHFConfig(Options):
    """Every round has its own seed; those of sampling, reward and ppo are ignored."""

    rounds: int = option(3, "rounds of sampling, reward model and PPO", within="[1, inf)")
    sampling: SamplingConfig = option(
        help="sampling of pairs and of answers", factory=lambda: SamplingConfig(num_samples=2)
    )
    reward: RewardConfig = option(help="training of the reward models", factory=RewardConfig)
    ppo: PPOConfig = option(help="training of the policy", factory=PPOConfig)
    seed: int = option(0, "seed of the rounds")

    def __post_init__(self):
        super().__post_init__()
        n = self.sampling.num_samples
        if n < 2:
            raise ValueError(f"sampling.num_samples must be at least 2 for a pair, got {n}")


def iterated_rlhf(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: IteratedRLHFConfig,
    *,
    judge: Judge,
    pairs: Sequence[Pair] = (),
    eval_prompts: Sequence[Sequence[int]] = (),
    eos_ids: Sequence[int] | None = None,
    pretraining_examples: Sequence[Example] = (),
    tokenizer: Tokenizer | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
) -> list[dict]:
    """Train the model in place by rounds of reward model and PPO; returns each round's metrics.

    Metrics: those of PPO's last step; reward/..., those of the reward model; pairs, all so far;
    ties, the share of this round's prompts whose responses tie. With eval_prompts also wins against
    each earlier policy, the first one first, and elo, the ratings of all policies: 0 for the first
    one, with one draw added between every two.

    Args:
        judge, eos_ids, pretraining_examples, tokenizer: as for `OnlineDPOTrainer`.
        pairs: earlier pairs, which every round's reward model also learns from.
        eval_prompts: each policy answers them once. The judge compares its answers with those of
            every earlier policy in both orders, so that a preference for the first answer favours
            nobody: 2 K comparisons per prompt in round K.
        out: folder for the model, metrics.jsonl with a line per round, and round-1, round-2, ...
            with that round's policy, reward model, pairs and answers.
        resume: continue the run in `out` after its last finished round.
    """
    first = frozen_copy(model)
    out = None if out is None else Path(out)
    scorer = make_scorer(model, prompts, config.sampling, judge=judge, tokenizer=tokenizer)
    prompts = list(prompts_for(model, prompts, config.sampling).values())
    if len(eval_prompts):
        scorer.check_columns(eval_prompts)
        eval_prompts = list(prompts_for(model, eval_prompts, config.sampling).values())

    def sampled(
        prompts: Sequence[Sequence[int]], scorer: Callable, seed: int, num_samples: int
    ) -> Candidates:
        settings = replace(config.sampling, num_samples=num_samples)
        generator = torch.Generator().manual_seed(seed)
        options = dict(eos_ids=eos_ids, tokenizer=tokenizer, generator=generator)
        return candidates(model, prompts, scorer, settings, **options)

    def answer() -> list[list[int]]:
        """The policy's response to each of eval_prompts, with the same seeds for every policy."""
        if not len(eval_prompts):
            return []
        unscored = lambda _, responses: torch.zeros(len(responses))  # noqa: E731
        samples = sampled(eval_prompts, unscored, config.seed, 1)
        return [responses[0] for responses in samples.responses]

    def wins_of(new: list[list[int]], old: list[list[int]]) -> float:
        """Wins of the new answers in as many games; those that failed count as the others' mean."""
        wins = judged_in_both_orders(judge, eval_prompts, new, old, tokenizer=tokenizer)
        if wins.isnan().all():
            raise ValueError("every comparison of the policy with an earlier one failed")
        return wins.nanmean().item() * len(wins)

    all_pairs = list(pairs)
    answers = [answer()]  # of each policy so far

    def train_round(seed: int, folder: Path | None, history: list[dict]) -> dict:
        # 1. Sample pairs from the policy; the judge labels them.
        samples = sampled(prompts, scorer, seed, config.sampling.num_samples)
        new_pairs = samples.pairs()
        all_pairs.extend(new_pairs)

        # 2. Train a reward model on all pairs so far.
        reward_model = RewardModel.from_model(first)
        reward_config = with_seed(config.reward, seed)
        options = dict(tokenizer=tokenizer, out=folder and subfolder(folder, "reward"))
        reward_report = RewardTrainer(reward_model, all_pairs, reward_config, **options).train()[-1]

        # 3. Continue PPO of the policy against it.
        options = dict(
            reference=first,
            eos_ids=eos_ids,
            pretraining_examples=pretraining_examples,
            tokenizer=tokenizer,
            out=folder,
        )
        ppo_config = with_seed(config.ppo, seed)
        trainer = resumed(PPOTrainer(model, prompts, ppo_config, reward=reward_model, **options))
        report = trainer.train()[-1]
        report |= {f"reward/{name}": value for name, value in reward_report.items()}
        report |= {"pairs": len(all_pairs), "ties": (samples.margins() == 0).double().mean().item()}

        # 4. Compare the policy with all earlier ones.
        answers.append(answer())
        if folder is not None:
            write_json(folder / SAMPLES, {"pairs": new_pairs, "answers": answers[-1]})
        if len(eval_prompts):
            report["wins"] = [wins_of(answers[-1], old) for old in answers[:-1]]
            wins = [*(line["wins"] for line in history), report["wins"]]
            report["elo"] = ratings(wins, len(eval_prompts)).tolist()
        return report

    def restore(folder: Path) -> None:
        samples = read_json(folder / SAMPLES)
        all_pairs.extend(Pair(*row) for row in samples["pairs"])
        answers.append(samples["answers"])

    fixed = dict(prompts=list(prompts), pairs=list(pairs), eval_prompts=list(eval_prompts))
    options = dict(
        fixed=fixed | {"eos_ids": eos_ids},
        scorer=scorer,
        tokenizer=tokenizer,
        out=out,
        resume=resume,
        restore=restore,
    )
    return run_rounds("iterated_rlhf", model, config, train_round, **options)


def ratings(wins: list[list[float]], games: int) -> Tensor:
    """Elo (K + 1,) of a first player and K later ones.

    wins: for each later player its wins against every earlier one, out of `games`.
    """
    table = torch.zeros(len(wins) + 1, len(wins) + 1, dtype=torch.float64)
    for player, row in enumerate(wins, 1):
        table[player, :player] = torch.tensor(row, dtype=torch.float64)
        table[:player, player] = games - table[player, :player]
    return elo(table, prior=1)
