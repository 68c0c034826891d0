"""The loss of supervised fine-tuning beside plain cross-entropy. Unreduced."""

from torch import Tensor


def regularized_cross_entropy(
    logprobs: Tensor,
    target_logits: Tensor,
    mean_logits: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_coef: float = 0.0,
) -> Tensor:
    """Cross-entropy with a smoothed target, and z-loss: (1 - s) -log p(target) + s mean_v(-log p(v)) + z (log Z)^2.

    logprobs, target_logits: (...) log p and the logit of the target. mean_logits: (...) over the vocabulary.
    label_smoothing: s in [0, 1), the share of the target's probability spread over all tokens (Szegedy et al. 2016).
    z_coef: z, which keeps log Z, the logits' logsumexp, near 0 (Chowdhery et al. 2022, PaLM, section 5: 1e-4).
    """
    log_z = target_logits - logprobs
    return (
        -(1 - label_smoothing) * logprobs
        + label_smoothing * (log_z - mean_logits)
        + z_coef * log_z**2
    )
