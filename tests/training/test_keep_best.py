"""--keep-best: the checkpoint of the best value of a metric stays, beside the last model."""

import json

import pytest
import torch
from helpers import tiny

from rlhf_core.data import Example
from rlhf_core.models import Transformer
from rlhf_core.trainers import IteratedDPOConfig, RFTConfig, SFTConfig, SFTTrainer
from rlhf_core.training.checkpoint import BEST_NAME, STATE

EXAMPLES = [Example([5], [i, 2]) for i in range(4, 12)]
VALUES = [0.5, 0.3, 0.9, float("nan"), 0.3, 0.9]


class Scripted(SFTTrainer):
    """Evaluations give VALUES."""

    def evaluate(self):
        self.seen[self.steps_done] = self.model.trunk.embed.weight.detach().clone()
        return {"eval_x": VALUES[self.steps_done - 1], "eval_loss": -VALUES[self.steps_done - 1]}


def trainer(out, metric, **config):
    settings = dict(batch_size=4, epochs=3, eval_every=1, keep_best=metric, lr=0.01) | config
    kept = Scripted(tiny(), EXAMPLES, SFTConfig(**settings), eval_examples=EXAMPLES[:1], out=out)
    kept.seen = {}
    return kept


def best_step(out, seen):
    best = Transformer.from_pretrained(out / BEST_NAME).trunk.embed.weight
    return [step for step, weight in seen.items() if torch.equal(best, weight)]


@pytest.mark.parametrize(
    "metric, step",
    [("eval_x", 3), ("max:eval_x", 3), ("min:eval_x", 2), ("eval_loss", 3), ("max:eval_loss", 2)],
)
def test_the_first_of_the_best_steps_is_kept(tmp_path, metric, step, capsys):
    run = trainer(tmp_path, metric)
    run.train()
    assert f" at step {step}: {tmp_path / BEST_NAME}\n" in capsys.readouterr().err
    assert best_step(tmp_path, run.seen) == [step]
    assert (tmp_path / BEST_NAME / STATE).is_file()


def test_a_resumed_run_remembers_the_best_and_does_not_resume_from_it(tmp_path):
    trainer(tmp_path, "eval_x", max_steps=4, save_every=1, lr_schedule="constant").train()
    kept = (tmp_path / BEST_NAME / STATE).read_bytes()
    run = trainer(tmp_path, "eval_x", save_every=1, lr_schedule="constant")
    run.resume()
    assert run.steps_done == 4
    run.train()
    assert (tmp_path / BEST_NAME / STATE).read_bytes() == kept


def test_a_new_run_removes_the_best_of_an_older_one(tmp_path):
    trainer(tmp_path, "eval_x").train()
    trainer(tmp_path, None).train()
    assert not (tmp_path / BEST_NAME).exists()


def test_a_folder_of_that_name_that_is_something_else_is_refused_before_the_first_step(tmp_path):
    (tmp_path / BEST_NAME).mkdir()
    run = trainer(tmp_path, "eval_x")
    with pytest.raises(FileExistsError, match="checkpoint-best: not a checkpoint of a run"):
        run.train()
    assert run.steps_done == 0


def test_a_metric_that_no_step_has_is_named(tmp_path):
    message = "no step has keep_best 'eval_y', which must be one of .*eval_x"
    with pytest.warns(UserWarning, match=message):
        trainer(tmp_path, "eval_y").train()
    assert not (tmp_path / BEST_NAME).exists()


def test_it_has_no_effect_without_a_folder_and_is_refused_in_rounds():
    with pytest.warns(UserWarning, match="keep_best has no effect without out"):
        trainer(None, "eval_x").train()
    for config in (RFTConfig, IteratedDPOConfig):
        with pytest.raises(ValueError, match="round-N holds each round's model, got 'eval_x'"):
            config(keep_best="eval_x")


def test_metrics_of_steps_count_too(tmp_path):
    run = trainer(tmp_path, "loss")
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lowest = min(lines, key=lambda line: line["loss"])["step"]
    assert best_step(tmp_path, run.seen) == [lowest]
