"""Rows that several processes encode: the same examples, notes and errors as in one."""

import gzip
import json
import multiprocessing
import os
import signal
import time

import pytest

from rlhf_core.data import (
    ByteTokenizer,
    DataError,
    Parallel,
    Text,
    encode_text,
    parallel,
    read_texts,
)
from rlhf_core.data.store import Block, ExampleStore

TOKENIZER = ByteTokenizer()
HERE = os.getpid()
pytestmark = pytest.mark.skipif(parallel.processes() < 2, reason="one core, or not Linux")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Other processes start after the first batch."""
    monkeypatch.setattr(parallel, "SECONDS", 0)


def write(path, count=3000, bad=()):
    rows = [json.dumps({"prompt": f"{i}", "completion": "x" * (i % 40)}) for i in range(count)]
    for i in range(0, count, 40):
        rows[i] = json.dumps({"prompt": f"{i}", "completion": "y"})
    for i in bad:
        rows[i] = "{"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def encode(text: Text):
    return encode_text(text, TOKENIZER, 64)


def forked():
    """Processes that this one forked; those of other tests are started afresh."""
    return [x for x in multiprocessing.active_children() if x.name.startswith("ForkProcess")]


def test_several_processes_give_the_examples_and_notes_of_one(tmp_path):
    path, places, dates, pids = write(tmp_path / "rows.jsonl"), [], {}, []

    def noted(text):
        places.append(int(text.prompt))
        pids.append(os.getpid())
        dates[text.prompt[-1]] = text.completion
        return encode(text)

    found = read_texts(path, encode=Parallel(noted, [places, dates, pids]))
    assert isinstance(found, ExampleStore) and found == read_texts(path, encode=encode)
    assert all(isinstance(block, Block) for block in found.blocks)
    assert places == list(range(3000)) and len(set(pids)) >= 3 and pids[0] == HERE
    assert dates == {str(i % 10): "y" if i % 40 == 0 else "x" * (i % 40) for i in range(2900, 3000)}
    assert not forked()


def test_a_bad_row_is_the_same_error_in_another_process(tmp_path):
    path = write(tmp_path / "rows.jsonl", bad=(2000, 2700))
    reports = []
    for wrapped in (encode, Parallel(encode)):
        with pytest.raises(DataError) as error:
            read_texts(path, encode=wrapped)
        dropped = []
        examples = read_texts(path, on_bad=dropped.append, encode=wrapped)
        reports.append((str(error.value), list(map(str, dropped)), list(examples)))
        assert not forked()
    assert reports[0] == reports[1] and "rows.jsonl:2001: not valid JSON" in reports[0][0]
    assert len(reports[0][1]) == 2


def test_a_damaged_file_is_reported_after_the_bad_rows_before_it(tmp_path):
    whole = gzip.compress(write(tmp_path / "rows.jsonl", 20_000, bad=(300,)).read_bytes())
    path, dropped = tmp_path / "rows.jsonl.gz", []
    path.write_bytes(whole[:-2000])
    with pytest.raises(DataError, match=":301: not valid JSON"):
        read_texts(path, encode=Parallel(encode))
    with pytest.raises(DataError, match="damaged gzip file"):
        read_texts(path, on_bad=dropped.append, encode=Parallel(encode))
    assert len(dropped) == 1


def test_what_cannot_come_from_another_process_is_done_in_this_one(tmp_path):
    path = write(tmp_path / "rows.jsonl")

    def fails(text):
        if text.prompt == "1500":
            raise KeyError("1500")
        return encode(text)

    with pytest.raises(KeyError, match="1500"):
        read_texts(path, encode=Parallel(fails))
    functions = read_texts(path, encode=Parallel(lambda text: lambda: text.prompt))
    assert [function() for function in functions] == [str(i) for i in range(3000)]

    def dies(text):
        if text.prompt in ("700", "1500", "1501", "2900") and os.getpid() != HERE:
            os._exit(1)
        return encode(text)

    assert read_texts(path, encode=Parallel(dies)) == read_texts(path, encode=encode)
    assert not forked()


def test_a_process_that_may_not_start_others_does_all_of_it(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_count_processes, (path,)) == (1, 3000)


def _count_processes(path):
    pids = set()

    def noted(text):
        pids.add(os.getpid())
        return encode(text)

    found = read_texts(path, encode=Parallel(noted))
    return len(pids), len(found)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_one_that_reads(signum, tmp_path):
    path, context = write(tmp_path / "rows.jsonl"), multiprocessing.get_context("fork")
    folder = tmp_path / "pids"
    folder.mkdir()

    def slow(text):
        (folder / str(os.getpid())).touch()
        time.sleep(0.002)
        return encode(text)

    def read():
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        read_texts(path, encode=Parallel(slow))

    reader = context.Process(target=read)
    reader.start()
    while len(pids := [int(file.name) for file in folder.iterdir()]) < 3:
        time.sleep(0.01)
    (os.killpg if signum == signal.SIGINT else os.kill)(reader.pid, signum)
    reader.join()
    assert reader.exitcode == (1 if signum == signal.SIGINT else -signum)
    deadline = time.monotonic() + 60
    while any(map(_runs, pids)):
        assert time.monotonic() < deadline, "a process still runs"
        time.sleep(0.01)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_ranks_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    counts = []
    for ranks in ("1", "3", "12"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        counts.append(parallel.processes())
    assert counts == [parallel.MOST, 4, 1]
