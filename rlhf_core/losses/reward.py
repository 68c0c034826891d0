"""Losses of reward models: Bradley-Terry (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Negative log-likelihood (B,) that the chosen response wins: -log sigmoid(chosen - rejected), scores (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def preferred(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """1 where the chosen one scores higher, 0 where lower, one half on a tie: the mean is accuracy, or win rate."""
    return (torch.sign(chosen_scores - rejected_scores) + 1) / 2
