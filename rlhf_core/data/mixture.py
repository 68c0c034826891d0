"""Several lists of examples to one, in given shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_core.data.store import join, select


def mix(sources: Sequence[Sequence[Any]], weights: Sequence[float], seed: int = 0) -> Sequence[Any]:
    """Return as many examples as all sources have together, in the shares that weights give.

    A source that has more examples than its share loses some, drawn at random. One that has fewer
    is repeated: each of its examples occurs equally often, but for a random part that occurs once
    more. So no example occurs twice unless its source is too small. The examples keep the order of
    their sources; trainers shuffle.

    Args:
        sources: Lists of examples.
        weights: A positive number for each source; its share is weight / sum of weights.
        seed: Seed of the draws. An equal seed gives equal examples.

    Raises:
        ValueError: The weights do not fit the sources, or a source is empty.
    """
    if len(weights) != len(sources):
        raise ValueError(
            f"there are {len(weights)} weights for {len(sources)} data files; give one weight for "
            "each file"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights of data must be positive numbers, got {list(weights)}")
    for i, source in enumerate(sources):
        if not source:
            raise ValueError(f"data file {i + 1} of {len(sources)} has no examples to train on")
    shares = [weight / sum(weights) * sum(map(len, sources)) for weight in weights]
    counts = [math.floor(share) for share in shares]
    # What rounding down has left goes to the shares that lost most (largest remainders).
    by_loss = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_loss[: sum(map(len, sources)) - sum(counts)]:
        counts[i] += 1
    generator, places, start = torch.Generator().manual_seed(seed), [], 0
    for source, count in zip(sources, counts):
        order = torch.randperm(len(source), generator=generator).tolist()
        times, more = divmod(count, len(source))
        drawn = [*range(len(source))] * times + sorted(order[:more])
        places += [start + i for i in drawn]
        start += len(source)
    return select(join(sources), places)
