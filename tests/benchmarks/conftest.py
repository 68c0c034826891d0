"""`benchmarks.peers` and `benchmarks.learning` are not installed: import them from the repository.

The repository leaves the path again, because its kernels/ would shadow a package of that name.
"""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
sys.path.insert(0, ROOT)
import benchmarks  # noqa: E402, F401

sys.path.remove(ROOT)
