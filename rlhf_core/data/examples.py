"""The rows that trainers learn from: token ids of prompts and completions, labels and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A tokenised prompt and completion.

    Attributes:
        prompt_ids: With BOS.
        completion_ids: With EOS.
        completion_mask: True for completion tokens in the loss. None means all of them.
        label: Whether the completion is desirable. None if not known.
        reward: Reward of the completion, which arrives after its last token. None if not known.
        teacher_prompt_ids: The prompt that a teacher reads, such as one with a context in front.
            None means the same prompt.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[bool] | None = None
    label: bool | None = None
    reward: float | None = None
    teacher_prompt_ids: list[int] | None = None

    def __repr__(self) -> str:
        # Part of the digest of a run's data: a field that older versions lack is shown when set.
        shown = [f"{name}={value!r}" for name, value in zip(self._fields, self)]
        return f"Example({', '.join(shown[: -1 if self.teacher_prompt_ids is None else None])})"


class Prompt(list[int]):
    """The token ids of a prompt, with the columns of its row that rewards and judges get.

    `Prompt(ids, answer="42")` has one column. Anything that takes the ids of a prompt takes it.
    """

    def __init__(self, ids: Sequence[int], /, **columns: Any):
        super().__init__(ids)
        self.columns = columns

    def __repr__(self) -> str:  # part of the digest of a run's data: a list's without columns
        ids = super().__repr__()
        return f"Prompt({ids}, **{self.columns!r})" if self.columns else ids


class Pair(NamedTuple):
    """A tokenised prompt with a chosen and a rejected completion.

    Attributes:
        prompt_ids: With BOS.
        chosen_ids: With EOS, like `rejected_ids`.
        margin: How clearly the chosen completion won, for reward models.
        masks: The completion masks of both, as in `Example`. None means that all tokens count.
        label_smoothing: Probability that the label is wrong, in [0, 0.5). None means the config's.
        criteria: For each criterion that the pair labels, whether `chosen_ids` is better by it; for
            reward models of several criteria. None means that the pair labels their score.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None = None
    masks: list[list[bool] | None] | None = None
    label_smoothing: float | None = None
    criteria: dict[str, bool] | None = None

    def __repr__(self) -> str:
        # Part of the digest of a run's data: a field that older versions lack is shown when set.
        newer = ("label_smoothing", "criteria")
        pairs = zip(self._fields, self)
        shown = [f"{name}={x!r}" for name, x in pairs if name not in newer or x is not None]
        return f"Pair({', '.join(shown)})"

    @property
    def completions_ids(self) -> list[list[int]]:
        """Both completions, chosen first."""
        return [self.chosen_ids, self.rejected_ids]


class Ranked(NamedTuple):
    """A tokenised prompt with two or more completions, best first."""

    prompt_ids: list[int]
    completions_ids: list[list[int]]


class Steps(NamedTuple):
    """A tokenised prompt and solution. The mask is True at the last token of each labelled step."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[bool]
    labels: list[float]
