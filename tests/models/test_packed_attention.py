"""Attention of packed rows in parts is attention along whole rows, with fewer pairs of tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rlhf_core.data import Example, Ranked, collate
from rlhf_core.models import Transformer, TransformerConfig, packed_attention
from rlhf_core.models.packed_attention import additive, packing_pays, parts_of

CONFIG = TransformerConfig(50, hidden_size=32, num_heads=4, num_kv_heads=2, num_layers=2)
GROUPS = {
    "completions": [Ranked([1] * 7, [[2] * 5, [3], [4] * 9]), Ranked([5], [[6] * 4, [7] * 4])],
    "without a prompt": [Ranked([], [[2] * 5, [3] * 3]), Example([], [4] * 6)],
    "sequences": [Example([1] * n, [2] * (9 - n)) for n in (2, 5, 8)] + [Example([3], [4])],
    "without a completion": [Ranked([1, 2, 3], [[], [5, 6], []])],
}


@pytest.fixture(autouse=True)
def calls_cost_nothing(monkeypatch):
    """Small rows are split as well."""
    monkeypatch.setattr(packed_attention, "CALL", 0)


def sees_own(visible):
    return visible | torch.eye(visible.shape[-1], dtype=torch.bool)


def masks():
    torch.manual_seed(0)
    for name, groups in GROUPS.items():
        for packing in (None, 20, 100):
            tokens = collate(groups, 0, packing=packing)
            if tokens.visible is not None:
                yield f"{name}, {packing}", tokens.visible
    for density in (0.1, 0.5, 0.95):  # of any kind, not only those that `collate` makes
        yield f"random {density}", sees_own(torch.rand(2, 12, 12) < density).tril()
    yield "beyond themselves", sees_own(torch.rand(1, 9, 9) < 0.4)


@pytest.mark.parametrize("visible", [pytest.param(x, id=name) for name, x in masks()])
def test_parts_attend_as_whole_rows(visible):
    """Values and gradients."""
    B, T = visible.shape[:2]
    parts = parts_of(visible, CONFIG)
    shapes = [(1, heads, B * T, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    cotangent = torch.randn(shapes[0], dtype=torch.double)

    def attention(q, k, v, bias):
        causal = bias is None
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=True)

    q, k, v = (x.unflatten(2, (B, T))[0].transpose(0, 1) for x in inputs)
    whole = attention(q, k, v, additive(visible, torch.double)[:, None])
    whole = whole.transpose(0, 1).flatten(1, 2)[None]
    found = parts.attend(attention, *inputs, parts.biases(visible, torch.double))
    assert_close(found, whole)
    for got, want in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (found, whole))):
        assert_close(got, want)


def test_completions_meet_their_prompt_and_themselves_only():
    tokens = collate([Ranked([1] * 7, [[2] * 5, [3], [4] * 9]), Example([5] * 4, [6])], 0)
    parts, sizes = parts_of(tokens.visible, CONFIG)
    # The first completion goes on after the prompt. The second row has 17 tokens of padding.
    assert [(p.row, p.queries, len(p.keys)) for p in parts] == [
        (0, slice(0, 12), 12), (0, slice(12, 13), 8), (0, slice(13, 22), 16),
        (1, slice(0, 5), 5), (1, slice(5, 22), 17),
    ]  # fmt: skip
    assert sizes == [7, 5, 1, 9, 5, 17]
    assert [p.chunks for p in parts] == [[0, 1], [0, 2], [0, 3], [4], [5]]
    biases = parts_of(tokens.visible, CONFIG).biases(tokens.visible, torch.float32)
    assert [bias is None for bias in biases] == [True, False, False, True, True]


@pytest.mark.parametrize("options", [{}, dict(sliding_window=4), dict(sliding_window=64)], ids=str)
def test_a_model_of_packed_rows_gives_those_of_whole_rows(options, monkeypatch):
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(50, hidden_size=32, num_heads=4, num_kv_heads=2, **options)
    ).double()
    for groups in GROUPS.values():
        tokens = collate(groups, 0, packing=40)
        results = []
        for call in (0, 2**60):
            monkeypatch.setattr(packed_attention, "CALL", call)
            given = dict(positions=tokens.positions, visible=tokens.visible, read=tokens.read)
            hidden = model.hidden_states(tokens.input_ids, **given)
            model.zero_grad()
            hidden.square().sum().backward()
            results.append((hidden, [p.grad for p in model.parameters()]))
        assert_close(*results)


def test_rows_stay_whole_where_parts_do_not_pay(monkeypatch):
    visible = torch.ones(2, 64, 64, dtype=torch.bool).tril()
    visible[:, 32:, :32] = False
    assert len(parts_of(visible, CONFIG).parts) == 4
    capped = TransformerConfig(50, hidden_size=32, num_heads=4, attention_softcap=5.0)
    assert parts_of(visible, capped) is None
    # 4 heads of at least 64, 2 * 32^2 * 2 pairs fewer: 2^20 multiplications for 4 calls.
    monkeypatch.setattr(packed_attention, "CALL", 2**18)
    assert parts_of(visible, CONFIG) is not None
    monkeypatch.setattr(packed_attention, "CALL", 2**18 + 1)
    assert parts_of(visible, CONFIG) is None


def test_rows_are_packed_where_the_saved_tokens_cost_more_than_the_calls(monkeypatch):
    # A block of CONFIG has 32 (32 + 2 * 16 + 32) + 3 * 32 * 128 = 15360 weights.
    monkeypatch.setattr(packed_attention, "CALL", 15360)
    monkeypatch.setattr(packed_attention, "MASK", 0)
    assert packing_pays(CONFIG, (4, 10), 35) and not packing_pays(CONFIG, (4, 10), 36)
    # A mask of 30 rows of 20 tokens, against 10 saved tokens of 2 blocks.
    monkeypatch.setattr(packed_attention, "CALL", 0)
    for cost, pays in ((2 * 10 * 15360 // 600 - 1, True), (2 * 10 * 15360 // 600, False)):
        monkeypatch.setattr(packed_attention, "MASK", cost)
        assert packing_pays(CONFIG, (4, 10), 30) == pays
