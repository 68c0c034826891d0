"""The commands for labels from people: links, exports, tasks of platforms, and bad input."""

import contextlib
import json
import socket
import threading

import pytest
from helpers import run, write

from rlhf_core.cli import annotation
from rlhf_core.data import read_preferences
from rlhf_core.feedback.annotation.labels import open_store, read_labels

ROWS = [{"id": f"p{i}", "prompt": f"q{i}", "responses": ["good", "bad"]} for i in range(3)]


@pytest.fixture
def files(tmp_path):
    """Candidates, and a database with labels by ann and ben: the first response is better."""
    write(tmp_path / "c.jsonl", ROWS)
    with contextlib.suppress(KeyboardInterrupt):
        serve(tmp_path, "--annotators", "ann", "ben", "--overlap", 2)
    with open_store(tmp_path / "l.sqlite", annotators=["ann", "ben"], overlap=2) as store:
        for name in ("ann", "ben"):
            while item := store.next_item(name):
                choice = 1 + store.order(item, name).index(0)
                store.add(name, {"id": f"{name}-{item.id}", "item": item.id, "choice": choice})
    return tmp_path


def serve(folder, *options):
    return run(
        "annotate", "--data", folder / "c.jsonl", "--db", folder / "l.sqlite", "--port", 0, *options
    )


@pytest.fixture(autouse=True)
def no_serving(monkeypatch):
    """The server answers nothing and ends as if by Ctrl-C."""

    def stop(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(annotation.AnnotationServer, "serve_forever", stop)


def error_of(capsys, *arguments):
    assert run(*arguments) == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


def test_annotate_prints_a_link_for_each_annotator_and_a_summary(files, capsys):
    capsys.readouterr()
    assert serve(files, "--annotators", "ann", "ben", "--overlap", 2) == 130
    out, err = capsys.readouterr()
    names, links = zip(*(line.split(": ", 1) for line in out.splitlines()))
    assert names == ("ann", "ben") and len(set(links)) == 2
    assert all(link.startswith("http://127.0.0.1:") and "/?token=" in link for link in links)
    assert "6 labels of 3 items\nann: 3 labels, 0 skips" in err


def test_a_database_is_served_again_without_its_data(files, capsys):
    capsys.readouterr()
    again = ("annotate", "--db", files / "l.sqlite", "--port", 0)
    assert run(*again) == 130
    out, err = capsys.readouterr()
    assert out.startswith("annotator: http://127.0.0.1:") and "6 labels of 3 items" in err
    gold = error_of(capsys, *again, "--gold", files / "c.jsonl")
    assert gold == "--gold goes with --data; the database has its own. Remove it"
    new = error_of(capsys, "annotate", "--db", files / "new.sqlite")
    assert new.endswith("new.sqlite does not exist. Pass --data to make it")


def test_an_open_host_is_warned_about(files, capsys):
    with pytest.warns(UserWarning, match="--host 0.0.0.0: texts, labels and links travel unenc"):
        serve(files, "--host", "0.0.0.0")
    assert f"http://{socket.gethostname()}:" in capsys.readouterr().out


def test_exports_are_equal_and_read_by_the_readers(files, capsys):
    out = files / "pairs.jsonl"
    export = ("export", "--db", files / "l.sqlite", "--format", "preference", "--out", out)
    assert run(*export) == 0
    assert f"3 rows written to {out}" in capsys.readouterr().out
    first = out.read_bytes()
    assert [row.chosen for row in read_preferences(out)] == ["good"] * 3
    assert error_of(capsys, *export).endswith("exists. Choose another file, or pass --overwrite")
    assert run(*export, "--overwrite") == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize("platform", ["label-studio", "argilla"])
def test_tasks_are_equal_from_the_candidates_and_from_the_database(files, platform):
    for source in (("--db", files / "l.sqlite"), ("--data", files / "c.jsonl")):
        folder = files / source[0]
        folder.mkdir()
        assert run("export", *source, "--format", platform, "--out", folder / "tasks.json") == 0
    one, other = sorted((files / "--db").iterdir()), sorted((files / "--data").iterdir())
    assert [x.name for x in one] == [x.name for x in other] and len(one) == 2
    assert [x.read_bytes() for x in one] == [x.read_bytes() for x in other]
    assert len(json.loads((files / "--db" / "tasks.json").read_text())) == 3


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["annotate", "--annotators", "a", "a"], "--annotators must be different names, got a a"),
        (["annotate", "--overlap", 2], "--overlap 2 needs as many annotators, got 1"),
        (["annotate", "--mode", "write", "--criteria", "kind"], "--criteria rates answers, but"),
        (["annotate", "--seed", 1], "l.sqlite was made with --seed 0, now it is 1"),
        (["annotate", "--gold", "c.jsonl"], 'gold row "p0" has no right answer'),
        (["export", "--format", "kto", "--out", "o"], "pass either --db or --data"),
        (
            ["export", "--data", "c.jsonl", "--format", "kto", "--out", "o"],
            "from labels: pass --db",
        ),
        (
            ["export", "--db", "l.sqlite", "--mode", "rank", "--format", "kto", "--out", "o"],
            "--mode g",
        ),
        (["import-labels", "x", "--db", "l.sqlite", "--seed", 1], "--seed goes with --data; the"),
        (
            ["export", "--db", "l.sqlite", "--format", "kto", "--out", "l.sqlite", "--overwrite"],
            "l.sqlite is the data itself",
        ),
        (["export", "--db", "no", "--format", "kto", "--out", "o"], "no does not exist"),
        (["export", "--db", "l.sqlite", "--format", "sft", "--out", "o"], "of --mode write"),
        (["import-labels", "c.jsonl", "--db", "no"], "no does not exist. Pass --data to make it"),
        (["import-labels", "c.jsonl", "--db", "l.sqlite"], "c.jsonl:2: not valid JSON"),
    ],
)
def test_bad_input_is_named(files, capsys, monkeypatch, arguments, error):
    monkeypatch.chdir(files)
    if arguments[0] == "annotate":
        arguments = [*arguments, "--data", "c.jsonl", "--db", "l.sqlite", "--port", 0]
    assert error in error_of(capsys, *arguments)
    assert not (files / "o").exists()
    assert len(read_labels(files / "l.sqlite").rows) == 6


