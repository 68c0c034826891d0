"""DPO and its family through the trainer: every loss is its definition."""

import copy
import math

import pytest
import torch
from helpers import (
    accumulated,
    head_calls,
    make_trainer,
    pairs_biased_to_length,
    rows,
    snapshot,
    softplus,
    tiny,
)
from torch.testing import assert_close

from rlhf_core.algorithms import dpo
from rlhf_core.data import Pair
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.trainers import DPOConfig


def test_dpo_metrics_are_those_of_the_pairs_one_by_one():
    reference, batch = tiny(seed=1), rows("dpo")
    trainer = make_trainer("dpo", others=dict(reference=reference), beta=0.3)
    total, metrics, _ = accumulated(trainer, batch)

    def logps(model, prompt, completion):
        log_p = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        return log_p[torch.arange(len(completion)), completion].sum().item()

    logp = torch.tensor(
        [
            [[logps(m, p, x) for x in (c, r)] for p, c, r, *_ in batch]
            for m in (trainer.model, reference)
        ]
    )
    reward = 0.3 * (logp[0] - logp[1])  # (B, 2)
    margin = reward[:, 0] - reward[:, 1]
    want = {
        "rewards/chosen": reward[:, 0], "rewards/rejected": reward[:, 1], "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float(),
        "logps/chosen": logp[0, :, 0], "logps/rejected": logp[0, :, 1],
        "loss": torch.nn.functional.softplus(-margin),
    }  # fmt: skip
    for name, values in want.items():
        assert metrics[name] == pytest.approx(values.mean().item(), abs=1e-4), name
    assert total == pytest.approx(metrics["loss"], abs=1e-6)


def log_odds(logp):
    return logp - (-logp.expm1()).log()


