"""Distillation: the loss is the KL to the teacher, and the student takes over a context."""

import itertools
import json
import random

import pytest
import torch
from helpers import accumulated, adapted, rows, run_ranks, snapshot, tiny
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer, Example, Text, encode_in_context, encode_text
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.models.lora import LoRAConfig, add_adapters, frozen_adapters
from rlhf_core.rollout import sample
from rlhf_core.trainers import DistillConfig, DistillTrainer, SFTConfig, SFTTrainer

CONTEXT = [9, 4, 11]


def lessons(n=6, context=CONTEXT):
    """Examples of unequal lengths; the teacher reads the context in front of each prompt."""
    return [x._replace(teacher_prompt_ids=[*context, *x.prompt_ids]) for x in rows("sft", n)]


def make(model=None, examples=None, others=None, **config):
    config = DistillConfig(**(dict(batch_size=8, lr=1e-2) | config))
    examples = lessons() if examples is None else examples
    return DistillTrainer(tiny() if model is None else model, examples, config, **(others or {}))


def distributions(model, prompt, completion, temperature):
    """log p (M, V) of each completion token, in float64, from one row alone."""
    logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)


def by_hand(student, teacher, batch, divergence="forward", temperature=1.0, top_k=None):
    """The mean over tokens of the sum over the vocabulary."""
    losses = []
    for row in batch:
        q = distributions(student, row.prompt_ids, row.completion_ids, temperature)
        prompt = row.teacher_prompt_ids or row.prompt_ids
        p = distributions(teacher, prompt, row.completion_ids, temperature).detach()
        if top_k is not None:
            top = p.topk(top_k).indices
            p, q = (
                torch.cat((x.gather(1, top), (1 - x.exp().gather(1, top).sum(1, True)).log()), 1)
                for x in (p, q)
            )
        a, b = (p, q) if divergence == "forward" else (q, p)
        losses.append((a.exp() * (a - b)).sum(-1))
    return torch.cat(losses).mean()


# ---- the loss


@pytest.mark.parametrize("micro_batch_size, packing", [(None, False), (1, False), (4, True)])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(divergence="reverse"),
        dict(temperature=2.0),
        dict(kl_top_k=3),
        dict(kl_top_k=2, divergence="reverse", temperature=0.7),
    ],
)
def test_loss_and_gradients_are_those_by_hand(options, micro_batch_size, packing):
    """Separate rows in float64. Positions of teacher and student differ by the context."""
    batch = lessons()
    trainer = make(micro_batch_size=micro_batch_size, packing=packing, **options)
    names = {"top_k" if name == "kl_top_k" else name: x for name, x in options.items()}
    want = by_hand(trainer.model, tiny(), batch, **names)
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    total, metrics, found = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=1e-5) and total > 0.02
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    temperature = options.get("temperature", 1.0)
    kl = by_hand(trainer.model, tiny(), batch, temperature=temperature).item()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert_close(found, list(gradients), rtol=1e-4, atol=1e-6)


