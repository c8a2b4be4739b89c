"""`softrl train`: train a policy from a recipe, alone or under `accelerate launch -m softrl train ...`."""

import sys
from pathlib import Path
from typing import Any

from softrl.cli.arguments import (
    BUILTIN_DATASET,
    CORPORA,
    EMBEDDED_DATASETS,
    FROM_SCRATCH,
    KEYWORDS_DATASET,
    RANKINGS_DATASET,
    SCRATCH,
    SHAKESPEARE_CORPUS,
    TEXTS_DATASET,
    WITHOUT_REWARDS,
    DataArguments,
    TrainArguments,
    find_recipe,
    make_parser,
    parse,
    unknown_key,
)

__all__ = [
    "build_trainer",
    "checkpoint_to_resume",
    "find_recipe",
    "load_judge",
    "load_prompts",
    "main",
    "make_parser",
    "parse",
    "unknown_key",
]


def build_trainer(arguments: TrainArguments, training_args: Any, model_args: Any) -> Any:
    """The trainer that a recipe describes: one of ours, or TRL's own on our rewards."""
    from trl import get_peft_config, get_quantization_config

    from softrl.assets import resolve_model

    if arguments.trainer in WITHOUT_REWARDS:
        _check_without_rewards(arguments)
    name = resolve_model(model_args.model_name_or_path)
    loading = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if model_args.attn_implementation is not None:
        loading["attn_implementation"] = model_args.attn_implementation
    training_args.model_init_kwargs = {**loading, **(training_args.model_init_kwargs or {})}
    model: Any = name
    if arguments.trainer in FROM_SCRATCH:
        from softrl.cli.scratch import beginning

        tokenizer = None if name == SCRATCH else _tokenizer(name, model_args.model_revision)
        model, tokenizer, train, test = beginning(arguments, training_args, name, tokenizer)
    else:
        tokenizer = _tokenizer(name, model_args.model_revision)
        train, test = load_prompts(arguments, tokenizer)
    if arguments.trainer == "soft_sft":
        thinks = training_args.think_tokens
        train, test = (_with_completions(rows, tokenizer, arguments.dataset_name, thinks) for rows in (train, test))
    settings = {
        "model": model,
        "args": training_args,
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }
    if arguments.trainer.startswith("trl_"):
        trainer = _trl_trainer(arguments, settings)
    else:
        from softrl import trainers

        ours = {
            "soft_rollout": "SoftRolloutTrainer",
            "reinforce": "ReinforceTrainer",
            "ppo": "PPOTrainer",
            "text_gan": "TextGANTrainer",
            "reinforce_gan": "ReinforceGANTrainer",
            "listwise": "ListwisePreferenceTrainer",
            "quietstar": "QuietSTaRTrainer",
            "soft_sft": "SoftSFTTrainer",
            "soft_ar": "SoftARTrainer",
            "reasoner": "ReasonerTrainer",
        }
        trainer_class = getattr(trainers, ours[arguments.trainer])
        if arguments.trainer not in WITHOUT_REWARDS:
            settings |= {"reward_funcs": arguments.reward_funcs, "judge": load_judge(arguments.judge)}
        trainer = trainer_class(**settings)
    if arguments.gradient_statistics:
        from softrl.trainers.gradient_statistics import GradientStatisticsCallback

        GradientStatisticsCallback().add_to(trainer)
    return trainer


def _tokenizer(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, padding_side="left", revision=revision)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r} cannot be loaded ({str(error).splitlines()[0]}); pass 'smollm2-135m', a "
            "local folder with a model and its tokenizer, or a hub name"
        ) from error


def _with_completions(rows: Any, tokenizer: Any, dataset_name: str, as_text: bool = False) -> Any:
    """References as what TRL's SFTTrainer calls completions, where the data set has nothing else to train on.

    As text they can still be put between other tokens; TRL then ends them all.
    """
    from softrl.cli.sft import encoded_references

    columns = set(rows.column_names)
    if "reference" not in columns or columns & {"completion", "messages", "text", "input_ids"}:
        return rows
    if as_text:
        firsts = [each if isinstance(each, str) else each[0] for each in rows["reference"]]
        return rows.remove_columns("reference").add_column("completion", firsts)

    # Those of the openings are cut in mid-sentence, where nothing ends.
    return encoded_references(rows, tokenizer, dataset_name != BUILTIN_DATASET, dataset_name)


