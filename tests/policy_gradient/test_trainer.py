"""Options of the methods that sample, each seen to do what it says, by hand-made arithmetic where there is one."""

import copy
import itertools
import math

import pytest
import torch
from test_ppo import (
    PROMPTS,
    experience_of,
    fives,
    gradients,
    lengths,
    make,
    rollout_of,
    snapshot,
    tiny,
)
from torch.testing import assert_close

from rlhf_core import full_kl
from rlhf_core.data import Example
from rlhf_core.masking import loss_weights, masked_mean
from rlhf_core.models import RewardModel
from rlhf_core.trainers import A2CConfig, A2CTrainer, PPOConfig, SFTConfig, SFTTrainer
from rlhf_core.policy_gradient.shaping import Coefficient
from rlhf_core.training.metrics import Metrics

# ---- the KL to the reference


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_the_kl_in_the_loss_adds_its_gradient_and_leaves_the_reward_alone(estimator):
    reference = tiny(seed=1)
    trainers = [
        make(**options, others=dict(reference=reference), vf_coef=0.0)
        for options in (
            dict(kl_coef=0),
            *(dict(kl_in="loss", kl_estimator=estimator, kl_coef=c) for c in (0.5, 1.0)),
        )
    ]
    trainers[0].full_kl = lambda *arguments: pytest.fail("computed for a weight of 0")
    rollout = rollout_of(trainers[0])
    old = experience_of(make(others=dict(reference=reference)), rollout)
    none, half, whole = (gradients(trainer, rollout, old)[2][:-1] for trainer in trainers)
    added = [b - a for a, b in zip(none, whole)]
    assert_close([b - a for a, b in zip(none, half)], [x / 2 for x in added], rtol=1e-3, atol=1e-5)
    kl = torch.zeros(())
    if estimator == "full":  # the same from whole logits, a row at a time
        weights = loss_weights(rollout.response_mask)
        for b, (prompt, response) in enumerate(zip(rollout.prompts(), rollout.responses())):
            ids = torch.tensor([prompt + response])
            p, q = (model(ids)[0, len(prompt) - 1 : -1] for model in (trainers[0].model, reference))
            kl = kl + (full_kl(p, q.detach()) * weights[b, : len(response)]).sum()
        want = torch.autograd.grad(kl, list(trainers[0].model.parameters()))
        assert_close(added[: len(want)], list(want), rtol=1e-3, atol=1e-5)
    report = trainers[2].step(PROMPTS)
    assert report["objective/non_score_reward"] == 0 != report["objective/kl"]
    assert not any(parameter.grad is not None for parameter in reference.parameters())


def test_an_estimator_is_chosen_for_the_place_where_the_kl_counts():
    assert PPOConfig().estimator == "k1" and PPOConfig(kl_in="loss").estimator == "k3"
    assert PPOConfig(kl_in="loss", kl_estimator="k2").estimator == "k2"


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs", "full"])
def test_an_estimator_whose_gradient_in_the_reward_is_not_the_kls_warns(estimator):
    """Row 18."""
    with pytest.warns(
        UserWarning, match=f"{estimator} in the reward: its policy gradient is not the KL's"
    ):
        make(kl_estimator=estimator)


@pytest.mark.filterwarnings("ignore:kl_estimator full in the reward")
def test_the_exact_kl_is_what_the_reward_is_charged():
    reference = tiny(seed=1)
    trainer = make(
        kl_estimator="full", kl_coef=0.3, micro_batch_size=3, others=dict(reference=reference)
    )
    rollout = rollout_of(trainer)
    kl = trainer.predict(rollout)["kl"]
    for b, (prompt, response) in enumerate(zip(rollout.prompts(), rollout.responses())):
        ids = torch.tensor([prompt + response])
        p, q = (model(ids)[0, len(prompt) - 1 : -1] for model in (trainer.model, reference))
        assert_close(kl[b, : len(response)], full_kl(p, q), rtol=1e-4, atol=1e-6)
    assert not kl[~rollout.response_mask].any()
    torch.manual_seed(7)
    twin = copy.deepcopy(trainer)
    report = trainer.step(PROMPTS)
    charged = twin.predict(twin.sample(PROMPTS))["kl"].sum(dim=1).mean().item()
    assert report["objective/non_score_reward"] == pytest.approx(-0.3 * charged, rel=1e-5)


