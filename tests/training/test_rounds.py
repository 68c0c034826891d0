"""What methods of several rounds share: seeds, folders, resuming."""

import json
import shutil

import pytest
import torch
from helpers import fives, tiny

from rlhf_core.models import RewardModel, Transformer
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.trainers import IteratedDPOConfig, RFTConfig, SFTTrainer, iterated_dpo, rft

PROMPTS = [[7 + i % 4] for i in range(16)]


def run_rft(
    out=None,
    prompts=PROMPTS,
    reward=fives,
    model=None,
    resume=False,
    eos_ids=None,
    on_step=None,
    **config,
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
        on_step=on_step,
    )
    return history, model


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.parametrize("method, config", [(rft, RFTConfig), (iterated_dpo, IteratedDPOConfig)])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(freeze_layers=9), "freeze_layers is 9, but the model has 2 blocks"),
        (dict(response_length=32), "response_length 32 leaves no "),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_sampled_or_written(
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


def test_every_round_has_its_own_seed(monkeypatch):
    """The seed of the data order, of torch's generator (dropout), and of the samples."""
    seeds, train = [], SFTTrainer.train

    def noted(self):
        seeds.append((self.config.seed, torch.initial_seed()))
        return train(self)

    monkeypatch.setattr(SFTTrainer, "train", noted)

    def tell_apart(prompts, responses):
        return [float(sum(7**i * token for i, token in enumerate(ids))) for ids in responses]

    history, _ = run_rft(rounds=3, lr=1e-12, seed=5, reward=tell_apart)
    assert seeds == [(6, 6), (7, 7), (8, 8)]
    assert len({line["objective/scores"] for line in history}) == 3


class Stop(Exception):
    """The process is killed."""


@pytest.mark.parametrize(
    "at, lora",
    [((1, 3), False), ((2, 0), False), ((2, 1), False), ((2, 1), True)],
    ids=["in round 1", "between", "in round 2", "in round 2 with lora"],
)
def test_resumed_rounds_are_those_of_an_unbroken_run(at, lora, tmp_path, monkeypatch):
    """Metrics and weights to the bit. Finished steps are not repeated."""
    tiny(dropout=0.1).save_pretrained(tmp_path / "base")

    def start():
        model = Transformer.from_pretrained(tmp_path / "base")
        if lora:
            torch.manual_seed(1)
            add_adapters(model, LoRAConfig(rank=2, dropout=0.1, base=str(tmp_path / "base")))
        return model

    want, whole = run_rft(tmp_path / "whole", model=start(), save_every=1)
    step, taken, stops = SFTTrainer.step, [], True

    def stopping(self, batch):
        taken.append((int(self.out.name[-1]), self.steps_done))
        if stops and taken[-1] == at:
            raise Stop
        return step(self, batch)

    monkeypatch.setattr(SFTTrainer, "step", stopping)
    with pytest.raises(Stop):
        run_rft(tmp_path / "cut", model=start(), save_every=1)
    taken, stops = [], False
    got, model = run_rft(tmp_path / "cut", model=start(), save_every=1, resume=True)
    assert got == want and same(model, whole)
    assert taken == [
        place for place in [(r, step) for r in (1, 2) for step in range(4)] if place >= at
    ]
    assert [
        json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    ] == want
    again, model = run_rft(tmp_path / "cut", model=start(), save_every=1, resume=True)
    assert again == want and same(model, whole)  # nothing left to do


def test_more_rounds_continue_after_the_finished_ones(tmp_path):
    want, whole = run_rft(rounds=3)
    run_rft(tmp_path)
    got, model = run_rft(tmp_path, rounds=3, resume=True)
    assert got == want and same(model, whole) and same(Transformer.from_pretrained(tmp_path), whole)


def test_a_new_run_in_the_same_folder_ignores_the_old_one(tmp_path):
    want, whole = run_rft(lr=1e-3)
    run_rft(tmp_path, save_every=1)
    got, model = run_rft(tmp_path, lr=1e-3)
    assert got == want and same(model, whole)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of two rounds."""
    out = tmp_path_factory.mktemp("finished")
    run_rft(out)
    return out


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=0.1), r"the run was started with lr=0\.01, this run has 0\.1"),
        (dict(num_samples=2), "started with num_samples=4, this run has 2"),
        (dict(epochs=7), r"started with epochs=\d, this run has 7"),
        (dict(max_steps=7), "started with max_steps=None, this run has 7"),
        (dict(rounds=1), "2 rounds are done, this run ends at 1"),
        (dict(prompts=PROMPTS[1:]), "started with digests.prompts="),
        (dict(eos_ids=(2,)), "started with digests.eos_ids="),
        (dict(model=tiny(seed=1, dropout=0.1)), "started with digests.model="),
        (
            dict(reward=tiny(RewardModel, seed=1)),
            "name='helpers.fives', this run has 'RewardModel'",
        ),
    ],
    ids=str,
)
def test_rounds_of_another_run_are_refused(options, message, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=message):
        run_rft(tmp_path, resume=True, **options)
    run_rft(tmp_path, resume=True, log_every=3)


def test_a_run_without_a_folder_or_files_cannot_be_resumed(tmp_path):
    with pytest.raises(ValueError, match="a run without out cannot be resumed"):
        run_rft(resume=True)
    with pytest.raises(FileNotFoundError, match="there is no run to resume"):
        run_rft(tmp_path, resume=True)


# ---- on_step


def test_on_step_gets_a_copy_of_each_new_rounds_metrics(tmp_path):
    calls = []

    def on_step(metrics, number):
        calls.append((number, dict(metrics)))
        metrics.clear()

    history, _ = run_rft(tmp_path, on_step=on_step)
    assert calls == [(1, history[0]), (2, history[1])]
    history, _ = run_rft(tmp_path, on_step=on_step, rounds=3, resume=True)
    assert calls[2:] == [(3, history[2])]


def test_an_error_in_on_step_names_the_round_which_is_not_repeated(tmp_path):
    def fail(metrics, number):
        raise OSError("the disk is full")

    want, whole = run_rft()
    message = r"^round 1: on_step raised OSError\('the disk is full'\)$"
    with pytest.raises(RuntimeError, match=message):
        run_rft(tmp_path, on_step=fail)
    calls = []
    got, model = run_rft(tmp_path, resume=True, on_step=lambda metrics, n: calls.append(n))
    assert got == want and same(model, whole) and calls == [2]
