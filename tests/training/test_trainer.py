"""What every trainer promises: exact accumulation, only trained weights move, files read back."""

from itertools import chain

import pytest
import torch
from helpers import (
    KINDS,
    NAN,
    accumulated,
    head_calls,
    input_shapes,
    make_trainer,
    rows,
    snapshot,
    tiny,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core import backends
from rlhf_core.data import Example, Pair, Ranked, Steps
from rlhf_core.data.collate import length
from rlhf_core.data.store import store
from rlhf_core.models import ILQLModel, RewardModel
from rlhf_core.ops import linear_logprobs_blocks
from rlhf_core.trainers import (
    DistillConfig,
    DistillTrainer,
    DPOConfig,
    DPOTrainer,
    ILQLConfig,
    ILQLTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

kinds = pytest.mark.parametrize("kind", KINDS)

# ---- examples


@pytest.mark.parametrize(
    "kind, bad, message",
    [
        ("sft", Pair([7], [5], [6]), "is of type Pair, sft takes Example"),
        ("sft", [7, 8], "is of type list, sft takes Example"),
        ("dpo", Ranked([7], [[5], [6]]), "is of type Ranked, dpo takes Pair"),
        ("reward", Example([7], [5]), "is of type Example, reward takes Pair or Ranked or Steps"),
        ("sft", Example([7], [5, 2], [True]), "has a mask of 1 for 2 tokens"),
        ("dpo", Pair([7], [5, 2], [6], masks=[None, [True, True]]), "has a mask of 2 for 1 tokens"),
        ("reward", Pair([7], [5, 2], [6], masks=[None]), "has 1 masks for 2 completions"),
        ("reward", Steps([7], [5, 2], [True, True], [1.0]), "has 1 labels for 2 steps"),
        ("reward", Steps([7], [5, 2], [True, True], [1.0, 1.5]), r"has label 1\.5, which is not"),
        ("reward", Steps([7], [5, 2], [True, True], [NAN, 1.0]), "has label nan, which is not"),
    ],
)  # fmt: skip
def test_an_example_that_cannot_be_trained_on_is_reported_by_number(kind, bad, message):
    for examples in ([*rows(kind), bad], store([*rows(kind), bad])):
        with pytest.raises(ValueError, match=f"^example 8 {message}"):
            make_trainer(kind, examples=examples)
    with pytest.raises(ValueError, match=f"^evaluation example 0 {message}"):
        make_trainer(kind, others=dict(eval_examples=[bad]))


def test_a_fault_of_a_methods_own_is_found_in_a_store(monkeypatch):
    good = rows("sft")
    for cls, config, model, name, value in (
        (KTOTrainer, KTOConfig(), tiny(), "label", True),
        (ILQLTrainer, ILQLConfig(), ILQLModel(tiny()), "reward", 1.0),
    ):
        examples = [row._replace(**{name: value}) for row in good]
        cls(model, store(examples), config)
        with pytest.raises(ValueError, match=f"^example 8 has {name} None, not"):
            cls(model, store([*examples, good[0]]), config)
    # One that names no field is asked about every example.
    monkeypatch.setattr(SFTTrainer, "fault", lambda self, row: f"has {row.prompt_ids}")
    with pytest.raises(ValueError, match=r"^example 0 has \["):
        make_trainer("sft", examples=store(good))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_store_is_the_run_on_its_list(kind):
    examples, held_out = rows(kind, n=6), rows(kind, n=3, seed=1)
    options = dict(batch_size=4, epochs=2, eval_every=2)
    runs = [
        make_trainer(kind, examples=some, others=dict(eval_examples=others), **options)
        for some, others in ((examples, held_out), (store(examples), store(held_out)[:]))
    ]
    assert runs[0].digests == runs[1].digests
    assert runs[0].train() == runs[1].train()


@kinds
def test_an_example_longer_than_max_length_or_the_model_is_refused_not_truncated(kind):
    """An example of exactly that length is accepted."""
    model, (row,) = tiny(KINDS[kind][2], max_positions=16), rows(kind, 1)
    for max_length, message in (
        (12, "max_length is 12; the encoders of .* truncate"),
        (64, "the model has 16 positions"),
    ):
        room = min(max_length, 16) - length(row._replace(prompt_ids=[]))
        fits, long = (row._replace(prompt_ids=[7] * n) for n in (room, room + 1))
        make_trainer(kind, model, [fits], max_length=max_length)
        message = f"has {min(max_length, 16) + 1} tokens, but {message}"
        with pytest.raises(ValueError, match=f"^example 1 {message}"):
            make_trainer(kind, model, [fits, long], max_length=max_length)
        with pytest.raises(ValueError, match=f"^evaluation example 0 {message}"):
            make_trainer(kind, model, [fits], dict(eval_examples=[long]), max_length=max_length)


def test_a_model_of_another_type_is_refused():
    message = "reward trains a model of type RewardModel, got Transformer"
    with pytest.raises(TypeError, match=message):
        make_trainer("reward", tiny())


def test_a_run_without_examples_is_refused():
    with pytest.raises(ValueError, match="no examples to train on"):
        make_trainer("sft", examples=[])


def test_the_loss_on_plain_text_is_reported_before_and_after(tmp_path):
    """In nats per token of all texts together, by hand; a resumed run knows the first one."""
    texts = [Example([], [7, 8, 9, 2]), Example([5], [6, 2])]
    settings = dict(batch_size=2, lr=1e-2, lr_schedule="constant")

    def trainer(**options):
        others = dict(pretraining_examples=texts, out=tmp_path)
        return make_trainer("sft", others=others, **(settings | options))

    def by_hand(model):
        rows = [
            model(torch.tensor([x.prompt_ids + x.completion_ids])).log_softmax(-1) for x in texts
        ]
        ids = [[8, 9, 2], [6, 2]]
        losses = [-row[0, range(len(x)), x] for row, x in zip(rows, ids)]
        return torch.cat(losses).mean().item()

    first = trainer(max_steps=2, eval_every=1, save_every=2)
    history = first.train()
    assert history[0]["pretraining/loss_before"] == pytest.approx(by_hand(tiny()), rel=1e-5)
    assert history[1]["pretraining/loss"] == pytest.approx(by_hand(first.model), rel=1e-5)
    assert history[0]["pretraining/loss"] != history[1]["pretraining/loss"]
    rest = trainer()
    rest.resume()
    history = rest.train()
    assert "pretraining/loss" not in history[2]
    assert history[3]["pretraining/loss"] == pytest.approx(by_hand(rest.model), rel=1e-5)
    assert history[3]["pretraining/loss_before"] == history[0]["pretraining/loss_before"]
    plain = make_trainer("sft", **settings)
    plain.train()
    assert_close(snapshot(rest.model), snapshot(plain.model), rtol=0, atol=0)


def test_texts_that_a_model_cannot_read_are_refused():
    for texts, message in (
        ([Example([], [99])], "pretraining example 0 has"),
        ([Example([], [5])], "no pretraining example has a token to predict"),
        ([[5, 6]], "pretraining example 0 is of type list"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer("sft", others=dict(pretraining_examples=texts))


def test_an_option_of_the_run_without_effect_warns_and_the_run_works(tmp_path, monkeypatch):
    """For example, save_every without out saves nothing and does not fail."""
    monkeypatch.chdir(tmp_path)
    for options, message in (
        (dict(dropout=True), "dropout has no effect: the model's config has none"),
        (dict(save_every=1), "save_every has no effect without out"),
        (dict(eval_every=1), "eval_every has no effect without evaluation or pretraining examples"),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            trainer = make_trainer("sft", **options)
        assert len(caught) == 1 and len(trainer.train()) == 1
        plain = make_trainer("sft")
        plain.train()
        assert_close(snapshot(trainer.model), snapshot(plain.model), rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


# ---- accumulation


@kinds
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_micro_batches_add_up_to_the_batch(kind, precision):
    """Row 16: 1x8, 2x4, 8x1 and an uneven split, lengths unequal."""
    model_type = KINDS[kind][2]
    others = dict(reference=tiny(seed=1)) if kind == "dpo" else {}
    results = [
        accumulated(
            make_trainer(
                kind, tiny(model_type), micro_batch_size=size, precision=precision, others=others
            ),
            rows(kind),
        )
        for size in (None, 1, 2, 4, 3)
    ]
    for result in results[1:]:
        if precision == "float32":
            assert_close(result, results[0], rtol=1e-5, atol=1e-6)
        else:
            got, want = (torch.cat([x.flatten() for x in r[2]]) for r in (result, results[0]))
            assert result[0] == pytest.approx(results[0][0], rel=0.01)
            assert (got - want).norm() < 0.01 * want.norm()


POSITIONS = {
    "rotary": {},
    "learned": dict(positions="learned", norm="layernorm", tie_embeddings=False),
    "sliding window": dict(sliding_window=4, num_kv_heads=1),
}


def row_by_row(kind, trainer, batch):
    """Loss and gradients of every sequence in a row of its own, by the definitions."""
    model, terms = trainer.model, []

    def logps(model, prompt, completion):
        log_p = model(torch.tensor([prompt + completion]))[0].log_softmax(-1)
        return torch.stack(
            [log_p[k - 1, (prompt + completion)[k]] for k in range(max(len(prompt), 1), len(log_p))]
        )

    def score(ids):
        return model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]

    for row in batch:
        if kind == "sft":
            mask = torch.tensor(row.completion_mask or [True] * len(row.completion_ids))[
                not row.prompt_ids :
            ]
            terms += -logps(model, row.prompt_ids, row.completion_ids)[mask]
            continue
        if kind == "dpo":
            policy, reference = (
                [logps(m, row[0], x).sum() for x in row[1:3]]
                for m in (model, trainer.reference.model)
            )
            margin = trainer.config.beta * (
                (policy[0] - reference[0].detach()) - (policy[1] - reference[1].detach())
            )
        else:
            margin = score(row[0] + row[1]) - score(row[0] + row[2])
        terms.append(torch.nn.functional.softplus(-margin))
    loss = torch.stack(terms).mean()
    return loss.item(), list(torch.autograd.grad(loss, trainer.trained_parameters()))


@kinds
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_rows_that_share_a_prompt_or_are_packed_have_the_loss_and_gradients_of_separate_rows(
    kind, positions, micro_batch_size
):
    """Row 30: with an empty prompt, a masked completion, and a pair longer than the positions."""
    model_type = KINDS[kind][2]
    batch = rows(kind, 9)
    if kind == "sft":
        batch += [Example([], [4, 5, 2]), Example([3], [7, 8, 2], [False, True, True])]
    else:
        batch += [Pair([], [4, 5, 2], [6, 2]), Pair([7] * 10, [5] * 20, [6] * 15)]
    others = dict(reference=tiny(seed=1, **POSITIONS[positions])) if kind == "dpo" else {}
    options = dict(
        others=others,
        micro_batch_size=micro_batch_size,
        **(dict(beta=0.5) if kind == "dpo" else {}),
    )
    for packing in [dict(packing=True), dict(packing=False)] if kind == "sft" else [{}]:
        trainer = make_trainer(kind, tiny(model_type, **POSITIONS[positions]), **options, **packing)
        loss, metrics, gradients = accumulated(trainer, batch)
        want, want_gradients = row_by_row(kind, trainer, batch)
        assert loss == pytest.approx(want, abs=1e-6) and metrics["loss"] == pytest.approx(
            want, abs=1e-6
        )
        assert_close(gradients, want_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_the_prompt_of_a_pair_is_computed_once(kind):
    """In the reference too."""
    trainer = make_trainer(kind)
    batch = [pair._replace(prompt_ids=[7] * 12) for pair in rows(kind)]
    models = [trainer.model, trainer.reference.model] if kind == "dpo" else [trainer.model]
    seen = [input_shapes(model.trunk) for model in models]
    trainer.step(batch)
    assert [len(shapes) for shapes in seen] == [1] * len(models) and seen[0] == seen[-1]
    apart = sum(len(p) + len(c) + len(p) + len(r) for p, c, r, *_ in batch)
    assert seen[0][0].numel() < 0.8 * apart


REGULARIZED = ("sft", dict(label_smoothing=0.1, z_coef=0.01))


@pytest.mark.parametrize("kind, options", [*((kind, {}) for kind in KINDS), REGULARIZED])
def test_no_step_holds_the_logits_of_all_targets(kind, options, monkeypatch):
    """The largest tensor of a step is smaller than the logits of half the targets."""
    monkeypatch.setattr(linear_logprobs_blocks, "CPU_WHOLE", 30 * 9000)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                # By its storage: a view of one number may have the shape of logits.
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return out

    vocab_size, batch = 9000, rows(kind, 32)
    trainer = make_trainer(kind, tiny(KINDS[kind][2], vocab_size=vocab_size), **options)
    targets = sum(
        len(completion) for row in batch for completion in row[1 : 2 if kind == "sft" else 3]
    )
    with Largest() as largest:
        trainer.step(batch)
    assert 16 * vocab_size <= largest.numel < targets * vocab_size / 2


@pytest.mark.parametrize("kind, options", [("sft", {}), ("dpo", {}), REGULARIZED])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_logits_and_loss_are_computed_once(kind, options, micro_batch_size, monkeypatch):
    """One call of the head per micro-batch, one call of the loss function per chunk of it."""
    packing = dict(packing=True) if kind == "sft" else {}
    trainer = make_trainer(kind, micro_batch_size=micro_batch_size, **packing, **options)
    targets = sum(len(ids) for row in rows(kind) for ids in row[1 : 2 if kind == "sft" else 3])
    calls = head_calls(monkeypatch, rows_at_once=15)
    trainer.step(rows(kind))
    assert len(calls) == (1 if micro_batch_size is None else 3)
    assert sum(count for chunks in calls for _, count in chunks) == targets > 20
    assert max(count for chunks in calls for _, count in chunks) <= 15
    for chunks in calls:
        ends = [0, *(groups.stop for groups, _ in chunks)]
        assert [groups.start for groups, _ in chunks] == ends[:-1]


BATCHES = {  # for every method whose loss is a mean: its trainer on a batch of its own
    "sft": lambda: (SFTTrainer, tiny(), SFTConfig(), rows("sft")),
    "sft packed": lambda: (SFTTrainer, tiny(), SFTConfig(packing=True), rows("sft")),
    "sft regularized": lambda: (SFTTrainer, tiny(), SFTConfig(z_coef=0.1), rows("sft")),
    "dpo": lambda: (DPOTrainer, tiny(), DPOConfig(sft_coef=0.5), rows("dpo")),
    "kto": lambda: (KTOTrainer, tiny(), KTOConfig(), labelled()),
    "reward of pairs": lambda: (RewardTrainer, tiny(RewardModel), RewardConfig(), rows("reward")),
    "reward of lists": lambda: (RewardTrainer, tiny(RewardModel), RewardConfig(), LISTS),
    "reward of steps": lambda: (RewardTrainer, tiny(RewardModel), RewardConfig(), STEPS),
    "distill": lambda: (DistillTrainer, tiny(), DistillConfig(kl_top_k=2), taught()),
    "ilql": lambda: (ILQLTrainer, ILQLModel(tiny()), ILQLConfig(), labelled()),
}
LISTS = [Ranked([7], [[5, 2], [6, 2], [8, 2]]), Ranked([8], [[5, 5, 2], [6, 2]])]
STEPS = [Steps([7], [5, 6, 2], [True, False, True], [1.0, 0.0]), Steps([8], [9], [True], [0.5])]


def labelled():
    return [x._replace(label=i % 2 > 0, reward=i - 1.0) for i, x in enumerate(rows("sft"))]


def taught():
    return [x._replace(teacher_prompt_ids=[5, 6, *x.prompt_ids]) for x in rows("sft")]


@pytest.mark.parametrize("name", BATCHES)
def test_total_is_the_only_denominator_of_a_loss(name):
    """Across several devices only `total` knows the whole batch: doubling it halves the loss."""
    trainer_type, model, config, batch = BATCHES[name]()

    class Doubled(trainer_type):
        def total(self, count):
            return 2 * super().total(count)

    loss, metrics, gradients = accumulated(trainer_type(model, batch, config), batch)
    half, same_metrics, halves = accumulated(Doubled(model, batch, config), batch)
    assert half == pytest.approx(loss / 2, rel=1e-6) and loss != 0
    assert same_metrics == pytest.approx(metrics, rel=1e-6)
    assert_close(halves, [x / 2 for x in gradients], rtol=1e-4, atol=1e-6)


def test_a_batch_without_targets_has_loss_0():
    masked = Example([5], [6, 2], [False, False])
    loss, metrics, _ = accumulated(make_trainer("sft"), [masked, masked])
    assert loss == 0 and "loss" not in metrics


# ---- precision, checkpointing, frozen layers


def test_a_cpu_without_bfloat16_products_stays_in_float32(monkeypatch):
    def rounds(**options):
        with make_trainer("sft", **options).autocast():
            return torch.is_autocast_enabled("cpu")

    assert not rounds() and rounds(precision="bfloat16")
    monkeypatch.setattr(backends, "multiplies_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="the run computes in float32"):
        assert not rounds(precision="bfloat16")


@kinds
def test_in_bfloat16_products_are_rounded_and_weights_gradients_and_moments_are_not(kind):
    dtypes = {}
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(kind, precision=precision)
        seen = dtypes[precision] = {}
        block = trainer.model.trunk.blocks[0]
        for name, module in (("qkv", block.attn.qkv), ("up", block.mlp.up), ("block", block)):
            module.register_forward_hook(
                lambda m, i, out, name=name, seen=seen: seen.update({name: out.dtype})
            )
        loss, _, gradients = accumulated(trainer, rows(kind))
        trainer.step(rows(kind))
        moments = trainer.optimizer.state.values()
        state = [x for moment in moments for x in (moment["exp_avg"], moment["exp_avg_sq"])]
        for x in (*gradients, *state, *trainer.trained_parameters()):
            assert x.dtype == torch.float32
        seen |= dict(loss=loss, gradient=torch.cat([g.flatten() for g in gradients]))
    half, full = dtypes["bfloat16"], dtypes["float32"]
    assert half["qkv"] == half["up"] == torch.bfloat16
    assert half["block"] == full["qkv"] == torch.float32
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02)
    assert kind == "dpo" or half["loss"] != full["loss"]
    assert (half["gradient"] - full["gradient"]).norm() < 0.05 * full["gradient"].norm()


@kinds
@pytest.mark.parametrize("options", [{}, dict(dropout=0.3)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_no_bit_of_the_loss_and_keeps_less(
    kind, options, precision
):
    results, kept = [], []

    def keep(x):
        kept[-1] += x.numel()
        return x

    for checkpointing in (False, True):
        model = tiny(KINDS[kind][2], **options)
        settings = dict(
            activation_checkpointing=checkpointing, precision=precision, dropout=bool(options)
        )
        trainer = make_trainer(kind, model, **settings)
        torch.manual_seed(0)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            results.append(accumulated(trainer, rows(kind)))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert kept[1] < kept[0]


@kinds
@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_frozen_layers_stay_as_they_are_and_the_others_move(kind, positions, layers):
    """Row 32. The last norm's bias cancels in the margin of a pair, so it stays, too."""
    trainer = make_trainer(
        kind, tiny(KINDS[kind][2], **POSITIONS[positions]), freeze_layers=layers, weight_decay=0.1
    )
    before = snapshot(trainer.model)
    trainer.step(rows(kind))
    lowest = ["embed.", "position.", *(f"blocks.{i}." for i in range(layers))] if layers else []
    held = tuple(f"trunk.{low}" for low in lowest)
    for name, weight in snapshot(trainer.model).items():
        if (kind, name) != ("reward", "trunk.norm.bias"):
            assert torch.equal(weight, before[name]) == name.startswith(held), name


@kinds
def test_weight_decay_shrinks_matrices_and_not_norms_or_biases(kind):
    model_type, weights = KINDS[kind][2], []
    for weight_decay in (0.0, 0.5):
        model = tiny(model_type, **POSITIONS["learned"])
        trainer = make_trainer(kind, model, weight_decay=weight_decay, lr=1e-2)
        before = snapshot(model)
        trainer.step(rows(kind))
        weights.append(snapshot(model))
    plain, decayed = weights
    for name, weight in decayed.items():
        decay = 0.5 * 1e-2 * before[name] * (weight.ndim > 1)
        assert_close(weight, plain[name] - decay, rtol=1e-5, atol=1e-7, msg=name)


@kinds
def test_more_frozen_layers_than_the_model_has_are_refused(kind):
    with pytest.raises(ValueError, match="freeze_layers is 3, but the model has 2 blocks"):
        make_trainer(kind, freeze_layers=3)


# ---- what moves


@kinds
def test_training_moves_what_it_trains_and_nothing_else(kind):
    """Row 32."""
    trainer = make_trainer(kind)
    frozen = trainer.model.trunk.blocks[0].requires_grad_(False)
    trainer = make_trainer(kind, trainer.model)
    reference = trainer.reference.model if kind == "dpo" else frozen
    before, reference_before = snapshot(trainer.model), snapshot(reference)
    trainer.step(rows(kind))
    for name, weight in snapshot(trainer.model).items():
        assert torch.equal(weight, before[name]) == name.startswith("trunk.blocks.0."), name
    assert_close(snapshot(reference), reference_before, rtol=0, atol=0)


@kinds
def test_a_nan_gradient_leaves_every_weight_as_it_was(kind):
    trainer = make_trainer(kind)
    hook = trainer.model.trunk.norm.weight.register_hook(lambda gradient: gradient * NAN)
    before = snapshot(trainer.model)
    message = "step 1: the gradient's norm is nan; no weight was updated"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert_close(snapshot(trainer.model), before, rtol=0, atol=0)
    hook.remove()
    trainer.step(rows(kind))  # and the optimizer holds no NaN either
    assert all(weight.isfinite().all() for weight in snapshot(trainer.model).values())


@kinds
def test_dropout_is_off_unless_asked_for(kind):
    """Row 3."""
    model_type, evals = KINDS[kind][2], dict(eval_examples=rows(kind, seed=1))
    assert not make_trainer(kind, tiny(model_type, dropout=0.3).train()).model.training
    noisy = make_trainer(kind, tiny(model_type, dropout=0.3), others=evals, dropout=True)
    assert noisy.model.training
    assert accumulated(noisy, rows(kind))[0] != accumulated(noisy, rows(kind))[0]
    assert noisy.evaluate() == noisy.evaluate()  # off for evaluation, then on again
    assert noisy.model.training


@kinds
def test_evaluation_does_not_depend_on_the_batch_size(kind):
    """Row 32."""
    others = dict(eval_examples=rows(kind, n=7, seed=1))
    if kind == "dpo":
        others["reference"] = tiny(seed=1)
    results = [make_trainer(kind, others=others, batch_size=size).evaluate() for size in (7, 1, 3)]
    want = accumulated(make_trainer(kind, others=others), others["eval_examples"])[1]
    for result in results:
        assert result == pytest.approx(
            {f"eval_{name}": value for name, value in want.items()}, abs=1e-5
        )


# ---- the loop


@kinds
def test_the_same_seed_repeats_a_run_and_another_seed_does_not(kind):
    runs = [make_trainer(kind, batch_size=3, epochs=2, seed=seed).train() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_every_epoch_sees_every_example_once_in_another_order():
    examples = rows("sft", 10)
    trainer = make_trainer("sft", examples=examples, batch_size=4, epochs=2)
    batches = [[examples.index(example) for example in batch] for batch in trainer.batches()]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2 and trainer.total_steps == 6
    first, second = (list(chain(*part)) for part in (batches[:3], batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize(
    "options, want",
    [
        (dict(), [1, 0.75, 0.5, 0.25]),
        (dict(lr_schedule="constant"), [1, 1, 1, 1]),
        (dict(warmup_steps=2), [0.5, 1, 1, 0.5]),
        # As transformers' get_cosine_schedule_with_warmup gives them.
        (dict(lr_schedule="cosine"), [1, 0.8535533906, 0.5, 0.1464466094]),
        (dict(warmup_steps=1, lr_schedule="cosine"), [1, 1, 0.75, 0.25]),
        (dict(warmup_steps=2, lr_schedule="constant"), [0.5, 1, 1, 1]),
        (dict(warmup_steps=4), [0.25, 0.5, 0.75, 1]),
        (dict(warmup_steps=8), [0.125, 0.25, 0.375, 0.5]),
        (dict(max_steps=2), [1, 0.5]),
    ],
    ids=str,
)
def test_the_learning_rate_of_every_step(options, want):
    history = make_trainer("sft", batch_size=2, lr=0.01, **options).train()
    assert [step["lr"] for step in history] == pytest.approx([0.01 * factor for factor in want])


def test_the_gradient_is_clipped_and_its_norm_before_clipping_reported():
    trainer = make_trainer("sft", max_grad_norm=0.01)
    norm = trainer.step(rows("sft"))["grad_norm"]
    left = torch.stack([p.grad.norm() for p in trainer.trained_parameters()]).norm().item()
    assert norm > 0.1 and left == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("eval_every, want", [(None, [4]), (2, [2, 4]), (3, [3, 4])])
def test_evaluation_happens_when_it_is_due_and_at_the_end(eval_every, want):
    others = dict(eval_examples=rows("sft", 3, seed=1))
    history = make_trainer("sft", batch_size=2, eval_every=eval_every, others=others).train()
    assert [step["step"] for step in history if "eval_loss" in step] == want
