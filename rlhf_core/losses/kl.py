"""The KL to the reference as a loss term, with the gradient of the KL itself."""

import torch
from torch import Tensor

from rlhf_core.ops import kl_estimate
from rlhf_core.ops.policy_loss import MAX_LOG_RATIO


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: str = "k3",
) -> Tensor:
    """Per-token KL(policy || reference) (B, R), whose mean over old samples has the KL's gradient.

    Differentiating an estimate directly is wrong: the gradient of k1 has mean 0, and that of k3
    belongs to the reverse KL. Weighted by the importance ratio exp(logprobs - old_logprobs), k1 and
    k3 have the KL as their mean for any policy, and so also its gradient (DeepSeek-AI 2025,
    "DeepSeek-V3.2", section 3.1). k2, (log ratio)^2 / 2, has the gradient if the ratio is a
    constant weight, and the KL's value only near the reference. abs has neither.

    Args:
        logprobs, old_logprobs, ref_logprobs: (B, R) of the sampled tokens, nats.
        mask: (B, R) bool, True where a token counts; elsewhere the result is 0.
        estimator: "k1", "k2", "k3" or "abs", see `kl_estimate`.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator, mask=mask)
    return torch.exp(log_ratio.detach() if estimator in ("k2", "abs") else log_ratio) * kl
