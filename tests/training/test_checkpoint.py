"""A run that stops and resumes in a new process equals one that never stopped, to the bit.

Also which checkpoints are refused, and what stops a run. The file is the program of the
other process, too: `python test_checkpoint.py FOLDER` resumes every run FOLDER/KIND/cut.
"""

import copy
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the other process
from helpers import make_trainer, rows, tiny

from rlhf_core.data import ByteTokenizer, Example, Pair, Prompt, load_tokenizer
from rlhf_core.data.store import store
from rlhf_core.models import ILQLModel, RewardModel, Transformer
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import read_tensors
from rlhf_core.policy_gradient.experience import Predictions
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    ILQLConfig,
    ILQLTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_core.training import checkpoint, reference, rounds

PAIRS = [Pair([7 + i % 4], [5, 2], [6, *range(3, 3 + i % 5), 2]) for i in range(10)]
EXAMPLES = [Example(pair.prompt_ids, pair.chosen_ids) for pair in PAIRS]
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "ppo": (PPOTrainer, PPOConfig),
    "online": (OnlineDPOTrainer, OnlineDPOConfig),
    "ilql": (ILQLTrainer, ILQLConfig),
}
KINDS = [
    "sft",
    "reward",
    "dpo",
    "dpo-lora",
    "ppo",
    "ppo-head",
    "ppo-lora",
    "ppo-steered",
    "online",
    "online-lora",
]
VARIANTS = {  # of a config
    "head": dict(critic="head"),
    "steered": dict(
        kl_target=0.5,
        kl_horizon=50,
        entropy_coef=0.01,
        entropy_target=2.0,
        whiten_scores="running",
        reference_ema=0.9,
    ),
}
PPO = dict(minibatch_size=2, ppo_epochs=2, response_length=5)


def build(kind, out=None, seed=0, examples=None, others=None, alpha=16.0, base=None, **config):
    """The trainer of a run of two epochs of three steps. Dropout makes every generator matter."""
    kind, _, variant = kind.partition("-")
    trainer_type, config_type = TRAINERS[kind]
    model = tiny(RewardModel if kind == "reward" else Transformer, seed, dropout=0.1)
    others = dict(others or {})
    if variant == "lora":
        add_adapters(model, LoRAConfig(rank=2, alpha=alpha, dropout=0.1, base=base))
    settings = dict(batch_size=4, epochs=2, lr=1e-2, dropout=True)
    if kind in ("ppo", "online"):
        others = dict(reward=tiny(RewardModel, seed=1)) | others
        settings |= PPO if kind == "ppo" else dict(response_length=5)
        settings |= VARIANTS.get(variant, {})
        examples = [pair.prompt_ids for pair in PAIRS] if examples is None else examples
    elif kind == "ilql":
        model = ILQLModel(model)
        examples = [example._replace(reward=1.0) for example in EXAMPLES]
    elif examples is None:
        examples = EXAMPLES if kind == "sft" else PAIRS
    return trainer_type(model, examples, config_type(**(settings | config)), out=out, **others)


class Stop(Exception):
    """The process is killed."""


def run(kind, out, cut=None):
    """Resume from the checkpoint if there is one; stop in the middle of step cut + 1."""
    trainer = build(kind, out, save_every=2)
    if checkpoint.find(out):
        torch.manual_seed(99)  # as if the process had drawn other numbers before
        trainer.resume()
    step, taken = trainer.step, []

    def stopping(batch):
        if trainer.steps_done == cut:
            raise Stop
        taken.append(trainer.steps_done)
        return step(batch)

    trainer.step = stopping
    try:
        history = trainer.train()
    except Stop:
        return taken
    metrics = [{name: x for name, x in line.items() if name != "eps"} for line in history]
    weights = [model.state_dict() for model in trainer.trained_models()]
    torch.save((taken, metrics, weights), out / "result.pt")


