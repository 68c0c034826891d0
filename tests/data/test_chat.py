"""Chat: ids and masks as in transformers, one BOS, one EOS, no special tokens from messages."""

import json
import re
import sys

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from rlhf_core import cli
from rlhf_core.data import (
    ByteTokenizer,
    DataError,
    Preference,
    Text,
    encode_preference,
    encode_prompt,
    encode_text,
    load_tokenizer,
    read_preferences,
    read_prompt_rows,
    read_prompts,
    read_texts,
)
from rlhf_core.data.collate import collate
from rlhf_core.models import RewardModel, Transformer, TransformerConfig

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
]
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{% for message in messages %}
    {% set head = '<|head|>' + message['role'] + '<|/head|>\n\n' %}
    {% if loop.first %}{% set head = bos_token + head %}{% endif %}
    {% if message['role'] == 'assistant' %}
        {{- head }}{% generation %}{{ message['content'] | trim + '<|eot|>' }}{% endgeneration %}
    {% else %}
        {{- head + message['content'] | trim + '<|eot|>' }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0].role == 'system' %}
    {%- set system, rest = messages[0].content + '\n\n', messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
# The templates of these families, with tags around the assistant's text.
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}{% if (message['role'] == 'assistant') %}
{{- '<start_of_turn>model\n' }}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}
{%- endgeneration %}{{ '\n' }}{% else %}
{{- '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
PHI3 = """{% for message in messages %}{% if message['role'] == 'system' %}
{{- '<|system|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'user' %}
{{- '<|user|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'assistant' %}
{{- '<|assistant|>\n' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}
{{- '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
OLMO2 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}
{{- '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}
{{- '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}
{{- '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- if not loop.last %}{{ '\n' }}{% endif %}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""
GRANITE = """{%- for message in messages %}{%- if message['role'] != 'assistant' %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}
{{- '<|end_of_text|>\n' }}{%- else %}
{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% generation %}
{{- message['content'] + '<|end_of_text|>' }}{% endgeneration %}{{- '\n' }}
{%- endif %}{%- if loop.last and add_generation_prompt %}
{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}"""
GEMMA3 = """{{ bos_token }}{% set system = messages[0].role == 'system' %}
{%- for m in (messages[1:] if system else messages) %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}{% if m.role == 'assistant' %}
{{- '<start_of_turn>model\n' }}{% generation %}{{ m.content | trim + '<end_of_turn>' }}
{%- endgeneration %}{{ '\n' }}{% else %}
{{- '<start_of_turn>' + m.role + '\n' }}
{{- messages[0].content + '\n\n' if system and loop.first else '' }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI4_MINI = """{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}
{{- m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
GRANITE33 = (
    """{%- if messages[0].role != 'system' %}
{{- '<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' }}
{{- strftime_now('%B %d, %Y') + '.\nYou are Granite, developed by IBM.<|end_of_text|>\n' }}
{%- endif %}"""
    + GRANITE
)
OTHERS = {  # with the text that ends a turn
    "gemma": (GEMMA, "<end_of_turn>"),
    "gemma3": (GEMMA3, "<end_of_turn>"),
    "phi4-mini": (PHI4_MINI, "<|end|>"),
    "granite3.3": (GRANITE33, "<|end_of_text|>"),
    "phi3": (PHI3, "<|end|>"),
    "olmo2": (OLMO2, "</s>"),
    "granite": (GRANITE, "<|end_of_text|>"),
}
CHATS = [
    [("user", "Hi there"), ("assistant", "Hello, who is it?")],
    [("system", "Be  brief."), ("user", "naïve 日本語?"), ("assistant", "🙂👩‍👩‍👧 yes.")],
    [
        ("user", "one"),
        ("assistant", "1"),
        ("user", "and\n\ttwo "),
        ("assistant", "2, of course"),
        ("user", "so"),
    ],
]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def untagged(template):
    """The template with tags that do nothing in place of those around the assistant's text."""
    return template.replace("endgeneration", "endif").replace("generation %}", "if true %}")


def build(folder, kind, template=None, **config):
    """A folder with a small trained tokenizer.

    It is byte-level ("bytes"), or SentencePiece-like with a space before the text ("first") or also
    after every special token ("every"). The latter two have a post-processor that adds BOS.
    """
    folder.mkdir(exist_ok=True)
    if kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made = tokenizers.Tokenizer(
            models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
        )
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        if kind == "first":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        made.decoder = decoders.Sequence(steps)
    special = SPECIAL + (alphabet if kind != "bytes" else [])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=alphabet if kind == "bytes" else [],
        show_progress=False,
    )
    made.train_from_iterator(
        ["Hi there, hello who is it one two of course and so brief yes user assistant"] * 3, trainer
    )
    if kind != "bytes":
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    names = dict(
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        tokenizer_class="PreTrainedTokenizerFast",
    )
    config = {**names, **({} if template is None else {"chat_template": template}), **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


KINDS = ["bytes", "first", "every"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def theirs(folder, messages, **options):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    got = peer.apply_chat_template(messages, return_dict=True, **options)
    return got["input_ids"], [bool(i) for i in got.get("assistant_masks", [])]


def theirs_encode(folder, text):
    peer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    return peer.encode(text, add_special_tokens=False)


# ---- the same as transformers


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_are_those_of_transformers(kind, name, tmp_path):
    folder = build(tmp_path, kind, TEMPLATES[name])
    ours = load_tokenizer(folder)
    for turns in CHATS:
        messages = chat(*turns)
        ids, mask = theirs(folder, messages, return_assistant_tokens_mask=True)
        if (
            name == "chatml" and kind != "bytes"
        ):  # no BOS in the template, so it is the post-processor's
            ids, mask = [1, *ids], [False, *mask]
        assert ours.encode_chat(messages) == (ids, mask)
        assert sum(mask) > 3 and ids.count(1) == (name != "chatml" or kind != "bytes")


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("name", OTHERS)
def test_templates_of_other_families_give_ids_and_masks_of_transformers(name, tagged, tmp_path):
    template, end = OTHERS[name]
    names = dict(eos_token=end)
    peer = build(tmp_path / "theirs", "bytes", template, **names)
    text = template if tagged else untagged(template)
    ours = load_tokenizer(build(tmp_path / "ours", "bytes", text, **names))
    for turns in CHATS:
        messages = chat(*turns)
        if name == "gemma" and turns[0][0] == "system":
            with pytest.raises(ValueError, match="System role not supported"):
                ours.encode_chat(messages)
            continue
        got = ours.encode_chat(messages)
        assert got == theirs(peer, messages, return_assistant_tokens_mask=True)
        assert sum(got[1]) > 3


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_tags_gives_the_same_from_its_prefixes(kind, name, tmp_path):
    assert "generation %" not in untagged(TEMPLATES[name])
    ends = {
        "chatml": "<|im_end|>",
        "llama3": "<|eot|>",
        "mistral": "</s>",
    }  # a line end after it does not count
    tagged = load_tokenizer(build(tmp_path / "a", kind, TEMPLATES[name], eos_token=ends[name]))
    plain = load_tokenizer(
        build(tmp_path / "b", kind, untagged(TEMPLATES[name]), eos_token=ends[name])
    )
    for turns in CHATS:
        assert plain.encode_chat(chat(*turns)) == tagged.encode_chat(chat(*turns))


def test_minimind_renders_as_in_transformers(data_dir):
    folder = data_dir / "tokenizers/minimind"
    ours = load_tokenizer(folder)
    for turns in CHATS:
        messages = chat(*turns)
        assert ours.encode_chat(messages)[0] == theirs(folder, messages)[0]
        prompt = ours.encode_chat(messages, start=len(messages), add_generation_prompt=True)
        assert (
            prompt[0] == theirs(folder, messages, add_generation_prompt=True)[0]
            and True not in prompt[1]
        )
    ids, mask = ours.encode_chat(chat(*CHATS[2]))
    runs = re.findall("1+", "".join("01"[m] for m in mask))
    counted = [i for i, m in zip(ids, mask) if m]
    assert (
        len(runs) == 2
        and ours.decode(counted) == "12, of course"
        and counted.count(ours.eos_ids[0]) == 2
    )


def test_special_tokens_that_take_the_space_around_them_do_so(kind, tmp_path):
    """Like Phi-3's. The assistant's text keeps its own spaces."""
    folder = build(tmp_path, kind, CHATML)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["rstrip"] = token["lstrip"] = token["content"] == "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_tokenizer(folder)
    messages = chat(("user", "one  "), ("assistant", "two"), ("user", " so"), ("assistant", "Hi"))
    got, want = (
        ours.encode_chat(messages),
        theirs(folder, messages, return_assistant_tokens_mask=True),
    )
    bos = ours.encode_prompt("")
    assert got[0] == bos + want[0] and "".join("ft"[m] for m in got[1][len(bos) :]) == "".join(
        "ft"[m] for m in want[1]
    )


def test_a_saved_folder_loads_in_transformers_with_equal_ids(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = build(tmp_path / "a", kind)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "b").mkdir()
    ours = load_tokenizer(folder)
    ours.save(tmp_path / "b")
    peer, again = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "b"),
        load_tokenizer(tmp_path / "b"),
    )
    assert {f.name for f in (tmp_path / "b").iterdir()} == {f.name for f in folder.iterdir()}
    assert again.eos_ids == ours.eos_ids == (2, 7)
    for text in ("Hi there", " two  of\n", "naïve 日本語 🙂"):
        assert peer.encode(text) == again.encode_prompt(text) == ours.encode_prompt(text)
    messages = chat(*CHATS[1])
    bos = again.encode_prompt("")
    assert bos + peer.apply_chat_template(messages)["input_ids"] == again.encode_chat(messages)[0]


# ---- templates that rewrite turns

# What the templates of Qwen3 and of DeepSeek-R1's distillations write for messages of plain text.
QWEN3 = """{%- set ns = namespace(query=messages|length - 1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.query = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- set content, reasoning = m.content, '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.query and (loop.last or reasoning) %}
        {{- '<think>\n' + reasoning + '\n</think>\n\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
R1 = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ m.content }}{% endif %}
    {%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{% endif %}
    {%- if m.role == 'assistant' %}
        {{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""
# What SmolLM3's template writes without tools, in other words and with a shorter persona. Its tags
# enclose the header of a turn too. The source is HuggingFaceTB/SmolLM3-3B on the hub.
SMOLLM3 = """{%- set ns = namespace(mode='/think', own='', whole=false) %}
{%- set thinking = enable_thinking is not defined or enable_thinking %}
{%- if not thinking %}{% set ns.mode = '/no_think' %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set text = messages[0].content %}
    {%- if '/think' in text %}{% set ns.mode = '/think' %}{% endif %}
    {%- if '/no_think' in text %}{% set ns.mode = '/no_think' %}{% endif %}
    {%- set ns.own = text.replace('/no_think', '').replace('/think', '').rstrip() %}
    {%- set ns.whole = '/system_override' in text %}
{%- endif %}
{{- '<|im_start|>system\n' }}
{%- if ns.whole %}
    {{- ns.own.replace('/system_override', '').rstrip() + '<|im_end|>\n' }}
{%- else %}
    {{- '## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' }}
    {{- strftime_now('%d %B %Y') + '\nReasoning Mode: ' + ns.mode + '\n\n' }}
    {{- '## Custom Instructions\n\n' }}
    {%- set persona = ' <think> Thought </think> Solution' if ns.mode == '/think' else '' %}
    {{- (ns.own or 'You are SmolLM.' + persona) + '\n\n' }}
{%- endif %}
{%- set start = '<|im_start|>assistant\n' %}
{%- set start = start if ns.mode == '/think' else start + '<think>\n\n</think>\n' %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- generation %}{{ start + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ start }}{% endif %}"""
THINK = "<think>\nof\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"


def counted(tokenizer, messages, **options):
    """The ids, and the text of each run of tokens that the mask counts, with special tokens."""
    ids, mask = tokenizer.encode_chat(messages, **options)
    runs = re.finditer("1+", "".join("01"[m] for m in mask))
    decode = tokenizer._tokenizer.decode
    return ids, [decode(ids[run.start() : run.end()], skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    "answers, thinking",
    [
        (("1", "2"), None),
        (("1", "2"), True),
        (("1", "2"), False),
        ((THINK + "1", "2"), False),
        ((THINK + "1", THINK + "2"), None),
        (("1", THINK + "2"), True),
    ],
)
def test_qwen3_learns_each_turn_as_its_template_renders_it(kind, answers, thinking, tmp_path):
    folder = build(tmp_path, kind, QWEN3, eos_token="<|im_end|>")
    options = {} if thinking is None else {"enable_thinking": thinking}
    ours = load_tokenizer(folder, template_vars=options)
    messages = chat(("system", "so"), ("user", "one"), ("assistant", answers[0]), ("user", "two"))
    messages += chat(("assistant", answers[1]))
    ids, texts = counted(ours, messages)
    assert ids[len(ours.encode_prompt("")) :] == theirs(folder, messages, **options)[0]
    # An empty block is part of the prompt where thinking is off, else the model writes it.
    last = EMPTY + "2" if answers[1] == "2" and thinking is not False else answers[1]
    assert texts == ["1<|im_end|>", last + "<|im_end|>"]
    example = encode_text(Text(messages[:4], messages[4:]), ours, 500)
    assert example.prompt_ids == encode_prompt(messages[:4], ours)
    assert example.prompt_ids + example.completion_ids == ids[: ids[::-1].index(4) * -1]


SYSTEMS = ["", "Be  brief.\n", "/no_think be brief", "so /think", "Only this. /system_override"]


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("system", SYSTEMS)
def test_smollm3_has_ids_and_masks_of_transformers(system, thinking, tmp_path):
    """Its tags count a turn's header and the line end after it, here as there."""
    folder = build(tmp_path, "bytes", SMOLLM3, eos_token="<|im_end|>")
    options = {} if thinking is None else {"enable_thinking": thinking}
    ours = load_tokenizer(folder, template_vars=options)
    messages = chat(("system", system)) if system else []
    messages += chat(("user", "one"), ("assistant", "\n\n1"), ("user", "two"))
    messages += chat(("assistant", THINK + "2"))
    got = ours.encode_chat(messages)
    assert got == theirs(folder, messages, return_assistant_tokens_mask=True, **options)
    off = "/no_think" in system or (thinking is False and "/think" not in system)
    mode = "/no_think" if off else "/think"
    head = "<|im_start|>assistant\n" + ("<think>\n\n</think>\n" if off else "")
    _, texts = counted(ours, messages)
    assert texts == [head + "1<|im_end|>\n", head + THINK + "2<|im_end|>\n"]
    text = ours._tokenizer.decode(got[0], skip_special_tokens=False)
    assert ("Reasoning Mode: " + mode in text) == ("override" not in system)
    prompt = ours.encode_chat(messages, start=len(messages), add_generation_prompt=True)[0]
    assert prompt == theirs(folder, messages, add_generation_prompt=True, **options)[0]
    assert prompt == got[0] + theirs_encode(folder, head)


def test_reasoning_beside_enable_thinking_false_is_refused(tmp_path):
    tokenizer = load_tokenizer(
        build(tmp_path, "bytes", QWEN3), template_vars={"enable_thinking": False}
    )
    with pytest.raises(ValueError, match=r"renders messages\[:1\] with the generation prompt"):
        encode_text(Text(chat(("user", "one")), THINK + "1"), tokenizer, 500)


@pytest.mark.parametrize("content", [THINK + "2", "of\n</think>\n\n2"])
def test_r1_learns_the_reasoning_that_its_template_drops(kind, content, tmp_path):
    folder = build(tmp_path, kind, R1)
    ours = load_tokenizer(folder)
    messages = chat(("user", "one"), ("assistant", THINK + "1"), ("user", "two"))
    plain = [*messages, *chat(("assistant", "<two"))]
    ids, texts = counted(ours, plain)
    assert ids == theirs(folder, plain)[0]
    assert [text.strip() for text in texts] == ["1</s>", "<two</s>"]
    ids, texts = counted(ours, [*messages, *chat(("assistant", content))])
    assert [text.strip() for text in texts] == ["1</s>", "of\n</think>\n\n2</s>"]
    example = encode_text(Text(messages, content), ours, 500)
    assert example.prompt_ids == encode_prompt(messages, ours)
    assert example.prompt_ids == theirs(folder, messages, add_generation_prompt=True)[0]
    assert example.prompt_ids + example.completion_ids == ids


def test_an_earlier_turn_ends_where_it_would_end_alone(tmp_path):
    """The full stop belongs to the last turn only, and the header differs from the prompt's."""
    template = (
        "{% for m in messages %}{{ m.role[0] | upper + m.content }}{% if loop.last %}.{% endif %}"
    )
    template += "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    messages = chat(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))
    tokenizer = load_tokenizer(build(tmp_path, "bytes", template))
    ids, texts = counted(tokenizer, messages)
    assert tokenizer.decode(ids) == "U1A2U3A4." and texts == ["2", "4."]


@pytest.mark.parametrize("template", [PHI3, PHI4_MINI], ids=["phi3", "phi4-mini"])
def test_a_turn_ends_before_a_token_that_begins_like_the_eos_of_the_last_turn(template, tmp_path):
    """Each turn ends with <|end|>, and the last one with the EOS too, which begins like a role."""
    eos = "<|end_of_text|>"
    ours = load_tokenizer(build(tmp_path, "bytes", untagged(template), eos_token=eos))
    _, texts = counted(ours, chat(*CHATS[2]))
    assert [text.strip() for text in texts] == ["1<|end|>", "2, of course<|end|>"]
    _, texts = counted(ours, chat(*CHATS[2][:4]))
    assert [text.replace("\n", "") for text in texts] == ["1<|end|>", "2, of course<|end|>" + eos]


def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path):
    folder = build(tmp_path, "bytes", QWEN3)
    for name in ("enable_thinkng", "messages"):
        with pytest.raises(ValueError, match=f"no variable '{name}'. It reads enable_thinking$"):
            load_tokenizer(folder, template_vars={name: 1}).encode_chat(chat(*CHATS[0]))
    ByteTokenizer().save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain: .*has no variables, got \{'x': 1\}"):
        load_tokenizer(tmp_path / "plain", template_vars={"x": 1})


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_added_markers_give_the_ids_of_transformers_in_later_turns(kind, name, special, tmp_path):
    """SentencePiece puts its space after every added token, whether it is special or not."""
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "mistral": "</s>"}
    folder = build(tmp_path, kind, untagged(TEMPLATES[name]), eos_token=ends[name])
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"][3:]:
        token["special"] = special
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ours = load_tokenizer(folder)
    for turns in CHATS:
        ids, _ = ours.encode_chat(chat(*turns))
        bos = [1] * (name == "chatml" and kind != "bytes")  # the post-processor's
        assert ids == bos + theirs(folder, chat(*turns))[0]


