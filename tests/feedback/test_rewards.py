"""Every kind of reward becomes numbers; a bad reward is an error with its row."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Letters, make_ppo, tiny
from torch.testing import assert_close

from rlhf_core.data import Prompt
from rlhf_core.feedback.rewards import columns_for
from rlhf_core.models import EnsembleReward, RewardModel, packed_attention
from rlhf_core.trainers import GRPOConfig, GRPOTrainer, SamplingConfig, Scorer, best_of_n

PROMPTS, RESPONSES = [[4, 5], [6], [7, 8, 9]], [[5, 2], [5, 6, 5, 2], [3]]


def model(seed=1):
    return RewardModel.from_model(tiny(seed=seed))


def alone(reward):
    """A reward model's scores, a row at a time."""
    rows = (torch.tensor([p + r]) for p, r in zip(PROMPTS, RESPONSES))
    return torch.cat([reward(row, torch.ones_like(row, dtype=torch.bool)) for row in rows]).detach()


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_reward_model_scores_whole_sequences(batch_size):
    """Row 10: at the last token, although 2 and 3 end sequences."""
    assert_close(Scorer(model(), batch_size=batch_size)(PROMPTS, RESPONSES), alone(model()))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_packed_rows_score_the_same_with_fewer_tokens(batch_size, monkeypatch):
    """Responses to one prompt share it."""
    for name in ("CALL", "MASK"):  # small rows are packed as well
        monkeypatch.setattr(packed_attention, name, 0)
    reward, prompts = model(), [[4, 5, 6, 7]] * 2 + [[8]]
    computed, forward = [], reward.trunk.forward
    monkeypatch.setattr(
        reward.trunk, "forward", lambda ids, *a, **k: computed.append(ids) or forward(ids, *a, **k)
    )
    found = Scorer(reward, batch_size=batch_size)(prompts, RESPONSES)
    assert sum(ids.numel() for ids in computed) == 12
    rows = [torch.tensor([p + r]) for p, r in zip(prompts, RESPONSES)]
    want = [reward(row, torch.ones_like(row, dtype=torch.bool)) for row in rows]
    assert_close(found, torch.cat(want).detach())


@pytest.mark.parametrize("batch_size", [None, 2])
def test_scores_by_each_criterion_come_with_the_rewards(batch_size):
    reward, prompts = model(), [*PROMPTS, PROMPTS[0]]
    reward.set_criteria({"helpful": 1.0, "harmless": 2.0})
    reward.score.weight.data[1] += torch.randn(len(reward.score.weight[1]))
    scorer = Scorer([(reward, 0.5)], batch_size=batch_size)
    total, each = scorer.rewards_and_criteria(prompts, [*RESPONSES, RESPONSES[0]])
    assert list(each) == ["helpful", "harmless"] and each["helpful"].shape == (4,)
    assert_close(total, 0.5 * (each["helpful"] + 2 * each["harmless"]))
    reward.set_criteria({"helpful": 1.0, "harmless": 0.0})
    assert_close(each["helpful"][:3], alone(reward))
    both = Scorer([(reward, 1), (reward, 1), (model(), 1)])
    _, each = both.rewards_and_criteria(PROMPTS, RESPONSES)
    assert list(each) == [f"{i}/{name}" for i in (0, 1) for name in reward.criteria]


def test_an_ensemble_of_models_of_criteria_combines_their_weighted_sums():
    models = [model(1), model(2)]
    for one in models:
        one.set_criteria({"helpful": 1.0, "harmless": 2.0})
    each = torch.stack([alone(m) for m in models])
    scorer = Scorer(EnsembleReward(models, "worst"))
    assert_close(scorer(PROMPTS, RESPONSES), each.amin(dim=0))
    assert_close(scorer.spread(PROMPTS, RESPONSES), each.std(dim=0))


def test_an_ensemble_scores_as_its_aggregate_does():
    models = [model(1), model(2), model(3)]
    each = torch.stack([alone(m) for m in models])
    assert_close(Scorer(EnsembleReward(models, "worst"))(PROMPTS, RESPONSES), each.amin(dim=0))
    assert_close(Scorer(EnsembleReward(models))(PROMPTS, RESPONSES), each.mean(dim=0))


