"""`python -m rlhf_core.cli` is `rlhf-core`."""

import sys

from rlhf_core.cli import main

sys.exit(main())
