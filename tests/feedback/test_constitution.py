"""Constitutional AI: each revision answers its request; useless revisions are dropped, with why."""

import json
import random

import pytest
import torch
from helpers import tiny

from rlhf_core.data import ByteTokenizer, read_prompt_rows
from rlhf_core.feedback import constitution
from rlhf_core.feedback.candidates import SamplingConfig
from rlhf_core.feedback.constitution import (
    Principle,
    Writer,
    Written,
    read_principles,
    revised,
    revision_fault,
    training_rows,
)

PRINCIPLES = [Principle(name, "q", f"criticise {name}", f"revise {name}") for name in "xyz"]


class Script:
    """A writer of given texts, by the end of the prompt; None has no room."""

    config = SamplingConfig(batch_size=2, seed=3)

    def __init__(self, texts):
        self.texts, self.asked = texts, []

    def __call__(self, prompts, seeds):
        self.asked += zip(prompts, seeds)
        keys = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        found = [
            next(text for end, text in self.texts.items() if key.endswith(end)) for key in keys
        ]
        return [None if text is None else Written(text, 10, len(text)) for text in found]


def rows_of(script, prompts, rounds, first=0):
    return [
        row for _, batch in revised(script, prompts, PRINCIPLES, rounds, first) for (row,) in batch
    ]


def test_a_round_is_critique_and_revision_of_the_last_answer():
    script = Script({"Critique:": "it harms", "Revision:": "no harm", "?": "harm"})
    (row,) = rows_of(script, ["how?"], 1)
    name = row["rounds"][0]["principle"]
    first, second, third = (prompt for prompt, _ in script.asked)
    assert first == "how?"
    assert second == f"how? harm\n\nCritique request: criticise {name}\n\nCritique:"
    assert third == f"{second} it harms\n\nRevision request: revise {name}\n\nRevision:"
    assert row["answer"] == "harm" and row["revision"] == "no harm"
    assert row["tokens"] == {"read": 30, "written": 4 + 8 + 7}
    assert len({seed for _, seed in script.asked}) == 3


def test_messages_get_requests_as_turns_of_the_user():
    script = Script({"how?": "harm", "criticise x": "bad", "revise x": "good"})
    prompt = [{"role": "user", "content": "how?"}]
    ((_, ((row,),)),) = revised(script, [prompt], PRINCIPLES[:1], 1)
    assert [(x["role"], x["content"]) for x in script.asked[-1][0]] == [
        ("user", "how?"),
        ("assistant", "harm"),
        ("user", "criticise x"),
        ("assistant", "bad"),
        ("user", "revise x"),
    ]
    assert row["revision"] == "good"


def test_a_useless_revision_is_dropped_and_the_next_round_revises_the_answer_before():
    """The revision repeats the answer, whatever the round."""
    script = Script({"Critique:": "it harms", "Revision:": " Harm! ", "?": "harm"})
    (row,) = rows_of(script, ["how?"], 2)
    assert [x["dropped"] for x in row["rounds"]] == ["repeats the answer"] * 2
    assert row["revision"] is None and training_rows([row | {"prompt": "how?"}]) == ([], [])
    assert "how? harm\n\nCritique" in script.asked[3][0]
    script = Script({"Critique:": None, "?": "harm"})
    (row,) = rows_of(script, ["how?"], 1)
    assert row["rounds"][0]["dropped"] == "no text, or no room for it"
    script = Script({"?": None})
    assert rows_of(script, ["how?"], 1)[0]["answer"] is None


def test_principles_and_seeds_depend_on_the_row_and_round_alone():
    texts = {"Critique:": "c", "Revision:": "r", "?": "a"}
    prompts = [f"{i}?" for i in range(6)]
    whole, later = Script(texts), Script(texts)
    rows = rows_of(whole, prompts, 2)
    assert rows_of(later, prompts, 2, first=4) == rows[4:]
    assert dict(later.asked).items() <= dict(whole.asked).items()
    names = [x["principle"] for row in rows for x in row["rounds"]]
    assert names == [
        random.Random(f"3 {i} {n}").choice(PRINCIPLES).name for i in range(6) for n in range(2)
    ]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    "revision, fault",
    [
        ("I will not help.", None),
        (None, "no text"),
        (" ...", "no text"),
        ("Do IT, now", "repeats the answer"),
        ("How? Well", "echoes"),
        ("revise x: I will", "echoes"),
        ("However, no", None),
    ],
)
def test_faults_of_revisions(revision, fault):
    found = revision_fault(revision, "do it now!", ["how?", None, "revise x"])
    assert found is None if fault is None else fault in found


def test_training_rows_prefer_the_last_revision_to_the_first_answer():
    rows = [
        {"prompt": "p", "answer": "a", "revision": "r"},
        {"prompt": "p", "answer": None, "revision": None},
        {"prompt": "p", "answer": "a", "revision": "A."},  # back where it began
    ]
    assert training_rows(rows) == (
        [{"prompt": "p", "completion": " r"}],
        [{"prompt": "p", "chosen": " r", "rejected": " a"}],
    )


@pytest.mark.parametrize("prompt", ["p:\n", [{"role": "user", "content": "p"}]])
def test_only_a_prompt_of_text_without_a_space_at_its_end_needs_one(prompt):
    (row,), _ = training_rows([{"prompt": prompt, "answer": "a", "revision": "r"}])
    assert row["completion"] == "r"


def test_a_writer_samples_each_row_by_its_own_seed_and_leaves_out_what_does_not_fit():
    tokenizer = ByteTokenizer()
    model = tiny(vocab_size=259, max_positions=32, eos_ids=tokenizer.eos_ids)
    config = SamplingConfig(response_length=8, max_length=32)
    writer = Writer(model, tokenizer, tokenizer.eos_ids, config)
    one, none, two = writer(["ab", "x" * 24, "cd"], [1, 2, 3])
    assert none is None and one.read == two.read == 3 and 1 <= one.written <= 8
    assert writer(["cd"], [3]) == [two] and writer(["cd"], [4]) != [two]
    assert writer(["x" * 24], [1]) == [None]
    torch.manual_seed(9)
    assert writer(["ab"], [1]) == [one]


# ---- principles, and the data that ships


def test_the_constitution_and_prompts_that_ship_can_be_read():
    principles = read_principles(constitution.CONSTITUTION)
    assert "honesty over politeness" in {principle.name for principle in principles}
    for file, least in ((constitution.RED_TEAM, 24), (constitution.SAFE_PROMPTS, 16)):
        prompts = [row.prompt for row in read_prompt_rows(file)]
        assert len(set(prompts)) == len(prompts) >= least


def test_principles_are_texts_or_objects(tmp_path):
    lines = tmp_path / "p.txt"
    lines.write_text("Which is kind?\n\nWhich is true?\n")
    as_list = tmp_path / "p.json"
    as_list.write_text(json.dumps(["Which is kind?", "Which is true?"]))
    found = read_principles(lines)
    assert found == read_principles(as_list)
    assert [x.question for x in found] == ["Which is kind?", "Which is true?"]
    assert found[0].critique.endswith("principle: Which is kind?")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must hold a list of principles"),
        ('{"a": 1}', "must hold a list of principles"),
        ('["a", 3]', "principle 1 must be a text, or an object with the texts name, question"),
        ('[{"name": "x"}]', "principle 0 must be"),
        ("[", "p.json:1: not valid JSON"),
    ],
)
def test_bad_principles_are_named(text, message, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_principles(tmp_path / "p.json")