def test_a_coefficient_is_steered_to_its_target():
    """The defaults' arithmetic: error = clip(kl / target - 1, +-0.2); coefficient *= 1 + error * n / horizon."""
    kl = Coefficient(0.05, 6.0, 10000)
    kl.update(6.6, 64)
    assert kl.value == pytest.approx(0.05 * (1 + 0.1 * 64 / 10000))
    kl.update(60.0, 64)
    assert kl.value == pytest.approx(0.05 * (1 + 0.1 * 64 / 10000) * (1 + 0.2 * 64 / 10000))
    entropy = Coefficient(0.01, 2.0, 1000, sign=-1)
    entropy.update(1.0, 100)
    assert entropy.value == pytest.approx(0.01 * 1.02)
    fixed = Coefficient(0.05, None, 10000)
    fixed.update(60.0, 64)
    assert fixed.value == 0.05


def test_coefficients_move_in_a_run_and_are_what_it_uses():
    trainer = make(others=dict(reference=tiny(seed=1)), kl_target=0.01, kl_horizon=80, entropy_coef=0.1,
                   entropy_target=100.0)  # fmt: skip
    first, second = (trainer.step(PROMPTS) for _ in range(2))
    assert (first["objective/kl_coef"], first["policy/entropy_coef"]) == (0.05, 0.1)
    assert second["objective/kl_coef"] == pytest.approx(0.05 * 1.02)
    assert second["policy/entropy_coef"] == pytest.approx(0.1 * 1.02)
    assert trainer.kl_coef.value > second["objective/kl_coef"]


def test_a_reference_that_follows_is_an_average_of_the_policy_and_a_copy():
    given = tiny(seed=1)
    before = snapshot(given)
    trainer = make(others=dict(reference=given), reference_ema=0.75, lr=1e-2)
    trainer.step(PROMPTS)
    assert_close(snapshot(given), before, rtol=0, atol=0)
    want = {
        name: 0.75 * before[name] + 0.25 * weight
        for name, weight in snapshot(trainer.model).items()
    }
    assert_close(snapshot(trainer.reference.model), want)


# ---- the critic


def test_the_critic_has_its_own_learning_rate():
    fast, slow = (make(critic_lr=critic_lr, lr=1e-3, warmup_steps=2) for critic_lr in (1e-2, None))
    start = snapshot(fast.critic)["score.weight"]
    for trainer in (fast, slow):
        trainer._set_lr()
        trainer.step(PROMPTS)
    assert [group["lr"] for group in fast.optimizer.param_groups] == [5e-4, 5e-3]
    moved = [(snapshot(t.critic)["score.weight"] - start).abs().mean() for t in (fast, slow)]
    assert moved[0] > 5 * moved[1]
    assert_close(snapshot(fast.model), snapshot(slow.model))


@pytest.mark.parametrize("critic", ["separate", "head"])
@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_in_its_warm_up_the_critic_alone_learns(critic, estimator):
    """Whatever else is in the loss; nor are the coefficients steered."""
    losses = dict(
        entropy_coef=0.1,
        ptx_coef=0.5,
        kl_in="loss",
        kl_estimator=estimator,
        kl_target=1.0,
        kl_horizon=8,
    )
    others = dict(ptx_examples=[Example([1], [2, 3])], reference=tiny(seed=1))
    trainer = make(
        prompts=PROMPTS * 3, critic=critic, critic_warmup_steps=2, lr=1e-2, **losses, others=others
    )
    policies, heads = [snapshot(trainer.model)], [snapshot(trainer.critic)["score.weight"]]
    step = trainer.step

    def watched(batch):
        metrics = step(batch)
        policies.append(snapshot(trainer.model))
        heads.append(snapshot(trainer.critic)["score.weight"])
        return metrics

    trainer.step = watched
    history = trainer.train()
    assert history[2]["objective/kl_coef"] == trainer.config.kl_coef != trainer.kl_coef.value
    assert_close(policies[0], policies[2], rtol=0, atol=0)
    assert not torch.equal(policies[3]["trunk.norm.weight"], policies[2]["trunk.norm.weight"])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(heads))


def test_a_critic_starts_from_the_reward_model_unless_told_otherwise():
    model, reward = tiny(), RewardModel.from_model(tiny(seed=1))
    of_reward, of_policy = make(model, reward), make(model, reward, critic_init="policy")
    assert torch.equal(of_reward.critic.trunk.embed.weight, reward.trunk.embed.weight)
    assert torch.equal(of_policy.critic.trunk.embed.weight, model.trunk.embed.weight)


