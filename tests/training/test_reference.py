"""The reference: a frozen model, or its log-probs in a file."""

import copy
import random
import re

import pytest
import torch
from helpers import accumulated, make_trainer, rows, tiny
from torch.testing import assert_close

from rlhf_core.algorithms import dpo
from rlhf_core.data import Pair
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors
from rlhf_core.trainers import DPOConfig, DPOTrainer
from rlhf_core.training.reference import frozen_copy


def test_a_frozen_copy_shares_no_weight_and_takes_no_gradient():
    model = tiny().train()
    copy = frozen_copy(model)
    model.trunk.embed.weight.data.zero_()
    assert copy.trunk.embed.weight.any() and not copy.training and model.training
    assert not any(p.requires_grad for p in copy.parameters())


def test_a_given_reference_is_used_without_its_dropout():
    policy, reference = tiny(dropout=0.3), tiny(dropout=0.3).train()
    trainer = make_trainer("dpo", policy, others=dict(reference=reference))
    assert trainer.reference.model is reference
    assert trainer.step(rows("dpo"))["rewards/margins"] == 0 and reference.training
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        make_trainer("dpo", policy, others=dict(reference=policy))


LOG_2 = torch.tensor(2.0).log().item()


def pairs(n=10, seed=0):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, 12) for _ in range(rng.randrange(low, high))]

    return [Pair(ids(1, 5), [*ids(0, 7), 5, 2], [*ids(0, 7), 6, 2]) for _ in range(n)]


def make(file, model=None, examples=None, reference=None, eval_examples=(), out=None, **config):
    config = DPOConfig(
        **(dict(batch_size=4, lr=1e-2, beta=0.3, reference_logprobs=file and str(file)) | config)
    )
    examples = pairs() if examples is None else examples
    return DPOTrainer(
        model or tiny(), examples, config, reference=reference, eval_examples=eval_examples, out=out
    )


def calls(monkeypatch, model):
    """How often the model's log-probs are asked for from now on."""
    real, seen = dpo.target_logprobs, []

    def counted(asked, *arguments, **options):
        seen.extend([1] * (asked is model))
        return real(asked, *arguments, **options)

    monkeypatch.setattr(dpo, "target_logprobs", counted)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(average=True),
        dict(ld_alpha=0.3),
        dict(loss="ipo"),
        dict(loss="robust", label_smoothing=0.2),
    ],
    ids=str,
)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_cached_log_probs_are_the_recomputed_ones_in_any_order(
    options, micro_batch_size, tmp_path, monkeypatch
):
    """Row 27: one file of token log-probs serves every loss, in another order and other splits."""
    reference, batch = tiny(seed=1), pairs()
    make(tmp_path / "logprobs", reference=reference)
    seen = calls(monkeypatch, reference)
    order = random.Random(3).sample(batch, len(batch))
    options = dict(micro_batch_size=micro_batch_size, seed=7) | options
    cached = make(
        tmp_path / "logprobs", examples=order, reference=reference, batch_size=3, **options
    )
    assert cached.reference is None
    got = accumulated(cached, order[:5])
    assert not seen
    want = accumulated(
        make(None, examples=order, reference=reference, batch_size=3, **options), order[:5]
    )
    assert seen and got[0] == pytest.approx(want[0], abs=1e-5)
    for name in want[1]:
        assert got[1][name] == pytest.approx(want[1][name], abs=1e-5), name
    assert_close(got[2], want[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_the_first_loss_is_log_2_to_the_last_bit(precision, micro_batch_size, tmp_path):
    for _ in range(2):  # the first trainer writes the file, the second reads it
        trainer = make(
            tmp_path / "logprobs", precision=precision, micro_batch_size=micro_batch_size
        )
        metrics = trainer.step(next(trainer.batches()))
        assert (
            metrics["loss"] == LOG_2
            and metrics["rewards/margins"] == 0 == metrics["rewards/chosen"]
        )


def test_the_reference_has_no_dropout(tmp_path):
    make(tmp_path / "a", tiny(dropout=0.5).train(), dropout=True)
    make(tmp_path / "b", tiny(dropout=0.5))
    (_, a), (_, b) = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert_close(a, b, rtol=0, atol=0)


def test_the_policy_as_it_is_now_is_the_reference_and_no_copy_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(copy, "deepcopy", lambda *args: pytest.fail("copied"))
    cached = make(tmp_path / "logprobs")
    monkeypatch.undo()
    plain = make(None)
    for trainer in (cached, plain):
        trainer.train()
    assert_close(
        dict(cached.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-4, atol=1e-5
    )


def test_evaluation_examples_are_in_the_file(tmp_path):
    held_out = pairs(5, seed=9)
    trainer = make(tmp_path / "logprobs", eval_examples=held_out)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(LOG_2)
    make(tmp_path / "logprobs", examples=held_out)


def test_adapters_share_the_file_of_their_base_until_they_change_it(tmp_path):
    """The digest covers adapters only if they change the model."""
    make(tmp_path / "logprobs")
    adapted = tiny()
    add_adapters(adapted, LoRAConfig(rank=2))
    trainer = make(tmp_path / "logprobs", adapted)
    assert trainer.step(next(trainer.batches()))["loss"] == LOG_2
    with pytest.raises(ValueError, match="made with another reference"):
        make(tmp_path / "logprobs", adapted)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(model=tiny(seed=2)),
            r"made with another reference \([0-9a-f]{12}, now [0-9a-f]{12}\)\. Remove the file",
        ),
        (dict(reference=tiny(seed=2)), "made with another reference"),
        (dict(model=tiny(rope_theta=500.0)), "made with another reference"),
        (dict(precision="bfloat16"), r"made with another precision \(float32, now bfloat16\)"),
        (
            dict(examples=[*pairs(), pairs(1, seed=5)[0]]),
            r"no log-probs of example 10, Pair\(.*made from other data",
        ),
        (dict(eval_examples=pairs(2, seed=5)), "no log-probs of example 10, "),
    ],
    ids=["policy", "reference", "config", "precision", "example", "evaluation example"],
)
def test_a_file_of_another_model_or_other_data_is_refused(change, message, tmp_path):
    make(tmp_path / "logprobs")
    make(tmp_path / "logprobs")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "logprobs")) + ": " + message):
        make(tmp_path / "logprobs", **change)


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "logprobs"
    make(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="logprobs: cannot be read, damaged or cut short"):
        make(file)
    write_tensors(file, {"x": torch.zeros(1)})
    with pytest.raises(
        ValueError, match="this safetensors file does not hold a reference's log-probs"
    ):
        make(file)


