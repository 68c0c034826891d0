"""Tokenizers, file readers and collation."""

from rlhf_core.data.collate import TokenBatch, collate
from rlhf_core.data.encode import Example, Pair, Ranked, encode_labelled, encode_preference, encode_prompt, encode_text
from rlhf_core.data.readers import (
    DataError,
    Labelled,
    Preference,
    Ranking,
    Text,
    read_comparisons,
    read_labelled,
    read_preferences,
    read_prompts,
    read_texts,
)
from rlhf_core.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "DataError",
    "Example",
    "JsonTokenizer",
    "Labelled",
    "Pair",
    "Preference",
    "Ranked",
    "Ranking",
    "Text",
    "TokenBatch",
    "Tokenizer",
    "collate",
    "encode_labelled",
    "encode_preference",
    "encode_prompt",
    "encode_text",
    "load_tokenizer",
    "read_comparisons",
    "read_labelled",
    "read_preferences",
    "read_prompts",
    "read_texts",
]