@pytest.mark.parametrize(
    "rewards, message",
    [
        ([len, len], r"several rewards must be \(reward, weight\) pairs, got"),
        ((len, 1.0), r"several rewards must be \(reward, weight\) pairs, got"),
        ([(len, "1")], "a reward's weight must be a finite number, got '1'"),
        ([(len, math.nan)], "a reward's weight must be a finite number, got nan"),
        ([], "the list of rewards is empty"),
    ],
)
def test_several_rewards_need_their_weights(rewards, message):
    with pytest.raises(ValueError, match=message):
        Scorer(rewards)


def test_several_rewards_add_up_by_their_weights_also_those_of_tokens():
    def count(prompts, responses):
        return [float(len(response)) for response in responses]

    def each(prompts, responses):
        return [[float(token == 5) for token in response] for response in responses]

    scorer = Scorer([(model(), 2.0), (count, -0.5), (each, 10.0)])
    rewards = scorer.rewards_of(PROMPTS, RESPONSES)
    ends = 2 * alone(model()) - 0.5 * torch.tensor([2.0, 4.0, 1.0])
    want = torch.tensor([[10.0, ends[0], 0, 0], [10.0, 0, 10.0, ends[1]], [ends[2], 0, 0, 0]])
    assert_close(rewards, want)
    assert_close(scorer(PROMPTS, RESPONSES), want.sum(dim=1))
    assert Scorer([(count, 1.0)]).rewards_of(PROMPTS, RESPONSES).tolist() == [2.0, 4.0, 1.0]


class Lines(Letters):
    """Token 6 is the end of a line."""

    eos_ids = (2, 3)

    def decode(self, ids):
        return "".join("\n" if i == 6 else super(Lines, self).decode([i]) for i in ids)


def test_the_end_of_a_step_earns_the_log_of_its_probability():
    """A response then scores the log of the probability that all of its steps are right.

    An end after a newline, a blank line and a truncated step, which training never shows, earn 0.
    """
    reward, responses = (
        model(),
        [[5, 2], [5, 6, 5, 2], [3], [5, 6, 2], [5, 6, 5], [6, 7, 6, 6, 8, 3], [9]],
    )
    prompts, reward.of_steps = (PROMPTS * 3)[:7], True
    scorer = Scorer(reward, tokenizer=Lines(), of_steps=True)
    want = torch.zeros(7, 6)
    for row, step in ((0, 1), (1, 1), (1, 3), (3, 1), (4, 1), (5, 2), (5, 5)):
        ids = torch.tensor([prompts[row] + responses[row][: step + 1]])
        want[row, step] = F.logsigmoid(reward(ids, torch.ones_like(ids, dtype=torch.bool)))[
            0
        ].detach()
    assert_close(scorer.rewards_of(prompts, responses), want)
    assert (want <= 0).all() and (want < 0).sum() == 7
    assert scorer.rewards_of([[4], [5]], [[5, 7], [3]]).tolist() == [[0, 0], [0, 0]]


def test_a_callable_gets_the_texts_or_the_ids():
    """Row 35."""
    calls = []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return torch.ones(3, dtype=torch.bfloat16)

    for tokenizer in (None, Letters()):
        assert Scorer(reward, tokenizer=tokenizer)(PROMPTS, RESPONSES).tolist() == [1.0, 1.0, 1.0]
    assert calls[0] == (PROMPTS, RESPONSES)
    assert calls[1] == (["ef", "g", "hij"], ["f", "fgf", ""])


@pytest.mark.parametrize(
    "returned, message",
    [
        (
            [1.0, math.nan, 1.0],
            r"the reward of row 1 is nan; prompt \[6\], response \[5, 6, 5, 2\]",
        ),
        (
            [[1.0, 2.0], [1.0, 1.0, math.inf, 1.0], [0.0]],
            r"the reward of row 1 is inf; prompt \[6\]",
        ),
        ([1.0, 2.0], "the reward returned 2 rows for 3 responses"),
        (
            [[1.0, 2.0], [1.0, 2.0], [0.0]],
            r"the reward of row 1 has shape \(2,\), but the response has 4 tokens",
        ),
        ([1.0, "good", 2.0], r"the reward returned \[1.0, 'good', 2.0\]: "),
        (None, "the reward returned None: "),
    ],
)
def test_a_bad_reward_is_reported_with_its_row(returned, message):
    """Row 35."""
    with pytest.raises(ValueError, match=message):
        Scorer(lambda prompts, responses: returned)(PROMPTS, RESPONSES)


