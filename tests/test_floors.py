"""The house: who may import whom, read off the sources; and that importing the package does no work.

A file imports from lower floors, or from its own folder. `floor` is the table of CONTRIBUTING.md.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"kernels", "_C"},
    {"backends", "compiled", "cpp", "masking", "checks", "files"},
    {"ops", "models", "data"},
    {"losses"},
    {"generation", "rollout"},
    {"trainers", "evaluation", "integrations"},
    {"", "demo", "benchmarks"},  # "" is rlhf_core/__init__.py
    {"commands", "cli"},
]
NEIGHBOURS = {  # on one floor, and one is made of the other
    *(
        ("masking", "checks"),
        ("rollout", "generation"),
        ("models", "ops"),
        ("trainers", "evaluation"),
    ),
    ("cli", "commands"),
    *(("backends", "compiled"), ("checks", "backends")),
}
ONLY_IN = {"triton": "kernels", "argparse": "cli"}
FILES = sorted([*ROOT.glob("rlhf_core/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def part(module):
    """The table's name for a module: "rlhf_core.ops.kl" -> "ops", "rlhf_core" -> ""."""
    return [*module.split("."), ""][1]


def floor(name):
    (level,) = [level for level, names in enumerate(FLOORS) if name in names]
    return level


def module_of(file):
    relative = file.relative_to(ROOT).with_suffix("")
    parts = relative.parts if relative.parts[0] == "rlhf_core" else ("rlhf_core", *relative.parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(tree):
    """Every module that is imported, anywhere in the file; `from rlhf_core import x` is rlhf_core.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that grep finds them"
            yield from (
                (f"rlhf_core.{a.name}" for a in node.names)
                if node.module == "rlhf_core"
                else [node.module]
            )


def faults(source, module):
    """What the imports of a source break, in words."""
    tree, own = ast.parse(source), part(module)
    for name in imports(tree):
        top, other = name.split(".")[0], part(name)
        if ONLY_IN.get(top, own) != own:
            yield f"{module} imports {top}, which belongs in {ONLY_IN[top]}"
        if own == "kernels" and top not in {
            "torch",
            "triton",
            "math",
            "functools",
            "concurrent",
            "rlhf_core",
        }:
            yield f"{module} imports {top}"
        if name == "rlhf_core._C" and own != "cpp":
            yield f"{module} imports the extension, which belongs in cpp"
        allowed = (
            top != "rlhf_core"
            or other == own
            or (own, other) in NEIGHBOURS
            or version_only(tree, name)
        )
        if not allowed and floor(other) >= floor(own):
            yield f"{module} (F{floor(own)}) imports {name} (F{floor(other)})"


def version_only(tree, name):
    """`import rlhf_core` for its version is no dependency: the package is always there."""
    used = [
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "rlhf_core"
    ]
    return name == "rlhf_core" and set(used) == {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_from_lower_floors_only(file):
    assert not list(faults(file.read_text(encoding="utf-8"), module_of(file)))


def test_every_part_of_the_package_has_a_floor():
    assert len(FILES) > 25
    found = {part(module_of(file)) for file in FILES}
    assert found == set().union(*FLOORS) - {
        "_C",
        "benchmarks",
    }  # a benchmark uses the package as any user does


@pytest.mark.parametrize(
    "source, module",
    [
        ("import triton", "rlhf_core.ops.kl"),
        ("import argparse", "rlhf_core.demo"),
        ("from rlhf_core import _C", "rlhf_core.backends"),
        ("from rlhf_core.trainers.config import option", "rlhf_core.losses.policy"),
        ("from rlhf_core.models import RewardModel", "rlhf_core.ops.gae"),
        ("def f():\n    from rlhf_core.cli import main", "rlhf_core.algorithms.sft"),
        ("from rlhf_core import masking", "rlhf_core.kernels.gae"),
        ("import numpy", "rlhf_core.kernels.gae"),
        ("import rlhf_core\nrlhf_core.gae(1)", "rlhf_core.trainers.common"),
    ],
)
def test_the_rule_catches_what_it_should(source, module):
    assert list(faults(source, module))


def test_pybind11_is_included_in_the_bindings_only():
    users = [
        f.name
        for f in (ROOT / "csrc").iterdir()
        if "#include <pybind11" in f.read_text(encoding="utf-8")
    ]
    assert users == ["bindings.cpp"]


def python(code, cwd):
    """Run code in a fresh interpreter, away from pytest's path."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_importing_the_package_does_no_work(tmp_path):
    code = """
import sys, threading, os
before = set(sys.modules)
import rlhf_core
heavy = {"triton", "rlhf_core.cpp", "rlhf_core._C", "rlhf_core.kernels", "rlhf_core.trainers", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert len(set(sys.modules) - before) < 10, set(sys.modules) - before
assert threading.active_count() == 1
assert not os.path.exists("/proc/self/task") or len(os.listdir("/proc/self/task")) == 1
"""
    run = python(code, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_every_public_name_is_there_and_none_needs_triton(tmp_path):
    code = """
import sys
import rlhf_core
assert set(dir(rlhf_core)) == set(rlhf_core.__all__)
for name in rlhf_core.__all__:
    assert getattr(rlhf_core, name) is not None
assert "triton" not in sys.modules and "rlhf_core._C" not in sys.modules
try:
    rlhf_core.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    run = python(code, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_folder_kernels_cannot_be_imported_by_that_name():
    """A package of that name exists, and others look for it."""
    run = python("import kernels", ROOT)
    assert (
        run.returncode == 1
        and "ImportError: the folder kernels/ is rlhf_core.kernels" in run.stderr
    )
