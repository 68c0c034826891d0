"""A language model as judge: our own one, or one behind an OpenAI-compatible endpoint.

The model reads a prompt, two answers and a principle, and names the better answer. The probability
of its verdict is the label. It is averaged over the principles and over both orders of the answers,
because models prefer what they read first. Source: Bai et al. 2022, Constitutional AI, section 4.1.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rlhf_core.data import Tokenizer, collate, encode_prompt
from rlhf_core.data.batches import to_device
from rlhf_core.data.collate import length
from rlhf_core.data.examples import Ranked
from rlhf_core.feedback.endpoint import Endpoint, JudgeError, RequestError
from rlhf_core.feedback.verdicts import Reply, probability_of_first
from rlhf_core.models import Transformer, eval_mode

PRINCIPLES = ("Which answer is more helpful, honest and harmless?",)
FEW = 20  # comparisons, at least, that a share of failures is taken of
_MAX_TOKENS = 64  # of a verdict
_QUESTION = """\
Consider this conversation and two answers to it.

{prompt}

Answer (A):
{first}

Answer (B):
{second}

{principle}
Reply with (A) or (B) only."""
# The place of each row; for each order the probability that the first answer shown wins; and why
# that is NaN.
Answers = Generator[tuple[int, list[float], str], None, None]
_LEAD, _OPTIONS = "\nThe better answer is", (" (A)", " (B)")


class AIJudge:
    """A judge for everything that takes one: `JudgeScorer`, online DPO, `evaluate`.

    Attributes:
        counts: comparisons so far: asked; failed; inconsistent, those where the same position won
            in both orders.
    """

    def __init__(
        self,
        model: Transformer | Endpoint | str,
        principles: Sequence[str] = PRINCIPLES,
        *,
        tokenizer: Tokenizer | None = None,
        both_orders: bool = True,
        clamp: tuple[float, float] | None = None,
        max_failures: float = 0.05,
        threads: int = 8,
    ):
        """
        Args:
            model: a Transformer, whose log-probs of "(A)" and "(B)" decide; or an `Endpoint` or its
                URL, whose reply is read.
            principles: questions to which the better answer is the answer.
            tokenizer: of a Transformer.
            both_orders: ask with each answer first. An answer that wins only where it is first, or
                only where it is last, ties.
            clamp: the lowest and highest probability, for models that are too sure, such as after
                a chain of thought: Bai et al. take 0.4 and 0.6.
            max_failures: share of failed comparisons, of all or of `FEW`, above which JudgeError
                stops the run.
            threads: requests at a time to an endpoint.
        """
        if isinstance(principles, str) or not principles or not all(map(str.strip, principles)):
            raise ValueError(f"principles must be a list of texts, none empty, got {principles!r}")
        if clamp is not None and not 0 <= clamp[0] <= 0.5 <= clamp[1] <= 1:
            raise ValueError(f"clamp must be a range around 0.5 within [0, 1], got {clamp}")
        if not 0 <= max_failures <= 1:
            raise ValueError(f"max_failures must be a share, got {max_failures}")
        if isinstance(model, Transformer) and tokenizer is None:
            raise ValueError("a model as judge needs its tokenizer: pass tokenizer=")
        self.model = Endpoint(os.fspath(model)) if isinstance(model, str) else model
        self.tokenizer, self.principles, self.both_orders = tokenizer, list(principles), both_orders
        self.clamp, self.max_failures = clamp or (0.0, 1.0), max_failures
        self.threads = threads
        self.counts = {"asked": 0, "failed": 0, "inconsistent": 0}
        self._next_report = FEW

    @property
    def models(self) -> list[nn.Module]:
        """The Transformer, which a resumed run must share."""
        return [] if isinstance(self.model, Endpoint) else [self.model]

    def describe(self) -> dict[str, Any]:
        """What judge this is, as JSON, by which a resumed run finds that it has changed."""
        remote = isinstance(self.model, Endpoint)
        return {
            "name": "AIJudge",
            "model": [self.model.url, self.model.model] if remote else "transformer",
            "principles": self.principles,
            "both_orders": self.both_orders,
            "clamp": list(self.clamp),
        }

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> list[float]:
        """For each pair the probability that the first answer is better; NaN for a failure.

        Equal answers tie without being asked about.

        Raises:
            JudgeError: more than max_failures have failed, or the endpoint refuses all requests.
        """
        rows = list(zip(prompts, first, second))
        if not all(isinstance(text, str) for row in rows for text in row):
            raise TypeError("AIJudge reads text, but got token ids: pass a tokenizer")
        wins = [0.5] * len(rows)
        differ = [i for i, (_, one, other) in enumerate(rows) if one != other]
        ask = self._ask_endpoint if isinstance(self.model, Endpoint) else self._ask_model
        with contextlib.closing(ask([rows[i] for i in differ])) as answers:
            for place, sides, reason in answers:
                wins[differ[place]] = self._counted(sides, reason)
        return wins

    def _counted(self, sides: list[float], reason: str) -> float:
        """One comparison's probability, from those of each order that the first one shown wins."""
        counts = self.counts
        counts["asked"] += 1
        counts["failed"] += any(map(math.isnan, sides))
        if counts["failed"] > self.max_failures * max(counts["asked"], FEW):
            raise JudgeError(
                f"the judge failed in {counts['failed']} of {counts['asked']} comparisons, more "
                f"than max_failures {self.max_failures:g} allows. The last reason: {reason}. "
                "Repair the judge, then continue the run, or allow more"
            )
        win = sides[0]
        if self.both_orders:
            win = (sides[0] + 1 - sides[1]) / 2
            if (sides[0] - 0.5) * (sides[1] - 0.5) > 0:
                counts["inconsistent"] += 1
                win = 0.5
        if counts["asked"] == self._next_report:
            self._next_report *= 2
            self._report()
        return win

    def _report(self) -> None:
        """Warn of position bias and of failures."""
        asked, failed, inconsistent = self.counts.values()
        if inconsistent > 0.2 * asked:
            warnings.warn(
                f"position bias: in {inconsistent} of {asked} comparisons the judge's answer "
                "depends on the order alone. These tie. Use a stronger model or clearer principles",
                stacklevel=4,
            )
        if failed:
            warnings.warn(
                f"the judge failed in {failed} of {asked} comparisons, which are left out",
                stacklevel=4,
            )

    def _questions(self, row: tuple[str, str, str]) -> Iterator[str]:
        """For each order, for each principle."""
        prompt, one, other = row
        for first, second in ((one, other), (other, one))[: 1 + self.both_orders]:
            for principle in self.principles:
                parts = dict(prompt=prompt, first=first, second=second, principle=principle)
                yield _QUESTION.format(**parts)

    def _sides(self, wins: list[float]) -> list[float]:
        """Means over the principles, for each order."""
        low, high = self.clamp
        wins = [min(max(p, low), high) if p == p else p for p in wins]
        n = len(self.principles)
        return [math.fsum(wins[i : i + n]) / n for i in range(0, len(wins), n)]

    # ---- an endpoint

    def _ask_endpoint(self, rows: list) -> Answers:
        pool = concurrent.futures.ThreadPoolExecutor(self.threads)
        try:
            tasks = {pool.submit(self._sides_of, row): i for i, row in enumerate(rows)}
            for task in concurrent.futures.as_completed(tasks):
                yield tasks[task], *task.result()
        except BaseException:
            self.model.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _sides_of(self, row: tuple[str, str, str]) -> tuple[list[float], str]:
        wins = []
        for question in self._questions(row):
            lead = "" if self.model.chat else _LEAD
            try:
                wins.append(self.model.complete(question + lead, _MAX_TOKENS, _read))
            except RequestError as error:
                return [math.nan, math.nan], str(error)
        return self._sides(wins), ""

    # ---- our own model

    def _ask_model(self, rows: list) -> Answers:
        options = [self.tokenizer.encode_completion(option) for option in _OPTIONS]
        limit = self.model.config.max_positions
        for i, row in enumerate(rows):
            questions = (question + _LEAD for question in self._questions(row))
            groups = [Ranked(encode_prompt(x, self.tokenizer), options) for x in questions]
            longest = max(map(length, groups))
            if longest > limit:
                reason = f"the question has {longest} tokens, the judge {limit} positions"
                yield i, [math.nan, math.nan], reason
            else:
                yield i, self._sides(self._option_shares(groups)), "its logits are not finite"

    @torch.no_grad()
    def _option_shares(self, groups: list[Ranked]) -> list[float]:
        """For each question the probability of the first option among both."""
        tokens = to_device(collate(groups, self.tokenizer.pad_id), self.model.device)
        with eval_mode(self.model):
            hidden = self.model.hidden_states(
                tokens.input_ids,
                positions=tokens.positions,
                visible=tokens.visible,
                read=tokens.read,
            )
            logprobs = self.model.token_logprobs(hidden, tokens.targets).logprobs.double()
        logps = torch.stack([x.sum() for x in logprobs.split(tokens.lengths.tolist())])
        return logps.view(-1, 2).softmax(dim=1)[:, 0].tolist()


def _read(reply: Reply) -> float:
    win = probability_of_first(reply)
    if win is None:
        raise ValueError("no verdict")
    return win
