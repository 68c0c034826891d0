"""Metrics add up as sums and counts."""

import torch
from helpers import NAN

from rlhf_core.training.metrics import Metrics


def test_every_value_has_the_same_weight_and_an_empty_metric_is_left_out():
    metrics = Metrics()
    metrics.add("a", torch.tensor([1.0, 2.0, 3.0]))
    metrics.add("a", torch.tensor([10.0, NAN]), torch.tensor([True, False]))
    metrics.add("none", torch.tensor([NAN]), torch.tensor([False]))
    assert metrics.means() == {"a": 4.0}
