"""ppo_loss on every backend against its float64 reference, and that against a manual loop."""

import math

import pytest
import torch
from op_helpers import assert_as_accurate, cases

from rlhf_core import loss_weights, ppo_loss
from rlhf_core.ops.policy_loss import PPOLossStats

SETTINGS = {"clip_range": 0.2, "value_clip_range": 0.25, "vf_coef": 0.5}
GRADIENTS = ("logprobs", "values", "entropy")


def batch(B, T, keep=0.7):
    """All inputs by name. Values are multiples of 1/64, so that rounding never decides clipping."""
    old_values, returns = (torch.randn(2, B, T) * 64).round() / 64
    old_logprobs = -torch.rand(B, T) * 3
    return {
        "logprobs": old_logprobs + torch.randn(B, T) * 0.4 * (torch.rand(B, T) < 0.8),
        "old_logprobs": old_logprobs,
        "advantages": torch.randn(B, T),
        "values": old_values + (torch.randn(B, T) * 16).round() / 64,
        "old_values": old_values,
        "returns": returns,
        "response_mask": torch.rand(B, T) < keep,
        "entropy": torch.rand(B, T) * 2,
        "weights": torch.rand(B, T),
    }


def run(inputs, backend, upstream=1.0, **settings):
    """({loss and statistics}, {gradients}); if backend is None, by the reference in float64."""
    dtype = torch.float64 if backend is None else torch.float32
    inputs = {
        k: x.to(dtype) if x is not None and x.is_floating_point() else x for k, x in inputs.items()
    }
    leaves = {k: inputs[k].clone().requires_grad_() for k in GRADIENTS if inputs.get(k) is not None}
    loss, stats = ppo_loss(**inputs | leaves, **SETTINGS | settings, backend=backend or "reference")
    gradients = torch.autograd.grad(loss * upstream, list(leaves.values()), materialize_grads=True)
    assert all(x.dtype == dtype for x in (loss, *stats, *gradients))
    return {"loss": loss.detach(), **stats._asdict()}, dict(zip(leaves, gradients))


def check(inputs, backend, **settings):
    got, reference, truth = (run(inputs, b, **settings) for b in (backend, "reference", None))
    for x, r, t in zip(got, reference, truth):
        assert x.keys() == t.keys()
        for name in t:
            assert_as_accurate(x[name], r[name], t[name])


CASES = {
    "token mean": {},
    "sequence mean": {"aggregation": "sequence_mean"},
    "entropy bonus": {"entropy_coef": 0.01},
    "dual clip": {"dual_clip": 1.5},
    "values unclipped": {"value_clip_range": None},
    "wide clip": {"clip_range": 0.9, "value_clip_range": 4.0},
    "clip higher": {"clip_range": (0.1, 0.4)},
    "above alone": {"clip_range": (math.inf, 0.2)},
}


SHAPES = [(1, 1), (3, 19), (2, 70), (37, 5)]


@pytest.mark.parametrize(
    "backend, shape, case",
    cases((SHAPES, CASES), few=[(SHAPES[i % 4], case) for i, case in enumerate(CASES)]),
    indirect=["backend"],
)
def test_loss_statistics_and_gradients_match_the_reference_in_float64(backend, shape, case):
    inputs = batch(*shape)
    check(inputs, backend, **CASES[case])
    check(inputs | {"weights": None}, backend, **CASES[case])


def test_without_a_critic_or_entropy(backend):
    inputs = batch(3, 19) | {"entropy": None, "weights": None}
    check(inputs, backend)
    inputs |= {"values": None, "old_values": None, "returns": None}
    check(inputs, backend)
    stats, _ = run(inputs, backend)
    assert stats["value_loss"] == stats["value_clip_frac"] == stats["entropy"] == 0


