"""One run per folder: a second process, thread or launcher's worker is refused."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import SMALL, TEXTS, make_ppo, make_trainer, model_folders, run, tiny, write

from rlhf_core import locks
from rlhf_core.models import Transformer
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.trainers import IteratedDPOConfig, RFTConfig, iterated_dpo, rft

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from rlhf_core import locks
with locks.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return model_folders(tmp_path_factory.mktemp("models"))


def refusal(capsys, *arguments):
    """The error of a command that must fail."""
    capsys.readouterr()
    assert run(*arguments) == 2
    return capsys.readouterr().err


@pytest.fixture
def other_process(tmp_path):
    """A process that holds tmp_path / "out"."""
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], **options)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def in_use(process, folder):
    return rf"{folder} is in use by process {process.pid} on .*which holds {folder}/\.lock"


@pytest.mark.slow
def test_a_folder_that_another_process_holds_is_refused_until_that_process_dies(
    other_process, tmp_path
):
    out = tmp_path / "out"
    message = in_use(other_process, out)
    with pytest.raises(BlockingIOError, match=message):
        make_trainer("sft", others=dict(out=out)).train()
    with pytest.raises(BlockingIOError, match=message):
        make_trainer("sft", others=dict(out=out)).save_checkpoint()
    with pytest.raises(BlockingIOError, match=message):
        tiny().save_pretrained(out)
    options = dict(reward=lambda *_: pytest.fail("it samples"), out=out)
    with pytest.raises(BlockingIOError, match=message):
        rft(tiny(), [[5]] * 4, RFTConfig(response_length=4), **options)
    with pytest.raises(BlockingIOError, match=message):
        iterated_dpo(tiny(), [[5]] * 4, IteratedDPOConfig(response_length=4), **options)
    assert os.listdir(out) == [".lock"]
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert (out / ".lock").exists()
    make_trainer("sft", others=dict(out=out)).train()
    assert not (out / ".lock").exists() and (out / "model.safetensors").exists()


@pytest.mark.slow
def test_commands_refuse_a_folder_that_another_process_holds(
    other_process, folders, tmp_path, capsys
):
    add_adapters(model := Transformer.from_pretrained(folders / "policy"), LoRAConfig(rank=2))
    model.save_pretrained(tmp_path / "adapters")
    out, model = tmp_path / "out", ["--model", folders / "policy"]
    texts = [*model, "--data", write(tmp_path / "texts.jsonl", TEXTS), *SMALL, "--out", out]
    prompts = ["--prompts", write(tmp_path / "prompts.txt", ["x"] * 4)]
    prompts += [*model, "--reward-model", folders / "reward", "--out"]
    for command in (
        ["sft", *texts],
        ["sft", *texts, "--overwrite"],
        ["sft", *texts, "--resume"],
        ["ppo", *prompts, out, *SMALL],
        ["rft", *prompts, out, *SMALL, "--overwrite"],
        ["best-of-n", *prompts, out / "best"],
        ["merge", "--model", tmp_path / "adapters", "--out", out, "--overwrite"],
        ["demo", "--out", out],
    ):
        error = refusal(capsys, *command)
        assert f"process {other_process.pid}" in error and "Traceback" not in error
    assert os.listdir(out) == [".lock"]


@pytest.mark.slow
def test_of_two_commands_with_one_folder_one_trains(folders, tmp_path):
    data = write(tmp_path / "data.jsonl", TEXTS)
    paths = ["--model", folders / "policy", "--data", data, "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "rlhf_core", "sft", *paths, *SMALL, "--overwrite"]
    command = [str(word) for word in [*command, "--max-steps", 40, "--epochs", 40]]
    options = dict(cwd=ROOT, stderr=subprocess.PIPE, text=True)
    first, second = (subprocess.Popen(command, **options) for _ in range(2))
    errors = [process.communicate(timeout=120)[1] for process in (first, second)]
    statuses = [process.returncode for process in (first, second)]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 40 and "Traceback" not in "".join(errors)
    if statuses != [0, 0]:  # else one began when the other had ended
        assert sorted(statuses) == [0, 2] and "is in use by process" in "".join(errors)


def test_a_second_best_of_n_into_one_file_is_refused(folders, tmp_path, capsys):
    command = ["best-of-n", "--model", folders / "policy", "--reward-model", folders / "reward"]
    command += ["--prompts", write(tmp_path / "prompts.txt", ["x"]), "--response-length", 4]
    command += ["--out", tmp_path / "best.jsonl"]
    errors = []
    with locks.hold(tmp_path, ".best.jsonl.lock"):
        thread = threading.Thread(target=lambda: errors.append(refusal(capsys, *command)))
        thread.start()
        thread.join()
    assert "is in use by another thread" in errors[0]
    assert run(*command) == 0 and not list(tmp_path.glob(".*"))


def test_a_second_thread_is_refused_and_a_nested_hold_is_free(tmp_path):
    errors = []

    def again():
        try:
            make_trainer("sft", others=dict(out=tmp_path)).train()
        except BlockingIOError as error:
            errors.append(str(error))

    with locks.hold(tmp_path), locks.hold(tmp_path), locks.hold(tmp_path / "." / "x" / ".."):
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
    assert errors == [f"{tmp_path} is in use by another thread of this process"]
    again()
    assert len(errors) == 1


def test_a_forked_child_neither_holds_nor_keeps_the_lock(tmp_path):
    read, write = os.pipe()
    with locks.hold(tmp_path):
        child = os.fork()
        if not child:
            try:
                with locks.hold(tmp_path):
                    os.write(write, b"held")
            except BlockingIOError:
                os.write(write, b"refused")
            time.sleep(5)
            os._exit(0)
        assert os.read(read, 10) == b"refused"
    with locks.hold(tmp_path):  # though the child lives
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_leaves_nothing_behind_and_follows_no_link(tmp_path):
    with locks.hold(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "a").exists()
    (tmp_path / "target").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"cannot lock: .*\.lock"), locks.hold(tmp_path):
        pass
    assert (tmp_path / "target").read_text() == "kept"


@pytest.mark.parametrize(
    "owner, free",
    [
        (f"process {2**22 + 1} on HOST", True),
        (f"process {2**70} on HOST", True),
        ("process 1 on HOST", False),
        (f"process {2**22 + 1} on elsewhere", False),
        ("", False),
        ("garbage", False),
    ],
)
def test_where_there_are_no_locks_the_process_in_the_file_counts(
    owner, free, tmp_path, monkeypatch
):
    monkeypatch.setattr(locks, "fcntl", None)
    with locks.hold(tmp_path):
        assert (tmp_path / ".lock").exists()
    (tmp_path / ".lock").write_text(owner.replace("HOST", locks.socket.gethostname()))
    if free:
        with locks.hold(tmp_path):
            pass
    else:
        with pytest.raises(BlockingIOError, match="is in use by "), locks.hold(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()


# ---- several processes of a launcher


@pytest.mark.parametrize("size", ["2", "16", "x"])
def test_a_launcher_with_several_processes_is_refused_before_anything_is_read(
    size, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    message = f"WORLD_SIZE is {size}: several processes were started for one run"
    alone = f"WORLD_SIZE is {size}: several processes were started, but only the commands that"
    unset = f"WORLD_SIZE is {size}, but RANK and MASTER_ADDR and MASTER_PORT are not set"
    if size == "x":
        message = unset = "WORLD_SIZE must be a number of processes, got 'x'"
    for make in (make_ppo, lambda: make_trainer("dpo")):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match=message):
        rft(tiny(), [[5]], RFTConfig(response_length=4), reward=len)
    paths = ["--model", tmp_path / "none", "--out", tmp_path / "out"]
    reward = ["--reward-model", tmp_path / "none"]
    for found, command in (
        (unset, ["sft", *paths, "--data", tmp_path / "none.jsonl"]),
        (unset, ["ppo", *paths, "--prompts", tmp_path / "none.jsonl", *reward]),
        (alone, ["demo", "--out", tmp_path / "out"]),
        (alone, ["generate", "--model", tmp_path / "none", "--prompt", "x"]),
    ):
        assert found in refusal(capsys, *command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["1", ""])
def test_a_launcher_with_one_process_works(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    make_trainer("sft").train()
