"""Encoding: prompts and completions are encoded separately, end with one EOS and are cut."""

import random

import pytest

from rlhf_core.data import Preference, Text, encode_preference, encode_text
from rlhf_core.data.encode import fit


@pytest.mark.parametrize(
    "prompt, completion", [("Once upon", " a time"), ("Who?\n", "Me"), ("th", "ere"), ("", "Hi")]
)
def test_prompt_and_completion_are_encoded_apart_and_end_with_one_eos(
    tokenizer, prompt, completion
):
    """Row 21: "th" + "ere" must not become "there", which no prompt ending in "th" predicts."""
    got = encode_text(Text(prompt, completion), tokenizer, max_length=100)
    assert got.prompt_ids == tokenizer.encode_prompt(prompt)
    eos_id = tokenizer.eos_ids[0]
    assert got.completion_ids[-1] == eos_id and got.completion_ids.count(eos_id) == 1
    assert tokenizer.decode(got.prompt_ids + got.completion_ids) == prompt + completion
    # Without a prompt, the completion is a text of its own.
    encode = tokenizer.encode if prompt == "" else tokenizer.encode_completion
    assert got.completion_ids[:-1] == encode(completion)
    pair = encode_preference(Preference(prompt, completion, "no"), tokenizer, max_length=100)
    assert pair.prompt_ids == got.prompt_ids and pair.chosen_ids == got.completion_ids
    assert pair.rejected_ids[-1] == tokenizer.eos_ids[0]


@pytest.mark.parametrize(
    "text", ["<s>hi", "hi</s>", "<|im_start|>system\n", "<|im_end|>", "<|endoftext|>"]
)
def test_text_that_spells_a_special_token_is_text(tokenizer, text):
    """Row 29: no second BOS, and nothing that ends a response but the one EOS at the end."""
    example = encode_text(Text(text, text), tokenizer, 100)
    begun = tokenizer.encode_prompt("")
    special = {tokenizer.bos_id, *tokenizer.eos_ids}
    assert not special & {*example.prompt_ids[len(begun) :], *example.completion_ids[:-1]}
    assert example.prompt_ids[: len(begun)] == begun
    assert example.completion_ids[-1] == tokenizer.eos_ids[0]


def test_fit_cuts_the_start_of_the_prompt_first_then_the_end_of_the_completion():
    prompt, completion = list(range(10)), list(range(10, 16))
    assert fit(prompt, [completion], 16) == (prompt, [completion])
    assert fit(prompt, [completion], 14) == (prompt[2:], [completion])
    assert fit(prompt, [completion], 12) == (prompt[4:], [completion])
    assert fit(prompt, [completion], 8) == (prompt[6:], [completion[:4]])
    assert fit(prompt[:3], [completion], 8) == (prompt[:3], [completion[:5]])
    both = [completion[:1], completion]
    assert fit(prompt, both, 12) == (prompt[4:], both)


def test_fit_never_exceeds_max_length_nor_leaves_a_completion_empty():
    rng = random.Random(0)
    for _ in range(300):
        max_length = rng.randint(1, 20)
        prompt = list(range(rng.randint(0, 30)))
        completions = [list(range(rng.randint(1, 30))) for _ in range(2)]
        bos_id = rng.choice([None, 0])  # the prompt's first
        kept, cut = fit(prompt, completions, max_length, bos_id)
        begun = kept[:1] if bos_id == 0 else []
        assert begun == prompt[: len(begun)]
        assert kept[len(begun) :] == prompt[len(prompt) - len(kept) + len(begun) :]
        for before, after in zip(completions, cut):
            assert len(after) >= 1 and len(kept) + len(after) <= max_length
            assert after == before[: len(after)]
