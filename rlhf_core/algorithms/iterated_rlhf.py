"""Iterated online RLHF: rounds of judged pairs, a reward model and PPO (Bai et al. 2022, 4.5).

Each round's reward model starts from the first policy and learns from all pairs so far, so it has
seen what the policy does now. PPO continues from the policy of the round before, with the first
policy as reference. A judge labels the pairs (`iterated_rlhf`), or people do
(`iterated_rlhf_with_people`). Elo ratings from the labels show the progress of the rounds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.algorithms.ppo import PPOConfig, PPOTrainer
from rlhf_core.algorithms.reward import RewardConfig, RewardTrainer
from rlhf_core.checks import check_own
from rlhf_core.data import Candidates as CandidateRow
from rlhf_core.data import (
    Example,
    Pair,
    Tokenizer,
    encode_preference,
    read_candidates,
    read_comparisons,
)
from rlhf_core.evaluation import elo
from rlhf_core.evaluation.ratings import Ratings, rate_players
from rlhf_core.feedback import candidate_file
from rlhf_core.feedback.annotation.export import describe, export_rows
from rlhf_core.feedback.annotation.labels import Contents, read_labels
from rlhf_core.feedback.annotation.people import People, ask
from rlhf_core.feedback.candidate_file import Source, appending, candidate_row
from rlhf_core.feedback.candidates import (
    Candidates,
    SamplingConfig,
    candidates,
    make_scorer,
    prompts_for,
)
from rlhf_core.feedback.judges import Judge, judged_in_both_orders
from rlhf_core.files import read_json, subfolder, write_json, write_rows
from rlhf_core.generation import Engine
from rlhf_core.models import RewardModel, Transformer, eval_mode
from rlhf_core.options import Options, option
from rlhf_core.training.checkpoint import digest
from rlhf_core.training.reference import frozen_copy
from rlhf_core.training.rounds import (
    CANDIDATES,
    PAIRS,
    resumed,
    run_rounds,
    with_seed,
)
from rlhf_core.training.run_log import OnStep

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
        if self.reward.copies != self.ppo.copies:
            raise ValueError(
                f"reward has {self.reward.copies} copies of weights in pieces, but ppo has "
                f"{self.ppo.copies}: give both the same shard and mesh"
            )

    @property
    def copies(self) -> int | None:
        """Copies of the weights that are cut into pieces; None: they are not cut."""
        return self.ppo.copies


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
    on_step: OnStep | None = None,
    engine: Engine | None = None,
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
        on_step: called as on_step(metrics, round) after each round of this process; see `Trainer`.
        engine: as for `PPOTrainer`.
    """
    first = frozen_copy(model)
    out = None if out is None else Path(out)
    scorer = make_scorer(model, prompts, config.sampling, judge=judge, tokenizer=tokenizer)
    prompts = prompts_for(model, prompts, config.sampling).prompts
    if len(eval_prompts):
        scorer.check_columns(eval_prompts)
        eval_prompts = prompts_for(model, eval_prompts, config.sampling).prompts

    def sampled(
        prompts: Sequence[Sequence[int]], scorer: Callable, seed: int, num_samples: int
    ) -> Candidates:
        settings = replace(config.sampling, num_samples=num_samples)
        generator = torch.Generator().manual_seed(seed)
        options = dict(eos_ids=eos_ids, tokenizer=tokenizer, generator=generator, engine=engine)
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
    options = dict(eos_ids=eos_ids, pretraining_examples=pretraining_examples, tokenizer=tokenizer)
    options["engine"] = engine

    def train_round(seed: int, folder: Path | None, history: list[dict]) -> dict:
        # 1. Sample pairs from the policy; the judge labels them.
        samples = sampled(prompts, scorer, seed, config.sampling.num_samples)
        new_pairs = samples.pairs()
        all_pairs.extend(new_pairs)

        # 2. Train a reward model on all pairs so far.  3. Continue PPO of the policy against it.
        report = train_on(all_pairs, model, first, prompts, config, seed, folder, **options)
        report["ties"] = (samples.margins() == 0).double().mean().item()

        # 4. Compare the policy with all earlier ones.
        answers.append(answer())
        if folder is not None and not distributed.rank():
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
    return run_rounds(
        "iterated_rlhf",
        model,
        config,
        train_round,
        fixed=fixed | {"eos_ids": eos_ids},
        scorer=scorer,
        tokenizer=tokenizer,
        out=out,
        resume=resume,
        on_step=on_step,
        restore=restore,
    )


