"""Pictures of runs and of evaluations, as figures of matplotlib.

Left out: tables of final values, and lists, such as the Elo ratings of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_core.files import parse_json, read_object, require
from rlhf_core.options import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAIN = (  # drawn unless others are asked for, at most MOST of them
    "objective/scores", "objective/kl", "loss", "eval_loss", "rewards/accuracies",
    "eval_rewards/accuracies", "rewards/margins", "accuracy", "eval_accuracy",
    "mean_token_accuracy", "policy/entropy_avg", "entropy", "response_length", "grad_norm",
)  # fmt: skip
MOST = 6
SCORE, KL = "objective/scores", "objective/kl"  # per response; KL in nats
POINTS = 20_000  # of all curves of a panel together
Point = tuple[float, float]


class Run(NamedTuple):
    """The metrics of a run.

    Attributes:
        name: In the legend.
        history: The metrics of each step or round, with its number as `step` or `round`.
        fault: Why the history is not that of a whole run; None if it is.
        facts: What run.json holds; None if there is none.
    """

    name: str
    history: list[dict[str, float]]
    fault: str | None = None
    facts: dict[str, Any] | None = None


def read_run(folder: Path, name: str, most: int | None = None) -> Run:
    """Read metrics.jsonl and run.json of a run's folder.

    Damaged lines end the history and are named in `fault`.

    Args:
        folder: The run's folder.
        name: The run's name in legends.
        most: A history of more lines than this is read in part: the first line, the last one, and
            every 10th, or 100th, and so on between them.

    Raises:
        FileNotFoundError: There is no metrics.jsonl.
        ValueError: It has no whole line.
    """
    path, history, fault, facts = folder / "metrics.jsonl", [], None, None
    for number, line in _lines(path, most):
        try:
            row = parse_json(line.decode())
            counted = isinstance(row, dict) and type(row.get(counter(row))) is int
        except ValueError:
            counted = False
        if not counted or not line.endswith(b"\n"):
            fault = f"{path}:{number}: a damaged line; the curves end before it"
            break
        history.append(row)
    if not history:
        raise ValueError(f"{path}: no metrics; the run has not finished a step")
    file = folder / "run.json"
    if file.is_file():
        try:
            facts = read_object(file)
        except ValueError as error:
            fault = fault or str(error)
        if fault is None and facts is not None and facts.get("status") != "finished":
            last, total = history[-1][counter(history[-1])], facts.get("total_steps")
            done = f"{last} of {total} {counter(history[0])}s"
            fault = f"{folder}: not finished ({facts.get('status')}), {done}"
    return Run(name, history, fault, facts)


def _lines(path: Path, most: int | None) -> Iterator[tuple[int, bytes]]:
    """Lines of a file with their numbers, as `read_run` reads them."""
    with open(path, "rb") as file:
        size = len(file.readline())
        count, every = path.stat().st_size / max(size, 1), 1
        # Of every 10th line, not every 7th, the evaluations every 50 or 100 steps are a part.
        while most and count > most * every:
            every *= 10
        file.seek(0)
        number, line = 0, b""
        for number, line in enumerate(file, 1):
            if number == 1 or number % every == 0:
                yield number, line
        if number > 1 and number % every:
            yield number, line


def counter(row: dict) -> str:
    """What numbers the rows of a history."""
    return "round" if "round" in row else "step"


def colours_of(runs: int) -> list[dict[str, Any]]:
    """A colour and a line style for each run."""
    colours = require("matplotlib", "report").colormaps["tab10"].colors
    styles = ("-", "--", ":")
    return [dict(color=colours[i % 10], linestyle=styles[i // 10 % 3]) for i in range(runs)]


def draw_curves(
    runs: Sequence[Run],
    metrics: Sequence[str] | None = None,
    smooth: int = 1,
    legend: bool = True,
) -> Figure:
    """Draw a panel for each metric, with a curve for each run that has it.

    Of a long curve the lowest and the highest value of each stretch of steps are drawn.

    Args:
        runs: At least one.
        metrics: Their names. None means the main ones that the runs have.
        smooth: Steps of a moving average. Above 1 the values themselves are drawn pale.
        legend: Name the runs: beside the panels, or a single one above them.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
        ValueError: No run has a metric.
    """
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
    figure, panels = _panels(len(metrics), 0.3 * len(runs) * legend)
    counts = next(counter(row) for run in runs for row in run.history)
    lines, most = {}, max(100, POINTS // len(runs))
    for panel, name in zip(panels, metrics):
        for run, style in zip(runs, colours_of(len(runs))):
            points = points_of(run, name)
            if not points:
                continue
            style["marker"] = "o" if len(points) < 20 else ""
            if smooth > 1:
                pale = style | dict(marker="", alpha=0.25)
                panel.plot(*zip(*_thinned(points, most)), **pale)
                steps, values = zip(*points)
                points = list(zip(steps, moving_average(steps, values, smooth)))
            (lines[run.name],) = panel.plot(*zip(*_thinned(points, most)), markersize=3, **style)
        panel.set(title=name, xlabel=counts)
    if legend and len(runs) > 1:
        figure.legend(lines.values(), lines, loc="outside lower left", frameon=False)
    elif legend:
        figure.suptitle(runs[0].name)
    return figure


def draw_against_kl(runs: Sequence[Run], parts: int = 40) -> Figure:
    """Draw the score of each run that has one against the root of its KL to the reference.

    Args:
        runs: Some may have no score or KL.
        parts: Points of a run, each the mean of a stretch of its steps.
    """
    figure, (panel,) = _panels(1)
    for run, style in zip(runs, colours_of(len(runs))):
        kls, size = dict(points_of(run, KL)), math.ceil(len(run.history) / parts) or 1
        rows = [(kls[step], score) for step, score in points_of(run, SCORE) if step in kls]
        means = [
            tuple(sum(column) / len(column) for column in zip(*rows[i : i + size]))
            for i in range(0, len(rows), size)
        ]
        roots = [math.sqrt(max(kl, 0)) for kl, _ in means]
        panel.plot(roots, [score for _, score in means], marker="o", markersize=3, **style)
    panel.set(title="score against KL, in training", xlabel="√KL to the reference (KL in nats)")
    panel.set(ylabel=SCORE)
    return figure


def draw_policies(evaluations: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw the mean scores of policies against the root of their KL, with standard errors.

    Args:
        evaluations: The policies of each evaluation.json by its name, a panel each: with the
            scores of a proxy and of gold, over-optimisation is where one rises and the other falls.
    """
    figure, panels = _panels(len(evaluations))
    for panel, (name, policies) in zip(panels, evaluations.items()):
        places = {}
        for policy in policies:
            place = math.sqrt(max(policy["kl"]["mean"], 0)), policy["score"]["mean"]
            error = policy["score"]["standard_error"] or 0
            panel.errorbar(*place, yerr=error, color="tab:blue", marker="o", markersize=4)
            places[policy["name"]] = place
        panel.set(title=name, xlabel="√KL to the reference (KL in nats)", ylabel="score")
        _name_points(panel, places)
    return figure


