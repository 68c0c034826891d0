"""A reference's log-probs in a file: what training makes of them is what it makes of the reference itself."""

import copy
import random
import re

import pytest
import torch
from test_trainers import accumulated
from torch.testing import assert_close

from rlhf_core.data import Pair
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors
from rlhf_core.trainers import DPOConfig, DPOTrainer
from rlhf_core.trainers import dpo as dpo_module

LOG_2 = torch.tensor(2.0).log().item()


@torch.no_grad()
def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=12,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        max_positions=32,
        eos_ids=(2,),
        pad_id=0,
    )
    model = Transformer(TransformerConfig(**(sizes | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


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
    real, seen = dpo_module.target_logprobs, []

    def counted(asked, *arguments, **options):
        seen.extend([1] * (asked is model))
        return real(asked, *arguments, **options)

    monkeypatch.setattr(dpo_module, "target_logprobs", counted)
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
    """Row 27: one file, which knows tokens, for every loss; read by a run that shuffles and splits otherwise."""
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
    for _ in range(2):  # that made the file, and that reads it
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


def test_adapters_share_the_file_of_their_base_until_they_have_learned(tmp_path):
    """What changes nothing is not in the digest; what does, is."""
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
            r"made with another reference, [0-9a-f]{12}, not [0-9a-f]{12}; remove the file",
        ),
        (dict(reference=tiny(seed=2)), "made with another reference"),
        (dict(model=tiny(rope_theta=500.0)), "made with another reference"),
        (dict(precision="bfloat16"), "made with another precision, float32, not bfloat16"),
        (
            dict(examples=[*pairs(), pairs(1, seed=5)[0]]),
            r"made of other examples, without example 10: Pair\(",
        ),
        (dict(eval_examples=pairs(2, seed=5)), "made of other examples, without example 10"),
    ],
    ids=["policy", "reference", "config", "precision", "example", "evaluation example"],
)
def test_a_file_of_something_else_is_refused_by_name(change, message, tmp_path):
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
    with pytest.raises(ValueError, match="a safetensors file, but not of a reference's log-probs"):
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
        ValueError, match=r"logprobs: damaged: keys of shape .*, log-probs of shape"
    ):
        make(tmp_path / "logprobs")


def test_an_example_is_known_by_its_tokens_and_which_of_them_count(tmp_path, monkeypatch):
    batch = pairs()
    want = make(tmp_path / "logprobs", examples=batch).train()
    monkeypatch.setattr(
        dpo_module.DPOTrainer, "_compute_reference_logprobs", lambda *_: pytest.fail("computed")
    )
    for same in (
        [pair._replace(margin=float(i)) for i, pair in enumerate(batch)],
        [Pair(*(tuple(ids) for ids in pair[:3])) for pair in batch],
        [pair._replace(masks=[None, [True] * len(pair.rejected_ids)]) for pair in batch],
    ):
        got = make(tmp_path / "logprobs", examples=same).train()
        assert [line["loss"] for line in got] == [line["loss"] for line in want]
    masked = batch[0]._replace(masks=[None, [False] * len(batch[0].rejected_ids)])
    with pytest.raises(ValueError, match="made of other examples, without example 0"):
        make(tmp_path / "logprobs", examples=[masked, *batch[1:]])


def test_a_run_that_was_stopped_goes_on_from_the_file(tmp_path):
    """Row 31: also from a copy of it; not where run and file are of another model, though nothing of it is held."""
    options = dict(epochs=2, lr_schedule="constant")
    want = make(tmp_path / "logprobs", **options).train()
    make(tmp_path / "logprobs", max_steps=3, save_every=3, out=tmp_path / "run", **options).train()
    (tmp_path / "logprobs").rename(tmp_path / "moved")
    resumed = make(tmp_path / "moved", out=tmp_path / "run", **options)
    resumed.resume()
    assert [row["loss"] for row in resumed.train()] == [row["loss"] for row in want]
    with pytest.raises(
        ValueError, match=r"of a run with reference='[0-9a-f]{64}', not '[0-9a-f]{64}'"
    ):
        make(tmp_path / "of another", tiny(seed=2), out=tmp_path / "run", **options).resume()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(loss="simpo", average=True),
            "reference_logprobs has no effect on loss 'simpo', got 'file'",
        ),
        (
            dict(loss="orpo", average=True),
            "reference_logprobs has no effect on loss 'orpo', got 'file'",
        ),
        (
            dict(reference_free=True),
            "reference_logprobs has no effect with reference_free, got 'file'",
        ),
    ],
)
def test_a_file_that_the_loss_does_not_use_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(reference_logprobs="file", **options)


def test_pairs_that_are_all_alike_are_refused():
    with pytest.raises(ValueError, match="of none of the 2 pairs do the completions differ"):
        make(None, examples=[Pair([3], [4, 2], [4, 2])] * 2)
