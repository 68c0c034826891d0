"""Iterated DPO: each round samples all prompts and runs DPO on the pairs."""

import math

import pytest
import torch
from helpers import fives, tiny

from rlhf_core.models import RewardModel, Transformer
from rlhf_core.trainers import IteratedDPOConfig, SamplingConfig, best_of_n, iterated_dpo

PROMPTS = [[7 + i % 4] for i in range(32)]


SMALL = dict(response_length=5, batch_size=16, lr=3e-3)


def more_fives(prompts, first, second):
    return [
        0.5 + 0.5 * ((a.count(5) > b.count(5)) - (a.count(5) < b.count(5)))
        for a, b in zip(first, second)
    ]


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def iterated(model=None, out=None, resume=False, **options):
    who = {name: options.pop(name) for name in ("reward", "judge") if name in options} or dict(
        reward=fives
    )
    model, config = model or tiny(), IteratedDPOConfig(**(SMALL | options))
    return iterated_dpo(model, PROMPTS * 4, config, out=out, resume=resume, **who), model


@pytest.mark.parametrize(
    "label", [dict(reward=fives), dict(judge=more_fives)], ids=["reward", "judge"]
)
def test_rounds_raise_the_score(label):
    history, model = iterated(rounds=4, epochs=2, lr=1e-2, **label)
    scores = [
        best_of_n(m, PROMPTS * 4, SamplingConfig(2, 5), reward=fives).scores.mean()
        for m in (tiny(), model)
    ]
    assert scores[1] > scores[0] + 1
    assert all(line["pairs"] == round(128 * (1 - line["objective/ties"])) for line in history)


def test_the_reference_is_the_start_of_the_round_or_the_first_policy():
    """The loss of a round's first step is log 2 if the policy is its own reference."""
    for reference_policy, moved in (("round", False), ("first", True)):
        history, _ = iterated(rounds=3, max_steps=1, reference_policy=reference_policy)
        off = [abs(line["loss"] - math.log(2)) > 1e-6 for line in history]
        assert off == [False, moved, moved]
    with pytest.raises(
        ValueError, match="reference_policy must be one of round, first, got 'last'"
    ):
        IteratedDPOConfig(reference_policy="last")
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        IteratedDPOConfig(rounds=0)


@pytest.mark.slow
@pytest.mark.parametrize("reference_policy", ["round", "first"])
def test_a_stopped_run_resumes_at_its_next_round(reference_policy, tmp_path):
    options = dict(
        dropout=True, reference_policy=reference_policy, reward=tiny(RewardModel, seed=1)
    )
    want, whole = iterated(tiny(dropout=0.1), rounds=3, **options)
    iterated(tiny(dropout=0.1), rounds=1, out=tmp_path, **options)
    got, model = iterated(tiny(dropout=0.1), rounds=3, out=tmp_path, resume=True, **options)
    assert got == want and same(model, whole) and same(Transformer.from_pretrained(tmp_path), whole)
    with pytest.raises(ValueError, match=r"started with digests\.reward models="):
        other = options | dict(reward=tiny(RewardModel, seed=2))
        iterated(tiny(dropout=0.1), rounds=3, out=tmp_path, resume=True, **other)


def test_a_round_without_pairs_is_an_error():
    with pytest.raises(
        ValueError, match="no response scores differently from the others to its prompt"
    ):
        iterated(reward=lambda prompts, responses: [1] * len(responses))


@pytest.mark.parametrize(
    "options", [dict(reference_free=True), dict(loss="orpo", beta=0.1, average=True)]
)
def test_reference_policy_has_no_effect_without_a_reference(options):
    """The run works without a reference, and the warning comes once, not in every round."""
    with pytest.warns(UserWarning, match="reference_policy='first' has no effect") as caught:
        history, _ = iterated(rounds=2, max_steps=1, **options, reference_policy="first")
    assert len(history) == 2
    assert len([warning for warning in caught if "no effect" in str(warning.message)]) == 1
