"""Op benchmarks: wrong ops are not timed, tables are right, and `make gpu` can be continued."""

import dataclasses
import functools
import importlib
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
import torch
from helpers import run

from rlhf_core import backends, cli, ops
from rlhf_core.benchmarks import OPS, cold, common, gpu
from rlhf_core.benchmarks.common import FLOOR, OURS, Case

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(monkeypatch):
    """Every size is the tiny one."""
    cases = common.cases
    monkeypatch.setattr(common, "cases", lambda op, size, device: cases(op, "tiny", device))


def nothing():
    pass


def case(**kwargs):
    return Case(
        {OURS: lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.02), "fast": nothing},
        **kwargs,
    )


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[pytest.mark.slow] * (op == "logprobs")) for op in OPS]
)
def test_every_case_is_right_and_runs(op, tmp_path, capsys):
    assert common.run([op], "tiny", "cpu", json_path=tmp_path / "new" / "rows.json") == 0
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())["rows"]
    assert [row["case"] for row in rows] == list(common.cases(op, "tiny", "cpu"))
    shown = capsys.readouterr().out
    for row in rows:
        assert row["check"] == "passed" and "failed" not in row and row["ms"][OURS] > 0
        assert len(row["ms"]) >= 2 and row["ratios"]
        assert f"| {row['case']} | {common.digits(row['ms'][OURS])} |" in shown


@pytest.mark.parametrize("op", OPS)
def test_cases_are_named_without_being_made(op):
    """Those for a GPU too, on a machine without one."""
    for size, device in itertools.product(("full", "sweep"), ("cpu", "cuda")):
        named = common.cases(op, size, device)
        assert size == "sweep" or named
        assert all(callable(make) for make in named.values())


@pytest.mark.parametrize(
    "op, function, wrong",
    [
        ("gae", "gae", lambda r, v, m, **_: (r + v, r)),
        ("logprobs", "token_logprobs", lambda z, y, **_: z.sum(-1)),
        ("kl", "full_kl", lambda a, b: (a - b).sum(-1)),
        ("policy_loss", "ppo_loss", lambda a, b, c, d, *_, **k: ((a - b).mean() + d.mean(), None)),
        ("decode_attention", "decode_attention", lambda q, *_, **k: q * 2),
        (
            "sampling",
            "sample_tokens",
            lambda z, *_, **k: ops.sampling.Sample(z.argmax(-1), z[:, 0], z[:, 0]),
        ),
        ("linear_logprobs", "linear_token_logprobs", lambda h, w, y, **_: (h @ w.T).amax(-1)),
    ],
)
def test_a_wrong_op_gets_no_figure_and_status_one(op, function, wrong, tiny, monkeypatch, capsys):
    module = importlib.import_module(f"rlhf_core.benchmarks.bench_{op}")
    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(SystemExit, match="gave wrong results"):
        cli.main(["bench", "--op", op, "--device", "cpu"])
    assert "| not timed |" in capsys.readouterr().out


def test_a_wrong_gradient_is_caught_too(tiny, monkeypatch):
    from rlhf_core.benchmarks import bench_logprobs

    right = bench_logprobs.token_logprobs

    def wrong(z, y, **kwargs):
        return right(z, y, **kwargs) + z[..., 0] - z[..., 0].detach()

    monkeypatch.setattr(bench_logprobs, "token_logprobs", wrong)
    make = common.cases("logprobs", "tiny", "cpu")
    make["fwd float32 (2, 3, 257)"]().checked()
    with pytest.raises(AssertionError):
        make["fwd + bwd float32 (2, 3, 257)"]().checked()


