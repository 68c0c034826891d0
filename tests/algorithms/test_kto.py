"""KTO: the loss is the paper's, its KL comes from mismatched rows."""

import math

import pytest
import torch
from helpers import accumulated, snapshot, tiny
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer, Example, Labelled, encode_labelled, read_labelled
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.ops import linear_logprobs_blocks
from rlhf_core.trainers import KTOConfig, KTOTrainer


def rows(n=7, seed=0):
    """A desirable completion holds a 5, an undesirable one a 6."""
    torch.manual_seed(seed)
    made = []
    for i in range(n):
        prompt, before = (torch.randint(7, 12, (k % 4 + 1,)).tolist() for k in (i, i + 2))
        made.append(Example(prompt, [*before, 5 if i % 3 else 6, 2], label=i % 3 > 0))
    return made


def make(model=None, reference=None, examples=None, **config):
    config = KTOConfig(**(dict(batch_size=7, lr=1e-3, beta=0.5) | config))
    return KTOTrainer(
        tiny() if model is None else model, examples or rows(), config, reference=reference
    )


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_loss_and_gradients_are_those_of_the_paper_for_every_micro_batch_size(
    micro_batch_size, monkeypatch
):
    """Eq. 8, computed from separate rows. The logits of a step are computed once."""
    batch, reference = rows(), tiny(seed=1)
    weights = dict(desirable_weight=1.5, undesirable_weight=0.7)
    trainer = make(reference=reference, micro_batch_size=micro_batch_size, **weights)

    def log_ratio(prompt, completion):
        logps = []
        for model in (trainer.model, reference):
            log_p = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].log_softmax(
                -1
            )
            logps.append(log_p[torch.arange(len(completion)), completion].sum())
        return logps[0] - logps[1].detach()

    others = [
        log_ratio(row.prompt_ids, batch[(i + 1) % 7].completion_ids).item()
        for i, row in enumerate(batch)
    ]
    kl = sum(others) / 7
    assert kl > 0.05  # else the clamp would hide it
    terms, hits = [], []
    for row in batch:
        gain = 0.5 * (log_ratio(row.prompt_ids, row.completion_ids) - kl)
        hits.append((gain.item() > 0) == row.label)
        terms.append(1.5 * (1 - gain.sigmoid()) if row.label else 0.7 * (1 - (-gain).sigmoid()))
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    monkeypatch.setattr(
        linear_logprobs_blocks, "backward", lambda *args: pytest.fail("computed again")
    )
    total, metrics, got = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), abs=2e-6) and metrics["kl"] == pytest.approx(
        kl, abs=1e-5
    )
    assert metrics["rewards/accuracies"] == pytest.approx(sum(hits) / 7)
    assert_close(got, list(gradients), rtol=1e-4, atol=2e-6)


def test_where_policy_and_reference_agree_every_value_is_one_half():
    """Row 27, with and without adapters: the KL is 0."""
    for adapted in (False, True):
        model = tiny()
        if adapted:
            add_adapters(model, LoRAConfig())
        metrics = make(model).step(rows())
        assert (
            metrics["loss"] == 0.5 and metrics["kl"] == 0 and metrics["rewards/accuracies"] == 0.5
        )


def test_the_kl_is_never_negative_and_0_for_one_row():
    trainers = [make(tiny(seed=a), tiny(seed=b)) for a, b in ((0, 1), (1, 0))]
    logs = [trainer.kl(rows()).item() for trainer in trainers]
    assert min(logs) >= 0 and max(logs) > 0 and trainers[0].kl(rows(1)) == 0


def test_the_kl_counts_the_unmasked_tokens_of_the_other_completion():
    """Masked tokens count like those of a prompt."""
    whole = [Example([7, 8], [9, 10, 5, 2], label=True), Example([11], [8, 6, 9, 2], label=False)]
    masked = [row._replace(completion_mask=[False, True, True, False]) for row in whole]
    for max_length in (1024, 4):  # cut: two tokens of each are left
        trainer = make(tiny(), tiny(seed=1), whole, batch_size=2)
        object.__setattr__(trainer.config, "max_length", max_length)
        total = 0.0
        for row, other in zip(masked, reversed(masked)):
            prompt = row.prompt_ids
            completion = other.completion_ids[: max_length - len(prompt)]
            for model, sign in ((trainer.model, 1), (trainer.reference.model, -1)):
                log_p = model(torch.tensor([prompt + completion]))[
                    0, len(prompt) - 1 : -1
                ].log_softmax(-1)
                counted = zip(log_p, completion, other.completion_mask)
                total += sign * sum(x[token].item() for x, token, counts in counted if counts)
        assert trainer.kl(masked).item() == pytest.approx(max(total / 2, 0), abs=1e-5)
        assert trainer.kl(masked) != trainer.kl(whole)


def test_the_kl_is_computed_without_dropout():
    trainer = make(tiny(dropout=0.3), dropout=True)
    assert not any(trainer.kl(rows(seed=seed)) for seed in range(12))


def test_mismatched_rows_are_truncated_to_the_models_positions():
    long = [
        Example([7] * 20, [5] * 10 + [2], label=True),
        Example([8] * 2, [6] * 28 + [2], label=False),
    ]
    assert math.isfinite(make(examples=long, batch_size=2).train()[-1]["loss"])


def test_kto_learns_what_is_desirable_and_leaves_the_reference_alone():
    trainer = make(examples=rows(60), epochs=4, lr=3e-3, batch_size=20)
    before = snapshot(trainer.reference.model)
    last = trainer.train()[-1]
    assert (
        last["rewards/desirable"] > last["rewards/undesirable"] + 0.3
        and last["rewards/accuracies"] > 0.8
    )
    assert_close(snapshot(trainer.reference.model), before, rtol=0, atol=0)


def test_labels_are_read_from_the_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "p", "completion": "c", "label": true}\n'
        '{"prompt": "p", "response": "d", "label": 0}\n'
    )
    assert read_labelled(path) == [Labelled("p", "c", True), Labelled("p", "d", False)]
    encoded = read_labelled(path, encode=lambda row: encode_labelled(row, ByteTokenizer(), 20))
    assert [example.label for example in encoded] == [True, False]
    assert ByteTokenizer().decode(encoded[1].completion_ids) == "d"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beta=0), "beta must be > 0, got 0"),
        (dict(desirable_weight=0), "desirable_weight must be > 0, got 0"),
        (dict(undesirable_weight=-1), "undesirable_weight must be > 0, got -1"),
        (dict(batch_size=1), "batch_size must be at least 2, got 1"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KTOConfig(**options)


@pytest.mark.parametrize("label", [None, 2, "no", math.nan])
def test_an_example_without_a_true_or_false_label_is_reported(label):
    bad = Example([7], [5, 2], label=label)
    with pytest.raises(ValueError, match=f"^example 1 has label {label!r}, not True or False"):
        make(examples=[rows()[0], bad])
    with pytest.raises(ValueError, match=r"^evaluation example 0 has label"):
        KTOTrainer(tiny(), rows(1), KTOConfig(batch_size=2), eval_examples=[bad])


def test_labels_0_and_1_are_false_and_true():
    numbers = [row._replace(label=int(row.label)) for row in rows()]
    want, got = (accumulated(make(reference=tiny(seed=1)), batch) for batch in (rows(), numbers))
    assert_close(got, want, rtol=0, atol=0)
