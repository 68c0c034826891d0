"""The vLLM engine against a server on this machine that has the numbers of our own model.

test_vllm_server.py holds it against vLLM itself, and against a recording of it.
"""

import gc
import socket
import threading

import pytest
import torch
from helpers import PROMPTS, Letters, adapted, fives, make_ppo, snapshot, tiny

from rlhf_core.data import ByteTokenizer
from rlhf_core.feedback.candidates import SamplingConfig, best_of_n
from rlhf_core.generation import EngineError
from rlhf_core.integrations import vllm
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.models.lora import adapters_off
from rlhf_core.rollout import sample
from rlhf_core.trainers import (
    GRPOConfig,
    GRPOTrainer,
    IteratedDPOConfig,
    IteratedRLHFConfig,
    NLPOConfig,
    NLPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RFTConfig,
    iterated_dpo,
    iterated_rlhf,
    rft,
)


def engine_of(server, waits=None, **options):
    """An engine that does not really wait between attempts."""
    sleep = (lambda seconds: None) if waits is None else waits.append
    return vllm.Engine(server.url, sleep=sleep, **options)


@torch.no_grad()
def move(model, seed=3, size=0.05):
    """Change every weight that trains, as an optimiser does."""
    noise = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn(weight.shape, generator=noise) * size)


def rollouts(model, engine=None, **options):
    """16 rows, equal for an equal model."""
    settings = dict(max_new_tokens=6, num_samples=2, seeds=torch.arange(16) * 977)
    return sample(model, PROMPTS, engine=engine, **(settings | options))


def assert_same(a, b):
    """Two rollouts are equal, log-probs up to rounding."""
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, atol=1e-5 * x.is_floating_point(), rtol=0)


def paths(server):
    return [path for path, _ in server.requests]


# ---- sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize(
    "options",
    [{}, dict(eos_ids=()), dict(stop_strings=("hi", "j"), tokenizer=Letters())],
    ids=["eos", "no eos", "stop strings"],
)
def test_rows_are_those_of_generate(engine_server, temperature, options):
    model = tiny()
    engine = engine_of(engine_server(model, tokenizer=Letters()))
    ours, theirs = (rollouts(model, x, temperature=temperature, **options) for x in (None, engine))
    assert_same(ours, theirs)
    assert temperature == 0 or ours.ended.any() != (options == dict(eos_ids=()))


def test_a_row_is_a_request_with_its_own_seed_and_neutral_options(engine_server):
    model = tiny()
    server = engine_server(model)
    engine = engine_of(server)
    engine.load(model)
    server.requests.clear()
    rollouts(model, engine, temperature=0.7, eos_ids=(3, 2))
    sampled = [body for path, body in server.requests if "seed" in body]
    assert sorted(body["seed"] for body in sampled) == [977 * i for i in range(16)]
    for body in sampled:
        assert body["prompt"] == PROMPTS[body["seed"] // 977 // 2]
        assert (body["temperature"], body["max_tokens"]) == (0.7, 6)
        assert body["ignore_eos"] and body["stop_token_ids"] == [2, 3]
        neutral = dict(top_p=1, top_k=-1, min_p=0, repetition_penalty=1)  # else the model's own
        assert neutral.items() <= body.items()


def test_the_server_tokenizes_otherwise_and_still_ends_nothing_too_early(engine_server):
    model = tiny()
    server = engine_server(model, tokenizer=Letters())
    stop = dict(stop_strings=("j",), tokenizer=Letters(), temperature=1.5)
    ours = rollouts(model, **stop)

    def cut_early(choice):  # at a string that our tokenizer does not see
        if len(choice["token_ids"]) > 2 and choice["finish_reason"] == "length":
            choice["token_ids"], choice["finish_reason"] = choice["token_ids"][:2], "stop"
            logprobs = choice["logprobs"]
            logprobs["token_logprobs"] = logprobs["token_logprobs"][:2]
        return choice

    server.edit = lambda choice: choice
    engine = engine_of(server)
    engine.load(model)
    seen = []
    plain = server.choice
    server.choice = lambda i, prompt, body: (
        seen.append(body) or (cut_early if "stop" in body else dict)(plain(i, prompt, body))
    )
    assert_same(ours, rollouts(model, engine, **stop))
    assert 0 < sum("stop" not in body for body in seen if "seed" in body) < 16


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_k=3), "top_k is 3, but an engine returns log-probs of the truncated"),
        (dict(top_p=0.9), "top_p is 0.9"),
        (dict(min_p=0.1), "min_p is 0.1"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(temperature=0.005), "temperature must be 0 or at least 0.01 for vLLM, got 0.005"),
        (dict(temperature=-1.0), "temperature must be 0 or at least"),
        (dict(max_new_tokens=30), r"row 0: 4 prompt \+ 30 new tokens exceed the 32"),
        (dict(max_new_tokens=15), r"row 0: 4 prompt \+ 15 new tokens exceed the 18"),
        (dict(eos_ids=(12,)), r"eos_ids must be in \[0, 12\)"),
        (dict(stop_strings=("a",)), "stop_strings need a tokenizer"),
        (dict(seeds=torch.arange(3)), r"seeds have shape \(3,\), but there are 8 prompts"),
    ],
)
def test_what_it_cannot_sample_is_refused(engine_server, options, message):
    model = tiny()
    limit = 18 if options.get("max_new_tokens") == 15 else None
    with pytest.raises(ValueError, match=message):
        rollouts(model, engine_of(engine_server(model, limit=limit)), **options)


