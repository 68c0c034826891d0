"""A context in front of prompts: what the teacher reads, and what is cut."""

import json

import pytest

from rlhf_core.data import (
    ByteTokenizer,
    PromptRow,
    Text,
    encode_in_context,
    encode_prompt,
    encode_prompt_in_context,
    encode_text,
    in_context,
    load_tokenizer,
    read_context,
)
from rlhf_core.data.collate import as_taught, collate, count_targets, length
from rlhf_core.data.context import fit_both

BYTES = ByteTokenizer()
CONTEXT = "Answer in French.\n\n"
SYSTEM, USER, ANSWER = (
    {"role": role, "content": content}
    for role, content in (("system", "Be kind."), ("user", "Hi?"), ("assistant", "Salut."))
)


def text_of(ids):
    return BYTES.decode(ids)


def test_plain_text_gets_a_prefix_and_the_students_prompt_stays(tokenizer):
    row = Text("Say hello: ", "bonjour")
    example, plain = (
        encode_in_context(row, tokenizer, 200, CONTEXT),
        encode_text(row, tokenizer, 200),
    )
    assert example._replace(teacher_prompt_ids=None) == plain
    assert tokenizer.decode(example.teacher_prompt_ids) == CONTEXT + "Say hello: "
    assert example.teacher_prompt_ids[0] == tokenizer.encode_prompt(CONTEXT)[0]  # BOS, if any
    prompt = encode_prompt_in_context(PromptRow("Say hello: ", {}), tokenizer, CONTEXT)
    assert prompt.teacher_prompt_ids == example.teacher_prompt_ids
    assert (prompt.prompt_ids, prompt.completion_ids) == (plain.prompt_ids, [])


def test_text_without_a_prompt_follows_the_context(tokenizer):
    """Askell et al. 2021: X is text of a corpus, and the teacher models it given the context."""
    example = encode_in_context(Text("", "Bonjour"), tokenizer, 200, CONTEXT)
    assert tokenizer.decode(example.teacher_prompt_ids) == CONTEXT
    assert example._replace(teacher_prompt_ids=None) == encode_text(
        Text("", "Bonjour"), tokenizer, 200
    )
    taught = as_taught(example)
    assert count_targets(taught) == count_targets(example)
    assert collate([taught], 0).targets.equal(collate([example], 0).targets)


def test_without_a_context_there_is_no_prompt_of_the_teacher():
    row = Text("Say hello: ", "bonjour")
    assert encode_in_context(row, BYTES, 20, None) == encode_text(row, BYTES, 20)
    assert encode_prompt_in_context(PromptRow("a", {}), BYTES, None).teacher_prompt_ids is None


def test_a_conversation_gets_a_system_message():
    example = encode_in_context(Text([USER], [ANSWER]), BYTES, 200, CONTEXT)
    assert text_of(example.prompt_ids) == "user: Hi?assistant: "
    assert text_of(example.teacher_prompt_ids) == "system: Answer in French.user: Hi?assistant: "
    row = PromptRow([USER], {"messages": [USER]})
    prompt = encode_prompt_in_context(row, BYTES, CONTEXT)
    assert prompt.teacher_prompt_ids == example.teacher_prompt_ids
    assert prompt.prompt_ids == encode_prompt([USER], BYTES)


def test_a_conversation_has_one_system_message():
    shot = [USER | {"content": "Bye."}, ANSWER | {"content": "Au revoir."}]
    french = SYSTEM | {"content": "Answer in French."}
    both = SYSTEM | {"content": "Answer in French.\n\nBe kind."}
    for context, prompt, whole in (
        (CONTEXT, [USER], [french, USER]),
        (CONTEXT, [SYSTEM, USER], [both, USER]),
        (shot, [USER], [*shot, USER]),
        (shot, [SYSTEM, USER], [SYSTEM, *shot, USER]),
        ([french, *shot], [USER], [french, *shot, USER]),
        ([french, *shot], [SYSTEM, USER], [both, *shot, USER]),
        (CONTEXT, [], [french]),
    ):
        assert in_context(prompt, context) == whole


def test_all_turns_of_the_assistant_stay_targets():
    turns = [ANSWER, USER, ANSWER | {"content": "Oui."}]
    example = encode_in_context(Text([USER], turns), BYTES, 200, CONTEXT)
    taught = as_taught(example)
    assert taught.completion_mask == example.completion_mask and False in example.completion_mask
    targets = [collate([x], 0).targets for x in (example, taught)]
    assert targets[0].equal(targets[1]) and "Oui." in text_of(targets[0].tolist())


@pytest.mark.parametrize("max_length", [30, 40, 50])
def test_the_start_of_the_prompt_is_cut_but_not_the_context(max_length):
    row = Text("0123456789" * 2, "abcde")
    example = encode_in_context(row, BYTES, max_length, CONTEXT)
    assert length(example) == min(max_length, 1 + len(CONTEXT) + 20 + 6)
    kept = text_of(example.prompt_ids)
    assert row.prompt.endswith(kept) and example.prompt_ids[0] == BYTES.bos_id
    assert text_of(example.teacher_prompt_ids) == CONTEXT + kept
    assert row.completion.startswith(text_of(example.completion_ids))


def test_a_default_system_message_that_is_cut_takes_no_context_with_it():
    """The student's prompt can be the longer one, where a template has a long default."""
    example = encode_in_context(Text("0123456789" * 2, "abcde"), BYTES, 100, "C")
    longer = example._replace(prompt_ids=[257, *BYTES.encode("default "), *example.prompt_ids[1:]])
    for max_length in (20, 25, 30, 100):
        cut = fit_both(longer, max_length, BYTES.bos_id)
        assert length(cut) <= max_length
        assert text_of(cut.teacher_prompt_ids).startswith("C")
        assert longer.prompt_ids[-5:] == cut.teacher_prompt_ids[-5:] == cut.prompt_ids[-5:]


def test_a_context_that_leaves_no_room_is_an_error():
    row = Text("0123456789", "abc")
    with pytest.raises(ValueError, match=f"context has {len(CONTEXT)} tokens.*in 20 tokens"):
        encode_in_context(row, BYTES, 20, CONTEXT)
    assert length(encode_in_context(row, BYTES, len(CONTEXT) + 2, CONTEXT)) == len(CONTEXT) + 2


def test_a_template_that_changes_the_answer_is_an_error(data_dir, tmp_path):
    folder = data_dir / "tokenizers" / "gpt2"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ messages | length }}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="renders the completion differently"):
        encode_in_context(Text([USER], [ANSWER]), tokenizer, 200, CONTEXT)


def test_a_conversation_cannot_come_before_plain_text():
    for encode in (
        lambda: encode_in_context(Text("a", "b"), BYTES, 99, [USER, ANSWER]),
        lambda: encode_prompt_in_context(PromptRow("a", {}), BYTES, [USER, ANSWER]),
    ):
        with pytest.raises(ValueError, match="context is a conversation, but the prompt is plain"):
            encode()


def test_a_file_holds_text_or_messages(tmp_path):
    text, messages = tmp_path / "context.txt", tmp_path / "context.json"
    text.write_text(CONTEXT)
    messages.write_text(json.dumps([USER, ANSWER]))
    assert read_context(text) == CONTEXT and read_context(messages) == [USER, ANSWER]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b" \n", "the context is empty"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.json", b"{", "a.json: "),
        ("a.json", b"[]", "a.json: field 'context' is an empty list"),
        ("a.json", b'[{"role": "tool", "content": "x"}]', "must be one of system, user, assistant"),
    ],
)
def test_a_bad_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_context(tmp_path / name)
    assert name in str(error.value)
