"""Data and tokenizer files that somebody damaged or made to do harm: refused by name, soon."""

import gzip
import itertools
import json
import random
import re
import time
import tracemalloc
from pathlib import Path

import jinja2.ext
import jinja2.sandbox
import pytest
import torch
from helpers import rows, tiny

from rlhf_core import cli, data
from rlhf_core.data import ByteTokenizer, DataError, readers, sandbox
from rlhf_core.data.chat import ChatTemplate
from rlhf_core.data.encode import (
    encode_labelled,
    encode_preference,
    encode_prompt,
    encode_scored,
    encode_text,
)
from rlhf_core.data.tokenizer import load_tokenizer
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.rollout import sample
from rlhf_core.trainers import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer

DEEP = "[" * 100_000 + "]" * 100_000
# As they stand in a file: json.dumps writes neither a number beyond float nor one this deep.
NASTY = [
    "null", "true", "false", "-1", "0", "1.5", str(2**63), "1" + "0" * 400, "1e999", "NaN",
    '""', '"a"', "[]", "{}", "[[]]", '[{"a": 1}]', '{"a": {}}', "[null]", '"\\u0000"',
    json.dumps("x" * 100_000), DEEP,
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz:|<>/_▁\n"
TOKENIZER = {
    "version": "1.0",
    "truncation": {
        "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    },
    "padding": None,
    "added_tokens": [
        dict(id=i, content=text, single_word=False, lstrip=False, rstrip=i == 2, normalized=False,
             special=True)
        for i, text in enumerate(("<unk>", "<s>", "</s>"))
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {
            text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *LETTERS, "ab"])
        },
        "merges": [["a", "b"]],
    },
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FILES = {
    "tokenizer.json": TOKENIZER,
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tools"}],
    },
    "special_tokens_map.json": {"unk_token": "<unk>", "pad_token": {"content": "</s>"}},
    "generation_config.json": {"eos_token_id": [2], "bos_token_id": 1},
    "config.json": {"eos_token_id": 2, "pad_token_id": -1},
}


def leaves(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*path, key))


def mutations(value):
    """JSON texts, each of `value` with one value in it replaced."""
    for path, nasty in itertools.product(leaves(value), NASTY):
        mutant = json.loads(json.dumps(value))
        owner = mutant = [mutant]
        for key in (0, *path)[:-1]:
            owner = owner[key]
        owner[(0, *path)[-1]] = "@@"
        yield json.dumps(mutant[0]).replace('"@@"', nasty)


def refused_or_read(read, name, what):
    """Call `read`, which must succeed or raise an error that names the file, and not hang."""
    start = time.thread_time()
    try:
        read()
    except (ValueError, OSError, ImportError) as error:
        assert name in str(error), (error, what[:300])
        assert len(str(error)) < 2000, (str(error)[:300], what[:300])
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {what[:300]}") from error
    took = time.thread_time() - start
    assert took < 20, (took, what[:300])


