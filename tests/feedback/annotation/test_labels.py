"""Labels: stored once and for good, about the right response, by as many people as asked."""

import hashlib
import itertools
import json
import sqlite3
import threading

import pytest

from rlhf_core.data import Candidates
from rlhf_core.feedback.annotation import labels
from rlhf_core.feedback.annotation.items import display_order, make_items, unblind
from rlhf_core.feedback.annotation.labels import Refused, Settings, open_store, read_labels


def rows(n=4, k=2, **options):
    return [
        Candidates(
            f"p{i}", f"question {i}", [{"text": f"{i}{x}"} for x in "abcdefgh"[:k]], **options
        )
        for i in range(n)
    ]


def gold(n=1):
    return [
        Candidates(f"g{i}", "sure?", [{"text": "good"}, {"text": "bad"}], [1, 2]) for i in range(n)
    ]


def opened(db, data=None, mode="pair", gold_rows=(), criteria=(), seed=0, **options):
    items = make_items(data or rows(), mode) + make_items(gold_rows, mode, gold=True)
    options = {"annotators": ["ann", "ben"]} | options
    return open_store(db, items, Settings(mode, criteria, seed), **options)


IDS = (f"id{i}" for i in itertools.count())


def label(store, name, choice=1, item=None, **fields):
    item = store.next_item(name).id if item is None else item
    field = {"rank": "ranks", "write": "text"}.get(store.settings.mode, "choice")
    return store.add(name, {"id": next(IDS), "item": item, field: choice} | fields)


# ---- what a choice means


