"""Advantages without a critic: a response's score against the scores of other responses. One signature for all.

scores (P, n): n responses to each of P prompts. The result (P, n), float32, is a response's advantage, the same for all
its tokens. Where nothing differs, the advantage is 0 and never NaN.
"""

from torch import Tensor

from rlhf_core.masking import whiten


def grpo_advantages(scores: Tensor, *, normalize: bool = True) -> Tensor:
    """(score - group mean) / group standard deviation (Shao et al. 2024, section 4.1.2; unbiased variance).

    normalize=False leaves the division out (Liu et al. 2025, "Dr. GRPO"): with it easy and hard prompts, whose scores
    hardly vary, weigh more.
    """
    centred = _centred(scores)
    return centred / (scores.float().std(dim=1, keepdim=True) + 1e-4) if normalize else centred


def rloo_advantages(scores: Tensor) -> Tensor:
    """score - mean score of the group's other responses (Ahmadian et al. 2024, eq. 8)."""
    n = scores.shape[-1]
    return _centred(scores) * (n / (n - 1))


def reinforce_pp_advantages(scores: Tensor) -> Tensor:
    """Scores whitened over the whole batch (REINFORCE++, Hu et al. 2025); groups of n > 1 lose their own mean first."""
    if scores.ndim == 2 and scores.shape[1] == 1:
        return whiten(scores.float(), scores == scores)
    centred = _centred(scores)  # its mean over the batch is 0 but for rounding
    return whiten(centred, centred == centred).masked_fill(centred == 0, 0)


def remax_advantages(scores: Tensor, greedy_scores: Tensor) -> Tensor:
    """score - the score (P,) of the prompt's greedy response (ReMax, Li et al. 2023, eq. 8)."""
    return scores.float() - greedy_scores.float()[:, None]


def _centred(scores: Tensor) -> Tensor:
    """Scores without their group's mean; exactly 0 where a group's scores are all alike."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"needs scores (P, n) of n >= 2 responses a prompt, got shape {tuple(scores.shape)}")
    alike = (scores == scores[:, :1]).all(dim=1, keepdim=True)
    scores = scores.float()
    return (scores - scores.mean(dim=1, keepdim=True)).masked_fill(alike, 0)
