"""Readers: nothing lost, nothing merged, nothing counted twice, and bad lines named."""

import gzip
import json
import random
import re

import pytest

from rlhf_core.data import (
    ByteTokenizer,
    DataError,
    Preference,
    Ranked,
    Ranking,
    encode_preference,
    read_candidates,
    read_comparisons,
    read_labelled,
    read_preferences,
    read_prompts,
    read_scored,
    read_texts,
)

GOOD = {
    read_texts: {"prompt": "p", "completion": "c"},
    read_preferences: {"prompt": "p", "chosen": "a", "rejected": "b"},
    read_comparisons: {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 0]},
    read_labelled: {"prompt": "p", "completion": "c", "label": True},
    read_prompts: {"prompt": "p", "other": 1},
    read_candidates: {"prompt": "p", "responses": ["a", {"text": "b", "model": "m"}]},
}


def write(path, *lines):
    """JSON of each object, bytes and strings as they are."""
    texts = [line if isinstance(line, (bytes, str)) else json.dumps(line) for line in lines]
    raw = [text.encode() if isinstance(text, str) else text for text in texts]
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(b"\n".join(raw) + b"\n")
    return path


BAD = [
    (read_texts, '{"prompt": "p", ', "not valid JSON"),
    (read_texts, "[1, 2]", r"expected a JSON object, got \[1, 2\]"),
    (read_texts, '"text"', "expected a JSON object"),
    (read_texts, {"prompt": "p"}, "field 'response' is missing; the line has 'prompt'"),
    (read_texts, {"completion": "c"}, "field 'prompt' is missing"),
    (
        read_texts, {"prompt": "p", "completion": True},
        "field 'completion' must be a string, got true",
    ),
    (read_texts, {"text": None}, "field 'prompt' is missing; the line has none"),
    (read_texts, {"question": "q", "answer": " \n"}, "field 'answer' is empty"),
    (read_texts, b'{"prompt": "\xff", "completion": "c"}', "not UTF-8"),
    (read_texts, r'{"prompt": "p", "completion": "\ud800"}', "field 'completion'.*surrogate"),
    (
        read_preferences, {"prompt": "p", "chosen": "a", "rejected": "a"},
        "'chosen' and 'rejected' are equal",
    ),
    (
        read_preferences, {"prompt": "p", "chosen": "a", "rejected": False},
        "field 'rejected' must be a string, got false",
    ),
    (read_preferences, {"prompt": "p", "chosen": "", "rejected": "b"}, "field 'chosen' is empty"),
    (
        read_preferences, {"prompt": 3, "chosen": "a", "rejected": "b"},
        "field 'prompt' must be a string, got 3",
    ),
    (
        read_preferences, {"chosen": "a", "rejected": "b"},
        "field 'prompt' is missing, and .* share no dialogue",
    ),
    (read_preferences, {"chosen": "\n\nAssistant: a", "rejected": "b"}, "share no dialogue"),
    (
        read_preferences, {"chosen": "\n\nAssistant:", "rejected": "\n\nAssistant: b"},
        "field 'chosen' is empty",
    ),
    (
        read_preferences, {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant:"},
        "field 'rejected' is empty",
    ),
    (
        read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1},
        "field 'margin' must be a number >= 0, got -1",
    ),
    (
        read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "margin": True},
        "'margin' must .* got true",
    ),
    (
        read_preferences, {"prompt": "p", "chosen": "a", "rejected": "b", "label_smoothing": 0.5},
        r"field 'label_smoothing' must be a number in \[0, 0.5\), got 0.5",
    ),
    (
        read_comparisons, {"prompt": "p", "chosen": "a", "rejected": "a"},
        "'chosen' and 'rejected' are equal",
    ),
    (read_comparisons, {"responses": ["a", "b"], "ranks": [0, 1]}, "field 'prompt' is missing"),
    (
        read_comparisons, {"prompt": "p", "responses": ["a"], "ranks": [0]},
        "'responses' must be a list of at least 2",
    ),
    (
        read_comparisons, {"prompt": "p", "responses": ["a", ""], "ranks": [0, 1]},
        "field 'responses.1' is empty",
    ),
    (
        read_comparisons, {"prompt": "p", "responses": ["a", "a"], "ranks": [0, 1]},
        "has the same response twice",
    ),
    (
        read_comparisons, {"prompt": "p", "responses": ["a", "b"], "ranks": [0]},
        r"'ranks' must be a list of 2 numbers, got \[0\]",
    ),
    (
        read_comparisons, {"prompt": "p", "responses": ["a", "b"], "ranks": [0, float("nan")]},
        "'ranks' must be a list of 2 numbers",
    ),
    (
        read_comparisons, {"prompt": "p", "responses": ["a", "b"]},
        "'ranks' must be a list of 2 numbers, got null",
    ),
    (
        read_comparisons, {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]},
        r"'ranks' has a tie.*\[1, 1\]",
    ),
    (
        read_labelled, {"prompt": "p", "completion": "c"},
        "field 'label' must be true or false, got null",
    ),
    (
        read_labelled, {"prompt": "p", "completion": "c", "label": "no"},
        "'label' must be true or false, got \"no\"",
    ),
    (
        read_labelled, {"prompt": "p", "completion": "", "label": False},
        "field 'completion' is empty",
    ),
    (read_prompts, {"other": "p"}, "field 'prompt' is missing; the line has 'other'"),
    (read_prompts, {}, "the line has none"),
]  # fmt: skip


