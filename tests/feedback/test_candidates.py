"""Candidates: how they are sampled, scored and chosen from; best-of-n."""

import pytest
import torch
from helpers import fives, tiny
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer, Pair, Prompt
from rlhf_core.data.store import ExampleStore, store
from rlhf_core.evaluation import best_of_n_curve
from rlhf_core.feedback.candidates import Candidates, fit_prompts
from rlhf_core.models import RewardModel
from rlhf_core.trainers import SamplingConfig, best_of_n

PROMPTS = [[7 + i % 4, *[3] * (i % 3)] for i in range(10)]


def sampled(prompts=PROMPTS, reward=fives, tokenizer=None, model=None, eos_ids=None, **options):
    config = SamplingConfig(**(dict(num_samples=3, response_length=6) | options))
    return best_of_n(
        model or tiny(), prompts, config, reward=reward, tokenizer=tokenizer, eos_ids=eos_ids
    )


def test_every_response_has_its_own_seed():
    """Neither batch_size nor later prompts change a response; another seed does."""
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


def test_a_callable_gets_strings_with_a_tokenizer():
    tokenizer, seen = ByteTokenizer(), []
    prompts = [tokenizer.encode_prompt(text) for text in ("ab", "c")]

    def reward(prompts, responses):
        seen.append((prompts, responses))
        return [0.0] * len(prompts)

    found = sampled(prompts, reward, tokenizer, tiny(vocab_size=259))
    (shown, responses) = seen[0]
    assert shown == ["ab"] * 3 + ["c"] * 3
    assert responses == [tokenizer.decode(ids) for texts in found.responses for ids in texts]


def test_options_of_sampling_reach_the_sampler():
    greedy = sampled(temperature=1e-6).responses
    assert all(texts == [texts[0]] * 3 for texts in greedy)
    assert max(len(ids) for texts in sampled(response_length=9).responses for ids in texts) == 9
    assert all(len(ids) == 1 for texts in sampled(eos_ids=range(12)).responses for ids in texts)


def test_a_response_must_leave_room_for_a_prompt():
    with pytest.raises(ValueError, match="response_length 6 leaves no room for a prompt"):
        sampled(max_length=6)
    with pytest.raises(ValueError, match="response_length 32 leaves no room for a prompt"):
        sampled(response_length=32)


