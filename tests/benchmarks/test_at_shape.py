"""`rlhf-core bench --shape`: a table and recommendations for the user's own shape."""

import json
import re

import pytest
from helpers import run

from rlhf_core.benchmarks import at_shape, bench_gae, common
from rlhf_core.benchmarks.common import FLOOR, OURS, Shape

SHAPE = ("--shape", 2, 5, 67, "--device", "cpu")


class FakeTwin:
    def __init__(self, environment, *what):
        self.what = what

    def peak_bytes(self, variant):
        return 3e6 if variant == OURS else 5e6


@pytest.fixture
def quick(monkeypatch):
    """Compiles nothing and starts no processes."""
    monkeypatch.setattr(common, "compiled", lambda f: f)
    monkeypatch.setattr(common, "Twin", FakeTwin)


@pytest.mark.parametrize("dtype, name", [("bf16", "bfloat16"), ("float16", "float16")])
@pytest.mark.parametrize("op", at_shape.SHAPED)
def test_an_op_at_a_shape_is_compared_with_float64_and_recommended(
    op, dtype, name, quick, tmp_path, capsys
):
    file = tmp_path / "rows.json"
    logits = () if op in at_shape.WITHOUT_LOGITS else ("--dtype", dtype)
    width = ("--width", 8) if op == "linear_logprobs" else ()
    assert run("bench", *SHAPE, *logits, *width, "--op", op, "--json", file) == 0
    shown = capsys.readouterr().out
    assert f"| {' | '.join(at_shape.COLUMNS)} |" in shown
    rows = json.loads(file.read_text())["rows"]
    named = common.cases(op, Shape(2, 5, 67, name, 8), "cpu")
    assert [row["case"] for row in rows] == list(named)
    for row in rows:
        assert row["check"] == "passed" and not row["bars"] and "failed" not in row
        assert {OURS, FLOOR} < set(row["ms"])
        assert set(row["error"]) == set(row["ms"]) - {FLOOR}
        for error in row["error"].values():  # a draw has no truth; 16-bit results round
            assert op == "sampling" if error is None else 0 <= error < 0.05
        assert f"\n| {row['case']} | " in shown and f"\n{row['case']}: " in shown
    assert shown.count("| rlhf_core (cpp) |") == shown.count("| floor: ") == len(rows)
    recommended = re.findall(r"(?:rlhf_core needs 2.0 MB less|needs 2.0 MB more)$", shown, re.M)
    assert len(recommended) == len(rows)  # by the memory of FakeTwin; the faster one may be any


def test_without_op_every_op_that_the_shape_describes_is_timed(monkeypatch):
    timed = []
    monkeypatch.setattr(common, "run", lambda ops, *rest: timed.append(list(ops)) or 0)
    assert run("bench", *SHAPE) == run("bench", *SHAPE, "--width", 4) == 0
    assert set(timed[1]) == set(at_shape.SHAPED) == {*timed[0], "linear_logprobs"}
    assert "linear_logprobs" not in timed[0]


def row(ours, eager, peaks=None):
    """A row with the quartiles of two variants."""
    times = {OURS: ours, "eager": eager}
    found = {"case": "fwd", "ms": {name: x[1] for name, x in times.items()}}
    found["quartiles ms"] = {name: [x[0], x[2]] for name, x in times.items()}
    return found | ({"peak MB": dict(zip(times, peaks))} if peaks else {})


@pytest.mark.parametrize(
    "row, text",
    [
        (
            row((1, 2, 3), (7, 8, 9), (10, 30)),
            "use rlhf_core, which saves 6.0 of 8.0 ms against eager; rlhf_core needs 20.0 MB less",
        ),
        (
            row((7, 8, 9), (1, 2, 3), (10, 30)),
            "use eager, which saves 6.0 of 8.0 ms against rlhf_core; eager needs 20.0 MB more",
        ),
        (
            row((1, 2, 5), (4, 6, 9), (30, 10)),
            "rlhf_core and eager are equally fast within their spread; rlhf_core needs 20.0 MB "
            "more",
        ),
        (
            row((1, 2, 3), (7, 8, 9), (10, 10)),
            "use rlhf_core, which saves 6.0 of 8.0 ms against eager",
        ),
    ],
)
def test_the_recommendation_names_the_faster_one_and_what_it_saves(row, text):
    assert at_shape.recommendation(row) == f"fwd: {text}"


@pytest.mark.parametrize(
    "options, message",
    [
        (("--shape", 2, 0, 9), "argument --shape: must be at least 1, got 0"),
        ((*SHAPE, "--op", "logits"), "argument --op: must be one of logprobs, "),
        ((*SHAPE, "--dtype", "half"), "got 'half'; did you mean bfloat16?"),
        ((*SHAPE, "--op", "decode_attention"), "--op decode_attention has no --shape; choose from"),
        ((*SHAPE, "--op", "linear_logprobs"), "--op linear_logprobs needs --width"),
        ((*SHAPE, "--op", "kl", "--width", 8), "--width is for linear_logprobs, which --op"),
        ((*SHAPE, "--op", "gae", "--dtype", "bf16"), "--dtype is of logits, and gae reads none"),
        ((*SHAPE, "--sweep"), "--shape contradicts --sweep"),
        (("--dtype", "bf16"), "--dtype needs --shape"),
        (("--width", 8), "--width needs --shape"),
        (
            ("--shape", 4096, 4096, 10**6, "--device", "cpu", "--dtype", "bf16"),
            "logprobs at shape 4096 4096 1000000 in bfloat16 needs up to 2.01e+05 GB, and ",
        ),
    ],
)
def test_a_bad_shape_is_one_line_and_status_two(options, message, capsys, tmp_path):
    try:
        status = run("bench", *options, "--json", tmp_path / "rows.json")
    except SystemExit as stop:  # of argparse
        status = stop.code
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "error" in line]
    assert status == 2 and message in line and not shown.out and not list(tmp_path.iterdir())


def test_a_baseline_beyond_the_memory_is_left_out_with_the_reason(quick, monkeypatch, capsys):
    monkeypatch.setattr(common, "free_memory", lambda device: 8192 * 67 + 20_000)  # fits ours
    assert run("bench", *SHAPE, "--op", "kl") == 0
    shown = capsys.readouterr().out
    assert "full fwd float32 (2, 5, 67): use rlhf_core; nothing else ran here" in shown
    assert "  no eager: ValueError: kl at shape 2 5 67 in float32 needs up to " in shown


def test_a_wrong_result_gets_no_figure_and_status_one(quick, monkeypatch, capsys):
    monkeypatch.setattr(bench_gae, "gae", lambda r, v, m, **_: (r + v, r))
    with pytest.raises(SystemExit, match="gave wrong results"):
        run("bench", *SHAPE, "--op", "gae")
    shown = capsys.readouterr().out
    assert "ppo_advantages (2, 5): not timed, AssertionError" in shown


@pytest.mark.slow
def test_the_peak_memory_at_a_shape_is_that_of_a_process_of_its_own(tmp_path):
    file = tmp_path / "rows.json"
    options = ("--op", "gae", "--device", "cpu", "--json", file)
    assert run("bench", "--shape", 8192, 64, 9, *options) == 0
    peaks = json.loads(file.read_text())["rows"][0]["peak MB"]
    if peaks[OURS] is None:
        pytest.skip("this system does not report it")
    assert set(peaks) == {OURS, "torch (T, B)", "numpy (T, B)", "TRL"}
    assert 3 < peaks[OURS] < peaks["TRL"]  # two results of 2.1 MB; a loop has columns as well
