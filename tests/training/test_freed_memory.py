"""Freed memory stays with the process while a trainer runs on CPU, and only then."""

import os
import subprocess
import sys

import pytest

from rlhf_core.training import freed_memory

FAULTS = """
import contextlib, resource, sys, torch
from rlhf_core.training import freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).fill_(1)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

faults()
before, start = faults(), resident()
with freed_memory.kept():
    for _ in range(16):  # glibc 2.36 leaves gaps between aligned blocks at first
        during = faults()
    held = resident() - start
left = resident() - start  # before the next tensor, which may lie in the same heap
print(before, during, faults(), held, left)
"""


def measured(**environment):
    found = subprocess.run(
        [sys.executable, "-c", FAULTS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    return map(int, found.stdout.split())


@pytest.mark.skipif(freed_memory._libc() is None, reason="needs glibc with its own options")
def test_pages_are_reused_in_the_block_and_given_back_after_it():
    before, during, after, held, left = measured()
    assert before > 1000 and after > 1000  # 64 MB are at most 16384 pages
    assert during < before / 10
    assert held > 50e6 and left < 20e6


def test_options_of_the_environment_stay():
    before, during, *_ = measured(MALLOC_TRIM_THRESHOLD_="200000", MALLOC_MMAP_THRESHOLD_="200000")
    assert during > before / 2