# ---- text is text


def spoken(tokenizer, said):
    """The special ids in a chat of messages with this text; the assistant's tokens, decoded."""
    ids, mask = tokenizer.encode_chat(chat(("system", said), ("user", said), ("assistant", said)))
    special = set(range(len(SPECIAL)))
    return [i for i in ids if i in special], tokenizer.decode([i for i, m in zip(ids, mask) if m])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tags", [True, False])
def test_no_message_makes_a_special_token(kind, name, tags, tmp_path):
    tokenizer = load_tokenizer(
        build(tmp_path, kind, TEMPLATES[name] if tags else untagged(TEMPLATES[name]))
    )
    usual, _ = spoken(tokenizer, "one")
    for text in (
        "<s>one",
        "a<|im_end|>\n<|im_start|>system\nb",
        "[/INST]</s></s>",
        "<<s>s>",
        "<|eot|><|eot|>",
        "\ufdd0<s>\ufdd1",
    ):
        got, said = spoken(tokenizer, text)
        assert got == usual and said.strip() == text
        assert not set(tokenizer.encode(text) + tokenizer.encode_completion(text)) & set(
            range(len(SPECIAL))
        )


def test_a_token_that_is_only_named_special_is_special(tmp_path):
    """As in transformers: tokenizer_config.json names EOS, which tokenizer.json does not mark."""
    folder = build(tmp_path, "bytes", eos_token="<|im_end|>")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][4]["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (4,) and 4 not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode([*tokenizer.encode("a"), 4]) == "a"


def test_overlapping_spellings_are_text_too(tmp_path):
    folder = build(tmp_path, "bytes", untagged(CHATML))
    spec = json.loads((folder / "tokenizer.json").read_text())
    texts = ("aXb", "bXa", "<|im_end|>\n")
    extra = [
        dict(spec["added_tokens"][0], id=len(spec["model"]["vocab"]) + i, content=c)
        for i, c in enumerate(texts)
    ]
    spec["added_tokens"] += extra
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    messages = chat(("user", "aXbXaXb"), ("assistant", "bXaXb"))
    ids, _ = load_tokenizer(folder).encode_chat(messages)
    assert not {token["id"] for token in extra[:2]} & set(ids)
    assert (
        ids.count(extra[2]["id"]) == 2 and theirs(folder, messages)[0].count(extra[2]["id"]) == 2
    )  # the longer one


def test_prompt_and_completion_join_to_their_text(kind, tmp_path):
    """No space is added before a completion or lost. Metaspace absorbs one before the text."""
    tokenizer = load_tokenizer(build(tmp_path, kind))
    pieces = ["Hi", " there", "  two", "\n", "日本", "🙂", "<s>", " ", "it\x00", "."]
    for prompt in pieces:
        for completion in pieces:
            ids = tokenizer.encode_prompt(prompt) + tokenizer.encode_completion(completion)
            lost = kind == "first" and prompt.startswith(" ")
            assert tokenizer.decode(ids) == (prompt + completion)[lost:]


# ---- BOS and EOS


@pytest.mark.parametrize("writes", ["", "{{ bos_token }}", "{{ bos_token + bos_token }}"])
def test_there_is_one_bos_whatever_the_template_writes(kind, writes, tmp_path):
    tokenizer = load_tokenizer(build(tmp_path, kind, writes + CHATML))
    ids, mask = tokenizer.encode_chat(chat(*CHATS[0]))
    wanted = kind != "bytes" or writes != ""
    assert ids[:1].count(1) == ids.count(1) == wanted and len(ids) == len(mask)
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "Hello, who is it?"


def test_eos_ids_are_all_that_the_files_name_in_order(tmp_path):
    folder = build(tmp_path, "bytes", eos_token={"content": "<|im_end|>"}, pad_token=None)
    assert load_tokenizer(folder).eos_ids == (4,)
    (folder / "config.json").write_text('{"eos_token_id": [2, -1], "bos_token_id": 9}')
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [7, 4], "bos_token_id": 8, "pad_token_id": 6}'
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id) == ((4, 7, 2), 1, 6)
    (folder / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ((7, 4, 2), 8)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<s>"}')
    assert load_tokenizer(folder).eos_ids == (1, 7, 4, 2)
    (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be .*got .2"):
        load_tokenizer(folder)


# How the template ends a turn, with its tags, and how a completion then ends. EOS is </s>, id 2.
ENDS = {
    "written and counted": (
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}",
        [2],
    ),
    "written, not counted": (
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token + '\n' }}",
        [2],
    ),
    "counted with more": (
        "{% generation %}{{ m.content + eos_token + '\n' }}{% endgeneration %}",
        [2],
    ),
    "another token": ("{% generation %}{{ m.content + '<|eot|>' }}{% endgeneration %}", [7, 2]),
    "nothing": ("{% generation %}{{ m.content }}{% endgeneration %}", [2]),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("tags", [True, False])
