"""Text and conversations to examples: token ids of prompt and completion, cut to length."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_core.data.chat import Message
from rlhf_core.data.readers import Labelled, Preference, Ranking, Scored, Solution, Text
from rlhf_core.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """A tokenised prompt (BOS included) and completion (EOS included)."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[bool] | None = None  # which of its tokens count; None: all
    label: bool | None = None  # whether the completion is desirable, where that is known
    reward: float | None = (
        None  # of the completion, which arrives after its last token, where that is known
    )


class Pair(NamedTuple):
    """A tokenised prompt with the completion that was preferred and the one that was not."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None = None  # how clearly the first one won; for reward models
    masks: list[list[bool] | None] | None = None  # which tokens of each count; None: all

    @property
    def completions_ids(self) -> list[list[int]]:
        """Both, the better one first."""
        return [self.chosen_ids, self.rejected_ids]


class Ranked(NamedTuple):
    """A tokenised prompt with two or more completions, the best one first."""

    prompt_ids: list[int]
    completions_ids: list[list[int]]


class Steps(NamedTuple):
    """A tokenised prompt and solution, whose mask is True at the last token of each step; the labels of these."""

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[bool]
    labels: list[float]


def encode_prompt(prompt: str | list[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids that a response follows: text with its BOS, or messages up to where the assistant's turn begins."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return tokenizer.encode_chat(prompt, start=len(prompt), add_generation_prompt=True)[0]


def encode_text(text: Text, tokenizer: Tokenizer, max_length: int) -> Example:
    """Tokenise; the completion ends with EOS. See `fit` for what max_length cuts.

    Of messages the prompt is everything before the completion's first turn of the assistant, its header included; of
    the tokens after it those of the assistant count. What ends a turn is the template's to write: EOS is added where
    the template ends the last one with none of the tokenizer's eos_ids, and what it writes after it is left out.
    """
    example = _encode(*text, tokenizer)
    prompt, (completion,) = fit(
        example.prompt_ids, [example.completion_ids], max_length, tokenizer.bos_id
    )
    mask = example.completion_mask
    return Example(prompt, completion, None if mask is None else mask[: len(completion)])


def encode_labelled(labelled: Labelled, tokenizer: Tokenizer, max_length: int) -> Example:
    """`encode_text`, with the label."""
    return encode_text(Text(*labelled[:2]), tokenizer, max_length)._replace(label=labelled.label)


def encode_scored(scored: Scored, tokenizer: Tokenizer, max_length: int) -> Example:
    """`encode_text`, with the reward."""
    return encode_text(Text(*scored[:2]), tokenizer, max_length)._replace(reward=scored.reward)


def encode_preference(
    preference: Preference | Ranking | Solution, tokenizer: Tokenizer, max_length: int
) -> Pair | Ranked | Steps:
    """Tokenise; all completions end with EOS, as in `encode_text`. See `fit` for what max_length cuts. A solution goes
    through `encode_solution`."""
    if isinstance(preference, Solution):
        return encode_solution(preference, tokenizer, max_length)
    ranking = isinstance(preference, Ranking)
    texts = preference.responses if ranking else (preference.chosen, preference.rejected)
    first, *others = (_encode(preference.prompt, text, tokenizer) for text in texts)
    if any(other.prompt_ids != first.prompt_ids for other in others):
        raise ValueError(
            "the chat template renders the prompt of one completion otherwise than that of another"
        )
    masks = [example.completion_mask for example in (first, *others)]
    completions = [example.completion_ids for example in (first, *others)]
    prompt, completions = fit(first.prompt_ids, completions, max_length, tokenizer.bos_id)
    if ranking:
        return Ranked(prompt, completions)
    masks = [None if mask is None else mask[: len(ids)] for mask, ids in zip(masks, completions)]
    return Pair(prompt, *completions, preference.margin, masks if any(masks) else None)


def encode_solution(solution: Solution, tokenizer: Tokenizer, max_length: int) -> Steps:
    """Tokenise the steps, a newline between two, as `encode_text` does; where they end, says `step_ends`. See `fit` for
    what max_length cuts: the steps that end beyond it do not count. ValueError where none is left, or where the tokens
    have other steps."""
    example = _encode(solution.prompt, "\n".join(solution.steps), tokenizer)
    ends = step_ends(example.completion_ids, tokenizer)
    if sum(ends) != len(solution.labels):
        raise ValueError(
            f"{len(solution.labels)} steps, but tokenised they end in {sum(ends)} places"
        )
    prompt, (completion,) = fit(
        example.prompt_ids, [example.completion_ids], max_length, tokenizer.bos_id
    )
    mask = ends[: len(completion)]
    if not any(mask):
        raise ValueError(f"no step ends within {max_length} tokens")
    return Steps(prompt, completion, mask, solution.labels[: sum(mask)])


def step_ends(ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Of each token of a completion, whether a step ends with it, where reward models learn of steps and score them.

    A step is a line that is not blank. It ends with the token that holds its newline, the last one also with one of the
    tokenizer's eos_ids: neither an EOS behind a newline nor what was cut before its end is a step. Where the tokenizer
    has no eos_ids nothing tells what was cut, and the last token is an end.
    """
    last = set(tokenizer.eos_ids)
    texts, ends, line = {i: "" if i in last else tokenizer.decode([i]) for i in set(ids)}, [], ""
    for at, i in enumerate(ids, 1):
        before, newline, after = texts[i].partition("\n")
        line += before
        over = newline or i in last or (not last and at == len(ids))
        ends.append(bool(over and line.strip()))
        line = after.rpartition("\n")[2] if over else line
    return ends


