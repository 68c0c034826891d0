"""`rlhf-core bench --shape B T V`: what each op gains at the user's own shape.

An op's table has a line for each implementation of each case. Recommendations stand under it. The
bars of our own shapes do not apply. decode_attention, which knows no V, is left out.
"""

from collections.abc import Sequence
from pathlib import Path

from rlhf_core import backends
from rlhf_core.benchmarks import OPS, common
from rlhf_core.benchmarks.common import FLOOR, OURS, Shape, digits

SHAPED = tuple(op for op in OPS if op != "decode_attention")
WITHOUT_LOGITS = ("gae", "policy_loss")
COLUMNS = ["case", "backend", "ms", "spread", "of floor", "peak MB", "error"]


def run(
    ops: Sequence[str] | None,
    shape: Shape,
    device: str,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> int:
    """Print each op's table and recommendations. Returns how many checks failed.

    Args:
        ops: those to time; None: all that the shape describes.

    Raises:
        ValueError: an op has no such shape, or needs a width; no op reads the width or the dtype;
            the memory is too small.
    """
    if ops is None:
        ops = [op for op in SHAPED if op != "linear_logprobs" or shape.D]
    for op in ops:
        if op not in SHAPED:
            raise ValueError(f"--op {op} has no --shape; choose from {', '.join(SHAPED)}")
        if op == "linear_logprobs" and shape.D is None:
            raise ValueError(f"--op {op} needs --width, the width of the hidden states")
        shape.check_memory(op, device)
    if shape.D is not None and "linear_logprobs" not in ops:
        raise ValueError("--width is for linear_logprobs, which --op leaves out")
    if shape.dtype != "float32" and set(ops) <= set(WITHOUT_LOGITS):
        raise ValueError(f"--dtype is of logits, and {' and '.join(ops)} reads none")
    backend = backends.of_device(device).name
    return common.run(ops, shape, device, json_path, plot_path, lambda rows: report(rows, backend))


def report(rows: list[dict], backend: str) -> str:
    """The table as Markdown, then a line for each case: what to use, or why there is no figure."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    notes = []
    for row in rows:
        case = row["case"]
        if row["check"] != "passed":
            notes.append(f"{case}: not timed, {' '.join(row['check'].split())}")
            continue
        for name in sorted(row["ms"], key=lambda name: (name == FLOOR, row["ms"][name])):
            lines.append("| " + " | ".join([case, *_cells(row, name, backend)]) + " |")
            case = ""
        notes.append(recommendation(row))
        notes += [f"  no {name}: {error}" for name, error in row.get("failed", {}).items()]
    return "\n".join([*lines, "", *notes])


def _cells(row: dict, name: str, backend: str) -> list[str]:
    ms, floor = row["ms"][name], row["ms"].get(FLOOR)
    low, high = row["quartiles ms"][name]
    cells = [digits(ms), f"{(high - low) / ms:.0%}", f"{floor / ms:.0%}" if floor else ""]
    if name == FLOOR:
        unit, work = ("GB/s", "memory") if "GB/s" in row else ("GFLOP/s", "products")
        rate = row[unit] * row["ms"][OURS] / ms
        return [f"floor: {work} at {digits(rate)} {unit}", *cells, "", ""]
    peak, error = row.get("peak MB", {}).get(name), row["error"][name]
    name = f"{OURS} ({backend})" if name == OURS else name
    return [
        name,
        *cells,
        "" if peak is None else f"{peak:.1f}",
        "" if error is None else f"{error:.0e}",
    ]


def recommendation(row: dict) -> str:
    """Names the faster one of ours and the best baseline, and how much it saves."""
    case, ms, ranges = row["case"], row["ms"], row["quartiles ms"]
    others = [name for name in ms if name not in (OURS, FLOOR)]
    if not others:
        return f"{case}: use {OURS}; nothing else ran here"
    best = min(others, key=lambda name: ms[name])
    first, second = (OURS, best) if ms[OURS] <= ms[best] else (best, OURS)
    if ranges[first][1] >= ranges[second][0]:  # the interquartile ranges overlap
        first, second = OURS, best
        text = f"{case}: {OURS} and {best} are equally fast within their spread"
    else:
        saved = f"{digits(ms[second] - ms[first])} of {digits(ms[second])} ms"
        text = f"{case}: use {first}, which saves {saved} against {second}"
    peaks = [row.get("peak MB", {}).get(name) for name in (first, second)]
    difference = 0 if None in peaks else peaks[1] - peaks[0]
    if abs(difference) < 0.05:
        return text
    return f"{text}; {first} needs {abs(difference):.1f} MB {'less' if difference >= 0 else 'more'}"
