"""Iterated RLHF: each round's reward model learns from all pairs so far; Elo rates the rounds."""

import json

import pytest
import torch
from helpers import tiny

from rlhf_core.algorithms.iterated_rlhf import ratings
from rlhf_core.data import ByteTokenizer, Pair
from rlhf_core.evaluation import elo
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.trainers import (
    IteratedRLHFConfig,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SamplingConfig,
    iterated_rlhf,
)

PROMPTS = [[7 + i % 4] for i in range(32)]


def more_fives(prompts, first, second):
    return [
        0.5 + 0.5 * ((a.count(5) > b.count(5)) - (a.count(5) < b.count(5)))
        for a, b in zip(first, second)
    ]


def iterated(model=None, rounds=2, reward=None, ppo=None, num_samples=2, seed=0, **options):
    config = IteratedRLHFConfig(
        rounds,
        SamplingConfig(num_samples, response_length=5),
        RewardConfig(**(dict(lr=3e-3, batch_size=16) | (reward or {}))),
        PPOConfig(
            **(
                dict(lr=3e-3, batch_size=16, response_length=5, temperature=1.0, kl_coef=0.02)
                | (ppo or {})
            )
        ),
        seed,
    )
    options = dict(judge=more_fives, eval_prompts=PROMPTS[:16]) | options
    model = model or tiny()
    return iterated_rlhf(model, options.pop("prompts", PROMPTS), config, **options), model


def timeless(history):
    return [{name: x for name, x in line.items() if name != "eps"} for line in history]


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.slow
def test_every_round_is_rated_above_the_ones_before():
    ppo, reward = dict(epochs=4, batch_size=32), dict(epochs=2, batch_size=32)
    options = dict(prompts=PROMPTS * 2, eval_prompts=PROMPTS * 2, ppo=ppo, reward=reward)
    history, _ = iterated(tiny(noise=0), rounds=3, num_samples=4, **options)
    final = history[-1]["elo"]
    assert final[0] == 0 and final == sorted(final) and final[-1] > 400
    assert [len(line["elo"]) for line in history] == [2, 3, 4]
    assert [len(line["wins"]) for line in history] == [1, 2, 3]
    assert history[-1]["wins"][0] > 0.9 * 64


def test_a_reward_model_starts_from_the_first_policy_and_learns_from_all_pairs_so_far(monkeypatch):
    learned, started, train = [], [], RewardTrainer.train

    def watch(self):
        learned.append(list(self.examples))
        started.append(self.model.trunk.state_dict()["embed.weight"].clone())
        return train(self)

    monkeypatch.setattr(RewardTrainer, "train", watch)
    before = [Pair([7], [5], [6])]
    history, model = iterated(pairs=before)
    assert (
        learned[0][:1] == before
        and learned[1][: len(learned[0])] == learned[0]
        and len(learned[1]) > len(learned[0])
    )
    assert [line["pairs"] for line in history] == [len(pairs) for pairs in learned]
    new = [len(learned[0]) - 1, len(learned[1]) - len(learned[0])]
    assert [round(32 * (1 - line["ties"])) for line in history] == new
    for pairs in learned:
        assert all(pair.chosen_ids.count(5) > pair.rejected_ids.count(5) for pair in pairs)
    first = tiny().trunk.embed.weight
    assert torch.equal(started[0], first) and torch.equal(started[1], first)
    assert not torch.equal(model.trunk.embed.weight, first)


def test_ppo_continues_from_the_last_policy_with_the_first_as_reference(monkeypatch):
    seen, train = [], PPOTrainer.train

    def watch(self):
        seen.append((self.model.state_dict()["trunk.embed.weight"].clone(), self.reference.model))
        return train(self)

    monkeypatch.setattr(PPOTrainer, "train", watch)
    iterated()
    (first, reference), (second, again) = seen
    assert torch.equal(first, tiny().trunk.embed.weight) and not torch.equal(second, first)
    assert same(reference, tiny()) and again is reference


def test_every_round_has_its_own_seed(monkeypatch):
    seeds = []
    for kind in (RewardTrainer, PPOTrainer):
        train = kind.train

        def watch(self, train=train):
            return seeds.append((self.algorithm, self.config.seed)) or train(self)

        monkeypatch.setattr(kind, "train", watch)
    iterated(seed=5, eval_prompts=())
    assert seeds == [("reward", 6), ("ppo", 6), ("reward", 7), ("ppo", 7)]


