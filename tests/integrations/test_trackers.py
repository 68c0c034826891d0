"""Trackers: what they are told, what they write, resumed runs, and failures that end no run."""

import csv
import json
import os
import sqlite3
import struct
import subprocess
import sys

import pytest
from helpers import TEXTS, make_trainer, model_folders, rows, write

from rlhf_core.integrations.trackers import TRACKERS, Trackers

NAN = float("nan")


class Noted:
    """A tracker that notes what it is told, and raises where `fail` names a method."""

    runs: list
    fail = ()

    @staticmethod
    def check(out):
        pass

    def __init__(self, start):
        self.start, self.steps = start, []
        self.runs.append(self)
        self._raise("start")

    def log(self, metrics, step):
        print("tracker: logged")
        self._raise("log")
        self.steps.append((step, metrics))

    def finish(self, end):
        self.end = end
        self._raise("finish")

    def _raise(self, method):
        if method in self.fail:
            raise ConnectionError(f"no network to {method}, key {os.environ.get('A_KEY')}")


@pytest.fixture
def noted(monkeypatch):
    """The class of a tracker named noted; its `runs` has one of them for each start."""
    tracker = type("Tracker", (Noted,), {"runs": []})
    monkeypatch.setitem(TRACKERS, "noted", tracker)
    return tracker


def train(names, out, resume=False, **config):
    """Four steps of SFT, with an evaluation after the second and the last one."""
    settings = dict(batch_size=2, eval_every=2, save_every=1, lr_schedule="constant") | config
    with Trackers(names, out) as on_step:
        others = dict(out=out, on_step=on_step, eval_examples=rows("sft", 3, seed=1))
        trainer = make_trainer("sft", others=others, **settings)
        if resume:
            trainer.resume()
        return trainer.train()


# ---- what a tracker is told


def test_a_tracker_gets_the_run_every_step_and_the_end(noted, tmp_path, capsys):
    history = train(["noted"], tmp_path / "run")
    (run,) = noted.runs
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run.start.out == tmp_path / "run" and run.start.step == 1 and not run.start.resumed
    assert run.start.facts["status"] == "running"
    assert run.start.facts["options"] == facts["options"]
    assert [step for step, _ in run.steps] == [1, 2, 3, 4]
    for line, (_, metrics) in zip(history, run.steps):
        want = {name: x for name, x in line.items() if name != "step"}
        assert {name: metrics[name] for name in want} == want and "step" not in metrics
        assert metrics["time/step_s"] > 0
    assert (run.end.status, run.end.step, run.end.report) == ("finished", 4, None)
    assert run.end.summary["final/loss"] == history[-1]["loss"]
    assert run.end.summary["final/eval_loss"] == history[-1]["eval_loss"]
    assert run.end.options["batch_size"] == 2
    captured = capsys.readouterr()
    assert "tracker: logged" in captured.err and "tracker" not in captured.out


