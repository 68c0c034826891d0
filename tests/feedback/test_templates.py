"""Pairs from templates: balanced between users who are right and wrong; padding only adds."""

import random

from rlhf_core.data import Preference
from rlhf_core.data.quality import PairAudit
from rlhf_core.feedback.templates import FACTS, padding_pair, sycophancy_pairs


def test_every_error_and_every_fact_is_claimed_and_answered_by_what_is_right():
    pairs = list(sycophancy_pairs())
    assert len(pairs) == 8 * len(FACTS)
    wrong, right = map(dict.fromkeys, zip(*FACTS))
    assert not wrong.keys() & right.keys()
    for i, pair in enumerate(pairs):
        error, fact = FACTS[i // 8]
        claimed = fact if i % 2 else error
        assert claimed in pair["prompt"]
        assert fact in pair["chosen"] and error not in pair["chosen"].replace(fact, "")
        assert error in pair["rejected"]


def test_neither_agreement_nor_length_tells_chosen_from_rejected():
    audit = PairAudit()
    for pair in sycophancy_pairs():
        audit.add(Preference(**pair))
    report = audit.report()
    assert report["agreement_bias"]["only_chosen"] == report["agreement_bias"]["only_rejected"] > 80
    assert not report["length_bias"]["biased"]
    assert not {"duplicate", "contradiction", "equal", "empty"} & set(report["failed"])


def test_padding_keeps_the_answer_and_depends_on_the_seed_alone():
    pair = padding_pair("q", "The answer.", seed=1)
    assert pair["chosen"] == "The answer." and " The answer. " in pair["rejected"]
    assert len(pair["rejected"]) > 100
    random.seed(9)
    assert padding_pair("q", "The answer.", seed=1) == pair != padding_pair("q", "The answer.", 2)


def test_the_last_message_of_a_conversation_is_padded():
    turns = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    pair = padding_pair([{"role": "user", "content": "q"}], turns, seed=0)
    assert pair["chosen"] == turns and pair["rejected"][:2] == turns[:2]
    assert " c " in pair["rejected"][2]["content"]
