"""Generation against transformers' `generate`, in turns, on the same weights, prompts and lengths.

    OMP_NUM_THREADS=2 python -m benchmarks.peers.generation --json generation.json

Theirs is the fastest of three: the default cache, a static one, and a static one under
torch.compile. The gain from dropping ended rows is measured between two runs of ours. In one,
random ids that make up 1/16 of the tokens end a row, on average after a quarter of its length. In
the other, no id does, and all rows are as long as the longest response of the first run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor

from rlhf_core.generation import generate
from rlhf_core.models import Transformer
from rlhf_core.rollout import response_logprobs, sample

PROMPT, RESPONSE, VOCAB = 16, 64, {"gpt2": 50257, "llama": 32000}
BATCH = {"stories260k": 64, "gpt2": 16, "llama": 8}
BARS = {"stories260k": 4.0, "gpt2": 3.0, "llama": 1.5}
DROPPING_BAR = 2.0
LOGPROB_TOLERANCE = 5e-5


def theirs_and_ours(name: str, data: Path | None, **sizes):
    """The model in both libraries. `sizes` override fields of its config."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = (
            dict(vocab_size=VOCAB[name], n_embd=256, n_layer=4, n_head=4, n_positions=256) | sizes
        )
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    elif name == "llama":
        config = dict(
            vocab_size=VOCAB[name], hidden_size=512, num_hidden_layers=8, num_attention_heads=8
        )
        config |= (
            dict(num_key_value_heads=4, intermediate_size=1376, max_position_embeddings=256) | sizes
        )
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    else:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(data / "models" / name)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs.eval(), Transformer.from_pretrained(folder).eval()


def generators(theirs, prompts: Tensor, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Their ways to sample exactly `tokens` tokens for each row from softmax(logits)."""

    def run(**options):
        options |= dict(
            do_sample=True, top_k=0, top_p=1.0, min_new_tokens=tokens, max_new_tokens=tokens
        )
        return theirs.generate(
            prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options
        )

    def compiled():
        eager = theirs.forward
        try:
            theirs.forward = graph
            return run(cache_implementation="static")
        finally:
            theirs.forward = eager

    graph = torch.compile(theirs.forward)
    return {
        "default": run,
        "static": lambda: run(cache_implementation="static"),
        "static, compiled": compiled,
    }


def in_turns(variants: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant per round, after a warm-up. Each round has another first variant."""
    names, seconds = list(variants), {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            variants[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def check(ours: Transformer, theirs, prompts: Tensor, tokens: int) -> None:
    """Raise AssertionError if the sampled log-probs are not those of our or their forward pass."""
    rollout = sample(ours, prompts.tolist(), max_new_tokens=tokens, eos_ids=())
    with torch.no_grad():
        apart = float((response_logprobs(ours, rollout)[0] - rollout.logprobs).abs().max())
        logits = theirs(rollout.input_ids).logits[:, prompts.shape[1] - 1 : -1]
    assert apart < LOGPROB_TOLERANCE, f"log-probs differ from a training forward by {apart:.1e}"
    expected = logits.log_softmax(-1).gather(-1, rollout.response_ids[..., None])[..., 0]
    assert (expected - rollout.logprobs).abs().max() < LOGPROB_TOLERANCE


def ends(response_ids: Tensor) -> tuple[int, ...]:
    """Random ids that make up 1/16 of the tokens of the responses."""
    counts, chosen, held = response_ids.flatten().bincount(), [], 0
    for token in torch.randperm(len(counts), generator=torch.Generator().manual_seed(0)).tolist():
        if held + int(counts[token]) <= response_ids.numel() / 16:
            chosen, held = [*chosen, token], held + int(counts[token])
    return tuple(chosen)


def measure(name: str, data: Path | None, batch: int, tokens: int, rounds: int, **sizes) -> dict:
    theirs, ours = theirs_and_ours(name, data, **sizes)
    prompts = torch.randint(3, 500, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    check(ours, theirs, prompts, tokens)
    seeds, failed, ways = torch.arange(batch), {}, generators(theirs, prompts, tokens)
    for way in list(ways):
        try:
            ways[way]()
        except Exception as error:  # reported below the table
            failed[way] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del ways[way]
    ways["ours"] = lambda: generate(ours, prompts, max_new_tokens=tokens, eos_ids=(), seeds=seeds)
    seconds = in_turns(ways, rounds)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    best = min((way for way in medians if way != "ours"), key=medians.get)

    whole = ways["ours"]()
    stops = ends(whole.response_ids)

    def ours_with(max_new_tokens: int, eos_ids: tuple[int, ...]):
        return generate(ours, prompts, max_new_tokens=max_new_tokens, eos_ids=eos_ids, seeds=seeds)

    lengths = ours_with(tokens, stops).response_mask.sum(dim=1)
    longest = int(lengths.max())
    dropped, kept = lambda: ours_with(tokens, stops), lambda: ours_with(longest, ())
    dropping = in_turns({"dropped": dropped, "kept": kept}, rounds)
    return {
        "model": name,
        "batch": batch,
        "tokens": tokens,
        "seconds": seconds | dropping,
        "failed": failed,
        "best": best,
        "ratio": medians[best] / medians["ours"],
        "mean_length": float(lengths.float().mean()),
        "dropping_ratio": statistics.median(dropping["kept"])
        / statistics.median(dropping["dropped"]),
    }


COLUMNS = ("model, rows x tokens", "ours, ms a step", "theirs, fastest first", "ratio", "bar")
COLUMNS += ("dropping ended rows", "bar")
HEAD = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]


def row(result: dict) -> str:
    def ms(way: str) -> str:
        return f"{statistics.median(result['seconds'][way]) / result['tokens'] * 1e3:.2f}"

    def met(ratio: float, bar: float) -> str:
        return f"{bar:g} {'met' if ratio >= bar else 'missed'}"

    others = result["seconds"].keys() - {"ours", "dropped", "kept"}
    fastest_first = sorted(others, key=lambda way: statistics.median(result["seconds"][way]))
    theirs = [f"{ms(way)} {way}" for way in fastest_first]
    theirs += [f"{way} failed" for way in result["failed"]]
    ratio, dropping = result["ratio"], result["dropping_ratio"]
    cells = [f"{result['model']}, {result['batch']} x {result['tokens']}", ms("ours")]
    cells += ["; ".join(theirs), f"{ratio:.2f}", met(ratio, BARS[result["model"]])]
    cells += [f"{dropping:.2f} at {result['mean_length']:.0f} tokens on average"]
    return f"| {' | '.join(cells)} | {met(dropping, DROPPING_BAR)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.generation", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--models", nargs="+", choices=BATCH, default=list(BATCH), help="default: all"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        help="folder that holds models/stories260k; default: ../shared/data",
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed rounds, after a warm-up; default: 7"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    results = []
    print("\n".join(HEAD))
    for name in arguments.models:
        results.append(measure(name, arguments.data, BATCH[name], RESPONSE, arguments.rounds))
        print(row(results[-1]), flush=True)
        for way, error in results[-1]["failed"].items():
            print(f"\n{name}: {way}: {error}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
