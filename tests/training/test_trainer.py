"""What every trainer promises: exact accumulation, honest metrics, only what trains moves, files that read back."""

import copy
import json
import math
import random
from itertools import chain

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.data import ByteTokenizer, Example, Pair, Ranked, Steps
from rlhf_core.data.collate import length
from rlhf_core.evaluation import length_bias
from rlhf_core.models import RewardModel, Transformer, TransformerConfig, ValueModel
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.ops import linear_logprobs_blocks
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_core.trainers import completions as given
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.config import TrainConfig
from rlhf_core.training.reference import frozen_copy

NAN = float("nan")
softplus = torch.nn.functional.softplus
KINDS = {
    "sft": (SFTTrainer, SFTConfig, Transformer),
    "reward": (RewardTrainer, RewardConfig, RewardModel),
    "dpo": (DPOTrainer, DPOConfig, Transformer),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@torch.no_grad()
def tiny(cls=Transformer, seed=0, **options):
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
    return [
        Pair(ids(1, 5), [*ids(0, 4), 5, *ids(0, 4), 2], [*ids(0, 4), 6, *ids(0, 4), 2])
        for _ in range(n)
    ]


def make(kind, model=None, examples=None, others=None, **config):
    trainer_type, config_type, model_type = KINDS[kind]
    config = config_type(**(dict(batch_size=8, lr=1e-3) | config))
    model = tiny(model_type) if model is None else model
    return trainer_type(
        model, rows(kind) if examples is None else examples, config, **(others or {})
    )


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


# ---- what is trained on


@pytest.mark.parametrize(
    "kind, bad, message",
    [
        ("sft", Pair([7], [5], [6]), "is of type Pair, sft takes Example"),
        ("sft", [7, 8], "is of type list, sft takes Example"),
        ("dpo", Ranked([7], [[5], [6]]), "is of type Ranked, dpo takes Pair"),
        ("reward", Example([7], [5]), "is of type Example, reward takes Pair or Ranked or Steps"),
        ("sft", Example([7], [5, 2], [True]), "has a mask of 1 for 2 tokens"),
        ("dpo", Pair([7], [5, 2], [6], masks=[None, [True, True]]), "has a mask of 2 for 1 tokens"),
        ("reward", Pair([7], [5, 2], [6], masks=[None]), "has 1 masks for 2 completions"),
        ("reward", Steps([7], [5, 2], [True, True], [1.0]), "has 1 labels for 2 steps"),
        ("reward", Steps([7], [5, 2], [True, True], [1.0, 1.5]), r"has label 1\.5, not in \[0, 1\]"),
        ("reward", Steps([7], [5, 2], [True, True], [NAN, 1.0]), r"has label nan, not in \[0, 1\]"),
    ],
)  # fmt: skip
def test_an_example_that_cannot_be_trained_on_is_named(kind, bad, message):
    with pytest.raises(ValueError, match=f"^example 8 {message}"):
        make(kind, examples=[*rows(kind), bad])
    with pytest.raises(ValueError, match=f"^evaluation example 0 {message}"):
        make(kind, others=dict(eval_examples=[bad]))


@kinds
def test_an_example_longer_than_max_length_is_refused_not_cut(kind):
    """What is too long for the model, too; an example as long as either is not."""
    model, (row,) = tiny(KINDS[kind][2], max_positions=16), rows(kind, 1)
    for max_length, message in (
        (12, "max_length is 12; the encoders of .* cut"),
        (64, "the model 16 positions"),
    ):
        room = min(max_length, 16) - length(row._replace(prompt_ids=[]))
        fits, long = (row._replace(prompt_ids=[7] * n) for n in (room, room + 1))
        make(kind, model, [fits], max_length=max_length)
        with pytest.raises(
            ValueError, match=f"^example 1 has {min(max_length, 16) + 1} tokens, {message}"
        ):
            make(kind, model, [fits, long], max_length=max_length)


def test_a_reward_model_is_what_learns_rewards():
    with pytest.raises(
        TypeError, match="reward trains a model of type RewardModel, got Transformer"
    ):
        make("reward", tiny())


# ---- accumulation and metrics


@kinds
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_micro_batches_add_up_to_the_batch(kind, precision):
    """Row 16: 1x8, 2x4, 8x1 and an uneven split, lengths unequal."""
    model_type = KINDS[kind][2]
    others = dict(reference=tiny(seed=1)) if kind == "dpo" else {}
    results = [
        accumulated(
            make(kind, tiny(model_type), micro_batch_size=size, precision=precision, others=others),
            rows(kind),
        )
        for size in (None, 1, 2, 4, 3)
    ]
    for result in results[1:]:
        if precision == "float32":
            assert_close(result, results[0], rtol=1e-5, atol=1e-6)
        else:
            got, want = (
                torch.cat([gradient.flatten() for gradient in r[2]]) for r in (result, results[0])
            )
            assert (
                result[0] == pytest.approx(results[0][0], rel=0.01)
                and (got - want).norm() < 0.01 * want.norm()
            )


POSITIONS = {
    "rotary": {},
    "learned": dict(positions="learned", norm="layernorm", tie_embeddings=False),
    "sliding window": dict(sliding_window=4, num_kv_heads=1),
}


def row_by_row(kind, trainer, batch):
    """Loss and gradients of every sequence in a row of its own, by the definitions."""
    model, terms = trainer.model, []

    def logps(model, prompt, completion):
        log_p = model(torch.tensor([prompt + completion]))[0].log_softmax(-1)
        return torch.stack(
            [log_p[k - 1, (prompt + completion)[k]] for k in range(max(len(prompt), 1), len(log_p))]
        )

    def score(ids):
        return model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]

    for row in batch:
        if kind == "sft":
            mask = torch.tensor(row.completion_mask or [True] * len(row.completion_ids))[
                not row.prompt_ids :
            ]
            terms += -logps(model, row.prompt_ids, row.completion_ids)[mask]
            continue
        if kind == "dpo":
            policy, reference = (
                [logps(m, row[0], x).sum() for x in row[1:3]]
                for m in (model, trainer.reference.model)
            )
            margin = trainer.config.beta * (
                (policy[0] - reference[0].detach()) - (policy[1] - reference[1].detach())
            )
        else:
            margin = score(row[0] + row[1]) - score(row[0] + row[2])
        terms.append(torch.nn.functional.softplus(-margin))
    loss = torch.stack(terms).mean()
    return loss.item(), list(torch.autograd.grad(loss, trainer.trained_parameters()))


