"""TRL's side: its current trainers for SFT, DPO and reward models, and its PPO trainer of 1.12.

Everything that costs time and is not part of the method is off: bfloat16 (emulated on most CPUs),
gradient checkpointing, saving, evaluation, reports, progress bars, sample generations. The
optimiser is the default of transformers, fused AdamW. The data is tokenized beforehand.
"""

from __future__ import annotations

import math
import os

import torch

from benchmarks.peers.task import Task, Turn, ids_score

QUIET = dict(  # fields of TrainingArguments that turn off what is named above
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    logging_strategy="no",
    logging_nan_inf_filter=False,
    save_strategy="no",
    eval_strategy="no",
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=False,
)


def train(task: Task, turn: Turn) -> None:
    globals()[f"_{task.method}"](task, turn)


def options(task: Task) -> dict:
    """Fields of transformers' TrainingArguments, as TRL extends them."""
    return dict(
        output_dir=task.folder,
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=task.batch_size,
        gradient_accumulation_steps=1,
        max_steps=task.steps,
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        adam_epsilon=task.adam_eps,
        weight_decay=0.0,
        max_grad_norm=task.max_grad_norm,
        seed=task.seed,
        **QUIET | {"bf16": task.precision == "bfloat16"},
    )


def method_options(task: Task) -> dict:
    """Further fields of SFTConfig, DPOConfig or RewardConfig."""
    most = task.prompt_length + task.completion_length
    extra = {
        "sft": {"completion_only_loss": True, "packing": False},
        "dpo": {"beta": task.beta, "precompute_ref_log_probs": task.cached_reference},
        "reward": {},
    }
    return dict(max_length=most, train_sampling_strategy="sequential") | extra[task.method]


def ppo_options(task: Task) -> dict:
    """Further fields of PPOConfig. A minibatch is one micro-batch, and one optimiser step."""
    return dict(
        total_episodes=task.steps * task.batch_size,
        num_mini_batches=task.minibatches,
        num_ppo_epochs=task.ppo_epochs,
        local_rollout_forward_batch_size=task.batch_size,
        num_sample_generations=0,
        response_length=task.completion_length,
        stop_token=None,
        temperature=task.temperature,
        missing_eos_penalty=None,
        whiten_rewards=False,
        kl_coef=task.kl_coef,
        kl_estimator="k1",
        cliprange=task.clip_range,
        cliprange_value=task.value_clip_range,
        vf_coef=task.vf_coef,
        gamma=task.gamma,
        lam=task.lam,
    )


def _load(kind: str, folder: str, **options):
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **options)
    for weight in model.parameters():  # the file is mapped, and becomes memory when read
        weight.sum()
    return model


def _policy(task):
    return _load("AutoModelForCausalLM", task.policy)


def _adapters(task) -> dict:
    """The arguments of a trainer that train adapters, if the task has any."""
    if not task.lora_rank:
        return {}
    from peft import LoraConfig

    sizes = dict(r=task.lora_rank, lora_alpha=2 * task.lora_rank)
    config = LoraConfig(**sizes, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"peft_config": config}


def _scorer(task):
    return _load("AutoModelForSequenceClassification", task.reward, num_labels=1)


def _critic(task):
    critic = _scorer(task)
    if task.lora_rank:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(**_adapters(task), model=critic.base_model)  # its head trains whole
    return critic


def _tokenizer(task):
    """A tokenizer of this vocabulary, which the trainers require, but the data does not need."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(task.vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=str(task.pad_id), eos_token=str(task.pad_id - 1)
    )


def _turns(turn: Turn, loss) -> object:
    """A callback that calls `turn` before the first step and after each step."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turn(math.nan)

        def on_step_end(self, *args, **kwargs):
            turn(loss())

    return Turns()


