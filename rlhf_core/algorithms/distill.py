"""Distillation: the student learns a teacher's distribution over every next token.

Context distillation (Askell et al. 2021): the teacher is the policy as it was, and reads a context
that the student does not. Or the teacher is a larger model, with a context or without. Responses
come from the data, or either model samples them; from the student this is on-policy distillation
(Agarwal et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.data import Example, Tokenizer, collate
from rlhf_core.data.batches import to_device
from rlhf_core.data.collate import as_taught, count_targets, unknown_id
from rlhf_core.data.context import cut_teacher_prompt
from rlhf_core.feedback.candidates import LONG_PROMPTS, ON_LONG_PROMPT, STOP_STRINGS, fit_prompts
from rlhf_core.generation import check_stop_strings
from rlhf_core.losses.distillation import DIVERGENCES, distillation_loss
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.ops import full_kl, token_logprobs_and_entropy
from rlhf_core.options import option
from rlhf_core.rollout import sample
from rlhf_core.training.completions import sequence_means, target_hidden
from rlhf_core.training.config import PRINT_SAMPLES, SAMPLE_EVERY, TrainConfig
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.reference import Reference
from rlhf_core.training.trainer import Trainer


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Loss of distillation, and where responses come from."""

    lr: float = option(2e-5, "peak learning rate of AdamW", within="(0, inf)")
    divergence: str = option(
        "forward",
        "forward: KL(teacher || student), which covers all that the teacher may say; reverse: "
        "KL(student || teacher), which keeps to what the teacher finds likely",
        choices=DIVERGENCES,
    )
    kl_top_k: int | None = option(
        None,
        "how many of the teacher's most likely tokens count one by one; the others count together "
        "as one token (Askell et al. 2021: 50); unset: the whole vocabulary",
        within="[1, inf)",
    )
    temperature: float = option(
        1.0, "temperature of both distributions, and of sampling", within="(0, inf)"
    )
    responses: str = option(
        "data",
        "where responses come from: the data, or the student (on-policy) or the teacher samples "
        "them in every step",
        choices=("data", "student", "teacher"),
    )
    response_length: int = option(53, "longest sampled response, tokens", within="[1, inf)")
    on_long_prompt: str = option("drop", ON_LONG_PROMPT, choices=LONG_PROMPTS)
    stop_strings: tuple[str, ...] = option((), STOP_STRINGS, flag="--stop")
    max_length: int = option(
        1024,
        "tokens of context, prompt and response together; longer examples are cut, but never the "
        "context",
        within="[2, inf)",
    )
    packing: bool = option(
        False, "pack several sequences into rows of at most max_length: less padding, same loss"
    )
    sample_every: int = option(10, SAMPLE_EVERY, within="[0, inf)")
    print_samples: bool = option(False, PRINT_SAMPLES)

    def __post_init__(self):
        super().__post_init__()
        sampling = ("response_length", "on_long_prompt", "stop_strings", "sample_every")
        given = "with the data's responses"
        self.warn_unused(
            *((name, self.samples, given) for name in (*sampling, "print_samples")),
            ("print_samples", not self.samples or self.sample_every > 0, "with sample_every 0"),
        )

    @property
    def samples(self) -> bool:
        """Whether responses are sampled."""
        return self.responses != "data"


