"""The patch of TRL, on an imitation of its package and, if it is installed, on TRL itself."""

import importlib
import sys
import time

import pytest
import torch

from rlhf_core.integrations import trl as door

UTILS = """
import torch
from ..kernels import ChunkedLogProbFunction as _ChunkedLogProbFunction

calls = []

def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    calls.append("selective_log_softmax")
    found = (logits / temperature).log_softmax(-1)
    found = found.gather(-1, index if index.ndim == logits.ndim else index[..., None])
    found = found if index.ndim == logits.ndim else found[..., 0]
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0)

def entropy_from_logits(logits, chunk_size=128):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)

def selective_log_softmax_and_entropy(
    logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
):
    entropy = entropy_from_logits(logits / temperature)
    entropy = entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0)
    logprobs = selective_log_softmax(logits, index, temperature, row_mask)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()

def score(*arguments):
    return _ChunkedLogProbFunction.apply(*arguments)
"""
KERNELS = """
import torch

ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
calls = []

class ChunkedLogProbFunction:
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size,
                final_logit_softcapping=None, logit_scale=1.0, outputs=ALL):
        pass

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size,
              final_logit_softcapping=None, logit_scale=1.0, outputs=ALL):
        calls.append(outputs)
        z = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias) * logit_scale
        if final_logit_softcapping is not None:
            z = final_logit_softcapping * torch.tanh(z / final_logit_softcapping)
        log_p = (z / temperature).log_softmax(-1)
        found = {
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1).detach(),
            "mean_logits": (z / temperature).mean(-1).detach(),
            "is_top1": z.argmax(-1) == targets,
        }
        logprobs = log_p.gather(-1, targets[:, None])[:, 0]
        return logprobs, *(found[n] if n in outputs else None for n in ALL)
"""
TRAINER = "from ..trainer.utils import selective_log_softmax as logprobs_of, entropy_from_logits\n"
UTIL, KERNEL = "trainer/utils", "kernels/__init__"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Writes a package `trl` with the parts of 1.16 that the patch uses. Sources replace files."""

    def write(**sources):
        files = {
            "trainer/utils": UTILS,
            "kernels/__init__": KERNELS,
            "trainer/dpo_trainer": TRAINER,
        }
        files |= {
            "__init__": "__version__ = '9.9'",
            "trainer/__init__": "",
            "late/__init__": TRAINER,
        } | sources
        for name, source in files.items():
            path = tmp_path / "trl" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return tuple(
            importlib.import_module(f"trl.trainer.{name}") for name in ("dpo_trainer", "utils")
        )

    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    door.unpatch()
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        del sys.modules[name]


def test_functions_are_replaced_wherever_trl_holds_them_and_given_back(fake, monkeypatch):
    trainer, utils = fake()
    monkeypatch.setattr(sys.modules[__name__], "mine", utils.selective_log_softmax, raising=False)
    held = [
        (trainer, "logprobs_of"), (trainer, "entropy_from_logits"),
        (utils, "selective_log_softmax"), (utils, "selective_log_softmax_and_entropy"),
        (utils, "_ChunkedLogProbFunction"),
        (sys.modules["trl.kernels"], "ChunkedLogProbFunction"),
    ]  # fmt: skip
    before = [getattr(*place) for place in held]
    everything = {
        name: dict(vars(module)) for name, module in sys.modules.items() if name.startswith("trl")
    }
    with torch.no_grad():
        door.patch()
    assert sys.modules[__name__].mine is before[2]  # what is not TRL's stays
    now = [getattr(*place) for place in held]
    assert all(getattr(x, "__module__", "").startswith("rlhf_core") for x in now)
    door.patch()
    assert [getattr(*place) for place in held] == now
    late = importlib.import_module("trl.late")
    assert late.logprobs_of is trainer.logprobs_of is now[0]
    door.unpatch()
    assert [getattr(*place) for place in held] == before and late.logprobs_of is before[0]
    for name, attributes in everything.items():
        assert dict(vars(sys.modules[name])).items() >= attributes.items()


def test_the_outer_context_manager_undoes_the_patch_even_after_an_error(fake):
    trainer, _ = fake()
    before = trainer.logprobs_of
    with pytest.raises(ZeroDivisionError), door.patch():
        ours = trainer.logprobs_of
        with door.patch():
            pass
        assert trainer.logprobs_of is ours is not before
        raise ZeroDivisionError
    assert trainer.logprobs_of is before


def test_patched_functions_give_what_they_gave_in_every_form(fake):
    """Temperature, integer masks, several targets, entropy without gradient, other dtypes."""
    _, utils = fake()
    torch.manual_seed(0)
    logits, index = torch.randn(2, 3, 11, requires_grad=True), torch.randint(11, (2, 3))
    several, mask = torch.randint(11, (2, 3, 4)), torch.tensor([[1, 0, 1], [1, 1, 0]])
    hidden, weight, bias = (
        torch.randn(shape, requires_grad=True) for shape in ((6, 8), (11, 8), (11,))
    )
    row = index.flatten()

    def found():
        spread = weight * 1
        spread.ds_id = 0  # as DeepSpeed marks it
        yield utils.selective_log_softmax(logits, index, 0.6, mask)
        yield utils.selective_log_softmax(logits, index, row_mask=mask, temperature=2.0)
        yield utils.selective_log_softmax(logits, several)
        yield utils.selective_log_softmax(logits, several, temperature=0.5)
        yield utils.entropy_from_logits(logits, 2)
        yield utils.selective_log_softmax_and_entropy(logits, index, temperature=0.6, row_mask=mask)
        yield utils.selective_log_softmax_and_entropy(logits, index, False)
        yield utils.score(hidden, weight, None, row, 0.7, 4, None, 2.0, ("log_probs",))
        yield utils.score(hidden, weight, bias, row, 0.7, 4, None, 2.0, ("entropy", "mean_logits"))
        yield utils.score(hidden, weight, bias, row, 1.0, 4, None, 0.5, ("is_top1",))
        yield utils.score(hidden, weight, bias, row, 1.0, 4)
        yield utils.score(hidden, weight, bias, row, 1.0, 4, 1.5, 1.0, ("entropy",))
        yield utils.score(hidden, weight, bias, row, 1.0, 4, None, -1.0, ("entropy",))
        yield utils.score(hidden, weight, bias, row, 1.0, 4, None, 0.0, ("entropy",))
        yield utils.score(hidden, spread, bias, row, 1.0, 4, None, 1.0, ("entropy",))
        yield utils.score(
            hidden, weight.detach().double(), None, row, 1.0, 4, None, 1.0, ("log_probs",)
        )

    def flat(results):
        return [x for r in results for x in ((r,) if isinstance(r, torch.Tensor) else r)]

    def gradients(results):
        total = sum(
            (x * torch.arange(x.numel()).view_as(x)).sum()
            for x in results
            if x is not None and x.requires_grad
        )
        return torch.autograd.grad(total, [logits, hidden, weight, bias])

    expected = flat(found())
    with door.patch():
        theirs, kernels = utils.calls.copy(), sys.modules["trl.kernels"].calls.copy()
        results = flat(found())
        assert len(utils.calls) == len(theirs) + 2  # several targets a row
        assert (
            len(sys.modules["trl.kernels"].calls) == len(kernels) + 5
        )  # sum of squares, soft cap, scale, DeepSpeed
        torch.testing.assert_close(results, expected, rtol=0, atol=1e-5)
        assert [x is not None and x.requires_grad for x in results] == [
            x is not None and x.requires_grad for x in expected
        ]
        torch.testing.assert_close(gradients(results), gradients(expected), rtol=1e-5, atol=1e-4)


def test_without_counted_tokens_the_loss_still_has_a_gradient(fake):
    _, utils = fake()
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    with door.patch():
        logprobs = utils.score(
            hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 4, None, 1.0, ("entropy",)
        )
    logprobs[0].sum().backward()
    assert hidden.grad.shape == (0, 8) and not weight.grad.any()


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        (UTIL, "return -(log_p", "return (log_p", "entropy_from_logits differs .* in its value"),
        (UTIL, "found = (logits", "found = (2 * logits.detach() - logits", "in its gradient"),
        (UTIL, "row_mask=None):\n    calls", "mask=None):\n    calls", "takes logits, .*, mask"),
        (UTIL, "def entropy_from_logits", "def entropy", "entropy_from_logits is missing"),
        (KERNEL, "chunk_size,\n", "width,\n", "ChunkedLogProbFunction takes hidden, weight, bias"),
        (KERNEL, "gather(-1, targets[", "gather(-1, (1 + targets % 36)[", "in its value"),
    ],
)  # fmt: skip
def test_another_trl_is_refused_by_its_difference_and_left_alone(file, old, new, message, fake):
    source = {UTIL: UTILS, KERNEL: KERNELS}[file]
    assert old in source
    wrong = source.replace(old, new)
    if message.endswith("missing"):
        wrong = wrong.replace("entropy_from_logits(logits /", "entropy(logits /")
        trainer, utils = fake(**{file: wrong, "trainer/dpo_trainer": "", "late/__init__": ""})
    else:
        trainer, utils = fake(**{file: wrong})
    before = dict(vars(utils)), dict(vars(trainer))
    with pytest.raises(RuntimeError, match=message) as caught:
        door.patch()
    error = str(caught.value)
    assert "so nothing is replaced (found TRL 9.9). " in error
    assert error.endswith("Install one of the tested versions, 1.12 to 1.16")
    assert (dict(vars(utils)), dict(vars(trainer))) == before


FUNCTIONS = ["selective_log_softmax", "entropy_from_logits"]
FUSED = ["selective_log_softmax_and_entropy", "ChunkedLogProbFunction"]


def test_what_is_replaced_is_returned_and_printed_once(fake, capsys):
    fake()
    done = door.patch()
    assert (done.version, done.replaced, done.kept) == ("9.9", FUNCTIONS + FUSED, {})
    shown = capsys.readouterr().err
    assert shown == str(done) + "\n" and shown.startswith(f"TRL 9.9: replaced {FUNCTIONS[0]}, ")
    assert "this version is not tested (1.12 to 1.16 are)" in shown and "SFTTrainer" not in shown
    again = door.patch()
    assert again.replaced == done.replaced and capsys.readouterr().err == ""
    with again:
        pass
    assert door.patch().replaced == done.replaced and capsys.readouterr().err == ""  # still active


def test_a_function_that_needs_a_gpu_is_left_alone_with_its_error(fake, capsys):
    """As TRL 1.15's, which is a Triton kernel."""
    kernels = KERNELS.replace("calls.append(outputs)", "raise RuntimeError('no driver')")
    _, utils = fake(**{KERNEL: kernels, "__init__": "__version__ = '1.15.2'"})
    before = utils._ChunkedLogProbFunction
    done = door.patch()
    assert done.replaced == [*FUNCTIONS, FUSED[0]] and utils._ChunkedLogProbFunction is before
    shown = capsys.readouterr().err
    assert "ChunkedLogProbFunction, which cannot be checked on a CPU: RuntimeError: no dri" in shown
    assert "SFTTrainer's default loss, and losses on hidden states, stay TRL's own" in shown
    assert "not tested" not in shown


