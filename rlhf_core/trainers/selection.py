"""Several responses to each prompt, scored, the better ones kept: best-of-n; what RFT and online DPO learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data import Pair, Tokenizer
from rlhf_core.data.encode import cut_prompt
from rlhf_core.models import Transformer
from rlhf_core.rollout import sample
from rlhf_core.trainers.common import RewardError
from rlhf_core.trainers.config import Options, option
from rlhf_core.trainers.scoring import Reward, Scorer, raises_on

Judge = Callable[[list, list, list], Sequence[float]]


@dataclass(frozen=True)
class SamplingConfig(Options):
    """How candidates are sampled; a trainer's config takes it up behind its own fields, which win."""

    num_samples: int = option(16, "responses to each prompt")
    response_length: int = option(53, "longest response, tokens")
    temperature: float = option(1.0, "of sampling, > 0")
    max_length: int = option(
        1024, "tokens of prompt and response together; a longer prompt loses its start"
    )
    batch_size: int = option(16, "prompts at a time, and rows of a reward model's forward")
    seed: int = option(0, "of sampling")

    def __post_init__(self):
        self.check_positive("num_samples", "response_length", "temperature", "batch_size")


class Candidates(NamedTuple):
    """n scored responses to each of B prompts, all token ids."""

    prompts: list[list[int]]  # cut to the length that they were sampled with
    responses: list[list[list[int]]]  # (B, n), EOS included
    scores: Tensor  # (B, n), on the CPU

    def best(self) -> tuple[list[list[int]], Tensor]:
        """Of each prompt the response that scores highest, of several the first one, and the scores (B,)."""
        scores, index = self.scores.max(dim=1)
        return [row[i] for row, i in zip(self.responses, index.tolist())], scores

    def pairs(self) -> list[Pair]:
        """Of each prompt the best response against the worst, where they do not score alike."""
        best, worst = self.scores.argmax(dim=1).tolist(), self.scores.argmin(dim=1).tolist()
        rows = zip(self.prompts, self.responses, best, worst, self.margins().tolist())
        return [
            Pair(prompt, texts[i], texts[j]) for prompt, texts, i, j, margin in rows if margin > 0
        ]

    def margins(self) -> Tensor:
        """Best minus worst score (B,); 0 is a tie."""
        return self.scores.amax(dim=1) - self.scores.amin(dim=1)


def best_of_n(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]],
    eos_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Candidates:
    """Sample and score num_samples responses to each prompt, a list of token ids; `best` of them are the answers.

    How far that is from the policy says `evaluation.best_of_n_kl`. reward: as for `Scorer`; eos_ids: every token that
    ends a response, None takes the policy's own.
    """
    scorer = scorer_of(model, config, reward=reward, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(config.seed)
    return candidates(model, prompts, scorer, config, eos_ids=eos_ids, generator=generator)


def candidates(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    scorer: Callable[[list[list[int]], list[list[int]]], Tensor],
    config: SamplingConfig,
    *,
    eos_ids: Sequence[int] | None = None,
    generator: torch.Generator,
) -> Candidates:
    """Sample n responses to each prompt, and score them.

    scorer: (prompts, responses) -> scores (B n,), the responses to a prompt one after the other.
    Every response has a seed of its own, so batch_size changes only rounding.
    """
    if not len(prompts):
        raise ValueError("there are no prompts to sample responses to")
    n, R, room = config.num_samples, config.response_length, _prompt_length(model, config)
    prompts = [cut_prompt(list(prompt), room, model.config.bos_id) for prompt in prompts]
    seeds = torch.randint(2**63 - 1, (len(prompts), n), generator=generator)
    responses, scores = [], []
    for start in range(0, len(prompts), config.batch_size):
        part = slice(start, start + config.batch_size)
        rollout = sample(
            model,
            prompts[part],
            max_new_tokens=R,
            num_samples=n,
            temperature=config.temperature,
            eos_ids=eos_ids,
            seeds=seeds[part].flatten(),
        )
        flat = rollout.responses()
        responses += [flat[i : i + n] for i in range(0, len(flat), n)]
        scores.append(scorer(rollout.prompts(), flat).cpu().view(-1, n))
    return Candidates(prompts, responses, torch.cat(scores))


def _prompt_length(model: Transformer, config: SamplingConfig) -> int:
    """The longest prompt, tokens; ValueError where the response leaves none."""
    limit, R = min(config.max_length, model.config.max_positions), config.response_length
    if limit <= R:
        raise ValueError(f"response_length {R} leaves no prompt of {limit} tokens")
    return limit - R


def scorer_of(
    model: Transformer,
    config: SamplingConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]] | None = None,
    judge: Judge | None = None,
    tokenizer: Tokenizer | None = None,
) -> Callable[[list[list[int]], list[list[int]]], Tensor]:
    """What scores the samples of a model: a reward or a judge, whichever is given. ValueError, before anything is
    sampled, where that does not fit the model, or the config's lengths do not."""
    _prompt_length(model, config)
    if (reward is None) == (judge is None):
        raise ValueError("give either a reward or a judge")
    if judge is not None:
        return JudgeScorer(judge, config.num_samples, tokenizer)
    scorer = Scorer(
        reward, tokenizer=tokenizer, pad_id=model.config.pad_id or 0, batch_size=config.batch_size
    )
    scorer.check_vocabulary(model)
    return scorer


