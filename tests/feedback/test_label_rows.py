"""Labels from files of every layout, and from the database of annotate."""

import sqlite3

import pytest
from helpers import write

from rlhf_core.data import DataError
from rlhf_core.data.readers import Candidates
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import Settings, open_store
from rlhf_core.feedback.label_rows import (
    LabelColumns,
    LabelRow,
    is_database,
    read_database,
    read_label_rows,
    table_of,
)

LONG = [
    {"item": "a", "annotator": "ann", "label": 1, "time": "2026-01-01T00:00:10Z"},
    {"item": "a", "annotator": "ben", "label": 2, "time": "2026-01-01T00:00:10.5"},
    {"item": "b", "annotator": "ann", "label": None, "time": 3},
    {"item": "b", "annotator": "ben", "label": 1, "time": 3},
]
EXPECTED = [("a", "ann", 1), ("a", "ben", 2), ("b", "ben", 1)]


def rows_of(path, numeric=False, **columns):
    return list(read_label_rows(path, LabelColumns(**columns), numeric))


def test_every_layout_gives_the_same_labels(tmp_path):
    long = write(tmp_path / "long.jsonl", LONG)
    assert [row[:3] for row in rows_of(long)] == EXPECTED
    csv = tmp_path / "long.csv"
    csv.write_text("q,who,label\na,ann,1\na,ben,2\nb,ann,\nb,ben,1\n")
    assert [row[:3] for row in rows_of(csv, item="q", annotator="who")] == EXPECTED
    wide = write(tmp_path / "wide.jsonl", [{"id": "a", "ann": 1, "ben": 2}, {"id": "b", "ben": 1}])
    assert [row[:3] for row in rows_of(wide, annotators=["ann", "ben"])] == EXPECTED
    lists = write(tmp_path / "list.jsonl", [{"x": "a", "labels": [1, 2]}, {"labels": [None, 1]}])
    by_id = write(tmp_path / "id.jsonl", [{"id": "a", "annotator": "ann", "label": 1}])
    assert [row[:3] for row in rows_of(by_id)] == EXPECTED[:1]
    by_number = {"ann": "1", "ben": "2", "a": "row 1", "b": "row 2"}
    want = [(by_number[item], by_number[name], label) for item, name, label in EXPECTED]
    assert [row[:3] for row in rows_of(lists)] == want
    assert rows_of(lists, label="labels") == rows_of(lists)


def test_times_are_numbers_or_dates_in_utc(tmp_path):
    times = [row.time for row in rows_of(write(tmp_path / "a.jsonl", LONG), time="time")]
    assert times == [1767225610, 1767225610.5, 3]
    assert rows_of(tmp_path / "a.jsonl")[0].time is None


def test_numeric_labels_are_read_from_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"item": 1, "annotator": "a", "label": "2.5"}])
    assert rows_of(path)[0].label == "2.5" and rows_of(path, numeric=True)[0].label == 2.5


def test_a_table_keeps_the_last_label_of_a_person_for_an_item():
    rows = [LabelRow("a", "x", 1, 0), LabelRow("a", "y", 2, 1), LabelRow("b", "y", 1, 2)]
    table = table_of([*rows, LabelRow("a", "x", 2, 3)])
    assert table.ratings == [[2, None], [2, 1]] and table.times == [[3, None], [1, 2]]
    assert (table.annotators, table.items, table.repeats) == (["x", "y"], ["a", "b"], 1)
    assert table_of([*rows, LabelRow("b", "x", 1)]).times is None


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([{"item": 1, "label": 1}], {}, r"a.jsonl:1: column 'annotator' is missing; .* 'label'"),
        (LONG, dict(item="q", annotators=["label"]), "a.jsonl:1: column 'q' is missing"),
        (LONG, dict(item="id"), "a.jsonl:1: column 'id' is missing; the row has 'item'"),
        (
            [{"item": 1}],
            {},
            "a.jsonl: no row has a column 'label'. .*a.jsonl:1: the row has 'item'",
        ),
        (LONG, dict(annotators=["label", "cy"]), "no row has a column 'cy'"),
        (LONG, dict(time="when"), "no row has a column 'when'"),
        ([], {}, "no row has a column 'label'. It is empty"),
        ([LONG[0] | {"label": {}}], {}, "a.jsonl:1: a label must be text or a number, got {}"),
        ([LONG[0] | {"item": []}], {}, r"column 'item' must be text or a number, got \[\]"),
        ([LONG[0] | {"time": "noon"}], dict(time="time"), 'a time must be .* got "noon"'),
        (["{"], {}, "a.jsonl:1: not valid JSON"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, rows, columns, message):
    with pytest.raises(DataError, match=message):
        rows_of(write(tmp_path / "a.jsonl", rows), **columns)


