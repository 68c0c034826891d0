"""Runs every method on the demo's tasks and prints what it brought, by gold.

    OMP_NUM_THREADS=1 python -m benchmarks.learning --task replies --seeds 0 1 2 --out runs/learning

A result that is in --out with the same settings is not made again, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.learning.methods import METHODS
from benchmarks.learning.setup import TASKS, measure, prepare
from rlhf_core.files import read_json, write_json

GAINS = {
    "PPO": 1.0,
    "DPO": 1.0,
}  # least gain asked for, in deviations of SFT's gold; 0 of all others
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
    parser.add_argument("--task", choices=TASKS, default="replies")
    parser.add_argument("--data", type=Path, help="stories: folder as for rlhf-core demo --real")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    if arguments.task == "stories" and arguments.data is None:
        parser.error("--task stories needs --data")
    out = arguments.out / arguments.task
    for seed in arguments.seeds:
        learn(arguments.task, arguments.data, seed, arguments.methods, out / f"seed-{seed}")
    results = read_results(out, arguments.seeds)
    print(table(results), *missed(results), sep="\n")


def learn(task: str, data: Path | None, seed: int, methods: list[str], folder: Path) -> None:
    """Run those methods whose result is not in the folder, each into a file of its own there."""
    setup = None
    folder.mkdir(parents=True, exist_ok=True)
    for name in methods:
        method = METHODS[name]
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
    """Of each method the results that are there, one a seed."""
    files = {
        name: {seed: out / f"seed-{seed}" / f"{name}.json" for seed in seeds} for name in METHODS
    }
    found = {
        name: [{"seed": seed, **read_json(file)} for seed, file in paths.items() if file.exists()]
        for name, paths in files.items()
    }
    return {name: results for name, results in found.items() if results}


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: a line a method, means over its seeds; gain in deviations of SFT's gold scores."""
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
    """The methods that gained less than was asked for, in words."""
    gains = {name: gain(seeds, results["SFT"]) for name, seeds in results.items()}
    short = {name: g for name, g in gains.items() if g < GAINS.get(name, 0.0)}
    return [
        f"{name} gained {g:.2f}, and was to gain {GAINS.get(name, 0.0):.2f}"
        for name, g in short.items()
    ]


def gain(results: list[dict], base: list[dict]) -> float:
    """Of the mean gold score, in deviations of SFT's; of the seeds that are there, beside the same seeds of SFT."""
    base = [result for result in base if result["seed"] in {r["seed"] for r in results}]
    return (mean(results, "gold") - mean(base, "gold")) / mean(base, "gold_sd")


def mean(results: list[dict], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def standard_error(results: list[dict]) -> float:
    """Of the mean gold score. A seed is a run of everything, with prompts and samples of its own, so the
    deviation of the seeds' means over the root of their number; of one seed the same of its prompts."""
    if len(results) == 1:
        return results[0]["gold_error"]
    return statistics.stdev(result["gold"] for result in results) / len(results) ** 0.5


if __name__ == "__main__":
    main()