@kinds
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_rows_that_share_a_prompt_or_are_packed_give_the_loss_and_gradients_of_rows_apart(
    kind, positions, micro_batch_size
):
    """Row 30; also an empty prompt, a completion of which not all counts, a row longer than the model's positions."""
    model_type = KINDS[kind][2]
    batch = rows(kind, 9)
    if kind == "sft":
        batch += [Example([], [4, 5, 2]), Example([3], [7, 8, 2], [False, True, True])]
    else:
        batch += [Pair([], [4, 5, 2], [6, 2]), Pair([7] * 10, [5] * 20, [6] * 15)]
    others = dict(reference=tiny(seed=1, **POSITIONS[positions])) if kind == "dpo" else {}
    options = dict(
        others=others,
        micro_batch_size=micro_batch_size,
        **(dict(beta=0.5) if kind == "dpo" else {}),
    )
    for packing in [dict(packing=True), dict(packing=False)] if kind == "sft" else [{}]:
        trainer = make(kind, tiny(model_type, **POSITIONS[positions]), **options, **packing)
        loss, metrics, gradients = accumulated(trainer, batch)
        want, want_gradients = row_by_row(kind, trainer, batch)
        assert loss == pytest.approx(want, abs=1e-6) and metrics["loss"] == pytest.approx(
            want, abs=1e-6
        )
        assert_close(gradients, want_gradients, rtol=1e-4, atol=1e-6)


def spy(module, seen):
    """Append the shape of what the module gets."""
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))


