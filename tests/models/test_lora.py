"""Adapters: new ones change nothing, nothing else trains, and PEFT uses the same files."""

import copy
import json
import re

import pytest
import safetensors.torch
import torch
from helpers import GPT2, snapshot
from helpers import tiny as any_tiny
from torch.testing import assert_close

from rlhf_core.generation import generate
from rlhf_core.models import ILQLModel, RewardModel, Transformer, ValueModel
from rlhf_core.models.ilql import has_values
from rlhf_core.models.lora import (
    LoRAConfig,
    LoRALinear,
    adapters_off,
    add_adapters,
    frozen_adapters,
    has_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)

LLAMA = dict(num_kv_heads=1, tie_embeddings=False)
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "phi3": LLAMA | dict(family="phi3")}
ALL = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
families = pytest.mark.parametrize("family", FAMILIES)
IDS = torch.tensor([[1, 5, 7, 2, 9, 4], [3, 3, 8, 0, 6, 1]])


def tiny(family="llama", cls=Transformer, seed=0, **options):
    options = dict(intermediate_size=24) | FAMILIES[family] | options
    return any_tiny(cls, seed, **options).eval()


@torch.no_grad()
def trained(model, seed=1):
    """As after some training: the weights that train have moved."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def adapted(family="llama", cls=Transformer, seed=0, **config):
    model = tiny(family, cls, seed)
    add_adapters(model, LoRAConfig(**(dict(rank=3) | config)))
    return trained(model)


# ---- what they compute


@families
def test_new_adapters_change_nothing_and_switched_off_ones_neither(family):
    """Row 28: to the last bit, in every form of the forward."""
    model = tiny(family)
    plain = copy.deepcopy(model)
    add_adapters(model, LoRAConfig())
    assert torch.equal(model(IDS), plain(IDS))
    trained(model)
    assert (model(IDS) - plain(IDS)).abs().max() > 0.1
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    with adapters_off(model):
        assert torch.equal(model(IDS), plain(IDS))
        assert torch.equal(model(IDS, mask), plain(IDS, mask))
        with adapters_off(model):
            pass
        assert torch.equal(model(IDS), plain(IDS))
    assert (model(IDS) - plain(IDS)).abs().max() > 0.1


@families
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_adds_its_product_to_its_rows(family, rslora):
    """y = W x + alpha / rank (or its root) B A x, written out on the named modules' weights."""
    target = {"llama": "k_proj", "gpt2": "c_attn", "phi3": "qkv_proj"}[family]
    model = adapted(family, rank=4, alpha=6, rslora=rslora, target_modules=[target])
    plain, scale = tiny(family), 6 / (2 if rslora else 4)
    rows = {"llama": slice(16, 24), "gpt2": slice(0, 48), "phi3": slice(0, 32)}[
        family
    ]  # of q, k, v: 16, 8, 8 or 16, 16, 16
    for mine, block in zip(model.trunk.blocks, plain.trunk.blocks):
        (adapter,) = mine.attn.qkv.adapters.values()
        block.attn.qkv.weight.data[rows] += scale * adapter.lora_B.data @ adapter.lora_A.data
        assert not isinstance(mine.attn.out, LoRALinear) and not isinstance(mine.mlp.up, LoRALinear)
    assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-5)


def test_merged_adapters_leave_a_plain_model_that_computes_the_same(tmp_path):
    model = adapted()
    want, names = model(IDS), tiny().state_dict().keys()
    merge_adapters(model)
    assert not has_adapters(model) and model.state_dict().keys() == names
    assert all(p.requires_grad for p in model.parameters())
    assert_close(model(IDS), want, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(IDS), model(IDS))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2's head is tied
