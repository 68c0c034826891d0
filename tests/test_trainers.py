"""What every trainer promises: exact accumulation, honest metrics, only what trains moves, files that read back."""

import json
import math
import random
from itertools import chain

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer, Example, Pair
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.trainers import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlhf_core.trainers.common import Metrics, TrainConfig, frozen_copy

NAN = float("nan")
KINDS = {
    "sft": (SFTTrainer, SFTConfig, Transformer),
    "reward": (RewardTrainer, RewardConfig, RewardModel),
    "dpo": (DPOTrainer, DPOConfig, Transformer),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def tiny(cls=Transformer, seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=12, hidden_size=16, num_layers=2, num_heads=2, max_positions=32, eos_ids=(2,), pad_id=0)
    model = cls(TransformerConfig(**(sizes | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def rows(kind, n=8, seed=0):
    """Examples or pairs of unequal lengths; what is preferred holds a 5, what is not a 6."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(7, 12) for _ in range(rng.randrange(low, high))]

    if kind == "sft":
        return [Example(ids(1, 5), [*ids(0, 7), 2]) for _ in range(n)]
    return [Pair(ids(1, 5), [*ids(0, 4), 5, *ids(0, 4), 2], [*ids(0, 4), 6, *ids(0, 4), 2]) for _ in range(n)]


def make(kind, model=None, examples=None, others=None, **config):
    trainer_type, config_type, model_type = KINDS[kind]
    config = config_type(**(dict(batch_size=8, lr=1e-3) | config))
    model = tiny(model_type) if model is None else model
    return trainer_type(model, rows(kind) if examples is None else examples, config, **(others or {}))


def snapshot(module):
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def accumulated(trainer, batch):
    """Loss, metrics and gradients as `optimize` adds them up."""
    metrics, total = Metrics(), 0.0
    trainer.optimizer.zero_grad()
    for loss in trainer.losses(batch, metrics):
        loss.backward()
        total += loss.item()
    return total, metrics.means(), [p.grad.clone() for p in trainer.trained_parameters()]


# ---- accumulation and metrics


@kinds
def test_micro_batches_add_up_to_the_batch(kind):
    """Row 16: 1x8, 2x4, 8x1 and an uneven split, lengths unequal."""
    model_type = KINDS[kind][2]
    others = dict(reference=tiny(seed=1)) if kind == "dpo" else {}
    results = [
        accumulated(make(kind, tiny(model_type), micro_batch_size=size, others=others), rows(kind))
        for size in (None, 1, 2, 4, 3)
    ]
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_sft_metrics_are_those_of_the_rows_one_by_one():
    trainer, batch = make("sft"), rows("sft")
    total, metrics, _ = accumulated(trainer, batch)
    nll, hits, entropy = [], [], []
    for prompt, completion in batch:
        log_p = trainer.model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        nll += (-log_p[torch.arange(len(completion)), completion]).tolist()
        hits += (log_p.argmax(-1) == torch.tensor(completion)).tolist()
        entropy += (-(log_p.exp() * log_p).sum(-1)).tolist()
    want = dict(loss=nll, mean_token_accuracy=hits, entropy=entropy)
    for name, values in want.items():
        assert metrics[name] == pytest.approx(sum(values) / len(values), abs=1e-5), name
    assert total == pytest.approx(metrics["loss"], abs=1e-6)
    assert trainer.step(batch)["num_tokens"] == len(nll)


def test_num_tokens_counts_only_what_is_in_the_loss():
    """A first token without anything before it is no target."""
    assert make("sft").step([Example([], [4, 5, 2]), Example([3], [2])])["num_tokens"] == 3


def test_reward_metrics_are_those_of_the_pairs_one_by_one():
    trainer, batch = make("reward"), rows("reward")
    total, metrics, _ = accumulated(trainer, batch)

    def score(ids):
        return trainer.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)).item()

    scores = torch.tensor([[score(p + c), score(p + r)] for p, c, r in batch])
    margin = scores[:, 0] - scores[:, 1]
    want = dict(
        accuracy=(margin > 0).float().mean(), margin=margin.mean(), mean_reward=scores.mean(),
        loss=torch.nn.functional.softplus(-margin).mean(),
    )  # fmt: skip
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value.item(), abs=1e-5), name
    assert total == pytest.approx(metrics["loss"], abs=1e-6)


def test_dpo_metrics_are_those_of_the_pairs_one_by_one():
    reference, batch = tiny(seed=1), rows("dpo")
    trainer = make("dpo", others=dict(reference=reference), beta=0.3)
    total, metrics, _ = accumulated(trainer, batch)

    def logps(model, prompt, completion):
        log_p = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        return log_p[torch.arange(len(completion)), completion].sum().item()

    logp = torch.tensor([[[logps(m, p, x) for x in (c, r)] for p, c, r in batch] for m in (trainer.model, reference)])
    reward = 0.3 * (logp[0] - logp[1])  # (B, 2)
    margin = reward[:, 0] - reward[:, 1]
    want = {
        "rewards/chosen": reward[:, 0], "rewards/rejected": reward[:, 1], "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float(), "logps/chosen": logp[0, :, 0], "logps/rejected": logp[0, :, 1],
        "loss": torch.nn.functional.softplus(-margin),
    }  # fmt: skip
    for name, values in want.items():
        assert metrics[name] == pytest.approx(values.mean().item(), abs=1e-4), name
    assert total == pytest.approx(metrics["loss"], abs=1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, dict(dropout=0.3)], ids=str)
def test_the_first_loss_of_dpo_is_log_two_to_the_last_bit(micro_batch_size, options):
    """Row 27, with dropout in the model's config; before an update every pair is a tie, which counts one half."""
    metrics = make("dpo", tiny(**options), micro_batch_size=micro_batch_size).step(rows("dpo"))
    assert metrics["loss"] == torch.tensor(2.0).log().item() or micro_batch_size == 3  # a sum of 3 rounds
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0.5


def test_metrics_weigh_values_not_micro_batches():
    metrics = Metrics()
    metrics.add("a", torch.tensor([1.0, 2.0, 3.0]))
    metrics.add("a", torch.tensor([10.0, NAN]), torch.tensor([True, False]))
    metrics.add("none", torch.tensor([NAN]), torch.tensor([False]))
    assert metrics.means() == {"a": 4.0, "none": 0.0}


# ---- what moves


@kinds
def test_training_moves_what_it_trains_and_nothing_else(kind):
    """Row 32."""
    trainer = make(kind)
    frozen = trainer.model.trunk.blocks[0].requires_grad_(False)
    trainer = make(kind, trainer.model)
    before, reference = snapshot(trainer.model), snapshot(getattr(trainer, "reference", frozen))
    trainer.step(rows(kind))
    for name, weight in snapshot(trainer.model).items():
        assert torch.equal(weight, before[name]) == name.startswith("trunk.blocks.0."), name
    assert_close(snapshot(getattr(trainer, "reference", frozen)), reference, rtol=0, atol=0)


@kinds
def test_a_gradient_that_is_no_number_leaves_every_weight_as_it_was(kind):
    trainer = make(kind)
    hook = trainer.model.trunk.norm.weight.register_hook(lambda gradient: gradient * NAN)
    before = snapshot(trainer.model)
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is nan; nothing updated"):
        trainer.train()
    assert_close(snapshot(trainer.model), before, rtol=0, atol=0)
    hook.remove()
    trainer.step(rows(kind))  # and the optimizer holds no NaN either
    assert all(weight.isfinite().all() for weight in snapshot(trainer.model).values())


@kinds
def test_dropout_is_off_unless_asked_for(kind):
    """Row 3."""
    model_type, evals = KINDS[kind][2], dict(eval_examples=rows(kind, seed=1))
    assert not make(kind, tiny(model_type, dropout=0.3).train()).model.training
    noisy = make(kind, tiny(model_type, dropout=0.3), others=evals, dropout=True)
    assert noisy.model.training
    assert accumulated(noisy, rows(kind))[0] != accumulated(noisy, rows(kind))[0]
    assert noisy.evaluate() == noisy.evaluate()  # off for evaluation, then on again
    assert noisy.model.training


@kinds
def test_evaluation_is_that_of_all_rows_whatever_the_batch_size(kind):
    """Row 32."""
    others = dict(eval_examples=rows(kind, n=7, seed=1))
    if kind == "dpo":
        others["reference"] = tiny(seed=1)
    results = [make(kind, others=others, batch_size=size).evaluate() for size in (7, 1, 3)]
    want = accumulated(make(kind, others=others), others["eval_examples"])[1]
    for result in results:
        assert result == pytest.approx({f"eval_{name}": value for name, value in want.items()}, abs=1e-5)


def test_a_frozen_copy_is_a_copy():
    model = tiny().train()
    copy = frozen_copy(model)
    model.trunk.embed.weight.data.zero_()
    assert copy.trunk.embed.weight.any() and not copy.training and model.training
    assert not any(p.requires_grad for p in copy.parameters())


# ---- learning


def test_sft_learns_to_count():
    examples = [Example([8, 6, start], [*range(start + 1, 12), 2]) for start in range(3, 12)] * 8
    history = make("sft", examples=examples, epochs=5, lr=1e-2, batch_size=12).train()
    assert history[0]["loss"] > 1.5 and history[-1]["loss"] < 0.3
    assert history[-1]["mean_token_accuracy"] > 0.95


def test_a_reward_model_learns_which_token_is_preferred():
    others = dict(eval_examples=rows("reward", 64, seed=1))
    history = make("reward", examples=rows("reward", 128), epochs=4, lr=1e-2, batch_size=16, others=others).train()
    assert history[-1]["eval_accuracy"] > 0.9 and history[-1]["eval_margin"] > 1


def test_dpo_learns_which_token_is_preferred():
    others = dict(eval_examples=rows("dpo", 64, seed=1))
    history = make("dpo", examples=rows("dpo", 64), epochs=4, lr=3e-3, batch_size=16, others=others).train()
    assert history[0]["rewards/margins"] == 0
    assert history[-1]["eval_rewards/accuracies"] > 0.9 and history[-1]["eval_rewards/margins"] > 0.1


# ---- the loop


@kinds
def test_the_same_seed_gives_the_same_numbers_and_another_others(kind):
    runs = [make(kind, batch_size=3, epochs=2, seed=seed).train() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_every_epoch_sees_every_example_once_in_another_order():
    trainer = make("sft", examples=list(range(10)), batch_size=4, epochs=2)
    batches = list(trainer.batches())
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2 and trainer.total_steps == 6
    first, second = (list(chain(*part)) for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(), [1, 0.75, 0.5, 0.25]),
        (dict(lr_schedule="constant"), [1, 1, 1, 1]),
        (dict(warmup_steps=2), [0.5, 1, 1, 0.5]),
        (dict(warmup_steps=2, lr_schedule="constant"), [0.5, 1, 1, 1]),
        (dict(warmup_steps=4), [0.25, 0.5, 0.75, 1]),
        (dict(warmup_steps=8), [0.125, 0.25, 0.375, 0.5]),
        (dict(max_steps=2), [1, 0.5]),
    ],
    ids=str,
)
def test_the_learning_rate_of_every_step(options, want):
    history = make("sft", batch_size=2, lr=0.01, **options).train()
    assert [step["lr"] for step in history] == pytest.approx([0.01 * factor for factor in want])


def test_the_gradient_is_clipped_and_its_norm_reported_as_it_was():
    trainer = make("sft", max_grad_norm=0.01)
    norm = trainer.step(rows("sft"))["grad_norm"]
    left = torch.stack([p.grad.norm() for p in trainer.trained_parameters()]).norm().item()
    assert norm > 0.1 and left == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("eval_every, want", [(None, [4]), (2, [2, 4]), (3, [3, 4])])
def test_evaluation_comes_when_it_is_due_and_at_the_end(eval_every, want):
    others = dict(eval_examples=rows("sft", 3, seed=1))
    history = make("sft", batch_size=2, eval_every=eval_every, others=others).train()
    assert [step["step"] for step in history if "eval_loss" in step] == want


NAMES = {
    "sft": "loss mean_token_accuracy entropy num_tokens",
    "reward": "loss accuracy margin mean_reward",
    "dpo": "loss entropy logps/chosen logps/rejected "
    "rewards/chosen rewards/rejected rewards/accuracies rewards/margins",
}


@kinds
def test_a_run_leaves_a_model_a_config_and_a_line_of_metrics_a_step(kind, tmp_path, capsys):
    others = dict(out=tmp_path / "run", tokenizer=ByteTokenizer(), eval_examples=rows(kind, 3))
    trainer = make(kind, batch_size=3, log_every=2, others=others)
    history = trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == history and [line["step"] for line in lines] == [1, 2, 3]
    assert set(NAMES[kind].split()) | {"grad_norm", "lr"} <= set(lines[0])
    assert {f"eval_{name}" for name in NAMES[kind].split() if name != "num_tokens"} <= set(lines[-1])
    run = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert run["algorithm"] == kind and run["batch_size"] == 3 and run["versions"]["torch"] == torch.__version__
    saved = KINDS[kind][2].from_pretrained(tmp_path / "run")
    assert_close(snapshot(saved), snapshot(trainer.model), rtol=0, atol=0)
    assert (tmp_path / "run" / "tokenizer_config.json").exists()
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize("config_type", [TrainConfig, *(row[1] for row in KINDS.values())])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=0.0), "lr must be > 0, got 0.0"),
        (dict(batch_size=0), "batch_size must be > 0"),
        (dict(micro_batch_size=0), "micro_batch_size must be at least 1, got 0"),
        (dict(max_steps=0), "max_steps must be at least 1"),
        (dict(epochs=-1), "epochs must be > 0"),
        (dict(max_grad_norm=0), "max_grad_norm must be > 0"),
        (dict(lr=NAN), "lr must be > 0, got nan"),
        (dict(lr_schedule="cosine"), "lr_schedule must be 'linear' or 'constant', got 'cosine'"),
    ],
    ids=str,
)
def test_a_config_out_of_range_is_refused(config_type, options, message):
    with pytest.raises(ValueError, match=message):
        config_type(**options)


def test_beta_and_examples_must_be_there():
    with pytest.raises(ValueError, match="beta must be > 0, got 0"):
        DPOConfig(beta=0)
    with pytest.raises(ValueError, match="no examples to train on"):
        make("sft", examples=[])