# Options of each loss, and its definition from the log-ratios c and r of chosen and rejected and
# the mean log-prob m of the chosen completion's tokens.
FAMILY = {
    "cdpo": (
        dict(label_smoothing=0.2),
        lambda c, r, m: 0.8 * softplus(-0.5 * (c - r)) + 0.2 * softplus(0.5 * (c - r)),
    ),
    "length-normalised": (dict(average=True), lambda c, r, m: softplus(-0.5 * (c - r))),
    "robust": (
        dict(loss="robust", label_smoothing=0.2),
        lambda c, r, m: (0.8 * softplus(-0.5 * (c - r)) - 0.2 * softplus(0.5 * (c - r))) / 0.6,
    ),
    "ipo": (dict(loss="ipo"), lambda c, r, m: (c - r - 1) ** 2),
    "ipo of means": (dict(loss="ipo", average=True), lambda c, r, m: (c - r - 1) ** 2),
    "hinge": (dict(loss="hinge"), lambda c, r, m: (1 - 0.5 * (c - r)).clamp_min(0)),
    "simpo": (
        dict(loss="simpo", average=True, gamma=0.3),
        lambda c, r, m: softplus(-0.5 * (c - r) + 0.3),
    ),
    "orpo": (
        dict(loss="orpo", average=True, orpo_lambda=0.7, beta=0.1),
        lambda c, r, m: -m + 0.7 * softplus(log_odds(r) - log_odds(c)),
    ),
    "reference-free": (dict(reference_free=True), lambda c, r, m: softplus(-0.5 * (c - r))),
    "ld": (dict(ld_alpha=0.3), lambda c, r, m: softplus(-0.5 * (c - r))),
    "sft": (dict(sft_coef=0.6), lambda c, r, m: softplus(-0.5 * (c - r)) - 0.6 * m),
}


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("name", FAMILY)
def test_every_preference_loss_is_its_definition_and_computes_the_logits_once(
    name, micro_batch_size, monkeypatch
):
    """Row 20: loss and gradients, computed from separate rows."""
    options, definition = FAMILY[name]
    batch, options = rows("dpo"), dict(beta=0.5) | options
    without = options.get("reference_free") or options.get("loss") in ("simpo", "orpo")
    others = {} if without else dict(reference=tiny(seed=1, noise=0.1))
    settings = dict(micro_batch_size=micro_batch_size, **options)
    trainer = make_trainer("dpo", tiny(noise=0.1), others=others, **settings)
    assert (trainer.reference is None) == bool(without)

    def logp(model, ids, prompt, shared):
        log_p = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        tokens = log_p[torch.arange(len(ids)), ids]
        if options.get("average"):
            return tokens.mean(), tokens.mean()
        beyond = options.get("ld_alpha", 1) * tokens[shared:].sum()
        return tokens[:shared].sum() + beyond, tokens.mean()

    terms, chosen = [], []
    for prompt, *completions, _, _, _, _ in batch:
        shared, ratios, means = min(map(len, completions)), [], []
        for ids in completions:
            ratio, mean = logp(trainer.model, ids, prompt, shared)
            if not without:
                ratio = ratio - logp(others["reference"], ids, prompt, shared)[0].detach()
            ratios.append(ratio)
            means.append(mean)
        terms.append(definition(*ratios, means[0]))
        chosen.append((1.0 if options.get("loss") == "orpo" else 0.5) * ratios[0].item())
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    calls = head_calls(monkeypatch, rows_at_once=20)  # so that a micro-batch has several chunks
    total, metrics, got = accumulated(trainer, batch)
    assert len(calls) == (1 if micro_batch_size is None else 3) < sum(map(len, calls))
    assert total == pytest.approx(want.item(), rel=2e-6) == metrics["loss"]
    assert metrics["rewards/chosen"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-4)
    assert_close(got, list(gradients), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("loss", ["dpo", "robust", "hinge"])
def test_r_dpo_adds_alpha_for_each_token_to_both_rewards(loss):
    """Park et al. 2024: -log sigma(beta m + alpha |y_w| - alpha |y_l|). Reported rewards have no
    alpha."""
    batch, options = rows("dpo"), dict(loss=loss, beta=0.5)
    if loss == "robust":
        options |= dict(label_smoothing=0.1)
    others = dict(reference=tiny(seed=1, noise=0.1))
    plain = make_trainer("dpo", tiny(noise=0.1), others=others, **options)
    trainer = make_trainer("dpo", tiny(noise=0.1), others=others, length_alpha=0.3, **options)
    total, metrics, _ = accumulated(trainer, batch)
    assert metrics["rewards/margins"] == accumulated(plain, batch)[1]["rewards/margins"]
    terms = []
    for pair in batch:
        margin = accumulated(plain, [pair])[1]["rewards/margins"]
        m = torch.tensor(margin + 0.3 * (len(pair.chosen_ids) - len(pair.rejected_ids)))
        terms.append({
            "dpo": softplus(-m),
            "robust": (0.9 * softplus(-m) - 0.1 * softplus(m)) / 0.8,
            "hinge": (1 - m).clamp_min(0),
        }[loss].item())  # fmt: skip
    assert total == pytest.approx(sum(terms) / len(terms), rel=1e-5)


@pytest.mark.slow
def test_a_planted_length_bias_stays_out_of_the_policys_rewards():
    """The labels like a 5, and length. With length_alpha the implicit reward follows the 5."""
    pairs, held_out = pairs_biased_to_length(800), pairs_biased_to_length(200, seed=1)
    found = []
    for alpha in (0.0, 0.4):
        options = dict(beta=0.5, batch_size=40, epochs=6, lr=3e-3, length_alpha=alpha)
        trainer = make_trainer("dpo", tiny(noise=0.05), pairs, **options)
        trainer.train()
        rewards, lengths, right = [], [], []
        for pair in held_out:
            _, metrics, _ = accumulated(trainer, [pair])
            rewards.append(metrics["rewards/margins"])
            lengths.append(len(pair.chosen_ids) - len(pair.rejected_ids))
            if pair.chosen_ids[0] != pair.rejected_ids[0]:
                right.append((rewards[-1] > 0) == (pair.chosen_ids[0] == 5))
        both = torch.tensor([rewards, lengths])
        found.append((torch.corrcoef(both)[0, 1].item(), sum(right) / len(right)))
    (biased, wrong), (debiased, right) = found
    assert biased > 0.5 and abs(debiased) < 0.5 * biased and right > wrong


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_length_alpha_is_refused_for_losses_with_a_target_or_without_a_reference(loss):
    wanted = f"length_alpha must be 0 for loss '{loss}'; it is for dpo, robust, hinge, got 0.1"
    with pytest.raises(ValueError, match=wanted):
        DPOConfig(loss=loss, length_alpha=0.1, average=loss != "ipo")


ROW_SMOOTHED = {
    "dpo": lambda s, m: (1 - s) * softplus(-m) + s * softplus(m),
    "robust": lambda s, m: ((1 - s) * softplus(-m) - s * softplus(m)) / (1 - 2 * s),
}


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("loss", ROW_SMOOTHED)
def test_a_pair_uses_its_own_label_smoothing_and_others_the_configs(
    loss, micro_batch_size, monkeypatch
):
    """A chunk of the fused loss has several pairs, so each must find its own number."""
    own = [0.3, None, 0.0, 0.45, None, 0.1, 0.25, None]
    batch = [pair._replace(label_smoothing=s) for pair, s in zip(rows("dpo"), own)]
    settings = dict(loss=loss, label_smoothing=0.2, micro_batch_size=micro_batch_size)
    others = dict(reference=tiny(seed=1, noise=0.1))
    trainer = make_trainer("dpo", tiny(noise=0.1), batch, others, **settings)
    margins = []
    for pair in batch:
        _, metrics, _ = accumulated(trainer, [pair])
        margins.append(metrics["rewards/margins"])
    smoothing = torch.tensor([0.2 if s is None else s for s in own], dtype=torch.float64)
    want = ROW_SMOOTHED[loss](smoothing, torch.tensor(margins, dtype=torch.float64)).mean()
    calls = head_calls(monkeypatch, rows_at_once=20)
    total, metrics, _ = accumulated(trainer, batch)
    assert len(calls) < sum(map(len, calls))
    assert total == pytest.approx(want.item(), rel=1e-6) == metrics["loss"]


def test_a_label_smoothing_that_the_loss_does_not_use_gives_a_warning():
    pairs = rows("dpo")
    pairs[3] = pairs[3]._replace(label_smoothing=0.1)
    with pytest.warns(
        UserWarning, match="label_smoothing of the pairs has no effect on loss 'ipo'"
    ):
        make_trainer("dpo", examples=pairs, loss="ipo")


@pytest.mark.parametrize("smoothing", [0.5, -0.1, math.nan])
def test_a_label_smoothing_out_of_range_is_refused(smoothing):
    pairs = rows("dpo")
    pairs[3] = pairs[3]._replace(label_smoothing=smoothing)
    with pytest.raises(ValueError, match=rf"example 3 has label_smoothing {smoothing}, which is"):
        make_trainer("dpo", examples=pairs)


def test_masked_tokens_of_a_pair_are_only_context():
    """Such as the user's turns in a conversation."""
    pair = Pair([7, 8], [9, 10, 5, 2], [6, 2], None, [[True, False, False, True], None])
    mask = [1.0, 0, 0, 1.0]
    reference = tiny(seed=1)
    trainer = make_trainer("dpo", examples=[pair], others=dict(reference=reference), beta=0.3)

    def logp(model, ids, weights):
        log_p = model(torch.tensor([pair.prompt_ids + ids]))[0, 1:-1].log_softmax(-1)
        return log_p[torch.arange(len(ids)), ids] @ torch.tensor(weights)

    ratios = [
        logp(trainer.model, ids, weights) - logp(reference, ids, weights).detach()
        for ids, weights in ((pair.chosen_ids, mask), (pair.rejected_ids, [1.0, 1.0]))
    ]
    want = softplus(-0.3 * (ratios[0] - ratios[1]))
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    loss, _, got = accumulated(trainer, [pair])
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert_close(got, list(gradients), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, dict(dropout=0.3)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_loss_of_dpo_is_log_two_to_the_last_bit(micro_batch_size, options, precision):
    """Row 27, with dropout in the model's config. A tie counts as one half accurate."""
    settings = dict(micro_batch_size=micro_batch_size, precision=precision)
    metrics = make_trainer("dpo", tiny(**options), **settings).step(rows("dpo"))
    # A sum of three parts rounds.
    assert metrics["loss"] == torch.tensor(2.0).log().item() or micro_batch_size == 3
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0.5


def test_dpo_on_adapters_holds_its_weights_once_and_starts_at_log_two(monkeypatch):
    """Rows 27, 28: the reference is the policy without its adapters, and no copy is made."""
    model = tiny()
    add_adapters(model, LoRAConfig())
    before = snapshot(model)
    monkeypatch.setattr(
        copy, "deepcopy", lambda x, memo=None: pytest.fail(f"a copy of {type(x).__name__}")
    )
    trainer = make_trainer("dpo", model, lr=1e-2, micro_batch_size=3)
    assert trainer.reference.model is model
    assert trainer.step(rows("dpo"))["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert trainer.step(rows("dpo"))["loss"] < math.log(2) - 1e-3
    moved = {
        name for name, weight in snapshot(model).items() if not torch.equal(weight, before[name])
    }
    assert moved == {name for name in before if "lora_" in name}


def test_in_bfloat16_adapters_learn_beside_a_reference_that_shares_their_weights():
    """Their gradients are close to those in float32."""
    gradients = []
    for precision in ("float32", "bfloat16"):
        policy = tiny()
        add_adapters(policy, LoRAConfig(rank=2))
        trainer = make_trainer("dpo", policy, precision=precision)
        assert trainer.reference.model is policy
        gradients.append(
            torch.cat([gradient.flatten() for gradient in accumulated(trainer, rows("dpo"))[2]])
        )
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_the_reference_reads_each_pair_once_and_a_resumed_run_equals_an_unbroken_one(
    monkeypatch, tmp_path
):
    """To the bit, although later epochs put the pairs into other batches."""
    read, logprobs = [], dpo.target_logprobs
    monkeypatch.setattr(
        dpo, "target_logprobs", lambda *args: read.append(len(read)) or logprobs(*args)
    )

    def make(cut=True, **options):
        settings = dict(epochs=3, batch_size=4, lr=1e-2, lr_schedule="constant") | options
        others = dict(out=tmp_path / "run") if cut else {}
        return make_trainer("dpo", examples=rows("dpo", 10), others=others, **settings)

    unbroken = make(cut=False)
    unbroken.train()
    assert len(read) == 3  # batches of the first epoch
    make(max_steps=5, save_every=5).train()
    resumed = make()
    resumed.resume()
    read.clear()
    resumed.train()
    assert not read
    assert_close(snapshot(resumed.model), snapshot(unbroken.model), rtol=0, atol=0)


def test_dpo_learns_which_token_is_preferred():
    others = dict(eval_examples=rows("dpo", 64, seed=1))
    history = make_trainer(
        "dpo", examples=rows("dpo", 64), epochs=4, lr=3e-3, batch_size=16, others=others
    ).train()
    assert history[0]["rewards/margins"] == 0
    assert (
        history[-1]["eval_rewards/accuracies"] > 0.9 and history[-1]["eval_rewards/margins"] > 0.1
    )


# ---- refused, or without effect


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beta=0), "beta must be > 0, got 0"),
        (dict(loss="slic"), "loss must be one of dpo, robust, ipo, hinge, simpo, orpo, got 'slic'"),
        (dict(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (dict(ld_alpha=1.1), r"ld_alpha must be in \[0, 1\], got 1.1"),
        (dict(loss="simpo", average=True, gamma=-1), "gamma must be at least 0, got -1"),
        (dict(loss="orpo", average=True, orpo_lambda=0), "orpo_lambda must be > 0, got 0"),
        (dict(sft_coef=-1), "sft_coef must be at least 0, got -1"),
        (dict(loss="simpo"), "average must be set for loss 'simpo', got False"),
        (dict(loss="orpo"), "average must be set for loss 'orpo', got False"),
        (dict(loss="robust"), "label_smoothing must be > 0 for loss 'robust'"),
        (
            dict(loss="orpo", average=True, sft_coef=1.0),
            "sft_coef must be 0: orpo has a cross-entropy term, got 1.0",
        ),
    ],
    ids=str,
)
def test_an_option_out_of_range_or_against_the_loss_is_refused(options, message):
    """Row 20."""
    with pytest.raises(ValueError, match=message):
        DPOConfig(**options)


def test_a_reference_that_the_loss_does_not_use_is_refused():
    for options, named in (
        (dict(reference_free=True), "reference_free"),
        (dict(loss="simpo", average=True), "loss 'simpo'"),
    ):
        message = f"a reference was passed, but {named} compares with none"
        with pytest.raises(ValueError, match=message):
            make_trainer("dpo", others=dict(reference=tiny(seed=1)), **options)


def test_pairs_that_are_all_identical_are_refused():
    with pytest.raises(ValueError, match="identical in all 2 pairs"):
        make_trainer("dpo", examples=[Pair([3], [4, 2], [4, 2])] * 2)
