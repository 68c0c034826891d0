"""Text and conversations to ids and back: bytes, any `tokenizer.json`, or GPT-2's two files.

Text that spells a special token is encoded letter by letter. Only BOS, EOS and chat templates give
special ids. A prompt starts with BOS if the tokenizer's post-processor adds it. EOS is added by the
functions of encode.py. Prompt and completion are encoded separately, so no token spans both.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from rlhf_core.data.chat import ChatTemplate, Message, Rendered
from rlhf_core.data.readers import check_messages
from rlhf_core.files import (
    Replacement,
    dump_json,
    model_folder,
    read_ids,
    read_object,
    read_text,
    require,
    short,
    shown,
)

_GPT2, _END = ("GPT2Tokenizer", "GPT2TokenizerFast"), "<|endoftext|>"


class Tokenizer(Protocol):
    """The interface of all tokenizers.

    Attributes:
        vocab_size: Number of ids.
        bos_id: Id that starts a sequence, if there is one.
        eos_ids: All ids that end a response. The first one is appended to completions.
        pad_id: Id of padding.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int

    def encode(self, text: str) -> list[int]: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def encode_completion(self, text: str) -> list[int]: ...
    def encode_chat(
        self, messages: Sequence[Message], *, start: int = 0, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def save(self, path: str | os.PathLike) -> None: ...


class ByteTokenizer:
    """Ids 0 to 255 are UTF-8 bytes; padding, BOS and EOS follow. It encodes any text."""

    vocab_size: int = 259
    pad_id: int = 256
    bos_id: int | None = 257
    eos_ids: tuple[int, ...] = (258,)

    def encode(self, text: str) -> list[int]:
        return [*text.encode("utf-8")]  # faster than list(...)

    def encode_prompt(self, text: str) -> list[int]:
        return [self.bos_id, *text.encode("utf-8")]

    encode_completion = encode

    def encode_chat(
        self, messages: Sequence[Message], *, start: int = 0, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """As `JsonTokenizer.encode_chat`, with a built-in template.

        It is BOS, then "role: content" and EOS per message. The generation prompt is "assistant: ".
        """
        ids, mask = [self.bos_id], [False]
        for i, message in enumerate(check_messages(messages, "messages")):
            header = self.encode(f"{message['role']}: ")
            content = [*self.encode(message["content"]), *self.eos_ids]
            counts = message["role"] == "assistant" and i >= start
            ids += header + content
            mask += [False] * len(header) + [counts] * len(content)
        prompt = self.encode("assistant: " * add_generation_prompt)
        return ids + prompt, mask + [False] * len(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the byte ids, without special ids. Invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token by its name."""
        special = {"padding": self.pad_id, "BOS": self.bos_id, "EOS": self.eos_ids[0]}
        return {f"byte {i}": i for i in range(256)} | special

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer_config.json. A tokenizer.json goes, because readers would prefer it."""
        with Replacement(path) as files:
            files.remove("tokenizer.json", first=True)
            dump_json(files.open("tokenizer_config.json"), {"tokenizer_class": type(self).__name__})


class JsonTokenizer:
    """The tokenizer.json of a folder, read with the `tokenizers` package.

    A folder of GPT-2's kind may have vocab.json and merges.txt instead. `save` then makes the
    tokenizer.json.

    BOS, EOS and padding are those of tokenizer_config.json (or else special_tokens_map.json), then
    of generation_config.json, then of config.json. `eos_ids` holds all of them in this order,
    `bos_id` and `pad_id` are the first. Without padding, `pad_id` is 0, because any id works.

    decode(encode(text)) equals text as far as the tokenizer allows. SentencePiece, for example,
    decodes U+2581 as a space.

    Attributes:
        template_dates: The dates that the chat template has written so far, by format.
    """

    _FILES = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    )
    _TEMPLATE = "chat_template.jinja"

    def __init__(
        self,
        path: str | os.PathLike,
        template_date: datetime.date | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ):
        self._folder = Path(path).absolute()
        self._template_date, self._template_vars = template_date, template_vars
        self.template_dates: dict[str, str] = {}
        self._file = file = self._folder / "tokenizer.json"
        self._config = self._read("special_tokens_map.json") | self._read("tokenizer_config.json")
        self._made: dict[str, dict] = {}  # files that the folder lacks
        if file.is_file():
            spec = read_object(file)
            self._tokenizer = _tokenizer("from_file", file, str(file))
        else:
            self._file = file = self._folder / "vocab.json"
            spec, self._config = _of_gpt2(self._folder, self._config)
            self._made = {"tokenizer.json": spec, "tokenizer_config.json": self._config}
            self._tokenizer = _tokenizer("from_str", file, json.dumps(spec))
        self._names = {
            name: self._text_of(name, token)
            for name, token in self._config.items()
            if name.endswith("_token") and not isinstance(token, bool)
        }
        known = self._tokenizer.token_to_id
        named = [text for text in self._names.values() if known(text) is not None]
        self._tokenizer.add_special_tokens(named)
        # SentencePiece normalizers put a space before a text, which a completion must not have.
        parts = ("normalizer", "pre_tokenizer")
        unprefixed = spec | {part: _without_prefix(spec.get(part)) for part in parts}
        self._continuing = self._tokenizer
        if unprefixed != spec:
            self._continuing = _tokenizer("from_str", file, json.dumps(unprefixed))
            self._continuing.add_special_tokens(named)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {x.content: i for i, x in added.items() if x.special or x.content in named}
        self._splits = _splits(token for token in added.values() if token.content in self._special)
        # Added tokens that are not special. Messages may spell them, as in transformers.
        plain = {i: x for i, x in added.items() if not (x.normalized or x.single_word)}
        self._markers = {x.content: i for i, x in plain.items() if x.content not in self._special}
        self._marker_splits = _splits(x for x in plain.values() if x.content in self._markers)
        # Whether the space comes after every added token, too, or only before the whole text.
        first = next(iter(self._special), "")
        with _foreign(file):
            spaced, alone = (
                self._tokenizer.encode(x, add_special_tokens=False).tokens
                for x in (first + "a", "a")
            )
            prefix = self._tokenizer.encode("").ids[:1]
        self._prefix_after_token = spaced[1:] == alone
        for tokenizer in (self._tokenizer, self._continuing):
            tokenizer.encode_special_tokens = True  # as plain text

        self.vocab_size = self._tokenizer.get_vocab_size()
        bos, self.eos_ids, pad = (self._ids_of(kind) for kind in ("bos", "eos", "pad"))
        self.bos_id, self.pad_id = next(iter(bos), None), next(iter(pad), 0)
        self._prompt_prefix = prefix if prefix == [self.bos_id] else []

    def _read(self, name: str) -> dict:
        """The fields of a file except null ones. A file that is missing has none."""
        file = self._folder / name
        fields = read_object(file) if file.is_file() else {}
        return {field: value for field, value in fields.items() if value is not None}

    def _text_of(self, name: str, token) -> str:
        """The text of a special token in the tokenizer's files."""
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str) or not text:
            files = "tokenizer_config.json or special_tokens_map.json"
            raise ValueError(
                f"{self._folder}: {name} in {files} must be a text, or an object with a text as "
                f"content, got {shown(token)}"
            )
        return text

    def _ids_of(self, kind: str) -> tuple[int, ...]:
        named = self._names.get(f"{kind}_token")
        ids = [self._tokenizer.token_to_id(named)] if named is not None else []
        for name in ("generation_config.json", "config.json"):
            try:
                ids += read_ids(self._read(name), f"{kind}_token_id")
            except ValueError as error:
                raise ValueError(f"{self._folder / name}: {error}") from None
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def encode(self, text: str) -> list[int]:
        return self._ids(self._tokenizer, text)

    def _ids(self, tokenizer, text: str) -> list[int]:
        with _foreign(self._file):
            return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        return self._prompt_prefix + self.encode(text)

    def encode_completion(self, text: str) -> list[int]:
        """Return ids of text after a prompt: decode(prompt ids + these) equals prompt + text."""
        return self._ids(self._continuing, text)

    def encode_chat(
        self, messages: Sequence[Message], *, start: int = 0, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, by the folder's chat template, and their mask.

        The mask is True for tokens of the assistant in messages[start:]: those that the template
        encloses in {% generation %} or, without this tag, each turn up to its first EOS. A turn is
        encoded separately from the text around it. The ids start with one BOS if the template or
        the post-processor adds it.

        Raises:
            FileNotFoundError: The folder has no template.
            ValueError: The template fails, or the assistant's turns cannot be found.
        """
        messages = check_messages(messages, "messages")
        rendered = self._template.render(
            messages, start=start, add_generation_prompt=add_generation_prompt
        )
        ids, mask, ended = [], [], None
        for position, tokens in self._pieces(rendered):
            turn = next((span for span in rendered.spans if span[0] <= position < span[1]), None)
            ids += tokens
            mask += [turn not in (None, ended)] * len(tokens)
            if not self._template.tagged and set(tokens[-1:]) & set(self.eos_ids):
                ended = turn
        if True not in mask and any(message["role"] == "assistant" for message in messages[start:]):
            raise ValueError(
                f"{self._template.file}: the chat template renders no text of the assistant"
            )
        leading = next((n for n, i in enumerate(ids) if i != self.bos_id), len(ids))
        bos = ids[: min(leading, 1)] or self._prompt_prefix
        return bos + ids[leading:], [False] * len(bos) + mask[leading:]

    def _pieces(self, rendered: Rendered) -> Iterator[tuple[int, list[int]]]:
        """Yield (position, ids) of added tokens and of the texts between them, cut at turns."""
        edges = sorted(edge for span in rendered.spans for edge in span)
        position, prefixed = 0, True
        for i, piece in enumerate(self._splits.split(rendered.text)):
            end = position + len(piece)
            if i % 2:
                token = piece if piece in self._special else piece.strip()
                yield position + piece.index(token), [self._special[token]]
                prefixed = self._prefix_after_token
            elif piece:
                inner = (edge for edge in edges if position < edge < end)
                for first, last in pairwise([position, *inner, end]):
                    text = rendered.text[first:last].replace(rendered.shield, "")
                    for j, part in enumerate(self._marker_splits.split(text)):
                        if j % 2:
                            token = part if part in self._markers else part.strip()
                            yield first, [self._markers[token]]
                            prefixed = self._prefix_after_token
                        elif part:
                            encoder = self._tokenizer if prefixed else self._continuing
                            yield first, self._ids(encoder, part)
                            prefixed = False
            position = end

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        file = self._folder / self._TEMPLATE
        if file.is_file():
            source = read_text(file)
        else:
            file, source = self._folder / "tokenizer_config.json", self._config.get("chat_template")
            if isinstance(source, list):  # named templates
                entries = (entry for entry in source if isinstance(entry, dict))
                named = (x.get("template") for x in entries if x.get("name") == "default")
                source = next(named, None)
            if source is not None and not isinstance(source, str):
                raise ValueError(f"{file}: chat_template must be a string, got {shown(source)}")
        if source is None:
            raise FileNotFoundError(
                f"{self._folder}: the tokenizer has no chat template for messages: add "
                f"{self._TEMPLATE}, or a field 'chat_template' in tokenizer_config.json (if it has "
                "named templates, one named 'default')"
            )
        options = (self._template_date, self._template_vars, self.template_dates)
        return ChatTemplate(source, file, self._names, self._special, *options)

    def decode(self, ids: Sequence[int]) -> str:
        with _foreign(self._file):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token by its text, those of added tokens included."""
        return self._tokenizer.get_vocab()

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer's files, without config.json, which belongs to the model.

        Files with these names that the tokenizer lacks are removed.
        """
        if self._folder.resolve() == Path(path).resolve():
            return
        names = (*self._FILES, self._TEMPLATE)
        found = {name: self._folder / name for name in reversed(names)}  # tokenizer.json last
        found = {
            name: None if name in self._made else file.read_bytes()
            for name, file in found.items()
            if name == "tokenizer.json" or name in self._made or file.is_file()
        }
        with Replacement(path) as files:
            files.remove(*names)
            for name, content in found.items():
                if content is None:
                    dump_json(files.open(name), self._made[name])
                else:
                    files.open(name).write(content)


def load_tokenizer(
    path: str | os.PathLike,
    template_date: datetime.date | None = None,
    template_vars: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Return the tokenizer of a folder or of "owner/name".

    Args:
        path: The folder or repository.
        template_date: What a chat template with `strftime_now` writes. None means now.
        template_vars: Values of variables of the chat template, such as {"enable_thinking": False}.

    Raises:
        FileNotFoundError: There is no tokenizer.
        ValueError: A file is damaged, or the tokenizer's template has no variables.
    """
    folder = model_folder(path)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder, template_date, template_vars)
    config = folder / "tokenizer_config.json"
    if config.is_file() and read_object(config).get("tokenizer_class") == ByteTokenizer.__name__:
        if template_vars:
            raise ValueError(
                f"{folder}: the chat template of a ByteTokenizer has no variables, got "
                f"{short(template_vars)}"
            )
        return ByteTokenizer()
    if all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        return JsonTokenizer(folder, template_date, template_vars)
    raise FileNotFoundError(
        f"{folder}: no tokenizer.json, no vocab.json with merges.txt, and no tokenizer_config.json "
        "of a ByteTokenizer. Copy the model's tokenizer there, or write the one for bytes "
        "with ByteTokenizer().save(folder)"
    )


def other_token(
    tokenizer: ByteTokenizer | JsonTokenizer, other: ByteTokenizer | JsonTokenizer
) -> str | None:
    """Describe a token of a tokenizer that another one lacks or gives another id, or None."""
    own, theirs = tokenizer.vocabulary(), other.vocabulary()
    names = (name for name in sorted(own, key=own.__getitem__) if theirs.get(name) != own[name])
    name = next(names, None)
    if name is None:
        return None
    found = f"has id {theirs[name]}" if name in theirs else "does not exist"
    return f"token {short(name)} with id {own[name]} {found}"


def _of_gpt2(folder: Path, config: dict) -> tuple[dict, dict]:
    """Return tokenizer.json and tokenizer_config.json of GPT-2's vocab.json and merges.txt.

    Raises:
        ValueError: The tokenizer is of another kind, whose ids these files do not determine, or a
            file is damaged.
    """
    model = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    kinds = config.get("tokenizer_class"), model.get("model_type")
    if kinds[0] not in (None, *_GPT2) or (kinds[0] is None and kinds[1] not in (None, "gpt2")):
        raise ValueError(
            f"{folder}: without tokenizer.json only GPT-2's tokenizer is read, not that of "
            f"{shown(kinds[0] or kinds[1])}. Write tokenizer.json with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    vocabulary, merges = read_object(folder / "vocab.json"), []
    for number, line in enumerate(read_text(folder / "merges.txt").split("\n"), 1):
        parts = line.rstrip("\r").split(" ")
        if line.startswith("#version") or not line.strip():
            continue
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocabulary.keys():
            raise ValueError(
                f"{folder / 'merges.txt'}:{number}: must be two tokens of vocab.json that make a "
                f"third one, got {shown(line)}"
            )
        merges.append(parts)
    if _END in vocabulary:
        config = {"bos_token": _END, "eos_token": _END, "unk_token": _END} | config
    file = folder / "added_tokens.json"
    extra = read_object(file) if file.is_file() else {}
    extra |= {_END: vocabulary[_END]} if _END in vocabulary else {}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = {i: {"content": x, "special": x == _END, **flags} for x, i in extra.items()}
    try:
        tokens = config.get("added_tokens_decoder", tokens).items()
        added = [{**token, "id": int(i)} for i, token in tokens]
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{folder}: the added tokens in tokenizer_config.json or added_tokens.json must have "
            f"whole numbers as ids, got {shown(tokens)}"
        ) from None
    spaced = bool(config.get("add_prefix_space", False))
    bytes_of = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**bytes_of, "add_prefix_space": spaced},
        "post_processor": {**bytes_of, "trim_offsets": False, "add_prefix_space": spaced},
        "decoder": {**bytes_of, "add_prefix_space": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    }
    return spec, {"tokenizer_class": "GPT2Tokenizer"} | config


