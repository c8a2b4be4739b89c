"""Trainers of tiny random models, for the tests beside this file."""

from dataclasses import fields

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


def ranked_dataset(count=8):
    """Sets of two to four completions behind the same prompts, the best of them twice in some."""
    prompts = dataset(count)["prompt"]
    sizes = [2 + i % 3 for i in range(count)]
    completions = [
        [" ".join(f"w{3 + (5 * i + 3 * k + j) % 20}" for j in range(1 + (i + k) % 3)) for k in range(size)]
        for i, size in enumerate(sizes)
    ]
    rewards = [[float(max((i + k) % 4, 1)) for k in range(size)] for i, size in enumerate(sizes)]
    return Dataset.from_dict({"prompt": prompts, "completions": completions, "rewards": rewards})


def make(
    tmp_path, tokenizer, model=None, reward=None, train=None, evaluation=None, peft_config=None, judge=None,
    method="SoftRollout", **settings
):  # fmt: skip
    """A trainer in float64 that trains by SGD, with exact cotangents, at a learning rate that shows.

    `method` is the first part of the trainer's name: SoftRollout, Reinforce, PPO or, which has neither reward nor
    judge, ListwisePreference.
    """
    from softrl import trainers

    config, trainer = (getattr(trainers, f"{method}{suffix}") for suffix in ("Config", "Trainer"))
    defaults = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_completion_length": 5, "top_k": 7,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "optim": "sgd", "max_steps": 3, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "adjoint_tol": 1e-10,
        "gradient_checkpointing": False, "beta": 0.1, "entropy_coef": 0.05, "max_grad_norm": 1.0,
    }  # fmt: skip
    known = {field.name for field in fields(config)}
    scored_already = method == "ListwisePreference"
    rows = ranked_dataset if scored_already else dataset
    scoring = {"reward_funcs": reward if reward is not None else PairReward(), "judge": judge}
    return trainer(
        model=model if model is not None else llama(),
        args=config(**{name: value for name, value in defaults.items() if name in known} | settings),
        train_dataset=rows() if train is None else train,
        eval_dataset=rows(3) if evaluation is None else evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
        **({} if scored_already else scoring),
    )


def parameters_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def logs_of(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def numbers_of(trainer):
    """What every step logged, without times."""
    return [
        {key: value for key, value in row.items() if not key.startswith("step_time")}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def own_forwards(trainer, rollout):
    """By the models' own forwards, a sequence at a time: log π(x_t), KL_t, H_t, hidden states; lists of N."""
    found = []
    temperature = trainer.args.temperature
    for ids, present, tokens, mask in zip(
        rollout.prompts.ids, rollout.prompts.mask, rollout.tokens, rollout.mask, strict=True
    ):
        prompt, completion = ids[present], tokens[mask]
        whole = torch.cat([prompt, completion])[None]
        output = trainer.model(whole, output_hidden_states=True)
        steps = slice(len(prompt) - 1, -1)
        log_probs = (output.logits[0, steps] / temperature).log_softmax(-1)
        reference = log_probs.detach()
        if trainer.reference is not None:
            with torch.no_grad():
                reference = (trainer.reference.model(whole).logits[0, steps] / temperature).log_softmax(-1)
        kl = (log_probs.exp() * (log_probs - reference)).sum(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        taken = log_probs.gather(-1, completion[:, None])[:, 0]
        found.append((taken, kl, entropy, output.hidden_states[-1][0, steps]))
    return found