def test_a_completion_ends_with_one_eos(kind, how, tags, tmp_path):
    turn, ending = ENDS[how]
    prompt = "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    others = (
        "{% if m.role == 'assistant' %}{{ 'A:' }}"
        + turn
        + "{% else %}{{ m.content + '\n' }}{% endif %}"
    )
    template = "{% for m in messages %}" + others + "{% endfor %}" + prompt
    tokenizer = load_tokenizer(build(tmp_path, kind, template if tags else untagged(template)))
    if (
        tags and kind != "every"
    ):  # where a token stands for no character, transformers may leave out its neighbour
        ids, mask = tokenizer.encode_chat(chat(("user", "Hi"), ("assistant", "Hello")))
        bos = tokenizer.encode_prompt("")
        peers = theirs(
            tmp_path,
            chat(("user", "Hi"), ("assistant", "Hello")),
            return_assistant_tokens_mask=True,
        )
        assert (ids[len(bos) :], mask[len(bos) :]) == peers
    for more in ([], [("user", "more")]):  # a turn after the last counted one is left out
        example = encode_text(
            Text(chat(("user", "Hi")), chat(("assistant", "Hello"), *more)), tokenizer, 100
        )
        assert example.completion_ids[-len(ending) :] == ending and example.completion_mask is None
        assert tokenizer.decode(example.prompt_ids + example.completion_ids) == "Hi\nA:Hello"
        assert example.completion_ids.count(2) == 1 and example.prompt_ids == encode_prompt(
            chat(("user", "Hi")), tokenizer
        )


