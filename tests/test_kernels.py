"""The kernels as such: which backend answers, what their launchers share, and what compilers make of the Triton ones.

Their values are tested through the public ops, file by file. Run as a script, this file compiles every Triton kernel
ahead of time, without a GPU; that takes a process of its own, since the tests' own one interprets them.
"""

import ast
import importlib.util
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_core import backends, gae, kl_estimate, token_logprobs

ROOT = Path(__file__).parents[1]
LAUNCHERS = ["gae_bwd", "gae_fwd", "kl_estimate_bwd", "kl_estimate_fwd", "token_logprobs_bwd", "token_logprobs_fwd"]
OPS = {
    "token_logprobs": lambda **kw: token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), **kw),
    "kl_estimate": lambda **kw: kl_estimate(torch.zeros(2, 3), torch.zeros(2, 3), **kw),
    "gae": lambda **kw: gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), **kw),
}


def launchers(backend):
    if backend == "reference":
        pytest.skip("the reference has no launchers")
    return backends.resolve(backend, torch.zeros(1))


def test_report_names_every_backend_and_says_why(capsys):
    backends.report()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["reference", "cpp", "triton"]
    assert all(line.split()[1] in ("yes", "no") and len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("op", list(OPS))
def test_an_unknown_backend_raises_with_the_choices(op):
    with pytest.raises(ValueError, match=r"'cuda'.*reference, cpp, triton"):
        OPS[op](backend="cuda")


@pytest.mark.parametrize("op", list(OPS))
def test_the_environment_chooses_the_default_backend(op, monkeypatch):
    monkeypatch.setenv("RLHF_CORE_BACKEND", "reference")
    OPS[op]()
    monkeypatch.setenv("RLHF_CORE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        OPS[op]()
    OPS[op](backend="reference")  # a name given in the call wins


def test_fused_backends_refuse_float64_and_foreign_devices(backend):
    launchers(backend)
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="float64"):
        kl_estimate(x.double(), x.double(), backend=backend)
    with pytest.raises(ValueError, match="meta"):
        kl_estimate(x.to("meta"), x.to("meta"), backend=backend)


def test_every_backend_has_the_same_launchers_with_the_same_parameters(backend):
    import rlhf_core.kernels as kernels

    module = launchers(backend)
    assert sorted(kernels.__all__) == LAUNCHERS
    for name in LAUNCHERS:
        parameters = [list(inspect.signature(getattr(m, name)).parameters) for m in (module, kernels)]
        assert parameters[0] == parameters[1]


def test_the_folder_is_not_importable_by_its_bare_name():
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    with pytest.raises(ImportError, match=r"rlhf_core\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_kernel_files_import_torch_triton_and_nothing_of_ours():
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in names:
                    assert name.split(".")[0] in ("torch", "triton", "math") or name.startswith("rlhf_core.kernels.")


def test_lse_is_two_numbers_that_survive_a_common_offset(backend):
    logits = torch.randn(2, 3, 50) + 1e4
    _, _, lse = launchers(backend).token_logprobs_fwd(logits, torch.zeros(2, 3, dtype=torch.int64), None, 0.7, False)
    z = logits.double()
    truth = torch.logsumexp((z - lse[..., :1].double()) / 0.7, dim=-1)
    assert lse.shape == (2, 3, 2) and lse.dtype == torch.float32
    torch.testing.assert_close(lse[..., 1].double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("why", ["masked", "no incoming gradient"])
def test_rows_that_pass_no_gradient_on_are_zeroed_without_reading_their_logits(backend, why):
    module = launchers(backend)
    logits, targets = torch.randn(1, 3, 3000), torch.randint(0, 3000, (1, 3))
    mask = torch.tensor([[True, why != "masked", True]])
    _, entropy, lse = module.token_logprobs_fwd(logits, targets, mask, 1.0, True)
    g = torch.tensor([[1.0, math.nan if why == "masked" else 0.0, 0.0]])
    h = torch.tensor([[0.0, g[0, 1], 1.0]])
    poisoned = logits.clone()
    poisoned[0, 1] = math.nan
    dlogits = torch.empty_like(logits)
    module.token_logprobs_bwd(g, h, poisoned, targets, mask, 1.0, entropy, lse, dlogits)
    assert (dlogits[0, 1] == 0).all() and dlogits.isfinite().all() and (dlogits[0, [0, 2]] != 0).any(dim=-1).all()


def test_masked_rows_have_lse_zero_and_are_not_read(backend):
    logits = torch.full((1, 2, 40), math.nan)
    mask = torch.zeros(1, 2, dtype=torch.bool)
    targets = torch.full((1, 2), 10**6)
    for x in launchers(backend).token_logprobs_fwd(logits, targets, mask, 1.0, True):
        assert (x == 0).all()


def test_triton_turns_an_unmasked_ignored_target_into_nan_not_into_a_number():
    import rlhf_core.kernels as kernels

    if not backends.status()[2].available:
        pytest.skip(backends.status()[2].reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(1, 3, 3000, device=device)
    targets = torch.tensor([[5, -100, 3000]], device=device)
    logprobs, entropy, lse = kernels.token_logprobs_fwd(logits, targets, None, 1.0, True)
    dlogits = torch.empty_like(logits)
    kernels.token_logprobs_bwd(torch.ones_like(logprobs), None, logits, targets, None, 1.0, None, lse, dlogits)
    assert logprobs.isnan().tolist() == [[False, True, True]] and entropy.isfinite().all()
    assert dlogits.isnan().all(dim=-1).tolist() == [[False, True, True]]


def test_triton_rows_lie_on_the_one_grid_axis_that_is_long_enough(monkeypatch):
    from rlhf_core.kernels import gae as gae_kernels
    from rlhf_core.kernels import logprobs as logprobs_kernels

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for module in (gae_kernels, logprobs_kernels):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder())
    B, T = 70_000, 1  # more than a grid's second and third axis take
    x, ids, mask = torch.zeros(B, T), torch.zeros(B, T, dtype=torch.int64), torch.ones(B, T, dtype=torch.bool)
    logits = torch.zeros(B, T, 1)
    _, _, lse = logprobs_kernels.token_logprobs_fwd(logits, ids, mask, 1.0, False)
    logprobs_kernels.token_logprobs_bwd(x, None, logits, ids, mask, 1.0, None, lse, torch.zeros_like(logits))
    gae_kernels.gae_fwd(x, x, mask, 1.0, 1.0, None)
    gae_kernels.gae_bwd(x, x, mask, 1.0, 1.0, False)
    assert grids == [(B * T,), (B * T,), (B,), (B,)]


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_every_instruction_set_of_this_cpu_gives_the_same_answers(isa, tmp_path):
    if not backends.status()[1].available:
        pytest.skip(backends.status()[1].reason)
    from rlhf_core import cpp

    if isa not in cpp.cpu_features()["instruction sets"].split(", "):
        pytest.skip(f"this CPU has no {isa}")
    script = """
import sys, torch
from rlhf_core import cpp, gae, kl_estimate, token_logprobs_and_entropy
torch.manual_seed(0)
out = [cpp.isa()]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    z = (torch.randn(2, 3, 4099) * 4).to(dtype).requires_grad_()
    lp, h = token_logprobs_and_entropy(z, torch.randint(0, 4099, (2, 3)), temperature=0.7, backend="cpp")
    (lp.sum() + h.sum()).backward()
    out += [lp.detach(), h.detach(), z.grad.float()]
a, b = torch.randn(2, 77, requires_grad=True), torch.randn(2, 77)
k = kl_estimate(a, b, estimator="k3", backend="cpp")
k.sum().backward()
out += [k.detach(), a.grad, *gae(a.detach(), b, torch.rand(2, 77) < 0.8, backend="cpp")]
torch.save(out, sys.argv[1])
"""
    results = []
    for name in (isa, ""):
        path = tmp_path / f"{name or 'default'}.pt"
        environment = {**os.environ, "RLHF_CORE_CPU_ISA": name}
        subprocess.run([sys.executable, "-c", script, str(path)], env=environment, cwd=ROOT, check=True)
        results.append(torch.load(path))
    assert results[0][0] == isa
    for x, y in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(x, y, rtol=2**-7, atol=5e-6)


def test_triton_kernels_compile_for_every_gpu_without_spills_and_with_wide_loads():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 4 * 6


def compile_all():
    """Compile each kernel as its launcher specialises it at V = 151936; print one line each, exit 1 at a bad one."""
    import tempfile

    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    from rlhf_core.kernels import gae as g
    from rlhf_core.kernels import kl as k
    from rlhf_core.kernels import logprobs as lp

    tile = lp._tile(151936)
    warps = tile.pop("num_warps")
    kernels = [  # what is not named here is a pointer; sizes marked 16 are multiples of it
        (lp.token_logprobs_fwd_kernel, {**tile, "WITH_ENTROPY": True}, warps),
        (lp.token_logprobs_bwd_kernel, tile, warps),
        (k.kl_estimate_fwd_kernel, {"ESTIMATOR": "k3", "BLOCK": k.BLOCK}, 4),
        (k.kl_estimate_bwd_kernel, {"ESTIMATOR": "k3", "BLOCK": k.BLOCK}, 4),
        (g.gae_fwd_kernel, {"BLOCK": g.MAX_BLOCK}, 4),
        (g.gae_bwd_kernel, {"BLOCK": g.MAX_BLOCK}, 4),
    ]
    pointers = {"logits_ptr": "*bf16", "dlogits_ptr": "*bf16", "targets_ptr": "*i64", "mask_ptr": "*u8"}
    floats = ("scale", "inverse_temperature", "gamma", "lam")
    aligned = ("V", "n", "logits_sb", "logits_st", "dlogits_sb", "dlogits_st")
    failed = False
    for name, target in {
        "sm_80": GPUTarget("cuda", 80, 32),
        "sm_90": GPUTarget("cuda", 90, 32),
        "sm_100": GPUTarget("cuda", 100, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }.items():
        for kernel, constants, num_warps in kernels:
            signature, attributes = {}, {}
            for i, argument in enumerate(kernel.arg_names):
                pointer = argument.endswith("_ptr")
                kind = pointers.get(argument, "*fp32") if pointer else "fp32" if argument in floats else "i32"
                signature[argument] = "constexpr" if argument in constants else kind
                if pointer or argument in aligned:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
            if target.backend == "cuda":
                with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
                    f.write(compiled.asm["cubin"])
                    f.flush()
                    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", f.name]
                    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                stack = int(re.search(r"STACK:(\d+)", usage)[1])
                wide = "ld.global.v4.b32" in compiled.asm["ptx"]
            else:
                stack = int(re.search(r"\.private_segment_fixed_size: *(\d+)", compiled.asm["amdgcn"])[1])
                wide = "load_dwordx4" in compiled.asm["amdgcn"]
            bad = stack > 0 or not (wide or kernel in (g.gae_fwd_kernel, g.gae_bwd_kernel))
            failed |= bad
            print(f"{kernel.__name__} {name}: stack {stack} B, 128-bit loads {wide}{'  BAD' if bad else ''}")
    sys.exit(failed)


if __name__ == "__main__":
    compile_all()