class JudgeScorer:
    """Scores (B * n,) from a judge: how probable a response is to win against another one to its prompt, in the mean.

    Of two responses these are p and 1 - p. The judge sees each two once, in the order in which they were sampled.
    """

    models = ()  # that it holds, see `Scorer`

    def __init__(self, judge: Judge, num_samples: int, tokenizer: Tokenizer | None = None):
        if num_samples < 2:
            raise ValueError(
                f"num_samples must be at least 2 for a judge to compare, got {num_samples}"
            )
        self.judge, self.num_samples, self.tokenizer = judge, num_samples, tokenizer

    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        n, scores = self.num_samples, torch.zeros(len(responses), dtype=torch.float64)
        rows = torch.arange(0, len(responses), n)[
            :, None
        ]  # (B, 1) where a prompt's responses begin
        first, second = (
            (rows + i).flatten() for i in torch.triu_indices(n, n, 1)
        )  # (B n (n - 1) / 2,)
        columns = (
            [prompts[i] for i in first],
            [responses[i] for i in first],
            [responses[i] for i in second],
        )
        wins = judged(self.judge, *columns, tokenizer=self.tokenizer)
        return scores.index_add(0, first, wins).index_add(0, second, 1 - wins) / (n - 1)


def judged(
    judge: Judge,
    prompts: list[list[int]],
    first: list[list[int]],
    second: list[list[int]],
    *,
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """The probabilities (B,) float64 that a judge gives the first response to be the better one; it sees strings where
    there is a tokenizer, else token ids. ValueError with row, prompt and responses where one is no probability,
    RewardError where it raises."""
    rows = list(zip(prompts, first, second))
    if not rows:
        raise ValueError("there are no responses to judge")
    if tokenizer is not None:
        rows = [tuple(tokenizer.decode(ids) for ids in row) for row in rows]
    columns = [list(column) for column in zip(*rows)]
    try:
        wins = torch.as_tensor(judge(*columns), dtype=torch.float64, device="cpu")
    except Exception as error:
        raise RewardError(f"the judge raised {error!r}; {raises_on(judge, *columns)}") from error
    if wins.shape != (len(rows),):
        raise ValueError(
            f"the judge returned shape {tuple(wins.shape)} for {len(rows)} pairs of responses"
        )
    for row, p in enumerate(wins.tolist()):
        if not 0 <= p <= 1:
            prompt, *responses = rows[row]
            raise ValueError(
                f"the judge gives row {row} {p}, no probability; prompt {prompt!r}, responses {responses!r}"
            )
    return wins
