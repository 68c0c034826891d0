"""The vLLM engine against vLLM itself: `make test-engine`; elsewhere against a recording of it.

The server is that of $RLHF_CORE_ENGINE. It serves the folder $RLHF_CORE_ENGINE_MODEL, which
serve_vllm.py writes: stories260k with wider heads. With the file vllm_protocol.json removed, the
tests write a new one.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from engine_helpers import Recorder, Replay, session, widened
from helpers import snapshot

from rlhf_core.data import load_tokenizer
from rlhf_core.generation import EngineError
from rlhf_core.integrations import vllm
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.rollout import response_logprobs, sample
from rlhf_core.trainers import GRPOConfig, GRPOTrainer

RECORDING = Path(__file__).with_name("vllm_protocol.json")
PROMPTS = [[1, 403, 407, 261], [1, 410, 276]]
URL = os.environ.get("RLHF_CORE_ENGINE")


@pytest.fixture
def exchanges():
    return json.loads(RECORDING.read_text(encoding="utf-8"))


@pytest.fixture
def policy(data_dir):
    """The policy and its tokenizer."""
    folder = data_dir / "models" / "stories260k"
    return widened(Transformer.from_pretrained(folder), 32), load_tokenizer(folder)


@pytest.fixture
def engine():
    if URL is None:
        pytest.skip("no vLLM server: run `make test-engine`")
    return vllm.Engine(URL)


def logprob_errors(model, rollout, temperature):
    """Differences (B, R) in nats between the engine's log-probs and the training forward's."""
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, rollout, temperature)
    return (rollout.logprobs - logprobs).abs()


# ---- the recording


def test_wider_heads_compute_the_same(data_dir, policy):
    plain = Transformer.from_pretrained(data_dir / "models" / "stories260k")
    ids = torch.randint(3, 512, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(policy[0](ids), plain(ids), atol=1e-4, rtol=0)


def test_the_recorded_replies_are_read(policy, exchanges, monkeypatch):
    """The recorded log-probs of vLLM are those of our own forward."""
    monkeypatch.setenv("no_proxy", "*")
    model, tokenizer = policy
    server = Replay(model, exchanges)
    try:
        sampled, greedy, stopped = session(vllm.Engine(server.url), model, tokenizer, PROMPTS)
    finally:
        server.shutdown()
        server.server_close()
    assert logprob_errors(model, sampled, 0.7).max() < 1e-4
    assert sampled.response_mask.sum() > 40
    own = sample(model, PROMPTS, max_new_tokens=12, temperature=0.0, eos_ids=(1, 2))
    assert torch.equal(greedy.response_ids[::2], own.response_ids) and not greedy.logprobs.any()
    assert stopped.ended.any() and logprob_errors(model, stopped, 1.0).max() < 1e-4
    for ids, ended in zip(stopped.responses(), stopped.ended.tolist()):
        assert ("a" in tokenizer.decode(ids)) == ended and "a" not in tokenizer.decode(ids[:-1])


def kinds(value):
    """A JSON value with types in the place of numbers and texts; a list by its first element."""
    if isinstance(value, dict):
        return {name: kinds(x) for name, x in value.items()}
    if isinstance(value, list):
        return [kinds(x) for x in value[:1]]
    return type(value).__name__


def lacks(ours, theirs):
    """Whether ours has a field that theirs has not, or one of another type."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if all(name.isdecimal() for name in ours):  # token ids
            return any(lacks(x, y) for x, y in zip(ours.values(), theirs.values()))
        ours = {name: x for name, x in ours.items() if name != "top_logprobs"}  # by text
        return any(name not in theirs or lacks(x, theirs[name]) for name, x in ours.items())
    if isinstance(ours, list) and isinstance(theirs, list):
        return any(lacks(x, y) for x, y in zip(ours, theirs))
    return ours != theirs


class Alphabet:
    """A tokenizer that repeats the alphabet."""

    def encode(self, text):
        return [ord(x) % 512 for x in text]

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


def test_the_server_of_the_other_tests_answers_as_vllm_does(exchanges, engine_server, tmp_path):
    """Equal statuses, and every field of its replies is in vLLM's, with the same type."""
    model = Transformer(TransformerConfig(512, 16, 1, 2, max_positions=256))
    model.plain_copy().save_pretrained(tmp_path)
    server = engine_server(model, tokenizer=Alphabet())
    statuses = set()
    for x in exchanges:
        body = x["body"] | {"kwargs": {"weights_path": tmp_path}}
        status, reply = server.reply(x["path"], body)
        assert status == x["status"], x
        if status == 200:
            reply = json.loads(json.dumps(reply))
            for choice in reply.get("choices", ()):
                assert choice["finish_reason"] in ("stop", "length")
                del choice["stop_reason"]  # a text, an id or none
            assert not lacks(kinds(reply), kinds(x["reply"])), x["path"]
        statuses.add((x["path"], status))
    assert ("/v1/completions", 400) in statuses and len(statuses) == 9


# ---- the server


