"""The files that a run writes."""

import json
import warnings

import pytest
from helpers import (
    KINDS,
    PROMPTS,
    Letters,
    fives,
    lengths,
    make_ppo,
    make_trainer,
    rows,
    run_ranks,
    snapshot,
    tiny,
)
from torch.testing import assert_close

from rlhf_core.cli.presets import PRESETS
from rlhf_core.data import ByteTokenizer, load_tokenizer
from rlhf_core.data.collate import count_targets
from rlhf_core.models import Transformer
from rlhf_core.trainers import (
    GRPOConfig,
    GRPOTrainer,
    IteratedDPOConfig,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RFTConfig,
    iterated_dpo,
    rft,
)
from rlhf_core.training.run_log import drop_later, duration, preview, summarize

kinds = pytest.mark.parametrize("kind", KINDS)

NAMES = {
    "sft": "loss mean_token_accuracy entropy num_tokens",
    "reward": "loss accuracy margin mean_reward",
    "dpo": "loss entropy logps/chosen logps/rejected "
    "rewards/chosen rewards/rejected rewards/accuracies rewards/margins",
}


@kinds
def test_a_run_writes_its_model_its_config_and_one_line_of_metrics_per_step(kind, tmp_path, capsys):
    others = dict(out=tmp_path / "run", tokenizer=ByteTokenizer(), eval_examples=rows(kind, 3))
    trainer = make_trainer(kind, batch_size=3, log_every=2, others=others)
    history = trainer.train()
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == history and [line["step"] for line in lines] == [1, 2, 3]
    assert set(NAMES[kind].split()) | {"grad_norm", "lr"} <= set(lines[0])
    assert {f"eval_{name}" for name in NAMES[kind].split() if name != "num_tokens"} <= set(
        lines[-1]
    )
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["algorithm"] == kind and run["options"]["batch_size"] == 3
    saved = KINDS[kind][2].from_pretrained(tmp_path / "run")
    assert_close(snapshot(saved), snapshot(trainer.model), rtol=0, atol=0)
    assert (tmp_path / "run" / "tokenizer_config.json").exists()
    shown = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert [line[1] for line in shown] == ["1/3", "2/3", "3/3", "3/3"]
    assert [line[-1] for line in shown[:2]] == ["left", "left"] and shown[2][-1] == "s"
    assert shown[3][2].startswith("eval_")


# ---- timings and samples


def rows_in(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_timings_are_apart_from_the_metrics_and_count_sampled_and_trained_tokens(tmp_path):
    trainer = make_ppo(ppo_epochs=2, others=dict(out=tmp_path), max_steps=2, epochs=2)
    metrics = trainer.train()
    timings = rows_in(tmp_path / "timings.jsonl")
    assert [row["step"] for row in timings] == [1, 2]
    for row, line in zip(timings, metrics):
        tokens = row["time/tokens_per_s"] * row["time/step_s"]
        assert tokens == pytest.approx(8 * line["response_length"] * 3)  # sampled, trained twice
        assert row["memory/peak_mb"] > 10 and not row.keys() & line.keys() - {"step"}
    trainer = make_trainer("sft", others=dict(out=tmp_path))
    trainer.train()
    (row,) = rows_in(tmp_path / "timings.jsonl")  # those of the run before are gone
    assert row["time/tokens_per_s"] * row["time/step_s"] == pytest.approx(
        sum(map(count_targets, trainer.examples))
    )


@pytest.mark.parametrize("tokenizer", [None, Letters()])
def test_samples_are_written_every_few_steps_and_shown_when_asked(tokenizer, tmp_path, capsys):
    options = dict(sample_every=2, print_samples=True, max_steps=5, epochs=5, reward=lengths)
    trainer = make_ppo(others=dict(out=tmp_path, tokenizer=tokenizer), **options)
    trainer.train()
    rows, shown = rows_in(tmp_path / "samples.jsonl"), capsys.readouterr().err
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [4] * 4
    decode = list if tokenizer is None else tokenizer.decode
    for row in rows:
        assert row["prompt"] in map(decode, PROMPTS) and row["score"] >= len(row["response"])
        assert preview(row) in shown
    drop_later(tmp_path / "samples.jsonl", "step", 2)
    assert rows_in(tmp_path / "samples.jsonl") == rows[:8]
    make_ppo(sample_every=0, others=dict(out=tmp_path)).train()
    assert not rows_in(tmp_path / "samples.jsonl")


def test_methods_of_rounds_write_the_samples_of_each_round(tmp_path):
    small = dict(response_length=4, num_samples=2, batch_size=4, max_steps=1, rounds=2)
    rft(tiny(), PROMPTS, RFTConfig(**small), reward=fives, out=tmp_path)
    rows = rows_in(tmp_path / "samples.jsonl")
    assert [row["round"] for row in rows] == [1] * 4 + [2] * 4
    config = IteratedDPOConfig(**small | dict(sample_every=0, num_samples=4))
    iterated_dpo(tiny(), PROMPTS, config, reward=fives, out=tmp_path / "none")
    assert not (tmp_path / "none" / "samples.jsonl").exists()


def test_online_dpo_writes_samples_and_counts_their_tokens(tmp_path):
    config = OnlineDPOConfig(response_length=4, batch_size=8, max_steps=1, num_samples=4)
    trainer = OnlineDPOTrainer(tiny(), PROMPTS, config, reward=fives, out=tmp_path)
    (metrics,) = trainer.train()
    assert len(rows_in(tmp_path / "samples.jsonl")) == 4
    (row,) = rows_in(tmp_path / "timings.jsonl")
    sampled = 32 * metrics["response_length"]
    assert sampled < row["time/tokens_per_s"] * row["time/step_s"] < 2 * sampled


# ---- the terminal


@pytest.mark.parametrize(
    "seconds, text", [(12.4, "12 s"), (108, "1 min 48 s"), (7500, "2 h 5 min"), (59.6, "1 min 0 s")]
)
def test_durations_are_texts_of_at_most_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_bar_keeps_to_the_main_metric_and_evaluations_are_lines(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar:
        def __init__(self, **options):
            self.postfix, self.lines = [], []
            bars.append(self)

        def set_postfix_str(self, text):
            self.postfix.append(text)

        def write(self, text, file):
            self.lines.append(text)

        update = close = lambda self: None

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    make_trainer("dpo", others=dict(eval_examples=rows("dpo", 3))).train()
    (bar,) = bars
    assert [text.split()[0] for text in bar.postfix] == ["rewards/accuracies"]
    assert len(bar.lines) == 1 and "eval_loss" in bar.lines[0]


# ---- runs that move nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_learning_rate_that_moves_nothing_is_named_once(kind):
    options = dict(batch_size=4, epochs=5)  # 10 steps
    with pytest.warns(UserWarning, match=r"lr 1e-08 moved .* in 10 steps: almost nothing") as found:
        make_trainer(kind, lr=1e-8, **options).train()
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(kind, lr=1e-3, **options).train()
        make_trainer(kind, lr=1e-8, batch_size=4).train()  # too few steps to tell


def test_a_policy_that_did_not_move_is_named_with_its_kl():
    options = dict(epochs=10, kl_coef=0.0)
    with pytest.warns(UserWarning, match=r"lr 1e-08 moved the policy by .* nats per response"):
        make_ppo(lr=1e-8, **options).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_ppo(lr=1e-3, **options).train()


def test_a_run_with_nothing_to_learn_is_not_told_to_raise_its_learning_rate():
    config = GRPOConfig(batch_size=4, num_samples=2, epochs=5, response_length=3)  # 10 steps
    with pytest.warns(UserWarning) as found:
        GRPOTrainer(
            tiny(), PROMPTS, config, reward=lambda _, responses: [1.0] * len(responses)
        ).train()
    assert len(found) == 1 and "there is nothing to learn" in str(found[0].message)


@pytest.mark.slow
def test_the_default_rate_of_ppo_is_named_on_a_small_real_model_and_that_of_tiny_is_not(data_dir):
    folder = data_dir / "models" / "stories260k"
    prompts = [load_tokenizer(folder).encode_prompt("Once upon a time")] * 40

    def distinct(prompts, responses):
        return [float(len(set(response))) for response in responses]

    def train(**settings):  # 10 steps
        policy = Transformer.from_pretrained(folder)
        config = PPOConfig(batch_size=4, response_length=8, **settings)
        PPOTrainer(policy, prompts, config, reward=distinct).train()

    with pytest.warns(UserWarning, match="lr 3e-06 moved the policy by 0.0.*guides/settings.md"):
        train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(**PRESETS["ppo"]["tiny"])


def test_a_run_in_short_is_its_last_tenth_and_what_has_no_mean():
    history = [{"step": i, "loss": float(i), "elo": [0, i]} for i in range(1, 21)]
    history[-1] |= {"eval_loss": 7.0, "pretraining/loss": 3.0}
    history[-2]["eval_loss"] = 1.0
    recent, means, final = summarize(history)
    assert recent == history[18:] and means == {"loss": 19.5, "elo": [0, 20]}
    assert final == {"eval_loss": 7.0, "pretraining/loss": 3.0}
    assert summarize([{"round": 1, "loss": 2.0}]) == (
        [{"round": 1, "loss": 2.0}],
        {"loss": 2.0},
        {},
    )


# ---- on_step


def noting(calls, fail_at=None):
    """An on_step that notes what it gets, spoils it, and raises at a step."""

    def on_step(metrics, step):
        calls.append((step, dict(metrics)))
        metrics.clear()
        if step == fail_at:
            raise KeyError("no server")

    return on_step


def without_timings(calls):
    return [
        {name: x for name, x in metrics.items() if not name.startswith(("time/", "memory/"))}
        for _, metrics in calls
    ]


@pytest.mark.parametrize("out", [None, "run"])
@kinds
def test_on_step_gets_a_copy_of_every_steps_metrics_with_its_timings(kind, out, tmp_path):
    calls, plain = [], make_trainer(kind, batch_size=3)
    out = out and tmp_path / out
    trainer = make_trainer(kind, batch_size=3, others=dict(on_step=noting(calls), out=out))
    history = trainer.train()
    assert history == plain.train()
    assert [step for step, _ in calls] == [1, 2, 3] and without_timings(calls) == history
    assert all(metrics["time/step_s"] > 0 for _, metrics in calls)
    if out:
        assert rows_in(out / "metrics.jsonl") == history
        assert calls[1][1] == history[1] | rows_in(out / "timings.jsonl")[1]


def test_on_step_of_ppo_gets_its_evaluations():
    calls = []
    others = dict(on_step=noting(calls), eval_examples=PROMPTS[:3])
    history = make_ppo(batch_size=4, minibatch_size=4, eval_every=2, others=others).train()
    assert without_timings(calls) == history and "eval_reward" in calls[1][1]


def test_a_resumed_run_calls_on_step_for_its_new_steps_alone(tmp_path):
    def make(calls, **config):
        others = dict(on_step=noting(calls), out=tmp_path)
        return make_trainer("sft", batch_size=2, lr_schedule="constant", others=others, **config)

    first, second = [], []
    make(first, max_steps=2, save_every=2).train()
    trainer = make(second)
    trainer.resume()
    trainer.train()
    assert [step for step, _ in first] == [1, 2] and [step for step, _ in second] == [3, 4]


@pytest.mark.parametrize("fail_at", [2, 4])
def test_an_error_in_on_step_names_the_step_and_leaves_a_checkpoint(fail_at, tmp_path):
    want = make_trainer("sft", batch_size=2).train()
    others = dict(on_step=noting([], fail_at), out=tmp_path)
    message = (
        rf"^step {fail_at}: on_step raised KeyError\('no server'\); continue from .*/checkpoint-"
    )
    with pytest.raises(RuntimeError, match=f"{message}{fail_at}$") as caught:
        make_trainer("sft", batch_size=2, others=others).train()
    assert isinstance(caught.value.__cause__, KeyError)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"] == "failed" and run["steps_done"] == fail_at
    trainer = make_trainer("sft", batch_size=2, others=dict(out=tmp_path))
    trainer.resume()
    assert trainer.train() == want


def test_an_error_in_on_step_without_a_folder_names_the_step():
    trainer = make_trainer("sft", batch_size=2, others=dict(on_step=noting([], 3)))
    with pytest.raises(RuntimeError, match=r"^step 3: on_step raised KeyError\('no server'\)$"):
        trainer.train()


def train_on_ranks(rank, world, out, fail_at):
    """The steps that on_step got on this rank, and how the run ended."""
    calls = []
    others = dict(on_step=noting(calls, fail_at), out=out)
    try:
        make_trainer("sft", batch_size=2, others=others).train()
    except RuntimeError as error:
        return [step for step, _ in calls], str(error)
    return [step for step, _ in calls], "finished"


@pytest.mark.slow
def test_rank_0_alone_calls_on_step_and_an_error_in_it_ends_every_rank(tmp_path):
    first, second = run_ranks(train_on_ranks, 2, tmp_path, str(tmp_path / "whole"), None)
    assert first == ([1, 2, 3, 4], "finished") and second == ([], "finished")
    first, second = run_ranks(train_on_ranks, 2, tmp_path, str(tmp_path / "failed"), 3)
    assert first[0] == [1, 2, 3] and second[0] == []
    assert first[1].startswith("step 3: on_step raised KeyError('no server'); continue from ")
    assert second[1] == f"rank 0: {first[1]}"


@pytest.mark.parametrize("bad", ["wandb", 3])
def test_an_on_step_that_cannot_be_called_is_refused(bad, tmp_path):
    message = f"on_step must be a function of metrics and step, got {bad!r}"
    with pytest.raises(TypeError, match=message):
        make_trainer("sft", others=dict(on_step=bad))
    with pytest.raises(TypeError, match=message):
        make_ppo(others=dict(on_step=bad))
    for method, config in ((rft, RFTConfig), (iterated_dpo, IteratedDPOConfig)):
        with pytest.raises(TypeError, match=message):
            options = dict(reward=fives, on_step=bad, out=tmp_path / "out")
            method(tiny(), PROMPTS, config(response_length=5), **options)
    assert not (tmp_path / "out").exists()
