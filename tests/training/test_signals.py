"""What ends a run early: signals, user code that exits, moves or deletes. Nothing is lost."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    SMALL,
    TEXTS,
    make_ppo,
    make_trainer,
    model_folders,
    rows,
    run,
    snapshot,
    tiny,
    write,
)

from rlhf_core.cli import arguments, sampling
from rlhf_core.feedback.rewards import RewardError
from rlhf_core.models import Transformer
from rlhf_core.trainers import OnlineDPOConfig, OnlineDPOTrainer, RFTConfig, SFTTrainer, rft
from rlhf_core.training import signals
from rlhf_core.training.checkpoint import find

ROOT = Path(__file__).parents[2]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
every_signal = pytest.mark.parametrize("signum", STATUS, ids=lambda signum: signum.name)


def handlers():
    return [signal.getsignal(signum) for signum in STATUS]


def same(a, b):
    a, b = (snapshot(x.model) for x in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a | b)


def sft(out=None, **config):
    """Three steps with dropout, evaluated after every one."""
    options = dict(batch_size=3, lr=1e-2, dropout=True, eval_every=1) | config
    others = dict(out=out, eval_examples=rows("sft", 3))
    return make_trainer("sft", tiny(dropout=0.1), others=others, **options)


def ppo(out=None, **config):
    options = dict(batch_size=3, lr=1e-2, dropout=True, minibatch_size=3) | config
    return make_ppo(tiny(dropout=0.1), others=dict(out=out), **options)


def raising(signum, method, at=1):
    """The method, which gets the signal at its call number `at`."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(signum)
        return method(*args, **kwargs)

    return wrapped


# ---- the first signal


@every_signal
@pytest.mark.parametrize(
    "make, phase, at, step",
    [
        (sft, "losses", 3, 2),  # the first call is of step 1, the second evaluates it
        (sft, "evaluate", 1, 1),
        (sft, "save_checkpoint", 1, 1),
        (ppo, "sample", 2, 2),
        (ppo, "update", 2, 2),
    ],
)
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint_that_continues_the_same_run(
    signum, make, phase, at, step, tmp_path, capsys
):
    whole = make()
    whole.train()
    trainer, before = make(tmp_path, save_every=1), handlers()
    setattr(trainer, phase, raising(signum, getattr(trainer, phase), at))
    with pytest.raises(
        KeyboardInterrupt, match=f"step {step} is saved in .*checkpoint-{step}$"
    ) as raised:
        trainer.train()
    assert getattr(raised.value, "code", 130) == STATUS[signum] and handlers() == before
    assert "stopping after this step, or after 30 s; " in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))
    again = make(tmp_path)
    again.resume()
    assert again.steps_done == step and len(again.train()) == 3 and same(again, whole)


def test_a_signal_in_the_last_step_leaves_the_finished_model(tmp_path):
    trainer = sft(tmp_path)
    trainer.losses = raising(signal.SIGTERM, trainer.losses, 5)
    with pytest.raises(SystemExit, match="all 3 steps are done, and the model is saved in") as end:
        trainer.train()
    saved = Transformer.from_pretrained(tmp_path)
    assert end.value.code == 143
    assert all(torch.equal(x, trainer.model.get_parameter(n)) for n, x in saved.named_parameters())


# ---- the second signal, and the deadline


@every_signal
@pytest.mark.parametrize(
    "phase, at", [("losses", 3), ("save_checkpoint", 2), ("save", 2), ("save", 4)]
)
def test_a_second_signal_stops_at_once_and_keeps_the_checkpoint_before(signum, phase, at, tmp_path):
    """The fourth save is that of the finished model."""
    trainer, before = sft(tmp_path, save_every=1), handlers()
    kept = []

    def stuck(*args, **kwargs):
        kept.extend(find(tmp_path))
        kept.append(kept[0].read_bytes())
        signal.raise_signal(signum)
        signal.raise_signal(signum)
        pytest.fail("still running")

    original = getattr(trainer, phase)
    calls = []

    def second(*args, **kwargs):
        calls.append(None)
        return (stuck if len(calls) == at else original)(*args, **kwargs)

    setattr(trainer, phase, second)
    with pytest.raises(KeyboardInterrupt) as raised:
        trainer.train()
    assert getattr(raised.value, "code", 130) == STATUS[signum] and handlers() == before
    assert find(tmp_path) == kept[:1] and kept[0].read_bytes() == kept[1]
    assert not list(tmp_path.glob(".*"))
    sft(tmp_path).resume()


def test_a_step_that_outlasts_the_grace_is_stopped_and_the_checkpoint_before_stays(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("RLHF_CORE_GRACE", "0.2")
    trainer = sft(tmp_path, save_every=1, eval_every=None)
    losses = trainer.losses

    def slow(*args):
        if trainer.steps_done == 2:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(120)
        return losses(*args)

    trainer.losses, began = slow, time.monotonic()
    with pytest.raises(SystemExit) as raised:
        trainer.train()
    assert time.monotonic() - began < 60 and raised.value.code == 143
    again = sft(tmp_path, eval_every=None)
    again.resume()
    assert again.steps_done == 2


def test_after_a_stop_in_time_nothing_comes_of_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CORE_GRACE", "0.3")
    trainer = sft(tmp_path)
    trainer.losses = raising(signal.SIGHUP, trainer.losses)
    with pytest.raises(SystemExit):
        trainer.train()
    time.sleep(0.6)  # the process would die


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "1e300"])
def test_a_grace_that_is_no_time_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CORE_GRACE", text)
    with pytest.raises(ValueError, match=f"RLHF_CORE_GRACE must be a number of .*, got '{text}'"):
        sft(tmp_path).train()


