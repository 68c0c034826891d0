"""What the tests of the ops share: tolerances, a call of every op and of every launcher."""

import itertools

import torch

import rlhf_core

# (relative, absolute) error allowed on top of the error that the float32 reference itself makes.
TOLERANCES = {
    "value": (5e-7, 5e-6),  # float32 results in nats or in units of reward
    # Gradients, by the dtype they are stored in: half a unit in the last place.
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2**-8, 2e-6),
    torch.float16: (2**-11, 2e-6),
}
LAUNCHERS = [
    "decode_attention_fwd", "full_kl_bwd", "full_kl_fwd", "gae_bwd", "gae_fwd", "kl_estimate_bwd",
    "kl_estimate_fwd", "ppo_advantages_fwd", "ppo_loss_fwd", "sample_tokens_fwd",
    "token_logprobs_bwd", "token_logprobs_fwd",
]  # fmt: skip
TRITON_LAUNCHERS = [*LAUNCHERS, "linear_logprobs_bwd", "linear_logprobs_fwd"]


def assert_as_accurate(got, reference, truth, kind="value"):
    """|got - truth| <= |reference - truth| + tolerance; NaN and infinities exactly as in the truth.

    The reference itself must be within a percent of the truth, because a wrong reference would
    allow every backend to be as wrong.
    """
    got, reference, truth = got.double(), reference.double(), truth.double()
    special = ~truth.isfinite()
    torch.testing.assert_close(got[special], truth[special], rtol=0, atol=0, equal_nan=True)
    relative, absolute = TOLERANCES[kind]
    got, reference, truth = got[~special], reference[~special], truth[~special]
    error = (reference - truth).abs()
    assert (error <= 1e-4 + 0.01 * truth.abs()).all(), (
        f"the reference is off by {error.nan_to_num(torch.inf).max():.2g}"
    )
    excess = (got - truth).abs() - error - absolute - relative * truth.abs()
    assert not (excess > 0).any() and not got.isnan().any(), (
        f"{excess.max():.2g} beyond the tolerance"
    )


def interpreted(backend):
    """Whether the backend is Triton's interpreter, a thousand times slower than the others."""
    return backend == "triton" and not torch.cuda.is_available()


def cases(settings, few):
    """All combinations of the settings on each backend, but few in Triton's interpreter.

    The few hold every value, and the interpreted kernels run the same code for the others.
    """
    every = list(itertools.product(*settings))
    return [
        (backend, *x)
        for backend in ("reference", "cpp", "triton")
        for x in (few if interpreted(backend) else every)
    ]