# ---- rewards


def test_rewards_of_tokens_arrive_at_their_tokens():
    """A reward for every 5 as it is written; with gamma = lam = 1 the return is what is still to come."""

    def each(prompts, responses):
        return [[float(token == 5) for token in response] for response in responses]

    trainer = make(reward=each, kl_coef=0.0, lam=1.0, length_penalty=0.25)
    twin, seen = copy.deepcopy(trainer), []
    losses = trainer.minibatch_losses
    trainer.minibatch_losses = lambda *arguments: seen.append(arguments) or losses(*arguments)
    report = trainer.step(PROMPTS)
    (rollout, experience, _), fives_written = seen[0], twin.sample(PROMPTS).responses()
    assert report["objective/scores"] == pytest.approx(
        sum(row.count(5) - 0.25 * len(row) for row in fives_written) / 8
    )
    for row, response in enumerate(rollout.responses()):
        to_come = [response[t:].count(5) - 0.25 * len(response) for t in range(len(response))]
        assert_close(
            experience.returns[row, : len(response)], torch.tensor(to_come), rtol=1e-5, atol=1e-5
        )


def test_penalties_for_length_and_a_missing_end_are_taken_off_the_score():
    trainer = make(reward=lengths, length_penalty=0.5, missing_eos_penalty=2.0)
    rollout = rollout_of(trainer)
    want = [len(r) * 0.5 - 2.0 * (r[-1] not in (2, 3)) for r in rollout.responses()]
    assert_close(trainer.score(rollout), torch.tensor(want))
    assert len({r[-1] in (2, 3) for r in rollout.responses()}) == 2


@pytest.mark.parametrize("whiten_mean", [False, True])
def test_scores_are_whitened_over_the_batch_or_the_run_then_clipped(whiten_mean):
    """Row 15; tokens and responses alike."""
    mask = torch.tensor([[True, True], [True, False]])
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([7.0, 9.0])
    options = dict(whiten_mean=whiten_mean)
    of_batch = make(whiten_scores="batch", **options)
    shift = torch.tensor([2.0, 8.0]) * whiten_mean
    assert_close(of_batch.shaped(first, mask), first - shift[0])  # a deviation of 1
    assert_close(of_batch.shaped(second, mask), second - shift[1])
    running = make(whiten_scores="running", score_clip=1.5, **options)
    assert_close(running.shaped(first, mask), (first - shift[0]).clamp(-1.5, 1.5))
    both = torch.cat((first, second))
    want = (second - both.mean() * whiten_mean) / both.std(correction=0)
    assert_close(running.shaped(second, mask), want.clamp(-1.5, 1.5))
    tokens = torch.tensor([[0.5, 0.5], [3.0, 0.0]])  # the same scores, token by token
    got = make(whiten_scores="batch", **options).shaped(tokens, mask)
    assert_close(got.sum(dim=1), of_batch.shaped(first, mask))
    assert got[0, 0] == 0.5 and got[1, 1] == 0


@pytest.mark.parametrize("whiten_scores", ["batch", "running"])
@pytest.mark.parametrize("whiten_mean", [False, True])
def test_scores_that_are_alike_are_not_divided_by_their_rounding(whiten_scores, whiten_mean):
    for score in (0.1, 3.0, 1e6 + 0.1):
        trainer = make(
            whiten_scores=whiten_scores,
            whiten_mean=whiten_mean,
            reward=lambda p, r, s=score: [s] * len(r),
        )
        report = trainer.step(PROMPTS)
        want = 0.0 if whiten_mean else score
        assert report["objective/rlhf_reward"] == pytest.approx(want, rel=1e-5, abs=1e-2)


# ---- the update


def test_a_higher_upper_bound_lets_a_good_token_rise_further():
    trainer = make(clip_range=0.1, clip_range_high=0.5, vf_coef=0.0, ppo_epochs=2)
    rollout = rollout_of(trainer)
    old = experience_of(trainer, rollout)
    higher, same, lower = (
        gradients(make(**options, vf_coef=0.0, ppo_epochs=2), rollout, old)[1][
            "policy/clipfrac_avg"
        ]
        for options in (
            dict(clip_range=low, clip_range_high=high)
            for low, high in ((0.1, 0.5), (0.1, None), (0.5, 0.1))
        )
    )
    assert higher < same and lower < same and higher != lower


