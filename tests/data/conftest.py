"""The tokenizers that the tests of data try: bytes, byte-level BPE, and SentencePiece-like."""

import pytest

from rlhf_core.data import ByteTokenizer, load_tokenizer


@pytest.fixture(
    params=["bytes", "tokenizers/gpt2", "tokenizers/minimind", "models/stories260k"],
    scope="module",
)
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return load_tokenizer(request.getfixturevalue("data_dir") / request.param)
