"""The page about runs shows everything in their folders, runs no script, and survives damage."""

import json
import sys
from html.parser import HTMLParser

import pytest
import torch
from helpers import write

from rlhf_core.data import Preference, Sample
from rlhf_core.data.quality import PairAudit
from rlhf_core.evaluation import report as module
from rlhf_core.evaluation.report import PAGE, try_report, write_report
from rlhf_core.evaluation.summary import by_score, dump_samples, summarize
from rlhf_core.feedback.agreement import agreement_report
from rlhf_core.files import write_json

pytest.importorskip("matplotlib")
EVIL = "<script>alert(1)</script></style>\"'&$"
FACTS = {"algorithm": "ppo", "status": "finished", "total_steps": 8, "options": {"lr": 1e-4}}
HISTORY = [{"step": i, "objective/scores": i / 8, "objective/kl": i / 2} for i in range(1, 9)]


class Reader(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def run_folder(path, history=HISTORY, **facts):
    path.mkdir()
    write(path / "metrics.jsonl", history)
    write_json(path / "run.json", FACTS | facts)
    return path


def evaluation_folder(path, better="new", texts=("fine answer", "poor answer")):
    """20 prompts; the policy `better` wins all but two of them; labels make a frontier."""
    rows = [
        Sample(name, f"p{i}", text, float(name == better) if i > 1 else 0.5, kl, 3, label, each)
        for name, text, kl in (("old", texts[1], 0.0), (better, texts[0], 4.0))
        for i in range(20)
        for label in [("safe", "unsafe")[i % 2]]
        for each in [{"<b>kind": 0.25} if name == better else None]
    ]
    path.mkdir()
    with open(path / "samples.jsonl", "wb") as file:
        dump_samples(file, rows)
    write_json(path / "evaluation.json", summarize(rows, "old", by_score))
    return path


def report(tmp_path, *paths, **options):
    write_report(paths, tmp_path / "report.html", **options)
    return Reader((tmp_path / "report.html").read_text())


def test_everything_in_the_folders_is_on_the_page(tmp_path):
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", options={"lr": 0.25, "seed": 1})]
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "elo": [0.0, 67.6]}\n')
    evaluation = evaluation_folder(tmp_path / "eval")
    agreed = agreement_report(torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1]]).numpy(), resamples=20)
    write_json(tmp_path / "agreement.json", {"file": "labels.jsonl", **agreed})
    audit = PairAudit(())
    for pair in [Preference("p", "x", "y"), Preference("p", "y", "x"), Preference("q", "", "z")]:
        audit.add(pair)
    findings = {
        name: [{"row": row, "reason": why} for row, why in rows.items()]
        for name, rows in audit.findings.items()
    }
    write_json(evaluation / "audit.json", {"file": "pairs", **audit.report(), "findings": findings})
    given = [{"step": i, "prompt": f"q{i}", "response": f"r{i}", "score": i} for i in range(9)]
    with write(runs[0] / "samples.jsonl", given).open("a") as file:
        file.write('{"step": 9, "pro')
    page = report(tmp_path, *runs, evaluation, tmp_path / "agreement.json", title="My runs")
    result = json.loads((evaluation / "evaluation.json").read_text())
    (comparison,), elo = result["comparisons"], result["policies"][1]["elo"]
    low, high = comparison["interval"]
    for shown in (
        "My runs",
        "new against old: better , wins 95% of 20 comparisons",
        f"{low:.3f} to {high:.3f}",
        f"{elo['rating']:.0f} {elo['interval'][0]:.0f} to {elo['interval'][1]:.0f}",
        "18, 2, 0",
        "0.950 ± ",
        "policy score <b>kind KL, nats",
        "0.250 ± 0.000",
        "frontier",
        "harmlessness",
        "√KL",
        "objective/scores",
        "option a b options.lr 0.0001 0.25 a name value",  # not --seed, which one run has
        "Elo of the rounds of b, from its start: 0, 68",
        f"Verdict: {agreed['verdict']}",
        "krippendorff_alpha",
        "eval/audit.json",
        "contradiction failed 2 rows",
        "empty failed 1 rows; row 3",
        "prompt response score step q0 r0 0 0 q1 r1 1 1 q2 r2 2 2 q7 r7 7 7 q8 r8 8 8",
    ):
        assert shown in page.text, shown
    assert (
        page.text.count("fine answer") == page.text.count("poor answer") == 5
    )  # responses side by side
    assert page.tags.count("figure") == 4  # curves, scores against KL twice, frontier