def _check_without_rewards(arguments: TrainArguments) -> None:
    for name, given in (("reward_funcs", arguments.reward_funcs), ("judge", arguments.judge)):
        if given not in ([], "none"):
            raise ValueError(
                f"trainer={arguments.trainer!r} learns from the data set alone and calls no {name}: got {given!r}. "
                "Leave it out; scores of ranked completions belong into the column 'rewards'"
            )


def _trl_trainer(arguments: TrainArguments, settings: dict[str, Any]) -> Any:
    """TRL's RLOOTrainer or GRPOTrainer on our rewards' hard faces; a judge is left to evaluations after the run."""
    import trl

    from softrl.rewards.base import as_trl
    from softrl.rewards.resolve import resolve_rewards
    from softrl.trainers.loading import supported_dtype

    tokenizer, loading = settings["processing_class"], settings["args"].model_init_kwargs
    loading["dtype"] = supported_dtype(loading["dtype"], settings["args"].device)
    rewards = resolve_rewards(arguments.reward_funcs, tokenizer, settings["model"], differentiates=False)
    trainer_class = trl.RLOOTrainer if arguments.trainer == "trl_rloo" else trl.GRPOTrainer
    return trainer_class(reward_funcs=[as_trl(reward, tokenizer) for reward in rewards], **settings)


def load_prompts(arguments: DataArguments, tokenizer: Any) -> tuple[Any, Any]:
    """Training and held-out prompts, with the prefix in front.

    Raises:
        ValueError: the data set is empty, cannot be read, or lacks a split; or a prefix for conversations.
    """
    name = arguments.dataset_name
    train, test = _load_splits(arguments, tokenizer)
    prefix = arguments.prompt_prefix
    if not prefix or "prompt" not in train.column_names:  # the trainer says what is missing
        return train, test
    if not isinstance(train[0]["prompt"], str):
        raise ValueError(
            f"prompt_prefix={prefix!r} goes before text, but the prompts of dataset_name={name!r} are conversations; "
            "leave it out, or put it into their messages"
        )

    def prefixed(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "prompt": prefix + row["prompt"]}

    return train.map(prefixed), test.map(prefixed)


