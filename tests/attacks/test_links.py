"""Links are planted under every name that a command writes; nothing outside --out changes."""

import json
import os

import pytest
from helpers import SMALL, TEXTS, model_folders, run, write

pytestmark = pytest.mark.slow
FIVES = "def score(prompts, responses):\n    return [r.count('5') + 0.0 for r in responses]\n"


@pytest.fixture
def commands(tmp_path):
    """Commands that write into a folder: their arguments, without --out."""
    model = model_folders(tmp_path / "models") / "policy"
    data, prompts = write(tmp_path / "data.jsonl", TEXTS), write(tmp_path / "prompts.txt", "abcd")
    (tmp_path / "reward.py").write_text(FIVES)
    sampling = ["--prompts", prompts, "--reward-function", f"{tmp_path / 'reward.py'}:score"]
    sampling += ["--response-length", 4]
    start, options = ["--model", model], [*SMALL, "--overwrite"]
    return {
        "sft": ["sft", *start, "--data", data, *options, "--save-every", 1],
        "lora": ["sft", *start, "--data", data, *options, "--lora-rank", 2],
        "ppo": ["ppo", *start, *sampling, *options],
        "rft": ["rft", *start, *sampling, *options, "--rounds", 2],
    }


def snapshot(folder):
    """Every path below the folder with its bytes, mode and time."""
    return {
        path: (path.read_bytes() if path.is_file() else None, *path.lstat()[:3], path.lstat()[8])
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", ["sft", "lora", "ppo", "rft"])
def test_linked_files_are_replaced_and_their_targets_stay(name, link, commands, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "outside"
    assert run(*commands[name], "--out", out) == 0
    names = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(names) > 3
    for i, file in enumerate(names):
        outside.mkdir(exist_ok=True)
        secret = outside / str(i)
        (out / file).rename(secret)
        secret.chmod(0o600)
        link(secret, out / file)
    before = {path: state[0] for path, state in snapshot(outside).items()}
    assert run(*commands[name], "--out", out) == 0
    assert {path: state[0] for path, state in snapshot(outside).items()} == before
    assert not any((out / file).is_symlink() for file in names)


@pytest.mark.parametrize(
    "name, folder", [("ppo", "critic"), ("rft", "round-1"), ("rft", "round-2")]
)
def test_linked_folders_are_refused_and_their_targets_stay(
    name, folder, commands, tmp_path, capsys
):
    out, outside = tmp_path / "out", tmp_path / "outside"
    assert run(*commands[name], "--out", out) == 0
    (out / folder).rename(outside)
    (out / folder).symlink_to(outside)
    before = snapshot(outside)
    assert run(*commands[name], "--out", out) == 2
    assert f"error: {out / folder} is a link to {outside}" in capsys.readouterr().err
    assert snapshot(outside) == before


def test_best_of_n_replaces_a_link_and_no_device(commands, tmp_path, capsys):
    options = [*commands["ppo"][1:7], "--response-length", 4, "--num-samples", 2, "--overwrite"]
    secret, out = tmp_path / "secret", tmp_path / "best.jsonl"
    secret.write_text("of somebody else")
    out.symlink_to(secret)
    assert run("best-of-n", *options, "--out", out) == 0
    assert secret.read_text() == "of somebody else" and not out.is_symlink()
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 4
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    assert run("best-of-n", *options, "--out", null) == 2
    assert "null is a pipe or a device, not a file" in capsys.readouterr().err and null.is_symlink()
