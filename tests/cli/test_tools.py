"""info and demo. `bench` is tested with the benchmarks."""

import torch
from helpers import run, write

from rlhf_core import backends


def test_info_lists_versions_and_backends(capsys):
    assert run("info") == 0
    shown = capsys.readouterr().out
    for name, available, reason in backends.status():
        assert f"{name:<10} {'yes' if available else 'no':<4} {reason}" in shown
    assert torch.__version__ in shown and "tokenizers" in shown


def test_demo_fails_before_it_reads_anything_if_out_cannot_be_written(fails, tmp_path):
    file = write(tmp_path / "file", ["in the way"])
    line = fails("demo", "--real", tmp_path / "absent", "--out", file / "new" / "out")
    assert f"{file} is not a directory" in line and file.read_text() == "in the way\n"
