"""A damaged or hostile file of a run is refused by name, and changes nothing."""

import json
import re
import shutil

import pytest
import torch
from helpers import PROMPTS, adapted, fives, make_ppo, make_trainer, rows, snapshot, tiny

from rlhf_core.models import ILQLModel
from rlhf_core.models.safetensors import read_tensors, write_tensors
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    ILQLConfig,
    ILQLTrainer,
    NLPOConfig,
    NLPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    RFTConfig,
    rft,
)
from rlhf_core.training import checkpoint

STEPS = dict(batch_size=4, max_steps=2, lr=1e-3)


def sft(out=None, **options):
    return make_trainer("sft", others=dict(out=out), **(STEPS | dict(save_every=1) | options))


def reward(out=None):
    return make_trainer("reward", others=dict(out=out), save_every=1, **STEPS)


def lora(out=None):
    return make_trainer("dpo", adapted(), others=dict(out=out), save_every=1, **STEPS)


def ppo(out=None, **options):
    options |= dict(minibatch_size=2, reference_ema=0.9, whiten_scores="running", save_every=1)
    return make_ppo(others=dict(out=out), **(STEPS | options))


def nlpo(out=None):
    config = NLPOConfig(response_length=4, mask_every=1, save_every=1, **STEPS)
    return NLPOTrainer(tiny(), PROMPTS, config, reward=fives, out=out)


def online(out=None):
    config = OnlineDPOConfig(response_length=4, save_every=1, **STEPS)
    return OnlineDPOTrainer(tiny(), PROMPTS, config, reward=fives, out=out)


def ilql(out=None):
    examples = [example._replace(reward=1.0) for example in rows("sft")]
    torch.manual_seed(0)
    config = ILQLConfig(save_every=1, **STEPS)
    return ILQLTrainer(ILQLModel(tiny()), examples, config, out=out)


MAKERS = dict(sft=sft, reward=reward, lora=lora, ppo=ppo, nlpo=nlpo, online=online, ilql=ilql)


@pytest.fixture(scope="module", params=MAKERS)
def trained(request, tmp_path_factory):
    """A function that makes a trainer, and the folder of its run of two steps."""
    out = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](out).train()
    return MAKERS[request.param], out


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    sft(out).train()
    return out


def parts_of(out):
    header, tensors = read_tensors(checkpoint.find(out)[-1])
    return json.loads(header["run"]), tensors


@pytest.fixture
def refused(trained, tmp_path):
    """Writes a checkpoint as one file. Resuming raises the words and changes nothing."""
    trainer = trained[0](tmp_path)
    return lambda *checkpoint: _refused(trainer, *checkpoint)


@pytest.fixture
def refused_by_sft(tmp_path):
    trainer = sft(tmp_path)
    return lambda *checkpoint: _refused(trainer, *checkpoint)


def _refused(trainer, run, tensors, words):
    text, path = run if isinstance(run, str) else json.dumps(run), trainer.out / "checkpoint"
    write_tensors(path, tensors, {"run": text})
    before = [snapshot(model) for model in trainer.models()]
    state = {name: x.clone() for name, x in trainer.state().items() if name != "seconds"}
    with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
        trainer.resume()
    assert words in str(raised.value) and len(str(raised.value)) < 500
    after = trainer.state()
    assert all(torch.equal(x, after[name]) for name, x in state.items())
    assert not trainer.steps_done and not trainer.optimizer.state
    for old, model in zip(before, trainer.models()):
        assert all(torch.equal(x, old[name]) for name, x in snapshot(model).items())


def one_of_each_kind(tensors):
    """Names: the first weight with its moments, and the first of every kind of state."""
    kinds = {}
    for name in sorted(tensors):
        kinds.setdefault(re.split(r"[:.]", name)[0], name)
    return kinds.values()


# ---- tensors


def test_a_tensor_of_another_shape_or_dtype_is_refused_by_its_name(trained, refused):
    run, tensors = parts_of(trained[1])
    assert len(list(one_of_each_kind(tensors))) >= 5
    del run["tensors"]  # as in an old checkpoint: no digest tells of the change
    for name in one_of_each_kind(tensors):
        x = tensors[name]
        for other in (
            torch.zeros(3, dtype=x.dtype),
            torch.zeros(0, dtype=x.dtype),
            torch.zeros(2, 3, 4, dtype=x.dtype),
            x[None],
            x.to(torch.int32),
            x.to(torch.bool),
            x.to(torch.float16),
        ):
            if (other.shape, other.dtype) != (x.shape, x.dtype):
                refused(run, tensors | {name: other}, f"tensor {name!r} is ")


