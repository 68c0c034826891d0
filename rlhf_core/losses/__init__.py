"""Losses as pure functions: tensors in, unreduced loss out."""

from rlhf_core.losses.preference import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    length_desensitized,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_core.losses.reward import (
    bradley_terry_loss,
    centering_loss,
    margin_ranking_loss,
    plackett_luce_loss,
    preferred,
)

__all__ = [
    "bradley_terry_loss",
    "centering_loss",
    "dpo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "length_desensitized",
    "margin_ranking_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "preferred",
    "robust_dpo_loss",
    "simpo_loss",
]