@pytest.mark.parametrize("name", ["num_samples", "response_length", "temperature", "batch_size"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        SamplingConfig(**{name: 0})


def test_the_best_is_the_first_of_the_highest_and_a_pair_is_best_against_worst():
    scores = torch.tensor([[1.0, 3, 3], [2, 2, 2], [0, -1, -1]])
    responses = [[[10 * b + i] for i in range(3)] for b in range(3)]
    found = Candidates([[7], [8], [9]], responses, scores)
    best, best_scores = found.best()
    assert best == [[1], [10], [20]] and best_scores.tolist() == [3, 2, 0]
    assert found.margins().tolist() == [2, 0, 1]
    assert found.pairs() == [Pair([7], [1], [0]), Pair([9], [20], [21])]  # all of the second tie


def test_best_of_n_scores_as_the_curve_of_other_samples_predicts():
    prompts = PROMPTS[:1] * 400
    others = sampled(prompts, num_samples=16, seed=1).scores
    curve = best_of_n_curve(others, others)
    for n in (1, 4, 16):
        scores = sampled(prompts, num_samples=n).best()[1].double()
        assert abs(scores.mean() - curve[n - 1]) < 4 * scores.std() / 20
    assert curve[15] > curve[0] + 1


def test_a_call_without_prompts_is_refused():
    with pytest.raises(ValueError, match="there are no prompts to sample responses to"):
        sampled([])


def test_equal_responses_are_no_pair_whatever_they_score():
    """Neither chance in a reward nor the last bit of a score makes a preference."""
    equal = [[5, 2], [5, 2]]
    ulp = 1 + 2**-23
    scores = torch.tensor([[0.1, 0.9], [1.0, ulp], [1000.0, 1000.0005], [0.0, 1e-9]])
    found = Candidates([[7]] * 4, [equal, [[5], [6]], [[5], [6]], [[5], [6]]], scores)
    assert found.margins()[1:3].tolist() == [0, 0] and found.margins()[3] > 0
    calls = []

    def chance(prompts, responses):
        calls.append(list(responses))
        return [len(calls) + i for i, _ in enumerate(responses)]

    model = tiny(max_positions=32)
    greedy = sampled([[7], [8]], chance, model=model, num_samples=4, temperature=1e-4)
    assert not greedy.pairs() and not greedy.margins().any()
    for responses in calls:
        assert len(set(map(tuple, responses))) == len(responses)


@pytest.mark.parametrize("mode", ["drop", "truncate", "error"])
def test_prompts_without_room_are_dropped_cut_or_refused_and_counted(mode):
    prompts = [[7, 8], [1, 3, 4, 5, 6, 7], [9], [1, 4, 5, 6, 7, 8, 9]]
    options = dict(max_length=10, model=tiny(bos_id=1), on_long_prompt=mode)
    message = "2 of 4 prompts have more than 4 tokens; the longest is prompt 3 with 7"
    if mode == "error":
        with pytest.raises(ValueError, match=message):
            sampled(prompts, **options)
        return
    with pytest.warns(UserWarning, match=message):
        found = sampled(prompts, **options)
    cut = [[1, 5, 6, 7], [1, 7, 8, 9]]
    assert found.prompts == ([[7, 8], [9]] if mode == "drop" else [[7, 8], cut[0], [9], cut[1]])


def test_prompts_that_are_all_too_long_are_refused():
    with pytest.raises(ValueError, match="2 of 2 prompts have more than 4 tokens"):
        sampled([[7] * 5, [8] * 6], max_length=10)


def test_a_judges_failures_are_not_the_best_nor_the_worst():
    nan = float("nan")
    scores = torch.tensor([[nan, 0.2, 0.8], [nan, nan, nan], [0.5, nan, 0.5]])
    found = Candidates([[1], [2], [3]], [[[4], [5], [6]]] * 3, scores)
    assert found.pairs() == [Pair([1], [6], [5])]
    assert found.best()[0][0] == [6]
    assert_close(found.margins(), torch.tensor([0.6, nan, 0.0]), equal_nan=True)


def test_best_of_n_by_a_judge_takes_the_response_that_wins_most():
    def longer(prompts, first, second):
        return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second)]

    config = SamplingConfig(num_samples=3, response_length=6)
    found = best_of_n(tiny(), PROMPTS, config, judge=longer)
    for best, responses in zip(found.best()[0], found.responses):
        assert len(best) == max(map(len, responses))
    with pytest.raises(ValueError, match="pass either a reward or a judge"):
        best_of_n(tiny(), PROMPTS, config)


@pytest.mark.filterwarnings("ignore:.*prompts have more than")
@pytest.mark.parametrize("mode", ["drop", "truncate"])
@pytest.mark.parametrize("columns", [[{}], [{"a": 1}], [{"a": 1}, {}, {"b": 2, "a": 3}]])
def test_a_store_of_prompts_is_fitted_as_a_list_is(mode, columns):
    rows = [Prompt([1, *[5] * (i % 7)], **columns[i % len(columns)]) for i in range(700)]
    config = SamplingConfig(on_long_prompt=mode)
    want, found = (fit_prompts(x, 5, 1, config) for x in (rows, store(rows)))
    assert isinstance(found.prompts, ExampleStore) and found.places == want.places
    assert list(map(repr, found.prompts)) == list(map(repr, want.prompts))
    assert len(found.places) == (500 if mode == "drop" else 700)
    assert max(map(len, found.prompts)) == 5 and all(x[0] == 1 for x in found.prompts)