def test_a_callable_that_raises_is_reported_with_its_row():
    """Row 35: the error names the first row that raises alone, or says that none does."""

    def on_the_third(prompts, responses):
        if [7, 8, 9] in prompts:
            raise KeyError("seven")
        return [0.0] * len(prompts)

    with pytest.raises(
        RuntimeError,
        match=r"KeyError\('seven'\); it also raises on row 2 alone: prompt \[7, 8, 9\]",
    ):
        Scorer(on_the_third)(PROMPTS, RESPONSES)

    def on_several(prompts, responses):
        assert len(prompts) == 1, "too many"
        return [0.0]

    with pytest.raises(RuntimeError, match="it raises on all 3 rows together, on no row alone"):
        Scorer(on_several)(PROMPTS, RESPONSES)


def test_a_reward_model_with_a_nan_weight_is_reported():
    reward = model()
    reward.score.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"the reward of row 0 is nan; prompt \[4, 5\]"):
        Scorer(reward)(PROMPTS, RESPONSES)


def test_scores_of_steps_and_of_responses_cannot_replace_each_other():
    process = model(2)
    process.of_steps = True
    for reward, of_steps, message in (
        (
            [(model(), 1.0), (process, 1.0)],
            False,
            "reward model 1 scores steps: it needs process_rewards",
        ),
        (
            [(process, 1.0), (model(), 1.0)],
            True,
            "reward model 1 scores whole responses: process_rewards needs a model",
        ),
        (EnsembleReward([process, process]), False, "reward model 0 scores steps"),
        (RewardModel.from_model(process), False, "reward model 0 scores steps"),
    ):
        with pytest.raises(ValueError, match=message):
            Scorer(reward, tokenizer=Lines(), of_steps=of_steps)
    with pytest.raises(
        ValueError, match=r"reward models \[1\] of the ensemble score steps, the others responses"
    ):
        EnsembleReward([model(), process])


def test_a_reward_model_of_another_vocabulary_is_refused():
    policy = tiny()
    other = RewardModel.from_model(tiny(vocab_size=policy.config.vocab_size + 1))
    sizes = "the policy has 12 tokens, but reward model 1 has 13: they must share a tokenizer"
    rewards = [(model(), 1.0), (other, 1.0)]
    with pytest.raises(ValueError, match=sizes):
        Scorer(rewards).check_vocabulary(policy)
    with pytest.raises(ValueError, match=sizes):
        GRPOTrainer(policy, PROMPTS, GRPOConfig(response_length=4), reward=rewards)
    with pytest.raises(ValueError, match="reward model 0"):
        best_of_n(
            policy,
            PROMPTS,
            SamplingConfig(response_length=4),
            reward=EnsembleReward([other, other]),
        )
    Scorer([(model(), 1.0), (lambda prompts, responses: [0.0], 1.0)]).check_vocabulary(policy)


def test_rewards_of_steps_need_reward_models_and_a_tokenizer():
    for arguments in (dict(reward=model()), dict(reward=lambda p, r: [0.0], tokenizer=Lines())):
        with pytest.raises(ValueError, match="rewards of steps need a tokenizer"):
            Scorer(**arguments, of_steps=True)


def test_equal_rows_are_scored_once():
    """So neither rounding nor chance makes a difference between equal responses."""
    calls = []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return list(range(len(prompts)))

    prompts, responses = [[4], [6], [4], [4], [6]], [[5], [5], [5], [7], [5]]
    assert Scorer(reward)(prompts, responses).tolist() == [0, 1, 0, 2, 1]
    assert calls == [([[4], [6], [4]], [[5], [5], [7]])]
    scores = Scorer(model(), batch_size=2)(prompts, responses)
    assert scores[0] == scores[2] and scores[1] == scores[4] and len(scores.unique()) == 3


# ---- columns of the prompts' rows


def with_sums(prompts):
    """The prompts with their sum and first token as columns."""
    return [Prompt(ids, total=sum(ids), first=ids[0], responses="kept out") for ids in prompts]


