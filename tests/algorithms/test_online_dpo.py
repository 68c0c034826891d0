"""Online DPO: each step learns from the policy's own samples."""

import math

import pytest
import torch
from helpers import fives, tiny

from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    IteratedDPOConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    SamplingConfig,
    best_of_n,
)

PROMPTS = [[7 + i % 4] for i in range(32)]


SMALL = dict(response_length=5, batch_size=16, lr=3e-3)


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


@pytest.mark.parametrize(
    "label",
    [dict(reward=fives), dict(judge=more_fives), dict(judge=more_fives, num_samples=4)],
    ids=["reward", "judge", "judge of four"],
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


def test_a_judge_that_compares_scores_labels_like_the_scores():
    by_reward, by_judge = online(), online(judge=more_fives)
    by_reward.train(), by_judge.train()
    assert same(by_reward.model, by_judge.model)
    assert by_judge.step(PROMPTS)["objective/scores"] == 0.5
    assert (by_reward.main_metric, by_judge.main_metric) == (
        "objective/scores",
        "rewards/accuracies",
    )


def test_ties_are_not_pairs_and_a_step_of_only_ties_moves_nothing():
    trainer, before = online(reward=lambda prompts, responses: [1] * len(responses)), tiny()
    metrics = trainer.train()[-1]
    assert same(trainer.model, before) and metrics["objective/ties"] == 1 and "loss" not in metrics


def test_the_reference_is_the_one_given_or_the_first_policy():
    trainer = online(max_steps=2)
    first, second = trainer.train()
    assert abs(first["loss"] - math.log(2)) < 1e-6 < abs(second["loss"] - math.log(2))
    assert same(trainer.reference.model, tiny())
    assert abs(online(reference=tiny(seed=1)).step(PROMPTS)["loss"] - math.log(2)) > 1e-3


def test_both_a_reward_and_a_judge_or_neither_is_refused():
    for who in (dict(reward=None), dict(reward=fives, judge=more_fives)):
        with pytest.raises(ValueError, match="pass either a reward or a judge"):
            online(**who)


@pytest.mark.parametrize("config", [OnlineDPOConfig, IteratedDPOConfig])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_samples=1), "num_samples must be at least 2, got 1"),
        (dict(temperature=0), "temperature must be > 0, got 0"),
        (dict(beta=0), "beta must be > 0, got 0"),
        (
            dict(reference_logprobs="file"),
            "reference_logprobs must be unset: samples are not known in advance, got 'file'",
        ),
    ],
)
def test_an_option_out_of_range_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_sample_without_a_finite_loss_is_reported():
    trainer = online()
    losses = trainer.losses

    def failing(batch, metrics):
        for loss in losses(batch, metrics):
            bad = any(pair.chosen_ids == worst.chosen_ids for pair in batch)
            yield loss * (math.inf if bad else 1)

    worst = best_of_n(tiny(), PROMPTS[:16], SamplingConfig(2, 5), reward=fives).pairs()[2]
    trainer.losses = failing
    with pytest.raises(
        FloatingPointError,
        match=r"the loss of row 2, Pair\(prompt_ids=\[\d+\], chosen_ids=.*, alone is not finite",
    ):
        trainer.step(PROMPTS[:16])
