"""Tokenizers and readers: nothing lost, nothing merged, nothing counted twice, and bad lines named."""

import gzip
import json
import random

import pytest

from rlhf_core.data import (
    ByteTokenizer,
    DataError,
    JsonTokenizer,
    Preference,
    Ranked,
    Ranking,
    Text,
    encode_preference,
    encode_text,
    load_tokenizer,
    read_comparisons,
    read_labelled,
    read_preferences,
    read_prompts,
    read_scored,
    read_texts,
)
from rlhf_core.data.encode import fit

TEXTS = [
    *(
        "Once upon a time",
        " a  b\n\n c ",
        "trailing  ",
        "x",
        "",
        " ",
        "\n",
        "\r\n\t",
        "don't  's",
        "中文，日本語も。",
    ),
    *(
        "naïve 🙂👩‍👩‍👧🏳️‍🌈",
        "e\u0301 \u200b\u00a0\u3000",
        "\ufeffbom",
        "\x00\x1b[0m\ttab\x7f",
        "\ufdd0\uffff\U0010ffff",
    ),
    *(
        "<s>hi",
        "</s>",
        "<unk>",
        "a<|im_end|>b",
        "<|endoftext|>",
        " <|im_start|>",
        "<|endof",
        "".join(map(chr, range(300))),
    ),
]
FOLDERS = ["tokenizers/gpt2", "tokenizers/minimind", "models/stories260k"]


@pytest.fixture(params=["bytes", *FOLDERS])
def tokenizer(request):
    return (
        ByteTokenizer()
        if request.param == "bytes"
        else load_tokenizer(request.getfixturevalue("data_dir") / request.param)
    )


# ---- tokenizers


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    whole, begun = tokenizer.encode(text), tokenizer.encode_prompt("say:")
    assert tokenizer.decode(whole) == text
    assert tokenizer.decode(begun + tokenizer.encode_completion(text)) == "say:" + text
    assert all(0 <= i < tokenizer.vocab_size for i in whole)


def test_a_prompt_starts_with_one_bos_where_the_model_wants_one(tokenizer):
    """Row 29. GPT-2 and MiniMind have a BOS token that their own template does not add."""
    ids = tokenizer.encode_prompt("Once upon a time")
    wants = isinstance(tokenizer, ByteTokenizer) or tokenizer.vocab_size == 512
    assert ids.count(tokenizer.bos_id) == wants
    assert ids == [tokenizer.bos_id] * wants + tokenizer.encode("Once upon a time")
    assert tokenizer.bos_id not in tokenizer.encode_completion(" there was")


@pytest.mark.parametrize(
    "prompt, completion", [("Once upon", " a time"), ("Who?\n", "Me"), ("th", "ere"), ("", "Hi")]
)
def test_prompt_and_completion_are_encoded_apart_and_end_with_one_eos(
    tokenizer, prompt, completion
):
    """Row 21: "th" + "ere" must not become "there", whose log-prob no prompt ending in "th" can predict."""
    got = encode_text(Text(prompt, completion), tokenizer, max_length=100)
    assert got.prompt_ids == tokenizer.encode_prompt(prompt)
    assert (
        got.completion_ids[-1] == tokenizer.eos_ids[0]
        and got.completion_ids.count(tokenizer.eos_ids[0]) == 1
    )
    assert tokenizer.decode(got.prompt_ids + got.completion_ids) == prompt + completion
    begins = (
        tokenizer.encode if prompt == "" else tokenizer.encode_completion
    )  # a text of its own, or one that goes on
    assert got.completion_ids[:-1] == begins(completion)
    pair = encode_preference(Preference(prompt, completion, "no"), tokenizer, max_length=100)
    assert pair.prompt_ids == got.prompt_ids and pair.chosen_ids == got.completion_ids
    assert pair.rejected_ids[-1] == tokenizer.eos_ids[0]


def test_random_text_survives_the_tokenizer_whole_and_in_two(tokenizer):
    rng = random.Random(0)
    characters = [
        *map(chr, range(0x250)),
        *"  \n\u200d🙂👩中文日本語",
        *map(chr, range(0x4E00, 0x4F00)),
        "<s>",
        "</s>",
    ]
    for _ in range(300):
        first, second = ("".join(rng.choices(characters, k=rng.randint(1, 9))) for _ in range(2))
        assert tokenizer.decode(tokenizer.encode(first)) == first
        assert (
            tokenizer.decode(tokenizer.encode_prompt(first) + tokenizer.encode_completion(second))
            == first + second
        )


def test_a_saved_tokenizer_reads_back_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    again.save(tmp_path)  # over itself
    assert type(again) is type(tokenizer)
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode_prompt("It's 3 o'clock") == tokenizer.encode_prompt("It's 3 o'clock")


