"""DPO on the policy's own samples: online, a step at a time, and iterated, a round at a time."""

import math

import pytest
import torch

from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    IteratedDPOConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    SamplingConfig,
    best_of_n,
    iterated_dpo,
)

PROMPTS = [[7 + i % 4] for i in range(32)]
SMALL = dict(response_length=5, batch_size=16, lr=3e-3)


def tiny(cls=Transformer, seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=12, hidden_size=16, num_layers=2, num_heads=2, max_positions=32)
    return cls(TransformerConfig(**sizes, eos_ids=(2,), pad_id=0, **options))


def fives(prompts, responses):
    return [float(response.count(5)) for response in responses]


def more_fives(prompts, first, second):
    return [
        0.5 + 0.5 * ((a.count(5) > b.count(5)) - (a.count(5) < b.count(5)))
        for a, b in zip(first, second)
    ]


def online(model=None, prompts=PROMPTS, out=None, reference=None, **options):
    who = {name: options.pop(name) for name in ("reward", "judge") if name in options} or dict(
        reward=fives
    )
    model, config = model or tiny(), OnlineDPOConfig(**(SMALL | options))
    return OnlineDPOTrainer(model, prompts, config, out=out, reference=reference, **who)


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


# ---- online


@pytest.mark.parametrize(
    "label",
    [dict(reward=fives), dict(judge=more_fives), dict(judge=more_fives, num_samples=4)],
    ids=str,
)
def test_steps_raise_the_score_of_the_samples(label):
    trainer = online(epochs=15, lr=1e-2, **label)
    sampling = SamplingConfig(num_samples=4, response_length=5)
    before = best_of_n(trainer.model, PROMPTS * 4, sampling, reward=fives).scores.mean()
    trainer.train()
    assert best_of_n(trainer.model, PROMPTS * 4, sampling, reward=fives).scores.mean() > before + 1


@pytest.mark.parametrize(
    "options",
    [
        dict(num_samples=4, beta=0.3, label_smoothing=0.1),
        dict(loss="robust", label_smoothing=0.1, micro_batch_size=3),
        dict(loss="ipo", average=True),
        dict(loss="hinge", ld_alpha=0.5, sft_coef=0.1),
        dict(loss="simpo", average=True, beta=2.0, gamma=0.5),
        dict(loss="orpo", average=True),
    ],
    ids=str,
)
def test_a_step_is_a_step_of_dpo_on_the_labelled_samples(options):
    trainer, model = online(**options), tiny()
    found = best_of_n(
        model, PROMPTS, SamplingConfig(options.get("num_samples", 2), 5), reward=fives
    )
    options.pop("num_samples", None)
    plain = DPOTrainer(model, found.pairs(), DPOConfig(lr=3e-3, batch_size=99, **options))
    want, got = plain.step(found.pairs()), trainer.step(PROMPTS)
    assert same(trainer.model, model) and {name: got[name] for name in want} == want
    assert got["objective/scores"] == found.scores.mean().item() and 0 < got["objective/ties"] < 1
    assert got["objective/margin"] == found.margins().mean().item()
    assert (
        got["response_length"]
        == sum(len(ids) for texts in found.responses for ids in texts) / found.scores.numel()
    )


def test_a_judge_that_compares_scores_labels_as_they_do():
    by_reward, by_judge = online(), online(judge=more_fives)
    by_reward.train(), by_judge.train()
    assert same(by_reward.model, by_judge.model)
    assert by_judge.step(PROMPTS)["objective/scores"] == 0.5
    assert (by_reward.main_metric, by_judge.main_metric) == (
        "objective/scores",
        "rewards/accuracies",
    )


def test_ties_are_no_pairs_and_a_step_of_ties_alone_moves_nothing():
    trainer, before = online(reward=lambda prompts, responses: [1] * len(responses)), tiny()
    metrics = trainer.train()[-1]
    assert same(trainer.model, before) and metrics["objective/ties"] == 1 and "loss" not in metrics


def test_the_reference_is_the_one_given_or_the_first_policy():
    trainer = online(max_steps=2)
    first, second = trainer.train()
    assert abs(first["loss"] - math.log(2)) < 1e-6 < abs(second["loss"] - math.log(2))
    assert same(trainer.reference.model, tiny())
    assert abs(online(reference=tiny(seed=1)).step(PROMPTS)["loss"] - math.log(2)) > 1e-3


