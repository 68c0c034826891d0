"""Cross-entropy with label smoothing and z-loss, for supervised fine-tuning. Unreduced."""

from torch import Tensor


def regularized_cross_entropy(
    logprobs: Tensor,
    target_logits: Tensor,
    mean_logits: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_coef: float = 0.0,
) -> Tensor:
    """-(1 - s) log p(target) - s mean_v(log p(v)) + z (log Z)^2, where Z = sum_v exp(logit_v).

    Args:
        logprobs, target_logits: (...) log p, in nats, and the logit of the target.
        mean_logits: (...) mean logit over the vocabulary.
        label_smoothing: s in [0, 1), share of the target's probability that is spread over all
            tokens (Szegedy et al. 2016).
        z_coef: z >= 0; higher keeps log Z closer to 0 (PaLM, Chowdhery et al. 2022, section 5, uses
            1e-4).
    """
    log_z = target_logits - logprobs
    return (
        -(1 - label_smoothing) * logprobs
        + label_smoothing * (log_z - mean_logits)
        + z_coef * log_z**2
    )
