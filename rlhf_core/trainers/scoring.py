"""Responses to rewards: of a reward model, of any callable, of several weighted. A bad score is an error with its row.

A reward is one number for a response, which its last token earns, or one for each of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_core.data import Example, Tokenizer, collate, step_ends
from rlhf_core.models import EnsembleReward, RewardModel, Transformer
from rlhf_core.trainers.common import RewardError, to_device

Reward = RewardModel | EnsembleReward | Callable[[list, list], Sequence[float | Sequence[float]]]


class Scorer:
    """Calls the rewards on rows of token ids."""

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
        reward: a RewardModel or EnsembleReward; or a callable (prompts, responses) -> rewards that gets lists of
            strings where there is a tokenizer (special tokens left out), lists of token ids otherwise, and returns for
            each response a finite number, or a finite number for each of its tokens; or a list of (reward, weight),
            which add up.
        batch_size: rows of a reward model's forward; None: all at once. device: of the rewards.
        of_steps: the reward models are process reward models: what the end of a step earns is the log of the
            probability that the step is right, and so a response's score that of all of them being right;
            what `step_ends` calls no step earns nothing.

        Raises ValueError for a reward model that scores steps where they do not count, or the other way round.
        """
        self.rewards = list(reward) if isinstance(reward, list | tuple) else [(reward, 1.0)]
        if not self.rewards:
            raise ValueError("there is no reward")
        for row in self.rewards:
            if (
                not isinstance(row, list | tuple)
                or len(row) != 2
                or not isinstance(row[1], float | int)
            ):
                raise ValueError(f"several rewards are (reward, weight) each, got {row!r}")
            if not math.isfinite(row[1]):
                raise ValueError(f"a reward's weight must be finite, got {row[1]}")
        self.models = [
            part.eval()
            for part, _ in self.rewards
            if isinstance(part, RewardModel | EnsembleReward)
        ]
        self.tokenizer, self.pad_id, self.batch_size, self.device = (
            tokenizer,
            pad_id,
            batch_size,
            device,
        )
        self.of_steps = of_steps
        if of_steps and (tokenizer is None or len(self.models) < len(self.rewards)):
            raise ValueError(
                "rewards of steps need a tokenizer, which knows where these end, and reward models alone"
            )
        for i, model in enumerate(self.models):
            if model.of_steps and not of_steps:
                raise ValueError(
                    f"reward model {i} scores steps, so it goes with process_rewards alone"
                )
            if of_steps and not model.of_steps:
                raise ValueError(
                    f"reward model {i} scores responses: process_rewards needs those that learned steps"
                )

    def check_vocabulary(self, policy: Transformer) -> None:
        """Raise ValueError where a reward model cannot read the token ids of a policy. Sizes a hundredth apart may be
        those of one tokenizer, padded otherwise, as Qwen2.5's are."""
        size = policy.config.vocab_size
        for i, model in enumerate(self.models):
            if abs(model.config.vocab_size - size) > 0.01 * size:
                sizes = f"the policy has {size} tokens, reward model {i} {model.config.vocab_size}"
                raise ValueError(f"{sizes}: they must share a tokenizer")

    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Scores (B,) float32: what the tokens of each response earn together."""
        rewards = self.rewards_of(prompts, responses)
        return rewards if rewards.ndim == 1 else rewards.sum(dim=1)

    @torch.no_grad()
    def rewards_of(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Float32 (B,), or (B, R) for rewards of tokens, R those of the longest response; 0 after a response's end.

        Raises ValueError for a reward of another shape or that is not finite, RewardError where a callable raises,
        with the row, its prompt and its response.
        """
        total = torch.zeros(len(responses), device=self.device)
        for reward, weight in self.rewards:
            if isinstance(reward, RewardModel | EnsembleReward):
                part = self._model_scores(reward, prompts, responses)
            else:
                part = self._call(reward, prompts, responses)
            bad = (~part.isfinite()).flatten(1).any(dim=1) if part.ndim > 1 else ~part.isfinite()
            if bad.any():
                row = int(bad.int().argmax())
                value = part[row] if part.ndim == 1 else part[row][~part[row].isfinite()][0]
                raise ValueError(
                    f"the reward of row {row} is {value}; {self._words(prompts[row], responses[row])}"
                )
            if part.ndim != total.ndim:
                total, part = (_on_tokens(x, responses) for x in (total, part))
            total = total + weight * part
        return total

    def _model_scores(
        self,
        model: RewardModel | EnsembleReward,
        prompts: list[list[int]],
        responses: list[list[int]],
    ) -> Tensor:
        masks = [step_ends(ids, self.tokenizer) if self.of_steps else None for ids in responses]
        examples = [Example(*row) for row in zip(prompts, responses, masks)]
        size, scores = self.batch_size or len(examples), []
        for start in range(0, len(examples), size):
            tokens = to_device(
                collate(examples[start : start + size], self.pad_id),
                next(model.parameters()).device,
            )
            scores.append(
                F.logsigmoid(model.token_scores(tokens)) if self.of_steps else model.scores(tokens)
            )
        scores = torch.cat(scores).to(self.device)
        if not self.of_steps:
            return scores
        ends = pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True).to(
            self.device
        )  # (B, R)
        return scores.new_zeros(ends.shape).masked_scatter(ends, scores)

    def _call(
        self, reward: Callable, prompts: list[list[int]], responses: list[list[int]]
    ) -> Tensor:
        texts = (
            [self.readable(prompt) for prompt in prompts],
            [self.readable(response) for response in responses],
        )
        try:
            found = reward(*texts)
        except Exception as error:
            raise RewardError(
                f"the reward raised {error!r}; {raises_on(reward, *texts)}"
            ) from error
        try:
            rows = [torch.as_tensor(row, dtype=torch.float32) for row in found]
        except (TypeError, ValueError) as error:
            raise ValueError(f"the reward returned {found!r:.200}: {error}") from None
        if len(rows) != len(responses):
            raise ValueError(f"the reward returned {len(rows)} rows for {len(responses)} responses")
        if all(row.ndim == 0 for row in rows):
            return torch.stack(rows).to(self.device)
        for i, (row, response) in enumerate(zip(rows, responses)):
            if row.shape != (len(response),):
                raise ValueError(
                    f"the reward of row {i} has shape {tuple(row.shape)}, for {len(response)} tokens; return a number "
                    "for each response, or one for each of its tokens"
                )
        return pad_sequence(rows, batch_first=True).to(self.device)

    def _words(self, prompt: list[int], response: list[int]) -> str:
        return f"prompt {self.readable(prompt)!r}, response {self.readable(response)!r}"

    def readable(self, ids: list[int]) -> str | list[int]:
        """The string of token ids where there is a tokenizer, else the ids."""
        return ids if self.tokenizer is None else self.tokenizer.decode(ids)


def raises_on(judge: Callable, prompts: list, *responses: list) -> str:
    """The first row on which a reward or a judge raises when it is called with that one alone, in words."""
    for row, (prompt, *texts) in enumerate(zip(prompts, *responses)):
        try:
            judge([prompt], *([text] for text in texts))
        except Exception:
            return f"so it does on row {row} alone: prompt {prompt!r}, response {' and '.join(map(repr, texts))}"
    return f"on all {len(prompts)} rows at once, on no row alone"


def _on_tokens(rewards: Tensor, responses: list[list[int]]) -> Tensor:
    """Rewards (B,) as those of the responses' last tokens, (B, R)."""
    if rewards.ndim == 2:
        return rewards
    lengths = torch.tensor([len(response) for response in responses], device=rewards.device)
    places = rewards.new_zeros(len(lengths), int(lengths.max()))
    return places.scatter(1, lengths[:, None] - 1, rewards[:, None])