def test_the_entropy_bonus_has_the_entropys_gradient():
    rollout = rollout_of(make())
    old = experience_of(make(), rollout)
    none, some = (make(entropy_coef=coef, vf_coef=0.0) for coef in (0.0, 0.5))
    added = [
        b - a for a, b in zip(gradients(none, rollout, old)[2], gradients(some, rollout, old)[2])
    ]
    some.optimizer.zero_grad()
    found = some.forward(rollout)
    (-0.5 * masked_mean(found["entropy"], rollout.response_mask)).backward()
    for got, parameter in zip(added, some.model.parameters()):
        assert_close(got, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(aggregation="sequence_sum"),
        dict(kl_in="loss", kl_estimator="full", kl_coef=0.5),
        dict(kl_in="loss", kl_estimator="k3", kl_coef=0.5, entropy_coef=0.1),
        dict(dual_clip=1.5, clip_range_high=0.3, aggregation="sequence_mean", ppo_epochs=2),
    ],
    ids=str,
)
def test_micro_batches_add_up_whatever_is_in_the_loss(options):
    """Row 16."""
    reference = tiny(seed=1)
    rollout = rollout_of(make())
    old = experience_of(make(others=dict(reference=reference)), rollout)
    results = [
        gradients(
            make(micro_batch_size=size, others=dict(reference=reference), **options), rollout, old
        )
        for size in (None, 1, 3)
    ]
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_sequence_sum_weighs_a_token_the_same_whatever_its_response_is_long():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    want = torch.where(mask, 1 / (10 * 2), 0.0)
    assert_close(loss_weights(mask, "sequence_sum", length=10), want)
    with pytest.raises(ValueError, match="needs the length"):
        loss_weights(mask, "sequence_sum")


def test_passes_end_when_the_policy_has_moved_too_far():
    def updates(max_approx_kl):
        trainer, steps = (
            make(minibatch_size=4, ppo_epochs=4, lr=5e-2, max_approx_kl=max_approx_kl),
            [],
        )
        optimize = trainer.optimize
        trainer.optimize = lambda losses: steps.append(1) or optimize(losses)
        trainer.step(PROMPTS)
        return len(steps)

    assert updates(None) == 8 and 1 < updates(1e-3) < 8


def test_truncated_importance_weights_make_up_for_a_sampler_that_differs():
    capped, plain = make(importance_cap=1.1), make()
    rollout = rollout_of(plain)
    columns = plain.predict(rollout)
    old = experience_of(plain, rollout)._replace(old_logprobs=columns["logprobs"])
    differs = rollout._replace(
        logprobs=columns["logprobs"] + 0.3 * torch.randn(columns["logprobs"].shape)
    )
    seen = []
    capped.minibatch_losses = lambda rollout, experience, metrics: (
        seen.append((rollout, experience)) or iter(())
    )
    capped.optimize = lambda losses: 0.0
    capped.checked = lambda losses, metrics: losses
    capped.update(differs, old, Metrics())
    weight = (columns["logprobs"] - differs.logprobs).exp().clamp(max=1.1)
    ((shuffled, got),), mask = seen, rollout.response_mask
    want = (old.advantages * weight)[mask]
    assert_close(got.advantages[shuffled.response_mask].sort().values, want.sort().values)
    assert weight[mask].max() <= 1.1 < (1 / weight[mask]).max()


def test_importance_weights_reach_the_kl_in_the_loss():
    trainer = make(
        kl_in="loss",
        kl_coef=0.5,
        vf_coef=0.0,
        importance_cap=2.0,
        others=dict(reference=tiny(seed=1)),
    )
    rollout = rollout_of(trainer)
    old = experience_of(trainer, rollout)._replace(
        advantages=torch.zeros(rollout.response_mask.shape)
    )
    once, twice = (
        gradients(
            trainer, rollout, old._replace(importance=torch.full_like(old.advantages, weight))
        )[2]
        for weight in (1.0, 2.0)
    )
    assert_close(twice, [2 * x for x in once], rtol=1e-4, atol=1e-6)
    assert max(x.abs().max() for x in once) > 1e-3


