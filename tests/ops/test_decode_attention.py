"""decode_attention on every backend, against a manual float64 loop over the resulting cache."""

import itertools
import math

import pytest
import torch
from op_helpers import assert_as_accurate, cases

from rlhf_core import decode_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CACHE = ("keys", "values")


def inputs(
    lengths, H=4, Hkv=2, K=8, S=None, N=None, rope=True, dtype=torch.float32, cache_dtype=None
):
    """Arguments by name: one row per length, in random slots of N; unused memory is NaN."""
    B = len(lengths)
    N, S = N or B + 2, S or max([*lengths, 0]) + 1
    slots = torch.randperm(N)[:B]
    all_lengths = torch.full((N,), S)  # other rows are full
    keys, values = torch.full((2, N, Hkv, S, K), math.nan).to(cache_dtype or dtype).unbind()
    for slot, n in zip(slots.tolist(), lengths):
        all_lengths[slot] = n
        for store in (keys, values):
            store[slot, :, :n] = torch.randn(Hkv, n, K)
    q, k, v = (
        torch.randn(B, (H + 2 * Hkv) * K)
        .to(dtype)
        .unflatten(1, (-1, K))
        .split([H, Hkv, Hkv], dim=1)
    )
    angles = torch.arange(S)[:, None] / 50 ** (torch.arange(0, K, 2) / K)  # (S, K / 2)
    given = dict(q=q, k=k, v=v, keys=keys, values=values, lengths=all_lengths, slots=slots)
    return given | dict(rope=(angles.cos(), angles.sin()) if rope else None)


def run(x, backend, **settings):
    """(out, keys, values), the cache a copy."""
    x = x | settings | {name: x[name].clone() for name in CACHE}
    out = decode_attention(**x, backend=backend)
    assert out.is_contiguous() and out.shape == x["q"].shape and out.dtype == x["q"].dtype
    return out, x["keys"], x["values"]


def rotated(heads, rope, n):
    """(H, K) in float64, each pair a complex number rotated by its angle."""
    if rope is None:
        return heads.double()
    left, right = heads.double().chunk(2, -1)
    turned = torch.complex(left, right) * torch.complex(*(table[n].double() for table in rope))
    return torch.cat((turned.real, turned.imag), -1)


def by_hand(x, keys, values, window=None, softcap=None):
    """Attention in float64 over the cache after the step."""
    out = torch.zeros_like(x["q"], dtype=torch.float64)
    _, H, K = out.shape
    for b, slot in enumerate(x["slots"].tolist()):
        n = x["lengths"][slot].item()
        seen = slice(0 if window is None else max(0, n + 1 - window), n + 1)
        for i, head in enumerate(rotated(x["q"][b], x["rope"], n)):
            h = i * keys.shape[1] // H
            scores = keys[slot, h, seen].double() @ head / math.sqrt(K)
            p = (scores if softcap is None else softcap * (scores / softcap).tanh()).softmax(0)
            out[b, i] = p @ values[slot, h, seen].double()
    return out


def check(x, backend, **settings):
    """Check the result and the new tokens, and that the rest of the cache is unchanged."""
    (out, *cache), (other, *other_cache) = (
        run(x, name, **settings) for name in (backend, "reference")
    )
    truth = by_hand(x, *cache, **settings)
    error = other - by_hand(x, *other_cache, **settings)
    assert_as_accurate(
        out, truth + error, truth, "value" if out.dtype == torch.float32 else out.dtype
    )
    slots, n = x["slots"], x["lengths"][x["slots"]]
    if len(slots):
        k = torch.stack([rotated(k, x["rope"], i) for k, i in zip(x["k"], n.tolist())])
        assert_as_accurate(cache[0][slots, :, n], other_cache[0][slots, :, n], k, x["keys"].dtype)
    assert torch.equal(cache[1][slots, :, n], x["v"].to(x["values"].dtype))
    for name, got in zip(CACHE, cache):
        want = x[name].clone()
        want[slots, :, n] = got[slots, :, n]
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    return out


@pytest.mark.parametrize(
    "backend, K, heads, rope",
    cases(
        ([8, 64], [(1, 1), (4, 4), (6, 2), (9, 1)], [True, False]),
        few=[(8, (1, 1), True), (64, (4, 4), False), (64, (6, 2), True), (8, (9, 1), False)],
    ),
    indirect=["backend"],
)
def test_rows_of_any_length_match_float64(backend, K, heads, rope):
    check(inputs([0, 1, 7, 15, 16, 17, 64, 70], *heads, K, rope=rope), backend)


