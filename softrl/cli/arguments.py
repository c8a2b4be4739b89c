"""What `softrl train` reads: the arguments of a run, which of the trainers it is for, recipes by name."""

import difflib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

BUILTIN_DATASET = "review-openings"
KEYWORDS_DATASET = "review-keywords"
RANKINGS_DATASET = "review-rankings"
TEXTS_DATASET = "review-texts"
EMBEDDED_DATASETS = (BUILTIN_DATASET, KEYWORDS_DATASET, RANKINGS_DATASET, TEXTS_DATASET)
# Of trainers of small models, whose model and tokenizer are made where model_name_or_path is "scratch".
SCRATCH, SHAKESPEARE_CORPUS, POINTER_CORPUS = "scratch", "shakespeare", "pointer-chasing"
RECALL_CORPUS = "key-recall"
CORPORA = (SHAKESPEARE_CORPUS, POINTER_CORPUS, RECALL_CORPUS)
FROM_SCRATCH = ("reasoner", "soft_ar")
_ALL_BLOCKS = 100_000  # more than the corpus has
_SECTIONS = ("reward_model", "sft")  # of a recipe: keys of other commands than `train`
TRAINERS = (
    "soft_rollout", "reinforce", "ppo", "text_gan", "reinforce_gan", "listwise", "quietstar", "soft_sft", "reasoner",
    "soft_ar", "trl_rloo", "trl_grpo",
)  # fmt: skip
# They sample no completions of prompts, and what they read has its scores: their data sets by default.
WITHOUT_REWARDS = {
    "listwise": RANKINGS_DATASET, "quietstar": TEXTS_DATASET, "soft_sft": TEXTS_DATASET,
    **dict.fromkeys(FROM_SCRATCH, SHAKESPEARE_CORPUS),
}  # fmt: skip