def test_the_side_is_the_first_bit_of_the_digest():
    for item in range(50):
        digest = hashlib.sha256(f"7:{item}:ann".encode()).digest()
        assert display_order(7, item, "ann", 2) == ([1, 0] if digest[0] >= 128 else [0, 1])
    assert sorted(display_order(7, "x", "ann", 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "mode, choice, order, meaning",
    [
        ("pair", 1, [0, 1], 1),
        ("pair", 1, [1, 0], 2),
        ("pair", 2, [1, 0], 1),
        ("pair", 0, [1, 0], 0),
        ("pair", "both_bad", [1, 0], "both_bad"),
        ("likert8", 2, [0, 1], 2),
        ("likert8", 2, [1, 0], 7),
        ("rank", [1, 2, 2], [2, 0, 1], [2, 2, 1]),
        ("write", "Better.", [1, 0], "Better."),
    ],
)
def test_a_choice_is_stored_about_the_responses_of_the_data(mode, choice, order, meaning):
    assert unblind(mode, choice, order) == meaning


@pytest.mark.parametrize(
    "mode, choice",
    [
        *(("pair", choice) for choice in (3, True, "1", None)),
        *(("likert8", choice) for choice in (0, 9, 4.5)),
        *(("rank", choice) for choice in ([1], [0, 1], [1, 3], 1)),
        *(("write", choice) for choice in (" ", 1)),
    ],
)
def test_a_choice_that_the_mode_lacks_is_refused_and_not_stored(tmp_path, mode, choice):
    with opened(tmp_path / "l.sqlite", mode=mode) as store:
        with pytest.raises(Refused) as error:
            label(store, "ann", choice)
        assert error.value.status == 400
        assert store.progress("ann")["done"] == 0


def test_labels_of_shown_sides_are_unblinded_in_the_table(tmp_path):
    with opened(tmp_path / "l.sqlite", rows(20), seed=3) as store:
        for _ in range(20):
            item = store.next_item("ann")
            left_is_first = store.order(item, "ann") == [0, 1]
            label(store, "ann", 1 if left_is_first else 2, item.id)  # always the first response
    contents = read_labels(tmp_path / "l.sqlite")
    assert [row["choice"] for row in contents.rows] == [1] * 20
    assert {tuple(row["shown"]) for row in contents.rows} == {(0, 1), (1, 0)}
    table = sqlite3.connect(tmp_path / "l.sqlite").execute("SELECT side FROM labels").fetchall()
    assert [side for (side,) in table] == [row["shown"][0] for row in contents.rows]


def test_pairs_of_more_than_two_responses_are_items_of_their_own():
    (row,) = rows(1, k=3)
    row.responses.append({"text": "0a"})  # a repeated text
    items = make_items([row], "pair")
    assert [item.id for item in items] == ["p0:0-1", "p0:0-2", "p0:1-2"]
    assert items[2].responses == ["0b", "0c"]
    (item,) = make_items([row], "rank")
    assert (item.id, item.responses) == ("p0", ["0a", "0b", "0c"])
    with pytest.raises(ValueError, match='two rows have the id "p0"'):
        make_items([row, row], "pair")


def test_rows_without_an_id_get_one_from_their_content():
    row = rows(1)[0]._replace(id=None)
    other = row._replace(prompt="another")
    names = [item.id for item in make_items([row, other, row], "pair")]
    assert len(names) == 2 and names == [item.id for item in make_items([row, other], "pair")]


# ---- assignment


def test_each_item_goes_to_as_many_people_as_asked_and_to_none_twice(tmp_path):
    with opened(tmp_path / "l.sqlite", annotators=["a", "b", "c"], overlap=2) as store:
        for name in itertools.cycle("abc"):
            if all(store.next_item(x) is None for x in "abc"):
                break
            if store.next_item(name):
                label(store, name)
    by_item = {}
    for row in read_labels(tmp_path / "l.sqlite").rows:
        by_item.setdefault(row["item"], []).append(row["annotator"])
    assert {item: len(set(names)) for item, names in by_item.items()} == {
        f"p{i}": 2 for i in range(4)
    }
    assert all(len(names) == 2 for names in by_item.values())


def test_a_person_has_one_open_item_also_after_a_restart(tmp_path):
    with opened(tmp_path / "l.sqlite") as store:
        assert [store.next_item(name).id for name in ("ben", "ann", "ben", "ann")] == [
            *("p0", "p1"),
            *("p0", "p1"),
        ]
    with opened(tmp_path / "l.sqlite") as store:
        assert [store.next_item(name).id for name in ("ann", "ben")] == ["p1", "p0"]


def test_a_lease_ends_after_ten_minutes_and_the_late_label_is_refused(tmp_path, monkeypatch):
    now = [1e9]
    monkeypatch.setattr(labels.time, "time", lambda: now[0])
    with opened(tmp_path / "l.sqlite", rows(1)) as store:
        store.next_item("ann")
        now[0] += 599
        assert store.next_item("ben") is None
        assert store.waiting("ben") == 1
        now[0] += 2
        assert store.next_item("ben").id == "p0"
        with pytest.raises(Refused, match="others have finished it"):
            label(store, "ann", item="p0")
        label(store, "ben")
        assert store.waiting("ann") == 0


def test_a_skipped_item_is_free_for_others_at_once(tmp_path):
    with opened(tmp_path / "l.sqlite", rows(1)) as store:
        label(store, "ann", "skip")
        assert store.next_item("ann") is None
        assert store.next_item("ben").id == "p0"


def test_every_nth_item_is_a_gold_question_and_everybody_gets_it(tmp_path):
    with opened(tmp_path / "l.sqlite", rows(6), gold_rows=gold(2), gold_every=3) as store:
        order = []
        while item := store.next_item("ann"):
            order.append(item.id)
            label(store, "ann")
        assert order == ["p0", "p1", "g0", "p2", "p3", "g1", "p4", "p5"]
        label(store, "ben", item="g0")
    contents = read_labels(tmp_path / "l.sqlite")
    assert [row["item"] for row in contents.rows] == [*order, "g0"]
    assert [row["item"] for row in contents.labels()] == [x for x in order if x[0] == "p"]


def test_gold_rows_need_a_right_answer():
    with pytest.raises(ValueError, match='gold row "p0" has no right answer'):
        make_items(rows(1), "pair", gold=True)


# ---- the log


def test_undo_is_a_row_and_gives_the_item_back_also_after_a_restart(tmp_path):
    db = tmp_path / "l.sqlite"
    with opened(db) as store:
        for choice in (1, "skip", 2):
            item = label(store, "ann", choice)["item"]
    with opened(db) as store:
        assert store.add("ann", {"id": "u", "choice": "undo"})["item"] == item == "p2"
        assert store.next_item("ann").id == "p2"
        assert store.add("ann", {"id": "v", "choice": "undo"})["item"] == "p1"
        assert store.next_item("ann").id == "p1"
        label(store, "ann", 0)
        assert store.next_item("ann").id == "p2"
    assert [(row["kind"], row["item"]) for row in read_labels(db).rows] == [
        *(("label", "p0"), ("label", "p1"))
    ]
    kinds = sqlite3.connect(db).execute("SELECT kind FROM labels ORDER BY number").fetchall()
    assert [kind for (kind,) in kinds] == ["label", "skip", "label", "undo", "undo", "label"]


def test_there_may_be_nothing_to_undo(tmp_path):
    with opened(tmp_path / "l.sqlite") as store, pytest.raises(Refused, match="no label to take"):
        store.add("ann", {"id": "u", "choice": "undo"})


def test_a_label_sent_twice_is_stored_once(tmp_path):
    with opened(tmp_path / "l.sqlite") as store:
        sent = {"id": "x", "item": "p0", "choice": 1}
        assert store.add("ann", sent) == store.add("ann", sent | {"ms": 5})
        undo = {"id": "u", "choice": "undo"}
        assert store.add("ann", undo) == store.add("ann", undo)
        for other in (sent | {"choice": 2}, sent | {"item": "p1"}):
            with pytest.raises(Refused, match='id "x" is that of another label'):
                store.add("ann", other)
        with pytest.raises(Refused, match='id "x" is that of another label'):
            store.add("ben", sent)
        assert store.progress("ann")["done"] == 0


def test_an_item_is_labelled_once_by_a_person(tmp_path):
    with opened(tmp_path / "l.sqlite", overlap=2) as store:
        label(store, "ann", item="p3")
        with pytest.raises(Refused, match='item "p3" is closed: you have labelled it already'):
            label(store, "ann", item="p3")
        with pytest.raises(Refused, match='no item "p9"'):
            label(store, "ann", item="p9")


def test_the_log_cannot_be_changed(tmp_path):
    with opened(tmp_path / "l.sqlite") as store:
        label(store, "ann")
    connection = sqlite3.connect(tmp_path / "l.sqlite")
    for statement in ("UPDATE labels SET choice = 2", "DELETE FROM labels"):
        with pytest.raises(sqlite3.IntegrityError, match="labels are never"):
            connection.execute(statement)


def test_ratings_of_each_response_are_stored_by_criterion(tmp_path):
    with opened(tmp_path / "l.sqlite", criteria=("helpful", "honest")) as store:
        for ratings in (None, {"helpful": [1, 2]}, {"helpful": [1, 2], "honest": [0, 1]}):
            with pytest.raises(Refused, match="ratings"):
                label(store, "ann", ratings=ratings)
        item = store.next_item("ann")
        label(store, "ann", ratings={"helpful": [4, 1], "honest": [5, 5]})
        swapped = store.order(item, "ann") == [1, 0]
    (row,) = read_labels(tmp_path / "l.sqlite").rows
    assert row["ratings"] == {"helpful": [1, 4] if swapped else [4, 1], "honest": [5, 5]}


def test_labels_keep_their_time_and_the_version_of_the_guidelines(tmp_path, monkeypatch):
    now = [1e9]
    monkeypatch.setattr(labels.time, "time", lambda: now[0])
    db = tmp_path / "l.sqlite"
    for text in ("be kind", "be kind", "be brief"):
        with opened(db, guidelines=text) as store:
            store.next_item("ann")
            now[0] += 2.5
            label(store, "ann")
    found = [(row["guidelines"], row["ms"]) for row in read_labels(db).rows]
    assert found == [(1, 2500), (1, 2500), (2, 2500)]
    assert read_labels(db).rows[0]["time"] == "2001-09-09T01:46:42.500+00:00"


# ---- the file


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": rows(3)}, 'from other data: item "p3" is missing or differs'),
        ({"data": rows(4, k=3)}, 'from other data: item "p0" is missing or differs'),
        ({"gold_rows": ()}, 'from other data: item "g0" is missing or differs'),
        ({"gold_rows": [*gold(), rows()[0]._replace(ranks=[1, 2])]}, 'have the id "p0". Rename'),
        ({"mode": "likert8"}, 'with --mode "pair", now it is "likert8"'),
        ({"seed": 1}, "with --seed 0, now it is 1"),
        ({"criteria": ("honest",)}, r'with --criteria \[\], now it is \["honest"\]'),
    ],
)
def test_a_database_of_other_data_is_refused(tmp_path, change, message):
    db = tmp_path / "l.sqlite"
    with opened(db, gold_rows=gold()) as store:
        label(store, "ann")
    with pytest.raises(ValueError, match=message):
        opened(db, **({"gold_rows": gold()} | change)).__enter__()
    assert len(read_labels(db).rows) == 1


