"""Length bias of scores, and the audit of pairs against values of scipy, datasketch and sets."""

import time

import pytest
import torch

from rlhf_core.data import Pair, Preference, Ranked
from rlhf_core.data.formats import read_rows
from rlhf_core.data.quality import PairAudit, length_bias, personal_data, preference_cycles
from rlhf_core.data.readers import iterate_preferences

SHORTER_LOSES = Pair([7], [5, 5, 2], [6, 2])
SHORTER_WINS = Pair([7], [5, 2], [6, 6, 6, 2])
EQUAL = Pair([7], [5, 2], [6, 2])


def test_a_score_that_is_the_length_has_correlation_1_and_is_wrong_on_shorter_winners():
    pairs = [SHORTER_LOSES, SHORTER_WINS, EQUAL]
    found = length_bias(pairs, torch.tensor([3.0, 2, 2, 4, 2, 2]))
    assert found == {"length_correlation": pytest.approx(1), "accuracy_where_shorter_won": 0}
    found = length_bias(pairs, -torch.tensor([3.0, 2, 2, 4, 2, 2]))
    assert found == {"length_correlation": pytest.approx(-1), "accuracy_where_shorter_won": 1}


def test_accuracy_counts_only_pairs_whose_better_completion_is_shorter():
    scores = torch.tensor([0.0, 9, 1, 0])  # the longer one of the first pair is better: no matter
    assert length_bias([SHORTER_LOSES, SHORTER_WINS], scores)["accuracy_where_shorter_won"] == 1
    halved = torch.tensor([1.0, 0, 0, 1])
    assert length_bias([SHORTER_WINS, SHORTER_WINS], halved)["accuracy_where_shorter_won"] == 0.5


def test_a_ranked_list_gives_all_its_pairs():
    """Best first, of lengths 2, 3 and 1: the first is shorter than the second only."""
    ranked = [Ranked([7], [[5, 2], [6, 6, 2], [2]])]
    assert length_bias(ranked, torch.tensor([2.0, 3, 1]))["accuracy_where_shorter_won"] == 0
    assert length_bias(ranked, torch.tensor([3.0, 2, 9]))["accuracy_where_shorter_won"] == 1


def test_undefined_values_are_left_out():
    assert length_bias([EQUAL], torch.tensor([0.0, 1])) == {}  # all lengths are equal
    assert length_bias([SHORTER_LOSES], torch.tensor([1.0, 1])) == {}  # all scores are equal


# ---- the audit


def audited(rows, **options):
    """The audit of (prompt, chosen, rejected) rows, and its report."""
    audit = PairAudit(**options)
    for row in rows:
        audit.add(Preference(*row))
    return audit, audit.report()


@pytest.fixture(scope="module")
def reports(data_dir):
    """The audits of the real files of pairs, each computed once."""
    names, audits = ("hh_helpful", "hh_harmless", "rasbt_pref"), {}
    for name in names:
        audits[name] = PairAudit()
        for _, pair in iterate_preferences(data_dir / "preferences" / f"{name}.jsonl.gz"):
            audits[name].add(pair)
    return {name: (audit, audit.report()) for name, audit in audits.items()}


@pytest.mark.parametrize("name", ["hh_helpful", "hh_harmless", "rasbt_pref"])
def test_length_bias_of_real_pairs(reports, expected, name):
    (_, report), values = reports[name], expected["length_bias"][name]
    length = report["length_bias"]
    for field in ("n", "ties", "median_chars_chosen_rejected", "auc_length_difference"):
        assert length[field] == pytest.approx(values[field], abs=1e-6)
    assert length["wilson95_without_ties"] == pytest.approx(
        values["wilson95_without_ties"], abs=1e-6
    )
    assert length["sign_test_p"] == pytest.approx(values["sign_test_p"], rel=1e-6)
    for unit in ("chars", "words"):
        share = values[f"longer_chosen_{unit}(ties half)"]
        assert length[f"longer_chosen_{unit}"] == pytest.approx(share, abs=1e-6)
    assert report["flagged"]["empty"] == values["empty"]
    assert report["flagged"]["equal"] == values["equal_texts"]
    alike = report["duplicates"]["equal_answers"]
    assert alike == values["equal_after_strip_casefold"]
    assert length["biased"] == (name != "rasbt_pref")


