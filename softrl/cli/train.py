"""`softrl train`: train a policy from a recipe, alone or under `accelerate launch -m softrl train ...`."""

import difflib
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softrl.trainers import SoftRolloutConfig, SoftRolloutTrainer

BUILTIN_DATASET = "review-openings"


@dataclass
class TrainArguments:
    """
    Arguments of `softrl train` that are neither the trainer's nor the model's.

    Args:
        reward_funcs (`list[str]`, *optional*, defaults to `["sentiment"]`):
            `"sentiment"` (the embedded token-linear classifier, fitted for the policy's tokenizer), a file saved by
            `TokenLinearReward.save`, a sequence classifier in the policy's vocabulary (hub name or folder), or a
            dotted path to a reward, to a differentiable function of soft tokens, or to what makes one.
        judge (`str`, *optional*, defaults to `"sentiment"`):
            `"sentiment"` (MiniLM, fitted on other reviews than the reward), `"none"`, or a dotted path to a function
            from a list of texts to a tensor of scores.
        dataset_name (`str`, *optional*, defaults to `"review-openings"`):
            `"review-openings"` (embedded), a hub name, a folder saved by `Dataset.save_to_disk`, or a .json, .jsonl,
            .csv, .parquet or .txt file with a `prompt` column of texts or of conversations, which go through the
            tokenizer's chat template (a text file has one prompt a line).
        dataset_train_split, dataset_test_split (`str`, *optional*, default to `"train"` and `"test"`):
            Splits of a hub data set or folder.
        num_train_prompts, num_eval_prompts (`int`, *optional*, default to `1024` and `64`):
            How many prompts to use at most; of `review-openings` exactly so many.
        prompt_length_tokens (`int`, *optional*, defaults to `8`):
            Length of `review-openings` in tokens.
        prompt_prefix (`str`, *optional*, defaults to `""`):
            Text put before every prompt that is text; an error for conversations.
    """

    reward_funcs: list[str] = field(
        default_factory=lambda: ["sentiment"],
        metadata={"help": "'sentiment', a saved token-linear reward, a classifier's name, or a dotted path."},
    )
    judge: str = field(default="sentiment", metadata={"help": "'sentiment', 'none' or a dotted path."})
    dataset_name: str = field(
        default=BUILTIN_DATASET, metadata={"help": "'review-openings', a hub name, a local folder or a file."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    num_train_prompts: int = field(default=1024, metadata={"help": "Prompts to train on, at most."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts, at most."})
    prompt_length_tokens: int = field(default=8, metadata={"help": "Length of 'review-openings' in tokens."})
    prompt_prefix: str = field(default="", metadata={"help": "Text put before every prompt."})


def make_parser(prog: str = "softrl train") -> Any:
    """A TrlParser over our arguments, the trainer's and the model's."""
    from trl import ModelConfig, TrlParser

    from softrl.trainers import SoftRolloutConfig

    parser = TrlParser((TrainArguments, SoftRolloutConfig, ModelConfig), prog=prog, allow_abbrev=False)
    parser.set_defaults(model_name_or_path="smollm2-135m")
    return parser


def parse(argv: list[str], prog: str = "softrl train") -> tuple[TrainArguments, "SoftRolloutConfig", Any]:
    """Recipe and command line, the latter winning.

    Raises:
        ValueError: the recipe does not exist or is not a mapping, or a key is unknown (the closest one is named).
    """
    # TRL's own default trips over a renaming in transformers; nothing that a user of softrl could act on.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    parser = make_parser(prog)
    argv = [part for argument in argv for part in _split_equals(argument)]
    if "--config" in argv:
        position = argv.index("--config") + 1
        if position == len(argv):
            raise ValueError("--config needs the path or the name of a recipe")
        argv[position] = str(find_recipe(argv[position]))
    *parsed, from_recipe, from_command = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = sorted(action.dest for action in parser._actions)
    for source, remaining in (("recipe", from_recipe[::2]), ("command line", from_command)):
        unknown = [text.lstrip("-") for text in remaining if text.startswith("--")] or remaining
        if unknown:
            raise ValueError(unknown_key(unknown[0], known, source))
    return tuple(parsed)


def _split_equals(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def unknown_key(key: str, known: list[str], source: str) -> str:
    """The message for a key that no dataclass has."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "`softrl train --help` lists all keys"
    return (
        f"unknown key {key!r} on the {source}: {hint}" if source != "recipe" else f"unknown recipe key {key!r}: {hint}"
    )


def find_recipe(name: str) -> Path:
    """A recipe by path, or by name from the recipes that travel with softrl.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    import softrl

    package = Path(softrl.__file__).parent
    folders = [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()]
    for candidate in [Path(name), *(f / name for f in folders), *(f / f"{name}.yaml" for f in folders)]:
        if candidate.is_file():
            return candidate
    shipped = sorted(str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.yaml"))
    raise ValueError(f"no recipe {name!r}: it is neither a file nor one of {shipped}")


def build_trainer(
    arguments: TrainArguments, training_args: "SoftRolloutConfig", model_args: Any
) -> "SoftRolloutTrainer":
    """The trainer that a recipe describes."""
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from softrl.assets import resolve_model
    from softrl.trainers import SoftRolloutTrainer

    name = resolve_model(model_args.model_name_or_path)
    settings = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    if model_args.attn_implementation is not None:
        settings["attn_implementation"] = model_args.attn_implementation
    training_args.model_init_kwargs = {**settings, **(training_args.model_init_kwargs or {})}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", revision=model_args.model_revision)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r} cannot be loaded ({str(error).splitlines()[0]}); pass 'smollm2-135m', a "
            "local folder with a model and its tokenizer, or a hub name"
        ) from error
    train, test = load_prompts(arguments, tokenizer)
    return SoftRolloutTrainer(
        model=name,
        reward_funcs=arguments.reward_funcs,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        judge=load_judge(arguments.judge),
    )


def load_prompts(arguments: TrainArguments, tokenizer: Any) -> tuple[Any, Any]:
    """Training and held-out prompts, with the prefix in front.

    Raises:
        ValueError: the data set is empty, cannot be read, or lacks a split; or a prefix for conversations.
    """
    from datasets.exceptions import DatasetsError

    name = arguments.dataset_name
    if Path(name).is_file() and Path(name).stat().st_size == 0:
        raise ValueError(f"dataset_name={name!r} is an empty file; it needs at least two prompts")
    try:
        train, test = _load_splits(arguments, tokenizer)
    except (DatasetsError, OSError) as error:
        raise ValueError(
            f"dataset_name={name!r} cannot be read ({error.__cause__ or error}); pass {BUILTIN_DATASET!r}, a hub "
            "name, a folder saved by save_to_disk, or a .json, .jsonl, .csv, .parquet or .txt file"
        ) from error
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


def _load_splits(arguments: TrainArguments, tokenizer: Any) -> tuple[Any, Any]:
    import datasets

    name = arguments.dataset_name
    if name == BUILTIN_DATASET:
        from softrl.data.prompts import review_openings

        length = arguments.prompt_length_tokens
        return (
            review_openings(tokenizer, arguments.num_train_prompts, length, "train"),
            review_openings(tokenizer, arguments.num_eval_prompts, length, "test"),
        )
    suffix = Path(name).suffix.lstrip(".")
    if Path(name).is_file():
        builder = {"jsonl": "json", "txt": "text"}.get(suffix, suffix)
        loaded = datasets.load_dataset(builder, data_files=name)["train"]
        if builder == "text":
            loaded = loaded.rename_column("text", "prompt")
        if len(loaded) < 2:
            raise ValueError(f"dataset_name={name!r} has {len(loaded)} prompts; it needs two, one to hold out")
        splits = loaded.train_test_split(test_size=min(arguments.num_eval_prompts, len(loaded) // 2), seed=0)
    else:
        splits = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
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
    if "." not in text:
        raise ValueError(f"judge: {text!r} is neither 'sentiment', 'none', nor a dotted path to a function")
    from softrl.rewards.resolve import imported

    return imported(text, "judge")


def checkpoint_to_resume(training_args: "SoftRolloutConfig") -> str | None:
    """`--resume_from_checkpoint` as a path: a folder, or "latest" (also "true") for the newest in `output_dir`.

    Raises:
        ValueError: there is no such checkpoint.
    """
    from transformers.trainer_utils import get_last_checkpoint

    wanted = training_args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() not in ("latest", "true"):
        if not Path(wanted).is_dir():
            raise ValueError(f"resume_from_checkpoint={wanted!r} is not a folder; pass one, or 'latest'")
        return str(wanted)
    folder = training_args.output_dir
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if last is None:
        raise ValueError(f"resume_from_checkpoint={wanted!r}, but {folder} holds no checkpoint to resume from")
    return last


def main(argv: list[str]) -> int:
    """Train; save the model, and say how to resume when interrupted."""
    from softrl.assets import AssetError

    try:
        arguments, training_args, model_args = parse(argv)
        checkpoint = checkpoint_to_resume(training_args)
        trainer = build_trainer(arguments, training_args, model_args)
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"softrl train: {error}", file=sys.stderr)
        return 2
    from softrl.trainers.callbacks import InterruptCallback

    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.interrupted:
        trainer.accelerator.print(
            f"Stopped at step {trainer.state.global_step}. Resume with: softrl train {' '.join(argv)} "
            "--resume_from_checkpoint latest"
        )
        return 130
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if trainer.is_world_process_zero():
        from softrl.studies.report import plot_run

        for figure in plot_run(trainer.state.log_history, Path(training_args.output_dir)):
            print(f"Figure: {figure}")
    return 0