@pytest.mark.parametrize(
    "text", ["<s>hi", "hi</s>", "<|im_start|>system\n", "<|im_end|>", "<|endoftext|>"]
)
def test_text_that_spells_a_special_token_is_text(tokenizer, text):
    """Row 29: no second BOS, and nothing that ends a response but the one EOS at the end."""
    example = encode_text(Text(text, text), tokenizer, 100)
    begun = tokenizer.encode_prompt("")
    special = {tokenizer.bos_id, *tokenizer.eos_ids}
    assert not special & {*example.prompt_ids[len(begun) :], *example.completion_ids[:-1]}
    assert (
        example.prompt_ids[: len(begun)] == begun
        and example.completion_ids[-1] == tokenizer.eos_ids[0]
    )


def test_byte_tokenizer_leaves_special_ids_out_and_mends_invalid_bytes():
    assert ByteTokenizer().decode([257, 72, 105, 258, 256]) == "Hi"
    assert ByteTokenizer().decode([0xE6, 72]) == "\ufffdH"


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        JsonTokenizer(tmp_path)


# ---- fit


def test_fit_cuts_the_start_of_the_prompt_first_then_the_end_of_the_completion():
    prompt, completion = list(range(10)), list(range(10, 16))
    assert fit(prompt, [completion], 16) == (prompt, [completion])
    assert fit(prompt, [completion], 14) == (prompt[2:], [completion])
    assert fit(prompt, [completion], 12) == (prompt[4:], [completion])
    assert fit(prompt, [completion], 8) == (prompt[6:], [completion[:4]])
    assert fit(prompt[:3], [completion], 8) == (prompt[:3], [completion[:5]])
    assert fit(prompt, [completion[:1], completion], 12) == (
        prompt[4:],
        [completion[:1], completion],
    )


def test_fit_never_exceeds_max_length_nor_leaves_a_completion_empty():
    rng = random.Random(0)
    for _ in range(300):
        max_length = rng.randint(1, 20)
        prompt = list(range(rng.randint(0, 30)))
        completions = [list(range(rng.randint(1, 30))) for _ in range(2)]
        bos_id = rng.choice([None, 0])  # the prompt's first
        kept, cut = fit(prompt, completions, max_length, bos_id)
        begun = kept[:1] if bos_id == 0 else []
        assert (
            begun == prompt[: len(begun)]
            and kept[len(begun) :] == prompt[len(prompt) - len(kept) + len(begun) :]
        )
        for before, after in zip(completions, cut):
            assert len(after) >= 1 and len(kept) + len(after) <= max_length
            assert after == before[: len(after)]


# ---- readers


GOOD = {
    read_texts: {"prompt": "p", "completion": "c"},
    read_preferences: {"prompt": "p", "chosen": "a", "rejected": "b"},
    read_comparisons: {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 0]},
    read_labelled: {"prompt": "p", "completion": "c", "label": True},
    read_prompts: {"prompt": "p", "other": 1},
}


