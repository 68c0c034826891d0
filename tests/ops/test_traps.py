"""Known pitfalls of kernels of this kind, each with a description and the tests that cover it.

The tests of a single op are in that op's file. Tests over all ops are here, also threads and fork.
"""

import ast
import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from op_helpers import TRITON_LAUNCHERS, call_every_launcher, op_call
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_core
from rlhf_core import backends, ops

TESTS = Path(__file__).parents[1]
TRAPS = {
    1: "a first block that is all -inf gives NaN",
    2: "0 * -inf in entropy or KL gives NaN",
    3: "the tail of the vocabulary is counted as exp(0)",
    4: "the running maximum starts at 0",
    5: "offsets beyond 2^31 wrap around",
    6: "rows on a grid axis that ends at 65535",
    7: "a new temperature, length or batch compiles anew",
    8: "the target's gradient is read, changed and written in bfloat16",
    9: "the gradient is right for a uniform upstream one only",
    10: "3-D inputs lose their gradient",
    11: "kernels fail when called from an autograd thread",
    12: "torch.compile passes float64 scalars",
    13: "views such as ids[1:] are not aligned",
    14: "0 * NaN on masked rows",
    15: "a batch of masked rows alone",
    16: "vector and scalar code disagree",
    17: "sequences of length 0 and 1",
    18: "atomics make results differ from run to run",
    19: "a launch goes to the current GPU, not to the tensors'",
    20: "k3 cancels where policy and reference nearly agree",
    21: "a hidden synchronisation",
    22: "rows of an odd vocabulary, as of 50257, are loaded narrowly or beyond their end",
}
HELD_BY = {
    1: ("logprobs::adversarial_rows_match_float64",
        "kl::full_kl_of_rows_whose_first_blocks_are_all_masked_out"),
    2: ("logprobs::adversarial_rows_match_float64",
        "kl::full_kl_ignores_tokens_that_neither_can_sample",
        "kl::full_kl_is_inf_where_the_reference_cannot_sample_what_the_policy_can"),
    3: ("logprobs::values_entropy_and_gradient_match_float64_for_any_vocabulary",
        "kl::full_kl_and_both_gradients_match_float64",
        "cpp::every_size_and_dtype_matches_float64"),
    4: ("logprobs::an_offset_common_to_all_logits_costs_no_digits",
        "kl::full_kl_finds_maxima_that_come_late",
        "cpp::offset_that_starts_too_low"),
    5: ("logprobs::offsets_beyond_2_to_the_31",
        "kernels::exact_kl_of_rows_further_apart_than_int32_offsets"),
    6: ("kernels::triton_rows_lie_on_the_one_grid_axis_that_is_long_enough",),
    7: ("kernels::new_lengths_batches_temperatures_and_coefficients_compile_nothing",),
    8: ("logprobs::the_gradient_of_a_near_certain_target_is_formed_before_rounding",
        "cpp::gradients_are_rounded_once_to_nearest",
        "linear_logprobs::16_bit_gradients_of_the_weight_add_up_in_float32"),
    9: ("logprobs::values_entropy_and_gradient_match_float64_for_any_vocabulary",
        "linear_logprobs::values_and_gradients_are_those_of_the_whole_logits",
        "kl::full_kl_and_both_gradients_match_float64",
        "kl::values_and_gradients_match_the_float64_formula",
        "gae::a_mask_with_gaps_equals_the_compacted_sequence",
        "policy_loss::gradients_scale_with_the_upstream_one"),
    10: ("logprobs::any_number_of_leading_axes",
         "kl::values_and_gradients_match_the_float64_formula",
         "linear_logprobs::values_and_gradients_are_those_of_the_whole_logits"),
    11: ("traps::every_op_works_in_a_thread_of_autograds_own",
         "traps::backward_runs_in_another_thread"),
    12: ("compiled::one_compiled_graph_gives_the_results_of_eager_mode",
         "traps::numbers_that_change_under_torch_compile_leave_results_float32"),
    13: ("logprobs::unaligned_and_strided_targets_and_masks",
         "traps::unaligned_tensors_give_the_bits_of_aligned_ones"),
    14: ("masking::masked_values_change_nothing_bitwise_and_come_out_as_zero",
         "linear_logprobs::masked_rows_are_not_computed_and_their_values_change_nothing",
         "kl::full_kl_and_its_gradients_are_zero_where_the_mask_is_false",
         "gae::what_masked_inputs_hold_changes_no_bit_of_ppo_advantages",
         "policy_loss::what_masked_inputs_hold_changes_no_bit_and_gets_no_gradient"),
    15: ("masking::a_batch_that_counts_nothing_gives_zeros_and_zero_gradients",
         "linear_logprobs::nothing_to_compute_gives_zeros",
         "policy_loss::a_batch_that_counts_nothing_has_loss_zero_and_no_gradient"),
    16: ("cpp::other_isas_match_float64",),
    17: ("logprobs::an_empty_batch_gives_empty_results_and_gradients", "gae::one_token_rows",
         "gae::packed_input_of_few_or_empty_sequences",
         "gae::ppo_advantages_of_an_empty_batch_are_empty"),
    18: ("logprobs::the_same_call_gives_the_same_bits",
         "policy_loss::the_result_is_the_same_bit_for_bit_every_time",
         "kernels::programs_stay_inside_their_tensors_and_apart_and_any_order_gives_the_same_bits"),
    19: ("traps::every_launch_is_on_the_tensors_own_gpu",),
    20: ("kl::k3_keeps_its_digits_where_policy_and_reference_nearly_agree",),
    21: ("traps::no_op_waits_for_the_device",),
    22: ("logprobs::values_entropy_and_gradient_match_float64_at_the_vocabularies_of_real_models",
         "kernels::triton_kernels_compile_for_every_gpu_without_spills_and_with_wide_loads",
         "kernels::programs_stay_inside_their_tensors_and_apart_and_any_order_gives_the_same_bits"),
}  # fmt: skip