@dataclass
class DataArguments:
    """
    Where prompts come from.

    Args:
        dataset_name (`str`, *optional*, defaults to `"review-openings"`):
            `"review-openings"`, `"review-keywords"` (sentences to be written from their keywords),
            `"review-rankings"` (four sentences that begin alike, scored by the token-linear classifier; the default of
            `"listwise"`) or `"review-texts"` (whole reviews; the default of `"quietstar"` and `"soft_sft"`), all
            embedded; `"shakespeare"` (the works as one text, the default of trainers from scratch, which also know
            `"pointer-chasing"` and `"key-recall"`; for others passages of `prompt_length_tokens` to go on from); a hub
            name, a folder saved by `Dataset.save_to_disk`, or a .json, .jsonl, .csv, .parquet or .txt file with a
            `prompt` column of texts or of conversations, which go through the tokenizer's chat template (a text file
            has one prompt a line). Rewards and metrics that compare need a column `reference`: a text, or a list of
            texts, as it would follow the prompt, its leading space included. `"listwise"` needs `completions` and
            `rewards` or `ranking`, lists of equal length; `"quietstar"` reads `text` or `input_ids`; `"soft_sft"` what
            TRL's SFTTrainer reads (`text`, `messages`, `prompt` with `completion`), or a `reference` as the
            completion.
        dataset_train_split, dataset_test_split (`str`, *optional*, default to `"train"` and `"test"`):
            Splits of a hub data set or folder.
        num_train_prompts, num_eval_prompts (`int`, *optional*, default to `1024` and `64`):
            How many prompts to use at most; of embedded ones exactly so many.
        prompt_length_tokens (`int`, *optional*, defaults to `8`):
            Length of `review-openings`, and of `shakespeare`'s passages, in tokens.
        reference_length_tokens (`int`, *optional*, defaults to `0`):
            Give `review-openings` so many of the tokens that follow as references; 0 for none. Those of
            `review-keywords`, and the sentences of `review-rankings`, are whole and of at most so many tokens, 24 for
            0.
        prompt_prefix (`str`, *optional*, defaults to `""`):
            Text put before every prompt that is text; an error for conversations.
    """

    dataset_name: str = field(
        default=BUILTIN_DATASET,
        metadata={"help": f"One of {', '.join(map(repr, EMBEDDED_DATASETS))}, a hub name, a folder or a file."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    num_train_prompts: int = field(default=1024, metadata={"help": "Prompts to train on, at most."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Held-out prompts, at most."})
    prompt_length_tokens: int = field(default=8, metadata={"help": "Length of 'review-openings' in tokens."})
    reference_length_tokens: int = field(default=0, metadata={"help": "Length of embedded references in tokens."})
    prompt_prefix: str = field(default="", metadata={"help": "Text put before every prompt."})


@dataclass
class TrainArguments(DataArguments):
    """
    Arguments of `softrl train` that are neither the trainer's nor the model's, beside those of its data.

    Args:
        trainer (`str`, *optional*, defaults to `"soft_rollout"`):
            `"soft_rollout"`, `"reinforce"` (and its `estimator`), `"ppo"`, `"text_gan"` and `"reinforce_gan"` (whose
            `reward_funcs` name `"discriminator"`; the data set needs a column `reference`), `"listwise"` (on ranked
            completions in the data set; neither rewards nor a judge), `"quietstar"` (thoughts, on plain text; neither,
            too), `"soft_sft"` (supervised, behind soft tokens; neither, too), `"reasoner"` (a small model from scratch
            that thinks in latents; neither, too), or TRL's own `"trl_rloo"` and
            `"trl_grpo"` on the same data and rewards. Keys of another trainer are ignored, and named.
        gradient_statistics (`bool`, *optional*, defaults to `False`):
            Log signal-to-noise ratio and variance of the gradient, from the micro-batches of a step; needs
            `gradient_accumulation_steps` of at least 2.
        reward_funcs (`list[str]`, *optional*, defaults to `["sentiment"]`):
            `"sentiment"` (the embedded token-linear classifier, fitted for the policy's tokenizer), `"nontoxic"` (one
            minus the probability of toxicity by a classifier over words, fetched at its first use), `"bleu"`,
            `"rouge1"`, `"rouge2"` or `"rougeL"` (of the policy's tokens, against the data set's column `reference`),
            `"similarity"` (cosine of all-MiniLM-L6-v2's sentence embeddings of the completion and of that column),
            a file saved by `TokenLinearReward.save`, a sequence classifier in the policy's vocabulary (hub name or
            folder), or a dotted path to a reward, to a differentiable function of soft tokens, or to what makes one.
            Trainers that do not differentiate rewards take TRL's functions of texts as well.
        judge (`str`, *optional*, defaults to `"sentiment"`):
            `"sentiment"` (MiniLM, fitted on other reviews than the reward), `"token_linear"` (where MiniLM is the
            reward), `"none"`, or a dotted path to a function from a list of texts to a tensor of scores.
    """

    trainer: str = field(default=TRAINERS[0], metadata={"help": "Trainer.", "choices": list(TRAINERS)})
    gradient_statistics: bool = field(
        default=False, metadata={"help": "Log the gradient's signal-to-noise ratio over the micro-batches of a step."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["sentiment"],
        metadata={
            "help": "'sentiment', 'bleu', 'nontoxic', ..., a saved reward, a classifier's name, or a dotted path."
        },
    )
    judge: str = field(default="sentiment", metadata={"help": "'sentiment', 'token_linear', 'none' or a dotted path."})


def config_class(trainer: str) -> type:
    """The configuration of a trainer; imported only when it is asked for."""
    from softrl import trainers
    from softrl.trainers import trl_config

    classes = {
        "soft_rollout": trainers.SoftRolloutConfig,
        "reinforce": trainers.ReinforceConfig,
        "ppo": trainers.PPOConfig,
        "text_gan": trainers.TextGANConfig,
        "reinforce_gan": trainers.ReinforceGANConfig,
        "listwise": trainers.ListwisePreferenceConfig,
        "quietstar": trainers.QuietSTaRConfig,
        "soft_sft": trainers.SoftSFTConfig,
        "soft_ar": trainers.SoftARTrainingConfig,
        "reasoner": trainers.ReasonerTrainingConfig,
        "trl_rloo": trl_config.TrlRLOOConfig,
        "trl_grpo": trl_config.TrlGRPOConfig,
    }
    return classes[trainer]


def make_parser(prog: str = "softrl train", trainer: str = TRAINERS[0]) -> Any:
    """A TrlParser over our arguments, the trainer's and the model's."""
    from trl import ModelConfig, TrlParser

    parser = TrlParser((TrainArguments, config_class(trainer), ModelConfig), prog=prog, allow_abbrev=False)
    parser.set_defaults(model_name_or_path="smollm2-135m")
    if trainer in FROM_SCRATCH:
        parser.set_defaults(model_name_or_path=SCRATCH, num_train_prompts=_ALL_BLOCKS)
    if trainer in WITHOUT_REWARDS:
        parser.set_defaults(dataset_name=WITHOUT_REWARDS[trainer], reward_funcs=[], judge="none")
    parser.epilog = (
        "Several processes: --accelerate_config NAME|PATH runs the command under `accelerate launch`; NAME is one of "
        "ddp, fsdp2, zero1, zero2, zero3, cpu, ddp_cpu; --num_processes N and other options of the launch go with it."
    )
    return parser


def parse(argv: list[str], prog: str = "softrl train") -> tuple[TrainArguments, Any, Any]:
    """Recipe and command line, the latter winning.

    Keys of other trainers than the chosen one are left out, with one line that names them.

    Raises:
        ValueError: the recipe does not exist or is not a mapping, or a key is unknown to every trainer (the closest
            one is named), or the trainer is.
    """
    argv = _with_recipe_found(argv)
    trainer = _chosen_trainer(argv)
    parser = make_parser(prog, trainer)
    *parsed, from_recipe, from_command = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = {action.dest for action in parser._actions}
    of_others = {field.name for other in TRAINERS for field in fields(config_class(other))} - known
    ignored = list(_of_other_trainers(from_recipe[::2], "recipe", known, of_others))
    ignored += _of_other_trainers(from_command, "command line", known, of_others)
    if trainer.startswith("trl_") and parsed[1].top_k != 0:  # there it truncates the sampler, here it is K
        parsed[1].top_k = 0
        ignored.append("top_k")
    if ignored and os.environ.get("RANK", "0") == "0":
        print(f"{prog}: trainer={trainer!r} has no use for {', '.join(dict.fromkeys(ignored))}", flush=True)
    return tuple(parsed)


def parse_recipe(classes: tuple[type, ...], argv: list[str], prog: str, section: str, **defaults: Any) -> Any:
    """Recipe and command line as dataclasses, for commands other than `train`; the latter wins.

    Args:
        classes: the dataclasses.
        argv: the command line.
        prog: the command's name.
        section: a recipe of several commands has the keys of this one under this key; any other is all its own.
        defaults: of keys, over the dataclasses'.
    Raises:
        ValueError: the recipe does not exist or is not a mapping, or a key is unknown (the closest one is named).
    """
    from trl import TrlParser

    argv = _with_recipe_found(argv)
    parser = TrlParser(classes, prog=prog, allow_abbrev=False)
    parser.set_defaults(**defaults)
    known = {action.dest for action in parser._actions}
    if "--config" in argv:
        position = argv.index("--config")
        path = argv[position + 1]
        recipe = _read(path)
        recipe = recipe.get(section, recipe)
        if not isinstance(recipe, dict):
            raise ValueError(f"{path}: {section} must be a mapping of keys to values, got {recipe!r}")
        if unknown := [key for key in recipe if key not in known]:
            raise ValueError(unknown_key(unknown[0], sorted(known), "recipe"))
        parser.set_defaults(**recipe)
        argv = argv[:position] + argv[position + 2 :]
    *parsed, remaining = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if remaining:
        raise ValueError(unknown_key(remaining[0].lstrip("-").split("=")[0], sorted(known), "command line"))
    return tuple(parsed)


def _with_recipe_found(argv: list[str]) -> list[str]:
    """The command line with a recipe's name replaced by its path."""
    # TRL's own default trips over a renaming in transformers; nothing that a user of softrl could act on.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    argv = [part for argument in argv for part in _split_equals(argument)]
    if "--config" in argv:
        position = argv.index("--config") + 1
        if position == len(argv):
            raise ValueError("--config needs the path or the name of a recipe")
        argv[position] = str(find_recipe(argv[position]))
    return argv


def _read(path: str) -> dict[str, Any]:
    recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {recipe!r}")
    return recipe


def _chosen_trainer(argv: list[str]) -> str:
    """The trainer that the command line names, or else the recipe."""
    chosen = TRAINERS[0]
    if "--config" in argv:
        recipe = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text(encoding="utf-8"))
        chosen = recipe.get("trainer", chosen) if isinstance(recipe, dict) else chosen
    if "--trainer" in argv[:-1]:
        chosen = argv[argv.index("--trainer") + 1]
    if chosen not in TRAINERS:
        raise ValueError(f"trainer must be one of {TRAINERS}, got {chosen!r}")
    return chosen


def _of_other_trainers(remaining: list[str], source: str, known: set[str], of_others: set[str]) -> Iterator[str]:
    """The keys among what the parser left over; ValueError for one that no trainer has."""
    for key in [text.lstrip("-").split("=")[0] for text in remaining if text.startswith("--")] or remaining:
        if key in _SECTIONS:
            continue
        if key not in of_others:
            raise ValueError(unknown_key(key, sorted(known | of_others), source))
        yield key


def _split_equals(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith(("--config=", "--trainer=")) else [argument]


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
    return find_shipped("recipes", name, "recipe")


def find_study(name: str) -> Path:
    """A study's recipe by path or name; those that are shipped lie in a folder of their own."""
    try:
        return find_recipe(name)
    except ValueError:
        return find_recipe(f"studies/{name}")


def find_shipped(folder_name: str, name: str, kind: str) -> Path:
    """A YAML file by path, or by name from a folder that travels with softrl.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    import softrl

    package = Path(softrl.__file__).parent
    folders = [folder for folder in (package / folder_name, package.parent / folder_name) if folder.is_dir()]
    for candidate in [Path(name), *(f / name for f in folders), *(f / f"{name}.yaml" for f in folders)]:
        if candidate.is_file():
            return candidate
    shipped = sorted(str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*.yaml"))
    raise ValueError(f"no {kind} {name!r}: it is neither a file nor one of {shipped}")
