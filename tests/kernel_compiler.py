"""Compiles what the Triton launchers launch, for GPUs that need not be present.

A script, because the tests interpret kernels, and a process does one or the other:

    python tests/kernel_compiler.py compile   # registers, spills, loads; BAD for what is too much
    python tests/kernel_compiler.py count     # fails if a new length compiles anything anew
    python tests/kernel_compiler.py roofline  # the least time of each kernel, computed

The least time is the largest of three: that of the bytes, of the matrix products, and of issuing
the instructions of the kernel's loop. A linear kernel issues those while its tensor cores wait.
"""

import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch
from op_helpers import call_every_launcher

# Registers that each kernel may use, of 255 per thread, and kernels that load 128 bits at a time if
# V % 16 == 0. (On AMD, elementwise kernels have twice the threads, with two elements each.)
REGISTERS = {
    **{"token_logprobs_fwd": 72, "token_logprobs_bwd": 64, "full_kl_fwd": 88, "full_kl_bwd": 64},
    **{"kl_estimate_fwd": 40, "kl_estimate_bwd": 40, "gae_fwd": 120, "gae_bwd": 120},
    **{"ppo_advantages_fwd": 136, "ppo_loss_fwd": 128, "decode_attention_fwd": 168},
    **{"sample_tokens_fwd": 128, "linear_logprobs_fwd": 255, "linear_logprobs_bwd": 255},
}
WIDE = {
    "hip": (
        "token_logprobs_fwd",
        "token_logprobs_bwd",
        "full_kl_fwd",
        "full_kl_bwd",
        "decode_attention_fwd",
        "linear_logprobs_fwd",
        "linear_logprobs_bwd",
    )
}
WIDE["cuda"] = (*WIDE["hip"], "kl_estimate_fwd", "kl_estimate_bwd")


class Gpu(NamedTuple):
    backend: str
    architecture: int | str
    warp: int
    shared: int  # bytes of shared memory that a program may have
    product: str  # the instruction for matrix products of 16-bit numbers

    @property
    def major(self) -> int:
        """What `compute_capability` says there."""
        return self.architecture // 10 if self.backend == "cuda" else 0


GPUS = {
    "sm_80": Gpu("cuda", 80, 32, 163 << 10, "mma.sync"),
    "sm_90": Gpu("cuda", 90, 32, 227 << 10, "wgmma.mma_async"),
    "sm_100": Gpu("cuda", 100, 32, 227 << 10, "tcgen05.mma"),
    "gfx942": Gpu("hip", "gfx942", 64, 64 << 10, "v_mfma_f32"),
}


class Rates(NamedTuple):
    """What a GPU can do at most, in seconds. No measurement of ours."""

    name: str
    bytes: float  # of a copy
    flop: float  # of products of bfloat16 by torch
    instructions: float  # of single threads: SMs x 128 x clock


# 0.9 of the memory's rate and 0.8 of the tensor cores' in the data sheets, as on an H200.
RATES = {
    "sm_90": Rates("H200", 4.3e12, 790e12, 132 * 128 * 1.98e9),
    "sm_100": Rates("B200", 7.2e12, 1800e12, 148 * 128 * 1.85e9),
}


class Work(NamedTuple):
    kernel: str
    case: str
    elements: int  # logits, or pairs of them
    exponentials: int  # per element; 0: too little work to count
    bytes: int
    flop: int = 0
    peer: str = ""  # ms, published


