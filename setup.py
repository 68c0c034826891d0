"""What pyproject.toml cannot say: where the packages lie, and the C++ extension rlhf_core._C.

The extension is optional. Without a C++17 compiler the install is pure Python and prints a warning;
CPU tensors then use the reference backend. RLHF_CORE_REQUIRE_EXT=1 turns a failed build into an
error.
"""

import os
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("RLHF_CORE_REQUIRE_EXT") == "1"

# No -march: dispatch.cpp compiles each ISA for itself. No contraction: it would depend on inlining.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-trapping-math",
]


class BuildExt(build_ext):
    def build_extension(self, ext):
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            openmp = ["-fopenmp"] if self.has_openmp() else []
            ext.extra_compile_args = FLAGS + openmp
            ext.extra_link_args = openmp or ([] if sys.platform == "darwin" else ["-pthread"])
            print(
                f"rlhf_core: compiling {len(ext.sources)} C++ files with "
                f"{self.compiler.compiler_cxx[0]}, {'with' if openmp else 'without'} OpenMP"
            )
            super().build_extension(ext)
        except Exception as error:
            if REQUIRED:
                raise
            print(
                "WARNING: rlhf_core is installed without its C++ kernels, so CPU tensors will use "
                f"slower plain PyTorch: {error}. Install a C++17 compiler (g++ or clang++) and the "
                "Python headers, then reinstall.",
                file=sys.stderr,
            )

    def has_openmp(self):
        """Whether the compiler has OpenMP. On macOS its runtime would differ from torch's."""
        if sys.platform == "darwin":
            return False
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(
                "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
            )
            command = [
                *self.compiler.compiler_cxx,
                "-fopenmp",
                str(source),
                "-o",
                str(source.with_suffix("")),
            ]
            return subprocess.run(command, capture_output=True).returncode == 0


class BdistWheel(bdist_wheel):
    def get_tag(self):
        """A wheel without the extension serves every Python and machine, and its tag says so."""
        built = any(Path(self.bdist_dir).rglob("_C.*"))
        return super().get_tag() if built else ("py3", "none", "any")


setup(
    packages=[
        *find_packages(include=["rlhf_core*"]),
        "rlhf_core.benchmarks",
        "rlhf_core.kernels",
    ],
    package_dir={"rlhf_core.benchmarks": "benchmarks", "rlhf_core.kernels": "kernels"},
    ext_modules=[
        Extension(
            "rlhf_core._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            language="c++",
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