def by_hand(x, clip_range, value_clip_range, vf_coef, entropy_coef, dual_clip):
    """(policy, value, loss, approx_kl, clipped, value_clipped, dual_clipped) of one token."""
    ratio = math.exp(x["logprobs"] - x["old_logprobs"])
    unclipped = -x["advantages"] * ratio
    low, high = clip_range
    clipped = -x["advantages"] * min(max(ratio, 1 - low), 1 + high)
    policy = max(unclipped, clipped)
    bounded = x["advantages"] < 0 and policy > -x["advantages"] * dual_clip
    policy = -x["advantages"] * dual_clip if bounded else policy
    near = min(
        max(x["values"], x["old_values"] - value_clip_range), x["old_values"] + value_clip_range
    )
    far_loss, near_loss = (x["values"] - x["returns"]) ** 2, (near - x["returns"]) ** 2
    value = max(far_loss, near_loss) / 2
    loss = policy + vf_coef * value - entropy_coef * x["entropy"]
    return (
        policy,
        value,
        loss,
        ratio - 1 - math.log(ratio),
        clipped > unclipped,
        near_loss > far_loss,
        bounded,
    )


def test_the_loss_is_that_of_a_loop_by_hand(backend):
    inputs = batch(4, 9)
    settings = SETTINGS | {"clip_range": (0.2, 0.1), "entropy_coef": 0.1, "dual_clip": 1.3}
    got, _ = run(inputs, backend, **settings)
    tokens = [{k: x[b, t].item() for k, x in inputs.items()} for b in range(4) for t in range(9)]
    tokens = [x for x in tokens if x["response_mask"]]
    rows = [by_hand(x, **settings) for x in tokens]
    policy, value, _, approx_kl, clipped, value_clipped, bounded = (
        torch.tensor(rows).double().mean(0).tolist()
    )
    assert min(clipped, value_clipped, bounded) > 0
    names = (
        "policy_loss",
        "value_loss",
        "approx_kl",
        "clip_frac",
        "value_clip_frac",
        "dual_clip_frac",
        "count",
    )
    for name, want in zip(
        names, (policy, value, approx_kl, clipped, value_clipped, bounded, len(tokens))
    ):
        assert got[name].item() == pytest.approx(want, rel=1e-5, abs=1e-6), name
    want = sum(x["weights"] * row[2] for x, row in zip(tokens, rows))
    assert got["loss"].item() == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_before_any_update_nothing_is_clipped_and_the_whole_gradient_flows(backend):
    inputs = batch(3, 19)
    inputs |= {"logprobs": inputs["old_logprobs"], "values": inputs["old_values"]}
    for aggregation in ("token_mean", "sequence_mean"):
        weights = loss_weights(inputs["response_mask"], aggregation)
        settings = {"aggregation": aggregation, "dual_clip": 3.0}
        stats, gradients = run(inputs | {"weights": None}, backend, **settings)
        assert stats["ratio"] == stats["ratio_squared"] == 1 and stats["approx_kl"] == 0
        assert stats["clip_frac"] == stats["value_clip_frac"] == stats["dual_clip_frac"] == 0
        errors = inputs["values"] - inputs["returns"]
        torch.testing.assert_close(gradients["logprobs"], -inputs["advantages"] * weights)
        torch.testing.assert_close(gradients["values"], SETTINGS["vf_coef"] * errors * weights)


def test_a_value_inside_its_range_is_not_counted_as_clipped(backend):
    inputs = batch(5, 70)
    inputs["old_values"], inputs["values"] = torch.rand(2, 5, 70) / 5
    stats, _ = run(inputs, backend)
    assert stats["value_clip_frac"] == 0


@pytest.mark.parametrize("advantage, log_ratio, slope", [
    (1.0, 0.5, 0), (1.0, -0.5, 1), (-1.0, 0.5, 1), (-1.0, -0.5, 0), (1.0, 0.1, 1),
    (-1.0, -0.1, 1), (0.0, 0.5, 1),
])  # fmt: skip
def test_a_clipped_ratio_passes_no_gradient(backend, advantage, log_ratio, slope):
    inputs = batch(1, 1, keep=1.0) | {"weights": None}
    inputs["advantages"].fill_(advantage)
    inputs["logprobs"] = inputs["old_logprobs"] + log_ratio
    stats, gradients = run(inputs, backend)
    torch.testing.assert_close(
        gradients["logprobs"].item(), -advantage * math.exp(log_ratio) * slope
    )
    assert stats["clip_frac"] == 1 - slope


