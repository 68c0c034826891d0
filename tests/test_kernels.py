"""Backends and kernels: selection, what launchers have in common, compilation of the Triton ones.

The tests of the public ops check the values.
"""

import functools
import importlib.util
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from op_helpers import LAUNCHERS, TRITON_LAUNCHERS, call_every_launcher

from rlhf_core import (
    backends,
    decode_attention,
    full_kl,
    gae,
    kl_estimate,
    ppo_advantages,
    ppo_loss,
    token_logprobs,
)

ROOT = Path(__file__).parents[1]
X, LOGITS, MASK = torch.zeros(2, 3), torch.zeros(2, 3, 5), torch.ones(2, 3, dtype=torch.bool)
OPS = {
    "token_logprobs": lambda **kw: token_logprobs(LOGITS, X.long(), **kw),
    "full_kl": lambda **kw: full_kl(LOGITS, LOGITS, **kw),
    "kl_estimate": lambda **kw: kl_estimate(X, X, **kw),
    "gae": lambda **kw: gae(X, X, MASK, **kw),
    "ppo_advantages": lambda **kw: ppo_advantages(torch.zeros(2), X, X, X, MASK, kl_coef=0.1, **kw),
    "ppo_loss": lambda **kw: ppo_loss(
        X, X, X, None, None, None, MASK, clip_range=0.2, value_clip_range=None, vf_coef=0.0, **kw
    ),
    "decode_attention": lambda **kw: decode_attention(
        *[LOGITS] * 3,
        *[LOGITS[:, :, None].clone()] * 2,
        *[torch.arange(2) * 0, torch.arange(2)],
        rope=None,
        **kw,
    ),
}


def launchers(backend):
    if backend == "reference":
        pytest.skip("the reference has no launchers")
    return backends.resolve(backend, torch.zeros(1))


def test_report_names_every_backend_and_the_reason(capsys):
    backends.report()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["reference", "cpp", "triton"]
    assert all(line.split()[1] in ("yes", "no") and len(line.split()) > 2 for line in lines)


@pytest.mark.parametrize("op", list(OPS))
def test_an_unknown_backend_raises_with_the_choices(op):
    with pytest.raises(ValueError, match=r"'cuda'.*reference, cpp, triton"):
        OPS[op](backend="cuda")


