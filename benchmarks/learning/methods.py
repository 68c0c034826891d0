"""Every method as a function of a `Setup` and settings, and the table of methods.

A function returns the policy. Best of n returns an `Evaluation`, because it picks among samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.learning.setup import Setup
from benchmarks.learning.theirs import trl_dpo, trl_grpo
from rlhf_core.data import Example
from rlhf_core.evaluation import Evaluation, best_of_n_kl
from rlhf_core.models import ILQLModel, Transformer
from rlhf_core.trainers import (
    A2CConfig,
    A2CTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    ILQLConfig,
    ILQLTrainer,
    IteratedDPOConfig,
    IteratedRLHFConfig,
    KTOConfig,
    KTOTrainer,
    NLPOConfig,
    NLPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RFTConfig,
    SamplingConfig,
    TRPOConfig,
    TRPOTrainer,
    best_of_n,
    iterated_dpo,
    iterated_rlhf,
    rft,
)


def sft(setup: Setup) -> Transformer:
    return setup.base


# ---- from pairs


def dpo(setup: Setup, **settings) -> Transformer:
    policy, config = setup.policy(), DPOConfig(seed=setup.seed, **settings)
    reference = None if config.loss in ("simpo", "orpo") else setup.base
    DPOTrainer(policy, setup.pairs, config, reference=reference).train()
    return policy


def kto(setup: Setup, **settings) -> Transformer:
    policy, examples = setup.policy(), []
    for pair in setup.pairs:
        examples += [Example(pair.prompt_ids, pair.chosen_ids, label=True)]
        examples += [Example(pair.prompt_ids, pair.rejected_ids, label=False)]
    KTOTrainer(policy, examples, KTOConfig(seed=setup.seed, **settings)).train()
    return policy


def ilql(setup: Setup, **settings) -> ILQLModel:
    """ILQL on the completions of the pairs, with the reward model's scores as rewards."""
    prompts = [pair.prompt_ids for pair in setup.pairs for _ in range(2)]
    responses = [ids for pair in setup.pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    rewards = setup.scores(prompts, responses).tolist()
    examples = [Example(*row[:2], reward=row[2]) for row in zip(prompts, responses, rewards)]
    model = ILQLModel(setup.policy())
    ILQLTrainer(model, examples, ILQLConfig(seed=setup.seed, **settings)).train()
    return model


# ---- from the reward model


def on_policy(trainer: type, config: type) -> Callable[..., nn.Module]:
    def train(setup: Setup, **settings) -> nn.Module:
        policy = setup.policy()
        fixed = dict(temperature=1.0, response_length=setup.task.response_length)
        options = dict(reward=setup.reward_model, reference=setup.base, **setup.shared)
        trained = trainer(
            policy, setup.task.prompts, config(seed=setup.seed, **fixed, **settings), **options
        )
        trained.train()
        return trained.sampled_policy  # NLPO's keeps its mask

    return train


ppo = on_policy(PPOTrainer, PPOConfig)
a2c = on_policy(A2CTrainer, A2CConfig)
nlpo = on_policy(NLPOTrainer, NLPOConfig)
trpo = on_policy(TRPOTrainer, TRPOConfig)
group = on_policy(GRPOTrainer, GRPOConfig)


def best_of(setup: Setup, **settings) -> Evaluation:
    config = SamplingConfig(
        seed=setup.seed + 1, response_length=setup.task.response_length, **settings
    )
    prompts, options = setup.task.eval_prompts, dict(reward=setup.reward_model, **setup.shared)
    ids, _ = best_of_n(setup.base, prompts, config, **options).best()
    texts, questions = (
        [setup.task.tokenizer.decode(row) for row in rows] for rows in (ids, prompts)
    )
    scores = torch.tensor(setup.task.gold(questions, texts))
    kl = torch.full((len(ids),), best_of_n_kl(config.num_samples))
    return Evaluation(texts, scores, kl, torch.tensor([len(row) for row in ids]), ids)


def rejection_sampling(setup: Setup, num_prompts: int, **settings) -> Transformer:
    policy, length = setup.policy(), setup.task.response_length
    config = RFTConfig(seed=setup.seed, response_length=length, **settings)
    rft(policy, setup.task.prompts[:num_prompts], config, reward=setup.reward_model, **setup.shared)
    return policy


def online_dpo(setup: Setup, **settings) -> Transformer:
    policy = setup.policy()
    config = OnlineDPOConfig(
        seed=setup.seed, response_length=setup.task.response_length, **settings
    )
    options = dict(reward=setup.reward_model, reference=setup.base, **setup.shared)
    OnlineDPOTrainer(policy, setup.task.prompts, config, **options).train()
    return policy


def rounds_of_dpo(setup: Setup, num_prompts: int, **settings) -> Transformer:
    policy = setup.policy()
    config = IteratedDPOConfig(
        seed=setup.seed, response_length=setup.task.response_length, **settings
    )
    iterated_dpo(
        policy, setup.task.prompts[:num_prompts], config, reward=setup.reward_model, **setup.shared
    )
    return policy


# ---- from a judge, which prefers the response with the higher gold score


def rounds_of_rlhf(
    setup: Setup, num_prompts: int, rounds: int, reward: dict, ppo: dict
) -> Transformer:
    def judge(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        scores = zip(setup.task.gold(prompts, first), setup.task.gold(prompts, second))
        return [(a > b) + (a == b) / 2 for a, b in scores]

    task, policy = setup.task, setup.policy()
    fixed = dict(response_length=task.response_length)
    config = IteratedRLHFConfig(
        rounds=rounds,
        sampling=SamplingConfig(num_samples=2, batch_size=128, **fixed),
        reward=replace(task.reward, **reward),
        ppo=replace(task.ppo, **ppo),
        seed=setup.seed,
    )
    iterated_rlhf(policy, task.prompts[:num_prompts], config, judge=judge, **setup.shared)
    return policy


class Method(NamedTuple):
    """A function, and settings that differ from the config's defaults on all tasks or on one."""

    run: Callable
    shared: dict = {}  # noqa: RUF012
    replies: dict = {}  # noqa: RUF012
    stories: dict = {}  # noqa: RUF012
    constraints: dict = {}  # noqa: RUF012

    def settings(self, task: str) -> dict:
        return self.shared | getattr(self, task)


# A model of 0.3 M parameters needs far higher learning rates than the defaults, made for billions.
SHORT = dict(lr=3e-4, kl_coef=0.1, max_steps=60, ppo_epochs=2)
PPO = dict(lr=1e-4, max_steps=50), dict(kl_coef=0.1), dict(kl_coef=0.06), SHORT
ONE_UPDATE = (
    dict(lr=1e-3, max_steps=50),
    dict(kl_coef=0.055),
    dict(kl_coef=0.06),
    dict(kl_coef=0.05, lr=3e-4),
)  # a rollout, where PPO makes 16
KL_IN_REWARD = dict(kl_in="reward", kl_estimator="k1")
ONE_SAMPLE = dict(num_samples=1, batch_size=64, **KL_IN_REWARD)
PAIRS = dict(lr=1e-4, batch_size=64)


def with_(defaults: tuple[dict, ...], **settings) -> tuple[dict, ...]:
    return defaults[0] | settings, *defaults[1:]


METHODS = {
    "SFT": Method(sft),
    "DPO": Method(dpo, PAIRS, replies=dict(beta=0.5), constraints=dict(lr=2e-4, beta=0.2)),
    "IPO": Method(dpo, PAIRS | dict(loss="ipo")),
    "hinge": Method(dpo, PAIRS | dict(loss="hinge"), replies=dict(beta=0.5)),
    "SimPO": Method(dpo, PAIRS | dict(loss="simpo", average=True, beta=2.0, gamma=1.0)),
    "ORPO": Method(dpo, PAIRS | dict(loss="orpo", average=True, lr=1e-3, orpo_lambda=1.0)),
    "KTO": Method(kto, PAIRS | dict(lr=3e-4)),
    "ILQL": Method(ilql, PAIRS | dict(lr=1e-3, epochs=2, target_rate=0.05, beta=16.0)),
    "PPO": Method(ppo, *PPO),
    "PPO, head critic": Method(ppo, *with_(PPO, critic="head")),
    "A2C": Method(a2c, *ONE_UPDATE),
    "NLPO": Method(nlpo, *PPO),
    "TRPO": Method(
        trpo,
        *with_(PPO[:3], max_kl=0.01, fisher_share=0.25),
        SHORT | dict(max_kl=0.03, kl_coef=0.05, max_steps=40),
    ),
    "GRPO": Method(
        group,
        dict(lr=5e-4, max_steps=50, kl_coef=0.2),
        constraints=dict(normalize=False, kl_coef=0.06, batch_size=16, max_steps=100),
    ),
    "RLOO": Method(group, *with_(ONE_UPDATE, advantage="rloo", **KL_IN_REWARD)),
    "REINFORCE++": Method(group, *with_(ONE_UPDATE, advantage="reinforce_pp", **ONE_SAMPLE)),
    "ReMax": Method(group, *with_(ONE_UPDATE, advantage="remax", **ONE_SAMPLE)),
    "best of 16": Method(best_of, dict(num_samples=16)),
    "RFT": Method(
        rejection_sampling,
        dict(num_prompts=512, num_samples=8, rounds=2, lr=3e-4, batch_size=32),
        constraints=dict(num_prompts=1536, rounds=3, epochs=2, lr=5e-4),
    ),
    "online DPO": Method(online_dpo, PAIRS | dict(max_steps=50), replies=dict(beta=0.5)),
    "iterated DPO": Method(
        rounds_of_dpo, PAIRS | dict(num_prompts=1024, rounds=3), replies=dict(beta=0.5)
    ),
    "iterated RLHF": Method(
        rounds_of_rlhf, dict(num_prompts=1024, rounds=3, reward={}, ppo=dict(max_steps=16))
    ),
}
PEERS = {
    "DPO, TRL": METHODS["DPO"]._replace(run=trl_dpo),
    "GRPO, TRL": METHODS["GRPO"]._replace(run=trl_grpo),
}
