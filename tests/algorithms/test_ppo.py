"""PPO: the ratio starts at 1, returns and advantages, the critic, and only what trains moves."""

import copy
import itertools
import json

import pytest
import torch
from helpers import (
    NAN,
    PROMPTS,
    Letters,
    adapted,
    experience_of,
    gradients,
    lengths,
    make_ppo,
    rollout_of,
    snapshot,
    tiny,
)
from torch.testing import assert_close

from rlhf_core import ppo_advantages, whiten
from rlhf_core.data import Example
from rlhf_core.masking import explained_variance
from rlhf_core.models import RewardModel, Transformer, ValueModel
from rlhf_core.models.lora import LoRAConfig, adapters_off, add_adapters
from rlhf_core.trainers import PPOConfig


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("critic, model", [("separate", tiny), ("head", tiny), ("head", adapted)])
def test_the_first_minibatch_has_ratio_one(micro_batch_size, temperature, critic, model):
    """Rows 2, 3, 4: for every split, with dropout in the model's config, at any temperature."""
    trainer = make_ppo(
        model(dropout=0.1),
        micro_batch_size=micro_batch_size,
        temperature=temperature,
        critic=critic,
    )
    report = trainer.step(PROMPTS)
    assert report["val/ratio"] == pytest.approx(1, abs=1e-5)
    for name in ("policy/approxkl_avg", "val/ratio_var"):
        assert report[name] == pytest.approx(0, abs=1e-6)
    assert report["policy/clipfrac_avg"] == report["val/clipfrac_avg"] == 0
    assert report["val/rollout_mismatch"] < 1e-5
    assert report["objective/kl"] == pytest.approx(
        0, abs=1e-5
    )  # the reference is the policy itself


def test_dropout_is_off_unless_asked_for():
    quiet, noisy = make_ppo(tiny(dropout=0.3)), make_ppo(tiny(dropout=0.3), dropout=True)
    for trainer, mode in ((quiet, False), (noisy, True)):
        assert trainer.model.training == trainer.critic.training == mode
        with trainer.reference.policy() as reference:
            assert not reference.training
    assert noisy.step(PROMPTS)["policy/approxkl_avg"] > 1e-3


# ---- advantages


def test_rewards_add_up_and_the_last_counted_token_carries_the_score():
    """Row 7: a short row, a full one, one that ends at once, and an empty one."""
    mask = torch.arange(5) < torch.tensor([3, 5, 1, 0])[:, None]
    scores, kl = torch.tensor([2.0, -1.0, 3.0, 9.0]), torch.randn(4, 5)
    zeros = torch.zeros(4, 5)
    rewards = ppo_advantages(
        scores, kl.masked_fill(~mask, NAN), zeros, zeros, mask, kl_coef=0.3
    ).rewards
    counted = kl.masked_fill(~mask, 0)
    assert_close(rewards.sum(dim=1)[:3], (scores - 0.3 * counted.sum(dim=1))[:3])
    assert not rewards[~mask].any()
    bare = rewards + 0.3 * counted
    for row, last in enumerate((2, 4, 0)):
        assert_close(
            bare[row],
            torch.zeros(5).index_fill(0, torch.tensor(last), scores[row].item()),
            atol=1e-6,
            rtol=0,
        )


def captured(**options):
    """The rollout and experience that a step optimises on."""
    trainer, seen = make_ppo(**options), []
    losses = trainer.minibatch_losses
    trainer.minibatch_losses = lambda *arguments: seen.append(arguments[:2]) or losses(*arguments)
    trainer.step(PROMPTS)
    return seen


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_returns_are_the_discounted_rewards_to_come_and_advantages_are_whitened(gamma):
    options = dict(reward=lengths, kl_coef=0.0, gamma=gamma, lam=1.0)
    ((rollout, experience),) = captured(**options)
    mask, scores = rollout.response_mask, torch.tensor(lengths(None, rollout.responses()))
    to_come = scores[:, None] - 1 - torch.arange(mask.shape[1])  # tokens after each one
    returns = scores[:, None] * gamma**to_come * mask
    assert_close(experience.returns, returns)
    want = whiten(returns - experience.old_values, mask)
    assert_close(experience.advantages, want, rtol=1e-4, atol=1e-5)
    assert_close(experience.advantages[mask].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 3), 2.0), returns, mask) == 0
    assert explained_variance(torch.tensor([[3.0, 1.0, NAN]]), returns, mask) == -3
    assert explained_variance(returns, torch.ones(1, 3), mask) == 0  # returns that do not vary


def test_rewards_of_tokens_arrive_at_their_tokens():
    """With gamma = lam = 1 the return is the sum of the rewards to come."""

    def each(prompts, responses):
        return [[float(token == 5) for token in response] for response in responses]

    trainer = make_ppo(reward=each, kl_coef=0.0, lam=1.0, length_penalty=0.25)
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


# ---- the critic


