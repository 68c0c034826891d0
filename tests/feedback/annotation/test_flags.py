"""Flags: each names what it should and nothing else; low agreement proposes a pause."""

import datetime

import pytest

from rlhf_core.data import Candidates
from rlhf_core.feedback.annotation import flags
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import Contents, Settings

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)


def summary(monkeypatch, rows, mode="pair", gold=0, n=100):
    """The summary of labels (annotator, item, choice and other columns)."""
    texts = [{"text": "a" * 100}, {"text": "b" * 100}]
    data = [Candidates(i, "?", texts) for i in range(n)]
    known = [Candidates(f"g{i}", "?", texts, [1, 2]) for i in range(gold)]
    items = make_items(data, mode) + make_items(known, mode, gold=True)
    default = {"kind": "label", "gold": 0, "shown": [0, 1], "ms": 9000, "ratings": None}
    given = [
        default
        | {"id": str(k), "time": (START + datetime.timedelta(seconds=9 * k)).isoformat()}
        | row
        for k, row in enumerate(rows)
    ]
    contents = Contents(Settings(mode), {item.id: item for item in items}, given)
    monkeypatch.setattr(flags, "read_labels", lambda db: contents)
    return flags.summary(None)


def label(person, item, choice, **columns):
    return {"annotator": person, "item": item, "choice": choice} | columns


def flags_of(report, person="ann"):
    return report["annotators"][person]["flags"]


def test_nothing_is_flagged_in_careful_work(monkeypatch):
    rows = [label("ann", i, 1 + i % 2) for i in range(60)]
    report = summary(monkeypatch, [*rows, label("ann", 60, None, kind="skip")])
    assert report["annotators"]["ann"] == {
        **{"labels": 60, "skips": 1, "gold": 0, "gold_missed": 0, "median_ms": 9000, "flags": []}
    }
    assert (report["items"], report["labels"], report["alpha"], report["warnings"]) == (
        *(100, 60, None, []),
    )


@pytest.mark.parametrize("missed, flagged", [(1, False), (2, True)])
def test_missed_gold_questions_are_flagged(monkeypatch, missed, flagged):
    rows = [label("ann", f"g{i}", 2 if i < missed else 1, gold=1) for i in range(4)]
    report = summary(monkeypatch, rows, gold=4)
    expected = [f"missed {missed} of 4 gold questions"] if flagged else []
    assert flags_of(report) == expected
    assert report["labels"] == 0


@pytest.mark.parametrize("fast, flagged", [(2, False), (4, True)])
def test_haste_is_flagged(monkeypatch, fast, flagged):
    """201 characters take at least 2.01 seconds."""
    rows = [label("ann", i, 1 + i % 2, ms=2000 if i < fast else 2020) for i in range(20)]
    expected = [f"gave {fast} of 20 labels faster than anybody reads the texts"] if flagged else []
    assert flags_of(summary(monkeypatch, rows)) == expected


@pytest.mark.parametrize("mode, left, right", [("pair", 1, 2), ("likert8", 3, 6)])
def test_one_side_is_flagged_whatever_it_holds(monkeypatch, mode, left, right):
    rows = [
        label("ann", i, left if i % 2 else right, shown=[0, 1] if i % 2 else [1, 0])
        for i in range(14)
    ]
    (flag,) = flags_of(summary(monkeypatch, rows, mode))
    assert flag == "chose the left answer in 14 of 14 items (binomial p 0.0001)"
    one = [row | {"choice": left, "shown": [0, 1]} for row in rows[:5]]
    assert not flags_of(summary(monkeypatch, [*rows[:5], *one], mode))


def test_fatigue_is_slower_or_less_agreement_within_a_session(monkeypatch):
    slow = [label("ann", i, 1 + i % 2, ms=9000 if i < 20 else 15000) for i in range(30)]
    (flag,) = flags_of(summary(monkeypatch, slow))
    assert flag == "may be tired, within a session: 9.0 s an item at first, 15.0 s at the end"
    ben = [label("ben", i, 1 + i % 2, time=START.isoformat()) for i in range(30)]
    vague = [label("ann", i, 1 + (i + (i > 24)) % 2) for i in range(30)]
    (flag,) = flags_of(summary(monkeypatch, [*ben, *vague]))
    assert flag.endswith("agreed with others in 100% at first, in 50% at the end")
    day = datetime.timedelta(days=1)
    later = [row | {"time": (START + day * i).isoformat()} for i, row in enumerate(slow)]
    assert not flags_of(summary(monkeypatch, later))  # each label is a session of its own


def test_agreement_that_stays_low_proposes_a_pause(monkeypatch):
    ann = [label("ann", i, 1 + i % 2) for i in range(40)]
    ben = [label("ben", i, 1 + (i // 2) % 2) for i in range(40)]
    report = summary(monkeypatch, [*ann, *ben])
    assert report["alpha"] == pytest.approx(0.0125)
    (warning,) = report["warnings"]
    assert warning.startswith(
        "agreement stays low (alpha 0.03, then 0.03). Pause, talk about items"
    )
    assert warning.endswith("33, 34, 37, 38, and add them to the guidelines as corner cases")
    assert flags.alert_lines(report) == [f"warning: {warning}"]
    assert flags.summary_lines(report)[-1] == f"warning: {warning}"
    assert not summary(monkeypatch, [*ann[:19], *ben[:19]])["warnings"]
    assert not summary(monkeypatch, [*ann, *(row | {"annotator": "ben"} for row in ann)])[
        "warnings"
    ]
