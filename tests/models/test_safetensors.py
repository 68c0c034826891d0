"""Files are read in pieces that add up; a damaged one is refused by name; nothing is held twice."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from helpers import GPT2

from rlhf_core.models import safetensors as ours

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def example():
    torch.manual_seed(0)
    tensors = {f"{dtype}".removeprefix("torch."): torch.randn(5, 3).to(dtype) for dtype in DTYPES}
    return tensors | {
        "empty": torch.zeros(0, 4),
        "long": torch.randn(1001),
        "名前": torch.randn(2, 3, 4),
    }


def read(path):
    tensors = {}
    for name, stored in ours.stored_tensors(path).items():
        tensors[name] = torch.full(stored.shape, torch.nan, dtype=ours.DTYPES[stored.dtype])
        stored.copy_to(tensors[name])
    return tensors


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize("piece_bytes", [1, 50, 16 * 2**20])
def test_files_are_read_and_written_whole_whatever_the_pieces(piece_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "PIECE_BYTES", piece_bytes)
    safetensors.torch.save_file(example(), tmp_path / "theirs", metadata={"format": "pt"})
    assert equal(read(tmp_path / "theirs"), example())
    ours.write_tensors(tmp_path / "ours", example())
    assert equal(safetensors.torch.load_file(tmp_path / "ours"), example())
    assert equal(read(tmp_path / "ours"), example())
    with safetensors.safe_open(tmp_path / "ours", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # without which transformers does not read it


def test_texts_are_kept_beside_tensors_of_any_kind(tmp_path):
    tensors = example() | {"bytes": torch.arange(5, dtype=torch.uint8), "scalar": torch.tensor(3)}
    ours.write_tensors(tmp_path / "x", tensors, {"note": "\u00e9t\u00e9"})
    texts, got = ours.read_tensors(tmp_path / "x")
    assert texts["note"] == "\u00e9t\u00e9" and equal(got, tensors)


def test_views_are_written_and_filled_as_the_tensors_that_they_are(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    ours.write_tensors(
        tmp_path / "x", {"transposed": whole.t(), "columns": whole[:, 1:3], "rows": whole[1:]}
    )
    assert equal(
        safetensors.torch.load_file(tmp_path / "x"),
        {
            "transposed": whole.t().contiguous(),
            "columns": whole[:, 1:3].contiguous(),
            "rows": whole[1:],
        },
    )
    target = torch.zeros(4, 6, dtype=torch.bfloat16)
    ours.stored_tensors(tmp_path / "x")["transposed"].copy_to(target.t())
    assert torch.equal(target, whole.bfloat16())


def test_a_file_cut_anywhere_is_refused_before_anything_is_read(tmp_path):
    ours.write_tensors(tmp_path / "x", example())
    whole = (tmp_path / "x").read_bytes()
    for damaged in (
        *(whole[:length] for length in [*range(32), *range(32, len(whole), 97), len(whole) - 1]),
        whole + b"0",
    ):
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(ValueError, match="x: cannot be read, damaged or cut short"):
            ours.stored_tensors(tmp_path / "x")


def test_a_dtype_that_is_no_float_is_refused_when_it_is_read(tmp_path):
    safetensors.torch.save_file({"q": torch.ones(4, dtype=torch.int8)}, tmp_path / "x")
    with pytest.raises(
        ValueError, match=re.escape("x: tensor 'q' is stored as I8, not as F64, F32, F16, BF16")
    ):
        ours.stored_tensors(tmp_path / "x")["q"].copy_to(torch.empty(4))


MEASURED = """
import re, sys, torch
from rlhf_core.models import Transformer
def peak(): return 1024 * int(re.search("VmHWM:[ \\t]*(\\d+)", open("/proc/self/status").read())[1])
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
Transformer.from_pretrained(folder + "/small", dtype).save_pretrained(folder + "/out")
before = peak()
model = Transformer.from_pretrained(folder + "/large", dtype)
loaded = peak()
model.save_pretrained(folder + "/out")
saved = peak()
size = sum(p.nbytes for p in model.parameters())
print((loaded - before) / size, (saved - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow
@pytest.mark.parametrize("family, dtype", [("gpt2", "float32"), ("llama", "bfloat16")])
def test_loading_and_saving_take_little_more_memory_than_the_model(family, dtype, tmp_path):
    """As the system measures it, with mapped files, in a new process; the file is float32.

    GPT-2's files hold transposed matrices, which are copies; bfloat16 is converted piece by piece.
    """
    from rlhf_core.models import Transformer, TransformerConfig

    options = dict(num_layers=2, num_heads=4, tie_embeddings=False)
    options |= GPT2 if family == "gpt2" else {}
    Transformer(TransformerConfig(16, 16, **options)).save_pretrained(tmp_path / "small")
    width = 1024 if dtype == "float32" else 1408
    Transformer(TransformerConfig(8000, width, **options)).save_pretrained(tmp_path / "large")
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-c", MEASURED, str(tmp_path), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded, saved = map(float, done.stdout.split())
    assert 0.9 < loaded <= 1.2
    assert saved <= (1.2 if family == "llama" else 2)
