"""Configs: every field has a meaning, valid values pass, others are refused or reported by name."""

import dataclasses
import math
import warnings

import pytest

from rlhf_core import trainers
from rlhf_core.options import SYNONYMS, Options, describe, did_you_mean, option

CONFIGS = {
    name: getattr(trainers, name) for name in trainers.__all__ if name.endswith("Config")
}  # every public config
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@dataclasses.dataclass(frozen=True)
class Base(Options):
    """Options of the base."""

    rate: float = option(0.5, "learning rate", within="(0, 1]")
    kind: str = option("soft", "kind of loss", choices=("soft", "hard"))


@dataclasses.dataclass(frozen=True)
class Derived(Base):
    """Options of the derived class."""

    rate: float = option(0.25, "another rate", within="[0, inf)")
    steps: int | None = option(None, "steps; unset: all", within="[1, inf)")
    scale: float = option(1.0, "scale of the scores", within="(-inf, inf)")
    on: bool = option(False, "whether it is on")

    def __post_init__(self):
        super().__post_init__()
        self.check(
            ("steps", self.steps != 13, "another number than 13"),
            ("scale", self.scale != 13, "another number than 13"),
        )
        self.warn_unused(
            ("scale", self.kind == "hard", "on soft losses"),
            ("steps", self.kind == "hard", "on soft losses"),
        )


# ---- ranges and choices


@pytest.mark.parametrize("rate", [1, 1.0, 1e-30])
def test_a_value_in_its_interval_is_taken(rate):
    assert Base(rate=rate).rate == rate


@pytest.mark.parametrize("rate", [0, -0.5, 1.0001, math.inf, math.nan])
def test_a_value_outside_its_interval_is_refused_by_name(rate):
    with pytest.raises(ValueError, match=r"^rate must be in \(0, 1\], got ") as raised:
        Base(rate=rate)
    assert str(raised.value).endswith(f"got {rate!r}")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rate="0.5"), "rate must be a number, got '0.5'"),
        (dict(rate=None), "rate must be a number, got None"),
        (dict(rate=[0.5]), "rate must be a number, got [0.5]"),
        (dict(rate=True), "rate must be a number, got True"),
        (dict(steps=2.0), "steps must be a whole number, got 2.0"),
        (dict(kind=3), "kind must be a string, got 3"),
        (dict(on=1), "on must be True or False, got 1"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(values, message):
    with pytest.raises(ValueError) as raised:
        Derived(**values)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(rate=-1), "rate must be at least 0, got -1"),
        (dict(rate=math.inf), "rate must be at least 0 and finite, got inf"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(scale=-math.inf), "scale must be finite, got -inf"),
        (dict(kind="Soft"), "kind must be one of soft, hard, got 'Soft'; did you mean soft?"),
        (dict(steps=13, scale=13), "steps must be another number than 13, got 13"),
    ],
)
def test_an_error_names_field_valid_values_and_value(values, message):
    with pytest.raises(ValueError) as raised:
        Derived(**values)
    assert str(raised.value) == message


def test_ends_of_intervals_are_open_or_closed():
    @dataclasses.dataclass
    class Ends(Options):
        """Options of nothing."""

        open: float = option(0.5, within="(0, 1)")
        closed: float = option(0.5, within="[0, 1]")
        unbounded: float = option(1.0, within="(0, inf]")

    Ends(closed=0), Ends(closed=1), Ends(unbounded=math.inf)
    for values in (dict(open=0), dict(open=1), dict(closed=-1e-9), dict(closed=1 + 1e-9)):
        with pytest.raises(ValueError, match=f"^{next(iter(values))} must be in "):
            Ends(**values)


