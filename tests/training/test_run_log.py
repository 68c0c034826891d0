"""The files that a run writes."""

import json

import pytest
from helpers import KINDS, make_trainer, rows, snapshot
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer

kinds = pytest.mark.parametrize("kind", KINDS)

NAMES = {
    "sft": "loss mean_token_accuracy entropy num_tokens",
    "reward": "loss accuracy margin mean_reward",
    "dpo": "loss entropy logps/chosen logps/rejected "
    "rewards/chosen rewards/rejected rewards/accuracies rewards/margins",
}


@kinds
def test_a_run_writes_its_model_its_config_and_one_line_of_metrics_per_step(kind, tmp_path, capsys):
    others = dict(out=tmp_path / "run", tokenizer=ByteTokenizer(), eval_examples=rows(kind, 3))
    trainer = make_trainer(kind, batch_size=3, log_every=2, others=others)
    history = trainer.train()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == history and [line["step"] for line in lines] == [1, 2, 3]
    assert set(NAMES[kind].split()) | {"grad_norm", "lr"} <= set(lines[0])
    assert {f"eval_{name}" for name in NAMES[kind].split() if name != "num_tokens"} <= set(
        lines[-1]
    )
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["algorithm"] == kind and run["options"]["batch_size"] == 3
    saved = KINDS[kind][2].from_pretrained(tmp_path / "run")
    assert_close(snapshot(saved), snapshot(trainer.model), rtol=0, atol=0)
    assert (tmp_path / "run" / "tokenizer_config.json").exists()
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1/3", "2/3", "3/3"]
