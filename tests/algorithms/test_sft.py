"""SFT: metrics, smoothing and z-loss as defined over whole logits, packing, whole texts."""

import random

import pytest
import torch
from helpers import accumulated, input_shapes, make_trainer, rows, tiny
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from rlhf_core.data import Example, Pair
from rlhf_core.losses import regularized_cross_entropy
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.ops import linear_logprobs_blocks
from rlhf_core.trainers import SFTConfig, SFTTrainer

OPTIONS = [dict(label_smoothing=0.1), dict(z_coef=0.03), dict(label_smoothing=0.3, z_coef=0.01)]


options = pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(option) for option in OPTIONS])


def texts(n=7):
    """Unequal lengths, an empty prompt, a completion of which not all counts."""
    rng = random.Random(0)
    rows = [
        Example(*([rng.randrange(3, 12) for _ in range(rng.randrange(1, 6))] for _ in "pc"))
        for _ in range(n)
    ]
    return [*rows, Example([], [5, 6, 2]), Example([7], [8, 9, 10, 2], [True, False, False, True])]


def make_sft(examples=None, model=None, **config):
    config = SFTConfig(**(dict(batch_size=9, lr=1e-3) | config))
    return SFTTrainer(model or tiny(), texts() if examples is None else examples, config)


def by_definition(model, batch, label_smoothing=0.0, z_coef=0.0):
    """Loss and gradients from every row's logits in float64."""
    model, losses = model.double(), []
    for row in batch:
        ids = torch.tensor([*row.prompt_ids, *row.completion_ids])
        counts = torch.tensor(
            [False] * len(row.prompt_ids)
            + (row.completion_mask or [True] * len(row.completion_ids))
        )
        logits, targets = model(ids[None])[0, :-1][counts[1:]], ids[1:][counts[1:]]
        smoothed = cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        losses.append(smoothed + z_coef * logits.logsumexp(dim=-1) ** 2)
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = [p.grad.float() for p in model.parameters()]
    model.zero_grad()
    return loss.item(), gradients, model.float()


def test_sft_metrics_are_those_of_the_rows_one_by_one():
    trainer, batch = make_trainer("sft"), rows("sft")
    total, metrics, _ = accumulated(trainer, batch)
    nll, hits, entropy = [], [], []
    for prompt, completion, *_ in batch:
        log_p = trainer.model(torch.tensor([prompt + completion]))[
            0, len(prompt) - 1 : -1
        ].log_softmax(-1)
        nll += (-log_p[torch.arange(len(completion)), completion]).tolist()
        hits += (log_p.argmax(-1) == torch.tensor(completion)).tolist()
        entropy += (-(log_p.exp() * log_p).sum(-1)).tolist()
    want = dict(loss=nll, mean_token_accuracy=hits, entropy=entropy)
    for name, values in want.items():
        assert metrics[name] == pytest.approx(sum(values) / len(values), abs=1e-5), name
    assert total == pytest.approx(metrics["loss"], abs=1e-6)
    assert trainer.step(batch)["num_tokens"] == len(nll)


def test_num_tokens_counts_only_targets():
    """A first token with nothing before it is not a target."""
    assert make_trainer("sft").step([Example([], [4, 5, 2]), Example([3], [2])])["num_tokens"] == 3


def test_packing_leaves_less_padding():
    shapes = []
    for packing in (False, True):
        trainer = make_trainer("sft", packing=packing, max_length=16)
        shapes.append(input_shapes(trainer.model.trunk))
        trainer.step(rows("sft"))
    ((plain,), (packed,)) = shapes
    assert plain[0] == 8 and packed.numel() < 0.8 * plain.numel() and packed[1] <= 16


def test_sft_learns_to_count():
    examples = [Example([8, 6, start], [*range(start + 1, 12), 2]) for start in range(3, 12)] * 8
    history = make_trainer("sft", examples=examples, epochs=5, lr=1e-2, batch_size=12).train()
    assert history[0]["loss"] > 1.5 and history[-1]["loss"] < 0.3
    assert history[-1]["mean_token_accuracy"] > 0.95


@options
def test_the_regularized_loss_and_its_gradient_are_those_of_the_whole_logits(options):
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    own = logits.gather(1, targets[:, None])[:, 0]
    got = regularized_cross_entropy(
        own - logits.logsumexp(dim=1), own, logits.mean(dim=1), **options
    )
    smoothing, z_coef = options.get("label_smoothing", 0.0), options.get("z_coef", 0.0)
    want = cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    want = want + z_coef * logits.logsumexp(dim=1) ** 2
    assert_close(got, want)
    assert_close(
        *(torch.autograd.grad(loss.sum(), logits, retain_graph=True) for loss in (got, want))
    )


