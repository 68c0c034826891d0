"""DPO's family, SimPO and ORPO: the policy learns from pairs, without reward model or sampling."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.data import Pair, TokenBatch
from rlhf_core.data.quality import differing
from rlhf_core.data.store import join
from rlhf_core.losses.preference import (
    LOSSES,
    length_desensitized_weights,
    length_regularized,
)
from rlhf_core.losses.reward import preferred
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.ops.linear_logprobs import TokenStatistics
from rlhf_core.options import option
from rlhf_core.training.completions import (
    label_smoothing_of,
    sequence_means,
    sequence_sums,
    target_logprobs,
    target_loss,
    warn_of_label_smoothing,
)
from rlhf_core.training.config import MAX_LENGTH, TrainConfig
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.reference import KnownLogps, Reference, ReferenceLogprobs
from rlhf_core.training.trainer import Trainer

WITHOUT_REFERENCE = ("simpo", "orpo")
OF_REWARD_MARGINS = ("dpo", "robust", "hinge")  # losses of beta times the margin, not of targets


def options_of(loss: str) -> set[str]:
    """The options that a loss takes beside log-ratios."""
    return set(inspect.getfullargspec(LOSSES[loss]).kwonlyargs)


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    """Loss of DPO and its kin, see losses/preference.py."""

    lr: float = option(1e-6, "peak learning rate of AdamW", within="(0, inf)")
    loss: str = option(
        "dpo", "hinge is SLiC; simpo and orpo need no reference", choices=tuple(LOSSES)
    )
    beta: float = option(
        0.1,
        "strength of the implicit KL penalty; higher stays closer. simpo: the reward's scale, 2-10",
        within="(0, inf)",
    )
    label_smoothing: float = option(
        0.0,
        "dpo (then cDPO) and robust: share of pairs assumed to be labelled wrongly; a pair's own "
        "label_smoothing comes first",
        within="[0, 0.5)",
    )
    average: bool = option(
        False, "average log-probs over a completion's tokens; simpo and orpo require it"
    )
    reference_free: bool = option(False, "compare with no reference: its log-probs count as equal")
    reference_logprobs: str | None = option(
        None, "file of the reference's log-probs, written if it does not exist"
    )
    ld_alpha: float = option(
        1.0,
        "LD-DPO: weight of tokens beyond the pair's shorter completion; 1 is plain DPO",
        within="[0, 1]",
    )
    length_alpha: float = option(
        0.0,
        "R-DPO, for dpo, robust and hinge: reward that each token of a completion earns by its "
        "length alone, so that the policy need not learn it; higher favours shorter answers",
        within="[0, inf)",
    )
    gamma: float = option(
        0.0, "simpo: margin by which the chosen completion's reward should win", within="[0, inf)"
    )
    orpo_lambda: float = option(
        0.1, "orpo: weight of the odds-ratio term beside the cross-entropy", within="(0, inf)"
    )
    sft_coef: float = option(
        0.0, "weight of the chosen completion's mean cross-entropy in the loss", within="[0, inf)"
    )
    max_length: int = option(1024, MAX_LENGTH, within="[2, inf)")

    def __post_init__(self):
        super().__post_init__()
        loss, compares = self.loss, self.loss not in WITHOUT_REFERENCE
        no_file = self.reference_logprobs is None
        self.check(
            ("average", self.average or compares, f"set for loss {loss!r}"),
            (
                "label_smoothing",
                self.label_smoothing or loss != "robust",
                "> 0 for loss 'robust', which is dpo at 0",
            ),
            ("reference_logprobs", no_file or compares, f"unset: loss {loss!r} has no reference"),
            (
                "reference_logprobs",
                no_file or not self.reference_free,
                "unset with reference_free, which compares with no reference",
            ),
            (
                "length_alpha",
                not self.length_alpha or loss in OF_REWARD_MARGINS,
                f"0 for loss {loss!r}; it is for {', '.join(OF_REWARD_MARGINS)}",
            ),
            ("sft_coef", not self.sft_coef or loss != "orpo", "0: orpo has a cross-entropy term"),
        )
        unused = {"beta", "label_smoothing", "gamma", "orpo_lambda"} - options_of(loss)
        if not compares:
            unused.add("reference_free")
        self.warn_unused(
            *((name, False, f"on loss {loss!r}") for name in sorted(unused)),
            ("ld_alpha", not self.average, "with average"),
        )


class DPOTrainer(Trainer):
    """Trains a Transformer on `Pair`s; reference as for `Reference`.

    No reference is held if the loss needs none, or with `reference_logprobs`; those belong to the
    reference given, else to the policy as it is now.

    Metrics: loss, rewards/{chosen,rejected,accuracies,margins}, entropy, logps/{chosen,rejected} as
    the loss takes them (summed, averaged or weighted).
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
        if self.kinds:
            self.examples = differing(self.examples, "pairs")
            self.eval_examples = differing(self.eval_examples, "evaluation pairs")
            if "label_smoothing" not in options_of(config.loss):
                warn_of_label_smoothing(join([self.examples, self.eval_examples]), config.loss)
        without = config.reference_free or config.loss in WITHOUT_REFERENCE
        if without and reference is not None:
            named = "reference_free" if config.reference_free else f"loss {config.loss!r}"
            raise ValueError(f"a reference was passed, but {named} compares with none")
        self.reference = self.reference_logprobs = None
        if config.reference_logprobs is not None:
            self.reference_logprobs = ReferenceLogprobs(
                config.reference_logprobs,
                join([self.examples, self.eval_examples]),
                reference or model,
                config.precision,
                self._compute_reference_logprobs,
            )
        elif not without:
            self.reference = Reference(model, reference)
        # Ranks get other pairs in each epoch, and online DPO samples new ones.
        again = config.epochs > 1 or len(self.eval_examples) > 0
        self._known_logps = None
        if self.reference is not None and self.kinds and again and distributed.size() == 1:
            self._known_logps = KnownLogps()

    def _compute_reference_logprobs(
        self, reference: Transformer
    ) -> Iterator[tuple[list[Pair], tuple[Tensor, ...]]]:
        """Log-probs in the batches of the first epoch, so that they round as the policy's will."""
        size = self.config.batch_size
        first_epoch = itertools.islice(self.batches(), math.ceil(len(self.examples) / size))
        starts = range(0, len(self.eval_examples), size)
        held_out = (list(self.eval_examples[start : start + size]) for start in starts)
        with torch.no_grad(), eval_mode(reference):
            for batch in itertools.chain(first_epoch, held_out):
                for part, tokens in self.parts(batch, packing=self.config.max_length):
                    with self.autocast():
                        logprobs = target_logprobs(reference, tokens)
                    yield part, logprobs.split(tokens.lengths.view(-1, 2).sum(dim=1).tolist())

    def _reference_logps(self, part: list[Pair], tokens: TokenBatch) -> Tensor:
        """The reference's numbers (B, 2) for the pairs of a micro-batch."""

        def compute() -> Tensor:
            with self.reference.policy() as reference, self.autocast():
                logprobs = target_logprobs(reference, tokens)  # (M,)
            return self.logps(logprobs, tokens.lengths.view(-1, 2))

        return compute() if self._known_logps is None else self._known_logps(part, compute)

    def resume(self) -> None:
        """As in Trainer. The reference reads the first epoch's pairs in the same batches again."""
        super().resume()
        if self._known_logps is not None:
            first_epoch = math.ceil(len(self.examples) / self.config.batch_size)
            for batch in itertools.islice(self.batches(), min(self.steps_done, first_epoch)):
                for part, tokens in self.parts(batch, packing=self.config.max_length):
                    self._reference_logps(part, tokens)

    def fixed_models(self) -> list:
        reference = [] if self.reference is None else self.reference.fixed_models()
        return [*super().fixed_models(), *reference]

    def settings(self) -> dict:
        if self.reference_logprobs is None:
            return super().settings()
        return super().settings() | {"reference": self.reference_logprobs.made_of["reference"]}

    def losses(self, batch: list[Pair], metrics: Metrics) -> Iterator[Tensor]:
        for part, tokens in self.parts(batch, packing=self.config.max_length):
            lengths = tokens.lengths.view(-1, 2)  # (B, 2)
            ref_logps = torch.zeros(lengths.shape, device=lengths.device)
            if self.reference_logprobs is not None:
                ref_logps = self.logps(self.reference_logprobs(part).to(self.device), lengths)
            elif self.reference is not None:
                ref_logps = self._reference_logps(part, tokens)
            losses_of = partial(
                self.pair_losses,
                lengths=lengths,
                ref_logps=ref_logps,
                label_smoothing=label_smoothing_of(part, self.config.label_smoothing, self.device),
                count=self.total(len(batch)),
            )
            with self.autocast():
                total, loss, logps, rewards, entropy = target_loss(
                    self.model, tokens, losses_of, sizes=lengths.sum(dim=1)
                )
            chosen, rejected = rewards.unbind(dim=1)
            metrics.add("loss", loss)
            metrics.add("rewards/chosen", chosen)
            metrics.add("rewards/rejected", rejected)
            metrics.add("rewards/accuracies", preferred(chosen, rejected))
            metrics.add("rewards/margins", chosen - rejected)
            metrics.add("logps/chosen", logps[:, 0])
            metrics.add("logps/rejected", logps[:, 1])
            metrics.add("entropy", entropy)
            yield total

    def pair_losses(
        self,
        read: TokenStatistics,
        some: slice,
        *,
        lengths: Tensor,
        ref_logps: Tensor,
        label_smoothing: Tensor | float,
        count: int,
    ) -> tuple[Tensor, ...]:
        """The summed loss of some pairs over `count`; their losses (n,), log-probs (n, 2) and
        implicit rewards (n, 2), and the entropy of their tokens. See `ops.linear_token_loss`."""
        config = self.config
        logps = self.logps(read.logprobs, lengths[some])
        log_ratios = logps - ref_logps[some]
        compared = log_ratios
        if config.length_alpha:
            alpha = dict(alpha=config.length_alpha, beta=config.beta)
            compared = length_regularized(log_ratios, lengths[some], **alpha)
        options = {name: getattr(config, name) for name in options_of(config.loss)}
        if "label_smoothing" in options and isinstance(label_smoothing, Tensor):
            options["label_smoothing"] = label_smoothing[some]
        loss = LOSSES[config.loss](*compared.unbind(dim=1), **options)
        if config.sft_coef:
            means = sequence_means(read.logprobs, lengths[some])
            loss = loss - config.sft_coef * means[:, 0]
        rewards = options.get("beta", 1.0) * log_ratios
        return loss.sum() / count, loss, logps, rewards, read.entropy

    def logps(self, logprobs: Tensor, lengths: Tensor) -> Tensor:
        """One number (B, 2) for each completion, from the log-probs (M,) of its tokens."""
        if self.config.average:
            return sequence_means(logprobs, lengths)
        if self.config.ld_alpha < 1:
            weights = length_desensitized_weights(lengths, alpha=self.config.ld_alpha)
            logprobs = logprobs * weights
        return sequence_sums(logprobs, lengths)
