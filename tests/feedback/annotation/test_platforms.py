"""Tasks for other platforms hold the texts alone, and their exports come back as labels.

label_studio.json has real exports of Label Studio 1.23.2, one list of tasks for each mode, made by
hand in a browser from the tasks and configurations that this library writes.
"""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rlhf_core.data import Candidates
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import Settings, open_store, read_labels
from rlhf_core.feedback.annotation.platforms import argilla, label_studio, read_platform

EXPORTS = json.loads(Path(__file__).with_name("label_studio.json").read_text(encoding="utf-8"))
PLANTS = (
    "Plants make food by photosynthesis. They take in light, water and carbon dioxide, and make "
    "sugar and oxygen.\n\n"
    "1. Light is caught by chlorophyll.\n2. Water is split.\n3. Sugar is built."
)
TURNS = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Is <script>alert(1)</script> dangerous?"},
    {"role": "assistant", "content": "It depends."},
    {"role": "user", "content": "On what?"},
]
ROWS = [
    Candidates(
        "p0",
        "How do plants make food?",
        [{"text": PLANTS, "model": "secret"}, {"text": "They eat soil.", "model": "secret"}],
    ),
    Candidates(
        "p1",
        TURNS,
        [
            {
                "text": "On where it is shown: <script>document.title='pwned'</script> as text is "
                "harmless."
            },
            {"text": "<img src=x onerror=\"document.title='pwned'\"> Yes, always."},
        ],
    ),
    Candidates("p3", "日本の首都はどこですか。", [{"text": "東京です。"}, {"text": "京都です。"}]),
]
COLOURS = [
    Candidates(
        "r0",
        "Name a colour 0.",
        [{"text": x} for x in ("Blue 0, like the sky.", "Red 0.", "Seven 0.")],
    )
]
MODES = {"pair": ROWS, "likert8": ROWS, "rank": COLOURS, "write": ROWS}


def read(tmp_path, export, mode, rows=None, criteria=()):
    """The labels in an export."""
    path = tmp_path / "export.json"
    path.write_text(json.dumps(export), encoding="utf-8")
    items = {item.id: item for item in make_items(rows or MODES[mode], mode)}
    return read_platform(path, items, Settings(mode, criteria))


@pytest.mark.parametrize(
    "mode, labels",
    [
        ("pair", [("p0", 1), ("p1", 0)]),  # the right one was the first response of the data
        ("likert8", [("p0", 7)]),  # 2, where the second response was on the left
        ("rank", [("r0", [1, 2, 3])]),
        ("write", [("p0", "Plants use light.")]),
    ],
)
def test_real_exports_of_label_studio_are_read(tmp_path, mode, labels):
    rows = read(tmp_path, EXPORTS[mode], mode)
    assert [(row["item"], row["choice"]) for row in rows] == labels
    assert {row["annotator"] for row in rows} == {"1"}
    assert all(row["time"].startswith("2026-11-30T07:0") for row in rows)
    assert all(1800 < row["ms"] < 4000 for row in rows)


def test_ratings_of_label_studio_are_read(tmp_path):
    (row,) = read(tmp_path, EXPORTS["crit"], "pair", criteria=("helpful", "honest"))
    assert row["shown"] == [1, 0] and row["choice"] == 1
    assert row["ratings"] == {"helpful": [4, 5], "honest": [1, 2]}


def test_cancelled_and_empty_annotations_are_skips_and_people_have_names(tmp_path):
    task = json.loads(json.dumps(EXPORTS["pair"][0]))
    (annotation,) = task["annotations"]
    annotation["completed_by"] = {"id": 7, "email": "eve@example.org"}
    empty = annotation | {"id": 8, "result": []}
    cancelled = annotation | {"id": 9, "was_cancelled": True}
    task["annotations"] += [empty, cancelled]
    rows = read(tmp_path, [task], "pair")
    assert [row.get("kind", "label") for row in rows] == ["label", "skip", "skip"]
    assert {row["annotator"] for row in rows} == {"eve@example.org"}


def test_an_import_is_stored_once_and_a_changed_label_replaces_its_former(tmp_path):
    db, items = tmp_path / "l.sqlite", make_items(ROWS, "pair")
    changed = json.loads(json.dumps(EXPORTS["pair"]))
    changed[0]["annotations"][0]["updated_at"] = "2026-12-01T00:00:00Z"
    changed[0]["annotations"][0]["result"][0]["value"]["selected"] = "left"
    with open_store(db, items, Settings("pair")) as store:
        first = read(tmp_path, EXPORTS["pair"], "pair")
        assert store.add_imported(first) == {"new": 2}
        assert store.add_imported(first) == {"known": 2}
        assert store.add_imported(read(tmp_path, changed, "pair")) == {"known": 1, "replaced": 1}
    assert [(row["item"], row["choice"]) for row in read_labels(db).labels()] == [
        *(("p1", 0), ("p0", 2))
    ]


