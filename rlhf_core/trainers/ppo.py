"""PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020; Ouyang et al. 2022), with a critic.

A step samples responses, scores them, shapes the reward with the KL to a frozen reference, estimates advantages and
takes `ppo_epochs` passes over them. `step` is the algorithm in numbered lines; what it calls is one file away.
Left out so far: adaptive KL coefficient, reward whitening, entropy bonus.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.data import Example, Tokenizer
from rlhf_core.data.encode import cut_prompt
from rlhf_core.masking import AGGREGATIONS, last_token_index, loss_weights, masked_moments
from rlhf_core.models import RewardModel, Transformer, ValueModel
from rlhf_core.ops import kl_estimate, ppo_advantages, ppo_loss
from rlhf_core.ops.kl import ESTIMATORS
from rlhf_core.rollout import Rollout, response_hidden, response_logprobs, response_values, sample
from rlhf_core.trainers.common import Metrics, Reference, TrainConfig, Trainer, micro_batches, option, read_hidden, rows

MAX_FIRST_ERROR = {"float32": 1e-3, "bfloat16": 0.05}  # of the first minibatch's ratio: its padding rounds otherwise
DIVERGED = "the weights have diverged (a smaller lr, fewer ppo_epochs) or overflow in bfloat16"

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
    critic: str = option("separate", "a model of its own, or head: on the policy's trunk, which then learns both")
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
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("kl_coef", "vf_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.minibatch_size is not None and not 0 < self.minibatch_size <= self.batch_size:
            raise ValueError(
                f"minibatch_size must be from 1 to batch_size {self.batch_size}, got {self.minibatch_size}"
            )
        choices = (("kl_estimator", ESTIMATORS), ("aggregation", AGGREGATIONS), ("critic", ("separate", "head")))
        for name, allowed in choices:
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
    reference: see `Reference`.
    critic: unless given, with critic="separate" a copy of the reward model where that is one, else of the policy's
        trunk with a fresh head; with critic="head" a fresh head on the policy's trunk. Then one forward gives log-probs
        and values, and the value loss, weighed by vf_coef, moves the trunk too. With adapters on the policy all of PPO
        holds its weights once.
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
        if critic is None and config.critic == "head":
            critic = ValueModel.from_model(model, share_trunk=True)
        elif critic is None:
            critic = ValueModel.from_model(reward if isinstance(reward, RewardModel) else model)
        self.critic, self.one_trunk = critic, critic.trunk is model.trunk
        if self.one_trunk != (config.critic == "head"):
            trunk = "the policy's trunk" if self.one_trunk else "a trunk of its own"
            raise ValueError(f"critic={config.critic!r}, but the critic given is on {trunk}")
        super().__init__(model, examples, config, tokenizer=tokenizer, out=out)
        self.reference = Reference(model, reference)
        self.reward = reward.eval() if isinstance(reward, nn.Module) else reward
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        positions = model.config.max_positions
        self.prompt_length = min(config.max_prompt_length, positions - config.response_length)
        if self.prompt_length < 1:
            raise ValueError(f"response_length {config.response_length} leaves no prompt of {positions} positions")
        self.episodes, self.started = 0, time.monotonic()  # eps: episodes a second

    def trained_models(self) -> list[nn.Module]:
        return [self.model, self.critic]

    def settings(self) -> dict:
        return {"eos_ids": self.eos_ids}

    def state(self) -> dict[str, Tensor]:
        seconds = torch.tensor(time.monotonic() - self.started, dtype=torch.float64)
        counters = {"episodes": torch.tensor(self.episodes), "seconds": seconds}
        return super().state() | counters | {"sampling": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.generator.set_state(state["sampling"])
        self.episodes, self.started = int(state["episodes"]), time.monotonic() - float(state["seconds"])

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
        self.check(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, values=old_values, kl=kl)

        # 5. Several passes of clipped updates over the same rollout, in minibatches.
        experience = Experience(old_logprobs, old_values, advantages, returns)
        minibatch_size = config.minibatch_size or -(-config.batch_size // 4)
        for epoch in range(config.ppo_epochs):
            order = torch.randperm(len(batch), generator=self.generator, device=self.device)
            for i, index in enumerate(order.split(minibatch_size)):
                losses = self.minibatch_losses(rows(rollout, index), rows(experience, index), metrics)
                self.optimize(losses if epoch or i else self.checked(losses, metrics))

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

    def check(self, **columns: Tensor) -> None:
        """FloatingPointError naming column, row and token where one (B, R) holds what it never may."""
        for (name, x), bad in zip(columns.items(), torch.stack([~x.isfinite() for x in columns.values()]).cpu()):
            if bad.any():
                row, token = bad.nonzero()[0].tolist()
                raise FloatingPointError(f"{name} is {x[row, token]} at row {row}, token {token}: {DIVERGED}")
        if self.config.kl_estimator != "k1" and (columns["kl"] < 0).any():
            row, token = (columns["kl"] < 0).nonzero()[0].tolist()
            value = columns["kl"][row, token]
            raise FloatingPointError(f"{self.config.kl_estimator} is {value} < 0 at row {row}, token {token}")

    def checked(self, losses: Iterator[Tensor], metrics: Metrics) -> Iterator[Tensor]:
        """The losses of a rollout's first minibatch; then, before it updates anything, the policy must still be the one
        that the old log-probs are of: ratio 1 up to rounding. With dropout it is not."""
        yield from losses
        means = metrics.means()
        error = max(abs(means["val/ratio"] - 1), means["policy/approxkl_avg"])
        if error > MAX_FIRST_ERROR[self.config.precision] and not self.config.dropout:
            raise FloatingPointError(
                f"the first minibatch has ratio {means['val/ratio']:.6g} and approximate KL "
                f"{means['policy/approxkl_avg']:.3g}, not 1 and 0; nothing updated. Likely causes: the policy is in "
                "train mode, or moved between rollout and update, or its forward depends on the other rows of a batch"
            )

    def minibatch_losses(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> Iterator[Tensor]:
        """The PPO loss of each micro-batch; the parts add up to the minibatch's loss."""
        config = self.config
        weights = loss_weights(rollout.response_mask, config.aggregation)  # (B, R)
        clipping = dict(clip_range=config.clip_range, value_clip_range=config.value_clip_range)
        for part, old, w in micro_batches(config.micro_batch_size, rollout, experience, weights):
            counted = [x[part.response_mask][None] for x in (*old, w)]  # (1, M)

            def policy_loss_of(logprobs, tokens, counted=counted):
                old_logprobs, old_values, advantages, returns, weights = (x[:, tokens] for x in counted)
                data = logprobs[None], old_logprobs, advantages, old_values, old_values, returns
                mask = torch.ones_like(weights, dtype=torch.bool)
                return ppo_loss(*data, mask, vf_coef=0.0, weights=weights, **clipping)[0]

            logprobs, entropy, values = self.forward(part, policy_loss_of)
            loss, stats = ppo_loss(
                logprobs,
                old.old_logprobs,
                old.advantages,
                values,
                old.old_values,
                old.returns,
                part.response_mask,
                vf_coef=config.vf_coef,
                entropy=entropy.detach(),
                weights=w,
                **clipping,
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

    def forward(self, rollout: Rollout, loss_of: Callable | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, entropy and values of the response tokens, all (B, R); loss_of as for `response_logprobs`."""
        with self.autocast():
            hidden = response_hidden(self.model.trunk, rollout)
            logprobs, entropy = response_logprobs(self.model, rollout, self.config.temperature, hidden, loss_of)
            values = response_values(self.critic, rollout, hidden if self.one_trunk else None)
        return logprobs, entropy, values

    @torch.no_grad()
    def predict(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """old_logprobs, ref_logprobs, values and entropy, all (B, R).

        The old log-probs are computed by the training forward, not taken from sampling, so that the ratio of the first
        minibatch is 1 even where a fast decoder rounds differently; `val/rollout_mismatch` reports the difference.
        """
        parts = []
        for (part,) in micro_batches(self.config.micro_batch_size, rollout):
            old_logprobs, entropy, values = self.forward(part)
            with self.reference.policy() as reference, self.autocast():
                ref_logprobs, _ = response_logprobs(reference, part, self.config.temperature)
            parts.append((old_logprobs, ref_logprobs, values, entropy))
        return tuple(torch.cat(columns) for columns in zip(*parts))

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        """Scores (B,) of the responses, the missing-EOS penalty taken off."""
        prompts, responses = rollout.prompts(), rollout.responses()
        if isinstance(self.reward, RewardModel):
            examples = [Example(p, r) for p, r in zip(prompts, responses)]
            parts = self.token_batches(examples)
            scores = torch.cat([self.reward.read(read_hidden(self.reward.trunk, part, part.last)) for part in parts])
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
        prompts, responses = self._readable(prompts), self._readable(responses)
        try:
            scores = self.reward(prompts, responses)
        except Exception as error:
            raise RuntimeError(f"the reward raised {error!r}; {self._raises_on(prompts, responses)}") from error
        scores = torch.as_tensor(scores, dtype=torch.float32, device=self.device)
        if scores.shape != (len(prompts),):
            raise ValueError(f"the reward returned shape {tuple(scores.shape)} for {len(prompts)} responses")
        return scores

    def _raises_on(self, prompts: list, responses: list) -> str:
        """The first row on which the reward raises when it is called with that one alone, in words."""
        for row, (prompt, response) in enumerate(zip(prompts, responses)):
            try:
                self.reward([prompt], [response])
            except Exception:
                return f"so it does on row {row} alone: prompt {prompt!r}, response {response!r}"
        return f"on all {len(prompts)} rows at once, on no row alone"

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