# ---- whose signals they are


def test_handlers_of_the_caller_stay(tmp_path):
    seen, before = [], handlers()
    signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        trainer = sft(tmp_path)
        step = raising(signal.SIGHUP, raising(signal.SIGTERM, trainer.step), 2)
        trainer.step = step
        assert len(trainer.train()) == 3 and seen == [signal.SIGTERM]
    finally:
        for signum, handler in zip(STATUS, before):
            signal.signal(signum, handler)


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    histories, before = [], handlers()
    thread = threading.Thread(target=lambda: histories.append(sft(tmp_path).train()))
    thread.start()
    thread.join()
    assert len(histories[0]) == 3 and handlers() == before


# ---- rounds


@every_signal
@pytest.mark.parametrize("where", ["sampling", "training"])
def test_rounds_that_a_signal_stops_continue_as_one_run(signum, where, tmp_path, monkeypatch):
    def rounds(out=None, resume=False, reward=lambda _, texts: [float(len(x)) for x in texts]):
        config = RFTConfig(
            rounds=2, num_samples=2, response_length=4, batch_size=4, lr=1e-2, dropout=True
        )
        model = tiny(dropout=0.1)
        return rft(model, [[5], [6]] * 4, config, reward=reward, out=out, resume=resume), model

    history, whole = rounds()
    calls, before = [], handlers()

    def reward(prompts, texts):
        calls.append(None)
        if where == "sampling" and len(calls) == 3:  # the first of the second round
            signal.raise_signal(signum)
        return [float(len(x)) for x in texts]

    if where == "training":
        monkeypatch.setattr(SFTTrainer, "losses", raising(signum, SFTTrainer.losses, 3))
    with pytest.raises(KeyboardInterrupt) as raised:
        rounds(tmp_path, reward=reward)
    monkeypatch.undo()
    assert getattr(raised.value, "code", 130) == STATUS[signum] and handlers() == before
    run = tmp_path / "rounds.json"
    description = json.loads(run.read_text())
    description["feedback"] = None  # `reward` above is another function
    run.write_text(json.dumps(description).replace('"feedback": null,', ""))
    again, model = rounds(tmp_path, resume=True)
    assert again == history
    assert all(torch.equal(x, model.get_parameter(n)) for n, x in whole.named_parameters())


# ---- the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return model_folders(tmp_path_factory.mktemp("models"))


@every_signal
@pytest.mark.parametrize("command", ["generate", "merge", "sft"])
def test_a_command_exits_with_the_status_of_the_signal(
    signum, command, folders, tmp_path, monkeypatch, capsys
):
    for module in (sampling, arguments):
        load = module.load_tokenizer
        monkeypatch.setattr(module, "load_tokenizer", raising(signum, load))
    options = dict(
        generate=["--prompt", "x"],
        merge=["--out", tmp_path / "out"],
        sft=["--data", tmp_path / "data", "--out", tmp_path / "out"],
    )
    before = handlers()
    assert run(command, "--model", folders / "policy", *options[command]) == STATUS[signum]
    word = "interrupted" if signum == signal.SIGINT else f"stopped by {signum.name}"
    lost = "; the model was not saved" if command == "sft" else ""
    assert capsys.readouterr().err == f"rlhf-core {command}: {word}{lost}\n"
    assert not (tmp_path / "out").exists() and handlers() == before


def command_of(folders, tmp_path, out):
    data = write(tmp_path / "data.jsonl", TEXTS)
    paths = ["--model", folders / "policy", "--data", data, "--out", tmp_path / out]
    options = [*SMALL, "--max-steps", 60, "--epochs", 60, "--log-every", 1, "--lr", 0.01]
    return list(map(str, [sys.executable, "-m", "rlhf_core", "sft", *paths, *options]))


def wait_for_lines(file, count):
    until = time.monotonic() + 300
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.slow
def test_a_command_that_is_stopped_twice_and_resumed_is_one_run(folders, tmp_path):
    whole, cut = (command_of(folders, tmp_path, out) for out in ("whole", "cut"))
    for signum, lines, options in ((signal.SIGTERM, 3, []), (signal.SIGHUP, 30, ["--resume"])):
        pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        process = subprocess.Popen([*cut, *options], cwd=ROOT, **pipes)
        wait_for_lines(tmp_path / "cut" / "metrics.jsonl", lines)
        process.send_signal(signum)
        error = process.communicate(timeout=300)[1]
        assert process.returncode == STATUS[signum]
        assert f"rlhf-core sft: stopped by {signum.name}; step " in error
        assert re.search(r"checkpoint-\d+, continue with --resume\n$", error)
    assert run(*whole[3:]) == run(*cut[3:], "--resume") == 0
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.slow
def test_a_run_whose_terminal_closes_saves_its_checkpoint(folders, tmp_path):
    command = command_of(folders, tmp_path, "out")
    child, terminal = pty.fork()
    if not child:
        os.chdir(ROOT)
        os.execv(command[0], command)
    wait_for_lines(tmp_path / "out" / "metrics.jsonl", 3)
    os.close(terminal)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 129 and find(tmp_path / "out")
    assert not (tmp_path / "out" / ".lock").exists()


