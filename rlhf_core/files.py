"""Atomic writes of files and folders, JSON with clear errors, downloads, optional dependencies."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import re
import reprlib
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TextIO

MAX_OBJECT_BYTES = 2**27
_OURS = re.compile(r"\.rlhf-core-[0-9a-f]{16}\.(tmp|old)")
_SMALL = 2**20  # bytes
OWNERS = {"gpt2": "openai-community", "distilgpt2": "distilbert"}  # of names that once had none


class Replacement:
    """New files in a folder, and old ones to remove. All of it happens when the block succeeds.

    A failed block leaves the folder as it was. Open the file without which readers refuse the
    folder last: of several files it goes first and comes back last. So a process that is killed in
    between leaves a folder that is refused, never a mixture of two saves.

    Links are replaced, not followed. A new file has the mode of the old one, or that of the umask.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = self.current = Path(folder)
        self.new: dict[Path, tuple[Path, BinaryIO]] = {}
        self.stale: dict[Path, int] = {}  # where in the order of moves each of them goes

    def open(self, name: str) -> BinaryIO:
        """Return a new file, which will replace `name`."""
        path = self.current = self.folder / name
        check_replaceable(path)
        self.new[path] = _, file = _temporary_file(self.folder)
        if path.exists() and not path.is_symlink():
            with contextlib.suppress(PermissionError):  # some file systems have no modes
                os.chmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        return file

    def remove(self, *names: str, first: bool = False) -> None:
        """Remove these files too, if they exist and are not replaced.

        first: Before all others, because readers refuse the folder without them.
        """
        self.stale |= {self.folder / name: 0 if first else -1 for name in names}

    def __enter__(self) -> Replacement:
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.folder, ".tmp")
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self._commit()
        except OSError as failure:
            error = failure
        finally:
            for temporary, file in self.new.values():
                for clean in (file.close, temporary.unlink):
                    with contextlib.suppress(OSError):  # gone already, or the error that we have
                        clean()
        if isinstance(error, OSError):
            raise _named(self.current, error) from None

    def _commit(self) -> None:
        for path, (_, file) in self.new.items():
            self.current = path
            file.flush()
            os.fsync(file.fileno())
        new = {path: temporary for path, (temporary, _) in self.new.items()}
        stale = [path for path in self.stale if path.is_file() or path.is_symlink()]
        stale = [path for path in stale if path not in new]
        changed = {path: new[path] for path in new if len(new) == 1 or not _alike(path, new[path])}
        old = [path for path in new if os.path.lexists(path)]
        aside = lambda path: (path, path, _temporary_name(self.folder, ".old"))  # noqa: E731
        moves = [(path, new[path], path) for path in changed]  # which file, from where to where
        if new and len(changed) + len(stale) > 1:
            *others, last = new
            moves = [aside(last)] * (last in old)
            for path in (*others, last):
                moves += [aside(path)] * (path in old and path != last)
                moves.append((path, new[path], path))
        for path in stale:
            moves.insert(self.stale[path], aside(path))
        try:
            for self.current, source, target in moves:
                os.replace(source, target)
        except BaseException:
            for path, source, kept in reversed(moves):
                with contextlib.suppress(OSError):  # a move that was not made
                    if source == path:
                        os.replace(kept, path)
                    elif path not in old:
                        path.unlink()
            raise
        if len(self.new) + len(self.stale) > 1:
            _remove_leftovers(self.folder, ".old")
        _sync_folder(self.folder)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Yield a new file, which replaces `path` when the block succeeds: see `Replacement`."""
    path = Path(path)
    with Replacement(path.parent) as files:
        yield files.open(path.name)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder, which replaces `path` when the block succeeds.

    The block writes files as `replacing` does, the last one directly into the folder: that puts all
    of it on the disk. The caller holds the parent folder.
    """
    path = Path(path)
    new = _temporary_name(path.parent, ".tmp")
    try:
        new.mkdir(parents=True)
        yield new
        remove_folder(path)
        os.replace(new, path)
        _sync_folder(path.parent)
    except OSError as error:
        named = _named(path, error)
        raise type(named)(str(named).replace(new.name, path.name)) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, file or link. A killed process leaves all of it or nothing at `path`."""
    if path.is_dir() and not path.is_symlink():
        old = _temporary_name(path.parent, ".old")
        os.replace(path, old)
        shutil.rmtree(old, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftover_folders(folder: Path) -> None:
    """Remove what killed processes left of the two functions above; the caller holds `folder`."""
    for entry in os.scandir(folder):
        if _OURS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)


def open_for_append(path: str | os.PathLike) -> TextIO:
    """Open a text file to append to. A link raises OSError, because its target is elsewhere."""
    opener = lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)  # noqa: E731
    with naming(Path(path)):
        return open(path, "a", encoding="utf-8", opener=opener)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in errors of the system, such as a full disk."""
    try:
        yield
    except OSError as error:
        raise _named(path, error) from None


def subfolder(folder: Path, name: str) -> Path:
    """Return folder / name, to write into. A link raises OSError: its target is elsewhere."""
    path = folder / name
    if path.is_symlink():
        raise NotADirectoryError(
            f"{path} is a link to {os.readlink(path)}, whose files would be replaced. Remove the "
            "link, or choose another folder"
        )
    return path


