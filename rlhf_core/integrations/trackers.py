"""Experiment trackers for `on_step`: TensorBoard, Weights & Biases, trackio, and a CSV file.

A tracker starts at the first step that it gets, with what run.json says of the run, where secrets
are masked. It ends with the run's status, the metrics that a command prints at its end, and
report.html. Left out: uploads of models, and the steps inside a round.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_core.files import read_object, replacing, require, write_json
from rlhf_core.training import run_file
from rlhf_core.training.run_log import summarize

PROJECT = "rlhf_core"  # where the user names none
IDENTITY = "trackers.json"  # the run's id in its trackers, so that a resumed run has the same


class Start(NamedTuple):
    """The run that a tracker begins, or continues."""

    out: Path
    id: str
    step: int  # the first one to come
    resumed: bool  # the tracker may have earlier steps
    facts: dict[str, Any]  # as in run.json


class End(NamedTuple):
    """How a run has ended."""

    status: str  # finished, interrupted or failed
    step: int
    summary: dict[str, Any]  # final/NAME -> what a command prints at its end
    options: dict[str, Any]
    report: Path | None


class CSV:
    """metrics.csv: a line per step, a column per metric."""

    @staticmethod
    def check(out: Path) -> None:
        """Nothing to check: it needs no package."""

    def __init__(self, start: Start):
        self.path, self.columns = start.out / "metrics.csv", ["step"]
        earlier = self._rows() if start.resumed and self.path.is_file() else []
        self._rewrite([row for row in earlier if int(row["step"]) < start.step])

    def log(self, metrics: dict[str, Any], step: int) -> None:
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self.columns]
        if new:  # such as those of an evaluation
            rows = self._rows()
            self.columns += new
            self._rewrite([*rows, row])
        else:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                self._writer(file).writerow(row)

    def _rows(self) -> list[dict[str, Any]]:
        """The whole lines of the file; sets the columns, too."""
        with open(self.path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or self.columns)
            return [row for row in reader if None not in row.values()]

    def _writer(self, file: Any) -> csv.DictWriter:
        return csv.DictWriter(file, self.columns, lineterminator="\n")

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())

    def finish(self, end: End) -> None:
        """Nothing to add: run.json and report.html are in the same folder."""


class TensorBoard:
    """Event files in tensorboard/, with the options and the summary under HPARAMS."""

    @staticmethod
    def check(out: Path) -> None:
        require("tensorboard", "tensorboard")

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        folder = start.out / "tensorboard"
        if not start.resumed:  # curves of an older run would mix with those of this one
            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=start.step, flush_secs=10)
        facts = json.dumps(start.facts, indent=2, ensure_ascii=False)
        self._text("run.json", facts, start.step - 1)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
            else:
                self._text(name, str(value), step)

    def _text(self, name: str, text: str, step: int) -> None:
        code = "    " + text.replace("\n", "\n    ")  # in Markdown
        self.writer.add_text(name, code, step)

    def finish(self, end: End) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._text("status", end.status, end.step)
        self.log(end.summary, end.step)
        if end.status == "finished":
            plain = {name: x for name, x in end.options.items() if isinstance(x, int | float | str)}
            for summary in hparams(plain, dict.fromkeys(end.summary, 0.0)):
                self.writer.file_writer.add_summary(summary)
        self.writer.close()


class WandB:
    """A run of Weights & Biases. Its own environment variables work, such as WANDB_MODE."""

    @staticmethod
    def check(out: Path) -> None:
        wandb = require("wandb", "wandb")
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and "WANDB_API_KEY" not in os.environ and not netrc.exists():
            try:
                wandb.login()  # asks for a key, on a terminal
            except wandb.errors.UsageError as error:
                text = f"wandb: {error} Or set WANDB_MODE=offline, and send the run later"
                raise ValueError(text) from None

    def __init__(self, start: Start):
        import wandb

        folder = start.out / "wandb"
        defaults = dict(WANDB_PROJECT=PROJECT, WANDB_NAME=start.out.name, WANDB_DIR=start.out)
        defaults |= dict(WANDB_RUN_ID=start.id, WANDB_RESUME="allow", WANDB_CONSOLE="off")
        defaults |= dict(WANDB_CACHE_DIR=folder / "cache", WANDB_DATA_DIR=folder / "data")
        settings = wandb.Settings(x_disable_meta=True)  # it has the command without masks
        with _environment(defaults):
            self.run = wandb.init(config=start.facts, settings=settings)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.run.log({"step": step, **metrics})

    def finish(self, end: End) -> None:
        self.run.summary.update({"status": end.status, **end.summary})
        if end.report is not None:
            self.run.save(str(end.report), base_path=str(end.report.parent), policy="now")
        self.run.finish(exit_code=int(end.status != "finished"))


class Trackio:
    """A run of trackio, in trackio/. TRACKIO_PROJECT, and trackio's own variables, work."""

    @staticmethod
    def check(out: Path) -> None:
        # It reads its folder once, when it is imported: the first run of a process decides.
        os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))
        require("trackio", "trackio")

    def __init__(self, start: Start):
        import trackio

        # A name is all that it knows a run by, and several folders may share theirs.
        name, project = f"{start.out.name}-{start.id}", os.environ.get("TRACKIO_PROJECT", PROJECT)
        options: dict[str, Any] = dict(resume="allow", embed=False, auto_log_cpu=False)
        self.run = trackio.init(project, name, config=start.facts, **options)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self, end: End) -> None:
        import trackio

        self.run.log({"status": end.status, **end.summary}, step=end.step)
        if end.report is not None:
            self.run.log_artifact(str(end.report), type="report")
        trackio.finish()


TRACKERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "csv": CSV,
}


class Trackers:
    """Sends a run's metrics to trackers. Use it in a `with` block, and pass it as `on_step`.

    A failure of a tracker is a warning, once for each: the run goes on.
    """

    def __init__(self, names: Sequence[str], out: str | os.PathLike):
        """
        Args:
            names: of TRACKERS.
            out: the run's folder. Trackers write into it, unless the user's environment says
                otherwise.

        Raises:
            ImportError: a tracker's package is missing; names the extra to install.
            ValueError: there is no such tracker, or wandb has no API key.
        """
        self.out = Path(out).absolute()  # a reward may call os.chdir
        for name in names:
            if name not in TRACKERS:
                raise ValueError(f"a tracker must be one of {', '.join(TRACKERS)}, got {name!r}")
            TRACKERS[name].check(self.out)
        self.names = list(dict.fromkeys(names))
        self.open: dict[str, Any] | None = None  # None: not started yet
        self.step, self.created = 0, time.time()
        self._warned: set[str] = set()

    def __enter__(self) -> Trackers:
        return self

    def __call__(self, metrics: dict[str, Any], step: int) -> None:
        """Log the metrics of a step or round."""
        if self.open is None:
            self._start(step)
        self.step, metrics = step, _flat(metrics)
        for name, tracker in self.open.items():
            with self._guarded(name):
                tracker.log(metrics, step)

    def _start(self, step: int) -> None:
        self.open, facts, before = {}, _read(self.out / run_file.NAME), _read(self.out / IDENTITY)
        # Another run may have been in this folder; only a resumed one keeps its start.
        resumed = "resumed" in facts and before.get("start") == facts["start"]
        id = str(before["id"]) if resumed else secrets.token_hex(4)
        start = Start(self.out, id, step, resumed, facts)
        for name in self.names:
            with self._guarded(name):
                self.out.mkdir(parents=True, exist_ok=True)
                write_json(self.out / IDENTITY, {"id": id, "start": facts.get("start")})
                self.open[name] = TRACKERS[name](start)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not self.open:
            return
        facts, report = _read(self.out / run_file.NAME), self.out / "report.html"
        status = facts.get("status") or ("finished" if error is None else "failed")
        written = report.is_file() and report.stat().st_mtime >= self.created
        options = _flat(facts.get("options") or {})
        end = End(status, self.step, self._summary(), options, report if written else None)
        for name, tracker in self.open.items():
            with self._guarded(name):
                tracker.finish(end)

    def _summary(self) -> dict[str, Any]:
        try:
            lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            _, means, final = summarize([json.loads(line) for line in lines])
        except (OSError, ValueError, LookupError):  # no such file, or a damaged one
            return {}
        return {f"final/{name}": value for name, value in _flat(means | final).items()}

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout has the command's own result
                yield
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                text = run_file.masked(f"{name}: {error!r}; the run goes on, see {self.out}")
                warnings.warn(text, stacklevel=4)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none, or a damaged one."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _flat(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics without step and round, and an item of a list, such as elo, as elo/0."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, list | tuple):
            flat |= {f"{name}/{i}": item for i, item in enumerate(value)}
        elif name not in ("step", "round"):
            flat[name] = value
    return flat


@contextlib.contextmanager
def _environment(defaults: dict[str, Any]) -> Iterator[None]:
    """Environment variables, where the user has set none."""
    added = {name: str(value) for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