def works():
    """The kernels at sizes that others publish: bfloat16, 8192 rows, D 4096, V 128256."""
    N, D, V, qwen = 8192, 4096, 128256, 151936
    product = 2 * N * D * V
    weights = 2 * D * (V * N // 2048 + N)  # 16 blocks of 128 rows share a read of the weights
    tokens, keys = 8 * 1024, 2 * 16 * 8 * 4096 * 128
    rows, reads = N * V, 2 * N * V
    return (
        Work("token_logprobs_fwd", "+ entropy, V 151936", N * qwen, 1, 2 * N * qwen, 0,
             "0.89 TRL, H100"),
        Work("token_logprobs_fwd", "+ entropy", rows, 1, reads),
        Work("token_logprobs_bwd", "", rows, 1, 2 * reads, 0, "2.27 Liger, H100, with forward"),
        Work("full_kl_fwd", "", rows, 2, 2 * reads),
        Work("full_kl_bwd", "both gradients", rows, 2, 4 * reads),
        Work("linear_logprobs_fwd", "+ entropy", rows, 1, weights, product, "13.6 CuTe, H200"),
        Work("linear_logprobs_bwd", "gradient of the logits", rows, 1, weights + reads, product),
        Work("decode_attention_fwd", "16 rows, 4096 tokens, 8 x 128", 0, 0, 2 * keys),
        Work("gae_fwd", "(8, 1024)", 0, 0, 17 * tokens, 0, "0.001 to 0.004 rl-triton, H100"),
        Work("ppo_loss_fwd", "(8, 1024)", 0, 0, 41 * tokens, 0, "0.18 RL-Kernel"),
        Work("kl_estimate_fwd", "(8, 1024)", 0, 0, 13 * tokens),
    )  # fmt: skip


class Compiled(NamedTuple):
    registers: int
    spills: int  # bytes of stack, on AMD instructions
    shared: int
    wide: bool  # loads 128 bits at a time
    products: bool  # uses the GPU's instruction for matrix products
    handle: object  # Triton's own


def record_launches():
    """A list to which each later launch adds (kernel, args, kwargs), also for CPU tensors."""
    from triton.runtime.jit import JITFunction

    launches = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: launches.append(
        (kernel, args, kwargs)
    )
    return launches


def pretend(gpu):
    """Let launchers choose their tiles for that GPU. Returns Triton's target and its backend."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from rlhf_core.kernels import linear_logprobs

    linear_logprobs.compute_capability = lambda x: gpu.major
    target = GPUTarget(*gpu[:3])
    return target, make_backend(target)


def specialise(launch, backend):
    """What the launch would compile: (signature, constants, attributes, options)."""
    from triton.runtime.jit import create_function_from_signature

    kernel, args, kwargs = launch
    kwargs = {**kwargs, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, *rest = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return *rest, options.__dict__


def compile_all():
    """Compile all launches and print a line each."""
    import rlhf_core.kernels as kernels

    recorded = record_launches()
    for name, gpu in GPUS.items():
        target, backend = pretend(gpu)
        done = set()
        for V, dtype, per_row in (
            (151936, torch.bfloat16, False),
            (32000, torch.float32, True),
            (50257, torch.bfloat16, True),
        ):
            if V % 16 and name != "sm_90":
                continue  # one is enough for narrow loads
            recorded.clear()
            shape = dict(B=1, T=1 if per_row else 33)
            call_every_launcher(kernels, V=V, dtype=dtype, temperature_per_row=(per_row,), **shape)
            for launch in recorded:
                source = specialise(launch, backend)
                if str((launch[0], source[:-1])) not in done:
                    done.add(str((launch[0], source[:-1])))
                    op = launch[0].__name__.removesuffix("_kernel")
                    found = compile_one(launch[0], *source, gpu, target)
                    bad = faults(op, found, gpu, dtype, aligned=V % 16 == 0)
                    print(
                        name,
                        op,
                        *(f"{k} {v}" for k, v in found._asdict().items() if k != "handle"),
                        *(f"BAD: {fault}" for fault in bad),
                        flush=True,
                    )


def compile_one(kernel, signature, constants, attributes, options, gpu, target):
    import triton
    from triton import knobs

    found = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, attributes), target, options
    )
    if gpu.backend == "cuda":
        code = found.asm["ptx"]
        usage = disassemble(knobs.nvidia.cuobjdump, found, "--dump-resource-usage")
        registers, spills = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK"))
        # Pipelined loops copy 16 bytes at a time to shared memory.
        wide = "ld.global.v4.b32" in code or re.search(r"cp\.async\.cg.*0x10,", code)
    else:
        code = found.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count: *(\d+)", code)[1])
        spills = len(re.findall(r"\bscratch_(?:load|store)_", code))
        wide = "load_dwordx4" in code
    return Compiled(
        registers, spills, found.metadata.shared, bool(wide), gpu.product in code, found
    )


def disassemble(tool, compiled, *options):
    """What a tool of CUDA says about the compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool.path, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions_per_exponential(compiled):
    """Instructions of a thread per 2^x in the loop that has the most of them, or without a loop.

    Of two such loops the shorter one counts: the other has the masks of the last block.
    """
    from triton import knobs

    lines, labels, loops = [], {}, []
    for line in disassemble(knobs.nvidia.nvdisasm, compiled, "-c").splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            branch = re.search(r"BRA.*\((\.L_\w+)\)", line)
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(lines)))
            lines.append(line)
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    codes = [lines[start : end + 1] for start, end in inner] + [lines]
    counts = [(sum("MUFU.EX2" in line for line in code), len(code)) for code in codes]
    exponentials, length = max(counts[:-1], key=lambda c: (c[0], -c[1]), default=(0, 0))
    if not exponentials:
        exponentials, length = counts[-1]
    return length / exponentials