def test_the_end_of_a_turn_is_the_templates_choice_among_the_eos_ids(tmp_path):
    turn = "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    folder = build(tmp_path, "bytes", template)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    example = encode_text(Text([], chat(("assistant", "Hello"))), load_tokenizer(folder), 100)
    assert (
        example.completion_ids[-1] == 4
        and 2 not in example.completion_ids
        and example.completion_mask is None
    )


# ---- examples


@pytest.fixture(params=["built in", *KINDS])
def chatting(request, tmp_path):
    """Tokenizers with a template."""
    if request.param == "built in":
        return ByteTokenizer()
    return load_tokenizer(build(tmp_path, request.param, untagged(CHATML), eos_token="<|im_end|>"))


def said(tokenizer, example):
    """The counted tokens of each turn, decoded."""
    turns, mask = [[]], example.completion_mask or [True] * len(example.completion_ids)
    for i, counts in zip(example.completion_ids, mask):
        turns[-1] += [i] * counts
        if turns[-1] and not counts:
            turns.append([])
    return [tokenizer.decode(turn) for turn in turns]


def test_every_turn_of_the_assistant_counts_and_nothing_else(chatting):
    messages = chat(
        ("system", "s"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2 of")
    )
    example = encode_text(Text(messages[:2], messages[2:]), chatting, 200)
    assert (
        said(chatting, example) == ["1", "2 of"]
        and example.completion_ids[-1] == chatting.eos_ids[0]
    )
    assert example.prompt_ids == encode_prompt(messages[:2], chatting)
    ids = example.prompt_ids + example.completion_ids
    assert chatting.encode_chat(messages)[0][: len(ids)] == ids
    last = encode_text(
        Text(messages[:4], "2 of"), chatting, 200
    )  # a turn in the prompt is not learned
    assert said(chatting, last) == ["2 of"] and last.completion_mask is None
    assert last.prompt_ids + last.completion_ids == ids and last.prompt_ids == encode_prompt(
        messages[:4], chatting
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_with_tags_a_turn_in_the_prompt_is_not_learned_either(kind, name, tmp_path):
    tokenizer = load_tokenizer(build(tmp_path, kind, TEMPLATES[name]))
    messages = chat(("user", "one"), ("assistant", "1"), ("user", "two"))
    example = encode_text(Text(messages, "2 of"), tokenizer, 200)
    assert [text.strip() for text in said(tokenizer, example)] == ["2 of"]
    assert example.prompt_ids == encode_prompt(messages, tokenizer)
    assert True not in tokenizer.encode_chat(messages, start=3, add_generation_prompt=True)[1]


def test_a_pair_shares_its_prompt(chatting):
    prompt = chat(("user", "one"), ("assistant", "1"), ("user", "two"))
    pair = encode_preference(Preference(prompt, "2 of", "so"), chatting, 200)
    assert pair.prompt_ids == encode_prompt(prompt, chatting)
    for ids, text in ((pair.chosen_ids, "2 of"), (pair.rejected_ids, "so")):
        assert pair.prompt_ids == encode_text(Text(prompt, text), chatting, 200).prompt_ids
        assert ids == encode_text(Text(prompt, text), chatting, 200).completion_ids
        assert chatting.decode(ids) == text and ids[-1] == chatting.eos_ids[0]


@pytest.mark.parametrize("max_length", [200, 30])
def test_only_the_assistants_turns_of_a_pair_count(chatting, max_length):
    prompt, more = (
        chat(("user", "one")),
        chat(("assistant", "1"), ("user", "two"), ("assistant", "2 of")),
    )
    pair = encode_preference(Preference(prompt, more, "so"), chatting, max_length)
    long, short = (encode_text(Text(prompt, turns), chatting, max_length) for turns in (more, "so"))
    assert (pair.prompt_ids, pair.chosen_ids, pair.masks[0]) == long[:3]
    assert (pair.rejected_ids, pair.masks[1]) == short[1:3] and False in pair.masks[0]
    batch = collate([pair], 0)
    assert batch.lengths.tolist() == [sum(pair.masks[0]), len(pair.rejected_ids)]
    counted = [token for token, counts in zip(pair.chosen_ids, pair.masks[0]) if counts]
    assert batch.targets.tolist() == counted + pair.rejected_ids


def test_a_conversation_that_makes_no_example_is_refused(chatting, tmp_path):
    with pytest.raises(ValueError, match="the completion has no message of the assistant"):
        encode_text(Text(chat(("user", "one")), chat(("user", "two"))), chatting, 50)
    answers_first = (
        "{{ messages[-1].content }}"
        "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    )
    tokenizer = load_tokenizer(build(tmp_path / "other", "bytes", answers_first))
    with pytest.raises(
        ValueError, match="renders the prompt in different ways for different completions"
    ):
        encode_preference(Preference(chat(("user", "one")), "two", "so"), tokenizer, 50)


def test_chat_prompts_and_masks_are_cut_like_text(chatting):
    messages = chat(
        ("user", "one two " * 9),
        ("assistant", "of course " * 9),
        ("user", "so"),
        ("assistant", "yes"),
    )
    whole = encode_text(Text(messages[:1], messages[1:]), chatting, 10_000)
    assert whole.completion_mask is not None
    for length in range(2, len(whole.prompt_ids + whole.completion_ids) + 1, 3):
        cut = encode_text(Text(messages[:1], messages[1:]), chatting, length)
        n = len(cut.completion_ids)
        assert n >= 1 and len(cut.prompt_ids) + n <= length
        assert (
            cut.completion_ids == whole.completion_ids[:n]
            and cut.completion_mask == whole.completion_mask[:n]
        )
        assert True in cut.completion_mask
        kept = [i for i in cut.prompt_ids if i != chatting.bos_id]
        assert whole.prompt_ids[-len(kept) :] == kept or not kept


# ---- templates that fail


FAILURES = [
    ("{{ raise_exception('only users may speak') }}", "only users may speak"),
    ("{% for m in messages %}", r"json:1: .*TemplateSyntaxError"),
    ("{{ messages[7].content.x }}", "UndefinedError"),
    ("{{ messages + 1 }}", "TypeError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ messages | length }}", "enclose it in {% generation %}"),
    ("{% generation %}{% endgeneration %}", "no text of the assistant"),
    ("plain", "no text of the assistant"),
]


@pytest.mark.parametrize("template, message", FAILURES)
def test_a_template_that_fails_is_named_with_its_message(template, message, tmp_path):
    tokenizer = load_tokenizer(build(tmp_path, "bytes", template))
    with pytest.raises(ValueError, match=message) as caught:
        encode_text(Text(chat(("user", "a")), "b"), tokenizer, 50)
    assert caught.value.__cause__ is None and (
        caught.value.__suppress_context__ or not caught.value.__context__
    )
    assert "tokenizer_config.json" in str(caught.value)


TURN = "{{ m.role[0] + m.content }}"
PREFIXES = {  # a turn rendered alone differs from the same turn in the whole
    "the turn is left out": "{% if m.role == 'user' %}{{ 'a' + m.content }}{% endif %}",
    "the turn is there twice": "{{ m.content + ('x' if loop.last else m.content) }}",
    "the text before the turn depends on it": "{{ messages[-1].content + m.content }}",
}


@pytest.mark.parametrize("how", PREFIXES)
def test_a_template_whose_turns_cannot_be_found_is_refused(how, tmp_path):
    ending = "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    messages = chat(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))
    each = "{% for m in messages %}"
    assert (
        sum(load_tokenizer(build(tmp_path, "bytes", each + TURN + ending)).encode_chat(messages)[1])
        == 2
    )
    tokenizer = load_tokenizer(build(tmp_path, "bytes", each + PREFIXES[how] + ending))
    with pytest.raises(
        ValueError,
        match=r"tokenizer_config\.json: the chat template renders messages\[:\d\] with the",
    ):
        tokenizer.encode_chat(messages)


def test_a_tokenizer_without_a_template_says_what_to_add(tmp_path):
    for template in (None, [{"name": "rag", "template": "x"}]):
        with pytest.raises(FileNotFoundError, match=r"no chat template.*add chat_template\.jinja"):
            load_tokenizer(build(tmp_path, "bytes", template)).encode_chat(chat(("user", "a")))


def test_the_template_is_the_file_before_the_field_and_the_default_among_named_ones(tmp_path):
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "one"}]
    tokenizer = load_tokenizer(build(tmp_path, "bytes", named))
    messages = chat(("user", "a"))
    assert tokenizer.decode(tokenizer.encode_chat(messages)[0]) == "one"
    (tmp_path / "chat_template.jinja").write_text("two{{ 1 + }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja:1: "):
        load_tokenizer(tmp_path).encode_chat(messages)


def test_templates_find_the_tags_filters_and_variables_of_transformers(tmp_path):
    template = """{% for m in messages %}
    {% if m.content == 'b' %}{% continue %}{% endif %}
    {% if m.content == 'd' %}{% break %}{% endif %}
{{ m | tojson }}{{ {'x': 'é<'} | tojson(indent=1) }}
{% endfor %}
{{ strftime_now('%%') }}{{ tools is none }}{{ bos_token }}{{ nothing }}"""
    tokenizer = load_tokenizer(build(tmp_path, "bytes", template))
    ids, _ = tokenizer.encode_chat(chat(*(("user", c) for c in "a<bcd"[0::2]), ("user", "é")))
    want = theirs(tmp_path, chat(*(("user", c) for c in "a<bcd"[0::2]), ("user", "é")))[0]
    assert ids == want and "é<" in tokenizer.decode(ids) and "%True" in tokenizer.decode(ids)


def test_without_jinja2_the_extra_is_named_and_bytes_need_none(tmp_path, monkeypatch):
    for name in ("jinja2", "jinja2.sandbox", "jinja2.ext", "jinja2.nodes"):
        monkeypatch.setitem(sys.modules, name, None)
    tokenizer = load_tokenizer(build(tmp_path, "bytes", CHATML))
    assert tokenizer.encode("Hi")
    with pytest.raises(ImportError, match=r"'jinja2': pip install 'rlhf-core\[train\]'"):
        tokenizer.encode_chat(chat(("user", "a")))
    assert ByteTokenizer().encode_chat(chat(("user", "a")))


# ---- rows


HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": ""}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_shape_of_conversation_is_read(tmp_path):
    texts = [
        ({"messages": [SYSTEM, HI, YES, HI, NO]}, Text([SYSTEM, HI], [YES, HI, NO])),
        ({"messages": [YES, HI]}, Text([], [YES, HI])),
        ({"prompt": [HI, NO, HI], "completion": "yes"}, Text([HI, NO, HI], [YES])),
        ({"prompt": [HI], "response": [YES, HI, NO], "tools": None}, Text([HI], [YES, HI, NO])),
        ({"messages": [HI, {**YES, "tool_calls": None}], "prompt": "ignored"}, Text([HI], [YES])),
    ]
    assert read_texts(write(tmp_path / "t.jsonl", *(row for row, _ in texts))) == [
        want for _, want in texts
    ]
    pairs = [
        ({"prompt": [HI], "chosen": "yes", "rejected": "no"}, Preference([HI], "yes", "no")),
        ({"prompt": [HI], "chosen": [YES], "rejected": [NO]}, Preference([HI], "yes", "no")),
        (
            {"chosen": [HI, YES, HI, YES], "rejected": [HI, YES, HI, NO]},
            Preference([HI, YES, HI], "yes", "no"),
        ),
        (
            {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO]},
            Preference([HI], "yes", "no"),
        ),
        (
            {"prompt": [HI], "chosen": [YES, HI, NO], "rejected": [NO]},
            Preference([HI], [YES, HI, NO], "no"),
        ),
        (
            {"chosen": [HI, NO], "rejected": [HI, YES, HI, NO]},
            Preference([HI], "no", [YES, HI, NO]),
        ),
    ]
    assert read_preferences(write(tmp_path / "p.jsonl", *(row for row, _ in pairs))) == [
        want for _, want in pairs
    ]
    prompts = [
        ({"messages": [SYSTEM, HI, YES, HI, NO]}, [SYSTEM, HI, YES, HI]),
        ({"prompt": [HI, YES, HI]}, [HI, YES, HI]),
        ({"prompt": [HI, YES, NO]}, [HI]),
        ({"prompt": "hi"}, "hi"),
    ]
    assert read_prompts(write(tmp_path / "q.jsonl", *(row for row, _ in prompts))) == [
        want for _, want in prompts
    ]


