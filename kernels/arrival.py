"""The last program to arrive finishes a launch: how a sum over all programs fits into the launch that makes its parts.

Every program stores its part and calls `arrives_last`. The one that is told so reads all parts, in a fixed order and
without float atomics, so that the result is the same bits whoever came last.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def arrives_last(counter_ptr):
    """Whether all other programs have called this, and what they stored may be read, past the L1 cache (".cg").

    The barrier puts the stores of all threads before the atomic of one. That atomic, acq_rel in the scope of the GPU,
    releases them and acquires what every earlier arrival released; handing its result to the other threads is a
    barrier again. The last one leaves the counter at 0 for the next launch on the stream.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def counter(x: Tensor) -> Tensor:
    """An int32 at 0 on x's device, for one launch at a time: every stream has its own, and every captured launch.

    A captured launch cannot share its stream's, as the graph may be replayed on another while that one is in use.
    """
    if not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=x.device)
    return _counter(x.device, torch.cuda.current_stream(x.device).cuda_stream)


@functools.cache
def _counter(device: torch.device, stream: int) -> Tensor:
    # It outlives the call, so it must not lie in a graph's private memory, where this thread may be allocating as it
    # warms up for one (torch.compile does): another thread, on its default stream, does not.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_zero, device).result()


def _zero(device: torch.device) -> Tensor:
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    return zero