def result(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taken, metrics, weights = torch.load(out / "result.pt")
    assert [{name: x for name, x in line.items() if name != "eps"} for line in lines] == metrics
    return taken, metrics, weights


def snapshot_of(folder):
    """The bytes of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(trainer):
    return [
        {name: x.clone() for name, x in model.state_dict().items()}
        for model in trainer.trained_models()
    ]


def equal(a, b):
    return all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x | y)


# ---- the same run


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory):
    """Folders KIND/whole of unbroken runs, and KIND/cut of runs that a new process has resumed."""
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        whole, cut = root / kind / "whole", root / kind / "cut"
        run(kind, whole)
        assert run(kind, cut, 3) == [0, 1, 2] and not (cut / "result.pt").exists()
        lines = (cut / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3  # one more than the checkpoint has seen
    command = [sys.executable, "-P", __file__, str(root)]
    subprocess.run(command, check=True, timeout=240, env=os.environ | {"PYTHONHASHSEED": "1"})
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_in_a_new_process_equals_one_that_never_stopped(kind, resumed_runs):
    """Row 31: killed in step 4, resumed from step 2; weights and metrics to the bit."""
    whole, cut = resumed_runs / kind / "whole", resumed_runs / kind / "cut"
    (taken, metrics, weights), (all_taken, want_metrics, want) = result(cut), result(whole)
    assert taken == [2, 3, 4, 5] and all_taken == list(range(6))
    assert metrics == want_metrics and [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert equal(weights, want)
    for file in ("model.safetensors", "adapter_model.safetensors", "critic/model.safetensors"):
        if (whole / file).exists():
            assert (whole / file).read_bytes() == (cut / file).read_bytes()


def test_a_finished_reward_model_is_the_same_when_its_run_is_resumed(tmp_path):
    """Normalization at the end adds a bias that the head lacked at the start."""
    done = build("reward", tmp_path, save_every=2)
    done.train()
    again = build("reward", tmp_path, save_every=2)
    again.resume()
    assert again.train() == [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    ids = torch.tensor([[7, 5, 2]])
    for model in (again.model, RewardModel.from_pretrained(tmp_path)):
        assert_close(model.eval()(ids, ids > 0), done.model.eval()(ids, ids > 0), rtol=0, atol=0)


@pytest.mark.parametrize("started", ["from a policy", "from a reward model"])
def test_a_finished_reward_run_continues_with_the_scores_it_learned(started, tmp_path):
    """It equals a run that never stopped, whether the head started with a bias or without."""
    build("reward", tmp_path / "first").train()

    def reward(out, epochs):
        model = tiny(RewardModel, dropout=0.1)
        if "reward" in started:
            model = RewardModel.from_pretrained(tmp_path / "first")
        settings = dict(batch_size=4, epochs=epochs, lr=1e-2, dropout=True, lr_schedule="constant")
        torch.manual_seed(3)
        config = RewardConfig(**settings, save_every=out and 1)
        return RewardTrainer(model, PAIRS, config, out=out and tmp_path / out)

    whole = reward(None, 3)
    want = whole.train()
    reward("out", 1).train()
    longer = reward("out", 3)
    longer.resume()
    got = longer.train()
    assert got[3:] == want[3:] and equal(snapshot(longer), snapshot(whole))
    scores = longer.scores_of(PAIRS)
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4
    longer.train()  # nothing is left to do, and nothing is normalized again
    assert equal(snapshot(longer), snapshot(whole))


def test_a_reward_run_resumed_at_its_last_step_is_normalized(tmp_path):
    run("reward", tmp_path, cut=2)
    trainer = build("reward", tmp_path, max_steps=2, save_every=2)
    with pytest.warns(UserWarning, match="linear schedule over 6 steps"):
        trainer.resume()
    trainer.train()
    scores = RewardTrainer(RewardModel.from_pretrained(tmp_path), PAIRS, RewardConfig()).scores_of(
        PAIRS
    )
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_resuming_with_another_decaying_schedule_warns(schedule, tmp_path):
    build("sft", tmp_path, save_every=1, max_steps=2, lr_schedule=schedule).train()
    longer = build("sft", tmp_path, lr_schedule=schedule)
    with pytest.warns(
        UserWarning, match=f"the first 2 steps used a {schedule} schedule over 2 steps, .* over 6"
    ):
        longer.resume()
    assert longer.steps_done == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("sft", tmp_path, max_steps=2, lr_schedule=schedule).resume()  # the same
        for out, options in (
            ("flat", dict(lr_schedule="constant")),
            ("rising", dict(warmup_steps=2)),
        ):
            build("sft", tmp_path / out, save_every=1, max_steps=2, **options).train()
            build("sft", tmp_path / out, **options).resume()  # the schedules agree so far


def test_a_finished_run_continues_with_a_larger_max_steps(tmp_path):
    options = dict(lr_schedule="constant")
    whole = build("sft", **options)
    whole.train()
    build("sft", tmp_path, save_every=1, max_steps=2, **options).train()
    longer = build("sft", tmp_path, save_every=3, **options)
    longer.resume()
    assert len(longer.train()) == 6 and equal(snapshot(longer), snapshot(whole))
    longer = build("sft", tmp_path, **options)
    longer.resume()
    assert [line["step"] for line in longer.train()] == [1, 2, 3, 4, 5, 6]  # nothing left to do


def test_a_checkpoint_of_adapters_holds_no_other_weights(tmp_path):
    build("dpo-lora", tmp_path, save_every=3).train()
    _, tensors = read_tensors(tmp_path / "checkpoint-6" / checkpoint.STATE)
    assert len(tensors) > 4 and all("lora_" in name for name in tensors if name != "generator")


@pytest.mark.parametrize("save_every, want", [(1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (None, [])])
def test_checkpoints_are_written_when_due_and_at_the_end(save_every, want, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda path, run, *rest: saved.append(run["steps_done"]) or save(path, run, *rest),
    )
    build("sft", tmp_path, save_every=save_every).train()
    assert saved == want
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-6"] * bool(want)


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    options = dict(save_every=2, lr_schedule="constant")
    build("sft", tmp_path, max_steps=2, **options).train()
    before = snapshot_of(tmp_path / "checkpoint-2")
    trainer = build("sft", tmp_path, **options)
    trainer.resume()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        trainer.save_checkpoint()
    assert snapshot_of(tmp_path / "checkpoint-2") == before and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_checkpoint_is_a_model_folder_of_its_step(tmp_path):
    """Ours and transformers' classes load it, with the weights of a run that ends there."""
    transformers = pytest.importorskip("transformers")
    options = dict(lr_schedule="constant", others=dict(tokenizer=ByteTokenizer()))
    build("sft", tmp_path / "long", save_every=2, keep=3, **options).train()
    for step in (2, 4, 6):
        folder = tmp_path / "long" / f"checkpoint-{step}"
        short = build("sft", max_steps=step, **options)
        short.train()
        assert equal([Transformer.from_pretrained(folder).state_dict()], snapshot(short))
        assert isinstance(load_tokenizer(folder), ByteTokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        embedding = theirs.get_input_embeddings().weight
        assert torch.equal(embedding, short.model.trunk.embed.weight)


@pytest.mark.parametrize(
    "kind, cls",
    [("reward", RewardModel), ("dpo-lora", Transformer), ("ppo", Transformer), ("ilql", ILQLModel)],
)
def test_checkpoints_of_other_methods_are_model_folders_too(kind, cls, tmp_path):
    tiny(dropout=0.1).save_pretrained(tmp_path / "base")
    trainer = build(kind, tmp_path, save_every=1, max_steps=1, base=str(tmp_path / "base"))
    trainer.advance(next(trainer.batches()))
    folder = trainer.save_checkpoint()
    assert folder == tmp_path / "checkpoint-1"
    assert equal([cls.from_pretrained(folder).state_dict()], [trainer.model.state_dict()])
    assert (folder / "critic" / "model.safetensors").exists() == (kind == "ppo")


def test_a_full_disk_names_the_checkpoint_and_leaves_nothing_of_it(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=rf"^{tmp_path}/checkpoint-2: not written: No space left"):
        build("sft", tmp_path, save_every=2).train()
    assert not checkpoint.find(tmp_path) and not list(tmp_path.glob(".*"))


def names(out):
    return sorted(path.name for path in out.glob("checkpoint*"))


@pytest.mark.parametrize(
    "keep, want", [(1, ["checkpoint-6"]), (2, ["checkpoint-4", "checkpoint-6"])]
)
def test_the_newest_checkpoints_are_kept(keep, want, tmp_path):
    build("sft", tmp_path, save_every=2, keep=keep).train()
    assert names(tmp_path) == want


def test_older_checkpoints_go_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    build("sft", tmp_path, save_every=2, max_steps=4, lr_schedule="constant").train()
    removed = []
    monkeypatch.setattr(checkpoint, "remove_folder", lambda path: removed.append(names(tmp_path)))
    trainer = build("sft", tmp_path, save_every=2, lr_schedule="constant")
    trainer.resume()
    trainer.train()
    assert removed == [["checkpoint-4", "checkpoint-6"]]


def test_a_damaged_checkpoint_names_the_one_before_it(tmp_path):
    build("sft", tmp_path, save_every=2, keep=2).train()
    state = tmp_path / "checkpoint-6" / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-1])
    remedy = rf"{state}: .*damaged.*Or remove {state.parent} to resume from checkpoint-4$"
    with pytest.raises(ValueError, match=remedy):
        build("sft", tmp_path).resume()
    shutil.rmtree(state.parent)
    trainer = build("sft", tmp_path)
    trainer.resume()
    assert trainer.steps_done == 4


