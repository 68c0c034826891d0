"""Files are replaced whole or not at all, inside their folder only, with the modes one expects."""

import contextlib
import errno
import fcntl
import os
import resource
import stat

import pytest
import torch

from rlhf_core import files
from rlhf_core.files import (
    Replacement,
    remove_folder,
    remove_leftover_folders,
    replacing,
    replacing_folder,
    subfolder,
    write_json,
)
from rlhf_core.models.safetensors import write_tensors

WRITERS = {
    "json": lambda path: write_json(path, {"new": 1}),
    "tensors": lambda path: write_tensors(path, {"x": torch.ones(3)}),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder):
    """Every file below a folder, hidden ones too, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextlib.contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@writers
@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(write, mask, expected, tmp_path):
    with umask(mask):
        write(tmp_path / "x")
    assert mode(tmp_path / "x") == expected


@writers
@pytest.mark.parametrize("kept", [0o640, 0o600, 0o444, 0o666])
def test_a_replaced_file_keeps_its_mode(write, kept, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(kept)
    write(path)
    assert mode(path) == kept and path.read_bytes() != b"old"


@writers
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_a_link_is_replaced_and_its_target_stays(write, there, tmp_path):
    target, link = tmp_path / "elsewhere", tmp_path / "out" / "x"
    link.parent.mkdir()
    if there:
        target.write_text("of somebody else")
        target.chmod(0o600)
    link.symlink_to(target)
    with umask(0o022):
        write(link)
    assert not link.is_symlink() and mode(link) == 0o644
    assert target.exists() == there and (not there or target.read_text() == "of somebody else")


@writers
def test_a_hard_link_is_replaced_and_its_other_name_stays(write, tmp_path):
    (tmp_path / "other").write_text("of somebody else")
    os.link(tmp_path / "other", tmp_path / "x")
    write(tmp_path / "x")
    assert (tmp_path / "other").read_text() == "of somebody else"


@writers
def test_temporary_names_cannot_be_planted(write, tmp_path, monkeypatch):
    """They are random; a link is not followed even where an attacker guesses one."""
    out, target = tmp_path / "out", tmp_path / "elsewhere"
    target.write_text("of somebody else")
    out.mkdir()
    (out / f".x.{os.getpid()}.tmp").symlink_to(target)
    write(out / "x")
    monkeypatch.setattr(files.os, "urandom", bytes)
    (out / f".rlhf-core-{'00' * 8}.tmp").symlink_to(target)
    with pytest.raises(FileExistsError, match="x: not written: File exists"):
        write(out / "x")
    assert target.read_text() == "of somebody else"


def test_leftovers_of_killed_processes_go_and_files_of_living_ones_stay(tmp_path):
    dead, alive, aside, other = (
        tmp_path / name
        for name in (
            f".rlhf-core-{'0a' * 8}.tmp",
            f".rlhf-core-{'0b' * 8}.tmp",
            f".rlhf-core-{'0c' * 8}.old",
            ".rlhf-core-notes.tmp",
        )
    )
    for path in (dead, alive, aside, other):
        path.write_text("part of a file")
    with open(alive) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_json(tmp_path / "x", 1)
        assert not dead.exists() and alive.exists() and aside.exists() and other.exists()
        with Replacement(tmp_path) as new:  # several files, so that the old ones are obsolete
            new.open("a"), new.open("b")
        assert alive.exists() and not aside.exists()
    write_json(tmp_path / "x", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "x", other.name}


def test_two_writers_of_one_folder_leave_each_other_alone(tmp_path):
    with replacing(tmp_path / "x") as first:
        first.write(b"first")
        with replacing(tmp_path / "y") as second:
            second.write(b"second")
    assert contents(tmp_path) == {"x": b"first", "y": b"second"}


@writers
def test_file_and_folder_are_on_disk_before_the_writer_returns(write, tmp_path, monkeypatch):
    calls, replace, fsync = [], os.replace, os.fsync

    def synced(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("folder" if folder else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("rename"), replace(*names)))
    write(tmp_path / "x")
    assert calls == ["file", "rename", "folder"]


# ---- failures


@writers
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT])
def test_a_failed_write_names_the_path_and_leaves_the_old_file(
    write, call, code, tmp_path, monkeypatch
):
    path = tmp_path / "x"
    path.write_text("old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
        patch.setattr(os, call, fail)
        write(path)
    assert str(raised.value) == f"{path}: not written: {os.strerror(code)}"
    assert contents(tmp_path) == {"x": b"old"}


@writers
def test_a_file_that_may_not_grow_leaves_the_old_one(write, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        with pytest.raises(OSError, match="x: not written: File too large"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {"x": b"old"}


@writers
def test_a_name_that_is_too_long_is_named(write, tmp_path):
    write(tmp_path / ("x" * 255))  # as long as a name may be
    with pytest.raises(OSError, match=r"/x{256}: not written: File name too long"):
        write(tmp_path / ("x" * 256))
    assert contents(tmp_path).keys() == {"x" * 255}


def test_a_folder_that_goes_while_a_file_is_written_is_named(tmp_path):
    path = tmp_path / "out" / "x"
    with (
        pytest.raises(FileNotFoundError, match="out/x: not written: No such file"),
        replacing(path) as file,
    ):
        file.write(b"new")
        for leftover in path.parent.iterdir():
            leftover.unlink()
        path.parent.rmdir()
    assert not path.parent.exists()


@writers
def test_what_is_no_file_is_not_replaced(write, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    kinds = {"folder": "a directory", "pipe": "a pipe or a device", "null": "a pipe or a device"}
    for name, kind in kinds.items():
        with pytest.raises(OSError, match=f"{name} is {kind}, not a file"):
            write(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == kinds.keys()


@pytest.mark.parametrize("old", [(), ("a",), ("a", "b", "c"), ("b", "stale")], ids=str)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_files_are_replaced_together_or_not_at_all(old, error, late, tmp_path, monkeypatch):
    """Whichever rename fails or is interrupted, the folder is as it was."""
    for name in old:
        (tmp_path / name).write_text(f"old {name}")
    before, replace = contents(tmp_path), os.replace

    def save():
        with Replacement(tmp_path) as new:
            new.remove("a", "stale", "missing")
            for name in "abc":
                new.open(name).write(b"new")

    for number in range(20):
        calls = []

        def failing(source, target, calls=calls, number=number):
            calls.append(target)
            if len(calls) != number + 1:
                replace(source, target)
            else:
                if late and isinstance(error, KeyboardInterrupt):
                    replace(source, target)
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with contextlib.suppress(OSError, KeyboardInterrupt):
                save()
                break
        assert contents(tmp_path) == before
    assert number >= 3 and contents(tmp_path) == dict.fromkeys("abc", b"new")


def test_the_file_opened_last_goes_first_and_comes_back_last(tmp_path, monkeypatch):
    """So no reader, and no process killed in between, finds a mixture of two saves."""
    for name in ("a", "b", "config", "stale"):
        (tmp_path / name).write_text("old")
    states, replace = [], os.replace

    def watched(source, target):
        replace(source, target)
        found = contents(tmp_path)
        states.append({name: found[name].decode() for name in found if name[0] != "."})

    monkeypatch.setattr(os, "replace", watched)
    with Replacement(tmp_path) as new:
        new.remove("stale")
        for name in ("a", "b", "config"):
            new.open(name).write(b"new")
    assert states.pop() == dict.fromkeys(("a", "b", "config"), "new")
    assert len(states) > 4 and all("config" not in state for state in states)


def test_an_unchanged_config_makes_the_save_a_single_rename(tmp_path, monkeypatch):
    moves, replace = [], os.replace
    for content in (b"first", b"second"):
        moves.clear()
        monkeypatch.setattr(os, "replace", lambda *x: (moves.append(x), replace(*x)))
        with Replacement(tmp_path) as new:
            new.open("weights").write(content)
            new.open("config").write(b"same")
    assert len(moves) == 1
    assert contents(tmp_path) == {"weights": b"second", "config": b"same"}


# ---- files that grow, and folders in folders


def test_a_file_to_append_to_is_no_link(tmp_path):
    with files.open_for_append(tmp_path / "log") as file:
        file.write("one\n")
    with files.open_for_append(tmp_path / "log") as file:
        file.write("two\n")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    (tmp_path / "link").symlink_to(tmp_path / "log")
    with pytest.raises(OSError, match="link: not written: Too many levels of symbolic links"):
        files.open_for_append(tmp_path / "link")


def test_a_subfolder_is_no_link(tmp_path):
    (tmp_path / "critic").mkdir()
    assert subfolder(tmp_path, "critic") == tmp_path / "critic"
    (tmp_path / "round-1").symlink_to(tmp_path / "critic")
    with pytest.raises(NotADirectoryError, match=r"round-1 is a link to .*critic, whose files"):
        subfolder(tmp_path, "round-1")


def test_a_folder_behind_a_broken_link_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    with pytest.raises(NotADirectoryError, match="link is not a directory"):
        files.check_writable(tmp_path / "link" / "out")


# ---- folders


def test_a_folder_is_replaced_whole_and_a_failed_block_leaves_the_old_one(tmp_path):
    path = tmp_path / "runs" / "x"
    for value in (1, 2):
        with replacing_folder(path) as new:
            write_json(new / "sub" / "a", value)
            write_json(new / f"b{value}", value)
    kept = {"sub/a": b"2\n", "b2": b"2\n"}
    assert contents(path) == kept
    with pytest.raises(KeyError), replacing_folder(path) as new:
        write_json(new / "c", 3)
        raise KeyError
    message = f"^{path}/sub is a directory"
    with pytest.raises(IsADirectoryError, match=message), replacing_folder(path) as new:
        write_json(new / "sub" / "a", 3)
        write_json(new / "sub", 3)
    assert contents(path) == kept and os.listdir(path.parent) == ["x"]


def test_a_link_to_a_folder_is_replaced_or_removed_and_its_target_stays(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    (target / "a").write_text("of somebody else")
    link.symlink_to(target)
    with replacing_folder(link) as new:
        write_json(new / "b", 1)
    assert contents(link) == {"b": b"1\n"} and not link.is_symlink()
    remove_folder(link)
    link.symlink_to(target)
    remove_folder(link)
    assert os.listdir(tmp_path) == ["target"] and os.listdir(target) == ["a"]


def test_leftover_folders_are_removed_and_others_stay(tmp_path):
    ours, other = tmp_path / f".rlhf-core-{16 * 'a'}.old", tmp_path / ".rlhf-core-mine.old"
    link = tmp_path / f".rlhf-core-{16 * 'b'}.tmp"
    for folder in (ours, other):
        (folder / "sub").mkdir(parents=True)
    link.symlink_to(other)
    remove_leftover_folders(tmp_path)
    assert sorted(tmp_path.iterdir()) == [link, other] and os.listdir(other) == ["sub"]