SPLITS = [{}, dict(micro_batch_size=2), dict(packing=True), dict(packing=True, micro_batch_size=4)]


@pytest.mark.parametrize(
    "options, tied, split",
    [
        *((OPTIONS[2], tied, split) for tied in (True, False) for split in SPLITS),
        *((option, True, SPLITS[3]) for option in OPTIONS[:2]),  # each option alone
    ],
)
def test_smoothing_and_z_loss_are_exact_under_micro_batches_and_packing(
    options, tied, split, monkeypatch
):
    monkeypatch.setattr(linear_logprobs_blocks, "CPU_WHOLE", 3 * 12)  # logits of three tokens
    trainer = make_sft(model=tiny(tie_embeddings=tied), **options, **split)
    loss, gradients, _ = by_definition(tiny(tie_embeddings=tied), texts(), **options)
    got = accumulated(trainer, texts())
    assert got[0] == pytest.approx(loss, rel=1e-5) and got[1]["loss"] == pytest.approx(
        loss, rel=1e-5
    )
    assert_close(got[2], gradients, rtol=1e-4, atol=1e-6)
    nll = by_definition(tiny(tie_embeddings=tied), texts())[0]
    assert got[1]["nll"] == pytest.approx(nll, rel=1e-5)


@options
def test_smoothing_and_z_loss_agree_in_bfloat16_up_to_its_rounding(options):
    want, got = (
        accumulated(make_sft(precision=p, **options), texts()) for p in ("float32", "bfloat16")
    )
    a, b = (torch.cat([gradient.flatten() for gradient in result[2]]) for result in (got, want))
    assert got[0] == pytest.approx(want[0], rel=0.01) and (a - b).norm() < 0.02 * b.norm()


def test_smoothing_and_z_loss_train_adapters_of_a_frozen_head():
    model = tiny()
    add_adapters(model, LoRAConfig(rank=2))
    trainer = make_sft(model=model, label_smoothing=0.1, z_coef=0.01)
    before = trainer.step(texts())
    assert trainer.step(texts())["loss"] < before["loss"]


# ---- whole text


def test_whole_text_learns_every_token_but_the_first():
    got = accumulated(make_sft(whole_text=True), whole := make_sft(whole_text=True).examples)
    everything = [Example([], [*row.prompt_ids, *row.completion_ids]) for row in texts()]
    loss, gradients, _ = by_definition(tiny(), everything)
    assert whole == everything and got[0] == pytest.approx(loss, rel=1e-5)
    assert_close(got[2], gradients, rtol=1e-4, atol=1e-6)
    metrics = make_sft(whole_text=True).step(whole)
    assert metrics["num_tokens"] == sum(
        len(row.prompt_ids) + len(row.completion_ids) - 1 for row in texts()
    )


def test_whole_text_is_evaluated_like_it_is_trained():
    trainer = SFTTrainer(
        tiny(), texts(), SFTConfig(batch_size=9, whole_text=True), eval_examples=texts()
    )
    everything = [Example([], [*row.prompt_ids, *row.completion_ids]) for row in texts()]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        by_definition(tiny(), everything)[0], rel=1e-5
    )


# ---- refused, or without effect


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (dict(label_smoothing=-0.1), r"label_smoothing must be in \[0, 1\), got -0.1"),
        (dict(z_coef=-1.0), "z_coef must be at least 0, got -1.0"),
        (dict(z_coef=float("nan")), "z_coef must be at least 0 and finite, got nan"),
        (dict(max_length=1), "max_length must be at least 2, got 1"),
    ],
)
def test_an_option_out_of_range_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SFTConfig(**config)


def test_whole_text_of_texts_without_prompts_warns():
    message = "whole_text has no effect: every example is a completion without prompt"
    with pytest.warns(UserWarning, match=message):
        make_sft([Example([], [3, 4, 2])], whole_text=True)


def test_examples_without_a_token_to_learn_are_refused():
    with pytest.raises(ValueError, match="none of the 2 examples has a token to learn"):
        make_sft([Example([], [2]), Example([3], [4], [False])])


def test_whole_texts_of_examples_of_another_type_are_refused():
    with pytest.raises(ValueError, match="example 0 is of type Pair, sft takes Example"):
        make_sft([Pair([5], [6], [7])], whole_text=True)
