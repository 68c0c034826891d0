"""TRPO: the largest step of the policy within a KL, and a critic that trains as PPO's."""

import copy

import pytest
import torch
from helpers import (
    PROMPTS,
    adapted,
    added_up,
    experience_of,
    fives,
    forward,
    gradients,
    make_ppo,
    rollout_of,
    snapshot,
    tiny,
)
from torch.testing import assert_close

from rlhf_core import full_kl
from rlhf_core.algorithms import trpo
from rlhf_core.data import Example
from rlhf_core.masking import masked_mean
from rlhf_core.policy_gradient.trust_region import flat, trained_weights
from rlhf_core.rollout import response_hidden
from rlhf_core.trainers import TRPOConfig, TRPOTrainer
from rlhf_core.training.metrics import Metrics


def make(model=None, out=None, prompts=PROMPTS, others=None, **config):
    """A TRPO trainer whose critic takes one step for each rollout."""
    torch.manual_seed(5)
    settings = dict(
        batch_size=8, minibatch_size=8, ppo_epochs=1, response_length=6, temperature=1.0, lr=1e-3
    )
    config = TRPOConfig(**(settings | dict(max_kl=1e-3, cg_damping=0.01) | config))
    model = tiny() if model is None else model
    return TRPOTrainer(model, prompts, config, reward=fives, out=out, **(others or {}))


def prepared(trainer):
    """A rollout and its experience, with ratio 1."""
    rollout = rollout_of(trainer)
    old = experience_of(trainer, rollout)
    return rollout, old._replace(old_logprobs=trainer.predict(rollout).logprobs)


def exact_kl(old, new, rollout, temperature=1.0):
    """The mean KL per token of one policy to another, float64."""
    with torch.no_grad():
        logits = [m.logits(response_hidden(m, rollout)).double() for m in (old, new)]
    return full_kl(*logits, temperature=temperature).mean().item()


def surrogate(trainer, rollout, experience):
    """E[ratio * A], float64."""
    mask = rollout.response_mask
    ratio = (forward(trainer, rollout).logprobs.double() - experience.old_logprobs).exp()
    return masked_mean(ratio.detach() * experience.advantages, mask).item()


def passed(trainer, rollout, experience):
    """The metrics of one step of the policy and of the critic's."""
    metrics = Metrics()
    trainer.passes(rollout, experience, metrics)
    return metrics.means()


# ---- the policy's step


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(entropy_coef=0.5, aggregation="sequence_mean"),
        dict(kl_in="loss", kl_coef=0.5, others=dict(reference=tiny(seed=1))),
    ],
    ids=lambda x: " ".join(x),
)
def test_the_gradient_is_that_of_ppo_where_the_ratio_is_one(options, monkeypatch):
    trainer, ppo = make(**options), make_ppo(vf_coef=0.0, **options)
    rollout, old = prepared(trainer)
    want = gradients(ppo, rollout, old)[2][: len(list(ppo.model.parameters()))]
    seen, step = [], trpo.natural_step
    monkeypatch.setattr(
        trpo, "natural_step", lambda product, g, **rest: seen.append(g) or step(product, g, **rest)
    )
    passed(trainer, rollout, old)
    assert_close(seen, [-flat(want)], rtol=1e-4, atol=1e-6)
    assert seen[0].norm() > 1e-2


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2])
@pytest.mark.parametrize("model", [tiny, adapted, lambda: tiny(tie_embeddings=False)])
def test_a_step_stays_within_max_kl_and_improves_the_surrogate(model, max_kl):
    trainer = make(model(), max_kl=max_kl, temperature=0.8)
    rollout, old = prepared(trainer)
    start, before = copy.deepcopy(trainer.model), surrogate(trainer, rollout, old)
    report = passed(trainer, rollout, old)
    kl, gain = exact_kl(start, trainer.model, rollout, 0.8), surrogate(trainer, rollout, old)
    assert max_kl / 4 < kl <= max_kl * 1.001
    assert report["trpo/kl"] == pytest.approx(kl, rel=1e-3)
    assert report["trpo/improvement"] == pytest.approx(gain - before, rel=1e-3, abs=1e-6)
    assert gain > before
    assert 0.1 < report["trpo/step_fraction"] <= 1 and report["trpo/failed"] == 0
    frozen = {n for n, p in start.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (model is adapted)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, start.get_parameter(name)) == (name in frozen)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(entropy_coef=0.5, aggregation="sequence_mean"),
        dict(kl_in="loss", kl_coef=0.5, others=dict(reference=tiny(seed=1))),
    ],
    ids=lambda x: " ".join(x),
)
def test_a_short_step_improves_as_expected(options):
    """To first order the surrogate, with its bonus and penalty, gains what the gradient says."""
    trainer = make(max_kl=1e-6, **options)
    report = passed(trainer, *prepared(trainer))
    assert report["trpo/improvement"] == pytest.approx(
        report["trpo/expected_improvement"], rel=0.05
    )
    assert report["trpo/kl"] == pytest.approx(1e-6, rel=0.2) and report["trpo/step_fraction"] == 1