def write_tokenizer(folder, **changes):
    folder.mkdir(exist_ok=True)
    for name, value in FILES.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def use(folder):
    """Everything that a tokenizer of a folder does."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_prompt("a b") + tokenizer.encode_completion(" c")
    tokenizer.decode(ids)
    tokenizer.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
ROWS = [
    (data.read_texts, {"messages": [HI, YES]}),
    (data.read_texts, {"prompt": "p", "completion": "c", "text": None}),
    (data.read_texts, {"question": "q", "answer": "a"}),
    (data.read_labelled, {"prompt": [HI], "completion": [YES], "label": True}),
    (data.read_scored, {"prompt": "p", "response": "c", "reward": 1.5}),
    (data.read_preferences, {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2}),
    (data.read_preferences, {"chosen": [HI, YES], "rejected": [HI, HI | YES | {"content": "no"}]}),
    (data.read_comparisons, {"prompt": "p", "responses": ["a", "b"], "ranks": [2, 1]}),
    (data.read_comparisons, {"prompt": "p", "steps": ["a", "b"], "labels": [True, 0.5]}),
    (data.read_prompts, {"messages": [HI]}),
    (data.read_prompts, {"prompt": "p"}),
]
ENCODERS = {
    data.read_texts: encode_text,
    data.read_labelled: encode_labelled,
    data.read_scored: encode_scored,
    data.read_preferences: encode_preference,
    data.read_comparisons: encode_preference,
}
RENDERED = [{"role": "user", "content": "hi"}]


def some(texts, count):
    texts = list(texts)
    return random.Random(0).sample(texts, min(count, len(texts)))


def render(source):
    return ChatTemplate(source, Path("chat.jinja"), {}, []).render(RENDERED).text


# ---- any value in any field


@pytest.mark.parametrize("name", FILES)
def test_no_value_in_a_tokenizers_file_gives_a_traceback(name, tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    use(folder)
    for text in some(mutations(FILES[name]), 60):
        (folder / name).write_text(text)
        refused_or_read(lambda: use(folder), folder.name, text)


@pytest.mark.parametrize("reader, row", ROWS, ids=lambda x: getattr(x, "__name__", ""))
def test_no_value_in_a_row_gives_a_traceback(reader, row, tmp_path):
    tokenizer, encoder = ByteTokenizer(), ENCODERS.get(reader)
    file = tmp_path / "rows.jsonl"

    def encode(item):
        return encoder(item, tokenizer, 64) if encoder else encode_prompt(item, tokenizer)

    file.write_text(json.dumps(row) + "\n")
    assert len(reader(file, None, encode)) == 1
    for text in some(mutations(row), 60):
        file.write_text(text + "\n")
        refused_or_read(lambda: reader(file, None, encode), "rows.jsonl:1", text)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("chat_template", 5, "tokenizer_config.json: chat_template must be a string, got 5"),
        ("bos_token", 5, r"bos_token in .* must be a text, or an object .* got 5"),
        ("eos_token", {"lstrip": True}, r"eos_token in .* got {\"lstrip\": true}"),
    ],
)
def test_a_wrong_field_of_a_tokenizer_is_named_with_its_value(field, value, message, tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    config = FILES["tokenizer_config.json"] | {field: value}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        use(folder)


def test_a_panic_of_the_tokenizers_package_names_the_file(tmp_path):
    """It derives from BaseException, so `except Exception` lets it pass."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    broken = json.loads(json.dumps(TOKENIZER))
    broken["post_processor"]["special_tokens"] = {}
    (folder / "tokenizer.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        use(folder)


def test_a_chat_template_that_is_not_utf_8_is_named(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8"):
        use(folder)


# ---- templates

GROWING = {
    "multiplication": "{{ 'a' * 10**10 }}",
    "a list": "{{ [1] * 10**10 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "lists in lists": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "text in loops": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "text in macros": "{% macro f() %}" + "x" * 9999 + "{% endmacro %}"
    "{% for i in range(99999) %}{% set x = f() %}{% endfor %}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "indent": "{{ ('\n' * 10**6)|indent(10**6) }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "join": "{{ range(99999)|list|join('a' * 10**6) }}",
    "map": "{{ (['a'] * 99999)|map('center', 10**6)|list }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "tojson": "{{ [[1]]|tojson(indent=10**10) }}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "a width of format": "{{ '{:>10000000000}'.format(1) }}",
    "a width of the filter": "{{ '%10000000000d'|format(1) }}",
    "a starred width": "{{ '%*d' % (10**10, 1) }}",
    "a nested width": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "a power": "{{ 10**10**10 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "length": "x" * 2**21,
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_template_cannot_take_all_memory(kind, monkeypatch):
    """`range` alone is bounded by jinja2."""
    monkeypatch.setattr(sandbox, "MAX_SIZE", 2**23)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"chat\.jinja.*: the chat template"):
            render(GROWING[kind])
        assert tracemalloc.get_traced_memory()[1] < 6 * sandbox.MAX_SIZE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% set x = range(99999)|list %}{% for i in x %}{% if x|min %}{% endif %}{% endfor %}",
    ],
)
def test_a_template_cannot_run_for_ever(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"it takes more than 0\.1 s"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        *(
            "{{ " + name + ".__globals__ }}{{ " + name + ".__init__.__globals__.os.environ }}"
            for name in ("raise_exception", "strftime_now", "namespace", "range", "dict")
        ),
        "{{ raise_exception|attr('__globals__') }}{{ strftime_now|attr('__globals__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ (''|attr('format'))|attr('__globals__') }}{{ ''.format.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{{ messages|map(attribute='__class__')|list }}{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_a_template_reads_nothing_of_the_process(source, monkeypatch):
    """jinja2 before 3.1.6 lets a template reach `format` around its sandbox."""
    monkeypatch.setenv("RLHF_CORE_SECRET", "sesame")
    try:
        text = render(source)
    except ValueError as error:
        text = str(error)
    assert not re.search("sesame|<class|<module|<function|{'", text)


def test_jinja2_is_one_whose_sandbox_holds():
    assert '"jinja2>=3.1.6"' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


FEATURES = [
    "{% macro f(a, b=2) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 3, 4, k=5) }}",
    "{% macro f(name, owner) %}{{ name }}{{ owner }}{% endmacro %}{{ f(name=1, owner=2) }}",
    "{% macro g() %}<{{ caller(1) }}>{% endmacro %}{% call(x) g() %}hi{{ x }}{% endcall %}",
    "{% filter upper %}abc{{ 1 }}{% endfilter %}{% set x | upper %}abc{{ 1 }}{% endset %}{{ x }}",
    "{% for m in messages recursive %}{{ m.role }}{{ loop.index }}{{ loop.last }}"
    "{% if loop.depth < 2 %}{{ loop(messages) }}{% endif %}{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{% if a == 3 %}{% break %}{% endif %}{% endfor %}",
    "{% set n = namespace(x=0, y=[]) %}{% for m in messages %}{% set n.x = n.x + 1 %}"
    "{% set n.y = n.y + [m.role] %}{% endfor %}{{ n.x }}{{ n.y }}",
    "{{ messages|tojson(indent=2) }}{{ messages|map(attribute='role')|join(', ') }}",
    "{{ ('<'|safe) ~ '>' }}{{ ('<'|escape) ~ 1.5 ~ none ~ true ~ [1, 'a'] ~ undefined }}",
    "{{ '{} {x}'.format(1, x='q') }}{{ '%s-%d' % ('a', 3) }}{{ '%s'|format('z') }}",
    "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ 1.5 * 2 }}{{ 'ab' * 3 }}{{ [1] * 2 }}{{ (1,) + (3,) }}",
    "{{ dict(name=1)|dictsort }}{{ {'a': messages[0].role, 'b': [1]} }}{{ range(1, 6, 2)|sum }}",
    "{{ 'hello world'|title|replace('World', 'X')|indent(2)|center(20) }}{{ 'abc'|batch(2)|list }}",
]


def test_limits_change_nothing_that_a_template_writes():
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.filters["tojson"] = sandbox._tojson
    for source in FEATURES:
        assert render(source) == plain.from_string(source).render(messages=RENDERED), source
    assert re.fullmatch(
        r"\d{4}True", render("{{ strftime_now('%Y') }}{{ strftime_now is defined }}")
    )


# ---- lines


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.txt"])
def test_a_line_that_is_too_long_is_named_or_dropped(name, tmp_path, monkeypatch):
    """What follows it keeps its line number."""
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    file = tmp_path / name
    lines = ['{"prompt": "a"}', json.dumps({"prompt": "b" * 1000}), '{"prompt": "c"}', "{"]
    content = "\n".join(lines).encode()
    file.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"{name}:2: the line has more than 100 bytes"):
        data.read_prompts(file)
    dropped = []
    texts = data.read_prompts(file, dropped.append)
    numbers = [str(error).split(":")[1] for error in dropped]
    if name == "rows.txt":  # any line is a prompt
        assert (texts, numbers) == ([lines[0], lines[2], "{"], ["2"])
    else:
        assert (texts, numbers) == (["a", "c"], ["2", "4"])


