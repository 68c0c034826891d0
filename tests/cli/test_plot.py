"""The commands that draw runs, and the page that training writes."""

import json
import sys

import pytest
from helpers import run, write

from rlhf_core.cli import arguments
from rlhf_core.evaluation.curves import read_run
from rlhf_core.evaluation.report import try_report

pytest.importorskip("matplotlib")
HISTORY = [{"step": i, "loss": 1 / i, "lr": 0.1} for i in range(1, 31)]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "metrics.jsonl", HISTORY)
    return tmp_path


@pytest.mark.parametrize(
    "suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_the_command_writes_a_picture_and_replaces_none_unasked(folder, suffix, start, fails):
    out = folder / f"curves.{suffix}"
    assert run("plot", folder, "--out", out) == 0
    assert out.read_bytes().startswith(start)
    out.write_text("mine")
    assert "pass --overwrite" in fails("plot", folder, "--out", out)
    assert out.read_text() == "mine"
    assert run("plot", folder, "--out", out, "--overwrite", "--metrics", "lr", "--smooth", 2) == 0


def test_unfinished_and_damaged_runs_are_named(folder, capsys):
    status = {"status": "interrupted", "total_steps": 50}
    (folder / "run.json").write_text(json.dumps(status))
    assert run("plot", folder, "--out", folder / "a.png") == 0
    assert f"{folder}: not finished (interrupted), 30 of 50 steps" in capsys.readouterr().err
    (folder / "run.json").write_text(json.dumps(status | {"status": "finished"}))
    assert read_run(folder, "a").fault is None
    for damage in ('{"step": 31, "lo', '{"loss": 1}\n', "[1]\n", "\n"):
        write(folder / "metrics.jsonl", HISTORY)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(damage)
        found = read_run(folder, "a")
        assert found.history == HISTORY
        assert f"{folder / 'metrics.jsonl'}:31: a damaged line" in found.fault


def test_what_cannot_be_drawn_is_named(folder, fails, tmp_path, monkeypatch):
    assert "metrics.jsonl" in fails("plot", tmp_path / "absent", "--out", tmp_path / "a.png")
    assert "must end with one of png" in fails("plot", folder, "--out", folder / "a.gif")
    assert "--smooth: must be at least 1" in fails(
        "plot", folder, "--out", folder / "a.png", "--smooth", 0
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "rlhf-core[report]" in fails("plot", folder, "--out", folder / "a.png")
    (folder / "metrics.jsonl").write_text("")
    assert "has not finished a step" in fails("plot", folder, "--out", folder / "a.png")
    assert not list(folder.glob("a.*"))


def test_the_report_of_runs_replaces_no_file_unasked(folder, fails, capsys):
    out = folder / "report.html"
    assert run("report", folder, "--out", out, "--title", "Mine") == 0
    assert f"1 run reported in {out}" in capsys.readouterr().out
    text = out.read_text()
    assert "<h1>Mine</h1>" in text and "<svg" in text
    assert "pass --overwrite" in fails("report", folder, "--out", out)
    with pytest.warns(UserWarning, match="absent: no such file or folder"):
        assert "nothing to report" in fails("report", folder / "absent", "--out", folder / "b.html")
    assert out.read_text() == text and not (folder / "b.html").exists()


@pytest.mark.slow
def test_training_writes_a_report_of_its_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "try_report", try_report)  # which the other tests go without
    rows = [{"prompt": "a", "completion": "b"}] * 4
    assert train("sft", rows, "--eval-fraction", 0) == 0
    assert "finished" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train("sft", rows, "--eval-fraction", 0, out="without") == 0
    assert not (tmp_path / "without" / "report.html").exists()
