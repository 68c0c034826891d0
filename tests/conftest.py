"""What the tests share: the backends an op is tried on, the one table of tolerances, and the data folder.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is first imported.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # which a job in the background begins without
os.environ.pop("RLHF_CORE_BACKEND", None)  # the tests name the backend they mean

# (relative, absolute) error allowed on top of the error that the float32 reference itself makes.
TOLERANCES = {
    "value": (5e-7, 5e-6),  # float32 results in nats or in units of reward
    torch.float32: (
        2e-6,
        2e-6,
    ),  # gradients, by the dtype they are stored in: half a unit in the last place
    torch.bfloat16: (2**-8, 2e-6),
    torch.float16: (2**-11, 2e-6),
}


def assert_as_accurate(got, reference, truth, kind="value"):
    """|got - truth| <= |reference - truth| + tolerance, with NaN and infinities exactly where the truth has them.

    The reference is itself within a percent of the truth: a wrong one would allow every backend to be as wrong.
    """
    got, reference, truth = got.double(), reference.double(), truth.double()
    special = ~truth.isfinite()
    torch.testing.assert_close(got[special], truth[special], rtol=0, atol=0, equal_nan=True)
    relative, absolute = TOLERANCES[kind]
    got, reference, truth = got[~special], reference[~special], truth[~special]
    error = (reference - truth).abs()
    assert (error <= 1e-4 + 0.01 * truth.abs()).all(), (
        f"the reference is off by {error.nan_to_num(torch.inf).max():.2g}"
    )
    excess = (got - truth).abs() - error - absolute - relative * truth.abs()
    assert not (excess > 0).any() and not got.isnan().any(), (
        f"{excess.max():.2g} beyond the tolerance"
    )


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """Our own: one that users share may hold half a file of a process that was killed while it compiled."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, monkeypatch):
    """Each backend's name in turn. Tensors are created where it runs, and uninitialised memory is NaN."""
    from rlhf_core import backends

    found = {status.name: status for status in backends.status()}[request.param]
    if not found.available:
        if request.param == "cpp" and os.environ.get("RLHF_CORE_REQUIRE_EXT") == "1":
            pytest.fail(found.reason)
        pytest.skip(f"{request.param}: {found.reason}")
    poison_uninitialised_memory(monkeypatch)
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    if request.param == "triton" and not on_gpu:
        round_to_nearest_in_interpreter(monkeypatch)
    device = torch.device("cuda") if on_gpu else contextlib.nullcontext()
    with (
        device,
        np.errstate(all="ignore"),
    ):  # the interpreter computes with numpy, which warns of 0 * inf
        torch.manual_seed(0)
        yield request.param


def poison_uninitialised_memory(monkeypatch):
    """A kernel that forgets to write an output must not find zeros there."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def round_to_nearest_in_interpreter(monkeypatch):
    """Triton's interpreter truncates float32 to bfloat16; every device rounds to nearest even."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.from_numpy(data.copy()).to("cpu", torch.bfloat16).view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


@pytest.fixture
def transformers(monkeypatch):
    """`python -m pytest` puts the repository on the path, whose kernels/ would pass for a package they look for."""
    root = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != root])
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets, tokenizers and models: RLHF_CORE_DATA, else ../shared/data beside the repository."""
    path = Path(
        os.environ.get("RLHF_CORE_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data"
    ).resolve()
    if not path.is_dir():
        pytest.skip(f"no data at {path}; set RLHF_CORE_DATA")
    return path