def test_a_text_where_numbers_are_needed_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [LONG[0] | {"label": "good"}])
    with pytest.raises(DataError, match='a label must be a number, got "good"'):
        rows_of(path, numeric=True)


# ---- the database


def database(path, mode, choices, criteria=(), gold=False):
    """A database where each annotator makes the choices about items 0, 1, ... as shown."""
    rows = [{"text": text} for text in "xyz"[: 3 if mode == "rank" else 2]]
    candidates = [Candidates(i, "q", rows) for i in range(3)]
    items = make_items(candidates, mode)
    if gold:
        known = Candidates("gold", "q", rows, ranks=[1, 2])
        items += make_items([known], mode, gold=True)
    people = list(choices)
    settings = Settings(mode, tuple(criteria))
    with open_store(path, items, settings, annotators=people, overlap=len(people)) as store:
        for name, given in choices.items():
            for number, choice in enumerate(given):
                label = {"id": f"{name}{number}", "item": items[number].id}
                store.add(name, label | choice)
    return path


def test_undone_labels_skips_and_gold_questions_do_not_count(tmp_path):
    one = {"choice": 0}
    choices = {"ann": [one, one, {"choice": "skip"}], "ben": [one, one, one, one]}
    path = database(tmp_path / "l.sqlite", "pair", choices, gold=True)
    with open_store(path, annotators=["ann", "ben"], overlap=2) as store:
        store.add("ben", {"id": "undo", "choice": "undo"})  # the gold question
        store.add("ben", {"id": "undo2", "choice": "undo"})
        store.add("ben", {"id": "again", "item": "gold", "choice": 1})
    assert is_database(path)
    rows, level = read_database(path)
    assert [row[:3] for row in rows] == [(0, "ann", 0), (1, "ann", 0), (0, "ben", 0), (1, "ben", 0)]
    assert level == "nominal" and all(row.time > 1.7e9 for row in rows)


def test_rankings_ratings_and_likert_labels(tmp_path):
    ratings = {"ratings": {"helpful": [4, 4, 4]}, "ranks": [1, 1, 1]}
    path = database(tmp_path / "r.sqlite", "rank", {"ann": [ratings]}, criteria=["helpful"])
    rows, level = read_database(path)
    assert [row[:3] for row in rows] == [(f"0:{pair}", "ann", 0) for pair in ("0-1", "0-2", "1-2")]
    rows, level = read_database(path, criterion="helpful")
    assert [row[:3] for row in rows] == [(f"0:{i}", "ann", 4) for i in range(3)]
    assert level == "ordinal"
    with pytest.raises(ValueError, match="no ratings of 'kind'; its criteria: helpful"):
        read_database(path, criterion="kind")
    likert = database(tmp_path / "l.sqlite", "likert8", {"ann": [{"choice": 2}]})
    ((_, _, label, _),), level = read_database(likert)
    assert label in (2, 7) and level == "ordinal"  # by the side
    texts = database(tmp_path / "t.sqlite", "write", {"ann": [{"text": "hi"}]})
    with pytest.raises(ValueError, match="texts that people wrote, which have no agreement"):
        read_database(texts)


def test_a_file_that_is_no_database_of_labels_is_refused(tmp_path):
    other = tmp_path / "other.data"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE labels (item, annotator, choice)")
    assert is_database(other)  # by its first bytes
    half = tmp_path / "half.sqlite"
    half.write_bytes(other.read_bytes()[:50])
    for path in (other, half):
        with pytest.raises(ValueError, match=f"{path} is"):
            read_database(path)
    assert not is_database(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_database(tmp_path / "none.sqlite")