@pytest.mark.parametrize("reader, line, message", BAD, ids=lambda x: getattr(x, "__name__", None))
def test_a_bad_line_is_named_or_dropped_and_counted(reader, line, message, tmp_path):
    """By its number in the file, plain or compressed. A blank line is a line, not a row."""
    for name in ("data.jsonl", "data.jsonl.gz"):
        path = write(tmp_path / name, GOOD[reader], "", line, GOOD[reader])
        with pytest.raises(DataError, match=rf"{re.escape(name)}:3: .*{message}"):
            reader(path)
        bad = []
        assert len(reader(path, bad.append)) == 2
        assert len(bad) == 1 and isinstance(bad[0], DataError)


@pytest.mark.parametrize("reader", GOOD)
def test_a_file_without_a_usable_line_is_refused(reader, tmp_path):
    for path in (write(tmp_path / "empty.jsonl", ""), write(tmp_path / "bad.jsonl", "{}")):
        with pytest.raises(DataError, match=": no usable line"):
            reader(path, lambda error: None)
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        reader(tmp_path / "absent.jsonl")


def test_lines_of_plain_text_keep_the_same_rules(tmp_path):
    with pytest.raises(DataError, match=r"empty\.txt: no usable line"):
        read_prompts(write(tmp_path / "empty.txt", "", " "))

    def encode(text):
        if text == "bad":
            raise ValueError("too bad")
        return text.upper()

    path, bad = write(tmp_path / "p.txt", "one", "bad"), []
    with pytest.raises(DataError, match=r"p\.txt:2: too bad"):
        read_prompts(path, encode=encode)
    assert read_prompts(path, bad.append, encode) == ["ONE"] and len(bad) == 1


ASKED, ANSWERED = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "reader, value", [(read_labelled, {"label": True}), (read_scored, {"reward": -0.5})]
)
def test_labels_and_rewards_belong_to_the_last_answer_of_a_conversation(reader, value, tmp_path):
    messages = [ASKED, ANSWERED, ASKED, ANSWERED]
    path = write(tmp_path / "data.jsonl", {"messages": messages, **value})
    assert reader(path) == [(messages[:3], messages[3:], *value.values())]
    for wrong, got in ((messages[:3], "user, assistant, user"), ([ANSWERED], "assistant")):
        path = write(tmp_path / "data.jsonl", {"messages": wrong, **value})
        with pytest.raises(DataError, match=f"must end with an answer of the assistant, got {got}"):
            reader(path)


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = write(tmp_path / "data.jsonl.gz", *[{"prompt": str(random.random())}] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"data\.jsonl\.gz:\d+: damaged gzip file"):
        read_prompts(path)
    path.write_bytes(b'{"prompt": "not compressed"}')
    with pytest.raises(DataError, match=r"data\.jsonl\.gz:1: damaged gzip file"):
        read_prompts(path)


def test_hh_rows_without_a_prompt_are_cut_at_the_last_turn(tmp_path):
    talk = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: how?\n\nAssistant:"
    path = write(tmp_path / "hh.jsonl", {"chosen": talk + " so", "rejected": talk + " no\n\nhow"})
    assert read_preferences(path) == [Preference(talk, " so", " no\n\nhow")]