def test_a_missing_or_unknown_tensor_is_refused_by_its_name(trained, refused):
    run, tensors = parts_of(trained[1])
    del run["tensors"]
    for name in one_of_each_kind(tensors):
        rest = {other: x for other, x in tensors.items() if other != name}
        refused(run, rest, f"tensor {name!r} is missing")
    for name in ("exp_avg:0.nothing", "weight:9.trunk", "max_exp_avg_sq:0.trunk.norm.weight", "x"):
        more = tensors | {name: torch.zeros(2)}
        refused(run, more, f"tensor {name!r} belongs to nothing in this run")


def test_values_that_no_run_has_are_refused_by_the_tensors_name(trained, refused):
    run, tensors = parts_of(trained[1])
    del run["tensors"]
    for name in one_of_each_kind(tensors):
        x = tensors[name]
        if x.dtype == torch.uint8:
            values = [torch.zeros_like(x), torch.full_like(x, 255)]
        else:
            values = [torch.full_like(x, value) for value in (float("nan"), float("-inf"))]
            values += [torch.full_like(x, -1)] * name.startswith(("exp_avg_sq:", "step:"))
        for value in values:
            message = f"damaged: tensor {name!r} holds values that no run has"
            refused(run, tensors | {name: value}, message)


def test_a_changed_bit_is_found(trained, refused):
    run, tensors = parts_of(trained[1])
    for name in one_of_each_kind(tensors):
        x = tensors[name].clone()
        x.view(-1).view(torch.uint8)[0] ^= 1
        refused(run, tensors | {name: x}, "damaged: its tensors have the digest ")
    fewer = {name: x for name, x in tensors.items() if not name.startswith(("exp", "step"))}
    refused(run, fewer, "damaged: its tensors have the digest ")


def test_a_checkpoint_of_an_older_version_still_loads(trained, tmp_path):
    """A file without digest of its tensors and description of models, reward and tokenizer."""
    make, out = trained
    run, tensors = parts_of(out)
    del run["tensors"]
    run["settings"] = {k: v for k, v in run["settings"].items() if k not in checkpoint.DESCRIBED}
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    write_tensors(tmp_path / "checkpoint", tensors, {"run": json.dumps(run)})
    trainer = make(tmp_path)
    trainer.resume()
    assert trainer.steps_done == 2 and len(trainer.train()) == 2


# ---- the description of the run

NASTY = [
    None, True, -1, 0.5, 2**70, -(2**63), 10**400, float("nan"), float("inf"), "", "x", [], [1],
    {}, {"a": {}}, "x" * 10**6,
]  # fmt: skip


def test_a_field_of_another_type_is_refused_by_its_name(sft_run, refused_by_sft):
    run, tensors = parts_of(sft_run)
    for name in ("steps_done", "total_steps", "settings", "digests", "tensors"):
        for value in NASTY:
            if name == "total_steps" and type(value) is int and value > 2:
                continue  # a longer run is no other run
            fits = type(value) is type(run[name])  # and the value does not
            words = "" if fits else f"damaged: {name} is "
            refused_by_sft(run | {name: value}, tensors, words)
    for name in ("steps_done", "settings", "digests"):
        rest = {other: value for other, value in run.items() if other != name}
        refused_by_sft(rest, tensors, f"damaged: {name} is None, not of type ")


def test_a_setting_or_digest_with_any_value_is_refused_by_its_name(sft_run, refused_by_sft):
    run, tensors = parts_of(sft_run)
    for name in ("lr", "batch_size", "algorithm", "models", "tokenizer"):
        for value in NASTY:
            if run["settings"][name] != value:
                changed = run["settings"] | {name: value}
                words = f"was written with {name}" if name != "models" else "was written with model"
                if len(repr(value)) < 300:
                    refused_by_sft(run | {"settings": changed}, tensors, words)
    for value in NASTY:
        changed = run["digests"] | {"examples": value}
        words = "different examples" if isinstance(value, str) else "the digest of its examples is"
        refused_by_sft(run | {"digests": changed}, tensors, words)
    rest = {"examples": run["digests"]["examples"]}
    words = "damaged: the digest of its frozen weights is None"
    refused_by_sft(run | {"digests": rest}, tensors, words)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "1", '"x"', "{", "[" * 10**5, "9" * 5000, '{"a": 1e999}', "NaN"]
)
def test_a_header_that_describes_no_run_is_refused(text, sft_run, refused_by_sft):
    refused_by_sft(text, parts_of(sft_run)[1], "damaged: ")


