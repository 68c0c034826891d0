"""Processes are killed (SIGKILL) at every file call of a save and of a run, and in every write.

Then the folder holds the old model or the new one, or it is refused by name; it never holds a
mixture. The next save or run succeeds and leaves no temporary file. The cases run in a process of
their own, which forks: `python tests/attacks/test_kill.py "plain over plain"` shows how the kills
of one case ended.
"""

import collections
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

FILE = Path(__file__).resolve()
SAVES = (
    "plain over nothing",
    "plain over plain",
    "other plain over plain",
    "shards over shards",
    "plain over shards",
    "plain over adapters",
    "adapters over plain",
    "adapters over values",
    "values over plain",
    "values over adapters",
    "values on adapters over values",
    "json over bytes",
    "bytes over json",
)
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.scandir", "fcntl.flock")
THEIRS = {"model-epoch1.safetensors": "of somebody else", ".notes.tmp": "of somebody else"}


@pytest.fixture(scope="module")
def outcomes():
    """case -> how many kills ended how, as one process counts them, which imports torch once."""
    command = [sys.executable, str(FILE), *SAVES, "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert done.returncode == 0, f"after {list(found)}: {done.stderr[-3000:]}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVES)
def test_a_killed_save_leaves_the_old_model_or_the_new_one_or_a_folder_that_is_refused(
    case, outcomes
):
    counts = outcomes[case]
    assert counts["new"] > 1 and counts["refused" if "nothing" in case else "old"] > 5
    if case == "plain over plain":  # only the weights differ: one rename
        assert counts.keys() == {"old", "new"}


@pytest.mark.slow
def test_a_killed_run_is_resumed_or_started_anew_and_ends_as_if_it_had_not_been_killed(outcomes):
    assert sum(outcomes["run"].values()) > 50


# ---- in that process


def make(kind, seed, base):
    """Something to save, and how to save it."""
    import torch
    from helpers import tiny

    from rlhf_core.data import ByteTokenizer, load_tokenizer
    from rlhf_core.models import ILQLModel, RewardModel, Transformer, hub
    from rlhf_core.models.lora import LoRAConfig, add_adapters

    if kind == "bytes":
        return ByteTokenizer().save
    if kind == "json":
        return load_tokenizer(base / "json").save
    model = tiny(RewardModel if kind == "reward" else Transformer, seed=seed)
    if kind == "other plain":
        model = tiny(seed=seed, norm_eps=1e-3)
    if "adapters" in kind:
        add_adapters(model := tiny(), LoRAConfig(rank=2 + seed, base=str(base / "base")))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    if "values" in kind:
        model = ILQLModel(model, beta=float(seed))
    if kind == "shards":
        return lambda folder: hub.save(model, folder, max_shard_bytes=9000)
    return model.save_pretrained


def read(folder):
    """What a reader finds in the folder: its kind, config and weights; or the error's type."""
    from rlhf_core.data.tokenizer import load_tokenizer
    from rlhf_core.models import ILQLModel, RewardModel, Transformer
    from rlhf_core.models.ilql import has_values
    from rlhf_core.models.lora import is_reward_model
    from rlhf_core.training.checkpoint import digest

    if any(folder.glob("*tokenizer*")) or not any(folder.glob("*.safetensors")):
        tokenizer = load_tokenizer(folder)
        files = getattr(tokenizer, "_config", None), getattr(tokenizer, "eos_ids", None)
        return type(tokenizer).__name__, repr(files)
    cls = RewardModel if is_reward_model(folder) else Transformer
    model = (ILQLModel if has_values(folder) else cls).from_pretrained(folder)
    return cls.__name__, repr(model.config), digest(model), getattr(model, "beta", None)


def die_at(number, folder):
    """Kill this process at a file call in the folder. The hook sees a call before it happens."""
    calls = 0

    def call(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        where = arguments[0] if arguments else None
        if event == "fcntl.flock" or (event in EVENTS and str(folder) in str(where)):
            call()

    fsync = os.fsync
    os.fsync = lambda descriptor: (call(), fsync(descriptor), call())
    sys.addaudithook(hook)


def die_in_write(size):
    """Kill this process when a file grows beyond the size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed(arm, work):
    """Whether a fork that does the work was killed."""
    pid = os.fork()
    if not pid:
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            arm()
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed"
    return os.WIFSIGNALED(status)


def attack(folder, prepare, work, check):
    """Kill the work at one call after another, then in writes; `check` names each outcome."""
    counts = collections.Counter()
    for limit in (lambda n: lambda: die_at(n, folder), lambda n: lambda: die_in_write(97 * n**2)):
        for number in range(1, 1000):
            shutil.rmtree(folder, ignore_errors=True)
            prepare()
            alive = not killed(limit(number), work)
            counts[check()] += 1
            if alive:
                break
    return counts


def kill_saves(case, root):
    new, _, old = case.partition(" over ")
    folder = root / "out"
    make("plain", 0, root)(root / "base")
    if "json" in case:
        from tokenizers import Tokenizer, models

        (root / "json").mkdir()
        Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(root / "json" / "tokenizer.json"))
        (root / "json" / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    save_old = make(old, 1, root) if old != "nothing" else lambda folder: folder.mkdir()
    save_new = make(new, 2, root)
    expected = {}
    for name, save in ("old", save_old), ("new", save_new):
        save(root / name)
        expected[name] = read(root / name) if any((root / name).iterdir()) else None

    def prepare():
        save_old(folder)
        for name, text in THEIRS.items():
            (folder / name).write_text(text)

    def check():
        try:
            found = read(folder)
            outcome = next((name for name in expected if expected[name] == found), "mixture")
            assert outcome != "mixture", sorted(path.name for path in folder.iterdir())
        except FileNotFoundError:
            outcome = "refused"
        save_new(folder)
        assert read(folder) == expected["new"]
        assert all((folder / name).read_text() == THEIRS[name] for name in THEIRS)
        left = {path.name for path in folder.glob(".*")} - THEIRS.keys()
        assert not left, left
        return outcome

    return attack(folder, prepare, lambda: save_new(folder), check)


def kill_runs(root):
    """A run with checkpoints, killed; then resumed if there is a checkpoint, else started anew."""
    from helpers import make_trainer

    from rlhf_core.data import ByteTokenizer
    from rlhf_core.training.checkpoint import find

    def train(folder):
        others = dict(out=folder, tokenizer=ByteTokenizer())
        trainer = make_trainer("sft", batch_size=4, save_every=1, log_every=99, others=others)
        resumed = bool(find(folder))
        if resumed:
            trainer.resume()
        trainer.train()
        return "resumed" if resumed else "started anew"

    def contents(folder):
        names = ("model.safetensors", "metrics.jsonl", "config.json", "tokenizer_config.json")
        assert not list(folder.glob(".rlhf-core-*"))
        return [(folder / name).read_bytes() for name in names]

    folder = root / "out"
    train(root / "whole")

    def check():
        outcome = train(folder)
        assert contents(folder) == contents(root / "whole")
        return outcome

    return attack(folder, lambda: None, lambda: train(folder), check)


if __name__ == "__main__":
    sys.path[0] = str(FILE.parents[1])
    sys.stderr.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore")
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where fsync costs nothing
    for case in sys.argv[1:]:
        with tempfile.TemporaryDirectory(dir=memory) as name:
            root = Path(name)
            counts = kill_runs(root) if case == "run" else kill_saves(case, root)
        print(json.dumps([case, counts]), flush=True)
