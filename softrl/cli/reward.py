"""`softrl reward fit`: a reward model from labelled texts or preference pairs, measured and saved with a card."""

import sys
from dataclasses import dataclass, field
from typing import Any

PROG = "softrl reward fit"
OBJECTIVES = ("classification", "preference")


@dataclass
class RewardFitArguments:
    """
    Arguments of `softrl reward fit` that are neither the training's nor the model's.

    Args:
        objective (`str`, *optional*, defaults to `"classification"`):
            `"classification"` of texts labelled 0 and 1 (the reward is then the probability of 1), or `"preference"`:
            pairs of a chosen and a rejected text, by TRL's `RewardTrainer`.
        dataset_name (`str`, *optional*, defaults to `"reviews"`):
            `"reviews"` (embedded), a hub name, a folder saved by `Dataset.save_to_disk`, or a .csv, .json, .jsonl or
            .parquet file, with columns `text` and `label`, or `chosen`, `rejected` and, if there is one, `prompt`.
        part (`str`, *optional*, defaults to `"judge"`):
            Of `reviews`: the half to fit on, `"judge"` or `"reward"`; the other one is measured on. The token-linear
            classifier is fitted on `"reward"`, so it can judge what a model of `"judge"` rewards.
        prompt (`str`, *optional*, defaults to `""`):
            Of preference pairs of `reviews`: the text before both.
        num_train, num_test (`int`, *optional*, default to `12000` and `3000`):
            How many texts or pairs to use at most.
    """

    objective: str = field(
        default=OBJECTIVES[0], metadata={"help": "What it is fitted on.", "choices": list(OBJECTIVES)}
    )
    dataset_name: str = field(default="reviews", metadata={"help": "'reviews', a hub name, a folder or a file."})
    part: str = field(default="judge", metadata={"help": "Of 'reviews': which half is fitted on."})
    prompt: str = field(default="", metadata={"help": "Of pairs of 'reviews': the text before both."})
    num_train: int = field(default=12000, metadata={"help": "Texts or pairs to fit on, at most."})
    num_test: int = field(default=3000, metadata={"help": "Held-out texts or pairs, at most."})


USAGE = """usage: softrl reward fit [--config RECIPE] [--key value ...]

Fits a reward model and saves it with what it was measured at on held-out data: accuracy, calibration, a card and a
reliability diagram. Without arguments MiniLM becomes a classifier of favourable film reviews (a quarter of an hour on
two cores). `softrl train --reward_funcs FOLDER` then trains a policy on it, whatever its tokenizer is.

`softrl reward fit --help` lists every key; a recipe is minilm/reviews or one of your own.
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the process's exit status: 2 for a mistake."""
    if not argv or argv[0] != "fit":
        print(USAGE, end="", file=sys.stdout if argv[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    from softrl.assets import AssetError

    try:
        return _fit(*parsed(argv[1:]))
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\n{PROG}: interrupted; nothing was saved but its checkpoints. Where it has any (--save_strategy steps "
            "--save_steps N), go on with --resume_from_checkpoint latest.",
            file=sys.stderr,
        )
        return 130


def parsed(argv: list[str]) -> tuple[RewardFitArguments, Any, Any]:
    """Recipe and command line, the latter winning."""
    from trl import ModelConfig

    from softrl.cli.arguments import parse_recipe
    from softrl.trainers.reward_model_config import RewardModelConfig

    classes = (RewardFitArguments, RewardModelConfig, ModelConfig)
    return parse_recipe(classes, argv, PROG, section="reward_model", model_name_or_path="minilm-l6")


def _fit(arguments: RewardFitArguments, args: Any, model_args: Any) -> int:
    from trl import get_peft_config

    from softrl._store import CARD
    from softrl.cli.train import checkpoint_to_resume
    from softrl.data.labelled import labelled_texts, preference_pairs
    from softrl.trainers.loading import check_output_dir
    from softrl.trainers.reward_model_fitting import fit_classifier, fit_preferences, save_reward_model

    check_output_dir(args.output_dir, CARD, "a reward model")
    checkpoint = checkpoint_to_resume(args)
    loading = {"dtype": model_args.dtype, "revision": model_args.model_revision}
    args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
    if arguments.objective == "preference":
        pairs = preference_pairs(
            arguments.dataset_name, arguments.part, arguments.prompt, arguments.num_train, arguments.num_test
        )
        fit, data = fit_preferences, pairs
    else:
        fit = fit_classifier
        data = labelled_texts(arguments.dataset_name, arguments.part, arguments.num_train, arguments.num_test)
    print(f"fitting {model_args.model_name_or_path} on {len(data[0])} and measuring on {len(data[1])} ...", flush=True)
    fitted = fit(model_args.model_name_or_path, *data, args, get_peft_config(model_args), checkpoint)
    save_reward_model(fitted, args.output_dir)
    _print(fitted, args.output_dir)
    return 0


def _print(fitted: Any, folder: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="on held-out data", title_justify="left")
    for title in ("", "number", "accuracy", "calibration error", "Brier score", "NLL, nats"):
        table.add_column(title, justify="right" if title else "left")
    for source, each in fitted.held_out.items():
        measures = (each.accuracy, each.expected_calibration_error, each.brier_score, each.nll_nats)
        table.add_row(source, str(each.num_texts), *(f"{value:.3f}" for value in measures))
    Console().print(table)
    print(
        f"{fitted.facts['seconds']:.0f} s. Saved with card and reliability diagram in {folder}; to train on it: "
        f"softrl train --reward_funcs {folder}"
    )