@pytest.mark.parametrize("mode", MODES)
def test_tasks_hold_the_texts_and_nothing_that_unblinds(mode):
    items = make_items(MODES[mode], mode)
    tasks, view = label_studio(items, Settings(mode))
    records, settings = argilla(items, Settings(mode))
    assert len(tasks) == len(records) == len(items)
    assert "secret" not in json.dumps([tasks, view, records, settings])
    names = {
        x.get("value")[1:] for x in ElementTree.fromstring(view).iter() if "$" in x.get("value", "")
    }
    assert names == tasks[0]["data"].keys() - {"item"}
    fields = {field["name"] for field in settings["fields"]}
    assert all(record["fields"].keys() <= fields for record in records)


def test_names_of_criteria_are_escaped_in_the_view():
    items = make_items(ROWS, "pair")
    _, view = label_studio(items, Settings("pair", ('a "b" <c>',)))
    ratings = [x.get("name") for x in ElementTree.fromstring(view).iter("Rating")]
    assert ratings == ['a "b" <c>:left', 'a "b" <c>:right']


ARGILLA = {
    "pair": ("choice", "left", lambda order: 1 + order[0]),
    "likert8": ("choice", "2", lambda order: 2 if order == [0, 1] else 7),
    "write": ("text", "Mine.", lambda order: "Mine."),
}


@pytest.mark.parametrize("mode", ARGILLA)
def test_records_of_argilla_are_read(tmp_path, mode):
    """As `records.to_json` of its client 2.8 writes them."""
    items = make_items(ROWS, mode)
    records, _ = argilla(items, Settings(mode))
    question, value, meaning = ARGILLA[mode]
    for record in records:
        record["responses"] = {question: [{"value": value, "user_id": "u1"}]}
    rows = read(tmp_path, records, mode)
    assert [row["choice"] for row in rows] == [meaning(row["shown"]) for row in rows]
    assert {row["annotator"] for row in rows} == {"u1"}
    assert [row["id"] for row in rows] == [row["id"] for row in read(tmp_path, records, mode)]


@pytest.mark.parametrize(
    "value",
    [
        ["answer_2", "answer_3", "answer_1"],
        [{"value": f"answer_{i}", "rank": rank} for i, rank in ((1, 9), (2, 1), (3, 4))],
    ],
)
def test_rankings_and_ratings_of_argilla_are_read(tmp_path, value):
    (record,), settings = argilla(make_items(COLOURS, "rank"), Settings("rank", ("kind",)))
    assert [x["name"] for x in settings["questions"]] == [
        *("rank", "kind_answer_1", "kind_answer_2", "kind_answer_3")
    ]
    record["responses"] = {"rank": [{"value": value, "user_id": "u"}]}
    for i in (1, 2, 3):
        record["responses"][f"kind_answer_{i}"] = [{"value": i, "user_id": "u"}]
    (row,) = read(tmp_path, [record], "rank", criteria=("kind",))
    shown = {number: place for place, number in enumerate(row["shown"])}
    assert row["choice"] == [[3, 1, 2][shown[i]] for i in range(3)]
    assert row["ratings"] == {"kind": [shown[i] + 1 for i in range(3)]}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda task: task["data"].pop("item"), "entry 1: field 'item' is missing or wrong"),
        (lambda task: task["data"].update(item="p9"), 'entry 1: item "p9" is not in the database'),
        (lambda task: task["data"].update(left="x"), 'the answers of item "p0" differ from those'),
        (lambda task: task.pop("annotations"), "entry 1: has neither annotations (Label Studio"),
        (
            lambda task: task["annotations"][0].update(completed_by=[]),
            "field 'completed_by' must be",
        ),
        (
            lambda task: task["annotations"][0]["result"][0]["value"].update(selected="up"),
            'entry 1: choice must be 1, 2, 0 or "both_bad", got "up"',
        ),
    ],
)
def test_a_bad_entry_is_named(tmp_path, change, message):
    export = json.loads(json.dumps(EXPORTS["pair"]))
    change(export[0])
    with pytest.raises(ValueError) as error:
        read(tmp_path, export, "pair")
    assert message in str(error.value) and str(tmp_path / "export.json") in str(error.value)