def test_a_file_of_an_older_version_is_resumed_and_then_replaced(tmp_path):
    whole = build("sft")
    whole.train()
    run("sft", tmp_path, cut=2)
    (tmp_path / "checkpoint-2" / checkpoint.STATE).rename(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint-2")
    trainer = build("sft", tmp_path, save_every=2)
    trainer.resume()
    assert trainer.steps_done == 2
    trainer.train()
    assert names(tmp_path) == ["checkpoint-6"] and equal(snapshot(trainer), snapshot(whole))


def test_a_folder_of_somebody_else_with_the_name_of_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "model.safetensors").write_text("of somebody else")
    (tmp_path / "checkpoint-mine").mkdir()
    trainer = build("sft", tmp_path, save_every=4)
    message = r"checkpoint-4: not a checkpoint of a run: state\.safetensors is missing\. Move it"
    with pytest.raises(FileExistsError, match=message):
        trainer.train()
    trainer.steps_done = 4
    with pytest.raises(FileExistsError, match=message):
        trainer.save_checkpoint()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == "of somebody else"
    (tmp_path / "checkpoint-4").rename(tmp_path / "other")
    build("sft", tmp_path, save_every=4).train()
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-mine"]


def test_a_new_run_in_the_same_folder_removes_the_checkpoint_of_the_old_one(tmp_path):
    build("sft", tmp_path, save_every=1).train()
    build("sft", tmp_path).train()
    assert (
        not checkpoint.find(tmp_path)
        and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    )


