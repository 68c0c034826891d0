"""Evaluation of a policy's own samples."""

import pytest
import torch
from helpers import tiny
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer, Example, Prompt, collate
from rlhf_core.evaluation import evaluate_policy
from rlhf_core.evaluation.policies import sample_policy
from rlhf_core.models import EnsembleReward, RewardModel


def noisy(seed=0, **options):
    sizes = dict(vocab_size=259, max_positions=64, eos_ids=(2,)) | options
    return tiny(seed=seed, noise=0.3, **sizes).eval()


def scores_of(prompts, responses):
    return [float(len(response)) for response in responses]


PROMPTS = [[257, *b"hello"], [257, *b"ok"], [257]]


def evaluated(policy, reference, reward=scores_of, **options):
    options = dict(max_new_tokens=5) | options
    return evaluate_policy(policy, reference, PROMPTS, reward, ByteTokenizer(), **options)


def test_evaluation_gives_a_score_and_a_kl_for_every_prompt():
    policy, other = (noisy(seed, eos_ids=(258,)) for seed in (0, 1))
    same = evaluated(policy, policy)
    assert len(same.responses) == len(same.scores) == len(same.kl) == len(same.lengths) == 3
    assert same.scores.tolist() == scores_of([], same.responses)
    assert_close(same.kl, torch.zeros(3), rtol=0, atol=1e-5)
    assert evaluated(policy, other).kl.mean() > 1
    assert evaluated(policy, other, seed=0).responses == same.responses
    assert evaluated(policy, other, seed=1).responses != same.responses


def test_a_reward_sees_every_response_with_the_columns_of_its_prompt():
    prompts = [Prompt([257, 97 + i], letter=chr(97 + i)) for i in range(3)]

    def right(texts, responses, letter):
        return [float(text == own) for text, own in zip(texts, letter)]

    options = dict(max_new_tokens=2, batch_size=2)
    got = evaluate_policy(noisy(), noisy(), prompts, right, ByteTokenizer(), **options)
    assert got.scores.tolist() == [1, 1, 1]
    got = evaluate_policy(
        noisy(), noisy(), prompts, right, ByteTokenizer(), num_samples=2, **options
    )
    assert got.scores.tolist() == [1] * len(got.responses) == [1] * 6


def test_lengths_count_the_tokens_of_a_response_with_its_eos():
    never, always = (
        evaluated(noisy(), noisy(), eos_ids=eos_ids) for eos_ids in ((), tuple(range(259)))
    )
    assert never.lengths.tolist() == [5, 5, 5] and always.lengths.tolist() == [1, 1, 1]


def test_evaluation_ignores_dropout_in_every_mode():
    policy, reference = (noisy(dropout=0.5) for _ in range(2))
    want = evaluated(policy, reference)
    got = evaluated(policy.train(), reference.train())
    assert_close(got.kl, want.kl, rtol=0, atol=1e-5)
    assert policy.training and reference.training


def test_evaluation_does_not_depend_on_the_batch_size():
    """Row 32. Every prompt has its own seed."""
    policy, reference = (noisy(seed) for seed in (0, 1))
    a, b = (evaluated(policy, reference, batch_size=size) for size in (1, 3))
    assert a.responses == b.responses
    assert_close(a.scores, b.scores)
    assert torch.equal(a.lengths, b.lengths)
    assert_close(a.kl, b.kl, rtol=1e-4, atol=1e-4)


def test_every_sample_of_a_prompt_has_a_seed_of_its_own():
    prompts, options = [[257, *b"hello"], [257]], dict(max_new_tokens=5, eos_ids=(258,))
    policy, reference = (noisy(seed) for seed in (0, 1))
    found = sample_policy(policy, reference, prompts, num_samples=3, **options)
    assert len(found.ids) == len(found.kl) == len(found.lengths) == 6
    assert len({tuple(ids) for ids in found.ids}) == 6
    again = sample_policy(policy, reference, prompts, num_samples=3, batch_size=1, **options)
    assert again.ids == found.ids
    greedy = sample_policy(policy, reference, prompts, num_samples=2, temperature=0, **options)
    assert greedy.ids[0] == greedy.ids[1] and greedy.kl.isnan().all()


def test_the_reward_may_be_a_model_an_ensemble_or_a_weighted_list():
    policy = noisy()
    models = [noisy(seed, cls=RewardModel) for seed in (3, 4)]
    plain, one = evaluated(policy, policy), evaluated(policy, policy, models[0], batch_size=2)
    examples = [Example(*row) for row in zip(PROMPTS, one.response_ids)]
    scores = [model.scores(collate(examples, 0)).detach() for model in models]
    assert one.responses == plain.responses
    assert_close(one.scores, scores[0], rtol=0, atol=1e-5)
    both = evaluated(policy, policy, EnsembleReward(models, "mean"))
    assert_close(both.scores, (scores[0] + scores[1]) / 2, rtol=0, atol=1e-5)
    mixed = evaluated(policy, policy, [(models[0], 2.0), (scores_of, 0.5)])
    assert_close(mixed.scores, 2 * scores[0] + 0.5 * plain.scores, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the policy has 259 tokens, but reward model 0 has 12"):
        evaluated(policy, policy, tiny(RewardModel))
