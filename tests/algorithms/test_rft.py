"""Rejection sampling, and what methods of several rounds share: seeds, folders, going on."""

import json

import pytest
import torch

from rlhf_core.data import Example
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.trainers import IteratedDPOConfig, RFTConfig, SFTTrainer, iterated_dpo, rft
from rlhf_core.algorithms.rft import kept
from rlhf_core.feedback.candidates import Candidates

PROMPTS = [[7 + i % 4] for i in range(16)]


def tiny(cls=Transformer, seed=0):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=12, hidden_size=16, num_layers=2, num_heads=2, max_positions=32, dropout=0.1
    )
    return cls(TransformerConfig(**sizes, eos_ids=(2,), pad_id=0))


def fives(prompts, responses):
    return [float(response.count(5)) for response in responses]


def run(out=None, prompts=PROMPTS, reward=fives, model=None, resume=False, eos_ids=None, **config):
    """Two rounds of four steps with dropout: all of their generators matter."""
    model = tiny() if model is None else model
    settings = (
        dict(rounds=2, num_samples=4, response_length=5, batch_size=4, lr=1e-2, dropout=True)
        | config
    )
    history = rft(
        model,
        prompts,
        RFTConfig(**settings),
        reward=reward,
        out=out,
        resume=resume,
        eos_ids=eos_ids,
    )
    return history, model


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


# ---- rejection sampling


def test_rounds_of_best_of_n_raise_the_score():
    history, _ = run(
        rounds=4, num_samples=8, epochs=2, dropout=False, prompts=PROMPTS * 4, batch_size=16
    )
    scores = [line["objective/scores"] for line in history]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 1
    assert all(line["objective/best"] > line["objective/scores"] for line in history)
    assert [(line["round"], line["examples"], line["step"]) for line in history] == [
        (r, 64, 8) for r in (1, 2, 3, 4)
    ]


def test_what_is_learned_is_the_best_or_all_that_are_good_enough_without_repetition():
    responses = [[[3], [4], [4]], [[5], [6], [5]]]
    found = Candidates([[7], [8]], responses, torch.tensor([[0.0, 2, 2], [1, 0, 1]]))
    assert kept(found, None) == [Example([7], [4]), Example([8], [5])]
    assert kept(found, 1.0) == [Example([7], [4]), Example([8], [5])]
    assert kept(found, 2.0) == [Example([7], [4])]
    assert kept(found, 0.0) == [
        Example([7], [3]),
        Example([7], [4]),
        Example([8], [5]),
        Example([8], [6]),
    ]
    twice = Candidates([[7], [7]], responses, found.scores)
    assert kept(twice, None) == [Example([7], [4]), Example([7], [5])]
    with pytest.raises(ValueError, match="no response scores 3, the best one 2"):
        kept(found, 3)


def test_a_round_is_sft_on_what_was_kept(monkeypatch):
    seen = []
    train = SFTTrainer.train
    monkeypatch.setattr(SFTTrainer, "train", lambda self: seen.append(self.examples) or train(self))
    history, _ = run(rounds=1, threshold=1.0)
    (examples,) = seen
    assert history[0]["examples"] == len(examples) == len(set(map(repr, examples)))
    assert {example.completion_ids.count(5) > 0 for example in examples} == {True}


@pytest.mark.parametrize("name", ["rounds", "num_samples", "lr"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        RFTConfig(**{name: 0})


# ---- rounds


@pytest.mark.parametrize("method, config", [(rft, RFTConfig), (iterated_dpo, IteratedDPOConfig)])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(freeze_layers=9), "freeze_layers is 9, the model has 2 blocks"),
        (dict(eval_every=2), "eval_every has no effect without evaluation examples"),
        (dict(response_length=32), "response_length 32 leaves no prompt of 32 tokens"),
    ],
    ids=str,
)
def test_what_the_trainer_refuses_is_told_before_anything_is_sampled_or_written(
    method, config, options, message, tmp_path
):
    asked = []
    with pytest.raises(ValueError, match=message):
        method(
            tiny(),
            PROMPTS,
            config(**{"response_length": 5, **options}),
            reward=lambda *rows: asked.append(rows),
            out=tmp_path / "out",
        )
    assert not asked and not (tmp_path / "out").exists()