def _load_splits(arguments: DataArguments, tokenizer: Any) -> tuple[Any, Any]:
    name = arguments.dataset_name
    counts: dict[Any, int] = {"train": arguments.num_train_prompts, "test": arguments.num_eval_prompts}
    if name == BUILTIN_DATASET:
        from softrl.data.prompts import review_openings

        lengths = {
            "prompt_length_tokens": arguments.prompt_length_tokens,
            "reference_length_tokens": arguments.reference_length_tokens,
        }
        train, test = (review_openings(tokenizer, count, split=split, **lengths) for split, count in counts.items())
        return train, test
    if name == KEYWORDS_DATASET:
        from softrl.data.keywords import review_keywords

        longest = arguments.reference_length_tokens or 24
        train, test = (review_keywords(tokenizer, count, longest, split) for split, count in counts.items())
        return train, test
    if name == RANKINGS_DATASET:
        from softrl.data.rankings import review_rankings
        from softrl.rewards.fit import token_linear_judge

        score, longest = token_linear_judge(), arguments.reference_length_tokens or 24
        train, test = (review_rankings(tokenizer, count, score, longest, split) for split, count in counts.items())
        return train, test
    if name == TEXTS_DATASET:
        from softrl.data.reviews import load_reviews

        parts = {"train": "reward", "test": "prompts"}
        train, test = (load_reviews(parts[split]).select(range(count)) for split, count in counts.items())
        return train.select_columns(["text"]), test.select_columns(["text"])
    if name == SHAKESPEARE_CORPUS and getattr(arguments, "trainer", None) not in WITHOUT_REWARDS:
        from softrl.data.characters import shakespeare
        from softrl.data.corpus import corpus_prompts

        length = arguments.prompt_length_tokens
        train, test = (corpus_prompts(shakespeare(split), tokenizer, length, count) for split, count in counts.items())
        return train, test
    if name in CORPORA:
        raise ValueError(f"dataset_name={name!r} is read by {', '.join(FROM_SCRATCH)} alone, in blocks of tokens")
    from softrl.data.files import read_data_set

    splits = read_data_set(name, EMBEDDED_DATASETS)
    if Path(name).is_file():
        loaded = splits["train"]
        if Path(name).suffix == ".txt" and getattr(arguments, "trainer", None) not in ("quietstar", "soft_sft"):
            loaded = loaded.rename_column("text", "prompt")
        if len(loaded) < 2:
            raise ValueError(f"dataset_name={name!r} has {len(loaded)} prompts; it needs two, one to hold out")
        splits = loaded.train_test_split(test_size=min(arguments.num_eval_prompts, len(loaded) // 2), seed=0)
    wanted = (
        (arguments.dataset_train_split, arguments.num_train_prompts),
        (arguments.dataset_test_split, arguments.num_eval_prompts),
    )
    for split, _ in wanted:
        if split not in splits:
            raise ValueError(f"data set {name!r} has no split {split!r}; it has {sorted(splits)}")
    train, test = (splits[split].select(range(min(count, len(splits[split])))) for split, count in wanted)
    return train, test


def load_judge(text: str) -> Any:
    """A judge by short name or dotted path; None for "none"."""
    if text == "none":
        return None
    if text == "sentiment":
        from softrl.rewards.fit import sentiment_judge

        return sentiment_judge().score
    if text == "token_linear":
        from softrl.rewards.fit import token_linear_judge

        return token_linear_judge()
    if "." not in text:
        raise ValueError(
            f"judge: {text!r} is neither 'sentiment', 'token_linear', 'none', nor a dotted path to a function"
        )
    from softrl.rewards.resolve import imported

    return imported(text, "judge")


def checkpoint_to_resume(training_args: Any) -> str | None:
    """`--resume_from_checkpoint` as a path: a folder, or "latest" (also "true") for the newest in `output_dir`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    from transformers.trainer_utils import get_last_checkpoint

    from softrl import trainers
    from softrl.trainers.checkpoints import latest_checkpoint

    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() not in ("latest", "true"):
        if not Path(wanted).is_dir():
            raise ValueError(f"resume_from_checkpoint={wanted!r} is not a folder; pass one, or 'latest'")
        return str(wanted)
    folder = training_args.output_dir
    ours = (
        trainers.RolloutConfig, trainers.ListwisePreferenceConfig, trainers.QuietSTaRConfig, trainers.SoftSFTConfig,
        trainers.SoftARTrainingConfig, trainers.ReasonerTrainingConfig,
    )  # fmt: skip
    newest = latest_checkpoint if isinstance(training_args, ours) else get_last_checkpoint  # TRL's have no list
    last = newest(folder) if Path(folder).is_dir() else None
    if last is None:
        raise ValueError(f"resume_from_checkpoint={wanted!r}, but {folder} holds no checkpoint to resume from")
    return last


def train(trainer: Any, checkpoint: str | None, command: str) -> int | None:
    """Train; an exit code where the run cannot go on or cannot start from that checkpoint, which is then said why."""
    from softrl.trainers.checkpoints import CheckpointError, NotResumableError

    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (CheckpointError, NotResumableError, FloatingPointError) as error:
        if trainer.is_world_process_zero():
            print(f"{command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, NotResumableError) else 1
    return None


def main(argv: list[str]) -> int:
    """Train; save the model, and say how to resume when interrupted."""
    from softrl.assets import AssetError
    from softrl.cli.launch import launch

    try:
        if (status := launch("train", argv)) is not None:
            return status
        arguments, training_args, model_args = parse(argv)
        checkpoint = checkpoint_to_resume(training_args)
        trainer = build_trainer(arguments, training_args, model_args)
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"softrl train: {error}", file=sys.stderr)
        return 2
    status = _run(trainer, checkpoint, argv)
    trainer.accelerator.end_training()  # a process that exits with gloo's threads in it may be aborted
    return status


def _run(trainer: Any, checkpoint: str | None, argv: list[str]) -> int:
    from softrl.rewards.base import ReadsDecodedText
    from softrl.trainers.callbacks import InterruptCallback

    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    for reward in trainer.rewards.rewards if hasattr(trainer, "rewards") else []:
        if isinstance(reward, ReadsDecodedText):
            trainer.accelerator.print(f"Reward {reward.name!r} has another tokenizer: {reward.coverage}.")
    resume = f"softrl train {' '.join(argv)} --resume_from_checkpoint latest"
    if (status := train(trainer, checkpoint, "softrl train")) is not None:
        return status
    if interrupt.signal is not None:
        trainer.accelerator.print(f"Stopped at step {trainer.state.global_step}. Resume with: {resume}")
        return interrupt.exit_code
    output_dir = trainer.args.output_dir
    trainer.save_model(output_dir)
    trainer.accelerator.print(f"Model saved to {output_dir}.")
    if trainer.is_world_process_zero():
        from softrl.studies.report import plot_run

        for figure in plot_run(trainer.state.log_history, Path(output_dir)):
            print(f"Figure: {figure}")
    return 0
