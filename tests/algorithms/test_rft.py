"""Rejection sampling: SFT on the policy's own best samples."""

import pytest
import torch
from helpers import fives, tiny

from rlhf_core.algorithms.rft import kept
from rlhf_core.data import Example
from rlhf_core.feedback.candidates import Candidates
from rlhf_core.trainers import RFTConfig, SFTTrainer, rft

PROMPTS = [[7 + i % 4] for i in range(16)]


def run_rft(
    out=None, prompts=PROMPTS, reward=fives, model=None, resume=False, eos_ids=None, **config
):
    """Two rounds of four steps. Dropout makes every generator matter."""
    model = tiny(dropout=0.1) if model is None else model
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


def test_rounds_of_best_of_n_raise_the_score():
    history, _ = run_rft(
        rounds=4, num_samples=8, epochs=2, dropout=False, prompts=PROMPTS * 4, batch_size=16
    )
    scores = [line["objective/scores"] for line in history]
    assert scores == sorted(scores) and scores[-1] > scores[0] + 1
    assert all(line["objective/best"] > line["objective/scores"] for line in history)
    assert [(line["round"], line["examples"], line["step"]) for line in history] == [
        (r, 64, 8) for r in (1, 2, 3, 4)
    ]


def test_the_best_responses_or_all_distinct_ones_above_the_threshold_are_kept():
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
    with pytest.raises(ValueError, match="no response scores at least 3; the best scores 2"):
        kept(found, 3)


def test_a_round_is_sft_on_what_was_kept(monkeypatch):
    seen = []
    train = SFTTrainer.train
    monkeypatch.setattr(SFTTrainer, "train", lambda self: seen.append(self.examples) or train(self))
    history, _ = run_rft(rounds=1, threshold=1.0)
    (examples,) = seen
    assert history[0]["examples"] == len(examples) == len(set(map(repr, examples)))
    assert {example.completion_ids.count(5) > 0 for example in examples} == {True}


@pytest.mark.parametrize("name", ["rounds", "num_samples", "lr"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        RFTConfig(**{name: 0})