def test_the_mismatch_of_sampling_and_training_is_reported():
    trainer = make()
    rollout, sampled = rollout_of(trainer), trainer.sample

    def noisy(batch, *args, **options):
        rollout = sampled(batch, *args, **options)
        return rollout._replace(
            logprobs=rollout.logprobs + torch.tensor([0.5] + [0.1] * 7)[:, None]
        )

    trainer.sample = noisy
    report = trainer.step(PROMPTS)
    assert report["val/rollout_mismatch"] == pytest.approx(0.5, abs=1e-4)
    assert 0.1 < report["val/rollout_mismatch_mean"] < 0.3
    assert rollout.response_mask.any()


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_ptx_adds_the_gradient_of_the_cross_entropy(micro_batch_size):
    """Ouyang et al. 2022, eq. 2: gamma times the pretraining gradient, its micro-batches add up."""
    example = Example([7, 8], [5, 9, 2])
    options = dict(vf_coef=0.0, micro_batch_size=micro_batch_size)
    trainer = make(ptx_coef=0.7, others=dict(ptx_examples=[example] * 4), **options)
    metrics = Metrics()
    trainer.optimizer.zero_grad()
    for loss in trainer.ptx_losses(8, metrics):
        loss.backward()
    got = [p.grad.clone() for p in trainer.model.parameters()]
    sft = SFTTrainer(tiny(), [example], SFTConfig(batch_size=1))
    (loss,) = sft.losses([example], Metrics())
    want = torch.autograd.grad(loss, list(sft.model.parameters()))
    assert_close(got, [0.7 * g for g in want], rtol=1e-4, atol=1e-6)
    assert metrics.means()["loss/ptx"] == pytest.approx(loss.item(), rel=1e-5)


def test_ptx_examples_without_a_target_leave_their_metric_alone():
    masked, good = Example([1], [2, 3], [False, False]), Example([1], [2, 3])
    trainer = make(ptx_coef=0.5, micro_batch_size=1, others=dict(ptx_examples=[masked, good]))
    assert trainer.step(PROMPTS)["loss/ptx"] > 0


def test_ptx_holds_a_text_up_that_the_reward_would_let_go():
    example = Example([7], [9, 2])

    def likelihood(ptx_coef):
        others = dict(ptx_examples=[example]) if ptx_coef else {}
        trainer = make(prompts=PROMPTS * 8, lr=1e-2, ptx_coef=ptx_coef, kl_coef=0.0, others=others)
        trainer.train()
        logits = trainer.model(torch.tensor([[7, 9]])).log_softmax(-1)[0]
        return float(logits[0, 9] + logits[1, 2])

    assert likelihood(1.0) > likelihood(0.0) + 2


# ---- A2C


def test_a2c_is_one_step_of_the_policy_gradient():
    """Its gradient is that of -A log p and of the value error, with nothing clipped."""
    torch.manual_seed(5)
    config = A2CConfig(batch_size=8, response_length=6, temperature=1.0, lr=1e-3)
    trainer = A2CTrainer(tiny(), PROMPTS, config, reward=fives)
    rollout = rollout_of(trainer)
    old = experience_of(trainer, rollout)
    columns = trainer.predict(rollout)
    old = old._replace(
        old_logprobs=columns["logprobs"], old_values=columns["values"] + 10
    )  # any clip would bind
    _, metrics, got = gradients(trainer, rollout, old)
    trainer.optimizer.zero_grad()
    found, mask = trainer.forward(rollout), rollout.response_mask
    error = (found["values"] - old.returns) ** 2 / 2
    masked_mean(-old.advantages * found["logprobs"] + 0.1 * error, mask).backward()
    assert_close(got, [p.grad for p in trainer.trained_parameters()], rtol=1e-4, atol=1e-6)
    assert metrics["policy/clipfrac_avg"] == metrics["val/clipfrac_avg"] == 0


def test_a2c_takes_one_optimiser_step_a_rollout_and_learns():
    config = A2CConfig(
        batch_size=32,
        response_length=6,
        temperature=1.0,
        lr=2e-2,
        lr_schedule="constant",
        kl_coef=0,
    )
    torch.manual_seed(5)
    trainer, steps = A2CTrainer(tiny(), PROMPTS * 100, config, reward=fives), []
    optimize = trainer.optimize
    trainer.optimize = lambda losses: steps.append(1) or optimize(losses)
    history = trainer.train()
    assert len(steps) == len(history) == 25
    assert history[-1]["objective/scores"] > history[0]["objective/scores"] + 2


