"""Benchmarks of the ops, one file each, installed as rlhf_core.benchmarks.

`cases(size, device)` in bench_<op>.py returns functions that make a `Case`, by name. `rlhf-core
bench` and pytest run the same cases; `common` checks and times them.
"""

OPS = ("logprobs", "linear_logprobs", "kl", "gae", "policy_loss", "decode_attention", "sampling")
