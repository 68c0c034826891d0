"""The documentation quotes code, options, links and error messages that exist."""

import ast
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlhf_core.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = {name: page.read_text(encoding="utf-8") for name, page in zip(NAMES, PAGES)}
FENCE = re.compile(r"^```(\w*)(?: title=\"(\S+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELISION = "# ..."


def blocks(language, titled):
    """(page, title, code) of every code block."""
    return [
        (name, title, code)
        for name, text in TEXTS.items()
        for found, title, code in FENCE.findall(text)
        if found == language and bool(title) == titled
    ]


def prose(name):
    return FENCE.sub("", TEXTS[name])


# ---- code


@pytest.mark.parametrize("name, path, code", blocks("python", titled=True))
def test_quoted_code_is_in_its_file(name, path, code):
    """A line `# ...` in a quotation stands for lines left out."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    at = 0
    for part in re.split(rf"^\s*{ELISION}\n", code, flags=re.MULTILINE):
        part = textwrap.dedent(part).splitlines()
        starts = [
            i
            for i in range(at, len(lines) - len(part) + 1)
            if textwrap.dedent("\n".join(lines[i : i + len(part)])).splitlines() == part
        ]
        assert starts, f"{name} quotes lines that {path} does not have:\n" + "\n".join(part)
        at = starts[0] + len(part)


@pytest.mark.parametrize("name, _, code", blocks("python", titled=False))
def test_python_compiles_and_imports_names_that_exist(name, _, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "rlhf_core":
            module = importlib.import_module(node.module)
            for alias in node.names:
                missing = not hasattr(module, alias.name)
                if missing:
                    importlib.import_module(f"{node.module}.{alias.name}")


def recipe(word):
    """The names that the one code block with this word defines."""
    (code,) = (x for _, _, x in blocks("python", titled=False) if word in x)
    names = {}
    exec(compile(code, "kernels.md", "exec"), names)
    return names


def test_the_recipe_of_the_ops_runs(capsys):
    recipe("backends.report()")
    assert "reference" in capsys.readouterr().out


def test_the_recipe_for_a_training_loop_is_cross_entropy():
    torch.manual_seed(0)
    x, head = torch.randn(2, 5, 8, requires_grad=True), nn.Linear(8, 11, bias=False)
    targets = torch.tensor([[1, -1, 3, 4, 5], [-1, -1, 0, 10, 2]])
    loss = recipe("def loss_of")["loss_of"](x, head, targets)
    expected = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x, head.weight)), torch.autograd.grad(expected, (x, head.weight))
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_the_recipe_of_a_split_head_runs(tmp_path):
    (code,) = (x for _, _, x in blocks("python", titled=False) if "init_process_group" in x)
    (tmp_path / "head.py").write_text(code, encoding="utf-8")
    assert "torchrun --standalone --nproc-per-node 2 head.py" in TEXTS["docs/guides/kernels.md"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*command, "--nproc-per-node", "2", "head.py"], cwd=tmp_path, capture_output=True,
        text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = re.findall(r"rank (\d): (\d+) rows, difference (\d+e[-+]\d+)", run.stdout)
    assert sorted(x[:2] for x in found) == [("0", "25129"), ("1", "25128")]
    assert all(float(x[2]) < 1e-4 for x in found)


def test_the_recipe_for_a_transformers_model_gives_its_log_probs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, hidden_size=8, intermediate_size=16, num_hidden_layers=1)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    ids, mask = torch.randint(19, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    completion = torch.arange(6).expand(2, 6) >= 3
    logprobs = recipe("def completion_logprobs")["completion_logprobs"](
        model, ids, mask, completion
    )
    expected = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs, expected * completion[:, 1:])


@pytest.fixture(scope="module")
def options_of():
    """A command's help, computed once."""
    texts = {}

    def options(command, capsys):
        if command not in texts:
            with pytest.raises(SystemExit) as stop:
                main([command, "--help"])
            texts[command] = capsys.readouterr().out
            assert stop.value.code == 0
        return set(re.findall(r"--[a-z][a-z0-9-]*", texts[command]))

    return options


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_their_options_exist(name, options_of, capsys):
    text = re.sub(r"\\\n", " ", TEXTS[name])
    for command, rest in re.findall(r"rlhf-core ([a-z][a-z0-9-]*)([^\n`#|]*)", text):
        known = options_of(command, capsys)
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest):
            assert option in known, f"{name}: rlhf-core {command} has no {option}"


# ---- links


def anchors(page):
    """The ids of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading) for heading in headings)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", x).strip().lower()) for x in plain}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}: no such heading"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS)}\n" in navigation


# ---- completeness


def modules():
    for file in sorted(ROOT.glob("rlhf_core/**/*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if not any((ROOT / Path(*parts[:n])).is_symlink() for n in range(1, len(parts))):
            yield file, ".".join(parts)


def test_every_module_is_in_the_reference_and_on_the_map():
    reference = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("api/*.md"))
    listed = set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE))
    existing = {module for _, module in modules()} | {
        module.removesuffix(".__init__") for _, module in modules()
    }
    assert listed <= existing
    for file, module in modules():
        if file.name not in ("__init__.py", "__main__.py"):
            assert file.name in TEXTS["docs/map.md"], f"{file} is missing from docs/map.md"
            private = module.split(".")[1] == "cli"
            assert module in listed or private, f"{module} is missing from docs/api"


def messages():
    """Every string of the library, f-strings with their values left out."""
    for file in [*ROOT.glob("rlhf_core/**/*.py"), *ROOT.glob("kernels/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_of_the_faq_exists():
    """A heading in the FAQ quotes a message; <...> stands for a value in it."""
    corpus = "\n".join(messages())
    quoted = re.findall(r"^### `(.+)`$", TEXTS["docs/faq.md"], re.MULTILINE)
    assert len(quoted) >= 20
    for message in quoted:
        for part in re.split(r"<[^<>]*>", message):
            assert part.strip() in corpus, f"no message of the library says {part!r}"
