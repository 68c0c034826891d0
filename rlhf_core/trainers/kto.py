"""KTO: the policy against a frozen reference on single completions, each labelled desirable or not; no pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.data import Example
from rlhf_core.data.encode import fit
from rlhf_core.losses import kto_loss, preferred
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.trainers.common import Metrics, Trainer
from rlhf_core.trainers.completions import sequence_sums, target_logprobs
from rlhf_core.trainers.config import TrainConfig, option
from rlhf_core.trainers.reference import Reference


@dataclass(frozen=True)
class KTOConfig(TrainConfig):
    lr: float = option(1e-6, "peak learning rate of AdamW")
    beta: float = option(0.1, "strength of the implicit KL penalty, > 0")
    desirable_weight: float = option(
        1.0, "of desirable completions, > 0; raise it where there are few of them"
    )
    undesirable_weight: float = option(1.0, "of the others, > 0")
    max_length: int = option(
        1024, "tokens of prompt and completion together; what is longer is cut"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("beta", "desirable_weight", "undesirable_weight")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, got {self.batch_size}: the KL needs other prompts"
            )


class KTOTrainer(Trainer):
    """model: Transformer; examples: `Example`s with a label; reference: see `Reference`.

    Metrics: loss, rewards/{desirable,undesirable}, rewards/accuracies (whether a completion's reward is on the right
    side of the KL), kl, logps, entropy. The KL is of a batch's own rows: loss and accuracies, of evaluation too, depend
    on batch_size.
    """

    algorithm = "kto"
    main_metric = "rewards/accuracies"
    kinds = (Example,)

    def __init__(
        self,
        model: Transformer,
        examples,
        config: KTOConfig,
        *,
        reference: Transformer | None = None,
        **options,
    ):
        super().__init__(model, examples, config, **options)
        self.reference = Reference(model, reference)

    def fault(self, example) -> str | None:
        return (
            None
            if example.label in (True, False)
            else f"has label {example.label!r}, not True or False"
        )

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config, kl = self.config, self.kl(batch)
        weights = dict(
            desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight
        )
        for part, tokens in self.parts(batch, packing=config.max_length):
            desirable = torch.tensor(
                [bool(example.label) for example in part], device=kl.device
            )  # (B,)
            with self.reference.policy() as reference, self.autocast():
                ref_logps = sequence_sums(target_logprobs(reference, tokens)[0], tokens.lengths)

            def row_losses(logps, rows, desirable=desirable, ref_logps=ref_logps):
                return kto_loss(
                    logps - ref_logps[rows], desirable[rows], kl, beta=config.beta, **weights
                )

            def loss_of(logprobs, rows, lengths=tokens.lengths, row_losses=row_losses):
                return row_losses(sequence_sums(logprobs, lengths[rows]), rows).sum() / len(batch)

            with self.autocast():
                logprobs, entropy = target_logprobs(
                    self.model, tokens, loss_of=loss_of, sizes=tokens.lengths
                )
            logps = sequence_sums(logprobs, tokens.lengths)
            loss, rewards = row_losses(logps, slice(None)), config.beta * (logps - ref_logps)
            gain = rewards - config.beta * kl
            metrics.add("loss", loss)
            metrics.add("rewards/desirable", rewards, desirable)
            metrics.add("rewards/undesirable", rewards, ~desirable)
            metrics.add(
                "rewards/accuracies",
                preferred(gain, -gain).where(desirable, preferred(-gain, gain)),
            )
            metrics.add("kl", kl.expand(len(part)))
            metrics.add("logps", logps)
            metrics.add("entropy", entropy)
            yield loss.sum() / len(batch)

    @torch.no_grad()
    def kl(self, batch: list[Example]) -> Tensor:
        """z0 (): the mean log-ratio of every prompt with the next one's completion, at least 0; of one row alone 0."""
        if len(batch) == 1:
            return torch.zeros((), device=self.device)
        limit, bos_id = (
            min(self.config.max_length, self.model.config.max_positions),
            self.model.config.bos_id,
        )
        mismatched = []
        for row, other in zip(batch, batch[1:] + batch[:1]):
            prompt, (completion,) = fit(row.prompt_ids, [other.completion_ids], limit, bos_id)
            mask = other.completion_mask
            mismatched.append(
                Example(prompt, completion, None if mask is None else mask[: len(completion)])
            )
        total = torch.zeros((), device=self.device)
        for tokens in self.token_batches(mismatched, packing=self.config.max_length):
            with eval_mode(self.model), self.autocast():
                logps = sequence_sums(target_logprobs(self.model, tokens)[0], tokens.lengths)
            with self.reference.policy() as reference, self.autocast():
                total += (
                    logps - sequence_sums(target_logprobs(reference, tokens)[0], tokens.lengths)
                ).sum()
        return (total / len(batch)).clamp_min(0)