def test_packing_leaves_less_padding():
    plain, packed = [], []
    for packing, seen in ((False, plain), (True, packed)):
        trainer = make("sft", packing=packing, max_length=16)
        spy(trainer.model.trunk, seen)
        trainer.step(rows("sft"))
    assert plain[0][0] == 8 and packed[0].numel() < 0.8 * plain[0].numel() and packed[0][1] <= 16


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_the_prompt_of_a_pair_is_computed_once(kind):
    """In the reference too."""
    trainer, seen, batch = (
        make(kind),
        [],
        [pair._replace(prompt_ids=[7] * 12) for pair in rows(kind)],
    )
    for model in (trainer.model, trainer.reference.model if kind == "dpo" else trainer.model):
        spy(model.trunk, seen)
    trainer.step(batch)
    assert len(seen) == 2 and len(set(seen)) == 1
    assert seen[0].numel() < 0.8 * sum(len(p) + len(c) + len(p) + len(r) for p, c, r, *_ in batch)


REGULARIZED = ("sft", dict(label_smoothing=0.1, z_coef=0.01))


@pytest.mark.parametrize("kind, options", [*((kind, {}) for kind in KINDS), REGULARIZED])
def test_no_step_holds_the_logits_of_all_targets(kind, options, monkeypatch):
    """Nor of half of them: the largest tensor of a step is smaller."""
    monkeypatch.setattr(linear_logprobs_blocks, "CPU_WHOLE", 30 * 9000)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(
                    x, torch.Tensor
                ):  # by what it takes: a view of one number may look like logits
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return out

    vocab_size, batch = 9000, rows(kind, 32)
    trainer = make(kind, tiny(KINDS[kind][2], vocab_size=vocab_size), **options)
    targets = sum(
        len(completion) for row in batch for completion in row[1 : 2 if kind == "sft" else 3]
    )
    with Largest() as largest:
        trainer.step(batch)
    assert 16 * vocab_size <= largest.numel < targets * vocab_size / 2


@pytest.mark.parametrize("kind, options", [("sft", {}), ("dpo", {}), REGULARIZED])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_logits_are_computed_once_a_step(kind, options, micro_batch_size, monkeypatch):
    """The loss that the head is told of beforehand is the one that comes: nothing is left for backward to compute."""
    trainer = make(
        kind,
        micro_batch_size=micro_batch_size,
        **({"packing": True} if kind == "sft" else {}),
        **options,
    )
    monkeypatch.setattr(
        linear_logprobs_blocks, "backward", lambda *args: pytest.fail("computed again")
    )
    trainer.step(rows(kind))


def test_sft_metrics_are_those_of_the_rows_one_by_one():
    trainer, batch = make("sft"), rows("sft")
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


def test_num_tokens_counts_only_what_is_in_the_loss():
    """A first token without anything before it is no target."""
    assert make("sft").step([Example([], [4, 5, 2]), Example([3], [2])])["num_tokens"] == 3


def test_reward_metrics_are_those_of_the_pairs_one_by_one():
    trainer, batch = make("reward"), rows("reward")
    total, metrics, _ = accumulated(trainer, batch)

    def score(ids):
        return trainer.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)).item()

    scores = torch.tensor([[score(p + c), score(p + r)] for p, c, r, *_ in batch])
    margin = scores[:, 0] - scores[:, 1]
    want = dict(
        accuracy=(margin > 0).float().mean(), margin=margin.mean(), mean_reward=scores.mean(),
        loss=torch.nn.functional.softplus(-margin).mean(),
    )  # fmt: skip
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value.item(), abs=1e-5), name
    assert total == pytest.approx(metrics["loss"], abs=1e-6)


# Each loss with what it needs, and the definition from the scores and the pair's margin.
REWARD_LOSSES = {
    "bradley-terry": ({}, lambda c, r, margin: softplus(r - c + (margin or 0))),
    "smoothed": (
        dict(label_smoothing=0.2),
        lambda c, r, margin: (
            0.8 * softplus(r - c + (margin or 0)) + 0.2 * softplus(c - r - (margin or 0))
        ),
    ),
    "hinge": (
        dict(loss="margin_ranking"),
        lambda c, r, m: (r - c + (1 if m is None else m)).clamp_min(0),
    ),
    "centred": (
        dict(centering_coef=0.3),
        lambda c, r, margin: softplus(r - c + (margin or 0)) + 0.3 * (c + r) ** 2,
    ),
}


