"""KTO (Ethayarajh et al. 2024): learning from single completions, each desirable or undesirable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.data import Example, TokenBatch
from rlhf_core.data.encode import fit
from rlhf_core.losses import kto_loss, preferred
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.ops.linear_logprobs import TokenStatistics
from rlhf_core.options import option
from rlhf_core.training.completions import sequence_sums, target_logprobs, target_loss
from rlhf_core.training.config import MAX_LENGTH, TrainConfig
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.reference import Reference
from rlhf_core.training.trainer import Trainer


@dataclass(frozen=True)
class KTOConfig(TrainConfig):
    """Loss of KTO."""

    lr: float = option(1e-6, "peak learning rate of AdamW", within="(0, inf)")
    batch_size: int = option(
        16,
        "examples of an optimiser step; the KL pairs each prompt with another's completion",
        within="[2, inf)",
    )
    beta: float = option(
        0.1, "strength of the implicit KL penalty; higher stays closer", within="(0, inf)"
    )
    desirable_weight: float = option(
        1.0, "weight of desirable completions; raise it if there are few", within="(0, inf)"
    )
    undesirable_weight: float = option(
        1.0, "weight of undesirable completions; raise it if there are few", within="(0, inf)"
    )
    max_length: int = option(1024, MAX_LENGTH, within="[2, inf)")


class KTOTrainer(Trainer):
    """Trains a Transformer on `Example`s with a label; reference as for `Reference`.

    Metrics: loss, rewards/{desirable,undesirable}, rewards/accuracies (whether a reward is on the
    right side of the KL), kl, logps, entropy. The KL comes from a batch's own rows, so loss and
    accuracies depend on batch_size, in evaluation too.
    """

    algorithm = "kto"
    main_metric = "rewards/accuracies"
    kinds = (Example,)
    needs = "label"

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

    def fixed_models(self) -> list:
        return [*super().fixed_models(), *self.reference.fixed_models()]

    def fault(self, example: Example) -> str | None:
        if example.label in (True, False):
            return None
        return f"has label {example.label!r}, not True or False"

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config, kl = self.config, self.kl(batch)
        for part, tokens in self.parts(batch, packing=config.max_length):
            desirable = torch.tensor([bool(x.label) for x in part], device=kl.device)  # (B,)
            with self.reference.policy() as reference, self.autocast():
                ref_logps = sequence_sums(target_logprobs(reference, tokens), tokens.lengths)

            losses_of = partial(
                self.row_losses,
                lengths=tokens.lengths,
                desirable=desirable,
                ref_logps=ref_logps,
                kl=kl,
                count=self.total(len(batch)),
            )
            with self.autocast():
                total, loss, rewards, logps, entropy = target_loss(
                    self.model, tokens, losses_of, sizes=tokens.lengths
                )
            gain = rewards - config.beta * kl
            right, wrong = preferred(gain, -gain), preferred(-gain, gain)
            metrics.add("loss", loss)
            metrics.add("rewards/desirable", rewards, desirable)
            metrics.add("rewards/undesirable", rewards, ~desirable)
            metrics.add("rewards/accuracies", right.where(desirable, wrong))
            metrics.add("kl", kl.expand(len(part)))
            metrics.add("logps", logps)
            metrics.add("entropy", entropy)
            yield total

    def row_losses(
        self,
        read: TokenStatistics,
        some: slice,
        *,
        lengths: Tensor,
        desirable: Tensor,
        ref_logps: Tensor,
        kl: Tensor,
        count: int,
    ) -> tuple[Tensor, ...]:
        """The summed loss of some rows over `count`; their losses, rewards and logps (n,), and the
        entropy of their tokens. See `ops.linear_token_loss`."""
        logps = sequence_sums(read.logprobs, lengths[some])
        log_ratios = logps - ref_logps[some]
        loss = kto_loss(
            log_ratios,
            desirable[some],
            kl,
            beta=self.config.beta,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )
        return loss.sum() / count, loss, self.config.beta * log_ratios, logps, read.entropy

    @torch.no_grad()
    def kl(self, batch: list[Example]) -> Tensor:
        """z0 (): mean log-ratio of each prompt with the next one's completion, at least 0.

        It is 0 for a single row.
        """
        if len(batch) == 1:
            return torch.zeros((), device=self.device)
        limit = min(self.config.max_length, self.model.config.max_positions)
        mismatched = []
        for row, other in zip(batch, batch[1:] + batch[:1]):
            bos_id = self.model.config.bos_id
            prompt, (ids,) = fit(row.prompt_ids, [other.completion_ids], limit, bos_id)
            mask = other.completion_mask
            mismatched.append(Example(prompt, ids, None if mask is None else mask[: len(ids)]))

        def log_ratios(tokens: TokenBatch) -> tuple[Tensor]:
            with eval_mode(self.model), self.autocast():
                logps = sequence_sums(target_logprobs(self.model, tokens), tokens.lengths)
            with self.reference.policy() as reference, self.autocast():
                ref_logps = sequence_sums(target_logprobs(reference, tokens), tokens.lengths)
            return (logps - ref_logps,)

        parts = self.parts(mismatched, packing=self.config.max_length)
        (found,) = distributed.gather(log_ratios(tokens) for _, tokens in parts)  # (B,)
        return found.mean().clamp_min(0)