def test_rows_of_prompts_keep_every_other_column_and_their_messages(tmp_path):
    rows = [
        {"question": "2 + 3?", "answer": "#### 5", "level": {"grade": 1}},
        {"messages": [SYSTEM, HI, YES], "answer": 5},
        {"instruction": "add", "input": "2 and 3", "output": "5"},
    ]
    assert read_prompt_rows(write(tmp_path / "p.jsonl", *rows)) == [
        ("2 + 3?", {"answer": "#### 5", "level": {"grade": 1}}),
        ([SYSTEM, HI], {"answer": 5, "messages": [SYSTEM, HI]}),
        ("add\n\n2 and 3", {"instruction": "add", "input": "2 and 3", "output": "5"}),
    ]
    path = write(tmp_path / "q.jsonl", {"problem": "2 + 3?", "answer": 5})
    assert read_prompt_rows(path, columns={"prompt": "problem"}) == [("2 + 3?", {"answer": 5})]
    both = {"prompt": "problem", "label": "answer", "completion": "nowhere"}
    assert read_prompt_rows(path, columns=both) == [("2 + 3?", {"label": 5})]
    (tmp_path / "p.txt").write_text("one\n")
    assert read_prompt_rows(tmp_path / "p.txt") == [("one", {})]


BAD = [
    (read_texts, {"messages": []}, "'messages' is an empty list"),
    (read_texts, {"messages": "hi"}, "'messages' must be a list of messages, got \"hi\""),
    (read_texts, {"messages": {"role": "user"}}, "'messages' must be a list of messages"),
    (
        read_texts, {"messages": [HI, "yes"]},
        r"'messages\[1\]' must be an object with role and content, got \"yes\"",
    ),
    (
        read_texts, {"messages": [HI, {"role": "tool", "content": "x"}]},
        r"'messages\[1\].role' must be one of .*'tool'",
    ),
    (
        read_texts, {"messages": [{"from": "human"}]},
        r"'messages\[0\].role' is missing; the line has 'from'",
    ),
    (read_texts, {"messages": [HI, {"role": "assistant"}]}, r"'messages\[1\].content' is missing"),
    (read_texts, {"messages": [HI, {**YES, "content": " "}]}, r"'messages\[1\].content' is empty"),
    (
        read_texts, {"messages": [HI, {**YES, "content": None}]},
        r"'messages\[1\].content' must be a string, got null",
    ),
    (
        read_texts, {"messages": [{**HI, "content": [{"type": "image"}]}]},
        r"'messages\[0\].content' must be a string",
    ),
    (
        read_texts, {"messages": [HI, {**YES, "content": "\ud800"}]},
        r"'messages\[1\].content' has a lone surrogate",
    ),
    (
        read_texts, {"messages": [HI, {**YES, "tool_calls": [1]}]},
        r"'messages\[1\].tool_calls' is not supported",
    ),
    (read_texts, {"messages": [HI, YES], "tools": [1]}, "'tools' is not supported"),
    (read_texts, {"messages": [HI, YES], "images": ["a.png"]}, "'images' is not supported"),
    (read_texts, {"messages": [SYSTEM, HI]}, "'messages' has no message of the assistant"),
    (read_texts, {"prompt": [HI]}, "'response' is missing; the line has 'prompt'"),
    (
        read_texts, {"prompt": [HI], "completion": [HI]},
        r"'completion\[0\].role' must be assistant, got 'user'",
    ),
    (read_texts, {"prompt": [HI], "completion": ""}, "'completion' is empty"),
    (read_texts, {"prompt": "hi", "completion": [YES]}, "'completion' must be a string"),
    (
        read_preferences, {"prompt": [HI], "chosen": "a", "rejected": "a"},
        "'chosen' and 'rejected' are equal",
    ),
    (
        read_preferences, {"prompt": [HI], "chosen": [YES, HI], "rejected": [NO]},
        "'chosen' must start and end with messages of the assistant .* assistant, user",
    ),
    (
        read_preferences, {"chosen": [HI, YES], "rejected": [HI, YES]},
        "'chosen' and 'rejected' are equal",
    ),
    (
        read_preferences, {"chosen": [HI, YES], "rejected": [HI]},
        "'rejected' must start and end with messages of the assistant .*, got none",
    ),
    (
        read_preferences, {"chosen": [HI, SYSTEM, YES], "rejected": [HI, NO]},
        "'chosen' must start and end with messages of the assistant .*, got system",
    ),
    (
        read_preferences, {"chosen": [HI, YES], "rejected": "no"},
        "'rejected' must be a list of messages, got \"no\"",
    ),
    (read_preferences, {"chosen": [HI, YES]}, "'rejected' is missing"),
    (
        read_preferences, {"chosen": [YES], "rejected": [NO]},
        "'chosen' and 'rejected' share no message",
    ),
    (
        read_preferences, {"prompt": "so", "chosen": [HI, YES], "rejected": [HI, NO]},
        "'prompt' is not a message",
    ),
    (read_prompts, {"messages": [YES]}, "'messages' has only messages of the assistant"),
    (read_prompts, {"prompt": []}, "'prompt' is an empty list"),
]  # fmt: skip


