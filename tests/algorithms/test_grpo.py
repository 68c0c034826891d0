"""GRPO, RLOO, REINFORCE++, ReMax through the trainer: groups stay together, each gradient is its paper's."""

import math
import warnings

import pytest
import torch
from test_ppo import PROMPTS, Letters, fives, lengths, rollout_of, tiny
from torch.testing import assert_close

from rlhf_core.losses import (
    grpo_advantages,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)
from rlhf_core.models import Transformer
from rlhf_core.rollout import sample
from rlhf_core.trainers import GRPOConfig, GRPOTrainer
from rlhf_core.policy_gradient.trainer import Experience
from rlhf_core.training.metrics import Metrics

N = 4


def make(model=None, reward=fives, prompts=PROMPTS, others=None, **config):
    torch.manual_seed(5)
    settings = dict(batch_size=8, num_samples=N, response_length=6, lr=1e-3)
    config = GRPOConfig(**(settings | config))
    return GRPOTrainer(
        tiny() if model is None else model, prompts, config, reward=reward, **(others or {})
    )


def captured(**options):
    """What the passes of a step are taken on."""
    trainer, seen = make(**options), []
    trainer.update = lambda rollout, experience, metrics: (
        seen.append((rollout, experience)) or _one_pass(trainer, rollout, experience, metrics)
    )
    report = trainer.step(PROMPTS)
    return trainer, *seen[0], report


