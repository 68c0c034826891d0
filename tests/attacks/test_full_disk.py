"""The disk is full, in a small tmpfs and by the limit on the size of a file, at any byte of a run.

Then the command ends with status 2 and one line that names the path; what was in the folder before
is intact, and no temporary file is left.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import SMALL, TEXTS, make_trainer, model_folders, write

from rlhf_core.data import ByteTokenizer
from rlhf_core.models import Transformer
from rlhf_core.training.checkpoint import digest

pytestmark = pytest.mark.slow
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from rlhf_core.cli import main
sys.exit(main())
"""
# Files that belong to the new run from its start.
RESULTS = {"metrics.jsonl", "timings.jsonl", "samples.jsonl", "run.json"}


@pytest.fixture
def command(tmp_path):
    """Runs a training command in a process of its own, with a limit on the size of its files."""
    folders, data = model_folders(tmp_path / "models"), write(tmp_path / "data.jsonl", TEXTS)

    def command(out, limit=0):
        arguments = ["sft", "--model", folders / "policy", "--data", data, "--out", out]
        line = [sys.executable, "-c", LIMITED, limit, *arguments, "--overwrite", *SMALL]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(map(str, line), capture_output=True, text=True, env=environment)

    return command


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a tmpfs of a given size, which needs the right to mount."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(options, capture_output=True).returncode:
            pytest.skip("this user may not mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in RESULTS and path.is_file()
    }


def check_error(done):
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.fullmatch(r"rlhf-core sft: error: /\S+: not written: [\w ]+", line), line


@pytest.mark.parametrize("limit", [1, 2000, 20000])
def test_files_that_may_not_grow_leave_the_old_model(limit, command, tmp_path):
    out = tmp_path / "out"
    assert command(out).returncode == 0
    before = contents(out)
    check_error(command(out, limit))
    assert contents(out) == before


def test_a_full_tmpfs_leaves_the_old_model(command, disk, tmp_path):
    assert command(tmp_path / "out").returncode == 0
    out = disk("400k") / "out"  # room for one model, not for two
    shutil.copytree(tmp_path / "out", out)
    (out.parent / "filler").write_bytes(bytes(100))
    before = contents(out)
    while True:  # leave 8 KB
        free = os.statvfs(out)
        if free.f_bavail * free.f_frsize <= 8192:
            break
        with open(out.parent / "filler", "ab") as file:
            file.write(bytes(4096))
    check_error(command(out))
    assert contents(out) == before


def test_a_full_disk_in_any_save_leaves_the_old_model(disk):
    """From no room at all to enough room: each time the old model or the new one is there."""
    out, found = disk("2m") / "out", set()
    others = dict(out=out, tokenizer=ByteTokenizer())
    old = make_trainer("sft", others=others)
    old.train()
    new = make_trainer("sft", others=others | {"out": None}, lr=0.1)
    new.train()
    expected = {digest(old.model): "old", digest(new.model): "new"}
    filler = out.parent / "filler"
    for free in range(0, 200_000, 4096):
        old.save(out)
        filler.write_bytes(b"")
        room = os.statvfs(out)
        filler.write_bytes(bytes(room.f_bavail * room.f_frsize - free))
        try:
            new.save(out)
        except OSError as error:
            assert "No space left" in str(error) and str(out) in str(error)
        filler.unlink()
        state = expected[digest(Transformer.from_pretrained(out))]
        found.add(state)
        assert not list(out.glob(".rlhf-core-*"))
    assert found == {"old", "new"}