@pytest.mark.parametrize("value, default", [("reference", "reference"), ("", None)])
def test_the_default_backend_is_read_from_the_environment_at_import(value, default, monkeypatch):
    monkeypatch.setenv("RLHF_CORE_BACKEND", value)
    spec = importlib.util.spec_from_file_location("fresh", backends.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert default == fresh.DEFAULT


@pytest.mark.parametrize("op", list(OPS))
def test_the_default_backend_runs_every_op_called_without_one(op, monkeypatch):
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    OPS[op]()
    monkeypatch.setattr(backends, "DEFAULT", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        OPS[op]()
    OPS[op](backend="reference")  # a name passed in the call has priority


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
    assert sorted(kernels.__all__) == sorted(TRITON_LAUNCHERS)
    for name in LAUNCHERS:
        parameters = [
            list(inspect.signature(getattr(m, name)).parameters) for m in (module, kernels)
        ]
        assert parameters[0] == parameters[1]


def test_by_its_bare_name_the_folder_is_empty():
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not [name for name in vars(module) if not name.startswith("__")]
    assert not hasattr(module, "__all__") and not hasattr(module, "__version__")


def test_lse_is_two_numbers_that_survive_a_common_offset(backend):
    logits = torch.randn(2, 3, 50) + 1e4
    _, _, lse = launchers(backend).token_logprobs_fwd(
        logits, torch.zeros(2, 3, dtype=torch.int64), None, 0.7, False
    )
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
    dlogits = module.token_logprobs_bwd(g, h, poisoned, targets, mask, 1.0, entropy, lse, False)
    assert (
        (dlogits[0, 1] == 0).all()
        and dlogits.isfinite().all()
        and (dlogits[0, [0, 2]] != 0).any(dim=-1).all()
    )


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
    args = (torch.ones_like(logprobs), None, logits, targets, None, 1.0, None, lse)
    dlogits = kernels.token_logprobs_bwd(*args, inplace=False)
    assert logprobs.isnan().tolist() == [[False, True, True]] and entropy.isfinite().all()
    assert dlogits.isnan().all(dim=-1).tolist() == [[False, True, True]]


def test_triton_rows_lie_on_the_one_grid_axis_that_is_long_enough(monkeypatch):
    kernels = pytest.importorskip("rlhf_core.kernels")
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for module in {sys.modules[getattr(kernels, name).__module__] for name in TRITON_LAUNCHERS}:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder())
    # More rows than the second and third axis of a grid allow.
    call_every_launcher(kernels, V=1, B=70_000, T=1)
    assert all(len(grid) == 1 for grid in grids) and max(grids) == (70_000,)


def needs_interpreter():
    if torch.cuda.is_available() or not backends.status()[2].available:
        pytest.skip("needs Triton's interpreter")


class Meter:
    """Monitors interpreted Triton launches: bytes per tensor, accesses out of bounds, and races.

    A race: two programs access one element, one of them writes, and not all arrive in between.
    """

    def __init__(self, monkeypatch, reverse=False):
        needs_interpreter()
        from triton.runtime import interpreter

        self.regions, self.reverse = {}, reverse
        self.builder = interpreter.interpreter_builder
        self.wrap(monkeypatch, interpreter.GridExecutor, "__call__", self.launch)
        for name, kind in (
            ("masked_load", "loads"),
            ("masked_store", "stores"),
            ("atomic_rmw", "atomics"),
        ):
            access = functools.partial(self.access, kind)
            self.wrap(monkeypatch, interpreter.InterpreterBuilder, f"create_{name}", access)
        self.wrap(monkeypatch, interpreter.InterpreterBuilder, "set_grid_idx", self.set_program)

    def wrap(self, monkeypatch, owner, name, function):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, **kwargs: function(original, *args, **kwargs)
        )

    def launch(self, original, executor, *args, **kwargs):
        self.arrivals, self.num_programs = 0, math.prod(executor.grid)
        for x in args:
            if isinstance(x, torch.Tensor) and x.numel():
                span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
                touched = {
                    kind: np.zeros(span, np.int64)
                    for kind in ("loads", "stores", "loaded by", "stored by")
                }
                self.regions[x.data_ptr()] = {
                    "span": span * x.element_size(),
                    "size": x.element_size(),
                    "kept": x,  # so that no other tensor gets its memory
                    **touched,
                }
        with np.errstate(all="ignore"):  # numpy warns about inf - inf
            original(executor, *args, **kwargs)

    def set_program(self, original, builder, x, y, z):
        self.program = x + 1
        original(builder, builder.grid_dim[0] - 1 - x if self.reverse else x, y, z)

    def access(self, kind, original, builder, *args):
        pointers, mask = (
            (args[1], args[3])
            if kind == "atomics"
            else (args[0], args[2 if kind == "stores" else 1])
        )
        inside = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # may be integers
        addresses = pointers.data[inside].astype(np.int64)
        self.arrivals += kind == "atomics"
        for start, region in self.regions.items():
            here = (addresses >= start) & (addresses < start + region["span"])
            if kind != "atomics" and here.any():
                self.touch(region, kind, (addresses[here] - start) // region["size"])
            addresses = addresses[~here]
        assert addresses.size == 0, f"{kind} outside of every tensor"
        return original(builder, *args)

    def touch(self, region, kind, at):
        np.add.at(region[kind], at, 1)
        if self.arrivals < self.num_programs:
            for other in ("stored by", "loaded by") if kind == "stores" else ("stored by",):
                owner = region[other][at]
                assert ((owner == 0) | (owner == self.program)).all(), (
                    f"race: {kind} of what was {other} another program"
                )
        region["stored by" if kind == "stores" else "loaded by"][at] = self.program

    def bytes(self, kind, x):
        return int(self.regions[x.data_ptr()][kind].sum()) * x.element_size()


def test_every_byte_of_the_logits_is_loaded_and_stored_once_and_none_of_masked_rows(monkeypatch):
    meter = Meter(monkeypatch)
    import rlhf_core.kernels as kernels

    V = 5000  # two blocks and a tail
    logits, ref = (torch.randn(2, 2, V, dtype=torch.bfloat16) for _ in range(2))
    targets = torch.randint(0, V, (2, 2))
    mask = torch.tensor([[True, True], [False, True]])
    rows, some = 4 * 2 * V, 3 * 2 * V  # bytes of all rows, and of the counted ones
    ones = torch.ones(2, 2)

    _, entropy, lse = kernels.token_logprobs_fwd(logits, targets, mask, 0.7, True)
    assert meter.bytes("loads", logits) == some + 3 * 2  # and the targets'
    dlogits = kernels.token_logprobs_bwd(
        ones, ones, logits, targets, mask, 0.7, entropy, lse, False
    )
    assert (meter.bytes("loads", logits), meter.bytes("stores", dlogits)) == (some, rows)
    kl, lse = kernels.full_kl_fwd(logits, ref, mask, 0.7)
    assert (meter.bytes("loads", logits), meter.bytes("loads", ref)) == (some, some)
    grads = kernels.full_kl_bwd(ones, logits, ref, mask, 0.7, kl, lse, True, True)
    assert (meter.bytes("loads", logits), meter.bytes("loads", ref)) == (some, some)
    assert [meter.bytes("stores", x) for x in grads] == [rows, rows]


def test_every_token_is_loaded_and_stored_once(monkeypatch):
    meter = Meter(monkeypatch)
    import rlhf_core.kernels as kernels

    x = [torch.randn(3, 700) for _ in range(7)]
    mask = torch.rand(3, 700) < 0.7
    every, counted = 4 * mask.numel(), 4 * int(mask.sum())
    kl = kernels.kl_estimate_fwd(x[0], x[1], mask, "k3")
    assert [meter.bytes("loads", t) for t in x[:2]] == [every] * 2 and meter.bytes(
        "stores", kl
    ) == every
    grads = kernels.kl_estimate_bwd(x[2], x[0], x[1], mask, "k3")
    assert [meter.bytes("loads", t) for t in x[:3]] == [every] * 3
    assert [meter.bytes("stores", t) for t in grads] == [every] * 2
    *_, dlogprobs, dvalues, dentropy = kernels.ppo_loss_fwd(
        *x, mask, None, False, 0.2, 0.3, 0.2, 0.5, 0.01, 2.0
    )
    assert [meter.bytes("loads", t) for t in x] == [counted] * 7
    assert [meter.bytes("stores", t) for t in (dlogprobs, dvalues, dentropy)] == [every] * 3


def test_every_key_and_value_that_is_seen_is_loaded_once_for_its_group_of_heads(monkeypatch):
    meter = Meter(monkeypatch)
    import rlhf_core.kernels as kernels

    q, k, v = torch.randn(2, 8, 20), torch.randn(2, 2, 20), torch.randn(2, 2, 20)
    keys, values = torch.randn(3, 2, 300, 20), torch.randn(3, 2, 300, 20)
    lengths, slots = torch.tensor([299, 9, 5]), torch.tensor([2, 0])
    # The new token is in a register and not loaded.
    for window, seen in ((None, 299 + 5), (200, 199 + 5)):
        kernels.decode_attention_fwd(q, k, v, keys, values, lengths, slots, None, None, window, 300)
        for x in (keys, values):
            assert (meter.bytes("loads", x), meter.bytes("stores", x)) == (
                seen * 2 * 20 * 4,
                2 * 2 * 20 * 4,
            )


def test_triton_turns_a_row_without_room_or_place_into_nan_and_leaves_the_cache(monkeypatch):
    meter = Meter(monkeypatch)
    import rlhf_core.kernels as kernels

    q, k, v, cache = (
        torch.randn(4, 2, 8),
        torch.randn(4, 1, 8),
        torch.randn(4, 1, 8),
        torch.randn(2, 3, 1, 5, 8),
    )
    before, lengths, slots = cache.clone(), torch.tensor([5, 2, -1]), torch.tensor([0, 3, -1, 2])
    out = kernels.decode_attention_fwd(q, k, v, *cache, lengths, slots, None, None, None, 5)
    assert out.isnan().all() and torch.equal(cache, before) and not meter.bytes("stores", cache)


@pytest.mark.slow
def test_programs_stay_inside_their_tensors_and_apart_and_any_order_gives_the_same_bits(
    monkeypatch,
):
    results = []
    for reverse in (False, True):
        with monkeypatch.context() as patch:
            Meter(patch, reverse)
            import rlhf_core.kernels as kernels

            torch.manual_seed(0)
            results.append(call_every_launcher(kernels, B=3, T=5))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count, stride", [(2, 2**31 + 16), (3, 2**30 + 16)])
def test_exact_kl_of_rows_further_apart_than_int32_offsets(backend, count, stride, tmp_path):
    module = launchers(backend)
    start = 2**31  # an offset that wraps around then reads the memory before, and does not crash
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("needs the interpreter: a GPU would have to allocate all the memory")
    size = start + (count - 1) * stride + 32  # in a sparse file, which stores only touched pages
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    rows, ref = torch.randn(2, count, 1, 32).half()
    for shape, strides in (((count, 1, 32), (stride, 32, 1)), ((1, count, 32), (32, stride, 1))):
        results = []
        for far in (False, True):
            z, other, g = rows.view(shape), ref.view(shape), torch.ones(shape[:2])
            if far:
                z = memory.as_strided(shape, strides, start)
                z.copy_(rows.view(shape))
            for a, b in ((z, other), (other, z)):
                kl, lse = module.full_kl_fwd(a, b, None, 1.0)
                results += [kl, *module.full_kl_bwd(g, a, b, None, 1.0, kl, lse, True, True)]
        for near, far in zip(results[:6], results[6:]):
            assert torch.equal(near, far)


def in_a_process_that_compiles(what):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernel_compiler.py"), what],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_triton_kernels_compile_for_every_gpu_without_spills_and_with_wide_loads():
    lines = in_a_process_that_compiles("compile")
    assert len(lines) >= 4 * len(TRITON_LAUNCHERS) and not [
        line for line in lines if "BAD" in line
    ], "\n".join(lines)


@pytest.mark.slow
def test_new_lengths_batches_temperatures_and_coefficients_compile_nothing():
    in_a_process_that_compiles("count")