def matches(prompts, responses, total, *, first=None, other="default"):
    """A reward that also checks that its columns belong to its prompts."""
    assert total == [sum(ids) for ids in prompts] and first == [ids[0] for ids in prompts]
    assert other == "default"
    return [float(len(response)) for response in responses]


MIXED = [[5, 3, 7, 4], [8, 1], [6], [9] * 30, [4, 4], [8, 1]]  # one too long, two equal


def test_rewards_see_the_columns_that_their_parameters_name_in_every_order_of_prompts():
    """Also with several samples, repeated rows, shuffled and dropped prompts."""
    options = dict(num_samples=3, batch_size=2, response_length=4)
    policy, prompts = tiny(), with_sums(MIXED)
    with pytest.warns(UserWarning, match="1 of 6 prompts"):
        GRPOTrainer(policy, prompts, GRPOConfig(epochs=2, **options), reward=matches).train()
    with pytest.warns(UserWarning, match="1 of 6 prompts"):
        best_of_n(policy, prompts, SamplingConfig(**options), reward=matches)
    scorer = Scorer([(matches, 1.0), (lambda prompts, responses: [0.0] * len(prompts), 1.0)])
    assert scorer(with_sums(PROMPTS), RESPONSES).tolist() == [2.0, 4.0, 1.0]


def test_rows_that_differ_only_in_a_column_are_scored_apart():
    calls = []

    def right(prompts, responses, answer):
        calls.append(answer)
        return [float(response == [token]) for response, token in zip(responses, answer)]

    prompts = [Prompt([4], answer=5), Prompt([4], answer=6), Prompt([4], answer=5), [4]]
    assert Scorer(right)(prompts, [[5]] * 4).tolist() == [1, 0, 1, 0]
    assert calls == [[5, 6, None]]


def test_a_function_with_open_names_gets_every_column_but_those_of_its_first_parameters():
    def score(prompts, responses, **columns):
        return columns

    columns = {"total": [1], "responses": ["kept out"], "two words": [2]}
    assert columns_for(score, 2, columns) == {"total": [1], "two words": [2]}
    assert columns_for(lambda *rows: rows, 2, columns) == {}
    bound = functools.partial(lambda prompts, responses, scale, total: [0], scale=2)
    assert columns_for(bound, 2, columns) == {"total": [1]}
    assert columns_for(max, 2, columns) == {}  # a builtin without a signature


def test_a_parameter_without_a_column_is_refused_before_anything_is_sampled():
    def score(prompts, responses, answer):
        raise AssertionError

    message = r"score has a parameter 'answer', but .* their columns: total, first, responses. Give"
    with pytest.raises(ValueError, match=message):
        make_ppo(reward=score, prompts=with_sums(PROMPTS))
    with pytest.raises(ValueError, match=r"'answer', .* their columns: none"):
        best_of_n(tiny(), PROMPTS, SamplingConfig(response_length=4), reward=score)


def test_a_reward_that_raises_is_called_with_the_columns_of_each_row():
    def score(prompts, responses, answer):
        return [1 / number for number in answer]

    prompts = [Prompt([4], answer=2), Prompt([5], answer=0)]
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError.*on row 1 alone: prompt .*\[5\]"):
        Scorer(score)(prompts, [[6], [7]])


def test_a_run_resumes_only_with_the_columns_that_it_began_with(tmp_path):
    def right(prompts, responses, answer):
        return [float(response.count(token)) for response, token in zip(responses, answer)]

    def trainer(out, answer, max_steps):
        prompts = [Prompt(ids, answer=answer) for ids in ([4, 5], [6], [7], [8])]
        return make_ppo(
            reward=right,
            prompts=prompts,
            others=dict(out=tmp_path / out),
            batch_size=2,
            minibatch_size=2,
            save_every=1,
            max_steps=max_steps,
            lr_schedule="constant",
        )

    whole = trainer("whole", 5, 2).train()
    trainer("parts", 5, 1).train()
    other = trainer("parts", 6, 2)
    with pytest.raises(ValueError, match="a run with different examples"):
        other.resume()
    rest = trainer("parts", 5, 2)
    rest.resume()
    names = ("loss", "objective/scores", "grad_norm")
    assert [rest.train()[-1][name] for name in names] == [whole[-1][name] for name in names]
