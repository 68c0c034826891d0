"""Reward models of pairs, ranked lists and steps, also those that start from reward models."""

import functools
import json
import random

import pytest
import torch
from helpers import (
    accumulated,
    input_shapes,
    make_trainer,
    pairs_biased_to_length,
    rows,
    snapshot,
    softplus,
    tiny,
)
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from rlhf_core import cli
from rlhf_core.data import (
    ByteTokenizer,
    DataError,
    Pair,
    Ranked,
    Solution,
    Steps,
    encode_preference,
    load_tokenizer,
    read_comparisons,
    step_ends,
)
from rlhf_core.data.quality import length_bias
from rlhf_core.losses import process_reward_loss
from rlhf_core.models import RewardModel, Transformer, ValueModel
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.trainers import RewardConfig, RewardTrainer

# ---- pairs


def test_reward_metrics_are_those_of_the_pairs_one_by_one():
    trainer, batch = make_trainer("reward"), rows("reward")
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
def test_every_loss_of_pairs_is_its_definition(name, margins):
    options, definition = REWARD_LOSSES[name]
    batch = [
        p._replace(margin=i / 2 if margins and i % 3 else None)
        for i, p in enumerate(rows("reward"))
    ]
    trainer = make_trainer("reward", micro_batch_size=3, **options)
    terms = [
        definition(*(scored(trainer.model, p.prompt_ids + x) for x in p[1:3]), p.margin)
        for p in batch
    ]
    want = torch.stack(terms).mean()
    total, metrics, got = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=5e-6, abs=1e-6) and metrics[
        "loss"
    ] == pytest.approx(total, rel=1e-6)
    assert_close(
        got, list(torch.autograd.grad(want, trainer.trained_parameters())), rtol=1e-4, atol=2e-6
    )


def test_a_pair_uses_its_own_label_smoothing_and_others_the_configs():
    own = [0.3, None, 0.0, 0.45, None, 0.1, 0.25, None]
    batch = [
        pair._replace(label_smoothing=s, margin=0.5 if s else None)
        for pair, s in zip(rows("reward"), own)
    ]
    trainer = make_trainer("reward", examples=batch, label_smoothing=0.2, micro_batch_size=3)
    terms = []
    for pair, s in zip(batch, own):
        chosen, rejected = (scored(trainer.model, pair.prompt_ids + x) for x in pair[1:3])
        gap, s = (chosen - rejected).double() - (pair.margin or 0), 0.2 if s is None else s
        terms.append((1 - s) * softplus(-gap) + s * softplus(gap))
    total, metrics, _ = accumulated(trainer, batch)
    assert total == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6) == metrics["loss"]


