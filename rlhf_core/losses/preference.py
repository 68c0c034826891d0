"""Losses that learn from preferences without a reward model: DPO and its family, KTO, ORPO, SimPO.

All take one number per completion, (B,) in nats: log_ratios = logps - ref_logps, where logps are
the log-probs of its tokens, summed unless a loss says averaged. Variants are up to the caller:
without a reference log_ratios = logps, length-normalised DPO (Lambert et al. 2024) averages, and
LD-DPO uses `length_desensitized_weights`. The implicit reward of a completion is beta * log_ratio.
All losses are unreduced, (B,) per pair (KTO: per completion).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    *,
    beta: float,
    label_smoothing: Tensor | float = 0.0,
) -> Tensor:
    """DPO loss (Rafailov et al. 2023, eq. 7); log 2 if policy and reference agree.

    beta: > 0, strength of the implicit KL penalty; higher stays closer to the reference.
    label_smoothing: in [0, 0.5), a number, the assumed share of flipped labels (cDPO, Mitchell
    2023), or (B,), the probability that each label is wrong.
    """
    margins = beta * (chosen_log_ratios - rejected_log_ratios)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def robust_dpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    *,
    beta: float,
    label_smoothing: Tensor | float,
) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): an unbiased estimate of the loss with clean labels.

    label_smoothing: in [0, 0.5), share of flipped labels in the data, or (B,) as for `dpo_loss`.
    """
    margins = beta * (chosen_log_ratios - rejected_log_ratios)
    noisy = (1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return -noisy / (1 - 2 * label_smoothing)


def ipo_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17, beta is its tau): the margin regresses to 1 / (2 beta) nats.

    Log-ratios are summed as in the paper, or averaged, so that long completions reach the target.
    """
    return (chosen_log_ratios - rejected_log_ratios - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """Hinge loss of DPO's margin (SLiC, Zhao et al. 2023, eq. 1; RSO, Liu et al. 2024)."""
    return F.relu(1 - beta * (chosen_log_ratios - rejected_log_ratios))


def simpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): no reference; logps are averaged over a completion's tokens.

    gamma: target margin of the chosen completion, in units of reward.
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, orpo_lambda: float) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6): cross-entropy of chosen, plus the odds-ratio loss (eq. 7).

    No reference. logps are averaged over a completion's tokens, and < 0. orpo_lambda: weight of
    the odds-ratio loss.
    """

    def log_odds(logps: Tensor) -> Tensor:  # log p - log(1 - p), finite if p rounds to 1
        logps = logps.clamp_max(-1e-7)
        return logps - torch.log(-torch.expm1(logps))

    odds_ratio = F.logsigmoid(log_odds(chosen_logps) - log_odds(rejected_logps))
    return -chosen_logps - orpo_lambda * odds_ratio


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8) for single completions, each desirable or not.

    desirable: (B,) bool. kl: scalar >= 0, the reference point z0, which estimates KL(policy ||
    reference) by the mean log-ratio of prompts with other prompts' completions. No gradient.
    """
    gain = beta * (log_ratios - kl.detach())
    value = torch.sigmoid(torch.where(desirable, gain, -gain))
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - value)


def length_desensitized_weights(lengths: Tensor, *, alpha: float) -> Tensor:
    """Token weights (M,) for LD-DPO (Liu et al. 2024).

    Tokens beyond the length of the pair's shorter completion get weight alpha, others 1.

    lengths: (B, 2), tokens of each completion, M in total. alpha: in [0, 1]; 1 is plain DPO.
    """
    shared = lengths.amin(dim=1, keepdim=True).expand_as(lengths)
    runs = torch.stack([shared, lengths - shared], dim=-1).flatten()
    weights = lengths.new_tensor([1.0, alpha], dtype=torch.float32)
    return weights.repeat(lengths.numel()).repeat_interleave(runs)


def length_regularized(log_ratios: Tensor, lengths: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Log-ratios for R-DPO (Park et al. 2024): each token adds alpha to a completion's reward.

    A longer chosen completion then wins by its length in part, and the policy learns only the rest.

    log_ratios, lengths: (B, 2), of chosen and rejected; lengths in tokens. alpha: in units of
    reward per token; higher favours shorter completions. beta: as for the loss.
    """
    return log_ratios + alpha / beta * lengths


# Losses of pairs: functions of the two log-ratios, chosen and rejected, with keyword options.
LOSSES = {
    "dpo": dpo_loss,
    "robust": robust_dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}
