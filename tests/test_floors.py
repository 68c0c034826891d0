"""Which part of the package may import which, read from the sources; importing it does no work.

A file imports only parts that stand before its own in ORDER, and files of its own folder. Imports
count wherever they stand: at the top, in functions, under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_core

ROOT = Path(__file__).parents[1]
# "" is rlhf_core/__init__.py, which holds the version and imports a public name on its first use.
ORDER = [
    "", "_C", "kernels", "cpp", "compiled", "backends", "checks", "files", "remote", "locks",
    "distributed", "masking", "options", "significance", "ops", "losses", "data", "models",
    "generation", "rollout", "feedback", "evaluation", "training", "policy_gradient", "algorithms",
    "trainers",
    "integrations", "demo", "benchmarks", "cli", "__main__",
]  # fmt: skip
ONLY_IN = {"triton": {"kernels"}, "argparse": {"cli", "benchmarks"}, "rlhf_core._C": {"cpp"}}
KERNELS_MAY_IMPORT = {"torch", "triton", "math", "functools", "concurrent", "rlhf_core"}
INSIDES = {"head_weight", "trunk"}  # of a model, which only models/ reads
FOLDERS = {name: f"rlhf_core.{name}" for name in ("kernels", "benchmarks")}
FOLDERS["rlhf_core"] = "rlhf_core"


def module_of(file):
    """rlhf_core/ops/kl.py is rlhf_core.ops.kl, kernels/__init__.py is rlhf_core.kernels."""
    folder, *rest = file.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")


FILES = {module_of(file): file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.py")}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
# The package names what it loads on first use, for type checkers. This block never runs.
TREES["rlhf_core"].body = [
    node for node in TREES["rlhf_core"].body if ast.unparse(node)[:16] != "if TYPE_CHECKING"
]


def part(module):
    """The name in ORDER: rlhf_core.ops.kl is in ops, rlhf_core in ""."""
    return [*module.split("."), ""][1]


def imports(tree):
    """Every module that is imported, anywhere in the file.

    A public name counts as the part that defines it, also as an attribute: `rlhf_core.gae`.
    """
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports must be absolute, so that grep finds them"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "rlhf_core":
            names.append(f"rlhf_core.{node.attr}")
    return [module_that_holds(name) for name in names]


def module_that_holds(name):
    """rlhf_core.ops for rlhf_core.gae, rlhf_core.data.collate for rlhf_core.data.collate.length."""
    top, dot, rest = name.partition(".")
    name = FOLDERS.get(top, top) + dot + rest
    if top == "rlhf_core" and rest in rlhf_core._MODULE_OF:
        return rlhf_core._MODULE_OF[rest]
    return name if name in FILES or name in ONLY_IN else name.rpartition(".")[0] or name


def faults(tree, module):
    """What the imports of a file violate, as text."""
    own = part(module)
    for name in imports(tree):
        top = name.split(".")[0]
        for owned in {top, name} & ONLY_IN.keys():
            if own not in ONLY_IN[owned]:
                yield f"{module} imports {name}, which belongs in {ONLY_IN[owned]}"
        if own == "kernels" and top not in KERNELS_MAY_IMPORT:
            yield f"{module} imports {name}, but kernels need torch and triton only"
        if top == "rlhf_core" and part(name) != own and place(part(name)) >= place(own):
            yield f"{module} imports {name}, which comes after {own or 'rlhf_core'} in ORDER"


def place(name):
    return ORDER.index(name)


def insides_read(tree):
    """Lines that read a model's `head_weight` or `trunk`, as attributes or through getattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in INSIDES:
            yield node.lineno
        is_getattr = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr"
        if is_getattr and getattr(node.args[1], "value", None) in INSIDES:
            yield node.lineno


def cycle(graph):
    """Modules that import each other in a circle, if there are any."""
    done = set()

    def search(name, path):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := search(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := search(name, []))), [])


# ---- the sources


def test_a_file_imports_only_what_stands_before_it():
    assert len(FILES) > 90
    assert not [fault for name, tree in TREES.items() for fault in faults(tree, name)]


def test_every_part_of_the_package_has_one_place():
    assert len(set(ORDER)) == len(ORDER)
    assert {part(name) for name in FILES} == set(ORDER) - {"_C"}


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {name: {x for x in imports(tree) if x in FILES} for name, tree in TREES.items()}
    assert sum(map(len, graph.values())) > 300
    assert not cycle(graph)


