"""The options that every trainer has."""

import pytest
from helpers import KINDS, NAN

from rlhf_core.training.config import TrainConfig


@pytest.mark.parametrize("config_type", [TrainConfig, *(row[1] for row in KINDS.values())])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=0.0), "lr must be > 0, got 0.0"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(micro_batch_size=0), "micro_batch_size must be at least 1, got 0"),
        (dict(max_steps=0), "max_steps must be at least 1, got 0"),
        (dict(epochs=-1), "epochs must be at least 1, got -1"),
        (dict(max_grad_norm=0), "max_grad_norm must be > 0, got 0"),
        (dict(lr=NAN), "lr must be > 0 and finite, got nan"),
        (dict(lr_schedule="step"), "must be one of linear, cosine, constant, got 'step'"),
        (dict(precision="float16"), "precision must be one of float32, bfloat16, got 'float16'"),
        (dict(freeze_layers=-1), "freeze_layers must be at least 0, got -1"),
        (dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (dict(save_every=0), "save_every must be at least 1, got 0"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(config_type, options, message):
    with pytest.raises(ValueError, match=message):
        config_type(**options)
