"""What a policy's responses are worth: gold scores, KL to a reference, win rate, Elo; what the n of best-of-n buys. And
whether a reward model takes length for quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.data import Pair, Ranked, Tokenizer
from rlhf_core.losses import preferred
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.ops import kl_estimate
from rlhf_core.rollout import response_logprobs, sample


class Evaluation(NamedTuple):
    """N responses, one for each prompt."""

    responses: list[str]
    scores: Tensor  # (N,)
    kl: Tensor  # (N,) nats a response, the unbiased estimate (k1) summed over its tokens
    lengths: Tensor  # (N,) tokens of a response, EOS included
    response_ids: list[list[int]]


@torch.no_grad()
def evaluate_policy(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[list[str], list[str]], Sequence[float]],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_ids: tuple[int, ...] | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Evaluation:
    """Sample a response to every prompt (token ids), score it, and estimate KL(policy || reference) from it.

    Every prompt has a seed of its own, from its place in the list and `seed`: batch_size changes nothing but rounding.
    """
    seeds = torch.randint(2**63 - 1, (len(prompts),), generator=torch.Generator().manual_seed(seed))
    responses, scores, kls, lengths, response_ids = [], [], [], [], []
    with eval_mode(policy, reference):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            rollout = sample(
                policy,
                batch,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                eos_ids=eos_ids,
                seeds=seeds[start : start + batch_size],
            )
            ref_logprobs, _ = response_logprobs(reference, rollout, temperature)
            kls.append(
                kl_estimate(rollout.logprobs, ref_logprobs, mask=rollout.response_mask).sum(dim=1)
            )
            lengths.append(rollout.response_mask.sum(dim=1))
            response_ids += rollout.responses()
            texts = [tokenizer.decode(ids) for ids in response_ids[start:]]
            responses += texts
            scores.append(
                torch.as_tensor(
                    reward([tokenizer.decode(ids) for ids in batch], texts), dtype=torch.float32
                )
            )
    return Evaluation(
        responses, torch.cat(scores), torch.cat(kls).cpu(), torch.cat(lengths).cpu(), response_ids
    )


def win_rate(scores: Tensor, other: Tensor) -> float:
    """Share of rows (N,) where `scores` is higher than `other`; a tie is one half."""
    return float(preferred(scores, other).mean())


def length_bias(examples: list[Pair] | list[Ranked], scores: Tensor) -> dict[str, float]:
    """Whether length passes for quality: the correlation of score (N,) and length (tokens, EOS included) of every
    completion, and the accuracy in pairs whose better completion is the shorter one. What is undefined is left out."""
    lengths = [len(ids) for example in examples for ids in example.completions_ids]
    pairs, first = [], 0
    for example in examples:
        end = first + len(example.completions_ids)
        pairs += [
            (i, j) for i in range(first, end) for j in range(i + 1, end) if lengths[i] < lengths[j]
        ]
        first = end
    report, both = {}, torch.stack([scores, torch.tensor(lengths, dtype=scores.dtype)])
    if both.std(dim=1, correction=0).all():
        report["length_correlation"] = torch.corrcoef(both)[0, 1].item()
    if pairs:
        better, worse = torch.tensor(pairs).unbind(dim=1)
        report["accuracy_where_shorter_won"] = (
            preferred(scores[better], scores[worse]).mean().item()
        )
    return report


def elo(wins: Tensor, *, prior: float = 0.0) -> Tensor:
    """Ratings (K,) float64 of K players, the first one's 0: 400 more is ten wins to one.

    The maximum of the Bradley-Terry likelihood (Bradley & Terry 1952), by Newton's method.

    wins: (K, K), how often the row's player beat the column's; a draw is half a win for both. The diagonal is ignored.
    prior: draws added between every two players, which holds the rating of one who won, or lost, all games finite.
    Raises ValueError where the ratings are not finite (some players never lost to the others), or not found.
    """
    wins = torch.as_tensor(wins, dtype=torch.float64)
    if (
        wins.ndim != 2
        or wins.shape[0] != wins.shape[1]
        or not len(wins)
        or not (wins.isfinite() & (wins >= 0)).all()
    ):
        raise ValueError(f"wins must be a square matrix of numbers of at least 0, got {wins}")
    wins = (wins + prior / 2).fill_diagonal_(1)
    reached = (wins > 0).double()
    for _ in range(len(wins).bit_length()):  # paths of twice the length
        reached = (reached @ reached > 0).double()
    if not reached.all():
        one, other = (reached == 0).nonzero()[0].tolist()
        raise ValueError(
            f"player {one} has beaten player {other} neither itself nor through others: no finite ratings are the "
            "likeliest; prior=1 adds a draw between every two"
        )
    games, strengths = wins + wins.T, wins.new_zeros(len(wins))

    def likelihood(strengths: Tensor) -> Tensor:
        return (wins * F.logsigmoid(strengths[:, None] - strengths)).sum()

    for _ in range(1000):
        expected = torch.sigmoid(strengths[:, None] - strengths)
        slope = (wins * expected.T - wins.T * expected).sum(dim=1)
        curvature = games * expected * expected.T
        step = torch.linalg.solve(curvature.sum(dim=1).diag() - curvature + curvature.mean(), slope)
        change, size = float(step.max() - step.min()), 1.0
        # A step of at most 1 always climbs: the third derivative of log sigmoid is at most its second.
        while size * change > 1 and likelihood(strengths + size * step) < likelihood(strengths):
            size /= 2
        strengths += size * step
        if change < 1e-9:  # the next one's would be its square
            break
    else:
        raise ValueError(f"no likeliest ratings found in 1000 steps, the last one of {change:.3g}")
    return (strengths - strengths[0]) * 400 / math.log(10)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: KL(best of n || policy) where no two responses tie (Stiennon et al. 2020, app. G.3), an
    upper bound where some do (Beirami et al. 2024)."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_curve(proxy: Tensor, gold: Tensor) -> Tensor:
    """Expected gold score (N,) float64 of the best of n by proxy, for n = 1..N, from N samples of each of B prompts.

    The mean over all subsets of n samples, so without bias and without drawing any (Nakano et al. 2021, appendix): the
    i-th best from below is the best of C(i - 1, n - 1) of the C(N, n). Among samples that tie one is taken at random.
    With the proxy as gold it is the curve of what was optimised.

    proxy, gold: (B, N), scores of the same samples.
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
