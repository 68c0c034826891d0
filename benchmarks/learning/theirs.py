"""The same data and settings through TRL's DPO and GRPO, for the table of methods.

This needs `pip install trl==1.16.0`, and a task with a tokenizer of a folder: not `replies`. The
seconds leave out imports, and writing and reading the policy's files.
"""

from __future__ import annotations

import tempfile

import torch

from benchmarks.learning.setup import Setup
from benchmarks.peers.theirs import QUIET, tokenized_dpo
from rlhf_core.models import Transformer
from rlhf_core.trainers import DPOConfig, GRPOConfig


def trl_dpo(setup: Setup, **settings) -> Transformer:
    with setup.untimed():
        from datasets import Dataset
        from trl import DPOConfig as Config

        from_ids = tokenized_dpo()

    ours = DPOConfig(seed=setup.seed, **settings)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = {name: [getattr(pair, name) for pair in setup.pairs] for name in names}

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            per_device_train_batch_size=ours.batch_size,
            num_train_epochs=ours.epochs,
            beta=ours.beta,
            max_length=ours.max_length,
            **options(ours, folder),
        )
        policy, tokenizer = load(setup, folder)
        reference, data = load(setup, folder)[0], Dataset.from_dict(columns)
        trainer = from_ids(
            policy, reference, config, train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        return Transformer.from_transformers(policy)


def trl_grpo(setup: Setup, **settings) -> Transformer:
    with setup.untimed():
        from datasets import Dataset
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer

    ours = GRPOConfig(seed=setup.seed, response_length=setup.task.response_length, **settings)
    texts = [setup.task.tokenizer.decode(prompt) for prompt in setup.task.prompts]
    ids = dict(zip(texts, setup.task.prompts))

    def reward(prompts, completions, completion_ids, **kwargs):
        return setup.scores([ids[prompt] for prompt in prompts], completion_ids).tolist()

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            per_device_train_batch_size=ours.batch_size * ours.num_samples,
            num_generations=ours.num_samples,
            max_completion_length=ours.response_length,
            beta=ours.kl_coef,
            scale_rewards="group" if ours.normalize else "none",
            temperature=ours.temperature,
            **options(ours, folder),
        )
        policy, tokenizer = load(setup, folder)
        trainer = Trainer(
            policy,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
        )
        trainer.train()
        return Transformer.from_transformers(policy)


def options(ours: DPOConfig | GRPOConfig, folder: str) -> dict:
    """Fields of transformers' TrainingArguments: our settings, without extras that cost time."""
    return dict(
        output_dir=folder,
        learning_rate=ours.lr,
        lr_scheduler_type=ours.lr_schedule,
        max_steps=ours.max_steps or -1,  # which means all epochs
        max_grad_norm=ours.max_grad_norm,
        weight_decay=ours.weight_decay,
        seed=ours.seed,
        **QUIET,
    )


def load(setup: Setup, folder: str):
    """The policy after SFT and its tokenizer as those of transformers."""
    with setup.untimed():
        import transformers

        setup.base.save_pretrained(folder)
        setup.task.tokenizer.save(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, tokenizer
