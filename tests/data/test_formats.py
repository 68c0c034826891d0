"""Files that people have: JSON arrays, CSV, Parquet, Alpaca, ShareGPT, other column names."""

import csv
import gzip
import io
import itertools
import json
import os
import random
import sys
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
from helpers import SMALL, model_folders, run

from rlhf_core.data import (
    DataError,
    read_comparisons,
    read_labelled,
    read_preferences,
    read_prompts,
    read_scored,
    read_texts,
    readers,
)

ROWS = [
    {"prompt": "p, [1]", "completion": 'a "quoted"\nword \\', "note": {"deep": [1, "]"]}},
    {"prompt": "\u00e9\u4e2d", "completion": "b", "note": None},
    {"prompt": "{", "completion": "}", "extra": "\\\\"},
]
TEXTS = [(row["prompt"], row["completion"]) for row in ROWS]
HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "Be brief."}


def save(path, content):
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows):
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


ARRAYS = [
    json.dumps(ROWS),
    json.dumps(ROWS, indent=2),
    json.dumps(ROWS, ensure_ascii=False, separators=(",", ":")) + "\n\n",
    "\n \n" + json.dumps(ROWS, indent="\t"),
    "[" + ",\n".join(map(json.dumps, ROWS)) + "]",
]


# ---- the same rows from every format


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.data"])
@pytest.mark.parametrize("text", ARRAYS)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_json_array_has_the_rows_of_its_lines(name, text, bom, tmp_path):
    assert read_texts(save(tmp_path / name, bom + text)) == TEXTS


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_an_array_is_read_the_same_wherever_its_chunks_end(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_core.data.formats._CHUNK", chunk)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 200)  # so that the first line is not the file
    for text in ARRAYS:
        assert read_texts(save(tmp_path / "a.json", text)) == TEXTS
        path = save(tmp_path / "b.json", text.replace('"}"', "3"))
        line = text[: text.rindex('{"' if "\n " not in text else "{\n")].count("\n") + 1
        with pytest.raises(DataError, match=rf"b\.json:{line}: row 3: field 'comp.* got 3"):
            read_texts(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_file_of_lines_is_read_with_or_without_a_byte_order_mark(name, tmp_path):
    for bom in ("", "\ufeff"):
        assert read_texts(save(tmp_path / name, bom + lines(ROWS))) == TEXTS
    assert read_prompts(save(tmp_path / "p.txt", "\ufeffone\ntwo\n")) == ["one", "two"]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_cells_of_a_csv_file_are_text_or_the_json_of_their_field(name, bom, tmp_path):
    path = tmp_path / name
    rows = [{"prompt": p, "completion": c} for p, c in TEXTS]
    assert read_texts(save(path, bom + table(rows))) == TEXTS
    labelled = [row | {"label": label} for row, label in zip(rows, ("True", "0", "false"))]
    assert [row.label for row in read_labelled(save(path, bom + table(labelled)))] == [
        True, False, False,
    ]  # fmt: skip
    scored = [row | {"reward": reward} for row, reward in zip(rows, ("0.5", "-1", "2e1"))]
    assert [row.reward for row in read_scored(save(path, bom + table(scored)))] == [0.5, -1, 20]
    talk = [{"messages": json.dumps([HI, YES]), "text": ""}]
    assert read_texts(save(path, bom + table(talk))) == [([HI], [YES])]
    pair = {"prompt": "1", "chosen": "2", "rejected": "[3]", "margin": "", "label_smoothing": "0.1"}
    assert read_preferences(save(path, bom + table([pair])))[0][:5] == ("1", "2", "[3]", None, 0.1)
    rated = pair | {"chosen_ratings": '{"x": 2, "y": null}', "rejected_ratings": '{"x": 3}'}
    (row,) = read_comparisons(save(path, bom + table([rated])), criteria=["x", "y"])
    assert row.criteria == {"x": False} and row.label_smoothing is None
    ranked = [{"prompt": "p", "responses": '["a", "b"]', "ranks": "[2, 1]"}]
    assert read_comparisons(save(path, bom + table(ranked))) == [("p", ["b", "a"])]


def test_parquet_has_the_rows_of_its_lines(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def stored(rows, name="a.parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=50)
        return tmp_path / name

    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 2 == 0} for i in range(200)]
    expected = [tuple(row.values()) for row in rows]
    assert read_labelled(stored(rows)) == expected
    assert read_labelled(stored(rows, "a.data")) == expected  # by its first bytes
    talk = [{"messages": [HI, YES | {"name": None}]}]
    assert read_texts(stored(talk)) == [([HI], [YES])]
    rows[150]["completion"] = ""
    with pytest.raises(DataError, match=r"a\.parquet: row 151: field 'completion' is empty"):
        read_labelled(stored(rows))
    columns = {"prompt": "completion", "completion": "prompt"}
    assert read_texts(stored(rows[:1]), columns=columns) == [("c0", "p0")]
    path = stored(rows)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet: row 1: damaged Parquet file"):
        read_labelled(path)


def test_a_long_row_of_parquet_is_named_or_dropped(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    rows = [{"prompt": "a"}, {"prompt": "b" * 5000}, {"prompt": "c"}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"a\.parquet: row 2: the row has more than 1000 bytes"):
        read_prompts(path)
    assert read_prompts(path, lambda error: None) == ["a", "c"]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    def without(name):
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", without)
    path = save(tmp_path / "a.parquet", b"PAR1 and more")
    with pytest.raises(ImportError, match=r"a\.parquet: .*pip install 'rlhf-core\[data\]'"):
        read_texts(path)


# ---- what was read before


def test_an_array_among_lines_is_one_bad_line(tmp_path):
    """As before arrays were read: the lines after it are rows."""
    path = save(tmp_path / "a.jsonl", json.dumps([ROWS[0]]) + "\n\n" + lines(ROWS[1:]))
    with pytest.raises(DataError, match=r"a\.jsonl:1: expected a JSON object, got \["):
        read_texts(path)
    bad = []
    assert read_texts(path, bad.append) == TEXTS[1:] and len(bad) == 1
    path = save(tmp_path / "a.jsonl", "[1, 2]\n" + lines(ROWS))
    assert read_texts(path, bad.append) == TEXTS


def test_a_pipe_is_read(tmp_path):
    for text in (lines(ROWS), ARRAYS[0], ARRAYS[1]):
        path = tmp_path / "pipe"
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_text, args=(text,))
        writer.start()
        assert read_texts(path) == TEXTS
        writer.join()
        path.unlink()


# ---- errors


def test_a_bad_row_of_an_array_is_named_by_its_number_or_dropped(tmp_path):
    good = json.dumps(ROWS[0])
    for bad, message in (
        ('{"prompt": tru}', "not valid JSON: Expecting value"),
        ('{"prompt": "p"}', "field 'response' is missing; the line has 'prompt'"),
        ("7", "expected a JSON object, got 7"),
        ("[" * 100_000 + "]" * 100_000, "not valid JSON: nested too deeply"),
        (json.dumps(ROWS[0]).replace("p,", r"\ud800"), "field 'prompt' has a lone surrogate"),
    ):
        path = save(tmp_path / "a.json", f"[{good},\n{good}, {bad}, {good}]")
        with pytest.raises(DataError, match=rf"a\.json:2: row 3: {message}"):
            read_texts(path)
        assert read_texts(path, lambda error: None) == TEXTS[:1] * 3
    path = save(tmp_path / "a.json", f'[{good}, {{"prompt": "\xff"}}]'.encode("latin1"))
    with pytest.raises(DataError, match=r"a\.json:1: row 2: not UTF-8"):
        read_texts(path)


@pytest.mark.parametrize(
    "end, message",
    [
        ("", "row 1: the file ends within the array; it may be cut off"),
        (', {"prompt": "cut', "row 2: the file ends within the array"),
        ("] more", "row 1: the array ends here, but the file goes on"),
        ("}]", "row 1: the array ends here, but the file goes on"),
    ],
)
def test_an_array_that_is_damaged_stops_the_run_also_if_bad_rows_are_dropped(
    end, message, tmp_path
):
    path = save(tmp_path / "a.json", f"[{json.dumps(ROWS[0])}{end}")
    for on_bad in (None, lambda error: None):
        with pytest.raises(DataError, match=rf"a\.json:1: {message}"):
            read_texts(path, on_bad)


def test_a_row_of_a_csv_file_is_named_by_the_line_where_it_begins(tmp_path):
    path = tmp_path / "a.csv"
    good = 'p,"a\nb"\n'
    for bad, message in (
        ("p\n", "the row has 1 cells, the header has 2"),
        ("p,\n", "field 'response' is missing; the line has 'prompt'"),
        ('p,"a" b\n', "not valid CSV"),
        ('p,"\xff"\n', "not UTF-8"),
    ):
        content = f"prompt,completion\n{good}\n{bad}{good}"
        save(path, content.encode("latin1" if "\xff" in bad else "utf-8"))
        with pytest.raises(DataError, match=rf"a\.csv:5: {message}"):
            read_texts(path)
        assert read_texts(path, lambda error: None) == [("p", "a\nb")] * 2
    for content, message in (
        ("prompt,prompt\na,b\n", "1: the header has 'prompt' twice"),
        ('prompt,completion\na,"b\nc,d\n', "2: a quote is not closed until the file ends"),
    ):
        with pytest.raises(DataError, match=rf"a\.csv:{message}"):
            read_texts(save(path, content), lambda error: None)


@pytest.mark.parametrize("content", [b"PK\x03\x04\xff\xfe", b"<html>", b'"prompt"'])
def test_a_file_of_another_format_is_refused_with_the_formats_that_are_read(content, tmp_path):
    formats = r"JSON lines, a JSON array, CSV .*, and Parquet"
    path = save(tmp_path / "a.xlsx", content)
    with pytest.raises(DataError, match=rf"a\.xlsx.*{formats}"):
        read_texts(path, (lambda error: None) if content[:1] == b'"' else None)


# ---- limits


def test_long_rows_of_arrays_and_csv_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 200)
    short, long = {"text": "a" * 100}, {"text": "b" * 1000}
    path = save(tmp_path / "a.json", json.dumps([short, long, short]))
    with pytest.raises(DataError, match=r"a\.json:1: row 2: the row has more than 200 bytes"):
        read_texts(path)
    assert len(read_texts(path, lambda error: None)) == 2
    for rows in ([short, long], [short, {"text": "b\n" * 500}]):
        path = save(tmp_path / "a.csv", table(rows))
        with pytest.raises(DataError, match=r"a\.csv:3: the row has more than 200 bytes"):
            read_texts(path)
    before = csv.field_size_limit()
    assert read_texts(save(path, table([short]))) == [("", "a" * 100)]
    assert csv.field_size_limit() == before


def test_a_cell_may_be_longer_than_the_default_limit_of_csv(tmp_path):
    text = "a" * (csv.field_size_limit() + 1)
    assert read_texts(save(tmp_path / "a.csv", table([{"text": text}]))) == [("", text)]


def test_an_array_takes_little_more_memory_than_its_rows(tmp_path):
    path = save(tmp_path / "a.json", json.dumps([{"prompt": "a" * 1000}] * 20_000))
    tracemalloc.start()
    read_prompts(path, encode=len)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**24 and peak < 3 * path.stat().st_size


# ---- Alpaca, ShareGPT, system


def test_rows_of_alpaca_are_prompts_and_completions(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    texts = [("Add.\n\n1 + 1", "2"), ("Say hi.", "hi")]
    path = save(tmp_path / "a.json", json.dumps(rows))
    assert read_texts(path) == texts and read_prompts(path) == [prompt for prompt, _ in texts]
    labelled = [row | {"label": True} for row in rows]
    assert read_labelled(save(path, lines(labelled))) == [(*text, True) for text in texts]
    pair = {"instruction": "Add.", "input": "1 + 1", "chosen": "2", "rejected": "3"}
    assert read_preferences(save(path, lines([pair]))) == [
        ("Add.\n\n1 + 1", "2", "3", None, None, None)
    ]
    whole = rows[0] | {"text": "Add. 1 + 1 2"}  # learned as text, as before Alpaca was read
    assert read_texts(save(path, lines([whole]))) == [("", "Add. 1 + 1 2")]
    assert read_texts(path, columns={"instruction": "instruction"}) == texts[:1]
    with pytest.raises(DataError, match="field 'output' is empty"):
        read_texts(save(path, lines([rows[0] | {"output": ""}])))
    with pytest.raises(DataError, match="field 'history' is not supported"):
        read_texts(save(path, lines([rows[0] | {"history": [["a", "b"]]}])))


def test_rows_of_sharegpt_are_messages(tmp_path):
    path = tmp_path / "a.json"
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yes"},
    ]
    save(path, json.dumps([{"id": "1", "conversations": turns}]))
    assert read_texts(path) == [([SYSTEM, HI], [YES])]
    assert read_prompts(path) == [[SYSTEM, HI]]
    scored = [{"conversations": [HI, YES], "reward": 1}]
    assert read_scored(save(path, lines(scored))) == [([HI], [YES], 1.0)]
    for turn, message in (
        ({"from": "tool", "value": "x"}, r"'conversations\[3\].from' must be .* got \"tool\""),
        ({"from": "gpt", "value": 3}, r"'conversations\[3\].content' must be a string, got 3"),
        ({"from": "gpt", "value": "x", "weight": 0}, r"'conversations\[3\].weight' is not supp"),
        ("x", r"'conversations\[3\]' must be an object"),
    ):
        with pytest.raises(DataError, match=message):
            read_texts(save(path, lines([{"conversations": [*turns, turn]}])))
    both = {"prompt": "p", "completion": "c", "conversations": 3}
    assert read_texts(save(path, lines([both]))) == [("p", "c")]


def test_a_system_column_starts_the_conversation_or_is_refused(tmp_path):
    path, system = tmp_path / "a.jsonl", {"system": "Be brief."}
    assert read_texts(save(path, lines([{"messages": [HI, YES]} | system]))) == [
        ([SYSTEM, HI], [YES])
    ]
    row = {"prompt": [HI], "chosen": "a", "rejected": "b"} | system
    assert read_preferences(save(path, lines([row]))) == [
        ([SYSTEM, HI], "a", "b", None, None, None)
    ]
    no = {"role": "assistant", "content": "no"}
    row = {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, no]} | system
    assert read_preferences(save(path, lines([row]))) == [
        ([SYSTEM, HI], "yes", "no", None, None, None)
    ]
    row = {"messages": [SYSTEM, HI, YES]} | system
    assert read_texts(save(path, lines([row]))) == [([SYSTEM, HI], [YES])]
    with pytest.raises(DataError, match="field 'system' contradicts the system message in 'mess"):
        read_texts(save(path, lines([row | {"system": "Be long."}])))
    plain = {"prompt": "p", "completion": "c"}
    for empty in (None, "", " "):
        assert read_texts(save(path, lines([plain | {"system": empty}]))) == [("p", "c")]
    message = r"a\.jsonl:1: field 'system' needs a conversation, .* got \"Be brief.\". Write"
    with pytest.raises(DataError, match=message):
        read_texts(save(path, lines([plain | system])))


