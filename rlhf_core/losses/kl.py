"""The KL to the reference as a term of the loss, with the gradient of the KL itself."""

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
    """Per-token KL(policy || reference) (B, R): over the old policy's samples its mean has the KL's gradient.

    An estimate differentiated as it stands has not: the gradient of k1 has mean 0, that of k3 is one of the reverse KL.
    Weighed by the importance ratio, exp(logprobs - old_logprobs), k1 and k3 have the KL as their mean whatever the
    policy has become, and so its gradient, too (DeepSeek-AI 2025, "DeepSeek-V3.2", section 3.1). k2, (log ratio)^2 / 2,
    has it where the ratio weighs but is not differentiated, and the KL's value only nearby; abs has neither.

    logprobs, old_logprobs, ref_logprobs: (B, R) of the sampled tokens, nats. mask: (B, R) bool; elsewhere 0.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator, mask=mask)
    return torch.exp(log_ratio.detach() if estimator in ("k2", "abs") else log_ratio) * kl