def test_a_trl_without_the_fused_functions_is_patched_partly(fake, capsys):
    older = UTILS.split("def selective_log_softmax_and_entropy")[0].replace(
        "from ..kernels import", "# no"
    )
    older = older.replace("index, temperature=1.0, row_mask=None", "index").replace(
        "logits / temperature", "logits"
    )
    older = older.replace(
        "return found if row_mask is None else found.masked_fill(row_mask == 0, 0)", "return found"
    )
    trainer, utils = fake(**{"trainer/utils": older, "kernels/__init__": ""})
    before = trainer.logprobs_of
    logits, several = torch.randn(2, 3, 11), torch.randint(11, (2, 3, 4))
    with door.patch() as done:
        assert done.replaced == FUNCTIONS and list(done.kept) == FUSED
        shown = capsys.readouterr().err
        assert "not replaced: ChunkedLogProbFunction, which this version lacks" in shown
        assert "SFTTrainer's default loss, and losses on hidden states, stay TRL's own" in shown
        assert trainer.logprobs_of is utils.selective_log_softmax is not before
        torch.testing.assert_close(
            utils.selective_log_softmax(logits, several), before(logits, several)
        )


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"this needs 'trl': pip install 'rlhf-core\[trl\]'"):
        door.patch()


def test_a_dpo_step_of_trl_has_the_same_loss_and_gradient_either_way(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    from benchmarks.peers import theirs
    from benchmarks.peers.task import Task

    task = Task(
        "dpo",
        str(tmp_path),
        vocab_size=997,
        batch_size=3,
        steps=1,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
    )
    task.write()
    held = []
    monkeypatch.setattr(theirs, "_train", lambda trainer, turn: held.append(trainer))
    theirs.train(task, None)
    (trainer,) = held
    inputs, model = next(iter(trainer.get_train_dataloader())), trainer.model
    torch.manual_seed(0)
    with torch.no_grad():  # away from the reference, where every loss is log 2
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)

    def step():
        model.zero_grad()
        start = time.process_time()
        loss = trainer.compute_loss(model, dict(inputs))
        loss.backward()
        seconds = time.process_time() - start
        return (
            float(loss.detach()),
            [p.grad.clone() for p in model.parameters() if p.grad is not None],
            seconds,
        )

    step()
    expected = step()
    with door.patch():
        found = step()
    assert abs(expected[0] - 0.693147) > 1e-3
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    norm = torch.nn.utils.get_total_norm(expected[1])
    assert float(torch.nn.utils.get_total_norm(found[1])) == pytest.approx(float(norm), rel=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5 * float(norm))
    assert step()[0] == expected[0]
    print(f"TRL {trl.__version__}: {expected[2]:.3f} s a step, with our ops {found[2]:.3f} s")
