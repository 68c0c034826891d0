"""Losses as pure functions: tensors in, unreduced loss and statistics out."""

from rlhf_core.losses.policy import clipped_policy_loss, clipped_value_loss
from rlhf_core.losses.preference import dpo_loss
from rlhf_core.losses.reward import bradley_terry_loss, preferred

__all__ = ["bradley_terry_loss", "clipped_policy_loss", "clipped_value_loss", "dpo_loss", "preferred"]
