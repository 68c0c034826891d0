"""The options of every method that samples from the policy while it trains it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_core.feedback.candidates import LONG_PROMPTS, ON_LONG_PROMPT, STOP_STRINGS
from rlhf_core.ops.kl import ESTIMATORS
from rlhf_core.options import option
from rlhf_core.training.config import PRINT_SAMPLES, SAMPLE_EVERY, TrainConfig

ONE_UPDATE = "with one update per rollout; raise ppo_epochs or lower minibatch_size"
KL_COEF = "weight of the KL to the reference; higher keeps the policy closer to it"
TEMPERATURE = "temperature of sampling, and so of all log-probs, entropies and KLs"


@dataclass(frozen=True)
class PolicyGradientConfig(TrainConfig):
    """Sampling, reward shaping, KL penalty and clipped updates."""

    batch_size: int = option(64, "prompts of a rollout", within="[1, inf)")
    minibatch_size: int | None = option(
        None, "responses of an optimiser step; unset: a quarter of the rollout"
    )
    ppo_epochs: int = option(4, "passes over each rollout", within="[1, inf)")
    response_length: int = option(53, "longest response, tokens", within="[1, inf)")
    max_prompt_length: int = option(
        512, "longest prompt, tokens; see on_long_prompt", within="[1, inf)"
    )
    on_long_prompt: str = option("drop", ON_LONG_PROMPT, choices=LONG_PROMPTS)
    stop_strings: tuple[str, ...] = option((), STOP_STRINGS, flag="--stop")
    temperature: float = option(0.7, TEMPERATURE, within="(0, inf)")
    sample_every: int = option(10, SAMPLE_EVERY, within="[0, inf)")
    print_samples: bool = option(False, PRINT_SAMPLES)

    kl_coef: float = option(0.05, KL_COEF, within="[0, inf)")
    kl_in: str = option(
        "reward",
        "where the KL penalty enters; in the loss its own gradient is used",
        choices=("reward", "loss"),
    )
    kl_estimator: str | None = option(
        None,
        "estimator of the KL (Schulman 2020), or full: exact over the vocabulary. Unset: k1 in the "
        "reward, k3 in the loss. In the reward only k1 has the KL's gradient; in the loss all "
        "but abs have it, and abs is refused",
        choices=(*ESTIMATORS, "full"),
    )
    kl_target: float | None = option(
        None,
        "nats per response that kl_coef is steered to; unset: kl_coef is fixed",
        within="(0, inf)",
    )
    kl_horizon: int = option(
        10000,
        "responses over which a steered coefficient moves; higher is slower",
        within="[1, inf)",
    )
    reference_ema: float | None = option(
        None,
        "the reference follows the policy and keeps this share of itself per step",
        within="(0, 1)",
    )

    clip_range: float = option(
        0.2,
        "the ratio is clipped at 1 - clip_range and, without clip_range_high, at 1 + clip_range",
        within="(0, inf]",
    )
    clip_range_high: float | None = option(
        None, "upper clip: the ratio is clipped at 1 + this (DAPO's clip-higher)", within="(0, inf]"
    )
    dual_clip: float | None = option(
        None, "bound of a token's loss in units of |A| where the advantage A < 0", within="(1, inf)"
    )
    entropy_coef: float = option(
        0.0, "weight of the entropy bonus; its initial value with entropy_target", within="[0, inf)"
    )
    entropy_target: float | None = option(
        None,
        "nats per token that entropy_coef is steered to; unset: entropy_coef is fixed",
        within="(0, inf)",
    )
    max_approx_kl: float | None = option(
        None,
        "early stopping of the PPO epochs when a minibatch's KL to the rollout exceeds this",
        within="(0, inf)",
    )
    ptx_coef: float = option(
        0.0,
        "PPO-ptx: weight of the cross-entropy of pretraining examples, one per response",
        within="[0, inf)",
    )
    importance_cap: float | None = option(
        None,
        "importance sampling against a sampler that rounds otherwise: cap of the weight p(trained) "
        "/ p(sampled)",
        within="(0, inf)",
    )
    importance_floor: float | None = option(
        None, "lower bound of the same weight; unset: none", within="(0, inf)"
    )
    importance_level: str = option(
        "token",
        "a weight for each token, or one for a response: the product of its tokens'",
        choices=("token", "sequence"),
    )
    importance_mode: str = option(
        "truncate",
        "weights beyond a bound: truncate sets them to the bound (TIS), mask to 0 (MIS; with both "
        "bounds IcePop)",
        choices=("truncate", "mask"),
    )
    rollout_dtype: str | None = option(
        None,
        "rollouts are sampled on a CPU from copies of the weights, which are read faster; "
        "importance_cap corrects for the difference. int8: copies in 8 bits; bfloat16: in 16. "
        "Unset: the weights as they are",
        choices=("int8", "bfloat16"),
    )
    steps_ahead: int = option(
        0,
        "rollouts that an engine samples while the policy trains on the one before; with 1 the "
        "weights that sample are a step old, which importance_cap corrects",
        within="[0, 1]",
    )
    aggregation: str = option(
        "token_mean",
        "how token losses are averaged; sequence_sum divides by response_length",
        choices=("token_mean", "sequence_mean", "sequence_sum"),
    )

    process_rewards: bool = option(
        False,
        "the reward models score steps: the end of a step earns the log of its probability. A "
        "truncated step earns nothing; missing_eos_penalty can offset that",
    )
    missing_eos_penalty: float | None = option(
        None,
        "subtracted from the score of a response that neither EOS nor a stop string ends",
        within="(-inf, inf)",
    )
    overlong_buffer: int | None = option(
        None,
        "tokens at the end of response_length over which a penalty on the score grows from 0 to 1 "
        "(DAPO's soft overlong punishment, eq. 13)",
        within="[1, inf)",
    )
    mask_truncated: bool = option(
        False,
        "responses that neither EOS nor a stop string ends do not enter the loss (DAPO's overlong "
        "filtering); their scores still count in the advantages of the others",
    )
    length_penalty: float = option(
        0.0, "subtracted from the score for each token of the response", within="(-inf, inf)"
    )
    whiten_scores: str = option(
        "none",
        "divide rewards by the standard deviation of the batch's scores, or of all so far",
        choices=("none", "batch", "running"),
    )
    whiten_mean: bool = option(False, "whiten_scores also subtracts the mean score")
    score_clip: float | None = option(
        None, "clip rewards to +- this, after whitening", within="(0, inf)"
    )

    def __post_init__(self):
        super().__post_init__()
        size, rollout = self.minibatch_size, self.rollout_size
        steered = bool(self.kl_target or self.entropy_target)
        has_gradient = self.kl_in == "reward" or self.kl_estimator != "abs"
        long_enough = not steered or self.kl_horizon >= rollout
        floor, cap = self.importance_floor or 0.0, self.importance_cap or math.inf
        buffer, longest = self.overlong_buffer or 1, self.response_length
        self.check(
            ("kl_estimator", has_gradient, "one with the KL's gradient when kl_in is loss"),
            ("minibatch_size", size is None or 0 < size <= rollout, f"from 1 to {rollout}"),
            ("importance_floor", floor < cap, f"less than importance_cap {cap}"),
            ("overlong_buffer", buffer <= longest, f"at most response_length {longest}"),
            ("kl_horizon", long_enough, f"at least the rollout's {rollout} responses"),
        )
        no_kl = "because kl_coef is 0"
        no_bonus = "because entropy_coef is 0"
        corrects, uncorrected = self.importance_cap is not None, "without importance_cap"
        self.warn_unused(
            ("print_samples", self.sample_every > 0, "with sample_every 0"),
            ("kl_target", self.kl_coef > 0, no_kl),
            ("kl_horizon", steered, "without kl_target or entropy_target"),
            ("kl_in", self.kl_coef > 0, no_kl),
            ("kl_estimator", self.kl_coef > 0, no_kl),
            ("reference_ema", self.kl_coef > 0, no_kl),
            ("entropy_target", self.entropy_coef > 0, no_bonus),
            ("importance_floor", corrects, uncorrected),
            ("importance_level", corrects, uncorrected),
            ("importance_mode", corrects, uncorrected),
            ("whiten_mean", self.whiten_scores != "none", "without whiten_scores"),
            ("clip_range", not self.at_ratio_1, ONE_UPDATE),
            ("clip_range_high", not self.at_ratio_1, ONE_UPDATE),
            ("dual_clip", not self.at_ratio_1, ONE_UPDATE),
            ("max_approx_kl", not self.one_update, ONE_UPDATE),
        )

    @property
    def estimator(self) -> str:
        """kl_estimator, or the default for kl_in."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """Distances from ratio 1 to the lower and the upper clip."""
        high = self.clip_range_high
        return self.clip_range, self.clip_range if high is None else high

    @property
    def rollout_size(self) -> int:
        """Responses of a rollout."""
        return self.batch_size

    @property
    def update_size(self) -> int:
        """Responses of an optimiser step."""
        return self.minibatch_size or math.ceil(self.rollout_size / 4)

    @property
    def one_update(self) -> bool:
        """Whether each rollout gets a single optimiser step."""
        return self.ppo_epochs == 1 and self.update_size >= self.rollout_size

    @property
    def at_ratio_1(self) -> bool:
        """Whether every update sees the policy that sampled, so that no ratio is clipped."""
        return self.one_update and not self.dropout