def test_only_models_read_the_insides_of_a_model():
    assert list(insides_read(TREES["rlhf_core.models.transformer"]))
    library = {name: tree for name, tree in TREES.items() if "rlhf_core" in FILES[name].parts}
    others = {name: tree for name, tree in library.items() if part(name) != "models"}
    assert not [f"{name}:{line}" for name in others for line in insides_read(others[name])]


def test_pybind11_is_included_in_the_bindings_only():
    users = [
        file.name
        for file in (ROOT / "csrc").iterdir()
        if "#include <pybind11" in file.read_text(encoding="utf-8")
    ]
    assert users == ["bindings.cpp"]


# ---- the rules themselves


@pytest.mark.parametrize(
    "source, module",
    [
        ("import triton", "rlhf_core.ops.kl"),
        ("import triton.language as tl", "rlhf_core.cpp"),
        ("import argparse", "rlhf_core.demo"),
        ("from argparse import Namespace", "rlhf_core.options"),
        ("from rlhf_core import _C", "rlhf_core.backends"),
        ("import rlhf_core._C as _C", "rlhf_core.backends"),
        ("from rlhf_core.options import option", "rlhf_core.masking"),
        ("from rlhf_core.models import RewardModel", "rlhf_core.ops.gae"),
        ("from rlhf_core.models import rope", "rlhf_core.data.collate"),
        ("def f():\n    from rlhf_core.cli import main", "rlhf_core.algorithms.sft"),
        ("if TYPE_CHECKING:\n    from rlhf_core.demo import run", "rlhf_core.training.trainer"),
        ("from rlhf_core import masking", "rlhf_core.kernels.gae"),
        ("import numpy", "rlhf_core.kernels.gae"),
        ("import rlhf_core\nrlhf_core.gae(1)", "rlhf_core.masking"),
        ("from rlhf_core import gae", "rlhf_core.masking"),
        ("from rlhf_core import PPOTrainer", "rlhf_core.training.trainer"),
        ("from benchmarks.peers import task", "rlhf_core.demo"),
        ("from rlhf_core.ops import kl", "rlhf_core"),
    ],
)
def test_a_forbidden_import_is_found(source, module):
    assert list(faults(ast.parse(source), module))


@pytest.mark.parametrize(
    "source, module",
    [
        ("import argparse", "rlhf_core.benchmarks.gpu"),
        ("import rlhf_core\nrlhf_core.__version__", "rlhf_core.training.run_log"),
        ("from rlhf_core.ops import kl", "rlhf_core.ops.gae"),
        ("from rlhf_core import backends, gae", "rlhf_core.models.heads"),
    ],
)
def test_an_allowed_import_is_let_through(source, module):
    assert not list(faults(ast.parse(source), module))


def test_a_circle_is_found():
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d"]


@pytest.mark.parametrize("source", ["model.lm.trunk(ids)", "getattr(model, 'head_weight')"])
def test_a_look_inside_a_model_is_found(source):
    assert list(insides_read(ast.parse(source))) == [1]


# ---- fresh interpreters


def python(code, cwd):
    """Run code in a fresh interpreter, away from pytest's path."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_importing_the_package_does_no_work(tmp_path):
    code = """
import sys, threading, os
before = set(sys.modules)
import rlhf_core
heavy = {"torch", "triton", "transformers"}
heavy |= {f"rlhf_core.{name}" for name in ("cpp", "_C", "kernels", "trainers")}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert len(set(sys.modules) - before) < 10, set(sys.modules) - before
assert threading.active_count() == 1
assert not os.path.exists("/proc/self/task") or len(os.listdir("/proc/self/task")) == 1
"""
    run = python(code, tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.slow
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


@pytest.mark.slow
def test_transformers_can_be_imported_in_the_root_and_takes_kernels_as_missing():
    """A package of that name exists, and transformers looks for it."""
    pytest.importorskip("transformers")
    code = """
import os, transformers, kernels
assert list(kernels.__path__) == [os.path.abspath("kernels")]
assert not transformers.utils.is_kernels_available()
"""
    run = python(code, ROOT)
    assert run.returncode == 0, run.stderr
