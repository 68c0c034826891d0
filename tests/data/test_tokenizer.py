"""Tokenizers: any text survives, prompts start with one BOS, and a saved tokenizer reads back."""

import json
import random

import pytest
from helpers import edit_json

from rlhf_core.data import ByteTokenizer, JsonTokenizer, load_tokenizer
from rlhf_core.data.tokenizer import other_token

TEXTS = [
    "Once upon a time", " a  b\n\n c ", "trailing  ", "x", "", " ", "\n", "\r\n\t", "don't  's",
    "中文，日本語も。", "naïve 🙂👩‍👩‍👧🏳️‍🌈", "e\u0301 \u200b\u00a0\u3000", "\ufeffbom",
    "\x00\x1b[0m\ttab\x7f", "\ufdd0\uffff\U0010ffff", "<s>hi", "</s>", "<unk>", "a<|im_end|>b",
    "<|endoftext|>", " <|im_start|>", "<|endof", "".join(map(chr, range(300))),
]  # fmt: skip


def test_any_text_survives_the_tokenizer(tokenizer):
    begun = tokenizer.encode_prompt("say:")
    for text in TEXTS:
        whole = tokenizer.encode(text)
        assert tokenizer.decode(whole) == text
        assert tokenizer.decode(begun + tokenizer.encode_completion(text)) == "say:" + text
        assert all(0 <= i < tokenizer.vocab_size for i in whole)


def test_random_text_survives_the_tokenizer_whole_and_in_two(tokenizer):
    rng = random.Random(0)
    characters = [*map(chr, [*range(0x250), *range(0x4E00, 0x4F00)]), "<s>", "</s>"]
    characters += "  \n\u200d🙂👩中文日本語"
    for _ in range(300):
        first, second = ("".join(rng.choices(characters, k=rng.randint(1, 9))) for _ in range(2))
        assert tokenizer.decode(tokenizer.encode(first)) == first
        ids = tokenizer.encode_prompt(first) + tokenizer.encode_completion(second)
        assert tokenizer.decode(ids) == first + second


def test_a_prompt_starts_with_one_bos_where_the_model_wants_one(tokenizer):
    """Row 29. GPT-2 and MiniMind have a BOS token that their own template does not add."""
    ids = tokenizer.encode_prompt("Once upon a time")
    wants = isinstance(tokenizer, ByteTokenizer) or tokenizer.vocab_size == 512
    assert ids.count(tokenizer.bos_id) == wants
    assert ids == [tokenizer.bos_id] * wants + tokenizer.encode("Once upon a time")
    assert tokenizer.bos_id not in tokenizer.encode_completion(" there was")


def test_a_saved_tokenizer_reads_back_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    again.save(tmp_path)  # over itself
    assert type(again) is type(tokenizer)
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode_prompt("It's 3 o'clock") == tokenizer.encode_prompt("It's 3 o'clock")


def test_byte_tokenizer_leaves_special_ids_out_and_mends_invalid_bytes():
    special = {ByteTokenizer.pad_id, ByteTokenizer.bos_id, *ByteTokenizer.eos_ids}
    assert special == {256, 257, 258} and ByteTokenizer.vocab_size == 259
    assert ByteTokenizer().decode([257, 72, 105, 258, 256]) == "Hi"
    assert ByteTokenizer().decode([0xE6, 72]) == "\ufffdH"


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        JsonTokenizer(tmp_path)


# ---- vocab.json and merges.txt


@pytest.fixture
def gpt2(data_dir, tmp_path):
    """A folder with the two files that GPT-2 was released with, and the one with tokenizer.json."""
    whole, folder = data_dir / "tokenizers/gpt2", tmp_path / "gpt2"
    model = json.loads((whole / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [x if isinstance(x, str) else " ".join(x) for x in model["merges"]]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder, whole


@pytest.mark.slow
def test_vocab_and_merges_alone_give_gpt2s_ids(gpt2):
    transformers = pytest.importorskip("transformers")
    ours, wanted = map(load_tokenizer, gpt2)
    peer = transformers.GPT2Tokenizer.from_pretrained(gpt2[0])
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id"):
        assert getattr(ours, name) == getattr(wanted, name)
    for text in TEXTS:
        assert ours.encode(text) == wanted.encode(text)
        if "<|endoftext|>" not in text:  # which is text here
            assert ours.encode(text) == peer.encode(text)


def write_gpt2(folder, merges="a b\n", **config):
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (folder / "merges.txt").write_text(merges)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_added_tokens_beside_vocab_and_merges_are_read(tmp_path):
    write_gpt2(tmp_path, pad_token="<pad>")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 4, "<x>": 5}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.pad_id) == (6, (3,), 4)
    assert tokenizer.encode("ab<x>ba") == [2, 5, 1, 0] and tokenizer.decode([2, 3, 4]) == "ab"
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (again.eos_ids, again.pad_id, again.encode("ab<x>ba")) == ((3,), 4, [2, 5, 1, 0])
    token = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    edit_json(
        tmp_path / "tokenizer_config.json",
        added_tokens_decoder={"4": {"content": "<y>", **token}},
        pad_token="remove",
    )
    assert load_tokenizer(tmp_path).encode("a<y>") == [0, 4]
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"x": 1})
    with pytest.raises(ValueError, match="must have whole numbers as ids"):
        load_tokenizer(tmp_path)


def test_other_tokenizers_of_two_files_and_damaged_merges_are_refused(tmp_path):
    write_gpt2(tmp_path, tokenizer_class="RobertaTokenizer")
    with pytest.raises(
        ValueError, match=r'that of "RobertaTokenizer"\. Write tokenizer\.json with'
    ):
        load_tokenizer(tmp_path)
    write_gpt2(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match='that of "qwen2"'):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    for line in ("a", "a c", "b a", "a b b"):
        write_gpt2(tmp_path, f"#version: 0.2\na b\n{line}\n")
        with pytest.raises(ValueError, match=rf"merges\.txt:3: .*got \"{line}\""):
            load_tokenizer(tmp_path)


def test_tokenizers_are_compared_by_the_ids_of_their_tokens(data_dir, tmp_path):
    gpt2 = load_tokenizer(data_dir / "tokenizers/gpt2")
    assert other_token(gpt2, load_tokenizer(data_dir / "tokenizers/gpt2")) is None
    assert other_token(ByteTokenizer(), ByteTokenizer()) is None
    assert other_token(ByteTokenizer(), gpt2) == "token 'byte 0' with id 0 does not exist"
    swapped = json.loads((data_dir / "tokenizers/gpt2/tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped))
    ids = gpt2.vocabulary()
    assert other_token(gpt2, load_tokenizer(tmp_path)) == (
        f"token 'a' with id {ids['a']} has id {ids['b']}"
    )
