"""Tokenizers, file readers and collation."""

from rlhf_core.data.collate import Example, Pair, TokenBatch, collate, collate_pairs, encode_preference, encode_text
from rlhf_core.data.readers import DataError, Preference, Text, read_preferences, read_prompts, read_texts
from rlhf_core.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "DataError",
    "Example",
    "JsonTokenizer",
    "Pair",
    "Preference",
    "Text",
    "TokenBatch",
    "Tokenizer",
    "collate",
    "collate_pairs",
    "encode_preference",
    "encode_text",
    "load_tokenizer",
    "read_preferences",
    "read_prompts",
    "read_texts",
]