def test_the_dual_clip_bounds_the_loss_of_bad_tokens_alone(backend):
    inputs = batch(1, 3, keep=1.0) | {"weights": None}
    inputs["advantages"] = torch.tensor([[-2.0, 2.0, -2.0]])
    inputs["logprobs"] = inputs["old_logprobs"] + torch.tensor([[3.0, -3.0, 0.5]])
    stats, gradients = run(inputs, backend, dual_clip=2.0)
    assert (gradients["logprobs"] != 0).tolist() == [[False, True, True]]
    torch.testing.assert_close(stats["dual_clip_frac"].item(), 1 / 3)
    want = (2 * 2 - 2 * math.exp(-3) + 2 * math.exp(0.5)) / 3
    torch.testing.assert_close(stats["policy_loss"].item(), want)


def test_a_value_beyond_its_range_passes_gradient_only_where_clipping_makes_it_better(backend):
    inputs = batch(1, 4, keep=1.0) | {"weights": None}
    inputs["old_values"] = torch.zeros(1, 4)
    inputs["values"] = torch.tensor([[1.0, 1.0, 0.25, 1.0]])  # beyond, beyond, on the edge, beyond
    # The last return is equally far from both, so each gets half the gradient.
    inputs["returns"] = torch.tensor([[2.0, -1.0, 2.0, 0.625]])
    stats, gradients = run(inputs, backend, vf_coef=4.0)
    torch.testing.assert_close(gradients["values"], torch.tensor([[0.0, 2.0, -1.75, 0.1875]]))
    assert stats["value_clip_frac"] == 0.25


@pytest.mark.parametrize("log_ratio", [-0.3, -0.15, 0.35, 0.45])
def test_below_and_above_one_the_ratio_is_clipped_at_bounds_of_their_own(backend, log_ratio):
    inputs = batch(1, 1, keep=1.0) | {"weights": None}
    # The sign with which a ratio beyond its bound is clipped.
    inputs["advantages"].fill_(math.copysign(1, log_ratio))
    inputs["logprobs"] = inputs["old_logprobs"] + log_ratio
    for low, high, clipped in (
        (0.2, 0.5, not -0.2 < math.expm1(log_ratio) < 0.5),
        (0.1, 0.3, True),
    ):
        stats, gradients = run(inputs, backend, clip_range=(low, high))
        assert stats["clip_frac"] == clipped and (gradients["logprobs"] == 0).all() == clipped


@pytest.mark.parametrize("number", [0.2, 0.9, 5.0])
def test_two_equal_bounds_are_a_number_bit_for_bit(backend, number):
    inputs = batch(3, 19)
    for x, y in zip(
        run(inputs, backend, clip_range=(number, number)), run(inputs, backend, clip_range=number)
    ):
        assert all(torch.equal(x[name], y[name]) for name in y)


@pytest.mark.parametrize("clip_range", [math.inf, (1.0, math.inf)], ids=str)
def test_with_an_infinite_clip_range_it_is_the_policy_gradient(backend, clip_range):
    inputs = batch(3, 19) | {"weights": None}
    stats, gradients = run(inputs, backend, clip_range=clip_range)
    ratio = (inputs["logprobs"] - inputs["old_logprobs"]).exp()
    weights = loss_weights(inputs["response_mask"])
    torch.testing.assert_close(
        gradients["logprobs"], -inputs["advantages"] * ratio * weights, rtol=1e-5, atol=1e-7
    )
    assert stats["clip_frac"] == 0


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 1e4, 21.0, -21.0])
def test_a_ratio_that_would_overflow_gives_a_finite_loss_and_no_gradient(backend, log_ratio):
    inputs = batch(2, 3, keep=1.0)
    inputs["logprobs"] = inputs["old_logprobs"] + log_ratio
    inputs["advantages"][0] = 0
    stats, gradients = run(inputs, backend)
    assert all(x.isfinite() for x in stats.values()) and (gradients["logprobs"] == 0).all()
    torch.testing.assert_close(
        stats["ratio"].item(), math.exp(max(-20.0, min(20.0, log_ratio))), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("bad", [100.0, math.inf, -math.inf, math.nan])
def test_what_masked_inputs_hold_changes_no_bit_and_gets_no_gradient(backend, bad):
    inputs = batch(3, 19)
    mask = inputs["response_mask"]
    for weights in (inputs["weights"], None):
        want = run(inputs | {"weights": weights}, backend, entropy_coef=0.1)
        dirty = {k: x if x is mask else x.masked_fill(~mask, bad) for k, x in inputs.items()}
        dirty |= {"weights": None} if weights is None else {}
        got = run(dirty, backend, entropy_coef=0.1)
        for x, y in zip(got, want):
            assert all(torch.equal(x[name], y[name]) for name in y)
        assert all((x[~mask] == 0).all() for x in got[1].values())


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (3, 0)], ids=str)
def test_a_batch_that_counts_nothing_has_loss_zero_and_no_gradient(backend, shape, aggregation):
    inputs = batch(*shape, keep=0.0)
    for weights in (inputs["weights"], None):
        stats, gradients = run(
            inputs | {"weights": weights}, backend, aggregation=aggregation, entropy_coef=0.1
        )
        assert all(x == 0 for x in stats.values())
        assert all(x.shape == shape and (x == 0).all() for x in gradients.values())