def _one_pass(trainer, rollout, experience, metrics):
    for _ in trainer.minibatch_losses(rollout, experience, metrics):
        pass


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce_pp"])
def test_every_token_has_its_responses_advantage_over_those_of_the_same_prompt(advantage):
    estimate = {
        "grpo": grpo_advantages,
        "rloo": rloo_advantages,
        "reinforce_pp": reinforce_pp_advantages,
    }[advantage]
    _, rollout, experience, report = captured(advantage=advantage, length_penalty=0.1)
    prompts = rollout.prompts()
    assert prompts == [prompt for prompt in PROMPTS for _ in range(N)]
    responses = rollout.responses()
    scores = torch.tensor([r.count(5) - 0.1 * len(r) for r in responses]).view(8, N)
    mask = rollout.response_mask.unflatten(0, (8, N))
    assert_close(
        experience.advantages, estimate(scores, torch.zeros(mask.shape), mask).flatten(0, 1)
    )
    assert report["reward"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert report["reward_std"] == pytest.approx(scores.std(dim=1).mean().item(), abs=1e-5)
    alike = (scores == scores[:, :1]).all(dim=1).float().mean().item()
    assert report["frac_reward_zero_std"] == alike
    assert report["completions/mean_length"] == sum(map(len, responses)) / len(responses)


def test_remax_compares_with_the_greedy_response():
    trainer, rollout, experience, _ = captured(advantage="remax", num_samples=2, reward=lengths)
    greedy = sample(trainer.model, PROMPTS, max_new_tokens=6, temperature=0.0)
    scores = torch.tensor(lengths(None, rollout.responses())).view(8, 2)
    baseline = torch.tensor(lengths(None, greedy.responses()))
    mask = rollout.response_mask.unflatten(0, (8, 2))
    want = remax_advantages(scores, torch.zeros(mask.shape), mask, greedy_scores=baseline)
    assert_close(experience.advantages, want.flatten(0, 1))
    assert experience.advantages.any()


@pytest.mark.parametrize("advantage", ["rloo", "reinforce_pp"])
def test_the_kl_in_the_reward_is_part_of_the_comparison(advantage):
    """Of a response as a whole, or for each token what is still to come."""
    reference, estimate = (
        tiny(seed=1),
        {"rloo": rloo_advantages, "reinforce_pp": reinforce_pp_advantages}[advantage],
    )
    options = dict(
        kl_in="reward", kl_coef=0.3, advantage=advantage, others=dict(reference=reference)
    )
    trainer, rollout, experience, report = captured(**options)
    assert trainer.config.estimator == "k1"
    kl = trainer.predict(rollout)["kl"]
    tokens = (x.unflatten(0, (8, N)) for x in (0.3 * kl, rollout.response_mask))
    want = estimate(torch.tensor(fives(None, rollout.responses())).view(8, N), *tokens)
    assert_close(experience.advantages, want.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert report["objective/non_score_reward"] == pytest.approx(
        -0.3 * kl.sum(dim=1).mean().item(), rel=1e-4
    )
    assert report["kl"] == pytest.approx(
        kl.sum().item() / rollout.response_mask.sum().item(), rel=1e-4
    )


def test_without_a_weight_for_the_kl_no_reference_is_held_unless_it_is_given():
    """And what is learned is the same."""
    without, given = make(), make(others=dict(reference=tiny(seed=1)))
    assert without.reference is None
    reports = [trainer.step(PROMPTS) for trainer in (without, given)]
    assert (
        not {"kl", "objective/kl"} & reports[0].keys()
        and reports[1]["kl"] != 0 != reports[1]["objective/kl"]
    )
    assert_close(without.model.state_dict(), given.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_the_gradient_is_reinforces_at_ratio_one(aggregation):
    """-A log p of every token, by the weights that the aggregation gives; no critic and no clip in it."""
    trainer = make(aggregation=aggregation)
    rollout = rollout_of(trainer)
    columns = trainer.predict(rollout)
    mask, advantages = (
        rollout.response_mask,
        torch.randn(8)[:, None].expand_as(rollout.response_mask),
    )
    old = Experience(columns["logprobs"], advantages, columns["ref_logprobs"])
    trainer.optimizer.zero_grad()
    for loss in trainer.minibatch_losses(rollout, old, Metrics()):
        loss.backward()
    got = [p.grad.clone() for p in trainer.model.parameters()]
    lengths = mask.sum(dim=1, keepdim=True)
    weights = {
        "token_mean": 1 / lengths.sum(),
        "sequence_mean": 1 / (8 * lengths),
        "sequence_sum": 1 / (8 * 6),
    }
    trainer.optimizer.zero_grad()
    logprobs = trainer.forward(rollout)["logprobs"]
    (-advantages * logprobs * weights[aggregation] * mask).sum().backward()
    assert_close(got, [p.grad for p in trainer.model.parameters()], rtol=1e-4, atol=1e-6)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    """GSPO, eq. 7; a token's gradient is then that of the mean log-prob of its response, clipped as one."""
    trainer = make(ratio="sequence", aggregation="sequence_mean", clip_range=0.1, ppo_epochs=2)
    rollout = rollout_of(trainer)
    mask, columns = rollout.response_mask, trainer.predict(rollout)
    torch.manual_seed(3)
    old_logprobs = columns["logprobs"] + 0.3 * torch.randn(mask.shape) * mask
    advantages = torch.tensor([1.0, -1.0] * 4)
    old = Experience(old_logprobs, advantages[:, None].expand_as(mask), columns["ref_logprobs"])
    trainer.optimizer.zero_grad()
    metrics = Metrics()
    for loss in trainer.minibatch_losses(rollout, old, metrics):
        loss.backward()
    got = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.optimizer.zero_grad()
    log_ratio = (trainer.forward(rollout)["logprobs"] - old_logprobs) * mask
    s = (log_ratio.sum(dim=1) / mask.sum(dim=1)).exp()
    objective = torch.minimum(s * advantages, s.clamp(0.9, 1.1) * advantages).mean()
    (-objective).backward()
    assert_close(got, [p.grad for p in trainer.model.parameters()], rtol=1e-4, atol=1e-6)
    assert 0 < metrics.means()["policy/clipfrac_avg"] < 1
    kl = (log_ratio.exp() - 1 - log_ratio).sum() / mask.sum()  # of tokens
    assert metrics.means()["policy/approxkl_avg"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce_pp", "remax"])
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_it_starts_at_ratio_one(advantage, micro_batch_size):
    """Row 2."""
    report = make(advantage=advantage, micro_batch_size=micro_batch_size).step(PROMPTS)
    assert report["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert report["clip_ratio"] == report["policy/clipfrac_avg"] == 0


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce_pp", "remax"])
def test_the_score_rises(advantage):
    options = dict(
        prompts=PROMPTS * 10, lr=2e-2, lr_schedule="constant", ppo_epochs=2, minibatch_size=16
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups that have learned all there is
        history = make(advantage=advantage, **options).train()
    assert history[-1]["reward"] > history[0]["reward"] + 2


def test_groups_that_say_nothing_are_told_of():
    trainer = make(reward=lambda prompts, responses: [1.0] * len(responses))
    with pytest.warns(
        UserWarning, match="step 1: no response scores otherwise than what it is compared with"
    ):
        report = trainer.step(PROMPTS)
    assert report["frac_reward_zero_std"] == 1 and report["grad_norm"] == 0


def test_a_run_writes_the_policy_and_its_name(tmp_path):
    trainer = make(
        advantage="rloo",
        others=dict(out=tmp_path, tokenizer=Letters()),
        reward=lambda p, r: list(range(32)),
    )
    trainer.train()
    assert trainer.algorithm == "rloo"
    saved = Transformer.from_pretrained(tmp_path)
    assert_close(saved.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)
    assert not (tmp_path / "critic").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(advantage="ppo"),
            "advantage must be one of grpo, rloo, reinforce_pp, remax, got 'ppo'",
        ),
        (dict(num_samples=1), "num_samples must be at least 2 for grpo, got 1"),
        (dict(advantage="remax", num_samples=0), "num_samples must be at least 1 for remax, got 0"),
        (dict(advantage="rloo", normalize=False), "normalize has no effect on rloo"),
        (dict(ratio="word"), "ratio must be one of token, sequence, got 'word'"),
        (dict(advantage="remax", whiten_scores="batch"), "whiten_scores must be none for remax"),
        (
            dict(batch_size=2, num_samples=3, minibatch_size=7),
            "minibatch_size must be from 1 to 6, got 7",
        ),
        (dict(entropy_coef=math.inf), "entropy_coef must be at least 0, got inf"),
        (
            dict(clip_range_high=0.28),
            "clip_range_high has no effect on the one update of a rollout",
        ),
        (dict(ratio="sequence"), "ratio has no effect on the one update of a rollout"),
        (
            dict(whiten_scores="batch"),
            "whiten_scores has no effect on grpo, which divides by a deviation anyway",
        ),
        (
            dict(advantage="rloo", whiten_scores="batch", whiten_mean=True),
            "whiten_mean has no effect on advantages",
        ),
    ],
)
def test_an_option_without_effect_or_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**options)
