"""The parts of a policy-gradient step, each against hand-made arithmetic where there is one."""

import copy
import math

import pytest
import torch
from helpers import (
    NAN,
    PROMPTS,
    Letters,
    adapted,
    experience_of,
    fives,
    forward,
    gradients,
    head_calls,
    lengths,
    make_ppo,
    rollout_of,
    snapshot,
    tiny,
)
from torch.testing import assert_close

from rlhf_core import full_kl
from rlhf_core.data import Example
from rlhf_core.masking import loss_weights, masked_mean
from rlhf_core.models import RewardModel
from rlhf_core.models.transformer import Trunk
from rlhf_core.policy_gradient.experience import Experience
from rlhf_core.rollout import Rollout, response_logprobs, sample
from rlhf_core.trainers import (
    GRPOConfig,
    GRPOTrainer,
    NLPOConfig,
    NLPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_core.training.metrics import Metrics

# ---- sampling and scoring


@pytest.mark.parametrize("limit", [dict(max_prompt_length=2), dict(response_length=30)])
def test_prompts_without_room_are_dropped_or_truncated(limit):
    """The model has 32 positions."""
    message = "3 of 8 prompts have more than 2 tokens; the longest is prompt 0 with 4"
    with pytest.warns(UserWarning, match=message):
        ((rollout, _),) = captured(**limit)
    assert sorted(rollout.prompts()) == sorted(ids for ids in PROMPTS if len(ids) < 3)
    with pytest.warns(UserWarning, match=message):
        ((rollout, _),) = captured(on_long_prompt="truncate", **limit)
    assert sorted(rollout.prompts()) == sorted(ids[-2:] for ids in PROMPTS)
    with pytest.raises(ValueError, match=message):
        captured(on_long_prompt="error", **limit)


def test_a_response_must_leave_room_for_a_prompt():
    with pytest.raises(ValueError, match="response_length 32 leaves no room for a prompt"):
        make_ppo(response_length=32)


@pytest.mark.parametrize("strings, ends", [((), (2, 7)), (("f", "kk"), (2, 7, 5))])
def test_the_missing_eos_penalty_applies_only_to_rows_without_an_end(strings, ends):
    """Rows 8 and 11: several ids and stop strings end a response, at the last place as well."""
    others = dict(eos_ids=(2, 7), tokenizer=Letters())
    trainer = make_ppo(reward=lengths, missing_eos_penalty=1.5, stop_strings=strings, others=others)
    rollout = trainer.sample(PROMPTS * 8)
    ended = [r[-1] in ends or (r[-2:] == [10, 10] and bool(strings)) for r in rollout.responses()]
    assert rollout.ended.tolist() == ended
    assert {len(r) == 6 for r, end in zip(rollout.responses(), ended) if end} == {True, False}
    texts = [Letters().decode(ids) for ids in rollout.responses()]
    want = [len(text) - 1.5 * (not end) for text, end in zip(texts, ended)]
    assert_close(trainer.score(rollout, PROMPTS * 8), torch.tensor(want))
    assert {r[-1] for r, end in zip(rollout.responses(), ended) if end} >= set(ends)


def test_the_token_that_completes_a_stop_string_is_trained_on():
    """With a reward of nothing but the length penalty, the stop string becomes likely."""
    options = dict(stop_strings=("f",), length_penalty=1.0, lr=1e-2, epochs=30)
    trainer = make_ppo(
        reward=lambda prompts, _: [0.0] * len(prompts),
        others=dict(tokenizer=Letters(), eos_ids=()),
        **options,
    )
    history = trainer.train()
    assert history[-1]["response_length"] < 2 < 3.5 < history[0]["response_length"]
    assert history[-1]["val/num_eos_tokens"] == 8


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        make_ppo(stop_strings=("f",))
    with pytest.raises(ValueError, match="stop_strings must be a list of strings, got 'f'"):
        make_ppo(stop_strings="f")


def test_penalties_for_length_and_missing_eos_are_subtracted_from_the_score():
    trainer = make_ppo(reward=lengths, length_penalty=0.5, missing_eos_penalty=2.0)
    rollout = rollout_of(trainer)
    want = [len(r) * 0.5 - 2.0 * (r[-1] not in (2, 3)) for r in rollout.responses()]
    assert_close(trainer.score(rollout, rollout.prompts()), torch.tensor(want))
    assert len({r[-1] in (2, 3) for r in rollout.responses()}) == 2


@pytest.mark.parametrize("whiten_mean", [False, True])
def test_scores_are_whitened_over_the_batch_or_the_run_then_clipped(whiten_mean):
    """Row 15; tokens and responses alike."""
    mask = torch.tensor([[True, True], [True, False]])
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([7.0, 9.0])
    options = dict(whiten_mean=whiten_mean)
    of_batch = make_ppo(whiten_scores="batch", **options)
    shift = torch.tensor([2.0, 8.0]) * whiten_mean
    assert_close(of_batch.shape(first, mask), first - shift[0])  # a deviation of 1
    assert_close(of_batch.shape(second, mask), second - shift[1])
    running = make_ppo(whiten_scores="running", score_clip=1.5, **options)
    assert_close(running.shape(first, mask), (first - shift[0]).clamp(-1.5, 1.5))
    both = torch.cat((first, second))
    want = (second - both.mean() * whiten_mean) / both.std(correction=0)
    assert_close(running.shape(second, mask), want.clamp(-1.5, 1.5))
    tokens = torch.tensor([[0.5, 0.5], [3.0, 0.0]])  # the same scores, token by token
    got = make_ppo(whiten_scores="batch", **options).shape(tokens, mask)
    assert_close(got.sum(dim=1), of_batch.shape(first, mask))
    assert got[0, 0] == 0.5 and got[1, 1] == 0


@pytest.mark.parametrize("whiten_scores", ["batch", "running"])
@pytest.mark.parametrize("whiten_mean", [False, True])
def test_equal_scores_are_not_divided_by_their_rounding(whiten_scores, whiten_mean):
    for score in (0.1, 3.0, 1e6 + 0.1):
        trainer = make_ppo(
            whiten_scores=whiten_scores,
            whiten_mean=whiten_mean,
            reward=lambda p, r, s=score: [s] * len(r),
        )
        report = trainer.step(PROMPTS)
        want = 0.0 if whiten_mean else score
        assert report["objective/rlhf_reward"] == pytest.approx(want, rel=1e-5, abs=1e-2)


def test_a_reward_function_gets_strings_with_a_tokenizer_and_ids_without():
    """Row 35."""
    calls = []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return torch.arange(8)

    for tokenizer in (None, Letters()):
        report = make_ppo(reward=reward, others=dict(tokenizer=tokenizer)).step(PROMPTS)
        assert report["objective/scores"] == 3.5
    (prompts, responses), (texts, replies) = calls
    assert prompts == PROMPTS and all(
        isinstance(i, int) for response in responses for i in response
    )
    assert any(response[-1] in (2, 3) for response in responses)
    assert texts == [Letters().decode(prompt) for prompt in PROMPTS]
    assert replies == [Letters().decode(response) for response in responses]


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_score_that_is_not_finite_is_reported_and_nothing_is_trained(bad):
    trainer = make_ppo(reward=lambda prompts, responses: [1.0, 1.0, bad] + [1.0] * 5)
    before = snapshot(trainer.model), snapshot(trainer.critic)
    with pytest.raises(ValueError, match=rf"reward of row 2 is {bad}; prompt \[6\], response \["):
        trainer.step(PROMPTS)
    assert_close((snapshot(trainer.model), snapshot(trainer.critic)), before, rtol=0, atol=0)


def test_a_reward_model_with_a_nan_score_trains_nothing():
    reward = RewardModel.from_model(tiny(seed=1))
    trainer = make_ppo(reward=reward)
    reward.score.weight.data.fill_(NAN)
    before = snapshot(trainer.model), snapshot(trainer.critic)
    with pytest.raises(ValueError, match=r"reward of row 0 is nan; prompt \[5, 3, 7, 4\]"):
        trainer.step(PROMPTS)
    assert_close((snapshot(trainer.model), snapshot(trainer.critic)), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "scores, message",
    [
        ([1.0] * 7, "7 rows for 8 responses"),
        (
            [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]] * 8,
            r"reward of row 0 has shape \(7,\), but the response has \d tokens",
        ),
        (1.0, "the reward returned 1.0: 'float' object is not iterable"),
        (["good"] * 8, r"the reward returned \['good'"),
    ],
)
def test_scores_of_a_wrong_shape_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        make_ppo(reward=lambda prompts, responses: scores).step(PROMPTS)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_reward_model_scores_prompt_and_response_without_padding(micro_batch_size):
    reward = RewardModel.from_model(tiny(seed=1))
    trainer = make_ppo(reward=reward.train(), micro_batch_size=micro_batch_size)
    rollout = rollout_of(trainer)
    rows = [
        torch.tensor([prompt + response]) for prompt, response in zip(PROMPTS, rollout.responses())
    ]
    want = torch.cat([reward(row, torch.ones_like(row, dtype=torch.bool)) for row in rows])
    assert_close(trainer.score(rollout, rollout.prompts()), want, rtol=0, atol=1e-5)