@pytest.mark.parametrize("name", ["hh_helpful", "hh_harmless", "rasbt_pref"])
def test_format_bias_of_real_pairs(reports, expected, name):
    _, report = reports[name]
    for form, values in expected["format_bias"][name].items():
        side = report["format_bias"][form]
        assert side["only_chosen"] == values["only_chosen"]
        assert side["only_rejected"] == values["only_rejected"]
        p = values["sign_test_p"]
        assert side["sign_test_p"] == (p if p is None else pytest.approx(p, rel=1e-6))
    biased = [form for form, side in report["format_bias"].items() if side["biased"]]
    assert biased == {"hh_helpful": ["question_end"], "rasbt_pref": ["question_end"]}.get(name, [])


def test_repeated_prompts_of_real_pairs(reports):
    _, report = reports["rasbt_pref"]
    assert report["duplicates"] == {
        "rows": 0,
        "prompts": 22,
        "equal_answers": 0,
        "near_prompt_pairs": 31,
        "rows_in_near_pairs": 53,
        "all_pairs_compared": True,
    }


def test_preferences_of_real_judges_have_one_circle(data_dir, expected):
    rows = read_rows(data_dir / "labels" / "pandalm_3annotators.jsonl.gz", 2**24)
    edges = []
    for _, row in rows:
        one, other = row["models"].split("_")
        if row["majority"] in (1, 2):
            pair = (one, other) if row["majority"] == 1 else (other, one)
            edges.append(((row["instruction"], row["input"]), *pair))
    found = preference_cycles(edges)
    assert len(found.pop("edges")) == 3
    assert found == expected["intransitive"]["pandalm majority by instruction+input"]


def test_circles_leave_out_ties_and_other_prompts():
    cycle = [("p", "a", "b"), ("p", "b", "c"), ("p", "c", "a")]
    found = preference_cycles([*cycle, ("p", "a", "d"), ("q", "d", "a"), ("p", "d", "b")])
    assert (found["triples_without_ties"], found["cyclic"]) == (2, 1)
    assert found["edges"] == set(cycle)
    tie = preference_cycles([*cycle, ("p", "a", "c")])
    assert (tie["triples_without_ties"], tie["cyclic"], tie["edges"]) == (0, 0, set())


def test_each_fault_of_a_row_is_found_with_its_reason():
    long = "a prompt of quite a few words, so that one changed word of it is a near duplicate: "
    long *= 2
    audit, report = audited(
        [
            ("p", "a", "b"),
            ("p", "x", "  "),
            ("p", "Same thing", "Same thing\n"),
            ("P", "a", "b"),
            (long + "one", "a", "b"),
            (long + "two", "a", "b"),
            ("q", "yes", "no"),
            ("q", "no", "yes"),
            ("r", "a", "b"),
            ("r", "b", "c"),
            ("r", "c", "a"),
            ("mail ann@example.com", "call (555) 123-4567", "pay 4111 1111 1111 1111"),
            ("I am sure that 2 + 2 = 5.", "Yes, you are right.", "No, it is 4."),
            ("I am sure that 2 + 2 = 4.", "No, it is 5.", "Yes, that is right."),
        ]
    )
    found = {name: rows for name, rows in audit.findings.items() if rows}
    assert found == {
        "empty": {2: "rejected empty"},
        "equal": {3: "the answers are equal"},
        "duplicate": {4: "row 1 has the same prompt and answers"},
        "near_duplicate": {6: "the prompt is nearly that of row 5"},
        "contradiction": dict.fromkeys(
            (7, 8), "another row has the same prompt and answers with the order reversed"
        ),
        "cycle": dict.fromkeys((9, 10, 11), "rows of the prompt prefer a to b, b to c and c to a"),
        "personal": {
            12: "e-mail address in prompt, phone number in chosen, card number in rejected"
        },
        "sycophancy": {
            13: "chosen agrees with 2 + 2 = 5",
            14: "chosen contradicts 2 + 2 = 4",
        },
    }
    assert report["failed"] == list(found)
    assert report["flagged"]["contradiction"] == 2 and report["rows"] == 14


