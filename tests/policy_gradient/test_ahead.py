"""Sampling a step ahead: whose samples they are, what runs meanwhile, and how a run resumes."""

import threading

import pytest
import torch
from helpers import PROMPTS, fives, run_ranks, snapshot, tiny

from rlhf_core.data.collate import left_pad
from rlhf_core.generation import EngineError, generate
from rlhf_core.integrations import vllm
from rlhf_core.policy_gradient.ahead import Flight, flight_of, flight_state
from rlhf_core.rollout import response_logprobs
from rlhf_core.trainers import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer, TRPOConfig

KINDS = {
    "ppo": (PPOTrainer, PPOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, dict(num_samples=2, dynamic_sampling=1)),
}


@pytest.fixture
def make(engine_server):
    """Makes a trainer of a kind, whose batches are 3, 3 and 2 prompts, and its server."""

    def make(kind="grpo", patience=300.0, **options):
        trainer_type, config_type, own = KINDS[kind]
        settings = dict(
            batch_size=3, response_length=4, lr=1e-2, epochs=2, steps_ahead=1, importance_cap=2.0
        )
        others = {name: options.pop(name) for name in ("out", "eval_examples") if name in options}
        torch.manual_seed(0)
        model = tiny()
        server = engine_server(model)
        engine = vllm.Engine(server.url, sleep=lambda seconds: None, patience=patience)
        config = config_type(**(settings | own | options))
        trainer = trainer_type(model, PROMPTS, config, reward=fives, engine=engine, **others)
        return trainer, server

    return make


def without_time(history):
    return [{name: x for name, x in line.items() if name != "eps"} for line in history]


def assert_equal(model, other):
    for name, weight in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_is_of_the_weights_a_step_before(kind, make):
    trainer, _ = make(kind, dynamic_sampling=0) if kind == "grpo" else make(kind)
    weights, rollouts, collect = [], [], trainer.collect

    def watch(*arguments):
        weights.append(snapshot(trainer.model))
        rollouts.append(collect(*arguments))
        return rollouts[-1]

    trainer.collect = watch
    history = trainer.train()
    assert [line["val/oldest_version"] for line in history] == [0, 0, 1, 2, 3, 4]
    assert trainer.tokens and not trainer.flights.get(6)
    model = tiny()
    moved = 0
    for step, rollout in enumerate(rollouts):
        old, new = weights[max(step - 1, 0)], weights[step]
        for state in (old, new):
            model.load_state_dict(state)
            with torch.no_grad():
                logprobs, _ = response_logprobs(model, rollout, trainer.config.temperature)
            near = torch.allclose(logprobs, rollout.logprobs, atol=1e-5)
            assert near == all(torch.equal(state[name], old[name]) for name in old)
            moved += not near
    assert moved >= 4


def test_the_engine_samples_while_the_policy_trains(make):
    trainer, server = make(dynamic_sampling=0)
    go, update, seen = threading.Event(), trainer.update, []
    choice = server.choice
    go.set()

    def held(index, prompt, body):
        assert "seed" not in body or go.wait(60)
        return choice(index, prompt, body)

    def updating(*arguments):
        flight = trainer.flights.get(trainer.steps_done + 1)
        seen.append(flight is not None and not flight._future.done())
        update(*arguments)
        go.set()

    server.choice, trainer.update = held, updating
    take_off = trainer._take_off
    trainer._take_off = lambda n: (go.clear(), take_off(n))
    trainer.train()
    assert seen == [True] * 5 + [False]  # no step comes after the last one


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_unbroken_one(kind, make, tmp_path):
    whole, _ = make(kind)
    expected = without_time(whole.train())

    def stop(metrics, step):
        if step in (1, 2, 5):
            raise KeyError("stop")

    done = []
    for _ in range(4):
        trainer, _ = make(kind, out=tmp_path)
        if done:
            trainer.resume()
        done.append(trainer.steps_done)
        trainer.on_step = stop
        try:
            history = trainer.train()
        except RuntimeError as error:
            assert "continue from" in str(error)
    assert done == [0, 1, 2, 5]
    assert_equal(whole.model, trainer.model)
    assert without_time(history) == expected


@pytest.mark.slow
def test_held_out_prompts_change_nothing(make):
    plain, _ = make()
    evaluated, _ = make(eval_examples=PROMPTS[:3], eval_every=1)
    plain.train()
    assert "eval_reward" in evaluated.train()[0]
    assert_equal(plain.model, evaluated.model)