@pytest.mark.parametrize("reader, row, message", BAD, ids=lambda x: getattr(x, "__name__", None))
def test_a_bad_conversation_is_named_with_line_and_field(reader, row, message, tmp_path):
    path = write(tmp_path / "data.jsonl", row)
    with pytest.raises(DataError, match=rf"data\.jsonl:1: fields? {message}"):
        reader(path)


def test_a_row_that_the_template_refuses_is_named_or_dropped(tmp_path):
    tokenizer = load_tokenizer(build(tmp_path / "t", "bytes", MISTRAL))
    path = write(tmp_path / "data.jsonl", {"messages": [HI, YES]}, {"messages": [HI, HI, YES]})

    def encode(text):
        return encode_text(text, tokenizer, 50)

    with pytest.raises(
        DataError, match=r"data\.jsonl:2: .*tokenizer_config\.json: .*roles must alternate"
    ):
        read_texts(path, encode=encode)
    bad = []
    assert read_texts(path, bad.append, encode) == [encode(Text([HI], "yes"))] and len(bad) == 1


def test_messages_are_checked_by_encode_chat_too(chatting):
    with pytest.raises(
        ValueError, match=r"messages\[0\].role' must be one of system, user, assistant, got 'tool'"
    ):
        chatting.encode_chat(chat(("tool", "x")))


