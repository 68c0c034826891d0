"""Statistics of preference data that reveal a bias."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rlhf_core.data.encode import Pair, Ranked
from rlhf_core.losses import preferred


def differing(examples: list[Pair] | list[Ranked], name: str) -> list:
    """The pairs or ranked lists whose completions are not all equal; warns if some are.

    Equal completions teach nothing, and their rounding noise would train.

    Raises:
        ValueError: none is left.
    """
    kept = [
        row for row in examples if any(x != row.completions_ids[0] for x in row.completions_ids)
    ]
    dropped = len(examples) - len(kept)
    if examples and not kept:
        raise ValueError(f"the completions are identical in all {len(examples)} {name}")
    if dropped:
        warnings.warn(
            f"dropped {dropped} of {len(examples)} {name}, whose completions are identical "
            "(perhaps only up to max_length)",
            stacklevel=4,
        )
    return kept


def length_bias(examples: list[Pair] | list[Ranked], scores: Tensor) -> dict[str, float]:
    """Whether a reward model confuses length with quality.

    Args:
        examples: pairs or ranked lists.
        scores: (N,) of every completion, in order.

    Returns:
        length_correlation, of score and length (tokens, EOS included), and
        accuracy_where_shorter_won, over pairs whose better completion is the shorter one. Undefined
        values are left out.
    """
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