def test_an_empty_prompt_is_refused(engine_server):
    model = tiny()
    with pytest.raises(ValueError, match="row 1: the prompt is empty"):
        sample(model, [[5], []], max_new_tokens=2, engine=engine_of(engine_server(model)))


def test_the_number_of_requests_at_a_time_is_bounded(engine_server):
    model = tiny()
    for bound in (1, 3):
        server = engine_server(model)
        rollouts(model, engine_of(server, requests=bound))
        assert min(bound, 2) <= server.most <= bound


# ---- weights


@pytest.mark.parametrize("tied", [True, False])
def test_changed_weights_are_loaded_once(engine_server, tied):
    model = tiny(tie_embeddings=tied)
    server = engine_server(model)
    engine = engine_of(server)
    rollouts(model, engine)
    assert paths(server).count("/collective_rpc") == 1
    move(model)
    moved = rollouts(model, engine)
    assert_same(rollouts(model), moved)
    rollouts(model, engine)
    assert paths(server).count("/collective_rpc") == engine.loads == 2
    order = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert [path for path in paths(server) if path in order] == order * 2
    other = tiny(seed=1, tie_embeddings=tied)
    assert_same(rollouts(other), rollouts(other, engine))


def test_a_cached_prefix_belongs_to_the_weights_that_computed_it(engine_server):
    model = tiny()
    server = engine_server(model)
    engine = engine_of(server)
    rollouts(model, engine)
    move(model)
    rollouts(model, engine)
    salts = [body["cache_salt"] for _, body in server.requests if body and "cache_salt" in body]
    assert len(set(salts)) == 2 and salts == sorted(salts, key=salts.index)


def test_adapters_are_merged_in_a_copy(engine_server):
    model, base = adapted(), tiny()
    server = engine_server(base)
    engine = engine_of(server)
    before = snapshot(model)
    theirs = rollouts(model, engine)
    assert_same(rollouts(model), theirs)
    assert not torch.equal(theirs.response_ids, rollouts(base).response_ids)
    move(model)
    assert_same(rollouts(model), rollouts(model, engine))
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[x], after[x]) == ("lora" not in x) for x in before)
    with adapters_off(model):
        assert_same(rollouts(base), rollouts(model))


