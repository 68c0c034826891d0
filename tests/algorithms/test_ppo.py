"""PPO: the ratio starts at 1, padding and micro-batches change nothing, rewards add up, and only what trains moves."""

import copy
import json
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core import ppo_advantages, whiten
from rlhf_core.masking import explained_variance
from rlhf_core.models import RewardModel, Transformer, TransformerConfig, ValueModel
from rlhf_core.models.lora import LoRAConfig, adapters_off, add_adapters
from rlhf_core.models.transformer import Trunk
from rlhf_core.ops import linear_logprobs_blocks
from rlhf_core.rollout import Rollout, sample
from rlhf_core.trainers import PPOConfig, PPOTrainer
from rlhf_core.policy_gradient.trainer import Experience
from rlhf_core.training.metrics import Metrics

PROMPTS = [[5, 3, 7, 4], [8, 1], [6], [9, 9, 1], [4, 4], [3], [7, 8, 9], [1, 5]]
NAN = float("nan")


@torch.no_grad()
def tiny(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=12,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        max_positions=32,
        eos_ids=(2, 3),
        pad_id=0,
    )
    model = Transformer(TransformerConfig(**(sizes | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def adapted(seed=0, start=0.3, **options):
    """With adapters that have been trained, unless start is 0."""
    model = tiny(seed, **options)
    add_adapters(model, LoRAConfig(rank=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=start)
    return model


def fives(prompts, responses):
    return [float(response.count(5)) for response in responses]


def lengths(prompts, responses):
    return [float(len(response)) for response in responses]


def make(model=None, reward=fives, prompts=PROMPTS, others=None, **config):
    """A trainer whose step is one minibatch, unless told otherwise."""
    torch.manual_seed(5)
    settings = dict(
        batch_size=8, minibatch_size=8, ppo_epochs=1, response_length=6, temperature=1.0, lr=1e-3
    )
    config = PPOConfig(**(settings | config))
    return PPOTrainer(
        tiny() if model is None else model, prompts, config, reward=reward, **(others or {})
    )


def rollout_of(trainer, **options):
    generator = torch.Generator().manual_seed(1)
    rollout = sample(
        trainer.model, PROMPTS, max_new_tokens=6, temperature=1.5, generator=generator, **options
    )
    assert len(rollout.response_mask.sum(dim=1).unique()) > 2  # lengths differ
    return rollout


def experience_of(trainer, rollout):
    """As after some updates: the policy has moved, so that ratios differ and some clip."""
    columns = trainer.predict(rollout)
    noise = torch.Generator().manual_seed(2)
    logprobs, values, advantages, returns = (
        torch.randn(columns["values"].shape, generator=noise) for _ in range(4)
    )
    old = Experience(columns["logprobs"] + logprobs * 0.2, advantages, columns["ref_logprobs"])
    return old._replace(old_values=columns["values"] + values * 0.2, returns=returns)


def gradients(trainer, rollout, experience):
    """Loss, metrics and gradients of the minibatch, as `optimize` adds them up."""
    metrics, total = Metrics(), 0.0
    trainer.optimizer.zero_grad()
    for loss in trainer.minibatch_losses(rollout, experience, metrics):
        loss.backward()
        total += loss.item()
    return total, metrics.means(), [p.grad.clone() for p in trainer.trained_parameters()]


# ---- before any update


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("critic, model", [("separate", tiny), ("head", tiny), ("head", adapted)])
def test_the_first_minibatch_has_ratio_one(micro_batch_size, temperature, critic, model):
    """Rows 2, 3, 4: for every split, with dropout in the model's config, at any temperature."""
    trainer = make(
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
    quiet, noisy = make(tiny(dropout=0.3)), make(tiny(dropout=0.3), dropout=True)
    for trainer, mode in ((quiet, False), (noisy, True)):
        assert trainer.model.training == trainer.critic.training == mode
        with trainer.reference.policy() as reference:
            assert not reference.training
    assert noisy.step(PROMPTS)["policy/approxkl_avg"] > 1e-3


def test_values_do_not_depend_on_the_temperature_and_log_probs_do():
    """Row 4."""
    cold, hot = make(temperature=0.5), make(temperature=2.0)
    rollout = rollout_of(cold)
    a, b = cold.predict(rollout), hot.predict(rollout)
    assert torch.equal(a["values"], b["values"])
    assert not torch.isclose(a["logprobs"], b["logprobs"])[rollout.response_mask].any()
    assert (a["entropy"] < b["entropy"])[rollout.response_mask].all()  # colder, less entropy


# ---- padding and micro-batches


@pytest.mark.parametrize("left, right", [(0, 4), (3, 0), (2, 2)])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_padding_columns_change_no_loss_metric_or_gradient(left, right, aggregation):
    """Row 6: whatever the added columns hold."""
    trainer = make(aggregation=aggregation)
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
    )
    want = gradients(trainer, rollout, experience)
    got = gradients(trainer, padded, Experience(*(pad(x, 0, right, NAN) for x in experience[:5])))
    assert want[1]["policy/clipfrac_avg"] > 0 and want[1]["val/clipfrac_avg"] > 0
    assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_micro_batches_add_up_to_the_minibatch(aggregation):
    """Row 16: 1x8, 2x4, 8x1 and an uneven split, lengths unequal."""
    rollout = rollout_of(make())
    results = []
    for size in (None, 1, 2, 4, 3):
        trainer = make(aggregation=aggregation, micro_batch_size=size)
        results.append(gradients(trainer, rollout, experience_of(make(), rollout)))
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_with_a_wide_clip_range_it_is_the_policy_gradient(aggregation):
    """Row 33: at ratio 1 the gradient is that of -A * log p, one row at a time, without padding."""
    trainer = make(aggregation=aggregation, clip_range=1e6, vf_coef=0.0, ppo_epochs=2)
    rollout = rollout_of(trainer)
    experience = experience_of(trainer, rollout)._replace(
        old_logprobs=trainer.predict(rollout)["logprobs"]
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


def test_a_padded_rollout_is_computed_as_far_as_its_longest_row_and_without_a_mask(monkeypatch):
    trainer = make()
    rollout = rollout_of(trainer)
    longest = max(len(p) + len(r) for p, r in zip(rollout.prompts(), rollout.responses()))
    calls, forward = [], Trunk.forward
    monkeypatch.setattr(
        Trunk, "forward", lambda *a, **k: calls.append((a[1:], k)) or forward(*a, **k)
    )
    trainer.predict(rollout)
    assert len(calls) == 3  # policy, reference, critic
    for (input_ids, *rest), options in calls:
        assert input_ids.shape == (8, longest - 1) and not rest and set(options) == {"read"}


# ---- one trunk


@pytest.mark.parametrize("critic", ["head", "separate"])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_the_logits_of_an_update_are_computed_once(critic, aggregation, monkeypatch):
    """The loss that the head is told of beforehand is the one that comes: nothing is left for backward to compute."""
    trainer = make(
        critic=critic, aggregation=aggregation, micro_batch_size=3, ppo_epochs=4, clip_range=0.01
    )
    monkeypatch.setattr(
        linear_logprobs_blocks, "backward", lambda *args: pytest.fail("computed again")
    )
    report = trainer.step(PROMPTS)
    assert 0 < report["policy/clipfrac_avg"] < 1, report


def test_a_head_on_the_policys_trunk_takes_one_forward_for_both(monkeypatch):
    trainer = make(critic="head", micro_batch_size=3)
    rollout = rollout_of(trainer)
    experience = experience_of(trainer, rollout)
    forwards = []
    trainer.model.trunk.register_forward_hook(lambda *_: forwards.append(1))
    loss, _, got = gradients(trainer, rollout, experience)
    assert len(forwards) == 3  # micro-batches
    assert len(got) == len(list(trainer.model.parameters())) + 1
    twice = make(critic="head", micro_batch_size=3)
    twice.one_trunk = False  # forward by forward
    want_loss, _, want = gradients(twice, rollout, experience)
    assert loss == pytest.approx(want_loss, abs=1e-6)
    assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_value_loss_moves_a_trunk_that_it_shares_by_its_weight():
    rollout = rollout_of(make())

    def trunk_gradient(vf_coef, critic):
        trainer = make(critic=critic, vf_coef=vf_coef)
        experience = experience_of(make(), rollout)
        return gradients(trainer, rollout, experience)[2][0]

    alone, little, more = (trunk_gradient(vf_coef, "head") for vf_coef in (0.0, 0.5, 1.0))
    assert (little - alone).abs().max() > 1e-3
    assert_close(more - alone, 2 * (little - alone), rtol=1e-3, atol=1e-5)
    assert_close(trunk_gradient(1.0, "separate"), alone, rtol=1e-4, atol=1e-6)


def bytes_held(*modules):
    """Of the storages behind the parameters, each counted once."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for m in modules
        for p in m.parameters()
    }
    return sum(storages.values())


def test_with_adapters_and_a_head_ppo_holds_its_weights_once(monkeypatch):
    """The reference is the policy without its adapters: no copy of the weights is made, then or later."""
    model = adapted(start=0)
    base, before = copy.deepcopy(model), snapshot(model)
    monkeypatch.setattr(
        copy, "deepcopy", lambda x, memo=None: pytest.fail(f"a copy of {type(x).__name__}")
    )
    trainer = make(model, critic="head", ppo_epochs=2, lr=1e-2)
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


def test_adapters_that_were_trained_before_are_part_of_the_reference():
    """The reference is the policy as it is now, not the model that its adapters were made for."""
    model = adapted()
    start = copy.deepcopy(model)
    trainer = make(model, critic="head", lr=1e-2)
    assert trainer.step(PROMPTS)["objective/kl"] == pytest.approx(0, abs=1e-5)
    ids = torch.tensor([PROMPTS[0]])
    with adapters_off(start):
        bare = start(ids)
    with trainer.reference.policy() as reference:
        assert torch.equal(reference(ids), start(ids)) and not torch.equal(reference(ids), bare)
    assert not torch.equal(model(ids), start(ids))
    assert trainer.step(PROMPTS)["objective/kl"] != pytest.approx(0, abs=1e-5)


def test_a_base_that_moves_is_no_reference():
    """Row 28: it never falls back silently."""
    model = adapted()
    model.trunk.norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"no reference without its adapters while trunk\.norm\.weight trains"
    ):
        make(model)
    assert make(model, others=dict(reference=tiny())).step(PROMPTS)["objective/kl"] != 0
    with pytest.raises(ValueError, match="the policy itself, which moves"):
        make(model, others=dict(reference=model))


def test_a_given_critic_is_on_the_trunk_that_the_config_says():
    model = tiny()
    with pytest.raises(
        ValueError, match="critic='head', but the critic given is on a trunk of its own"
    ):
        make(model, critic="head", others=dict(critic=ValueModel.from_model(model)))
    shared = ValueModel.from_model(model, share_trunk=True)
    with pytest.raises(
        ValueError, match="critic='separate', but the critic given is on the policy's trunk"
    ):
        make(model, others=dict(critic=shared))
    assert make(model, critic="head", others=dict(critic=shared)).critic is shared


@pytest.mark.parametrize("kind", [tiny, adapted])
def test_a_critic_on_the_policys_trunk_is_written_and_read_back(kind, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    model = tiny() if kind is tiny else Transformer.from_pretrained(tmp_path / "base")
    if kind is adapted:
        add_adapters(model, LoRAConfig(base=str(tmp_path / "base")))
    trainer = make(model, critic="head", lr=1e-2, others=dict(out=tmp_path / "out"))
    trainer.train()
    assert (tmp_path / "out" / "critic" / "adapter_config.json").exists() == (kind is adapted)
    critic, policy = (
        ValueModel.from_pretrained(tmp_path / "out" / "critic"),
        Transformer.from_pretrained(tmp_path / "out"),
    )
    assert_close(snapshot(critic), snapshot(trainer.critic), rtol=0, atol=0)
    assert_close(snapshot(policy), snapshot(model), rtol=0, atol=0)


# ---- rewards


def test_rewards_add_up_and_the_last_counted_token_carries_the_score():
    """Row 7: a short row, a full one, one that ends at once, and one with nothing."""
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


def test_the_missing_eos_penalty_touches_rows_without_any_of_the_stops():
    """Rows 8 and 11: the configured set, several ids; a row that was cut off ends at its own length."""
    trainer = make(missing_eos_penalty=1.5, others=dict(eos_ids=(2, 7)))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    ids = torch.tensor(
        [[5, 2, 0], [5, 5, 7], [7, 5, 5], [5, 2, 5], [5, 3, 2]]
    )  # 3 ends nothing here; nor 2 masked
    prompts = torch.ones(5, 2, dtype=torch.long)
    rollout = Rollout(prompts, prompts.bool(), ids, mask, torch.zeros(5, 3))
    assert trainer.ended(rollout).tolist() == [True, True, True, False, False]
    assert trainer.score(rollout).tolist() == [1.0, 2.0, 0.0, 2.0 - 1.5, 1.0 - 1.5]
    assert make().ended(rollout).tolist() == [
        True,
        False,
        False,
        False,
        True,
    ]  # the model's own stops: 2 and 3


def test_a_step_reports_what_its_rows_say_one_by_one():
    reference, temperature, kl_coef = tiny(seed=1), 0.8, 0.3
    options = dict(temperature=temperature, kl_coef=kl_coef, missing_eos_penalty=1.0)
    trainer = make(others=dict(reference=reference), **options)
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


def captured(**options):
    """The rollout and experience that a step optimises on."""
    trainer, seen = make(**options), []
    losses = trainer.minibatch_losses
    trainer.minibatch_losses = lambda *arguments: seen.append(arguments[:2]) or losses(*arguments)
    trainer.step(PROMPTS)
    return seen


def test_returns_are_the_rewards_to_come_and_advantages_are_whitened():
    ((rollout, experience),) = captured(reward=lengths, kl_coef=0.0, gamma=1.0, lam=1.0)
    mask, scores = rollout.response_mask, torch.tensor(lengths(None, rollout.responses()))
    assert_close(
        experience.returns, scores[:, None] * mask
    )  # every state of a row is worth what its end brings
    want = whiten(scores[:, None] - experience.old_values, mask)
    assert_close(experience.advantages, want, rtol=1e-4, atol=1e-5)
    assert_close(experience.advantages[mask].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_every_epoch_sees_every_rollout_once_in_minibatches():
    seen = captured(minibatch_size=3, ppo_epochs=2)
    assert [len(rollout.response_ids) for rollout, _ in seen] == [3, 3, 2] * 2
    for epoch in (seen[:3], seen[3:]):
        prompts = [prompt for rollout, _ in epoch for prompt in rollout.prompts()]
        assert sorted(prompts) == sorted(PROMPTS) and prompts != PROMPTS
    assert len(captured(minibatch_size=None)) == 4  # a quarter of the batch each


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 3), 2.0), returns, mask) == 0
    assert explained_variance(torch.tensor([[3.0, 1.0, NAN]]), returns, mask) == -3
    assert explained_variance(returns, torch.ones(1, 3), mask) == 0  # returns that do not vary


# ---- what moves


def snapshot(module):
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def test_the_policy_and_the_critic_move_and_nothing_else_does():
    """Row 32; a frozen reward model gives a critic that trains all the same."""
    reward = RewardModel.from_model(tiny(seed=1)).requires_grad_(False)
    model = tiny()
    frozen = model.trunk.blocks[0].requires_grad_(False)
    trainer = make(model, reward, ppo_epochs=2)
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
    trainer = make(others=dict(critic=critic, reference=reference))
    assert trainer.critic is critic
    with trainer.reference.policy() as used:
        assert used is reference  # no copy
    assert trainer.step(PROMPTS)["objective/kl"] > 0.1


@pytest.mark.parametrize("ratio", [100.0, -100.0])
def test_a_ratio_that_overflows_moves_nothing_where_the_advantage_is_zero(ratio):
    """Row 17, through the model."""
    trainer = make(vf_coef=0.0)
    rollout = rollout_of(trainer)
    experience = experience_of(trainer, rollout)
    experience = experience._replace(
        old_logprobs=experience.old_logprobs - ratio,
        advantages=torch.zeros_like(experience.advantages),
    )
    loss, metrics, got = gradients(trainer, rollout, experience)
    assert loss == 0 and all(math.isfinite(value) for value in metrics.values())
    assert not any(g.any() for g in got[: len(list(trainer.model.parameters()))])


# ---- the reward


class Letters:
    """Token i is the i-th letter; 2 and 3 are special."""

    def decode(self, ids):
        return "".join("abcdefghijkl"[i] for i in ids if i not in (2, 3))

    def save(self, path):
        (path / "letters").touch()


def test_a_reward_function_gets_strings_with_a_tokenizer_and_ids_without():
    """Row 35."""
    calls = []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return torch.arange(8)

    for tokenizer in (None, Letters()):
        report = make(reward=reward, others=dict(tokenizer=tokenizer)).step(PROMPTS)
        assert report["objective/scores"] == 3.5
    (prompts, responses), (texts, replies) = calls
    assert prompts == PROMPTS and all(
        isinstance(i, int) for response in responses for i in response
    )
    assert any(response[-1] in (2, 3) for response in responses)
    assert texts == [Letters().decode(prompt) for prompt in PROMPTS]
    assert replies == [Letters().decode(response) for response in responses]


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_score_that_is_no_number_is_named_and_nothing_is_trained(bad):
    trainer = make(reward=lambda prompts, responses: [1.0, 1.0, bad] + [1.0] * 5)
    before = snapshot(trainer.model), snapshot(trainer.critic)
    with pytest.raises(ValueError, match=rf"reward of row 2 is {bad}; prompt \[6\], response \["):
        trainer.step(PROMPTS)
    assert_close((snapshot(trainer.model), snapshot(trainer.critic)), before, rtol=0, atol=0)


def test_a_reward_model_whose_score_is_no_number_trains_nothing():
    reward = RewardModel.from_model(tiny(seed=1))
    trainer = make(reward=reward)
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
            r"reward of row 0 has shape \(7,\), for \d tokens",
        ),
        (1.0, "the reward returned 1.0: 'float' object is not iterable"),
        (["good"] * 8, r"the reward returned \['good'"),
    ],
)
def test_scores_of_another_number_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        make(reward=lambda prompts, responses: scores).step(PROMPTS)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_a_reward_model_scores_prompt_and_response_without_padding(micro_batch_size):
    reward = RewardModel.from_model(tiny(seed=1))
    trainer = make(reward=reward.train(), micro_batch_size=micro_batch_size)
    rollout = rollout_of(trainer)
    rows = [
        torch.tensor([prompt + response]) for prompt, response in zip(PROMPTS, rollout.responses())
    ]
    want = torch.cat([reward(row, torch.ones_like(row, dtype=torch.bool)) for row in rows])
    assert_close(trainer.score(rollout), want, rtol=0, atol=1e-5)


# ---- the whole


def learned(n, **config):
    """Every step's metrics of a run at constant learning rate."""
    return make(prompts=PROMPTS * n, ppo_epochs=4, lr_schedule="constant", **config).train()


def test_the_score_rises():
    scores = [
        step["objective/scores"]
        for step in learned(32, batch_size=32, minibatch_size=16, lr=2e-2, kl_coef=0.0)
    ]
    assert scores[0] < 0.6 and scores[-1] > 2


def test_the_kl_penalty_holds_the_policy_back():
    far, near = (
        learned(12, lr=1e-2, kl_coef=kl_coef)[-1]["objective/kl"] for kl_coef in (1e-9, 5.0)
    )
    assert near < far / 2


def test_training_writes_policy_critic_config_and_a_line_of_metrics_a_step(tmp_path):
    others = dict(out=tmp_path, tokenizer=Letters())
    trainer = make(
        prompts=PROMPTS * 2,
        reward=lengths,
        others=others,
        max_prompt_length=2,
    )
    history = trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history and [line["step"] for line in lines] == [1, 2]
    names = """objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
    objective/kl_coef policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg
    val/clipfrac_avg val/ratio val/ratio_var val/num_eos_tokens val/explained_variance lr eps episode"""
    assert set(names.split()) <= set(lines[0])
    assert json.loads((tmp_path / "train_config.json").read_text())["response_length"] == 6
    assert (tmp_path / "letters").exists()
    for saved, kept in (
        (Transformer.from_pretrained(tmp_path), trainer.model),
        (ValueModel.from_pretrained(tmp_path / "critic"), trainer.critic),
    ):
        assert_close(snapshot(saved), snapshot(kept), rtol=0, atol=0)


def test_a_long_prompt_loses_its_start():
    ((rollout, _),) = captured(max_prompt_length=2)
    assert sorted(rollout.prompts()) == sorted(prompt[-2:] for prompt in PROMPTS)


def test_a_prompt_leaves_room_for_the_response():
    ((rollout, _),) = captured(response_length=30)  # of 32 positions
    assert sorted(rollout.prompts()) == sorted(prompt[-2:] for prompt in PROMPTS)
    with pytest.raises(ValueError, match="response_length 32 leaves no prompt of 32 positions"):
        make(response_length=32)


def test_the_same_seed_gives_the_same_numbers_and_another_others():
    runs = [make(prompts=PROMPTS * 2, minibatch_size=3, seed=seed).train() for seed in (1, 1, 2)]
    assert all(step.pop("eps") > 0 for run in runs for step in run)  # episodes a second
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "name", ["temperature", "ppo_epochs", "response_length", "clip_range", "value_clip_range"]
)
def test_a_config_out_of_range_is_refused(name):
    with pytest.raises(ValueError, match="critic must be one of separate, head, got 'shared'"):
        PPOConfig(critic="shared")
    with pytest.raises(ValueError, match=f"{name} must be > 0, got 0"):
        PPOConfig(**{name: 0})
