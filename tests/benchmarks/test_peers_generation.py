"""The comparison of generation with transformers: it runs, and its checks can fail."""

import importlib

import pytest
import torch


@pytest.mark.slow
def test_the_comparison_with_transformers_runs_and_tells_met_from_missed(transformers, monkeypatch):
    bench = importlib.import_module("benchmarks.peers.generation")

    monkeypatch.setattr(torch, "compile", lambda f: lambda *args, **options: [][0])
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    result = bench.measure("llama", None, 3, 20, 2, **sizes, intermediate_size=16)
    assert set(result["seconds"]) == {"ours", "default", "static", "kept", "dropped"}
    assert "IndexError" in result["failed"]["static, compiled"] and 1 <= result["mean_length"] < 20
    result |= {"ratio": 1.4, "dropping_ratio": 2.0}
    assert "| 1.40 | 1.5 missed | 2.00 at " in bench.row(result) and bench.row(result).endswith(
        "| 2 met |"
    )


def test_the_comparison_refuses_log_probs_that_are_not_the_models(transformers, monkeypatch):
    bench = importlib.import_module("benchmarks.peers.generation")

    theirs, ours = bench.theirs_and_ours("gpt2", None, n_embd=16, n_layer=1, n_head=2)
    prompts = torch.ones(2, 3, dtype=torch.long)
    bench.check(ours, theirs, prompts, 5)
    with torch.no_grad():
        theirs.transformer.wte.weight[:, 0] += 0.1
    with pytest.raises(AssertionError):
        bench.check(ours, theirs, prompts, 5)