# ---- what is not the same run


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("sft", dict(lr=0.1), r"written with lr=0\.01, this run has 0\.1"),
        ("sft", dict(batch_size=5), "written with batch_size=4, this run has 5"),
        ("sft", dict(max_steps=1), "the checkpoint is at step 6, this run ends at 1"),
        (
            "sft",
            dict(examples=EXAMPLES[::-1]),
            r"a run with different examples \(digest \w{8}, now \w{8}\)",
        ),
        (
            "dpo",
            dict(examples=[pair._replace(label_smoothing=0.1) for pair in PAIRS]),
            "a run with different examples",
        ),
        ("dpo", dict(seed=1), "a run with different frozen weights"),  # of the reference
        ("dpo-lora", dict(seed=1), "a run with different frozen weights"),
        ("dpo-lora", dict(alpha=8.0), r"written with lora\.alpha=16\.0, this run has 8\.0"),
        (
            "ppo",
            dict(others=dict(reward=tiny(RewardModel, seed=2))),
            "a run with different frozen weights",
        ),
        (
            "ppo",
            dict(others=dict(eos_ids=(2,))),
            r"written with eos_ids=\[2, 3\], this run has \[2\]",
        ),
        (
            "online",
            dict(others=dict(reward=tiny(RewardModel, seed=2))),
            "a run with different frozen weights",
        ),
        (
            "online",
            dict(others=dict(eos_ids=(2,))),
            r"written with eos_ids=\[2, 3\], this run has \[2\]",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(
    kind, options, message, tmp_path
):
    build(kind, tmp_path, save_every=6).train()
    trainer = build(kind, tmp_path, **options)
    before = snapshot(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.resume()
    assert (
        equal(snapshot(trainer), before) and not trainer.steps_done and not trainer.optimizer.state
    )
    trainer = build(kind, tmp_path, log_every=3, save_every=1)
    trainer.resume()
    assert trainer.steps_done == 6


def test_the_reference_of_a_resumed_run_is_the_original_policy(tmp_path):
    trainer = build("dpo", tmp_path, save_every=6)
    before = snapshot(trainer)
    trainer.train()
    resumed = build("dpo", tmp_path)
    resumed.resume()
    assert equal([resumed.reference.model.state_dict()], before) and not equal(
        snapshot(resumed), before
    )


@pytest.mark.parametrize("what", ["missing", "damaged", "other", "metrics"])
def test_a_checkpoint_that_cannot_be_used_is_reported(what, tmp_path):
    trainer = build("sft", tmp_path, save_every=6)
    trainer.train()
    file = tmp_path / "checkpoint-6" / checkpoint.STATE
    if what == "missing":
        shutil.rmtree(file.parent)
    elif what == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "other":
        file.write_bytes((tmp_path / "model.safetensors").read_bytes())
    else:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:9])
    message = {
        "missing": "there is no checkpoint to resume from",
        "damaged": "damaged or cut short",
        "other": "this safetensors file is not a checkpoint of a run",
        "metrics": "metrics.jsonl: the file ends before step 5, but the checkpoint is at step 6",
    }
    trainer = build("sft", tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message[what]):
        trainer.resume()
        trainer.train()


