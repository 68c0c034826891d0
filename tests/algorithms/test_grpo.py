"""GRPO, RLOO, REINFORCE++ and ReMax through the trainer: each gradient is its paper's."""

import math
import warnings

import pytest
import torch
from helpers import (
    PROMPTS,
    Letters,
    fives,
    forward,
    input_shapes,
    lengths,
    rollout_of,
    snapshot,
    tiny,
)  # fmt: skip
from torch.testing import assert_close

from rlhf_core.data.batches import rows
from rlhf_core.losses import (
    grpo_advantages,
    kl_loss,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)
from rlhf_core.models import Transformer
from rlhf_core.policy_gradient.experience import Experience
from rlhf_core.rollout import sample
from rlhf_core.trainers import GRPOConfig, GRPOTrainer
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
    """The trainer, the rollout and experience of its updates, and the step's report."""
    trainer, seen = make(**options), []
    trainer.update = lambda rollout, experience, metrics: (
        seen.append((rollout, experience)) or _one_pass(trainer, rollout, experience, metrics)
    )
    report = trainer.step(PROMPTS)
    return trainer, *seen[0], report


def _one_pass(trainer, rollout, experience, metrics):
    trainer.order, trainer.seen = torch.arange(len(rollout.response_ids)), []
    for _ in trainer.minibatch_losses(rollout, experience, metrics):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(kl_coef=0.1, micro_batch_size=3),
        dict(kl_coef=0.1, kl_estimator="full"),
        dict(ratio="sequence", aggregation="sequence_mean"),
        dict(advantage="remax", entropy_coef=0.01),
        dict(advantage="reinforce_pp", loss="cispo"),
        dict(rollout_dtype="bfloat16", importance_cap=1.001, micro_batch_size=3),
        dict(
            rollout_dtype="bfloat16", importance_cap=1.01, importance_level="sequence", kl_coef=0.1
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_a_single_update_reads_the_old_log_probs_itself(options, monkeypatch):
    """The run is that with a pass of its own for them, and the policy's trunk runs once a step."""
    results, counts = [], []
    for one_pass in (True, False):
        if not one_pass:
            monkeypatch.setattr(GRPOConfig, "one_pass", False)
        trainer = make(max_steps=3, epochs=3, **options)
        shapes = input_shapes(trainer.model.trunk)
        sampled = len(trainer.sample(PROMPTS, N).response_ids)
        before = len(shapes)
        results.append([trainer.step(PROMPTS) for _ in range(2)])
        counts.append(len(shapes) - 3 * before if not options else 0)
        results[-1].append(snapshot(trainer.model))
        assert sampled == 8 * N
    (*reports, weights), (*other_reports, other_weights) = results
    for report, other in zip(reports, other_reports):
        assert report.keys() == other.keys()
        for name in report.keys() - {"eps"}:
            assert report[name] == pytest.approx(other[name], rel=1e-4, abs=2e-6), name
    assert_close(weights, other_weights, rtol=0, atol=1e-6)
    if not options:
        assert counts == [2, 2]  # the update trains through the pass before, see test_a2c.py


@pytest.mark.parametrize(
    "options",
    [
        dict(ppo_epochs=2),
        dict(minibatch_size=8),
        dict(mask_truncated=True),
        dict(kl_coef=0.1, kl_in="reward", kl_estimator="k1"),
    ],
)
def test_more_than_one_update_or_reader_takes_a_pass_before(options):
    config = make(**options).config
    assert not config.one_pass and make().config.one_pass


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce_pp"])
def test_every_token_has_the_advantage_of_its_response_within_its_group(advantage):
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
    """That of the whole response, or for each token that of the tokens to come."""
    reference = tiny(seed=1)
    estimate = {"rloo": rloo_advantages, "reinforce_pp": reinforce_pp_advantages}[advantage]
    options = dict(
        kl_in="reward", kl_coef=0.3, advantage=advantage, others=dict(reference=reference)
    )
    trainer, rollout, experience, report = captured(**options)
    assert trainer.config.estimator == "k1"
    kl = trainer.predict(rollout).kl
    tokens = (x.unflatten(0, (8, N)) for x in (0.3 * kl, rollout.response_mask))
    want = estimate(torch.tensor(fives(None, rollout.responses())).view(8, N), *tokens)
    assert_close(experience.advantages, want.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert report["objective/non_score_reward"] == pytest.approx(
        -0.3 * kl.sum(dim=1).mean().item(), rel=1e-4
    )
    assert report["kl"] == pytest.approx(
        kl.sum().item() / rollout.response_mask.sum().item(), rel=1e-4
    )


def test_with_kl_coef_0_no_reference_is_held_unless_it_is_given():
    """Both learn the same."""
    without, given = make(), make(others=dict(reference=tiny(seed=1)))
    assert without.reference is None
    reports = [trainer.step(PROMPTS) for trainer in (without, given)]
    assert (
        not {"kl", "objective/kl"} & reports[0].keys()
        and reports[1]["kl"] != 0 != reports[1]["objective/kl"]
    )
    assert_close(without.model.state_dict(), given.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(aggregation):
    """That of -A log p of every token with the aggregation's weights, without critic or clip."""
    trainer = make(aggregation=aggregation)
    rollout = rollout_of(trainer)
    columns = trainer.predict(rollout)
    mask, advantages = (
        rollout.response_mask,
        torch.randn(8)[:, None].expand_as(rollout.response_mask),
    )
    old = Experience(columns.logprobs, advantages, columns.ref_logprobs)
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
    logprobs = forward(trainer, rollout).logprobs
    (-advantages * logprobs * weights[aggregation] * mask).sum().backward()
    assert_close(got, [p.grad for p in trainer.model.parameters()], rtol=1e-4, atol=1e-6)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    """GSPO, eq. 7: every token has the gradient of its response's mean log-prob, clipped as one."""
    trainer = make(ratio="sequence", aggregation="sequence_mean", clip_range=0.1, ppo_epochs=2)
    rollout = rollout_of(trainer)
    mask, columns = rollout.response_mask, trainer.predict(rollout)
    torch.manual_seed(3)
    old_logprobs = columns.logprobs + 0.3 * torch.randn(mask.shape) * mask
    advantages = torch.tensor([1.0, -1.0] * 4)
    old = Experience(old_logprobs, advantages[:, None].expand_as(mask), columns.ref_logprobs)
    trainer.optimizer.zero_grad()
    metrics = Metrics()
    for loss in trainer.minibatch_losses(rollout, old, metrics):
        loss.backward()
    got = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.optimizer.zero_grad()
    log_ratio = (forward(trainer, rollout).logprobs - old_logprobs) * mask
    s = (log_ratio.sum(dim=1) / mask.sum(dim=1)).exp()
    objective = torch.minimum(s * advantages, s.clamp(0.9, 1.1) * advantages).mean()
    (-objective).backward()
    assert_close(got, [p.grad for p in trainer.model.parameters()], rtol=1e-4, atol=1e-6)
    assert 0 < metrics.means()["policy/clipfrac_avg"] < 1
    kl = (log_ratio.exp() - 1 - log_ratio).sum() / mask.sum()  # of tokens
    assert metrics.means()["policy/approxkl_avg"] == pytest.approx(kl.item(), rel=1e-4)


def test_cispo_keeps_the_gradient_of_tokens_beyond_the_clip():
    """Against its formula on the model's own log-probs, with entropy bonus and KL in the loss."""
    settings = dict(entropy_coef=0.1, kl_coef=0.2, clip_range=1.0, clip_range_high=0.1)
    trainer = make(loss="cispo", ppo_epochs=2, others=dict(reference=tiny(seed=1)), **settings)
    rollout = rollout_of(trainer)
    mask, columns = rollout.response_mask, trainer.predict(rollout)
    torch.manual_seed(3)
    old_logprobs = columns.logprobs + 0.3 * torch.randn(mask.shape) * mask
    advantages = torch.randn(8)[:, None].expand_as(mask)
    trainer.optimizer.zero_grad()
    metrics = Metrics()
    old = Experience(old_logprobs, advantages, columns.ref_logprobs)
    for loss in trainer.minibatch_losses(rollout, old, metrics):
        loss.backward()
    got = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.optimizer.zero_grad()
    now = forward(trainer, rollout)
    ratio = (now.logprobs - old_logprobs).exp().detach()
    objective = ratio.clamp_max(1.1) * advantages * now.logprobs + 0.1 * now.entropy
    kl = kl_loss(now.logprobs, old_logprobs, columns.ref_logprobs, mask, estimator="k3")
    (-(objective - 0.2 * kl)[mask].mean()).backward()
    assert_close(got, [p.grad for p in trainer.model.parameters()], rtol=1e-4, atol=1e-6)
    clipped = (ratio > 1.1)[mask].float().mean().item()
    assert metrics.means()["policy/clipfrac_avg"] == pytest.approx(clipped) and 0 < clipped < 1
    value = -(ratio.clamp_max(1.1) * advantages * now.logprobs)[mask].mean().item()
    assert metrics.means()["loss/policy_avg"] == pytest.approx(value, rel=1e-4)


def test_truncated_responses_teach_nothing_and_count_in_no_denominator():
    """The update is that on the responses that ended; their advantages know all of the group."""
    _, rollout, experience, _ = captured()
    masked, ended = make(mask_truncated=True), rollout.ended
    assert 0 < ended.sum() < len(ended)
    masked.update(rollout, experience, Metrics())
    kept = rows(rollout, ended), rows(experience, ended)
    plain = make()
    plain.update(*kept, Metrics())
    assert_close(masked.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    assert masked.step(PROMPTS)["val/num_eos_tokens"] < 8 * N


def test_a_step_of_only_truncated_responses_changes_nothing():
    trainer = make(mask_truncated=True, others=dict(eos_ids=()), reward=fives)
    before = snapshot(trainer.model)
    with pytest.warns(UserWarning, match="every response is truncated"):
        report = trainer.step(PROMPTS)
    assert "loss" not in report and report["clip_ratio"] == 0
    assert_close(snapshot(trainer.model), before, rtol=0, atol=0)


def odd(prompts, responses):
    """Only responses to prompts that begin with an odd token differ."""
    return [len(r) * float(p[0] % 2) for p, r in zip(prompts, responses)]


def odd_per_token(prompts, responses):
    return [[float(p[0] % 2)] * len(r) for p, r in zip(prompts, responses)]


@pytest.mark.parametrize("reward", [odd, odd_per_token])
def test_groups_that_tie_are_replaced_by_those_of_other_prompts(reward):
    _, rollout, experience, report = captured(dynamic_sampling=20, reward=reward)
    assert report["frac_reward_zero_std"] == 0 < report["resampled_groups"]
    prompts = rollout.prompts()
    assert len(prompts) == 8 * N and all(prompt[0] % 2 for prompt in prompts)
    assert all(prompts[i : i + N] == [prompts[i]] * N for i in range(0, 8 * N, N))
    scores = torch.tensor(odd(prompts, rollout.responses())).view(8, N)
    assert report["reward"] == pytest.approx(scores.mean().item())
    mask = rollout.response_mask.unflatten(0, (8, N))
    want = grpo_advantages(scores, torch.zeros(mask.shape), mask).flatten(0, 1)
    assert_close(experience.advantages, want)


def test_groups_are_resampled_only_as_often_as_configured():
    """All tie: 8 groups twice, and the last ones stay."""
    calls = []

    def nothing(prompts, responses):
        calls.append(len(prompts))
        return [0.0] * len(prompts)

    _, rollout, _, report = captured(dynamic_sampling=2, reward=nothing)
    assert len(calls) == 3 and len(rollout.response_ids) == 8 * N
    assert report["resampled_groups"] == 16 and report["frac_reward_zero_std"] == 1
    with pytest.raises(ValueError, match="dynamic_sampling must be 0 for groups of 1, got 1"):
        make(num_samples=1, advantage="remax", dynamic_sampling=1)


def test_a_run_with_every_part_of_dapo_resumes_bit_by_bit(tmp_path):
    """Also with cispo, stop strings and a cosine schedule."""

    def build(out, **options):
        dapo = dict(dynamic_sampling=2, mask_truncated=True, overlong_buffer=3, loss="cispo")
        sizes = dict(batch_size=2, ppo_epochs=2, lr=1e-2, lr_schedule="cosine", warmup_steps=1)
        others = dict(out=tmp_path / out, tokenizer=Letters())
        options |= dapo | sizes | dict(stop_strings=("f",))
        return make(reward=odd_texts, others=others, **options)

    def odd_texts(prompts, responses):
        return [len(r) * float(len(p) % 2) for p, r in zip(prompts, responses)]

    whole = build("whole")
    history = whole.train()
    first = build("parts", save_every=2)
    for batch in list(first.batches())[:2]:
        first.advance(batch)
    first.save_checkpoint()
    (tmp_path / "parts" / "metrics.jsonl").write_text(
        "".join((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)[:2])
    )
    rest = build("parts", save_every=2)
    rest.resume()
    resumed = rest.train()
    assert equal_steps(resumed, history) and sum(step["resampled_groups"] for step in history) > 0
    assert_close(snapshot(rest.model), snapshot(whole.model), rtol=0, atol=0)


def equal_steps(some, others):
    """Whether the metrics agree apart from speed."""
    return [{**x, "eps": 0} for x in some] == [{**x, "eps": 0} for x in others]


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
        warnings.simplefilter("ignore")  # about advantages that are all 0 once all is learned
        history = make(advantage=advantage, **options).train()
    assert history[-1]["reward"] > history[0]["reward"] + 2


def test_a_step_whose_advantages_are_all_0_warns():
    trainer = make(reward=lambda prompts, responses: [1.0] * len(responses))
    with pytest.warns(
        UserWarning, match="step 1: no response scores differently from the others to its prompt"
    ):
        report = trainer.step(PROMPTS)
    assert report["frac_reward_zero_std"] == 1 and report["grad_norm"] == 0


def test_a_run_saves_the_policy_and_no_critic(tmp_path):
    trainer = make(
        advantage="rloo",
        others=dict(out=tmp_path, tokenizer=Letters()),
        reward=lambda p, r: list(range(len(r))),
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
        (dict(advantage="rloo", num_samples=1), "num_samples must be at least 2 for rloo, got 1"),
        (dict(advantage="remax", num_samples=0), "num_samples must be at least 1, got 0"),
        (dict(ratio="word"), "ratio must be one of token, sequence, got 'word'"),
        (dict(advantage="remax", whiten_scores="batch"), "whiten_scores must be none for remax"),
        (
            dict(batch_size=2, num_samples=3, minibatch_size=7),
            "minibatch_size must be from 1 to 6, got 7",
        ),
        (dict(entropy_coef=math.inf), "entropy_coef must be at least 0 and finite, got inf"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        dict(ratio="sequence", importance_cap=2.0),
        dict(ratio="sequence", ppo_epochs=2),
        dict(ratio="sequence", kl_in="reward", kl_coef=0.1, advantage="reinforce_pp"),
        dict(clip_range_high=0.28, minibatch_size=8),
        dict(whiten_scores="batch", score_clip=1.0, whiten_mean=True),
        dict(whiten_scores="batch", kl_in="reward", kl_coef=0.1),
        dict(whiten_scores="batch", normalize=False),
    ],
    ids=" ".join,
)
def test_an_option_with_an_effect_does_not_warn(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPOConfig(**options)