@pytest.mark.parametrize("K", [1, 2, 4, 6, 10, 16, 20, 24, 40, 80, 96, 128, 130, 256])
def test_any_head_dim_matches_float64(backend, K):
    check(inputs([0, 5, 33], 4, 2, K, rope=K % 2 == 0), backend)


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 400, 1000])
def test_blocks_of_keys_join_without_a_seam(backend, length):
    x = inputs([length, length // 2], 2, 1, 8)
    scale = torch.linspace(0.1, 20, length)[:, None]  # puts the maximum into later blocks
    x["keys"][x["slots"][0], 0, :length] *= scale
    check(x, backend)
    x["keys"][x["slots"][0], 0, :length] = x["keys"][x["slots"][0], 0, :length].flip(0)
    check(x, backend)


@pytest.mark.parametrize("window", [1, 2, 16, 33, 65, 100, 10**6])
def test_a_window_hides_all_but_the_last_tokens(backend, window):
    x = inputs([0, 1, 15, 32, 64, 200], K=16)
    check(x, backend, window=window)
    for slot in x["slots"].tolist():  # hidden entries are not even read
        hidden = max(0, x["lengths"][slot].item() + 1 - window)
        x["keys"][slot, :, :hidden], x["values"][slot, :, :hidden] = math.nan, math.nan
    check(x, backend, window=window)


RINGS = [(1, 1), (5, 3), (16, 16), (200, 200), (300, 129)]


@pytest.mark.parametrize(
    "backend, K, ring",
    cases(([8, 64], RINGS), few=[((64, 8)[i % 2], ring) for i, ring in enumerate(RINGS)]),
    indirect=["backend"],
)
def test_a_cache_as_long_as_the_window_is_a_ring(backend, K, ring):
    S, window = ring
    lengths = [0, 1, S - 1, S, S + 1, 2 * S + S // 2, 5 * S - 1]
    x = inputs(lengths, K=K, S=5 * S)
    stored = {name: torch.full_like(x[name][:, :, :S], math.nan) for name in CACHE}
    for slot, n in zip(x["slots"].tolist(), lengths):
        for name, t in ((name, t) for name in CACHE for t in range(n)):
            stored[name][slot, :, t % S] = x[name][slot, :, t]
    want, *full = run(x, backend, window=window)
    got, *stores = run(x | stored, backend, window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    early = torch.tensor([n < S for n in lengths])
    if backend != "reference":  # whose sums run over all places
        assert torch.equal(got[early], want[early])
    n, slots = torch.tensor(lengths), x["slots"]
    for name, store, whole in zip(CACHE, stores, full):
        stored[name][slots, :, n % S] = whole[slots, :, n]
        assert torch.equal(store.nan_to_num(), stored[name].nan_to_num())


def test_a_ring_has_room_for_the_positions_of_its_rotation(backend):
    x = inputs([3, 9], S=10)
    x |= {name: x[name][:, :, :4].contiguous().nan_to_num() for name in CACHE}
    run(x, backend, window=4)
    x["lengths"][x["slots"][1]] = 10
    with pytest.raises(ValueError, match="has length 10, no room for another token in 10"):
        run(x, backend, window=4)
    run(x | dict(rope=None), backend, window=4)
    with pytest.raises(ValueError, match="has length 10, no room for another token in 4"):
        run(x | dict(rope=None), backend, window=5)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (9, 1)], ids=str)
@pytest.mark.parametrize("K", [6, 64])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_tokens_that_rows_share_are_stored_once(backend, dtype, K, heads):
    """Shared rows of 5, 0 and 130 tokens for three slots each; some slots are not in the batch."""
    firsts, own = torch.tensor([5, 0, 130]), torch.tensor([0, 3, 1, 0, 2, 8, 0, 1, 140])
    lengths = firsts.repeat_interleave(3) + own
    x = inputs(lengths.tolist(), *heads, K, N=9, S=280, dtype=dtype)
    x |= dict(slots=torch.tensor([0, 1, 2, 4, 5, 8, 7]), lengths=lengths)
    x |= {name: x[name][:7] for name in ("q", "k", "v")}
    for store, m in itertools.product(CACHE, range(3)):  # every slot starts as its group's first
        group = x[store][3 * m : 3 * m + 3]
        group[:, :, : firsts[m]] = torch.randn(heads[1], firsts[m], K)
        for slot, row in zip(range(3 * m, 3 * m + 3), group):
            row[:, firsts[m] : lengths[slot]] = torch.randn(heads[1], own[slot], K)
    want, *whole = run(x, backend)
    parts = {name: torch.full_like(x[name][:, :, :150], math.nan) for name in CACHE}
    for name, slot in itertools.product(CACHE, range(9)):
        first = firsts[slot // 3]
        parts[name][slot, :, : own[slot]] = x[name][slot, :, first : lengths[slot]]
    shared = *(x[name][::3, :, :130].contiguous() for name in CACHE), firsts
    got, *stores = run(x | parts, backend, shared=shared)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    for name, store, full in zip(CACHE, stores, whole):
        for slot in x["slots"].tolist():
            parts[name][slot, :, own[slot]] = full[slot, :, lengths[slot]]
        assert torch.equal(store.nan_to_num(), parts[name].nan_to_num())
    if backend == "reference":  # whose products of matrices depend on their number
        return
    some = torch.tensor([5, 1, 2])  # a row's bits do not depend on the others
    part = {name: x[name][some] for name in ("q", "k", "v", "slots")}
    assert torch.equal(run(x | parts | part, backend, shared=shared)[0], got[some])


def test_shared_tokens_that_do_not_fit_the_cache_are_named(backend):
    x = inputs([3, 2], N=4, S=8, rope=False)
    keys, lengths = torch.zeros(2, 2, 5, 8), torch.tensor([1, 2])
    for shared, settings in (
        ((keys, keys[:, :, :4].contiguous(), lengths), {}),
        ((keys.half(), keys.half(), lengths), {}),
        ((keys[:, :1], keys[:, :1], lengths), {}),
        ((keys, keys, lengths.int()), {}),
        ((keys, keys, lengths), dict(window=3)),
        ((keys[:1].repeat(3, 1, 1, 1), keys[:1].repeat(3, 1, 1, 1), torch.ones(3).long()), {}),
    ):
        with pytest.raises(ValueError, match="shared must be contiguous keys and values"):
            run(x, backend, shared=shared, **settings)
    if not (torch.cuda.is_available() and backend == "triton"):
        x["lengths"][x["slots"][0]] = 0
        with pytest.raises(ValueError, match=r"row 0: slot \d has length 0, no room"):
            run(x, backend, shared=(keys, keys, lengths))


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_queries_and_cache(backend, dtype, cache_dtype):
    for K in (8, 20, 64):
        check(inputs([0, 5, 40], 4, 2, K, dtype=dtype, cache_dtype=cache_dtype), backend)


def test_an_empty_cache_gives_the_values_of_the_token_itself(backend):
    x = inputs([0, 0], 4, 2, 16)
    assert torch.equal(run(x, backend)[0], x["v"].repeat_interleave(2, 1))


def test_a_second_step_attends_over_what_the_first_has_stored(backend):
    x = inputs([0, 3], S=5)
    for _ in range(2):
        check(x, backend)
        decode_attention(**x, backend=backend)
        x["lengths"][x["slots"]] += 1
    assert x["keys"][x["slots"][1]].isfinite().all()


def test_a_row_is_the_same_bit_for_bit_in_any_batch(backend):
    x = inputs([3, 0, 40, 17, 130], 4, 2, 8, S=200)
    together = run(x, backend)
    order = torch.tensor([4, 0, 2])
    for rows in (order, *order.split(1)):
        part = {name: a[rows] if name in ("q", "k", "v", "slots") else a for name, a in x.items()}
        assert torch.equal(run(part, backend)[0], together[0][rows])
    permuted = torch.randperm(len(x["lengths"]))  # the same rows elsewhere in the cache
    moved = {name: x[name][permuted] for name in (*CACHE, "lengths")} | dict(
        slots=permuted.argsort()[x["slots"]]
    )
    assert torch.equal(run(x | moved, backend)[0], together[0])


def test_the_number_of_threads_changes_no_bit():
    pytest.importorskip("rlhf_core.cpp", reason="the C++ extension is not built")
    x, before, results = inputs([199] * 16, 8, 4, 8), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(x, "cpp")[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_views_of_one_projection_and_any_other_layout_give_the_same_bits(backend):
    x = inputs([3, 0, 40], 4, 2, 8)
    assert not x["q"].is_contiguous()
    want = run(x, backend)[0]
    for layout in (
        lambda a: a.contiguous(),
        lambda a: a.mT.contiguous().mT,
        lambda a: a.repeat(2, 1, 1)[:3],
    ):
        assert torch.equal(run(x | {name: layout(x[name]) for name in "qkv"}, backend)[0], want)
    assert torch.equal(run(x | dict(slots=x["slots"].repeat_interleave(2)[::2]), backend)[0], want)


def test_no_rows_leave_the_cache_alone(backend):
    assert check(inputs([], N=3, S=4), backend).numel() == 0


def test_nan_and_infinite_scores_give_nan_in_their_row_alone(backend):
    x = inputs([5, 40, 20], 4, 2, 8)
    clean = run(x, backend)[0]
    for special in (math.nan, math.inf):
        x["keys"][x["slots"][1], 0, 17] = special
        out = run(x, backend)[0]
        assert out[1, :2].isnan().all() and torch.equal(out[1, 2:], clean[1, 2:])
        assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_a_soft_cap_limits_the_scores_by_the_reference_alone():
    x = inputs([3, 0, 7], H=4, Hkv=2, K=8)
    x["q"] *= 4
    out, *cache = run(x, None, softcap=0.5)
    torch.testing.assert_close(out.double(), by_hand(x, *cache, softcap=0.5), rtol=0, atol=1e-6)
    assert (out - run(x, None)[0]).abs().max() > 0.1
    for backend, softcap in (("cpp", 0.5), (None, 0.0)):
        with pytest.raises(ValueError, match=f"softcap {softcap} must be > 0, with the reference"):
            run(x, backend, softcap=softcap)


def test_float64_goes_through_the_reference():
    x = inputs([0, 5, 40], dtype=torch.float64)
    out, *cache = run(x, None)
    torch.testing.assert_close(out, by_hand(x, *cache))


def test_lengths_and_inputs_are_not_changed(backend):
    x = inputs([0, 5, 40])
    before = {
        name: a.clone()
        for name, a in x.items()
        if isinstance(a, torch.Tensor) and name not in CACHE
    }
    run(x, backend)
    assert all(torch.equal(x[name], a) for name, a in before.items())


def test_a_row_without_room_or_place_is_named(backend):
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("values are not checked on a GPU")
    x = inputs([3, 2, 7], N=5, S=8)
    before = [x[name].clone().nan_to_num() for name in CACHE]
    for slot, length, message in (
        (5, 2, r"row 1: slot 5 is outside \[0, 5\)"),
        (-1, 2, r"row 1: slot -1 is outside \[0, 5\)"),
        (0, 2, "row 1: slot 0 is an earlier row's"),
        (4, 8, "row 1: slot 4 has length 8, no room for another token in 8"),
        (4, 9, "row 1: slot 4 has length 9"),
        (4, -1, "row 1: slot 4 has length -1"),
    ):
        x["slots"], x["lengths"] = torch.tensor([0, slot, 3]), torch.tensor([3, 2, 2, 7, length])
        with pytest.raises(ValueError, match=message):
            decode_attention(**x, backend=backend)
    assert all(torch.equal(x[name].nan_to_num(), a) for name, a in zip(CACHE, before))


def test_wrong_arguments_are_named(backend):
    x = inputs([3, 2])
    half = {name: x[name].half() for name in ("q", "k", "v")}
    for wrong, error, message in (
        (dict(k=x["k"].double()), TypeError, "float64"),
        (dict(values=x["values"].half()), TypeError, "float16"),
        ({name: x[name].double() for name in CACHE}, TypeError, "float64"),
        (dict(slots=x["slots"].int()), TypeError, "slots must be int64, got torch.int32"),
        (dict(lengths=x["lengths"].float()), TypeError, "lengths must be int64"),
        (dict(q=x["q"].long()), TypeError, "int64"),
        (dict(q=x["q"][:, :3]), ValueError, r"q \(2, 3, 8\)"),
        (dict(q=x["q"][0]), ValueError, r"\(4, 8\)"),
        (dict(k=x["k"][:1]), ValueError, r"k \(1, 2, 8\)"),
        (dict(slots=x["slots"][:1]), ValueError, r"slots \(1,\)"),
        (dict(lengths=x["lengths"][:1]), ValueError, r"lengths \(1,\)"),
        (dict(values=x["values"][:, :, :2]), ValueError, r"values \(4, 2, 2, 8\)"),
        (
            {name: x[name].mT.contiguous().mT for name in CACHE},
            ValueError,
            "contiguous, got strides",
        ),
        (dict(rope=(x["rope"][0].double(), x["rope"][1])), TypeError, "rope must be float32"),
        (
            dict(rope=tuple(a[:3] for a in x["rope"])),
            ValueError,
            r"at least 4 positions, got \(3, 4\)",
        ),
        (dict(rope=tuple(a.repeat(1, 2) for a in x["rope"])), ValueError, r"got \(4, 8\)"),
        (dict(window=0), ValueError, "window must be >= 1, got 0"),
        (dict(q=x["q"].clone().requires_grad_()), ValueError, "no_grad"),
    ):
        with pytest.raises(error, match=message):
            decode_attention(**x | wrong, backend=backend)
    run(x | half, backend)  # a cache of another precision is allowed