@pytest.mark.parametrize("loss", ["bradley_terry", "margin_ranking"])
def test_each_token_of_a_pair_explains_a_part_of_its_margin(loss):
    """length_alpha, from separate rows; metrics and the centering term are of the scores alone."""
    batch = rows("reward")
    options = dict(loss=loss, length_alpha=0.3, centering_coef=0.05)
    trainer = make_trainer("reward", **options)
    terms, margins = [], []
    for prompt, *completions, _, _, _, _ in batch:
        chosen, rejected = (scored(trainer.model, prompt + ids) for ids in completions)
        margin = chosen - rejected + 0.3 * (len(completions[0]) - len(completions[1]))
        term = softplus(-margin) if loss == "bradley_terry" else (1 - margin).clamp_min(0)
        terms.append(term + 0.05 * (chosen + rejected) ** 2)
        margins.append((chosen - rejected).item())
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    total, metrics, found = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=1e-5)
    assert metrics["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert_close(found, list(gradients), rtol=1e-4, atol=2e-6)


def test_each_token_of_a_ranked_list_explains_a_part_of_its_score():
    pairs = rows("reward")
    ranked = [Ranked(pair.prompt_ids, pair.completions_ids) for pair in pairs]
    totals = [
        accumulated(make_trainer("reward", examples=x, length_alpha=0.3), x)[0]
        for x in (pairs, ranked)
    ]
    plain = accumulated(make_trainer("reward"), pairs)[0]
    assert totals[0] == pytest.approx(totals[1], rel=1e-6) and abs(totals[0] - plain) > 1e-3


@pytest.mark.slow
def test_a_planted_length_bias_stays_out_of_the_scores():
    """The labels like a 5, and length. With length_alpha the scores follow the 5 alone."""
    pairs, held_out = pairs_biased_to_length(800), pairs_biased_to_length(200, seed=1)
    equal = [Pair([4], [5, 7, 8, 2], [6, 7, 8, 2]), Pair([4], [5, 9, 2], [6, 10, 9, 7, 11, 8, 2])]
    found = []
    for alpha in (0.0, 0.4):
        trainer = make_trainer(
            "reward", None, pairs, dict(eval_examples=held_out), batch_size=40, epochs=6,
            lr=3e-3, length_alpha=alpha,
        )  # fmt: skip
        last = trainer.train()[-1]
        short, long = trainer.scores_of(equal).view(2, 2).tolist()
        found.append((last["length_correlation"], long[0] - long[1]))
        assert short[0] > short[1] + 0.5  # of equal length: both learn the 5
    (biased, wrong), (debiased, right) = found
    assert biased > 0.5 and abs(debiased) < 0.25
    assert right > wrong + 0.5  # a good answer, against a bad one that is longer


def test_a_label_smoothing_that_the_loss_does_not_use_gives_a_warning():
    batch = [pair._replace(label_smoothing=0.1) for pair in rows("reward")]
    with pytest.warns(UserWarning, match="has no effect on loss 'margin_ranking'"):
        make_trainer("reward", examples=batch, loss="margin_ranking")


def test_a_reward_model_learns_which_token_is_preferred():
    others = dict(eval_examples=rows("reward", 64, seed=1))
    history = make_trainer(
        "reward", examples=rows("reward", 128), epochs=4, lr=1e-2, batch_size=16, others=others
    ).train()
    assert history[-1]["eval_accuracy"] > 0.9 and history[-1]["eval_margin"] > 1


def test_in_bfloat16_scores_have_more_digits_than_bfloat16():
    trainer, seen = make_trainer("reward", precision="bfloat16"), []
    trainer.model.score.register_forward_hook(lambda module, inputs, out: seen.append(out))
    trainer.step(rows("reward"))
    assert seen[0].dtype == torch.float32 and (seen[0] != seen[0].bfloat16().float()).any()


# ---- ranked lists


def lists(n=8, seed=0, sizes=(2, 5)):
    """The more often a completion holds a 5, the better it is."""
    rng = random.Random(seed)
    stuff = [
        [[5] * (4 - i) + [6] * i + [2] for i in range(rng.randrange(*sizes))] for _ in range(n)
    ]
    return [Ranked([rng.randrange(7, 12)], completions) for completions in stuff]


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_the_loss_of_a_ranked_list_compares_each_item_with_all_below_it(micro_batch_size):
    batch = lists()
    trainer, terms, correct = (
        make_trainer("reward", examples=batch, micro_batch_size=micro_batch_size),
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
    got, want = (
        accumulated(make_trainer("reward", examples=twos), twos),
        accumulated(make_trainer("reward"), pairs),
    )
    assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_ranked_list_takes_one_forward_and_its_prompt_is_computed_once():
    batch = [Ranked([7] * 12, [[5, 2], [6, 2], [8, 2]])] * 2
    trainer = make_trainer("reward", examples=batch)
    shapes = input_shapes(trainer.model.trunk)
    trainer.step(batch)
    assert shapes == [(2, 18)]


def test_a_reward_model_learns_ranked_lists():
    others = dict(eval_examples=lists(16, seed=1))
    history = make_trainer("reward", examples=lists(64), epochs=4, lr=1e-2, others=others).train()
    assert history[-1]["eval_accuracy"] > 0.9


# ---- after the last step


@pytest.mark.parametrize("examples", [rows("reward", 12), lists(12)], ids=["pairs", "lists"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_scores_are_normalized_over_the_training_data_also_in_the_saved_model(
    examples, adapters, tmp_path
):
    """To mean 0 and standard deviation 1; the saved model scores the same."""
    model, out = tiny(RewardModel), tmp_path / "run"
    if adapters:
        model.save_pretrained(tmp_path / "base")
        add_adapters(model, LoRAConfig(rank=2, base=str(tmp_path / "base")))
    trainer = make_trainer("reward", model, examples, dict(out=out), lr=1e-2, batch_size=5)
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
    # Back to the scores that were trained.
    model.normalize(-last["score_mean"] / last["score_std"], 1 / last["score_std"])
    scores = torch.cat([scored(model, ids)[None] for ids in sequences])
    assert_close(scores.mean().item(), last["score_mean"], rtol=0, atol=1e-5)
    assert last["score_std"] != pytest.approx(1, abs=0.01)


def test_scores_are_normalized_without_dropout():
    examples = rows("reward")
    trainer = make_trainer("reward", tiny(RewardModel, dropout=0.3), examples, dropout=True)
    trainer.train()
    trainer.model.eval()
    scores = torch.cat(
        [scored(trainer.model, p.prompt_ids + ids)[None] for p in examples for ids in p[1:3]]
    )
    assert_close(scores.mean().item(), 0.0, rtol=0, atol=1e-6)


def test_a_normalized_reward_model_becomes_a_critic_and_trains_again(tmp_path):
    model = tiny(RewardModel)
    model.normalize(0.3, 2.0)
    model.normalize(-1.0, 0.5)  # once more, on top
    critic = ValueModel.from_model(model)
    ids = torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.bool)
    want = (scored(tiny(RewardModel), [7, 8, 9]) - 0.3) / 2 * 2 + 2
    assert_close(scored(model, [7, 8, 9]), want)
    assert_close(critic(*ids)[0, -1], want)
    critic.save_pretrained(tmp_path)
    assert_close(ValueModel.from_pretrained(tmp_path)(*ids), critic(*ids), rtol=0, atol=0)
    make_trainer("reward", model).train()
    assert "score.bias" in snapshot(model)


def test_scores_equal_up_to_rounding_are_only_centred():
    model = tiny(RewardModel)
    model.normalize(-100.0, 1.0)  # a bias of 100, beside which the head's own part rounds
    model.score.weight.data.fill_(1e-6)
    last = make_trainer("reward", model, [Pair([7], [5, 2], [6, 2])] * 2, lr=1e-30).train()[-1]
    assert last["score_std"] == 0 and last["score_mean"] == pytest.approx(100)
    assert abs(scored(model, [7, 5, 2])) < 1e-4 and "length_correlation" not in last


def test_length_bias_is_that_of_the_held_out_examples():
    """The first scores equal the lengths, so every shorter completion loses."""
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
    trainer = make_trainer("reward", others=dict(eval_examples=pairs[:1]))
    assert "accuracy_where_shorter_won" not in trainer.train()[-1]
    trainer = make_trainer("reward", others=dict(eval_examples=pairs))
    assert "accuracy_where_shorter_won" in trainer.train()[-1]


# ---- several criteria


def opposed(n, seed=0, unlabelled=0):
    """A 5 is helpful and harmful, a 6 neither: the criteria prefer opposite completions."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n + unlabelled):
        prompt, good, bad = [rng.randrange(7, 12)], [5, *[8] * (i % 2), 2], [6, 8, 2]
        labels = [{"helpful": True}, {"harmless": False}, {"helpful": True, "harmless": False}]
        if i % 4 == 1:
            pairs.append(Pair(prompt, bad, good, criteria={"harmless": True}))
        else:
            pairs.append(Pair(prompt, good, bad, criteria=labels[i % 3]))
    return pairs[:n] + [pair._replace(criteria=None) for pair in pairs[n:]]


def criteria_model(seed=0, **weights):
    """A model whose heads differ."""
    model = tiny(RewardModel, seed)
    model.set_criteria(weights or {"helpful": 1.0, "harmless": 2.0})
    noise = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(3))
    model.score.weight.data += 0.2 * noise
    return model


def each_scored(model, ids):
    hidden = model.hidden_states(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    return hidden[0, -1] @ model.score.weight.T  # (K,)


@pytest.mark.parametrize("options", [{}, dict(length_alpha=0.3, label_smoothing=0.1)])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_loss_of_criteria_is_that_of_each_label_from_single_rows(micro_batch_size, options):
    """A pair counts once, however many criteria it labels; without any it trains the sum."""
    batch = [pair._replace(margin=i / 9) for i, pair in enumerate(opposed(8, unlabelled=3))]
    model, alpha = criteria_model(), options.get("length_alpha", 0)
    trainer = make_trainer("reward", model, batch, micro_batch_size=micro_batch_size, **options)
    terms, weights, smoothing = [], torch.tensor([1.0, 2.0]), options.get("label_smoothing", 0)
    for pair in batch:
        chosen, rejected = (each_scored(model, pair.prompt_ids + x) for x in pair[1:3])
        lead = alpha * (len(pair.chosen_ids) - len(pair.rejected_ids))
        gaps = []
        for i, name in enumerate(("helpful", "harmless")):
            if name in (pair.criteria or {}):
                sign = 1 if pair.criteria[name] else -1
                gaps.append(sign * (chosen[i] - rejected[i] + lead) - pair.margin)
        if pair.criteria is None:
            gaps = [weights @ chosen - weights @ rejected + lead - pair.margin]
        losses = [(1 - smoothing) * softplus(-x) + smoothing * softplus(x) for x in gaps]
        terms.append(torch.stack(losses).mean())
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    total, metrics, found = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert_close(found, list(gradients), rtol=1e-4, atol=2e-6)


def test_a_label_trains_only_the_head_of_its_criterion():
    pairs = opposed(12)
    for i, name in enumerate(("helpful", "harmless")):
        batch = [pair for pair in pairs if pair.criteria.keys() == {name}]
        trainer = make_trainer("reward", criteria_model(), pairs)
        _, metrics, gradients = accumulated(trainer, batch)
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        head = gradients[names.index("score.weight")]
        assert (head[1 - i] == 0).all() and (head[i] != 0).all()
        assert f"accuracy/{name}" in metrics and len(batch) > 2
        assert f"accuracy/{'harmless' if i == 0 else 'helpful'}" not in metrics


def test_criteria_that_oppose_each_other_are_both_learned_and_weights_choose_between_them():
    history = make_trainer(
        "reward", model := criteria_model(), opposed(128), epochs=4, lr=1e-2, batch_size=16,
        others=dict(eval_examples=opposed(64, seed=1)),
    ).train()  # fmt: skip
    last = history[-1]
    assert last["eval_accuracy/helpful"] > 0.9 and last["eval_accuracy/harmless"] > 0.9
    assert "accuracy_where_shorter_won" not in last and "length_correlation" in last
    found = []
    for weights in ({"helpful": 1, "harmless": 0}, {"helpful": 0, "harmless": 1}):
        model.set_criteria(weights)
        found.append(scored(model, [7, 5, 8, 2]) > scored(model, [7, 6, 8, 2]))
    assert found == [True, False]


def test_each_criterion_gets_mean_0_and_all_share_a_scale_that_keeps_the_ranking(tmp_path):
    pairs, model = opposed(24, unlabelled=8), criteria_model()
    last = make_trainer(
        "reward", model, pairs, dict(out=tmp_path), lr=1e-2, batch_size=5, epochs=3
    ).train()[-1]
    sequences = [pair.prompt_ids + ids for pair in pairs for ids in pair.completions_ids]
    for scorer in (model, RewardModel.from_pretrained(tmp_path)):
        each = torch.stack([each_scored(scorer, ids) for ids in sequences]).detach()
        each += scorer.score.bias.detach()
        assert_close(each.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-6)
        stds = each.std(dim=0, correction=0)
        assert_close(stds.square().mean(), torch.tensor(1.0), rtol=1e-5, atol=0)
        scores = torch.stack([scored(scorer, ids) for ids in sequences]).detach()
        assert_close(scores, each @ torch.tensor([1.0, 2.0]), rtol=1e-5, atol=1e-5)
    ratio = last["score_std/helpful"] / last["score_std/harmless"]
    assert ratio == pytest.approx(float(stds[0] / stds[1]), rel=1e-4)
    pooled = ((last["score_std/helpful"] ** 2 + last["score_std/harmless"] ** 2) / 2) ** 0.5
    assert_close(scores.std(correction=0).item(), last["score_std"] / pooled, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "examples, model, message",
    [
        (opposed(8)[1:2], None, "no training pair labels criterion 'helpful'"),
        (lists(), None, "the model scores helpful, harmless: train it on pairs, not ranked lists"),
        (
            [Pair([7], [5, 2], [6, 2], criteria={"honest": True})],
            None,
            "pairs label criterion 'honest', but the model has helpful, harmless",
        ),
        (
            opposed(8),
            tiny(RewardModel),
            "pairs label criterion 'harmless', but the model has one score",
        ),
    ],
)
def test_examples_that_do_not_fit_the_criteria_are_refused(examples, model, message):
    with pytest.raises(ValueError, match=message):
        make_trainer("reward", model or criteria_model(), examples)


def test_steps_are_refused_with_criteria():
    with pytest.raises(ValueError, match="train it on pairs, not solutions in steps"):
        make_steps(model=criteria_model())


# ---- steps


def solutions():
    """A step that holds a 6 is wrong; 10 ends a step."""
    steps = [
        ([7, 10], 1.0),
        ([6, 8, 10], 0.0),
        ([9, 9, 10], 1.0),
        ([8, 6, 10], 0.0),
        ([9, 10], 1.0),
    ]
    rows = []
    for i in range(12):
        chosen = [steps[(i * k) % 5] for k in range(1, 2 + i % 3)]
        ids = [token for step, _ in chosen for token in step]
        rows.append(
            Steps(
                [7, 11][: 1 + i % 2],
                [*ids, 2],
                [*(i == 10 for i in ids), False],
                [y for _, y in chosen],
            )
        )
    return rows


def make_steps(examples=None, model=None, eval_examples=(), **config):
    config = RewardConfig(**(dict(batch_size=12, lr=3e-3) | config))
    return RewardTrainer(
        model or tiny(RewardModel), examples or solutions(), config, eval_examples=eval_examples
    )


def test_the_loss_of_steps_is_binary_cross_entropy_with_its_closed_form():
    scores = torch.tensor(
        [0.0, 1.5, -2.0, 400.0, -400.0, 0.3], dtype=torch.float64, requires_grad=True
    )
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.25], dtype=torch.float64)
    loss = process_reward_loss(scores, labels)
    assert_close(loss, binary_cross_entropy_with_logits(scores, labels, reduction="none"))
    loss.sum().backward()
    assert_close(scores.grad, scores.detach().sigmoid() - labels)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 5])
def test_the_loss_of_steps_is_their_mean_and_each_step_is_read_where_it_ends(micro_batch_size):
    batch, model, terms, hits = solutions(), tiny(RewardModel), [], []
    batch = [row._replace(labels=[0.25, *row.labels[1:]]) for row in batch]  # also a soft label
    for row in batch:
        ends = [i for i, ending in enumerate(row.completion_mask) if ending]
        for end, label in zip(ends, row.labels, strict=True):
            ids = torch.tensor([row.prompt_ids + row.completion_ids[: end + 1]])
            score = model(ids, torch.ones_like(ids, dtype=torch.bool))[0]
            terms.append(binary_cross_entropy_with_logits(score, torch.tensor(label)))
            hits.append((score > 0).item() == (label > 0.5))
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, list(model.parameters()))
    loss, metrics, got = accumulated(make_steps(micro_batch_size=micro_batch_size), batch)
    assert loss == pytest.approx(want.item(), rel=1e-5) and metrics["loss"] == pytest.approx(
        loss, rel=1e-5
    )
    assert_close(got, list(gradients), rtol=1e-4, atol=1e-6)
    assert metrics["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert metrics["labels"] == pytest.approx(
        sum(y for row in batch for y in row.labels) / len(hits)
    )


def test_steps_are_learned_and_their_scores_stay_log_odds():
    trainer = make_steps(eval_examples=solutions(), epochs=60, lr=1e-2)
    last = trainer.train()[-1]
    assert last["eval_accuracy"] == 1.0 and "score_mean" not in last
    assert trainer.model.score.bias is None
    after = accumulated(trainer, solutions())[1]  # nothing was moved or scaled at the end
    assert after["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


# ---- refused, or without effect


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
            dict(loss="margin_ranking"),
            lists(2),
            "loss must be the default on ranked lists, got 'margin_ranking'",
        ),
        (
            {},
            [*lists(2), *rows("reward")],
            "the examples are pairs and ranked lists; train and evaluate on one kind",
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_an_option_out_of_range_is_refused(options, examples, message):
    with pytest.raises(ValueError, match=message):
        make_trainer("reward", examples=examples, **options)


def test_a_loss_of_pairs_is_refused_for_steps():
    with pytest.raises(ValueError, match="loss must be the default on solutions in steps"):
        make_steps(loss="margin_ranking")


def test_steps_mixed_with_pairs_are_refused():
    with pytest.raises(ValueError, match="the examples are pairs and solutions in steps"):
        make_steps([*solutions(), Pair([3], [5, 2], [6, 2])])


@pytest.mark.parametrize("row", [Pair([3], [5, 2], [5, 2]), Ranked([3], [[5], [5], [5]])])
def test_completions_that_are_all_identical_are_refused(row):
    with pytest.raises(ValueError, match=r"identical in all 2 (pairs|ranked lists)"):
        make_steps([row, row])
    completions = [[5], [6], [5]] if isinstance(row, Ranked) else [9, 2]
    make_steps([row, row._replace(**{row._fields[1]: completions})])


# ---- from files to steps

FOLDERS = ["tokenizers/gpt2", "tokenizers/minimind", "models/stories260k"]


@functools.cache
def tokenizer_of(folder):
    return load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["bytes", *FOLDERS])
@pytest.mark.parametrize(
    "steps", [["a = 1.", "b = 2", "so: c."], [" x ", "\ty\t ", "  中文  "], ["only"]]
)
def test_a_step_ends_at_its_newline_and_the_last_one_with_the_completion(kind, steps, request):
    tokenizer = ByteTokenizer()
    if kind != "bytes":
        tokenizer = tokenizer_of(request.getfixturevalue("data_dir") / kind)
    labels = [float(i % 2) for i in range(len(steps))]
    row = encode_preference(Solution("Solve it:\n", steps, labels), tokenizer, 256)
    assert row.labels == labels
    assert sum(row.completion_mask) == len(steps) and row.completion_mask[-1]
    assert row.completion_mask == step_ends(row.completion_ids, tokenizer)
    pieces, start = [], 0
    for end in (i + 1 for i, ending in enumerate(row.completion_mask) if ending):
        pieces.append(tokenizer.decode(row.completion_ids[start:end]).strip())
        start = end
    assert pieces == [step.strip() for step in steps]


@pytest.mark.parametrize(
    "text, steps",
    [
        ("ab\ncd\0", "001001"),
        ("ab\n\0", "0010"),
        ("ab\n\ncd", "001000"),
        (" \nab\0", "00001"),
        ("ab", "00"),
        ("", ""),
    ],
)
def test_a_step_is_a_nonblank_line_that_ends(text, steps):
    """A zero byte stands for EOS."""
    ids = [258 if letter == "\0" else ord(letter) for letter in text]
    assert step_ends(ids, ByteTokenizer()) == [end == "1" for end in steps]


def test_one_token_may_end_a_step_and_start_the_next():
    class Words:
        words, eos_ids = ("a", "\n", "\nb", " \n\n", "<end>"), (4,)

        def decode(self, ids):
            return "".join(self.words[i] for i in ids)

    for ids, steps in (([0, 2, 4], "011"), ([0, 1, 4], "010"), ([0, 2, 3, 4], "0110"), ([4], "0")):
        assert step_ends(ids, Words()) == [end == "1" for end in steps]


def test_without_eos_ids_the_last_step_ends_with_the_completion():
    tokenizer = ByteTokenizer()
    tokenizer.eos_ids = ()
    row = encode_preference(Solution("p:", ["ab", "cd"], [1.0, 0.0]), tokenizer, 64)
    assert row.completion_mask == [False, False, True, False, True]


def test_steps_that_end_beyond_max_length_do_not_count():
    solution = Solution(
        "p:", ["ab", "cd", "ef"], [1.0, 0.0, 1.0]
    )  # 3 of the prompt, then 3 bytes a step, EOS for one
    encoded = [encode_preference(solution, ByteTokenizer(), length) for length in (12, 11, 8)]
    assert [row.labels for row in encoded] == [[1.0, 0.0, 1.0], [1.0, 0.0], [1.0]]
    assert all(len(row.labels) == sum(row.completion_mask) for row in encoded)
    assert all(len(row.completion_ids) == len(row.completion_mask) for row in encoded)
    with pytest.raises(ValueError, match="no step ends within 4 tokens"):
        encode_preference(solution, ByteTokenizer(), 4)


def test_the_steps_of_a_conversation_are_those_of_the_assistants_turn():
    prompt = [{"role": "user", "content": "Solve\nit"}]
    row = encode_preference(Solution(prompt, ["a", "b"], [1.0, 0.0]), ByteTokenizer(), 64)
    assert row.completion_mask == [False, True, False, True]
    assert ByteTokenizer().decode(row.completion_ids) == "a\nb"


GOOD = {"prompt": "p", "steps": ["a\n", "b"], "labels": [True, 0]}


def test_solutions_are_read_with_labels_of_every_spelling(tmp_path):
    file = tmp_path / "steps.jsonl"
    shares = {
        "messages": [{"role": "user", "content": "p"}],
        "completions": ["a", "b"],
        "labels": [0.25, 1],
    }
    file.write_text("\n".join(map(json.dumps, (GOOD, shares))))
    assert read_comparisons(file) == [
        Solution("p", ["a", "b"], [1.0, 0.0]),
        Solution(shares["messages"], ["a", "b"], [0.25, 1.0]),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(labels=[True]),
            r"'labels' must be 2 of true, false or a number from 0 to 1, got \[true\]",
        ),
        (dict(labels=[True, 2]), r"'labels' must be .* got \[true, 2\]"),
        (dict(labels=[True, None]), r"'labels' must be .* got \[true, null\]"),
        (dict(labels=True), "'labels' must be .* got true"),
        (dict(steps=["a", "b\nc"]), "'steps.1' contains a newline"),
        (dict(steps=["a", "\n"]), "'steps.1' is empty"),
        (dict(steps=["a", 3]), "'steps.1' must be a string, got 3"),
        (dict(steps=[]), r"'steps' must be a list of steps, got \[\]"),
        (dict(prompt=""), "'prompt' is empty"),
    ],
)
def test_a_bad_solution_names_its_field(change, message, tmp_path):
    file = tmp_path / "steps.jsonl"
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(DataError, match=f"steps.jsonl:1: field {message}"):
        read_comparisons(file)


# ---- on the command line, from a model and from a reward model

PAIRS = [{"prompt": f"say {i}", "chosen": "yes", "rejected": f"no{i}"} for i in range(10)]


STEPS = [
    {"prompt": f"say {i}", "steps": ["yes", "no", "yes"], "labels": [True, False, True]}
    for i in range(10)
]


def train(tmp_path, model, rows, out, *more):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "reward",
        "--model",
        model,
        "--data",
        data,
        "--out",
        tmp_path / out,
        "--batch-size",
        4,
        *more,
    ]
    return cli.main(list(map(str, arguments)))


@pytest.fixture
def policy(tmp_path):
    tokenizer = ByteTokenizer()
    sizes = dict(vocab_size=tokenizer.vocab_size, max_positions=64, eos_ids=tokenizer.eos_ids)
    tiny(Transformer, **sizes).save_pretrained(tmp_path / "policy")
    tokenizer.save(tmp_path / "policy")
    return tmp_path / "policy"


def test_the_command_learns_steps_from_a_file(policy, tmp_path, capsys):
    assert train(tmp_path, policy, STEPS, "rm", "--lr", 0.01, "--epochs", 4) == 0
    shown = capsys.readouterr().out
    assert (
        "9 to train on, 1 held out" in shown
        and "eval_accuracy" in shown
        and "score_mean" not in shown
    )
    assert RewardModel.from_pretrained(tmp_path / "rm").of_steps
    assert train(tmp_path, tmp_path / "rm", PAIRS, "pairs") == 0
    assert not RewardModel.from_pretrained(tmp_path / "pairs").of_steps


@pytest.mark.parametrize("lora", [[], ["--lora-rank", 2]])
def test_a_reward_model_trains_further_with_its_trunk_and_head(lora, policy, tmp_path, capsys):
    """A second run starts from all that a first one left, normalization included."""
    assert train(tmp_path, policy, PAIRS, "first", "--lr", 0.01, "--epochs", 2) == 0
    assert (
        train(
            tmp_path, tmp_path / "first", PAIRS, "still", "--lr", 1e-12, "--eval-fraction", 0, *lora
        )
        == 0
    )
    first, still = (RewardModel.from_pretrained(tmp_path / name) for name in ("first", "still"))
    ids, mask = torch.randint(200, (20, 9)), torch.ones(20, 9, dtype=torch.bool)
    with torch.no_grad():
        before, after = first(ids, mask), still(ids, mask)
    assert (
        torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.99999
    )  # up to the new normalisation
    lines = (tmp_path / "still" / "metrics.jsonl").read_text().splitlines()
    assert (
        abs(json.loads(lines[-1])["score_mean"]) < 0.2
        and 0.8 < json.loads(lines[-1])["score_std"] < 1.2
    )


def test_a_folder_without_a_model_is_named(policy, tmp_path, capsys):
    (policy / "config.json").unlink()
    assert train(tmp_path, policy, PAIRS, "rm") == 2
    assert f"{policy / 'config.json'}: no such file; --model" in capsys.readouterr().err


def test_the_adapters_of_a_reward_model_train_further(policy, tmp_path):
    assert train(tmp_path, policy, PAIRS, "first", "--lora-rank", 2, "--lr", 0.01) == 0
    assert train(tmp_path, tmp_path / "first", PAIRS, "second", "--lr", 1e-12) == 0
    first, second = (RewardModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for (name, a), b in zip(first.trunk.state_dict().items(), second.trunk.state_dict().values()):
        assert_close(a, b, rtol=0, atol=1e-9, msg=name)
    assert torch.cosine_similarity(first.score.weight, second.score.weight) > 0.999999


# ---- criteria, on the command line

CRITERIA_ROWS = [
    *({"prompt": f"a{i}", "chosen": "yes", "rejected": "no", "criterion": "kind"} for i in "1234"),
    *({"prompt": f"b{i}", "chosen": "no", "rejected": "yes", "criterion": "brief"} for i in "1234"),
    {
        "prompt": "c", "chosen": "yes", "rejected": "no", "margin": 2.0,
        "chosen_ratings": {"kind": 4.5, "brief": 1}, "rejected_ratings": {"kind": 2, "brief": 3},
    },
    {"prompt": "d", "chosen": "yes", "rejected": "no"},
]  # fmt: skip
CRITERIA = ["--criteria", "kind=1", "brief=0.5", "--eval-fraction", 0]


@pytest.mark.parametrize("lora", [[], ["--lora-rank", 2]])
def test_the_command_learns_criteria_which_another_run_weighs(lora, policy, tmp_path, capsys):
    options = ["--lr", 0.01, "--epochs", 8, *lora]
    assert train(tmp_path, policy, CRITERIA_ROWS, "rm", *CRITERIA, *options) == 0
    model = RewardModel.from_pretrained(tmp_path / "rm")
    assert dict(model.criteria) == {"kind": 1.0, "brief": 0.5}
    assert "accuracy/kind" in capsys.readouterr().out
    # A second run keeps the criteria, and continues from the heads.
    more = ["--lr", 1e-12, "--eval-fraction", 0]
    assert train(tmp_path, tmp_path / "rm", CRITERIA_ROWS, "more", *more) == 0
    second = RewardModel.from_pretrained(tmp_path / "more")
    assert second.criteria == model.criteria
    assert_close(second.score.weight, model.score.weight, rtol=1e-2, atol=1e-3)
    assert train(tmp_path, tmp_path / "rm", CRITERIA_ROWS, "bad", "--criteria", "a", "b") == 2
    assert "the model scores kind, brief, not a, b" in capsys.readouterr().err
    # PPO reports every criterion, and takes other weights for the score.
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, CRITERIA_ROWS)))
    found = {}
    for out, weights in (("p0", []), ("p1", ["--reward-weights", "brief=-1"])):
        arguments = [
            "ppo", "--model", policy, "--reward-model", tmp_path / "rm", "--prompts",
            tmp_path / "prompts.jsonl", "--out", tmp_path / out, "--response-length", 4,
            "--batch-size", 4, "--minibatch-size", 4, "--max-steps", 1, *weights,
        ]  # fmt: skip
        assert cli.main(list(map(str, arguments))) == 0
        found[out] = json.loads((tmp_path / out / "metrics.jsonl").read_text().splitlines()[0])
    for out, weight in (("p0", 0.5), ("p1", -1)):
        row = found[out]
        total = row["reward/kind"] + weight * row["reward/brief"]
        assert row["objective/scores"] == pytest.approx(total, abs=1e-5)
    assert found["p0"]["reward/kind"] == pytest.approx(found["p1"]["reward/kind"], abs=1e-6)


@pytest.mark.parametrize(
    "row, options, message",
    [
        ({"criterion": "kin"}, [], "data.jsonl:1: criterion 'kin' is not one of kind, brief. Corr"),
        ({"criterion": 3}, [], "data.jsonl:1: field 'criterion' must be a string, got 3"),
        (
            {"chosen_ratings": {"kind": 1, "new": 2}, "rejected_ratings": {"kind": 1, "new": 2}},
            [],
            "data.jsonl:1: criterion 'new' is not one of kind, brief",
        ),
        (
            {"chosen_ratings": {"kind": 1}},
            [],
            "fields 'chosen_ratings' and 'rejected_ratings' must rate the same criteria, got",
        ),
        (
            {"chosen_ratings": {"kind": "a"}, "rejected_ratings": {"kind": 1}},
            [],
            "data.jsonl:1: field 'chosen_ratings' must be an object of numbers, got",
        ),
        ({}, ["--criteria", "kind=1", "brief=1", "other"], "no training pair labels criterion 'ot"),
        ({}, ["--criteria", "kind=1", "brief=1", "kind=2"], "criterion 'kind' has two weights"),
        ({}, ["--criteria", "kind=0", "brief=0"], "the criteria all have weight 0"),
        ({}, ["--criteria", "kind=nan"], "criterion 'kind' must have a finite weight, got nan"),
        ({}, ["--criteria", "=2"], "the name of a criterion must be text, got ''"),
    ],
)
def test_a_bad_criterion_is_one_line_before_training(
    row, options, message, policy, tmp_path, capsys
):
    rows = [CRITERIA_ROWS[8] | row if "chosen_ratings" in row else CRITERIA_ROWS[0] | row]
    if "chosen_ratings" in row:
        rows = [{k: v for k, v in rows[0].items() if k in row or "ratings" not in k}]
    assert train(tmp_path, policy, rows + CRITERIA_ROWS, "rm", *CRITERIA, *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (tmp_path / "rm" / "config.json").exists()


def test_ratings_decide_each_criterion_that_they_do_not_tie_on(tmp_path):
    file = tmp_path / "pairs.jsonl"
    base = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0, "label_smoothing": 0.1}
    rows = [
        base | {"chosen_ratings": {"x": 4, "y": 2}, "rejected_ratings": {"x": 2, "y": 2.5}},
        base | {"chosen_ratings": {"x": 3, "y": 2}, "rejected_ratings": {"x": 3, "y": 2.5}},
        base | {"chosen_ratings": {"x": 3, "y": 2}, "rejected_ratings": {"x": 3, "y": 2}},
        base | {"criterion": "y"},
        base,
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = read_comparisons(file, criteria=("x", "y"))
    wanted = [{"x": True, "y": False}, {"y": False}, None, {"y": True}, None]
    assert [row.criteria for row in found] == wanted
    # Margin and noise belong to the choice, not to the ratings.
    assert [row.margin for row in found] == [None, None, 2.0, 2.0, 2.0]
    assert [row.label_smoothing for row in found] == [None, None, 0.1, 0.1, 0.1]
    assert all(row.criteria is None for row in read_comparisons(file))
