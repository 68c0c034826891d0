"""Advantages without a critic: a response's score against the scores of other responses. One signature for all.

scores (P, n): n responses to each of P prompts. kl (P, n, R): what each token's KL takes off the reward, 0 where it
does not count there. mask (P, n, R) bool: the tokens. The result (P, n, R) is float32, 0 where the mask is False; where
nothing differs it is 0 and never NaN.

GRPO and RLOO take a response for one action, so that the sum of its KL counts for every token; ReMax and REINFORCE++
take its tokens for actions: for each counts what is still to come.
"""

from torch import Tensor

from rlhf_core.masking import whiten


def grpo_advantages(scores: Tensor, kl: Tensor, mask: Tensor, *, normalize: bool = True) -> Tensor:
    """(score - group mean) / group standard deviation (Shao et al. 2024, section 4.1.2; unbiased variance).

    normalize=False leaves the division out (Liu et al. 2025, "Dr. GRPO"): with it easy and hard prompts, whose scores
    hardly vary, weigh more.
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
    """score - KL to come, whitened over the tokens of the batch (REINFORCE++, Hu et al. 2025); groups of n > 1 lose
    their mean score first."""
    # Whitening takes off any shift; with this one scores that are alike are 0 without a rest.
    scores = (
        _centred(scores.float()) if scores.shape[1] > 1 else scores.float() - scores[:1].float()
    )
    return whiten(scores[..., None] - _to_come(kl), mask)


def remax_advantages(scores: Tensor, kl: Tensor, mask: Tensor, *, greedy_scores: Tensor) -> Tensor:
    """score - the score (P,) of the prompt's greedy response (ReMax, Li et al. 2023, eq. 8) - KL to come."""
    return ((scores.float() - greedy_scores.float()[:, None])[..., None] - _to_come(kl)) * mask


ESTIMATORS = {
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_pp": reinforce_pp_advantages,
    "remax": remax_advantages,
}


def _to_come(kl: Tensor) -> Tensor:
    """Sums (..., R) of each token's and all later ones'."""
    return kl.flip(-1).cumsum(dim=-1).flip(-1)


def _centred(scores: Tensor) -> Tensor:
    """Scores without their group's mean; exactly 0 where a group's scores are all alike."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"needs scores (P, n) of n >= 2 responses a prompt, got shape {tuple(scores.shape)}"
        )
    alike = (scores == scores[:, :1]).all(dim=1, keepdim=True)
    return (scores - scores.mean(dim=1, keepdim=True)).masked_fill(alike, 0)