def test_more_steps_done_than_the_run_has_are_refused(sft_run, refused_by_sft):
    run, tensors = parts_of(sft_run)
    words = "damaged: steps_done is 3, of 2 steps"
    refused_by_sft(run | {"steps_done": 3}, tensors, words)


# ---- metrics


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[]", "null", "1", '"step"', '{"loss": 1}', '{"step": 1, "loss": 1}',
        '{"step": 2, "loss": "x"}', '{"step": 2, "loss": null}', '{"step": 2, "loss": {}}',
        '{"step": true}', '{"step": [2]}', "[" * 10**5, '{"step": 2, "loss": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_damaged_line_of_metrics_is_refused_by_its_number(line, sft_run, tmp_path):
    shutil.copytree(sft_run, tmp_path, dirs_exist_ok=True)
    first = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    (tmp_path / "metrics.jsonl").write_text(f"{first}\n{line}\n")
    trainer = sft(tmp_path, max_steps=2)
    trainer.resume()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not the metrics of step 2: "):
        trainer.train()
    assert (tmp_path / "metrics.jsonl").read_text() == f"{first}\n{line}\n"


# ---- rounds


@pytest.fixture(scope="module")
def rounds_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("rounds")
    rounds(out)
    return out


def rounds(out, resume=False):
    config = RFTConfig(response_length=4, num_samples=2, batch_size=4)
    return rft(tiny(), [[5]] * 4, config, reward=fives, out=out, resume=resume)


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("rounds.json", "[]", r"rounds\.json: must hold a JSON object"),
        ("rounds.json", "{", r"rounds\.json:1: not valid JSON"),
        ("rounds.json", "{}", r"rounds\.json: the run was started with algorithm=None"),
        ("metrics.jsonl", "{}\n", r"metrics\.jsonl:1: not the metrics of round 1"),
        ("metrics.jsonl", '{"round": 2}\n', r"metrics\.jsonl:1: .*round is 2, not 1"),
        ("metrics.jsonl", "x\n", r"metrics\.jsonl:1: not the metrics of round 1"),
    ],
)
def test_damaged_files_of_rounds_are_refused(file, text, message, rounds_run, tmp_path):
    shutil.copytree(rounds_run, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        rounds(tmp_path, resume=True)
    assert (tmp_path / file).read_text() == text


@pytest.mark.parametrize("how", ["a bit", "another model"])
def test_another_model_in_a_finished_round_is_found(how, rounds_run, tmp_path):
    shutil.copytree(rounds_run, tmp_path, dirs_exist_ok=True)
    rounds(tmp_path, resume=True)
    folder = tmp_path / "round-1"
    if how == "a bit":
        header, tensors = read_tensors(folder / "model.safetensors")
        next(iter(tensors.values())).view(-1).view(torch.uint8)[0] ^= 1
        write_tensors(folder / "model.safetensors", tensors, header)
    else:
        tiny(hidden_size=32).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"round-1: (damaged|its model is not the one)"):
        rounds(tmp_path, resume=True)


# ---- log-probs of a reference


def test_a_damaged_file_of_reference_logprobs_is_refused(tmp_path):
    file = tmp_path / "logprobs"

    def dpo():
        return DPOTrainer(tiny(), rows("dpo"), DPOConfig(reference_logprobs=str(file)))

    dpo()
    header, tensors = read_tensors(file)
    made_of = json.loads(header["made_of"])
    for text in ("", "[]", "{}", "null", json.dumps(made_of | {"precision": 3}), "[" * 10**5):
        write_tensors(file, tensors, {"made_of": text})
        with pytest.raises(ValueError, match=f"{file}: "):
            dpo()
    flat, lengths = tensors["logprobs"], tensors["lengths"]
    for name, other in (
        ("logprobs", flat[:-1]),
        ("logprobs", flat.double()),
        ("logprobs", flat * float("nan")),
        ("lengths", lengths.float()),
        ("lengths", lengths.flip(0).roll(1)),
        ("lengths", lengths - 1),
        ("keys", tensors["keys"].to(torch.int64) - 300),
        ("keys", tensors["keys"][:, :5]),
    ):
        write_tensors(file, tensors | {name: other.contiguous()}, header)
        with pytest.raises(ValueError, match=f"{file}: .*damaged"):
            dpo()
