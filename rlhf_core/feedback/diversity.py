"""Diversity of sampled responses. It falls when a policy collapses onto few texts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor


def diversity(groups: list[list[list[int]]]) -> dict[str, float]:
    """Metrics of groups of responses, each a prompt's, as token ids with EOS.

    diversity/distinct_1 and distinct_2: the share of n-grams of one and two tokens, over all
    responses, that are distinct (Li et al. 2016, section 5). Both fall with the number of tokens,
    so compare runs of equal rollouts only.

    diversity/self_similarity, for groups of several responses: the mean over the pairs of a group,
    and over the groups, of |A & B| / |A | B| (Jaccard), where A and B are the sets of n-grams of
    one and two tokens of two responses. 1: all are equal; 0: no two share a token.
    """
    metrics = {}
    for n, (codes, _) in enumerate(_ngrams(list(chain.from_iterable(groups))), 1):
        if len(codes):
            metrics[f"diversity/distinct_{n}"] = len(codes.unique()) / len(codes)
    if all(len(group) > 1 for group in groups):
        similarity = torch.stack([_self_similarity(group) for group in groups]).mean()
        metrics["diversity/self_similarity"] = similarity.item()
    return metrics


def _ngrams(responses: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """For n = 1 and 2: the n-grams of all responses as numbers, and the response of each."""
    lengths = torch.tensor([len(ids) for ids in responses])
    ids = torch.tensor(list(chain.from_iterable(responses)))
    rows = torch.arange(len(responses)).repeat_interleave(lengths)
    yield ids, rows
    within = rows[1:] == rows[:-1]
    yield (((ids[:-1] + 1) << 32) + ids[1:])[within], rows[1:][within]


def _self_similarity(group: list[list[int]]) -> Tensor:
    """The mean Jaccard index () of the pairs of a group."""
    codes, rows = map(torch.cat, zip(*_ngrams(group)))
    distinct, place = codes.unique(return_inverse=True)
    has = torch.zeros(len(group), len(distinct))  # (n, U) 1 where a response has an n-gram
    has[rows, place] = 1
    both, sizes = has @ has.T, has.sum(dim=1)
    jaccard = both / (sizes[:, None] + sizes - both)
    return (jaccard.sum() - len(group)) / (len(group) * (len(group) - 1))  # without the diagonal