def check_replaceable(path: Path) -> None:
    """Raise OSError if there is a folder, pipe or device at `path`, or its name is too long."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise (IsADirectoryError if stat.S_ISDIR(mode) else OSError)(
            f"{path} is {kind}, not a file"
        )


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be written to the folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a directory")
    with tempfile.TemporaryFile(dir=existing):
        pass


def write_json(path: str | os.PathLike, value) -> None:
    """Write value as indented JSON, atomically."""
    with replacing(path) as file:
        dump_json(file, value)


def write_rows(path: str | os.PathLike, rows: Iterable) -> None:
    """Write values as JSON lines, atomically."""
    with replacing(path) as file:
        dump_rows(file, rows)


def dump_json(file: BinaryIO, value) -> None:
    """Write value as indented JSON to an open file."""
    file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def dump_rows(file: BinaryIO, rows: Iterable) -> None:
    """Write values as JSON lines to an open file."""
    for row in rows:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _named(path: Path, error: OSError) -> OSError:
    """The error with `path` in its message, unless the message is ours."""
    if error.errno is None:
        return error
    return type(error)(f"{path}: not written: {error.strerror}")


def _alike(old: Path, new: Path) -> bool:
    """Whether two small files are equal, so that the old one can stay."""
    if old.is_symlink() or not os.access(old, os.R_OK):
        return False
    sizes = old.stat().st_size, new.stat().st_size
    return sizes[0] == sizes[1] <= _SMALL and old.read_bytes() == new.read_bytes()


def _temporary_name(folder: Path, suffix: str) -> Path:
    return folder / f".rlhf-core-{os.urandom(8).hex()}{suffix}"


def _temporary_file(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file, and a lock on it by which others know that its process is alive."""
    while True:
        path = _temporary_name(folder, ".tmp")
        file = open(path, "xb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            return path, file
        file.close()  # another process removed it before it was locked


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(folder: Path, suffix: str) -> None:
    """Remove temporary files of killed processes."""
    for entry in os.scandir(folder):
        if _OURS.fullmatch(entry.name) and entry.name.endswith(suffix):
            with contextlib.suppress(OSError):
                if suffix == ".old":
                    os.unlink(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    with open(entry.path, "rb") as file:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # raises if it is alive
                        os.unlink(entry.path)


def read_text(path: str | os.PathLike) -> str:
    """The text in a file. Raises ValueError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def parse_json(text: str):
    """The JSON value in a text. Raises ValueError if it is malformed or nested too deeply.

    Whole numbers have at most 300 digits, so that all of them are also finite floats.
    """
    try:
        try:
            value, end = _DECODER.raw_decode(text)
        except json.JSONDecodeError:  # loads knows the best message
            end = -1
        return value if end == len(text) else json.loads(text, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None


def _parse_int(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"not valid JSON: a number of {len(digits)} digits, {digits[:20]}...")
    return int(digits)


# Made once: json.loads with an option makes a decoder on every call, for longer than it decodes.
_DECODER = json.JSONDecoder(parse_int=_parse_int)


def read_json(path: str | os.PathLike):
    """The JSON value in a file. A malformed file raises ValueError with file and line."""
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except ValueError as error:
        raise ValueError(error if str(path) in str(error) else f"{path}: {error}") from None


def read_object(path: str | os.PathLike) -> dict:
    """The JSON object in a file; any other value, or a file of over 128 MB, raises ValueError."""
    size = os.path.getsize(path)
    if size > MAX_OBJECT_BYTES:
        raise ValueError(f"{path}: has {size} bytes, more than the {MAX_OBJECT_BYTES} of any model")
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {shown(value)}")
    return value


def read_ids(fields: dict, name: str) -> list[int]:
    """The token ids in a field of a JSON object: none, one, or a list. -1 stands for none.

    Raises:
        ValueError: The field holds anything else.
    """
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i < 2**63 for i in ids):
        raise ValueError(f"{name} must be an id or a list of ids, got {shown(value)}")
    return [i for i in ids if i >= 0]


def shown(value) -> str:
    """A value from a file for an error message: at most 80 characters of JSON."""
    return _cut(value, json.dumps)


def short(value) -> str:
    """A value for an error message: at most 80 characters of its repr."""
    return _cut(value, repr)


def _cut(value, write: Callable[[Any], str]) -> str:
    try:
        text = write(value)
    except (TypeError, ValueError, RecursionError):  # too long or deep a value
        text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def model_folder(source: str | os.PathLike) -> Path:
    """`source` if it exists, otherwise a local copy of the hub repository "owner/name".

    Raises:
        FileNotFoundError: `source` is neither, or the download failed.
        ImportError: a download needs huggingface_hub, which is not installed.
    """
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        near = ""
        if owner := OWNERS.get(str(source).split("-")[0]):
            near = f"; did you mean {owner}/{source}? That needs rlhf-core[hub]"
        raise FileNotFoundError(
            f"{source}: no such folder, and not a Hugging Face hub repository such as owner/name"
            f"{near}"
        )
    try:
        download = require("huggingface_hub", "hub").snapshot_download
        patterns = ["*.json", "*.jinja", "merges.txt", "*model*.safetensors"]
        return Path(download(str(source), allow_patterns=patterns))
    except ImportError as error:
        raise ImportError(
            f"{source}: no such folder; to fetch it from the Hugging Face hub, {error}"
        ) from None
    except Exception as error:  # any failed request
        reason = (str(error) or repr(error)).splitlines()[0]
        raise FileNotFoundError(
            f"{source}: no such folder, and not fetched from the Hugging Face hub (offline?): "
            f"{reason}"
        ) from None


def require(module: str, extra: str) -> ModuleType:
    """The imported optional dependency; if missing, ImportError names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0]
        raise ImportError(
            f"this needs {name!r}: pip install 'rlhf-core[{extra}]'", name=name
        ) from None