# ---- columns


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_columns_name_the_fields_of_every_reader(name, tmp_path):
    rows = [{"q": "p", "a": "1", "b": "2", "text": "t", "messages": "m"}]
    content = {"a.jsonl": lines, "a.json": json.dumps, "a.csv": table}[name](rows)
    path = save(tmp_path / name, content)
    assert read_texts(path, columns={"prompt": "q", "completion": "a"}) == [("p", "1")]
    assert read_texts(path, columns={"question": "q", "answer": "a"}) == [("p", "1")]
    assert read_prompts(path, columns={"prompt": "q"}) == ["p"]
    assert read_prompts(path, columns={"prompt": "q", "completion": "none"}) == ["p"]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert read_preferences(path, columns=pair) == [("p", "1", "2", None, None, None)]
    assert read_preferences(path, columns=pair | {"chosen": "b", "rejected": "a"})[0][1:3] == (
        "2", "1",
    )  # fmt: skip
    message = "column 'x' is missing; the line has 'q', 'a', 'b', 'text', 'messages'"
    with pytest.raises(DataError, match=message):
        read_prompts(path, columns={"prompt": "x"})
    with pytest.raises(DataError, match=r"p\.txt: a \.txt file has no columns"):
        read_prompts(save(tmp_path / "p.txt", "a\n"), columns={"prompt": "x"})