def test_statistics_of_the_policy_are_those_after_its_step():
    trainer = make(max_kl=1e-2)
    rollout, old = prepared(trainer)
    report, mask = passed(trainer, rollout, old), rollout.response_mask
    ratio = (forward(trainer, rollout).logprobs - old.old_logprobs).exp()[mask].mean().item()
    assert report["val/ratio"] == pytest.approx(ratio, rel=1e-4) and abs(ratio - 1) > 1e-3
    assert report["loss/policy_avg"] == pytest.approx(-surrogate(trainer, rollout, old), abs=1e-5)
    assert report["policy/clipfrac_avg"] == 0


@pytest.mark.parametrize(
    "options", [dict(micro_batch_size=3), dict(micro_batch_size=1, activation_checkpointing=True)]
)
def test_micro_batches_and_checkpointing_give_the_same_step(options):
    results = []
    for more in ({}, options):
        trainer = make(max_kl=1e-2, **more)
        start = flat(trained_weights(trainer.model).values()).detach()
        passed(trainer, *prepared(trainer))
        results.append(flat(trained_weights(trainer.model).values()).detach() - start)
    assert_close(*results, rtol=0, atol=0.01 * results[0].abs().max().item())


def test_the_fisher_matrix_is_made_of_a_share_of_the_responses(monkeypatch):
    seen, product = [], trpo.fisher_product

    def watched(model, rollout, vector, **rest):
        seen.append(len(rollout.response_ids))
        assert rest["tokens"] == int(rollout.response_mask.sum())
        assert rest["micro_batch_size"] == 2
        return product(model, rollout, vector, **rest)

    monkeypatch.setattr(trpo, "fisher_product", watched)
    trainer = make(fisher_share=0.3, micro_batch_size=2, cg_iterations=4)
    rollout, old = prepared(trainer)
    start = copy.deepcopy(trainer.model)
    assert passed(trainer, rollout, old)["trpo/failed"] == 0
    assert seen == [3] * 4  # ceil(0.3 * 8) responses, in cg_iterations products
    assert exact_kl(start, trainer.model, rollout) <= 1.001e-3


def test_a_failed_search_leaves_the_policy_and_is_counted(monkeypatch):
    """Every step downhill is worse. The critic trains on."""
    step = trpo.natural_step
    monkeypatch.setattr(trpo, "natural_step", lambda *given, **rest: -step(*given, **rest))
    trainer = make(line_search_steps=3)
    rollout, old = prepared(trainer)
    policy, critic = snapshot(trainer.model), snapshot(trainer.critic)
    with pytest.warns(UserWarning, match="step 1: no step of the line search improves"):
        report = passed(trainer, rollout, old)
    assert report["trpo/failed"] == 1 and report["trpo/step_fraction"] == 0
    assert report["trpo/kl"] == report["trpo/improvement"] == 0
    assert report["trpo/expected_improvement"] == 0
    assert report["val/ratio"] == pytest.approx(1, abs=1e-5)
    for before, model, same in ((policy, trainer.model, True), (critic, trainer.critic, False)):
        pairs = [(before[name], x) for name, x in model.state_dict().items()]
        assert all(torch.equal(*pair) for pair in pairs) == same


