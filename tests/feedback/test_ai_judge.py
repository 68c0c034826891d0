"""AI judges: soft labels over both orders and principles; failures and position bias are apart."""

import math
import threading

import pytest
import torch
from helpers import tiny

from rlhf_core.data import ByteTokenizer, encode_prompt
from rlhf_core.feedback.ai_judge import AIJudge
from rlhf_core.feedback.candidates import Candidates
from rlhf_core.feedback.endpoint import Endpoint, JudgeError
from rlhf_core.feedback.judges import JudgeScorer, judged, judged_in_both_orders


@pytest.fixture
def cai(expected):
    return expected["cai_soft_labels"]


def judge_of(server, **options):
    return AIJudge(Endpoint(server.url, sleep=lambda _: None, retries=1), threads=1, **options)


def logprob_reply(*logprobs):
    top = [{"token": name, "logprob": x} for name, x in zip("AB", logprobs)]
    row = {"token": "A", "logprob": logprobs[0], "top_logprobs": top}
    return {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [row]}}]}


def soft(p):
    return logprob_reply(math.log(p), math.log(1 - p))


@pytest.mark.parametrize("clamp, label", [(None, "p_first"), ((0.4, 0.6), "clamped_40_60")])
def test_soft_labels_are_the_options_shares_clamped_if_asked(cai, judge_server, clamp, label):
    server = judge_server([logprob_reply(*row) for row in cai["logprobs_of_(A),(B)"]])
    judge = judge_of(server, both_orders=False, clamp=clamp)
    wins = judge([*"pqrs"], [*"aaaa"], [*"bbbb"])
    assert wins == pytest.approx(cai[label], abs=1e-12)


def test_both_orders_are_averaged_and_contradiction_ties(cai, judge_server):
    rows = cai["both_orders"]
    orders = zip(rows["first_order_p(A=x)"], rows["swapped_p(A=y)"])
    server = judge_server([soft(p) for order in orders for p in order])
    judge = judge_of(server)
    assert judge([*"pqr"], [*"xxx"], [*"yyy"]) == pytest.approx(rows["mean_p_x"], abs=1e-12)
    assert judge.counts == {"asked": 3, "failed": 0, "inconsistent": 1}


def test_principles_are_averaged(judge_server):
    server = judge_server([soft(p) for p in (0.9, 0.7, 0.4, 0.2)])
    assert judge_of(server, principles=["one?", "two?"])(["p"], ["x"], ["y"]) == pytest.approx(
        [(0.8 + 1 - 0.3) / 2]
    )
    texts = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert ["one?" in text for text in texts] == [True, False, True, False]
    assert [text.index("x\n") < text.index("y\n") for text in texts] == [True, True, False, False]


def test_equal_answers_tie_without_a_question(judge_server):
    server = judge_server([])
    assert judge_of(server)(["p"], ["x"], ["x"]) == [0.5] and not server.requests


def test_always_a_is_position_bias_and_makes_no_pairs(judge_server):
    server = judge_server(["A"] * 40)
    judge = judge_of(server)
    scorer = JudgeScorer(judge, 2, ByteTokenizer())
    prompts = [[i] for i in range(20) for _ in range(2)]
    with pytest.warns(UserWarning, match="position bias: in 20 of 20 comparisons"):
        scores = scorer(prompts, [[97], [98]] * 20).view(-1, 2)
    assert not Candidates(prompts[::2], [[[97], [98]]] * 20, scores).pairs()


def test_a_failure_is_neither_tie_nor_loss(judge_server):
    """Of three comparisons the second fails: its reply is no verdict."""
    server = judge_server(["A", "B", "I refuse", "A", "B"])
    judge, tokenizer = judge_of(server), ByteTokenizer()
    prompts = [[i] for i in (1, 2, 3) for _ in range(2)]
    responses = [[97], [98]] * 3
    with pytest.warns(UserWarning, match="1 of 3 comparisons by the judge failed"):
        scores = JudgeScorer(judge, 2, tokenizer)(prompts, responses).view(-1, 2)
    assert scores.nan_to_num(-1).tolist() == [[1, 0], [-1, -1], [1, 0]]
    assert judge.counts == {"asked": 3, "failed": 1, "inconsistent": 0}
    found = Candidates([[1], [2], [3]], [[[97], [98]]] * 3, scores)
    assert [pair.prompt_ids for pair in found.pairs()] == [[1], [3]]
    assert found.margins().nan_to_num(-1).tolist() == [1, -1, 1]