def test_metrics_are_those_by_hand():
    batch, trainer = lessons(), make()
    p, q = (
        torch.cat([distributions(trainer.model, prompt(x), x.completion_ids, 1.0) for x in batch])
        for prompt in (lambda x: x.teacher_prompt_ids, lambda x: x.prompt_ids)
    )
    _, metrics, _ = accumulated(trainer, batch)
    assert metrics["agreement"] == (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert 0 < metrics["agreement"] < 1
    for name, x in (("teacher_entropy", p), ("entropy", q)):
        assert metrics[name] == pytest.approx(-(x.exp() * x).sum(1).mean().item(), rel=1e-5)
    lengths = [len(row.completion_ids) for row in batch]
    assert metrics["response_length"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("softcap", [dict(logit_softcap=3.0), dict(logit_divisor=4.0)])
def test_logits_that_a_model_changes_after_the_head_are_compared(softcap):
    trainer = make(tiny(**softcap))
    want = by_hand(trainer.model, tiny(**softcap), lessons())
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    total, _, found = accumulated(trainer, lessons())
    assert total == pytest.approx(want.item(), rel=1e-5)
    assert_close(found, list(gradients), rtol=1e-4, atol=1e-6)


def test_masked_tokens_and_rows_without_a_prompt_count_as_in_sft():
    """The first token of a row without a prompt is no target, also where the teacher has one."""
    batch = [
        Example([5], [7, 8, 9, 2], [True, False, True, True], teacher_prompt_ids=[4, 5]),
        Example([], [6, 7, 2], teacher_prompt_ids=[4]),
    ]
    trainer, teacher = make(examples=batch), tiny()
    total, metrics, _ = accumulated(trainer, batch)

    def kls(i, pick):
        row = batch[i]
        p = distributions(teacher, row.teacher_prompt_ids, row.completion_ids, 1.0)
        start = len(row.completion_ids) - (1 if not row.prompt_ids else 0)
        logits = trainer.model(torch.tensor([row.prompt_ids + row.completion_ids]))[
            0, -start - 1 : -1
        ]
        p, q = p[-start:], logits.double().log_softmax(-1)
        return (p.exp() * (p - q)).sum(1)[pick]

    want = torch.cat((kls(0, [0, 2, 3]), kls(1, [0, 1]))).mean().item()
    assert total == pytest.approx(want, rel=1e-5) and metrics["response_length"] == 2.5


def test_bfloat16_is_near_float32():
    totals = [accumulated(make(precision=x), lessons())[0] for x in ("float32", "bfloat16")]
    assert totals[1] == pytest.approx(totals[0], rel=0.05) and totals[0] != totals[1]


# ---- teachers


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_are_off_in_the_teacher_and_its_weights_are_held_once(trained):
    """The teacher is the policy as it was: with the adapters that it had, if they did anything."""
    model = adapted() if trained else tiny()
    if not trained:
        add_adapters(model, LoRAConfig(rank=2))
    teacher = adapted() if trained else tiny()
    trainer = make(model, max_steps=1)
    assert trainer.reference.model is model
    assert (frozen_adapters(model) is not None) == trained
    before = by_hand(teacher, teacher, lessons()).item()
    assert trainer.train()[0]["loss"] == pytest.approx(before, rel=1e-5)
    want = by_hand(model, teacher, lessons()).item()
    assert accumulated(trainer, lessons())[0] == pytest.approx(want, rel=1e-5)
    assert want < before


def test_a_larger_teacher_is_learned_without_a_context_and_stays_as_it_is():
    teacher = tiny(seed=1, hidden_size=32, num_layers=3)
    before, plain = snapshot(teacher), rows("sft", 6)
    trainer = make(examples=plain, others=dict(teacher=teacher), epochs=60)
    assert accumulated(trainer, plain)[0] == pytest.approx(
        by_hand(tiny(), teacher, plain).item(), rel=1e-5
    )
    history = trainer.train()
    assert history[-1]["kl"] < 0.2 * history[0]["kl"]
    assert_close(snapshot(teacher), before, rtol=0, atol=0)


def test_dropout_is_off_in_the_teacher():
    trainer = make(tiny(dropout=0.3), dropout=True)
    shown = [trainer.step(lessons())["teacher_entropy"] for _ in range(2)]
    assert shown[0] == pytest.approx(shown[1], rel=1e-6)


class Padded:
    """A tokenizer with 10 tokens; models can have more ids, which pad."""

    vocab_size = 10


def test_ids_that_pad_only_one_of_the_vocabularies_are_left_out():
    """Qwen 2.5 of 0.5 B has 151936 ids, of 7 B 152064, and one tokenizer."""
    batch = [Example([5, 6], [7, 8, 2]), Example([4], [9, 2])]
    student, teacher = tiny(vocab_size=11), tiny(seed=1, vocab_size=14)
    trainer = make(student, batch, dict(teacher=teacher, tokenizer=Padded()))
    losses = []
    for row in batch:
        ids, start = torch.tensor([row.prompt_ids + row.completion_ids]), len(row.prompt_ids) - 1
        q, p = (x(ids)[0, start:-1, :11].log_softmax(-1) for x in (student, teacher))
        losses.append((p.exp() * (p - q)).sum(1))
    want = torch.cat(losses).mean().item()
    assert accumulated(trainer, batch)[0] == pytest.approx(want, rel=1e-5)


# ---- sampled responses


@pytest.mark.parametrize("responses", ["student", "teacher"])
def test_responses_are_sampled_from_the_model_that_is_asked_for(responses):
    """The student continues its own prompts, the teacher those with the context."""
    prompts = [x._replace(completion_ids=[]) for x in lessons()]
    trainer = make(examples=prompts, responses=responses, response_length=4, temperature=1.5)
    losses, batches = trainer.losses, []
    trainer.losses = lambda batch, metrics: batches.append(batch) or losses(batch, metrics)
    metrics = trainer.step(prompts)
    (batch,) = batches
    seeds = torch.randint(2**63 - 1, (6,), generator=torch.Generator().manual_seed(0))
    read = [x.prompt_ids if responses == "student" else x.teacher_prompt_ids for x in prompts]
    want = sample(tiny(), read, max_new_tokens=4, temperature=1.5, seeds=seeds).responses()
    assert [x.completion_ids for x in batch] == want
    assert [x._replace(completion_ids=[]) for x in batch] == prompts
    kl = by_hand(tiny(), tiny(), batch, temperature=1.5).item()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)


def test_student_and_teacher_give_different_samples():
    prompts = [x._replace(completion_ids=[]) for x in lessons(8)]
    both = []
    for responses in ("student", "teacher"):
        trainer = make(examples=prompts, responses=responses, response_length=8)
        both.append(trainer.answered(prompts, torch.Generator().manual_seed(1)))
    assert both[0] != both[1]


def test_sampled_rows_are_logged_with_their_kl(tmp_path):
    prompts = lessons(4)
    trainer = make(
        examples=prompts, others=dict(out=tmp_path), responses="student", response_length=4
    )
    (metrics,) = trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    tokens = [len(line["response"]) for line in lines]
    mean = sum(n * line["score"] for n, line in zip(tokens, lines)) / sum(tokens)
    assert mean == pytest.approx(metrics["kl"], rel=1e-4)


def test_held_out_samples_have_the_same_seeds_and_leave_the_run_alone():
    """Evaluations differ by the student alone, and a run takes the same steps without them."""
    prompts = lessons(8)
    runs = []
    for held_out in (prompts[:3], []):
        trainer = make(
            tiny(),
            prompts,
            dict(eval_examples=held_out),
            responses="student",
            response_length=4,
            lr=1e-30,
            batch_size=4,
            eval_every=1 if held_out else None,
        )
        runs.append(trainer.train())
    assert runs[0][0]["eval_kl"] == pytest.approx(runs[0][1]["eval_kl"], rel=1e-6)
    for with_evaluation, without in zip(*runs):
        assert with_evaluation["kl"] == without["kl"]


@pytest.mark.parametrize("mode", ["truncate", "drop"])
def test_prompts_too_long_to_answer_are_cut_after_the_context(mode):
    long = Example([5] * 30, [], teacher_prompt_ids=[*CONTEXT, *[5] * 30])
    short = Example([7], [], teacher_prompt_ids=[*CONTEXT, 7])
    with pytest.warns(UserWarning, match="on_long_prompt"):
        trainer = make(
            examples=[long, short], responses="student", response_length=4, on_long_prompt=mode
        )
    if mode == "drop":
        assert trainer.examples == [short]
    else:
        kept = trainer.examples[0]
        assert kept.prompt_ids == [5] * 25 and kept.teacher_prompt_ids == [*CONTEXT, *[5] * 25]
        assert trainer.train()[0]["response_length"] <= 4


def run_of(rank, world, responses):
    prompts = lessons(7)
    others = dict(eval_examples=prompts[:3])
    options = dict(responses=responses, batch_size=4, micro_batch_size=3, kl_top_k=4)
    options |= dict(adam_eps=1e-5)  # so that no step follows the rounding of a gradient near 0
    if responses != "data":
        options |= dict(response_length=4)
    trainer = make(tiny(), prompts, others, **options)
    history = trainer.train()
    return history, [x.detach() for x in trainer.trained_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("responses", ["data", "student"])
def test_two_processes_take_the_steps_of_one(responses, tmp_path):
    alone, weights = run_of(0, 1, responses)
    for history, shared in run_ranks(run_of, 2, tmp_path, responses):
        for line, want in zip(history, alone, strict=True):
            assert line == pytest.approx(want, rel=1e-4)
        assert_close(shared, weights, rtol=1e-3, atol=1e-5)


# ---- runs


def test_a_run_that_stops_resumes_to_the_bit(tmp_path):
    """With sampled responses, dropout and a context: every generator matters."""

    def build(name):
        return make(
            tiny(dropout=0.1),
            lessons(8),
            dict(out=tmp_path / name, eval_examples=lessons(2)),
            responses="student",
            response_length=4,
            batch_size=2,
            epochs=2,
            dropout=True,
            save_every=3,
            eval_every=2,
        )

    whole = build("whole").train()
    cut = build("cut")
    step = cut.step
    cut.step = lambda batch: step(batch) if cut.steps_done < 4 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        cut.train()
    resumed = build("cut")
    torch.manual_seed(99)
    resumed.resume()
    assert resumed.steps_done == 3
    assert resumed.train() == whole


def test_a_checkpoint_of_another_context_or_teacher_is_refused(tmp_path):
    make(others=dict(out=tmp_path), save_every=1, max_steps=1).train()
    for examples, others, message in (
        (lessons(context=[8]), {}, "examples"),
        (lessons(), dict(teacher=tiny(seed=1)), "frozen weights"),
    ):
        trainer = make(examples=examples, others=others | dict(out=tmp_path), max_steps=1)
        with pytest.raises(ValueError, match=message):
            trainer.resume()


def test_evaluation_is_that_of_the_loss_on_held_out_rows():
    held_out = lessons(11)[6:]
    trainer = make(others=dict(eval_examples=held_out), lr=1e-30)
    last = trainer.train()[-1]
    assert last["eval_kl"] == pytest.approx(by_hand(tiny(), tiny(), held_out).item(), rel=1e-5)


WORDS = ["".join(word) for word in itertools.product("abcde", repeat=3)]
random.Random(0).shuffle(WORDS)


@pytest.mark.slow
def test_the_student_does_without_the_context_what_the_teacher_does_with_it():
    """A planted task: with the context "!" the model writes a word in capitals, without it as it
    is. The student learns to write capitals, also for words that it has not seen."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    sizes = dict(vocab_size=259, hidden_size=48, num_layers=2, num_heads=4, max_positions=16)
    model = Transformer(TransformerConfig(**sizes, bos_id=257, eos_ids=(258,), pad_id=256))
    planted = [
        Text(context + word + "=", word.upper() if context else word)
        for word in WORDS[:90]
        for context in ("", "!")
    ]
    examples = [encode_text(row, tokenizer, 16) for row in planted]
    SFTTrainer(model, examples, SFTConfig(lr=5e-3, batch_size=60, epochs=50)).train()

    def taught(words):
        texts = (Text(word + "=", word.upper()) for word in words)
        return [encode_in_context(text, tokenizer, 16, "!") for text in texts]

    config = DistillConfig(lr=2e-3, batch_size=30, epochs=10)
    trainer = DistillTrainer(model, taught(WORDS[:90]), config, eval_examples=taught(WORDS[90:]))
    before, history = trainer.evaluate(), trainer.train()
    assert before["eval_kl"] > 0.5 and before["eval_agreement"] < 0.8
    assert history[-1]["eval_kl"] < 0.1 * before["eval_kl"]
    assert history[-1]["eval_agreement"] > 0.9


# ---- bad input


@pytest.mark.parametrize(
    "examples, others, config, message",
    [
        (rows("sft"), {}, {}, "nothing to learn: the teacher is the policy itself"),
        (
            [x._replace(teacher_prompt_ids=list(x.prompt_ids)) for x in rows("sft")],
            {},
            {},
            "nothing to learn",
        ),
        ([], {}, {}, "no examples"),
        ([Example([5], [], teacher_prompt_ids=[4, 5])], {}, {}, "none of the 1 examples has a tok"),
        (lessons(), dict(teacher=tiny(vocab_size=13)), {}, "student has 12 token ids, the teach"),
        (
            lessons(),
            dict(teacher=tiny(vocab_size=9), tokenizer=Padded()),
            {},
            "12 token ids, the teacher 9, and the tokenizer 10. Both models must use the same",
        ),
        (lessons(), {}, dict(kl_top_k=12), "kl_top_k must be below the vocabulary's 12 tokens"),
        (
            lessons(context=[5] * 30),
            {},
            {},
            r"example 0 has \d+ tokens, but the model has 32 positions",
        ),
        (
            lessons(),
            dict(teacher=tiny(seed=1, max_positions=4)),
            {},
            "but the teacher has 4 positions",
        ),
        (
            lessons(context=[5] * 25),
            {},
            dict(responses="student", response_length=8),
            "response_length 8 and a context of 25 tokens leave no room",
        ),
        (
            [Example([5], [6, 2], teacher_prompt_ids=[40])],
            {},
            {},
            "example 0 has token id 40, but the model has ids 0 to 11",
        ),
        (
            [Example([5], [6, 2], teacher_prompt_ids=[])],
            {},
            {},
            "empty prompt for the teacher",
        ),
        ([[5, 6]], {}, {}, "example 0 is of type list, distill takes Example"),
        ([[5, 6]], {}, dict(responses="student"), "example 0 is of type list, distill takes Exam"),
    ],
)
def test_bad_input_is_named(examples, others, config, message):
    with pytest.raises(ValueError, match=message):
        make(examples=examples, others=others, **config)


def test_the_teacher_may_not_be_the_student_itself():
    model = tiny()
    with pytest.raises(ValueError, match="is the policy itself"):
        make(model, others=dict(teacher=model))


@pytest.mark.parametrize(
    "options", [dict(response_length=5), dict(stop_strings=("a",)), dict(on_long_prompt="error")]
)
def test_options_of_sampling_warn_with_given_responses(options):
    (name,) = options
    with pytest.warns(UserWarning, match=f"{name}=.*no effect with the data's responses"):
        DistillConfig(**options)