def test_a_row_has_ratios_slow_downs_and_bars():
    def broken():
        raise TypeError("another version\nof it")

    made = case(bytes=2_000_000, bars={"slow": 2, "fast": 1, "broken": 1})
    made.variants["broken"] = broken
    row = common.measure("op", "name", made, "full", "cpu")
    assert row["ratios"]["slow"] > 4 > 1 > row["ratios"]["fast"] and row["of floor"] is None
    assert row["GB/s"] == pytest.approx(2 / row["ms"][OURS])
    assert row["bars"] == [["slow", 2, True], ["fast", 1, False]]
    shown = common.table([row, {"op": "op", "case": "other", "check": "off\nby 1"}])
    assert "slow 2: met; fast 1: MISSED; no broken: TypeError: another version |" in shown
    assert [line.count("|") for line in shown.splitlines()] == [9] * 4
    assert shown.splitlines()[-1].startswith("| other | not timed |") and shown.endswith(
        "| off by 1 |"
    )


def test_an_error_is_relative_to_the_largest_value_of_the_truth():
    truth = torch.tensor([1.0, -4.0, 2.0], dtype=torch.float64)
    variants = {OURS: truth.float, "off": lambda: truth + 0.4, "other": lambda: truth[:2]}
    made = Case(variants, lambda: [truth])
    errors = common.measure("op", "name", made, "full", "cpu")["error"]
    assert errors == {OURS: 0, "off": pytest.approx(0.1), "other": None}


def test_a_short_call_is_timed_in_bundles_and_the_median_is_taken():
    calls = []
    quartiles = common.quartiles({OURS: lambda: calls.append(0)}, "cpu", False, rounds=9)
    assert (
        len(calls) > 1000 and quartiles[OURS][0] <= quartiles[OURS][1] <= quartiles[OURS][2] < 1e-4
    )


def test_peak_memory_is_the_most_that_a_call_holds_at_once():
    def call():
        x = torch.ones(2**24)  # 64 MiB
        return (x + 1).sum()  # as much again

    peak = common._resident_peak(call)
    if peak is None:
        pytest.skip("this system does not report it")
    assert peak == pytest.approx(2**27, rel=0.1)


@pytest.mark.slow
def test_a_twin_runs_its_variant_in_a_process_with_that_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_CORE_BACKEND", raising=False)
    name = "gae fwd (3, 70)"
    assert common.Twin({}, "gae", "tiny", name).call(OURS) is None
    with pytest.raises((EOFError, ConnectionError)):  # no such backend: the twin ends
        common.Twin({"RLHF_CORE_BACKEND": "none"}, "gae", "tiny", name).call(OURS)


@pytest.mark.slow
def test_peak_memory_makes_a_bar():
    name = "fwd + bwd float32 (2, 5, 16) V 257"
    made = common.cases("linear_logprobs", "tiny", "cpu")[name]()
    made.peaks = ["plain"]
    row = common.measure("linear_logprobs", name, made, "tiny", "cpu")
    assert set(row["peak MB"]) == {OURS, "plain"}


def test_calls_after_other_work_are_timed_in_turns(monkeypatch, capsys):
    for name, value in (("SHAPE", (4, 8)), ("OTHER_WORK", 2**10), ("PAUSE", 0.01)):
        monkeypatch.setattr(cold, name, value)
    done = []
    monkeypatch.setattr(cold.time, "sleep", lambda seconds: done.append(seconds))
    monkeypatch.setattr(sys, "argv", ["cold", "--rounds", "3"])
    cold.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split(" | ")[1:] == ["no gaps", "gaps |"] and len(rows) in (3, 5)
    assert [row.split(" | ")[0] for row in rows][:2] == ["| repeated", "| caches are cold"]
    sleeps = 1 if len(rows) == 3 else 2  # conditions in which threads fall asleep
    assert done == [0.01] * (3 * 2 * sleeps)


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert common.missing("cuda") == ["liger-kernel"] and common.missing("cpu") == []
    assert common.peer("liger_kernel.transformers") is None


