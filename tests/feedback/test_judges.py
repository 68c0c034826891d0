"""Judges: probabilities of pairs become scores; a bad verdict is an error with its row."""

import pytest
from helpers import PROMPTS, tiny

from rlhf_core.data import ByteTokenizer, Prompt
from rlhf_core.feedback.judges import JudgeScorer, RewardJudge, judged
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.models import RewardModel
from rlhf_core.trainers import (
    IteratedDPOConfig,
    IteratedRLHFConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    RFTConfig,
    SamplingConfig,
    iterated_dpo,
    iterated_rlhf,
    rft,
)


def longer(prompts, first, second):
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second)]


def test_two_responses_score_p_and_1_minus_p():
    score = JudgeScorer(lambda prompts, first, second: [0.75, 0.5, 0.0], 2)
    responses = [[3], [4], [3], [5], [3], [6]]
    assert score([[7]] * 6, responses).tolist() == [0.75, 0.25, 0.5, 0.5, 0.0, 1.0]


def test_each_of_several_responses_scores_its_mean_probability_of_winning():
    """The judge sees each pair once, in the order of sampling."""
    seen = []

    def judge(prompts, first, second):
        seen.extend(zip(prompts, first, second))
        return longer(prompts, first, second)

    responses = [[3], [3, 3], [3, 3, 3], [4, 4], [5, 4], [4]]
    scores = JudgeScorer(judge, 3)([[7]] * 3 + [[8]] * 3, responses)
    assert scores.tolist() == [0, 0.5, 1, 0.75, 0.75, 0]
    pairs = [(7, 0, 1), (7, 0, 2), (7, 1, 2), (8, 3, 4), (8, 3, 5), (8, 4, 5)]
    assert seen == [([prompt], responses[i], responses[j]) for prompt, i, j in pairs]


def test_equal_responses_tie_without_the_judge_and_equal_rows_are_judged_once():
    seen = []

    def judge(prompts, first, second):
        seen.extend(zip(prompts, first, second))
        return [1.0] * len(prompts)

    first, second = [[3], [4], [3], [3]], [[3], [5], [4], [4]]
    assert judged(judge, [[7]] * 4, first, second).tolist() == [0.5, 1, 1, 1]
    assert seen == [([7], [4], [5]), ([7], [3], [4])]


def test_a_judge_gets_strings_with_a_tokenizer():
    def judge(prompts, first, second):
        assert (prompts, first, second) == (["ab"], ["c"], ["d"])
        return [1]

    tokenizer = ByteTokenizer()
    rows = [tokenizer.encode_prompt("ab")], [[*b"c", *tokenizer.eos_ids]], [list(b"d")]
    assert judged(judge, *rows, tokenizer=tokenizer).tolist() == [1]


def test_a_judge_sees_the_columns_that_its_parameters_name():
    seen = []

    def judge(prompts, first, second, answer):
        seen.extend(zip(first, second, answer))
        return [float(one == [right]) for one, right in zip(first, answer)]

    prompts = [Prompt([7], answer=3, other=1)] * 2 + [Prompt([7], answer=4, other=1)] * 2
    assert JudgeScorer(judge, 2)(prompts, [[3], [4], [3], [4]]).tolist() == [1, 0, 0, 1]
    assert seen == [([3], [4], 3), ([3], [4], 4)]
    with pytest.raises(ValueError, match=r"parameter 'answer', .* their columns: other"):
        JudgeScorer(judge, 2).check_columns([Prompt([7], other=1)])