def test_labels_come_from_a_reward_or_from_a_judge():
    for who in (dict(reward=None), dict(reward=fives, judge=more_fives)):
        with pytest.raises(ValueError, match="give either a reward or a judge"):
            online(**who)
    for config in (OnlineDPOConfig, IteratedDPOConfig):
        for options, message in (
            (dict(num_samples=1), "num_samples must be at least 2 for a pair, got 1"),
            (dict(temperature=0), "temperature must be > 0, got 0"),
            (dict(beta=0), "beta must be > 0, got 0"),
            (dict(gamma=1.0), "gamma has no effect on loss 'dpo'"),
            (
                dict(reference_logprobs="file"),
                "reference_logprobs has no effect on samples, being of given pairs, got 'file'",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                config(**options)


@pytest.mark.parametrize(
    "options", [dict(reference_free=True), dict(loss="orpo", beta=0.1, average=True)]
)
def test_the_first_policy_is_no_reference_where_there_is_none(options):
    IteratedDPOConfig(**options)
    with pytest.raises(
        ValueError, match="reference_policy has no effect where there is no reference, got 'first'"
    ):
        IteratedDPOConfig(**options, reference_policy="first")


def test_a_sample_without_a_finite_loss_is_shown():
    trainer = online()
    losses = trainer.losses

    def bad(batch, metrics):
        for loss in losses(batch, metrics):
            yield loss * (
                math.inf if any(pair.chosen_ids == worst.chosen_ids for pair in batch) else 1
            )

    worst = best_of_n(tiny(), PROMPTS[:16], SamplingConfig(2, 5), reward=fives).pairs()[2]
    trainer.losses = bad
    with pytest.raises(
        FloatingPointError,
        match=r"the loss of row 2, Pair\(prompt_ids=\[\d+\], chosen_ids=.*, alone is",
    ):
        trainer.step(PROMPTS[:16])


# ---- iterated


def iterated(model=None, out=None, resume=False, **options):
    who = {name: options.pop(name) for name in ("reward", "judge") if name in options} or dict(
        reward=fives
    )
    model, config = model or tiny(), IteratedDPOConfig(**(SMALL | options))
    return iterated_dpo(model, PROMPTS * 4, config, out=out, resume=resume, **who), model


@pytest.mark.parametrize("label", [dict(reward=fives), dict(judge=more_fives)], ids=str)
def test_rounds_raise_the_score(label):
    history, model = iterated(rounds=4, epochs=2, lr=1e-2, **label)
    scores = [
        best_of_n(m, PROMPTS * 4, SamplingConfig(2, 5), reward=fives).scores.mean()
        for m in (tiny(), model)
    ]
    assert scores[1] > scores[0] + 1
    assert all(line["pairs"] == round(128 * (1 - line["objective/ties"])) for line in history)


def test_a_round_is_compared_with_its_own_start_or_with_the_first_policy():
    """The first step's loss is log 2 where the policy is its own reference."""
    for reference_policy, moved in (("round", False), ("first", True)):
        history, _ = iterated(rounds=3, max_steps=1, reference_policy=reference_policy)
        off = [abs(line["loss"] - math.log(2)) > 1e-6 for line in history]
        assert off == [False, moved, moved]
    with pytest.raises(
        ValueError, match="reference_policy must be one of round, first, got 'last'"
    ):
        IteratedDPOConfig(reference_policy="last")
    with pytest.raises(ValueError, match="rounds must be > 0, got 0"):
        IteratedDPOConfig(rounds=0)


@pytest.mark.parametrize("reference_policy", ["round", "first"])
def test_rounds_go_on_where_the_run_stopped(reference_policy, tmp_path):
    options = dict(
        dropout=True, reference_policy=reference_policy, reward=tiny(RewardModel, seed=1)
    )
    want, whole = iterated(tiny(dropout=0.1), rounds=3, **options)
    iterated(tiny(dropout=0.1), rounds=1, out=tmp_path, **options)
    got, model = iterated(tiny(dropout=0.1), rounds=3, out=tmp_path, resume=True, **options)
    assert got == want and same(model, whole) and same(Transformer.from_pretrained(tmp_path), whole)
    with pytest.raises(ValueError, match="with digest="):
        other = options | dict(reward=tiny(RewardModel, seed=2))
        iterated(tiny(dropout=0.1), rounds=3, out=tmp_path, resume=True, **other)


def test_a_round_without_pairs_is_an_error():
    with pytest.raises(ValueError, match="the responses to every prompt score alike"):
        iterated(reward=lambda prompts, responses: [1] * len(responses))
