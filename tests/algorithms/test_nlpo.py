"""NLPO: sampling and loss use the policy limited to a lagging copy's top-p set."""

import math

import pytest
import torch
from helpers import PROMPTS, adapted, fives, forward, model_folders, run, snapshot, tiny, write
from torch.testing import assert_close

from rlhf_core.generation import generate
from rlhf_core.models import Transformer, transformer
from rlhf_core.trainers import NLPOConfig, NLPOTrainer, PPOConfig, PPOTrainer


def make(model=None, out=None, trainer_type=NLPOTrainer, prompts=PROMPTS, **config):
    torch.manual_seed(5)
    settings = dict(
        batch_size=8, minibatch_size=8, ppo_epochs=1, response_length=6, temperature=1.3, lr=1e-2
    )
    config_type = NLPOConfig if trainer_type is NLPOTrainer else PPOConfig
    config = config_type(
        **(settings | ({"mask_top_p": 0.6} if config_type is NLPOConfig else {}) | config)
    )
    return trainer_type(tiny() if model is None else model, prompts, config, reward=fives, out=out)


def apart(trainer, seed=9):
    """The trainer, with a policy that has left its lagging copy."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return trainer


def nucleus(logits, top_p, temperature):
    """Ids of the smallest set of most likely tokens with probability top_p, one by one."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    kept = []
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        kept.append(token)
        if sum(p[t] for t in kept) >= top_p:
            return kept


def by_hand(trainer, rollout):
    """Masked log-probs and entropy of every counted token, row by row, and the tokens allowed."""
    temperature, found = trainer.config.temperature, []
    for prompt, response in zip(rollout.prompts(), rollout.responses()):
        own, lagging = (
            model.logits(model.trunk(torch.tensor([prompt + response])))[0]
            for model in (trainer.model, trainer.masked.lagging)
        )
        for t, token in enumerate(response, start=len(prompt) - 1):
            kept = nucleus(lagging[t].detach(), trainer.config.mask_top_p, temperature)
            log_p = (own[t, kept] / temperature).log_softmax(-1)
            found.append((log_p[kept.index(token)], -(log_p.exp() * log_p).sum(), kept))
    logprobs, entropy, kept = zip(*found)
    return torch.stack(logprobs), torch.stack(entropy), kept


@pytest.mark.parametrize("logits_at_once", [2**22, 60])  # 60: five tokens
@pytest.mark.parametrize("model", [tiny, adapted])
def test_log_probs_entropy_and_gradients_are_those_of_the_masked_policy(
    model, logits_at_once, monkeypatch
):
    monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", logits_at_once)
    trainer = apart(make(model()))
    rollout = trainer.sample(PROMPTS)
    mask, parameters = (
        rollout.response_mask,
        [p for p in trainer.model.parameters() if p.requires_grad],
    )
    want = by_hand(trainer, rollout)
    gradients = torch.autograd.grad(want[0].sum() + want[1].square().sum(), parameters)
    got = forward(trainer, rollout)
    assert_close((got.logprobs[mask], got.entropy[mask]), want[:2], rtol=1e-4, atol=1e-5)
    assert not got.logprobs[~mask].any() and not got.entropy[~mask].any()
    loss = got.logprobs.sum() + got.entropy.square().sum()
    for x, y in zip(torch.autograd.grad(loss, parameters), gradients):
        assert_close(x, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())
    assert_close(rollout.logprobs[mask], want[0], rtol=1e-4, atol=1e-5)  # recorded while sampling


def test_tokens_outside_the_mask_are_never_sampled():
    trainer = apart(make())
    rollout = trainer.sample(PROMPTS, num_samples=20)
    kept = by_hand(trainer, rollout)[2]  # looks each token up among those allowed
    plain = generate(
        trainer.model,
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=1,
        num_samples=400,
        temperature=1.3,
    )
    assert set(plain.response_ids[:, 0].tolist()) - set(
        kept[0]
    )  # the policy alone would leave the mask
    assert len(set(map(len, kept))) > 2


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("critic, model", [("separate", tiny), ("head", tiny), ("head", adapted)])
def test_the_first_minibatch_has_ratio_one_when_policy_and_copy_differ(
    micro_batch_size, critic, model
):
    """Dropout in the model's config stays off."""
    trainer = apart(make(model(dropout=0.1), micro_batch_size=micro_batch_size, critic=critic))
    report = trainer.step(PROMPTS)
    assert (
        report["val/ratio"] == pytest.approx(1, abs=1e-5) and report["val/rollout_mismatch"] < 1e-4
    )
    assert report["policy/approxkl_avg"] == pytest.approx(0, abs=1e-6)
    assert not trainer.model.training and not trainer.masked.lagging.training


def test_a_sampled_token_is_always_allowed():
    trainer = make()
    rollout = trainer.sample(PROMPTS)
    apart(trainer)
    # As if the copy rounded differently.
    trainer.masked.lagging.load_state_dict(snapshot(trainer.model))
    assert forward(trainer, rollout).logprobs.isfinite().all()