class DistillTrainer(Trainer):
    """Trains a Transformer on `Example`s with a teacher's prompt, or towards another teacher.

    Metrics, means over the response tokens: loss; kl, KL(teacher || student) over the whole
    vocabulary, which is the loss by default; agreement, the share of tokens where both find the
    same one most likely; entropy and teacher_entropy. And response_length. All in nats, of
    softmax(logits / temperature).
    """

    algorithm = "distill"
    main_metric = "kl"
    kinds = (Example,)

    def __init__(
        self,
        model: Transformer,
        examples: Sequence[Example],
        config: DistillConfig,
        *,
        teacher: Transformer | None = None,
        eos_ids: Sequence[int] | None = None,
        eval_examples: Sequence[Example] = (),
        **options,
    ):
        """
        Args:
            examples: the teacher reads `teacher_prompt_ids`, the student `prompt_ids`. Where
                responses are sampled, they replace the completions, which may be empty.
            teacher: None: the policy as it is now, see `Reference`.
            eos_ids: tokens that end a sampled response; None: the model's own.
        """
        tokenizer = options.get("tokenizer")
        self.teacher_config = (model if teacher is None else teacher).config
        self.vocab_size = shared_vocabulary(model.config, self.teacher_config, tokenizer)
        for name, rows in (("example", examples), ("evaluation example", eval_examples)):
            self.check_kinds(name, rows, self.kinds)
        if config.samples:
            check_stop_strings(config.stop_strings, tokenizer)
            examples, eval_examples = (
                fit_to_sample(rows, config, model.config, self.teacher_config) if rows else rows
                for rows in (examples, eval_examples)
            )
        super().__init__(model, examples, config, eval_examples=eval_examples, **options)
        if teacher is None and all(x.teacher_prompt_ids in (None, x.prompt_ids) for x in examples):
            raise ValueError(
                "there is nothing to learn: the teacher is the policy itself and reads the same "
                "prompts. Pass a teacher, or examples with a context (encode_in_context)"
            )
        if not config.samples and not any(map(count_targets, examples)):
            raise ValueError(
                f"none of the {len(examples)} examples has a token to learn: every completion is "
                "masked or empty"
            )
        if config.kl_top_k is not None and config.kl_top_k >= self.vocab_size:
            raise ValueError(
                f"kl_top_k must be below the vocabulary's {self.vocab_size} tokens, got "
                f"{config.kl_top_k}"
            )
        self.reference = Reference(model, teacher)
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.response_kls: list[Tensor] = []  # of the step's responses, nats per token

    def fixed_models(self) -> list:
        return [*super().fixed_models(), *self.reference.fixed_models()]

    def settings(self) -> dict:
        return {"eos_ids": self.eos_ids}

    def fault(self, example: Example) -> str | None:
        taught, positions = as_taught(example), self.teacher_config.max_positions
        if fault := unknown_id(example, self.vocab_size):
            return fault
        tokens = len(taught.prompt_ids) + len(taught.completion_ids)
        if tokens > positions:
            return f"has {tokens} tokens, but the teacher has {positions} positions"
        if count_targets(taught) != count_targets(example):
            return "has an empty prompt for the teacher, but not for the student"
        return None

    # ---- one step

    def step(self, batch: list[Example]) -> dict[str, float]:
        """Sample responses if the config asks for it, and take a step towards the teacher."""
        if not self.config.samples:
            return super().step(batch)
        batch, self.response_kls = self.answered(batch, self.generator), []
        metrics = super().step(batch)
        prompts, responses = zip(*(example[:2] for example in batch))
        (kls,) = distributed.gather((x,) for x in self.response_kls)
        self.note_samples(prompts, responses, kls)
        return metrics

    def answered(self, batch: Sequence[Example], generator: torch.Generator) -> list[Example]:
        """The examples with sampled responses."""
        config = self.config
        seeds = torch.randint(2**63 - 1, (len(batch),), generator=generator)
        options = dict(
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            eos_ids=self.eos_ids,
            stop_strings=config.stop_strings,
            tokenizer=self.tokenizer,
            seeds=seeds,
        )
        if config.responses == "student":
            rollout = sample(self.model, [x.prompt_ids for x in batch], **options)
        else:
            with self.reference.policy() as teacher:
                rollout = sample(teacher, [as_taught(x).prompt_ids for x in batch], **options)
        if not distributed.rank():  # every rank holds all responses
            self.tokens += rollout.response_mask.sum()
        answers = [
            example._replace(completion_ids=ids, completion_mask=None)
            for example, ids in zip(batch, rollout.responses())
        ]
        for example in answers:
            if fault := unknown_id(example, self.vocab_size):
                raise ValueError(f"a sampled response {fault}")
        return answers

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config, num_tokens = self.config, self.total(sum(map(count_targets, batch)))
        packing = config.max_length if config.packing else None
        for part, tokens in self.parts(batch, packing=packing):
            taught = to_device(
                collate(list(map(as_taught, part)), self.pad_id, packing=packing), self.device
            )
            with self.reference.policy() as teacher, self.autocast():
                teacher_hidden = target_hidden(teacher, taught)  # (M, D) of the same M targets
            losses_of = partial(
                self.token_losses, teacher_hidden=teacher_hidden, num_tokens=num_tokens
            )
            with self.autocast():
                hidden = target_hidden(self.model, tokens)
                loss, *outputs = self.model.logits_loss(hidden, losses_of)
            names = ("loss", "kl", "agreement", "entropy", "teacher_entropy")
            for name, values in zip(names, outputs):
                metrics.add(name, values)
            metrics.add("response_length", tokens.lengths)
            if not distributed.idle():
                self.response_kls.append(sequence_means(outputs[1], tokens.lengths))
            yield loss

    def token_losses(
        self, logits: Tensor, some: slice, *, teacher_hidden: Tensor, num_tokens: int
    ) -> tuple[Tensor, ...]:
        """The summed loss of some tokens over `num_tokens`; their losses, KLs, agreements and
        entropies (n,). See `ops.linear_loss`.

        Token ids that only one of the models has are left out.
        """
        config, T = self.config, self.config.temperature
        with torch.no_grad(), self.autocast():
            teacher_logits = self.reference.model.logits(teacher_hidden[some])
        both = [x[:, : self.vocab_size] for x in (logits, teacher_logits)]
        options = dict(divergence=config.divergence, temperature=T, top_k=config.kl_top_k)
        loss = distillation_loss(*both, **options)
        with torch.no_grad():
            kl = full_kl(*reversed(both), temperature=T)
            likeliest = [x.argmax(dim=-1) for x in both]
            entropies = (
                token_logprobs_and_entropy(x, ids, temperature=T)[1]
                for x, ids in zip(both, likeliest)
            )
            agreement = (likeliest[0] == likeliest[1]).float()
        return loss.sum() / num_tokens, loss, kl, agreement, *entropies

    # ---- evaluation

    def evaluate(self) -> dict[str, float]:
        """Metrics on `eval_examples`; sampled responses have the same seeds in every evaluation."""
        if not self.config.samples:
            return super().evaluate()
        generator, size = torch.Generator().manual_seed(self.config.seed), self.config.batch_size
        answers = []
        for start in range(0, len(self.eval_examples), size):
            answers += self.answered(self.eval_examples[start : start + size], generator)
        return {f"eval_{name}": value for name, value in self.metrics_of(answers).items()}

    def movement(self, first: dict[str, float]) -> tuple[float, str] | None:
        return None if self.config.samples else super().movement(first)


