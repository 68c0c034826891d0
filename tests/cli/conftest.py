"""Fixtures of the command line: model folders, two steps of training, the line of an error."""

import pytest
from helpers import SMALL, model_folders, run, write


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A policy, a reward model and one that scores steps, tiny, with a byte tokenizer."""
    return model_folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def no_reports(monkeypatch):
    """Training writes no page, which would take longer than the training itself."""
    monkeypatch.setattr("rlhf_core.cli.arguments.try_report", lambda *_: None)


@pytest.fixture
def train(folders, tmp_path):
    """Trains the policy for two steps on rows, or on a file, into tmp_path / out."""

    def train(command, data, *options, out="out"):
        if isinstance(data, list):
            data = write(tmp_path / "data.jsonl", data)
        paths = ["--model", folders / "policy", "--data", data, "--out", tmp_path / out]
        return run(command, *paths, *SMALL, *options)

    return train


@pytest.fixture
def sample(folders, tmp_path):
    """Runs two steps of a method that samples, into tmp_path / out."""

    def sample(command, *options, prompts=("one", "two", "three", "four"), out="out"):
        file = write(tmp_path / "prompts.txt", prompts)
        paths = ["--model", folders / "policy", "--prompts", file, "--out", tmp_path / out]
        return run(command, *paths, *SMALL, "--response-length", 4, *options)

    return sample


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail, and returns the one line of its error, from stderr."""

    def fails(*arguments):
        capsys.readouterr()
        try:
            status = run(*arguments)
        except SystemExit as stop:  # of argparse
            status = stop.code
        assert status == 2
        shown = capsys.readouterr()
        (line,) = [line for line in shown.err.splitlines() if "error" in line]
        assert line.startswith(f"rlhf-core {arguments[0]}: error: ")
        assert "Traceback" not in shown.err
        return line

    return fails
