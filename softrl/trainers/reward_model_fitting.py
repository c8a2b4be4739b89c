"""Reward models from labelled texts or preference pairs: fitted, calibrated, measured on others, saved with a card.

Training itself is transformers' `Trainer` and TRL's `RewardTrainer`. Left out: adapters that stay apart (they are
merged), more than two classes.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from jaxtyping import Float
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer
from trl import RewardTrainer

from softrl._store import CARD
from softrl.assets import resolve_model, write_folder_atomically
from softrl.data.reviews import unit_hash
from softrl.rewards.calibration import Calibration, ReliabilityBin, fitted_temperature, measure, reliability
from softrl.rewards.reward_model import APPEND_EOS
from softrl.trainers.loading import check_output_dir, supported_dtype
from softrl.trainers.reward_model_config import RewardModelConfig

_VALIDATION_FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class FittedRewardModel:
    """A reward model with one logit, what it was measured at on held-out data, and facts for its card.

    Args:
        model: a sequence classifier. `problem_type` is "multi_label_classification" where its logit is the log-odds
            of label 1, and not set where it is a score that is compared.
        tokenizer: its own.
        held_out: measures by source of the data; "all" is everything. Of pairs: of the difference of their scores.
        reliability: probabilities on the held-out data and what came true of them.
        facts: everything else of the card.
    """

    model: nn.Module
    tokenizer: Any
    held_out: dict[str, Calibration]
    reliability: list[ReliabilityBin]
    facts: dict[str, Any]


def fit_classifier(
    model_name: str,
    train: Dataset,
    test: Dataset,
    args: RewardModelConfig,
    peft_config: PeftConfig | None = None,
    resume_from_checkpoint: str | None = None,
) -> FittedRewardModel:
    """Fine-tune an encoder or a decoder as the classifier of texts labelled 0 and 1, all of its weights or an adapter.

    Args:
        model_name: short name, folder or hub name.
        train, test: columns `text` and `label`; with a column `source` the measures are also given by source.
        args: how to train, and `calibrate`.
        peft_config: an adapter, merged when it is trained.
        resume_from_checkpoint: of an interrupted run.
    Raises:
        ValueError: the model cannot be loaded.
    """
    started = time.monotonic()
    train, validation = _held_apart(train, "text", args)
    settings = {"problem_type": "multi_label_classification", "label2id": {"favourable": 0}}
    model, tokenizer = _loaded(model_name, args, **settings, id2label={0: "favourable"})
    if peft_config is not None:
        model = get_peft_model(model, _with_head(peft_config))

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["text"], truncation=True, max_length=args.max_length)
        return {**ids, "labels": [float(row["label"])]}

    trainer = Trainer(
        model, args, DataCollatorWithPadding(tokenizer),
        train.map(encoded, remove_columns=train.column_names), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    model = _merged(trainer)

    def margins(rows: Dataset, title: str) -> Float[Tensor, "n"]:
        return scores(model, tokenizer, rows["text"], args, title)

    return _measured(model, tokenizer, margins, validation, test, args, started, num_train=len(train))


def fit_preferences(
    model_name: str,
    train: Dataset,
    test: Dataset,
    args: RewardModelConfig,
    peft_config: PeftConfig | None = None,
    resume_from_checkpoint: str | None = None,
) -> FittedRewardModel:
    """Fit a reward model on preference pairs by TRL's `RewardTrainer` (Bradley-Terry).

    Args:
        model_name: short name, folder or hub name; of the policy's base model, to share its tokenizer.
        train, test: columns `chosen`, `rejected` and, if there is one, `prompt`: texts, or what the tokenizer's chat
            template takes.
        args, peft_config, resume_from_checkpoint: see `fit_classifier`.
    Raises:
        ValueError: the model cannot be loaded.
    """
    started = time.monotonic()
    train, validation = _held_apart(train, "chosen", args)
    model, tokenizer = _loaded(model_name, args)
    # It is loaded, and TRL would say that these are ignored; and pairs have no single length to be grouped by.
    args.model_init_kwargs, args.train_sampling_strategy = None, "random"
    trainer = RewardTrainer(
        model, args, train_dataset=train, processing_class=tokenizer, peft_config=_with_head(peft_config)
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    model = _merged(trainer)
    # TRL ends texts, not conversations, with one; where that is the padding too, classifiers of transformers skip it.
    reads_end = isinstance(train[0]["chosen"], str) and tokenizer.eos_token_id != tokenizer.pad_token_id
    setattr(model.config, APPEND_EOS, reads_end)

    def margins(rows: Dataset, title: str) -> Float[Tensor, "n"]:
        chosen, rejected = (
            scores(model, tokenizer, [_whole(row, column, tokenizer) for row in rows], args, title)
            for column in ("chosen", "rejected")
        )
        return chosen - rejected

    return _measured(model, tokenizer, margins, validation, test, args, started, num_train=len(train))


@torch.inference_mode()
def scores(
    model: nn.Module, tokenizer: Any, texts: list[str], args: RewardModelConfig, title: str | None = None
) -> Float[Tensor, "n"]:
    """The only logit of every text, float64, on the CPU; with a title, under a progress bar."""
    model.eval()
    found = torch.zeros(len(texts), dtype=torch.float64)
    by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    size = args.per_device_eval_batch_size
    for start in tqdm(range(0, len(texts), size), desc=title, leave=False, disable=None if title else True):
        rows = by_length[start : start + size]
        tokens = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=args.max_length,
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        found[rows] = model(**tokens).logits[:, 0].double().cpu()
    return found


def save_reward_model(fitted: FittedRewardModel, folder: str | Path) -> None:
    """Write model, tokenizer, `card.json`, README.md and reliability.png: whole or not at all.

    A folder of an earlier fit, or of this one's checkpoints, is replaced.

    Raises:
        ValueError: see `check_output_dir`.
    """
    check_output_dir(folder, CARD, "a reward model")
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with write_folder_atomically(folder) as temporary:
        fitted.model.save_pretrained(temporary)
        fitted.tokenizer.save_pretrained(temporary)
        held_out = {source: dataclasses.asdict(measures) for source, measures in fitted.held_out.items()}
        (temporary / CARD).write_text(json.dumps({**fitted.facts, "held_out": held_out}, indent=2) + "\n", "utf-8")
        (temporary / "README.md").write_text(_model_card(fitted, Path(folder).name), "utf-8")
        plot_reliability(fitted, temporary / "reliability.png")


def plot_reliability(fitted: FittedRewardModel, path: Path) -> None:
    """The reliability diagram: how often what the model says with some probability is so."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bins = [each for each in fitted.reliability if each.count]
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(5, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    upper.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    upper.plot([each.mean_probability for each in bins], [each.share_positive for each in bins], marker="o")
    everything = fitted.held_out["all"]
    upper.set_title(
        f"{everything.num_texts} held out: accuracy {everything.accuracy:.1%}, "
        f"calibration error {everything.expected_calibration_error:.3f}",
        fontsize=10,
    )
    upper.set_ylabel("share that is so")
    lower.bar([each.mean_probability for each in bins], [each.count for each in bins], width=0.04)
    lower.set_ylabel("count")
    lower.set_xlabel("probability that the model gives")
    figure.savefig(path, format="png", dpi=120)
    plt.close(figure)


def _loaded(model_name: str, args: RewardModelConfig, **settings: Any) -> tuple[nn.Module, Any]:
    name = resolve_model(model_name)
    loading = {"dtype": "float32", **(args.model_init_kwargs or {})}
    loading["dtype"] = supported_dtype(loading["dtype"], args.device)
    transformers.set_seed(args.seed)  # the head is initialised at random
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            ignore_mismatched_sizes=True,
            **settings,
            **loading,  # another classifier's head goes
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={model_name!r} cannot be loaded as a sequence classifier "
            f"({str(error).splitlines()[0]}); pass 'minilm-l6', 'smollm2-135m', a local folder or a hub name"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _held_apart(train: Dataset, column: str, args: RewardModelConfig) -> tuple[Dataset, Dataset]:
    """Texts to train on, and the tenth that the temperature is fitted on."""
    held = [args.calibrate and unit_hash(str(text), "validation") < _VALIDATION_FRACTION for text in train[column]]
    apart = [train.select([row for row, is_held in enumerate(held) if is_held == wanted]) for wanted in (False, True)]
    if len(apart[0]) == 0:
        raise ValueError(f"there is nothing to train on: {len(train)} rows; give more, or calibrate=False")
    return apart[0], apart[1]


def _with_head(peft_config: PeftConfig | None) -> PeftConfig | None:
    """The adapter of a classifier, whose head is trained too."""
    return None if peft_config is None else dataclasses.replace(peft_config, task_type="SEQ_CLS")


def _merged(trainer: Any) -> Any:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _whole(row: dict[str, Any], column: str, tokenizer: Any) -> str:
    """Prompt and answer as the text that `RewardTrainer` reads."""
    if isinstance(row[column], str):
        return row.get("prompt", "") + row[column].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
    return tokenizer.apply_chat_template([*(row.get("prompt") or []), *row[column]], tokenize=False)


def _measured(
    model: Any, tokenizer: Any, margins: Any, validation: Dataset, test: Dataset, args: RewardModelConfig,
    started: float, num_train: int,
) -> FittedRewardModel:  # fmt: skip
    temperature = 1.0
    if len(validation):
        temperature = fitted_temperature(margins(validation, "calibrating"), _labels(validation))
        _divide_logits(model, temperature)
    log_odds, labels = margins(test, "measuring"), _labels(test)
    held_out = {"all": measure(log_odds, labels)}
    if "source" in test.column_names:
        for source in sorted(set(test["source"])):
            rows = torch.tensor([each == source for each in test["source"]])
            held_out[source] = measure(log_odds[rows], labels[rows])
    facts = {
        "title": "reward model",
        "base_model": Path(model.config._name_or_path).name,
        "num_train": num_train,
        "num_validation": len(validation),
        "temperature": round(temperature, 4),
        "learning_rate": args.learning_rate,
        "num_train_epochs": args.num_train_epochs,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "max_length_tokens": args.max_length,
        "seed": args.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": round(time.monotonic() - started, 1),
    }
    return FittedRewardModel(model, tokenizer, held_out, reliability(log_odds, labels), facts)


def _labels(rows: Dataset) -> Float[Tensor, "n"]:
    """Labels of texts; of pairs, that the chosen one is better."""
    return torch.tensor(rows["label"] if "label" in rows.column_names else [1] * len(rows), dtype=torch.float64)


@torch.no_grad()
def _divide_logits(model: nn.Module, temperature: float) -> None:
    """Scale the last layer, so that whoever loads the model gets calibrated logits."""
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no last linear layer to put a temperature into; pass calibrate=False"
        )
    for parameter in heads[-1].parameters():
        parameter.div_(temperature)


def _model_card(fitted: FittedRewardModel, name: str) -> str:
    rows = "\n".join(
        f"| {source} | {each.num_texts} | {each.accuracy:.3f} | {each.expected_calibration_error:.3f} | "
        f"{each.brier_score:.3f} | {each.nll_nats:.3f} |"
        for source, each in fitted.held_out.items()
    )
    facts = "\n".join(
        f"- {key.replace('_', ' ')}: {value}" for key, value in fitted.facts.items() if key != "versions"
    )
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\ntags: [softrl, reward-model]\n---\n\n"
        f"# {name}\n\nA reward model, fitted by `softrl reward fit`. Its temperature is in its logit.\n\n"
        "| held out | number | accuracy | calibration error | Brier score | NLL, nats |\n|---|---|---|---|---|---|\n"
        f"{rows}\n\n![Reliability](reliability.png)\n\n{facts}\n\n"
        f'As a reward: `softrl train --reward_funcs {name}`, or `reward_funcs=["{name}"]`.\n'
    )