def test_a_head_on_the_policys_trunk_takes_one_forward_for_both(monkeypatch):
    trainer = make_ppo(critic="head", micro_batch_size=3)
    rollout = rollout_of(trainer)
    experience = experience_of(trainer, rollout)
    forwards = []
    trainer.model.trunk.register_forward_hook(lambda *_: forwards.append(1))
    loss, _, got = gradients(trainer, rollout, experience)
    assert len(forwards) == 3  # micro-batches
    assert len(got) == len(list(trainer.model.parameters())) + 1
    twice = make_ppo(critic="head", micro_batch_size=3)
    twice.shares_trunk = False  # so that the critic takes its own forward
    want_loss, _, want = gradients(twice, rollout, experience)
    assert loss == pytest.approx(want_loss, abs=1e-6)
    assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_value_loss_moves_a_trunk_that_it_shares_by_its_weight():
    rollout = rollout_of(make_ppo())

    def trunk_gradient(vf_coef, critic):
        trainer = make_ppo(critic=critic, vf_coef=vf_coef)
        experience = experience_of(make_ppo(), rollout)
        return gradients(trainer, rollout, experience)[2][0]

    alone, little, more = (trunk_gradient(vf_coef, "head") for vf_coef in (0.0, 0.5, 1.0))
    assert (little - alone).abs().max() > 1e-3
    assert_close(more - alone, 2 * (little - alone), rtol=1e-3, atol=1e-5)
    assert_close(trunk_gradient(1.0, "separate"), alone, rtol=1e-4, atol=1e-6)


def test_a_critic_that_contradicts_the_config_is_refused():
    model = tiny()
    with pytest.raises(
        ValueError, match="critic is 'head', but the critic passed has a trunk of its own"
    ):
        make_ppo(model, critic="head", others=dict(critic=ValueModel.from_model(model)))
    shared = ValueModel.from_model(model, share_trunk=True)
    with pytest.raises(
        ValueError, match=r"critic is 'separate', but the critic passed .* the policy's trunk"
    ):
        make_ppo(model, others=dict(critic=shared))
    assert make_ppo(model, critic="head", others=dict(critic=shared)).critic is shared