def test_a_plain_copy_has_no_adapters_and_a_head_of_its_own(family, tmp_path):
    for model in (adapted(family), tiny(family)):
        before, names = snapshot(model), set(tiny(family).state_dict())
        copy = model.plain_copy()
        assert copy.state_dict().keys() == names | {"lm_head.weight"}
        assert not copy.training and not copy.config.tie_embeddings
        assert_close(copy(IDS), model(IDS), rtol=0, atol=1e-5)
        assert not any(weight.requires_grad for weight in copy.parameters())
        after = snapshot(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert any(weight.requires_grad for weight in model.parameters())
        embedding = "trunk.embed.weight"
        assert copy.state_dict()[embedding].data_ptr() == model.state_dict()[embedding].data_ptr()
        copy.save_pretrained(tmp_path)
        assert_close(Transformer.from_pretrained(tmp_path)(IDS), model(IDS), rtol=0, atol=1e-5)


def test_dropout_is_on_the_adapters_input_in_train_mode_only():
    model, quiet = adapted(dropout=0.5), adapted()
    assert torch.equal(model(IDS), quiet(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))
    with adapters_off(model):
        assert torch.equal(model(IDS), tiny()(IDS))


def test_sampling_goes_through_the_adapters():
    """The log-probs that decoding records are those of the training forward."""
    model = adapted()
    response = generate(
        model,
        IDS[:, :3],
        max_new_tokens=8,
        temperature=1.0,
        eos_ids=(),
        generator=torch.Generator().manual_seed(0),
    )
    ids = torch.cat((IDS[:, :3], response.response_ids), dim=1)
    logprobs = (
        model(ids)[:, 2:-1].log_softmax(-1).gather(2, response.response_ids[..., None])[..., 0]
    )
    assert_close(response.logprobs, logprobs, rtol=0, atol=1e-5)


def test_adapters_of_bfloat16_weights_are_float32():
    model = tiny().to(torch.bfloat16)
    plain = copy.deepcopy(model)
    add_adapters(model, LoRAConfig())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(IDS).dtype == torch.bfloat16
    assert torch.equal(model(IDS), plain(IDS))
    trained(model)(IDS).sum().backward()
    critic = ValueModel.from_model(model)
    assert {
        p.dtype for p in critic.parameters() if p.requires_grad and p.ndim == 2 and len(p) > 1
    } == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_gradient(autocast):
    results = []
    for checkpointing in (False, True):
        model = adapted(dropout=0.3).train()
        model.trunk.checkpointing = checkpointing
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(IDS).float().square().mean()
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(g.any() for g in results[0].values())
    assert_close(*results, rtol=0, atol=0)


# ---- what trains


@families
@pytest.mark.parametrize("cls", [Transformer, RewardModel, ValueModel])
def test_a_step_moves_the_adapters_and_a_scalar_head_and_nothing_else(family, cls):
    """Row 32: everything else is the same to the last bit, under weight decay too."""
    model = adapted(family, cls)
    before = snapshot(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    arguments = (IDS,) if cls is Transformer else (IDS, torch.ones_like(IDS, dtype=torch.bool))
    model(*arguments).square().sum().backward()
    optimizer.step()
    moved = {
        name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert moved == {name for name in before if "lora_" in name or name == "score.weight"}
    assert {
        f"trunk.blocks.1.{name}" for name in ("attn.qkv.weight", "mlp.down.weight")
    } <= before.keys()


def test_a_head_on_an_adapted_trunk_trains_with_the_adapters_of_its_copy():
    policy = adapted()
    critic = ValueModel.from_model(policy)
    trains = {name for name, p in critic.named_parameters() if p.requires_grad}
    assert (
        "score.weight" in trains
        and all("lora_" in name for name in trains - {"score.weight"})
        and len(trains) > 20
    )
    trained(critic)
    assert torch.equal(policy(IDS), adapted()(IDS))


def test_a_head_can_share_the_adapted_trunk():
    policy = adapted()
    critic = ValueModel.from_model(policy, share_trunk=True)
    assert critic.trunk is policy.trunk and critic.score.weight.requires_grad
    assert not policy.trunk.embed.weight.requires_grad


def test_frozen_adapters_replace_those_that_train():
    assert frozen_adapters(adapt_fresh()) is None  # B = 0: off is the same
    model = adapted()
    kept, want = frozen_adapters(model), model(IDS)
    trained(model, seed=2)
    assert not torch.equal(model(IDS), want)
    with adapters_off(model, kept), torch.no_grad():
        assert torch.equal(model(IDS), want)
    assert sum(p.numel() for adapters in kept for p in adapters.parameters()) < 0.5 * sum(
        map(torch.numel, tiny().parameters())
    )
    assert not any(p.requires_grad for adapters in kept for p in adapters.parameters())


def adapt_fresh(**config):
    model = tiny()
    add_adapters(model, LoRAConfig(**config))
    return model


def test_a_model_without_adapters_is_not_its_own_reference():
    with pytest.raises(ValueError, match="no adapters to switch off"), adapters_off(tiny()):
        pass


def test_adapters_come_back_after_an_error():
    model = adapted()
    want = model(IDS)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(model(IDS), want)


# ---- files


@families
@pytest.mark.parametrize("cls", [Transformer, RewardModel, ValueModel])
def test_a_folder_of_adapters_reads_as_their_base_with_them(family, cls, tmp_path):
    """Whether the base is a language model or has the head already."""
    for number, base in enumerate((tiny(family), tiny(family, cls))):
        folder, out = tmp_path / f"base{number}", tmp_path / f"out{number}"
        base.save_pretrained(folder)
        model = base if isinstance(base, cls) else cls.from_model(base)
        add_adapters(model, LoRAConfig(rank=2, alpha=3.5, rslora=True, base=str(folder)))
        trained(model).save_pretrained(out)
        assert {file.name for file in out.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        read = cls.from_pretrained(out)
        assert_close(snapshot(read), snapshot(model), rtol=0, atol=0)
        arguments = (IDS,) if cls is Transformer else (IDS, torch.ones_like(IDS, dtype=torch.bool))
        assert torch.equal(read(*arguments), model(*arguments)) and not read.training


def test_a_whole_model_saved_over_adapters_is_what_is_read(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    adapted(base=str(tmp_path / "base")).save_pretrained(tmp_path / "out")
    tiny(seed=3).save_pretrained(tmp_path / "out")
    assert torch.equal(Transformer.from_pretrained(tmp_path / "out")(IDS), tiny(seed=3)(IDS))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_adapters_saved_over_a_model_with_values_remove_the_values(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    ILQLModel(adapted(base=str(tmp_path / "base"))).save_pretrained(tmp_path / "out")
    assert has_values(tmp_path / "out")
    adapted(base=str(tmp_path / "base")).save_pretrained(tmp_path / "out")
    assert not has_values(tmp_path / "out")


@pytest.mark.parametrize("of_steps", [True, False])
def test_of_steps_is_stored_with_adapters_whatever_their_base_has(of_steps, tmp_path):
    for base in (tiny(), RewardModel.from_model(tiny())):
        base.of_steps = not of_steps
        base.save_pretrained(tmp_path / "base")
        reward = RewardModel.from_model(base)
        add_adapters(reward, LoRAConfig(rank=2, base=str(tmp_path / "base")))
        reward.of_steps = of_steps
        reward.save_pretrained(tmp_path / "out")
        assert RewardModel.from_pretrained(tmp_path / "out").of_steps is of_steps


def test_criteria_are_stored_with_adapters_whatever_their_base_has(tmp_path):
    weights = {"helpful": 1.0, "harmless": 2.0}
    several = RewardModel.from_model(tiny())
    several.set_criteria({"helpful": 5.0, "harmless": 0.0})
    for base in (tiny(), RewardModel.from_model(tiny()), several):
        base.save_pretrained(tmp_path / "base")
        reward = RewardModel.from_model(base)
        add_adapters(reward, LoRAConfig(rank=2, base=str(tmp_path / "base")))
        reward.set_criteria(weights)
        reward.score.weight.data += torch.randn_like(reward.score.weight)
        reward.normalize(torch.tensor([0.5, -1.0]), 2.0)
        reward.save_pretrained(tmp_path / "out")
        back = RewardModel.from_pretrained(tmp_path / "out")
        assert dict(back.criteria) == weights
        assert torch.equal(back.score.weight, reward.score.weight)
        assert torch.equal(back.score.bias, reward.score.bias)
    several.criteria = {"x": 1.0, "y": 1.0}
    several.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="the model scores x, y, not helpful, harmless"):
        RewardModel.from_pretrained(tmp_path / "out")


def test_adapters_of_a_reward_model_are_not_read_as_a_policy(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    reward = RewardModel.from_model(tiny())
    add_adapters(reward, LoRAConfig(rank=2, base=str(tmp_path / "base")))
    reward.save_pretrained(tmp_path / "out")
    with pytest.raises(
        ValueError, match=f"{tmp_path / 'out'}: adapters of a reward model, not of a language model"
    ):
        Transformer.from_pretrained(tmp_path / "out")


def test_a_file_written_by_hand_is_read(tmp_path):
    """PEFT's format, as its own files have it."""
    a, b = torch.randn(2, 16), torch.randn(8, 2)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    safetensors.torch.save_file(
        {name.format("A"): a, name.format("B"): b}, tmp_path / "adapter_model.safetensors"
    )
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=6, lora_dropout=0.0, bias="none",
        use_dora=False, target_modules=["layers.1.self_attn.v_proj"], rank_pattern={},
        modules_to_save=None, fan_in_fan_out=False, base_model_name_or_path=None,
        layers_to_transform=None, init_lora_weights=True, megatron_core="megatron.core",
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model, plain = tiny(), tiny()
    load_adapters(model, tmp_path)
    plain.trunk.blocks[1].attn.qkv.weight.data[24:32] += 3 * b @ a  # after 16 rows of q and 8 of k
    assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="base_model_name_or_path is missing; load that model"):
        Transformer.from_pretrained(tmp_path)


def edit(folder, change=None, **fields):
    """Rewrite the tensors after change(dict), and fields of the config."""
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    if change:
        change(tensors)
    safetensors.torch.save_file(tensors, file)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(
        json.dumps({name: value for name, value in config.items() if value != "remove"})
    )


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.weight"


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


FAULTS = {
    "no config": (
        lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, r"adapter_config\.json",
    ),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError,
        r"adapter_model\.safetensors",
    ),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        FileNotFoundError, r"adapter_model\.bin is a pickle",
    ),
    "cut": (lambda f: cut(f / "adapter_model.safetensors"), ValueError, "cut short"),
    "missing tensor": (
        lambda f: edit(f, lambda t: t.pop(Q0)), ValueError, re.escape(f"no tensor {Q0!r}"),
    ),
    "unknown tensor": (
        lambda f: edit(f, lambda t: t.update({HEAD: torch.ones(12, 16)})), ValueError,
        r"1 tensors that do not belong to this model, e\.g\. 'base_model\.model\.lm_head\.weight'",
    ),
    "a module beyond": (
        lambda f: edit(f, target_modules=["k_proj"]), ValueError, "do not belong.*down_proj",
    ),
    "shape": (
        lambda f: edit(f, lambda t: t.update({Q0: torch.ones(3, 17)})), ValueError,
        re.escape(f"{Q0!r} is F32 (3, 17); with r=3 this model needs floats (3, 16)"),
    ),
    "rank": (lambda f: edit(f, r=4), ValueError, r"with r=4 this model needs floats \(4, 16\)"),
    "dtype": (
        lambda f: edit(f, lambda t: t.update({Q0: t[Q0].to(torch.int8)})), ValueError,
        r"is I8 \(3, 16\)",
    ),
    "method": (
        lambda f: edit(f, peft_type="IA3"), ValueError,
        r"peft_type='IA3' is not supported, only \('LORA',\)",
    ),
    "no rank": (lambda f: edit(f, r="remove"), ValueError, "field 'r' is missing"),
    "dora": (lambda f: edit(f, use_dora=True), ValueError, "use_dora=True is not supported"),
    "biases": (lambda f: edit(f, bias="all"), ValueError, "bias='all' is not supported"),
    "ranks": (
        lambda f: edit(f, rank_pattern={"q_proj": 2}), ValueError,
        "rank_pattern={'q_proj': 2} is not supported",
    ),
    "start": (
        lambda f: edit(f, init_lora_weights="pissa"), ValueError,
        "init_lora_weights='pissa' is not supported",
    ),
    "a field to come": (
        lambda f: edit(f, use_shiny=True), ValueError, "use_shiny=True is not supported",
    ),
    "whole modules": (
        lambda f: edit(f, modules_to_save=["score", "lm_head"]), ValueError,
        "modules_to_save with 'lm_head' is not",
    ),
    "target": (
        lambda f: edit(f, target_modules=["q_proj", "fc1"]),
        ValueError,
        "no module 'fc1' to adapt, only down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_refused_by_name_and_the_model_stays_as_it_was(fault, tmp_path):
    break_it, error, message = FAULTS[fault]
    save_adapters(adapted(), tmp_path)
    model = tiny()
    load_adapters(copy.deepcopy(model), tmp_path)
    break_it(tmp_path)
    with pytest.raises(error, match=message):
        load_adapters(model, tmp_path)
    assert not has_adapters(model) and all(p.requires_grad for p in model.parameters())


def test_adapters_of_another_base_are_refused(tmp_path):
    save_adapters(adapted(), tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.*this model needs floats \(3, 32\)"):
        load_adapters(tiny(hidden_size=32), tmp_path)
    with pytest.raises(ValueError, match=r"no tensor .*layers\.2\."):
        load_adapters(tiny(num_layers=3), tmp_path)
    with pytest.raises(ValueError, match=r"do not belong to this model, e\.g\. .*layers\.1\."):
        load_adapters(tiny(num_layers=1), tmp_path)
    with pytest.raises(ValueError, match=r"no tensor 'base_model\.model\.score\.weight'"):
        load_adapters(tiny(cls=RewardModel), tmp_path)


def test_adapters_are_added_once():
    model = adapted()
    with pytest.raises(ValueError, match="already has adapters"):
        add_adapters(model, LoRAConfig())


@pytest.mark.parametrize(
    "target, modules",
    [
        (["c_proj"], ["attn.out", "mlp.down"]),
        (["mlp.c_proj"], ["mlp.down"]),
        ("all-linear", ["attn.qkv", "attn.out", "mlp.up", "mlp.down"]),
        (r".*attn\.c_\w+", ["attn.qkv", "attn.out"]),
    ],
)
def test_targets_are_names_their_ends_or_a_pattern(target, modules):
    model = tiny("gpt2")
    add_adapters(model, LoRAConfig(target_modules=target))
    found = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert found == {f"trunk.blocks.{i}.{name}" for i in range(2) for name in modules}


@pytest.mark.parametrize("target", [["q_proj", "query"], "query", ["proj"]])
def test_an_unknown_target_is_named_with_the_known_ones(target):
    model = tiny()
    with pytest.raises(
        ValueError, match=r"no module '(query|proj)' to adapt, only down_proj, gate_proj"
    ):
        add_adapters(model, LoRAConfig(target_modules=target))
    assert not has_adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "field, value",
    [("rank", 0), ("rank", 1.5), ("alpha", 0), ("dropout", 1.0), ("target_modules", [])],
)
def test_a_config_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        LoRAConfig(**{field: value})


# ---- PEFT itself


@families
@pytest.mark.parametrize("targets", ["all", "one"])
@pytest.mark.parametrize("scalar", [False, True])
def test_peft_reads_what_is_written_here_and_the_other_way_round(family, targets, scalar, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    cls, kind = (RewardModel, "SequenceClassification") if scalar else (Transformer, "CausalLM")
    base = tiny(family, cls, pad_id=0)
    base.save_pretrained(tmp_path / "base")

    def theirs():
        return (
            getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "base").eval()
        )

    names = ALL[family][: None if targets == "all" else 1]
    mask = torch.ones_like(IDS, dtype=torch.bool)
    ids = IDS.clone()
    ids[ids == 0] = 1  # transformers' classifiers look for padding by its id

    def ours(model):
        return model(ids, mask)[:, None] if scalar else model(ids)

    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=names, task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        init_lora_weights=False, fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(theirs(), config).eval()
    model.save_pretrained(tmp_path / "peft")
    got = cls.from_pretrained(tmp_path / "peft")
    assert (ours(got) - ours(base)).abs().max() > 1e-3
    assert_close(ours(got), model(ids).logits, rtol=0, atol=1e-5)

    mine = cls.from_pretrained(tmp_path / "base")
    add_adapters(mine, LoRAConfig(rank=3, alpha=5, target_modules=names))
    trained(mine).save_pretrained(tmp_path / "mine")
    model = peft.PeftModel.from_pretrained(theirs(), tmp_path / "mine").eval()
    assert_close(model(ids).logits, ours(mine), rtol=0, atol=1e-5)