@pytest.mark.slow
def test_a_small_file_with_a_huge_line_takes_little_memory(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as out:
        for _ in range(64):
            out.write(b"x" * 2**22)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:1: the line has more than"):
        data.read_prompts(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * readers.MAX_LINE_BYTES


# ---- fields that are null or false


def read(reader, path, row):
    path.write_text(json.dumps(row) + "\n")
    return reader(path)[0]


def test_a_null_field_is_a_field_that_is_not_there(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"text": None, "messages": None, "prompt": "p", "completion": "c"}
    assert read(data.read_texts, file, row) == ("p", "c")
    row = {"labels": None, "responses": None, "prompt": "p", "chosen": "c", "rejected": "r"}
    assert read(data.read_comparisons, file, row)[:3] == ("p", "c", "r")
    assert read(data.read_prompts, file, {"messages": None, "question": "q"}) == "q"


@pytest.mark.parametrize("field, value", [("weight", 0), ("train", False), ("weight", 1)])
def test_a_field_that_weighs_a_message_is_refused_also_if_it_is_false(field, value, tmp_path):
    row = {"messages": [HI, YES | {field: value}]}
    got = json.dumps(value)
    message = rf"rows.jsonl:1: field 'messages\[1\].{field}' is not supported, got {got}"
    with pytest.raises(DataError, match=message):
        read(data.read_texts, tmp_path / "rows.jsonl", row)


def test_a_field_of_a_message_that_asks_for_nothing_is_ignored(tmp_path):
    row = {"messages": [HI | {"name": None}, YES | {"tool_calls": []}], "tools": []}
    assert read(data.read_texts, tmp_path / "rows.jsonl", row) == ([HI], [YES])


# ---- ids that the model does not have


@pytest.mark.parametrize("bad", [12, -1, 2**40])
def test_a_trainer_names_the_example_and_the_id_that_the_model_does_not_have(bad):
    message = rf"example 3 has token id {bad}, but the model has ids 0 to 11"
    examples = rows("sft")
    examples[3] = examples[3]._replace(completion_ids=[7, bad, 2])
    with pytest.raises(ValueError, match=message):
        SFTTrainer(tiny(), examples, SFTConfig())
    with pytest.raises(ValueError, match=f"evaluation {message}"):
        SFTTrainer(tiny(), rows("sft"), SFTConfig(), eval_examples=examples)
    prompts = [[7], [8], [9], [7, bad]]
    with pytest.raises(ValueError, match=message):
        PPOTrainer(
            tiny(), prompts, PPOConfig(response_length=4), reward=lambda p, r: [0.0] * len(r)
        )
    with pytest.raises(ValueError, match=rf"prompt 3 has token id {bad}"):
        sample(tiny(), prompts, max_new_tokens=2)


def test_a_reward_model_with_a_smaller_vocabulary_names_the_row(tmp_path):
    """Sizes within 1 % pass. Only the padding of such a vocabulary may differ."""
    scorer = Scorer(tiny(RewardModel), pad_id=12)
    assert scorer([[7], [7, 8]], [[2], [2]]).shape == (2,)
    with pytest.raises(ValueError, match="row 1 to score has token id 12"):
        scorer([[7], [12]], [[2], [2]])


def test_the_command_line_names_the_line_with_an_id_that_the_model_does_not_have(tmp_path, capsys):
    folder = tmp_path / "model"
    torch.manual_seed(0)
    tiny(vocab_size=200).save_pretrained(folder)
    ByteTokenizer().save(folder)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    out = str(tmp_path / "out")
    assert cli.main(["sft", "--model", str(folder), "--data", str(file), "--out", out]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl:1: the encoded row has token id 257, but the model has ids 0 to 199" in error
    command = ["sft", "--model", str(folder), "--data", str(file), "--out", out, "--device", "cpu"]
    command += ["--eval-fraction", "0", "--embedding-resize"]
    assert cli.main([*command, "--lora-rank", "2"]) == 2
    assert "--embedding-resize changes the base model" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert Transformer.from_pretrained(out).config.vocab_size == ByteTokenizer.vocab_size == 259
    command[2] = out
    assert cli.main([*command, "--overwrite"]) == 0
    found = "--embedding-resize has no effect: the model has 259 ids, the tokenizer 259"
    assert found in capsys.readouterr().err
    out = str(tmp_path / "other")
    options = ["--prompts", str(file), "--reward-function", "x.py:f", "--out", out]
    assert cli.main(["ppo", "--model", str(folder), *options]) == 2
    assert "rows.jsonl:1: the encoded row has token id 257" in capsys.readouterr().err
    assert cli.main(["generate", "--model", str(folder), "--prompt", "a"]) == 2
    assert "the encoded row has token id 257" in capsys.readouterr().err
