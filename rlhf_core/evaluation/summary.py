"""From the samples of several policies to everything that a comparison of them shows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rlhf_core.data import Sample
from rlhf_core.data.chat import Content
from rlhf_core.evaluation.comparisons import (
    clustered_error,
    compare,
    comparisons_needed,
    length_controlled_win_rate,
)
from rlhf_core.evaluation.frontier import hypervolume, pareto_frontier
from rlhf_core.evaluation.ratings import rate_players
from rlhf_core.evaluation.refusals import refusal_rate
from rlhf_core.files import dump_rows
from rlhf_core.losses import preferred

PRIOR = 1.0  # draws between every two policies, so that all ratings are finite

# Outcomes (N,) of the first policy's samples against the second's; NaN where a judgement failed.
Outcomes = Callable[[str, str, list[tuple[Sample, Sample]]], Tensor]


def cluster_of(prompt: Content) -> str:
    """A name that only equal prompts share."""
    return json.dumps(prompt, sort_keys=True)


def by_score(first: str, second: str, pairs: list[tuple[Sample, Sample]]) -> Tensor:
    """Outcomes by the samples' scores."""
    scores = torch.tensor([[one.score, other.score] for one, other in pairs], dtype=torch.float64)
    return preferred(*scores.unbind(dim=1))


def summarize(
    samples: Sequence[Sample], reference: str, outcomes: Outcomes | None, seed: int = 0
) -> dict[str, Any]:
    """Policies, comparisons of every two of them, and their frontier, as JSON.

    The n-th samples of both policies are compared for every prompt that both answered n times.

    Args:
        samples: of all policies.
        reference: the name of the policy whose Elo rating is 0.
        outcomes: None: there are no scores and no judge, so nothing is compared.
        seed: of the bootstraps.

    Raises:
        ValueError: two policies have no prompt in common.
    """
    by_policy: dict[str, list[Sample]] = {reference: []}
    for sample in samples:
        by_policy.setdefault(sample.policy, []).append(sample)
    policies = {name: _policy(rows) for name, rows in by_policy.items()}
    keyed = {name: _keyed(rows) for name, rows in by_policy.items()}
    names, comparisons, games = list(by_policy), [], []
    for second, first in combinations(names, 2) if outcomes else ():
        shared = [key for key in keyed[first] if key in keyed[second]]
        if not shared:
            raise ValueError(f"policies {first} and {second} have no prompt in common")
        pairs = [(keyed[first][key], keyed[second][key]) for key in shared]
        found = outcomes(first, second, pairs)
        judged = (~found.isnan()).nonzero().flatten().tolist()
        if not judged:
            raise ValueError(f"every judgement of {first} against {second} failed: test the judge")
        found, pairs = found[judged], [pairs[i] for i in judged]
        clusters = [shared[i][0] for i in judged]
        row = {"policy": first, "against": second, "failures": len(shared) - len(judged)}
        comparisons.append(row | _comparison(found, pairs, clusters, seed))
        ends = names.index(first), names.index(second)
        games += [(*ends, *game) for game in zip(found.tolist(), clusters)]
    if games:
        *players, results, clusters = zip(*games)
        anchor = names.index(reference)
        options = dict(anchor=anchor, clusters=clusters, prior=PRIOR, seed=seed)
        ratings = rate_players(*players, results, len(names), **options)
        for name, rating, error, *interval in zip(names, *(x.tolist() for x in ratings)):
            elo = {"rating": rating, "standard_error": error, "interval": interval}
            policies[name]["elo"] = elo
    return {
        "reference": reference,
        "policies": [{"name": name, **policy} for name, policy in policies.items()],
        "comparisons": comparisons,
        "frontier": _frontier(policies),
    }


def _keyed(samples: list[Sample]) -> dict[tuple[str, int], Sample]:
    """Samples by prompt, and by how many samples of it came before."""
    seen: Counter[str] = Counter()
    keyed = {}
    for sample in samples:
        cluster = cluster_of(sample.prompt)
        keyed[cluster, seen[cluster]] = sample
        seen[cluster] += 1
    return keyed


def _policy(samples: list[Sample]) -> dict[str, Any]:
    clusters = [cluster_of(sample.prompt) for sample in samples]
    columns = {
        "score": [sample.score for sample in samples],
        "kl": [sample.kl for sample in samples],
        "tokens": [sample.tokens for sample in samples],
        "characters": [len(sample.response) for sample in samples],
    }
    names = dict.fromkeys(name for sample in samples for name in sample.criteria or ())
    criteria = {name: [(x.criteria or {}).get(name) for x in samples] for name in names}
    groups = {"refusals": [sample.response for sample in samples]}
    for name, label in (("over_refusals", "safe"), ("refusals_of_unsafe", "unsafe")):
        groups[name] = [sample.response for sample in samples if sample.label == label]
    return {
        "responses": len(samples),
        "prompts": len(set(clusters)),
        **{name: _mean(values, clusters) for name, values in columns.items()},
        "criteria": {name: _mean(values, clusters) for name, values in criteria.items()},
        **{
            name: refusal_rate(texts)._asdict() if texts else None for name, texts in groups.items()
        },
        "elo": None,
    }


def _mean(values: list, clusters: list[str]) -> dict[str, float | None] | None:
    """Mean and clustered standard error; None unless all values are numbers."""
    if None in values:
        return None
    error = clustered_error(values, clusters) if len(set(clusters)) > 1 else None
    return {"mean": sum(values) / len(values), "standard_error": error}


def _comparison(
    outcomes: Tensor, pairs: list[tuple[Sample, Sample]], clusters: list[str], seed: int
) -> dict[str, Any]:
    found = compare(outcomes, clusters)
    low, high = found.interval
    decided, more = not low <= 0.5 <= high, None
    if not decided and found.rate != 0.5:
        needed = comparisons_needed(found.rate) * len(outcomes) / found.effective
        more = max(1, math.ceil(needed) - len(outcomes))
    lengths = ([len(pair[i].response) for pair in pairs] for i in (0, 1))
    try:
        controlled = length_controlled_win_rate(outcomes, *lengths, clusters, seed=seed)._asdict()
    except ValueError as error:  # it has no finite value
        controlled = {"rate": None, "reason": str(error)}
    return {
        "comparisons": len(pairs),
        "prompts": len(set(clusters)),
        **found._asdict(),
        "decided": decided,
        "more_comparisons": more,
        "length_controlled": controlled,
    }


def mean_text(found: dict[str, float | None] | None, digits: int = 3) -> str:
    """A mean with its standard error, as people read it."""
    if found is None:
        return "-"
    error = found["standard_error"]
    mean = round(found["mean"], digits) + 0.0  # no -0.000
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def dump_samples(file: BinaryIO, samples: Sequence[Sample]) -> None:
    """Write samples.jsonl to an open file."""
    dump_rows(file, (sample._asdict() for sample in samples))


def _frontier(policies: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Harmlessness, the refusal rate of unsafe prompts, and helpfulness, 1 - over-refusal."""
    if not all(
        policy["over_refusals"] and policy["refusals_of_unsafe"] for policy in policies.values()
    ):
        return None
    points = [
        [policy["refusals_of_unsafe"]["rate"], 1 - policy["over_refusals"]["rate"]]
        for policy in policies.values()
    ]
    rows = zip(policies, points, pareto_frontier(points).tolist())
    return {
        "points": [
            {"name": name, "harmlessness": x, "helpfulness": y, "on_frontier": on}
            for name, (x, y), on in rows
        ],
        "hypervolume": hypervolume(points, [0, 0]),
    }
