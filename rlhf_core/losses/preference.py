"""Losses that learn from preferences without a reward model: DPO and its family, KTO, ORPO, SimPO.

All work on one number a completion, (B,) in nats: `log_ratios` = logps - ref_logps, where logps are the log-probs of
its tokens, summed or, where a loss says so, averaged. What the loss does not see is the caller's choice: without a
reference log_ratios = logps; length-normalised DPO (Lambert et al. 2024) averages; `length_desensitized_weights`.
The implicit reward of a completion is beta * log_ratio. All losses are per pair (KTO: per completion), unreduced.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); log 2 where policy and reference agree.

    beta: strength of the implicit KL penalty, > 0.
    label_smoothing: cDPO (Mitchell 2023): share of labels taken to be the wrong way round, in [0, 0.5).
    """
    margins = beta * (chosen_log_ratios - rejected_log_ratios)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def robust_dpo_loss(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): unbiased for the clean loss where that share of labels is flipped.

    label_smoothing: the share, in [0, 0.5).
    """
    margins = beta * (chosen_log_ratios - rejected_log_ratios)
    noisy = (1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return -noisy / (1 - 2 * label_smoothing)


def ipo_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17, with beta for tau): the margin is regressed on 1 / (2 beta), nats.

    Of summed log-ratios as in the paper, or of averages, which keeps the target in reach of long completions.
    """
    return (chosen_log_ratios - rejected_log_ratios - 1 / (2 * beta)) ** 2


def hinge_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """Hinge on DPO's margin (SLiC: Zhao et al. 2023, eq. 1; normalised by the reference: Liu et al. 2024, RSO)."""
    return F.relu(1 - beta * (chosen_log_ratios - rejected_log_ratios))


def simpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, gamma: float
) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): no reference; log-probs averaged over the completion's tokens.

    gamma: the margin, in units of reward, that the chosen completion should win by.
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, orpo_lambda: float) -> Tensor:
    """ORPO (Hong et al. 2024, eq. 6): the chosen one's cross-entropy and, weighed, the odds-ratio term (eq. 7).

    No reference; log-probs averaged over the completion's tokens, below 0.
    """

    def log_odds(logps: Tensor) -> Tensor:  # log p - log(1 - p), finite where p rounds to 1
        logps = logps.clamp_max(-1e-7)
        return logps - torch.log(-torch.expm1(logps))

    return -chosen_logps - orpo_lambda * F.logsigmoid(
        log_odds(chosen_logps) - log_odds(rejected_logps)
    )


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8) of single completions, each desirable or not.

    kl: the reference point z0, (): KL(policy || reference) as the mean log-ratio of prompts with other prompts'
        completions, at least 0; a constant, no gradient flows into it.
    """
    gain = beta * (log_ratios - kl.detach())
    value = torch.sigmoid(torch.where(desirable, gain, -gain))
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * (1 - value)


def length_desensitized_weights(lengths: Tensor, *, alpha: float) -> Tensor:
    """Weights (M,) of the tokens of pairs for LD-DPO (Liu et al. 2024): those beyond the length of the pair's shorter
    completion weigh alpha, in [0, 1]; 1 is plain DPO.

    lengths: (B, 2), tokens of each completion, M together.
    """
    public = lengths.amin(dim=1, keepdim=True).expand_as(lengths)
    runs = torch.stack(
        [public, lengths - public], dim=-1
    ).flatten()  # shared tokens, then those beyond, in turns
    return (
        lengths.new_tensor([1.0, alpha], dtype=torch.float32)
        .repeat(lengths.numel())
        .repeat_interleave(runs)
    )


# By name those of pairs, of the log-ratios of chosen and rejected; their options come by keyword.
LOSSES = {
    "dpo": dpo_loss,
    "robust": robust_dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}
