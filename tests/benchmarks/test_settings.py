"""The runs behind the presets: that a size is pretrained, trained by methods and measured."""

import pytest

from benchmarks.learning import settings


@pytest.mark.slow
def test_each_method_of_a_size_is_a_row_with_its_measure(data_dir, monkeypatch):
    shape = dict(hidden_size=16, num_layers=1, num_heads=2)
    rates = {"sft": (1e-2,), "reward": (1e-2,), "dpo": (1e-2,), "grpo": (1e-8,), "trpo": (0.3,)}
    size = settings.Size(shape, dict(lr=1e-2, max_steps=2), 2, 1, rates)
    monkeypatch.setitem(settings.SIZES, "small", size)
    found = [row.split(" | ") for row in settings.rows("small", data_dir, list(rates))]
    sft, reward, dpo, grpo, trpo = found
    assert sft[:5] == ["| small", "sft", "0.01", "2", "eval_loss"]
    assert float(sft[6]) < float(sft[5]) and sft[7] == ""
    assert reward[4] == "eval_accuracy" and 0 <= float(reward[6]) <= 1
    assert dpo[4] == "gold" and float(dpo[7]) > 0.05
    assert abs(float(grpo[7])) <= 0.01 and grpo[5] == dpo[5]
    assert trpo[2:4] == ["0.3", "1"] and 0.05 < float(trpo[7]) < 32 * 0.3