SIZES = [(8,), (4, 4), (3, 5), (1,) * 8]
AGGREGATIONS = ["token_mean", "sequence_mean"]


@pytest.mark.parametrize(
    "backend, sizes, aggregation",
    cases(
        (SIZES, AGGREGATIONS),
        few=[(sizes, AGGREGATIONS[i % 2]) for i, sizes in enumerate(SIZES)],
    ),
    indirect=["backend"],
)
def test_micro_batches_with_sliced_weights_add_up_to_the_whole(backend, sizes, aggregation):
    inputs = batch(8, 21) | {"weights": None}
    inputs["response_mask"] = torch.arange(21) < torch.tensor([1, 21, 5, 0, 13, 2, 8, 20])[:, None]
    want, want_gradients = run(inputs, backend, aggregation=aggregation, entropy_coef=0.1)
    inputs["weights"] = loss_weights(inputs["response_mask"], aggregation)
    parts = zip(*(x.split(sizes) for x in inputs.values()))
    parts = [
        run(dict(zip(inputs, part)), backend, aggregation=aggregation, entropy_coef=0.1)
        for part in parts
    ]
    torch.testing.assert_close(sum(x["loss"] for x, _ in parts), want["loss"], rtol=1e-6, atol=1e-6)
    count = sum(x["count"] for x, _ in parts)
    assert count == want["count"]
    for name in PPOLossStats._fields[:-1]:
        mean = sum(x[name] * x["count"] for x, _ in parts) / count
        torch.testing.assert_close(mean, want[name], rtol=1e-5, atol=1e-6)
    for name, x in want_gradients.items():
        torch.testing.assert_close(torch.cat([g[name] for _, g in parts]), x, rtol=1e-5, atol=1e-7)


def test_padding_changes_nothing(backend):
    inputs = batch(3, 9) | {"weights": None}
    for aggregation in ("token_mean", "sequence_mean"):
        want, want_gradients = run(inputs, backend, aggregation=aggregation)
        padded = {
            k: x if x is None else torch.nn.functional.pad(x, (0, 30, 0, 2))
            for k, x in inputs.items()
        }
        got, gradients = run(padded, backend, aggregation=aggregation)
        for name, x in want.items():
            torch.testing.assert_close(got[name], x, rtol=1e-6, atol=1e-6)
        for name, x in want_gradients.items():
            torch.testing.assert_close(gradients[name][:3, :9], x, rtol=1e-6, atol=1e-7)


def test_gradients_scale_with_the_upstream_one(backend):
    inputs = batch(3, 19)
    _, once = run(inputs, backend, entropy_coef=0.1)
    _, thrice = run(inputs, backend, upstream=-3.0, entropy_coef=0.1)
    for name, x in once.items():
        torch.testing.assert_close(thrice[name], -3 * x)


def test_only_logprobs_values_and_entropy_get_a_gradient(backend):
    inputs = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in batch(2, 5).items()}
    loss, stats = ppo_loss(**inputs, **SETTINGS, entropy_coef=0.1, backend=backend)
    assert not any(x.requires_grad for x in stats)
    if backend != "reference":
        loss.backward()
        assert {k for k, x in inputs.items() if x.grad is not None} == set(GRADIENTS)