@pytest.mark.parametrize("grows", [False, True])
def test_the_picture_is_written(grows, tmp_path):
    pytest.importorskip("matplotlib")
    rows = []
    for i in range(4):
        row = {
            "op": f"op{i % 2}",
            "case": f"case {i}",
            "ms": {OURS: 1.0 + i, "eager": 3.0, FLOOR: 0.5},
            "of floor": 0.5,
        }
        rows.append(row | ({"grows": (f"V, panel {i % 2}", 2**i)} if grows else {}))
    common.plot(rows, "machine", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_refused_before_anything_is_timed(
    tiny, tmp_path, monkeypatch, capsys
):
    find_spec = common.importlib.util.find_spec
    found = lambda name: None if name == "matplotlib" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(common.importlib.util, "find_spec", found)
    assert cli.main(["bench", "--device", "cpu", "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'rlhf-core[report]'" in capsys.readouterr().err


def test_the_command_prints_the_table_and_writes_json_and_picture(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "rows.json", tmp_path / "roof.png"]
    options = ["--op", "gae", "--device", "cpu", "--json", files[0], "--plot", files[1]]
    assert run("bench", *options) == 0
    shown, threads = capsys.readouterr().out, torch.get_num_threads()
    assert torch.__version__ in shown and f"threads {threads}" in shown and "x TRL" in shown
    assert json.loads(files[0].read_text())["machine"]["threads"] == threads
    assert files[1].stat().st_size


def test_pytest_benchmark_gets_the_row_and_times_ours(tiny):
    class Benchmark:
        extra_info = {}  # noqa: RUF012

        def pedantic(self, call, **_):
            self.result = call()

    benchmark = Benchmark()
    common.record(benchmark, "gae", "gae fwd (3, 70)")
    assert {"ms", "GB/s", "of floor", "ratios", "threads", "torch", "device"} <= set(
        benchmark.extra_info
    )
    assert len(benchmark.result) == 2  # advantages and returns


@pytest.mark.slow
def test_pytest_finds_every_case_and_keeps_the_repository_off_the_path(tmp_path):
    (tmp_path / "spy.py").write_text(
        "import sys\n"
        "def pytest_collection_finish(session):\n"
        f"    assert {str(ROOT)!r} not in sys.path and '' not in sys.path\n"
    )
    code = f"import sys, pytest; sys.path[0] = {str(tmp_path)!r}; "
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-p", "spy", "--collect-only", "--import-mode=importlib"]
    command = [sys.executable, "-c", code, *options, "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for op in OPS:
        for name in common.cases(op, "full", common.device()):
            assert f"benchmarks/bench_{op}.py::test_{op}[{name}]" in done.stdout


# ---- make gpu


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Fake parts that each add a letter to a file. Returns a function that reads the letters."""
    runs = tmp_path / "runs"

    def part(letter, then, seconds=60, more=()):
        code = f"import os, time; runs = open({str(runs)!r}, 'a+'); runs.write('{letter}'); "
        code += f"runs.flush(); runs.seek(0); first = runs.read().count('{letter}') == 1; {then}"
        return gpu.Part([sys.executable, "-c", code, *more], seconds)

    rows = {"rows": [{"op": "gae", "case": "fwd", "check": "off by 1"}]}
    found = {
        "bench gae": part(
            "b", f"open(os.environ['RLHF_CORE_BENCH_ROWS'], 'w').write('{json.dumps(rows)}')"
        ),
        "memcheck": gpu.Part([], 60),
        "racecheck": part(
            "r", "print('Device not supported'); exit(9)", more=["--tool", "racecheck"]
        ),
        "tests": part("t", "print('why'); exit(first)"),
        "slow": part("s", "time.sleep(60 * first)", seconds=2),
    }
    monkeypatch.setattr(gpu, "parts", lambda root, size, device: found)
    return runs.read_text


@pytest.mark.slow
def test_make_gpu_runs_every_part_once_and_failed_ones_again(parts, tmp_path, capsys):
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "x.py"
    source.write_text("1")
    results = tmp_path / "results"
    assert gpu.run(tmp_path, results, "tiny", "cpu") == 2  # "tests" and "slow"
    assert parts() == "brts"
    shown = capsys.readouterr().out
    assert (
        "memcheck: skipped: compute-sanitizer is not installed (0 s)" in shown
        and "why\nexit: 1" in shown
    )
    assert (
        "racecheck: skipped: compute-sanitizer does not support" in shown
        and "stopped after 2 s" in shown
    )
    for _ in range(2):  # the second has nothing left to do
        assert gpu.run(tmp_path, results, "tiny", "cpu") == 0
        assert parts() == "brts" + "ts"
    (path,) = results.glob("*.json")
    data = json.loads(path.read_text())
    assert data["machine"] == common.machine("cpu") and data["parts"]["tests"]["status"] == "passed"
    table = path.with_suffix(".md").read_text()
    assert "| tests | passed |" in table and "| fwd | not timed |" in table
    source.write_text("2")
    gpu.run(tmp_path, results, "tiny", "cpu")
    assert parts() == "brtsts" + "brts"


def test_make_gpu_stops_in_time_and_leaves_the_rest_for_the_next_run(parts, tmp_path, capsys):
    results = tmp_path / "results"
    assert gpu.SECONDS < 480
    assert gpu.run(tmp_path, results, "tiny", "cpu", seconds=gpu.LEAST_SECONDS - 1) == 5
    assert not (tmp_path / "runs").exists()
    (table,) = results.glob("*.md")
    assert table.read_text().count(f"| {gpu.NOT_RUN} | 0 |") == 5
    assert "bench gae: not run" in capsys.readouterr().out


def test_make_gpu_writes_the_table_after_every_part(parts, tmp_path, monkeypatch):
    """A run that is cut at any time leaves what is done, and the next one continues."""
    done = []

    def cut(part):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(part)
        return {"status": "passed", "seconds": 1}

    monkeypatch.setattr(gpu, "run_part", cut)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(tmp_path, tmp_path, "tiny", "cpu")
    (table,) = tmp_path.glob("*.md")
    assert table.read_text().count("| passed | 1 |") == 2
    data = json.loads(table.with_suffix(".json").read_text())
    assert list(data["parts"]) == ["bench gae", "memcheck"]


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[pytest.mark.slow] * (op == "gae")) for op in OPS]
)
def test_make_gpu_times_every_op_on_a_fake_gpu(op, tmp_path, monkeypatch, capsys):
    """Triton's interpreter, CUDA events, peaks of memory, and the table."""
    if torch.cuda.is_available() or not backends.status()[2].available:
        pytest.skip("needs Triton's interpreter")
    cases = common.cases

    def first(op, size, device):
        """The first case, with peaks of memory: the interpreter is slow."""
        name, make = next(iter(cases(op, size, device).items()))

        def with_peaks():
            made = make()
            return dataclasses.replace(made, peaks=[*made.variants][1:2])

        return {name: with_peaks}

    monkeypatch.setattr(common, "cases", first)
    monkeypatch.setattr(common, "quartiles", functools.partial(common.quartiles, rounds=2))
    monkeypatch.setenv("RLHF_CORE_BENCH_ROWS", str(tmp_path / "rows.json"))
    with fake_gpu.install(monkeypatch.setattr), np.errstate(all="ignore"):
        assert gpu.bench(op, "tiny", "cuda") == 0
    data = json.loads((tmp_path / "rows.json").read_text())
    assert data["machine"]["device"] == "Fake GPU"
    for row in data["rows"]:
        assert row["check"] == "passed" and "failed" not in row and "peak MB" in row
    shown = gpu.markdown(data["machine"], {f"bench {op}": {**data, "status": "x", "seconds": 1}})
    assert ("wins" in shown) == (op == "linear_logprobs")


@pytest.mark.slow
def test_the_parts_of_make_gpu_run():
    parts = gpu.parts(ROOT, "tiny", "cpu")
    assert set(parts) >= {f"bench {op}" for op in OPS}
    bench = gpu.run_part(parts["bench gae"])
    assert bench["status"] == "passed" and all(row["check"] == "passed" for row in bench["rows"])
    assert gpu.check("cpu") == 0  # what the sanitizer runs
    command = [*parts["tests"].command, "--collect-only"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"tests/ops/test_{op}.py::" in done.stdout for op in OPS)
    assert "[triton" in done.stdout and gpu.AHEAD_OF_TIME not in done.stdout


@pytest.mark.slow
def test_make_gpu_without_a_gpu_stops():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rlhf_core.benchmarks.gpu", str(ROOT)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr
