"""ILQL: its trainer by the definition, a model that writes better than its data, and its files."""

import math
import random

import pytest
import torch
from helpers import accumulated, run, snapshot, tiny, write
from torch.testing import assert_close

from rlhf_core.data import ByteTokenizer, DataError, Example, Scored, encode_scored, read_scored
from rlhf_core.generation import generate
from rlhf_core.losses import cloning_loss, expectile_loss, q_loss, transitions
from rlhf_core.models import ILQLModel, RewardModel, Transformer, TransformerConfig
from rlhf_core.models.ilql import HEADS_FILE
from rlhf_core.models.lora import LoRAConfig, add_adapters, has_adapters
from rlhf_core.models.safetensors import read_tensors
from rlhf_core.trainers import ILQLConfig, ILQLTrainer


def rows(n=6, seed=0):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, 12) for _ in range(rng.randrange(low, high))]

    return [Example(ids(1, 5), [*ids(0, 6), 2], reward=rng.gauss(0.5, 1)) for _ in range(n)]


def valued(seed=0, **options):
    """A model whose value heads have all moved from their initial weights."""
    model = ILQLModel(tiny(seed=seed, noise=0.1, **options), beta=0.7)
    with torch.no_grad():
        for x in (*model.q.parameters(), *model.v.parameters(), *model.target_q.buffers()):
            x.add_(torch.randn_like(x) * 0.3)
    return model


def make(model=None, examples=None, out=None, **config):
    config = ILQLConfig(**(dict(batch_size=6, lr=1e-3) | config))
    return ILQLTrainer(valued() if model is None else model, examples or rows(), config, out=out)


def test_a_score_comes_after_the_last_token_where_the_value_is_0():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rewards, following = transitions(values, torch.tensor([7.0, 8.0, 9.0]), torch.tensor([3, 0, 2]))
    assert rewards.tolist() == [0, 0, 7, 0, 9] and following.tolist() == [2, 3, 0, 5, 0]
    rewards, following = transitions(values, torch.tensor([7.0, 8.0]), torch.tensor([5, 0]))
    assert rewards.tolist() == [0, 0, 0, 0, 7] and following.tolist() == [2, 3, 4, 5, 0]


def test_the_bellman_error_moves_q_towards_reward_and_next_value_alone():
    q, following = (torch.tensor(x, requires_grad=True) for x in ([1.0, 5.0], [4.0, 0.0]))
    loss = q_loss(q, torch.tensor([0.0, 3.0]), following, gamma=0.5)
    assert loss.tolist() == [1.0, 4.0]
    loss.sum().backward()
    assert q.grad.tolist() == [-2.0, 4.0] and following.grad is None


def test_the_expectile_weighs_values_that_are_too_low_by_itself_and_the_others_by_the_rest():
    values, target = (torch.tensor(x, requires_grad=True) for x in ([1.0, 3.0], [3.0, 2.0]))
    loss = expectile_loss(values, target, expectile=0.75)
    assert loss.tolist() == [3.0, 0.25]
    loss.sum().backward()
    assert values.grad.tolist() == [-3.0, 0.5] and target.grad is None


def test_the_expectile_is_the_mean_at_one_half_and_nears_the_maximum_at_one():
    q = torch.tensor([0.0, 1.0, 5.0])

    def gradient(value, expectile):
        v = torch.full((3,), value, requires_grad=True)
        return (
            torch.autograd.grad(expectile_loss(v, q, expectile=expectile).sum(), v)[0].sum().item()
        )

    assert gradient(2.0, 0.5) == pytest.approx(0, abs=1e-6)
    assert gradient(4.9, 0.99) < 0 < gradient(5.0, 0.99)


def test_cloning_weighs_a_token_by_its_exponential_advantage_up_to_100():
    logprobs, advantages = (
        torch.tensor(x, requires_grad=True) for x in ([-1.0, -2.0, -3.0], [0.5, -0.5, 9.0])
    )
    assert torch.equal(cloning_loss(logprobs, advantages, beta=0.0), -logprobs)
    got = cloning_loss(logprobs, advantages, beta=2.0)
    assert_close(got, torch.tensor([math.e, 2 / math.e, 300.0]))
    got.sum().backward()
    assert_close(logprobs.grad, torch.tensor([-math.e, -1 / math.e, -100.0]))
    assert advantages.grad is None