def scored(model, ids):
    return model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_every_reward_loss_of_pairs_is_its_definition(name, margins):
    options, definition = REWARD_LOSSES[name]
    batch = [
        p._replace(margin=i / 2 if margins and i % 3 else None)
        for i, p in enumerate(rows("reward"))
    ]
    trainer = make("reward", micro_batch_size=3, **options)
    terms = [
        definition(*(scored(trainer.model, p.prompt_ids + x) for x in p[1:3]), p.margin)
        for p in batch
    ]
    want = torch.stack(terms).mean()
    total, metrics, got = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=5e-6) and metrics["loss"] == pytest.approx(
        total, rel=1e-6
    )
    assert_close(
        got, list(torch.autograd.grad(want, trainer.trained_parameters())), rtol=1e-4, atol=2e-6
    )


def lists(n=8, seed=0, sizes=(2, 5)):
    """The more often a completion holds a 5, the better it is."""
    rng = random.Random(seed)
    stuff = [
        [[5] * (4 - i) + [6] * i + [2] for i in range(rng.randrange(*sizes))] for _ in range(n)
    ]
    return [Ranked([rng.randrange(7, 12)], completions) for completions in stuff]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_ranked_lists_are_learned_by_each_item_against_all_behind_it(micro_batch_size):
    batch = lists()
    trainer, terms, correct = (
        make("reward", examples=batch, micro_batch_size=micro_batch_size),
        [],
        [],
    )
    for prompt, completions in batch:
        scores = torch.stack([scored(trainer.model, prompt + ids) for ids in completions])
        terms.append(-sum(scores[i:].log_softmax(0)[0] for i in range(len(scores))))
        correct += [float(a > b) for i, a in enumerate(scores) for b in scores[i + 1 :]]
    want = torch.stack(terms).mean()
    total, metrics, got = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=5e-6)
    assert metrics["accuracy"] == pytest.approx(sum(correct) / len(correct))
    assert_close(
        got, list(torch.autograd.grad(want, trainer.trained_parameters())), rtol=1e-4, atol=2e-6
    )


def test_ranked_lists_of_two_are_pairs():
    pairs = rows("reward")
    twos = [Ranked(p, [c, r]) for p, c, r, *_ in pairs]
    got, want = accumulated(make("reward", examples=twos), twos), accumulated(make("reward"), pairs)
    assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_ranked_list_is_one_forward_and_its_prompt_is_computed_once():
    batch, seen = [Ranked([7] * 12, [[5, 2], [6, 2], [8, 2]])] * 2, []
    trainer = make("reward", examples=batch)
    spy(trainer.model.trunk, seen)
    trainer.step(batch)
    assert seen == [(2, 18)]


def test_a_reward_model_learns_ranked_lists():
    others = dict(eval_examples=lists(16, seed=1))
    history = make("reward", examples=lists(64), epochs=4, lr=1e-2, others=others).train()
    assert history[-1]["eval_accuracy"] > 0.9