def test_every_trap_is_held_by_tests_that_exist():
    assert list(HELD_BY) == list(TRAPS)
    for file, name in {tuple(test.split("::")) for tests in HELD_BY.values() for test in tests}:
        paths = Path(__file__).with_name(f"test_{file}.py"), TESTS / f"test_{file}.py"
        tree = ast.parse(next(path for path in paths if path.exists()).read_text())
        assert f"test_{name}" in [x.name for x in tree.body if isinstance(x, ast.FunctionDef)], (
            f"{file}::{name}"
        )


def everything(leaves, loss):
    """Outputs and gradients of an op, prepared by `op_call`."""
    outputs, total = loss(*leaves)
    return [x.detach() for x in outputs] + list(
        torch.autograd.grad(total, leaves) if leaves else ()
    )


@pytest.mark.parametrize("name", ops.__all__)
def test_backward_runs_in_another_thread(backend, name):
    want = everything(*op_call(name, backend))
    leaves, loss = op_call(name, backend)
    outputs, total = loss(*leaves)
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(torch.autograd.grad(total, leaves) if leaves else ())
    )
    thread.start()
    thread.join()
    assert len(got) == len(leaves) and all(
        torch.equal(x, y) for x, y in zip([*outputs, *got], want)
    )


class Nested(torch.autograd.Function):
    """Its backward runs another one, `depth` levels deep; beyond 60 autograd uses new threads."""

    @staticmethod
    def forward(ctx, x, depth, function):
        ctx.depth, ctx.function = depth, function
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        with torch.enable_grad():
            if ctx.depth == 0:
                ctx.function()
            else:
                x = torch.zeros((), device=dx.device, requires_grad=True)
                Nested.apply(x, ctx.depth - 1, ctx.function).backward()
        return dx, None, None


def test_every_op_works_in_a_thread_of_autograds_own(backend):
    prepared = [op_call(name, backend) for name in ops.__all__]
    got, threads = [], []

    def function():
        threads.append(threading.get_ident())
        got.extend(everything(*x) for x in prepared)

    Nested.apply(torch.zeros((), requires_grad=True), 61, function).backward()
    assert threads != [threading.get_ident()]
    for name, x in zip(ops.__all__, got, strict=True):
        torch.testing.assert_close(x, everything(*op_call(name, backend)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_numbers_that_change_under_torch_compile_leave_results_float32(compiler):
    if not backends.status()[1].available:
        pytest.skip(backends.status()[1].reason)
    torch.manual_seed(0)
    (z, ref), (targets,) = torch.randn(2, 2, 3, 5), torch.randint(5, (1, 2, 3))
    tokens, mask = torch.randn(3, 2, 3).unbind(), torch.rand(2, 3) < 0.7

    def step(z, number):
        logprobs, entropy = rlhf_core.token_logprobs_and_entropy(z, targets, temperature=number)
        kl = rlhf_core.full_kl(z, ref, temperature=number, mask=mask)
        advantages, _ = rlhf_core.gae(*tokens[:2], mask, gamma=number / 10, lam=number / 9)
        loss, _ = rlhf_core.ppo_loss(
            logprobs, tokens[2], advantages, None, None, None, mask, entropy=entropy,
            clip_range=(number, 2 * number), value_clip_range=None, vf_coef=0.0,
            entropy_coef=number, dual_clip=1 + number,
        )  # fmt: skip
        return number * loss + (number * kl).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    # A constant in the first graph, and if dynamo can do that, an input to the second.
    for number in (0.7, 1.3):
        results = []
        for function in (step, compiled):
            leaf = z.clone().requires_grad_()
            loss = function(leaf, number)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # dtypes too


def shifted(x):
    """Equal tensors that lie one element further than an aligned one."""
    if isinstance(x, tuple):
        return tuple(map(shifted, x))
    if isinstance(x, dict):
        return {name: shifted(value) for name, value in x.items()}
    if isinstance(x, torch.Tensor):
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    return x


@pytest.mark.parametrize("name", ops.__all__)
def test_unaligned_tensors_give_the_bits_of_aligned_ones(backend, name):
    want = everything(*op_call(name, backend, V=77))  # whole vectors and a tail
    got = everything(*op_call(name, backend, V=77, arrange=shifted))
    # Torch's own matrix products may round otherwise on unaligned memory.
    for x, y in zip(got, want, strict=True):
        rounds = name.startswith("linear") and y.is_floating_point()
        tolerance = 1e-6 * float(y.abs().max()) if rounds else 0
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def test_every_launch_is_on_the_tensors_own_gpu(monkeypatch):
    kernels = pytest.importorskip("rlhf_core.kernels")
    current, launched = [], []

    @contextlib.contextmanager
    def device_of(x):
        current.append(x.device)
        yield
        current.pop()

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                assert current == [args[0].device], (
                    f"{self.name} is launched on whatever GPU is current"
                )
                launched.append(self.name)

            return launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in {sys.modules[getattr(kernels, name).__module__] for name in TRITON_LAUNCHERS}:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name))
    call_every_launcher(kernels)
    assert {f"{name}_kernel" for name in TRITON_LAUNCHERS} == set(launched)