def test_a_cell_is_read_as_the_field_that_its_column_stands_for(tmp_path):
    path = save(tmp_path / "a.csv", "q,a,good\np,c,1\n")
    columns = {"prompt": "q", "completion": "a", "label": "good"}
    assert read_labelled(path, columns=columns) == [("p", "c", True)]


def test_the_command_line_takes_columns(tmp_path, capsys):
    policy = model_folders(tmp_path / "models") / "policy"

    def train(columns, out):
        paths = ["--model", policy, "--data", data, "--out", tmp_path / out]
        return run("sft", *paths, *SMALL, "--columns", columns)

    rows = [{"q": f"say {i}", "a": " yes"} for i in range(10)]
    data = save(tmp_path / "rows.csv", table(rows))
    assert train("prompt=q,completion=a", "a") == 0
    assert "9 to train on, 1 held out" in capsys.readouterr().out
    assert train("prompt=x,completion=a", "b") == 2
    assert "rows.csv:2: column 'x' is missing; the line has 'q', 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["prompt", "prompt=", "=q", "promt=q", "prompt=a,prompt=b"])
@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "kto", "ilql", "ppo", "best-of-n"])
def test_columns_that_are_not_fields_are_refused(command, value, capsys):
    with pytest.raises(SystemExit) as stop:
        run(command, "--columns", value)
    assert stop.value.code == 2 and "argument --columns: " in capsys.readouterr().err