@pytest.mark.filterwarnings("ignore:the judge failed in 1 of 20")
def test_too_many_failures_stop_the_run_and_it_goes_on_from_the_cache(judge_server, tmp_path):
    def judge(**options):
        asked = Endpoint(server.url, cache=tmp_path, retries=0)
        return AIJudge(asked, threads=1, both_orders=False, **options)

    rows = [[str(i) for i in range(30)], ["x"] * 30, ["y"] * 30]
    server = judge_server([*["A"] * 10, 500, *["A"] * 10, 500])
    message = r"failed in 2 of 22 comparisons, more than max_failures 0.05.*status 500.*continue"
    with pytest.raises(JudgeError, match=message):
        judge()(*rows)
    server.replies, before = ["A"] * 10, len(server.requests)
    assert judge()(*rows) == [1] * 30
    assert len(server.requests) - before == 10  # of 30, for 20 are in the cache
    server = judge_server([500])
    with pytest.raises(JudgeError, match="failed in 1 of 1"):
        judge(max_failures=0)(["new"], ["x"], ["y"])


def test_a_judge_that_stops_is_not_asked_row_by_row(judge_server):
    server = judge_server([401, "A", "A"])
    with pytest.raises(JudgeError, match="status 401"):
        judged(judge_of(server), ["p", "q"], ["x", "x"], ["y", "y"])
    assert len(server.requests) == 1


def test_requests_run_side_by_side_and_answers_stay_in_order(judge_server):
    """The server answers no request before four have arrived."""
    barrier = threading.Barrier(4, timeout=10)

    def reply(body):
        barrier.wait()
        return "A" if "Answer (A):\nlong" in body["messages"][0]["content"] else "B"

    server = judge_server(reply)
    judge = AIJudge(server.url, threads=4)
    rows = [[*"pqrs"], ["long", "x", "long", "x"], ["x", "long", "y", "long"]]
    assert judge(*rows) == [1, 0, 1, 0]


def test_a_judge_of_both_orders_is_not_asked_twice(judge_server):
    server = judge_server(["A", "B"])
    assert judged_in_both_orders(judge_of(server), ["p"], ["x"], ["y"]).tolist() == [1]
    assert len(server.requests) == 2
    assert judged_in_both_orders(lambda *rows: [0.75], ["p"], ["x"], ["y"]).tolist() == [0.5]


# ---- our own model


def test_our_own_models_label_is_the_share_of_the_options_log_probs():
    tokenizer = ByteTokenizer()
    model = tiny(vocab_size=259, max_positions=512, eos_ids=tokenizer.eos_ids)
    judge = AIJudge(model, ["Which is better?"], tokenizer=tokenizer, both_orders=False)
    (win,) = judge(["p"], ["x"], ["y"])
    (question,) = judge._questions(("p", "x", "y"))
    prompt = encode_prompt(question + "\nThe better answer is", tokenizer)
    logps = []
    for option in (" (A)", " (B)"):
        ids = tokenizer.encode(option)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + ids])).log_softmax(-1)[0]
        logps.append(sum(logprobs[len(prompt) - 1 + i, x] for i, x in enumerate(ids)))
    assert win == pytest.approx(torch.stack(logps).softmax(0)[0].item(), abs=1e-5)
    both = AIJudge(model, tokenizer=tokenizer)
    forward, backward = both(["p", "p"], ["x", "y"], ["y", "x"])
    assert forward == pytest.approx(1 - backward)
    assert both.models == [model] and JudgeScorer(both, 2).models == [model]


def test_a_question_that_does_not_fit_is_a_failure():
    model = tiny(vocab_size=259, max_positions=64)
    judge = AIJudge(model, tokenizer=ByteTokenizer(), max_failures=1)
    assert math.isnan(judge(["p"], ["x"], ["y"])[0])
    with pytest.raises(JudgeError, match=r"the question has \d+ tokens, the judge 64 positions"):
        AIJudge(model, tokenizer=ByteTokenizer(), max_failures=0)(["p"], ["x"], ["y"])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="a model as judge needs its tokenizer"):
        AIJudge(tiny())
    for options, message in (
        (dict(clamp=(0.6, 0.4)), "clamp must be a range around 0.5"),
        (dict(principles=[]), "principles must be a list of texts"),
        (dict(max_failures=2), "max_failures must be a share"),
    ):
        with pytest.raises(ValueError, match=message):
            AIJudge("http://localhost:1", **options)
    with pytest.raises(TypeError, match="AIJudge reads text"):
        AIJudge("http://localhost:1")([[1]], [[2]], [[3]])