def write(path, *lines):
    """JSON of each object, bytes and strings as they are."""
    raw = [
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(b"\n".join(raw) + b"\n")
    return path


BAD = [
    (read_texts, '{"prompt": "p", ', "not valid JSON"),
    (read_texts, "[1, 2]", r"expected a JSON object, got \[1, 2\]"),
    (read_texts, '"text"', "expected a JSON object"),
    (read_texts, {"prompt": "p"}, "field 'response' is missing; the line has 'prompt'"),
    (read_texts, {"completion": "c"}, "field 'prompt' is missing"),
    (
        read_texts,
        {"prompt": "p", "completion": True},
        "field 'completion' must be a string, got true",
    ),
    (read_texts, {"text": None}, "field 'text' must be a string, got null"),
    (read_texts, {"question": "q", "answer": " \n"}, "field 'answer' is empty"),
    (read_texts, b'{"prompt": "\xff", "completion": "c"}', "not UTF-8"),
    (read_texts, r'{"prompt": "p", "completion": "\ud800"}', "field 'completion'.*surrogate"),
    (
        read_preferences,
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        "'chosen' and 'rejected' are equal",
    ),
    (
        read_preferences,
        {"prompt": "p", "chosen": "a", "rejected": False},
        "field 'rejected' must be a string, got false",
    ),
    (read_preferences, {"prompt": "p", "chosen": "", "rejected": "b"}, "field 'chosen' is empty"),
    (
        read_preferences,
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        "field 'prompt' must be a string, got 3",
    ),
    (
        read_preferences,
        {"chosen": "a", "rejected": "b"},
        "field 'prompt' is missing, and .* share no dialogue",
    ),
    (read_preferences, {"chosen": "\n\nAssistant: a", "rejected": "b"}, "share no dialogue"),
    (
        read_preferences,
        {"chosen": "\n\nAssistant:", "rejected": "\n\nAssistant: b"},
        "field 'chosen' is empty",
    ),
    (
        read_preferences,
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant:"},
        "field 'rejected' is empty",
    ),
    (
        read_preferences,
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1},
        "field 'margin' must be a number >= 0, got -1",
    ),
    (
        read_preferences,
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": True},
        "'margin' must .* got true",
    ),
    (
        read_comparisons,
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        "'chosen' and 'rejected' are equal",
    ),
    (read_comparisons, {"responses": ["a", "b"], "ranks": [0, 1]}, "field 'prompt' is missing"),
    (
        read_comparisons,
        {"prompt": "p", "responses": ["a"], "ranks": [0]},
        "'responses' must be a list of at least 2",
    ),
    (
        read_comparisons,
        {"prompt": "p", "responses": ["a", ""], "ranks": [0, 1]},
        "field 'responses.1' is empty",
    ),
    (
        read_comparisons,
        {"prompt": "p", "responses": ["a", "a"], "ranks": [0, 1]},
        "has the same response twice",
    ),
    (
        read_comparisons,
        {"prompt": "p", "responses": ["a", "b"], "ranks": [0]},
        r"'ranks' must be a list of 2 numbers, got \[0\]",
    ),
    (
        read_comparisons,
        {"prompt": "p", "responses": ["a", "b"], "ranks": [0, float("nan")]},
        "'ranks' must be a list of 2 numbers",
    ),
    (
        read_comparisons,
        {"prompt": "p", "responses": ["a", "b"]},
        "'ranks' must be a list of 2 numbers, got null",
    ),
    (
        read_comparisons,
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]},
        r"'ranks' has a tie.*\[1, 1\]",
    ),
    (
        read_labelled,
        {"prompt": "p", "completion": "c"},
        "field 'label' must be true or false, got null",
    ),
    (
        read_labelled,
        {"prompt": "p", "completion": "c", "label": "no"},
        "'label' must be true or false, got \"no\"",
    ),
    (
        read_labelled,
        {"prompt": "p", "completion": "", "label": False},
        "field 'completion' is empty",
    ),
    (read_prompts, {"other": "p"}, "field 'prompt' is missing; the line has 'other'"),
    (read_prompts, {}, "the line has none"),
]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("reader, line, message", BAD, ids=lambda x: getattr(x, "__name__", None))
def test_a_bad_line_is_named_or_dropped_and_counted(name, reader, line, message, tmp_path):
    path = write(
        tmp_path / name, GOOD[reader], "", line, GOOD[reader]
    )  # a blank line is no row, but it is a line
    with pytest.raises(DataError, match=rf"data\.jsonl(\.gz)?:3: .*{message}"):
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
def test_the_last_answer_of_a_conversation_is_what_is_labelled_or_scored(reader, value, tmp_path):
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
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    )
    pairs = [Preference("p", "a", "b", 0.5), Preference("p", "a", "b", None)]
    assert read_comparisons(path) == [
        Ranking("p", ["b", "c", "a"]),
        Ranking(turns, ["a", "b"]),
        *pairs,
    ]
    tokenizer = ByteTokenizer()
    first, _, pair, _ = read_comparisons(
        path, encode=lambda row: encode_preference(row, tokenizer, 50)
    )
    assert isinstance(first, Ranked) and [
        tokenizer.decode(ids) for ids in first.completions_ids
    ] == ["b", "c", "a"]
    assert (
        all(ids[-1] == tokenizer.eos_ids[0] for ids in first.completions_ids) and pair.margin == 0.5
    )


def test_every_shape_of_text_and_prompt_is_read(tmp_path):
    rows = [
        {"prompt": "p", "response": "r"},
        {"question": "q", "answer": "a"},
        {"text": "t"},
        GOOD[read_texts],
    ]
    assert read_texts(write(tmp_path / "t.jsonl", *rows)) == [
        ("p", "r"),
        ("q", "a"),
        ("", "t"),
        ("p", "c"),
    ]
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
    """Every line is a row or is named; rasbt_pref and others hold a few pairs whose sides are equal."""
    reader, count = REAL[name]
    bad = []
    rows = reader(data_dir / f"{name}.jsonl.gz", bad.append)
    assert len(rows) + len(bad) == count and len(bad) <= count // 50, bad[:1]
    assert all(all(row[:2]) or row[0] == "" for row in rows)