@pytest.mark.filterwarnings("error")
def test_without_advantages_there_is_no_step_and_no_failure():
    trainer = make()
    rollout, old = prepared(trainer)
    policy = snapshot(trainer.model)
    report = passed(trainer, rollout, old._replace(advantages=torch.zeros_like(old.advantages)))
    assert {report[f"trpo/{name}"] for name in ("failed", "kl", "step_fraction")} == {0}
    assert all(torch.equal(x, policy[name]) for name, x in trainer.model.state_dict().items())


def test_bfloat16_keeps_the_trust_region_in_float32():
    trainer = make(precision="bfloat16", max_kl=1e-3)
    rollout, old = prepared(trainer)
    start = copy.deepcopy(trainer.model)
    report = passed(trainer, rollout, old)
    kl = exact_kl(start, trainer.model, rollout)
    assert report["trpo/kl"] == pytest.approx(kl, rel=1e-2) and 2e-4 < kl <= 1.001e-3


@pytest.mark.filterwarnings("ignore:.*NaN")
def test_a_gradient_that_is_not_finite_changes_nothing():
    trainer = make()
    rollout, old = prepared(trainer)
    policy = snapshot(trainer.model)
    old.advantages[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="no weight was updated"):
        passed(trainer, rollout, old)
    assert all(torch.equal(x, policy[name]) for name, x in trainer.model.state_dict().items())


def test_a_policy_that_changed_since_the_rollout_is_noticed():
    trainer = make()
    rollout, old = prepared(trainer)
    with pytest.raises(FloatingPointError, match=r"the first minibatch has ratio .* not 1"):
        passed(trainer, rollout, old._replace(old_logprobs=old.old_logprobs - 0.1))


# ---- the critic


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_critic_gets_the_gradient_that_ppo_gives_it(micro_batch_size):
    trainer, ppo = make(micro_batch_size=micro_batch_size), make_ppo()
    rollout, old = prepared(trainer)
    metrics, critic = Metrics(), list(ppo.critic.parameters())
    want = gradients(ppo, rollout, old)[2][-len(critic) :]
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)  # for `added_up`, which reads all of them
    losses = trainer.minibatch_losses(rollout, old._replace(), metrics)
    _, report, got = added_up(trainer, losses, metrics)
    assert_close(got[-len(critic) :], want, rtol=1e-4, atol=1e-6)
    assert not any(x.any() for x in got[: -len(critic)])
    assert report["loss/value_avg"] > 0


@pytest.mark.parametrize("model", [tiny, adapted])
def test_a_critic_on_the_trunk_trains_its_head_alone(model):
    """The policy's step is the same at any learning rate of the critic."""
    policies, heads = [], []
    for lr in (1e-9, 0.1):
        trainer = make(model(), critic="head", lr=lr, ppo_epochs=3)
        trainer.critic.score.weight.data.fill_(0.1)
        passed(trainer, *prepared(trainer))
        policies.append(snapshot(trainer.model))
        heads.append(trainer.critic.score.weight.detach().clone())
    assert all(torch.equal(x, policies[1][name]) for name, x in policies[0].items())
    assert (heads[1] - heads[0]).abs().max() > 0.01
    assert trainer.optimizer.param_groups[0]["params"] == [trainer.critic.score.weight]


def test_warmup_steps_train_only_the_critic():
    trainer = make(prompts=PROMPTS * 3, critic_warmup_steps=2)
    start, history = snapshot(trainer.model), []
    for batch in list(trainer.batches())[:2]:
        history.append(trainer.advance(batch))
    assert all(torch.equal(x, start[name]) for name, x in trainer.model.state_dict().items())
    assert all("trpo/kl" not in line and line["loss/value_avg"] > 0 for line in history)


