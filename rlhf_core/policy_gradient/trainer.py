"""The parts of a policy-gradient step: sample, score, predict, update, report.

A method's `step` calls them in the order of its paper and turns rewards into advantages in between;
see algorithms/ppo.py. shaping.py has the arithmetic on rewards, report.py the metrics.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core import distributed
from rlhf_core.data import Example, Tokenizer
from rlhf_core.data.batches import micro_batches, rows
from rlhf_core.data.collate import count_targets
from rlhf_core.feedback.candidates import ALL_TIED, fit_prompts
from rlhf_core.feedback.diversity import diversity
from rlhf_core.feedback.judges import Judge
from rlhf_core.feedback.rewards import Reward, Scorer, scores_of
from rlhf_core.generation import Engine, check_stop_strings, draw_seeds
from rlhf_core.losses.kl import kl_loss
from rlhf_core.masking import Moments, loss_weights, masked_mean, masked_moments
from rlhf_core.models import Transformer, ValueModel, eval_mode
from rlhf_core.models.gather import reshard, whole, whole_tensor
from rlhf_core.ops import kl_estimate, ppo_loss
from rlhf_core.ops.linear_logprobs import TokenStatistics
from rlhf_core.ops.policy_loss import PPOLossStats
from rlhf_core.policy_gradient.ahead import Flight, flight_of, flight_state
from rlhf_core.policy_gradient.config import PolicyGradientConfig
from rlhf_core.policy_gradient.experience import Experience, Predictions
from rlhf_core.policy_gradient.report import (
    POLICY_STATISTICS,
    VALUE_STATISTICS,
    add_importance,
    add_objectives,
    add_statistics,
    rollout_mismatch,
)
from rlhf_core.policy_gradient.shaping import (
    Coefficient,
    importance_ratio,
    importance_weight,
    penalized,
    scaled,
    weighted,
)
from rlhf_core.rollout import (
    Rollout,
    response_full_kl,
    response_hidden,
    response_logprobs,
    response_values,
    sample,
    scatter,
)
from rlhf_core.training.completions import target_loss
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.reference import Reference
from rlhf_core.training.run_log import OnStep
from rlhf_core.training.trainer import Trainer

# Largest error of the first minibatch's ratio: other padding rounds differently.
MAX_FIRST_ERROR = {"float32": 1e-3, "bfloat16": 0.05}
DIVERGED = "the weights have diverged (try a smaller lr or fewer ppo_epochs) or bfloat16 overflows"

ALL_TRUNCATED = (
    "every response is truncated, so with mask_truncated there is nothing to learn. Raise "
    "response_length, or start from a policy that ends its responses"
)


class EarlyStop(Exception):
    """The passes over a rollout stop before the next step."""


class PolicyGradientTrainer(Trainer):
    """A trainer that samples from the policy; a subclass defines `step`.

    Metrics of the loss, means over the optimiser steps: loss = loss/policy_avg + vf_coef
    loss/value_avg + kl_coef loss/kl - entropy_coef loss/entropy + ptx_coef loss/ptx, aggregated as
    the config says. Parts that do not count are left out.
    """

    main_metric = "objective/scores"
    least_movement = 0.1  # nats per response: no event's probability moved by more than 0.23

    def __init__(
        self,
        model: Transformer,
        examples: Sequence[Sequence[int]],
        config: PolicyGradientConfig,
        *,
        reward: Reward | Sequence[tuple[Reward, float]],
        critic: ValueModel | None = None,
        reference: Transformer | None = None,
        eos_ids: tuple[int, ...] | None = None,
        ptx_examples: Sequence[Example] = (),
        eval_examples: Sequence[Sequence[int]] = (),
        eval_judge: Judge | None = None,
        pretraining_examples: Sequence[Example] = (),
        tokenizer: Tokenizer | None = None,
        out: str | os.PathLike | None = None,
        on_step: OnStep | None = None,
        engine: Engine | None = None,
    ):
        """
        Args:
            model: the policy.
            examples: prompts as lists of token ids, or `Prompt` with columns for the reward.
            reward: as for `Scorer`: a RewardModel, a callable (prompts, responses, **columns) ->
                rewards, or several with weights.
            critic: trained with the policy, for methods that have one.
            reference: as for `Reference`; with reference_ema a copy of it follows the policy. With
                kl_coef 0 and no reference given there is none, and no KL is reported.
            eos_ids: tokens that end a response; None: the policy's own.
            eval_examples, eval_judge: held-out prompts, and the judge that compares the answers to
                them with the reference's; see `evaluate_answers`.
            ptx_examples: examples whose likelihood ptx_coef keeps up (Ouyang et al. 2022, eq. 2).
            engine: samples from the policy in place of `generate`, after each change of its
                weights has been loaded into it.
        """
        self.critic, self.engine = critic, engine
        if config.steps_ahead and engine is None:
            raise ValueError("steps_ahead is 1, but there is no engine to sample ahead: pass one")
        if config.steps_ahead and config.importance_cap is None:
            warnings.warn(
                "steps_ahead 1 without importance_cap: the policy gradient takes the samples of "
                "the weights before for its own. Set importance_cap, such as 2",
                stacklevel=2,
            )
        if config.rollout_dtype is not None:
            _check_rollout_dtype(config, model, engine)
        positions, longest = model.config.max_positions, config.response_length
        prompt_length = min(config.max_prompt_length, positions - longest)
        if prompt_length < 1:
            raise ValueError(
                f"response_length {longest} leaves no room for a prompt in the model's {positions} "
                "positions"
            )
        check_stop_strings(config.stop_strings, tokenizer)
        if len(examples):
            examples = fit_prompts(examples, prompt_length, model.config.bos_id, config).prompts
        if len(eval_examples):
            fitted = fit_prompts(eval_examples, prompt_length, model.config.bos_id, config)
            eval_examples = fitted.prompts
        options = dict(
            eval_examples=eval_examples,
            pretraining_examples=pretraining_examples,
            tokenizer=tokenizer,
            out=out,
            on_step=on_step,
        )
        super().__init__(model, examples, config, **options)
        self.shares_trunk = critic is not None and critic.shares_trunk_with(model)
        needed = config.kl_coef > 0 or reference is not None
        moves = config.reference_ema is not None
        self.reference = Reference(model, reference, moves=moves) if needed else None
        if len(eval_examples):
            fixed = needed and not moves
            self.eval_reference = self.reference if fixed else Reference(model, reference)
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        if bool(config.ptx_coef) != bool(ptx_examples):
            raise ValueError(
                f"ptx_coef is {config.ptx_coef}, but there are {len(ptx_examples)} ptx_examples; "
                "pass both or neither"
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
        self.scorer.check_columns(self.examples)
        if len(eval_examples):
            self.scorer.check_columns(eval_examples)
        self.eval_judge = eval_judge
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        if config.kl_in == "reward" and config.kl_coef and config.estimator != "k1":
            warnings.warn(
                f"kl_estimator {config.estimator} in the reward: its policy gradient is not the "
                "KL's and may lead away from the reference. Use k1, or kl_in loss",
                stacklevel=2,
            )
        self.kl_coef = Coefficient(config.kl_coef, config.kl_target, config.kl_horizon)
        self.entropy_coef = Coefficient(
            config.entropy_coef, config.entropy_target, config.kl_horizon, sign=-1
        )
        self.score_moments = Moments(*torch.zeros(3, dtype=torch.float64, device=self.device))
        self.episodes, self.started = 0, time.monotonic()
        # The last pass over a rollout: its order, and the log-probs and entropy that it has read.
        self.order, self.seen = torch.zeros(0, dtype=torch.long), []
        # The rollout whose update trains through the pass of `predict`: its hidden states, values.
        self.held: tuple[Rollout, Tensor, Tensor | None] | None = None
        self._first: tuple[Rollout, Tensor] | None = None  # of the first step, with its log-probs
        self.flights: dict[int, Flight] = {}  # by the steps done before theirs
        self.oldest_version = 0  # steps done when the weights that sampled this rollout were new
        self._upcoming = enumerate(self.batches()) if config.steps_ahead else None

    def trained_models(self) -> list[nn.Module]:
        return [self.model] if self.critic is None else [self.model, self.critic]

    @property
    def policy_trains(self) -> bool:
        """False while only the critic trains."""
        return True

    def head(self, rollout: Rollout):
        """What turns hidden states of the rollout's tokens into log-probs of `sampled_policy`."""
        return self.model

    # ---- before the updates

    def collect(self, batch: list[list[int]], num_samples: int = 1) -> Rollout:
        """The rollout of a step, as `sample`.

        With steps_ahead it was sampled during the step before, and the next one begins.
        """
        self.oldest_version = now = self.steps_done
        if not self.config.steps_ahead:
            return self.sample(batch, num_samples)
        options, flight = {}, self.flights.get(now)
        fresh = flight is not None and now - flight.version <= self.config.steps_ahead
        if fresh and flight.prompts == list(batch):
            self.oldest_version = flight.version
            options = dict(engine=flight, seeds=flight.seeds)
        rollout = self.sample(batch, num_samples, **options)
        self._take_off(num_samples)
        return rollout

    def _take_off(self, num_samples: int) -> None:
        """Let the engine begin with the rollout of the next step, with the weights as they are."""
        now = self.steps_done
        batch = next((batch for i, batch in self._upcoming if i == now + 1), None)
        if batch is None or now + 1 >= self.total_steps:
            return
        seeds = draw_seeds(len(batch) * num_samples, self.generator, self.device)
        options = self.sampling_options(num_samples)
        del options["generator"], options["weight_dtype"]
        options |= dict(seeds=seeds.tolist(), top_k=None, top_p=None, min_p=None)
        generate = partial(options.pop("engine").generate, batch, **options)
        with whole(self.sampled_policy) as policy, distributed.together(local=True):
            if not distributed.rank():
                self.engine.load(policy)
        flight = Flight(now, batch, seeds, (lambda: None) if distributed.rank() else generate)
        self.flights = {now: self.flights[now]} if now in self.flights else {}
        self.flights[now + 1] = flight

    def sampling_options(self, num_samples: int) -> dict[str, Any]:
        """Options of `rollout.sample`."""
        return dict(
            max_new_tokens=self.config.response_length,
            temperature=self.config.temperature,
            num_samples=num_samples,
            eos_ids=self.eos_ids,
            stop_strings=self.config.stop_strings,
            tokenizer=self.tokenizer,
            generator=self.generator,
            engine=self.engine,
            weight_dtype=self.config.rollout_dtype,
        )

    def sample(self, batch: list[list[int]], num_samples: int = 1, **options) -> Rollout:
        """Responses to every prompt; a prompt's responses are adjacent. Options as for `sample`."""
        settings = self.sampling_options(num_samples)
        rollout = sample(self.sampled_policy, batch, **(settings | options))
        if not distributed.rank():  # every rank holds all responses
            self.tokens = self.tokens + rollout.response_mask.sum()
        return rollout

    def evaluate(self) -> dict[str, float]:
        """As for `Trainer`, after what the engine samples for the next step."""
        for flight in self.flights.values():
            flight.wait()  # the engine is about to get other weights
        return super().evaluate()

    @torch.no_grad()
    def score(
        self, rollout: Rollout, batch: list[list[int]], metrics: Metrics | None = None
    ) -> Tensor:
        """Rewards (B,) or (B, R), minus the penalties of `penalized`.

        Args:
            batch: the prompts that the rollout was sampled from.
            metrics: get the score by each criterion of a reward model that has several.
        """
        num_samples = len(rollout.response_ids) // len(batch)
        prompts = [prompt for prompt in batch for _ in range(num_samples)]
        rewards, criteria = self.scorer.rewards_and_criteria(prompts, rollout.responses())
        for name, scores in criteria.items() if metrics is not None else ():
            metrics.add(f"reward/{name}", scores)
        if rewards.ndim == 2:
            rewards = F.pad(rewards, (0, rollout.response_ids.shape[1] - rewards.shape[1]))
        return penalized(
            rewards,
            rollout.response_mask,
            rollout.ended,
            length_penalty=self.config.length_penalty,
            missing_eos_penalty=self.config.missing_eos_penalty,
            overlong_buffer=self.config.overlong_buffer,
            response_length=self.config.response_length,
        )

    def shape(self, rewards: Tensor, mask: Tensor) -> Tensor:
        """Rewards (B,) or (B, R), whitened and clipped as configured."""
        config = self.config
        if config.whiten_scores != "none":
            scores = scores_of(rewards).double()
            moments = masked_moments(scores, torch.ones_like(scores, dtype=torch.bool))
            if config.whiten_scores == "running":
                moments = self.score_moments = self.score_moments.combine(moments)
            rewards = scaled(rewards, mask, moments, subtract_mean=config.whiten_mean)
        if config.score_clip is None:
            return rewards
        return rewards.clamp(-config.score_clip, config.score_clip)

    @torch.no_grad()
    def predict(self, rollout: Rollout) -> Predictions:
        """Log-probs, entropy, KL and values before any update.

        The log-probs come from the training forward, not from sampling, so that the first
        minibatch's ratio is 1 even if a fast decoder rounds differently; `val/rollout_mismatch`
        reports the difference. If the rollout gets one update on all rows at once, that update
        trains through this forward pass.
        """
        config, size = self.config, len(rollout.response_ids)
        at_once = distributed.size() == 1 and size <= (config.micro_batch_size or size)
        one_update = config.at_ratio_1 and self.policy_trains and not config.mask_truncated
        if at_once and one_update:
            predictions = self._predict(rollout, holds=True)
        else:
            parts = micro_batches(config.micro_batch_size, rollout)
            predictions = Predictions(*distributed.gather(self._predict(x) for (x,) in parts))
        self.check_predictions(predictions)
        return predictions

    @torch.no_grad()
    def predict_reference(self, rollout: Rollout) -> Tensor | None:
        """The reference's log-probs (B, R); None without a reference."""
        if self.reference is None:
            return None

        def predicted(part: Rollout) -> tuple[Tensor, Tensor]:
            with self.reference.policy() as reference, self.autocast():
                return response_logprobs(reference, part, self.config.temperature)

        parts = micro_batches(self.config.micro_batch_size, rollout)
        return distributed.gather(predicted(part) for (part,) in parts)[0]

    def predictions_of_update(self, rollout: Rollout, ref_logprobs: Tensor | None) -> Predictions:
        """What the rollout's only update has read before its step: a pass less than `predict`.

        ref_logprobs: as `predict_reference` gives them.
        """
        place = self.order.argsort()
        logprobs, entropy = (x[place] for x in distributed.gather(self.seen))
        kl = torch.zeros_like(logprobs)
        if ref_logprobs is not None:
            kl = self.estimated_kl(rollout, logprobs, ref_logprobs)
        reference = logprobs if ref_logprobs is None else ref_logprobs
        predictions = Predictions(logprobs, entropy, reference, kl)
        self.check_predictions(predictions)
        return predictions

    def _predict(self, rollout: Rollout, holds: bool = False) -> Predictions:
        """The predictions of some rows. holds: keep hidden states and values for the update."""
        mask = rollout.response_mask
        with torch.set_grad_enabled(holds), self.autocast():
            hidden = response_hidden(self.model, rollout)  # (N, D)
        with self.autocast():
            tokens = self.head(rollout).token_logprobs(
                hidden, rollout.response_ids[mask], temperature=self.config.temperature
            )
        logprobs, entropy = scatter(tokens.logprobs, mask), scatter(tokens.entropy, mask)
        ref_logprobs, kl = self.compare(rollout, logprobs, hidden)
        with torch.set_grad_enabled(holds):
            values = self.predict_values(rollout, hidden)
        self.held = (rollout, hidden, values) if holds else None
        values = None if values is None else values.detach()
        return Predictions(logprobs, entropy, ref_logprobs, kl, values)

    def predict_values(self, rollout: Rollout, hidden: Tensor) -> Tensor | None:
        """The critic's values (B, R), from the policy's hidden states if they share the trunk."""
        if self.critic is None:
            return None
        with self.autocast():
            return response_values(self.critic, rollout, hidden if self.shares_trunk else None)

    def compare(self, rollout: Rollout, logprobs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's log-probs and the policy's KL to it, both (B, R)."""
        if self.reference is None:
            return logprobs, torch.zeros_like(logprobs)
        estimator, temperature = self.config.estimator, self.config.temperature
        with self.reference.policy() as reference, self.autocast():
            ref_hidden = response_hidden(reference, rollout)
            ref_logprobs, _ = response_logprobs(reference, rollout, temperature, ref_hidden)
            if estimator == "full" and self.config.kl_in == "reward":
                kl = response_full_kl(
                    self.model, reference, rollout, temperature, hidden, ref_hidden
                )
                return ref_logprobs, kl
        return ref_logprobs, self.estimated_kl(rollout, logprobs, ref_logprobs)

    def estimated_kl(self, rollout: Rollout, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """KL (B, R) from the log-probs of the sampled tokens; k3 where the config's is exact."""
        estimator = "k3" if self.config.estimator == "full" else self.config.estimator
        mask = rollout.response_mask
        return kl_estimate(logprobs, ref_logprobs, estimator=estimator, mask=mask)

    def check_predictions(self, predictions: Predictions) -> None:
        """Raise FloatingPointError, naming row and token, for a value that cannot be."""
        columns = {name: x for name, x in predictions._asdict().items() if x is not None}
        bad_places = torch.stack([~x.isfinite() for x in columns.values()]).cpu()
        for (name, x), bad in zip(columns.items(), bad_places):
            if bad.any():
                row, token = bad.nonzero()[0].tolist()
                place = f"row {row}, token {token}"
                raise FloatingPointError(f"{name} is {x[row, token]} at {place}: {DIVERGED}")
        kl, estimator = predictions.kl, self.config.estimator
        if estimator != "k1" and (kl < 0).any():
            row, token = (kl < 0).nonzero()[0].tolist()
            raise FloatingPointError(
                f"{estimator} is {kl[row, token]} < 0 at row {row}, token {token}. No log-probs "
                "give that, so the op is wrong on this machine: try RLHF_CORE_BACKEND=reference, "
                "and see `rlhf-core info` for the backends"
            )

    # ---- the updates

    def update(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> None:
        """Train on the rollout.

        With mask_truncated the minibatches, and so the denominators of the loss, know only the
        responses that ended.
        """
        config = self.config
        if config.mask_truncated:
            rollout, experience = (rows(x, rollout.ended) for x in (rollout, experience))
        if not len(rollout.response_ids):
            self.warn_once(ALL_TRUNCATED)
            return
        if config.importance_cap is not None and experience.old_logprobs is not None:
            mask = rollout.response_mask
            experience = self.corrected(rollout.logprobs, mask, experience, metrics)
        self.passes(rollout, experience, metrics)

    def corrected(
        self, sampled: Tensor, mask: Tensor, experience: Experience, metrics: Metrics
    ) -> Experience:
        """The experience with weights for the difference between sampler and trained policy.

        sampled: (B, R) log-probs of the sampler.
        """
        config = self.config
        floor, cap = config.importance_floor or 0.0, config.importance_cap
        ratio = importance_ratio(experience.old_logprobs, sampled, mask, config.importance_level)
        weight = importance_weight(ratio, floor, cap, config.importance_mode)
        add_importance(metrics, ratio, weight, mask, floor, cap)
        return weighted(experience, weight)

    def passes(self, rollout: Rollout, experience: Experience, metrics: Metrics) -> None:
        """Pass over the rollout ppo_epochs times in minibatches, one optimiser step for each.

        Before a step beyond max_approx_kl the passes stop.
        """
        config, size, first = self.config, len(rollout.response_ids), True
        for _ in range(config.ppo_epochs):
            order = torch.randperm(size, generator=self.generator, device=self.device)
            minibatches = order.split(config.update_size)
            # In order a prompt's responses share it, and a single minibatch is the rollout.
            if len(minibatches) == 1 or config.rollout_size > config.batch_size:
                minibatches = [index.sort().values for index in minibatches]
            self.order, self.seen = torch.cat(minibatches), []
            for index in minibatches:
                seen, batch = Metrics(), (rollout, experience)
                if len(minibatches) > 1:
                    batch = rows(rollout, index), rows(experience, index)
                losses = self.minibatch_losses(*batch, seen)
                losses = self.checked(losses, seen, first)
                first = False
                try:
                    norm = self.optimize(chain(losses, self.ptx_losses(len(index), seen)))
                except EarlyStop:
                    metrics.merge(seen.over_ranks())
                    return
                except FloatingPointError as error:
                    self.predict(rollout)  # names the row and token at fault, if there is one
                    raise FloatingPointError(f"{error}; perhaps {DIVERGED}") from None
                metrics.merge(seen.over_ranks())
                metrics.add("grad_norm", torch.tensor(norm))

    def minibatch_losses(
        self, rollout: Rollout, experience: Experience, metrics: Metrics
    ) -> Iterator[Tensor]:
        """The loss of each micro-batch; they add up to the minibatch's loss."""
        config = self.config
        weights = loss_weights(
            rollout.response_mask, config.aggregation, length=config.response_length
        )  # (B, R)
        held, self.held = self.held, None
        held = held[1:] if held is not None and held[0] is rollout else None
        for part, old, w in micro_batches(config.micro_batch_size, rollout, experience, weights):
            mask = part.response_mask
            losses_of = partial(
                self.sequence_losses,
                sampled=part.logprobs,
                old=old,
                mask=mask,
                weights=w,
                metrics=metrics,
            )
            with (
                torch.set_grad_enabled(torch.is_grad_enabled() and self.policy_trains),
                self.autocast(),
            ):
                hidden = held[0] if held else response_hidden(self.model, part)  # (N, D)
                self.tokens += 0 if distributed.idle() else len(hidden)
                loss, *outputs = self.head(part).token_loss(
                    hidden,
                    part.response_ids[mask],
                    losses_of,
                    temperature=config.temperature,
                    sizes=mask.sum(dim=1),
                )
            if outputs and not distributed.idle():
                self.seen.append([scatter(x, mask) for x in outputs])
            if self.kl_in_loss and config.estimator == "full":
                kl = (self.full_kl(part, hidden) * w).sum()
                metrics.add_part("loss/kl", kl)
                loss = loss + self.kl_coef.value * kl
            if old.returns is not None:
                values = held[1] if held else self.predict_values(part, hidden)
                loss = loss + self.value_loss(values, old, mask, w, metrics)
            metrics.add_part("loss", loss)
            yield loss

    def sequence_losses(
        self,
        tokens: TokenStatistics,
        some: slice,
        *,
        sampled: Tensor,
        old: Experience,
        mask: Tensor,
        weights: Tensor,
        metrics: Metrics,
    ) -> tuple[Tensor, ...]:
        """The policy loss () of some sequences, see `ops.linear_token_loss`.

        Without old log-probs this pass has them, and returns log-probs and entropy as well.
        """
        mask, weights, old = mask[some], weights[some], rows(old, some)
        logprobs, entropy = scatter(tokens.logprobs, mask), scatter(tokens.entropy, mask)
        if old.old_logprobs is not None:
            return (self.policy_loss(logprobs, entropy, old, mask, weights, metrics),)
        old = old._replace(old_logprobs=logprobs.detach())
        if self.config.importance_cap is not None:
            old = self.corrected(sampled[some], mask, old, metrics)
        loss = self.policy_loss(logprobs, entropy, old, mask, weights, metrics)
        return loss, tokens.logprobs, tokens.entropy

    def policy_loss(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        old: Experience,
        mask: Tensor,
        weights: Tensor,
        metrics: Metrics,
    ) -> Tensor:
        """The clipped loss () of tokens (B, R), with entropy bonus and KL penalty."""
        config, entropy_coef = self.config, self.entropy_coef.value
        ratio_logprobs = self.ratio_logprobs(logprobs, old.old_logprobs, mask)
        # For the statistics alone the entropy needs no gradient, which would be all zeros.
        entropy_term = entropy if entropy_coef else entropy.detach()
        loss, stats = self.surrogate(ratio_logprobs, entropy_term, old, mask, weights)
        if ratio_logprobs is not logprobs:  # the approximate KL stays that of single tokens
            kl = kl_estimate(old.old_logprobs, logprobs.detach(), estimator="k3", mask=mask)
            stats = stats._replace(approx_kl=masked_mean(kl, mask))
        add_statistics(metrics, stats, POLICY_STATISTICS)
        bonus = (entropy.detach() * weights).sum()
        metrics.add_part("loss/policy_avg", loss + entropy_coef * bonus)
        if entropy_coef:
            metrics.add_part("loss/entropy", bonus)
        if self.kl_in_loss and config.estimator != "full":
            kl = kl_loss(
                logprobs, old.old_logprobs, old.ref_logprobs, mask, estimator=config.estimator
            )
            kl = kl if old.importance is None else kl * old.importance
            kl = (kl * weights).sum()
            metrics.add_part("loss/kl", kl)
            loss = loss + self.kl_coef.value * kl
        return loss

    def surrogate(
        self, logprobs: Tensor, entropy: Tensor, old: Experience, mask: Tensor, weights: Tensor
    ) -> tuple[Tensor, PPOLossStats]:
        """The clipped loss () with entropy bonus, and its statistics."""
        config = self.config
        return ppo_loss(
            logprobs,
            old.old_logprobs,
            old.advantages,
            None,
            None,
            None,
            mask,
            clip_range=config.clip_ranges,
            value_clip_range=None,
            vf_coef=0.0,
            entropy=entropy,
            entropy_coef=self.entropy_coef.value,
            dual_clip=config.dual_clip,
            weights=weights,
        )

    def ratio_logprobs(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """The log-probs (B, R) whose ratio to the old ones is clipped."""
        return logprobs

    def value_loss(
        self, values: Tensor, old: Experience, mask: Tensor, weights: Tensor, metrics: Metrics
    ) -> Tensor:
        """vf_coef times the clipped value loss () of values (B, R)."""
        zeros, clip = torch.zeros_like(old.old_values), self.config.value_clip_range
        vf_coef = self.config.vf_coef
        loss, stats = ppo_loss(
            zeros,  # with log-probs and advantages of 0 the policy's part is 0
            zeros,
            zeros,
            values,
            old.old_values,
            old.returns,
            mask,
            clip_range=self.config.clip_ranges,
            value_clip_range=None if clip == math.inf else clip,
            vf_coef=vf_coef,
            weights=weights,
        )
        add_statistics(metrics, stats, VALUE_STATISTICS)
        if vf_coef:
            metrics.add_part("loss/value_avg", loss / vf_coef)
        return loss

    @property
    def kl_in_loss(self) -> bool:
        return self.config.kl_in == "loss" and self.kl_coef.value > 0 and self.policy_trains

    def full_kl(self, rollout: Rollout, hidden: Tensor) -> Tensor:
        """Exact KL (B, R) of the response tokens to the reference, with gradient to the policy."""
        with self.reference.policy() as reference, self.autocast():
            ref_hidden = response_hidden(reference, rollout)
        with self.autocast():
            models, temperature = (self.model, self.reference.model), self.config.temperature
            return response_full_kl(*models, rollout, temperature, hidden, ref_hidden)

    def ptx_losses(self, size: int, metrics: Metrics) -> Iterator[Tensor]:
        """ptx_coef times the mean cross-entropy of `size` ptx examples, by micro-batches.

        The examples are drawn with replacement.
        """
        coef = self.config.ptx_coef
        if not coef or not self.policy_trains:
            return
        where = dict(generator=self.generator, device=self.device)
        index = torch.randint(len(self.ptx_examples), (size,), **where).tolist()
        batch = [self.ptx_examples[i] for i in index]
        count = self.total(sum(map(count_targets, batch)))

        def losses(tokens: TokenStatistics, some: slice) -> tuple[Tensor, Tensor]:
            loss = -tokens.logprobs.sum() / count
            return coef * loss, loss[None]

        for _, tokens in self.parts(batch):
            with self.autocast():
                loss, parts = target_loss(self.model, tokens, losses)
            n = len(tokens.targets)
            if n:
                metrics.add_mean("loss/ptx", parts.sum() * count / n, n)
            metrics.add_part("loss", loss)
            yield loss

    def checked(self, losses: Iterator[Tensor], metrics: Metrics, first: bool) -> Iterator[Tensor]:
        """The losses of a minibatch, then checks before its update.

        In a rollout's first minibatch the policy must still be the one that the old log-probs
        belong to, with ratio 1 up to rounding, unless it has dropout.

        Raises:
            EarlyStop: the approximate KL exceeds max_approx_kl.
        """
        yield from losses
        config = self.config
        if not first and config.max_approx_kl is None:
            return  # the means below wait for the device
        means = metrics.over_ranks().means()
        ratio, approx_kl = means["val/ratio"], means["policy/approxkl_avg"]
        error = max(abs(ratio - 1), approx_kl)
        if first and error > MAX_FIRST_ERROR[config.precision] and not config.dropout:
            raise FloatingPointError(
                f"the first minibatch has ratio {ratio:.6g} and approximate KL {approx_kl:.3g}, "
                "not 1 and 0; no weight was updated. Likely causes: the policy is in train mode, "
                "it changed between rollout and update, or its forward depends on the other rows"
            )
        if config.max_approx_kl is not None and approx_kl > config.max_approx_kl:
            raise EarlyStop

    # ---- after the updates

    def report(
        self,
        rollout: Rollout,
        predictions: Predictions,
        rewards: Tensor,
        shaped: Tensor,
        metrics: Metrics,
    ) -> dict[str, float]:
        """The step's metrics. Also steers the coefficients and moves a reference that follows.

        rewards, shaped: results of `score` and `shape`.
        """
        self.note_samples(rollout.prompts(), rollout.responses(), scores_of(rewards))
        if not self.steps_done:
            first = slice(0, 8)
            self._first = rows(rollout, first), predictions.logprobs[first]
        n = len(rollout.response_ids)
        kl_coef, entropy_coef = self.kl_coef.value, self.entropy_coef.value
        kl_weight = -kl_coef if self.config.kl_in == "reward" else 0.0
        add_objectives(metrics, rollout, predictions, rewards, shaped, kl_weight)
        report = metrics.means()
        if self.reference is None:
            del report["objective/kl"]
        if "val/ratio" in report:  # there was an update
            report["val/ratio_var"] = report.pop("ratio_squared") - report["val/ratio"] ** 2
        if "weight_squared" in report:
            squared = report.pop("weight_squared")
            report["importance/ess"] = (
                report["importance/weight"] ** 2 / squared if squared else 0.0
            )
        report |= rollout_mismatch(rollout, predictions)
        if self.engine is not None:
            report["val/oldest_version"] = self.oldest_version
        responses, size = rollout.responses(), self.config.rollout_size // self.config.batch_size
        report |= diversity([responses[i : i + size] for i in range(0, n, size)])
        report["val/num_eos_tokens"] = int(rollout.ended.sum())
        report |= {"objective/kl_coef": kl_coef, "policy/entropy_coef": entropy_coef}
        if self.policy_trains:
            entropy = masked_mean(predictions.entropy, rollout.response_mask)
            self.kl_coef.update(report.get("objective/kl", 0.0), n)
            self.entropy_coef.update(float(entropy), n)
        self._move_reference()
        self.episodes += n
        report |= {"lr": self.optimizer.param_groups[0]["lr"], "episode": self.episodes}
        return report | {"eps": self.episodes / (time.monotonic() - self.started)}  # per second

    @torch.no_grad()
    def movement(self, first: dict[str, float]) -> tuple[float, str] | None:
        """The KL of the first policy to this one, on responses of the first step."""
        if self._first is None or ALL_TIED in self._warned:  # resumed, or nothing to learn
            return None
        rollout, old = self._first
        with self.autocast(), eval_mode(self.model):
            logprobs, _ = response_logprobs(self.model, rollout, self.config.temperature)
        kl = kl_estimate(old, logprobs, estimator="k3", mask=rollout.response_mask)
        nats = kl.sum(dim=1).mean().item()
        return nats, f"moved the policy by {nats:.1g} nats per response"

    @torch.no_grad()
    def _move_reference(self) -> None:
        """Take a step of the reference's exponential moving average."""
        if self.reference is not None and self.reference.moves:
            reshard(self.model)
            for slow, fast in zip(self.reference.model.parameters(), self.model.parameters()):
                slow.lerp_(whole_tensor(fast), 1 - self.config.reference_ema)

    # ---- checkpoints

    def settings(self) -> dict:
        weights = [weight for _, weight in self.scorer.rewards]
        return {"eos_ids": self.eos_ids, "reward_weights": weights}

    def fixed_data(self) -> list[Sequence]:
        return [self.examples, self.ptx_examples]

    def fixed_models(self) -> list[nn.Module]:
        critic = [] if self.critic is None else [self.critic]
        reference = [] if self.reference is None else self.reference.fixed_models()
        return [*critic, self.model, *reference, *self.scorer.models]

    def state(self) -> dict[str, Tensor]:
        numbers = {
            "episodes": self.episodes,
            "seconds": time.monotonic() - self.started,
            "kl_coef": self.kl_coef.value,
            "entropy_coef": self.entropy_coef.value,
        }
        state = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
        state |= super().state()
        state["score_moments"] = torch.stack([x.double() for x in self.score_moments])
        if self.reference is not None and self.reference.moves:
            weights = self.reference.model.state_dict()
            state |= {f"reference:{name}": x for name, x in weights.items()}
        if self.config.steps_ahead:
            sizes = self.config.rollout_size, self.config.response_length
            state |= flight_state(self.flights.get(self.steps_done), *sizes)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.episodes = int(state["episodes"])
        self.started = time.monotonic() - float(state["seconds"])
        self.kl_coef.value = float(state["kl_coef"])
        self.entropy_coef.value = float(state["entropy_coef"])
        self.score_moments = Moments(*state["score_moments"].to(self.device))
        if self.reference is not None and self.reference.moves:
            names = self.reference.model.state_dict()
            weights = {name: state[f"reference:{name}"] for name in names}
            self.reference.model.load_state_dict(weights)
        if self.config.steps_ahead:
            self._land(state)

    def _land(self, state: dict[str, Tensor]) -> None:
        """Restore the rollout that a checkpoint holds for the next step."""
        self._upcoming = enumerate(self.batches())
        step = int(state["ahead:version"]) + 1
        num_samples = self.config.rollout_size // self.config.batch_size
        batch = next(islice(self.batches(), step, None), [])
        flight = flight_of(state, batch, num_samples)
        self.flights = {} if flight is None else {step: flight}


def _check_rollout_dtype(
    config: PolicyGradientConfig, model: Transformer, engine: Engine | None
) -> None:
    """Raise ValueError where rollout_dtype cannot apply. Warn where nothing corrects for it."""
    dtype = config.rollout_dtype
    if engine is not None:
        raise ValueError(f"rollout_dtype is {dtype}, but the engine samples: unset one of them")
    if model.device.type != "cpu":
        raise ValueError(
            f"rollout_dtype {dtype} is for CPUs, but the model is on {model.device}: unset it"
        )
    if config.importance_cap is None:
        warnings.warn(
            f"rollout_dtype {dtype} without importance_cap: the policy gradient takes the samples "
            "of rounded weights for the policy's own. Set importance_cap, such as 2",
            stacklevel=3,
        )
