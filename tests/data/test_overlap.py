"""Near duplicates and leaks: against sets in Python, and against datasketch on real data."""

import gzip
import itertools
import json
import random

import numpy as np
import pytest

from rlhf_core.data.overlap import (
    Leaks,
    count_words,
    near_duplicates,
    ngrams,
    normalized,
    words,
)


def words_of(texts):
    return [words(normalized(text)) for text in texts]


def near(texts, **options):
    return near_duplicates(*ngrams(words_of(texts), 5, short=True), **options)


def shingles(text):
    return {tuple(text[i : i + 5]) for i in range(max(len(text) - 4, 1))} if text else set()


def column(data_dir, file, *fields):
    with gzip.open(data_dir / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return ["\n".join(json.loads(line)[field] for field in fields) for line in lines]


# ---- words


def test_words_are_unicode_words_and_characters_of_scripts_without_blanks():
    text = "Ｎａïve  Straße, 東京へ!\tวันนี้ don't"
    assert words(normalized(text)) == [
        *("naïve", "strasse", "東", "京", "へ", "ว", "ั", "น", "น", "ี", "้", "don", "t")
    ]


def test_a_length_in_words_counts_characters_only_of_texts_in_scripts_without_blanks():
    assert count_words("one, two  three!") == 3
    assert count_words("東京へ行く。") == 5
    assert count_words("'hello' is 'こんにちは' (Konnichiwa)") == 4


# ---- near duplicates


def test_near_duplicates_are_those_of_all_pairs_of_sets():
    """Texts of a small vocabulary, many of them with one or two words changed."""
    rng, texts = random.Random(0), []
    for _ in range(60):
        text = [rng.choice("abcdefgh") for _ in range(rng.randrange(0, 60))]
        for _ in range(4):
            texts.append(" ".join(text))
            text = list(text)
            for _ in range(rng.randrange(1, 3)):
                if text:
                    text[rng.randrange(len(text))] = rng.choice("abcdefghij")
    sets = [shingles(text) for text in words_of(texts)]
    expected = [
        [i, j]
        for i, j in itertools.combinations(range(len(texts)), 2)
        if sets[i] and 5 * len(sets[i] & sets[j]) >= 4 * len(sets[i] | sets[j])
    ]
    found = near(texts)
    assert found.pairs.tolist() == expected and found.complete
    assert len(expected) > 25


def test_a_short_text_is_one_shingle_and_a_text_without_words_is_like_none():
    texts = ["Hello there!", "hello, THERE", "hello there you", "?!", "...", ""]
    assert near(texts).pairs.tolist() == [[0, 1]]
    assert near([]).pairs.shape == (0, 2) and near(["", "a"]).complete


def test_a_template_stops_at_the_limit_and_says_so():
    texts = [f"{'write a story about the life of a famous ' * 3}{i}" for i in range(100)]
    assert len(near(texts).pairs) == 4950
    found = near(texts, max_candidates=1000)
    assert not found.complete and 0 < len(found.pairs) < 4950


@pytest.mark.parametrize(
    "group, file, fields",
    [
        ("sentence_polarity.text", "labels/sentence_polarity", ["text"]),
        ("hh_helpful.prompt", "preferences/hh_helpful", ["prompt"]),
        ("rasbt_pref.prompt", "preferences/rasbt_pref", ["prompt"]),
        ("pandalm.instruction+input", "labels/pandalm_3annotators", ["instruction", "input"]),
        ("tinystories.text", "text/tinystories", ["text"]),
    ],
)
def test_duplicates_of_real_texts(data_dir, expected, group, file, fields):
    texts, values = column(data_dir, file, *fields), expected["duplicates"][group]
    assert len(texts) == values["n"]
    extra = len(texts) - len({normalized(text) for text in texts})
    assert extra == values["exact_duplicates_after_normalising(extra rows)"]
    pairs = near(texts).pairs
    assert len(pairs) == values["pairs_jaccard_0.8_of_5_word_shingles"]
    assert len(np.unique(pairs)) == values["rows_in_such_pairs"]


# ---- leaks


def test_a_leak_is_a_shared_run_whose_words_are_covered():
    test = [[f"w{i}" for i in range(20)], [f"v{i}" for i in range(10)], ["a", "b"]]
    leaks = Leaks(test)
    train = [["x", *test[0][:13]], test[0][:12], ["x", *test[1][2:]], ["a", "b"], ["a", "b", "c"]]
    assert leaks.add(train).tolist() == [True, False, True, True, False]
    assert leaks.coverage().tolist() == pytest.approx([13 / 20, 8 / 10, 1])


def test_leaks_add_up_over_batches_and_need_the_given_length():
    test = [[f"w{i}" for i in range(9)], ["short"]]
    leaks = Leaks(test, n=3)
    assert leaks.coverage().tolist() == [0, 0]
    assert leaks.add([test[0][:3]]).all() and leaks.add([test[0][2:6], ["short"]]).tolist() == [
        1,
        0,
    ]
    assert leaks.coverage().tolist() == pytest.approx([6 / 9, 0])
    assert Leaks([]).add([["a"]]).tolist() == [False] and not len(Leaks([]).coverage())


@pytest.mark.parametrize(
    "group, tests, training",
    [
        (
            "pandalm prompts in self_instruct_seed",
            ("labels/pandalm_3annotators", "instruction", "input"),
            ("sft/self_instruct_seed", "prompt"),
        ),
        (
            "hh_harmless prompts in hh_helpful prompts",
            ("preferences/hh_harmless", "prompt"),
            ("preferences/hh_helpful", "prompt"),
        ),
        (
            "hh_helpful with itself",
            ("preferences/hh_helpful", "prompt"),
            ("preferences/hh_helpful", "prompt"),
        ),
    ],
)
def test_leaks_between_real_files(data_dir, expected, group, tests, training):
    values = expected["contamination"][group]
    leaks = Leaks(words_of(column(data_dir, *tests)), values["n_gram"])
    leaks.add(words_of(column(data_dir, *training)))
    coverage = leaks.coverage()
    assert len(coverage) == values["test_rows"]
    counts = [(coverage > 0).sum(), (coverage >= 0.5).sum(), (coverage >= 1).sum()]
    names = ("rows_with_a_shared_ngram", "rows_half_covered", "rows_fully_covered")
    assert counts == [values[name] for name in names]