@pytest.mark.parametrize("micro_batch_size", [None, 1, 4])
def test_loss_and_gradients_are_those_of_the_definition_whatever_the_micro_batches(
    micro_batch_size,
):
    batch, coefs = rows(), dict(cql_coef=0.3, bc_coef=0.6, bc_beta=0.4, gamma=0.9, expectile=0.8)
    trainer = make(micro_batch_size=micro_batch_size, **coefs)
    model, terms = trainer.model, []
    for row in batch:
        ids, P = torch.tensor([row.prompt_ids + row.completion_ids]), len(row.prompt_ids)
        hidden = model.lm.trunk(ids)[0, P - 1 : -1]  # before each token of the completion
        V = model.values(hidden)
        for t, token in enumerate(row.completion_ids):
            end = t == len(row.completion_ids) - 1
            target = row.reward if end else 0.9 * V[t + 1].detach()
            target_q = min(head(hidden[t])[token].detach() for head in model.target_q)
            u = target_q - V[t]
            loss = (0.8 if u > 0 else 0.2) * u**2
            for head in model.q:
                values = head(hidden[t])
                loss = loss + (target - values[token]) ** 2 - 0.3 * values.log_softmax(-1)[token]
            logp = model.lm.logits(hidden[t]).log_softmax(-1)[token]
            terms.append(loss - 0.6 * (0.4 * u.detach()).exp() * logp)
    want = torch.stack(terms).mean()
    gradients = torch.autograd.grad(want, trainer.trained_parameters())
    total, metrics, got = accumulated(trainer, batch)
    assert total == pytest.approx(want.item(), rel=1e-5) and metrics["loss"] == pytest.approx(
        total, rel=1e-5
    )
    assert_close(got, list(gradients), rtol=1e-4, atol=2e-6)


def test_bfloat16_gives_the_same_loss_up_to_its_rounding():
    (exact, _, gradients), (rounded, _, others) = (
        accumulated(make(precision=precision), rows()) for precision in ("float32", "bfloat16")
    )
    got, want = (torch.cat([x.flatten() for x in parts]) for parts in (others, gradients))
    assert exact != rounded == pytest.approx(exact, rel=0.02)
    assert (got - want).norm() < 0.03 * want.norm()


def test_a_step_moves_the_targets_their_share_of_the_way_to_the_q_heads():
    trainer = make(target_rate=0.25)
    before = [x.clone() for x in trainer.model.target_q.buffers()]
    metrics = trainer.step(rows())
    want = [0.75 * old + 0.25 * new for old, new in zip(before, trainer.model.q.parameters())]
    assert_close(list(trainer.model.target_q.buffers()), want)
    assert metrics["advantage"] == pytest.approx(metrics["q"] - metrics["value"], abs=1e-5)
    assert not any(
        p is x for x in trainer.model.target_q.buffers() for p in trainer.trained_parameters()
    )


def test_a_fresh_model_writes_as_its_language_model_does_and_its_q_heads_part():
    model = ILQLModel(tiny())
    hidden = torch.randn(3, 16)
    assert torch.equal(model.logits(hidden), model.lm.logits(hidden))
    trainer = make(model)
    for _ in range(3):
        trainer.step(rows())
    assert not torch.equal(model.q[0].out.weight, model.q[1].out.weight)


def test_a_run_that_goes_on_ends_with_the_weights_and_targets_of_one_that_never_stopped(tmp_path):
    def build(**config):
        settings = dict(epochs=2, batch_size=4, target_rate=0.3, lr_schedule="constant")
        return make(valued(), rows(12), tmp_path, **(settings | config))

    whole = build()
    whole.train()
    build(max_steps=4, save_every=4).train()
    rest = build()
    with pytest.raises(ValueError, match="bc_beta"):
        build(bc_beta=1.0).resume()
    rest.resume()
    rest.train()
    for name, x in snapshot(rest.model).items():
        assert torch.equal(x, whole.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "name, value",
    [
        *(
            ("gamma", 1.5),
            ("expectile", 1.0),
            ("cql_coef", -1.0),
            ("bc_coef", -1.0),
            ("bc_beta", -1.0),
            ("beta", -0.1),
        ),
        *(("target_rate", 0.0), ("target_rate", 1.1)),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        ILQLConfig(**{name: value})


@pytest.mark.parametrize("reward", [None, math.nan, -math.inf])
def test_an_example_without_a_finite_reward_is_refused_by_number(reward):
    with pytest.raises(ValueError, match=f"example 1 has reward {reward}, not a finite number"):
        make(examples=[rows()[0], Example([3], [4, 2], reward=reward)])


def test_a_model_without_values_is_refused():
    with pytest.raises(TypeError, match="ilql trains a model of type ILQLModel, got Transformer"):
        make(tiny())


@pytest.mark.slow
def test_it_learns_to_write_better_than_the_data():
    """The data are random tokens. A 5 earns 1, a 6 costs 1."""
    rng = random.Random(0)
    examples = []
    for _ in range(400):
        completion = [rng.randrange(3, 12) for _ in range(rng.randrange(1, 8))]
        score = float(completion.count(5) - completion.count(6))
        examples.append(Example([rng.randrange(3, 12)], [*completion, 2], reward=score))
    behaviour = sum(example.reward for example in examples) / len(examples)
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=12,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        max_positions=32,
        eos_ids=(2,),
        pad_id=0,
    )
    model = ILQLModel(Transformer(TransformerConfig(**sizes)))
    settings = dict(
        lr=3e-3, batch_size=16, epochs=6, expectile=0.8, cql_coef=0.01, target_rate=0.05
    )
    ILQLTrainer(model, examples, ILQLConfig(**settings)).train()

    def score(beta):
        model.beta = beta
        made = generate(
            model,
            torch.arange(3, 12)[:, None],
            max_new_tokens=8,
            num_samples=40,
            seeds=torch.arange(360),
        )
        return float(((made.response_ids == 5).int() - (made.response_ids == 6).int()).sum()) / 360

    assert abs(score(0.0) - behaviour) < 0.2 and score(4.0) > behaviour + 0.7


@pytest.mark.slow
def test_values_come_to_what_the_bellman_equation_says():
    """One of two first tokens earns 1 at the end, the other 0; V is the expectile of their Qs."""
    examples = [Example([3], [first, 6, 2], reward=float(first == 4)) for first in (4, 5)] * 8
    settings = dict(
        batch_size=16, epochs=300, lr=5e-3, gamma=0.8, expectile=0.7, cql_coef=0.0, target_rate=0.1
    )
    model = ILQLModel(tiny())
    ILQLTrainer(model, examples, ILQLConfig(**settings)).train()
    hidden = model.trunk(torch.tensor([[3, 4, 6], [3, 5, 6]]))  # before each token
    q = torch.stack(
        [head.of_tokens(hidden, torch.tensor([[4, 6, 2], [5, 6, 2]])) for head in model.q]
    )
    assert_close(
        q, torch.tensor([[0.64, 0.8, 1.0], [0.0, 0.0, 0.0]]).expand(2, 2, 3), rtol=0, atol=0.03
    )
    values = torch.tensor([[0.7 * 0.64, 0.8, 1.0], [0.7 * 0.64, 0.0, 0.0]])
    assert_close(model.values(hidden), values, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    "vocab_size", [12, 4096]
)  # the larger one's weights are packed for decoding
def test_it_samples_from_logits_that_its_values_perturb(vocab_size):
    model = valued(vocab_size=vocab_size)
    made = generate(
        model, torch.tensor([[5, 6], [7, 8]]), max_new_tokens=4, eos_ids=(), seeds=torch.arange(2)
    )
    ids = torch.cat((torch.tensor([[5, 6], [7, 8]]), made.response_ids), dim=1)
    hidden = model.trunk(ids)[:, 1:-1]
    q = torch.minimum(*(head(hidden) for head in model.target_q))
    logits = model.lm.logits(hidden) + 0.7 * (q - model.v(hidden))
    want = logits.log_softmax(-1).gather(2, made.response_ids[:, :, None])[..., 0]
    assert_close(made.logprobs, want, rtol=1e-4, atol=1e-4)
    assert (
        want
        - model.lm.logits(hidden).log_softmax(-1).gather(2, made.response_ids[:, :, None])[..., 0]
    ).abs().max() > 0.1


@pytest.mark.parametrize("adapted", [False, True])
def test_a_folder_reads_back_and_is_the_language_models_too(adapted, tmp_path):
    lm = tiny()
    lm.save_pretrained(tmp_path / "base")
    if adapted:
        add_adapters(lm, LoRAConfig(rank=2, base=str(tmp_path / "base")))
    model = ILQLModel(lm)
    trainer = make(model, beta=2.5, target_rate=0.5)
    before = snapshot(lm)
    trainer.step(rows())
    moved = {name for name, x in snapshot(lm).items() if not torch.equal(x, before[name])}
    assert moved and all(".adapters." in name for name in moved) == adapted
    out = tmp_path / "out"
    model.save_pretrained(out)
    back, hidden = ILQLModel.from_pretrained(out), torch.randn(2, 16)
    assert back.beta == 2.5 and not back.training
    for name, x in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], x), name
    assert torch.equal(Transformer.from_pretrained(out).logits(hidden), model.lm.logits(hidden))


def test_another_model_saved_over_it_takes_the_heads_away(tmp_path):
    valued().save_pretrained(tmp_path)
    tiny(RewardModel).save_pretrained(tmp_path)
    assert not (tmp_path / HEADS_FILE).exists()
    with pytest.raises(FileNotFoundError, match=HEADS_FILE):
        tiny().save_pretrained(tmp_path)
        ILQLModel.from_pretrained(tmp_path)


