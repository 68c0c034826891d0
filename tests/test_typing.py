"""Type checkers see every public name with its type, and accept the documentation's code."""

import ast
import importlib.resources
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

import rlhf_core
from rlhf_core import trainers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAGS = [
    "--follow-imports=silent",
    "--ignore-missing-imports",
    "--no-implicit-reexport",
    "--no-error-summary",
    "--no-pretty",
]


def static(module):
    """A module's TYPE_CHECKING imports as {name: module}, and its `__all__`, a literal."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    return homes, names


def test_type_checkers_read_the_names_that_load_in_the_package():
    homes, names = static(rlhf_core)
    assert homes.pop("*") == "rlhf_core.trainers" and homes.pop("backends") == "rlhf_core"
    loaded = dict(rlhf_core._MODULE_OF)
    assert set(names) == {"__version__", "backends", *loaded} and len(set(names)) == len(names)
    assert {name: home for name, home in loaded.items() if home != "rlhf_core.trainers"} == homes


def test_type_checkers_read_the_names_that_load_in_trainers():
    homes, names = static(trainers)
    loaded = {name: f"rlhf_core.{home}" for name, home in trainers._MODULE_OF.items()}
    assert homes == loaded and names == sorted(loaded)


def test_the_package_is_marked_as_typed():
    assert (importlib.resources.files("rlhf_core") / "py.typed").is_file()


@pytest.mark.slow
def test_an_install_carries_the_mark(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "lib" / "rlhf_core" / "py.typed").is_file()
    assert (tmp_path / "lib" / "rlhf_core" / "kernels" / "gae.py").is_file()


@pytest.mark.parametrize("openmp", [True, False])
def test_the_build_says_what_it_compiles(openmp, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: asked.update(options))
    monkeypatch.setattr("setuptools.command.build_ext.build_ext.build_extension", lambda *_: None)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    build, (extension,) = asked["cmdclass"]["build_ext"], asked["ext_modules"]
    monkeypatch.setattr(build, "has_openmp", lambda _: openmp)
    command = build(Distribution())
    command.compiler = SimpleNamespace(compiler_cxx=["g++", "-Wall"])
    command.build_extension(extension)
    said, files = "with" if openmp else "without", len(list(ROOT.glob("csrc/*.cpp")))
    assert capsys.readouterr() == (
        f"rlhf_core: compiling {files} C++ files with g++, {said} OpenMP\n",
        "",
    )


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A folder with a file for each Python block of the documentation."""
    folder = tmp_path_factory.mktemp("blocks")
    for page in PAGES:
        for number, code in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            if "rlhf_core" in code:
                name = re.sub(r"\W", "_", str(page.relative_to(ROOT).with_suffix("")))
                (folder / f"{name}_{number}.py").write_text(code, encoding="utf-8")
    assert len(list(folder.glob("*.py"))) > 20
    return folder


@pytest.fixture(scope="module")
def mypy(blocks):
    """mypy's lines on every Python block of the documentation and on the type of each name."""
    pytest.importorskip("mypy")
    names = [name for name in rlhf_core.__all__ if name != "__version__"]
    lines = ["import rlhf_core", "from rlhf_core import trainers", "from rlhf_core import *"]
    lines += [f"reveal_type(rlhf_core.{name})" for name in names]
    lines += [f"reveal_type(trainers.{name})" for name in trainers.__all__]
    (blocks / "names.py").write_text("\n".join(lines), encoding="utf-8")
    files = sorted(file.name for file in blocks.glob("*.py"))
    command = [sys.executable, "-m", "mypy", *FLAGS, "--cache-dir", str(blocks / "cache"), *files]
    run = subprocess.run(
        command,
        cwd=blocks,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode in (0, 1) and not run.stderr, run.stdout + run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
def test_mypy_accepts_the_code_of_the_documentation(mypy):
    assert not [line for line in mypy if ": error:" in line]


@pytest.mark.slow
def test_mypy_knows_the_type_of_every_public_name(mypy):
    types = [line for line in mypy if "Revealed type is" in line]
    assert len(types) == len(rlhf_core.__all__) - 1 + len(trainers.__all__)
    assert not [line for line in types if 'type is "Any"' in line]


@pytest.mark.slow
def test_pyright_accepts_the_code_of_the_documentation(blocks):
    """basedpyright is pyright in a wheel; "standard" is pyright's own default."""
    pytest.importorskip("basedpyright")
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "exclude": ["cache"]}
    (blocks / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    run = subprocess.run(command, cwd=blocks, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 errors" in run.stdout