@pytest.mark.parametrize("settings", [dict(precision="bfloat16"), dict(dropout=True)])
def test_neither_precision_nor_dropout_of_the_policy_changes_the_mask(settings):
    """The mask must be the one sampled from."""
    patterns = []
    for more in ({}, settings):
        trainer = apart(make(tiny(dropout=0.3, vocab_size=300), **more))
        rollout = trainer.sample(PROMPTS, num_samples=8)
        found = trainer.masked.logits

        def watched(*args, found=found):
            logits = found(*args)
            patterns.append(logits == -math.inf)
            return logits

        trainer.masked.logits = watched
        trainer.predict(rollout)
    assert torch.equal(*patterns) and 0.2 < patterns[0].float().mean() < 0.8


def test_the_copy_follows_the_policy_every_mask_every_rollouts():
    trainer = make(prompts=PROMPTS * 4, mask_every=2)
    first, seen = snapshot(trainer.model), []
    step = trainer.step

    def watched(batch):
        report = step(batch)
        lagging = trainer.masked.lagging.state_dict()
        seen.append(
            [
                all(torch.equal(lagging[n], x) for n, x in s.items())
                for s in (first, snapshot(trainer.model))
            ]
        )
        return report

    trainer.step = watched
    trainer.train()
    assert seen == [[True, False], [False, True], [False, False], [False, True]]


def test_with_nothing_masked_it_is_ppo():
    runs = [
        make(trainer_type=kind, ppo_epochs=2, **more)
        for kind, more in ((PPOTrainer, {}), (NLPOTrainer, {"mask_top_p": 1.0}))
    ]
    want, got = (trainer.step(PROMPTS) for trainer in runs)
    assert got.keys() == want.keys()
    for name in want.keys() - {"eps", "val/rollout_mismatch", "val/rollout_mismatch_mean"}:
        assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name


def test_with_adapters_copy_and_checkpoint_hold_no_second_base(tmp_path):
    trainer = make(adapted(), tmp_path)
    lagging, shared = dict(trainer.masked.lagging.named_buffers()), 0
    for name, parameter in trainer.model.named_parameters():
        assert (lagging[name].data_ptr() == parameter.data_ptr()) != parameter.requires_grad, name
        shared += parameter.numel() * (not parameter.requires_grad)
    kept = {name for name in trainer.state() if name.startswith("lagging:")}
    assert shared > 2000 and kept and all(".adapters." in name for name in kept)


@pytest.mark.parametrize("model", [tiny, adapted])
def test_a_resumed_run_ends_like_an_unbroken_one(model, tmp_path):
    """Stopped after the copy has followed once and lags behind again."""

    def build(**config):
        settings = dict(mask_every=3, lr_schedule="constant")
        return make(model(), tmp_path, prompts=PROMPTS * 5, **(settings | config))

    whole = build()
    history = whole.train()
    build(max_steps=4, save_every=4).train()
    rest = build()
    rest.resume()
    for got, want in zip(rest.train(), history, strict=True):
        assert {n: x for n, x in got.items() if n != "eps"} == {
            n: x for n, x in want.items() if n != "eps"
        }
    for trained in (lambda t: t.model, lambda t: t.critic, lambda t: t.masked.lagging):
        for name, x in snapshot(trained(rest)).items():
            assert torch.equal(x, trained(whole).state_dict()[name]), name
    with pytest.raises(ValueError, match="mask_top_p"):
        build(mask_top_p=0.7).resume()


def test_policy_and_critic_train_and_the_copy_does_not():
    trainer = make(mask_every=9)
    before = snapshot(trainer.masked.lagging)
    trained = {
        id(parameter)
        for model in (trainer.model, trainer.critic)
        for parameter in model.parameters()
    }
    assert {id(parameter) for parameter in trainer.trained_parameters()} == trained
    trainer.step(PROMPTS)
    for name, x in snapshot(trainer.masked.lagging).items():
        assert torch.equal(x, before[name])


def test_the_score_rises():
    settings = dict(
        prompts=PROMPTS * 24, batch_size=32, minibatch_size=16, lr=2e-2, kl_coef=0.0, ppo_epochs=4
    )
    scores = [
        step["objective/scores"] for step in make(**settings, mask_top_p=0.95, mask_every=1).train()
    ]
    assert sum(scores[-2:]) / 2 > scores[0] + 1


@pytest.mark.parametrize(
    "name, value",
    [("mask_top_p", 0.0), ("mask_top_p", 1.1), ("mask_every", 0), ("kl_estimator", "full")],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        NLPOConfig(**{name: value})


def test_the_command_line_writes_the_policy(tmp_path, capsys):
    folders, out = model_folders(tmp_path / "models"), tmp_path / "out"
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(4)])
    options = [
        "--batch-size",
        2,
        "--response-length",
        4,
        "--mask-every",
        1,
        "--mask-top-p",
        0.8,
        "--device",
        "cpu",
    ]
    models = "--model", folders / "policy", "--reward-model", folders / "reward"
    assert run("nlpo", *models, "--prompts", prompts, "--out", out, *options) == 0
    assert "objective/scores" in capsys.readouterr().out
    before, after = (Transformer.from_pretrained(path) for path in (folders / "policy", out))
    assert not torch.equal(before.trunk.embed.weight, after.trunk.embed.weight)
