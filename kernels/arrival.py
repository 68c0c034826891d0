"""Reduction over all programs of a launch, done by the last program to arrive.

Every program stores its part and calls `arrives_last`. The program for which this returns True
reads all parts in a fixed order, without float atomics. The bits of the result therefore do not
depend on which program is last.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def arrives_last(counter_ptr):
    """True in the last program that calls this, which may then read what all others stored.

    It must read past the L1 cache (".cg"). The barrier orders the stores of all threads before the
    atomic of one. That atomic, acq_rel at GPU scope, releases them and acquires what every earlier
    arrival released. Broadcasting its result to the other threads is a second barrier. The last
    program resets the counter to 0 for the next launch on the stream.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def counter(x: Tensor) -> Tensor:
    """A zero int32 on x's device, for one launch at a time: one per stream or captured launch.

    A captured launch cannot share the counter of its stream, because the graph may be replayed on
    another stream while that counter is in use.
    """
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=x.device)
    return _counter(x.device, torch.cuda.current_stream(x.device).cuda_stream)


@functools.cache
def _counter(device: torch.device, stream: int) -> Tensor:
    # The counter outlives the call, so it must not lie in a graph's private memory. This thread may
    # allocate there while it warms up for a graph (torch.compile does). Another thread, on its
    # default stream, does not.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_zero, device).result()


def _zero(device: torch.device) -> Tensor:
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    return zero