def test_eos_ids_end_samples_rollouts_and_answers(tmp_path):
    (line,), _ = iterated(rounds=1, eos_ids=tuple(range(12)), out=tmp_path)
    samples = json.loads((tmp_path / "round-1" / "samples.json").read_text())
    assert line["response_length"] == 1 and samples["pairs"]
    assert (
        {len(ids) for ids in samples["answers"]}
        == {len(ids) for pair in samples["pairs"] for ids in pair[1:3]}
        == {1}
    )


@pytest.mark.slow
def test_a_stopped_run_resumes_between_rounds_and_within_one(tmp_path, monkeypatch):
    """Between rounds and in the middle of a round's PPO, to the bit."""

    def saving(out, rounds=2, **options):
        settings = dict(reward=dict(dropout=True), ppo=dict(save_every=1))
        return iterated(tiny(dropout=0.1), rounds, **settings, out=tmp_path / out, **options)

    want, whole = saving("whole")
    saving("between", rounds=1)
    step, taken = PPOTrainer.step, []

    def stopping(self, batch):
        if self.out.name == "round-2" and self.steps_done == 1:
            raise KeyboardInterrupt
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PPOTrainer, "step", stopping)
        saving("within")
    monkeypatch.setattr(
        PPOTrainer, "step", lambda self, batch: taken.append(self.steps_done) or step(self, batch)
    )
    for name, steps in (("between", [0, 1]), ("within", [1])):
        taken.clear()
        got, model = saving(name, resume=True)
        assert timeless(got) == timeless(want) and same(model, whole) and taken == steps
    for kind, folder in (
        (Transformer, ""),
        (Transformer, "round-2"),
        (RewardModel, "round-2/reward"),
    ):
        assert kind.from_pretrained(tmp_path / "within" / folder)
    assert (
        len(json.loads((tmp_path / "within" / "round-1" / "samples.json").read_text())["answers"])
        == 16
    )
    with pytest.raises(ValueError, match=r"the run was started with digests\.pairs="):
        saving("within", resume=True, pairs=[Pair([7], [5], [6])])


def test_on_step_gets_the_metrics_of_each_round_as_copies():
    calls = []

    def on_step(metrics, number):
        calls.append((number, json.dumps(metrics)))
        metrics["wins"].clear()

    history, _ = iterated(on_step=on_step)
    assert calls == [(1, json.dumps(history[0])), (2, json.dumps(history[1]))]
    assert len(history[1]["wins"]) == 2


def test_the_judge_gets_strings_with_a_tokenizer_and_nothing_is_rated_without_eval_prompts():
    tokenizer, asked = ByteTokenizer(), []

    def judge(prompts, first, second):
        asked.append(set(prompts))
        return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(first, second)]

    prompts = [tokenizer.encode_prompt(text) for text in ("ab", "c") * 4]
    model = tiny(vocab_size=259)
    options = dict(prompts=prompts, judge=judge, tokenizer=tokenizer, eval_prompts=())
    (line,), _ = iterated(model, rounds=1, **options)
    assert asked == [{"ab", "c"}] and "elo" not in line and "wins" not in line


def test_a_judge_that_prefers_the_first_answer_rates_all_policies_equally():
    history, _ = iterated(judge=lambda prompts, first, second: [1.0] * len(prompts))
    assert [line["wins"] for line in history] == [[8.0], [8.0, 8.0]]
    assert history[-1]["elo"] == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_run_without_prompts_is_refused():
    with pytest.raises(ValueError, match="there are no prompts"):
        iterated(prompts=[])


def test_ratings_are_the_elo_of_the_table_of_wins():
    table = torch.tensor([[0, 2, 1.0], [8, 0, 4.5], [9, 5.5, 0]])
    assert torch.equal(ratings([[8], [9, 5.5]], 10), elo(table, prior=1))
    assert ratings([[10.0]], 10)[1].isfinite()


@pytest.mark.parametrize(
    "options, message",
    [(dict(rounds=0), "rounds .* got 0"), (dict(num_samples=1), "for a pair, got 1")],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        iterated(**options)
