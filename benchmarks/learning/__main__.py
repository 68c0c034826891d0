"""Trains with every method on one of the demo's tasks and compares the gold scores.

    OMP_NUM_THREADS=1 python -m benchmarks.learning --task replies --seeds 0 1 2 --out runs/learning

Results in --out with the same settings are kept, so that an interrupted run can continue.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.learning.methods import METHODS, PEERS
from benchmarks.learning.setup import add_arguments, check_data, measure, prepare
from rlhf_core.files import read_json, write_json

# Lowest gain expected, in standard deviations of SFT's gold scores; 0 for the other methods.
GAINS = {"PPO": 1.0, "DPO": 1.0}
HEAD = (
    "method",
    "gold ± s.e.",
    "gain, s.d.",
    "RM score",
    "KL, nats",
    "win rate",
    "sampled, k",
    "trained, k",
    "s",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__.split("\n")[0]
    )
    add_arguments(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS | PEERS,
        default=METHODS,
        metavar="METHOD",
        help=f"some of {'; '.join(METHODS | PEERS)}; default: all but TRL's, which need it",
    )
    arguments = parser.parse_args()
    check_data(parser, arguments)
    out = arguments.out / arguments.task
    for seed in arguments.seeds:
        learn(arguments.task, arguments.data, seed, arguments.methods, out / f"seed-{seed}")
    results = read_results(out, arguments.seeds)
    print(table(results), *missed(results), sep="\n")


def learn(task: str, data: Path | None, seed: int, methods: list[str], folder: Path) -> None:
    """Run the methods without a result in the folder, and write each result to its own file."""
    setup = None
    folder.mkdir(parents=True, exist_ok=True)
    for name in methods:
        method = (METHODS | PEERS)[name]
        settings, file = method.settings(task), folder / f"{name}.json"
        if file.exists() and read_json(file)["settings"] == settings:
            continue
        setup = setup or prepare(task, data, seed, folder / "setup")
        result = measure(setup, method.run, settings)
        write_json(file, {"method": name, "settings": settings, **result})
        print(
            f"{task} seed {seed}: {name}: gold {result['gold']:.3f}, {result['seconds']:.0f} s",
            flush=True,
        )


def read_results(out: Path, seeds: list[int]) -> dict[str, list[dict]]:
    """The results in the folder, one for each method and seed."""
    files = {
        name: {seed: out / f"seed-{seed}" / f"{name}.json" for seed in seeds}
        for name in METHODS | PEERS
    }
    found = {
        name: [{"seed": seed, **read_json(file)} for seed, file in paths.items() if file.exists()]
        for name, paths in files.items()
    }
    return {name: results for name, results in found.items() if results}


def table(results: dict[str, list[dict]]) -> str:
    """A Markdown table: means over seeds; gains in standard deviations of SFT's gold scores."""
    base = results["SFT"]
    lines = [f"| {' | '.join(HEAD)} |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    for name, seeds in results.items():
        short = "" if len(seeds) == len(base) else f" ({len(seeds)} of {len(base)} seeds)"
        gold, error = mean(seeds, "gold"), standard_error(seeds)
        columns = [
            name + short,
            f"{gold:.2f} ± {error:.2f}",
            f"{gain(seeds, base):+.2f}",
            f"{mean(seeds, 'reward'):.2f}",
            f"{round(mean(seeds, 'kl'), 1) + 0.0:.1f}",
            f"{mean(seeds, 'win_rate'):.3f}",
            f"{mean(seeds, 'sampled') / 1000:.0f}",
            f"{mean(seeds, 'trained') / 1000:.0f}",
            f"{mean(seeds, 'seconds'):.0f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def missed(results: dict[str, list[dict]]) -> list[str]:
    """A sentence for each method that gained less than expected."""
    gains = {name: gain(seeds, results["SFT"]) for name, seeds in results.items()}
    short = {name: g for name, g in gains.items() if g < GAINS.get(name, 0.0)}
    return [
        f"{name} gained {g:.2f}, less than the expected {GAINS.get(name, 0.0):.2f}"
        for name, g in short.items()
    ]


def gain(results: list[dict], base: list[dict]) -> float:
    """Gain of the mean gold score over SFT with the same seeds, in deviations of SFT's scores."""
    base = [result for result in base if result["seed"] in {r["seed"] for r in results}]
    return (mean(results, "gold") - mean(base, "gold")) / mean(base, "gold_sd")


def mean(results: list[dict], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def standard_error(results: list[dict]) -> float:
    """Standard error of the mean gold score, over seeds, or over prompts if there is one seed.

    Every seed is an independent run with its own prompts and samples.
    """
    if len(results) == 1:
        return results[0]["gold_error"]
    return statistics.stdev(result["gold"] for result in results) / len(results) ** 0.5


if __name__ == "__main__":
    main()