# ---- user code that exits, changes the folder, or deletes it


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("bye"), GeneratorExit()], ids=repr)
def test_a_reward_or_judge_that_exits_is_an_error_that_names_it(error, tmp_path):
    def exits(*columns):
        raise error

    def lazily(*columns):
        yield 1.0
        raise error

    for reward in (exits, lazily):
        with pytest.raises(RewardError, match=rf"step 1: the reward raised {type(error).__name__}"):
            make_ppo(reward=reward, others=dict(out=tmp_path)).train()
    config = OnlineDPOConfig(response_length=4, batch_size=2, temperature=2.0)
    with pytest.raises(RewardError, match=f"the judge raised {type(error).__name__}"):
        OnlineDPOTrainer(tiny(), [[5]] * 4, config, judge=exits, out=tmp_path).train()


@pytest.mark.parametrize(
    "code, message",
    [
        ("import sys\nsys.exit()\ndef reward(p, r): ...", "raised SystemExit"),
        ("import sys\ndef reward(p, r): sys.exit(0)", "the reward raised SystemExit(0)"),
        ("import os\nos._exit(0)\ndef reward(p, r): ...", "raised SystemExit(0)"),
        ("import os\ndef reward(p, r): os._exit(0)", "the reward raised SystemExit(0)"),
    ],
)
def test_a_reward_file_that_exits_is_bad_input(code, message, folders, tmp_path, capsys):
    (tmp_path / "exits.py").write_text(code)
    prompts = write(tmp_path / "prompts.txt", ["x"] * 4)
    paths = ["--model", folders / "policy", "--prompts", prompts, "--out", tmp_path / "out"]
    reward = ["--reward-function", f"{tmp_path / 'exits.py'}:reward", "--response-length", 4]
    assert run("ppo", *paths, *reward, *SMALL) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_reward_that_changes_the_folder_moves_no_file(folders, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    shutil.copytree(folders / "policy", home / "policy")
    code = f"import os\nos.chdir({str(elsewhere)!r})\n"
    code += f"def reward(p, r):\n    os.chdir({str(elsewhere)!r})\n    return [len(x) for x in r]"
    (home / "moves.py").write_text(code)
    write(home / "prompts.txt", ["x"] * 4)
    monkeypatch.chdir(home)
    for command, out in (("ppo", "a"), ("rft", "b"), ("best-of-n", "c.jsonl")):
        options = [] if command == "best-of-n" else [*SMALL, "--lora-rank", 2]
        os.chdir(home)
        paths = ["--model", "policy", "--prompts", "prompts.txt", "--out", out]
        reward = ["--reward-function", "moves.py:reward", "--response-length", 4]
        assert run(command, *paths, *reward, *options) == 0
        assert (home / out).exists() and not list(elsewhere.iterdir())
    for out in ("a", "b"):
        assert (home / out / "adapter_model.safetensors").exists()
    os.chdir(home)

    def moves(prompts, responses):
        os.chdir(elsewhere)
        return [0.5 * len(x) for x in responses]

    make_ppo(reward=moves, others=dict(out="d")).train()
    assert (home / "d" / "model.safetensors").exists() and not list(elsewhere.iterdir())


@pytest.mark.parametrize("how", ["deleted", "renamed", "emptied", "replaced"])
@pytest.mark.parametrize("last", [False, True])
def test_a_folder_that_goes_during_the_run_is_an_error(how, last, tmp_path):
    out = tmp_path / "out"
    trainer = sft(out)
    losses = trainer.losses

    def going(*args):
        if trainer.steps_done == (3 if last else 1) and out.exists():
            if how == "emptied":
                for path in out.iterdir():
                    path.unlink()
            elif how == "renamed":
                out.rename(tmp_path / "other")
            else:
                shutil.rmtree(out)
            if how == "replaced":
                out.mkdir()
                (out / "metrics.jsonl").write_text("another's\n")
        return losses(*args)

    trainer.losses = going
    with pytest.raises(FileNotFoundError, match=r"out/metrics.jsonl was removed or replaced while"):
        trainer.train()
    if how == "replaced":
        assert (out / "metrics.jsonl").read_text() == "another's\n"
        assert os.listdir(out) == ["metrics.jsonl"]


def test_a_signal_handler_that_cannot_print_stops_all_the_same(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

        flush = write

    delay = signals.DelayedStop()
    monkeypatch.setattr(signals.os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stderr", Gone())
    delay(signal.SIGHUP, None)
    delay.cancel()
    assert delay.signum == signal.SIGHUP
