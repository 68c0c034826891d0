"""A fake GPU, to rehearse `make gpu`: tensors of device "cuda" lie on the CPU.

Triton's interpreter runs the kernels. Times are those of a CPU, and memory is not measured. torch
still says that there is no GPU. Run as a script, this rehearses all of `make gpu` in processes:

    python tests/fake_gpu.py RESULTS [SECONDS]
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


CUDA = {
    "Event": Event,
    "get_device_name": lambda: "Fake GPU",
    "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1024),
    "mem_get_info": lambda: (2**30, 2**30),
    "synchronize": lambda: None,
    "_sleep": lambda cycles: None,
    **{
        name: lambda: 0
        for name in (
            "memory_allocated", "max_memory_allocated", "memory_reserved",
            "reset_peak_memory_stats",
        )
    },
}  # fmt: skip


def install(setattr=setattr):
    """Replace what the benchmarks use of torch.cuda. Returns the mode in which to run them."""
    from rlhf_core import backends

    for name, fake in CUDA.items():
        setattr(torch.cuda, name, fake)
    choose = backends._choose

    def choose_triton(backend, dtype, device):
        fused = backend is None and dtype in backends.FUSED_DTYPES
        return choose("triton" if fused else backend, dtype, device)

    setattr(backends, "_choose", choose_triton)
    return OnCpu()


if __name__ == "__main__":
    from rlhf_core.benchmarks import gpu

    ROOT, results = Path(__file__).parents[1], Path(sys.argv[1])
    results.mkdir(parents=True, exist_ok=True)
    # Python imports this in every process before anything else.
    (results / "sitecustomize.py").write_text("import fake_gpu; fake_gpu.install().__enter__()\n")
    path = [str(results.resolve()), str(ROOT), str(ROOT / "tests")]
    os.environ |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1"}
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else gpu.SECONDS
    with install():
        sys.exit(gpu.run(ROOT, results, "tiny", "cuda", seconds))
