"""options.json gives each command's help byte for byte, without its module."""

import json
import subprocess
import sys

import pytest
from helpers import run

from rlhf_core import cli
from rlhf_core.cli import index, parser

REWRITE = "options.json is stale: python -m rlhf_core.cli.index rewrites it"


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "200"])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_from_the_index_is_that_of_the_commands_own_parser(
    command, columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", columns)
    real = cli.parser_of(command).format_help()
    monkeypatch.setattr(cli, "load", None)  # the index alone
    for flag in ("--help", "-h"):
        assert printed(capsys, command, flag) == real, REWRITE


def test_the_index_has_the_commands_of_the_program_and_no_unused_row():
    stored = json.loads(parser.INDEX.read_text())
    assert list(stored["commands"]) == list(cli.COMMANDS), REWRITE
    used = {row for entry in stored["commands"].values() for row, *_ in entry["options"]}
    assert used == set(range(len(stored["rows"]))), REWRITE


def test_writing_the_index_again_changes_nothing(tmp_path, monkeypatch):
    stored = parser.INDEX.read_bytes()
    monkeypatch.setattr(index, "INDEX", tmp_path / "options.json")
    index.write()
    assert (tmp_path / "options.json").read_bytes() == stored, REWRITE


@pytest.mark.parametrize("content", [None, "", "[1]", '{"rows": [], "commands": {}}'])
def test_without_a_usable_index_the_help_is_that_of_the_real_parser(
    content, capsys, monkeypatch, tmp_path
):
    want = printed(capsys, "info", "--help")
    if content is not None:
        (tmp_path / "options.json").write_text(content)
    monkeypatch.setattr(parser, "INDEX", tmp_path / "options.json")
    loaded = []
    load = cli.load
    monkeypatch.setattr(cli, "load", lambda name: loaded.append(name) or load(name))
    assert printed(capsys, "info", "--help") == want and loaded


def test_help_beside_other_options_is_that_of_the_real_parser(capsys, monkeypatch):
    want = printed(capsys, "info", "--help")
    monkeypatch.setattr(cli, "_print_help", None)
    assert printed(capsys, "info", "--help", "--help") == want


@pytest.mark.slow
def test_help_of_a_command_imports_no_torch():
    code = (
        "import sys; from rlhf_core.cli import main\n"
        "try: main(['ppo', '--help'])\n"
        "finally: assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--kl-coef" in done.stdout, done.stderr
