"""Training compared with TRL and with a bare loop over transformers models.

`python -m benchmarks.peers`, in a clone. transformers looks for a package `kernels`, which the
clone's folder of that name must not replace, so that the clone leaves the path.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
