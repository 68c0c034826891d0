"""sample_tokens on every backend: kept and drawn tokens against the float64 definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from op_helpers import assert_as_accurate, interpreted
from torch.testing import assert_close

from rlhf_core import sample_tokens, token_logprobs
from rlhf_core.ops.sampling import philox, uniform

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRUNCATIONS = [
    {},
    dict(top_k=5),
    dict(top_p=0.9),
    dict(min_p=0.05),
    dict(top_k=50, top_p=0.9),
    dict(top_k=40, top_p=0.95, min_p=0.02),
]
ROUNDING = 2e-6  # relative error of float32 sums of a row's mass


def truncations(backend):
    """All of TRUNCATIONS; in the interpreter none, and all options at once."""
    return [TRUNCATIONS[0], TRUNCATIONS[-1]] if interpreted(backend) else TRUNCATIONS


def pairs(backend, values, others):
    """All pairs; in the interpreter each value with one of the others, all of which occur."""
    if not interpreted(backend):
        return list(itertools.product(values, others))
    n = max(len(values), len(others))
    return [(values[i % len(values)], others[i % len(others)]) for i in range(n)]


def definition(z, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """(kept, p) of one row by sorting and long sums: bools, and p relative to the largest."""
    z = z.double().numpy()
    p = np.exp((z - z.max()) / temperature)
    order = np.argsort(-z, kind="stable")
    least = -INF
    if top_k is not None:
        least = z[order[min(top_k, len(z)) - 1]]
    if top_p is not None:
        order = order[z[order] >= least]
        held = p[order].cumsum(dtype=np.longdouble)
        least = z[order[np.argmax(held >= top_p * held[-1])]]
    return (z >= least) & (p >= (min_p or 0)), p


def assert_drawn_by_definition(logits, seeds, counters, backend, temperature=1.0, **truncation):
    """Check kept mass, token and both log-probs of every row, up to rounding."""
    got = sample_tokens(
        logits, seeds, counters, temperature=temperature, backend=backend, **truncation
    )
    assert [x.dtype for x in got] == [torch.int64, torch.float32, torch.float32]
    assert [x.shape for x in got] == [logits.shape[:1]] * 3
    rows, u = logits.cpu(), uniform(seeds, counters).cpu()
    for row, z in enumerate(rows):
        token, logprob, full_logprob = (x[row].item() for x in got)
        top_p = truncation.get("top_p")
        near = [truncation] + [
            truncation | dict(top_p=top_p * (1 + e))
            for e in (-ROUNDING, ROUNDING)
            if top_p is not None
        ]
        faults = []
        for settings in near:
            kept, p = definition(z, temperature, **settings)
            mass = p * kept
            total, cdf = mass.sum(), mass.cumsum()
            at, slack = u[row].item() * total, ROUNDING * total
            fault = None
            if not kept[token] or p[token] == 0:
                fault = f"row {row} drew {token}, which is not kept"
            elif not cdf[token] - mass[token] - slack <= at <= cdf[token] + slack:
                fault = f"row {row}: {at} is not in {token}'s part of the mass, up to {cdf[token]}"
            elif abs(full_logprob - math.log(p[token] / p.sum())) > 1e-5 * (1 + abs(full_logprob)):
                fault = f"row {row}: full log-prob {full_logprob}"
            elif abs(logprob - math.log(p[token] / total)) > 1e-5 * (1 + abs(logprob)):
                fault = f"row {row}: log-prob {logprob}, expected {math.log(p[token] / total)}"
            faults.append(fault)
        assert None in faults, f"{faults[0]} at {truncation} of {tuple(logits.shape)}"
    return got


def streams(count, first=0):
    """Seeds and counters that use both words and both signs."""
    i = torch.arange(first, first + count)
    return (i - 3) * 0x123456789ABCD, (i + 1) * 0x1FEDCBA98765 - 2**45


@pytest.mark.parametrize(
    "counter, key, random",
    [  # kat_vectors of Random123
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_published_answers(counter, key, random):
    assert list(philox(*counter, *key)) == random
    words = philox(*(torch.tensor([x, 1]) for x in counter + key))
    assert [word[0].item() for word in words] == random


def test_a_row_is_drawn_by_the_first_word_of_its_seed_and_counter(backend):
    cases = [
        (0, 0), (1, 0), (0, 1), (2**40 + 3, 5), (-1, 2**35), (7, -(2**62)), (2**63 - 1, -1)
    ]  # fmt: skip
    low, high = (lambda x: x & 0xFFFFFFFF), (lambda x: x >> 32 & 0xFFFFFFFF)
    words = [philox(low(c), high(c), 0, 0, low(seed), high(seed))[0] for seed, c in cases]
    seeds, counters = torch.tensor(cases).T
    # Never 0 or 1.
    assert uniform(seeds, counters).tolist() == [(word + 0.5) / 2**32 for word in words]
    equal = torch.zeros(len(cases), 4096)  # the token is the word's first 12 bits
    got = sample_tokens(equal, seeds, counters, backend=backend)
    assert got.tokens.tolist() == [word >> 20 for word in words]


def test_tokens_and_log_probs_are_those_of_the_definition_for_any_vocabulary(backend):
    """Sizes below, at and above a vector, a block and several blocks, under every truncation."""
    for vocab, truncation in pairs(backend, [1, 2, 127, 128, 129, 1000, 5000], TRUNCATIONS):
        logits = torch.randn(2, vocab) * 3
        assert_drawn_by_definition(logits, *streams(2), backend, temperature=0.8, **truncation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_vocabulary_of_a_real_model_in_every_dtype_with_many_ties(backend, dtype):
    some, vocab = TRUNCATIONS, 50257
    if interpreted(backend):  # one search by count, one by mass, and both; six blocks
        some = [TRUNCATIONS[{torch.float32: 1, torch.bfloat16: 2, torch.float16: 5}[dtype]]]
        vocab = 12_257
    for truncation in some:
        logits = (torch.randn(2, vocab) * torch.tensor([[0.3], [3.0]])).to(dtype)
        assert_drawn_by_definition(logits, *streams(2), backend, **truncation)


def difficult_rows(V):
    """Rows for which a naive threshold search, or a naive softmax, fails."""
    ramp, zeros = torch.linspace(-6, 6, V), torch.zeros(V)
    spike, late, two = ramp.clone(), torch.full((V,), -200.0), zeros.clone()
    spike[-1] = 90
    late[-100:] = ramp[-100:]
    two[::2] = 1
    empty, nowhere = torch.full((V,), -INF), torch.randn(V)
    empty[[5, 77, V - 100]] = torch.tensor([1.0, 2.0, 2.0])
    nowhere[:-200] = torch.finfo(torch.float32).min
    steps = (torch.arange(V) // 500).float()
    extremes = torch.tensor([3e4, -3e4]).repeat(V // 2)
    rows = (ramp, ramp.flip(0), spike, late, two, empty, torch.randn(V).round(), nowhere, steps)
    rows += (steps * 8, ramp + 1e4, ramp * 40, zeros, torch.full((V,), -1e30), extremes)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "truncation",
    [*TRUNCATIONS, dict(top_k=1), dict(top_k=2000), dict(top_p=1e-6), dict(top_p=0.3),
     dict(top_p=0.9999), dict(min_p=1)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_no_distribution_misleads_the_search(backend, truncation):
    logits = difficult_rows(4500)
    assert_drawn_by_definition(logits, *streams(len(logits)), backend, **truncation)


@pytest.mark.parametrize(
    "truncation, rows",
    [
        ({}, slice(None)),
        (dict(top_k=5), slice(None)),
        (dict(top_p=0.9), slice(None)),
        (dict(top_k=2000), slice(0, None, 3)),
        (dict(top_p=1e-6), slice(1, None, 3)),
        (TRUNCATIONS[-1], slice(2, None, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_no_distribution_misleads_the_bisection(backend, truncation, rows):
    """The first of two blocks is empty in some rows. All have searches by count and by mass."""
    logits = difficult_rows(2252)[rows]
    assert_drawn_by_definition(logits, *streams(len(logits)), backend, **truncation)


@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0])
def test_temperature_comes_before_truncation(backend, temperature):
    logits = torch.randn(3, 700)
    assert_drawn_by_definition(logits, *streams(3), backend, temperature, top_p=0.7, min_p=0.01)


@pytest.mark.parametrize(
    "truncation, kept",
    [
        ({}, [0, 1, 2, 3, 4, 6, 7]),
        (dict(top_k=1), [2]),
        (dict(top_k=2), [2, 4, 7]),  # 4 ties with 7
        (dict(top_k=3), [2, 4, 7]),
        (dict(top_k=4), [1, 2, 4, 6, 7]),
        (dict(top_p=0.24), [2]),  # 2 holds 0.25
        (dict(top_p=0.26), [2, 4, 7]),
        (dict(top_p=0.65), [1, 2, 4, 6, 7]),
        (dict(min_p=0.49), [1, 2, 4, 6, 7]),
        (dict(min_p=0.74), [2, 4, 7]),
        (dict(min_p=1.0), [2]),
        (dict(top_k=3, top_p=0.41), [2, 4, 7]),  # of 0.25 + 0.1875 + 0.1875, 2 holds 0.4
        (dict(top_k=3, top_p=0.39), [2]),
        (dict(top_p=0.3, min_p=0.8), [2]),
    ],
    ids=str,
)
def test_kept_tokens_include_those_that_tie_with_the_last(backend, truncation, kept):
    p = torch.tensor([0.0625, 0.125, 0.25, 0.03125, 0.1875, 0, 0.125, 0.1875])
    got = sample_tokens(p.log().expand(4, 8), *streams(4), backend=backend, **truncation)
    assert set(got.tokens.tolist()) <= set(kept)
    held = (got.full_logprobs - got.logprobs).exp() * p.sum()  # no two such sets have the same mass
    assert_close(held, p[kept].sum().expand(4))


def test_frequencies_are_the_probabilities(backend):
    n = 200 if interpreted(backend) else 20_000
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, -INF, -2.0, 1.5, 0.2])
    got = sample_tokens(
        logits.expand(n, 8),
        torch.arange(n),
        torch.zeros(n).long(),
        temperature=1.3,
        backend=backend,
    )
    counts = torch.bincount(got.tokens, minlength=8).double()
    expected = n * torch.softmax(logits.double() / 1.3, -1)
    assert counts[4] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 27.9  # 6 degrees of freedom: exceeded once in 10^4


def test_full_log_probs_are_those_of_token_logprobs_under_any_truncation(backend):
    logits = torch.randn(3, 3000) * 2 + 500
    settings = dict(temperature=0.6, backend="reference")
    for truncation in truncations(backend):
        got = sample_tokens(logits, *streams(3), temperature=0.6, backend=backend, **truncation)
        want = token_logprobs(logits.double(), got.tokens, **settings)
        assert_as_accurate(got.full_logprobs, token_logprobs(logits, got.tokens, **settings), want)
        assert (got.logprobs >= got.full_logprobs - 1e-6).all() and (got.logprobs <= 0).all()
        assert (got.logprobs is got.full_logprobs) == (truncation == {})


def test_options_that_keep_everything_change_no_bit(backend):
    logits = torch.randn(5, 300)
    plain = sample_tokens(logits, *streams(5), backend=backend)
    for neutral in (
        dict(top_k=300),
        dict(top_k=10**9),
        dict(top_p=1.0),
        dict(top_p=1),
        dict(min_p=0.0),
    ):
        got = sample_tokens(logits, *streams(5), backend=backend, **neutral)
        assert got.logprobs is got.full_logprobs
        assert_close(tuple(got), tuple(plain), rtol=0, atol=0)


def test_a_row_that_is_no_distribution_gives_token_0_and_nan_and_changes_no_other(backend):
    sampled = pairs(backend, [3, 3000], truncations(backend))
    for V, truncation, temperature in [(3, {}, 0), (3000, {}, 0), *((*x, 1.0) for x in sampled)]:
        logits = torch.randn(8, V)
        good = logits[[0, 7]].clone()
        logits[1, 1], logits[2, V - 1], logits[3, V // 2] = NAN, NAN, INF
        logits[4] = -INF
        logits[5] = NAN
        logits[6] = -INF
        logits[6, V - 1] = NAN
        seeds, counters = streams(8)
        settings = dict(temperature=temperature, backend=backend, **truncation)
        got = sample_tokens(logits, seeds, counters, **settings)
        assert got.tokens[1:7].tolist() == [0] * 6
        assert got.logprobs[1:7].isnan().all() and got.full_logprobs[1:7].isnan().all()
        alone = sample_tokens(good, seeds[[0, 7]], counters[[0, 7]], **settings)
        assert_close(tuple(x[[0, 7]] for x in got), tuple(alone), rtol=0, atol=0)


def test_one_possible_token_is_drawn_with_certainty(backend):
    tokens = [0, 499, 1023, 1024, 2047, 2048, 2499]  # at the ends of blocks of both kernels
    logits = torch.full((len(tokens), 2500), -INF)
    logits[torch.arange(len(tokens)), tokens] = -1e5
    for truncation in truncations(backend):
        got = sample_tokens(logits, *streams(len(tokens)), backend=backend, **truncation)
        assert got.tokens.tolist() == tokens
        assert not got.logprobs.any() and not got.full_logprobs.any()


def test_a_row_is_drawn_the_same_bit_for_bit_alone_and_in_any_batch(backend):
    logits, (seeds, counters) = torch.randn(7, 3001), streams(7)
    order = torch.tensor([4, 2, 6, 0])
    for truncation in truncations(backend):
        settings = dict(backend=backend, **truncation)
        got = sample_tokens(logits, seeds, counters, **settings)
        some = sample_tokens(logits[order], seeds[order], counters[order], **settings)
        assert_close(tuple(some), tuple(x[order] for x in got), rtol=0, atol=0)
        alone = sample_tokens(logits[3:4], seeds[3:4], counters[3:4], **settings)
        assert_close(tuple(alone), tuple(x[3:4] for x in got), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_give_the_same_bits_and_no_input_is_modified(backend, dtype):
    whole = torch.randn(4, 3, 1001).to(dtype)
    seeds, counters = (x.repeat_interleave(2)[::2] for x in streams(4))
    before = [x.clone() for x in (whole, seeds, counters)]
    for truncation in truncations(backend):
        want = sample_tokens(whole[:, -1].contiguous(), *streams(4), backend=backend, **truncation)
        for view in (whole[:, -1], whole[:, -1].t().contiguous().t()):
            got = sample_tokens(view, seeds, counters, backend=backend, **truncation)
            assert_close(tuple(got), tuple(want), rtol=0, atol=0)
    for now, then in zip((whole, seeds, counters), before):
        assert_close(now, then, rtol=0, atol=0)


def test_temperature_0_takes_the_first_of_the_most_likely_for_any_seed(backend):
    logits = torch.randn(10, 999).clamp(max=1.5)  # ties at the top
    for truncation in TRUNCATIONS:
        got = sample_tokens(logits, *streams(10), temperature=0, backend=backend, **truncation)
        assert got.tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]
        assert not got.logprobs.any()
        want = token_logprobs(logits.double(), got.tokens, backend="reference")
        assert_close(got.full_logprobs.double(), want, rtol=1e-6, atol=1e-6)


def test_a_temperature_near_0_takes_the_most_likely(backend):
    logits = torch.randn(5, 999)
    got = sample_tokens(logits, *streams(5), temperature=1e-20, backend=backend)
    assert_close(got.tokens, logits.argmax(-1))


def test_no_rows_give_no_tokens(backend):
    none = torch.zeros(0, dtype=torch.int64)
    for temperature in (0.0, 1.0):
        got = sample_tokens(
            torch.zeros(0, 7), none, none, temperature=temperature, top_k=2, backend=backend
        )
        assert [x.shape for x in got] == [(0,)] * 3 and got.tokens.dtype == torch.int64


def test_nothing_gets_a_gradient(backend):
    got = sample_tokens(torch.randn(2, 9, requires_grad=True), *streams(2), backend=backend)
    assert not got.logprobs.requires_grad and not got.full_logprobs.requires_grad


def test_float64_goes_through_the_reference():
    logits = torch.randn(3, 100, dtype=torch.float64)
    got = sample_tokens(logits, *streams(3), top_p=0.9)
    assert got.logprobs.dtype == got.full_logprobs.dtype == torch.float64
    assert_close(
        got.tokens,
        sample_tokens(logits.float(), *streams(3), top_p=0.9, backend="reference").tokens,
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            dict(logits=torch.zeros(2, 3).long()),
            TypeError,
            "logits must be a float tensor, got torch.int64",
        ),
        (dict(logits=torch.zeros(2, 1, 3)), ValueError, r"\(B, V\).*\(2, 1, 3\)"),
        (dict(logits=torch.zeros(2, 0)), ValueError, r"V > 0, got \(2, 0\)"),
        (dict(seeds=torch.zeros(2)), TypeError, "seeds must be an int64 tensor, got torch.float32"),
        (dict(seeds=7), TypeError, "seeds must be an int64 tensor, got int"),
        (
            dict(counters=torch.zeros(2).int()),
            TypeError,
            "counters must be an int64 tensor, got torch.int32",
        ),
        (dict(seeds=torch.zeros(3).long()), ValueError, r"seeds must be \(2,\).*\(3,\)"),
        (dict(counters=torch.zeros(2, 1).long()), ValueError, r"counters must be \(2,\).*\(2, 1\)"),
        (
            dict(counters=torch.zeros(2, device="meta").long()),
            ValueError,
            "counters are on meta, logits on",
        ),
        (dict(temperature=-0.5), ValueError, "temperature must be finite and >= 0, got -0.5"),
        (dict(temperature=INF), ValueError, "temperature must be finite and >= 0, got inf"),
        (dict(temperature=NAN), ValueError, "temperature must be finite and >= 0, got nan"),
        (dict(temperature=None), TypeError, "temperature must be a number, got NoneType"),
        (
            dict(temperature=torch.ones(2)),
            TypeError,
            "temperature must be a number, got torch.float32",
        ),
        (dict(top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (dict(top_k=2.0), TypeError, "top_k must be an integer, got float"),
        (dict(top_p=0.0), ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), ValueError, r"top_p must be in \(0, 1\], got 1.1"),
        (dict(top_p=NAN), ValueError, r"top_p must be in \(0, 1\], got nan"),
        (dict(top_p="0.9"), TypeError, "top_p must be a number, got str"),
        (dict(min_p=-0.1), ValueError, r"min_p must be in \[0, 1\], got -0.1"),
        (dict(min_p=2), ValueError, r"min_p must be in \[0, 1\], got 2"),
    ],
)
def test_bad_arguments_raise_with_their_value(change, error, message):
    good = dict(
        logits=torch.zeros(2, 3), seeds=torch.zeros(2).long(), counters=torch.zeros(2).long()
    )
    with pytest.raises(error, match=message):
        sample_tokens(**(good | change))