def test_the_recording_is_what_the_server_says(engine, policy):
    recorder = Recorder(engine)
    session(engine, *policy, PROMPTS)
    if not RECORDING.exists():
        lines = ",\n".join(json.dumps(x, ensure_ascii=False) for x in recorder.exchanges)
        RECORDING.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    recorded = json.loads(RECORDING.read_text(encoding="utf-8"))
    assert len(recorded) == len(recorder.exchanges)
    # The rows of a batch come in any order.
    old, new = (
        sorted(x, key=lambda x: json.dumps(x["body"])) for x in (recorded, recorder.exchanges)
    )
    for then, now in zip(old, new):
        assert all(then[name] == now[name] for name in ("path", "body", "status"))
        assert then["reply"].keys() == now["reply"].keys()
        choices = zip(then["reply"].get("choices", ()), now["reply"].get("choices", ()))
        assert all(a["token_ids"] == b["token_ids"] for a, b in choices)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_have_the_log_probs_of_the_training_forward(engine, policy, temperature):
    model, _ = policy
    options = dict(max_new_tokens=100, temperature=temperature, eos_ids=(1, 2), engine=engine)
    seeds = torch.arange(16) * 977
    rollout = sample(model, PROMPTS, num_samples=8, seeds=seeds, **options)
    assert logprob_errors(model, rollout, temperature).max() < 1e-4
    alone = sample(model, PROMPTS[:1], seeds=seeds[:1], **options)
    assert alone.responses()[0] == rollout.responses()[0]


def test_greedy_rows_are_our_own(engine, policy):
    model, _ = policy
    options = dict(max_new_tokens=60, temperature=0.0, eos_ids=(1, 2))
    theirs = sample(model, PROMPTS, engine=engine, **options)
    assert theirs.responses() == sample(model, PROMPTS, **options).responses()


@torch.no_grad()
def move(model, size=0.02):
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(torch.randn_like(weight) * size * weight.abs().mean())


def test_changed_weights_and_adapters_are_loaded(engine, policy):
    model, _ = policy
    options = dict(max_new_tokens=40, num_samples=4, eos_ids=(1, 2), engine=engine)
    for change in (move, lambda model: add_adapters(model, LoRAConfig(rank=4)), move, move):
        before = snapshot(model)
        change(model)
        rollout = sample(model, PROMPTS, **options)
        assert logprob_errors(model, rollout, 1.0).max() < 1e-4
        assert before.keys() <= model.state_dict().keys() | {"lm_head.weight"}


def test_a_tied_head_that_the_server_keeps_is_found(engine, policy, monkeypatch, tmp_path):
    """vLLM reloads a tied folder without its head, and answers 200."""
    model, _ = policy
    engine.load(model)
    ask = engine._ask

    def tied(path, body, *options, **more):
        if path == "/collective_rpc":
            model.save_pretrained(tmp_path)
            body = body | {"kwargs": {"weights_path": str(tmp_path)}}
        return ask(path, body, *options, **more)

    monkeypatch.setattr(engine, "_ask", tied)
    move(model)
    with pytest.raises(EngineError, match="It has kept its old output head"):
        engine.load(model)


def test_a_server_that_has_lost_the_weights_gets_them_again(engine, policy):
    model, _ = policy
    move(model)
    engine.load(model)
    first = os.environ["RLHF_CORE_ENGINE_MODEL"]
    lost = {"method": "reload_weights", "kwargs": {"weights_path": first}}
    engine._ask("/collective_rpc", lost)
    options = dict(max_new_tokens=40, num_samples=4, eos_ids=(1, 2), engine=engine)
    rollout = sample(model, PROMPTS, **options)
    assert logprob_errors(model, rollout, 1.0).max() < 1e-4


def test_another_vocabulary_is_refused(engine):
    for size, word in ((511, "more"), (513, "fewer")):
        model = Transformer(TransformerConfig(size, 16, 1, 2))
        with pytest.raises(EngineError, match=f"has {word} token ids"):
            engine.start(model)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_samples_from_the_policy_all_along(engine, policy, ahead, tmp_path):
    model, tokenizer = policy

    def run(folder, stop_at=None):
        copy = Transformer.from_pretrained(start)
        config = GRPOConfig(
            batch_size=2, num_samples=4, response_length=24, lr=1e-3, epochs=6, steps_ahead=ahead,
            importance_cap=2.0,
        )  # fmt: skip
        reward = lambda prompts, responses: [float(x.count("a")) for x in responses]  # noqa: E731

        def on_step(metrics, step):
            if step == stop_at:
                raise KeyError("stop")

        trainer = GRPOTrainer(
            copy, PROMPTS, config, reward=reward, tokenizer=tokenizer, eos_ids=(1, 2),
            engine=engine, out=tmp_path / folder, on_step=on_step,
        )  # fmt: skip
        if folder == "broken" and stop_at is None:
            trainer.resume()
        return trainer, trainer.train()

    start = tmp_path / "start"
    model.save_pretrained(start)
    whole, history = run("whole")
    assert [line["val/oldest_version"] for line in history] == [
        max(0, step - ahead) for step in range(6)
    ]
    for step, line in enumerate(history):
        near = line["val/rollout_mismatch"] < 1e-4 and line["val/rollout_kl"] < 1e-8
        assert near == (ahead == 0 or step == 0)
    with pytest.raises(RuntimeError, match="continue from"):
        run("broken", stop_at=3)
    again, _ = run("broken")
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight, atol=1e-5, rtol=0)
