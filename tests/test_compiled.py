"""Every op under torch.compile(fullgraph=True), forward and backward, and under opcheck."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_core
from rlhf_core import backends, compiled, ops

B, T, D, V = 2, 3, 4, 5


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


def inputs(name):
    """Arguments of the public op: those that may require a gradient, others, keywords."""
    z, ref, hidden, weight = (
        torch.randn(B, T, V),
        torch.randn(B, T, V),
        torch.randn(B, T, D),
        torch.randn(V, D),
    )
    tokens, mask = (
        torch.randn(7, B, T).unbind(),
        torch.tensor([[True, False, True], [True, True, True]]),
    )
    targets, rows = torch.randint(V, (B, T)), 0.5 + torch.rand(B, T)
    return {
        "token_logprobs": (
            (z,),
            (targets,),
            dict(mask=mask, temperature=0.7, inplace_backward=True),
        ),
        "token_logprobs_and_entropy": ((z,), (targets,), dict(mask=mask, temperature=rows)),
        "linear_token_logprobs": ((hidden, weight), (targets,), dict(mask=mask, chunk_rows=2)),
        "linear_token_logprobs_and_entropy": (
            (hidden, weight),
            (targets,),
            dict(temperature=rows, chunk_rows=2),
        ),
        "linear_token_statistics": (
            (hidden, weight),
            (targets,),
            dict(mask=mask, temperature=0.7, chunk_rows=2),
        ),
        "full_kl": ((z, ref), (), dict(mask=mask, temperature=rows)),
        "kl_estimate": (tokens[:2], (), dict(mask=mask, estimator="k3")),
        "gae": (tokens[:2], (mask,), dict(last_values=torch.randn(B))),
        "ppo_advantages": ((), (torch.randn(B), *tokens[:3], mask), dict(kl_coef=0.1)),
        "ppo_loss": (
            tokens[:1],
            (*tokens[1:6], mask),
            dict(
                clip_range=(0.2, 0.3),
                value_clip_range=0.2,
                vf_coef=0.1,
                entropy=tokens[6],
                entropy_coef=0.01,
            ),
        ),
        "decode_attention": (
            (),
            (
                *torch.randn(3, B, 2, 4),
                *torch.randn(2, 5, 2, T, 4),
                torch.tensor([2, 0, 3, 1, 2]),
                torch.tensor([4, 1]),
            ),
            dict(rope=(torch.rand(T, 2), torch.rand(T, 2)), window=2),
        ),
        "sample_tokens": (
            (),
            (z[0], targets[0], targets[1]),
            dict(temperature=0.7, top_k=3, top_p=0.9, min_p=0.01),
        ),
    }[name]


OPS = [name for name in ops.__all__ if name != "decode_attention"]  # it breaks the graph


def run(op, name, backend):
    leaves, rest, settings = inputs(name)
    leaves = [x.detach().requires_grad_() for x in leaves]

    def loss(*leaves):
        out = op(*leaves, *rest, backend=backend, **settings)
        out = out if isinstance(out, tuple) else (out,)
        flat = [x for item in out for x in (item if isinstance(item, tuple) else (item,))]
        return flat, sum(
            (i + 1.5) * x.square().sum() for i, x in enumerate(flat) if x.requires_grad
        )

    return leaves, loss


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", OPS)
def test_compiled_as_one_graph_it_gives_what_it_gives_eagerly(name, fused, dynamic):
    op = getattr(rlhf_core, name)
    seed = torch.random.get_rng_state()
    leaves, loss = run(op, name, fused)
    torch.random.set_rng_state(seed)
    same_leaves, _ = run(op, name, fused)
    compiled_loss = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    (want, total), (got, compiled_total) = loss(*leaves), compiled_loss(*same_leaves)
    assert_close(got, want, rtol=1e-6, atol=1e-6)
    if leaves:
        total.backward()
        compiled_total.backward()
        assert_close([x.grad for x in same_leaves], [x.grad for x in leaves], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_the_reference_compiles_too(name):
    torch._dynamo.reset()
    leaves, loss = run(getattr(rlhf_core, name), name, "reference")
    assert_close(
        torch.compile(loss, fullgraph=True)(*leaves)[0], loss(*leaves)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_steps_of_several_layers_write_to_one_cache_what_they_write_eagerly(fused, dynamic):
    q, k, v = torch.randn(3, B, 2, 4)
    cache = torch.randn(2, 2, 5, 2, T, 4)  # keys and values of two layers
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
    from rlhf_core import kernels

    for name in ("rlhf_core.cpp", "rlhf_core.kernels"):
        missing = set(kernels.__all__) - set(vars(compiled.launchers(name)))
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


def test_every_operator_passes_opcheck_on_what_the_ops_give_it(fused, monkeypatch):
    with monkeypatch.context() as patch, Recorder() as recorder:
        patch.setattr(
            torch.compiler, "is_compiling", lambda: True
        )  # the ops use the operators in eager mode
        for name in OPS:
            leaves, loss = run(getattr(rlhf_core, name), name, fused)
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