@pytest.mark.parametrize("kind", [tiny, adapted])
def test_a_critic_on_the_policys_trunk_is_saved_and_loaded(kind, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = tiny() if kind is tiny else Transformer.from_pretrained(tmp_path / "base")
    if kind is adapted:
        add_adapters(model, LoRAConfig(base=str(tmp_path / "base")))
    trainer = make_ppo(model, critic="head", lr=1e-2, others=dict(out=tmp_path / "out"))
    trainer.train()
    assert (tmp_path / "out" / "critic" / "adapter_config.json").exists() == (kind is adapted)
    critic, policy = (
        ValueModel.from_pretrained(tmp_path / "out" / "critic"),
        Transformer.from_pretrained(tmp_path / "out"),
    )
    assert_close(snapshot(critic), snapshot(trainer.critic), rtol=0, atol=0)
    assert_close(snapshot(policy), snapshot(model), rtol=0, atol=0)


def test_the_critic_has_its_own_learning_rate():
    fast, slow = (
        make_ppo(critic_lr=critic_lr, lr=1e-3, warmup_steps=2) for critic_lr in (1e-2, None)
    )
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
def test_during_warmup_only_the_critic_learns(critic, estimator):
    """This holds with every other term in the loss. The coefficients are not steered."""
    losses = dict(
        entropy_coef=0.1,
        ptx_coef=0.5,
        kl_in="loss",
        kl_estimator=estimator,
        kl_target=1.0,
        kl_horizon=8,
    )
    others = dict(ptx_examples=[Example([1], [2, 3])], reference=tiny(seed=1))
    trainer = make_ppo(
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


def test_a_critic_starts_from_the_reward_model_unless_configured_otherwise():
    model, reward = tiny(), RewardModel.from_model(tiny(seed=1))
    of_reward, of_policy = make_ppo(model, reward), make_ppo(model, reward, critic_init="policy")
    assert torch.equal(of_reward.critic.trunk.embed.weight, reward.trunk.embed.weight)
    assert torch.equal(of_policy.critic.trunk.embed.weight, model.trunk.embed.weight)


# ---- the reference


def bytes_held(*modules):
    """Bytes of all storages behind the parameters, each counted once."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for m in modules
        for p in m.parameters()
    }
    return sum(storages.values())


def test_with_adapters_and_a_head_ppo_holds_its_weights_once(monkeypatch):
    """The reference is the policy without its adapters, so no copy of the weights is made."""
    model = adapted(start=0)
    base, before = copy.deepcopy(model), snapshot(model)
    monkeypatch.setattr(
        copy, "deepcopy", lambda x, memo=None: pytest.fail(f"a copy of {type(x).__name__}")
    )
    trainer = make_ppo(model, critic="head", ppo_epochs=2, lr=1e-2)
    trainer.step(PROMPTS)
    assert (
        bytes_held(model, trainer.critic, trainer.reference.model)
        == bytes_held(model) + trainer.critic.score.weight.nbytes
    )
    moved = {
        name for name, weight in snapshot(model).items() if not torch.equal(weight, before[name])
    }
    assert moved == {name for name in before if "lora_" in name}
    ids = torch.tensor([PROMPTS[0]])
    with trainer.reference.policy() as reference:
        assert torch.equal(reference(ids), base(ids))
    assert not torch.equal(model(ids), base(ids))


def test_adapters_trained_before_are_part_of_the_reference():
    """The reference is the policy as it is now, not the model that its adapters were made for."""
    model = adapted()
    start = copy.deepcopy(model)
    trainer = make_ppo(model, critic="head", lr=1e-2)
    assert trainer.step(PROMPTS)["objective/kl"] == pytest.approx(0, abs=1e-5)
    ids = torch.tensor([PROMPTS[0]])
    with adapters_off(start):
        bare = start(ids)
    with trainer.reference.policy() as reference:
        assert torch.equal(reference(ids), start(ids)) and not torch.equal(reference(ids), bare)
    assert not torch.equal(model(ids), start(ids))
    assert trainer.step(PROMPTS)["objective/kl"] != pytest.approx(0, abs=1e-5)


def test_a_base_that_trains_cannot_be_the_reference():
    """Row 28: it never falls back silently."""
    model = adapted()
    model.trunk.norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"trunk\.norm\.weight trains beside the adapters, .* no fixed reference"
    ):
        make_ppo(model)
    assert make_ppo(model, others=dict(reference=tiny())).step(PROMPTS)["objective/kl"] != 0
    with pytest.raises(ValueError, match="the reference is the policy itself, which trains"):
        make_ppo(model, others=dict(reference=model))


# ---- what moves


def test_the_policy_and_the_critic_move_and_nothing_else_does():
    """Row 32. A critic made from a frozen reward model trains."""
    reward = RewardModel.from_model(tiny(seed=1)).requires_grad_(False)
    model = tiny()
    frozen = model.trunk.blocks[0].requires_grad_(False)
    trainer = make_ppo(model, reward, ppo_epochs=2)
    modules = dict(
        policy=model, critic=trainer.critic, reference=trainer.reference.model, reward=reward
    )
    before = {name: snapshot(module) for name, module in modules.items()}
    for name in ("trunk.embed.weight", "score.weight"):
        assert torch.equal(before["critic"][name], before["reward"][name])
    trainer.step(PROMPTS)
    held = {f"trunk.blocks.0.{name}" for name in frozen.state_dict()}
    for module, weights in before.items():
        for name, weight in snapshot(modules[module]).items():
            moves = module == "critic" or (module == "policy" and name not in held)
            assert torch.equal(weight, weights[name]) != moves, (module, name)


def test_a_given_critic_and_reference_are_used():
    critic, reference = ValueModel.from_model(tiny(seed=2)), tiny(seed=3)
    trainer = make_ppo(others=dict(critic=critic, reference=reference))
    assert trainer.critic is critic
    with trainer.reference.policy() as used:
        assert used is reference  # no copy
    assert trainer.step(PROMPTS)["objective/kl"] > 0.1


# ---- the whole


def learned(n, **config):
    """Every step's metrics of a run at constant learning rate."""
    return make_ppo(prompts=PROMPTS * n, ppo_epochs=4, lr_schedule="constant", **config).train()


def test_the_score_rises():
    scores = [
        step["objective/scores"]
        for step in learned(32, batch_size=32, minibatch_size=16, lr=2e-2, kl_coef=0.0)
    ]
    assert scores[0] < 0.6 and scores[-1] > 2


@pytest.mark.slow
def test_the_kl_penalty_holds_the_policy_back():
    far, near = (
        learned(12, lr=1e-2, kl_coef=kl_coef)[-1]["objective/kl"] for kl_coef in (1e-9, 5.0)
    )
    assert near < far / 2


def test_training_writes_policy_critic_config_and_one_line_of_metrics_per_step(tmp_path):
    others = dict(out=tmp_path, tokenizer=Letters())
    trainer = make_ppo(
        prompts=PROMPTS * 2,
        reward=lengths,
        others=others,
        max_prompt_length=2,
    )
    history = trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history and [line["step"] for line in lines] == [1, 2]
    names = """objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward
    objective/scores objective/kl_coef policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg
    loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio val/ratio_var val/num_eos_tokens
    val/explained_variance lr eps episode"""
    assert set(names.split()) <= set(lines[0])
    assert json.loads((tmp_path / "run.json").read_text())["options"]["response_length"] == 6
    assert (tmp_path / "letters").exists()
    for saved, kept in (
        (Transformer.from_pretrained(tmp_path), trainer.model),
        (ValueModel.from_pretrained(tmp_path / "critic"), trainer.critic),
    ):
        assert_close(snapshot(saved), snapshot(kept), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(critic="shared"), "critic must be one of separate, head, got 'shared'"),
        (dict(value_clip_range=0), "value_clip_range must be > 0, got 0"),
        (dict(gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (dict(lam=-0.1), r"lam must be in \[0, 1\], got -0.1"),
        (dict(critic_warmup_steps=3, vf_coef=0.0), "critic_warmup_steps must be 0 with vf_coef 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)