@pytest.mark.parametrize(
    "kept, part",
    [
        (lambda name: name == "lm_head.weight", "its old output head"),
        (lambda name: name == "trunk.embed.weight", "its old token embedding"),
        (lambda name: name.startswith("trunk.norm."), "its old final norm"),
        (lambda name: ".blocks." not in name, "its old embedding and output head"),
        (lambda name: ".blocks.1." in name, "its old block 1"),
        (lambda name: True, "all of its old weights"),
    ],
)
def test_a_part_that_the_server_keeps_is_named(engine_server, kept, part):
    """Tied embeddings are the first case: vLLM answers 200 and keeps the head."""
    model = tiny(tie_embeddings=True)
    server = engine_server(model)
    engine = engine_of(server)
    engine.load(model)
    move(model)
    server.keep = kept
    with pytest.raises(EngineError, match=rf"differ .* nats, more than 0.0001. It has kept {part}"):
        engine.load(model)
    server.keep = lambda name: False
    assert_same(rollouts(model), rollouts(model, engine))  # a failed load is not forgotten


def test_a_server_without_the_adapters_is_named(engine_server):
    model = adapted()
    server = engine_server(tiny())
    server.keep = lambda name: True
    with pytest.raises(EngineError, match="It has kept the base model without the adapters"):
        engine_of(server).load(model)


def test_a_difference_within_the_tolerance_passes(engine_server):
    model = tiny()
    server = engine_server(model)
    server.bias = -0.01
    with pytest.raises(EngineError, match=r"by 0\.01 nats.*another dtype than --dtype float32"):
        engine_of(server).load(model)
    engine_of(server, tolerance=0.02).load(model)


def test_the_folder_of_weights_is_removed(engine_server, tmp_path):
    model = tiny()
    engine = engine_of(engine_server(model), folder=tmp_path)
    for seed in range(4):
        move(model, seed)
        engine.load(model)
    (run,) = tmp_path.iterdir()
    assert sorted(path.name for path in run.iterdir()) == ["weights-3", "weights-4"]
    assert Transformer.from_pretrained(run / "weights-4").device.type == "cpu"
    del engine
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_only_a_language_model_can_be_served(engine_server):
    engine = engine_of(engine_server(tiny()))
    with pytest.raises(ValueError, match="from a Transformer, not from a RewardModel"):
        engine.load(tiny(RewardModel))
    with pytest.raises(EngineError, match="no weights are loaded"):
        engine.generate([[5]], seeds=[1], max_new_tokens=1)


# ---- the wrong server