@pytest.mark.parametrize("method", ["online", "iterated", "rlhf", "rejection"])
def test_every_method_on_candidates_gives_judge_or_reward_the_columns_of_its_prompts(method):
    calls, sizes = [], dict(batch_size=4, response_length=6)
    prompts = [Prompt(ids, total=sum(ids)) for ids in PROMPTS]

    def judge(prompts, first, second, total):
        calls.append(total == [sum(ids) for ids in prompts])
        return longer(prompts, first, second)

    def reward(prompts, responses, total):
        calls.append(total == [sum(ids) for ids in prompts])
        return [float(len(response)) for response in responses]

    if method == "online":
        OnlineDPOTrainer(tiny(), prompts, OnlineDPOConfig(**sizes), judge=judge).train()
    elif method == "iterated":
        iterated_dpo(tiny(), prompts, IteratedDPOConfig(rounds=1, **sizes), judge=judge)
    elif method == "rejection":
        rft(tiny(), prompts, RFTConfig(num_samples=2, **sizes), reward=reward)
    else:
        sampling, ppo = SamplingConfig(num_samples=2, **sizes), PPOConfig(**sizes)
        config = IteratedRLHFConfig(rounds=1, sampling=sampling, ppo=ppo)
        iterated_rlhf(tiny(), prompts, config, judge=judge, eval_prompts=prompts[:3])
    assert len(calls) >= 2 and all(calls)


def test_a_judge_needs_two_responses_to_compare():
    message = "a judge compares responses: num_samples must be >= 2, got 1"
    with pytest.raises(ValueError, match=message):
        JudgeScorer(longer, 1)
    for nothing in (lambda: JudgeScorer(longer, 2)([], []), lambda: judged(longer, [], [], [])):
        with pytest.raises(ValueError, match="there are no responses to judge"):
            nothing()


def test_a_judge_that_raises_is_reported_with_the_row():
    def judge(prompts, first, second):
        return [1 / (len(a) - len(b)) for a, b in zip(first, second)]

    message = r"raised ZeroDivisionError.*on row 1 alone: prompt \[8\], response \[4\] and \[6\]"
    with pytest.raises(RuntimeError, match=message):
        judged(judge, [[7], [8]], [[3, 3], [4]], [[5], [6]])


@pytest.mark.parametrize(
    "verdict, message",
    [
        ([0.5], r"returned shape \(1,\) for 2 pairs"),
        (
            [0.5, 1.5],
            r"returned 1\.5.*, not a probability.* prompt \[8\].* responses \[\[4\], \[6\]\]",
        ),
        (["A", "B"], "the judge returned \\['A', 'B'\\]"),
        ([0.5, -0.1], r"returned -0\.1.*, not a probability.* prompt \[8\]"),
    ],
    ids=str,
)
def test_a_verdict_that_is_not_a_probability_is_reported_with_its_row(verdict, message):
    with pytest.raises(ValueError, match=message):
        judged(lambda *_: verdict, [[7], [8]], [[3], [4]], [[5], [6]])


def test_a_reward_as_judge_prefers_the_higher_one_and_reads_ids_and_columns():
    def matches(prompts, responses, wanted):
        return [float(response.count(x)) for response, x in zip(responses, wanted)]

    judge = RewardJudge(Scorer(matches))
    prompts = [Prompt([1], wanted=5), Prompt([2], wanted=6), Prompt([3], wanted=5)]
    first, second = [[5, 5], [5], [7]], [[5], [6], [8]]
    for tokenizer in (None, ByteTokenizer()):
        wins = judged(judge, prompts, first, second, tokenizer=tokenizer)
        assert wins.tolist() == [1, 0, 0.5]
    described = JudgeScorer(judge, 2).describe()["judge"]
    assert described == Scorer(matches).describe()
    model = tiny(RewardModel)
    assert JudgeScorer(RewardJudge(Scorer(model)), 2).models == [model]


@pytest.mark.parametrize("failure", [None, float("nan")])
@pytest.mark.filterwarnings("ignore:.* comparisons by the judge failed")
def test_a_failed_comparison_is_left_out_of_a_responses_mean(failure):
    """Of 3 responses' pairs 01, 02 and 12, the first fails; of the second prompt's, all do."""
    verdicts = [failure, 1.0, 0.25, failure, failure, failure]
    scores = JudgeScorer(lambda *_: verdicts, 3)(
        [[7]] * 3 + [[8]] * 3, [[3], [4], [5], [3], [4], [5]]
    )
    assert scores.nan_to_num(-1).tolist() == [1, 0.25, 0.375, -1, -1, -1]


def test_failed_comparisons_are_counted():
    with pytest.warns(UserWarning, match="1 of 2 comparisons by the judge failed and are left out"):
        judged(lambda *_: [None, 1], [[7], [8]], [[3], [3]], [[4], [4]])