def train_on(
    pairs: Sequence[Pair],
    model: Transformer,
    first: Transformer,
    prompts: Sequence[Sequence[int]],
    config: IteratedRLHFConfig,
    seed: int,
    folder: Path | None,
    *,
    tokenizer: Tokenizer | None,
    **options,
) -> dict:
    """Train a reward model on the pairs, and the policy against it; the round's metrics."""
    reward_model = RewardModel.from_model(first)
    own = dict(tokenizer=tokenizer, out=folder and subfolder(folder, "reward"))
    reward_config = with_seed(config.reward, seed)
    reward_report = RewardTrainer(reward_model, pairs, reward_config, **own).train()[-1]

    options |= dict(reward=reward_model, reference=first, tokenizer=tokenizer, out=folder)
    trainer = resumed(PPOTrainer(model, prompts, with_seed(config.ppo, seed), **options))
    report = trainer.train()[-1]
    report |= {f"reward/{name}": value for name, value in reward_report.items()}
    return report | {"pairs": len(pairs)}


def iterated_rlhf_with_people(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: IteratedRLHFConfig,
    *,
    people: People,
    tokenizer: Tokenizer,
    out: str | os.PathLike,
    eos_ids: Sequence[int] | None = None,
    pretraining_examples: Sequence[Example] = (),
    resume: bool = False,
    on_step: OnStep | None = None,
    engine: Engine | None = None,
) -> list[dict]:
    """Train the model in place, with people as the judge; returns each round's metrics.

    In a round, half of the sampling.num_samples answers to a prompt are of the policy, half of the
    one before it; in the first round all are of the first policy. The reward model learns from all
    labels in the database, earlier ones included.

    Metrics: as for `iterated_rlhf` without wins. From the second round on, elo, elo_lower and
    elo_upper rate the policies that were compared, 0 for the first one, with 95 % intervals over
    prompts. So the policy of the last round is rated if another round follows.

    Args:
        people: with a text for each prompt.
        out: as for `iterated_rlhf`; a round's folder has its candidates.jsonl and pairs.jsonl.
        resume: continue the run in `out`, also one that was stopped while it waited.
        on_step: called as on_step(metrics, round) after each round of this process; see `Trainer`.
        engine: samples from the policy, but not from the one before it; see `PPOTrainer`.
    """
    if distributed.launched() > 1:
        raise ValueError(
            f"WORLD_SIZE is {distributed.launched()}, but a run that waits for people's labels "
            "uses one process"
        )
    first, out = frozen_copy(model), Path(out).absolute()
    check_own(model, tokenizer)
    if len(people.prompts) != len(prompts):
        raise ValueError(f"there are {len(people.prompts)} texts for {len(prompts)} prompts")
    places, prompts = prompts_for(model, prompts, config.sampling)
    texts = [people.prompts[i] for i in places]
    asked: list[CandidateRow] = []  # of all rounds

    def write_candidates(seed: int, folder: Path, number: int) -> list[CandidateRow]:
        """The answers of the policy and of the one before it."""
        n, old = config.sampling.num_samples, first if number == 2 else None
        if number > 2:
            old = Transformer.from_pretrained(out / f"round-{number - 2}").to(model.device)
        ends = model.config.eos_ids if eos_ids is None else eos_ids
        how = tokenizer, ends, prompts, [config.sampling.temperature]
        new = n if old is None else n - n // 2
        sources = [Source(f"policy-{number - 1}", model, *how, new, engine)]
        if old is not None:
            sources.append(Source(f"policy-{number - 2}", old, *how, n // 2))
        sampling = with_seed(config.sampling, seed)
        run = digest(repr(sampling), repr(prompts), *(source.model for source in sources))[:16]
        begun = [{"id": f"{run}-{i}", "prompt": text, "run": run} for i, text in enumerate(texts)]
        path = folder / CANDIDATES
        with eval_mode(model), appending(path, begun, sampling.batch_size) as (write, first_prompt):
            for start, batch in candidate_file.sampled(sources, sampling, first_prompt):
                write([candidate_row(row, answers) for row, answers in zip(begun[start:], batch)])
        return read_candidates(path)

    def train_round(seed: int, folder: Path, history: list[dict]) -> dict:
        # 1. People compare the policy's answers with those of the policy before it.
        asked.extend(write_candidates(seed, folder, len(history) + 1))
        if (folder / PAIRS).is_file():  # stopped after it: later labels would change the round
            labels = read_labels(people.db)
        else:
            labels = ask(people, asked[-len(prompts) :], config.seed)
            rows, left_out = export_rows(labels, "preference")
            write_rows(folder / PAIRS, rows)
            reasons = describe(left_out) or "nothing"
            print(f"{len(rows)} pairs; left out: {reasons}", file=sys.stderr)
        length = min(config.reward.max_length, model.config.max_positions)
        encode = lambda row: encode_preference(row, tokenizer, length)  # noqa: E731
        pairs = read_comparisons(folder / PAIRS, encode=encode)

        # 2. Train a reward model on all pairs so far.  3. Continue PPO of the policy against it.
        options = dict(eos_ids=eos_ids, pretraining_examples=pretraining_examples)
        options |= dict(tokenizer=tokenizer, engine=engine)
        report = train_on(pairs, model, first, prompts, config, seed, folder, **options)
        report["labels"] = len(labels.labels())

        # 4. Rate the policies that people have compared.
        rated = rate_policies(labels, [row.id for row in asked], len(prompts))
        if rated is not None:
            columns = (rated.elo.tolist(), rated.lower.tolist(), rated.upper.tolist())
            report |= dict(zip(("elo", "elo_lower", "elo_upper"), columns))
            for i, (rating, low, high) in enumerate(zip(*columns)):
                print(f"policy {i}: Elo {rating:.0f} [{low:.0f}, {high:.0f}]", file=sys.stderr)
        return report

    return run_rounds(
        "iterated_rlhf",
        model,
        config,
        train_round,
        fixed=dict(prompts=prompts, texts=texts, eos_ids=eos_ids),
        scorer=None,
        tokenizer=tokenizer,
        out=out,
        resume=resume,
        on_step=on_step,
        restore=lambda folder: asked.extend(read_candidates(folder / CANDIDATES)),
    )


def rate_policies(
    labels: Contents, rows: Sequence[str | int | None], prompts: int
) -> Ratings | None:
    """Elo of policy 0, 1, ... from the labels of these rows; None if no two were compared.

    A tie, or "both bad", is a draw, and one draw is added between every two policies. The intervals
    are clustered by prompt.

    rows: ids of the rows of all rounds, `prompts` a round, in the same order in each. Their
        responses have a source "policy-N".
    """
    prompt_of = {row: i % prompts for i, row in enumerate(rows)}
    games = []
    for (name, places), votes in labels.votes().items():
        item = labels.items[name]
        if item.row in prompt_of:
            one, two = (int(item.sources[i]["model"].removeprefix("policy-")) for i in places)
            results = [{1: 1.0, 2: 0.0}.get(outcome, 0.5) for _, outcome in votes]
            games += [(one, two, result, prompt_of[item.row]) for result in results if one != two]
    if not games:
        return None
    one, two, outcomes, clusters = zip(*games)
    players = 1 + max(*one, *two)
    return rate_players(one, two, outcomes, players, clusters=clusters, prior=1)


def ratings(wins: list[list[float]], games: int) -> Tensor:
    """Elo (K + 1,) of a first player and K later ones.

    wins: for each later player its wins against every earlier one, out of `games`.
    """
    table = torch.zeros(len(wins) + 1, len(wins) + 1, dtype=torch.float64)
    for player, row in enumerate(wins, 1):
        table[player, :player] = torch.tensor(row, dtype=torch.float64)
        table[:player, player] = games - table[player, :player]
    return elo(table, prior=1)