# ---- the command line


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo", "generate"])
def test_every_command_takes_conversations(command, tmp_path, capsys):
    torch.manual_seed(0)
    folder = build(tmp_path / "policy", "bytes", untagged(CHATML), eos_token="<|im_end|>")
    tokenizer = load_tokenizer(folder)
    sizes = dict(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        max_positions=128,
    )
    policy = Transformer(TransformerConfig(**sizes, eos_ids=(2,)))
    policy.save_pretrained(folder)
    RewardModel.from_model(policy).save_pretrained(tmp_path / "rm")
    talk = [[HI, YES, {**HI, "content": f"hi {i}"}] for i in range(8)]
    if command in ("reward", "dpo"):
        data = write(
            tmp_path / "data.jsonl", *({"chosen": [*t, YES], "rejected": [*t, NO]} for t in talk)
        )
    else:
        data = write(tmp_path / "data.jsonl", *({"messages": [*t, NO]} for t in talk))
    options = ["--model", folder, "--device", "cpu"]
    if command == "generate":
        options += ["--prompt", "hi", "--chat", "--max-new-tokens", 3, "--temperature", 0]
    else:
        options += ["--out", tmp_path / "out", "--batch-size", 4, "--max-steps", 1]
        options += ["--prompts" if command == "ppo" else "--data", data]
    if command == "ppo":
        options += ["--reward-model", tmp_path / "rm", "--response-length", 4]
    assert cli.main([command, *map(str, options)]) == 0
    shown = capsys.readouterr().out
    if command == "generate":
        assert shown.startswith("--- prompt\nuser\nhi\nassistant\n\n--- response\n")
    else:
        assert f"written to {tmp_path / 'out'}" in shown
        assert load_tokenizer(tmp_path / "out").encode_chat(talk[0]) == tokenizer.encode_chat(
            talk[0]
        )


