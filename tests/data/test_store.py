"""Stores of examples: equal to lists of them, in a few bytes a token."""

import json
import pickle

import numpy as np
import pytest
import torch

from rlhf_core.data import (
    ByteTokenizer,
    Example,
    Pair,
    Prompt,
    Ranked,
    Steps,
    encode_labelled,
    encode_preference,
    encode_prompt,
    encode_prompt_row,
    encode_scored,
    encode_text,
    mix,
    read_comparisons,
    read_labelled,
    read_preferences,
    read_prompt_rows,
    read_prompts,
    read_scored,
    read_texts,
)
from rlhf_core.data.collate import length, misfit, unknown_id
from rlhf_core.data.quality import differing
from rlhf_core.data.store import (
    Block,
    ExampleStore,
    column_names,
    digest,
    has,
    join,
    kinds_of,
    longer,
    store,
)

TOKENIZER = ByteTokenizer()
IDS = [1, 2, 300, 65535]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# Rows of each kind, with what is rare: empty parts, masks, numbers of each type, wide ids.
KINDS = {
    "examples": [
        Example([1], [2, 3]),
        Example([], []),
        Example([], [5], [True]),
        Example([7] * 9, [8] * 11, [True, False] * 5 + [True], True, -0.5),
        Example([1], [70000, -3], None, False, float("inf")),
        Example([1], [], []),
    ],
    "pairs": [
        Pair([1], [2], [3]),
        Pair([], [2], [3, 4], 1, None, 0.25),
        Pair([1], [2], [3], None, [[True], None]),
        Pair([1], [2, 2], [], 2),
        Pair([1], [2], [3], criteria={"helpful": True, "harmless": False}),
        Pair([1], [2], [3], criteria={}),
    ],
    "lists": [Ranked([1], [[2], [3], [4, 5]]), Ranked([], [[1], [2]]), Ranked([9], [])],
    "solutions": [
        Steps([1], [2, 3, 4], [False, True, True], [1.0, 0.5]),
        Steps([1], [2], [True], [0.0]),
    ],
    "prompts": [Prompt([1, 2]), Prompt([], answer="42"), Prompt(IDS, rows=[{"a": None}], n=1.5)],
    "ids": [[1, 2], [], IDS],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_gives_back_what_it_was_given(kind):
    rows = KINDS[kind] * 300
    found = store(iter(rows))
    assert isinstance(found, ExampleStore)
    assert all(isinstance(block, Block) for block in found.blocks)
    places, pickled = range(len(rows)), pickle.dumps(found)
    for got in (list(found), [found[i] for i in places], pickle.loads(pickled)):
        assert list(map(repr, got)) == list(map(repr, rows))
        assert [type(row) for row in got] == [type(row) for row in rows]
    assert found == rows and rows == found and repr(found) == repr(rows)


def test_a_digest_depends_on_the_examples_and_their_order_and_not_on_their_container():
    rows = [row for kind in KINDS.values() for row in kind]
    rows += [Example((1,), [2]), Example([1], [2], teacher_prompt_ids=[3])]  # in no array
    rows = [row for row in rows if row is not KINDS["prompts"][0]]  # equal to KINDS["ids"][0]
    assert len({digest([[row]]) for row in rows}) == len(rows)
    some = [row for row in rows for _ in range(40)]
    mixed, order = store(some), np.random.default_rng(0).permutation(len(some))
    shuffled = [some[i] for i in order]
    for kind in KINDS.values():  # blocks of one kind, with neighbours that have other fields
        assert digest([kind * 300]) == digest([store(kind * 300)])
    assert digest([some]) == digest([mixed]) == digest([join([mixed[:7], mixed[7:]])])
    assert digest([shuffled]) == digest([mixed.select(order)]) != digest([some])
    assert digest([some]) != digest([some[:3], some[3:]]) != digest([some[:4], some[4:]])
    assert digest([]) != digest([[]]) and digest([Prompt([1, 2])]) == digest([[1, 2]])


def test_slices_sums_and_indices_are_those_of_a_list():
    rows = [Example([i], [i + 1]) for i in range(1000)]
    found = store(rows)
    for part in (
        slice(3, 9),
        slice(None, None, -7),
        slice(990, 2000),
        slice(5, 5),
        slice(-3, None),
    ):
        assert found[part] == rows[part] and found[part][1:] == rows[part][1:]
    assert found[-1] == rows[-1] and found[torch.tensor(4)] == rows[4]
    assert found + rows[:2] == rows + rows[:2] and rows[:2] + found == rows[:2] + rows
    assert found[::2] + found[1::2] == rows[::2] + rows[1::2]
    assert found != rows[:-1] and found != [*rows[:-1], rows[0]]
    assert rows[5] in found and found.index(rows[5]) == 5
    for i in (1000, -1001):
        with pytest.raises(IndexError, match=f"there are 1000 examples, and none at {i}"):
            found[i]


def test_nothing_else_becomes_a_store():
    for rows in ([], ["text"], [("a", [1])], [[1.5]], [[True]], [Example((1,), [2])]):
        found = store(iter(rows))
        assert type(found) is list and found == rows


def test_what_arrays_cannot_hold_stays_an_object_in_its_place():
    odd = [
        Example([1], [2], [1]),  # a mask of numbers
        Example([1], [2], [True, False]),
        Pair([1], [2], [3], None, [None, None]),
        Pair([1], [2], [3], "0"),
        Prompt([1], function=print, other=lambda: 0),
        Example([2**70], [1]),
        Example([1], [2], teacher_prompt_ids=[3, 1]),
        Steps([1], [2], [True], [1]),
    ]
    rows = []
    for row in odd:
        rows += [Example([1], [2])] * 256 + [row] + [Pair([1], [2], [3])] * 300
    found = store(rows)
    assert isinstance(found, ExampleStore)
    assert list(map(repr, found)) == list(map(repr, rows))
    assert [found[i] is rows[i] for i in range(256, len(rows), 557)] == [True] * len(odd)
    assert found.kinds() == {Example, Pair, Prompt, Steps} == kinds_of(rows)
    assert found[300:302].kinds() == {Pair} == kinds_of(rows[300:302])


@pytest.mark.parametrize("high", [258, 65535, 65536, 2**31])
def test_bytes_of_a_token(high):
    size = 2 if high < 65536 else 4 if high < 2**31 else 8
    rows = [Example([high] * 50, [0] * 50) for _ in range(1000)]
    found = store(rows)
    assert size * 100_000 <= found.nbytes <= size * 100_000 + 12 * 1000 + 4 * len(found.blocks)
    masked = store([row._replace(completion_mask=[True, False] * 25) for row in rows])
    assert masked.nbytes - found.nbytes <= 100_000 / 8 + 2 * 1000 + len(found.blocks)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


READERS = {
    read_texts: (encode_text, [{"prompt": "a", "completion": "bé"}, {"messages": CHAT}]),
    read_labelled: (encode_labelled, [{"prompt": "a", "completion": "b", "label": True}]),
    read_scored: (encode_scored, [{"prompt": "a", "completion": "b", "reward": 1}]),
    read_preferences: (
        encode_preference,
        [
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "label_smoothing": 0.1},
            {"prompt": CHAT[:1], "chosen": "b", "rejected": "c"},
        ],
    ),
    read_comparisons: (
        encode_preference,
        [
            {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1, 3]},
            {"prompt": "a", "steps": ["b", "c"], "labels": [1, 0.5]},
        ],
    ),
}


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_readers_return_what_encode_does_row_by_row(tmp_path, reader):
    encode, rows = READERS[reader]
    rows = [row for row in rows for _ in range(300)]
    path = write(tmp_path / "rows.jsonl", rows)
    texts = reader(path)
    assert type(texts) is list
    found = reader(path, encode=lambda row: encode(row, TOKENIZER, 64))
    assert isinstance(found, ExampleStore)
    assert repr(found) == repr([encode(text, TOKENIZER, 64) for text in texts])