def _train(trainer, turn):
    losses = []
    training_step = trainer.training_step

    def kept(*args, **kwargs):
        losses.append(training_step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = kept
    trainer.add_callback(_turns(turn, lambda: losses[-1].item()))
    trainer.train()


def _sft(task, turn):
    import trl
    from datasets import Dataset

    rows = task.examples()
    columns = {
        "input_ids": [row.prompt + row.chosen for row in rows],
        "completion_mask": [[0] * len(row.prompt) + [1] * len(row.chosen) for row in rows],
    }
    config = trl.SFTConfig(**options(task), **method_options(task))
    data = Dataset.from_dict(columns)
    _train(
        trl.SFTTrainer(
            _policy(task),
            config,
            train_dataset=data,
            processing_class=_tokenizer(task),
            **_adapters(task),
        ),
        turn,
    )


def tokenized_dpo() -> type:
    """TRL's DPOTrainer for rows of token ids, which it does not detect."""
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    return Trainer


def _dpo(task, turn):
    import trl
    from datasets import Dataset

    rows = task.examples()
    columns = {
        "prompt_ids": [row.prompt for row in rows],
        "chosen_ids": [row.chosen for row in rows],
        "rejected_ids": [row.rejected for row in rows],
    }
    config = trl.DPOConfig(**options(task), **method_options(task))
    data = Dataset.from_dict(columns)

    _train(
        tokenized_dpo()(
            _policy(task),
            None if task.lora_rank else _policy(task),
            config,
            train_dataset=data,
            processing_class=_tokenizer(task),
            **_adapters(task),
        ),
        turn,
    )


def _grpo(task, turn):
    import trl
    from datasets import Dataset

    def reward(prompts, completions, completion_ids, **kwargs):
        return [ids_score(ids) for ids in completion_ids]

    responses = task.batch_size * task.samples
    config = trl.GRPOConfig(
        num_generations=task.samples,
        max_completion_length=task.completion_length,
        generation_kwargs={"min_new_tokens": task.completion_length},
        temperature=task.temperature,
        beta=0.0,
        shuffle_dataset=False,
        **options(task) | {"per_device_train_batch_size": responses},
    )
    prompts = [" ".join(map(str, row.prompt)) for row in task.examples()]
    trainer = trl.GRPOTrainer(
        _policy(task),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=_tokenizer(task),
        **_adapters(task),
    )
    _train(trainer, turn)


def _reward(task, turn):
    import trl
    from datasets import Dataset

    rows = task.examples()
    columns = {
        "chosen_ids": [row.prompt + row.chosen for row in rows],
        "rejected_ids": [row.prompt + row.rejected for row in rows],
    }
    config = trl.RewardConfig(**options(task), **method_options(task))
    data = Dataset.from_dict(columns)
    _train(
        trl.RewardTrainer(
            _scorer(task), config, train_dataset=data, processing_class=_tokenizer(task)
        ),
        turn,
    )


def _ppo(task, turn):
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    # The loader shuffles, but a batch of all its rows stays the same batch.
    rows = task.batches()[0]
    generation = ppo_trainer.batch_generation
    given = {tuple(row.prompt): row.chosen for row in rows}

    def given_responses_first(model, queries, batch_size, pad_id, config):
        """The first time, put the task's responses in place of the sampled ones."""
        generation(model, queries, batch_size, pad_id, config)
        ppo_trainer.batch_generation = generation
        prompts = [tuple(x for x in query if x != pad_id) for query in queries.tolist()]
        ids = torch.cat((queries, torch.tensor([given[prompt] for prompt in prompts])), dim=1)
        logits = ppo_trainer.forward(model, ids, pad_id).logits[:, queries.shape[1] - 1 : -1]
        return ids, logits / config.temperature

    def collate(rows):
        """Prompts, padded on the left."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = [[task.pad_id] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows]
        return {"input_ids": torch.tensor(ids)}

    # Its trainer ignores bf16 and reads this variable of `accelerate launch`.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if task.precision == "bfloat16" else "no"
    metrics = {}

    def loss() -> float:
        return metrics["loss/policy_avg"] + task.vf_coef * metrics["loss/value_avg"]

    class Trainer(PPOTrainer):
        def log(self, logs, *args, **kwargs):
            metrics.update(logs)

    ppo_trainer.batch_generation = given_responses_first
    trainer = Trainer(
        args=PPOConfig(**options(task), **ppo_options(task)),
        processing_class=_tokenizer(task),
        model=_policy(task),
        ref_model=None if task.lora_rank else _policy(task),
        reward_model=_scorer(task),
        value_model=_critic(task),
        train_dataset=Dataset.from_dict({"input_ids": [row.prompt for row in rows]}),
        data_collator=collate,
        **_adapters(task),
    )
    trainer.add_callback(_turns(turn, loss))
    trainer.train()
