"""The comparison of methods: its table, its token counts, and that an interrupted run continues."""

import copy
import random
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from benchmarks.learning import __main__ as learning
from benchmarks.learning import constraints, distillation, methods, overoptimisation, setup
from rlhf_core import demo
from rlhf_core.data import ByteTokenizer, Pair
from rlhf_core.files import read_json
from rlhf_core.models import Transformer, TransformerConfig

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # the setup trains a policy and a reward model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A setup of the replies task with a few steps of a small model, and its folder."""

    def task(seed):
        task = demo.replies_task(seed)
        torch.manual_seed(seed)
        return replace(
            task,
            policy=Transformer(
                replace(task.policy.config, hidden_size=16, num_layers=1, intermediate_size=32)
            ),
            prompts=task.prompts[:64],
            eval_prompts=task.eval_prompts[:18],
            response_length=8,
            sft=replace(task.sft, max_steps=40),
            reward=replace(task.reward, max_steps=2),
        )

    folder = tmp_path_factory.mktemp("learning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "replies_task", task)
        made = setup.prepare("replies", None, 0, folder)
        again = setup.prepare("replies", None, 0, folder)
    return made, again


def result(gold, seed=0, **values):
    return (
        dict(gold=gold, seed=seed, gold_sd=2.0, gold_error=0.5, reward=0.1, kl=3.0, win_rate=0.75)
        | values
    )


COST = dict(sampled=1500, trained=6000, seconds=12.4)


def test_the_table_has_means_over_seeds_and_gains_in_deviations_of_sft():
    results = {
        "SFT": [result(1.0, **COST), result(2.0, seed=1, **COST)],
        "PPO": [result(4.0, **COST, length=3), result(6.0, seed=1, **COST)],
        "DPO": [result(2.0, **COST)],
        "KTO": [result(1.9, seed=1, **COST)],
    }
    head, _, sft, ppo, dpo, kto = learning.table(results).split("\n")
    assert head.count("|") == sft.count("|") == len(learning.HEAD) + 1
    assert sft.startswith("| SFT | 1.50 ± 0.50 | +0.00 | 0.10 | 3.0 | 0.750 | 2 | 6 | 12 |")
    assert ppo.startswith("| PPO | 5.00 ± 1.00 | +1.75 |")
    assert dpo.startswith("| DPO (1 of 2 seeds) | 2.00 ± 0.50 | +0.50 |")
    assert kto.startswith("| KTO (1 of 2 seeds) | 1.90 ± 0.50 | -0.05 |")
    assert learning.missed(results) == [
        "DPO gained 0.50, less than the expected 1.00",
        "KTO gained -0.05, less than the expected 0.00",
    ]


def test_a_setup_is_read_back_as_it_was_made(tiny):
    made, again = tiny
    assert made.pairs == again.pairs and len(made.pairs) > 10
    assert torch.equal(made.sft_scores, again.sft_scores) and len(made.sft_scores) == 18
    assert again.evaluate(again.base).scores.tolist() == made.sft_scores.tolist()
    responses = [pair.chosen_ids for pair in made.pairs]
    prompts = [pair.prompt_ids for pair in made.pairs]
    assert torch.equal(made.scores(prompts, responses), again.scores(prompts, responses))
    assert not any(
        p.requires_grad for p in (*made.base.parameters(), *made.reward_model.parameters())
    )


def test_pairs_train_every_completion_once_and_sample_nothing(tiny):
    made, _ = tiny
    found = setup.measure(made, methods.dpo, dict(batch_size=len(made.pairs)))
    assert found["trained"] == sum(len(p.chosen_ids) + len(p.rejected_ids) for p in made.pairs)
    assert found["sampled"] == 0 and found["seconds"] > 0


def test_ppo_trains_what_it_samples_once_a_pass(tiny):
    made, _ = tiny
    found = setup.measure(made, methods.ppo, dict(batch_size=8, max_steps=2, ppo_epochs=3))
    assert found["trained"] == 3 * found["sampled"] > 0
    assert found["kl"] != 0 and 0 <= found["win_rate"] <= 1


def test_best_of_n_answers_with_the_highest_of_n_and_trains_nothing(tiny):
    made, _ = tiny
    one, many = (setup.measure(made, methods.best_of, dict(num_samples=n)) for n in (1, 8))
    assert many["reward"] > one["reward"] and many["trained"] == 0
    assert many["sampled"] > 4 * one["sampled"] > 0
    assert one["kl"] == 0 < many["kl"]


def test_sft_is_the_start_of_all_methods(tiny):
    made, _ = tiny
    found = setup.measure(made, methods.sft, {})
    assert found["gold"] == made.sft_scores.mean().item()
    assert found["win_rate"] == 0.5 and abs(found["kl"]) < 1e-3


def test_the_error_of_one_seed_is_over_its_prompts(tiny):
    """Two samples of one prompt count as one."""
    made, _ = tiny
    found = setup.measure(made, methods.sft, {})
    means = made.sft_scores.view(2, 9).mean(dim=0)
    assert found["gold_error"] == pytest.approx(means.std().item() / 3)
    assert learning.standard_error([found]) == found["gold_error"]


def test_a_result_is_kept_until_the_settings_change(tiny, tmp_path, monkeypatch):
    runs, settings = [], dict(lr=1.0)

    def measure(made, method, settings):
        runs.append(settings)
        return result(float(len(runs)), **COST)

    monkeypatch.setattr(learning, "prepare", lambda *arguments: tiny[0])
    monkeypatch.setattr(learning, "measure", measure)
    monkeypatch.setattr(learning, "METHODS", {"DPO": methods.Method(methods.dpo, settings)})
    for _ in range(2):
        learning.learn("replies", None, 0, ["DPO"], tmp_path / "seed-0")
    assert len(runs) == 1
    settings["lr"] = 2.0
    learning.learn("replies", None, 0, ["DPO"], tmp_path / "seed-0")
    assert runs == [dict(lr=1.0), dict(lr=2.0)]
    assert read_json(tmp_path / "seed-0" / "DPO.json")["gold"] == 2.0
    assert learning.read_results(tmp_path, [0, 1])["DPO"][0]["settings"] == dict(lr=2.0)


def test_the_curves_start_at_sft_and_are_drawn(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    made, _ = tiny
    ppo = dict(batch_size=4, max_steps=2 * overoptimisation.EVERY, ppo_epochs=1, kl_coef=0.0)
    found = overoptimisation.curves(
        made, num_pairs=8, reward=dict(epochs=1), ppo=ppo, prompts=3, num_samples=4
    )
    every = overoptimisation.EVERY
    assert [point["step"] for point in found["ppo"]] == [0, every, 2 * every]
    assert [point["n"] for point in found["best_of_n"]] == [1, 2, 4]
    for points in (found["ppo"], found["best_of_n"]):
        start = points[0]
        assert start["kl"] == 0 and max(abs(start["gold"]), abs(start["proxy"])) < 1e-6
    assert found["best_of_n"][2]["proxy"] > found["best_of_n"][1]["proxy"] > 0
    overoptimisation.draw([found, found], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_context_distillation_is_measured_on_other_words(monkeypatch):
    monkeypatch.setattr(distillation, "TRAINED", 8)
    monkeypatch.setattr(distillation, "HELD_OUT", 4)
    known = distillation.words(0)
    assert len(set(known)) == 12 and {len(word) for word in known} == {4}
    train, held_out = distillation.lessons(known[:8]), distillation.lessons(known[8:])
    config = TransformerConfig(259, hidden_size=16, num_layers=1, num_heads=2, max_positions=24)
    base = Transformer(replace(config, eos_ids=(258,), pad_id=256))
    before = distillation.measured(base, copy.deepcopy(base), held_out)
    for options in distillation.WAYS.values():
        student = distillation.distilled(base, train, options, 0)
        kl, share = distillation.measured(base, student, held_out)
        assert kl != before[0] and 0 <= share <= 1


# ---- constraints


def test_gold_checks_the_words_and_the_length():
    prompt = constraints.prompt_of(("dog", "happy"), 8)
    responses = {
        "The dog was happy to see his friend.": 3.0,
        "Dogs are happy to see all their friends.": 2.0,
        "The dog was happy.": 2.0,  # half as long
        "The big dog was happy to see his old friend.": 3.0,  # a quarter too long
        "": 0.0,
    }
    assert constraints.gold([prompt] * 5, list(responses)) == list(responses.values())


def test_a_passage_answers_a_prompt_with_two_of_its_words_and_its_length():
    def prompts(passage):
        texts = (
            constraints.instruction(passage, [("happy", "play")], random.Random(seed))
            for seed in range(60)
        )
        return {text and text.prompt for text in texts}

    passage = "They play with a happy friend and a big kite."
    asked = [pair for pair in permutations(("happy", "play", "friend"), 2) if "friend" in pair]
    assert prompts(passage) == {None, *(constraints.prompt_of(pair, 12) for pair in asked)}
    asked = [pair for pair in permutations(("water", "found", "tree"), 2) if "water" in pair]
    found = prompts("The dog found water by the tree.")
    assert found == {constraints.prompt_of(pair, 7) for pair in asked}
    assert prompts("The dog found a tree.") == {None}
    assert constraints.passages_of("It ran. " + passage) == [passage, "It ran. " + passage]


def test_later_pairs_are_kept_where_only_their_lengths_differ(monkeypatch):
    monkeypatch.setattr(constraints, "PAIRS", 1)
    tokenizer = ByteTokenizer()

    def pair(chosen, rejected):
        prompt = constraints.prompt_of(("dog", "happy"), 7)
        return Pair(*(tokenizer.encode(text) for text in (prompt, chosen, rejected)))

    both, short = "The dog was happy to be here.", "A happy dog."
    one = "The dog was sad to be here."
    words, lengths, mixed = pair(both, one), pair(both, short), pair(both, "A dog.")
    found = constraints.with_more_lengths([words, words, lengths, mixed], tokenizer)
    assert found == [words, lengths]


def test_training_never_sees_the_words_that_are_evaluated(data_dir, monkeypatch):
    monkeypatch.setattr(constraints, "pretrained", lambda *arguments: None)
    task = constraints.constraints_task(data_dir, 0, Path("unused"))

    def words(prompts):
        texts = (task.tokenizer.decode(ids) for ids in prompts)
        return {frozenset(text.split(" with ")[1].strip(".\n").split(", ")) for text in texts}

    asked = words(task.eval_prompts)
    known = words(task.prompts) | words([row.prompt_ids for row in task.sft_examples])
    assert len(asked) == constraints.HELD_OUT and not asked & known
    rows = [(row.prompt_ids, row.completion_ids) for row in task.sft_examples[:500]]
    texts = ([task.tokenizer.decode(ids) for ids in column] for column in zip(*rows))
    assert min(constraints.gold(*texts)) >= 2  # each passage has both words


@pytest.mark.parametrize("module", ["benchmarks.learning", "benchmarks.learning.overoptimisation"])
def test_it_runs_from_a_clone(module):
    command = [sys.executable, "-m", module]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {module}" in done.stdout and "--seeds" in done.stdout
    done = subprocess.run([*command, "--task", "stories"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--task stories needs --data" in done.stderr
