"""The runs behind the presets: that a size trains, is measured, and keeps its results."""

import pytest

from benchmarks.learning import settings
from rlhf_core.files import read_json


@pytest.mark.slow
def test_a_size_is_pretrained_and_measured_once(data_dir, tmp_path, monkeypatch, capsys):
    shape = dict(hidden_size=16, num_layers=1, num_heads=2)
    lrs = {"sft": (1e-2,), "grpo": (1e-2,)}
    size = settings.Size(shape, dict(lr=1e-2, max_steps=2), 2, 1, lrs)
    monkeypatch.setitem(settings.SIZES, "small", size)
    sft, grpo = settings.learn("small", data_dir, list(lrs), tmp_path)
    assert sft["after"] < sft["before"] and grpo["kl"] > 0
    assert read_json(tmp_path / "base" / "run.json")["options"]["lr"] == 1e-2
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(
        f"| small | sft | 0.01 | 2 | held-out loss | {sft['before']:.3f} -> "
    )
    monkeypatch.setattr(settings, "METHODS", {})
    assert settings.learn("small", data_dir, list(lrs), tmp_path) == [sft, grpo]
