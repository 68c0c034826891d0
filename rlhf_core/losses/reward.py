"""Losses of reward models, unreduced: from pairs and ranked lists, where only differences of scores count, and from
steps that are right or wrong."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1).

    margin: (B,) or one for all, how clearly the chosen one won (Touvron et al. 2023, eq. 2).
    label_smoothing: share of labels taken to be the wrong way round (Wang et al. 2024), in [0, 0.5).
    """
    margins = chosen_scores - rejected_scores - margin
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def margin_ranking_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | float = 1.0
) -> Tensor:
    """max(0, margin - (chosen - rejected)): nothing more once the chosen one leads by the margin, (B,) or one."""
    return F.relu(margin - (chosen_scores - rejected_scores))


def centering_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """(chosen + rejected)^2, which holds a pair's mean score near 0 (Eisenstein et al. 2023)."""
    return (chosen_scores + rejected_scores) ** 2


def plackett_luce_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood (B,) of ranked lists (Plackett 1975; Luce 1959): each item wins against all behind it.

    scores: (B, K), the best item first. mask: (B, K) bool, True = there is an item; False only at a list's end.
    Two items are Bradley-Terry; one, or none, give 0.
    """
    scores = scores.masked_fill(~mask, -torch.inf)
    rest = (
        scores.flip(-1).logcumsumexp(dim=-1).flip(-1)
    )  # log sum exp over this item and those behind it
    return (rest.masked_fill(~mask, 0) - scores.masked_fill(~mask, 0)).sum(dim=-1)


def process_reward_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-l log sigmoid(score) - (1 - l) log sigmoid(-score), the cross-entropy (M,) of steps (Uesato et al. 2022;
    Lightman et al. 2023): a score is the log-odds that its step is right.

    labels: (M,) l, 1 for right, 0 for wrong; between them the share of rollouts that end right (Wang et al. 2024).
    """
    return -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)


def preferred(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """1 where the chosen one scores higher, 0 where lower, one half on a tie: the mean is accuracy, or win rate."""
    return (torch.sign(chosen_scores - rejected_scores) + 1) / 2