def test_what_is_too_old_or_of_another_batch_is_sampled_again(make):
    trainer, _ = make(dynamic_sampling=0)
    batches = list(trainer.batches())
    trainer.advance(batches[0])
    trainer.flights[1].version = -1  # two steps before step 1
    assert trainer.advance(batches[1])["val/oldest_version"] == 1
    assert trainer.advance(batches[2])["val/oldest_version"] == 1
    other = [[7, 7, 7], [8], [9, 5]]
    seen, score = [], trainer.score
    trainer.score = lambda *rest: seen.append(rest[0].prompts()) or score(*rest)
    assert trainer.advance(other)["val/oldest_version"] == 3
    assert seen[-1][::2] == other
    assert trainer.advance(batches[4])["val/oldest_version"] == 3


def test_an_engine_that_fails_meanwhile_ends_the_next_step_and_the_run_goes_on(make, tmp_path):
    trainer, server = make(out=tmp_path, patience=1, dynamic_sampling=0)
    take_off = trainer._take_off

    def broken(num_samples):
        if trainer.steps_done == 2:
            server.faults["/v1/completions"] = [200] * 1 + [500] * 1000
        take_off(num_samples)

    trainer._take_off = broken
    with pytest.raises(EngineError, match=r"step [34]: .*fault.*the state is saved in"):
        trainer.train()
    again, _ = make(out=tmp_path, dynamic_sampling=0)
    again.resume()
    assert len(again.train()) == 6


def test_a_flight_survives_a_checkpoint():
    ids, mask = left_pad(PROMPTS[:3], 0)
    seeds = torch.arange(6)
    response = generate(
        tiny(), ids, attention_mask=mask, max_new_tokens=5, num_samples=2, seeds=seeds
    )
    state = flight_state(Flight(4, PROMPTS[:3], seeds, lambda: response), 8, 7)
    empty = flight_state(None, 8, 7)
    assert {x: state[x].shape for x in state} == {x: empty[x].shape for x in empty}
    flight = flight_of(state, PROMPTS[:3], 2)
    assert flight.version == 4 and flight.prompts == PROMPTS[:3]
    assert torch.equal(flight.seeds, seeds)
    for x, y in zip(flight.generate(PROMPTS[:3]), response):
        assert torch.equal(x, y)
    assert flight_of(empty, [], 2) is None

    def failing():
        raise EngineError("dead")

    dead = Flight(4, [], seeds, failing)
    assert dead.wait() is None and int(flight_state(dead, 8, 7)["ahead:version"]) == -1
    with pytest.raises(EngineError, match="dead"):
        dead.generate([])


def trained(rank, world, url):
    """The weights, the metrics and the loads of a run of this process and the others."""
    torch.manual_seed(0)
    engine, model = vllm.Engine(url), tiny()
    config = GRPOConfig(
        batch_size=3, num_samples=2, response_length=4, lr=1e-2, steps_ahead=1, importance_cap=2.0
    )
    trainer = GRPOTrainer(model, PROMPTS, config, reward=fives, engine=engine)
    history = without_time(trainer.train())
    return snapshot(model), history, engine.loads


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_several_processes_have_one_engine(engine_server, tmp_path):
    weights, history, loads = trained(0, 1, engine_server(tiny()).url)
    server = engine_server(tiny())
    ranks = run_ranks(trained, 2, tmp_path, server.url)
    assert [rank[2] for rank in ranks] == [loads, 0]  # the first one speaks to it
    for other, lines, _ in ranks:
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=0)
        assert [x["val/oldest_version"] for x in lines] == [0, 0, 1]
        assert [x["reward"] for x in lines] == [x["reward"] for x in history]


def test_bad_options(make):
    with pytest.raises(ValueError, match=r"steps_ahead must be in \[0, 1\], got 2"):
        GRPOConfig(steps_ahead=2)
    with pytest.raises(ValueError, match="steps_ahead is 1, but there is no engine"):
        GRPOTrainer(tiny(), PROMPTS, GRPOConfig(steps_ahead=1), reward=fives)
    with pytest.warns(UserWarning, match="steps_ahead 1 without importance_cap"):
        make(importance_cap=None)
    assert TRPOConfig(steps_ahead=1).steps_ahead == 1
