"""Monitors of over-optimisation: the reward that a policy is trained on rises, while a judge, the
length of its responses, or the spread of an ensemble says that it gets worse.

A series is cut into windows: an evaluation is one, and so are 10 steps. Its trend over the last 10
windows is tested after Mann (1945) and Kendall (1975).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

STEPS = 10  # of a window, for the metrics of steps
WINDOWS = 10  # that a test looks at
MIN_WINDOWS = 6
SIGNIFICANT = 0.01  # one-sided


class Monitor(NamedTuple):
    """A reward and a metric that may contradict it.

    Attributes:
        proxy: The metric whose rise is in doubt.
        other: The metric that may contradict it.
        sign: 1 if a rise of `other` does, -1 if a fall does.
        least: Relative change of `other`, from the first to the last window, that counts.
        advice: What it may mean, and what to do.
    """

    proxy: str
    other: str
    sign: int
    least: float
    advice: str


_LONGER = "Perhaps length is rewarded: read the samples, and see length_penalty"
MONITORS = (
    Monitor("eval_reward", "eval_win_rate", -1, 0.0, "The judge disagrees: stop earlier, or raise "
            "kl_coef"),
    Monitor("eval_reward", "eval_spread", 1, 0.2, "The ensemble's models disagree more: the policy "
            "leaves what they were trained on. Stop earlier, or raise kl_coef"),
    Monitor("eval_reward", "eval_length", 1, 0.2, _LONGER),
    Monitor("objective/scores", "response_length", 1, 0.2, _LONGER),
)  # fmt: skip


def alarms(history: Sequence[dict[str, float]], eval_every: int | None) -> dict[Monitor, str]:
    """The monitors that contradict the reward at the last step, with a message for each.

    Args:
        history: Metrics of the steps 1, 2, ...
        eval_every: Steps between evaluations; None: there are none on the way.
    """
    found = {}
    for monitor in MONITORS:
        evaluated = monitor.proxy.startswith("eval_")
        size = eval_every if evaluated else STEPS
        if size is None or len(history) % size:
            continue
        lines = history[-WINDOWS * size :]
        proxy = _windows(lines, size, monitor.proxy, evaluated)
        other = _windows(lines, size, monitor.other, evaluated)
        if min(len(proxy), len(other)) < MIN_WINDOWS:
            continue
        p_proxy, p_other = trend(proxy), trend([monitor.sign * x for x in other])
        counts = monitor.sign * (other[-1] - other[0]) >= monitor.least * abs(other[0])
        if max(p_proxy, p_other) < SIGNIFICANT and counts:
            way = "rose" if monitor.sign > 0 else "fell"
            found[monitor] = (
                f"{monitor.proxy} rose from {proxy[0]:.4g} to {proxy[-1]:.4g} (p = {p_proxy:.2g}) "
                f"while {monitor.other} {way} from {other[0]:.4g} to {other[-1]:.4g} "
                f"(p = {p_other:.2g}) in the last {len(lines)} steps. {monitor.advice}"
            )
    return found


def _windows(
    lines: Sequence[dict[str, float]], size: int, name: str, is_evaluation: bool
) -> list[float]:
    """The metric's mean in each window; none if a window lacks it."""
    means = []
    for start in range(0, len(lines), size):
        window = lines[start : start + size]
        values = [line[name] for line in (window[-1:] if is_evaluation else window) if name in line]
        if not values or not all(map(math.isfinite, values)):
            return []
        means.append(statistics.fmean(values))
    return means


def trend(values: Sequence[float]) -> float:
    """One-sided p-value of a rise, by the Mann-Kendall test; 1 without any.

    The normal approximation, with corrections for continuity and ties. Source: Mann 1945.
    """
    n = len(values)
    rises = sum(
        (values[j] > values[i]) - (values[j] < values[i]) for i in range(n) for j in range(i + 1, n)
    )
    ties = [values.count(x) for x in set(values)]
    variance = (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
    if rises <= 0:
        return 1.0
    return 0.5 * math.erfc((rises - 1) / math.sqrt(2 * variance))
