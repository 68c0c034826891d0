"""PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022), with a critic.

A step samples responses, scores them, shapes the reward with the KL to a frozen reference, estimates advantages and
takes `ppo_epochs` passes over them. `step` is the algorithm in numbered lines; what it calls is one file away.
Left out so far: adaptive KL coefficient, reward whitening, entropy bonus.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.data import Example, Tokenizer, collate
from rlhf_core.data.collate import cut_prompt
from rlhf_core.masking import AGGREGATIONS, last_token_index, loss_weights, masked_moments
from rlhf_core.models import RewardModel, Transformer, ValueModel
from rlhf_core.ops import kl_estimate, ppo_advantages, ppo_loss
from rlhf_core.ops.kl import ESTIMATORS
from rlhf_core.rollout import Rollout, response_logprobs, response_values, sample
from rlhf_core.trainers.common import Metrics, TrainConfig, Trainer, frozen_copy, micro_batches, option, rows

Reward = RewardModel | Callable[[list, list], Sequence[float]]


@dataclass(frozen=True)
class PPOConfig(TrainConfig):
    lr: float = option(3e-6, "peak learning rate of AdamW, policy and critic")
    batch_size: int = option(64, "prompts of a rollout")
    minibatch_size: int | None = option(None, "rollouts an optimiser step sees; None: a quarter of batch_size")
    ppo_epochs: int = option(4, "passes over each rollout")
    response_length: int = option(53, "longest response, tokens")
    temperature: float = option(0.7, "of sampling, and so of every log-prob, entropy and KL, > 0")
    kl_coef: float = option(0.05, "weight of the KL to the reference in the reward")
    kl_estimator: str = option("k1", "k1, k2, k3 or abs")
    clip_range: float = option(0.2, "half-width of the ratio's interval")
    value_clip_range: float = option(0.2, "how far a value may move from its old one")
    vf_coef: float = option(0.1, "weight of the value loss")
    gamma: float = option(1.0, "discount, in [0, 1]")
    lam: float = option(0.95, "GAE's lambda, in [0, 1]")
    aggregation: str = option("token_mean", "of the losses: token_mean or sequence_mean")
    missing_eos_penalty: float | None = option(None, "taken off the score of a response without an end token")
    max_prompt_length: int = option(
        512, "tokens of a prompt, and no more than the model has room for; a longer one loses its start"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("temperature", "ppo_epochs", "response_length", "clip_range", "value_clip_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name, allowed in (("kl_estimator", ESTIMATORS), ("aggregation", AGGREGATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


class Experience(NamedTuple):
    """What the PPO epochs read of a rollout, all (B, R), fixed while the policy moves."""

    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor  # whitened
    returns: Tensor


class PPOTrainer(Trainer):
    """model: the policy; examples: prompts as lists of token ids.

    reward: a RewardModel, or a callable (prompts, responses) -> scores that gets lists of strings where there is a
        tokenizer (special tokens left out), lists of token ids otherwise, and returns a finite number for each.
    reference: the policy as it is now, unless given. critic: starts from the reward model where that is one, else
        from the policy's trunk.
    eos_ids: every token that ends a response; None takes the policy's own.
    """

    algorithm = "ppo"
    main_metric = "objective/scores"

    def __init__(
        self,
        model: Transformer,
        examples: Sequence[Sequence[int]],
        config: PPOConfig,
        *,
        reward: Reward,
        reference: Transformer | None = None,
        critic: ValueModel | None = None,
        eos_ids: tuple[int, ...] | None = None,
        tokenizer: Tokenizer | None = None,
        out: str | os.PathLike | None = None,
    ):
        if critic is None:
            critic = ValueModel.from_model(reward if isinstance(reward, RewardModel) else model)
        self.critic = critic.train(config.dropout)
        super().__init__(model, examples, config, tokenizer=tokenizer, out=out)
        self.reference = frozen_copy(model if reference is None else reference)
        self.reward = reward.eval() if isinstance(reward, nn.Module) else reward
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        positions = model.config.max_positions
        self.prompt_length = min(config.max_prompt_length, positions - config.response_length)
        if self.prompt_length < 1:
            raise ValueError(f"response_length {config.response_length} leaves no prompt of {positions} positions")
        self.episodes, self.started = 0, time.monotonic()  # eps: episodes a second

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.model, self.critic) for p in module.parameters() if p.requires_grad]

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """One rollout of a response to every prompt, and the optimiser steps on it."""
        config, metrics = self.config, Metrics()

        # 1. Sample a response to every prompt.
        rollout = sample(
            self.model,
            [cut_prompt(prompt, self.prompt_length, self.model.config.bos_id) for prompt in batch],
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            eos_ids=self.eos_ids,
            generator=self.generator,
        )
        mask = rollout.response_mask  # (B, R)

        # 2. Score every response.
        scores = self.score(rollout)  # (B,)

        # 3. Log-probs under the policy that sampled and under the reference, and the values, before any update.
        old_logprobs, ref_logprobs, old_values, entropy = self.predict(rollout)  # (B, R)

        # 4. Rewards, the KL penalty on every token and the score on the last one; returns, and advantages, whitened.
        advantages, returns, rewards, kl = ppo_advantages(
            scores,
            old_logprobs,
            ref_logprobs,
            old_values,
            mask,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            gamma=config.gamma,
            lam=config.lam,
        )

        # 5. Several passes of clipped updates over the same rollout, in minibatches.
        experience = Experience(old_logprobs, old_values, advantages, returns)
        minibatch_size = config.minibatch_size or -(-config.batch_size // 4)
        for _ in range(config.ppo_epochs):
            for index in torch.randperm(len(batch), generator=self.generator, device=self.device).split(minibatch_size):
                self.optimize(self.minibatch_losses(rows(rollout, index), rows(experience, index), metrics))

        # 6. Report.
        self.episodes += len(batch)
        per_sequence = {
            "objective/kl": kl_estimate(old_logprobs, ref_logprobs, mask=mask).sum(dim=1),
            "objective/entropy": entropy.sum(dim=1),
            "objective/non_score_reward": -config.kl_coef * kl.sum(dim=1),
            "objective/rlhf_reward": rewards.sum(dim=1),
            "objective/scores": scores,
            "response_length": mask.sum(dim=1).float(),
        }
        for name, values in per_sequence.items():
            metrics.add(name, values)
        report = metrics.means()
        report["val/ratio_var"] = report.pop("ratio_squared") - report["val/ratio"] ** 2
        report["val/explained_variance"] = explained_variance(old_values, returns, mask)
        report["val/rollout_mismatch"] = float((old_logprobs - rollout.logprobs).abs().max())
        report |= {"objective/kl_coef": config.kl_coef, "lr": self.optimizer.param_groups[0]["lr"]}
        report["val/num_eos_tokens"] = int(self.ended(rollout).sum())
        return report | {"episode": self.episodes, "eps": self.episodes / (time.monotonic() - self.started)}

    def minibatch_losses(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> Iterator[Tensor]:
        """The PPO loss of each micro-batch; the parts add up to the minibatch's loss."""
        config = self.config
        weights = loss_weights(rollout.response_mask, config.aggregation)  # (B, R)
        for part, old, w in micro_batches(config.micro_batch_size, rollout, experience, weights):
            logprobs, entropy = response_logprobs(self.model, part, config.temperature)
            values = response_values(self.critic, part)
            loss, stats = ppo_loss(
                logprobs,
                old.old_logprobs,
                old.advantages,
                values,
                old.old_values,
                old.returns,
                part.response_mask,
                clip_range=config.clip_range,
                value_clip_range=config.value_clip_range,
                vf_coef=config.vf_coef,
                entropy=entropy.detach(),
                weights=w,
            )
            for name, mean in {
                "loss/policy_avg": stats.policy_loss,
                "loss/value_avg": stats.value_loss,
                "policy/approxkl_avg": stats.approx_kl,
                "policy/clipfrac_avg": stats.clip_frac,
                "policy/entropy_avg": stats.entropy,
                "val/clipfrac_avg": stats.value_clip_frac,
                "val/ratio": stats.ratio,
                "ratio_squared": stats.ratio_squared,
            }.items():
                metrics.add_mean(name, mean, stats.count)
            yield loss

    @torch.no_grad()
    def predict(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """old_logprobs, ref_logprobs, values and entropy, all (B, R).

        The old log-probs are computed by the training forward, not taken from sampling, so that the ratio of the first
        minibatch is 1 even where a fast decoder rounds differently; `val/rollout_mismatch` reports the difference.
        """
        parts = []
        for (part,) in micro_batches(self.config.micro_batch_size, rollout):
            old_logprobs, entropy = response_logprobs(self.model, part, self.config.temperature)
            ref_logprobs, _ = response_logprobs(self.reference, part, self.config.temperature)
            parts.append((old_logprobs, ref_logprobs, response_values(self.critic, part), entropy))
        return tuple(torch.cat(columns) for columns in zip(*parts))

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        """Scores (B,) of the responses, the missing-EOS penalty taken off."""
        prompts, responses = rollout.prompts(), rollout.responses()
        if isinstance(self.reward, RewardModel):
            tokens = collate([Example(p, r) for p, r in zip(prompts, responses)], self.pad_id)
            parts = micro_batches(self.config.micro_batch_size, tokens.input_ids, tokens.attention_mask)
            scores = torch.cat([self.reward(ids.to(self.device), seen.to(self.device)) for ids, seen in parts])
        else:
            scores = self._call_reward(prompts, responses)
        bad = (~scores.isfinite()).nonzero()
        if len(bad):
            row = int(bad[0])
            prompt, response = self._readable([prompts[row], responses[row]])
            raise ValueError(f"the reward of row {row} is {scores[row]}; prompt {prompt!r}, response {response!r}")
        if self.config.missing_eos_penalty is not None:
            scores = scores - self.config.missing_eos_penalty * ~self.ended(rollout)
        return scores

    def _call_reward(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        scores = self.reward(self._readable(prompts), self._readable(responses))
        scores = torch.as_tensor(scores, dtype=torch.float32, device=self.device)
        if scores.shape != (len(prompts),):
            raise ValueError(f"the reward returned shape {tuple(scores.shape)} for {len(prompts)} responses")
        return scores

    def _readable(self, rows: list[list[int]]) -> list:
        """The strings of token ids where there is a tokenizer, else the ids."""
        return rows if self.tokenizer is None else [self.tokenizer.decode(ids) for ids in rows]

    def ended(self, rollout: Rollout) -> Tensor:
        """(B,) bool: whether the last counted token is one of the stop set."""
        last = rollout.response_ids.gather(1, last_token_index(rollout.response_mask)[:, None])[:, 0]
        return torch.isin(last, torch.tensor(self.eos_ids, device=last.device, dtype=last.dtype))

    def save(self, path: Path) -> None:
        """The policy in `path`, the critic in its subfolder `critic`."""
        super().save(path)
        self.critic.save_pretrained(path / "critic")


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the counted tokens; 0 where the returns do not vary."""
    residual, total = masked_moments(returns - values, mask), masked_moments(returns, mask)
    return float(1 - residual.m2 / total.m2) if total.m2 > 0 else 0.0