def test_ranked_lists_come_best_first_and_pairs_keep_their_margin(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    path = write(
        tmp_path / "data.jsonl",
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, 0.5, 1]},
        {"messages": turns, "responses": ["a", "b"], "ranks": [0, 1]},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5, "label_smoothing": 0.1},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    )
    pairs = [Preference("p", "a", "b", 0.5, 0.1), Preference("p", "a", "b", None)]
    assert read_comparisons(path) == [
        Ranking("p", ["b", "c", "a"]),
        Ranking(turns, ["a", "b"]),
        *pairs,
    ]
    tokenizer = ByteTokenizer()
    first, _, pair, _ = read_comparisons(
        path, encode=lambda row: encode_preference(row, tokenizer, 50)
    )
    assert isinstance(first, Ranked) and (pair.margin, pair.label_smoothing) == (0.5, 0.1)
    assert [tokenizer.decode(ids) for ids in first.completions_ids] == ["b", "c", "a"]
    assert all(ids[-1] == tokenizer.eos_ids[0] for ids in first.completions_ids)


def test_every_shape_of_text_and_prompt_is_read(tmp_path):
    rows = [
        {"prompt": "p", "response": "r"},
        {"question": "q", "answer": "a"},
        {"text": "t"},
        GOOD[read_texts],
    ]
    texts = [("p", "r"), ("q", "a"), ("", "t"), ("p", "c")]
    assert read_texts(write(tmp_path / "t.jsonl", *rows)) == texts
    assert read_prompts(write(tmp_path / "p.jsonl", *rows)) == ["p", "q", "t", "p"]
    for name in ("p.txt", "p.txt.gz"):
        assert read_prompts(write(tmp_path / name, "one", "", "two \r")) == ["one", "two "]


REAL = {
    "preferences/hh_helpful": (read_preferences, 1735),
    "preferences/hh_harmless": (read_preferences, 1717),
    "preferences/rasbt_pref": (read_preferences, 891),
    "preferences/oasst_ranked_lists": (read_comparisons, 164),
    "sft/self_instruct_seed": (read_texts, 175),
    "sft/gsm8k_test": (read_texts, 1319),
    "text/tinystories": (read_texts, 2107),
    "labels/sentence_polarity": (read_texts, 10662),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(data_dir, name):
    """Every line is a row or is named. A few pairs, in rasbt_pref and others, have equal sides."""
    reader, count = REAL[name]
    bad = []
    rows = reader(data_dir / f"{name}.jsonl.gz", bad.append)
    assert len(rows) + len(bad) == count and len(bad) <= count // 50, bad[:1]
    assert all(all(row[:2]) or row[0] == "" for row in rows)


# ---- candidates


def test_candidates_come_from_responses_from_pairs_and_from_prompts_alone(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    sampled = {"text": "yes", "model": "m", "temperature": 0.7, "seed": 3, "logprob": -1.5}
    rows = read_candidates(
        write(
            tmp_path / "c.jsonl",
            {"id": "p0", "prompt": turns, "responses": [sampled, "no"], "content_warning": True},
            {"id": 7, "prompt": "q", "chosen": "a", "rejected": "b", "content_warning": "blood"},
            {"prompt": "q", "response_a": "a", "response_b": ""},
            {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]},
            {"messages": turns},
        )
    )
    assert rows == [
        ("p0", turns, [sampled, {"text": "no"}], None, "This item may be upsetting."),
        (7, "q", [{"text": "a"}, {"text": "b"}], [1, 2], "blood"),
        (None, "q", [{"text": "a"}, {"text": ""}], None, None),
        (None, "q", [{"text": "a"}, {"text": "b"}, {"text": "c"}], [2, 1, 2], None),
        (None, turns, [], None, None),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": 1.5}, "field 'id' must be text or a whole number, got 1.5"),
        ({"id": True}, "field 'id' must be text or a whole number, got true"),
        ({"id": " "}, "field 'id' is empty"),
        ({"responses": "a"}, "field 'responses' must be a list, got \"a\""),
        ({"responses": [{}]}, "field 'responses[0].text' is missing; the line has none"),
        ({"responses": ["a", 1]}, "field 'responses[1].text' must be a string, got 1"),
        ({"ranks": [1]}, "field 'ranks' must be a list of 2 numbers, got [1]"),
        ({"content_warning": 1}, "field 'content_warning' must be true, false or text, got 1"),
    ],
)
def test_a_bad_candidate_names_its_line_and_field(tmp_path, change, message):
    row = GOOD[read_candidates]
    with pytest.raises(DataError) as error:
        read_candidates(write(tmp_path / "c.jsonl", row, row | change))
    assert str(error.value) == f"{tmp_path / 'c.jsonl'}:2: {message}"
