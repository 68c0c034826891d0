"""Curves of the metrics of one or several runs, as a figure of matplotlib.

Left out: tables of final values, and lists, such as the Elo ratings of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf_core.files import parse_json, read_object, read_text, require
from rlhf_core.options import did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAIN = (  # drawn unless others are asked for, at most MOST of them
    "objective/scores", "objective/kl", "loss", "eval_loss", "rewards/accuracies",
    "eval_rewards/accuracies", "rewards/margins", "accuracy", "eval_accuracy",
    "mean_token_accuracy", "policy/entropy_avg", "entropy", "response_length", "grad_norm",
)  # fmt: skip
MOST = 6


class Run(NamedTuple):
    """The metrics of a run.

    Attributes:
        name: In the legend.
        history: The metrics of each step or round, with its number as `step` or `round`.
        fault: Why the history is not that of a whole run; None if it is.
    """

    name: str
    history: list[dict[str, float]]
    fault: str | None = None


def read_run(folder: Path, name: str) -> Run:
    """Read metrics.jsonl and run.json of a run's folder.

    Damaged lines end the history and are named in `fault`.

    Raises:
        FileNotFoundError: There is no metrics.jsonl.
        ValueError: It has no whole line.
    """
    path, history, fault = folder / "metrics.jsonl", [], None
    for number, line in enumerate(read_text(path).splitlines(keepends=True), 1):
        try:
            row = parse_json(line)
            counted = isinstance(row, dict) and type(row.get(counter(row))) is int
        except ValueError:
            counted = False
        if not counted or not line.endswith("\n"):
            fault = f"{path}:{number}: a damaged line; the curves end before it"
            break
        history.append(row)
    if not history:
        raise ValueError(f"{path}: no metrics; the run has not finished a step")
    file = folder / "run.json"
    if fault is None and file.is_file():
        facts = read_object(file)
        if facts.get("status") != "finished":
            done = f"{len(history)} of {facts.get('total_steps')} {counter(history[0])}s"
            fault = f"{folder}: not finished ({facts.get('status')}), {done}"
    return Run(name, history, fault)


def counter(row: dict) -> str:
    """What numbers the rows of a history."""
    return "round" if "round" in row else "step"


def draw_curves(
    runs: Sequence[Run], metrics: Sequence[str] | None = None, smooth: int = 1
) -> Figure:
    """Draw a panel for each metric, with a curve for each run that has it.

    Args:
        runs: At least one.
        metrics: Their names. None means the main ones that the runs have.
        smooth: Steps of a moving average. Above 1 the values themselves are drawn pale.

    Returns:
        The figure. Its legend is beside the panels.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
        ValueError: No run has a metric.
    """
    figures = require("matplotlib.figure", "report")
    colours = require("matplotlib", "report").colormaps["tab10"].colors
    # `dict` keeps the order in which runs log their metrics.
    there = dict.fromkeys(
        name
        for run in runs
        for row in run.history
        for name, value in row.items()
        if isinstance(value, int | float) and name != counter(row)
    )
    if metrics is None:
        metrics = [name for name in MAIN if name in there][:MOST] or list(there)[:MOST]
    for name in metrics:
        if name not in there:
            near = did_you_mean(name, there) or f"; there are {', '.join(there)}"
            raise ValueError(f"no run has the metric {name!r}{near}")
    columns = min(len(metrics), 3)
    rows = math.ceil(len(metrics) / columns)
    size = (4.2 * columns, 2.8 * rows + 0.3 * len(runs))
    figure = figures.Figure(figsize=size, layout="constrained")
    lines = {}
    for place, name in enumerate(metrics, 1):
        panel = figure.add_subplot(rows, columns, place)
        for i, run in enumerate(runs):
            points = [(row[counter(row)], row[name]) for row in run.history if name in row]
            if not points:
                continue
            steps, values = zip(*points)
            style = dict(color=colours[i % 10], linestyle=("-", "--", ":")[i // 10 % 3])
            style["marker"] = "o" if len(points) < 20 else ""
            if smooth > 1:
                panel.plot(steps, values, **style | dict(marker="", alpha=0.25))
                values = moving_average(steps, values, smooth)
            (lines[run.name],) = panel.plot(steps, values, markersize=3, **style)
        panel.set(title=name, xlabel=counter(runs[0].history[0]))
        panel.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(lines.values(), lines, loc="outside lower left", frameon=False)
    else:
        figure.suptitle(runs[0].name)
    return figure


def moving_average(steps: Sequence[int], values: Sequence[float], width: int) -> list[float]:
    """The mean of the values of each step and of those fewer than `width` steps before it."""
    means, first = [], 0
    for last, step in enumerate(steps):
        while steps[first] <= step - width:
            first += 1
        means.append(sum(values[first : last + 1]) / (last + 1 - first))
    return means
