"""What PPO and the methods without a critic share: sample, score, compare with the reference, update, report.

A subclass's `step` puts these parts in the order of its paper. Here are sampling and the rewards' shaping; the updates
are in clipped_updates.py.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.data import Example, Tokenizer
from rlhf_core.data.encode import cut_prompt
from rlhf_core.masking import Moments, last_token_index, masked_mean, masked_moments
from rlhf_core.models import Transformer
from rlhf_core.ops import kl_estimate
from rlhf_core.rollout import Rollout, response_full_kl, response_hidden, response_logprobs, sample
from rlhf_core.trainers.clipped_updates import ClippedUpdates, Coefficient
from rlhf_core.trainers.common import Metrics, micro_batches
from rlhf_core.trainers.config import OnPolicyConfig
from rlhf_core.trainers.reference import Reference
from rlhf_core.trainers.scoring import Reward, Scorer


class OnPolicyTrainer(ClippedUpdates):
    """model: the policy; examples: prompts as lists of token ids.

    reward: what `Scorer` takes: a RewardModel, a callable (prompts, responses) -> rewards, or several with weights.
    reference: see `Reference`; with reference_ema a copy of it moves. With kl_coef 0 none is held, and no KL reported,
        unless it is given.
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
        needed = config.kl_coef > 0 or reference is not None
        self.reference = (
            Reference(model, reference, moves=config.reference_ema is not None) if needed else None
        )
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        if bool(config.ptx_coef) != bool(ptx_examples):
            raise ValueError(
                f"ptx_coef {config.ptx_coef} goes with ptx_examples, there are {len(ptx_examples)}"
            )
        self.check_examples("ptx example", ptx_examples, (Example,))
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
            raise ValueError(
                f"response_length {config.response_length} leaves no prompt of {positions} positions"
            )
        if config.kl_in == "reward" and config.kl_coef and config.estimator != "k1":
            warnings.warn(
                f"kl_estimator {config.estimator} in the reward: its policy gradient is not the KL's and may lead away "
                "from the reference; k1 has it there, and in the loss k1, k2, k3 and full",
                stacklevel=2,
            )
        self.kl_coef = Coefficient(config.kl_coef, config.kl_target, config.kl_horizon)
        self.entropy_coef = Coefficient(
            config.entropy_coef, config.entropy_target, config.kl_horizon, sign=-1
        )
        self.score_moments = Moments(*torch.zeros(3, dtype=torch.float64, device=self.device))
        self.episodes, self.started = 0, time.monotonic()  # eps: episodes a second

    # ---- before the updates

    def sample(self, batch: list[list[int]], num_samples: int = 1, **options) -> Rollout:
        """Responses to every prompt of a batch, those of a prompt one after the other; options as for `sample`."""
        config = self.config
        settings = dict(max_new_tokens=config.response_length, temperature=config.temperature)
        prompts = [
            cut_prompt(prompt, self.prompt_length, self.model.config.bos_id) for prompt in batch
        ]
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
            variance = moments.m2 / moments.count
            varies = variance > 1e-10 * (variance + moments.mean**2)  # by more than rounding
            scale = torch.rsqrt(variance.where(varies, 1)).float()
            rewards = rewards * scale
            if config.whiten_mean:
                rewards = _add_to_last(
                    rewards, -(moments.mean.float() * scale).expand(len(mask)), mask
                )
        return (
            rewards
            if config.score_clip is None
            else rewards.clamp(-config.score_clip, config.score_clip)
        )

    @torch.no_grad()
    def predict(self, rollout: Rollout) -> dict[str, Tensor]:
        """logprobs, ref_logprobs, entropy and kl, all (B, R), and what a subclass adds in `forward`; without
        a reference the log-probs twice, and a KL of 0.

        The old log-probs are computed by the training forward, not taken from sampling, so that the ratio of the first
        minibatch is 1 even where a fast decoder rounds differently; `val/rollout_mismatch` reports the difference.
        """
        parts = []
        for (part,) in micro_batches(self.config.micro_batch_size, rollout):
            found = self.forward(part)
            ref_logprobs, kl = self.compare(part, found["logprobs"], found.pop("hidden"))
            parts.append(found | {"ref_logprobs": ref_logprobs, "kl": kl})
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.check(columns)
        return columns

    def compare(self, rollout: Rollout, logprobs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's log-probs and the policy's KL to it, (B, R)."""
        if self.reference is None:
            return logprobs, torch.zeros_like(logprobs)
        estimator, temperature = self.config.estimator, self.config.temperature
        with self.reference.policy() as reference, self.autocast():
            ref_hidden = response_hidden(reference.trunk, rollout)
            ref_logprobs, _ = response_logprobs(reference, rollout, temperature, ref_hidden)
            if estimator == "full" and self.config.kl_in == "reward":
                return ref_logprobs, response_full_kl(
                    self.model, reference, rollout, temperature, hidden, ref_hidden
                )
        estimator = "k3" if estimator == "full" else estimator
        return ref_logprobs, kl_estimate(
            logprobs, ref_logprobs, estimator=estimator, mask=rollout.response_mask
        )

    def ended(self, rollout: Rollout) -> Tensor:
        """(B,) bool: whether the last counted token is one of the stop set."""
        last = rollout.response_ids.gather(1, last_token_index(rollout.response_mask)[:, None])[
            :, 0
        ]
        return torch.isin(last, torch.tensor(self.eos_ids, device=last.device, dtype=last.dtype))

    # ---- after the updates

    def report(
        self,
        rollout: Rollout,
        columns: dict[str, Tensor],
        scores: Tensor,
        shaped: Tensor,
        metrics: Metrics,
    ) -> dict[str, float]:
        """The step's metrics; steers the coefficients and moves a reference that follows.

        columns, scores, shaped: what `predict`, `score` and `shaped` gave.
        """
        mask, n = rollout.response_mask, len(rollout.response_ids)
        penalty = columns["kl"].sum(dim=1) * (
            -self.kl_coef.value if self.config.kl_in == "reward" else 0.0
        )
        for name, values in {
            "objective/kl": kl_estimate(
                columns["logprobs"], columns["ref_logprobs"], mask=mask
            ).sum(dim=1),
            "objective/entropy": columns["entropy"].sum(dim=1),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": scores_of(shaped) + penalty,
            "objective/scores": scores_of(scores),
            "response_length": mask.sum(dim=1).float(),
        }.items():
            metrics.add(name, values)
        report = metrics.means()
        if self.reference is None:
            del report["objective/kl"]
        report["val/ratio_var"] = report.pop("ratio_squared") - report["val/ratio"] ** 2
        mismatch = (columns["logprobs"] - rollout.logprobs).where(mask, 0).abs()
        report["val/rollout_mismatch"] = float(mismatch.max())
        report["val/rollout_mismatch_mean"] = float(masked_mean(mismatch, mask))
        report["val/num_eos_tokens"] = int(self.ended(rollout).sum())
        report |= {
            "objective/kl_coef": self.kl_coef.value,
            "policy/entropy_coef": self.entropy_coef.value,
        }
        if not self.policy_rests:
            self.kl_coef.update(report.get("objective/kl", 0.0), n)
            self.entropy_coef.update(float(masked_mean(columns["entropy"], mask)), n)
        self._move_reference()
        self.episodes += n
        report |= {"lr": self.optimizer.param_groups[0]["lr"], "episode": self.episodes}
        return report | {"eps": self.episodes / (time.monotonic() - self.started)}

    @torch.no_grad()
    def _move_reference(self) -> None:
        """A step of the exponential moving average, where the reference is one."""
        if self.config.reference_ema is not None:
            for slow, fast in zip(self.reference.model.parameters(), self.model.parameters()):
                slow.lerp_(fast, 1 - self.config.reference_ema)

    # ---- checkpoints

    def settings(self) -> dict:
        return {
            "eos_ids": self.eos_ids,
            "reward_weights": [weight for _, weight in self.scorer.rewards],
        }

    def state(self) -> dict[str, Tensor]:
        numbers = dict(episodes=self.episodes, seconds=time.monotonic() - self.started)
        numbers |= dict(kl_coef=self.kl_coef.value, entropy_coef=self.entropy_coef.value)
        state = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        state |= super().state() | {
            "sampling": self.generator.get_state(),
            "score_moments": torch.stack([x.double() for x in self.score_moments]),
        }
        if self.config.reference_ema is not None:
            state |= {
                f"reference:{name}": x for name, x in self.reference.model.state_dict().items()
            }
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.generator.set_state(state["sampling"])
        self.episodes, self.started = (
            int(state["episodes"]),
            time.monotonic() - float(state["seconds"]),
        )
        self.kl_coef.value, self.entropy_coef.value = (
            float(state["kl_coef"]),
            float(state["entropy_coef"]),
        )
        self.score_moments = Moments(*state["score_moments"].to(self.device))
        if self.config.reference_ema is not None:
            weights = {
                name: state[f"reference:{name}"] for name in self.reference.model.state_dict()
            }
            self.reference.model.load_state_dict(weights)


def scores_of(rewards: Tensor) -> Tensor:
    """What a response earns in all (B,), of rewards (B,) or (B, R)."""
    return rewards if rewards.ndim == 1 else rewards.sum(dim=1)


def _add_to_last(rewards: Tensor, amounts: Tensor, mask: Tensor) -> Tensor:
    """Rewards (B,), or (B, R) of tokens, with amounts (B,) added; to the last counted token."""
    if rewards.ndim == 1:
        return rewards + amounts
    return rewards.scatter_add(1, last_token_index(mask)[:, None], amounts[:, None])
