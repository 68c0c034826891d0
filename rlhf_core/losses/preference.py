"""Losses on preference pairs without a reward model: DPO (Rafailov et al. 2023)."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class DPOStats(NamedTuple):
    """Implicit rewards beta * (logps - ref_logps), (B,), detached."""

    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, DPOStats]:
    """DPO loss (B,) of each pair, eq. 7, from log-probs summed over each completion, all (B,), in nats.

    beta is the strength of the implicit KL penalty, > 0. Where policy and reference agree the loss is log 2.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    loss = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return loss, DPOStats(chosen_rewards.detach(), rejected_rewards.detach())
