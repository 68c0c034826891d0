"""Rewards of responses: from a reward model, any callable, or a weighted sum of several.

A reward is one number for a response, earned by its last token, or one number for each token. A bad
reward is an error that names its row.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_core import distributed
from rlhf_core.checks import check_own
from rlhf_core.data import Example, Tokenizer, collate, columns_of, step_ends
from rlhf_core.data.batches import to_device
from rlhf_core.data.collate import TokenBatch, grouped, length, unknown_id
from rlhf_core.data.store import column_names
from rlhf_core.models import EnsembleReward, RewardModel, Transformer
from rlhf_core.models.packed_attention import packing_pays

# (prompts, responses, **columns) -> a number for each response, or for each of its tokens.
Reward = RewardModel | EnsembleReward | Callable[..., Sequence[float | Sequence[float]]]


class RewardError(RuntimeError):
    """A caller's reward or judge raised an error; the message names the row."""


class Scorer:
    """Scores rows of token ids with one or several rewards."""

    def __init__(
        self,
        reward: Reward | Sequence[tuple[Reward, float]],
        *,
        tokenizer: Tokenizer | None = None,
        pad_id: int = 0,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        of_steps: bool = False,
    ):
        """
        Args:
            reward: a RewardModel or EnsembleReward; a callable (prompts, responses, **columns) ->
                rewards; or a list of (reward, weight), whose weighted sum counts. A callable gets
                lists of strings without special tokens if there is a tokenizer, else lists of
                token ids, and those columns of the prompts that its parameters name, see
                `columns_for`. It returns a finite number for each response, or one for each token
                of it. An exception in it, sys.exit included, is a RewardError. os._exit is not
                seen: it ends the process, and a run leaves its lock file.
            batch_size: rows of a reward model's forward; None: all at once.
            device: of the returned rewards.
            of_steps: the reward models are process reward models. The end of a step earns the log
                of the probability that the step is right, so a response scores the log-probability
                that all its steps are right. Text that is not a step (see `step_ends`) earns 0.

        Raises:
            ValueError: the rewards are malformed, or a model scores steps where responses count, or
                the reverse.
        """
        self.rewards = list(reward) if isinstance(reward, list | tuple) else [(reward, 1.0)]
        if not self.rewards:
            raise ValueError("the list of rewards is empty")
        for row in self.rewards:
            if not isinstance(row, list | tuple) or len(row) != 2:
                raise ValueError(f"several rewards must be (reward, weight) pairs, got {row!r}")
            if not isinstance(row[1], float | int) or not math.isfinite(row[1]):
                raise ValueError(f"a reward's weight must be a finite number, got {row[1]!r}")
            check_own(row[0])
        models = (
            part for part, _ in self.rewards if isinstance(part, RewardModel | EnsembleReward)
        )
        self.models = [model.eval() for model in models]
        self.tokenizer, self.pad_id = tokenizer, pad_id
        self.batch_size, self.device, self.of_steps = batch_size, device, of_steps
        if of_steps and (tokenizer is None or len(self.models) < len(self.rewards)):
            raise ValueError(
                "rewards of steps need a tokenizer, which finds their ends, and reward models only"
            )
        for i, model in enumerate(self.models):
            if model.of_steps and not of_steps:
                raise ValueError(f"reward model {i} scores steps: it needs process_rewards")
            if of_steps and not model.of_steps:
                raise ValueError(
                    f"reward model {i} scores whole responses: process_rewards needs a model "
                    "trained on steps"
                )

    def describe(self) -> dict[str, Any]:
        """What rewards these are, as JSON, by which a resumed run finds that one has changed."""
        described = {"of_steps": self.of_steps}
        for i, (reward, weight) in enumerate(self.rewards):
            if isinstance(reward, RewardModel | EnsembleReward):
                options = {name: getattr(reward, name, None) for name in ("aggregate", "coef")}
                parts = {"models": len(getattr(reward, "models", [reward])), **options}
                parts = {"name": type(reward).__name__, **parts}
            else:
                parts = describe_function(reward)
            described[str(i)] = {**parts, "weight": weight}
        return described

    def check_vocabulary(self, policy: Transformer) -> None:
        """Raise ValueError if a reward model cannot read the policy's token ids.

        Sizes within 1 % pass: models of one tokenizer may be padded differently, as Qwen2.5's are.
        """
        size = policy.config.vocab_size
        for i, model in enumerate(self.models):
            other = model.config.vocab_size
            if abs(other - size) > 0.01 * size:
                raise ValueError(
                    f"the policy has {size} tokens, but reward model {i} has {other}: they must "
                    "share a tokenizer"
                )

    def check_columns(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise ValueError if a callable needs a column that the prompts do not have."""
        columns: dict[str, list] = {name: [] for name in chain(*column_names(prompts))}
        for reward, _ in self.rewards:
            if not isinstance(reward, RewardModel | EnsembleReward):
                columns_for(reward, 2, columns)

    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Scores (B,) float32: the sum over each response's tokens."""
        return scores_of(self.rewards_of(prompts, responses))

    @torch.no_grad()
    def spread(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor | None:
        """Standard deviation (B,) between the scores of the models of ensembles; None without."""
        members = [part for model in self.models for part in getattr(model, "models", ())]
        if not members:
            return None
        scores = [scores_of(self._model_scores(part, prompts, responses)[0]) for part in members]
        return torch.stack(scores).std(dim=0)

    def rewards_of(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Rewards (B,), or (B, R) if they are per token, float32; R is the longest response.

        Equal rows are scored once, so that no rounding or chance tells them apart.

        Raises:
            ValueError: a reward has a wrong shape or is not finite.
            RewardError: a callable raised. Both name the row, its prompt and its response.
        """
        return self.rewards_and_criteria(prompts, responses)[0]

    @torch.no_grad()
    def rewards_and_criteria(
        self, prompts: list[list[int]], responses: list[list[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `rewards_of`, with the scores (B,) by each criterion of the reward models.

        Of several rewards a criterion's name begins with the place of its own: "0/helpful".
        """
        *distinct, place = unique_rows(prompts, responses)
        total = torch.zeros(len(responses), device=self.device)
        criteria: dict[str, Tensor] = {}
        for i, (reward, weight) in enumerate(self.rewards):
            if isinstance(reward, RewardModel | EnsembleReward):
                part, each = self._model_scores(reward, *distinct)
                part, prefix = part[place], f"{i}/" if len(self.rewards) > 1 else ""
                criteria |= {f"{prefix}{name}": scores[place] for name, scores in each.items()}
            else:
                part = self._call(reward, *distinct)[place]
            self._check_finite(part, prompts, responses)
            if part.ndim != total.ndim:
                total, part = (_per_token(x, responses) for x in (total, part))
            total = total + weight * part
        return total, criteria

    def _model_scores(
        self, model: RewardModel | EnsembleReward, prompts: list[list[int]], responses: list
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scores (B,) or (B, R) of a model, and those (B,) by each of its criteria."""
        names = getattr(model, "criteria", {})
        masks = [step_ends(ids, self.tokenizer) if self.of_steps else None for ids in responses]
        examples = [Example(*row) for row in zip(prompts, responses, masks)]
        config = model.config
        vocab_size = config.vocab_size  # may differ from the policy's by its padding
        for i, example in enumerate(examples):
            if fault := unknown_id(example, vocab_size):
                raise ValueError(f"row {i} to score {fault}")
        pad_id = self.pad_id if self.pad_id < vocab_size else 0
        device = next(model.parameters()).device

        def batch_of(own: slice) -> TokenBatch:
            rows, groups = examples[own], grouped(prompts[own], responses[own])
            tokens = sum(len(g.prompt_ids) + sum(map(len, g.completions_ids)) for g in groups)
            shape = len(rows), max(map(length, rows))
            if self.of_steps or device.type != "cpu" or not packing_pays(config, shape, tokens):
                return collate(rows, pad_id)
            return collate(groups, pad_id, packing=tokens)

        def scored(own: slice) -> tuple[Tensor]:
            tokens = to_device(batch_of(own), device)
            if self.of_steps:
                return (F.logsigmoid(model.token_scores(tokens)),)
            return (model.scores_each(tokens) if names else model.scores(tokens),)

        own_rows = distributed.shares(len(examples), self.batch_size)
        (scores,) = distributed.gather(map(scored, own_rows))
        scores = scores.to(self.device)
        if names:
            return model.combine(scores), dict(zip(names, scores.float().unbind(dim=1)))
        if not self.of_steps:
            return scores, {}
        ends = pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True)  # (B, R)
        ends = ends.to(self.device)
        return scores.new_zeros(ends.shape).masked_scatter(ends, scores), {}

    def _call(self, reward: Callable, prompts: list[list[int]], responses: list) -> Tensor:
        """The rewards of a callable, which sees all responses to a prompt together.

        Each rank calls it for its share of the prompts.
        """
        starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]]
        own = distributed.share(len(starts))
        first, stop = ([*starts, len(prompts)][i] for i in (own.start, own.stop))
        parts = (self._called(reward, prompts[i:stop], responses[i:stop], i) for i in [first])
        (rewards,) = distributed.gather(parts if first < stop else ())
        return rewards

    def _called(
        self, reward: Callable, prompts: list[list[int]], responses: list, first: int
    ) -> tuple[Tensor]:
        """The rewards of rows, of which the first has the number `first`."""
        texts = [[self.readable(ids) for ids in column] for column in (prompts, responses)]
        columns = columns_for(reward, 2, columns_of(prompts))
        try:
            with no_hard_exit():
                returned = reward(*texts, **columns)
                if isinstance(returned, Iterator):
                    returned = list(returned)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, too
            where = first_failure(reward, columns, *texts, first=first)
            raise RewardError(f"the reward raised {error!r}; {where}") from error
        try:
            if isinstance(returned, dict | set | str | bytes):
                raise TypeError(f"a {type(returned).__name__} is not a list of numbers")
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in returned]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the reward returned {returned!r:.200}: {error}") from None
        if len(rows) != len(responses):
            raise ValueError(f"the reward returned {len(rows)} rows for {len(responses)} responses")
        if all(row.ndim == 0 for row in rows):
            return (torch.stack(rows).to(self.device),)
        for i, (row, response) in enumerate(zip(rows, responses), first):
            if row.shape != (len(response),):
                raise ValueError(
                    f"the reward of row {i} has shape {tuple(row.shape)}, but the response has "
                    f"{len(response)} tokens. Return one number per response, or one per token"
                )
        return (pad_sequence(rows, batch_first=True).to(self.device),)

    def _check_finite(self, rewards: Tensor, prompts: list, responses: list) -> None:
        bad = ~rewards.isfinite()
        if bad.any():
            place = bad.nonzero()[0].tolist()
            prompt, response = (self.readable(x[place[0]]) for x in (prompts, responses))
            raise ValueError(
                f"the reward of row {place[0]} is {rewards[tuple(place)]}; prompt {prompt!r}, "
                f"response {response!r}"
            )

    def readable(self, ids: list[int]) -> str | list[int]:
        """The text of token ids, or the ids themselves without a tokenizer."""
        return ids if self.tokenizer is None else self.tokenizer.decode(ids)


@contextlib.contextmanager
def no_hard_exit() -> Iterator[None]:
    """Inside, user code that calls `os._exit` raises SystemExit; forked processes still end."""
    end, process = os._exit, os.getpid()

    def refuse(status: int) -> None:
        if os.getpid() != process:
            end(status)
        raise SystemExit(status)

    os._exit = refuse
    try:
        yield
    finally:
        os._exit = end


def unique_rows(*columns: list) -> tuple[list, ...]:
    """The columns without repeated rows, and for each original row its place in them."""
    rows = list(zip(*columns))
    keys = [repr(row) for row in rows]
    first = dict(zip(keys, rows))
    places = {key: i for i, key in enumerate(first)}
    return *(list(column) for column in zip(*first.values())), [places[key] for key in keys]


def scores_of(rewards: Tensor) -> Tensor:
    """The total of each response (B,), from rewards (B,) or (B, R)."""
    return rewards if rewards.ndim == 1 else rewards.sum(dim=1)


def columns_for(function: Callable, lists: int, columns: Mapping[str, list]) -> dict[str, list]:
    """The columns that a reward or judge takes: those its parameters name, or with **names all.

    Args:
        lists: how many first parameters get prompts and responses; they never get a column.

    Raises:
        ValueError: a parameter without a default has no column.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return {}
    positional = [x for x in parameters if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    first = [x.name for x in positional[:lists]]
    named = [x for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)]
    named = {x.name: x for x in named if x.name not in first}
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in columns:
            found = ", ".join(columns) or "none"
            raise ValueError(
                f"{describe_function(function)['name']} has a parameter {name!r}, but the prompts "
                f"have no such column; their columns: {found}. Give it a default, or add the column"
            )
    takes_all = any(x.kind == x.VAR_KEYWORD for x in parameters)
    return {
        name: values
        for name, values in columns.items()
        if name in named or (takes_all and name not in first)
    }


def first_failure(
    function: Callable, columns: dict, prompts: list, *responses: list, first: int = 0
) -> str:
    """Call a reward or judge with single rows; says on which row it raises.

    first: the number of the first row.
    """
    for row, (prompt, *texts) in enumerate(zip(prompts, *responses)):
        try:
            with no_hard_exit():
                own = {name: [values[row]] for name, values in columns.items()}
                function([prompt], *([text] for text in texts), **own)
        except KeyboardInterrupt:
            raise
        except BaseException:
            shown = " and ".join(map(repr, texts))
            return f"it also raises on row {first + row} alone: prompt {prompt!r}, response {shown}"
    return f"it raises on all {len(prompts)} rows together, on no row alone"


def describe_function(function: Callable) -> dict[str, Any]:
    """Names of a callable, and SHA-256 of its source file, as JSON.

    A script changes for other reasons than its functions: what `__main__` defines has the digest of
    its own source. Without a source there is none. A callable with a method `describe` is asked.
    """
    if hasattr(function, "describe"):
        return function.describe()
    if isinstance(function, functools.partial):
        given = [*function.args, *function.keywords.items()]
        plain = [repr(x) for x in given if " at 0x" not in repr(x)]
        return {**describe_function(function.func), "arguments": plain}
    named = inspect.unwrap(function) if hasattr(function, "__qualname__") else type(function)
    module = getattr(named, "__module__", None)
    try:
        if module == "__main__":
            source = inspect.getsource(named).encode()
        else:
            source = Path(inspect.getsourcefile(named) or "").read_bytes()
        digest = hashlib.sha256(source).hexdigest()
    except (OSError, TypeError):
        digest = None
    return {"name": f"{module}.{named.__qualname__}", "source": digest}


def _per_token(rewards: Tensor, responses: list[list[int]]) -> Tensor:
    """Rewards (B, R), with rewards (B,) moved to the last token of each response."""
    if rewards.ndim == 2:
        return rewards
    lengths = torch.tensor([len(response) for response in responses], device=rewards.device)
    per_token = rewards.new_zeros(len(lengths), int(lengths.max()))
    return per_token.scatter(1, lengths[:, None] - 1, rewards[:, None])
