"""QuietSTaR trainers of tiny models that think, for the tests beside this file."""

import torch
from datasets import Dataset
from generation.thinkers import thinker
from helpers import V, llama

from softrl.trainers import QuietSTaRConfig, QuietSTaRTrainer


def texts(count=8, seed=0, length=None):
    """Rows of 4 to 9 token ids, or of one length, each with two anchors."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length or 4 + (5 * row) % 6 for row in range(count)]
    rows = [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": ids, "anchors": [0, len(ids) - 3]} for ids in rows])


def quietstar(
    folder, model=None, train=None, evaluation=None, peft_config=None, tokenizer=None, float32=False, **settings
):  # fmt: skip
    """A trainer in float64 (or 32) with SGD at a learning rate that shows, of a model that mixes thoughts."""
    defaults = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "n_thought": 2, "n_talk": 2, "top_k": 7,
        "num_thoughts": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_steps": 3,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "max_grad_norm": 0.0, "sigmoid_mixing": True,
    }  # fmt: skip
    args = QuietSTaRConfig(str(folder), **{**defaults, **settings})
    if model is None and peft_config is None:
        lm = llama().float() if float32 else llama()
        model = thinker(lm=lm, learns_log_z=args.estimator == "partition_learned", **vars(args.thinking_config()))
    return QuietSTaRTrainer(
        llama() if model is None else model, args, texts() if train is None else train,
        texts(3, seed=1) if evaluation is None else evaluation, tokenizer, peft_config=peft_config,
    )  # fmt: skip