@pytest.mark.parametrize("examples", [rows("reward", 12), lists(12)], ids=["pairs", "lists"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_scores_are_normalised_on_the_training_data_and_stay_so_in_the_folder(
    examples, adapters, tmp_path
):
    """To mean 0 and standard deviation 1; what comes after, evaluation too, scores alike."""
    model, out = tiny(RewardModel), tmp_path / "run"
    if adapters:
        model.save_pretrained(tmp_path / "base")
        add_adapters(model, LoRAConfig(rank=2, base=str(tmp_path / "base")))
    trainer = make("reward", model, examples, dict(out=out), lr=1e-2, batch_size=5)
    last = trainer.train()[-1]
    sequences = [
        row[0] + ids
        for row in examples
        for ids in (row.completions_ids if isinstance(row, Ranked) else row[1:3])
    ]
    for scorer in (model, RewardModel.from_pretrained(out)):
        scores = torch.cat([scored(scorer, ids)[None] for ids in sequences]).double()
        assert_close(scores.mean().item(), 0.0, rtol=0, atol=1e-6)
        assert_close(scores.std(correction=0).item(), 1.0, rtol=0, atol=1e-6)
    model.normalize(
        -last["score_mean"] / last["score_std"], 1 / last["score_std"]
    )  # back to what was trained
    scores = torch.cat([scored(model, ids)[None] for ids in sequences])
    assert_close(scores.mean().item(), last["score_mean"], rtol=0, atol=1e-5)
    assert last["score_std"] != pytest.approx(1, abs=0.01)


def test_scores_are_normalised_without_dropout():
    examples = rows("reward")
    trainer = make("reward", tiny(RewardModel, dropout=0.3), examples, dropout=True)
    trainer.train()
    trainer.model.eval()
    scores = torch.cat(
        [scored(trainer.model, p.prompt_ids + ids)[None] for p in examples for ids in p[1:3]]
    )
    assert_close(scores.mean().item(), 0.0, rtol=0, atol=1e-6)


def test_a_normalised_reward_model_goes_on_as_critic_and_trains_again(tmp_path):
    model = tiny(RewardModel)
    model.normalize(0.3, 2.0)
    model.normalize(-1.0, 0.5)  # once more, on top
    critic, ids = (
        ValueModel.from_model(model),
        (torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.bool)),
    )
    want = (scored(tiny(RewardModel), [7, 8, 9]) - 0.3) / 2 * 2 + 2
    assert_close(scored(model, [7, 8, 9]), want)
    assert_close(critic(*ids)[0, -1], want)
    critic.save_pretrained(tmp_path)
    assert_close(ValueModel.from_pretrained(tmp_path)(*ids), critic(*ids), rtol=0, atol=0)
    make("reward", model).train()
    assert "score.bias" in snapshot(model)


def test_scores_that_are_alike_up_to_rounding_are_only_centred():
    model = tiny(RewardModel)
    model.normalize(-100.0, 1.0)  # a bias of 100, beside which the head's own part rounds
    model.score.weight.data.fill_(1e-6)
    last = make("reward", model, [Pair([7], [5, 2], [6, 2])] * 2, lr=1e-30).train()[-1]
    assert last["score_std"] == 0 and last["score_mean"] == pytest.approx(100)
    assert abs(scored(model, [7, 5, 2])) < 1e-4 and "length_correlation" not in last


def test_length_bias_is_told_of_what_was_held_out():
    """A score that is the length of the completion: every shorter one loses."""
    pairs = [
        Pair([7], [5, 5, 2], [6, 2]),
        Pair([7], [5, 2], [6, 6, 6, 2]),
        Pair([7], [5, 2], [6, 2]),
    ]
    ranked = [Ranked([7], [[5, 2], [6, 6, 2], [2]])]
    assert length_bias(pairs, torch.tensor([3.0, 2, 2, 4, 2, 2])) == {
        "length_correlation": pytest.approx(1), "accuracy_where_shorter_won": 0
    }  # fmt: skip
    assert length_bias(pairs, torch.tensor([0.0, 0, 1, 0, 0, 0]))["accuracy_where_shorter_won"] == 1
    assert length_bias(ranked, torch.tensor([2.0, 3, 1]))["accuracy_where_shorter_won"] == 0
    assert length_bias(pairs[2:], torch.tensor([0.0, 1])) == {}
    trainer = make("reward", others=dict(eval_examples=pairs[:1]))
    assert "accuracy_where_shorter_won" not in trainer.train()[-1]
    assert (
        "accuracy_where_shorter_won" in make("reward", others=dict(eval_examples=pairs)).train()[-1]
    )


@pytest.mark.parametrize(
    "options, examples, message",
    [
        (
            dict(loss="hinge"),
            None,
            "loss must be one of bradley_terry, margin_ranking, got 'hinge'",
        ),
        (dict(label_smoothing=0.5), None, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (dict(centering_coef=-1), None, "centering_coef must be at least 0, got -1"),
        (
            dict(loss="margin_ranking", label_smoothing=0.1),
            None,
            "no effect on loss 'margin_ranking', got 0.1",
        ),
        (
            dict(loss="margin_ranking"),
            lists(2),
            "loss has no effect on ranked lists, got 'margin_ranking'",
        ),
        (
            dict(label_smoothing=0.1),
            lists(2),
            "label_smoothing has no effect on ranked lists, got 0.1",
        ),
        (
            dict(centering_coef=0.1),
            lists(2),
            "centering_coef has no effect on ranked lists, got 0.1",
        ),
        ({}, [*lists(2), *rows("reward")], "there are pairs and ranked lists"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_reward_option_out_of_range_or_without_effect_is_refused(options, examples, message):
    with pytest.raises(ValueError, match=message):
        make("reward", examples=examples, **options)


def test_tokens_of_a_pair_that_do_not_count_are_context_alone():
    """As in conversations of several turns: what the user says between the assistant's turns."""
    pair, mask = (
        Pair([7, 8], [9, 10, 5, 2], [6, 2], None, [[True, False, False, True], None]),
        [1.0, 0, 0, 1.0],
    )
    reference = tiny(seed=1)
    trainer = make("dpo", examples=[pair], others=dict(reference=reference), beta=0.3)

    def logp(model, ids, weights):
        log_p = model(torch.tensor([pair.prompt_ids + ids]))[0, 1:-1].log_softmax(-1)
        return log_p[torch.arange(len(ids)), ids] @ torch.tensor(weights)

    ratios = [
        logp(trainer.model, ids, weights) - logp(reference, ids, weights).detach()
        for ids, weights in ((pair.chosen_ids, mask), (pair.rejected_ids, [1.0, 1.0]))
    ]
    want = softplus(-0.3 * (ratios[0] - ratios[1]))
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    loss, _, got = accumulated(trainer, [pair])
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert_close(got, list(gradients), rtol=1e-4, atol=1e-6)


def test_metrics_weigh_values_not_micro_batches_and_those_of_nothing_are_left_out():
    metrics = Metrics()
    metrics.add("a", torch.tensor([1.0, 2.0, 3.0]))
    metrics.add("a", torch.tensor([10.0, NAN]), torch.tensor([True, False]))
    metrics.add("none", torch.tensor([NAN]), torch.tensor([False]))
    assert metrics.means() == {"a": 4.0}


# ---- precision, checkpointing, frozen layers


@kinds
def test_in_bfloat16_products_are_rounded_and_weights_gradients_and_moments_are_not(kind):
    dtypes = {}
    for precision in ("float32", "bfloat16"):
        trainer = make(kind, precision=precision)
        seen = dtypes[precision] = {}
        block = trainer.model.trunk.blocks[0]
        for name, module in (("qkv", block.attn.qkv), ("up", block.mlp.up), ("block", block)):
            module.register_forward_hook(
                lambda m, i, out, name=name, seen=seen: seen.update({name: out.dtype})
            )
        loss, _, gradients = accumulated(trainer, rows(kind))
        trainer.step(rows(kind))
        state = [
            x for s in trainer.optimizer.state.values() for x in (s["exp_avg"], s["exp_avg_sq"])
        ]
        assert all(
            x.dtype == torch.float32 for x in [*gradients, *state, *trainer.trained_parameters()]
        )
        dtypes[precision]["loss"], dtypes[precision]["gradient"] = (
            loss,
            torch.cat([g.flatten() for g in gradients]),
        )
    half, full = dtypes["bfloat16"], dtypes["float32"]
    assert (
        half["qkv"] == half["up"] == torch.bfloat16
        and half["block"] == full["qkv"] == torch.float32
    )
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02) and (
        kind == "dpo" or half["loss"] != full["loss"]
    )
    assert (half["gradient"] - full["gradient"]).norm() < 0.05 * full["gradient"].norm()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_in_bfloat16_logprobs_have_more_digits_than_bfloat16(kind, monkeypatch):
    name = {"sft": "linear_token_statistics", "dpo": "linear_token_logprobs_and_entropy"}[kind]
    op, seen = getattr(given, name), []
    monkeypatch.setattr(
        given, name, lambda *args, **known: seen.append(op(*args)[0]) or op(*args, **known)
    )
    make(kind, precision="bfloat16").step(rows(kind))
    assert seen
    for logprobs in seen:
        assert logprobs.dtype == torch.float32 and (logprobs != logprobs.bfloat16().float()).any()


def test_in_bfloat16_adapters_learn_beside_a_reference_that_shares_their_weights():
    """By the gradients that they get in float32."""
    gradients = []
    for precision in ("float32", "bfloat16"):
        policy = tiny()
        add_adapters(policy, LoRAConfig(rank=2))
        trainer = make("dpo", policy, precision=precision)
        assert trainer.reference.model is policy
        gradients.append(
            torch.cat([gradient.flatten() for gradient in accumulated(trainer, rows("dpo"))[2]])
        )
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_in_bfloat16_scores_have_more_digits_than_bfloat16():
    trainer, seen = make("reward", precision="bfloat16"), []
    trainer.model.score.register_forward_hook(lambda module, inputs, out: seen.append(out))
    trainer.step(rows("reward"))
    assert seen[0].dtype == torch.float32 and (seen[0] != seen[0].bfloat16().float()).any()


@kinds
@pytest.mark.parametrize("options", [{}, dict(dropout=0.3)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_changes_no_bit_of_loss_and_gradients_and_keeps_less(
    kind, options, precision
):
    results, kept = [], []

    def keep(x):
        kept[-1] += x.numel()
        return x

    for checkpointing in (False, True):
        model = tiny(KINDS[kind][2], **options)
        settings = dict(
            activation_checkpointing=checkpointing, precision=precision, dropout=bool(options)
        )
        trainer = make(kind, model, **settings)
        torch.manual_seed(0)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            results.append(accumulated(trainer, rows(kind)))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert kept[1] < kept[0]


@kinds
@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_frozen_layers_stay_as_they_are_and_the_others_move(kind, positions, layers):
    """Row 32."""
    trainer = make(
        kind, tiny(KINDS[kind][2], **POSITIONS[positions]), freeze_layers=layers, weight_decay=0.1
    )
    before = snapshot(trainer.model)
    trainer.step(rows(kind))
    lowest = ["embed.", "position.", *(f"blocks.{i}." for i in range(layers))] if layers else []
    for name, weight in snapshot(trainer.model).items():
        assert torch.equal(weight, before[name]) == name.startswith(
            tuple(f"trunk.{low}" for low in lowest)
        ), name


@kinds
def test_more_frozen_layers_than_there_are_is_an_error(kind):
    with pytest.raises(ValueError, match="freeze_layers is 3, the model has 2 blocks"):
        make(kind, freeze_layers=3)


@kinds
def test_an_example_longer_than_the_model_is_named_before_training(kind):
    long = Example([7] * 30, [5, 5, 2]) if kind == "sft" else Pair([7] * 30, [5], [6, 5, 2])
    with pytest.raises(ValueError, match=r"^example 8 has 33 tokens, the model 32 positions"):
        make(kind, examples=[*rows(kind), long])
    with pytest.raises(ValueError, match=r"^evaluation example 0 has 33 tokens"):
        make(kind, others=dict(eval_examples=[long]))


def test_a_given_reference_is_used_as_it_is_but_without_its_dropout():
    policy, reference = tiny(dropout=0.3), tiny(dropout=0.3).train()
    trainer = make("dpo", policy, others=dict(reference=reference))
    assert trainer.reference.model is reference
    assert trainer.step(rows("dpo"))["rewards/margins"] == 0 and reference.training
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        make("dpo", policy, others=dict(reference=policy))


# ---- what moves


@kinds
def test_training_moves_what_it_trains_and_nothing_else(kind):
    """Row 32."""
    trainer = make(kind)
    frozen = trainer.model.trunk.blocks[0].requires_grad_(False)
    trainer = make(kind, trainer.model)
    reference = trainer.reference.model if kind == "dpo" else frozen
    before, reference_before = snapshot(trainer.model), snapshot(reference)
    trainer.step(rows(kind))
    for name, weight in snapshot(trainer.model).items():
        assert torch.equal(weight, before[name]) == name.startswith("trunk.blocks.0."), name
    assert_close(snapshot(reference), reference_before, rtol=0, atol=0)


@kinds
def test_a_gradient_that_is_no_number_leaves_every_weight_as_it_was(kind):
    trainer = make(kind)
    hook = trainer.model.trunk.norm.weight.register_hook(lambda gradient: gradient * NAN)
    before = snapshot(trainer.model)
    with pytest.raises(
        FloatingPointError, match="step 1: the gradient's norm is nan; nothing updated"
    ):
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
        assert result == pytest.approx(
            {f"eval_{name}": value for name, value in want.items()}, abs=1e-5
        )


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
    history = make(
        "reward", examples=rows("reward", 128), epochs=4, lr=1e-2, batch_size=16, others=others
    ).train()
    assert history[-1]["eval_accuracy"] > 0.9 and history[-1]["eval_margin"] > 1


def test_dpo_learns_which_token_is_preferred():
    others = dict(eval_examples=rows("dpo", 64, seed=1))
    history = make(
        "dpo", examples=rows("dpo", 64), epochs=4, lr=3e-3, batch_size=16, others=others
    ).train()
    assert history[0]["rewards/margins"] == 0
    assert (
        history[-1]["eval_rewards/accuracies"] > 0.9 and history[-1]["eval_rewards/margins"] > 0.1
    )


# ---- the loop


@kinds
def test_the_same_seed_gives_the_same_numbers_and_another_others(kind):
    runs = [make(kind, batch_size=3, epochs=2, seed=seed).train() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_every_epoch_sees_every_example_once_in_another_order():
    examples = rows("sft", 10)
    trainer = make("sft", examples=examples, batch_size=4, epochs=2)
    batches = [[examples.index(example) for example in batch] for batch in trainer.batches()]
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
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == history and [line["step"] for line in lines] == [1, 2, 3]
    assert set(NAMES[kind].split()) | {"grad_norm", "lr"} <= set(lines[0])
    assert {f"eval_{name}" for name in NAMES[kind].split() if name != "num_tokens"} <= set(
        lines[-1]
    )
    run = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert (
        run["algorithm"] == kind
        and run["batch_size"] == 3
        and run["versions"]["torch"] == torch.__version__
    )
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
        (dict(micro_batch_size=0), "micro_batch_size must be > 0, got 0"),
        (dict(max_steps=0), "max_steps must be > 0"),
        (dict(epochs=-1), "epochs must be > 0"),
        (dict(max_grad_norm=0), "max_grad_norm must be > 0"),
        (dict(lr=NAN), "lr must be > 0, got nan"),
        (dict(lr_schedule="cosine"), "lr_schedule must be one of linear, constant, got 'cosine'"),
        (dict(precision="float16"), "precision must be one of float32, bfloat16, got 'float16'"),
        (dict(freeze_layers=-1), "freeze_layers must be at least 0, got -1"),
    ],
    ids=str,
)
def test_a_config_out_of_range_is_refused(config_type, options, message):
    with pytest.raises(ValueError, match=message):
        config_type(**options)


def test_examples_must_be_there():
    with pytest.raises(ValueError, match="no examples to train on"):
        make("sft", examples=[])


def test_dpo_on_adapters_holds_its_weights_once_and_starts_at_log_two(monkeypatch):
    """Rows 27, 28: the reference is the policy without its adapters, and no copy is made."""
    model = tiny()
    add_adapters(model, LoRAConfig())
    before = snapshot(model)
    monkeypatch.setattr(
        copy, "deepcopy", lambda x, memo=None: pytest.fail(f"a copy of {type(x).__name__}")
    )
    trainer = make("dpo", model, lr=1e-2, micro_batch_size=3)
    assert trainer.reference.model is model
    assert trainer.step(rows("dpo"))["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert trainer.step(rows("dpo"))["loss"] < math.log(2) - 1e-3
    moved = {
        name for name, weight in snapshot(model).items() if not torch.equal(weight, before[name])
    }
    assert moved == {name for name in before if "lora_" in name}


def test_dropout_of_models_that_have_none_is_refused():
    with pytest.raises(ValueError, match="dropout has no effect: no model's config has any"):
        make("sft", dropout=True)


def test_whole_texts_of_examples_of_another_kind_are_refused_like_all():
    pair = Pair([5], [6], [7])
    with pytest.raises(ValueError, match="example 0 is of type Pair, sft takes Example"):
        SFTTrainer(tiny(), [pair], SFTConfig(whole_text=True))
    with pytest.raises(ValueError, match="example 1 has no completion"):
        RewardTrainer(tiny(RewardModel), [Ranked([5], [[6], [7]]), Ranked([5], [])], RewardConfig())