def shared_vocabulary(
    student: TransformerConfig, teacher: TransformerConfig, tokenizer: Tokenizer | None
) -> int:
    """The number of token ids that both models have.

    Models of one family can pad their vocabularies to different sizes. The ids in between belong to
    no token.

    Raises:
        ValueError: The sizes differ, and the tokenizer has ids that one of the models lacks.
    """
    sizes = student.vocab_size, teacher.vocab_size
    if sizes[0] != sizes[1] and (tokenizer is None or tokenizer.vocab_size > min(sizes)):
        known = "" if tokenizer is None else f", and the tokenizer {tokenizer.vocab_size}"
        raise ValueError(
            f"the student has {sizes[0]} token ids, the teacher {sizes[1]}{known}. Both models "
            "must use the same tokenizer"
        )
    return min(sizes)


def fit_to_sample(
    examples: Sequence[Example], config: DistillConfig, *models: TransformerConfig
) -> list[Example]:
    """Examples without completions, whose prompts leave room for a response in both models.

    Longer prompts as on_long_prompt says.

    Raises:
        ValueError: Context and response alone fill the models' positions or max_length.
    """
    examples = [x._replace(completion_ids=[], completion_mask=None) for x in examples]
    limit = min(config.max_length, *(model.max_positions for model in models))
    context = max(len(as_taught(x).prompt_ids) - len(x.prompt_ids) for x in examples)
    room = limit - config.response_length - max(context, 0)
    if room < 1:
        raise ValueError(
            f"response_length {config.response_length} and a context of {max(context, 0)} tokens "
            f"leave no room for a prompt in {limit} tokens"
        )
    prompts = [example.prompt_ids for example in examples]
    fitted = fit_prompts(prompts, room, models[0].bos_id, config)
    return [
        cut_teacher_prompt(examples[i]._replace(prompt_ids=list(prompt)), examples[i])
        for i, prompt in zip(*fitted)
    ]
