"""Benchmarks, one file per op, installed as rlhf_core.benchmarks: `rlhf-core bench` and pytest run the same cases.

A bench_<op>.py has `cases(size, device)`: names to functions that make a `Case`. `common` checks and times them.
"""

OPS = ("logprobs", "linear_logprobs", "kl", "gae", "policy_loss", "decode_attention", "sampling")