def fit(
    prompt: list[int], completions: list[list[int]], max_length: int, bos_id: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """Cut a sequence to max_length tokens: first the prompt, down to half of max_length; then the end of the
    completion, which loses its EOS, for it did not end there."""
    longest = max(map(len, completions))
    prompt = cut_prompt(prompt, max(max_length - longest, max_length // 2), bos_id)
    return prompt, [completion[: max_length - len(prompt)] for completion in completions]


def cut_prompt(prompt: list[int], length: int, bos_id: int | None) -> list[int]:
    """The last `length` tokens of a prompt, whose end matters most; a BOS stays in front."""
    if len(prompt) <= length:
        return prompt
    start = [bos_id] if prompt[0] == bos_id and length else []
    return start + prompt[len(prompt) - length + len(start) :]


def _encode(
    prompt: str | list[Message], completion: str | list[Message], tokenizer: Tokenizer
) -> Example:
    if not isinstance(prompt, str):
        turns = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else completion
        )
        return _encode_turns(prompt, turns, tokenizer)
    encode = tokenizer.encode_completion if prompt else tokenizer.encode
    return Example(
        tokenizer.encode_prompt(prompt), encode(completion) + list(tokenizer.eos_ids[:1])
    )


def _encode_turns(prompt: list[Message], turns: list[Message], tokenizer: Tokenizer) -> Example:
    ids, mask = tokenizer.encode_chat([*prompt, *turns], start=len(prompt))
    if True not in mask:
        raise ValueError("the completion holds no message of the assistant")
    first, end = mask.index(True), len(mask) - mask[::-1].index(True)
    last = (
        end - mask[end - 1 :: -1].index(False) if False in mask[:end] else 0
    )  # where the last turn begins
    # An EOS is in the last turn or, where the template does not count it as the assistant's, right after it.
    written = [i for i in range(last, min(end + 1, len(ids))) if ids[i] in tokenizer.eos_ids]
    end = written[0] + 1 if written else end
    completion = ids[first:end] + ([] if written else list(tokenizer.eos_ids[:1]))
    counted = [*mask[first : len(completion) + first - 1], True]
    return Example(ids[:first], completion, None if all(counted) else counted)
