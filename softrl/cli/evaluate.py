"""`softrl evaluate`: what a run has learned, on held-out prompts, beside the policy that it began with."""

import sys
from pathlib import Path
from typing import Any

PROG = "softrl evaluate"
USAGE = """usage: softrl evaluate --config RECIPE [--checkpoint FOLDER] [--key value ...]

Samples the held-out prompts of a recipe of `softrl train` twice, from the policy that a run began with and from what
it left in `output_dir`, with the same random streams. Prints reward, judge, KL, diversity and perplexity before and
after, with completions; writes before.json and after.json into the run's folder. A run of `--trainer listwise` is
measured by how it orders the held-out sets of completions; what it writes is shown by any recipe that samples and has
the same adapter: softrl evaluate --config quickstart --checkpoint FOLDER --output_dir ELSEWHERE. One of `--trainer
quietstar` by the likelihood of held-out text with and without thoughts, and one of `--trainer soft_sft` by that behind
true tokens and behind the model's own soft ones. One of `--trainer soft_ar` by that of all tokens and of those beyond
the first window, with the text's own memory, without any, and with another text's. One of `--trainer reasoner` by that
of the mixture after thoughts, of the base LM and of the interpreter.

  --checkpoint FOLDER  another folder with a model or an adapter; "latest" for the run's last checkpoint
  --key value          any key of `softrl train`
"""

_TABLES = {  # trainers of texts, and what an evaluation of theirs shows
    "quietstar": ("nll", "base_nll", "gain", "nll_hard", "base_nll_hard", "accuracy", "base_accuracy", "mixing"),
    "soft_sft": ("hard_nll", "soft_nll", "nll_gap", "entropy", "soft_entropy", "fed_entropy"),
    "soft_ar": (
        "nll", "nll_truncated", "nll_permuted", "nll_soft", "nll_beyond", "nll_truncated_beyond",
        "nll_permuted_beyond", "nll_soft_beyond", "accuracy_beyond", "accuracy_truncated_beyond",
        "accuracy_permuted_beyond", "gain_truncated", "gain_truncated_se", "gain_permuted", "gain_permuted_se",
    ),
    "reasoner": ("nll", "base_nll", "interpreter_nll", "gain", "accuracy", "mixing", "thought_entropy"),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the command; returns the process's exit status: 2 for a mistake."""
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0 if argv else 2
    from softrl.assets import AssetError

    try:
        return _evaluate(argv)
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def _evaluate(argv: list[str]) -> int:
    import datasets
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.utils import logging

    from softrl.cli.arguments import WITHOUT_REWARDS
    from softrl.cli.quickstart import evaluated
    from softrl.cli.train import build_trainer, parse
    from softrl.studies.report import print_ranked_report, print_report, save_samples

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    wanted, argv = _checkpoint_argument(argv)
    arguments, training_args, model_args = parse(argv, PROG)
    if arguments.trainer.startswith("trl_"):
        raise ValueError(f"trainer={arguments.trainer!r}: give one of ours, whose evaluation this is")
    folder = _trained_folder(wanted, training_args.output_dir)
    trainer = build_trainer(arguments, training_args, model_args)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if arguments.trainer in _TABLES:
        return _evaluate_texts(trainer, folder, arguments.trainer)
    measure, report = evaluated, print_report
    if arguments.trainer in WITHOUT_REWARDS:
        measure, report = _ordered, print_ranked_report
    before = measure(trainer, "as training began")
    load_trained(trainer, folder)
    after = measure(trainer, f"of {folder}")
    for name, samples in (("before", before), ("after", after)):
        save_samples(samples, Path(training_args.output_dir) / f"{name}.json")
    report(before, after)
    return 0


def _evaluate_texts(trainer: Any, folder: Path, name: str) -> int:
    """What the tokens of held-out text cost with what the trainer adds and without, as training began and after it."""
    from rich.console import Console
    from rich.table import Table

    print(f"reading {len(trainer.eval_dataset)} held-out texts as training began ...", flush=True)
    before = trainer.evaluate()
    if name == "quietstar":
        trainer.load_thinking(folder)
    else:
        load_trained(trainer, folder)
    print(f"and as {folder} does ...", flush=True)
    after = trainer.evaluate()
    table = Table("", "before", "after", title=f"{len(trainer.eval_dataset)} held-out texts, nats a token")
    for row in _TABLES[name]:
        if f"eval_{row}" in after:
            table.add_row(row, *(f"{metrics[f'eval_{row}']:.4f}" for metrics in (before, after)))
    Console().print(table)
    return 0


def _ordered(trainer: Any, when: str) -> list[Any]:
    from softrl.trainers.listwise_evaluation import evaluate_sets

    print(f"ordering {len(trainer.eval_dataset)} held-out sets {when} ...", flush=True)
    return evaluate_sets(trainer, trainer.eval_dataset)


def _checkpoint_argument(argv: list[str]) -> tuple[str | None, list[str]]:
    if "--checkpoint" not in argv:
        return None, argv
    place = argv.index("--checkpoint")
    if place + 1 == len(argv):
        raise ValueError("--checkpoint needs a folder, or 'latest'")
    return argv[place + 1], argv[:place] + argv[place + 2 :]


def _trained_folder(wanted: str | None, output_dir: str) -> Path:
    """The folder with what was trained.

    Raises:
        ValueError: there is none.
    """
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(wanted or output_dir)
    if wanted == "latest":
        last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        folder = Path(last or output_dir)
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise ValueError(
            f"{folder} holds neither a model nor an adapter; train it first (softrl train saves its result in "
            "output_dir), or name a checkpoint: --checkpoint FOLDER"
        )
    return folder


def load_trained(trainer: Any, folder: Path) -> None:
    """Put trained weights into a trainer's model, in place, so that the reference stays what it was.

    Raises:
        ValueError: the folder has an adapter and the recipe asks for none, or the other way round; or its model has
            other parameters.
    """
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = trainer.accelerator.unwrap_model(trainer.model)
    has_adapter = (folder / "adapter_config.json").is_file()
    if has_adapter != isinstance(model, PeftModel):
        raise ValueError(
            f"{folder} holds {'an adapter' if has_adapter else 'a whole model'}, and the recipe trains "
            f"{'a whole model' if has_adapter else 'an adapter'}; evaluate it with the recipe that trained it "
            "(use_peft)"
        )
    if has_adapter:
        outcome = set_peft_model_state_dict(model, load_peft_weights(str(folder)))
        if outcome.unexpected_keys:
            raise ValueError(f"{folder} has an adapter of another shape: {outcome.unexpected_keys[:3]} have no place")
    else:
        trained = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
        _check_parameters(trained, model.state_dict(), folder)
        model.load_state_dict(trained)


def _check_parameters(trained: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    shapes = [{name: list(value.shape) for name, value in each.items()} for each in (trained, ours)]
    names = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if names:
        theirs, wanted = (each.get(names[0], "none") for each in shapes)
        raise ValueError(
            f"{folder} holds another model than the recipe makes: {len(names)} of its parameters differ, such as "
            f"{names[0]} of shape {theirs}, here {wanted}; evaluate it with the recipe and settings that trained it"
        )