def test_the_page_runs_no_script_and_fetches_nothing_whatever_the_texts(tmp_path):
    folder = run_folder(tmp_path / "a<b>$x$", [{"step": 1, "$<b>": 1.0, "loss": 2.0}], error=EVIL)
    evaluation = evaluation_folder(tmp_path / "<i>", better=EVIL, texts=(EVIL, EVIL))
    page = report(tmp_path, folder, evaluation, title=EVIL)
    assert not {"script", "i", "b>", "img", "iframe", "object", "form"} & set(page.tags)
    assert page.tags.count("style") == 1 + page.tags.count("figure")  # of SVG
    names = dict(page.attributes)
    assert not [name for name in names if name.startswith("on")]
    links = [value for name, value in page.attributes if name.split(":")[-1] in ("href", "src")]
    assert links and all(value.startswith(("data:", "#")) for value in links)
    assert "default-src 'none'" in (tmp_path / "report.html").read_text()
    assert EVIL in "".join(page.texts)
    assert "a<b>$x$" in page.text


def test_unfinished_and_damaged_runs_are_shown_as_such(tmp_path):
    going = run_folder(tmp_path / "going", status="running")
    new = run_folder(tmp_path / "new", [], status="running")
    odd = run_folder(tmp_path / "odd")
    (odd / "run.json").write_text("{")
    page = report(tmp_path, going, new, odd)
    assert "3 training runs; unfinished or damaged: going, new, odd" in page.text
    assert "not finished (running), 8 of 8 steps" in page.text
    assert "the run has not finished a step" in page.text
    assert "run.json:1: not valid JSON" in page.text


def test_what_is_no_run_is_left_out_with_a_warning_unless_nothing_is_left(tmp_path):
    folder = run_folder(tmp_path / "a", [])
    (tmp_path / "foreign").mkdir()
    write_json(tmp_path / "foreign" / "config.json", {"file": "x"})
    with pytest.warns(UserWarning) as caught:
        report(tmp_path, folder, tmp_path / "foreign", tmp_path / "absent")
    found = [str(warning.message) for warning in caught]
    assert found == [
        f"not in the report: {tmp_path / 'foreign'}: holds no metrics, evaluation, agreement or "
        "audit",
        f"not in the report: {tmp_path / 'absent'}: no such file or folder",
    ]
    before = (tmp_path / "report.html").read_text()
    with (
        pytest.raises(ValueError, match="foreign: nothing to report"),
        pytest.warns(UserWarning),
    ):
        report(tmp_path, tmp_path / "foreign")
    assert (tmp_path / "report.html").read_text() == before


def test_a_file_of_another_form_costs_only_its_own_section(tmp_path):
    folder, other = run_folder(tmp_path / "a", []), tmp_path / "eval"
    other.mkdir()
    for damage in ([], {"policies": 1}, {"policies": [{}], "comparisons": []}, {"x": EVIL}):
        (other / "evaluation.json").write_text(json.dumps(damage))
        with pytest.warns(UserWarning, match=r"eval.*(JSON object|unknown form)") as caught:
            page = report(tmp_path, folder, other)
        assert len(caught) == 1 and "options.lr 0.0001" in page.text


def test_values_that_cannot_be_drawn_and_half_characters_stop_nothing(tmp_path):
    odd = [1e308, -1e308, float("nan"), float("inf"), 10**299, "text", True, None, [1]]
    folder = run_folder(tmp_path / "a", [{"step": 1 + i, "loss": x} for i, x in enumerate(odd)])
    write(
        folder / "samples.jsonl", [{"step": 1, "prompt": [1, 2], "response": "\ud800!", "score": 1}]
    )
    page = report(tmp_path, folder)
    assert "[1, 2]" in page.text and "?!" in page.text
    assert page.tags.count("figure") == 1


def test_a_reward_models_accuracy_and_calibration_are_shown(tmp_path):
    row = {"accuracy": 0.75, "pairs": 400, "interval": [0.7, 0.79]}
    calibration = {"ece": 0.03, "temperature": None}
    result = {**row, "calibration": calibration, "chosen_is": {"longer": row | {"accuracy": 0.875}}}
    write_json(tmp_path / "evaluation.json", result)
    page = report(tmp_path, tmp_path)
    assert "agrees with 75.0% of 400 labels, 95 % interval 70.0% to 79.0%" in page.text
    assert (
        "chosen is longer 400 0.875 0.700 to 0.790" in page.text
        and "Calibration ece 0.03" in page.text
    )


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_report_that_cannot_be_written_is_a_warning_and_without_matplotlib_nothing(
    tmp_path, monkeypatch
):
    folder = run_folder(tmp_path / "a", [])
    (folder / PAGE).mkdir()
    with pytest.warns(UserWarning, match="report.html: not written: IsADirectoryError"):
        try_report([folder], folder / PAGE, "a")
    (folder / PAGE).rmdir()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="KeyboardInterrupt"):
        patch.setattr(module, "page", interrupted)
        try_report([folder], folder / PAGE, "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    try_report([folder], folder / PAGE, "a")
    assert not (folder / PAGE).exists()
    with pytest.raises(ImportError, match=r"rlhf-core\[report\]"):
        write_report([folder], folder / PAGE)