def test_readers_of_prompts_keep_their_columns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "n": i} for i in range(600)])
    found = read_prompt_rows(path, encode=lambda row: encode_prompt_row(row, TOKENIZER))
    assert isinstance(found, ExampleStore) and found[77].columns == {"n": 77}
    ids = read_prompts(path, encode=lambda prompt: encode_prompt(prompt, TOKENIZER))
    assert ids == [[257, 97]] * 600 and type(ids[0]) is list


FAULTY = {
    "id": (Example([1], [12]), "has token id 12"),
    "negative id": (Example([1, -1], [2]), "has token id -1"),
    "long": (Example([1] * 20, [2] * 20), "has 40 tokens"),
    "smoothing": (Pair([1], [2], [3], None, None, 0.5), "has label_smoothing 0.5"),
    "long rejected": (Pair([1] * 20, [2], [3] * 20), "has 40 tokens"),
    "no completion": (Ranked([1], []), "has no completion"),
    "long last": (Ranked([1] * 20, [[2], [3] * 20]), "has 40 tokens"),
    "labels": (Steps([1], [2, 3], [True, True], [1.0]), "has 1 labels for 2 steps"),
    "first step": (Steps([], [2, 3], [True, True], [1.0, 1.0]), "has 2 labels for 1 steps"),
    "label": (Steps([1], [2], [True], [1.5]), "has label 1.5"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_arrays_clear_good_rows_and_never_a_bad_one(name):
    bad, message = FAULTY[name]
    good = {
        Example: Example([1, 2], [3], [True]),
        Pair: Pair([1], [2], [3, 4], 1.0, None, 0.25),
        Ranked: Ranked([1], [[2], [3]]),
        Steps: Steps([1], [2, 3], [False, True], [0.5]),
    }[type(bad)]
    rows = [good] * 700
    rows[500] = bad
    found = store(rows)

    def unclear(block):
        return block.has_id_outside(12) | block.may_misfit() | (block.lengths() > 32)

    assert all(isinstance(block, Block) for block in found.blocks)
    assert found.where(unclear) == [500]
    assert found[::-1].where(unclear) == [199] and found[:500].where(unclear) == []
    faults = misfit(bad), unknown_id(bad, 12), f"has {length(bad) if bad[1] else 0} tokens"
    assert any(fault and message in fault for fault in faults)
    for block in found.blocks:
        assert block.lengths().tolist() == [length(row) if row[1] else 1 for row in block]


def test_numbers_that_are_missing_or_not_finite_are_found():
    rows = [Example([1], [2], None, i % 2 == 0, i / 2) for i in range(400)]
    rows[7], rows[300] = rows[7]._replace(reward=None), rows[300]._replace(reward=float("nan"))
    rows[8] = rows[8]._replace(label=None)
    found = store(rows)
    assert found.where(lambda block: block.lacks("reward")) == [7, 300]
    assert found.where(lambda block: block.lacks("label")) == [8]
    pairs = [Pair([1], [2], [3])] * 400
    one = [*pairs[:-1], Pair([1], [2], [3], None, None, 0.0)]
    assert not has(pairs, "label_smoothing") and not has(store(pairs), "label_smoothing")
    assert has(one, "label_smoothing") and has(store(one), "label_smoothing")
    assert not has(store(one)[:-1], "label_smoothing")


def test_pairs_that_are_alike_go_also_from_a_store():
    rows = [Pair([1], [2, i], [2, 3]) for i in range(300)]
    rows += [Pair([1], [2], [2, 3])] * 300
    with pytest.warns(UserWarning, match="dropped 1 of 600 pairs"):
        found = differing(store(rows), "pairs")
    assert isinstance(found, ExampleStore) and found == rows[:3] + rows[4:]
    with pytest.raises(ValueError, match="identical in all 300 lists"):
        differing(store([Ranked([1], [[2], [2]])] * 300), "lists")
    assert differing(found, "pairs") is found


def test_mixtures_and_sums_of_stores_are_those_of_lists():
    sources = [[Example([i], [k]) for i in range(n)] for k, n in ((1, 700), (2, 300))]
    stores = [store(source) for source in sources]
    mixed = mix(stores, [1, 3], seed=5)
    assert isinstance(mixed, ExampleStore) and mixed == mix(sources, [1, 3], seed=5)
    for parts in ([stores[0], sources[1]], [stores[0][::3], stores[1]], [[], stores[1], []]):
        both = join(parts)
        assert isinstance(both, ExampleStore) and both == [row for part in parts for row in part]
    assert join([[1], [2]]) == [1, 2] and join([]) == []


def test_a_store_shares_its_arrays_with_its_parts():
    found = store([Example([1] * 100, [2] * 100)] * 1000)
    part = found[::2]
    assert all(a is b for a, b in zip(part.blocks, found.blocks, strict=True))
    assert part.nbytes - found.nbytes == 8 * 500


def test_ids_of_64_bits_keep_their_sign_or_stay_objects():
    for high in (-1, 2**31, 2**63 - 1, -(2**63)):
        found = store([Example([high], [0])])
        assert isinstance(found.blocks[0], Block) and found[0].prompt_ids == [high]
    for high in (2**63, 2**64 - 1, 2**64, -(2**63) - 1):
        row = Example([high], [0])
        assert store([Example([1], [1]), row])[1] is row


def test_only_rows_whose_completions_may_be_equal_are_built():
    rows = [Pair([1], [2, 3], [2, 3]), Pair([1], [2, 3], [3, 3]), Pair([1], [2], [3, 3])]
    rows += [Pair([1], [2, 3], [3, 2]), Pair([], [], [])]
    found = store(rows)
    assert found.blocks[0].may_repeat().tolist() == [True, False, False, True, True]
    with pytest.warns(UserWarning, match="dropped 2 of 5 pairs"):
        assert list(differing(found, "pairs")) == [rows[1], rows[2], rows[3]]


def test_columns_of_prompts_are_named_without_building_them(monkeypatch):
    rows = [Prompt([1], a=1)] * 300 + [Prompt([2], a=2, b=3)] * 300
    found = store(rows)
    assert column_names(found) == column_names(rows) == [("a",), ("a", "b")]
    assert column_names(found[300:]) == [("a", "b")]
    monkeypatch.setattr(Block, "_build", None)
    assert column_names(found) == [("a",), ("a", "b")]
    assert longer(store([Prompt([1] * i) for i in range(300)]), 299) == []
