"""A run asks people, waits for their labels, and goes on where it was stopped."""

import pytest
from helpers import label_printed_links

from rlhf_core.data import Candidates
from rlhf_core.feedback.annotation import people as module
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import Settings, open_store, read_labels
from rlhf_core.feedback.annotation.people import People, ask

ROWS = [Candidates(f"a{i}", "q", [{"text": "good"}, {"text": "bad"}]) for i in range(4)]


def people(tmp_path, **options):
    return People(tmp_path / "l.sqlite", ["q"] * 4, port=0, **options)


def good(text):
    return text == "good"


def nobody_is_asked(monkeypatch):
    fail = lambda *texts, **options: pytest.fail("asked again")  # noqa: E731
    monkeypatch.setattr(module, "print", fail, raising=False)


def test_all_items_are_labelled_by_as_many_people_as_overlap_says(tmp_path, monkeypatch):
    counts = label_printed_links(monkeypatch, module, good)
    labels = ask(people(tmp_path, annotators=["ann", "ben", "cy"], overlap=2), ROWS).labels()
    assert len(labels) == 8 and {row["choice"] for row in labels} == {1}
    for item in {row["item"] for row in labels}:
        assert len({row["annotator"] for row in labels if row["item"] == item}) == 2
    assert sum(counts) <= 8


def test_a_run_goes_on_after_the_labels_it_waits_for(tmp_path, monkeypatch):
    label_printed_links(monkeypatch, module, good)
    assert len(ask(people(tmp_path, wait_labels=2), ROWS).labels()) in (2, 3)


def test_nothing_is_asked_twice_and_earlier_labels_stay(tmp_path, monkeypatch):
    label_printed_links(monkeypatch, module, good)
    ask(people(tmp_path), ROWS)
    nobody_is_asked(monkeypatch)
    again = [row._replace(responses=[{"text": "better"}, {"text": "bad"}]) for row in ROWS]
    contents = ask(people(tmp_path), again)  # sampled again elsewhere, with other rounding
    assert len(contents.labels()) == 4
    assert {item.responses[0] for item in contents.items.values()} == {"good"}


def test_people_get_the_items_of_this_round_alone(tmp_path, monkeypatch):
    db = tmp_path / "l.sqlite"
    with open_store(db, make_items(ROWS, "pair"), Settings("pair")):
        pass
    label_printed_links(monkeypatch, module, good)
    new = [row._replace(id=f"b{row.id}") for row in ROWS]
    contents = ask(people(tmp_path), new)
    assert len(contents.items) == 8
    assert {row["item"] for row in contents.labels()} == {row.id for row in new}


def test_an_item_that_everybody_skips_does_not_hold_up_the_run(tmp_path, monkeypatch):
    db = tmp_path / "l.sqlite"
    with open_store(
        db, make_items(ROWS[:1], "pair"), Settings("pair"), annotators=["ann"]
    ) as store:
        store.add("ann", {"id": "1", "item": "a0", "choice": "skip"})
    nobody_is_asked(monkeypatch)
    assert ask(people(tmp_path, annotators=["ann"]), ROWS[:1]).labels() == []


def test_equal_answers_and_a_database_of_texts_are_refused(tmp_path):
    equal = [Candidates("a", "q", [{"text": "x"}, {"text": "x"}])]
    with pytest.raises(ValueError, match=r"nothing to compare\. Raise the temperature"):
        ask(people(tmp_path), equal)
    with open_store(tmp_path / "l.sqlite", make_items(ROWS, "write"), Settings("write")):
        pass
    with pytest.raises(ValueError, match=r"texts that people write\. Choose another --db"):
        ask(people(tmp_path), ROWS)
    assert len(read_labels(tmp_path / "l.sqlite").items) == 4
