"""What the configs of trainers share: fields with their meaning, the rules they keep, those of every trainer, and those
of the methods that sample while they train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.ops.kl import ESTIMATORS


def option(default: Any, help: str) -> Any:
    """A config field with its meaning, unit and range; the command line shows the same text."""
    return field(default=default, metadata={"help": help})


class Options:
    """The rules that the fields of a config keep; a ValueError names the field, its value and what would be right."""

    def check(self, *rules: tuple[str, Any, str]) -> None:
        """A rule is a field, whether it is valid, and what it must be."""
        for name, valid, wanted in rules:
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def check_positive(self, *names: str) -> None:
        """Each field is above 0 or None."""
        for name in names:
            self.check((name, getattr(self, name) is None or getattr(self, name) > 0, "> 0"))

    def check_choices(self, **choices: Sequence[str]) -> None:
        for name, few in choices.items():
            self.check((name, getattr(self, name) in few, f"one of {', '.join(filter(None, few))}"))

    def check_effective(self, *rules: tuple[str, Any, str]) -> None:
        """A rule is a field, whether it has an effect, and why not; one without effect must have its default."""
        for name, effective, reason in rules:
            if not effective and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} has no effect {reason}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TrainConfig(Options):
    """Fields of every trainer."""

    lr: float = option(1e-5, "peak learning rate of AdamW")
    lr_schedule: str = option("linear", "linear (down to 0) or constant")
    warmup_steps: int = option(0, "steps over which lr rises from 0")
    batch_size: int = option(16, "rows (pairs, prompts) an optimiser step sees; PPO: a rollout")
    micro_batch_size: int | None = option(
        None, "rows of one forward and backward; None: all at once"
    )
    epochs: int = option(1, "passes over the data")
    max_steps: int | None = option(
        None, "stop after this many steps; None: when the epochs are over"
    )
    max_grad_norm: float = option(1.0, "clip the gradient's global norm to this")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    adam_eps: float = option(1e-8, "AdamW's epsilon")
    dropout: bool = option(False, "train with the dropout of the model's config")
    log_every: int = option(10, "steps between printed lines where there is no progress bar")
    eval_every: int | None = option(None, "steps between evaluations; None: only at the end")
    save_every: int | None = option(
        None, "steps between checkpoints, and one at the end; None: only where interrupted"
    )
    precision: str = option(
        "float32", "of the forward: float32 or bfloat16; weights and log-probs stay float32"
    )
    activation_checkpointing: bool = option(
        False, "keep a block's input alone and compute the rest again: less memory"
    )
    freeze_layers: int = option(
        0, "from 1: the embedding and this many of the lowest blocks stay as they are"
    )
    seed: int = option(0, "of data order and sampling")

    def __post_init__(self):
        sizes = (
            "batch_size",
            "micro_batch_size",
            "epochs",
            "max_steps",
            "log_every",
            "eval_every",
            "save_every",
        )
        self.check_positive("lr", "max_grad_norm", *sizes)
        self.check_choices(lr_schedule=("linear", "constant"), precision=("float32", "bfloat16"))
        at_least_0 = ("warmup_steps", "weight_decay", "adam_eps", "freeze_layers")
        self.check(*((name, getattr(self, name) >= 0, "at least 0") for name in at_least_0))
        if getattr(self, "max_length", 2) < 2:
            raise ValueError(
                f"max_length must be at least 2, a token and one to learn, got {self.max_length}"
            )


ONE_UPDATE = "on the one update of a rollout without more ppo_epochs or a smaller minibatch_size"


@dataclass(frozen=True)
class OnPolicyConfig(TrainConfig):
    """An option that could have no effect beside the others is refused."""

    batch_size: int = option(64, "prompts of a rollout")
    minibatch_size: int | None = option(
        None, "responses an optimiser step sees; None: a quarter of the rollout's"
    )
    ppo_epochs: int = option(4, "passes over each rollout")
    response_length: int = option(53, "longest response, tokens")
    max_prompt_length: int = option(
        512,
        "tokens of a prompt, and no more than the model has room for; a longer one loses its start",
    )
    temperature: float = option(0.7, "of sampling, and so of every log-prob, entropy and KL, > 0")

    kl_coef: float = option(0.05, "weight of the KL to the reference")
    kl_in: str = option(
        "reward", "where the KL counts: reward, or loss, there with the KL's own gradient"
    )
    kl_estimator: str | None = option(
        None,
        "k1, k2, k3, abs, or full: exact over the vocabulary; None: k1 in the reward, k3 in the loss. Only k1 has the "
        "KL's gradient in the reward; in the loss all have but abs, which is refused there",
    )
    kl_target: float | None = option(
        None, "nats a response that kl_coef is steered to; None: it stays as it is"
    )
    kl_horizon: int = option(10000, "responses over which an adaptive kl_coef moves")
    reference_ema: float | None = option(
        None, "the reference follows the policy, keeping this share of itself a step"
    )

    clip_range: float = option(
        0.2, "how far below 1 the ratio pays, and above unless clip_range_high says otherwise"
    )
    clip_range_high: float | None = option(
        None, "how far above 1 the ratio pays (clip-higher); None: clip_range"
    )
    dual_clip: float | None = option(
        None, "bound on a token's loss where the advantage is negative, in |A|, > 1"
    )
    entropy_coef: float = option(
        0.0, "weight of the entropy bonus; its start where there is an entropy_target"
    )
    entropy_target: float | None = option(
        None, "nats a token that entropy_coef is steered to; None: it stays"
    )
    max_approx_kl: float | None = option(
        None, "stop the passes over a rollout when a minibatch's KL to it is larger"
    )
    ptx_coef: float = option(
        0.0, "PPO-ptx: weight of the cross-entropy of ptx examples, as many as a minibatch has"
    )
    importance_cap: float | None = option(
        None, "truncated importance sampling: a token weighs trained / sampled, at most this"
    )
    aggregation: str = option(
        "token_mean", "of the losses: token_mean, sequence_mean, sequence_sum / response_length"
    )

    process_rewards: bool = option(
        False,
        "the reward models score steps: each one's end earns the log of its probability, at most 0; a step that is cut "
        "earns nothing, which missing_eos_penalty can make up for",
    )
    missing_eos_penalty: float | None = option(
        None, "taken off the score of a response without an end token"
    )
    length_penalty: float = option(0.0, "taken off the score for each token of the response")
    whiten_scores: str = option(
        "none", "divide rewards by the scores' deviation: none, of the batch, or running"
    )
    whiten_mean: bool = option(False, "whiten_scores also takes the scores' mean off")
    score_clip: float | None = option(None, "rewards are clipped to +- this, after whitening")

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("temperature", "ppo_epochs", "response_length", "max_prompt_length")
        self.check_positive(
            "clip_range", "clip_range_high", "max_approx_kl", "importance_cap", "score_clip"
        )
        self.check_positive("kl_target", "kl_horizon", "entropy_target")
        self.check_choices(
            kl_in=("reward", "loss"),
            kl_estimator=(None, *ESTIMATORS, "full"),
            aggregation=("token_mean", "sequence_mean", "sequence_sum"),
            whiten_scores=("none", "batch", "running"),
        )
        coefficients, steered = (
            ("kl_coef", "entropy_coef", "ptx_coef"),
            self.kl_target or self.entropy_target,
        )
        size, with_gradient = (
            self.minibatch_size,
            self.kl_in == "reward" or self.kl_estimator != "abs",
        )
        penalty, rollout = self.missing_eos_penalty or 0.0, self.rollout_size
        self.check(
            *((name, 0 <= getattr(self, name) < math.inf, "at least 0") for name in coefficients),
            ("kl_estimator", with_gradient, "one whose gradient is the KL's in the loss"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1, "> 1"),
            (
                "reference_ema",
                self.reference_ema is None or 0 < self.reference_ema < 1,
                "in (0, 1)",
            ),
            ("minibatch_size", size is None or 0 < size <= rollout, f"from 1 to {rollout}"),
            (
                "kl_horizon",
                not steered or self.kl_horizon >= rollout,
                f"at least a rollout's {rollout} responses",
            ),
            ("missing_eos_penalty", math.isfinite(penalty), "finite"),
            ("length_penalty", math.isfinite(self.length_penalty), "finite"),
        )
        self.check_effective(
            ("kl_target", self.kl_coef > 0, "without kl_coef > 0 to start from"),
            ("kl_horizon", steered, "without kl_target or entropy_target"),
            ("kl_in", self.kl_coef > 0, "without kl_coef > 0"),
            ("kl_estimator", self.kl_coef > 0, "without kl_coef > 0"),
            ("reference_ema", self.kl_coef > 0, "without kl_coef > 0"),
            ("entropy_target", self.entropy_coef > 0, "without entropy_coef > 0 to start from"),
            ("whiten_mean", self.whiten_scores != "none", "without whiten_scores"),
        )
        bounds = ("clip_range", "clip_range_high", "dual_clip")
        self.check_effective(
            *((name, not self.at_ratio_1, ONE_UPDATE) for name in bounds),
            ("max_approx_kl", not self.one_update, ONE_UPDATE),
        )

    @property
    def estimator(self) -> str:
        """kl_estimator, or what stands for None."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    @property
    def rollout_size(self) -> int:
        """Responses of a step."""
        return self.batch_size

    @property
    def update_size(self) -> int:
        """Responses of an optimiser step."""
        return self.minibatch_size or -(-self.rollout_size // 4)

    @property
    def one_update(self) -> bool:
        """Whether a rollout is gone through once and at once."""
        return self.ppo_epochs == 1 and self.update_size >= self.rollout_size

    @property
    def at_ratio_1(self) -> bool:
        """Whether the policy is the one that sampled throughout, so that nothing is clipped; not with dropout."""
        return self.one_update and not self.dropout
