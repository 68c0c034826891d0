"""Tensors whose values a kernel cannot read from memory: a right result or a clear error."""

import pytest
import torch
from op_helpers import op_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import rlhf_core
from rlhf_core import ops

TARGETS = torch.tensor([[0, 1, 2], [3, 4, 0]])


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, such as DTensor."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(
            cls, x.shape, dtype=x.dtype, device=x.device, strides=x.stride()
        )

    def __init__(self, x):
        self.inner = x

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, Wrapper) else x

        out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: Wrapper(x) if isinstance(x, torch.Tensor) else x, out)


class Named(torch.Tensor):
    """A subclass that has memory."""


def fake(x):
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def without_storage(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


ODD = {
    "wrapper": Wrapper,
    "subclass": lambda x: x.as_subclass(Named),
    "negative view": lambda x: torch._neg_view(-x),
}
PLAIN = {Wrapper: lambda x: x.inner, Named: lambda x: x.as_subclass(torch.Tensor)}


def call(name, arguments):
    leaves, rest, settings = arguments
    found = getattr(rlhf_core, name)(*leaves, *rest, **settings)
    tensors = [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)]
    return [PLAIN.get(type(x), lambda x: x)(x) for x in tensors]


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ops.__all__)
def test_an_odd_float_tensor_in_any_place_gives_what_a_plain_one_gives(name, kind):
    flat, spec = tree_flatten(op_inputs(name))

    def inputs(odd=None):
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in flat]
        if odd is not None:
            copies[odd] = ODD[kind](copies[odd])
        return tree_unflatten(copies, spec)

    want = call(name, inputs())
    for i, x in enumerate(flat):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            for got, expected in zip(call(name, inputs(i)), want, strict=True):
                torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda x: x.to_sparse(), "logits must be dense, got torch.sparse_coo: convert it"),
        (lambda x: x.to_mkldnn(), "logits must be dense, got torch._mkldnn"),
        (lambda x: torch.nested.nested_tensor(list(x)), "logits must be dense, got nested"),
        (
            lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
            "logits must be dense, got nested",
        ),
        (
            lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
            "logits must be a float tensor, got torch.quint8",
        ),
        (lambda x: torch.complex(x, x), "logits must be a float tensor, got torch.complex64"),
        (lambda x: torch._efficientzerotensor(x.shape), "got a Tensor without memory"),
        (torch._to_functional_tensor, "got a Tensor without memory"),
        (without_storage, "got a Tensor without memory"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_no_op_takes_is_named(make, message):
    pytest.importorskip("rlhf_core.cpp")
    with pytest.raises(TypeError, match=message):
        rlhf_core.token_logprobs(make(torch.zeros(2, 3, 5)), TARGETS)


@pytest.mark.parametrize("kind", [*ODD, "fake"])
@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_a_backend_asked_for_by_name_refuses_an_odd_tensor(backend, kind):
    odd = ODD.get(kind, fake)(torch.zeros(2, 3, 5))
    message = f"backend '{backend}' reads plain tensors, got a .*: use backend='reference'"
    with pytest.raises(TypeError, match=message):
        rlhf_core.token_logprobs(odd, TARGETS.to(odd.device), backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x | dict(logits=x["logits"].double()), "another dtype than float32, bfloat16"),
        (lambda x: x | dict(logits=torch.zeros(2, 3, 5).to(torch.float8_e5m2)), "another dtype"),
        (lambda x: x | dict(logits=torch.zeros(2, 5, 3).mT), "a strided last axis"),
        (lambda x: x | dict(logits=torch.zeros(2, 3, 5, device="meta")), "Cannot pack tensors on"),
        (lambda x: x | dict(targets=TARGETS.int()), "another dtype than this argument's"),
        (lambda x: x | dict(targets=Wrapper(TARGETS)), "a Wrapper without memory"),
        (lambda x: x | dict(mask=TARGETS), "another dtype than this argument's"),
        (lambda x: x | dict(logprobs=torch.zeros(3, 2).T), "one that is not contiguous"),
        (lambda x: x | dict(logits="text"), "a str: "),
    ],
)
def test_the_extension_reads_no_tensor_that_differs_from_what_the_kernel_expects(change, message):
    cpp = pytest.importorskip("rlhf_core.cpp")
    arguments = change(
        dict(logits=torch.zeros(2, 3, 5), targets=TARGETS, mask=None, logprobs=torch.zeros(2, 3))
    )
    logits, targets, mask, logprobs = arguments.values()
    with pytest.raises(TypeError, match=f"C\\+\\+ kernels read dense CPU tensors, got .*{message}"):
        cpp._C.token_logprobs_fwd(logits, targets, mask, 1.0, logprobs, None, None, 1)


def compiled(function, *args):
    pytest.importorskip("rlhf_core.cpp")
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)(*args)


@pytest.mark.parametrize(
    "bounds, found",
    [([0, 3, 10**9], "1000000000 at 2"), ([0, 2, 1], "1 at 2"), ([-1, 3], "-1 at 0")],
)
def test_compiled_code_names_bad_bounds_of_packed_sequences(bounds, found):
    x, mask = torch.randn(3), torch.ones(3, dtype=torch.bool)
    message = f"cu_seqlens must rise from >= 0 to <= 3, got {found}"
    with pytest.raises(ValueError, match=message):
        compiled(lambda x, c: rlhf_core.gae(x, x, mask, cu_seqlens=c), x, torch.tensor(bounds))
    with pytest.raises(ValueError, match=message):
        compiled(
            lambda x, c: rlhf_core.ppo_advantages(
                x[: len(bounds) - 1], x, x, x, mask, kl_coef=0.1, cu_seqlens=c
            ),
            x,
            torch.tensor(bounds),
        )


def with_temperature(name, backend):
    z, hidden = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    weight = torch.randn(5, 4)
    return {
        "token_logprobs": lambda T: rlhf_core.token_logprobs(
            z, TARGETS, temperature=T, backend=backend
        ),
        "full_kl": lambda T: rlhf_core.full_kl(z, 2 * z, temperature=T, backend=backend),
        "linear_token_logprobs": lambda T: rlhf_core.linear_token_logprobs(
            hidden, weight, TARGETS, temperature=T, backend=backend
        ),
    }[name]


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["token_logprobs", "full_kl", "linear_token_logprobs"])
def test_compiled_code_names_a_bad_temperature_of_a_row_or_gives_nan(name, bad):
    temperatures = torch.ones(2, 3)
    temperatures[1, 1] = bad
    with pytest.raises(ValueError, match=f"temperature must be finite and > 0, got {bad:.0f}"):
        compiled(with_temperature(name, "cpp"), temperatures)
    got = compiled(with_temperature(name, "reference"), temperatures)
    assert got.isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
def test_compiled_code_names_a_target_out_of_range(name):
    z, weight = torch.randn(2, 3, 5), torch.randn(5, 5)
    inputs = (z,) if name == "token_logprobs" else (z, weight)
    with pytest.raises(ValueError, match=r"target 7 at \(0, .\) is outside \[0, 5\)"):
        compiled(lambda y: getattr(rlhf_core, name)(*inputs, y), TARGETS.where(TARGETS != 2, 7))