def test_a_nan_that_counts_is_not_hidden(backend):
    for name in ("logprobs", "advantages", "values", "returns", "weights", "entropy"):
        inputs = batch(2, 5, keep=1.0)
        inputs[name][1, 2] = math.nan
        stats, _ = run(inputs, backend, entropy_coef=0.1)
        assert stats["loss"].isnan()


def test_the_result_is_the_same_bit_for_bit_every_time(backend):
    inputs = batch(40, 33)
    first = run(inputs, backend)
    for _ in range(3):
        for x, y in zip(run(inputs, backend), first):
            assert all(torch.equal(x[name], y[name]) for name in y)


def test_the_result_is_bitwise_independent_of_the_number_of_threads():
    pytest.importorskip("rlhf_core.cpp", reason="the C++ extension is not built")
    inputs = batch(300, 401)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(inputs, "cpp", entropy_coef=0.1))
    torch.set_num_threads(before)
    for x, y in zip(*results):
        assert all(torch.equal(x[name], y[name]) for name in y)


def test_strided_and_half_precision_inputs_and_none_of_them_changed(backend):
    inputs = batch(5, 8)
    mask = inputs["response_mask"].T[:, ::2]
    dense = {k: x.T[:, ::2].contiguous() for k, x in inputs.items()}
    want, want_gradients = run(dense, backend)
    got, gradients = run({k: x.T[:, ::2] for k, x in inputs.items()}, backend)
    assert all(torch.equal(got[name], x) for name, x in want.items())
    assert all(torch.equal(gradients[name], x) for name, x in want_gradients.items())
    halves = {
        k: x if x is mask or x.dtype == torch.bool else x.bfloat16() for k, x in dense.items()
    }
    before = {k: x.clone() for k, x in halves.items()}
    loss, _ = ppo_loss(**halves, **SETTINGS, backend=backend)
    floats = {k: x if x.dtype == torch.bool else x.float() for k, x in halves.items()}
    assert (
        loss.dtype == torch.float32 and loss == ppo_loss(**floats, **SETTINGS, backend=backend)[0]
    )
    assert all(torch.equal(halves[k], x) for k, x in before.items())


def test_reference_gradients_pass_gradcheck():
    torch.manual_seed(0)
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in batch(2, 5).items()}
    leaves = [inputs.pop(k).requires_grad_() for k in GRADIENTS]
    inputs["advantages"][0, 0] = -5.0

    def loss(*tensors):
        return ppo_loss(
            **inputs, **dict(zip(GRADIENTS, tensors)), **SETTINGS, entropy_coef=0.1, dual_clip=1.1
        )[0]

    leaves[0].data += 0.01  # away from the kink at ratio 1
    leaves[1].data += 1 / 128
    assert torch.autograd.gradcheck(loss, leaves)


def test_bad_input_raises_with_the_offending_value(backend):
    inputs = batch(2, 3)

    def call(**changes):
        ppo_loss(**(inputs | SETTINGS | {"backend": backend} | changes))

    for changes, error, message in (
        ({"advantages": torch.zeros(2, 4)}, ValueError, r"advantages.*\(2, 4\)"),
        ({"weights": torch.zeros(3, 2)}, ValueError, r"weights.*\(3, 2\)"),
        ({"returns": None}, ValueError, "returns"),
        ({"entropy": None, "entropy_coef": 0.1}, ValueError, r"0\.1"),
        ({"clip_range": 0.0}, ValueError, r"0\.0"),
        ({"clip_range": math.nan}, ValueError, "nan"),
        ({"clip_range": (0.2, -0.5)}, ValueError, r"-0\.5"),
        ({"clip_range": (0.2, 0.3, 0.4)}, ValueError, r"0\.4"),
        ({"value_clip_range": -1.0}, ValueError, r"-1\.0"),
        ({"dual_clip": 1.0}, ValueError, r"1\.0"),
        ({"aggregation": "mean"}, ValueError, "'mean'"),
        ({"response_mask": inputs["weights"]}, TypeError, r"response_mask.*float32"),
        ({"old_values": inputs["response_mask"]}, TypeError, r"old_values.*bool"),
        ({"values": inputs["values"].to("meta")}, ValueError, "meta"),
    ):
        with pytest.raises(error, match=message):
            call(**changes)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        call(**{k: x.flatten() for k, x in inputs.items()})