class Waits(TorchDispatchMode):
    """Counts calls that would wait for a GPU: values or element counts that Python reads."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        self.count += name.startswith(
            ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
        )
        boolean = (
            [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if name.startswith("index")
            else []
        )
        self.count += len(boolean)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ops.__all__)
@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_no_op_waits_for_the_device(backend, name, monkeypatch):
    for file in ("logprobs", "gae"):
        monkeypatch.setattr(
            sys.modules[f"rlhf_core.ops.{file}"], "values_may_be_read", lambda x: False
        )  # as on a GPU
    leaves, loss = op_call(name, backend)
    with Waits() as waits:
        everything(leaves, loss)
    expected = {
        "linear_token_logprobs": 2,  # both passes count the masked rows
        "linear_token_statistics": 2,
        "linear_token_loss": 1,  # backward asks whether the upstream gradient is 1
    }
    assert waits.count == expected.get(name, 0)


def python(code, *args):
    """Run the code in its own process, with two threads per op."""
    code = "import os, sys, threading, torch\ntorch.set_num_threads(2)\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


WORK = """
def work():
    import rlhf_core
    torch.manual_seed(0)
    z = torch.randn(2, 40, 5003, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs, entropy = rlhf_core.token_logprobs_and_entropy(z, torch.full((2, 40), 7))
    kl = rlhf_core.full_kl(z, z.detach().flip(-1))
    x = torch.linspace(-1, 1, 300 * 400).view(300, 400)
    done = rlhf_core.ppo_advantages(x[:, 0], x, x.flip(0), x * 2, x > -0.9, kl_coef=0.1,
                                    kl_estimator="k3")
    loss, stats = rlhf_core.ppo_loss(x, x.flip(0) / 9, *done[:2], x, x * 2, x > 0, clip_range=0.2,
                                     value_clip_range=0.2, vf_coef=0.1)
    gradients = torch.autograd.grad((logprobs + entropy + kl).sum(), z)
    return [logprobs, entropy, kl, *gradients, *done, loss, *stats]

def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
"""


@pytest.mark.slow
def test_two_threads_import_and_use_the_library_at_once():
    python(f"""{WORK}
start, results = threading.Barrier(2), [[], []]
def loop(out):
    start.wait()
    for _ in range(10):
        out.append(work())
threads = [threading.Thread(target=loop, args=(out,)) for out in results]
[t.start() for t in threads], [t.join() for t in threads]
alone = work()
assert [len(out) for out in results] == [10, 10]
assert all(same(x, alone) for out in results for x in out)
""")


FORK = f"""{WORK}
import time
import rlhf_core
threads, used = map(int, sys.argv[1:])
logits, targets = torch.randn(64, 9000), torch.randint(9000, (64,))

def ours():  # work for several threads, without torch's own ops
    return [rlhf_core.token_logprobs(logits, targets)]

want = ours() if used else None
child = os.fork()
if child == 0:
    torch.set_num_threads(threads)
    got = ours() if used else work()
    os._exit(0 if want is None or same(got, want) else 1)
for _ in range(80):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(status)
    time.sleep(0.1)
os.kill(child, 9), os.waitpid(child, 0)
sys.exit("the child hangs")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads, used", [(2, 0), (1, 1), (2, 1)])
def test_a_forked_child_computes(threads, used):
    """Children with this many threads, of a parent that used two or none; DataLoader uses one.

    In the last case torch's own ops hang, because libgomp waits for threads that are not forked.
    Ours do not hang.
    """
    python(FORK, str(threads), str(used))
