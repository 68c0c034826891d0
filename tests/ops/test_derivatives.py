"""Derivatives beyond the plain backward pass: right, or a clear error, never silently wrong."""

import pytest
import torch
from op_helpers import op_inputs
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import rlhf_core

FIRST_ONLY = ["ppo_loss", "linear_token_loss"]
DIFFERENTIABLE = [
    "token_logprobs",
    "token_logprobs_and_entropy",
    "linear_token_logprobs",
    "linear_token_logprobs_and_entropy",
    "linear_token_statistics",
    "full_kl",
    "kl_estimate",
    "gae",
]
BOTH = pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
TARGETS = [[0, 1, 2], [3, 4, 0]]


def scalar(name, backend, power=2):
    """An op's float inputs, and a function of them: a sum of its outputs to a power."""
    leaves, rest, settings = op_inputs(name)
    settings.pop("inplace_backward", None)

    def function(*leaves):
        found = getattr(rlhf_core, name)(*leaves, *rest, backend=backend, **settings)
        found = (found,) if isinstance(found, torch.Tensor) else found
        if name in FIRST_ONLY:
            found = found[:1]  # the others are detached
        outputs = [x for x in found if x is not None and x.is_floating_point()]
        return sum((i + 1.5) * (x**power).sum() for i, x in enumerate(outputs))

    return leaves, function


def second_order(name, backend, power):
    """The gradient of loss + 10 |dloss/dx|^2."""
    leaves, function = scalar(name, backend, power)
    leaves = [x.clone().requires_grad_() for x in leaves]
    loss = function(*leaves)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(loss + 10 * sum(g.square().sum() for g in first), leaves)


@BOTH
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_those_of_the_reference(name, power, backend):
    got, want = (second_order(name, b, power) for b in (backend, "reference"))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("name", FIRST_ONLY)
def test_a_loss_without_second_derivative_refuses_create_graph(name, backend):
    with pytest.raises(
        RuntimeError, match=f"{name} has no second derivative.*use backend='reference'"
    ):
        second_order(name, backend, 1)


@BOTH
def test_second_derivatives_are_right_where_one_input_depends_on_the_other(backend):
    found = []
    for b in (backend, "reference"):
        torch.manual_seed(0)
        z = torch.randn(2, 3, 5).requires_grad_()
        loss = rlhf_core.full_kl(z, z.flip(-1) ** 2, backend=b).sum()
        (first,) = torch.autograd.grad(loss, z, create_graph=True)
        found += [first, *torch.autograd.grad(first.square().sum(), z)]
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-4, atol=1e-4)


@BOTH
def test_a_hessian_vector_product_of_the_exact_kl_is_the_fisher_matrix_times_the_vector(backend):
    z, v = torch.randn(2, 1, 1, 7).unbind()
    x = z.clone().requires_grad_()
    kl = rlhf_core.full_kl(x, z, backend=backend).sum()
    (first,) = torch.autograd.grad(kl, x, create_graph=True)
    (product,) = torch.autograd.grad((first * v).sum(), x)
    p = z.softmax(-1)
    torch.testing.assert_close(product, p * (v - (p * v).sum(-1, keepdim=True)))


def dual(function, *leaves):
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in leaves))
        return forward_ad.unpack_dual(out).tangent


TRANSFORMS = {
    "dual": dual,
    "jvp": lambda f, *x: torch.func.jvp(f, x, tuple(torch.ones_like(y) for y in x))[1],
    "grad": lambda f, *x: torch.func.grad(f)(*x),
    "hessian": lambda f, *x: torch.func.hessian(f)(*x),
    "vmap": lambda f, *x: torch.func.vmap(f)(*(torch.stack((y, 2 * y)) for y in x)),
    "trace": lambda f, *x: torch.jit.trace(f, x, check_trace=False)(*(2 * y for y in x)),
    "make_fx": lambda f, *x: make_fx(f)(*x)(*(2 * y for y in x)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, *FIRST_ONLY])
def test_a_transform_of_torch_gives_what_it_gives_for_the_reference(name, transform):
    leaves, function = scalar(name, None)
    got = TRANSFORMS[transform](function, *leaves)
    want = TRANSFORMS[transform](scalar(name, "reference")[1], *leaves)
    assert got is not None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_backend_asked_for_by_name_refuses_a_transform_of_torch(transform, backend):
    leaves, function = scalar("token_logprobs", backend)
    with pytest.raises(TypeError, match=f"backend '{backend}' reads plain tensors, got tensors in"):
        TRANSFORMS[transform](function, *leaves)


@pytest.mark.parametrize("name", ["token_logprobs", "full_kl", "gae", "ppo_loss"])
def test_compiled_code_refuses_forward_mode_and_drops_no_tangent(name):
    pytest.importorskip("rlhf_core.cpp")
    torch._dynamo.reset()
    leaves, function = scalar(name, "cpp")
    with pytest.raises(
        Exception, match=r"_fwd has no forward-mode derivative under torch\.compile"
    ):
        dual(torch.compile(function, backend="eager"), *leaves)


@BOTH
def test_a_second_backward_after_the_logits_were_overwritten_is_refused(backend):
    for shape in ((2, 3, 5), (6, 5)):
        x = torch.randn(shape).requires_grad_()
        targets = torch.tensor(TARGETS).view(shape[:-1])
        loss = rlhf_core.token_logprobs(x * 1, targets, inplace_backward=True, backend=backend)
        torch.autograd.grad(loss.sum(), x, retain_graph=True)
        with pytest.raises(RuntimeError, match=r"the first one overwrote them.*inplace_backward"):
            torch.autograd.grad(loss.sum(), x)


@BOTH
def test_another_op_that_saved_the_overwritten_logits_notices(backend):
    x = torch.randn(2, 3, 5).requires_grad_()
    loss = rlhf_core.token_logprobs(
        x.tanh(), torch.tensor(TARGETS), inplace_backward=True, backend=backend
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss.sum(), x)


@BOTH
def test_overlapping_rows_are_not_overwritten(backend):
    x = torch.randn(40).as_strided((2, 3, 5), (6, 2, 1)).requires_grad_()
    before, found = x.detach().clone(), []
    for inplace in (False, True):
        loss = rlhf_core.token_logprobs(
            x, torch.tensor(TARGETS), inplace_backward=inplace, backend=backend
        )
        found += torch.autograd.grad(loss.sum(), x)
    assert torch.equal(*found) and torch.equal(x, before)


@BOTH
@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "ppo_loss"])
def test_an_upstream_gradient_may_be_a_negative_view(name, backend):
    """Autograd makes such views where the loss conjugates a complex number."""
    leaves, rest, settings = op_inputs(name)
    found = []
    for negate in (torch.neg, torch._neg_view):
        inputs = [x.clone().requires_grad_() for x in leaves]
        out = getattr(rlhf_core, name)(*inputs, *rest, backend=backend, **settings)
        out = out if isinstance(out, torch.Tensor) else out[0]
        upstream = torch.linspace(-1, 1, out.numel()).view(out.shape)
        found.append(torch.autograd.grad(out, inputs, negate(upstream)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
