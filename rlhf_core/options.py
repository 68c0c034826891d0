"""Config dataclasses whose fields carry their meaning and their valid values.

The class checks the values; the command line and `help()` show them. A contradiction between fields
is an error. A field that has no effect, given the others, is a warning, so that a sweep over it
runs.
"""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any

TYPES = {  # annotation -> the values that fit it, and how to say so
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
    "tuple[str, ...]": ((tuple, list), "a list of strings"),
}
SYNONYMS = {  # an option or choice of ours -> its names in other libraries
    "lr": "learning_rate actor_learning_rate",
    "batch_size": "per_device_train_batch_size train_batch_size rollout_batch_size",
    "micro_batch_size": "gradient_accumulation_steps micro_train_batch_size",
    "minibatch_size": "mini_batch_size num_mini_batches ppo_mini_batch_size",
    "epochs": "num_train_epochs num_epochs max_epochs total_epochs",
    "ppo_epochs": "num_ppo_epochs num_iterations",
    "num_samples": "num_generations n_samples_per_prompt num_return_sequences",
    "response_length": "max_completion_length max_new_tokens generate_max_len",
    "max_prompt_length": "prompt_max_len",
    "max_length": "max_seq_length max_len",
    "kl_coef": "beta init_kl_coef kl_loss_coef",
    "kl_target": "target_kl",
    "max_kl": "delta target_kl",
    "cg_iterations": "cg_iters cg_max_steps n_cg_steps",
    "fisher_share": "sub_sampling_factor",
    "clip_range": "epsilon cliprange clip_ratio eps_clip",
    "clip_range_high": "epsilon_high clip_ratio_high eps_clip_high",
    "value_clip_range": "cliprange_value value_clip",
    "importance_cap": "rollout_is_threshold vllm_importance_sampling_cap tis_imp_ratio_cap",
    "importance_floor": "rollout_rs_threshold_lower vllm_importance_sampling_clip_min",
    "importance_level": "rollout_is rollout_rs",
    "importance_mode": "vllm_importance_sampling_mode",
    "truncate": "token_truncate sequence_truncate",
    "mask": "token_mask sequence_mask",
    "lam": "gae_lambda lambda lambd",
    "vf_coef": "value_loss_coef",
    "normalize": "scale_rewards",
    "ratio": "importance_sampling_level",
    "missing_eos_penalty": "non_eos_penalty",
    "mask_truncated": "mask_truncated_completions overlong_filter",
    "dynamic_sampling": "filter_groups dynamic_filtering",
    "overlong_buffer": "overlong_buffer_len soft_punish_cache",
    "stop_strings": "stop stop_sequences",
    "gamma": "simpo_gamma",
    "aggregation": "loss_type loss_agg_mode",
    "loss": "loss_type",
    "advantage": "advantage_estimator adv_estimator",
    "lr_schedule": "lr_scheduler_type lr_scheduler",
    "warmup_steps": "warmup_ratio lr_warmup_ratio",
    "max_grad_norm": "gradient_clipping grad_clip max_norm",
    "adam_eps": "adam_epsilon",
    "precision": "bf16 fp16 dtype torch_dtype",
    "activation_checkpointing": "gradient_checkpointing",
    "log_every": "logging_steps",
    "eval_every": "eval_steps eval_strategy",
    "save_every": "save_steps save_strategy",
    "keep": "save_total_limit max_ckpt_to_keep",
    "keep_best": "metric_for_best_model load_best_model_at_end",
    "out": "output_dir save_path",
    "log": "report_to log_with logger",
    "model": "model_name_or_path pretrain",
    "data": "dataset dataset_name train_file",
    "prompts": "prompt_data dataset dataset_name",
    "reward_model": "reward_model_path reward_pretrain",
    "reward_function": "reward_funcs remote_rm_url",
    "lora_rank": "lora_r",
    "resume": "resume_from_checkpoint load_checkpoint",
    "bfloat16": "bf16 fp16 float16 half",
    "float32": "fp32 no full",
    "dpo": "sigmoid",
    "reinforce_pp": "reinforce++ reinforce",
    "token_mean": "dapo",
    "sequence_mean": "grpo",
    "sequence_sum": "dr_grpo",
}


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """ "; did you mean ...?" with the closest valid name or a synonym's; "" if none is close."""
    valid_of = {text.lstrip("-").replace("-", "_").lower(): text for text in valid}
    name = name.lstrip("-").replace("-", "_").lower()
    close = [ours for ours, others in SYNONYMS.items() if name in others.split()]
    close += difflib.get_close_matches(name, valid_of, n=1)
    return next((f"; did you mean {valid_of[x]}?" for x in close if x in valid_of), "")


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    within: str | None = None,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    factory: Any = MISSING,
) -> Any:
    """A config field.

    Args:
        default, factory: as for `dataclasses.field`. A field whose default is None may be None.
        help: meaning and unit; what happens when the value goes up.
        within: interval of valid numbers, such as "(0, 1]" or "[0, inf)".
        choices: valid strings.
        flag: its name on the command line; None: made from the field's name.
    """
    metadata = {"help": help, "within": within, "choices": choices, "flag": flag}
    return field(default=default, default_factory=factory, metadata=metadata)


