"""rlhf-core agreement: the tables, the JSON file, bad input."""

import json

import pytest
from helpers import run, write


def votes(seed=0):
    """Forty items; cy labels as ann does but for two, dee always says 1."""
    rows = []
    for i in range(40):
        label = i % 2
        for name, given in (
            ("ann", label), ("ben", label), ("cy", 1 - label if i in (3, 4) else label), ("dee", 1)
        ):  # fmt: skip
            rows.append({"item": f"i{i}", "annotator": name, "label": given, "when": 60 * i})
    return rows


def test_the_tables_name_the_verdict_the_guesser_and_the_confusing_items(tmp_path, capsys):
    data, figures = write(tmp_path / "votes.jsonl", votes()), tmp_path / "r.json"
    assert run("agreement", data, "--json", figures, "--bootstrap", 50, "--time", "when") == 0
    out = capsys.readouterr().out
    assert "40 items, 160 labels: 60 x 0, 100 x 1" in out
    assert "dee                          40   50.0% of 40   guesses" in out
    assert out.count("guesses") == 1 and "ann - ben" in out
    report = json.loads(figures.read_text())
    assert f"verdict: {report['verdict']}, by fleiss_kappa" in out
    kappa, ac1 = (report["coefficients"][x]["value"] for x in ("fleiss_kappa", "gwet_ac1"))
    assert f"fleiss_kappa {kappa:.3f}, gwet_ac1 {ac1:.3f}" in out
    assert report["dawid_skene"]["guessers"] == ["dee"]
    assert report["dawid_skene"]["items"][3] == "i3"
    assert report["dawid_skene"]["soft_labels"][3][1] > 0.9
    assert len(report["drift"]) == 2 and report["split_items"] == 21
    assert run("agreement", data, "--json", figures) == 2  # it exists
    assert run("agreement", data, "--json", figures, "--overwrite", "--bootstrap", 5) == 0


def test_the_real_labels_of_three_annotators_are_golden(data_dir, capsys):
    file = data_dir / "labels" / "pandalm_3annotators.jsonl.gz"
    assert run("agreement", file, "--bootstrap", 100) == 0
    out = capsys.readouterr().out
    assert "879 items unanimous, 120 split" in out and "verdict: golden, by fleiss_kappa" in out
    assert "0.852" in out and "pandalm-87" in out and "guesses" not in out


def test_ordinal_labels_from_text_in_columns(tmp_path, capsys):
    data = tmp_path / "wide.csv"
    data.write_text(
        "id,a,b\n" + "".join(f"{i},{i % 5},{(i + (i % 7 == 0)) % 5}\n" for i in range(30))
    )
    options = ["--annotators", "a", "b", "--level", "ordinal", "--bootstrap", 20]
    assert run("agreement", data, *options) == 0
    out = capsys.readouterr().out
    assert "by krippendorff_alpha" in out and "kendall_w" in out and "cohen_kappa_quadratic" in out


def test_a_coefficient_whose_resamples_have_no_value_and_many_labels_are_printed(tmp_path, capsys):
    rows = [{"labels": [0, 0]}] * 30 + [{"labels": [1, 1]}]
    assert run("agreement", write(tmp_path / "a.jsonl", rows), "--bootstrap", 1, "--seed", 3) == 0
    assert "1.000   no resample has a value" in capsys.readouterr().out
    rows = [{"labels": [i, i]} for i in range(30)]
    assert run("agreement", write(tmp_path / "b.jsonl", rows), "--bootstrap", 5) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("2 x 8, 2 x 9, ...")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([row for row in votes() if row["annotator"] == "ann"], "all labels are by ann"),
        ([votes()[0], votes()[5]], "no item has labels of two annotators"),
        ([{"item": 1, "label": 1}], "votes.jsonl:1: column 'annotator' is missing"),
        ([], "no row has a column 'label'"),
    ],
)
def test_labels_that_cannot_be_compared_are_one_line(tmp_path, fails, rows, message):
    data = write(tmp_path / "votes.jsonl", rows)
    line = fails("agreement", data)
    assert str(data) in line and message in line


def test_files_that_are_missing_or_half_written_are_one_line(tmp_path, fails):
    assert "no.jsonl: no such file" in fails("agreement", tmp_path / "no.jsonl")
    half = tmp_path / "half.sqlite"
    half.write_bytes(b"SQLite format 3\0" + b"\1" * 30)
    assert f"{half} is damaged, or not a database" in fails("agreement", half)
    assert "--time is for files of rows" in fails("agreement", half, "--time", "when")
    data = write(tmp_path / "votes.jsonl", votes())
    negative = write(tmp_path / "n.jsonl", [{"labels": [-1, 2]}])
    line = fails("agreement", negative, "--level", "ratio")
    assert f"{negative}: level='ratio' needs labels of at least 0, got -1" in line
    assert "resamples must be at least 1" in fails("agreement", data, "--bootstrap", 0)
    line = fails("agreement", data, "--annotators", "a", "b", "--label", "c")
    assert "leave out --annotator, --label" in line
    line = fails("agreement", data, "--json", data, "--overwrite")
    assert "is the data itself" in line and data.read_text().count("\n") == 160