def _tokenizer(constructor: str, file: Path, argument: str):
    make = getattr(require("tokenizers", "train").Tokenizer, constructor)
    with _foreign(file):
        tokenizer = make(argument)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def _foreign(file: Path) -> Iterator[None]:
    """Turn any error of the `tokenizers` package into a ValueError that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and panics of Rust, which are not even those
        raise ValueError(f"{file}: cannot be read: {str(error)[:200]}") from None


def _without_prefix(part: dict | None) -> dict | None:
    """A normalizer or pre_tokenizer that adds nothing before the text. None if nothing is left."""
    if not isinstance(part, dict | None):
        return part  # a form that the package reads, too, but does not write
    kind = "Prepend" if part is None else part.get("type")
    if kind == "Prepend":
        return None
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [_without_prefix(inner) for inner in part[key]]
        return {**part, key: [inner for inner in kept if inner is not None]}
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never", "add_prefix_space": False}
    return {**part, "add_prefix_space": False} if part.get("add_prefix_space") else part


def _splits(tokens) -> re.Pattern:
    """A pattern that splits text at special tokens, longest first. Some include white space."""
    texts = [
        r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
        for token in sorted(tokens, key=lambda token: -len(token.content))
    ]
    return re.compile(f"({'|'.join(texts) or '(?!)'})")
