"""Every op under torch.compile(fullgraph=True), forward and backward, and under opcheck."""

import pytest
import torch
from op_helpers import LAUNCHERS, op_call
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_core
from rlhf_core import backends, compiled, ops

OPS = [name for name in ops.__all__ if name != "decode_attention"]  # it breaks the graph


@pytest.fixture(params=["cpp", "triton"])
def fused(request):
    """A backend that torch.compile can run here. Interpreted Triton cannot be compiled."""
    usable = {s.name: s.available for s in backends.status()}[request.param]
    if not usable or (request.param == "triton" and not torch.cuda.is_available()):
        pytest.skip(f"{request.param} is not available" if not usable else "no CUDA device")
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda" if request.param == "triton" else "cpu"):
        yield request.param


def assert_compiles(names, backend, compiler, dynamic=None):
    """One graph that calls the ops has their outputs and gradients. The compiler is torch's."""
    calls = [op_call(name, backend) for name in names]

    def everything(leaves):
        results = [
            call(*leaves_of_op) for (_, call), leaves_of_op in zip(calls, leaves, strict=True)
        ]
        return [x for outputs, _ in results for x in outputs], sum(loss for _, loss in results)

    compiled_everything = torch.compile(
        everything, fullgraph=True, dynamic=dynamic, backend=compiler
    )
    found = []
    for function in (everything, compiled_everything):
        leaves = [[x.detach().clone().requires_grad_() for x in some] for some, _ in calls]
        outputs, loss = function(leaves)
        flat = [x for some in leaves for x in some]
        found.append(
            ([x.detach() for x in outputs], torch.autograd.grad(loss, flat) if flat else ())
        )
    (want, gradients), (got, compiled_gradients) = found
    tight = dict(rtol=1e-6, atol=1e-6) if backend != "reference" else dict(rtol=1e-5, atol=1e-5)
    assert_close(got, want, **tight)
    assert_close(compiled_gradients, gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPS)
def test_one_compiled_graph_gives_the_results_of_eager_mode(name, fused, dynamic):
    """Dynamo and AOTAutograd trace each op, forward and backward, without a break."""
    assert_compiles([name], fused, "aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_the_reference_compiles_too(name):
    torch._dynamo.reset()
    assert_compiles([name], "reference", "aot_eager")


@pytest.mark.slow
def test_inductor_compiles_all_ops_as_one_graph(fused):
    """Inductor generates code for what lies between the kernels."""
    assert_compiles(OPS, fused, "inductor")


@pytest.mark.slow
def test_inductor_compiles_the_reference_of_all_ops_as_one_graph():
    torch._dynamo.reset()
    assert_compiles(OPS, "reference", "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_steps_of_several_layers_write_the_same_to_one_cache(fused, dynamic):
    q, k, v = torch.randn(3, 2, 2, 4)
    cache = torch.randn(2, 2, 5, 2, 3, 4)  # keys and values of two layers
    lengths, slots = torch.tensor([2, 0, 1, 1, 2]), torch.tensor([4, 1])

    def step(q, keys, values):
        for layer in range(2):
            q = q + rlhf_core.decode_attention(
                q, k, v, keys[layer], values[layer], lengths, slots, rope=None, backend=fused
            )
        return q

    other = cache.clone()
    want, got = step(q, *cache), torch.compile(step, dynamic=dynamic)(q, *other)
    assert torch.equal(got, want) and torch.equal(other, cache)


def test_a_wrong_argument_is_named_while_compiling(fused):
    with pytest.raises(Exception, match="temperature must be finite"):
        torch.compile(rlhf_core.token_logprobs, fullgraph=True)(
            torch.zeros(2, 3), torch.zeros(2).long(), temperature=0
        )


def test_every_launcher_is_an_operator():
    for name in ("rlhf_core.cpp", "rlhf_core.kernels"):
        missing = set(LAUNCHERS) - set(vars(compiled.launchers(name)))
        assert not missing, missing


class Recorder(TorchDispatchMode):
    """Records our operators that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlhf_core":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_every_operator_passes_opcheck_on_the_ops_arguments(fused, monkeypatch):
    with monkeypatch.context() as patch, Recorder() as recorder:
        patch.setattr(
            torch.compiler, "is_compiling", lambda: True
        )  # the ops use the operators in eager mode
        for name in OPS:
            leaves, loss = op_call(name, fused)
            _, total = loss(*leaves)
            if leaves:
                total.backward()
    names = {
        "decode_attention_fwd",
        *(func._schema.name.split("::")[1] for func, _ in recorder.calls),
    }
    assert names == {
        name for name in vars(compiled.launchers("rlhf_core.cpp")) if not name.startswith("__")
    }
    for func, args in recorder.calls:
        torch.library.opcheck(
            func, [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        )