def test_rows_may_be_added_to_the_data(tmp_path):
    db = tmp_path / "l.sqlite"
    with opened(db, rows(2)) as store:
        label(store, "ann")
    with opened(db, rows(4), gold_rows=gold()) as store:
        assert store.next_item("ann").id == "p1"
    assert list(read_labels(db).items) == ["p0", "p1", "p2", "p3", "g0"]


def test_a_database_has_one_server(tmp_path):
    db, errors = tmp_path / "l.sqlite", []

    def second():
        try:
            opened(db).__enter__()
        except BlockingIOError as error:
            errors.append(str(error))

    with opened(db):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "in use" in errors[0]
    opened(db).__enter__()


@pytest.mark.parametrize("keep", [100, 5000])
def test_a_half_written_database_is_named(tmp_path, keep):
    db = tmp_path / "l.sqlite"
    with opened(db, rows(200)) as store:
        label(store, "ann")
    db.write_bytes(db.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{db} is damaged, or not a database"):
        opened(db, rows(200)).__enter__()


def test_a_database_of_something_else_is_left_alone(tmp_path):
    db = tmp_path / "l.sqlite"
    with pytest.raises(FileNotFoundError, match=f"{db} does not exist"):
        read_labels(db)
    connection = sqlite3.connect(db)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    before = db.read_bytes()
    for open_it in (lambda: opened(db).__enter__(), lambda: read_labels(db)):
        with pytest.raises(ValueError, match=f"{db} is not a database of labels"):
            open_it()
    assert db.read_bytes() == before


def test_a_full_disk_loses_nothing_that_was_stored(tmp_path):
    with opened(tmp_path / "l.sqlite", mode="write") as store:
        label(store, "ann", "short")
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match="full"):
            label(store, "ann", "long" * 10**6)
        store._connection.execute("PRAGMA max_page_count = 100000")
        label(store, "ann", "after")
    assert [row["choice"] for row in read_labels(tmp_path / "l.sqlite").rows] == ["short", "after"]


# ---- labels from elsewhere


def test_imported_labels_are_stored_once_and_replaced_when_they_change(tmp_path):
    db = tmp_path / "l.sqlite"
    row = {"id": "ls:1", "item": "p0", "annotator": "eve", "choice": 1, "time": "2026-01-01"}
    with opened(db) as store:
        other = row | {"id": "ls:2", "item": "p1"}
        assert store.add_imported([row, other]) == {"new": 2}
        assert store.add_imported([row, row | {"id": "ls:3", "choice": 2}]) == {
            "known": 1,
            "replaced": 1,
        }
    found = read_labels(db).rows
    assert [(x["item"], x["choice"], x["annotator"]) for x in found] == [
        ("p1", 1, "eve"),
        ("p0", 2, "eve"),
    ]
    assert json.dumps(found)  # plain values
