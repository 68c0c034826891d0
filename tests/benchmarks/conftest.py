"""Imports `benchmarks` from the repository, because peers and learning are not installed.

The repository then leaves the path, because its kernels/ would shadow the package of that name.
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
sys.path.insert(0, ROOT)
import benchmarks  # noqa: E402, F401

sys.path.remove(ROOT)