# ---- the bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Standard error as a terminal, and a clock of tqdm that goes on by a second at each look."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr("tqdm.std.time", map(float, itertools.count()).__next__)
    monkeypatch.setattr("sys.stderr", Terminal())
    return sys.stderr


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
def test_a_bar_shows_how_much_of_a_file_is_read(name, monkeypatch, tmp_path):
    err = terminal(monkeypatch)
    draw = random.Random(0)
    rows = [{"prompt": f"p{i}", "completion": str(draw.random()) * 9} for i in range(1000)]
    array = partial(json.dumps, indent=1)
    content = {".json": array, ".csv": table}.get(Path(name).suffix, lines)(rows)
    path = save(tmp_path / name, content)
    monkeypatch.setattr("rlhf_core.data.formats._CHUNK", 2**14)
    assert len(read_texts(path)) == 1000
    shown = [part for part in err.getvalue().split("\r") if part.strip()]
    total = path.stat().st_size / 1000
    assert all(part.startswith(f"{name}:") for part in shown)
    assert all(f"/{total:.0f}k" in part or f"/{total:.1f}k" in part for part in shown)
    percents = [int(part.split("%")[0].split()[-1]) for part in shown]
    assert percents == sorted(percents) and len(set(percents)) > 3 and 80 <= percents[-1] <= 100


