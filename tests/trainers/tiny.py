"""Trainers of tiny random models, for the tests beside this file."""

import torch
from datasets import Dataset
from helpers import EOS, PairReward, V, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def word_tokenizer(chat_template=None, vocab_size=V):
    """A word a token: `w7` is 7, and the two roles of conversations are the last ids."""
    words = {f"w{i}": i for i in range(3, vocab_size - 2)} | {"user": vocab_size - 2, "assistant": vocab_size - 1}
    vocabulary = {"<bos>": 0, "<eos>": EOS, "<pad>": 2, **words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left",
        chat_template=chat_template,
    )  # fmt: skip


def dataset(count=8):
    return Dataset.from_dict(
        {"prompt": [" ".join(f"w{3 + (i * 7 + j) % 20}" for j in range(1 + i % 4)) for i in range(count)]}
    )


def make(
    tmp_path, tokenizer, model=None, reward=None, train=None, evaluation=None, peft_config=None, judge=None, **settings
):
    """A SoftRolloutTrainer in float64 that trains by SGD, with exact cotangents, at a learning rate that shows."""
    from softrl.trainers import SoftRolloutConfig, SoftRolloutTrainer

    defaults = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_completion_length": 5, "top_k": 7,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_steps": 3, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "adjoint_tol": 1e-10,
        "gradient_checkpointing": False, "beta": 0.1, "entropy_coef": 0.05, "max_grad_norm": 1.0,
    }  # fmt: skip
    return SoftRolloutTrainer(
        model=model if model is not None else llama(),
        reward_funcs=reward if reward is not None else PairReward(),
        args=SoftRolloutConfig(**{**defaults, **settings}),
        train_dataset=dataset() if train is None else train,
        eval_dataset=dataset(3) if evaluation is None else evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
        judge=judge,
    )


def parameters_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def logs_of(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]
