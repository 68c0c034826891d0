"""Losses of reward models: Bradley-Terry (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1)."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Negative log-likelihood (B,) that the chosen response wins: -log sigmoid(chosen - rejected), scores (B,)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)
