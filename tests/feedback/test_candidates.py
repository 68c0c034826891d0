"""Candidates: how they are sampled, scored and chosen from; judges; best-of-n."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer, Pair
from rlhf_core.evaluation import best_of_n_curve
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.trainers import SamplingConfig, best_of_n
from rlhf_core.feedback.judges import JudgeScorer, judged
from rlhf_core.feedback.candidates import Candidates

PROMPTS = [[7 + i % 4, *[3] * (i % 3)] for i in range(10)]


def tiny(cls=Transformer, seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=12,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_positions=32,
        eos_ids=(2,),
        pad_id=0,
    )
    return cls(TransformerConfig(**(sizes | options)))


def fives(prompts, responses):
    return [float(response.count(5)) for response in responses]


def sampled(prompts=PROMPTS, reward=fives, tokenizer=None, model=None, eos_ids=None, **options):
    config = SamplingConfig(**(dict(num_samples=3, response_length=6) | options))
    return best_of_n(
        model or tiny(), prompts, config, reward=reward, tokenizer=tokenizer, eos_ids=eos_ids
    )


def test_every_response_has_a_seed_of_its_own():
    """Neither the batch nor the prompts behind change a response; another seed does, and no two samples are alike."""
    want = sampled()
    for got in (sampled(batch_size=1), sampled(batch_size=4), sampled(seed=0)):
        assert got.responses == want.responses and torch.equal(got.scores, want.scores)
    assert sampled(PROMPTS[:4]).responses == want.responses[:4]
    assert sampled(seed=1).responses != want.responses
    assert len({tuple(ids) for texts in want.responses for ids in texts}) > 20


def test_scores_are_those_of_each_response_to_its_prompt():
    def at(prompts, responses):
        return [100 * prompt[0] + sum(response) for prompt, response in zip(prompts, responses)]

    found = sampled(reward=at)
    want = [
        [100 * prompt[0] + sum(ids) for ids in texts]
        for prompt, texts in zip(PROMPTS, found.responses)
    ]
    assert found.prompts == PROMPTS and found.scores.tolist() == want
    model = tiny(RewardModel, seed=1)
    scores = sampled(reward=model).scores
    rows = [(PROMPTS[b], ids) for b, texts in enumerate(found.responses) for ids in texts]
    alone = [
        model(torch.tensor([p + ids]), torch.ones(1, len(p + ids), dtype=torch.bool)).item()
        for p, ids in rows
    ]
    assert_close(scores.flatten(), torch.tensor(alone), rtol=1e-5, atol=1e-5)


def test_a_callable_reads_strings_where_there_is_a_tokenizer():
    tokenizer, seen = ByteTokenizer(), []
    prompts = [tokenizer.encode_prompt(text) for text in ("ab", "c")]
    reward = lambda prompts, responses: seen.append((prompts, responses)) or [0.0] * len(prompts)  # noqa: E731
    found = sampled(prompts, reward, tokenizer, tiny(vocab_size=259))
    (shown, responses) = seen[0]
    assert shown == ["ab"] * 3 + ["c"] * 3
    assert responses == [tokenizer.decode(ids) for texts in found.responses for ids in texts]


def test_options_of_sampling_reach_the_sampler():
    greedy = sampled(temperature=1e-6).responses
    assert all(texts == [texts[0]] * 3 for texts in greedy)
    assert max(len(ids) for texts in sampled(response_length=9).responses for ids in texts) == 9
    assert all(len(ids) == 1 for texts in sampled(eos_ids=range(12)).responses for ids in texts)


def test_a_prompt_too_long_loses_its_start_and_keeps_its_bos():
    found = sampled([[1, 3, 4, 5, 6, 7]], max_length=10, model=tiny(bos_id=1))
    assert found.prompts == [[1, 5, 6, 7]]
    with pytest.raises(ValueError, match="response_length 6 leaves no prompt of 6 tokens"):
        sampled(max_length=6)
    with pytest.raises(ValueError, match="response_length 32 leaves no prompt of 32 tokens"):
        sampled(response_length=32)


@pytest.mark.parametrize("name", ["num_samples", "response_length", "temperature", "batch_size"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        SamplingConfig(**{name: 0})


def test_the_best_is_the_first_of_the_highest_and_the_pair_is_best_against_worst():
    scores = torch.tensor([[1.0, 3, 3], [2, 2, 2], [0, -1, -1]])
    responses = [[[10 * b + i] for i in range(3)] for b in range(3)]
    found = Candidates([[7], [8], [9]], responses, scores)
    best, best_scores = found.best()
    assert best == [[1], [10], [20]] and best_scores.tolist() == [3, 2, 0]
    assert found.margins().tolist() == [2, 0, 1]
    assert found.pairs() == [Pair([7], [1], [0]), Pair([9], [20], [21])]  # all of the second tie


def test_best_of_n_scores_as_the_curve_of_other_samples_foretells():
    prompts = PROMPTS[:1] * 400
    others = sampled(prompts, num_samples=16, seed=1).scores
    curve = best_of_n_curve(others, others)
    for n in (1, 4, 16):
        scores = sampled(prompts, num_samples=n).best()[1].double()
        assert abs(scores.mean() - curve[n - 1]) < 4 * scores.std() / 20
    assert curve[15] > curve[0] + 1


def test_sampling_for_no_prompts_is_refused():
    with pytest.raises(ValueError, match="there are no prompts to sample responses to"):
        sampled([])


# ---- judges


def longer(prompts, first, second):
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second)]


def test_a_judge_of_two_gives_p_and_one_minus_p():
    score = JudgeScorer(lambda prompts, first, second: [0.75, 0.5, 0.0], 2)
    assert score([[7]] * 6, [[3]] * 6).tolist() == [0.75, 0.25, 0.5, 0.5, 0.0, 1.0]


def test_of_several_each_scores_the_mean_of_its_wins_against_the_others():
    seen = []

    def judge(prompts, first, second):
        seen.extend(zip(prompts, first, second))
        return longer(prompts, first, second)

    responses = [[3], [3, 3], [3, 3, 3], [4, 4], [4, 4], [4]]
    scores = JudgeScorer(judge, 3)([[7]] * 3 + [[8]] * 3, responses)
    assert scores.tolist() == [0, 0.5, 1, 0.75, 0.75, 0]
    assert seen == [([p], responses[i], responses[j]) for p, i, j in
                    [(7, 0, 1), (7, 0, 2), (7, 1, 2), (8, 3, 4), (8, 3, 5), (8, 4, 5)]]  # fmt: skip


def test_a_judge_reads_strings_where_there_is_a_tokenizer():
    def judge(prompts, first, second):
        assert (prompts, first, second) == (["ab"], ["c"], ["d"])
        return [1]

    tokenizer = ByteTokenizer()
    rows = [tokenizer.encode_prompt("ab")], [[*b"c", *tokenizer.eos_ids]], [list(b"d")]
    assert judged(judge, *rows, tokenizer=tokenizer).tolist() == [1]


def test_a_judge_needs_two_responses_to_compare():
    with pytest.raises(
        ValueError, match="num_samples must be at least 2 for a judge to compare, got 1"
    ):
        JudgeScorer(longer, 1)
    for nothing in (lambda: JudgeScorer(longer, 2)([], []), lambda: judged(longer, [], [], [])):
        with pytest.raises(ValueError, match="there are no responses to judge"):
            nothing()


def test_a_judge_that_raises_is_named_with_the_row():
    def judge(prompts, first, second):
        return [1 / (len(a) - len(b)) for a, b in zip(first, second)]

    message = r"the judge raised ZeroDivisionError.*on row 1 alone: prompt \[8\], response \[4\] and \[6\]"
    with pytest.raises(RuntimeError, match=message):
        judged(judge, [[7], [8]], [[3, 3], [4]], [[5], [6]])


@pytest.mark.parametrize(
    "verdict, message",
    [
        ([0.5], r"returned shape \(1,\) for 2 pairs"),
        (
            [0.5, float("nan")],
            r"gives row 1 nan, no probability; prompt \[8\], responses \[\[4\], \[6\]\]",
        ),
        ([1.5, 0.5], r"gives row 0 1.5, no probability; prompt \[7\]"),
        ([0.5, -0.1], "gives row 1 -0.1"),
    ],
    ids=str,
)
def test_a_verdict_that_is_no_probability_is_named_with_its_row(verdict, message):
    with pytest.raises(ValueError, match=message):
        judged(lambda *_: verdict, [[7], [8]], [[3], [4]], [[5], [6]])
