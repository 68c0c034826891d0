"""run.json: what a run was. Written when the run starts, and again with its status when it ends.

A process that is killed leaves the status "running". Secrets are masked: values of environment
variables that are named like one, and the credentials in URLs.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import rlhf_core
from rlhf_core import backends
from rlhf_core.files import read_object, write_json

NAME = "run.json"
OLD_NAME = "train_config.json"  # of older versions: the options and versions alone
ORDER = (
    "algorithm", "status", "error", "steps_done", "total_steps", "seed", "start", "end", "resumed",
    "command", "options", "data", "examples", "models", "feedback", "tokenizer", "template_dates",
    "device", "backend", "threads", "cpu", "versions", "git",
)  # fmt: skip
PACKAGES = ("torch", "numpy", "triton", "safetensors", "tokenizers", "jinja2", "tqdm")
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_open: dict[Path, RunFile] = {}


class RunFile:
    """The facts of a run, and the file that holds them once the run has started."""

    def __init__(self, out: Path, facts: dict[str, Any]):
        self.path, self.facts, self.started = out / NAME, facts, False

    def start(self, facts: dict[str, Any], resumed: bool) -> None:
        """Write the file.

        Args:
            facts: with steps_done and device. Facts that are known already win over them.
            resumed: keep the start and the command of the process that started the run.
        """
        now = _now()
        self.facts = {"command": sys.argv, **environment(facts["device"]), **facts, **self.facts}
        self.facts |= {"status": "running", "start": now}
        before = {}
        if resumed:
            with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
                before = read_object(self.path)
            earlier = before.get("resumed")
            step = {name: self.facts[name] for name in ("steps_done", "start", "command")}
            self.facts["resumed"] = [*(earlier if isinstance(earlier, list) else ()), step]
            self.facts |= {name: before[name] for name in ("start", "command") if name in before}
        else:
            self.path.with_name(OLD_NAME).unlink(missing_ok=True)
        self._write()
        self.started = True

    def end(self, error: BaseException | None) -> None:
        """Write the file again, unless it was never written, or removed since."""
        if not self.started or not self.path.exists():
            return
        self.facts["end"] = _now()
        if error is not None and self.facts["status"] == "running":
            interrupted = isinstance(error, KeyboardInterrupt)
            self.facts["status"] = "interrupted" if interrupted else "failed"
            self.facts["error"] = str(error) or repr(error)
        self._write()

    def _write(self) -> None:
        facts = {name: self.facts[name] for name in ORDER if name in self.facts}
        write_json(self.path, masked(facts))


@contextlib.contextmanager
def recording(out: Path, **facts: Any) -> Iterator[RunFile]:
    """The run.json of a folder that the caller holds; ends it. Nested ones share the outermost."""
    if out in _open:
        yield _open[out]
        return
    run = _open[out] = RunFile(out, facts)
    try:
        yield run
    except BaseException as error:
        with contextlib.suppress(OSError):  # the run's own error matters more
            run.end(error)
        raise
    else:
        run.end(None)
    finally:
        del _open[out]


def environment(device: str) -> dict[str, Any]:
    """Versions, machine and repository, as JSON."""
    backend = backends.of_device(torch.device(device).type)
    return {
        "backend": {"name": backend.name, "reason": backend.reason},
        "threads": torch.get_num_threads(),
        "cpu": {"model": _cpu_model(), "features": torch.backends.cpu.get_cpu_capability()},
        "versions": versions(),
        "git": _git(os.getcwd()),
    }


@functools.cache
def versions() -> dict[str, str | None]:
    """The versions of this library, Python and packages; None for one that is not installed."""
    found: dict[str, str | None] = {"rlhf_core": rlhf_core.__version__}
    found["python"] = platform.python_version()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache  # a process runs the code that it imported first, whatever changes later
def _git(folder: str) -> dict[str, Any] | None:
    """Commit of the repository around a folder, and whether tracked files differ from it."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        streams = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        done = subprocess.run(command, cwd=folder, timeout=10, **streams)
    except (OSError, subprocess.SubprocessError, ValueError):  # no git, a slow one, or odd names
        return None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None
    return {
        "commit": lines[0].removeprefix("# branch.oid "),
        "dirty": any(not line.startswith("#") for line in lines),
    }


def masked(value: Any) -> Any:
    """A JSON value whose texts hold no secret of the environment and no credentials of a URL."""
    # Short values are switches, such as TOKENIZERS_PARALLELISM=false; others are paths of keys.
    secrets = [
        secret
        for name, secret in os.environ.items()
        if _SECRET.search(name) and len(secret) > 5 and not os.path.exists(secret)
    ]

    def mask(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: mask(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [mask(item) for item in value]
        if not isinstance(value, str):
            return value
        for secret in secrets:
            value = value.replace(secret, "***")
        return re.sub(r"(\w://)[^/?#\s]+@", r"\1***@", value)

    return mask(value)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
