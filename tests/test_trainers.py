"""rlhf_core.trainers holds every public name of the trainers; renamed ones warn."""

import pytest

import rlhf_core
from rlhf_core import trainers
from rlhf_core.options import Options

NAMES = """
    A2CConfig A2CTrainer DPOConfig DPOTrainer DistillConfig DistillTrainer GRPOConfig GRPOTrainer
    ILQLConfig ILQLTrainer IteratedDPOConfig IteratedRLHFConfig KTOConfig KTOTrainer NLPOConfig
    NLPOTrainer OnlineDPOConfig OnlineDPOTrainer PPOConfig PPOTrainer RFTConfig RewardConfig
    RewardTrainer SFTConfig SFTTrainer SamplingConfig Scorer TRPOConfig TRPOTrainer best_of_n
    iterated_dpo iterated_rlhf rft
"""


def test_every_public_name_is_there():
    assert trainers.__all__ == dir(trainers) == NAMES.split()
    assert all(callable(getattr(trainers, name)) for name in trainers.__all__)


def test_every_trainer_has_a_config():
    configs = {name for name in trainers.__all__ if name.endswith("Config")}
    assert all(issubclass(getattr(trainers, name), Options) for name in configs)
    for name in trainers.__all__:
        if name.endswith("Trainer"):
            assert name.removesuffix("Trainer") + "Config" in configs


@pytest.mark.parametrize("name", trainers.__all__)
def test_the_same_object_is_in_the_package(name):
    assert getattr(rlhf_core, name) is getattr(trainers, name)


@pytest.mark.parametrize(
    "old, new", [("GroupConfig", "GRPOConfig"), ("GroupTrainer", "GRPOTrainer")]
)
def test_an_old_name_still_works_and_warns(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} .*{new}") as caught:
        assert getattr(trainers, old) is getattr(trainers, new)
    assert caught[0].filename == __file__ and old not in trainers.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'rlhf_core\.trainers' has no attribute 'nothing'"):
        trainers.nothing  # noqa: B018
