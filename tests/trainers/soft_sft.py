"""SoftSFT trainers of a tiny Llama, for the tests beside this file."""

import torch
from datasets import Dataset
from helpers import llama
from trainers.tiny import CHAT_TEMPLATE, word_tokenizer

from softrl.trainers import SoftSFTConfig, SoftSFTTrainer


def words(first, count):
    return " ".join(f"w{3 + (first * 7 + j * (1 + first % 3)) % 17}" for j in range(count))


def texts(count=8, kind="text", seed=0):
    """Rows of different lengths, in each of TRL's formats."""
    rows = range(seed, seed + count)
    if kind == "text":
        return Dataset.from_dict({"text": [words(i, 3 + i % 5) for i in rows]})
    if kind == "prompt":
        columns = {"prompt": [words(i, 1 + i % 3) for i in rows]}
        return Dataset.from_dict(columns | {"completion": [f" {words(i + 3, 2 + i % 4)}" for i in rows]})
    turns = [
        [{"role": role, "content": words(i + j, 1 + (i + j) % 3)} for j, role in enumerate(("user", "assistant") * 2)]
        for i in rows
    ]
    if kind == "messages":
        return Dataset.from_dict({"messages": turns})
    if kind == "conversation":
        return Dataset.from_dict({"prompt": [each[:3] for each in turns], "completion": [each[3:] for each in turns]})
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 20, (4 + i % 4,), generator=generator).tolist() for i in rows]
    masks = [[0, 1, 0] + [1] * (len(each) - 3) for each in ids]  # another speaker's turn in between
    return Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


SETTINGS = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "learning_rate": 0.05,
    "lr_scheduler_type": "constant", "optim": "sgd", "max_steps": 3, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
}  # fmt: skip


def soft_sft(folder, model=None, train=None, evaluation=None, peft_config=None, **settings):
    """A trainer in float64 by SGD at a learning rate that shows, with exact cotangents."""
    defaults = {**SETTINGS, "top_k": 7, "min_p": 0.02, "adjoint_tol": 1e-10, "guidance_alpha": 0.4}
    return SoftSFTTrainer(
        llama() if model is None else model, SoftSFTConfig(str(folder), **{**defaults, **settings}),
        texts() if train is None else train, texts(3, seed=20) if evaluation is None else evaluation,
        word_tokenizer(CHAT_TEMPLATE), peft_config=peft_config,
    )  # fmt: skip
