"""Over-optimisation of a weak reward model (Gao et al. 2022), by PPO and by best-of-n.

With a reward model of few pairs, the gold score rises and then falls, while the reward model's own
score, the proxy, keeps rising. PPO runs without a KL penalty.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.overoptimisation --seeds 0 1 2

Each seed's curves are written to its folder in --out, and a picture of all. Both scores are counted
from SFT's mean, in standard deviations of SFT's scores.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.learning.setup import Setup, add_arguments, check_data, prepare
from rlhf_core.demo import evaluated, fitted_reward_model
from rlhf_core.evaluation import best_of_n_curve, best_of_n_kl
from rlhf_core.files import read_json, require, write_json
from rlhf_core.models import RewardModel
from rlhf_core.trainers import PPOConfig, PPOTrainer, SamplingConfig, best_of_n

SETTINGS = {  # num_pairs trains the reward model; prompts and num_samples are for best-of-n
    "replies": dict(
        num_pairs=30,
        reward=dict(epochs=30, batch_size=32, warmup_steps=0),
        ppo=dict(lr=1e-4, max_steps=50, kl_coef=0.0),
        prompts=9,
        num_samples=512,
    ),
    "stories": dict(
        num_pairs=100,
        reward=dict(epochs=12, batch_size=32),
        ppo=dict(lr=2e-4, max_steps=60, kl_coef=0.0),
        prompts=32,
        num_samples=512,
    ),
}
EVERY = 2  # PPO steps between points


class Scale:
    """Maps gold and proxy scores to standard deviations above SFT's mean."""

    def __init__(self, gold: Tensor, proxy: Tensor):
        self.moments = [(x.mean(), x.std()) for x in (gold, proxy)]

    def __call__(self, gold: Tensor, proxy: Tensor) -> tuple[float, float]:
        """Means of scores (N,), mapped."""
        return tuple(
            ((x.mean() - mean) / std).item() for x, (mean, std) in zip((gold, proxy), self.moments)
        )


def ppo_curve(setup: Setup, reward_model: RewardModel, settings: dict) -> list[dict]:
    """KL, gold and proxy of one run at the start and every few steps."""
    task = setup.task

    def scores(policy):
        found = evaluated(task, setup.base, policy, setup.seed)
        return found, setup.scores(task.eval_prompts, found.response_ids, reward_model)

    found, proxy = scores(setup.base)
    scale, points = Scale(found.scores, proxy), [dict(step=0, kl=0.0, gold=0.0, proxy=0.0)]

    class Watched(PPOTrainer):
        def step(self, batch: list) -> dict[str, float]:
            report = super().step(batch)
            if (self.steps_done + 1) % EVERY == 0:
                found, proxy = scores(self.model)
                gold, proxy = scale(found.scores, proxy)
                points.append(
                    dict(
                        step=self.steps_done + 1, kl=found.kl.mean().item(), gold=gold, proxy=proxy
                    )
                )
            return report

    fixed = dict(
        temperature=1.0,
        response_length=task.response_length,
        lr_schedule="constant",
        seed=setup.seed,
    )
    options = dict(reward=reward_model, reference=setup.base, **setup.shared)
    Watched(setup.policy(), task.prompts, PPOConfig(**fixed, **settings), **options).train()
    return points


def best_of_n_points(
    setup: Setup, reward_model: RewardModel, prompts: int, num_samples: int
) -> list[dict]:
    """KL, gold and proxy for n = 1, 2, 4, ..., estimated from all samples of each prompt."""
    task = setup.task
    config = SamplingConfig(
        num_samples=num_samples,
        response_length=task.response_length,
        batch_size=1,
        seed=setup.seed + 1,
    )
    prompts = list(dict.fromkeys(map(tuple, task.eval_prompts)))[:prompts]
    found = best_of_n(setup.base, prompts, config, reward=reward_model, **setup.shared)
    decode = task.tokenizer.decode
    gold = [
        task.gold([decode(p)] * num_samples, list(map(decode, r)))
        for p, r in zip(found.prompts, found.responses)
    ]
    gold, proxy = torch.tensor(gold), found.scores
    curves = best_of_n_curve(proxy, gold), best_of_n_curve(proxy, proxy)
    scale, points, n = Scale(gold, proxy), [], 1
    while n <= num_samples:
        at = scale(*(curve[n - 1] for curve in curves))
        points.append(dict(n=n, kl=best_of_n_kl(n), gold=at[0], proxy=at[1]))
        n *= 2
    return points


def curves(
    setup: Setup, num_pairs: int, reward: dict, ppo: dict, prompts: int, num_samples: int
) -> dict:
    """Train a reward model on num_pairs pairs. Returns its accuracy on others, and the curves."""
    task = replace(setup.task, reward=replace(setup.task.reward, **reward))
    pairs, rest = setup.pairs[:num_pairs], setup.pairs[num_pairs : num_pairs + 512]
    reward_model, report = fitted_reward_model(task, setup.base, pairs, rest, setup.seed)
    reward_model.requires_grad_(False)
    return {
        "accuracy": report["eval_accuracy"],
        "ppo": ppo_curve(setup, reward_model, ppo),
        "best_of_n": best_of_n_points(setup, reward_model, prompts, num_samples),
    }


def draw(results: list[dict], path: Path) -> None:
    """Plot both methods against sqrt(KL), with thin lines for seeds and thick ones for means."""
    plt = require("matplotlib.pyplot", "report")
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=False, layout="constrained")
    for panel, method, title in zip(
        panels, ("ppo", "best_of_n"), ("PPO, no KL penalty", "best of n")
    ):
        for name, colour in (("proxy", "tab:orange"), ("gold", "tab:blue")):
            runs = [[(point["kl"], point[name]) for point in result[method]] for result in results]
            for run in runs:
                kl, score = torch.tensor(run).unbind(dim=1)
                panel.plot(kl.clamp_min(0).sqrt(), score, color=colour, alpha=0.3, linewidth=0.8)
            kl, score = torch.tensor(runs).mean(dim=0).unbind(dim=1)
            panel.plot(kl.clamp_min(0).sqrt(), score, color=colour, linewidth=2, label=name)
        panel.axhline(0, color="grey", linewidth=0.5)
        panel.set(title=title, xlabel="√KL to SFT, √nats", ylabel="score above SFT's mean, s.d.")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.overoptimisation",
        description=__doc__.split("\n")[0],
    )
    add_arguments(parser, SETTINGS)
    arguments = parser.parse_args()
    check_data(parser, arguments)
    out, results = arguments.out / arguments.task, []
    for seed in arguments.seeds:
        folder = out / f"seed-{seed}"
        file, settings = folder / "overoptimisation.json", SETTINGS[arguments.task]
        if not (file.exists() and read_json(file)["settings"] == settings):
            setup = prepare(arguments.task, arguments.data, seed, folder / "setup")
            write_json(file, {"settings": settings, **curves(setup, **settings)})
        results.append(read_json(file))
    draw(results, out / "overoptimisation.png")


if __name__ == "__main__":
    main()
