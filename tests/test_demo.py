"""The demo, on a task of seconds."""

import json
from dataclasses import replace

import pytest
from helpers import tiny

from rlhf_core import demo


@pytest.mark.slow
def test_the_demo_ends_with_a_page_of_gold_and_proxy(tmp_path):
    pytest.importorskip("matplotlib")
    task = demo.replies_task(0)
    task = replace(
        task,
        gold=lambda prompts, responses: [float(len(set(text))) for text in responses],
        policy=tiny(vocab_size=task.tokenizer.vocab_size, max_positions=64),
        prompts=task.prompts[:48],
        eval_prompts=task.eval_prompts[:8],
        response_length=6,
        sft=None,
        reward=replace(task.reward, epochs=1, batch_size=16),
        ppo=replace(task.ppo, max_steps=3, batch_size=8, response_length=6),
        dpo=replace(task.dpo, max_steps=1, batch_size=8),
    )
    report = demo.run(task, tmp_path, seed=0)
    page = (tmp_path / "report.html").read_text()
    assert "PPO against SFT" in page and "DPO against SFT" in page
    gold, proxy = (
        json.loads((tmp_path / f"ppo-by-{by}" / "evaluation.json").read_text())["policies"]
        for by in ("gold", "reward-model")
    )
    assert [row["name"] for row in gold] == ["SFT", "step 1", "step 2", "PPO"]
    assert [row["kl"] for row in gold] == [row["kl"] for row in proxy]
    assert [row["score"] for row in gold] != [row["score"] for row in proxy]
    assert f"{gold[-1]['score']['mean']:.3f}" in report
