"""Several scored responses to each prompt: best-of-n, and the samples of RFT and online DPO."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_core.checks import check_own
from rlhf_core.data import Pair, Prompt, Tokenizer
from rlhf_core.data.encode import cut_prompt
from rlhf_core.data.store import ExampleStore, column_names, join, longer, select, store
from rlhf_core.feedback.judges import Judge, JudgeScorer
from rlhf_core.feedback.rewards import Reward, Scorer
from rlhf_core.generation import Engine, check_stop_strings
from rlhf_core.masking import tied
from rlhf_core.models import Transformer
from rlhf_core.options import Options, option
from rlhf_core.rollout import sample

LONG_PROMPTS = ("drop", "truncate", "error")
ON_LONG_PROMPT = (
    "what happens to prompts that leave no room for a response; truncate cuts the start"
)
STOP_STRINGS = (
    "strings that end a response; the token that completes one counts and is trained on, and the "
    "reward sees the string"
)
ALL_TIED = (
    "no response scores differently from the others to its prompt, so there is nothing to learn. "
    "Use harder or easier prompts, a finer reward or a higher temperature"
)


@dataclass(frozen=True)
class SamplingConfig(Options):
    """Sampling of candidates. In a trainer's config the trainer's own fields come first."""

    num_samples: int = option(16, "responses to each prompt", within="[1, inf)")
    response_length: int = option(53, "longest response, tokens", within="[1, inf)")
    temperature: float = option(1.0, "temperature of sampling", within="(0, inf)")
    max_length: int = option(1024, "tokens of prompt and response together; see on_long_prompt")
    on_long_prompt: str = option("drop", ON_LONG_PROMPT, choices=LONG_PROMPTS)
    stop_strings: tuple[str, ...] = option((), STOP_STRINGS, flag="--stop")
    batch_size: int = option(
        16, "prompts sampled at a time, and rows of a reward model's forward", within="[1, inf)"
    )
    seed: int = option(0, "seed of sampling")


class Candidates(NamedTuple):
    """n scored responses to each of B prompts, as token ids."""

    prompts: list[list[int]]
    responses: list[list[list[int]]]  # (B, n), EOS included
    scores: Tensor  # (B, n), on the CPU; NaN where a judge has failed

    def best(self) -> tuple[list[list[int]], Tensor]:
        """Each prompt's response with the highest score (the first of equals), and its score."""
        scores, index = self.scores.nan_to_num(-math.inf).max(dim=1)
        return [row[i] for row, i in zip(self.responses, index.tolist())], scores

    def rows(self) -> tuple[list, list[list[int]], list[float]]:
        """Prompt, response and score of each of the B n responses."""
        n = self.scores.shape[1]
        prompts = [prompt for prompt in self.prompts for _ in range(n)]
        return (
            prompts,
            [ids for group in self.responses for ids in group],
            self.scores.flatten().tolist(),
        )

    def pairs(self) -> list[Pair]:
        """Each prompt's best response against its worst, unless they tie."""
        best = self.scores.nan_to_num(-math.inf).argmax(dim=1).tolist()
        worst = self.scores.nan_to_num(math.inf).argmin(dim=1).tolist()
        rows = zip(self.prompts, self.responses, best, worst, self.margins().tolist())
        return [Pair(prompt, ids[i], ids[j]) for prompt, ids, i, j, margin in rows if margin > 0]

    def margins(self) -> Tensor:
        """Best minus worst score (B,); 0 for scores that tie (see `masking.tied`); NaN for none."""
        failed = self.scores.isnan()
        scores = self.scores.where(~failed, self.scores.nanmean(dim=1, keepdim=True))
        return (scores.amax(dim=1) - scores.amin(dim=1)).masked_fill(tied(scores), 0)


class Fitted(NamedTuple):
    """Prompts that leave room for a response, and their places among those that were given."""

    places: list[int]
    prompts: Sequence[list[int]]


def best_of_n(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]] | None = None,
    judge: Judge | None = None,
    eos_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    engine: Engine | None = None,
) -> Candidates:
    """Sample and score num_samples responses to each prompt; `best` of them are the answers.

    `evaluation.best_of_n_kl` bounds their KL to the policy. Prompts that are dropped (see
    on_long_prompt) have no candidates.

    Args:
        prompts: lists of token ids, or `Prompt` with columns for the reward.
        reward, judge: as for `make_scorer`.
        eos_ids: tokens that end a response; None: the policy's own.
        engine: samples in place of `generate`.
    """
    source = dict(reward=reward, judge=judge, tokenizer=tokenizer)
    scorer = make_scorer(model, prompts, config, **source)
    prompts = prompts_for(model, prompts, config).prompts
    generator = torch.Generator().manual_seed(config.seed)
    options = dict(eos_ids=eos_ids, tokenizer=tokenizer, generator=generator, engine=engine)
    return candidates(model, prompts, scorer, config, **options)


