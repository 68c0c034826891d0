"""Rotary tables are those of `transformers` to the last bit, for every way to scale them."""

import copy

import pytest
import torch

from rlhf_core.models import TransformerConfig
from rlhf_core.models.rope import rope_frequencies, rope_tables

BANDS = dict(low_freq_factor=1.0, high_freq_factor=4.0)


def scaled(rope_type, context=None, **options):
    """A scaling; context is original_max_position_embeddings."""
    options |= {} if context is None else dict(original_max_position_embeddings=context)
    return dict(rope_type=rope_type, **options)


SCALINGS = {
    "plain": {},
    "linear": scaled("linear", factor=2.5),
    "dynamic": scaled("dynamic", factor=4.0),
    "llama 3.1": scaled("llama3", 8192, factor=8.0, **BANDS),
    "llama 3.2": scaled("llama3", 8192, factor=32.0, **BANDS),
    "llama3 with the whole context": scaled("llama3", factor=2.0, **BANDS),
    "qwen2.5 yarn": scaled("yarn", 32768, factor=4.0),
    "yarn with its whole context": scaled("yarn", factor=1.0),
    "yarn attention": scaled("yarn", 8192, factor=4.0, attention_factor=0.7),
    "yarn bounds": scaled("yarn", 4096, factor=8.0, beta_fast=16, beta_slow=2, truncate=False),
    "yarn mscale": scaled("yarn", 4096, factor=40, mscale=0.7, mscale_all_dim=1.0),
    "yarn of a narrow band": scaled("yarn", 6, factor=4.0, beta_fast=1.0001),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("head_dim, theta", [(128, 500000.0), (64, 10000.0), (6, 1e6)])
def test_frequencies_and_tables_are_theirs_bit_for_bit(scaling, head_dim, theta, transformers):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = dict(vocab_size=8, hidden_size=2 * head_dim, num_hidden_layers=1, num_attention_heads=2)
    parameters = dict(rope_theta=theta, **copy.deepcopy(SCALINGS[scaling]))
    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            **sizes, max_position_embeddings=131072, rope_parameters=parameters
        )
    )
    options = dict(rope_theta=theta, rope_scaling=SCALINGS[scaling] or None)
    ours = TransformerConfig(8, 2 * head_dim, num_heads=2, max_positions=131072, **options)
    frequencies, magnitude = rope_frequencies(ours)
    assert torch.equal(frequencies, theirs.inv_freq) and magnitude == theirs.attention_scaling
    places = torch.tensor([0, 1, 2, 1000, 77777, 131071])
    want = theirs(torch.zeros(1), places[None])
    for table, wide in zip(rope_tables(ours, 131072), want):
        assert torch.equal(table[places], wide[0, :, : head_dim // 2])


@pytest.mark.parametrize("head_dim, share", [(96, 1.0), (128, 0.75)])
@pytest.mark.parametrize("attention_factor", [None, 1.3])
def test_the_tables_of_longrope_are_theirs_bit_for_bit(
    head_dim, share, attention_factor, transformers
):
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    pairs = int(head_dim * share) // 2
    factors = dict(short_factor=torch.linspace(1, 3, pairs).tolist(), rope_type="longrope")
    factors |= dict(long_factor=torch.linspace(1, 60, pairs).tolist())
    factors |= dict(original_max_position_embeddings=4096)
    factors |= {} if attention_factor is None else dict(attention_factor=attention_factor)
    sizes = dict(vocab_size=8, hidden_size=2 * head_dim, num_hidden_layers=1, num_attention_heads=2)
    parameters = dict(rope_theta=10000.0, partial_rotary_factor=share, **factors)
    sizes |= dict(max_position_embeddings=131072, original_max_position_embeddings=4096)
    sizes |= dict(pad_token_id=0, rope_parameters=copy.deepcopy(parameters))
    theirs = Phi3RotaryEmbedding(transformers.Phi3Config(**sizes))
    scaled = dict(rope_scaling=factors, partial_rotary_factor=share, max_positions=131072)
    ours = TransformerConfig(8, 2 * head_dim, num_heads=2, **scaled)
    long, mixed = (rope_tables(ours, 131072, kind) for kind in ("long", "global"))
    for places, tables in (([0, 1, 4095], mixed), ([0, 4095, 4096, 131071], long)):
        places = torch.tensor(places)
        for table, wide in zip(tables, theirs(torch.zeros(1), places[None])):
            assert torch.equal(table[places], wide[0, :, :pairs])
    for table, other in zip(mixed, long):
        assert torch.equal(table[4096:], other[4096:])


@pytest.mark.parametrize(
    "scaling, message",
    [
        (dict(factor=2.0), "rope scaling None is not supported, only"),
        (
            dict(rope_type="longrope", factor=2.0),
            "'longrope' needs a list of 8 numbers as 'short_factor', got None",
        ),
        (
            dict(
                rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8,
                original_max_position_embeddings=4.5,
            ),
            "'longrope' needs a whole number > 0 as 'original_max_position_embeddings', got 4.5",
        ),
        (dict(rope_type="su"), "rope scaling 'su' is not supported, only default, linear"),
        (dict(rope_type="linear"), "'linear' needs a number 'factor', got None"),
        (dict(rope_type="linear", factor="2"), "'linear' needs a number 'factor', got '2'"),
        (
            dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0),
            "'llama3' needs a number 'high_freq_factor'",
        ),
        (
            dict(rope_type="yarn", factor=8.0, partial_rotary_factor=0.5),
            "'yarn' has no option 'partial_rotary_factor'",
        ),
    ],
)  # fmt: skip
def test_an_incomplete_or_unknown_scaling_is_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(8, rope_scaling=scaling)
