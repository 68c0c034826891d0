"""Text and conversations to examples: the token ids of prompt and completion, cut to length."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.checks import check_own
from rlhf_core.data.chat import Content, Message
from rlhf_core.data.examples import Example, Pair, Prompt, Ranked, Steps
from rlhf_core.data.readers import (
    Labelled,
    Preference,
    PromptRow,
    Ranking,
    Scored,
    Solution,
    Text,
)
from rlhf_core.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer

_OWN = (ByteTokenizer, JsonTokenizer)


def encode_prompt(prompt: Content, tokenizer: Tokenizer) -> list[int]:
    """Return the ids before a response. After messages, add the header of the assistant's turn."""
    if type(tokenizer) not in _OWN:
        check_own(tokenizer)
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return tokenizer.encode_chat(prompt, start=len(prompt), add_generation_prompt=True)[0]


def encode_prompt_row(row: PromptRow, tokenizer: Tokenizer) -> Prompt:
    """Return the ids of `encode_prompt`, with the row's columns."""
    return Prompt(encode_prompt(row.prompt, tokenizer), **row.columns)


def columns_of(prompts: Sequence[Sequence[int]]) -> dict[str, list]:
    """The columns of prompts by name. A column has a value for each prompt, None if it has none."""
    rows = [getattr(prompt, "columns", {}) for prompt in prompts]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def encode_text(text: Text, tokenizer: Tokenizer, max_length: int) -> Example:
    """Tokenise a prompt and a completion, which ends with EOS. `fit` cuts them to max_length.

    The prompt of messages ends with the header of the first assistant turn in the completion. After
    it, only the tokens of the assistant count. If the chat template ends the last turn without one
    of the tokenizer's eos_ids, EOS is added. Anything it writes after EOS is dropped.
    """
    example = _encode(*text, tokenizer)
    if len(example.prompt_ids) + len(example.completion_ids) <= max_length:
        return example
    prompt, (ids,) = fit(example.prompt_ids, [example.completion_ids], max_length, tokenizer.bos_id)
    mask = example.completion_mask
    return Example(prompt, ids, None if mask is None else mask[: len(ids)])


def encode_labelled(labelled: Labelled, tokenizer: Tokenizer, max_length: int) -> Example:
    """As `encode_text`, with the label."""
    return encode_text(Text(*labelled[:2]), tokenizer, max_length)._replace(label=labelled.label)


def encode_scored(scored: Scored, tokenizer: Tokenizer, max_length: int) -> Example:
    """As `encode_text`, with the reward."""
    return encode_text(Text(*scored[:2]), tokenizer, max_length)._replace(reward=scored.reward)


def encode_preference(
    preference: Preference | Ranking | Solution, tokenizer: Tokenizer, max_length: int
) -> Pair | Ranked | Steps:
    """Tokenise a prompt and its completions like `encode_text`; a solution like `encode_solution`.

    Raises:
        ValueError: The chat template renders the prompt in different ways.
    """
    if isinstance(preference, Solution):
        return encode_solution(preference, tokenizer, max_length)
    if isinstance(preference, Ranking):
        prompt, texts = preference
        ids, completions, _ = _encode_group(prompt, texts, tokenizer, max_length)
        return Ranked(ids, completions)
    prompt, chosen, rejected, margin, *labels = preference  # label_smoothing and criteria
    ids, completions, masks = _encode_group(prompt, [chosen, rejected], tokenizer, max_length)
    return Pair(ids, *completions, margin, masks, *labels)


def encode_solution(solution: Solution, tokenizer: Tokenizer, max_length: int) -> Steps:
    """Tokenise the steps, joined by newlines, as `encode_text` does. Steps that are cut are lost.

    Raises:
        ValueError: No step is left, or `step_ends` finds another number of steps.
    """
    example = _encode(solution.prompt, "\n".join(solution.steps), tokenizer)
    ends = step_ends(example.completion_ids, tokenizer)
    if sum(ends) != len(solution.labels):
        raise ValueError(
            f"the solution has {len(solution.labels)} steps, but its tokens have {sum(ends)}"
        )
    prompt, (ids,) = fit(example.prompt_ids, [example.completion_ids], max_length, tokenizer.bos_id)
    mask = ends[: len(ids)]
    if not any(mask):
        raise ValueError(f"no step ends within {max_length} tokens")
    return Steps(prompt, ids, mask, solution.labels[: sum(mask)])