def candidates(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    scorer: Callable[[list[list[int]], list[list[int]]], Tensor],
    config: SamplingConfig,
    *,
    eos_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    generator: torch.Generator,
    engine: Engine | None = None,
) -> Candidates:
    """Sample n responses to each prompt and score them.

    Every response has its own seed, so batch_size changes nothing but rounding.

    Args:
        scorer: (prompts, responses) -> scores (B n,), a prompt's responses in a row.
        tokenizer: required with stop_strings.
        engine: samples in place of `generate`.
    """
    if not len(prompts):
        raise ValueError("there are no prompts to sample responses to")
    n = config.num_samples
    seeds = torch.randint(2**63 - 1, (len(prompts), n), generator=generator)
    responses, scores = [], []
    for start in range(0, len(prompts), config.batch_size):
        part = slice(start, start + config.batch_size)
        rollout = sample(
            model,
            prompts[part],
            max_new_tokens=config.response_length,
            num_samples=n,
            temperature=config.temperature,
            eos_ids=eos_ids,
            stop_strings=config.stop_strings,
            tokenizer=tokenizer,
            seeds=seeds[part].flatten(),
            engine=engine,
        )
        flat = rollout.responses()
        responses += [flat[i : i + n] for i in range(0, len(flat), n)]
        repeated = [prompt for prompt in prompts[part] for _ in range(n)]
        scores.append(scorer(repeated, flat).cpu().view(-1, n))
    return Candidates(list(prompts), responses, torch.cat(scores))


def prompts_for(
    model: Transformer, prompts: Sequence[Sequence[int]], config: SamplingConfig
) -> Fitted:
    """The prompts that leave room for the config's responses, as `fit_prompts`."""
    return fit_prompts(prompts, _prompt_length(model, config), model.config.bos_id, config)


def fit_prompts(
    prompts: Sequence[Sequence[int]], length: int, bos_id: int | None, config: Options
) -> Fitted:
    """Prompts of at most `length` tokens; longer ones as on_long_prompt says.

    Warns with the number of dropped or truncated prompts. If any prompt has columns, all get the
    same ones, None where a prompt has no value.

    Raises:
        ValueError: on_long_prompt is error and a prompt is longer, or none is left.
    """
    if not len(prompts):
        raise ValueError("there are no prompts to sample responses to")
    named = column_names(prompts)
    names = dict.fromkeys(chain.from_iterable(named))

    def with_columns(ids: Sequence[int], of: Any) -> list[int]:
        own = getattr(of, "columns", {})
        return Prompt(ids, **{name: own.get(name) for name in names}) if names else list(ids)

    make: Any = store if isinstance(prompts, ExampleStore) else list
    if make is list or len(named) > 1:
        prompts = make(with_columns(prompt, prompt) for prompt in prompts)
    places, long = list(range(len(prompts))), longer(prompts, length)
    if not long:
        return Fitted(places, prompts)
    mode, longest = config.on_long_prompt, max(long, key=lambda i: len(prompts[i]))
    found = (
        f"{len(long)} of {len(prompts)} prompts have more than {length} tokens; the longest is "
        f"prompt {longest} with {len(prompts[longest])}"
    )
    if mode == "error" or (mode == "drop" and len(long) == len(prompts)):
        raise ValueError(f"{found}. Shorten them, or set on_long_prompt to truncate")
    warnings.warn(f"{found}. on_long_prompt={mode!r} applies to them", stacklevel=3)
    if mode == "drop":
        dropped = set(long)
        places = [i for i in places if i not in dropped]
        return Fitted(places, select(prompts, places))
    cut = [with_columns(cut_prompt(x, length, bos_id), x) for x in select(prompts, long)]
    order = list(places)
    for place, i in enumerate(long, len(prompts)):
        order[i] = place
    return Fitted(places, select(join([prompts, cut]), order))


def make_scorer(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]] | None = None,
    judge: Judge | None = None,
    tokenizer: Tokenizer | None = None,
) -> Scorer | JudgeScorer:
    """The scorer of a model's samples, from a reward or a judge, whichever is given.

    Raises:
        ValueError: both or neither is given, they or the config's lengths do not fit the model, or
            they need a column that the prompts do not have.
    """
    check_own(model, tokenizer)
    _prompt_length(model, config)
    check_stop_strings(config.stop_strings, tokenizer)
    if (reward is None) == (judge is None):
        raise ValueError("pass either a reward or a judge")
    scorer: Scorer | JudgeScorer
    if judge is not None:
        scorer = JudgeScorer(judge, config.num_samples, tokenizer)
    else:
        options = dict(pad_id=model.config.pad_id or 0, batch_size=config.batch_size)
        scorer = Scorer(reward, tokenizer=tokenizer, **options)
        scorer.check_vocabulary(model)
    scorer.check_columns(prompts)
    return scorer


def _prompt_length(model: Transformer, config: SamplingConfig) -> int:
    """The longest prompt in tokens; ValueError if the response leaves no room for one."""
    limit = min(config.max_length, model.config.max_positions)
    length = config.response_length
    if limit <= length:
        raise ValueError(f"response_length {length} leaves no room for a prompt in {limit} tokens")
    return limit - length