def test_heads_of_another_model_are_refused_by_tensor(tmp_path):
    tiny().save_pretrained(tmp_path)
    other = tmp_path / "other"
    valued(hidden_size=32).save_pretrained(other)
    (other / HEADS_FILE).rename(tmp_path / HEADS_FILE)
    with pytest.raises(ValueError, match=r"tensor '.*' has shape .*this model's is"):
        ILQLModel.from_pretrained(tmp_path)


def test_rewards_are_read_and_stay_with_their_completion(tmp_path):
    data = [
        {"prompt": "a", "completion": "b", "reward": -0.5},
        {"prompt": "c", "response": "d", "reward": 2},
    ]
    path = write(tmp_path / "data.jsonl", data)
    assert read_scored(path) == [Scored("a", "b", -0.5), Scored("c", "d", 2.0)]
    first, _ = read_scored(path, encode=lambda row: encode_scored(row, ByteTokenizer(), 64))
    assert first.reward == -0.5 and len(first.completion_ids) == 2


@pytest.mark.parametrize("reward", ["NaN", "Infinity", "true", "null", '"1"', "[1]"])
def test_what_is_no_finite_number_is_no_reward(reward, tmp_path):
    lines = [
        '{"prompt": "a", "completion": "b", "reward": 1}',
        f'{{"prompt": "a", "completion": "b", "reward": {reward}}}',
    ]
    with pytest.raises(
        DataError, match=r"data\.jsonl:2: field 'reward' must be a finite number, got"
    ):
        read_scored(write(tmp_path / "data.jsonl", lines))


def on_the_command_line(tmp_path, out, *more, model=None):
    """Folders of a plain model, and of the one that `rlhf-core ilql` trains from it or `model`."""
    torch.manual_seed(0)
    tokenizer, base, out = ByteTokenizer(), tmp_path / "base", tmp_path / out
    sizes = dict(vocab_size=259, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    Transformer(
        TransformerConfig(**sizes, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    ).save_pretrained(base)
    tokenizer.save(base)
    data = [
        {"prompt": f"say {i}", "completion": "yes" if i % 2 else "no", "reward": i % 2}
        for i in range(10)
    ]
    options = [
        "--batch-size",
        4,
        "--max-steps",
        3,
        "--device",
        "cpu",
        "--lr",
        0.01,
        "--target-rate",
        1,
        "--beta",
        3,
    ]
    command = (
        "ilql",
        "--model",
        model or base,
        "--data",
        write(tmp_path / "data.jsonl", data),
        "--out",
        out,
    )
    assert run(*command, *options, *more) == 0
    return base, out


def heads(folder):
    _, tensors = read_tensors(folder / HEADS_FILE)
    return tensors


@pytest.mark.parametrize("lora", [(), ("--lora-rank", 2)])
def test_the_command_goes_on_with_the_heads_that_it_trained(lora, tmp_path):
    _, first = on_the_command_line(tmp_path, "first")
    _, second = on_the_command_line(tmp_path, "second", "--lr", 1e-12, *lora, model=first)
    assert heads(first)["v.2.weight"].any()
    assert_close(heads(second), heads(first), rtol=0, atol=1e-9)
    _, third = on_the_command_line(tmp_path, "third", "--lr", 1e-12, model=second)
    assert_close(heads(third), heads(first), rtol=0, atol=1e-9)


def test_merged_adapters_keep_the_heads(tmp_path):
    _, out = on_the_command_line(tmp_path, "out", "--lora-rank", 2)
    assert run("merge", "--model", out, "--out", tmp_path / "merged") == 0
    merged, model = (ILQLModel.from_pretrained(folder) for folder in (tmp_path / "merged", out))
    assert not has_adapters(merged) and has_adapters(model) and merged.beta == 3
    hidden = merged.trunk(torch.tensor([[65, 66, 67]]))
    assert_close(hidden, model.trunk(torch.tensor([[65, 66, 67]])), rtol=0, atol=1e-5)
    assert torch.equal(merged.logits(hidden), model.logits(hidden))


def test_the_command_line_goes_from_rewards_to_text(tmp_path, capsys):
    base, out = on_the_command_line(tmp_path, "out", "--lora-rank", 2)
    assert "eval_loss/cql" in capsys.readouterr().out

    def shown(model, *more):
        assert (
            run("generate", "--model", model, "--prompt", "say 1", "--max-new-tokens", 12, *more)
            == 0
        )
        return capsys.readouterr().out

    assert shown(out) == shown(out, "--beta", 3) != shown(out, "--beta", 0)
    assert run("generate", "--model", base, "--prompt", "x", "--beta", 1) == 2
    assert "--beta needs a model trained by ilql" in capsys.readouterr().err
