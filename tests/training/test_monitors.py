"""A reward that rises while something contradicts it is reported once, and nothing else is."""

import math
import random

import pytest
from helpers import make_ppo

from rlhf_core.training.monitors import alarms, trend

RISING = [0.1 * i for i in range(10)]


def history(every=1, **series):
    """Steps of which every `every`-th one has the next value of each series."""
    count = len(next(iter(series.values())))
    lines = [{"step": step} for step in range(1, count * every + 1)]
    for i, values in enumerate(zip(*series.values())):
        lines[(i + 1) * every - 1].update(zip(series, values))
    return lines


def messages(**series):
    found = alarms(history(every=5, **series), eval_every=5)
    return {monitor.other: message for monitor, message in found.items()}


def test_the_trend_is_that_of_mann_and_kendall():
    assert trend(range(10)) == pytest.approx(0.5 * math.erfc(44 / math.sqrt(2 * 125)))
    assert trend(range(10)[::-1]) == trend([1] * 10) == 1
    # S = 13 of 15 rises, one tie of two: variance (6 * 5 * 17 - 2 * 9) / 18.
    tied = 0.5 * math.erfc((14 - 1) / math.sqrt(2 * (510 - 18) / 18))
    assert trend([1, 2, 3, 3, 4, 5]) == pytest.approx(tied)


def test_a_judge_that_turns_against_a_rising_reward_is_reported_with_numbers():
    found = messages(eval_reward=RISING, eval_win_rate=[0.9 - 0.05 * i for i in range(10)])
    assert list(found) == ["eval_win_rate"]
    assert found["eval_win_rate"].startswith(
        "eval_reward rose from 0 to 0.9 (p = 4.2e-05) while eval_win_rate fell from 0.9 to 0.45 "
        "(p = 4.2e-05) in the last 50 steps. The judge disagrees"
    )


@pytest.mark.parametrize("other", ["eval_length", "eval_spread"])
def test_length_and_spread_count_if_they_grow_by_a_fifth(other):
    assert list(messages(eval_reward=RISING, **{other: [10 + i for i in range(10)]})) == [other]
    assert not messages(eval_reward=RISING, **{other: [10 + 0.1 * i for i in range(10)]})
    assert not messages(eval_reward=RISING, **{other: [20 - i for i in range(10)]})


def test_a_reward_that_does_not_rise_or_that_the_judge_confirms_is_no_alarm():
    falling = [0.9 - 0.05 * i for i in range(10)]
    assert not messages(eval_reward=[1.0] * 10, eval_win_rate=falling)
    assert not messages(eval_reward=RISING, eval_win_rate=falling[::-1])
    assert not messages(eval_reward=RISING)
    assert not messages(eval_reward=RISING[:5], eval_win_rate=falling[:5])  # too few


def test_only_the_last_windows_count():
    early = [0.5 + 0.05 * i for i in range(10)]
    late = [0.9 - 0.05 * i for i in range(10)]
    found = messages(eval_reward=[*RISING, *(1 + x for x in RISING)], eval_win_rate=early + late)
    assert list(found) == ["eval_win_rate"]
    assert not messages(eval_reward=[*RISING, *(1 + x for x in RISING)], eval_win_rate=late + early)


def test_noise_is_rarely_an_alarm():
    noise, count = random.Random(0), 0
    for _ in range(300):
        series = {name: [noise.random() for _ in range(10)] for name in ("a", "b")}
        count += bool(messages(eval_reward=series["a"], eval_win_rate=series["b"]))
    assert count <= 2


def test_metrics_of_steps_are_compared_in_windows_of_ten():
    noise = random.Random(0)
    scores = [0.01 * i + noise.random() for i in range(100)]
    lengths = [10 + 0.2 * i + 5 * noise.random() for i in range(100)]
    lines = history(**{"objective/scores": scores, "response_length": lengths})
    (message,) = alarms(lines, None).values()
    assert "while response_length rose from" in message and "Perhaps length is rewarded" in message
    assert not alarms(lines[:95], None)  # between windows
    assert not alarms(lines[:50], None)


@pytest.mark.slow
def test_a_reward_for_length_is_reported_once_in_a_run(recwarn):
    longer = lambda prompts, responses: [float(len(x)) for x in responses]  # noqa: E731
    hack = dict(response_length=16, lr=3e-3, epochs=100, lr_schedule="constant", kl_coef=0.0)
    make_ppo(reward=longer, others=dict(eos_ids=(2, 3, 4, 5)), **hack).train()
    found = [str(x.message) for x in recwarn if "Perhaps length is rewarded" in str(x.message)]
    assert len(found) == 1 and "objective/scores rose from" in found[0]