def test_the_bar_is_gone_before_an_error_is_shown(monkeypatch, tmp_path):
    err = terminal(monkeypatch)

    def encode(text):
        if text.prompt == "700":
            raise ValueError("no")

    path = save(
        tmp_path / "f.jsonl", lines({"prompt": str(i), "completion": "b"} for i in range(999))
    )
    try:
        read_texts(path, encode=encode)
        raise AssertionError("no error")
    except DataError:  # its traceback still holds the reader
        *_, bar, blank, rest = err.getvalue().split("\r")
        assert "f.jsonl:" in bar and blank.isspace() and rest == ""


def test_a_file_that_is_read_within_a_second_has_no_bar(monkeypatch, tmp_path):
    err = terminal(monkeypatch)
    monkeypatch.setattr("tqdm.std.time", lambda: 0.5)
    assert read_texts(save(tmp_path / "f.jsonl", lines(ROWS * 100))) == TEXTS * 100
    assert err.getvalue() == ""


@pytest.mark.parametrize(
    "target, value",
    [("sys.stderr.isatty", lambda: False), ("rlhf_core.distributed.rank", lambda: 1)],
)
def test_only_rank_0_shows_a_bar_and_only_on_a_terminal(target, value, monkeypatch, tmp_path):
    err = terminal(monkeypatch)
    monkeypatch.setattr(target, value)
    assert read_texts(save(tmp_path / "f.jsonl", lines(ROWS * 100))) == TEXTS * 100
    assert err.getvalue() == ""


def test_a_file_is_read_on_a_terminal_without_tqdm(monkeypatch, tmp_path):
    err = terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert read_texts(save(tmp_path / "f.jsonl", lines(ROWS * 100))) == TEXTS * 100
    assert err.getvalue() == ""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_which_has_no_size_is_read_on_a_terminal(monkeypatch, tmp_path):
    err = terminal(monkeypatch)
    os.mkfifo(tmp_path / "pipe")
    content = lines(ROWS * 100).encode()
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    assert read_texts(tmp_path / "pipe") == TEXTS * 100
    writer.join()
    assert err.getvalue() == ""
