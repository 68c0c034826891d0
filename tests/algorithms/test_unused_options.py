"""An option that warns of having no effect has none: the trained weights are those without it."""

import dataclasses
import functools
import re

import pytest
import torch
from helpers import PROMPTS, fives, make_ppo, rows, snapshot, tiny
from torch.testing import assert_close

from rlhf_core import trainers
from rlhf_core.data import Ranked, Steps
from rlhf_core.losses.preference import LOSSES
from rlhf_core.models import ILQLModel, RewardModel
from rlhf_core.options import Options
from rlhf_core.trainers import (
    A2CConfig,
    A2CTrainer,
    DistillConfig,
    DistillTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    ILQLConfig,
    ILQLTrainer,
    IteratedDPOConfig,
    RewardConfig,
    RewardTrainer,
    iterated_dpo,
)

LISTS = [Ranked([7], [[5, 2], [6, 2], [8, 2]]), Ranked([8], [[5, 5, 2], [6, 2]])]
STEPS = [Steps([7], [5, 6, 2], [True, False, True], [1.0, 0.0]), Steps([8], [9], [True], [0.5])]
TWICE = PROMPTS * 2  # two steps


def trained(trainer):
    trainer.train()
    return [snapshot(model) for model in trainer.trained_models()]


def ppo(**options):
    others = {}
    if "reference" in options:
        others["reference"] = tiny(seed=options.pop("reference"))
    return trained(
        make_ppo(None, RewardModel.from_model(tiny(seed=1)), TWICE, others, lr=1e-2, **options)
    )


def a2c(**options):
    torch.manual_seed(5)
    config = A2CConfig(batch_size=8, response_length=6, lr=1e-2, **options)
    return trained(A2CTrainer(tiny(), TWICE, config, reward=fives))


def grpo(**options):
    config = GRPOConfig(batch_size=8, num_samples=4, response_length=6, lr=1e-3, **options)
    return trained(GRPOTrainer(tiny(), TWICE, config, reward=fives))


def dpo(**options):
    examples = rows("dpo", 16)
    return trained(DPOTrainer(tiny(), examples, DPOConfig(batch_size=8, lr=1e-2, **options)))


def reward(examples=None, **options):
    config = RewardConfig(batch_size=8, lr=1e-2, **options)
    return trained(RewardTrainer(tiny(RewardModel), examples or rows("reward", 16), config))


def ilql(**options):
    examples = [x._replace(reward=float(i % 3)) for i, x in enumerate(rows("sft", 16))]
    config = ILQLConfig(batch_size=8, lr=1e-2, **options)
    return trained(ILQLTrainer(ILQLModel(tiny()), examples, config))


def iterated(**options):
    model, sizes = tiny(), dict(rounds=2, response_length=5, batch_size=8, lr=1e-2)
    iterated_dpo(model, TWICE, IteratedDPOConfig(**sizes, **options), reward=fives)
    return [snapshot(model)]


def distill(**options):
    examples = [x._replace(teacher_prompt_ids=[5, *x.prompt_ids]) for x in rows("sft", 16)]
    config = DistillConfig(batch_size=8, lr=1e-2, **options)
    return trained(DistillTrainer(tiny(), examples, config))