def test_without_value_loss_no_critic_trains():
    trainer = make(vf_coef=0.0)
    critic = snapshot(trainer.critic)
    assert "loss/value_avg" not in passed(trainer, *prepared(trainer))
    assert all(torch.equal(x, critic[name]) for name, x in trainer.critic.state_dict().items())


# ---- runs


@pytest.mark.slow
def test_trpo_learns_within_its_trust_region():
    options = dict(batch_size=24, kl_coef=0.0, max_kl=0.05, lr=1e-2, cg_iterations=5)
    history = make(prompts=PROMPTS * 60, **options).train()
    assert history[-1]["objective/scores"] > history[0]["objective/scores"] + 1
    assert all(line["trpo/kl"] <= 0.05 for line in history)


@pytest.mark.parametrize("model", [tiny, pytest.param(adapted, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_like_an_unbroken_one(model, tmp_path):
    def build(**config):
        options = dict(fisher_share=0.5, cg_iterations=3, lr_schedule="constant") | config
        return make(model(), tmp_path, prompts=PROMPTS * 3, **options)

    whole = build()
    history = whole.train()
    build(max_steps=2, save_every=2).train()
    rest = build()
    rest.resume()
    for got, want in zip(rest.train(), history, strict=True):
        assert {n: x for n, x in got.items() if n != "eps"} == {
            n: x for n, x in want.items() if n != "eps"
        }
    for one, other in zip(whole.trained_models(), rest.trained_models()):
        theirs = snapshot(other)
        assert all(torch.equal(x, theirs[name]) for name, x in snapshot(one).items())
    with pytest.raises(ValueError, match="max_kl"):
        build(max_kl=0.5).resume()


def test_a_run_that_moves_nothing_names_max_kl():
    with pytest.warns(UserWarning, match=r"max_kl 1e-12 moved the policy by .* a larger max_kl"):
        make(
            prompts=[[5]] * 10,
            cg_iterations=1,
            line_search_steps=1,
            batch_size=1,
            minibatch_size=1,
            max_kl=1e-12,
        ).train()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_kl=0.0), "max_kl must be > 0, got 0.0"),
        (dict(cg_damping=0.0), "cg_damping must be > 0, got 0.0"),
        (dict(cg_iterations=0), "cg_iterations must be at least 1, got 0"),
        (dict(fisher_share=1.5), r"fisher_share must be in \(0, 1\], got 1.5"),
        (dict(backtrack=1.0), r"backtrack must be in \(0, 1\), got 1.0"),
        (dict(line_search_steps=0), "line_search_steps must be at least 1, got 0"),
        (dict(clip_range=0.2), "clip_range must be inf in TRPO: max_kl bounds a step, got 0.2"),
        (dict(clip_range_high=0.2), "clip_range_high must be None in TRPO: max_kl bounds"),
        (dict(dual_clip=3.0), "dual_clip must be None in TRPO: max_kl bounds"),
        (dict(max_approx_kl=0.1), "max_approx_kl must be None in TRPO: see max_kl, got 0.1"),
        (dict(critic_lr=0.1), "critic_lr must be None in TRPO: lr is the critic's, got 0.1"),
        (dict(ptx_coef=0.1), "ptx_coef must be 0 in TRPO: its surrogate knows rollouts only"),
        (dict(dropout=True), "dropout must be False in TRPO: its KL belongs to a fixed policy"),
        (dict(kl_in="loss", kl_estimator="full"), "kl_estimator must be k1, k2 or k3 in the loss"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_what_has_no_place_in_trpo_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TRPOConfig(**options)


def test_ptx_examples_are_refused():
    with pytest.raises(ValueError, match="ptx_coef is 0"):
        make(others=dict(ptx_examples=[Example([7], [5, 2])]))