class Options:
    """Base of the config dataclasses. Its ValueErrors name the field, its value and valid ones."""

    def __init_subclass__(cls, **options):
        """List the fields in the class's docstring."""
        super().__init_subclass__(**options)
        listed: dict[str, Field] = {}
        for base in reversed(cls.__mro__[1:]):
            listed |= getattr(base, "__dataclass_fields__", {})
        listed |= {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        lines = [f"    {name}: {describe(entry)}" for name, entry in listed.items()]
        cls.__doc__ = "\n".join([cls.__doc__ or cls.__name__, "", "Attributes:", *lines])

    def __new__(cls, *values: Any, **named: Any):
        """Raise TypeError for an unknown field, with the one that was meant."""
        valid = [entry.name for entry in fields(cls)]
        for name in named:
            if name not in valid:
                near = did_you_mean(name, valid) or f"; help({cls.__name__}) lists them"
                raise TypeError(f"{cls.__name__} has no option {name!r}{near}")
        return super().__new__(cls)

    def __post_init__(self):
        for entry in fields(self):
            value, valid = getattr(self, entry.name), entry.metadata.get("choices")
            if value is None and entry.default is None:
                continue
            annotation = getattr(entry.type, "__name__", str(entry.type))  # a type, or its name
            kind = TYPES.get(annotation.removesuffix(" | None"))
            if kind is not None:
                is_bool = isinstance(value, bool)
                fits = isinstance(value, kind[0]) and is_bool == (kind[0] is bool)
                self.check((entry.name, fits, kind[1]))
            if valid is not None:
                self.check((entry.name, value in valid, f"one of {', '.join(valid)}"))
            interval = entry.metadata.get("within")
            if interval is not None:
                self.check((entry.name, _contains(interval, value), _as_text(interval, value)))

    def check(self, *rules: tuple[str, Any, str]) -> None:
        """Raise ValueError for the first rule (field, is it valid, what it must be) that fails."""
        for name, valid, wanted in rules:
            if not valid:
                value = getattr(self, name)
                choices = self.__dataclass_fields__[name].metadata.get("choices") or ()
                near = did_you_mean(str(value), choices) if value not in choices else ""
                raise ValueError(f"{name} must be {wanted}, got {value!r}{near}")

    def warn_unused(self, *rules: tuple[str, Any, str]) -> None:
        """Warn for each rule (field, has it an effect, why not) whose field is set in vain."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name, effective, reason in rules:
            if not effective and getattr(self, name) != defaults[name]:
                text = f"{name}={getattr(self, name)!r} has no effect {reason}"
                warnings.warn(text, stacklevel=_levels_to_caller())


def _levels_to_caller() -> int:
    """The stacklevel, in the calling method, of the line that makes the config or the trainer."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back and frame.f_code.co_name in ("__post_init__", "__init__"):
        level, frame = level + 1, frame.f_back
    return level


def describe(entry: Field) -> str:
    """A field's help with its choices or interval and its default."""
    help, choices, within = (entry.metadata.get(key) for key in ("help", "choices", "within"))
    valid = f"one of {', '.join(choices)}" if choices else within and _as_text(within)
    notes = "; ".join(filter(None, [valid, _default(entry)]))
    return f"{help} ({notes})" if notes else str(help)


def _default(entry: Field) -> str:
    unset = any(entry.default is value for value in (MISSING, None, False, ()))
    return "" if unset else f"default {entry.default}"


def _bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _contains(interval: str, value: Any) -> bool:
    low, high = _bounds(interval)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _as_text(interval: str, value: Any = 0) -> str:
    low, high = _bounds(interval)
    if low > -math.inf and high < math.inf:
        return f"in {interval}"
    texts = []
    if low > -math.inf:
        texts.append(f"at least {low:g}" if interval[0] == "[" else f"> {low:g}")
    if low == -math.inf or value in (math.inf, -math.inf) or value != value:
        texts.append("finite")
    return " and ".join(texts)