@pytest.mark.parametrize(
    "name, change",
    [
        ("lengths", lambda x: x.index_add(0, torch.tensor([0, 1]), torch.tensor([1, 1]))),
        ("lengths", lambda x: x.index_add(0, torch.tensor([0, 1]), torch.tensor([100, -100]))),
        ("lengths", lambda x: x[:-1]),
        ("keys", lambda x: x[:-1]),
        ("keys", lambda x: x[:, :-1]),
        ("logprobs", lambda x: x[:-1]),
        ("logprobs", lambda x: x[:, None]),
    ],
)
def test_a_file_whose_parts_do_not_fit_together_is_refused(name, change, tmp_path):
    make(tmp_path / "logprobs")
    header, tensors = read_tensors(tmp_path / "logprobs")
    header = {key: value for key, value in header.items() if key == "made_of"}
    write_tensors(
        tmp_path / "logprobs", tensors | {name: change(tensors[name]).contiguous()}, header
    )
    with pytest.raises(
        ValueError, match=r"logprobs: the file is damaged: keys of shape .*, log-probs of shape"
    ):
        make(tmp_path / "logprobs")


def test_an_example_is_identified_by_its_tokens_and_their_mask(tmp_path, monkeypatch):
    batch = pairs()
    want = make(tmp_path / "logprobs", examples=batch).train()
    monkeypatch.setattr(
        dpo.DPOTrainer, "_compute_reference_logprobs", lambda *_: pytest.fail("computed")
    )
    for same in (
        [pair._replace(margin=float(i)) for i, pair in enumerate(batch)],
        [Pair(*(tuple(ids) for ids in pair[:3])) for pair in batch],
        [pair._replace(masks=[None, [True] * len(pair.rejected_ids)]) for pair in batch],
    ):
        got = make(tmp_path / "logprobs", examples=same).train()
        assert [line["loss"] for line in got] == [line["loss"] for line in want]
    masked = batch[0]._replace(masks=[None, [False] * len(batch[0].rejected_ids)])
    with pytest.raises(ValueError, match="no log-probs of example 0, "):
        make(tmp_path / "logprobs", examples=[masked, *batch[1:]])


def test_a_stopped_run_resumes_with_the_file(tmp_path):
    """Row 31: also if the file has moved, but not with the file of another reference."""
    options = dict(epochs=2, lr_schedule="constant")
    want = make(tmp_path / "logprobs", **options).train()
    make(tmp_path / "logprobs", max_steps=3, save_every=3, out=tmp_path / "run", **options).train()
    (tmp_path / "logprobs").rename(tmp_path / "moved")
    resumed = make(tmp_path / "moved", out=tmp_path / "run", **options)
    resumed.resume()
    assert [row["loss"] for row in resumed.train()] == [row["loss"] for row in want]
    with pytest.raises(
        ValueError, match=r"written with reference='[0-9a-f]{64}', this run has '[0-9a-f]{64}'"
    ):
        make(tmp_path / "of another", tiny(seed=2), out=tmp_path / "run", **options).resume()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(loss="simpo", average=True),
            "reference_logprobs must be unset: loss 'simpo' has no reference, got 'file'",
        ),
        (
            dict(loss="orpo", average=True),
            "reference_logprobs must be unset: loss 'orpo' has no reference, got 'file'",
        ),
        (
            dict(reference_free=True),
            "reference_logprobs must be unset with reference_free",
        ),
    ],
)
def test_a_file_that_the_loss_does_not_use_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(reference_logprobs="file", **options)