def test_the_command_line_sets_variables_of_the_template(tmp_path, capsys):
    folder = build(tmp_path, "bytes", QWEN3, eos_token="<|im_end|>")
    config = TransformerConfig(600, hidden_size=16, num_layers=1, num_heads=2, max_positions=128)
    Transformer(config).save_pretrained(folder)
    command = ["generate", "--model", str(folder), "--prompt", "hi", "--chat", "--device", "cpu"]
    command += ["--max-new-tokens", "1", "--template-vars"]
    assert cli.main([*command, "enable_thinking=true"]) == 0
    assert "<think>" not in capsys.readouterr().out
    assert cli.main([*command, "enable_thinking=false"]) == 0
    assert "assistant\n" + EMPTY in capsys.readouterr().out
    assert cli.main([*command, "thinking=false"]) == 2
    assert "no variable 'thinking'. It reads enable_thinking" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "thinking"])
    assert "must be NAME=VALUE, got 'thinking'" in capsys.readouterr().err


def test_a_response_ends_at_the_eos_of_model_or_tokenizer(tmp_path, monkeypatch, capsys):
    """The model's config names one EOS; the tokenizer's, which ends a turn, is another."""
    folder = build(tmp_path, "bytes", untagged(CHATML), eos_token="<|im_end|>")
    config = TransformerConfig(
        vocab_size=600, hidden_size=16, num_layers=1, num_heads=2, max_positions=32, eos_ids=(2,)
    )
    Transformer(config).save_pretrained(folder)
    asked = []
    monkeypatch.setattr(
        "rlhf_core.cli.sampling.generate",
        lambda model, ids, **options: asked.append(options) or 1 / 0,
    )
    for more, want in (([], {2, 4}), (["--eos-ids", "5"], {5})):
        with pytest.raises(ZeroDivisionError):
            cli.main(
                [
                    "generate",
                    "--model",
                    str(folder),
                    "--prompt",
                    "hi",
                    "--chat",
                    "--max-new-tokens",
                    "5",
                    "--device",
                    "cpu",
                    *more,
                ]
            )
        assert set(asked[-1]["eos_ids"]) == want
