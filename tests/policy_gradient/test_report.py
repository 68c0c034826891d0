"""The metrics of a step, by numbers computed here in float64."""

import math

import pytest
import torch

from rlhf_core.policy_gradient.experience import Predictions
from rlhf_core.policy_gradient.report import rollout_mismatch
from rlhf_core.rollout import Rollout

MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.fixture
def columns():
    """A rollout and the trainer's log-probs of it; what the mask hides is NaN."""
    generator = torch.Generator().manual_seed(0)
    sampled, trained = (-torch.rand(2, 3, generator=generator) * 2 for _ in range(2))
    sampled, trained = (x.masked_fill(~MASK, math.nan) for x in (sampled, trained))
    ids = torch.zeros(2, 3, dtype=torch.int64)
    rollout = Rollout(ids, MASK, ids, MASK, sampled, torch.ones(2, dtype=torch.bool))
    return rollout, Predictions(trained, trained, trained, trained)


def test_the_mismatch_of_sampling_and_training(columns):
    rollout, predictions = columns
    pairs = zip(rollout.logprobs[MASK].tolist(), predictions.logprobs[MASK].tolist())
    differences = [trained - sampled for sampled, trained in pairs]
    report = rollout_mismatch(rollout, predictions)
    assert report.keys() == {f"val/rollout_{x}" for x in ("mismatch", "mismatch_mean", "kl")}
    assert report["val/rollout_mismatch"] == pytest.approx(max(map(abs, differences)), rel=1e-5)
    mean = sum(map(abs, differences)) / 5
    assert report["val/rollout_mismatch_mean"] == pytest.approx(mean, rel=1e-5)
    k3 = sum(math.exp(d) - 1 - d for d in differences) / 5  # of KL(sampled || trained)
    assert report["val/rollout_kl"] == pytest.approx(k3, rel=1e-5)
