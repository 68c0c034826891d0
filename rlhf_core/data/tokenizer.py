"""Text to ids and back: a byte-level tokenizer built in, and any `tokenizer.json` through the `tokenizers` package.

`encode` adds no special token. A prompt starts with BOS where the tokenizer's own template says so; whoever builds a
sequence adds EOS. Prompt and completion are encoded apart, so that no token straddles their boundary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rlhf_core.files import read_json, replacing, require, write_json


class Tokenizer(Protocol):
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int

    def encode(self, text: str) -> list[int]: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def encode_completion(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def save(self, path: str | os.PathLike) -> None: ...


class ByteTokenizer:
    """UTF-8 bytes are the ids 0..255; padding, BOS and EOS follow. No dependency, any text, no unknown token."""

    vocab_size = 259
    pad_id, bos_id, eos_ids = 256, 257, (258,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_prompt(self, text: str) -> list[int]:
        return [self.bos_id, *self.encode(text)]

    encode_completion = encode

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the byte ids; special ids are left out, invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        write_json(Path(path) / "tokenizer_config.json", {"tokenizer_class": type(self).__name__})


class JsonTokenizer:
    """A folder's tokenizer.json, with the special tokens that its tokenizer_config.json names."""

    def __init__(self, path: str | os.PathLike):
        self._folder = Path(path)
        file = self._folder / "tokenizer.json"
        try:
            self._tokenizer = require("tokenizers", "train").Tokenizer.from_file(str(file))
        except ImportError:
            raise
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{file}: cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = self._folder / "tokenizer_config.json"
        special = read_json(config) if config.is_file() else {}
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.bos_id = self._id(special.get("bos_token"))
        eos = self._id(special.get("eos_token"))
        self.eos_ids = () if eos is None else (eos,)
        pad = self._id(special.get("pad_token"))
        self.pad_id = 0 if pad is None else pad  # any id serves: masks come from lengths
        self._prompt_prefix = self._tokenizer.encode("").ids[:1] == [self.bos_id]
        # A SentencePiece normaliser puts a space before whatever it encodes.
        self._adds_space = self._tokenizer.decode(self.encode("a") + self.encode("a")) == "a a"

    def _id(self, token) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return None if text is None else self._tokenizer.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        return [self.bos_id] * self._prompt_prefix + self.encode(text)

    def encode_completion(self, text: str) -> list[int]:
        """Ids of text that continues other text; the space that a normaliser adds stands for one that is there."""
        return self.encode(text[1:] if self._adds_space and text.startswith(" ") else text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, path: str | os.PathLike) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (self._folder / name).is_file() and self._folder.resolve() != Path(path).resolve():
                with replacing(Path(path) / name) as temporary:
                    shutil.copyfile(self._folder / name, temporary)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model folder. FileNotFoundError where the folder has none."""
    folder = Path(path)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder)
    config = folder / "tokenizer_config.json"
    if config.is_file() and read_json(config).get("tokenizer_class") == ByteTokenizer.__name__:
        return ByteTokenizer()
    raise FileNotFoundError(f"{folder}: no tokenizer.json, and no tokenizer_config.json of a ByteTokenizer")
