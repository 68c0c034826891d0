"""What is shipped: the source archive holds everything, and a wheel says what it needs."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, because setuptools writes into the folder that it builds."""
    copy = tmp_path_factory.mktemp("source") / "rlhf_core"
    unwanted = (".git", ".venv", "build", "runs", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*unwanted))
    return copy


def build(source: Path, hook: str, out: Path) -> Path:
    """The file that setuptools' build hook writes; there is no compiler."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    environment = {"PATH": "", "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_source_archive_holds_examples_docs_tests_and_changelog(source, tmp_path):
    with tarfile.open(build(source, "build_sdist", tmp_path)) as archive:
        shipped = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    folders = ("rlhf_core", "csrc", "kernels", "benchmarks", "docs", "examples", "tests")
    sources = [x for folder in folders for x in (source / folder).rglob("*") if x.is_file()]
    names = {str(x.relative_to(source)) for x in sources if not x.is_symlink()}
    files = {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"}
    assert (names | files) - shipped == set()


@pytest.mark.slow
def test_a_wheel_without_the_extension_serves_every_python_and_holds_the_data_files(
    source, tmp_path
):
    wheel = build(source, "build_wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    files = {str(x.relative_to(source)) for x in (source / "rlhf_core").rglob("*.*")}
    assert {"rlhf_core/cli/options.json", "rlhf_core/evaluation/report.html"} <= files
    with zipfile.ZipFile(wheel) as archive:
        assert files - set(archive.namelist()) == set()