def test_every_round_has_a_seed_of_its_own(monkeypatch):
    seeds, train = [], SFTTrainer.train
    monkeypatch.setattr(
        SFTTrainer, "train", lambda self: seeds.append(self.config.seed) or train(self)
    )

    def tell_apart(prompts, responses):
        return [float(sum(7**i * token for i, token in enumerate(ids))) for ids in responses]

    history, _ = run(rounds=3, lr=1e-12, seed=5, reward=tell_apart)
    assert seeds == [6, 7, 8]  # of the data's order
    assert len({line["objective/scores"] for line in history}) == 3  # and of the samples


class Stop(Exception):
    """The power goes."""


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize(
    "at", [(1, 3), (2, 0), (2, 1)], ids=["in round 1", "between", "in round 2"]
)
def test_rounds_that_go_on_are_the_rounds_that_never_stopped(at, lora, tmp_path, monkeypatch):
    """Bit by bit, metrics and weights; what is done is not done again."""
    tiny().save_pretrained(tmp_path / "base")

    def start():
        model = Transformer.from_pretrained(tmp_path / "base")
        if lora:
            torch.manual_seed(1)
            add_adapters(model, LoRAConfig(rank=2, dropout=0.1, base=str(tmp_path / "base")))
        return model

    want, whole = run(tmp_path / "whole", model=start(), save_every=1)
    step, taken, stops = SFTTrainer.step, [], True

    def stopping(self, batch):
        taken.append((int(self.out.name[-1]), self.steps_done))
        if stops and taken[-1] == at:
            raise Stop
        return step(self, batch)

    monkeypatch.setattr(SFTTrainer, "step", stopping)
    with pytest.raises(Stop):
        run(tmp_path / "cut", model=start(), save_every=1)
    taken, stops = [], False
    got, model = run(tmp_path / "cut", model=start(), save_every=1, resume=True)
    assert got == want and same(model, whole)
    assert taken == [
        place for place in [(r, step) for r in (1, 2) for step in range(4)] if place >= at
    ]
    assert [
        json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    ] == want
    again, model = run(tmp_path / "cut", model=start(), save_every=1, resume=True)
    assert again == want and same(model, whole)  # nothing left to do


def test_more_rounds_go_on_from_those_that_are_done(tmp_path):
    want, whole = run(rounds=3)
    run(tmp_path)
    got, model = run(tmp_path, rounds=3, resume=True)
    assert got == want and same(model, whole) and same(Transformer.from_pretrained(tmp_path), whole)


def test_a_new_run_in_the_same_folder_takes_nothing_from_the_old_one(tmp_path):
    want, whole = run(lr=1e-3)
    run(tmp_path, save_every=1)
    got, model = run(tmp_path, lr=1e-3)
    assert got == want and same(model, whole)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=0.1), r"of a run with lr=0\.01, not 0\.1"),
        (dict(num_samples=2), "with num_samples=4, not 2"),
        (dict(epochs=7), r"with epochs=\d, not 7"),
        (dict(max_steps=7), "with max_steps=None, not 7"),
        (dict(rounds=1), "2 rounds are done, this run ends at 1"),
        (dict(prompts=PROMPTS[1:]), "with digest="),
        (dict(eos_ids=(2, 3)), "with digest="),
        (dict(model=tiny(seed=1)), "with digest="),
        (dict(reward=tiny(RewardModel, seed=1)), "with digest="),
    ],
    ids=str,
)
def test_other_rounds_are_refused(options, message, tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=True, **options)
    run(tmp_path, resume=True, log_every=3)


def test_there_must_be_something_to_go_on_from(tmp_path):
    with pytest.raises(ValueError, match="no out to go on from"):
        run(resume=True)
    with pytest.raises(FileNotFoundError, match="no run to go on from"):
        run(tmp_path, resume=True)
