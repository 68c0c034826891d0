"""`python -m rlhf_core` is `rlhf-core`."""

import sys

from rlhf_core.cli import main

sys.exit(main())
