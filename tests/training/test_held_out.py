"""Held-out prompts: what they measure, and that training does not notice them."""

import json

import pytest
import torch
from helpers import PROMPTS, fives, lengths, make_ppo, tiny

from rlhf_core.feedback.endpoint import JudgeError
from rlhf_core.models import EnsembleReward, RewardModel
from rlhf_core.rollout import response_logprobs, sample
from rlhf_core.trainers import (
    GRPOConfig,
    GRPOTrainer,
    IteratedDPOConfig,
    NLPOConfig,
    NLPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RFTConfig,
    iterated_dpo,
    rft,
)

HELD_OUT = [[2, 5], [7, 7, 7], [9]]
SAMPLING = dict(batch_size=8, response_length=5, lr=1e-3, temperature=1.0)


def longer(prompts, first, second):
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second)]


def trained(kind, config, **options):
    torch.manual_seed(0)
    model = tiny(dropout=0.1)
    settings = config(**SAMPLING, epochs=3, dropout=True, eval_every=2)
    trainer = kind(model, PROMPTS, settings, reward=fives, **options)
    return model, trainer.train()


@pytest.mark.parametrize(
    "kind, config",
    [
        pytest.param(PPOTrainer, PPOConfig, marks=pytest.mark.slow),
        (GRPOTrainer, GRPOConfig),
        pytest.param(NLPOTrainer, NLPOConfig, marks=pytest.mark.slow),
        (OnlineDPOTrainer, OnlineDPOConfig),
    ],
)
@pytest.mark.filterwarnings("ignore:eval_every has no effect")
def test_evaluations_change_nothing_in_training(kind, config):
    model, plain = trained(kind, config)
    same, history = trained(kind, config, eval_examples=HELD_OUT, eval_judge=longer)
    for a, b in zip(model.parameters(), same.parameters()):
        assert torch.equal(a, b)
    names = {"eval_reward", "eval_kl", "eval_length", "eval_win_rate"}
    assert [names <= line.keys() for line in history] == [False, True, True]
    for old, new in zip(plain, history):
        assert {n: x for n, x in new.items() if not n.startswith("eval_") and n != "eps"} == {
            n: x for n, x in old.items() if n != "eps"
        }


def test_the_metrics_are_those_of_one_answer_to_each_prompt():
    trainer = make_ppo(tiny(noise=0.3), reward=lengths, others=dict(eval_examples=HELD_OUT))
    reference = trainer.reference.model
    with torch.no_grad():
        trainer.model.trunk.embed.weight.mul_(1.3)
    metrics = trainer.evaluate()
    seeds = torch.randint(2**63 - 1, (3,), generator=torch.Generator().manual_seed(0))
    rollout = sample(
        trainer.model, HELD_OUT, max_new_tokens=6, seeds=seeds, eos_ids=trainer.eos_ids
    )
    with torch.no_grad():
        ratios = rollout.logprobs - response_logprobs(reference, rollout)[0]
    kl = ratios.where(rollout.response_mask, 0).sum(dim=1).mean()
    assert metrics["eval_kl"] == pytest.approx(kl.item(), rel=1e-4)
    length = rollout.response_mask.sum(dim=1).float().mean().item()
    assert metrics["eval_length"] == metrics["eval_reward"] == pytest.approx(length)
    assert trainer.evaluate() == metrics  # the same seeds again
    assert "eval_spread" not in metrics and "eval_win_rate" not in metrics


def test_an_ensemble_reports_how_far_its_models_are_apart():
    torch.manual_seed(0)
    models = [RewardModel.from_model(tiny(noise=noise)) for noise in (0.1, 0.3)]
    for model in models:
        torch.nn.init.normal_(model.score.weight)
    reward = EnsembleReward(models)
    trainer = make_ppo(reward=reward, others=dict(eval_examples=HELD_OUT))
    assert trainer.evaluate()["eval_spread"] > 0
    reward.models[1] = models[0]
    assert trainer.evaluate()["eval_spread"] == 0


def test_a_judge_compares_with_the_reference_and_a_policy_that_has_not_moved_ties():
    config = OnlineDPOConfig(**SAMPLING)
    trainer = OnlineDPOTrainer(tiny(), PROMPTS, config, judge=longer, eval_examples=HELD_OUT)
    metrics = trainer.evaluate()
    assert metrics["eval_win_rate"] == 0.5 and metrics["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert "eval_reward" not in metrics
    with torch.no_grad():
        trainer.model.trunk.embed.weight.add_(torch.randn_like(trainer.model.trunk.embed.weight))
    assert trainer.evaluate()["eval_win_rate"] != 0.5


@pytest.mark.parametrize("method, config", [(rft, RFTConfig), (iterated_dpo, IteratedDPOConfig)])
def test_rounds_evaluate_after_each_round_against_the_first_policy(method, config):
    settings = config(**SAMPLING, num_samples=4, rounds=2)
    options = dict(reward=fives, eval_prompts=HELD_OUT, eval_judge=longer)
    history = method(tiny(), PROMPTS * 2, settings, **options)
    names = {"eval_reward", "eval_kl", "eval_length", "eval_win_rate"}
    assert all(names <= line.keys() for line in history)
    assert history[0]["eval_kl"] != history[1]["eval_kl"]


def test_held_out_answers_are_among_the_samples(tmp_path):
    others = dict(eval_examples=HELD_OUT, out=tmp_path)
    make_ppo(others=others, sample_every=0, eval_every=1, epochs=2).train()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert all(row["held_out"] and row["prompt"] in HELD_OUT for row in rows)


def test_a_judge_that_fails_ends_no_run():
    def broken(prompts, first, second):
        raise JudgeError("6 of 6 comparisons failed")

    others = dict(eval_examples=HELD_OUT, eval_judge=broken)
    with torch.no_grad(), pytest.warns(UserWarning, match="not evaluated: 6 of 6") as caught:
        trainer = make_ppo(tiny(noise=0.3), others=others)
        trainer.model.trunk.embed.weight.mul_(1.3)
        assert trainer.evaluate() == trainer.evaluate() == {}
    assert len(caught) == 1


def test_long_held_out_prompts_are_treated_as_on_long_prompt_says():
    others = dict(eval_examples=[*HELD_OUT, [5] * 500])
    with pytest.warns(UserWarning, match="1 of 4 prompts have more than"):
        trainer = make_ppo(others=others)
    assert len(trainer.eval_examples) == 3