def test_resuming_without_out_is_refused():
    with pytest.raises(ValueError, match="a trainer without out has no checkpoint to resume from"):
        build("sft").resume()


# ---- digests


def test_a_digest_covers_the_bits_of_all_tensors_and_the_order_of_the_parts():
    digest, model = checkpoint.digest, tiny()
    same = copy.deepcopy(model)
    assert digest(model) == digest(same) == digest(*model.state_dict().values())
    same.trunk.norm.weight.data[0] += 1e-6
    assert digest(model) != digest(same)
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16)
    assert digest(a.T.contiguous().T, "x", b) == digest(a, "x", b) != digest(b, "x", a)
    assert len({digest(a), digest(-a), digest(a, "x"), digest(a, "y"), digest("x", a)}) == 5


def test_examples_have_the_digests_that_older_versions_wrote():
    """Without values in fields that were added later, their text is what it was."""
    old = "Pair(prompt_ids=[1], chosen_ids=[2], rejected_ids=[3], margin=0.5, masks=None)"
    assert repr(Pair([1], [2], [3], 0.5)) == old and repr(Prompt([1, 2])) == "[1, 2]"
    assert "label_smoothing=0.1" in repr(Pair([1], [2], [3], label_smoothing=0.1))
    assert repr(Prompt([1], answer="2")) == "Prompt([1], **{'answer': '2'})"


def test_a_run_on_lists_is_resumed_on_a_store(tmp_path):
    examples, kept = rows("dpo"), dict(out=tmp_path)
    options = dict(batch_size=2, max_steps=4, lr_schedule="constant")
    whole = make_trainer("dpo", examples=examples, **options).train()
    options |= dict(save_every=2)
    half = options | {"max_steps": 2}
    make_trainer("dpo", examples=examples, others=kept, **half).train()
    now = make_trainer("dpo", examples=store(examples), others=kept, **options)
    now.resume()
    assert now.steps_done == 2 and now.train() == whole
    other = store([*examples[:-1], examples[-1]._replace(margin=1)])
    with pytest.raises(ValueError, match="a run with different examples"):
        make_trainer("dpo", examples=other, others=kept, **options).resume()


def test_references_and_rounds_use_the_digest_of_checkpoints():
    assert reference.digest is checkpoint.digest
    assert rounds._digest(tiny(), [1]) == checkpoint.digest(tiny(), "[1]")


