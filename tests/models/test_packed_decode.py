"""A decoding step in one C++ call against Transformer.decode in float64; rejected models."""

import copy
import functools

import pytest
import torch

from rlhf_core import backends, generation
from rlhf_core.models import KVCache, Transformer, TransformerConfig
from rlhf_core.models import packed_decode as module
from rlhf_core.models.lagging import lagging_copy
from rlhf_core.models.lora import LoRAConfig, adapters_off, add_adapters
from rlhf_core.models.packed_decode import PackedModel, packed_for_decoding
from rlhf_core.ops.linear_rows import linear_rows, quantize_rows

pytestmark = pytest.mark.parametrize("backend", ["cpp"], indirect=True)
S = 40
KINDS = {
    "llama": dict(num_kv_heads=2),
    "as many heads": dict(tie_embeddings=False),
    "qwen2": dict(qkv_bias=True, num_kv_heads=1),
    "qwen3": dict(qk_norm=True, head_dim=6),
    "mistral": dict(sliding_window=7, num_kv_heads=2),
    "gpt2": dict(
        positions="learned", norm="layernorm", activation="gelu_tanh", gated_mlp=False,
        qkv_bias=True, out_bias=True, mlp_bias=True, hidden_size=36,
    ),
    "gemma": dict(norm="rmsnorm_plus_one", activation="gelu_tanh", num_kv_heads=1, qk_norm=True),
    "biases": dict(qkv_bias=True, out_bias=True, mlp_bias=True, num_layers=1),
    "odd sizes": dict(
        hidden_size=10, num_heads=1, num_kv_heads=1, intermediate_size=17, vocab_size=1
    ),
    "narrow and wide": dict(
        hidden_size=4, num_heads=2, head_dim=34, num_kv_heads=1, intermediate_size=70
    ),
    "scaled positions": dict(rope_theta=100.0, rope_scaling={"rope_type": "linear", "factor": 2.0}),
}  # fmt: skip


@pytest.fixture(params=["packed", "in place"])
def form(request, monkeypatch):
    """Packed copies of small models, or all models' weights where they are."""
    if request.param == "in place":
        monkeypatch.setattr(module, "MOST_PACKED", 0)
    return request.param


def packed(model, rows=1):
    """The form of a model that decodes in one call, or None if the model itself decodes."""
    with packed_for_decoding(model, rows) as fast:
        return fast if isinstance(fast, PackedModel) else None


@torch.no_grad()
def make(**options):
    sizes = dict(
        vocab_size=67,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=44,
        max_positions=2 * S,
    )
    model = Transformer(TransformerConfig(**(sizes | options))).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def filled(model, lengths):
    """A cache that holds `lengths` tokens per row, followed by NaN."""
    cache = KVCache(model.config, len(lengths), S, model.head_weight)
    cache.lengths[:] = torch.tensor(lengths)
    for store in stored(cache):
        store.copy_(torch.randn_like(store).where(held(cache), torch.nan))
    return cache


def stored(cache):
    """Keys and values, each (L, N, Hkv, S, K): all layers have the same window."""
    (pair,) = cache.stores.values()
    return pair


def held(cache):
    """The places that hold a token, (N, 1, S, 1)."""
    places = torch.arange(stored(cache)[0].shape[3])
    return (places < cache.lengths[:, None])[:, None, :, None]


def in_float64(cache, exact):
    copy = KVCache(exact.config, len(cache.lengths), S, exact.head_weight)
    copy.lengths[:] = cache.lengths
    for wide, store in zip(stored(copy), stored(cache)):
        wide.copy_(store)
    return copy


def rows(model, lengths):
    return torch.randint(model.config.vocab_size, (len(lengths),)), filled(model, lengths)


def check(got, reference, truth):
    """Compare the largest errors: after several layers those of single elements are noise."""
    assert torch.equal(got.isnan(), truth.isnan())
    error, theirs = ((x.double() - truth).nan_to_num().abs().max() for x in (got, reference))
    assert error <= 3 * theirs + 2e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B", [1, 2, 7, 45])
