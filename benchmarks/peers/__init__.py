"""Training beside TRL, and beside a bare loop over transformers models: `python -m benchmarks.peers`."""
