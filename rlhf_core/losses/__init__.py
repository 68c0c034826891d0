"""Losses as pure functions: tensors in, unreduced losses out."""

from rlhf_core.losses.advantages import (
    grpo_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)
from rlhf_core.losses.cispo import cispo_loss
from rlhf_core.losses.distillation import distillation_loss
from rlhf_core.losses.ilql import cloning_loss, expectile_loss, q_loss, transitions
from rlhf_core.losses.kl import kl_loss
from rlhf_core.losses.language import regularized_cross_entropy
from rlhf_core.losses.preference import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    length_desensitized_weights,
    length_regularized,
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
    process_reward_loss,
)

__all__ = [
    "bradley_terry_loss",
    "centering_loss",
    "cispo_loss",
    "cloning_loss",
    "distillation_loss",
    "dpo_loss",
    "expectile_loss",
    "grpo_advantages",
    "hinge_loss",
    "ipo_loss",
    "kl_loss",
    "kto_loss",
    "length_desensitized_weights",
    "length_regularized",
    "margin_ranking_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "preferred",
    "process_reward_loss",
    "q_loss",
    "regularized_cross_entropy",
    "reinforce_pp_advantages",
    "remax_advantages",
    "rloo_advantages",
    "robust_dpo_loss",
    "simpo_loss",
    "transitions",
]