def roofline():
    """Print a table of the least times on each GPU, in ms, beside published ones."""
    import rlhf_core.kernels as kernels

    recorded, launches = record_launches(), {}
    for name in RATES:
        pretend(GPUS[name])
        settings = dict(V=151936, dtype=torch.bfloat16, B=1, T=33, temperature_per_row=(False,))
        call_every_launcher(kernels, **settings)
        launches[name] = {launch[0].__name__: launch for launch in reversed(recorded)}
        recorded.clear()
    columns = ("registers", "spills", "load bits", "instructions", "ms", "bound")
    header = [f"{rates.name} {column}" for rates in RATES.values() for column in columns]
    print("| kernel | case | GB |", *(f" {x} |" for x in header), " published, ms |", sep="")
    print("|---|---|---:|" + "---:|" * len(header) + "---|", flush=True)
    for work in works():
        cells = [work.kernel, work.case, f"{work.bytes / 1e9:.2g}"]
        for name in RATES:
            cells += least_time(work, launches[name][f"{work.kernel}_kernel"], name)
        print("|", " | ".join([*cells, work.peer]), "|", flush=True)


def least_time(work, launch, name):
    """The cells of a GPU in a row of the table."""
    gpu, rates = GPUS[name], RATES[name]
    target, backend = pretend(gpu)
    found = compile_one(launch[0], *specialise(launch, backend), gpu, target)
    each = work.exponentials and work.exponentials * instructions_per_exponential(found.handle)
    issue = each * work.elements / rates.instructions
    memory, product = work.bytes / rates.bytes, work.flop / rates.flop
    seconds = product + issue if work.flop else max(memory, issue)
    bound = "products" if work.flop else "memory" if memory >= issue else "instructions"
    yield str(found.registers)
    yield str(found.spills)
    yield "128" if found.wide else "narrower"
    yield f"{each:.1f}" if each else ""
    yield f"{1e3 * seconds:.3g}"
    yield bound if seconds > 5e-6 else "launch"


def faults(op, found, gpu, dtype, aligned):
    if found.spills:
        yield "spills"
    if found.registers > REGISTERS[op]:
        yield "many registers"
    if found.shared > gpu.shared:
        yield "too much shared memory"
    if aligned and not found.wide and op in WIDE[gpu.backend]:
        yield "narrow loads"
    if op.startswith("linear") and dtype != torch.float32 and not found.products:
        yield f"no {gpu.product}"


def count_specialisations():
    import rlhf_core.kernels as kernels

    launches, (_, backend) = record_launches(), pretend(GPUS["sm_90"])
    for V in (64, 50):
        seen = set()
        shapes = [(2, 5), (2, 700)]  # the short and the long block of GAE
        shapes += [(B, T) for B in (1, 3, 16) for T in (1, 15, 16, 17, 32, 33, 48, 100, 256, 1000)]
        for i, (B, T) in enumerate(shapes):
            launches.clear()
            call_every_launcher(kernels, V=V, B=B, T=T, number=1.0 if i == 5 else 1 / (i + 1))
            for launch in launches:
                key = str((launch[0], specialise(launch, backend)))
                assert i < 2 or key in seen, f"compiled anew for {B, T}: {key}"
                seen.add(key)


if __name__ == "__main__":
    {"compile": compile_all, "count": count_specialisations, "roofline": roofline}[sys.argv[1]]()
