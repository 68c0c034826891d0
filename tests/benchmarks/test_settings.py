"""The runs behind the presets: that a size is pretrained or read, trained and measured."""

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


@pytest.mark.slow
def test_a_checkpoint_of_the_users_is_trained_whole_or_by_adapters(data_dir, monkeypatch):
    rates = {"sft": (1e-9, 1e-2), "dpo": (1e-3,), "dpo-lora": (1e-9, 1e-3)}
    size = settings.Size(None, {}, 2, 1, rates, held_out=16)
    monkeypatch.setitem(settings.SIZES, "135m", size)
    model = data_dir / "models" / "stories260k"
    methods = ["dpo-lora", "ppo", "sft", "dpo"]  # in this order; ppo has no rates
    found = [row.split(" | ") for row in settings.rows("135m", data_dir, methods, model)]
    idle, adapters, still, sft, whole = found
    assert [row[1] for row in found] == ["dpo-lora", "dpo-lora", "sft", "sft", "dpo"]
    assert idle[5] == whole[5] and idle[7] == "0.00"
    assert 0.01 < float(adapters[7]) < float(whole[7])
    assert still[5] == still[6] == sft[5] and float(sft[6]) < float(sft[5])


@pytest.mark.parametrize("options", [["--sizes", "135m"], ["--model", "x", "--sizes", "4m"]])
def test_the_size_of_a_checkpoint_and_its_folder_need_each_other(options, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["settings", "--data", "x", *options])
    with pytest.raises(SystemExit):
        settings.main()
    assert "--sizes 135m and --model, the folder of its checkpoint" in capsys.readouterr().err