# ---- stopped


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(tmp_path, capsys):
    whole = build("sft")
    whole.train()
    trainer = build("sft", tmp_path)
    step = trainer.step

    def interrupted(batch):
        if trainer.steps_done == 2:
            signal.raise_signal(signal.SIGINT)
        return step(batch)

    trainer.step = interrupted
    with pytest.raises(KeyboardInterrupt, match=r"step 3 is saved in .*checkpoint-3$"):
        trainer.train()
    assert "press Ctrl-C again to stop at once" in capsys.readouterr().err
    resumed = build("sft", tmp_path)
    resumed.resume()
    assert (
        resumed.steps_done == 3
        and len(resumed.train()) == 6
        and equal(snapshot(resumed), snapshot(whole))
    )


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    trainer = build("sft", tmp_path)

    def stuck(batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still running")

    trainer.step = stuck
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not checkpoint.find(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- what is checked as a run goes


def test_a_row_without_a_finite_loss_is_reported_and_the_state_saved(tmp_path):
    bad = EXAMPLES[4]._replace(prompt_ids=[1])  # a token that no other row has
    examples = [*EXAMPLES[:4], bad, *EXAMPLES[5:]]
    trainer = build("sft", tmp_path, examples=examples, batch_size=10, dropout=False)
    trainer.model.trunk.embed.register_forward_hook(
        lambda _, ids, hidden: hidden.masked_fill((ids[0] == 1)[..., None], math.nan)
    )
    before = snapshot(trainer)
    with pytest.raises(
        FloatingPointError,
        match=r"step 1: the .* is nan; no weight was updated; the loss of example 4 alone is not",
    ):
        trainer.train()
    assert equal(snapshot(trainer), before) and (tmp_path / "checkpoint-error").exists()
    build("sft", tmp_path, examples=EXAMPLES).train()  # a new run
    assert not (tmp_path / "checkpoint-error").exists()


def test_a_nan_loss_with_a_finite_gradient_stops_the_run():
    trainer = build("sft", examples=EXAMPLES)
    before = snapshot(trainer)
    with pytest.raises(FloatingPointError, match="the loss is nan; no weight was updated"):
        trainer.optimize(
            iter(
                [trainer.model.trunk.norm.weight.sum(), torch.tensor(math.nan, requires_grad=True)]
            )
        )
    assert equal(snapshot(trainer), before)


def ppo(**options):
    return build("ppo", **(dict(dropout=False, minibatch_size=4, ppo_epochs=1) | options))


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "entropy", "kl"])
def test_a_nan_prediction_is_reported_and_trains_nothing(name, monkeypatch):
    trainer, check = ppo(), PPOTrainer.check_predictions

    def broken(self, predictions):
        getattr(predictions, name)[1, 0] = math.nan
        check(self, predictions)

    monkeypatch.setattr(PPOTrainer, "check_predictions", broken)
    before = snapshot(trainer)
    with pytest.raises(FloatingPointError, match=f"step 1: {name} is nan at row 1, token 0"):
        trainer.train()
    assert equal(snapshot(trainer), before)


def test_a_negative_kl_estimate_is_reported():
    trainer = ppo(kl_estimator="k3")
    kl, zeros = torch.tensor([[0.0, 1.0], [0.5, -0.1]]), torch.zeros(2, 2)
    predictions = Predictions(zeros, zeros, zeros, kl)
    with pytest.raises(FloatingPointError, match=r"k3 is -0\.1\d* < 0 at row 1, token 1"):
        trainer.check_predictions(predictions)
    ppo(kl_estimator="k1").check_predictions(predictions)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_policy_that_changes_between_rollout_and_update_is_an_error(dropout, monkeypatch):
    """Row 2. With dropout the policy never repeats, so nothing is checked."""
    trainer, predict = ppo(dropout=dropout), PPOTrainer.predict

    def then_moves(self, rollout):
        columns = predict(self, rollout)
        with torch.no_grad():
            self.model.trunk.embed.weight.mul_(1.5)
        return columns

    monkeypatch.setattr(PPOTrainer, "predict", then_moves)
    critic = {name: x.clone() for name, x in trainer.critic.state_dict().items()}
    if dropout:
        trainer.step(trainer.examples[:4])
        return
    message = r"first minibatch has ratio .* not 1 and 0; no weight was updated"
    with pytest.raises(FloatingPointError, match=message):
        trainer.step(trainer.examples[:4])
    assert equal([trainer.critic.state_dict()], [critic])


def test_later_minibatches_may_have_any_ratio():
    assert abs(ppo(minibatch_size=1, ppo_epochs=3, lr=0.1).train()[0]["val/ratio"] - 1) > 0.01


def test_an_error_in_the_reward_names_the_row_that_raises():
    def reward(prompts, responses):
        return [1 / (prompt[0] - 8) for prompt in prompts]

    prompts = [[9], [7], [8], [10]]
    with pytest.raises(
        RuntimeError, match=r"ZeroDivisionError.* it also raises on row 2 alone: prompt \[8\]"
    ) as raised:
        ppo(others=dict(reward=reward), examples=prompts).step(prompts)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)

    def together(prompts, responses):
        return [float(4 // (2 - len(prompts) // 2))] * len(prompts)

    with pytest.raises(RuntimeError, match="it raises on all 4 rows together, on no row alone"):
        ppo(others=dict(reward=together), examples=prompts).step(prompts)


if __name__ == "__main__":
    for kind in KINDS:
        try:
            run(kind, Path(sys.argv[1]) / kind / "cut")
        except Exception:  # fails the test of this kind alone
            traceback.print_exc()