# ---- predictions


def test_values_do_not_depend_on_the_temperature_and_log_probs_do():
    """Row 4."""
    cold, hot = make_ppo(temperature=0.5), make_ppo(temperature=2.0)
    rollout = rollout_of(cold)
    a, b = cold.predict(rollout), hot.predict(rollout)
    assert torch.equal(a.values, b.values)
    assert not torch.isclose(a.logprobs, b.logprobs)[rollout.response_mask].any()
    assert (a.entropy < b.entropy)[rollout.response_mask].all()  # colder, less entropy


def test_a_rollout_is_computed_only_up_to_its_longest_row_and_without_a_mask(monkeypatch):
    trainer = make_ppo()
    rollout = rollout_of(trainer)
    longest = max(len(p) + len(r) for p, r in zip(rollout.prompts(), rollout.responses()))
    calls, forward = [], Trunk.forward
    monkeypatch.setattr(
        Trunk, "forward", lambda *a, **k: calls.append((a[1:], k)) or forward(*a, **k)
    )
    trainer.predict(rollout)
    assert len(calls) == 3  # policy, reference, critic
    for (input_ids, *rest), options in calls:
        assert input_ids.shape == (8, longest - 1) and rest == [None] and set(options) == {"read"}


@pytest.mark.filterwarnings("ignore:kl_estimator full in the reward")
def test_the_reward_is_charged_the_exact_kl():
    reference = tiny(seed=1)
    trainer = make_ppo(
        kl_estimator="full", kl_coef=0.3, micro_batch_size=3, others=dict(reference=reference)
    )
    rollout = rollout_of(trainer)
    kl = trainer.predict(rollout).kl
    for b, (prompt, response) in enumerate(zip(rollout.prompts(), rollout.responses())):
        ids = torch.tensor([prompt + response])
        p, q = (model(ids)[0, len(prompt) - 1 : -1] for model in (trainer.model, reference))
        assert_close(kl[b, : len(response)], full_kl(p, q), rtol=1e-4, atol=1e-6)
    assert not kl[~rollout.response_mask].any()
    torch.manual_seed(7)
    twin = copy.deepcopy(trainer)
    report = trainer.step(PROMPTS)
    charged = twin.predict(twin.sample(PROMPTS)).kl.sum(dim=1).mean().item()
    assert report["objective/non_score_reward"] == pytest.approx(-0.3 * charged, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs", "full"])
def test_an_estimator_without_the_gradient_of_the_kl_warns_in_the_reward(estimator):
    """Row 18."""
    with pytest.warns(
        UserWarning, match=f"{estimator} in the reward: its policy gradient is not the KL's"
    ):
        make_ppo(kl_estimator=estimator)


def test_the_mismatch_of_sampling_and_training_is_reported():
    trainer = make_ppo()
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


# ---- the loss of a minibatch


@pytest.mark.parametrize("left, right", [(0, 4), (3, 0), (2, 2)])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_padding_columns_change_no_loss_metric_or_gradient(left, right, aggregation):
    """Row 6: for any content of the added columns."""
    trainer = make_ppo(aggregation=aggregation)
    rollout = rollout_of(trainer)
    experience = experience_of(trainer, rollout)

    def pad(x, before, after, value):
        return torch.nn.functional.pad(x, (before, after), value=value)

    padded = Rollout(
        pad(rollout.prompt_ids, left, 0, 7),
        pad(rollout.prompt_mask, left, 0, False),
        pad(rollout.response_ids, 0, right, 2),
        pad(rollout.response_mask, 0, right, False),
        pad(rollout.logprobs, 0, right, NAN),
        rollout.ended,
    )
    want = gradients(trainer, rollout, experience)
    got = gradients(trainer, padded, Experience(*(pad(x, 0, right, NAN) for x in experience[:5])))
    assert want[1]["policy/clipfrac_avg"] > 0 and want[1]["val/clipfrac_avg"] > 0
    assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_micro_batches_add_up_to_the_minibatch(aggregation):
    """Row 16: 1x8, 2x4, 8x1 and an uneven split, lengths unequal."""
    rollout = rollout_of(make_ppo())
    results = []
    for size in (None, 1, 2, 4, 3):
        trainer = make_ppo(aggregation=aggregation, micro_batch_size=size)
        results.append(gradients(trainer, rollout, experience_of(make_ppo(), rollout)))
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_with_a_wide_clip_range_it_is_the_policy_gradient(aggregation):
    """Row 33: at ratio 1 the gradient is that of -A * log p, one row at a time, without padding."""
    trainer = make_ppo(aggregation=aggregation, clip_range=1e6, vf_coef=0.0, ppo_epochs=2)
    rollout = rollout_of(trainer)
    experience = experience_of(trainer, rollout)._replace(
        old_logprobs=trainer.predict(rollout).logprobs
    )
    _, _, got = gradients(trainer, rollout, experience)
    trainer.optimizer.zero_grad()
    lengths = rollout.response_mask.sum(dim=1).tolist()
    for b, (prompt, response) in enumerate(zip(PROMPTS, rollout.responses())):
        log_p = trainer.model(torch.tensor([prompt + response]))[
            0, len(prompt) - 1 : -1
        ].log_softmax(-1)
        taken = log_p[torch.arange(lengths[b]), response]
        weight = 1 / sum(lengths) if aggregation == "token_mean" else 1 / (8 * lengths[b])
        (-(experience.advantages[b, : lengths[b]] * taken).sum() * weight).backward()
    want = [p.grad for p in trainer.model.parameters()]
    assert_close(got[: len(want)], want, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in want) > 1e-2


@pytest.mark.parametrize("critic", ["head", "separate"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_logits_and_loss_of_an_update_are_computed_once(critic, aggregation, monkeypatch):
    """One call of the head per micro-batch, one call of the loss function per chunk of it."""
    options = dict(critic=critic, aggregation=aggregation, ppo_epochs=4, clip_range=0.01)
    trainer = make_ppo(micro_batch_size=3, kl_coef=0.0, **options)
    rollout, predict = [], trainer.predict
    trainer.predict = lambda found: rollout.append(found) or predict(found)
    calls = head_calls(monkeypatch, rows_at_once=12)
    report = trainer.step(PROMPTS)
    assert 0 < report["policy/clipfrac_avg"] < 1, report
    tokens = int(rollout[0].response_mask.sum())
    assert len(calls) == 4 * 3 < sum(map(len, calls))
    assert sum(count for chunks in calls for _, count in chunks) == 4 * tokens
    assert all(count <= 12 for chunks in calls for _, count in chunks)


@pytest.mark.parametrize("ratio", [100.0, -100.0])
def test_a_ratio_that_overflows_moves_nothing_where_the_advantage_is_zero(ratio):
    """Row 17, through the model."""
    trainer = make_ppo(vf_coef=0.0)
    rollout = rollout_of(trainer)
    experience = experience_of(trainer, rollout)
    experience = experience._replace(
        old_logprobs=experience.old_logprobs - ratio,
        advantages=torch.zeros_like(experience.advantages),
    )
    loss, metrics, got = gradients(trainer, rollout, experience)
    assert loss == 0 and all(math.isfinite(value) for value in metrics.values())
    assert not any(g.any() for g in got[: len(list(trainer.model.parameters()))])


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_the_kl_in_the_loss_adds_its_gradient_and_leaves_the_reward_alone(estimator):
    reference = tiny(seed=1)
    trainers = [
        make_ppo(**options, others=dict(reference=reference), vf_coef=0.0)
        for options in (
            dict(kl_coef=0),
            *(dict(kl_in="loss", kl_estimator=estimator, kl_coef=c) for c in (0.5, 1.0)),
        )
    ]
    trainers[0].full_kl = lambda *arguments: pytest.fail("computed for a weight of 0")
    rollout = rollout_of(trainers[0])
    old = experience_of(make_ppo(others=dict(reference=reference)), rollout)
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


def test_a_higher_upper_clip_range_clips_less():
    trainer = make_ppo(clip_range=0.1, clip_range_high=0.5, vf_coef=0.0, ppo_epochs=2)
    rollout = rollout_of(trainer)
    old = experience_of(trainer, rollout)
    higher, same, lower = (
        gradients(make_ppo(**options, vf_coef=0.0, ppo_epochs=2), rollout, old)[1][
            "policy/clipfrac_avg"
        ]
        for options in (
            dict(clip_range=low, clip_range_high=high)
            for low, high in ((0.1, 0.5), (0.1, None), (0.5, 0.1))
        )
    )
    assert higher < same and lower < same and higher != lower


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
    rollout = rollout_of(make_ppo())
    old = experience_of(make_ppo(), rollout)
    none, some = (make_ppo(entropy_coef=coef, vf_coef=0.0) for coef in (0.0, 0.5))
    added = [
        b - a for a, b in zip(gradients(none, rollout, old)[2], gradients(some, rollout, old)[2])
    ]
    some.optimizer.zero_grad()
    (-0.5 * masked_mean(forward(some, rollout).entropy, rollout.response_mask)).backward()
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
def test_micro_batches_add_up_with_every_term_of_the_loss(options):
    """Row 16."""
    reference = tiny(seed=1)
    rollout = rollout_of(make_ppo())
    old = experience_of(make_ppo(others=dict(reference=reference)), rollout)
    results = [
        gradients(
            make_ppo(micro_batch_size=size, others=dict(reference=reference), **options),
            rollout,
            old,
        )
        for size in (None, 1, 3)
    ]
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_sequence_sum_gives_every_token_the_same_weight():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    want = torch.where(mask, 1 / (10 * 2), 0.0)
    assert_close(loss_weights(mask, "sequence_sum", length=10), want)
    with pytest.raises(ValueError, match="'sequence_sum' needs a length"):
        loss_weights(mask, "sequence_sum")


def test_truncated_importance_weights_correct_for_another_sampler():
    capped, plain = make_ppo(importance_cap=1.1), make_ppo()
    rollout = rollout_of(plain)
    columns = plain.predict(rollout)
    old = experience_of(plain, rollout)._replace(old_logprobs=columns.logprobs)
    differs = rollout._replace(
        logprobs=columns.logprobs + 0.3 * torch.randn(columns.logprobs.shape)
    )
    seen, losses = [], capped.minibatch_losses
    capped.minibatch_losses = lambda *arguments: seen.append(arguments[:2]) or losses(*arguments)
    capped.update(differs, old, Metrics())
    weight = (columns.logprobs - differs.logprobs).exp().clamp(max=1.1)
    ((shuffled, got),), mask = seen, rollout.response_mask
    want = (old.advantages * weight)[mask]
    assert_close(got.advantages[shuffled.response_mask].sort().values, want.sort().values)
    assert weight[mask].max() <= 1.1 < (1 / weight[mask]).max()


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_step_reports_its_importance_weights(level, mode):
    """The sampler is another policy; the effective sample size is that of the weights used."""
    bounds = dict(importance_cap=1.1, importance_floor=0.9)
    trainer = make_ppo(importance_level=level, importance_mode=mode, **bounds)
    rollouts, sample = [], trainer.sample

    def other(*batch, **options):
        rollout = sample(*batch, **options)
        noise = torch.randn(rollout.logprobs.shape) * rollout.response_mask
        rollouts.append(rollout._replace(logprobs=rollout.logprobs + 0.1 * noise))
        return rollouts[0]

    trainer.sample = other
    policy = copy.deepcopy(trainer.model)
    report, (rollout,) = trainer.step(PROMPTS), rollouts
    trainer.model = policy
    mask = rollout.response_mask
    log_ratio = (forward(trainer, rollout).logprobs - rollout.logprobs).detach().double()
    ratio = log_ratio[mask].exp() if level == "token" else (log_ratio * mask).sum(dim=1).exp()
    inside = (ratio >= 0.9) & (ratio <= 1.1)
    weight = ratio * inside if mode == "mask" else ratio.clamp(0.9, 1.1)
    assert 0 < inside.double().mean() < 1
    want = {
        "weight": weight.mean(),
        "ess": weight.sum() ** 2 / (weight**2).sum() / len(weight),
        "above_cap": (ratio > 1.1).double().mean(),
        "below_floor": (ratio < 0.9).double().mean(),
    }
    for name, value in want.items():
        assert report[f"importance/{name}"] == pytest.approx(float(value), rel=1e-4), name
    assert "weight_squared" not in report


def make_grpo(model=None, others=None, **config):
    """A GRPO trainer with one update for each rollout."""
    settings = dict(batch_size=4, num_samples=2, response_length=6, temperature=1.0, lr=1e-3)
    config = GRPOConfig(**(settings | config))
    return GRPOTrainer(tiny(), PROMPTS[:4], config, reward=fives, **(others or {}))


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("make", [make_ppo, make_grpo])
def test_rollouts_in_fewer_bits_are_corrected_and_repeated_by_a_resumed_run(make, dtype, tmp_path):
    """Weights, metrics and names are those of an engine that rounds otherwise."""
    pytest.importorskip("rlhf_core.cpp", reason="the C++ extension is not built")
    options = dict(rollout_dtype=dtype, importance_cap=2.0, epochs=2)
    whole, exact = make(**options), make()
    sampled, sample = [], whole.sample
    whole.sample = lambda *a, **b: sampled.append(sample(*a, **b)) or sampled[-1]
    start = copy.deepcopy(whole.model)
    first, *_ = history = whole.train()
    assert 1e-6 < first["val/rollout_kl"] < 0.1 and exact.train()[0]["val/rollout_kl"] < 1e-9
    (rollout, *_), mask = sampled, sampled[0].response_mask
    with torch.no_grad():
        logprobs, _ = response_logprobs(start, rollout, whole.config.temperature)
    ratio = (logprobs - rollout.logprobs)[mask].exp().clamp(max=2.0)
    assert first["importance/weight"] == pytest.approx(float(ratio.mean()), rel=1e-5)

    def stop(metrics, step):
        raise KeyError("stop")

    broken = make(others=dict(out=tmp_path, on_step=stop), **options)
    with pytest.raises(RuntimeError, match="continue from"):
        broken.train()
    resumed = make(others=dict(out=tmp_path), **options)
    resumed.resume()
    timed = ("eps", "tokens_per_second")
    last, want = resumed.train()[-1], history[-1]
    assert {k: x for k, x in last.items() if k not in timed} == {
        k: x for k, x in want.items() if k not in timed
    }
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, resumed.model.state_dict()[name])


def test_rollouts_in_fewer_bits_are_refused_or_warned_about():
    with pytest.raises(ValueError, match="rollout_dtype is int8, but the engine samples"):
        make_ppo(rollout_dtype="int8", others=dict(engine=object()))
    with pytest.raises(ValueError, match=r"rollout_dtype int8 is for CPUs, .* on meta"):
        make_ppo(tiny().to("meta"), rollout_dtype="int8")
    with pytest.raises(ValueError, match="nlpo samples from a masked policy, which has no dec"):
        NLPOTrainer(tiny(), PROMPTS, NLPOConfig(rollout_dtype="int8"), reward=lengths)
    with pytest.warns(UserWarning, match="rollout_dtype int8 without importance_cap"):
        make_ppo(rollout_dtype="int8")


def test_if_all_weights_are_masked_the_policy_stays():
    trainer = make_ppo(importance_cap=1e-6, importance_mode="mask", vf_coef=0.0)
    before = snapshot(trainer.model)
    report = trainer.step(PROMPTS)
    assert report["importance/ess"] == report["importance/weight"] == 0
    assert report["importance/above_cap"] == 1
    assert all(torch.equal(x, before[name]) for name, x in trainer.model.state_dict().items())


def test_without_a_cap_no_weights_are_reported():
    assert not [name for name in make_ppo().step(PROMPTS) if name.startswith("importance/")]


def test_importance_weights_reach_the_kl_in_the_loss():
    trainer = make_ppo(
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


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_ptx_adds_the_gradient_of_the_cross_entropy(micro_batch_size):
    """Ouyang et al. 2022, eq. 2: gamma times the pretraining gradient, its micro-batches add up."""
    example = Example([7, 8], [5, 9, 2])
    options = dict(vf_coef=0.0, micro_batch_size=micro_batch_size)
    trainer = make_ppo(ptx_coef=0.7, others=dict(ptx_examples=[example] * 4), **options)
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
    trainer = make_ppo(ptx_coef=0.5, micro_batch_size=1, others=dict(ptx_examples=[masked, good]))
    assert trainer.step(PROMPTS)["loss/ptx"] > 0


def test_ptx_keeps_up_a_text_that_the_reward_would_let_go():
    example = Example([7], [9, 2])

    def likelihood(ptx_coef):
        others = dict(ptx_examples=[example]) if ptx_coef else {}
        trainer = make_ppo(
            prompts=PROMPTS * 8, lr=1e-2, ptx_coef=ptx_coef, kl_coef=0.0, others=others
        )
        trainer.train()
        logits = trainer.model(torch.tensor([[7, 9]])).log_softmax(-1)[0]
        return float(logits[0, 9] + logits[1, 2])

    assert likelihood(1.0) > likelihood(0.0) + 2


# ---- the passes


def captured(**options):
    """The rollout and experience that a step optimises on."""
    trainer, seen = make_ppo(**options), []
    losses = trainer.minibatch_losses
    trainer.minibatch_losses = lambda *arguments: seen.append(arguments[:2]) or losses(*arguments)
    trainer.step(trainer.examples)
    return seen


def test_every_epoch_sees_every_rollout_once_in_minibatches():
    seen = captured(minibatch_size=3, ppo_epochs=2)
    assert [len(rollout.response_ids) for rollout, _ in seen] == [3, 3, 2] * 2
    for epoch in (seen[:3], seen[3:]):
        prompts = [prompt for rollout, _ in epoch for prompt in rollout.prompts()]
        assert sorted(prompts) == sorted(PROMPTS) and prompts != PROMPTS
    assert len(captured(minibatch_size=None)) == 4  # a quarter of the batch each


def test_the_passes_stop_early_above_max_approx_kl():
    def updates(max_approx_kl):
        options = dict(minibatch_size=4, ppo_epochs=4, lr=5e-2, max_approx_kl=max_approx_kl)
        trainer, steps = make_ppo(**options), []
        optimize = trainer.optimize
        trainer.optimize = lambda *args: steps.append(optimize(*args)) or steps[-1]
        trainer.step(PROMPTS)
        return len([norm for norm in steps if norm is not None])

    assert updates(None) == 8 and 1 <= updates(1e-3) < 8


def test_a_run_uses_the_steered_coefficients():
    targets = dict(kl_target=0.01, kl_horizon=80, entropy_coef=0.1, entropy_target=100.0)
    trainer = make_ppo(others=dict(reference=tiny(seed=1)), **targets)
    first, second = (trainer.step(PROMPTS) for _ in range(2))
    assert (first["objective/kl_coef"], first["policy/entropy_coef"]) == (0.05, 0.1)
    assert second["objective/kl_coef"] == pytest.approx(0.05 * 1.02)
    assert second["policy/entropy_coef"] == pytest.approx(0.1 * 1.02)
    assert trainer.kl_coef.value > second["objective/kl_coef"]


def test_a_reference_that_follows_is_a_copy_averaged_with_the_policy():
    given = tiny(seed=1)
    before = snapshot(given)
    trainer = make_ppo(others=dict(reference=given), reference_ema=0.75, lr=1e-2)
    trainer.step(PROMPTS)
    assert_close(snapshot(given), before, rtol=0, atol=0)
    want = {
        name: 0.75 * before[name] + 0.25 * weight
        for name, weight in snapshot(trainer.model).items()
    }
    assert_close(snapshot(trainer.reference.model), want)


# ---- the report


def test_a_step_reports_the_means_over_its_rows():
    reference, temperature, kl_coef = tiny(seed=1), 0.8, 0.3
    options = dict(temperature=temperature, kl_coef=kl_coef, missing_eos_penalty=1.0)
    trainer = make_ppo(others=dict(reference=reference), **options)
    twin = copy.deepcopy(trainer)
    report = trainer.step(PROMPTS)
    rollout = sample(
        twin.model, PROMPTS, max_new_tokens=6, temperature=temperature, generator=twin.generator
    )
    rows = []
    for prompt, response in zip(PROMPTS, rollout.responses()):
        ids = torch.tensor([prompt + response])
        log_p, ref = (
            (m(ids)[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            for m in (twin.model, reference)
        )
        taken = torch.arange(len(response)), torch.tensor(response)
        kl, entropy = (log_p - ref)[taken].sum().item(), -(log_p.exp() * log_p).sum().item()
        ended = response[-1] in (2, 3)
        rows.append(
            (kl, entropy, -kl_coef * kl, response.count(5) - (not ended), ended, len(response))
        )
    kl, entropy, penalty, score, ended, length = (
        torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    )
    assert abs(kl) > 0.1 and 0 < ended < 1
    want = {
        "kl": kl,
        "entropy": entropy,
        "non_score_reward": penalty,
        "scores": score,
        "rlhf_reward": score + penalty,
    }
    want = {f"objective/{name}": value for name, value in want.items()}
    want |= {
        "val/num_eos_tokens": ended * 8,
        "response_length": length,
        "episode": 8,
        "objective/kl_coef": kl_coef,
    }
    for name, value in want.items():
        assert report[name] == pytest.approx(value, abs=1e-4), name


def test_the_same_seed_repeats_a_run_and_another_seed_does_not():
    runs = [
        make_ppo(prompts=PROMPTS * 2, minibatch_size=3, seed=seed).train() for seed in (1, 1, 2)
    ]
    assert all(step.pop("eps") > 0 for run in runs for step in run)  # episodes a second
    assert runs[0] == runs[1] != runs[2]


# ---- arguments


@pytest.mark.parametrize(
    "options, others, message",
    [
        (dict(ptx_coef=0.5), {}, r"ptx_coef is 0\.5, but there are 0 ptx_examples; pass both"),
        ({}, dict(ptx_examples=[Example([1], [2])]), r"ptx_coef is 0\.0, but there are 1 ptx_exam"),
        (dict(process_rewards=True), {}, "rewards of steps need a tokenizer"),
        (
            dict(reference_ema=0.9),
            dict(reference=tiny(hidden_size=8)),
            "a reference that follows the policy must have its shapes",
        ),
        (dict(critic_warmup_steps=1), {}, "critic_warmup_steps is 1, but the run has only 1 steps"),
    ],
    ids=["no examples", "no coefficient", "no tokenizer", "other shapes", "only warmup"],
)
def test_arguments_that_contradict_each_other_are_refused(options, others, message):
    with pytest.raises(ValueError, match=message):
        make_ppo(**options, others=others)


def test_the_policy_without_its_adapters_cannot_follow_it():
    with pytest.raises(ValueError, match="the policy without adapters cannot follow it"):
        make_ppo(adapted(), reference_ema=0.9)


# ---- what is reported and where the passes stop


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_the_loss_that_is_optimised_is_logged_with_its_parts(aggregation, micro_batch_size):
    trainer = make_ppo(
        aggregation=aggregation,
        micro_batch_size=micro_batch_size,
        kl_in="loss",
        kl_coef=0.3,
        entropy_coef=0.2,
        ptx_coef=0.5,
        vf_coef=0.7,
        others=dict(ptx_examples=[Example([7], [5, 2])]),
    )
    losses = []
    optimize = trainer.optimize

    def recorded(parts):
        parts = list(parts)
        losses.append(sum(float(part.detach()) for part in parts))
        return optimize(iter(parts))

    trainer.optimize = recorded
    report = trainer.step(PROMPTS)
    assert report["loss"] == pytest.approx(losses[0], rel=1e-5)
    parts = (
        report["loss/policy_avg"]
        + 0.7 * report["loss/value_avg"]
        + 0.3 * report["loss/kl"]
        - 0.2 * report["loss/entropy"]
        + 0.5 * report["loss/ptx"]
    )
    assert report["loss"] == pytest.approx(parts, rel=1e-5)


def test_parts_that_do_not_count_are_not_logged():
    report = make_ppo().step(PROMPTS)
    assert not {"loss/kl", "loss/entropy", "loss/ptx"} & set(report)
    total = report["loss/policy_avg"] + 0.1 * report["loss/value_avg"]
    assert report["loss"] == pytest.approx(total, rel=1e-5)


def test_the_passes_stop_before_the_step_beyond_max_approx_kl():
    """The weights are those of the steps within it; the minibatch beyond it is in the metrics."""
    settings = dict(ppo_epochs=4, lr=0.05, minibatch_size=8)
    limited = make_ppo(max_approx_kl=1e-4, **settings)
    report = limited.step(PROMPTS)
    once = make_ppo(**settings | dict(ppo_epochs=1))
    once.step(PROMPTS)
    want = snapshot(once.model)
    assert all(torch.equal(x, want[name]) for name, x in snapshot(limited.model).items())
    assert report["policy/approxkl_avg"] > 1e-4


def test_weight_decay_spares_norms_and_biases():
    trainer = make_ppo(weight_decay=0.5, lr=1e-3, max_grad_norm=1e-9)
    decayed = {
        id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    for name, weight in trainer.model.named_parameters():
        assert (id(weight) in decayed) == (weight.ndim > 1), name