def test_a_server_that_is_no_engine(engine_server, judge_server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    waits = []
    with pytest.raises(EngineError, match=r"refused; 1 attempts\. Is a vLLM server running there"):
        vllm.Engine(url, sleep=waits.append).start(tiny())
    assert not waits  # it may be a typo
    for reply in ("A", b"<html>"):
        judge = judge_server([reply])  # answers no GET
        with pytest.raises(EngineError, match=r"status 501.*Is a vLLM server running there"):
            vllm.Engine(judge.url).start(tiny())
    server = engine_server(tiny())
    server.reply = lambda path, body: (200, {"object": "list", "data": []})
    with pytest.raises(EngineError, match="Is a vLLM server running there"):
        engine_of(server).start(tiny())


def test_a_server_that_cannot_reload(engine_server):
    server = engine_server(tiny())
    server.missing = {"/is_paused"}
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        engine_of(server).start(tiny())


@pytest.mark.parametrize("size, word", [(11, "fewer"), (13, "more")])
def test_a_server_with_another_vocabulary(engine_server, size, word):
    server = engine_server(tiny(vocab_size=size))
    with pytest.raises(EngineError, match=f"tiny has {word} token ids than the policy, .* 12"):
        engine_of(server).start(tiny())
    assert "/collective_rpc" not in paths(server)  # it might not survive other shapes


def test_a_server_with_another_model(engine_server):
    server = engine_server(tiny(hidden_size=24))
    with pytest.raises(EngineError, match=r"status 500: .*could not load /.*start it with this"):
        engine_of(server).start(tiny())
    assert not server.paused


def test_a_server_that_ignores_the_temperature(engine_server):
    model = tiny()
    server = engine_server(model)
    server.raw = True
    with pytest.raises(EngineError, match=r"those of temperature 1: .*processed_logprobs"):
        engine_of(server).start(model)
    with pytest.raises(EngineError, match="processed_logprobs"):  # again, not half started
        engine_of(server).load(model)


def test_a_server_with_another_tokenizer(engine_server):
    class Shifted(ByteTokenizer):
        def encode(self, text):
            return [token + 1 for token in super().encode(text)]

    model = tiny(vocab_size=259)
    engine_of(engine_server(model, tokenizer=ByteTokenizer())).start(model, ByteTokenizer())
    engine_of(engine_server(model)).start(model, ByteTokenizer())  # started without one
    with pytest.raises(EngineError, match=r"its tokenizer encodes .* the policy's as"):
        engine_of(engine_server(model, tokenizer=Shifted())).start(model, ByteTokenizer())


@pytest.mark.parametrize(
    "url, options, message",
    [
        ("localhost:8000", {}, "must be http"),
        ("http://localhost:8000/v2", {}, "must be http"),
        ("http://user:secret@localhost", {}, "at localhost may hold no password"),
        ("http://localhost", dict(requests=0), "requests must be at least 1, got 0"),
        ("http://localhost", dict(timeout=0), "timeout must be positive and finite, got 0"),
        ("http://localhost", dict(tolerance=float("nan")), "tolerance must be positive"),
        ("http://localhost", dict(folder="/nowhere"), "/nowhere is not a directory"),
    ],
)
def test_bad_arguments(url, options, message):
    with pytest.raises(ValueError, match=message) as error:
        vllm.Engine(url, **options)
    assert "secret" not in str(error.value)


# ---- faults


def test_failed_requests_are_sent_again(engine_server):
    model = tiny()
    server = engine_server(model)
    waits = []
    engine = engine_of(server, waits)
    engine.load(model)
    server.faults["/v1/completions"] = [500, "truncate", "drop", 503, 429]
    assert_same(rollouts(model), rollouts(model, engine))
    assert len(waits) == 5 and not server.faults["/v1/completions"]
    for path in ("/pause", "/reset_prefix_cache", "/resume"):
        move(model)
        server.faults[path] = [500]
        assert_same(rollouts(model), rollouts(model, engine))
    move(model)
    server.faults["/collective_rpc"] = ["drop"]
    assert_same(rollouts(model), rollouts(model, engine))


def test_a_request_that_takes_too_long_is_sent_again(engine_server):
    model = tiny()
    server = engine_server(model)
    waits = []
    engine = engine_of(server, waits, timeout=1.0, requests=1)
    engine.load(model)
    server.faults["/v1/completions"] = [3.0]
    waits.clear()
    assert_same(rollouts(model), rollouts(model, engine))
    assert waits


def test_patience_ends(engine_server):
    model = tiny()
    server = engine_server(model)
    waits = []
    engine = engine_of(server, waits, patience=20)
    engine.load(model)
    server.faults["/v1/completions"] = [500] * 1000
    with pytest.raises(EngineError, match=r"/v1/completions: status 500: .*fault.*attempts"):
        sample(model, [[5]], max_new_tokens=2, engine=engine)
    assert 20 <= sum(waits) < 40 and max(waits) <= 15
    server.faults.clear()
    assert_same(rollouts(model), rollouts(model, engine))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda x: x | {"prompt_token_ids": [1]}, "changed the prompt"),
        (lambda x: x | {"token_ids": x["token_ids"] + [5]}, r"\d tokens with \d log-probs"),
        (lambda x: x | {"token_ids": [12 for _ in x["token_ids"]]}, "12"),
        (lambda x: x | {"finish_reason": "abort"}, "because of abort"),
        (lambda x: x | {"token_ids": None}, "TypeError"),
        (lambda x: {}, "KeyError"),
        (lambda x: x | {"logprobs": {"token_logprobs": [None for _ in x["token_ids"]]}}, "finite"),
        (
            lambda x: x | {"logprobs": {"token_logprobs": [0.5 for _ in x["token_ids"]]}},
            "at most 0",
        ),
    ],
)
def test_a_reply_that_is_no_response_is_an_error(engine_server, edit, message):
    model = tiny()
    server = engine_server(model)
    engine = engine_of(server, patience=1)
    engine.load(model)
    shorten = message == "because of abort"
    server.limit = 3 if shorten else server.limit
    server.edit = edit
    with pytest.raises(EngineError, match=message):
        sample(model, [[5]], max_new_tokens=6, eos_ids=(), engine=engine)


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_restart_is_survived_with_the_same_samples(engine_server, when):
    model = tiny()
    server = engine_server(model)
    engine = engine_of(server)
    move(model)
    engine.load(model)
    if when == "before":
        server.restart()
    else:  # with the first weights the server goes on, after half of the rows or all of them
        rows = [None] * (8 if when == "during" else 16)
        server.faults["/v1/completions"] = [*rows, server.restart]
    loads = paths(server).count("/collective_rpc")
    assert_same(rollouts(model), rollouts(model, engine))
    assert paths(server).count("/collective_rpc") == loads + 1


