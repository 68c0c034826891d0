"""Losses of reward models, unreduced.

Pairs and ranked lists determine only differences of scores; steps are labelled right or wrong.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float = 0.0,
    label_smoothing: Tensor | float = 0.0,
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1).

    margin: (B,) or a number; larger if the preference was clearer (Touvron et al. 2023, eq. 2).
    label_smoothing: in [0, 0.5), a number, the assumed share of flipped labels (Wang et al. 2024),
    or (B,), the probability that each label is wrong.
    """
    margins = chosen_scores - rejected_scores - margin
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def margin_ranking_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | float = 1.0
) -> Tensor:
    """max(0, margin - (chosen - rejected)): 0 once chosen leads by the margin, (B,) or a number."""
    return F.relu(margin - (chosen_scores - rejected_scores))


def centering_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """(chosen + rejected)^2, which keeps a pair's mean score near 0 (Eisenstein et al. 2023)."""
    return (chosen_scores + rejected_scores) ** 2


def plackett_luce_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood (B,) of ranked lists (Plackett 1975; Luce 1959).

    Each item beats all items after it. Two items give Bradley-Terry; one or none gives 0.

    scores: (B, K), best item first. mask: (B, K) bool, True = an item; False only at a list's end.
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    # log sum exp over each item and those after it
    rest = scores.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return (rest.masked_fill(~mask, 0) - scores.masked_fill(~mask, 0)).sum(dim=-1)


def process_reward_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-l log sigmoid(score) - (1 - l) log sigmoid(-score) of steps, (M,).

    A score is the log-odds that its step is right (Uesato et al. 2022; Lightman et al. 2023).

    labels: (M,) l in [0, 1]: 1 right, 0 wrong, or the share of rollouts from this step that end
    right (Wang et al. 2024).
    """
    return -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)


def preferred(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """1 if chosen scores higher, 0 if lower, 0.5 on a tie. The mean is the accuracy or win rate."""
    return (torch.sign(chosen_scores - rejected_scores) + 1) / 2
