"""Errors that only the C++ backend can make: instruction sets, threads, strides, exponential.

The tests of each op check on all backends that the launchers compute the right values.
"""

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from op_helpers import poison_uninitialised_memory

cpp = pytest.importorskip("rlhf_core.cpp", reason="the C++ extension is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 127, 128, 129, 1000, 8191, 50257]
ISAS = cpp.cpu_features()["instruction sets"].split(", ")
# Tolerance relative to the largest gradient in a tensor, by the dtype it is rounded to.
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison_uninitialised_memory(monkeypatch)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def truth(logits, targets, temperature, dlogprobs, dentropy):
    """(logprobs, entropy, dlogits) in float64."""
    z = logits.double().requires_grad_()
    log_p = torch.log_softmax(z / temperature, dim=-1)
    logprobs = log_p.gather(-1, targets[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    (dlogits,) = torch.autograd.grad(
        (logprobs, entropy), z, (dlogprobs.double(), dentropy.double())
    )
    return logprobs.detach(), entropy.detach(), dlogits


def forward_backward(logits, targets, mask=None, temperature=1.0, dlogprobs=None, dentropy=None):
    dlogprobs = torch.ones(targets.shape) if dlogprobs is None else dlogprobs
    logprobs, entropy, lse = cpp.token_logprobs_fwd(logits, targets, mask, temperature, True)
    dlogits = cpp.token_logprobs_bwd(
        dlogprobs, dentropy, logits, targets, mask, temperature, entropy, lse, False
    )
    return logprobs, entropy, dlogits, lse


def check_against_truth(logits, temperature):
    targets = torch.randint(logits.shape[-1], logits.shape[:2])
    dlogprobs, dentropy = torch.randn(2, *targets.shape).unbind()
    expected = truth(logits, targets, temperature, dlogprobs, dentropy)
    got = forward_backward(logits, targets, None, temperature, dlogprobs, dentropy)
    for x, y in zip(got[:2], expected[:2]):
        torch.testing.assert_close(x.double(), y, rtol=1e-6, atol=2e-6)
    scale = max(1e-6, expected[2].abs().max().item())
    torch.testing.assert_close(
        got[2].double(), expected[2], rtol=EPS[logits.dtype], atol=2e-6 * scale + 2**-24
    )
    assert (got[0] <= 0).all()
    assert (got[1] >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_every_size_and_dtype_matches_float64(vocab_size, dtype):
    torch.manual_seed(vocab_size)
    for scale, offset, temperature in [
        (1, 0, 1.0),
        (8, 0, 0.7),
        (3, 1e4, 1.3),
        (3, -1e4, 1.0),
        (1, 0, 100.0),
    ]:
        check_against_truth((torch.randn(2, 3, vocab_size) * scale + offset).to(dtype), temperature)


def test_a_temperature_per_row_gives_the_bits_of_each_row_at_its_own():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 129) * 4, torch.randint(129, (3, 4))
    upstream = torch.randn(3, 4), torch.randn(3, 4)
    rows = torch.rand(3, 8)[:, ::2] + 0.5
    mask = torch.rand(3, 4) < 0.7
    rows[~mask] = math.nan
    for temperatures in (
        rows,
        rows[:, :1].nan_to_num(1.0).expand(3, 4),
        rows[:1].nan_to_num(1.0).expand(3, 4),
    ):
        together = forward_backward(logits, targets, mask, temperatures, *upstream)
        for b in range(3):
            for t in range(4):
                one = [x[b : b + 1, t : t + 1] for x in (logits, targets, mask)]
                alone = forward_backward(
                    *one, temperatures[b, t].item(), *(x[b : b + 1, t : t + 1] for x in upstream)
                )
                assert all(torch.equal(x[b, t], y[0, 0]) for x, y in zip(together, alone))


def in_isa(isa: str, code: str) -> subprocess.CompletedProcess:
    env = dict(os.environ, RLHF_CORE_CPU_ISA=isa)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_best_isa_is_the_default():
    assert os.environ.get("RLHF_CORE_CPU_ISA") or cpp.isa() == ISAS[-1]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS[:-1])  # this process tests the best one
def test_other_isas_match_float64(isa):
    ops = ("kl", "gae", "policy_loss", "decode_attention", "sampling", "rms_norm", "linear_rows")
    ops += ("gated_activation", "rotary")
    files = ["test_cpp.py", "models/test_packed_decode.py", *(f"ops/test_{op}.py" for op in ops)]
    files = [str(Path(__file__).parent / file) for file in files]
    code = f"""
import pytest, rlhf_core.cpp
assert rlhf_core.cpp.isa() == {isa!r}
chosen = "not isa and not reference and not triton"
raise SystemExit(pytest.main([*{files!r}, "-q", "-p", "no:cacheprovider", "-k", chosen]))
"""
    result = in_isa(isa, code)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_impossible_isa_names_the_possible_ones():
    result = in_isa("avx9000", "import rlhf_core.cpp as cpp; cpp.isa()")
    assert "ValueError" in result.stderr
    assert "avx9000" in result.stderr
    assert ", ".join(ISAS) in result.stderr


def test_exponential_of_logits():
    # Logits [0, -x]: the log-prob's gradient at the second is -p, and p = exp(-x) / (1 + exp(-x)).
    x = torch.linspace(0, 87, 200_001).view(1, -1)
    logits = torch.stack([torch.zeros_like(x), -x], dim=-1)
    _, _, dlogits, _ = forward_backward(logits, torch.zeros(x.shape, dtype=torch.int64))
    p = torch.softmax(logits.double(), dim=-1)[..., 1]
    error = (-dlogits[..., 1].double() / p - 1).abs()
    assert (error <= 4e-7 + x * 2**-23).all()  # the exponent's own rounding grows with x


def test_exponential_is_within_one_unit_in_the_last_place():
    x = torch.linspace(-20, 20, 400_001).view(1, -1)
    x[0, 0] = 0
    zero, mask = torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)
    # The gradient of PPO's loss at advantage -1, nothing clipped, is the ratio exp(x).
    loss = (
        x,
        zero,
        zero - 1,
        None,
        None,
        None,
        None,
        mask,
        zero + 1,
        False,
        1.0,
        math.inf,
        None,
        0.0,
        0.0,
        None,
    )
    ratio, expected = cpp.ppo_loss_fwd(*loss)[3], x.double().exp()
    ulp = torch.nextafter(expected.float(), torch.tensor(math.inf)) - expected.float()
    assert ((ratio.double() - expected).abs() / ulp).max() < 1.02
    assert ratio[0, 0] == 1


def test_bfloat16_gradients_below_the_normal_range_are_rounded_or_0():
    logits = torch.linspace(-88.5, -80, 64).repeat(40).bfloat16().view(1, 1, -1)
    logits[..., 0] = 0
    targets = torch.zeros(1, 1, dtype=torch.int64)
    got, single = (
        forward_backward(z, targets)[2][..., 1:].float() for z in (logits, logits.float())
    )
    rounded = single.bfloat16().float()
    flushed = (got == 0) & (rounded != 0) & (single.abs() < 2**-126)
    assert torch.equal(got[~flushed], rounded[~flushed])
    assert not flushed.any() or cpp.isa() == "avx512_bf16"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_is_independent_of_threads_batch_and_alignment(dtype, threads):
    torch.manual_seed(0)
    B, T, V = 4, 40, 5003
    logits = (torch.randn(B, T, V) * 4).to(dtype)
    targets = torch.randint(V, (B, T))
    dentropy = torch.randn(B, T)
    threads(1)
    one = forward_backward(logits, targets, dentropy=dentropy)
    threads(2)
    two = forward_backward(logits, targets, dentropy=dentropy)
    assert all(torch.equal(x, y) for x, y in zip(one, two))
    for shift in (0, 1, 7):
        row = torch.empty(V + shift, dtype=dtype)[shift:].copy_(logits[2, 5]).view(1, 1, V)
        alone = forward_backward(row, targets[2:3, 5:6], dentropy=dentropy[2:3, 5:6])
        assert all(torch.equal(x[2, 5], y[0, 0]) for x, y in zip(one, alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offset_that_starts_too_low(dtype):
    """The maximum is late and far above the first offset, in the first block or a later one."""
    torch.manual_seed(0)
    for position in (0, 300, 8191, 8192, 20_000, 29_999):
        for height in (12.0, 40.0, 300.0, 3e4):
            logits = torch.randn(1, 1, 30_000)
            logits[..., position] = height
            check_against_truth(logits.to(dtype), 1.0)


def test_special_values_are_those_of_float64_log_softmax():
    inf, nan = math.inf, math.nan
    for V in (3, 40, 9000):
        for special in (
            [-inf],
            [inf],
            [nan],
            [-inf, nan],
            [inf, -inf],
            [-inf] * V,
            [-inf] * (V - 1),
            [inf, inf],
        ):
            logits = torch.randn(1, V)
            for start in (0, V - len(special)):
                row = logits.clone()
                row[0, start : start + len(special)] = torch.tensor(special)
                for target in (0, V - 1):
                    targets = torch.tensor([[target]])
                    got = cpp.token_logprobs_fwd(row[None], targets, None, 1.0, True)
                    expected = truth(row[None], targets, 1.0, torch.ones(1, 1), torch.ones(1, 1))
                    for x, y in zip(got[:2], expected[:2]):
                        torch.testing.assert_close(
                            x.double(), y, rtol=1e-6, atol=1e-6, equal_nan=True
                        )


def test_minus_inf_logits_get_no_gradient():
    logits = torch.randn(1, 2, 100)
    logits[..., ::3] = -math.inf
    targets = torch.tensor([[1, 3]])  # 3 is impossible
    logprobs, _, dlogits, _ = forward_backward(logits, targets, dentropy=torch.ones(1, 2))
    assert logprobs[0, 1] == -math.inf
    assert dlogits.isfinite().all()
    impossible = logits == -math.inf
    impossible[0, 1, 3] = False
    assert (dlogits[impossible] == 0).all()
    assert dlogits[0, 1, 3] == 1


def test_strided_and_expanded_views():
    torch.manual_seed(0)
    base = torch.randn(3, 9, 77)
    targets = torch.randint(77, (9, 3)).t()
    mask = torch.rand(3, 18)[:, ::2] < 0.5
    dlogprobs, dentropy = torch.randn(1, 1).expand(3, 8), torch.randn(3, 1).expand(3, 8)
    time_major = base.transpose(0, 1).contiguous().transpose(0, 1)
    for logits in (
        base[:, :-1],
        base[:1, :-1].expand(3, 8, 77),
        base[:, 1:, 3:60],
        time_major[:, 1:],
    ):
        y, m = targets.clamp(max=logits.shape[-1] - 1)[:, :8], mask[:, :8]
        got = forward_backward(logits, y, m, 1.0, dlogprobs, dentropy)
        expected = forward_backward(
            logits.contiguous(),
            y.contiguous(),
            m.contiguous(),
            1.0,
            dlogprobs.contiguous(),
            dentropy.contiguous(),
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_in_place_backward():
    base = torch.randn(3, 9, 50)
    logits, targets = base[:, :-1], torch.randint(50, (3, 8))
    _, _, expected, _ = forward_backward(logits, targets)
    last = base[:, -1].clone()
    _, entropy, lse = cpp.token_logprobs_fwd(logits, targets, None, 1.0, True)
    dlogits = cpp.token_logprobs_bwd(
        torch.ones(3, 8), None, logits, targets, None, 1.0, entropy, lse, True
    )
    assert dlogits is logits
    assert torch.equal(logits, expected)
    assert torch.equal(base[:, -1], last)


def test_rows_that_do_not_count_are_never_read():
    logits = torch.full((2, 3, 30), math.nan)
    targets = torch.full((2, 3), -100)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for x in forward_backward(logits, targets, mask, dentropy=torch.full((2, 3), math.nan)):
        assert (x == 0).all()
    targets.zero_()  # counted, but has no incoming gradient
    _, _, dlogits, _ = forward_backward(
        logits, targets, None, 1.0, torch.zeros(2, 3), torch.zeros(2, 3)
    )
    assert (dlogits == 0).all()


def test_target_out_of_range_is_named():
    targets = torch.zeros(2, 3, dtype=torch.int64)
    targets[1, 2] = -100
    with pytest.raises(ValueError, match=r"target -100 at \(1, 2\) is outside \[0, 7\).*mask"):
        cpp.token_logprobs_fwd(torch.zeros(2, 3, 7), targets, None, 1.0, False)
    targets[1, 2] = 7
    with pytest.raises(ValueError, match=r"target 7 at \(1, 2\)"):
        cpp.token_logprobs_fwd(torch.zeros(2, 3, 7), targets, None, 1.0, False)


def test_lse_is_offset_plus_log_of_sum():
    logits = torch.randn(2, 3, 500) * 5 + 1e4
    _, _, lse = cpp.token_logprobs_fwd(
        logits, torch.zeros(2, 3, dtype=torch.int64), None, 0.5, False
    )
    m, rest = lse.double().unbind(-1)
    torch.testing.assert_close(
        rest, torch.logsumexp((logits.double() - m[..., None]) / 0.5, -1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_are_rounded_once_to_nearest(dtype):
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 4000).to(dtype)
    targets = torch.tensor([[17]])
    _, _, got, _ = forward_backward(logits, targets)
    _, _, exact, _ = forward_backward(logits.float(), targets)
    assert torch.equal(got, exact.to(dtype))


def test_every_half_is_read_exactly_and_written_back():
    """A row of one element uses only load_partial for z, and returns z as its offset."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in DTYPES[1:]:
        values = bits.view(dtype)
        values = values[values.isfinite()]
        logits = values.view(1, -1, 1)
        _, _, lse = cpp.token_logprobs_fwd(
            logits, torch.zeros(1, len(values), dtype=torch.int64), None, 1.0, False
        )
        assert torch.equal(lse[0, :, 0], values.float())


NEON = """
#include "dispatch.cpp"
extern "C" void rows(
    int64_t dtype, int64_t n, int64_t V, char* z, int64_t* y, float* out, char* dz) {
  rlhf::LogprobsArgs a = {};
  a.dtype = static_cast<rlhf::Dtype>(dtype), a.temperature = 0.7, a.B = 1, a.T = n, a.V = V;
  a.logits = {z, 0, V}, a.targets = {y, 0, 1}, a.dlogits = {dz, 0, V}, a.lse = out + 4 * n;
  a.logprobs = out, a.entropy = out + n;
  a.dlogprobs = {out + 2 * n, 0, 1}, a.dentropy = {out + 3 * n, 0, 1};
  rlhf::neon::table.logprobs_fwd[dtype](a, 0, n);
  rlhf::neon::table.logprobs_bwd[dtype](a, 0, n);
}
"""


@pytest.fixture(scope="module")
def neon_rows(tmp_path_factory):
    """`rows`, cross-compiled for AArch64 and run in an emulator; Python provides libm and libc."""
    pytest.importorskip("ziglang", reason="cross-compiling needs ziglang")
    unicorn = pytest.importorskip("unicorn", reason="emulating AArch64 needs unicorn")
    from unicorn import arm64_const as arm

    D0, X0, SP, LR = (
        arm.UC_ARM64_REG_D0,
        arm.UC_ARM64_REG_X0,
        arm.UC_ARM64_REG_SP,
        arm.UC_ARM64_REG_LR,
    )
    folder = tmp_path_factory.mktemp("neon")
    (folder / "rows.cpp").write_text(NEON)
    outside = {
        0x1000 + 16 * i: name
        for i, name in enumerate(["exp", "exp2", "expm1", "log", "memcpy", "memset"])
    }
    build = "c++ -target aarch64-linux-musl -std=c++17 -O3 -ffp-contract=off -fno-trapping-math"
    build += f" -fno-sanitize=all -ffunction-sections -I {Path(__file__).parents[1] / 'csrc'}"
    build += " -c rows.cpp -o rows.o"
    link = "ld.lld --gc-sections --unresolved-symbols=ignore-all -e rows rows.o -o rows"
    link += "".join(f" --defsym={name}={at}" for at, name in outside.items())
    for command in (build, link):
        subprocess.run(
            [sys.executable, "-P", "-m", "ziglang", *command.split()], cwd=folder, check=True
        )

    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.mem_map(0, 1 << 26)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point on
    elf = (folder / "rows").read_bytes()
    entry, headers = struct.unpack_from("<QQ", elf, 24)
    for i in range(struct.unpack_from("<H", elf, 56)[0]):
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", elf, headers + 56 * i)
        if kind == 1:
            machine.mem_write(address, elf[offset : offset + size])

    def in_python(machine, address, *_):
        name, (to, source, count) = outside[address], map(machine.reg_read, range(X0, X0 + 3))
        if name.startswith("mem"):
            value = machine.mem_read(source, count) if name == "memcpy" else [source & 255] * count
            return machine.mem_write(to, bytes(value))
        x = np.uint64(machine.reg_read(D0)).view(np.float64)
        machine.reg_write(D0, int(getattr(np, name)(x).view(np.uint64)))

    for at in outside:
        machine.mem_write(at, b"\xc0\x03\x5f\xd6")  # ret
        machine.hook_add(unicorn.UC_HOOK_CODE, in_python, None, at, at)

    def rows(logits, targets, upstream):
        (n, V), (z, y, out, dz) = logits.shape, (i << 22 for i in (4, 6, 7, 8))
        for at, x in ((z, logits.view(torch.uint8)), (y, targets), (out + 8 * n, upstream)):
            machine.mem_write(at, x.numpy().tobytes())
        arguments = enumerate((DTYPES.index(logits.dtype), n, V, z, y, out, dz), X0)
        for register, value in (*arguments, (SP, 1 << 26), (LR, 0x2000)):
            machine.reg_write(register, value)
        machine.emu_start(entry, 0x2000)
        values = torch.frombuffer(machine.mem_read(out, 8 * n), dtype=torch.float32).view(2, n)
        return *values, torch.frombuffer(
            machine.mem_read(dz, logits.nbytes), dtype=logits.dtype
        ).view(n, V)

    return rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neon_isa_matches_float64(neon_rows, dtype):
    for V in (1, 7, 129, 5000):
        torch.manual_seed(V)
        logits = (torch.randn(4, V) * 8).to(dtype)
        logits[1:3, 1 + V // 3 :: 3] = -math.inf
        targets, upstream = torch.randint(V, (4,)), torch.randn(2, 4)
        expected = truth(logits, targets, 0.7, *upstream)
        for x, y, relative in zip(
            neon_rows(logits, targets, upstream), expected, (1e-6, 1e-6, EPS[dtype])
        ):
            torch.testing.assert_close(x.double(), y, rtol=relative, atol=2e-6)
        logits[0, V // 2] = math.nan
        assert neon_rows(logits, targets, upstream)[0].isnan().tolist() == [
            True,
            False,
            False,
            False,
        ]


def test_nothing_to_do():
    for B, T in ((0, 5), (5, 0)):
        logits, targets = torch.empty(B, T, 1000), torch.empty(B, T, dtype=torch.int64)
        assert forward_backward(logits, targets)[0].shape == (B, T)
        x, mask = torch.empty(B, T), torch.empty(B, T, dtype=torch.bool)
        assert cpp.kl_estimate_fwd(x, x, mask, "k3").shape == (B, T)
        assert cpp.gae_fwd(x, x, mask, 0.9, 0.9, torch.ones(B), None)[0].shape == (B, T)
        assert (cpp.gae_bwd(x, x, mask, 0.9, 0.9, True, None)[2] == 0).all()


def test_kl_and_gae_are_independent_of_threads(threads):
    torch.manual_seed(0)
    x, y, z = torch.randn(3, 500, 1001).unbind()
    mask = torch.rand(500, 1001) < 0.7
    results = []
    for count in (1, 2):
        threads(count)
        results.append([
            cpp.kl_estimate_fwd(x, y, mask, "k3"),
            *cpp.kl_estimate_bwd(z, x, y, mask, "k3"),
            *cpp.gae_fwd(x, y, mask, 0.99, 0.95, z[:, 0].contiguous(), None),
            *cpp.gae_bwd(x, y, mask, 0.99, 0.95, True, None),
        ])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_gae_skips_gaps_as_if_compacted():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 6, 50).unbind()
    mask = torch.rand(6, 50) < 0.6
    mask[0] = False
    last_values = torch.randn(6)
    rewards, values = rewards.masked_fill(~mask, math.nan), values.masked_fill(~mask, math.nan)
    advantages, returns = cpp.gae_fwd(rewards, values, mask, 0.9, 0.8, last_values, None)
    for b in range(6):
        kept = mask[b]
        row = (rewards[b, kept][None], values[b, kept][None], kept[kept][None])
        compact = cpp.gae_fwd(*row, 0.9, 0.8, last_values[b : b + 1], None)
        assert torch.equal(advantages[b, kept], compact[0][0])
        assert torch.equal(returns[b, kept], compact[1][0])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_extension_shares_torchs_openmp():
    if cpp.cpu_features()["threading"] != "openmp" or not os.path.exists("/proc/self/maps"):
        pytest.skip("needs OpenMP and Linux")
    with open("/proc/self/maps") as maps:
        assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1
