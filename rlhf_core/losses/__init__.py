"""Losses as pure functions: tensors in, unreduced loss and statistics out."""

from rlhf_core.losses.preference import dpo_loss
from rlhf_core.losses.reward import bradley_terry_loss, preferred

__all__ = ["bradley_terry_loss", "dpo_loss", "preferred"]
