"""Fixtures of all tests: the backends that an op is tried on, and the data folder.

Without a GPU the Triton kernels run in Triton's interpreter. The choice must come before triton is
first imported.
"""

import contextlib
import gc
import importlib.util
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_helpers import EngineServer
from judge_helpers import JudgeServer
from op_helpers import poison_uninitialised_memory

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
os.environ.pop("RLHF_CORE_BACKEND", None)  # the tests name the backend they mean
gc.disable()  # until the tests are collected


def pytest_collection_finish():
    """What is alive now stays so: the garbage collector need not look at it again and again."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the op tests in Triton's interpreter as slow.

    The quick tests still interpret every kernel in test_traps.py, test_kernels.py, test_masking.py.
    """
    for item in items if not torch.cuda.is_available() else ():
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend == "triton" and item.path.parent.name == "ops" and "traps" not in item.path.name:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    """A cache of our own, because a shared one may hold half a file of a killed process."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter, which does once what it would do again and again."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        import interpreter_helpers

        interpreter_helpers.speed_up()


@pytest.fixture(scope="session", autouse=True)
def bfloat16_on_every_cpu():
    """Let precision bfloat16 round also where trainers would stay in float32 for speed."""
    from rlhf_core import backends

    backends.multiplies_bfloat16 = lambda device: True


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request, monkeypatch):
    """Each backend's name in turn. New tensors are on its device; uninitialised memory is NaN."""
    from rlhf_core import backends

    found = {status.name: status for status in backends.status()}[request.param]
    if not found.available:
        if request.param == "cpp" and os.environ.get("RLHF_CORE_REQUIRE_EXT") == "1":
            pytest.fail(found.reason)
        pytest.skip(f"{request.param}: {found.reason}")
    poison_uninitialised_memory(monkeypatch)
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    if request.param == "triton" and not on_gpu:
        repair_bfloat16_in_interpreter(monkeypatch)
    device = torch.device("cuda") if on_gpu else contextlib.nullcontext()
    # The interpreter computes with numpy, which warns of 0 * inf.
    with device, np.errstate(all="ignore"):
        torch.manual_seed(0)
        yield request.param


def repair_bfloat16_in_interpreter(monkeypatch):
    """Triton's interpreter truncates float32 to bfloat16, and multiplies the bits as integers.

    Every device rounds to nearest even, and multiplies in float32.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(data, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.from_numpy(data.copy()).to("cpu", torch.bfloat16).view(torch.uint16).numpy()

    def upcast(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = torch.from_numpy(x.data.copy()).view(torch.bfloat16)
        return interpreter.TensorHandle(bits.float().numpy(), tl.float32)

    def in_float32(builder, a, b, *rest):
        return dot(builder, upcast(a), upcast(b), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_float32)


@pytest.fixture
def transformers():
    """The transformers library."""
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets, tokenizers and models: RLHF_CORE_DATA, or else ../shared/data."""
    path = Path(
        os.environ.get("RLHF_CORE_DATA") or Path(__file__).parents[1] / ".." / "shared" / "data"
    ).resolve()
    if not path.is_dir():
        pytest.skip(f"no data at {path}; set RLHF_CORE_DATA")
    return path


@pytest.fixture(scope="session")
def expected(data_dir) -> dict:
    """Right values of agreement, ratings, win rates and data checks, by independent libraries."""
    return json.loads((data_dir / "feedback" / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def judge_server(monkeypatch):
    """Starts a `JudgeServer` with the replies; no proxy and no key of the user's is used."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(replies=()):
        servers.append(JudgeServer(replies if callable(replies) else list(replies)))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def engine_server(monkeypatch):
    """Starts an `EngineServer` with a model; no proxy is used."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(model, **options):
        servers.append(EngineServer(model, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
