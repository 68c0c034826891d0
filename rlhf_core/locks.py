"""One run per folder: a lock file that a process holds while it writes there."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

NAME = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system
_held: dict[str, int] = {}  # lock file -> the thread of this process that holds it
_descriptors: set[int] = set()


@contextlib.contextmanager
def hold(folder: str | os.PathLike, name: str = NAME) -> Iterator[None]:
    """Hold a folder, which is made if it does not exist; a nested `hold` in the thread is free.

    The lock file ends with the lock. One that a killed process left behind does not count.

    Raises:
        BlockingIOError: another process or thread holds the folder; the message names it.
    """
    folder = Path(folder).absolute()
    file = folder.resolve() / name
    if _held.get(str(file)) == threading.get_ident():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _acquire(file, folder)
        _held[str(file)] = threading.get_ident()
        _descriptors.add(descriptor)
        try:
            yield
        finally:
            if _held.pop(str(file), None) is not None:  # else this is a fork of the holder
                _descriptors.discard(descriptor)
                if _is_file(descriptor, file):
                    file.unlink(missing_ok=True)
                os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # of a folder that is in use
            for path in made:
                path.rmdir()


def check_free(folder: str | os.PathLike, name: str = NAME) -> None:
    """Raise BlockingIOError if another process or thread holds the folder."""
    file = Path(folder).resolve() / name
    if file.is_file():
        with hold(folder, name):
            pass


def check_one_process() -> None:
    """Raise ValueError if a launcher has started several processes of a one-process command."""
    size = os.environ.get("WORLD_SIZE", "")
    if size not in ("", "1"):
        raise ValueError(
            f"WORLD_SIZE is {size}: several processes were started, but only the commands that "
            "train can share their work. Use one process, or unset WORLD_SIZE"
        )


def _acquire(file: Path, folder: Path) -> int:
    """A descriptor of the lock file, which is locked."""
    if str(file) in _held:
        raise BlockingIOError(f"{folder} is in use by another thread of this process")
    while True:
        descriptor, fresh = _open(file)
        try:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            locked = _lock(descriptor, fresh)
            if locked:
                if _is_file(descriptor, file):
                    os.ftruncate(descriptor, 0)
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(
                        descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode()
                    )
                    return descriptor
            elif locked is False or _lives(owner):
                raise BlockingIOError(
                    f"{folder} is in use by {owner or 'another process'}, which holds {file}. Wait "
                    "until that run ends, or choose another folder"
                )
            else:
                file.unlink(missing_ok=True)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(file: Path) -> tuple[int, bool]:
    """A descriptor of the lock file, and whether it is a new file."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    while True:
        for create in (os.O_CREAT | os.O_EXCL, 0):
            try:
                return os.open(file, flags | create, 0o666), bool(create)
            except (FileExistsError, FileNotFoundError):
                if not file.parent.is_dir():
                    raise
            except OSError as error:
                raise OSError(error.errno, f"cannot lock: {error.strerror}", str(file)) from None


def _lock(descriptor: int, fresh: bool) -> bool | None:
    """Whether the open file is locked now; None for one that exists where locks do not."""
    try:
        if fcntl is None:
            return fresh or None
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        if error.errno not in _NO_LOCKS:
            raise
        return fresh or None


def _lives(owner: str) -> bool:
    """Whether the process that wrote the lock file may still run."""
    pid, _, host = owner.removeprefix("process ").partition(" on ")
    if not pid.isdecimal() or host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process
        pass
    return True


def _is_file(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """In a forked process: its parent holds the locks, also after a fork that outlives it."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
