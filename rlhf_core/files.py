"""Atomic file writes, JSON with clear errors, downloads from the hub, optional dependencies."""

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
    """Yield a temporary path next to `path`; on success sync it and rename it to `path`."""
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
    """Raise OSError unless files can be written to the folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is not a directory")
    with tempfile.TemporaryFile(dir=existing):
        pass


def write_json(path: str | os.PathLike, value) -> None:
    """Write value as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike):
    """The JSON value in a file. A malformed file raises ValueError with file and line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def read_object(path: str | os.PathLike) -> dict:
    """The JSON object in a file; any other value raises ValueError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {json.dumps(value)[:40]}")
    return value


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
        raise FileNotFoundError(
            f"{source}: no such folder, and not a Hugging Face hub repository such as owner/name"
        )
    try:
        download = require("huggingface_hub", "hub").snapshot_download
        patterns = ["*.json", "*.jinja", "*model*.safetensors"]
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
