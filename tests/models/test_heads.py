"""What a reward model says of sequences and of their steps, alone and in an ensemble."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.data import Example, Pair, collate
from rlhf_core.models import EnsembleReward, RewardModel, TransformerConfig, load_reward

PROMPTS = [([7, 8], [9, 5, 10, 2]), ([7], [5, 2]), ([8, 8, 9], [10, 11, 2])]


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
    model = RewardModel(TransformerConfig(**(sizes | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def alone(model, ids):
    return model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("packing", [None, 16])
def test_scores_of_a_batch_are_those_of_its_sequences_alone(packing):
    model = tiny()
    pairs = [Pair(prompt, ids, ids[1:]) for prompt, ids in PROMPTS]
    want = torch.cat([alone(model, prompt + x) for prompt, ids in PROMPTS for x in (ids, ids[1:])])
    assert_close(model.scores(collate(pairs, 0, packing=packing)), want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("packing", [None, 16])
def test_scores_of_tokens_are_those_of_the_sequence_cut_after_them(packing):
    model = tiny()
    masks = [[False, True, False, True], [True, False], [True, True, True]]
    examples = [Example(prompt, ids, mask) for (prompt, ids), mask in zip(PROMPTS, masks)]
    want = torch.cat(
        [
            alone(model, prompt + ids[: i + 1])
            for (prompt, ids), mask in zip(PROMPTS, masks)
            for i in range(len(ids))
            if mask[i]
        ]
    )
    assert_close(model.token_scores(collate(examples, 0, packing=packing)), want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("aggregate, coef", [("mean", None), ("worst", None), ("uncertainty", 0.5)])
def test_an_ensemble_scores_by_its_models_mean_by_the_worst_or_less_their_variance(aggregate, coef):
    models = [tiny(seed=seed) for seed in range(3)]
    ensemble = EnsembleReward(models, aggregate, coef)
    tokens = collate([Example(*row) for row in PROMPTS], 0)
    ids, mask = torch.tensor([[7, 8, 9]]), torch.ones(1, 3, dtype=torch.bool)
    for method, arguments in (
        ("scores", [tokens]),
        ("token_scores", [tokens]),
        ("forward", [ids, mask]),
    ):
        each = torch.stack([getattr(model, method)(*arguments) for model in models]).double()
        assert each.std(dim=0).min() > 0
        mean = each.sum(dim=0) / 3
        variance = ((each - mean) ** 2).sum(dim=0) / 3
        want = {
            "mean": mean,
            "worst": each.min(dim=0).values,
            "uncertainty": mean - 0.5 * variance,
        }[aggregate]
        assert_close(getattr(ensemble, method)(*arguments).double(), want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_reward_models_are_loaded_from_one_folder_or_several(tmp_path):
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        tiny(seed=seed).save_pretrained(folder)
    ids = [7, 8, 9, 2]
    each = torch.cat([alone(tiny(seed=seed), ids) for seed in range(2)])
    assert_close(alone(load_reward(folders[:1]), ids), each[:1], rtol=0, atol=0)
    assert_close(alone(load_reward(folders), ids)[0], each.mean())
    assert_close(alone(load_reward(folders, "worst"), ids)[0], each.min(), rtol=0, atol=0)
    for options, message in (
        (dict(aggregate="worst"), "ensemble 'worst'"),
        (dict(coef=0.5), "coefficient 0.5"),
    ):
        with pytest.raises(
            ValueError, match=f"the {message} has no effect on a single reward model"
        ):
            load_reward(folders[:1], **options)


@pytest.mark.parametrize(
    "models, options, message",
    [
        (1, {}, "at least 2 reward models, got 1"),
        (2, dict(aggregate="best"), "mean, worst, uncertainty, got 'best'"),
        (
            2,
            dict(aggregate="mean", coef=0.5),
            "the coefficient 0.5 has no effect: only the ensemble 'uncertainty' uses it",
        ),
        (2, dict(aggregate="uncertainty"), "the ensemble 'uncertainty' needs a coefficient"),
        (
            2,
            dict(aggregate="uncertainty", coef=-1.0),
            "the coefficient must be a finite number > 0, got -1.0",
        ),
    ],
)
def test_an_ensemble_that_is_none_is_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleReward([tiny()] * models, **options)


def test_an_ensemble_over_two_vocabularies_is_refused():
    with pytest.raises(ValueError, match=r"got sizes \[12, 13\]"):
        EnsembleReward([tiny(), tiny(vocab_size=13)])
