"""Our side: the trainers as a user calls them, with the task's order of examples."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from benchmarks.peers.task import Task, Turn, ids_score
from rlhf_core import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    Transformer,
    ValueModel,
)
from rlhf_core.data import Example, Pair
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.rollout import response_logprobs


def train(task: Task, turn: Turn) -> None:
    trainer = globals()[f"_{task.method}"](task)
    step, batches = trainer.step, list(trainer_batches(task, trainer.examples))
    trainer.batches = lambda: iter(batches)  # instead of its own random order

    def timed_step(batch):
        metrics = step(batch)
        turn(metrics["loss"])
        return metrics

    trainer.step = timed_step
    turn(math.nan)
    trainer.train()


def trainer_batches(task: Task, examples: list):
    for start in range(0, len(examples), task.batch_size):
        yield examples[start : start + task.batch_size]


def options(task: Task) -> dict:
    """Fields of TrainConfig. `ppo_options` adds those of PPOConfig."""
    return dict(
        lr=task.lr,
        lr_schedule="constant",
        batch_size=task.batch_size,
        adam_eps=task.adam_eps,
        max_grad_norm=1e9 if task.method == "ppo" else task.max_grad_norm,
        max_steps=task.steps,
        log_every=task.steps + 1,
        seed=task.seed,
        precision=task.precision,
    )


def sampling_options(task: Task) -> dict:
    return options(task) | dict(
        response_length=task.completion_length,
        temperature=task.temperature,
        rollout_dtype="bfloat16" if task.precision == "bfloat16" else None,
    )


def ppo_options(task: Task) -> dict:
    return sampling_options(task) | dict(
        minibatch_size=task.batch_size // task.minibatches,
        ppo_epochs=task.ppo_epochs,
        kl_coef=task.kl_coef,
        kl_estimator="k1",
        clip_range=task.clip_range,
        value_clip_range=task.value_clip_range,
        vf_coef=task.vf_coef,
        gamma=task.gamma,
        lam=task.lam,
    )


def _adapted(task, model):
    """The model, with adapters if the task has any."""
    if task.lora_rank:
        add_adapters(model, LoRAConfig(rank=task.lora_rank, alpha=2 * task.lora_rank))
    return model


def _policy(task):
    return _adapted(task, Transformer.from_pretrained(task.policy))


def _sft(task):
    examples = [Example(row.prompt, row.chosen) for row in task.examples()]
    # Packing changes no loss here. With TRL's on a CPU a sequence would see its neighbours.
    config = SFTConfig(packing=True, **options(task))
    return SFTTrainer(_policy(task), examples, config)


def _pairs(task):
    return [Pair(row.prompt, row.chosen, row.rejected) for row in task.examples()]


def _dpo(task):
    cache = str(Path(task.folder, "reference")) if task.cached_reference else None
    config = DPOConfig(beta=task.beta, reference_logprobs=cache, **options(task))
    return DPOTrainer(_policy(task), _pairs(task), config)


def _grpo(task):
    config = GRPOConfig(num_samples=task.samples, kl_coef=0.0, **sampling_options(task))

    def reward(prompts, responses):
        return [ids_score(ids) for ids in responses]

    prompts = [row.prompt for row in task.examples()]
    return GRPOTrainer(_policy(task), prompts, config, reward=reward, eos_ids=())


def _reward(task):
    return RewardTrainer(
        RewardModel.from_pretrained(task.reward), _pairs(task), RewardConfig(**options(task))
    )


def _ppo(task):
    reward = RewardModel.from_pretrained(task.reward)
    prompts = [row.prompt for row in task.examples()]
    given = [row.chosen for row in task.batches()[0]]
    trainer = PPOTrainer(
        _policy(task),
        prompts,
        PPOConfig(**ppo_options(task)),
        reward=reward,
        critic=_adapted(task, ValueModel.from_model(reward)),
        eos_ids=(),
    )
    sample = trainer.sample

    def given_responses_first(batch, *options):
        """The first time, put the task's responses in place of the sampled ones."""
        trainer.sample = sample
        rollout = sample(batch, *options)._replace(response_ids=torch.tensor(given))
        with torch.no_grad():
            logprobs, _ = response_logprobs(trainer.model, rollout, task.temperature)
        return rollout._replace(logprobs=logprobs)

    trainer.sample = given_responses_first
    return trainer