def test_a_server_that_is_down_for_a_while(engine_server):
    model = tiny()
    server = engine_server(model)
    down = threading.Event()

    def sleep(seconds):
        if not down.is_set():
            down.set()
            server.restart()
            server.faults.clear()

    engine = vllm.Engine(server.url, sleep=sleep)
    move(model)
    engine.load(model)
    server.faults["/v1/completions"] = ["drop"] * 100
    assert_same(rollouts(model), rollouts(model, engine))


def test_a_server_that_always_loses_the_weights(engine_server):
    model = tiny()
    server = engine_server(model)
    engine = engine_of(server, requests=1)
    move(model)
    engine.load(model)
    plain = server.choice

    def restarting(i, prompt, body):
        if "seed" in body:
            server.restart()
        return plain(i, prompt, body)

    server.choice = restarting
    with pytest.raises(EngineError, match="lost the policy's weights 3 times"):
        rollouts(model, engine)


def test_weights_that_never_come_back_end_the_batch(engine_server):
    model = tiny()
    server = engine_server(model)
    engine = engine_of(server)
    move(model)
    engine.load(model)
    server.restart()
    server.keep = lambda name: True
    with pytest.raises(EngineError, match="log-probs differ from the model's"):
        rollouts(model, engine)


# ---- every method that samples


def config(kind, **options):
    settings = dict(batch_size=4, response_length=4, lr=1e-2, max_steps=2)
    return kind(**(settings | options))


def longer(prompts, first, second):
    """A judge that prefers the longer response."""
    return [0.5 + 0.1 * (len(a) - len(b)) / 4 for a, b in zip(first, second)]


def ppo(model, engine, **options):
    own = dict(reward=fives, eval_examples=PROMPTS[:3], engine=engine)
    return PPOTrainer(model, PROMPTS, config(PPOConfig, **options), **own).train()


def grpo(model, engine, **options):
    options = dict(num_samples=2, dynamic_sampling=1) | options
    own = dict(reward=fives, engine=engine)
    return GRPOTrainer(model, PROMPTS, config(GRPOConfig, **options), **own).train()


def remax(model, engine):
    return grpo(model, engine, advantage="remax", dynamic_sampling=0)


def online_dpo(model, engine):
    own = dict(judge=longer, eval_examples=PROMPTS[:3], engine=engine)
    return OnlineDPOTrainer(model, PROMPTS, config(OnlineDPOConfig), **own).train()


def rounds_of_dpo(model, engine):
    own = dict(reward=fives, eval_prompts=PROMPTS[:3], engine=engine)
    return iterated_dpo(model, PROMPTS, config(IteratedDPOConfig, rounds=2), **own)


def rounds_of_sft(model, engine):
    own = dict(reward=fives, eval_prompts=PROMPTS[:3], engine=engine)
    return rft(model, PROMPTS, config(RFTConfig, rounds=2, num_samples=2), **own)