def draw_frontier(frontier: dict[str, Any]) -> Figure:
    """Draw policies by harmlessness (x) and helpfulness (y), and the frontier of the best."""
    figure, (panel,) = _panels(1)
    best, places = [], {}
    for point in frontier["points"]:
        place = point["harmlessness"], point["helpfulness"]
        best += [place] * point["on_frontier"]
        panel.plot(*place, color="tab:blue" if point["on_frontier"] else "tab:gray", marker="o")
        places[point["name"]] = place
    panel.step(*zip(*sorted(best)), where="pre", color="tab:blue", alpha=0.4)
    panel.set(title="frontier", xlabel="harmlessness", ylabel="helpfulness")
    _name_points(panel, places)
    return figure


def _panels(count: int, below: float = 0) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows of three, and inches of room below them."""
    figures = require("matplotlib.figure", "report")
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    size = (4.2 * columns, 2.8 * rows + below)
    figure = figures.Figure(figsize=size, layout="constrained")
    panels = [figure.add_subplot(rows, columns, place) for place in range(1, count + 1)]
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure, panels


def _name_points(panel: Axes, places: dict[str, Point]) -> None:
    """Write the names beside the points. Where points are close, the later one is named."""
    panel.margins(x=0.25, y=0.15)
    panel.autoscale_view()
    named: list[Point] = []
    for name, place in reversed(places.items()):
        x, y = panel.transAxes.inverted().transform(panel.transData.transform(place))
        if all(abs(x - left) > 0.25 or abs(y - low) > 0.08 for left, low in named):
            panel.annotate(name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
            named.append((x, y))


def points_of(run: Run, metric: str) -> list[Point]:
    """The steps of a run at which the metric is a number that can be drawn, with its values."""
    rows = ((row[counter(row)], row.get(metric)) for row in run.history)
    return [(x, y) for x, y in rows if isinstance(y, int | float) and abs(y) < 1e300]


def _thinned(points: list[Point], most: int) -> list[Point]:
    """At most `most` of the points: the lowest and the highest of each stretch."""
    size = math.ceil(2 * len(points) / most) if len(points) > most else 1
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    height = lambda point: point[1]  # noqa: E731
    return [
        point
        for part in stretches
        for point in sorted({min(part, key=height), max(part, key=height)})
    ]


def moving_average(steps: Sequence[int], values: Sequence[float], width: int) -> list[float]:
    """The mean of the values of each step and of those fewer than `width` steps before it."""
    means, first = [], 0
    for last, step in enumerate(steps):
        while steps[first] <= step - width:
            first += 1
        means.append(sum(values[first : last + 1]) / (last + 1 - first))
    return means