@pytest.mark.parametrize(
    "option",
    [dict(ppo_epochs=2), dict(clip_range=0.2), dict(minibatch_size=4), dict(dual_clip=3.0)],
)
def test_a2c_refuses_what_would_make_it_ppo(option):
    with pytest.raises(
        ValueError,
        match=f"{next(iter(option))} (must be .* in A2C|has no effect on the one update)",
    ):
        A2CConfig(**option)


# ---- options that contradict each other


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kl_target=6.0, kl_coef=0.0), "kl_target has no effect without kl_coef > 0"),
        (dict(kl_horizon=5), "kl_horizon has no effect without kl_target or entropy_target, got 5"),
        (dict(entropy_target=1.0), "entropy_target has no effect without entropy_coef > 0"),
        (dict(whiten_mean=True), "whiten_mean has no effect without whiten_scores"),
        (dict(reference_ema=0.9, kl_coef=0.0), "reference_ema has no effect without kl_coef > 0"),
        (dict(reference_ema=1.0), r"reference_ema must be in \(0, 1\), got 1.0"),
        (
            dict(kl_in="loss", kl_estimator="abs"),
            "kl_estimator must be one whose gradient is the KL's in the loss",
        ),
        (dict(dual_clip=1.0), "dual_clip must be > 1, got 1.0"),
        (dict(score_clip=0.0), "score_clip must be > 0, got 0.0"),
        (dict(whiten_scores="yes"), "whiten_scores must be one of none, batch, running, got 'yes'"),
        (
            dict(critic="head", critic_init="policy"),
            "critic_init has no effect without a separate critic",
        ),
        (
            dict(critic_warmup_steps=3, vf_coef=0.0),
            "critic_warmup_steps has no effect without vf_coef > 0",
        ),
        (dict(ptx_coef=-1.0), "ptx_coef must be at least 0, got -1.0"),
        (
            dict(kl_target=6.0, kl_horizon=63),
            "kl_horizon must be at least a rollout's 64 responses, got 63",
        ),
        (dict(kl_in="loss", kl_coef=0.0), "kl_in has no effect without kl_coef > 0, got 'loss'"),
        (
            dict(kl_estimator="k1", kl_coef=0.0),
            "kl_estimator has no effect without kl_coef > 0, got 'k1'",
        ),
        (dict(length_penalty=math.nan), "length_penalty must be finite, got nan"),
        (dict(missing_eos_penalty=math.inf), "missing_eos_penalty must be finite, got inf"),
        (dict(max_prompt_length=0), "max_prompt_length must be > 0, got 0"),
        *(
            (
                dict(ppo_epochs=1, minibatch_size=64) | option,
                f"{next(iter(option))} has no effect on the one update",
            )
            for option in (
                dict(clip_range=0.3),
                dict(clip_range_high=0.3),
                dict(dual_clip=3.0),
                dict(max_approx_kl=0.1),
                dict(value_clip_range=0.3),
            )
        ),
    ],
)
def test_an_option_without_effect_or_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_what_bounds_the_ratio_counts_where_dropout_moves_it():
    one_update = dict(ppo_epochs=1, minibatch_size=64, dropout=True)
    assert (
        PPOConfig(**one_update, clip_range=0.1, dual_clip=3.0, value_clip_range=0.3).clip_range
        == 0.1
    )
    with pytest.raises(ValueError, match="max_approx_kl has no effect"):
        PPOConfig(**one_update, max_approx_kl=0.1)
    with pytest.raises(ValueError, match="dropout must be False in A2C"):
        A2CConfig(dropout=True)


def test_what_the_arguments_contradict_is_refused():
    with pytest.raises(ValueError, match=r"ptx_coef 0.5 goes with ptx_examples, there are 0"):
        make(ptx_coef=0.5)
    with pytest.raises(ValueError, match=r"ptx_coef 0.0 goes with ptx_examples, there are 1"):
        make(others=dict(ptx_examples=[Example([1], [2])]))
    with pytest.raises(ValueError, match="rewards of steps need a tokenizer"):
        make(process_rewards=True)
    with pytest.raises(ValueError, match="a reference that follows the policy must have its shape"):
        make(reference_ema=0.9, others=dict(reference=tiny(hidden_size=8)))
    with pytest.raises(ValueError, match="critic_warmup_steps 1 is all of the 1 steps"):
        make(critic_warmup_steps=1)
    from test_ppo import adapted

    with pytest.raises(ValueError, match="cannot follow it"):
        make(adapted(), reference_ema=0.9)
