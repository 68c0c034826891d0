"""Judges compare two responses to a prompt: the probability that the first one is better.

A comparison that has failed is NaN or None. It is no tie and no loss: it is counted and left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core import distributed
from rlhf_core.data import Tokenizer, columns_of
from rlhf_core.data.store import column_names
from rlhf_core.feedback.rewards import (
    RewardError,
    Scorer,
    columns_for,
    describe_function,
    first_failure,
    no_hard_exit,
    unique_rows,
)
from rlhf_core.losses import preferred

# (prompts, first, second, **columns) -> for each row the probability that the first response is
# better; NaN or None where the comparison has failed.
Judge = Callable[..., Sequence[float | None]]


class RewardJudge:
    """A judge that prefers the response with the higher reward. It reads token ids, not text."""

    def __init__(self, scorer: Scorer):
        self.scorer = scorer

    @property
    def models(self) -> Sequence[nn.Module]:
        return self.scorer.models

    def describe(self) -> dict[str, Any]:
        return self.scorer.describe()

    def __call__(self, prompts: list, first: list, second: list, **columns: list) -> Tensor:
        """1 where the first response is better, 0 where the second is, 1/2 for equal rewards.

        The scorer gets the columns with the prompts.
        """
        return preferred(self.scorer(prompts, first), self.scorer(prompts, second))


class JudgeScorer:
    """Scores (B * n,): a response's mean probability of winning against its prompt's other ones.

    The scores of two responses are p and 1 - p. The judge sees each pair once, in sampling order.
    Failed comparisons are left out. A response without any other one scores NaN.
    """

    def __init__(self, judge: Judge, num_samples: int, tokenizer: Tokenizer | None = None):
        if num_samples < 2:
            raise ValueError(
                f"a judge compares responses: num_samples must be >= 2, got {num_samples}"
            )
        self.judge, self.num_samples, self.tokenizer = judge, num_samples, tokenizer
        self.models: Sequence[nn.Module] = getattr(judge, "models", ())  # as for `Scorer`

    def describe(self) -> dict[str, Any]:
        """As `Scorer.describe`."""
        return {"judge": describe_function(self.judge)}

    def check_columns(self, prompts: Sequence[Sequence[int]]) -> None:
        """As `Scorer.check_columns`."""
        columns_for(self.judge, 3, {name: [] for name in chain(*column_names(prompts))})

    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        n, zeros = self.num_samples, torch.zeros(len(responses), dtype=torch.float64)
        groups = torch.arange(0, len(responses), n)[:, None]  # (B, 1) first row of each prompt
        pairs = torch.triu_indices(n, n, 1)
        first, second = ((groups + i).flatten() for i in pairs)  # (B n (n - 1) / 2,)
        wins = judged(
            self.judge,
            [prompts[i] for i in first],
            [responses[i] for i in first],
            [responses[i] for i in second],
            tokenizer=self.tokenizer,
        )
        counts = (~wins.isnan()).double()
        scores = zeros.index_add(0, first, wins.nan_to_num(0))
        scores = scores.index_add(0, second, (1 - wins).nan_to_num(0))
        return scores / zeros.index_add(0, first, counts).index_add(0, second, counts)


def judged(
    judge: Judge,
    prompts: list[list[int]],
    first: list[list[int]],
    second: list[list[int]],
    *,
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """The judge's probabilities (B,) float64 that the first response is better.

    The judge gets strings if there is a tokenizer, else token ids, and columns of the prompts as a
    reward does. Equal responses tie without asking it, and it sees equal rows once. Comparisons
    that have failed are NaN, and their number is a warning.

    Raises:
        ValueError: a returned value is not a probability.
        RewardError: the judge raised. Both name the row, its prompt and its responses.
    """
    if not len(prompts):
        raise ValueError("there are no responses to judge")
    texts, columns = [prompts, first, second], columns_for(judge, 3, columns_of(prompts))
    if tokenizer is not None and not isinstance(judge, RewardJudge):
        texts = [[tokenizer.decode(ids) for ids in column] for column in texts]
    *distinct, place = unique_rows(*texts, *columns.values())
    differ = [row for row, (one, other) in enumerate(zip(*distinct[1:3])) if one != other]
    wins = torch.full((len(distinct[0]),), 0.5, dtype=torch.float64)
    if differ:
        asked = [[column[row] for row in differ] for column in distinct]
        ask, found = isinstance(judge, RewardJudge) or not distributed.rank(), None
        with distributed.together():  # rank 0 alone asks a judge that may cost money
            if ask:
                found = _ask(judge, asked[:3], dict(zip(columns, asked[3:])))
        wins[differ] = distributed.from_rank_0(found)
    wins = wins[place]
    for row, (p, prompt, *responses) in enumerate(zip(wins.tolist(), *texts)):
        if not (0 <= p <= 1 or math.isnan(p)):
            raise ValueError(
                f"the judge returned {p} for row {row}, not a probability; prompt {prompt!r}, "
                f"responses {responses!r}"
            )
    if failed := int(wins.isnan().sum()):
        warnings.warn(
            f"{failed} of {len(wins)} comparisons by the judge failed and are left out",
            stacklevel=2,
        )
    return wins


def judged_in_both_orders(
    judge: Judge,
    prompts: list[list[int]],
    one: list[list[int]],
    other: list[list[int]],
    *,
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """As `judged`, averaged over both orders, so that a preference for the first favours nobody.

    A judge with a true attribute `both_orders` does so itself.
    """
    wins = judged(judge, prompts, one, other, tokenizer=tokenizer)
    if getattr(judge, "both_orders", False):
        return wins
    return (wins + 1 - judged(judge, prompts, other, one, tokenizer=tokenizer)) / 2


def _ask(judge: Judge, texts: list[list], columns: dict[str, list]) -> Tensor:
    """texts: prompts, first and second responses."""
    try:
        with no_hard_exit():
            returned = judge(*texts, **columns)
    except (KeyboardInterrupt, RewardError):  # a judge that says itself why it stops
        raise
    except BaseException as error:  # sys.exit, too
        where = first_failure(judge, columns, *texts)
        raise RewardError(f"the judge raised {error!r}; {where}") from error
    try:
        if isinstance(returned, list | tuple):
            returned = [math.nan if p is None else p for p in returned]
        wins = torch.as_tensor(returned, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the judge returned {returned!r:.200}: {error}") from None
    pairs = len(texts[0])
    if wins.shape != (pairs,):
        raise ValueError(f"the judge returned shape {tuple(wins.shape)} for {pairs} pairs")
    return wins
