"""DPO and its family through the trainer: every loss is its definition, options without effect are refused."""

import math

import pytest
import torch
from test_trainers import accumulated, make, rows, softplus, tiny
from torch.testing import assert_close

from rlhf_core.ops import linear_logprobs_blocks
from rlhf_core.trainers import DPOConfig


def test_dpo_metrics_are_those_of_the_pairs_one_by_one():
    reference, batch = tiny(seed=1), rows("dpo")
    trainer = make("dpo", others=dict(reference=reference), beta=0.3)
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
        "rewards/accuracies": (margin > 0).float(), "logps/chosen": logp[0, :, 0], "logps/rejected": logp[0, :, 1],
        "loss": torch.nn.functional.softplus(-margin),
    }  # fmt: skip
    for name, values in want.items():
        assert metrics[name] == pytest.approx(values.mean().item(), abs=1e-4), name
    assert total == pytest.approx(metrics["loss"], abs=1e-6)


# Each loss with what it needs, and the definition from log-ratios c, r and the chosen one's mean log-prob m.
def log_odds(logp):
    return logp - (-logp.expm1()).log()


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
    """Row 20: loss and gradients, from the tokens of every completion in a row of its own."""
    options, definition = FAMILY[name]
    batch, options = rows("dpo"), dict(beta=0.5) | options
    without = options.get("reference_free") or options.get("loss") in ("simpo", "orpo")
    others = {} if without else dict(reference=tiny(seed=1))
    trainer = make("dpo", others=others, micro_batch_size=micro_batch_size, **options)
    assert (trainer.reference is None) == bool(without)

    def logp(model, ids, prompt, shared):
        log_p = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        tokens = log_p[torch.arange(len(ids)), ids]
        if options.get("average"):
            return tokens.mean(), tokens.mean()
        return tokens[:shared].sum() + options.get("ld_alpha", 1) * tokens[
            shared:
        ].sum(), tokens.mean()

    terms, chosen = [], []
    for prompt, *completions, _, _ in batch:
        shared, ratios, means = min(map(len, completions)), [], []
        for ids in completions:
            policy, mean = logp(trainer.model, ids, prompt, shared)
            ratios.append(
                policy
                - (0 if without else logp(others["reference"], ids, prompt, shared)[0].detach())
            )
            means.append(mean)
        terms.append(definition(*ratios, means[0]))
        chosen.append((1.0 if options.get("loss") == "orpo" else 0.5) * ratios[0].item())
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    monkeypatch.setattr(
        linear_logprobs_blocks, "backward", lambda *args: pytest.fail("computed again")
    )
    total, metrics, got = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=2e-6) == metrics["loss"]
    assert metrics["rewards/chosen"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-4)
    assert_close(got, list(gradients), rtol=1e-4, atol=2e-6)


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
            dict(ld_alpha=0.5, average=True),
            "ld_alpha has no effect where log-probs are averaged, got 0.5",
        ),
        (dict(loss="orpo", average=True, beta=0.2), "beta has no effect on loss 'orpo', got 0.2"),
        (
            dict(loss="ipo", label_smoothing=0.1),
            "label_smoothing has no effect on loss 'ipo', got 0.1",
        ),
        (
            dict(loss="simpo", average=True, reference_free=True),
            "reference_free has no effect on loss 'simpo'",
        ),
        (dict(gamma=0.1), "gamma has no effect on loss 'dpo', got 0.1"),
        (dict(orpo_lambda=0.2), "orpo_lambda has no effect on loss 'dpo', got 0.2"),
        (
            dict(loss="orpo", average=True, sft_coef=1.0),
            "sft_coef has no effect on loss 'orpo', got 1.0",
        ),
    ],
    ids=str,
)
def test_a_preference_option_out_of_range_or_without_effect_is_refused(options, message):
    """Row 20."""
    with pytest.raises(ValueError, match=message):
        DPOConfig(**options)


def test_a_reference_that_the_loss_does_not_use_is_refused():
    for options in (dict(reference_free=True), dict(loss="simpo", average=True)):
        with pytest.raises(ValueError, match="a reference has no effect"):
            make("dpo", others=dict(reference=tiny(seed=1)), **options)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("options", [{}, dict(dropout=0.3)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_first_loss_of_dpo_is_log_two_to_the_last_bit(micro_batch_size, options, precision):
    """Row 27, with dropout in the model's config; before an update every pair is a tie, which counts one half."""
    settings = dict(micro_batch_size=micro_batch_size, precision=precision)
    metrics = make("dpo", tiny(**options), **settings).step(rows("dpo"))
    assert (
        metrics["loss"] == torch.tensor(2.0).log().item() or micro_batch_size == 3
    )  # a sum of 3 rounds
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0.5
