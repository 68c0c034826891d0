"""What the n of best-of-n buys: its KL to the policy, and the curve of expected scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """KL(best of n || policy) in nats: log n - (n - 1) / n.

    It is exact if no two responses tie (Stiennon et al. 2020, appendix G.3), else an upper bound
    (Beirami et al. 2024).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_curve(proxy: Tensor, gold: Tensor) -> Tensor:
    """Expected gold score (N,) float64 of the best of n by proxy, for n = 1..N.

    The exact mean over all subsets of n samples (Nakano et al. 2021, appendix): the i-th sample in
    ascending order is the best of C(i - 1, n - 1) of the C(N, n) subsets. Ties are broken at
    random. With the proxy as gold the curve shows the optimised score.

    Args:
        proxy, gold: (B, N), scores of the same N samples of each of B prompts.
    """
    if proxy.ndim != 2 or proxy.shape != gold.shape or not proxy.numel():
        raise ValueError(
            f"proxy and gold must be (B, N), got {tuple(proxy.shape)} and {tuple(gold.shape)}"
        )
    if not (proxy.isfinite() & gold.isfinite()).all():
        raise ValueError("proxy and gold must be finite")
    N = proxy.shape[1]
    proxy, order = proxy.sort(dim=1)
    gold = gold.double().gather(1, order)
    differs = torch.ones_like(order, dtype=torch.bool)
    differs[:, 1:] = proxy[:, 1:] != proxy[:, :-1]
    tied = differs.flatten().cumsum(dim=0) - 1  # (B N,)
    gold = (tied.bincount(gold.flatten()) / tied.bincount())[tied].view(gold.shape)

    def log_choose(n: Tensor, k: Tensor) -> Tensor:
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    n = torch.arange(1, N + 1, dtype=torch.float64, device=gold.device)
    log_weights = (
        log_choose(n - 1, n[:, None] - 1) - log_choose(torch.full_like(n, N), n)[:, None]
    )  # (n, i)
    return log_weights.exp() @ gold.mean(dim=0)