NO_KL, MARGIN = dict(kl_coef=0.0), dict(loss="margin_ranking")
REFERENCE = NO_KL | dict(reference=1)  # given, so that its KL is reported
CASES = [  # what trains, its options, the one without effect
    (ppo, dict(sample_every=0), dict(print_samples=True)),
    (ppo, NO_KL, dict(kl_target=6.0)),
    (ppo, REFERENCE, dict(kl_target=6.0)),
    (ppo, {}, dict(kl_horizon=8)),
    (ppo, {}, dict(keep=2)),
    (ppo, NO_KL, dict(kl_in="loss")),
    (ppo, REFERENCE, dict(kl_in="loss")),
    *((ppo, REFERENCE, dict(kl_estimator=name)) for name in ("k1", "abs", "full")),
    (ppo, REFERENCE, dict(reference_ema=0.5)),
    (ppo, {}, dict(entropy_target=0.1)),
    (ppo, {}, dict(whiten_mean=True)),
    (ppo, {}, dict(importance_floor=0.9)),
    (ppo, {}, dict(importance_level="sequence")),
    (ppo, {}, dict(importance_mode="mask")),
    (ppo, {}, dict(clip_range=1e-4)),
    (ppo, {}, dict(clip_range_high=1e-4)),
    (ppo, {}, dict(dual_clip=1.001)),
    (ppo, {}, dict(max_approx_kl=1e-9)),
    (ppo, {}, dict(value_clip_range=1e-4)),
    (ppo, dict(critic="head"), dict(critic_init="policy")),
    (ppo, dict(vf_coef=0.0), dict(critic_lr=1.0)),
    (a2c, {}, dict(clip_range=1e-4)),
    (grpo, {}, dict(ratio="sequence")),
    (grpo, dict(importance_cap=2.0, importance_level="sequence"), dict(ratio="sequence")),
    (grpo, {}, dict(loss="cispo")),
    (grpo, dict(loss="cispo", ppo_epochs=2), dict(dual_clip=1.001)),
    (grpo, dict(aggregation="sequence_mean", entropy_coef=0.1), dict(ratio="sequence")),
    *((grpo, dict(advantage=name), dict(normalize=False)) for name in ("rloo", "remax")),
    (grpo, {}, dict(whiten_scores="batch")),
    (grpo, dict(advantage="reinforce_pp"), dict(whiten_scores="running")),
    *(
        (grpo, dict(advantage=name, normalize=name != "grpo", whiten_scores="batch"), WHITEN)
        for name in ("grpo", "rloo")
        for WHITEN in [dict(whiten_mean=True)]
    ),
    (dpo, dict(loss="orpo", average=True), dict(beta=0.3)),
    (dpo, dict(loss="ipo"), dict(label_smoothing=0.2)),
    (dpo, dict(mesh="1x1"), dict(shard=True)),
    (dpo, {}, dict(gamma=1.0)),
    (dpo, {}, dict(orpo_lambda=3.0)),
    (dpo, dict(loss="simpo", average=True), dict(reference_free=True)),
    (dpo, dict(average=True), dict(ld_alpha=0.3)),
    (reward, MARGIN, dict(label_smoothing=0.2)),
    *((reward, dict(examples=rows), option) for rows in (LISTS, STEPS)
      for option in (dict(label_smoothing=0.2), dict(centering_coef=1.0))),
    (reward, dict(examples=STEPS), dict(length_alpha=0.5)),
    (ilql, dict(bc_coef=0.0), dict(bc_beta=2.0)),
    *((distill, {}, dict([option])) for option in dict(
        response_length=9, stop_strings=("a",), on_long_prompt="truncate", sample_every=3
    ).items()),
    (iterated, dict(reference_free=True), dict(reference_policy="first")),
]  # fmt: skip


@functools.cache
def _trained_without(index):
    train, options, _ = CASES[index]
    return train(**options)


def without_it(train, options):
    """The weights that the options alone give; computed once for equal options."""
    return _trained_without(next(i for i, case in enumerate(CASES) if case[:2] == (train, options)))


def named(x):
    return x.__name__ if callable(x) else str({k: v for k, v in x.items() if k != "examples"})


@pytest.mark.parametrize("train, options, unused", CASES, ids=named)
def test_an_option_without_effect_warns_once_and_changes_no_weight(train, options, unused):
    """Row 20."""
    want = without_it(train, options)
    ((name, value),) = unused.items()
    with pytest.warns(
        UserWarning, match="^" + re.escape(f"{name}={value!r} has no effect ")
    ) as caught:
        got = train(**options, **unused)
    assert len([warning for warning in caught if "no effect" in str(warning.message)]) == 1
    # The same numbers, computed otherwise: the mean of a ratio, scores divided by their deviation,
    # advantages in torch instead of a kernel.
    rounds = name in ("loss", "ratio", "whiten_scores", "whiten_mean") or value == "full"
    assert_close(got, want, rtol=1e-3 if rounds else 0, atol=1e-5 if rounds else 0)


def test_every_rule_has_a_case(monkeypatch):
    rules = set()
    monkeypatch.setattr(
        Options, "warn_unused", lambda self, *found: rules.update(name for name, *_ in found)
    )
    for name in trainers.__all__:
        if name.endswith("Config"):
            getattr(trainers, name)()
    for loss in LOSSES:
        DPOConfig(loss=loss, average=True, label_smoothing=0.1 * (loss == "robust"))
    reward()
    assert {name for *_, unused in CASES for name in unused} == rules
    fields = {f.name for name in trainers.__all__ if name.endswith("Config")
              for f in dataclasses.fields(getattr(trainers, name))}  # fmt: skip
    assert rules <= fields and len(rules) > 20