def step_ends(ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    """For each token of a completion, return whether a step ends there: where its reward belongs.

    A step is a line that is not blank. It ends with the token that holds its newline. The last step
    can also end with one of the tokenizer's eos_ids. An unfinished line is not a step, but if the
    tokenizer has no eos_ids, the last line always counts as finished.
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
    """Cut a sequence to max_length tokens.

    The start of the prompt is cut first, down to half of max_length, and then the end of the
    completion. A completion that is cut has no EOS, because it does not end there.
    """
    longest = max(map(len, completions))
    if len(prompt) + longest <= max_length:
        return prompt, completions
    prompt = cut_prompt(prompt, max(max_length - longest, max_length // 2), bos_id)
    return prompt, [completion[: max_length - len(prompt)] for completion in completions]


def cut_prompt(prompt: list[int], length: int, bos_id: int | None) -> list[int]:
    """Keep the last `length` tokens of a prompt, whose end matters most. A leading BOS stays."""
    if len(prompt) <= length:
        return prompt
    start = [bos_id] if prompt[0] == bos_id and length else []
    return start + prompt[len(prompt) - length + len(start) :]


def _encode_group(
    prompt: Content, texts: Sequence[Content], tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], list[list[int]], list[list[bool] | None] | None]:
    """Return the ids of a prompt and its completions, cut by `fit`, and their masks if any."""
    masks: list[list[bool] | None] | None = None
    if isinstance(prompt, str):
        ids = encode_prompt(prompt, tokenizer)
        completions = _encode_completions(prompt, texts, tokenizer)
    else:
        first, *others = (_encode(prompt, text, tokenizer) for text in texts)
        if any(other.prompt_ids != first.prompt_ids for other in others):
            raise ValueError(
                "the chat template renders the prompt in different ways for different completions"
            )
        ids, masks = first.prompt_ids, [x.completion_mask for x in (first, *others)]
        completions = [example.completion_ids for example in (first, *others)]
    ids, completions = fit(ids, completions, max_length, tokenizer.bos_id)
    if masks is not None:
        cut = zip(masks, map(len, completions))
        masks = [None if mask is None else mask[:length] for mask, length in cut]
        masks = masks if any(masks) else None
    return ids, completions, masks


def _encode(prompt: Content, completion: Content, tokenizer: Tokenizer) -> Example:
    if type(tokenizer) not in _OWN:
        check_own(tokenizer)
    if not isinstance(prompt, str):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return _encode_turns(prompt, completion, tokenizer)
    (ids,) = _encode_completions(prompt, [completion], tokenizer)
    return Example(tokenizer.encode_prompt(prompt), ids)


def _encode_completions(prompt: str, texts: Sequence, tokenizer: Tokenizer) -> list[list[int]]:
    encode, end = tokenizer.encode_completion if prompt else tokenizer.encode, tokenizer.eos_ids[:1]
    return [[*encode(text), *end] for text in texts]


def _encode_turns(prompt: list[Message], turns: list[Message], tokenizer: Tokenizer) -> Example:
    ids, mask = tokenizer.encode_chat([*prompt, *turns], start=len(prompt))
    if True not in mask:
        raise ValueError("the completion has no message of the assistant")
    first, end = mask.index(True), len(mask) - mask[::-1].index(True)
    # Where the last turn begins. Its EOS is in it, or right after it if the mask omits EOS.
    last = end - mask[end - 1 :: -1].index(False) if False in mask[:end] else 0
    written = [i for i in range(last, min(end + 1, len(ids))) if ids[i] in tokenizer.eos_ids]
    end = written[0] + 1 if written else end
    completion = ids[first:end] + ([] if written else list(tokenizer.eos_ids[:1]))
    counted = [*mask[first : len(completion) + first - 1], True]
    return Example(ids[:first], completion, None if all(counted) else counted)