@pytest.mark.parametrize(
    "config, name, meant",
    [
        ("PPOConfig", "learning_rate", "lr"),
        ("SFTConfig", "per_device_train_batch_size", "batch_size"),
        ("SFTConfig", "num_train_epochs", "epochs"),
        ("GRPOConfig", "num_generations", "num_samples"),
        ("GRPOConfig", "beta", "kl_coef"),
        ("GRPOConfig", "loss_type", "aggregation"),
        ("DPOConfig", "loss_type", "loss"),
        ("DPOConfig", "betta", "beta"),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_that_was_meant(config, name, meant):
    with pytest.raises(TypeError, match=f"^{config} has no option '{name}'; did you mean {meant}"):
        CONFIGS[config](**{name: 1})


def test_an_unknown_option_that_is_like_no_other_says_where_all_are_listed():
    with pytest.raises(TypeError, match=r"no option 'beta'; help\(SFTConfig\) lists them"):
        trainers.SFTConfig(beta=1)


def test_a_choice_of_another_library_is_answered_with_ours():
    for values, meant in ((dict(precision="bf16"), "bfloat16"), (dict(loss="sigmoid"), "dpo")):
        with pytest.raises(ValueError, match=f"; did you mean {meant}\\?$"):
            trainers.DPOConfig(**values)


def test_every_synonym_leads_to_an_option_and_is_none_itself():
    """A choice such as grpo may be a synonym of another option's choice."""
    names = {field.name for config in CONFIGS.values() for field in dataclasses.fields(config)}
    for ours, others in SYNONYMS.items():
        if ours in names:
            assert not names & set(others.split()) - {"beta", "model", "loss_type"}, ours
        valid = ["--" + ours.replace("_", "-"), "--other"]
        for name in others.split():
            assert did_you_mean(name, valid) == f"; did you mean {valid[0]}?"


def test_none_is_taken_only_where_it_is_the_default():
    assert Derived(steps=None).steps is None
    with pytest.raises(ValueError, match="kind must be a string, got None"):
        Derived(kind=None)


# ---- options without effect


def test_an_option_without_effect_gives_one_warning_at_the_line_that_sets_it():
    with pytest.warns(UserWarning) as caught:
        Derived(scale=2.0)
    (warning,) = caught
    assert str(warning.message) == "scale=2.0 has no effect on soft losses"
    assert warning.filename == __file__


@every_config
def test_no_warning_for_defaults(config):
    required = {
        field.name: 1
        for field in dataclasses.fields(config)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Derived(scale=2.0, kind="hard"), Derived(scale=1.0, steps=None)
        config(**required)


def test_every_option_in_vain_is_named():
    with pytest.warns(UserWarning) as caught:
        Derived(scale=2.0, steps=3)
    assert {str(warning.message).split("=")[0] for warning in caught} == {"scale", "steps"}


def test_the_warning_points_at_the_caller_whichever_class_gives_it():
    makers = {
        "gamma": lambda: trainers.DPOConfig(gamma=0.5),
        "normalize": lambda: trainers.GRPOConfig(advantage="rloo", normalize=False),
        "kl_in": lambda: trainers.GRPOConfig(kl_in="reward"),  # by the base of GRPOConfig
    }
    for name, make in makers.items():
        with pytest.warns(UserWarning, match=f"{name}=") as caught:
            make()
        assert [warning.filename for warning in caught] == [__file__], name


# ---- texts


def test_the_docstring_lists_every_field_as_the_class_has_it():
    lines = Derived.__doc__.splitlines()
    assert lines[0] == "Options of the derived class." and "Attributes:" in lines
    listed = {line.split(":")[0].strip(): line for line in lines[lines.index("Attributes:") + 1 :]}
    assert list(listed) == ["rate", "kind", "steps", "scale", "on"]
    assert "another rate" in listed["rate"] and "default 0.25" in listed["rate"]
    assert "another rate" not in Base.__doc__


def test_a_description_has_help_valid_values_and_default():
    texts = {field.name: describe(field) for field in dataclasses.fields(Derived)}
    assert texts["rate"].startswith("another rate (at least 0")
    assert texts["rate"].endswith("; default 0.25)")
    assert texts["kind"] == "kind of loss (one of soft, hard; default soft)"
    assert texts["steps"].startswith("steps; unset: all (at least 1")
    assert "default" not in texts["steps"]


# ---- the trainers' configs


@every_config
def test_every_field_has_help_and_a_default_that_is_valid(config):
    for field in dataclasses.fields(config):
        assert field.metadata["help"], field.name
        assert "\n" not in field.metadata["help"] and describe(field) in config.__doc__
        choices = field.metadata["choices"]
        assert choices is None or field.default is None or field.default in choices


@every_config
def test_values_beyond_an_interval_or_the_choices_are_refused_by_name(config):
    """One step beyond each closed end, at each open end, NaN and an unknown choice."""
    tried = 0
    for field in dataclasses.fields(config):
        interval, choices = field.metadata["within"], field.metadata["choices"]
        beyond = ["no such choice"] * (choices is not None)
        if interval is not None:
            low, high = map(float, interval[1:-1].split(","))
            beyond += [math.nan, low - 1 if interval[0] == "[" else low]
            beyond += [high + 1 if interval[-1] == "]" else high] * math.isfinite(high)
        for value in beyond:
            with pytest.raises(ValueError, match=f"^{field.name} must be .*, got {value!r}$"):
                config(**{field.name: value})
            tried += 1
    assert tried >= 2


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        trainers.SFTConfig().lr = 1.0
