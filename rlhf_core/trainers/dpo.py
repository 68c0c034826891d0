"""From preferences directly: the policy learns from pairs, no reward model, no sampling. DPO's family, SimPO, ORPO."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.data import Pair
from rlhf_core.losses.preference import LOSSES, length_desensitized_weights
from rlhf_core.losses.reward import preferred
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.trainers.common import Metrics, Trainer
from rlhf_core.trainers.completions import sequence_means, sequence_sums, target_logprobs
from rlhf_core.trainers.config import TrainConfig, option
from rlhf_core.trainers.reference import Reference, ReferenceLogprobs

WITHOUT_REFERENCE = ("simpo", "orpo")


def options_of(loss: str) -> set[str]:
    """What a loss takes beside log-ratios."""
    return set(inspect.getfullargspec(LOSSES[loss]).kwonlyargs)


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """An option that has no effect on the loss is refused unless it has its default."""

    lr: float = option(1e-6, "peak learning rate of AdamW")
    loss: str = option(
        "dpo",
        "dpo, robust, ipo, hinge (SLiC), or without reference simpo, orpo: see losses/preference",
    )
    beta: float = option(
        0.1, "strength of the implicit KL penalty, > 0; simpo: scale of the reward, there 2 to 10"
    )
    label_smoothing: float = option(
        0.0, "dpo (then cDPO), robust: share of labels taken to be wrong, in [0, 0.5)"
    )
    average: bool = option(
        False, "log-probs averaged over a completion's tokens, not summed; simpo and orpo need it"
    )
    reference_free: bool = option(False, "compare with no reference: its log-probs are all alike")
    reference_logprobs: str | None = option(
        None, "file of the reference's log-probs; written where there is none"
    )
    ld_alpha: float = option(
        1.0, "LD-DPO: weight of tokens beyond the pair's shorter completion, in [0, 1]; 1: all"
    )
    gamma: float = option(
        0.0, "simpo: reward by which the chosen completion should win, at least 0"
    )
    orpo_lambda: float = option(
        0.1, "orpo: weight of the odds-ratio term beside the cross-entropy of the chosen, > 0"
    )
    sft_coef: float = option(
        0.0, "weight of the chosen completion's mean cross-entropy, added to the loss"
    )
    max_length: int = option(
        1024, "tokens of prompt and completion together; what is longer is cut"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("beta", "orpo_lambda")
        self.check_choices(loss=tuple(LOSSES))
        loss, without_reference = self.loss, self.loss in WITHOUT_REFERENCE
        self.check(
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)"),
            ("ld_alpha", 0 <= self.ld_alpha <= 1, "in [0, 1]"),
            ("gamma", self.gamma >= 0, "at least 0"),
            ("sft_coef", self.sft_coef >= 0, "at least 0"),
            ("average", self.average or not without_reference, f"set for loss {loss!r}"),
            (
                "label_smoothing",
                self.label_smoothing or loss != "robust",
                "> 0 for loss 'robust', else it is 'dpo'",
            ),
        )
        idle = {"beta", "label_smoothing", "gamma", "orpo_lambda"} - options_of(loss)
        idle |= {"reference_free", "reference_logprobs"} if without_reference else set()
        idle |= {"sft_coef"} if loss == "orpo" else set()
        self.check_effective(
            *((name, False, f"on loss {loss!r}") for name in sorted(idle)),
            ("ld_alpha", not self.average, "where log-probs are averaged"),
            ("reference_logprobs", not self.reference_free, "with reference_free"),
        )


class DPOTrainer(Trainer):
    """model: Transformer; examples: `Pair`s; reference: see `Reference`. None is held where the loss needs none, nor
    with `reference_logprobs`, which are of the reference given, else of the policy as it is now.

    Metrics: loss, rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected} as the loss takes them (summed,
    averaged or weighted), entropy.
    """

    algorithm = "dpo"
    main_metric = "rewards/accuracies"
    kinds = (Pair,)

    def __init__(
        self,
        model: Transformer,
        examples,
        config: DPOConfig,
        *,
        reference: Transformer | None = None,
        **options,
    ):
        super().__init__(model, examples, config, **options)
        if self.kinds and all(row.chosen_ids == row.rejected_ids for row in examples):
            raise ValueError(f"of none of the {len(examples)} pairs do the completions differ")
        without = config.reference_free or config.loss in WITHOUT_REFERENCE
        if without and reference is not None:
            named = "reference_free" if config.reference_free else f"loss {config.loss!r}"
            raise ValueError(f"a reference has no effect with {named}")
        self.reference = self.reference_logprobs = None
        if config.reference_logprobs is not None:
            self.reference_logprobs = ReferenceLogprobs(
                config.reference_logprobs,
                (*examples, *self.eval_examples),
                reference or model,
                config.precision,
                self._compute_reference_logprobs,
            )
        elif not without:
            self.reference = Reference(model, reference)

    def _compute_reference_logprobs(
        self, reference: Transformer
    ) -> Iterator[tuple[list[Pair], tuple[Tensor, ...]]]:
        """In the batches of the first epoch, so that they round as the policy's will."""
        size = self.config.batch_size
        first_epoch = itertools.islice(self.batches(), math.ceil(len(self.examples) / size))
        held_out = (
            self.eval_examples[start : start + size]
            for start in range(0, len(self.eval_examples), size)
        )
        with torch.no_grad(), eval_mode(reference):
            for batch in itertools.chain(first_epoch, held_out):
                for part, tokens in self.parts(batch, packing=self.config.max_length):
                    with self.autocast():
                        logprobs, _ = target_logprobs(reference, tokens)
                    yield part, logprobs.split(tokens.lengths.view(-1, 2).sum(dim=1).tolist())

    def settings(self) -> dict:
        cached = self.reference_logprobs
        return super().settings() | (
            {} if cached is None else {"reference": cached.made_of["reference"]}
        )

    def losses(self, batch: list[Pair], metrics: Metrics) -> Iterator[Tensor]:
        for part, tokens in self.parts(batch, packing=self.config.max_length):
            lengths = tokens.lengths.view(-1, 2)  # (B, 2)
            ref_logps = torch.zeros(lengths.shape, device=lengths.device)
            if self.reference_logprobs is not None:
                ref_logps = self.logps(self.reference_logprobs(part).to(self.device), lengths)
            elif self.reference is not None:
                with self.reference.policy() as reference, self.autocast():
                    ref_logprobs, _ = target_logprobs(reference, tokens)  # (M,)
                ref_logps = self.logps(ref_logprobs, lengths)

            def loss_of(logprobs, pairs, lengths=lengths, ref_logps=ref_logps):
                return self.pair_losses(logprobs, lengths[pairs], ref_logps[pairs])[0].sum() / len(
                    batch
                )

            with self.autocast():
                logprobs, entropy = target_logprobs(
                    self.model, tokens, loss_of=loss_of, sizes=lengths.sum(dim=1)
                )
            loss, logps, rewards = self.pair_losses(logprobs, lengths, ref_logps)
            metrics.add("loss", loss)
            metrics.add("rewards/chosen", rewards[:, 0])
            metrics.add("rewards/rejected", rewards[:, 1])
            metrics.add("rewards/accuracies", preferred(*rewards.unbind(dim=1)))
            metrics.add("rewards/margins", rewards[:, 0] - rewards[:, 1])
            metrics.add("logps/chosen", logps[:, 0])
            metrics.add("logps/rejected", logps[:, 1])
            metrics.add("entropy", entropy)
            yield loss.sum() / len(batch)

    def pair_losses(
        self, logprobs: Tensor, lengths: Tensor, ref_logps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,), log-probs (B, 2) and implicit rewards (B, 2) from the targets' log-probs (M,)."""
        config, logps = self.config, self.logps(logprobs, lengths)
        log_ratios = logps - ref_logps
        names = options_of(config.loss)
        loss = LOSSES[config.loss](
            *log_ratios.unbind(dim=1), **{name: getattr(config, name) for name in names}
        )
        if config.sft_coef:
            loss = loss - config.sft_coef * sequence_means(logprobs, lengths)[:, 0]
        return loss, logps, (config.beta if "beta" in names else 1.0) * log_ratios

    def logps(self, logprobs: Tensor, lengths: Tensor) -> Tensor:
        """A number (B, 2) for each completion from the log-probs (M,) of its tokens."""
        if self.config.average:
            return sequence_means(logprobs, lengths)
        if self.config.ld_alpha < 1:
            logprobs = logprobs * length_desensitized_weights(lengths, alpha=self.config.ld_alpha)
        return sequence_sums(logprobs, lengths)