def test_options_without_effect_are_warned_about(files):
    with pytest.warns(UserWarning, match="--gold-every has no effect without --gold"):
        serve(files, "--gold-every", 3)
    with pytest.warns(UserWarning, match="no effect with --format argilla"):
        command = ("export", "--db", files / "l.sqlite", "--out", files / "tasks.json")
        run(*command, "--format", "argilla", "--min-agreement", 0.5)


def test_rows_that_nobody_can_compare_are_counted(tmp_path, capsys):
    rows = [*ROWS, {"prompt": "q", "responses": ["same", "same"]}]
    write(tmp_path / "c.jsonl", rows)
    serve(tmp_path)
    assert "1 of 4 rows are left out: repeated, or without two" in capsys.readouterr().err
    write(tmp_path / "c.jsonl", rows[3:])
    assert "no row has two different responses" in error_of(
        capsys, "annotate", "--data", tmp_path / "c.jsonl", "--db", tmp_path / "m.sqlite"
    )


def test_a_second_server_and_a_port_in_use_are_named(files, capsys):
    errors, command = [], ("annotate", "--data", files / "c.jsonl", "--db", files / "l.sqlite")
    with open_store(files / "l.sqlite"):
        thread = threading.Thread(target=lambda: errors.append(error_of(capsys, *command)))
        thread.start()
        thread.join()
    assert "in use" in errors[0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = error_of(capsys, *command, "--port", port)
        assert error == (
            f"cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another --port"
        )