def test_secrets_of_the_environment_are_masked(noted, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-12345678")
    monkeypatch.setattr(sys, "argv", ["train.py", "--key=sk-12345678"])
    train(["noted"], tmp_path)
    assert noted.runs[0].start.facts["command"] == ["train.py", "--key=***"]


def test_a_resumed_run_has_the_same_id_and_a_new_one_another(noted, tmp_path):
    train(["noted"], tmp_path, max_steps=2)
    train(["noted"], tmp_path, resume=True)
    train(["noted"], tmp_path)
    first, second, third = noted.runs
    assert first.start.id == second.start.id != third.start.id
    assert [run.start.resumed for run in noted.runs] == [False, True, False]
    assert second.start.step == 3 and [step for step, _ in second.steps] == [3, 4]
    assert second.end.status == "finished" and second.end.step == 4


def test_a_run_that_resumes_after_another_in_its_folder_gets_an_id_of_its_own(noted, tmp_path):
    train(["noted"], tmp_path, max_steps=2)
    train([], tmp_path, max_steps=2)
    (tmp_path / "trackers.json").write_text(json.dumps({"id": "old", "start": "2020-01-01"}))
    train(["noted"], tmp_path, resume=True)
    assert noted.runs[1].start.id != "old" and not noted.runs[1].start.resumed


@pytest.mark.parametrize("text", ["", "[]", "{", '{"id": 3}'])
def test_damaged_files_end_no_run(text, noted, tmp_path):
    train(["noted"], tmp_path, max_steps=2)
    (tmp_path / "trackers.json").write_text(text)
    train(["noted"], tmp_path, resume=True)
    assert [step for step, _ in noted.runs[1].steps] == [3, 4]


def test_lists_become_numbered_metrics(noted, tmp_path):
    with Trackers(["noted"], tmp_path) as on_step:
        on_step({"round": 1, "elo": [0.0, 12.5], "note": "fine"}, 1)
    (run,) = noted.runs
    assert run.steps == [(1, {"elo/0": 0.0, "elo/1": 12.5, "note": "fine"})]
    assert run.start.facts == {} and run.end.status == "finished" and run.end.summary == {}


def test_a_report_is_handed_over_if_this_run_has_written_it(noted, tmp_path):
    report = tmp_path / "report.html"
    report.write_text("old")
    os.utime(report, (1e9, 1e9))
    train(["noted"], tmp_path)
    with Trackers(["noted"], tmp_path) as on_step:
        on_step({"step": 1}, 1)
        report.write_text("new")
    assert [run.end.report for run in noted.runs] == [None, report]


def test_a_run_that_fails_or_is_interrupted_ends_with_that_status(noted, tmp_path, monkeypatch):
    for error, status in ((ValueError("bad"), "failed"), (KeyboardInterrupt(), "interrupted")):
        with pytest.raises(type(error)), Trackers(["noted"], tmp_path) as on_step:
            trainer = make_trainer("sft", batch_size=2, others=dict(out=tmp_path, on_step=on_step))
            step = trainer.step

            def fail_at_the_third(batch, trainer=trainer, step=step, error=error):
                if trainer.steps_done == 2:
                    raise error
                return step(batch)

            monkeypatch.setattr(trainer, "step", fail_at_the_third)
            trainer.train()
        assert (noted.runs[-1].end.status, noted.runs[-1].end.step) == (status, 2)


def test_nothing_is_started_for_a_run_without_steps(noted, tmp_path):
    with pytest.raises(FileNotFoundError), Trackers(["noted"], tmp_path / "run"):
        raise FileNotFoundError
    assert not noted.runs and not (tmp_path / "run").exists()


# ---- failures


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_the_others_go_on(
    method, noted, tmp_path, monkeypatch
):
    monkeypatch.setenv("A_KEY", "sk-12345678")
    monkeypatch.setattr(noted, "fail", (method,))
    with pytest.warns(UserWarning) as caught:
        history = train(["noted", "csv"], tmp_path)
    (warning,) = [str(x.message) for x in caught if "noted" in str(x.message)]
    assert warning.startswith(f"noted: ConnectionError('no network to {method}, key ***')")
    assert warning.endswith(f"; the run goes on, see {tmp_path}")
    assert history == train([], tmp_path / "plain")
    assert len(table(tmp_path)) == 4


def test_names_are_checked(tmp_path):
    names = "tensorboard, wandb, trackio, csv"
    with pytest.raises(ValueError, match=f"a tracker must be one of {names}, got 'mlflow'"):
        Trackers(["mlflow"], tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_an_error_that_names_the_extra(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    message = rf"this needs '{name}': pip install 'rlhf-core\[{name}\]'"
    with pytest.raises(ImportError, match=message):
        Trackers([name], tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- csv


def table(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_line_per_step_and_a_column_per_metric(tmp_path):
    history = train(["csv"], tmp_path)
    lines = table(tmp_path)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4]
    assert [float(line["loss"]) for line in lines] == [step["loss"] for step in history]
    assert [line["eval_loss"] != "" for line in lines] == [False, True, False, True]
    assert float(lines[3]["eval_loss"]) == history[3]["eval_loss"]


def test_csv_of_a_resumed_run_drops_later_and_torn_lines(tmp_path):
    history = train(["csv"], tmp_path, max_steps=2)
    path = tmp_path / "metrics.csv"
    last = path.read_text().splitlines()[-1]
    path.write_text(path.read_text() + last.replace("2,", "3,", 1) + "\n4,0.5")
    history = train(["csv"], tmp_path, resume=True)
    lines = table(tmp_path)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4]
    assert [float(line["loss"]) for line in lines] == [step["loss"] for step in history]


def test_csv_writes_nan_commas_quotes_and_new_columns(tmp_path):
    with Trackers(["csv"], tmp_path) as on_step:
        on_step({"step": 1, "a/b": NAN, "text": 'one, "two"\nthree'}, 1)
        on_step({"step": 2, "later": -1}, 2)
        on_step({"step": 3, "a/b": float("inf")}, 3)
    first, second, third = table(tmp_path)
    assert first == {"step": "1", "a/b": "nan", "text": 'one, "two"\nthree', "later": ""}
    assert second == {"step": "2", "a/b": "", "text": "", "later": "-1"}
    assert third["a/b"] == "inf"


# ---- tensorboard


def events(out):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(out / "tensorboard"))
    return found.Reload()


def scalars(found, name):
    return {event.step: event.value for event in found.Scalars(name)}


def text(found, name):
    return [event.tensor_proto.string_val[0].decode() for event in found.Tensors(name)]


def test_tensorboard_has_the_curves_the_run_and_its_hyperparameters(tmp_path):
    pytest.importorskip("tensorboard")
    history = train(["tensorboard"], tmp_path)
    found = events(tmp_path)
    assert scalars(found, "loss") == pytest.approx({x["step"]: x["loss"] for x in history})
    assert scalars(found, "eval_loss").keys() == {2, 4}
    assert scalars(found, "time/step_s").keys() == {1, 2, 3, 4}
    assert scalars(found, "final/loss") == pytest.approx({4: history[-1]["loss"]})
    (run,) = text(found, "run.json/text_summary")
    assert json.loads(run)["options"]["batch_size"] == 2
    assert text(found, "status/text_summary") == ["    finished"]
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    assert data.session_start_info.hparams["lr"].number_value == pytest.approx(1e-3)
    assert data.session_start_info.hparams["lr_schedule"].string_value == "constant"


def test_tensorboard_of_a_resumed_run_is_one_curve_and_of_a_new_run_a_new_one(tmp_path):
    pytest.importorskip("tensorboard")
    with Trackers(["tensorboard"], tmp_path) as on_step:
        make_trainer(
            "sft",
            batch_size=2,
            max_steps=2,
            save_every=2,
            lr_schedule="constant",
            others=dict(out=tmp_path, on_step=on_step, eval_examples=rows("sft", 3, seed=1)),
        ).train()
        on_step({"step": 3, "loss": 99.0}, 3)  # as if killed after a step without checkpoint
    history = train(["tensorboard"], tmp_path, resume=True, eval_every=None)
    losses = {x["step"]: x["loss"] for x in history}
    assert scalars(events(tmp_path), "loss") == pytest.approx(losses)
    history = train(["tensorboard"], tmp_path, seed=5)
    losses = {x["step"]: x["loss"] for x in history}
    assert scalars(events(tmp_path), "loss") == pytest.approx(losses)


def test_tensorboard_takes_nan_and_text(tmp_path):
    pytest.importorskip("tensorboard")
    with Trackers(["tensorboard"], tmp_path) as on_step:
        on_step({"step": 1, "a/b": NAN, "note": "# not a title"}, 1)
    found = events(tmp_path)
    assert scalars(found, "a/b")[1] != scalars(found, "a/b")[1]
    assert text(found, "note/text_summary") == ["    # not a title"]


# ---- wandb and trackio, in processes of their own, because they keep state


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return model_folders(tmp_path_factory.mktemp("models")) / "policy"


def sft(policy, tmp_path, *options, **environment):
    """`rlhf-core sft` with a home folder of its own; returns its metrics."""
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir(exist_ok=True)
    data = write(tmp_path / "data.jsonl", TEXTS)
    arguments = ["--model", policy, "--data", data, "--out", out, "--batch-size", 4]
    arguments += ["--save-every", 1, "--lr-schedule", "constant", *options]
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_core", "sft", *map(str, arguments)],
        env=kept | {"HOME": str(home), "MPLCONFIGDIR": str(out / "matplotlib")} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    files = {x for x in tmp_path.rglob("*") if x.is_file() and out not in x.parents}
    assert files == {data}, "nothing is written outside --out"
    assert not {"wandb", "Trackio"} & set(done.stdout.replace(":", " ").split())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def wandb_records(path):
    """The records of a .wandb file, which is a log in LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # the rest of a block
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        at, parts = at + 7 + length, parts + data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wandb_run(path):
    """The id, configuration, history and summary of a run."""
    start, config, history, summary = None, {}, [], {}
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run" and start is None:
            start = record.run
            config = {x.key: json.loads(x.value_json) for x in start.config.update}
        elif kind == "history":
            items = record.history.item
            line = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}
            history.append(line)
        elif kind == "summary":
            items = record.summary.update
            summary |= {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in items}
    return start, config, history, summary


@pytest.mark.slow
def test_wandb_offline_has_the_run_and_a_resumed_run_has_its_id(policy, tmp_path):
    pytest.importorskip("wandb")
    secret = dict(WANDB_MODE="offline", SOME_API_KEY="policy")
    sft(policy, tmp_path, "--max-steps", 1, "--log", "wandb", **secret)
    metrics = sft(policy, tmp_path, "--resume", "--max-steps", 2, **secret)
    paths = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    (first, config, history, _), (second, _, later, summary) = map(wandb_run, paths)
    assert first.run_id == second.run_id and first.display_name == "out"
    assert first.project == "rlhf_core"
    assert config["options"]["batch_size"] == 4 and config["options"]["log"] == ["wandb"]
    assert config["options"]["model"].endswith("/***")
    for line, want in zip([*history, *later], metrics, strict=True):
        assert {name: line[name] for name in want} == want and line["time/step_s"] > 0
    assert summary["status"] == "finished" and summary["final/loss"] == metrics[-1]["loss"]
    assert not [x for path in paths for x in wandb_records(path) if b"/policy" in str(x).encode()]


@pytest.mark.slow
def test_wandb_without_a_key_is_an_error_before_anything_is_written(policy, tmp_path):
    pytest.importorskip("wandb")
    with pytest.raises(AssertionError, match="error: wandb: No API key configured") as caught:
        sft(policy, tmp_path, "--log", "wandb")
    assert "set WANDB_MODE=offline" in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_trackio_has_the_run_its_report_and_the_steps_of_a_resumed_run(policy, tmp_path):
    pytest.importorskip("trackio")
    sft(policy, tmp_path, "--max-steps", 1, "--log", "trackio")
    metrics = sft(policy, tmp_path, "--resume", "--max-steps", 2)
    database = sqlite3.connect(tmp_path / "out" / "trackio" / "rlhf_core.db")
    read = lambda query: database.execute(query).fetchall()  # noqa: E731
    assert len(read("SELECT DISTINCT run_id FROM metrics")) == 1
    lines = [(step, json.loads(x)) for step, x in read("SELECT step, metrics FROM metrics")]
    steps = [(step, line) for step, line in lines if "status" not in line]
    for (step, line), want in zip(steps, metrics, strict=True):
        assert {**line, "step": step}.items() >= want.items()
    last = lines[-1][1]
    assert last["status"] == "finished" and last["final/loss"] == metrics[-1]["loss"]
    config = json.loads(read("SELECT config FROM configs")[-1][0])
    assert config["options"]["batch_size"] == 4
    pytest.importorskip("matplotlib")
    assert read("SELECT type FROM artifacts") == [("report",)]
