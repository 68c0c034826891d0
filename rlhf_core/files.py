"""Files that are whole or not there, and an error that names the extra where a dependency is missing."""

import contextlib
import importlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError unless a file could be written into the folder, which need not be there yet; it is not made."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is no folder")
    with tempfile.TemporaryFile(dir=place):
        pass


def write_json(path: str | os.PathLike, value) -> None:
    """Write value as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_json(path: str | os.PathLike):
    """The JSON value in a file; ValueError naming file and line where it is malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def read_object(path: str | os.PathLike) -> dict:
    """The same of a file that holds an object; ValueError where it holds another value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {json.dumps(value)[:40]}")
    return value


def model_folder(source: str | os.PathLike) -> Path:
    """`source` itself, or where no such folder is there and it reads "owner/name", a local copy of that hub repository.

    Raises FileNotFoundError where it is neither or the hub does not give it, ImportError where huggingface_hub is not
    installed.
    """
    path = Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)):
        raise FileNotFoundError(
            f"{source}: no such folder; a repository on the Hugging Face hub reads owner/name"
        )
    try:
        download = require("huggingface_hub", "hub").snapshot_download
        return Path(
            download(str(source), allow_patterns=["*.json", "*.jinja", "*model*.safetensors"])
        )
    except ImportError as error:
        raise ImportError(
            f"{source}: no such folder; to fetch it from the Hugging Face hub, {error}"
        ) from None
    except Exception as error:  # every kind of failed request
        reason = (str(error) or repr(error)).splitlines()[0]
        message = f"{source}: no such folder, and not fetched from the Hugging Face hub (offline?): {reason}"
        raise FileNotFoundError(message) from None


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; ImportError that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0]
        raise ImportError(
            f"this needs {name!r}: pip install 'rlhf-core[{extra}]'", name=name
        ) from None
