"""Rows longer than max_length are counted, exactly."""

import json

import pytest

from rlhf_core import ByteTokenizer, Transformer, TransformerConfig
from rlhf_core.cli import main


@pytest.fixture
def model(tmp_path):
    tokenizer = ByteTokenizer()
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    config = TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, **sizes)
    Transformer(config).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "command, other", [("sft", {}), ("dpo", {"rejected": "no"}), ("kto", {"label": True})]
)
def test_a_row_is_counted_as_cut_if_it_is_longer_than_max_length(
    command, other, model, tmp_path, capsys
):
    completion = "chosen" if command == "dpo" else "completion"
    # BOS, 4 bytes of prompt, n bytes of completion, EOS: 20 tokens for n = 14.
    lengths = (13, 14, 15, 40)
    rows = [{"prompt": "abcd", completion: "x" * n, **other} for n in lengths]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", model, "--data", data, "--out", tmp_path / "out", "--max-length", 20]
    assert main([command, *map(str, arguments), "--eval-fraction", "0"]) == 0
    cut = f"2 of 4 rows of {data} are longer than 20 tokens and were cut; see --max-length"
    assert cut in capsys.readouterr().err


def test_the_message_names_the_model_where_its_positions_are_the_limit(model, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "x" * 70}) + "\n")
    arguments = ["--model", model, "--data", data, "--out", tmp_path / "out", "--eval-fraction", 0]
    assert main(["sft", *map(str, arguments)]) == 0
    cut = "longer than 64 tokens and were cut; the model takes no more"
    assert cut in capsys.readouterr().err
