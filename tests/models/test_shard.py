"""Sharded models compute what one process computes: values, gradients, steps, whole copies."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import GPT2, make_trainer, run_ranks, snapshot, tiny
from torch.distributed.device_mesh import init_device_mesh

from rlhf_core.data import Example, collate
from rlhf_core.generation import generate
from rlhf_core.models import EnsembleReward, ILQLModel, RewardModel, Transformer, ValueModel
from rlhf_core.models.gather import is_sharded, reshard, whole, whole_copy, whole_tensor
from rlhf_core.models.lagging import follow
from rlhf_core.models.lora import LoRAConfig, adapters_off, add_adapters, frozen_adapters
from rlhf_core.models.masked import MaskedPolicy
from rlhf_core.models.shard import mesh_of, shard

pytestmark = pytest.mark.slow  # every test starts processes
ROWS = [Example([7, 8][: 1 + i % 2], [9, 10, 4 + i % 3, 11, 2][i % 4 :]) for i in range(8)]
ODD = dict(
    hidden_size=15, num_heads=3, head_dim=2, num_kv_heads=1, intermediate_size=7, vocab_size=13
)


def lora(cls, dtype=torch.float64):
    model = tiny(cls).to(dtype)
    add_adapters(model, LoRAConfig(rank=3))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def ilql():
    model = ILQLModel(tiny(**ODD).double())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def critic_head():
    policy = tiny(tie_embeddings=True).double()
    return policy, ValueModel.from_model(policy, share_trunk=True)


CASES = {
    "tied": lambda: [tiny(tie_embeddings=True).double()],
    "untied": lambda: [tiny().double()],
    "gpt2": lambda: [tiny(**GPT2, tie_embeddings=True).double()],
    "uneven": lambda: [tiny(**ODD).double()],
    "softcap": lambda: [tiny(logit_softcap=3.0).double()],
    "frozen": lambda: [frozen(tiny().double())],
    "checkpointing": lambda: [checkpointing(tiny().double())],
    "lora": lambda: [lora(Transformer)],
    "lora checkpointing": lambda: [checkpointing(lora(Transformer))],
    "lora reward": lambda: [lora(RewardModel)],
    "reward": lambda: [tiny(RewardModel).double()],
    "value": lambda: [tiny(ValueModel).double()],
    "critic head": critic_head,
    "ilql": lambda: [ilql()],
}
SOME = ["tied", "uneven", "lora", "critic head", "ilql"]


def frozen(model):
    model.prepare_training(freeze_layers=1, activation_checkpointing=False)
    return model


def checkpointing(model):
    model.prepare_training(freeze_layers=0, activation_checkpointing=True)
    return model


def token_loss(model, hidden, tokens):
    return model.token_loss(hidden, tokens.targets, lambda found, _: (found.logprobs.sum() / -8,))[
        0
    ]


def loss_of(models, rows):
    """The sum of a loss of each row, through the doors that trainers use."""
    model, tokens = models[0], collate(rows, 0)
    if isinstance(model, RewardModel):
        return model.scores(tokens).double().tanh().sum() + model.token_scores(tokens).sum() / 8
    if isinstance(model, ValueModel):
        mask = tokens.input_ids > 0
        return model(tokens.input_ids, mask).double().where(mask, 0).square().sum()
    hidden = model.hidden_states(tokens.input_ids, read=tokens.read)
    if isinstance(model, ILQLModel):
        q = torch.stack([head.of_tokens(hidden, tokens.targets) for head in model.q])
        return (q - model.values(hidden)).double().square().sum() - model.lm.token_logprobs(
            hidden, tokens.targets
        ).logprobs.sum()
    loss = token_loss(model, hidden, tokens)
    if len(models) > 1:
        loss = loss + models[1].read(hidden).double().square().sum()
    return loss


def share(rows):
    rank, size = dist.get_rank(), dist.get_world_size()
    return rows[len(rows) * rank // size : len(rows) * (rank + 1) // size]


def trained(models):
    """Each trained parameter once, by name."""
    found = {}
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and all(parameter is not x for x in found.values()):
                found[f"{i}.{name}"] = parameter
    return found


def backward(models, rows, at_once):
    for first in range(0, len(rows), at_once):
        loss_of(models, rows[first : first + at_once]).backward()
        with torch.no_grad():
            loss_of(models, rows[first : first + 1])
    reshard(*models)


def gradients(rank, world, shape, names):
    """The largest relative error of a gradient of each case."""
    warnings.filterwarnings("error", message="FSDP")
    mesh, errors = mesh_of(shape[0]), {}
    for name in names:
        plain = CASES[name]()
        models = copy.deepcopy(plain)
        for model in models:
            shard(model, mesh)
        backward(plain, ROWS, 5)
        backward(models, share(ROWS), 3)
        wanted, got = trained(plain), trained(models)
        assert wanted.keys() == got.keys()
        grads = {key: (whole_tensor(got[key].grad), x.grad) for key, x in wanted.items()}
        errors[name] = max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in grads.values()
        )
    return errors


@pytest.mark.parametrize(
    "shape, names",
    [((2, 2), SOME[:3]), ((1, 3), SOME), ((2, 1), SOME), ((1, 2), [*CASES])],
    ids=str,
)
def test_gradients_are_those_of_one_process(shape, names, tmp_path):
    for errors in run_ranks(gradients, torch.Size(shape).numel(), tmp_path, shape, names):
        assert errors.keys() == set(names)
        assert {name: x for name, x in errors.items() if not x < 1e-12} == {}


def steps(rank, world, names):
    """The largest difference of a weight after 8 steps of AdamW, for each case."""
    mesh, drifts = mesh_of(), {}
    for name in names:
        plain, weights = CASES[name](), []
        models = copy.deepcopy(plain)
        for model in models:
            shard(model, mesh)
        for these, rows in ((plain, ROWS), (models, share(ROWS))):
            parameters = list(trained(these).values())
            optimizer = torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)
            for _ in range(8):
                optimizer.zero_grad()
                backward(these, rows, 3)
                norm = torch.nn.utils.get_total_norm([x.grad for x in parameters])
                torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, whole_tensor(norm))
                optimizer.step()
            weights.append([whole_tensor(x).detach() for x in parameters])
        drifts[name] = max(float((a - b).abs().max()) for a, b in zip(*weights))
    return drifts


def test_steps_are_those_of_one_process(tmp_path):
    for drifts in run_ranks(steps, 2, tmp_path, SOME):
        assert drifts.keys() == set(SOME)
        assert {name: x for name, x in drifts.items() if not x < 1e-9} == {}


def copies(rank, world):
    """Check that `whole` yields the plain model, and frees it."""
    mesh = mesh_of()
    cases = CASES | {
        "ensemble": lambda: [EnsembleReward([tiny(RewardModel), tiny(RewardModel, 1)])]
    }
    for name, build in cases.items():
        plain = build()
        models = copy.deepcopy(plain)
        for model in models:
            shard(model, mesh)
        if name != "ensemble":
            with torch.no_grad():
                loss_of(models, ROWS)  # which leaves head and embedding gathered
        for model, wanted in zip(models, plain):
            assert is_sharded(model) and not is_sharded(wanted)
            with whole(model) as copied:
                assert [type(x) for x in copied.modules()] == [type(x) for x in wanted.modules()]
                state = copied.state_dict()
                assert state.keys() == wanted.state_dict().keys()
                for key, x in wanted.state_dict().items():
                    assert type(state[key]) is type(x) and torch.equal(state[key], x), (name, key)
                assert not any(x.requires_grad for x in copied.parameters())
                if isinstance(wanted, (Transformer, ILQLModel)):
                    options = dict(max_new_tokens=6, seeds=torch.arange(3))
                    prompt = torch.tensor([[7, 8]]).expand(3, 2)
                    ids = [generate(x, prompt, **options).response_ids for x in (copied, wanted)]
                    assert torch.equal(*ids)
                if isinstance(wanted, EnsembleReward):
                    ids = torch.tensor([[7, 8, 9]])
                    scores = [x(ids, ids > 0) for x in (copied, wanted, model)]
                    assert torch.equal(*scores[:2]) and torch.allclose(*scores[1:])
            assert all(x.is_meta for x in copied.parameters())
            assert all(not x.is_meta for x in model.buffers())
        with whole(plain[0]) as same:
            assert same is plain[0]


def test_whole_yields_the_plain_model_and_frees_it(tmp_path):
    run_ranks(copies, 2, tmp_path)


def references(rank, world):
    """Check adapters in float32 on a bfloat16 base, autocast, and the policy as its reference."""
    plain = lora(Transformer, torch.bfloat16)
    model = copy.deepcopy(plain)
    shard(model, mesh_of())
    tokens, found = collate(share(ROWS), 0), []
    for this in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = this.hidden_states(tokens.input_ids, read=tokens.read)
            with torch.no_grad(), adapters_off(this):
                off = this.hidden_states(tokens.input_ids, read=tokens.read)
                reference = this.token_logprobs(off, tokens.targets).logprobs
            loss = token_loss(this, hidden, tokens)
        loss.backward()
        grads = [whole_tensor(x.grad) for x in this.parameters() if x.requires_grad]
        found.append([hidden, off, reference, loss])
        assert not torch.equal(hidden, off)
        if this is plain:
            for grad in grads:
                dist.all_reduce(grad)
        assert {x.dtype for x in grads} == {torch.float32}
        found[-1] += grads
    assert len(found[0]) > 10 and all(map(torch.equal, *found))


def test_adapters_on_a_16_bit_base_under_autocast_match_to_the_bit(tmp_path):
    run_ranks(references, 2, tmp_path)


def slow_copies(rank, world):
    """Check copies that follow a sharded model, frozen adapters and a normalized head."""
    mesh, policy, model = mesh_of(), tiny(), ilql()
    plain = copy.deepcopy((policy, model))
    for this in (policy, model):
        shard(this, mesh)
    found = []
    for lm, valued in (plain, (policy, model)):
        masked = MaskedPolicy(lm, top_p=0.6, temperature=1.0)
        with torch.no_grad():
            for this in (lm, valued):
                for parameter in this.parameters():
                    parameter.mul_(1.1)
        before = snapshot(masked.lagging)
        follow(masked.lagging, lm, 0.3)
        follow(valued.target_q, valued.q, 0.2)
        found.append([before, masked.lagging.state_dict(), valued.target_q.state_dict()])
        with whole(masked) as copied:
            ids = torch.tensor([[7, 8, 9]]).expand(4, 3)
            rollout = generate(copied, ids, max_new_tokens=6, seeds=torch.arange(4))
        found[-1].append({"ids": rollout.response_ids, "hidden": masked.hidden_states(ids)})
    for a, b in zip(*found):
        assert a.keys() == b.keys() and len(a)
        for name, x in a.items():
            assert torch.equal(x, b[name]) or (name == "hidden" and torch.allclose(x, b[name]))
    assert not torch.equal(found[0][0]["trunk.norm.weight"], found[0][1]["trunk.norm.weight"])
    adapted = [lora(Transformer) for _ in range(2)]
    reward = [tiny(RewardModel) for _ in range(2)]
    shard(adapted[1], mesh)
    shard(reward[1], mesh)
    a, b = (torch.nn.ModuleList(frozen_adapters(x)).state_dict() for x in adapted)
    assert len(a) and all(torch.equal(x, b[name]) for name, x in a.items())
    for scores in reward:
        scores.normalize(0.5, 2.0)
    tokens = collate(ROWS, 0)
    assert torch.allclose(*(x.scores(tokens) for x in reward))
    assert torch.equal(*(whole_copy(x).score.bias for x in reward))


def test_copies_of_a_sharded_model_follow_it(tmp_path):
    run_ranks(slow_copies, 2, tmp_path)


def refusals(rank, world, folder):
    mesh, policy = mesh_of(), tiny()
    shard(policy, mesh)
    critic = ValueModel.from_model(tiny())
    for model, why in (
        (policy, "this Transformer is sharded already"),
        (torch.nn.Linear(2, 2), "Linear cannot be sharded, only models with a trunk"),
    ):
        with pytest.raises(ValueError, match=why):
            shard(model, mesh)
    with pytest.raises(ValueError, match=r"the mesh is \(2,\) with the names None"):
        shard(critic, init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="2 ranks cannot hold 3 copies"):
        mesh_of(3)
    head = ValueModel.from_model(policy, share_trunk=True)
    shard(head, mesh)
    with pytest.raises(ValueError, match="this ValueModel is sharded already"):
        shard(head, mesh)
    policy.save_pretrained(folder)
    read = Transformer.from_pretrained(folder, mesh=mesh)
    with pytest.raises(
        ValueError, match=r"read in pieces on a mesh of \(1, 2\), this one is \(2, 1"
    ):
        shard(read, mesh_of(2))
    with pytest.raises(ValueError, match="weights are in pieces: set shard"):
        make_trainer("sft", read)
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(head.hidden_states(ids), policy.hidden_states(ids))
    assert head(ids, ids > 0).shape == (1, 3)
    for call, why in (
        (lambda: generate(policy, ids, max_new_tokens=2), "with whole"),
        (lambda: policy.resize_embeddings(20), "before"),
        (lambda: add_adapters(policy, LoRAConfig()), "before"),
    ):
        with pytest.raises(ValueError, match=why):
            call()


def test_what_a_sharded_model_cannot_do_is_refused(tmp_path):
    run_ranks(refusals, 2, tmp_path, str(tmp_path / "policy"))