def poison_uninitialised_memory(monkeypatch):
    """A kernel that forgets to write an output must not find zeros there."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def op_inputs(name, V=5):
    """Arguments of an op: tensors that may require a gradient, other positionals, keywords.

    They have B = 2 sequences of T = 3 tokens, hidden states of D = 4, and V tokens.
    """
    torch.manual_seed(0)
    B, T, D = 2, 3, 4
    z, ref = torch.randn(2, B, T, V)
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D)
    tokens = torch.randn(7, B, T).unbind()
    mask = torch.tensor([[True, False, True], [True, True, True]])
    targets, temperatures = torch.randint(V, (B, T)), 0.5 + torch.rand(B, T)

    def losses(found, groups, extra):
        """A loss that uses all its arguments, and two outputs."""
        rows = found.logprobs * extra + found.entropy.square()
        return rows.sum(), rows, found.likeliest

    return {
        "token_logprobs": (
            (z,),
            (targets,),
            dict(mask=mask, temperature=0.7, inplace_backward=True),
        ),
        "token_logprobs_and_entropy": ((z,), (targets,), dict(mask=mask, temperature=temperatures)),
        "linear_token_logprobs": ((hidden, weight), (targets,), dict(mask=mask, chunk_rows=2)),
        "linear_token_logprobs_and_entropy": (
            (hidden, weight),
            (targets,),
            dict(temperature=temperatures, chunk_rows=2),
        ),
        "linear_token_statistics": (
            (hidden, weight),
            (targets,),
            dict(mask=mask, temperature=0.7, chunk_rows=2),
        ),
        "linear_token_loss": (
            (hidden[0], weight),
            (targets[0], losses),
            dict(temperature=temperatures[0], likeliest=True, extras=(tokens[0][0],)),
        ),
        "full_kl": ((z, ref), (), dict(mask=mask, temperature=temperatures)),
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


def op_call(name, backend, V=5, arrange=lambda inputs: inputs):
    """(leaves, call): `call(*leaves)` runs the op and returns its outputs and their scalar loss.

    arrange: maps the op's inputs to equal ones that lie differently in memory.
    """
    leaves, rest, settings = arrange(op_inputs(name, V))
    leaves = [x.detach().requires_grad_() for x in leaves]

    def call(*leaves):
        out = getattr(rlhf_core, name)(*leaves, *rest, backend=backend, **settings)
        out = out if isinstance(out, tuple) else (out,)
        flat = [x for item in out for x in (item if isinstance(item, tuple) else (item,))]
        loss = sum((i + 1.5) * x.square().sum() for i, x in enumerate(flat) if x.requires_grad)
        return flat, loss

    return leaves, call


def call_every_launcher(
    kernels, V=300, dtype=torch.float32, B=2, T=17, number=0.5, temperature_per_row=(False, True)
):
    """Results of all launchers in all their modes, in one list."""
    logits, ref = (torch.randn(B, T, V).to(dtype) for _ in range(2))
    targets, mask = torch.randint(0, V, (B, T)), torch.rand(B, T) < 0.7
    x = [torch.randn(B, T) for _ in range(8)]
    out = []
    for per_row in temperature_per_row:
        temperature = torch.rand(B, T) + 0.5 if per_row else number
        logprobs, entropy, lse = kernels.token_logprobs_fwd(
            logits, targets, mask, temperature, True
        )
        args = (logits, targets, mask, temperature, entropy, lse, False)
        out += [logprobs, entropy, kernels.token_logprobs_bwd(x[0], x[1], *args)]
        kl, lse = kernels.full_kl_fwd(logits, ref, mask, temperature)
        out += [kl, *kernels.full_kl_bwd(x[0], logits, ref, mask, temperature, kl, lse, True, True)]
    if hasattr(kernels, "linear_logprobs_fwd"):
        hidden, weight, bias = (torch.randn(n).to(dtype) for n in ((B * T, 64), (V, 64), (V,)))
        y, (g, h, entropy) = targets.flatten(), (a.flatten() for a in x[:3])
        for per_row in temperature_per_row:
            temperature = torch.rand(B * T) + 0.5 if per_row else number
            args = (hidden, weight, bias if per_row else None, y, temperature)
            out += kernels.linear_logprobs_fwd(*args, True)
            out += [kernels.linear_logprobs_bwd(g, h, *args, entropy, torch.rand(B * T, 2))]
    out += [
        kernels.kl_estimate_fwd(x[0], x[1], mask, "k3"),
        *kernels.kl_estimate_bwd(*x[:3], mask, "k3"),
    ]
    # One token before the first sequence, one or more after the last.
    cu_seqlens = torch.arange(B + 1) * ((B * T - 1) // B) + 1
    for cu, shape in ((None, (B, T)), (cu_seqlens, (B * T,))):
        y, m, last = [a.view(shape) for a in x], mask.view(shape), torch.randn(B)
        out += kernels.gae_fwd(y[0], y[1], m, number, 0.9, last, cu)
        out += kernels.gae_bwd(y[0], y[1], m, number, 0.9, True, cu)
        out += kernels.ppo_advantages_fwd(last, *y[:3], m, number, "k3", 0.9, number, True, cu)
    numbers = (*[number] * 5, 1 + number)
    for weights, sequence_mean in ((None, False), (None, True), (x[7], False)):
        out += kernels.ppo_loss_fwd(*x[:7], mask, weights, sequence_mean, *numbers)
    heads, cache = torch.randn(3, B, 2, 64).to(dtype), torch.randn(2, B + 1, 1, T + 1, 64).to(dtype)
    for rope in ((None, None), torch.randn(2, T + 1, 32).unbind()):
        slots, lengths = torch.arange(B).flip(0) + 1, torch.arange(B + 1) % (T + 1)
        out += [
            kernels.decode_attention_fwd(
                heads[0], *heads[1:, :, :1], *cache, lengths, slots, *rope, None, T + 1
            ),
            cache,
        ]
    seeds, counters = targets.flatten(), targets.flatten() - 2**40
    for truncation in (
        (None, None, None),
        (3, None, None),
        (None, number / 2, 0.1),
        (V // 2, number, None),
    ):
        out += kernels.sample_tokens_fwd(
            logits.view(B * T, V), seeds, counters, number, *truncation
        )
    return [x for x in out if x is not None]


class Named(torch.Tensor):
    """A subclass, which no kernel reads."""


TRANSFORMS = ("jvp", "vmap", "grad", "subclass", "compile")


def transformed(transform, function, x, tangent):
    """function(x), its derivative or its gradient under one of TRANSFORMS, as a plain tensor."""
    if transform == "jvp":
        return torch.stack(torch.func.jvp(function, (x,), (tangent,)))
    if transform == "vmap":
        return torch.func.vmap(function)(x)
    if transform == "grad":
        return torch.func.grad(lambda x: function(x).sum())(x)
    if transform == "compile":
        torch._dynamo.reset()
        leaf = x.clone().requires_grad_()
        y = torch.compile(function, backend="aot_eager", fullgraph=True)(leaf)
        return torch.autograd.grad(y.sum(), leaf)[0]
    return function(x.as_subclass(Named)).as_subclass(torch.Tensor)