def rounds_of_rlhf(model, engine):
    parts = dict(
        sampling=SamplingConfig(num_samples=2, response_length=4),
        reward=RewardConfig(max_steps=1, lr=1e-2),
        ppo=config(PPOConfig, max_steps=1),
    )
    own = dict(judge=longer, eval_prompts=PROMPTS[:3], engine=engine)
    return iterated_rlhf(model, PROMPTS, IteratedRLHFConfig(2, **parts), **own)


def best(model, engine):
    sampling = SamplingConfig(num_samples=2, response_length=4)
    samples = best_of_n(model, PROMPTS, sampling, reward=fives, engine=engine)
    tokens = [token for group in samples.responses for ids in group for token in ids]
    return [{"tokens": tokens, "scores": samples.scores.tolist()}]


METHODS = [ppo, grpo, remax, online_dpo, rounds_of_dpo, rounds_of_sft, rounds_of_rlhf, best]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_the_steps_that_it_takes_without_the_engine(engine_server, method):
    plain = tiny()
    server = engine_server(plain)
    expected = method(plain, None)
    served = tiny()  # which seeds torch's global generator, too
    found = method(served, engine_of(server))
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(served.state_dict()[name], weight, atol=1e-6, rtol=0)
    for name in expected[-1].keys() - {"eps"}:
        value, right = (torch.tensor(x[-1][name]) for x in (found, expected))
        torch.testing.assert_close(value, right, atol=1e-4, rtol=0, msg=name)
    prompts = {tuple(body["prompt"]) for _, body in server.requests if body and "seed" in body}
    assert prompts >= set(map(tuple, PROMPTS))  # held-out ones are among them


def test_nlpo_refuses_an_engine(engine_server):
    engine = engine_of(engine_server(tiny()))
    with pytest.raises(ValueError, match="nlpo samples from a masked policy"):
        NLPOTrainer(tiny(), PROMPTS, config(NLPOConfig), reward=fives, engine=engine)


@pytest.mark.parametrize("kind", ["ppo", "grpo", "online_dpo"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_engine_that_fails_leaves_a_checkpoint_to_resume_from(engine_server, tmp_path, kind):
    trainers = {
        "ppo": (PPOTrainer, PPOConfig, {}),
        "grpo": (GRPOTrainer, GRPOConfig, dict(num_samples=2, dynamic_sampling=1)),
        "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig, {}),
    }
    trainer_type, config_type, options = trainers[kind]

    def trainer(out, engine):
        settings = config(config_type, epochs=2, max_steps=3, **options)
        own = dict(reward=fives, out=tmp_path / out, engine=engine)
        return trainer_type(tiny(), PROMPTS, settings, **own)

    server = engine_server(tiny())
    whole = trainer("whole", engine_of(server))
    whole.train()
    broken = trainer("broken", engine_of(server, patience=1))
    count = {"pause": 0}

    def break_third(path, body, plain=server.reply):
        count["pause"] += path == "/pause"
        broken_now = count["pause"] >= 3 and path == "/v1/completions" and "seed" in body
        return (500, {"error": "dead"}) if broken_now else plain(path, body)

    server.reply = break_third
    with pytest.raises(EngineError, match=r"step 3: .*dead.*saved in .*checkpoint-2"):
        broken.train()
    del server.reply
    again = trainer("broken", engine_of(server))
    again.resume()
    again.train()
    assert again.steps_done == 3
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


def test_held_out_prompts_wait_for_an_engine_that_fails(engine_server, monkeypatch):
    server = engine_server(tiny())
    trainer = make_ppo(
        others=dict(eval_examples=PROMPTS[:2], engine=engine_of(server, patience=1)), max_steps=2
    )
    plain, step = server.reply, PPOTrainer.step

    def stepped(self, batch):
        server.reply = plain
        report = step(self, batch)
        server.reply = lambda path, body: (500, {"error": "dead"})
        return report

    monkeypatch.setattr(PPOTrainer, "step", stepped)
    with pytest.warns(UserWarning, match="step 1: held-out prompts are not evaluated: .*dead"):
        history = trainer.train()
    assert len(history) == 1 and "eval_length" not in history[-1]
