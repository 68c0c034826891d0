"""Advantages without a critic: each response's score against the scores of other responses.

All functions share one signature. Args: scores (P, n), n responses to each of P prompts; kl
(P, n, R), the KL penalty that each token subtracts from the reward, 0 where the mask is False; mask
(P, n, R) bool, True where a token counts. Returns: (P, n, R) float32, 0 where the mask is False. If
all scores are equal, the result is 0 and never NaN.

GRPO and RLOO treat a response as one action, so the sum of its KL counts for every token. ReMax and
REINFORCE++ treat each token as an action, and count the KL of that and later tokens.
"""

from torch import Tensor

from rlhf_core.masking import tied, whiten


def grpo_advantages(scores: Tensor, kl: Tensor, mask: Tensor, *, normalize: bool = True) -> Tensor:
    """(score - group mean) / group standard deviation (Shao et al. 2024, section 4.1.2).

    The variance is the unbiased one. normalize=False omits the division (Liu et al. 2025, "Dr.
    GRPO"). Dividing gives more weight to easy and hard prompts, because their scores hardly vary.
    """
    scores = scores.float() - kl.sum(dim=-1)
    centred = _centred(scores)
    if normalize:
        centred = centred / (scores.std(dim=1, keepdim=True) + 1e-4)
    return centred[..., None] * mask


def rloo_advantages(scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """score - mean score of the group's other responses (Ahmadian et al. 2024, eq. 8)."""
    n = scores.shape[-1]
    return _centred(scores.float() - kl.sum(dim=-1))[..., None] * (n / (n - 1)) * mask


def reinforce_pp_advantages(scores: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """score - KL to come, whitened over the batch's tokens (REINFORCE++, Hu et al. 2025).

    Groups of n > 1 responses are centred first.
    """
    scores = scores.float()
    # Whitening removes any shift. This one makes equal scores exactly 0.
    scores = _centred(scores) if scores.shape[1] > 1 else scores - scores[:1]
    return whiten(scores[..., None] - _to_come(kl), mask)


def remax_advantages(scores: Tensor, kl: Tensor, mask: Tensor, *, greedy_scores: Tensor) -> Tensor:
    """score - score of the prompt's greedy response - KL to come (ReMax, Li et al. 2023, eq. 8).

    greedy_scores: (P,).
    """
    return ((scores.float() - greedy_scores.float()[:, None])[..., None] - _to_come(kl)) * mask


ESTIMATORS = {
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_pp": reinforce_pp_advantages,
    "remax": remax_advantages,
}


def _to_come(kl: Tensor) -> Tensor:
    """Sums (..., R) over each token and all later ones."""
    return kl.flip(-1).cumsum(dim=-1).flip(-1)


def _centred(scores: Tensor) -> Tensor:
    """Scores minus their group's mean; exactly 0 in a group whose scores all tie."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores must be (P, n) with n >= 2 responses per prompt, got {tuple(scores.shape)}"
        )
    return (scores - scores.mean(dim=1, keepdim=True)).masked_fill(tied(scores)[:, None], 0)