def test_steps_are_as_accurate_as_those_of_the_modules(backend, form, kind, B):
    model = make(**KINDS[kind])
    exact = copy.deepcopy(model).double()
    ids, cache = rows(model, [3 * n % 30 for n in range(B + 1)])
    slots = torch.randperm(B + 1)[:B]
    theirs, truth = copy.deepcopy(cache), in_float64(cache, exact)
    decode = packed(model).decode
    for _ in range(3):
        got = decode(ids[:B], cache, slots)
        reference, want = model.decode(ids[:B], theirs, slots), exact.decode(ids[:B], truth, slots)
        check(got, reference, want)
        assert torch.equal(cache.lengths, truth.lengths)
        for stores in zip(*map(stored, (cache, theirs, truth))):
            check(*stores)
        ids[:B] = want.argmax(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_as_accurate_as_those_of_the_modules(backend, kind):
    """Prompts below, at and above a block of rows, several in a block, and padding ids of -7."""
    model = make(**KINDS[kind])
    exact = copy.deepcopy(model).double()
    lengths = torch.tensor([1, 2, 37, 32, 30, 5, 33, 1])
    ids = torch.randint(model.config.vocab_size, (8, 37))
    mine, theirs = (filled(model, [0] * 8) for _ in range(2))
    truth = in_float64(mine, exact)
    reference, want = model.prefill(ids, lengths, theirs), exact.prefill(ids, lengths, truth)
    beyond = torch.arange(37) >= lengths[:, None]
    got = packed(model).prefill(ids.masked_fill(beyond, -7), lengths, mine)
    check(got, reference, want)
    assert torch.equal(mine.lengths, truth.lengths)
    for stores in zip(*map(stored, (mine, theirs, truth))):
        assert stores[0].masked_fill(held(mine), torch.nan).isnan().all()
        check(*(x.where(held(mine), 0) for x in stores))


@torch.no_grad()
def test_a_prompt_has_the_bits_of_its_tokens_one_by_one(backend):
    model, ids = make(qk_norm=True, sliding_window=9), torch.randint(67, (3, 37))
    at_once, stepwise = (filled(model, [0] * 3) for _ in range(2))
    got = packed(model).prefill(ids, torch.full((3,), 37), at_once)
    for token_ids in ids.T:
        want = packed(model).decode(token_ids, stepwise, torch.arange(3))
    assert torch.equal(got, want) and torch.equal(at_once.lengths, stepwise.lengths)
    assert torch.equal(*(stored(x)[0].nan_to_num() for x in (at_once, stepwise)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "as many heads", "gpt2"])
def test_rows_that_share_a_prompt_are_as_rows_with_a_prompt_each(backend, form, kind):
    """Three rows a prompt, of which some have ended; without the prompts the cache is NaN."""
    model, lengths = make(**KINDS[kind]), torch.tensor([1, 9, 30])
    ids, tokens = torch.randint(67, (3, 30)), torch.randint(67, (4, 9))
    prompts = filled(model, [0] * 3)
    packed(model).prefill(ids, lengths, prompts)
    once = prompts.continued(3, S + 4)
    for store in stored(once):
        assert store.shape[3] == 4  # what follows the prompts
        store.fill_(torch.nan)
    apart = filled(model, lengths.repeat_interleave(3).tolist())
    for store, keys in zip(stored(apart), prompts.stores[None]):
        store.copy_(keys.repeat_interleave(3, dim=1))
    slots = torch.tensor([0, 2, 3, 4, 5, 6, 8])
    for step in tokens:
        got = packed(model).decode(step[slots], once, slots)
        want = packed(model).decode(step[slots], apart, slots)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert torch.equal(once.lengths, apart.lengths)


@torch.no_grad()
@pytest.mark.parametrize("B", [16, 77])
def test_a_row_is_the_same_bit_for_bit_in_any_batch_and_on_any_number_of_threads(backend, form, B):
    """In place, layers of more than 16 rows add in another order than those of fewer."""
    model = make()
    ids, cache = rows(model, [n % 30 for n in range(B)])
    decode, slots, before = packed(model).decode, torch.arange(B), torch.get_num_threads()
    together = copy.deepcopy(cache)
    torch.set_num_threads(2)
    want = decode(ids, together, slots)
    torch.set_num_threads(1)
    alone = copy.deepcopy(cache)
    sizes = (1, 2, 3, 5, 5) if B == 16 else (17, 40, 20)
    got = torch.cat([decode(ids[part], alone, slots[part]) for part in slots.split(sizes)])
    torch.set_num_threads(before)
    assert torch.equal(got, want) and torch.equal(alone.lengths, together.lengths)
    assert torch.equal(*(stored(x)[0].nan_to_num() for x in (alone, together)))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("B", [3, 20])
def test_16_bit_steps_are_as_accurate_as_those_of_the_modules(backend, dtype, kind, B):
    model = make(**KINDS[kind]).to(dtype)
    exact = copy.deepcopy(model).double()
    ids, cache = rows(model, [3 * n % 30 for n in range(B)])
    theirs, truth = copy.deepcopy(cache), in_float64(cache, exact)
    got = packed(model, B).decode(ids, cache, torch.arange(B))
    assert got.dtype == torch.float32
    reference = model.decode(ids, theirs, torch.arange(B))
    want = exact.decode(ids, truth, torch.arange(B))
    error, theirs = (torch.linalg.vector_norm(x.double() - want) for x in (got, reference))
    assert error <= theirs


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all-linear", ("v_proj", "gate_proj")], ids=str)
@pytest.mark.parametrize(
    ("form", "B"), [("packed", 6), ("in place", 6), ("in place", 20)], indirect=["form"]
)
def test_adapters_count_and_off_means_off(backend, form, targets, B):
    model = make(qkv_bias=True)
    ids, cache = rows(model, [5] * B)
    slots = torch.arange(B)
    untouched = packed(model).decode(ids, copy.deepcopy(cache), slots)
    add_adapters(model, LoRAConfig(rank=2, target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    with adapters_off(model):
        assert torch.equal(packed(model).decode(ids, copy.deepcopy(cache), slots), untouched)
    exact = copy.deepcopy(model).double()
    truth = in_float64(cache, exact)
    reference, want = (
        model.decode(ids, copy.deepcopy(cache), slots),
        exact.decode(ids, truth, slots),
    )
    assert (want - untouched).abs().max() > 0.1
    check(packed(model).decode(ids, cache, slots), reference, want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("B", [1, 7, 45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_in_8_bits_are_those_of_the_rounded_weights(backend, kind, B, dtype):
    model = make(**KINDS[kind]).to(dtype)
    rounded = model.plain_copy().double()
    layers = [x for x in rounded.modules() if isinstance(x, torch.nn.Linear)]
    assert len(layers) == 4 * 3 + 1
    for layer in layers:
        rows_of, scales = quantize_rows(layer.weight)
        layer.weight = torch.nn.Parameter(rows_of.double() * scales.double()[:, None])
    ids, cache = rows(model, [3 * n % 30 for n in range(B)])
    slots, exact = torch.arange(B), model.plain_copy().double()
    own = model.decode(ids, copy.deepcopy(cache), slots)
    own_error = (own - exact.decode(ids, in_float64(cache, exact), slots)).abs().max()
    want = rounded.decode(ids, in_float64(cache, rounded), slots)
    with packed_for_decoding(model, B, "int8") as fast:
        got = fast.decode(ids, cache, slots)
    tolerance = 1e-4 if dtype == torch.float32 else 1.5 * own_error.item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    assert (want - own).abs().max() > 20 * 1e-4


@torch.no_grad()
def test_adapters_keep_their_precision_beside_8_bits(backend):
    model, slots = make(), torch.arange(6)
    ids, cache = rows(model, [5] * 6)
    with packed_for_decoding(model, 6, "int8") as fast:
        before = fast.decode(ids, copy.deepcopy(cache), slots)
    add_adapters(model, LoRAConfig(rank=2))
    for parameter in filter(lambda x: x.requires_grad, model.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    want = model.decode(ids, copy.deepcopy(cache), slots)
    with packed_for_decoding(model, 6, "int8") as fast:
        got = fast.decode(ids, copy.deepcopy(cache), slots)
    assert (got - want).abs().mean() < 0.1 * (before - want).abs().mean()


@torch.no_grad()
def test_strides_do_not_matter(backend, form):
    model, slots = make(), torch.arange(10)
    ids, cache = rows(model, [5] * 10)
    strided, again = copy.deepcopy(model), copy.deepcopy(cache)
    for parameter in strided.parameters():
        parameter.data = (
            parameter.data[..., None].transpose(0, -1).contiguous().transpose(0, -1)[..., 0]
        )
    want = packed(model).decode(ids[::2].clone(), cache, slots[::2].clone())
    assert torch.equal(packed(strided).decode(ids[::2], again, slots[::2]), want)


@torch.no_grad()
@pytest.mark.parametrize("B", [9, 21])
def test_a_row_that_is_not_finite_stays_alone(backend, form, B):
    model = make()
    ids, cache = rows(model, [4] * B)
    stored(cache)[1][1, 5, :, 2] = torch.nan
    got = packed(model).decode(ids, cache, torch.arange(B))
    assert got.isnan().any(dim=1).tolist() == [row == 5 for row in range(B)]


@torch.no_grad()
def test_a_wrong_token_or_slot_is_named_and_nothing_written(backend):
    model = make()
    cache = filled(model, [3, S, 5])
    decode, before = packed(model).decode, copy.deepcopy(cache)
    for tokens, slots, message in (
        ([1, 67], [0, 2], r"row 1: token 67 is outside \[0, 67\)"),
        ([-1, 1], [0, 2], r"row 0: token -1 is"),
        ([1, 1], [0, 3], r"row 1: slot 3 is outside \[0, 3\)"),
        ([1, 1], [2, 2], "row 1: slot 2 is an earlier row's"),
        ([1, 1], [0, 1], f"row 1: slot 1 has length {S}, no room for another token in {S}"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(torch.tensor(tokens), cache, torch.tensor(slots))
    for counts, message in (
        ([2, 0], "row 1: cannot append 0 of 2 tokens at position 5 of"),
        ([3, 1], "row 0: cannot append 3 of 2"),
        ([2, 36], "36 of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            packed(model)._run(
                torch.ones(2, 2).long(), torch.tensor(counts), cache, torch.tensor([0, 2])
            )
    message = f"row 0: cannot append 36 of 36 tokens at position 5 of a cache of {S}"
    with pytest.raises(ValueError, match=message):
        packed(model)._run(torch.ones(1, 36).long(), None, cache, torch.tensor([2]))
    assert torch.equal(cache.lengths, before.lengths)
    assert torch.equal(*(stored(x)[0].nan_to_num() for x in (cache, before)))
    # The last position is usable.
    packed(model)._run(torch.ones(1, 35).long(), None, cache, torch.tensor([2]))
    assert cache.lengths.tolist() == [3, S, S]


@pytest.mark.parametrize("form", ["in place"], indirect=True)
def test_weights_in_place_are_not_copied(backend, form):
    model = make(qkv_bias=True)
    add_adapters(model, LoRAConfig(rank=2))
    kept = {x.data_ptr() for x in packed(model).kept}
    assert kept >= {x.data_ptr() for name, x in model.named_parameters() if "lora_" not in name}


def test_models_that_it_does_not_compute_decode_by_themselves(backend, monkeypatch):
    assert packed(make()) and packed(make(**KINDS["qwen3"])) and packed(lagging_copy(make()))
    for options in (
        dict(sliding_window=7, full_layers=(0,)), dict(activation="gelu"), dict(norm_places="both"),
        dict(logit_softcap=9.0), dict(attention_scale=0.3), dict(unrotated_layers=(0,)),
        dict(partial_rotary_factor=0.5),
    ):  # fmt: skip
        assert packed(make(**options)) is None
    hooked, early = make(), make()
    hooked.trunk.blocks[0].mlp.register_forward_hook(lambda *_: None)
    early.trunk.embed.register_forward_pre_hook(lambda *_: None)
    mine = type("Mine", (Transformer,), {})(make().config)
    for model in (hooked, early, make().double(), mine):
        assert packed(model) is None
    # From here on torch's product of 16-bit weights is faster.
    assert packed(make().bfloat16(), rows=64) and packed(make().bfloat16(), rows=65) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(make()) is None
    size = sum(x.numel() for x in make().parameters())
    monkeypatch.setattr(module, "MOST_PACKED", size)
    assert packed(make()).packed_size == size
    monkeypatch.setattr(module, "MOST_PACKED", size - 1)
    assert packed(make()).packed_size == 0
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    assert packed(make()) is None


def test_8_bits_are_refused_where_no_step_has_them(backend, monkeypatch):
    hooked, ids = make(), torch.ones(1, 3, dtype=torch.long)
    hooked.trunk.blocks[0].mlp.register_forward_hook(lambda *_: None)
    run = functools.partial(generation.generate, max_new_tokens=2)
    for model in (hooked, make(logit_softcap=9.0), make().double()):
        with pytest.raises(ValueError, match="weight_dtype int8: a GPT-2 or Llama without"):
            run(model, ids, weight_dtype="int8")
    with pytest.raises(ValueError, match=r"weight_dtype must be one of .*, got 'int4'"):
        run(make(), ids, weight_dtype="int4")
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    with pytest.raises(ValueError, match=r"it needs the C\+\+ backend"):
        run(make(), ids, weight_dtype="int8")


def test_generate_uses_it_and_samples_what_the_modules_sample(backend, form, monkeypatch):
    model, ids = make(), torch.randint(67, (20, 5))
    options = dict(max_new_tokens=30, eos_ids=(1, 2, 3, 4), seeds=torch.arange(20))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fits", lambda *_: False)
        want = generation.generate(model, ids, **options)
    monkeypatch.setattr(Transformer, "decode", None)
    got = generation.generate(model, ids, **options)
    assert torch.equal(got.response_ids, want.response_ids)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_large_layers_give_the_same_and_the_model_stays_as_it_was(backend, monkeypatch, adapted):
    """All layers count as large. The rows drop to one, so that every number of rows occurs."""
    monkeypatch.setattr(module, "_fits", lambda *_: False)
    model, ids = make(tie_embeddings=False), torch.randint(67, (20, 5))
    if adapted:
        add_adapters(model, LoRAConfig(rank=2, target_modules=("v_proj", "down_proj")))
        for parameter in filter(lambda x: x.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter, std=0.2)
    options = dict(max_new_tokens=14, eos_ids=tuple(range(9)), seeds=torch.arange(20))
    want = generation.generate(model, ids, **options)
    assert len(want.response_mask.sum(dim=1).unique()) > 5
    monkeypatch.setattr(module, "READ_FROM", 0)
    used = {}

    def counted(x, weight, bias):
        used[id(weight)] = used.get(id(weight), 0) + 1
        return linear_rows(x, weight, bias)

    monkeypatch.setattr(module, "linear_rows", counted)
    got = generation.generate(model, ids, **options)
    # In each of 14 steps: the prompt's, and 13 tokens.
    assert list(used.values()) == [14] * (4 * 3 + 1) and id(model.head_weight) in used
    assert torch.equal(got.response_ids, want.response_ids)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=2e-5)
    assert not any({"forward", "base", "project"} & vars(layer).keys() for layer in model.modules())