def test_a_test_prompt_in_a_training_prompt_is_a_leak():
    test = "name the largest city in the country with the most people in it by far now"
    audit, report = audited(
        [("In short: " + test.upper() + "!", "a", "b"), ("other", "a", "b")], against=[test, "o"]
    )
    assert list(audit.findings["leak"]) == [1]
    assert report["contamination"]["rows_with_a_shared_ngram"] == 1
    assert report["contamination"]["rows_fully_covered"] == 1


def test_agreement_with_every_claim_is_a_bias_and_a_balance_is_none():
    claim, agrees, contradicts = "I think cats bark.", "You're right!", "Actually, they do not."
    one, other = (claim, agrees, contradicts), (claim, contradicts, agrees)
    _, report = audited([one] * 20)
    assert report["agreement_bias"]["only_chosen"] == 20 and "agreement_bias" in report["failed"]
    _, report = audited([one, other] * 20)
    assert report["agreement_bias"]["sign_test_p"] == 1
    assert "agreement_bias" not in report["failed"]
    _, report = audited([("Do cats bark?", agrees, contradicts)] * 20)  # no claim
    assert report["agreement_bias"]["sign_test_p"] is None


def test_rows_whose_rejected_answer_scores_higher_are_likely_flipped():
    audit = PairAudit()
    audit.add_unreadable("bad")
    for text in "abc":
        audit.add(Preference(text, "x", "y"))
    report = audit.report([2.0, -0.5, -1.5], flip_margin=1.0)
    assert audit.findings["flipped"] == {4: "reward margin -1.5"}
    assert report["reward_margin"] == {"accuracy": 1 / 3, "mean": 0, "flip_margin": 1.0}
    assert report["failed"] == ["unreadable", "flipped"]


@pytest.mark.parametrize(
    "text, kinds",
    [
        ("write to a.b+c@mail.example.co.uk.", ["e-mail address"]),
        ("@home, a@b, 3 @ 4.50", []),
        ("call +49 30 1234567 or +1 (555) 123 4567", ["phone number"]),
        ("555-123-4567", ["phone number"]),
        ("in 1984-1985, 3.141592653589793, 10.0.0.1, 2026-11-30, 1234567890", []),
        ("4111-1111-1111-1111", ["card number"]),
        ("4111-1111-1111-1112", []),  # the check digit is wrong
        ("0000 0000 0000 0000", []),  # no card begins with 0
    ],
)
def test_personal_data(text, kinds):
    assert personal_data(text) == kinds


def test_hostile_text_takes_no_longer_than_its_length():
    begin = time.thread_time()
    for text in ("a" * 50_000 + "@", "a." * 25_000 + "@", "1 " * 25_000, "-\n " * 25_000):
        audited([(text, text + "1 + 1", " " * 50_000 + "?")])
    assert time.thread_time() - begin < 30  # quadratic time would be minutes


def test_pairs_in_chinese_have_characters_for_words():
    prompt = "请告诉我北京有哪些值得参观的地方以及怎么去"
    audit, report = audited(
        [(prompt + "？", "长城和故宫都很有名", "长城"), (prompt + "呢", "故宫", "长城")]
    )
    assert audit.findings["near_duplicate"] == {2: "the prompt is nearly that of row 1"}
    assert report["length_bias"]["longer_chosen_words"] == 0.75
