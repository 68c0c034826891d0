import pytest

from rlhf_core.benchmarks import ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def expected():
    return {name: ranks.result_of(name) for name in ranks.CASES}


# Two processes run every method. The others run cases that hold or exchange other tensors.
SHARDED = [
    *("sft, untied, checkpointing", "reward, steps", "dpo, lora", "ilql", "distill"),
    *("ppo", "ppo, critic head, lora", "ppo, reference ema", "nlpo", "trpo", "grpo, dapo"),
    *("online dpo", "iterated dpo", "iterated rlhf"),
]


@pytest.mark.parametrize(
    "processes, names",
    [
        (2, list(ranks.CASES)),
        (3, ["sft, packed", "dpo, lora", "ppo, critic head", "grpo, dapo"]),
        (5, ["sft", "ppo, adaptive kl, stop", "trpo"]),
        ("1x2", SHARDED),
        ("2x2", ["sft, lora", "ppo", "trpo", "iterated dpo"]),
    ],
    ids=["2", "3", "5", "1x2", "2x2"],
)
def test_several_processes_train_as_one_does(processes, names, expected):
    """Row 60: batches of 4 and 5 rows, so that ranks have unequal shares, and last ones of 3."""
    found = ranks.in_world(processes, names)
    assert found.keys() == set(names)
    for name, result in found.items():
        of_weights, of_metrics = ranks.difference(result, expected[name])
        assert of_weights < 1e-6 and of_metrics < 1e-4, (name, of_weights, of_metrics)


def test_the_comparison_finds_a_difference(expected):
    weights, history = expected["sft"]
    name = next(iter(weights))
    other = weights | {name: weights[name] + 1e-3}, [*history[:-1], history[-1] | {"loss": 9.0}]
    of_weights, of_metrics = ranks.difference(other, (weights, history))
    assert of_weights == pytest.approx(1e-3, rel=1e-2) and of_metrics > 1


def test_training_moves_the_weights_far_beyond_the_tolerance(expected):
    moved = ranks.difference(expected["ppo"], (expected["a2c"][0], expected["ppo"][1]))[0]
    assert moved > 1e-4
