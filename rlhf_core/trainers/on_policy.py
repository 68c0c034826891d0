"""What PPO and the methods without a critic share: sample, score, compare with the reference, update in minibatches.

A subclass's `step` puts these parts in the order of its paper. Here are the rewards' shaping, the coefficients that
follow a target, and the clipped policy update with everything that may be added to its loss.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.data import Example, Tokenizer
from rlhf_core.data.collate import count_targets
from rlhf_core.data.encode import cut_prompt
from rlhf_core.losses.kl import kl_loss
from rlhf_core.masking import Moments, last_token_index, loss_weights, masked_mean, masked_moments
from rlhf_core.models import Transformer
from rlhf_core.ops import kl_estimate, ppo_loss
from rlhf_core.ops.policy_loss import PPOLossStats
from rlhf_core.rollout import Rollout, response_full_kl, response_hidden, response_logprobs, sample
from rlhf_core.trainers.common import Metrics, Trainer, micro_batches, rows
from rlhf_core.trainers.completions import completion_loss
from rlhf_core.trainers.config import OnPolicyConfig
from rlhf_core.trainers.reference import Reference
from rlhf_core.trainers.scoring import Reward, Scorer

MAX_FIRST_ERROR = {"float32": 1e-3, "bfloat16": 0.05}  # of the first minibatch's ratio: its padding rounds otherwise
DIVERGED = "the weights have diverged (a smaller lr, fewer ppo_epochs) or overflow in bfloat16"


class Experience(NamedTuple):
    """What the passes over a rollout read beside it, all (B, R), fixed while the policy moves."""

    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor
    old_values: Tensor | None = None  # with a critic
    returns: Tensor | None = None


class Coefficient:
    """A coefficient that is steered so that what it holds down stays at a target (Ziegler et al. 2019, section 2.2).

    value *= 1 + clip(measured / target - 1, +-0.2) * n / horizon, n the responses seen; sign -1 for what it lifts.
    """

    def __init__(self, value: float, target: float | None, horizon: int, sign: int = 1):
        self.value, self.target, self.horizon, self.sign = value, target, horizon, sign

    def update(self, measured: float, n: int) -> None:
        if self.target is not None:
            error = min(max(measured / self.target - 1, -0.2), 0.2)
            self.value *= 1 + self.sign * error * n / self.horizon


class OnPolicyTrainer(Trainer):
    """model: the policy; examples: prompts as lists of token ids.

    reward: what `Scorer` takes: a RewardModel, a callable (prompts, responses) -> rewards, or several with weights.
    reference: see `Reference`; with reference_ema a copy of it moves.
    eos_ids: every token that ends a response; None takes the policy's own.
    ptx_examples: `Example`s whose likelihood is held up on the way (Ouyang et al. 2022, eq. 2), with ptx_coef.
    """

    main_metric = "objective/scores"

    def __init__(
        self,
        model: Transformer,
        examples: Sequence[Sequence[int]],
        config: OnPolicyConfig,
        *,
        reward: Reward | Sequence[tuple[Reward, float]],
        reference: Transformer | None = None,
        eos_ids: tuple[int, ...] | None = None,
        ptx_examples: Sequence[Example] = (),
        tokenizer: Tokenizer | None = None,
        out: str | os.PathLike | None = None,
    ):
        super().__init__(model, examples, config, tokenizer=tokenizer, out=out)
        self.reference = Reference(model, reference, moves=config.reference_ema is not None)
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        if bool(config.ptx_coef) != bool(ptx_examples):
            raise ValueError(f"ptx_coef {config.ptx_coef} goes with ptx_examples, there are {len(ptx_examples)}")
        self._check_lengths("ptx example", ptx_examples)
        self.ptx_examples = ptx_examples
        self.scorer = Scorer(
            reward,
            tokenizer=tokenizer,
            pad_id=self.pad_id,
            batch_size=config.micro_batch_size,
            device=self.device,
            of_steps=config.process_rewards,
        )
        self.scorer.check_vocabulary(model)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        positions = model.config.max_positions
        self.prompt_length = min(config.max_prompt_length, positions - config.response_length)
        if self.prompt_length < 1:
            raise ValueError(f"response_length {config.response_length} leaves no prompt of {positions} positions")
        self.kl_coef = Coefficient(config.kl_coef, config.kl_target, config.kl_horizon)
        self.entropy_coef = Coefficient(config.entropy_coef, config.entropy_target, config.kl_horizon, sign=-1)
        self.score_moments = Moments(*torch.zeros(3, dtype=torch.float64, device=self.device))
        self.episodes, self.started = 0, time.monotonic()  # eps: episodes a second

    # ---- before the updates

    def sample(self, batch: list[list[int]], num_samples: int = 1, **options) -> Rollout:
        """Responses to every prompt of a batch, those of a prompt one after the other; options as for `sample`."""
        config = self.config
        settings = dict(max_new_tokens=config.response_length, temperature=config.temperature)
        prompts = [cut_prompt(prompt, self.prompt_length, self.model.config.bos_id) for prompt in batch]
        settings |= dict(num_samples=num_samples, eos_ids=self.eos_ids, generator=self.generator)
        return sample(self.sampled, prompts, **(settings | options))

    @property
    def sampled(self) -> nn.Module:
        """What responses are sampled from."""
        return self.model

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        """Rewards as the Scorer gives them, (B,) or (B, R), the penalties for length and a missing end taken off."""
        rewards = self.scorer.rewards_of(rollout.prompts(), rollout.responses())
        if rewards.ndim == 2:
            rewards = F.pad(rewards, (0, rollout.response_ids.shape[1] - rewards.shape[1]))
        penalty = self.config.length_penalty * rollout.response_mask.sum(dim=1)
        if self.config.missing_eos_penalty is not None:
            penalty = penalty + self.config.missing_eos_penalty * ~self.ended(rollout)
        return _add_to_last(rewards, -penalty, rollout.response_mask)

    def shaped(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Rewards (B,) or (B, R), whitened and clipped as the config says."""
        config, scores = self.config, scores_of(rewards)
        if config.whiten_scores != "none":
            moments = masked_moments(scores.double(), torch.ones_like(scores, dtype=torch.bool))
            if config.whiten_scores == "running":
                moments = self.score_moments = self.score_moments.combine(moments)
            scale = torch.rsqrt(moments.m2 / moments.count + 1e-8).float()
            rewards = rewards * scale
            if config.whiten_mean:
                rewards = _add_to_last(rewards, -(moments.mean.float() * scale).expand(len(mask)), mask)
        return rewards if config.score_clip is None else rewards.clamp(-config.score_clip, config.score_clip)

    @torch.no_grad()
    def predict(self, rollout: Rollout) -> dict[str, Tensor]:
        """logprobs, ref_logprobs, entropy and kl, all (B, R), and what a subclass's `forward` gives beside them.

        The old log-probs are computed by the training forward, not taken from sampling, so that the ratio of the first
        minibatch is 1 even where a fast decoder rounds differently; `val/rollout_mismatch` reports the difference.
        """
        parts, full = [], self.config.kl_estimator == "full" and self.config.kl_in == "reward"
        for (part,) in micro_batches(self.config.micro_batch_size, rollout):
            found = self.forward(part)
            hidden = found.pop("hidden")
            with self.reference.policy() as reference, self.autocast():
                ref_hidden = response_hidden(reference.trunk, part)
                ref_logprobs, _ = response_logprobs(reference, part, self.config.temperature, ref_hidden)
                if full:
                    heads = self.model, reference
                    kl = response_full_kl(*heads, part, self.config.temperature, hidden, ref_hidden)
            if not full:
                estimator = "k3" if self.config.kl_estimator == "full" else self.config.kl_estimator
                kl = kl_estimate(found["logprobs"], ref_logprobs, estimator=estimator, mask=part.response_mask)
            parts.append(found | {"ref_logprobs": ref_logprobs, "kl": kl})
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.check(columns)
        return columns

    def forward(self, rollout: Rollout, loss_of: Callable | None = None) -> dict[str, Tensor]:
        """logprobs and entropy (B, R) of the response tokens, and the hidden states they were read from; loss_of as for
        `response_logprobs`."""
        with self.autocast():
            hidden = response_hidden(self.model.trunk, rollout)
            logprobs, entropy = self.response_logprobs(rollout, hidden, loss_of)
        return {"logprobs": logprobs, "entropy": entropy, "hidden": hidden}

    def response_logprobs(
        self, rollout: Rollout, hidden: Tensor, loss_of: Callable | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy (B, R) under what is sampled from."""
        return response_logprobs(self.model, rollout, self.config.temperature, hidden, loss_of)

    def check(self, columns: dict[str, Tensor]) -> None:
        """FloatingPointError naming column, row and token where one (B, R) holds what it never may."""
        for (name, x), bad in zip(columns.items(), torch.stack([~x.isfinite() for x in columns.values()]).cpu()):
            if bad.any():
                row, token = bad.nonzero()[0].tolist()
                raise FloatingPointError(f"{name} is {x[row, token]} at row {row}, token {token}: {DIVERGED}")
        kl, estimator = columns.get("kl"), self.config.kl_estimator
        if kl is not None and estimator != "k1" and (kl < 0).any():
            row, token = (kl < 0).nonzero()[0].tolist()
            raise FloatingPointError(
                f"{estimator} is {kl[row, token]} < 0 at row {row}, token {token}: no log-probs give that, so the op "
                "is wrong here; try RLHF_CORE_BACKEND=reference, and see `rlhf-core info` for what that replaces"
            )

    def ended(self, rollout: Rollout) -> Tensor:
        """(B,) bool: whether the last counted token is one of the stop set."""
        last = rollout.response_ids.gather(1, last_token_index(rollout.response_mask)[:, None])[:, 0]
        return torch.isin(last, torch.tensor(self.eos_ids, device=last.device, dtype=last.dtype))

    # ---- the updates

    def update(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> None:
        """Passes of clipped updates over the rollout, in minibatches; they end early beyond max_approx_kl."""
        config, size = self.config, len(rollout.response_ids)
        if config.importance_cap is not None:
            log_weight = (experience.old_logprobs - rollout.logprobs).where(rollout.response_mask, 0)
            weight = log_weight.exp().clamp_max(config.importance_cap)
            experience = experience._replace(advantages=experience.advantages * weight)
        for epoch in range(config.ppo_epochs):
            order = torch.randperm(size, generator=self.generator, device=self.device)
            for i, index in enumerate(order.split(config.update_size)):
                seen = Metrics()
                losses = self.minibatch_losses(rows(rollout, index), rows(experience, index), seen)
                losses = losses if epoch or i else self.checked(losses, seen)
                try:
                    norm = self.optimize(chain(losses, self.ptx_losses(len(index), seen)))
                except FloatingPointError as error:
                    with torch.no_grad():
                        self.check({name: x for name, x in self.forward(rollout).items() if name != "hidden"})
                    raise FloatingPointError(f"{error}; perhaps {DIVERGED}") from None
                metrics.merge(seen)
                metrics.add("grad_norm", torch.tensor(norm))
                if config.max_approx_kl is not None and seen.means()["policy/approxkl_avg"] > config.max_approx_kl:
                    return

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
        """The loss of each micro-batch; the parts add up to the minibatch's loss."""
        config = self.config
        weights = loss_weights(rollout.response_mask, config.aggregation, length=config.response_length)  # (B, R)
        for part, old, w in micro_batches(config.micro_batch_size, rollout, experience, weights):
            mask = part.response_mask
            counted = [x[mask][None] for x in (old.old_logprobs, old.advantages, old.ref_logprobs, w)]  # (1, M)

            def loss_of(logprobs, tokens, counted=counted):
                old_logprobs, advantages, ref_logprobs, weights = (x[:, tokens] for x in counted)
                mask = torch.ones_like(weights, dtype=torch.bool)
                old = Experience(old_logprobs, advantages, ref_logprobs)
                return self.token_loss(logprobs[None], old, mask, weights)[0]

            found = self.forward(part, loss_of if self.token_by_token else None)
            logprobs, entropy, values = found["logprobs"], found["entropy"], found.get("values")
            loss, stats = self.token_loss(logprobs, old, mask, w, entropy, values)
            if self.full_kl_in_loss:
                loss = loss + self.kl_coef.value * (self.full_kl(part, found["hidden"]) * w).sum()
            self.add_statistics(metrics, stats)
            yield loss

    def ptx_losses(self, size: int, metrics: Metrics) -> Iterator[Tensor]:
        """ptx_coef times the mean cross-entropy of so many ptx examples, drawn with replacement, by micro-batches."""
        if self.config.ptx_coef:
            where = dict(generator=self.generator, device=self.device)
            batch = [self.ptx_examples[i] for i in torch.randint(len(self.ptx_examples), (size,), **where).tolist()]
            count = sum(map(count_targets, batch))
            for tokens in self.token_batches(batch):
                with self.autocast():
                    loss = completion_loss(self.model, tokens, count)
                n = len(tokens.targets)
                metrics.add_mean("loss/ptx", loss * count / n, n)
                yield self.config.ptx_coef * loss

    @property
    def full_kl_in_loss(self) -> bool:
        return self.config.kl_in == "loss" and self.config.kl_estimator == "full" and self.kl_coef.value > 0

    @property
    def token_by_token(self) -> bool:
        """Whether the loss falls apart into tokens and sees of the policy their log-probs alone."""
        return self.entropy_coef.value == 0

    def token_loss(
        self,
        logprobs: Tensor,
        old: Experience,
        mask: Tensor,
        weights: Tensor,
        entropy: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, PPOLossStats]:
        """The clipped loss of tokens (B, R), the KL's part in it, and statistics; without entropy not its bonus."""
        config, entropy_coef = self.config, self.entropy_coef.value if entropy is not None else 0.0
        high = config.clip_range if config.clip_range_high is None else config.clip_range_high
        if not entropy_coef and entropy is not None:
            entropy = entropy.detach()  # for the statistics: else a gradient of zeros would be taken to the logits
        loss, stats = ppo_loss(
            self.ratio_logprobs(logprobs, old.old_logprobs, mask),
            old.old_logprobs,
            old.advantages,
            values,
            None if values is None else old.old_values,
            None if values is None else old.returns,
            mask,
            clip_range=(config.clip_range, high),
            value_clip_range=self.value_clip_range,
            vf_coef=self.vf_coef,
            entropy=entropy,
            entropy_coef=entropy_coef,
            dual_clip=config.dual_clip,
            weights=weights,
        )
        if config.kl_in == "loss" and not self.full_kl_in_loss and self.kl_coef.value:
            kl = kl_loss(logprobs, old.old_logprobs, old.ref_logprobs, mask, estimator=config.kl_estimator)
            loss = loss + self.kl_coef.value * (kl * weights).sum()
        return loss, stats

    value_clip_range, vf_coef = None, 0.0  # without a critic

    def ratio_logprobs(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The log-probs whose ratio to the old ones is clipped."""
        return logprobs

    def full_kl(self, rollout: Rollout, hidden: Tensor) -> Tensor:
        """Exact KL (B, R) of the response tokens, with gradient to the policy."""
        with self.reference.policy() as reference, self.autocast():
            ref_hidden = response_hidden(reference.trunk, rollout)
        with self.autocast():
            heads = self.model, self.reference.model
            return response_full_kl(*heads, rollout, self.config.temperature, hidden, ref_hidden)

    @staticmethod
    def add_statistics(metrics: Metrics, stats: PPOLossStats) -> None:
        for name, mean in {
            "loss/policy_avg": stats.policy_loss,
            "policy/approxkl_avg": stats.approx_kl,
            "policy/clipfrac_avg": stats.clip_frac,
            "policy/entropy_avg": stats.entropy,
            "policy/dual_clipfrac_avg": stats.dual_clip_frac,
            "val/ratio": stats.ratio,
            "ratio_squared": stats.ratio_squared,
        }.items():
            metrics.add_mean(name, mean, stats.count)

    # ---- after the updates

    def report(
        self, rollout: Rollout, columns: dict[str, Tensor], scores: Tensor, shaped: Tensor, metrics: Metrics
    ) -> dict[str, float]:
        """The step's metrics; steers the coefficients and moves a reference that follows.

        columns, scores, shaped: what `predict`, `score` and `shaped` gave.
        """
        mask, n = rollout.response_mask, len(rollout.response_ids)
        penalty = columns["kl"].sum(dim=1) * (-self.kl_coef.value if self.config.kl_in == "reward" else 0.0)
        for name, values in {
            "objective/kl": kl_estimate(columns["logprobs"], columns["ref_logprobs"], mask=mask).sum(dim=1),
            "objective/entropy": columns["entropy"].sum(dim=1),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": scores_of(shaped) + penalty,
            "objective/scores": scores_of(scores),
            "response_length": mask.sum(dim=1).float(),
        }.items():
            metrics.add(name, values)
        report = metrics.means()
        report["val/ratio_var"] = report.pop("ratio_squared") - report["val/ratio"] ** 2
        mismatch = (columns["logprobs"] - rollout.logprobs).where(mask, 0).abs()
        report["val/rollout_mismatch"] = float(mismatch.max())
        report["val/rollout_mismatch_mean"] = float(masked_mean(mismatch, mask))
        report["val/num_eos_tokens"] = int(self.ended(rollout).sum())
        report |= {"objective/kl_coef": self.kl_coef.value, "policy/entropy_coef": self.entropy_coef.value}
        self.kl_coef.update(report["objective/kl"], n)
        self.entropy_coef.update(float(masked_mean(columns["entropy"], mask)), n)
        self._move_reference()
        self.episodes += n
        report |= {"lr": self.optimizer.param_groups[0]["lr"], "episode": self.episodes}
        return report | {"eps": self.episodes / (time.monotonic() - self.started)}

    @torch.no_grad()
    def _move_reference(self) -> None:
        """A step of the exponential moving average, where the reference is one."""
        if self.reference.moves:
            for slow, fast in zip(self.reference.model.parameters(), self.model.parameters()):
                slow.lerp_(fast, 1 - self.config.reference_ema)

    # ---- checkpoints

    def settings(self) -> dict:
        return {"eos_ids": self.eos_ids, "reward_weights": [weight for _, weight in self.scorer.rewards]}

    def state(self) -> dict[str, Tensor]:
        numbers = dict(episodes=self.episodes, seconds=time.monotonic() - self.started)
        numbers |= dict(kl_coef=self.kl_coef.value, entropy_coef=self.entropy_coef.value)
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        state |= super().state() | {
            "sampling": self.generator.get_state(),
            "score_moments": torch.stack([x.double() for x in self.score_moments]),
        }
        if self.reference.moves:
            state |= {f"reference:{name}": x for name, x in self.reference.model.state_dict().items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.generator.set_state(state["sampling"])
        self.episodes, self.started = int(state["episodes"]), time.monotonic() - float(state["seconds"])
        self.kl_coef.value, self.entropy_coef.value = float(state["kl_coef"]), float(state["entropy_coef"])
        self.score_moments = Moments(*state["score_moments"].to(self.device))
        if self.reference.moves:
            weights = {name: state[f"reference:{name}"] for name in self.reference.model.state_dict()}
            self.reference.model.load_state_dict(weights)


def scores_of(rewards: Tensor) -> Tensor:
    """What a response earns in all (B,), of rewards (B,) or (B, R)."""
    return rewards if rewards.ndim == 1 else rewards.sum(dim=1)


def _add_to_last(rewards: Tensor, amounts: Tensor, mask: Tensor) -> Tensor:
    """Rewards (B,), or (B, R) of tokens, with amounts (B,) added; to the last counted token."""
    if rewards.ndim == 1:
        return rewards + amounts
    return rewards.scatter_add(1, last_token_index(mask)[:, None], amounts[:, None])
