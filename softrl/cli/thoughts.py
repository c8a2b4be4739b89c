"""`softrl thoughts`: what a model that thinks writes, and what its thoughts do."""

import argparse
import sys
from typing import Any

PROG = "softrl thoughts"


def main(argv: list[str]) -> int:
    """Run a subcommand; returns the process's exit status: 2 for a mistake."""
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (add_arguments, _, line) in _COMMANDS.items():
        add_arguments(commands.add_parser(name, help=line, description=line, allow_abbrev=False))
    given = parser.parse_args(argv)

    from softrl.assets import AssetError

    try:
        return _COMMANDS[given.command][1](given)
    except (AssetError, ValueError, TypeError, OSError) as error:
        print(f"{PROG} {given.command}: {error}", file=sys.stderr)
        return 2


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder that QuietSTaRTrainer wrote")
    parser.add_argument("--prompt", required=True, action="append", help="text to go on with; may be given repeatedly")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="tokens of a text (32)")
    parser.add_argument("--num_samples", type=int, default=1, help="texts a prompt (1)")
    parser.add_argument("--show_thoughts", action="store_true", help="show what was thought, and where")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    when = parser.add_argument_group("when to think")
    when.add_argument("--think_every", type=int, default=1, help="before every k-th token (1)")
    when.add_argument("--think_steps", type=int, nargs="*", help="before these tokens, counted from 0; none: never")
    when.add_argument("--think_above", type=float, help="where the next token's entropy is larger, nats")
    how = parser.add_argument_group("how to think")
    how.add_argument("--n_thought", type=int, help="tokens of a thought (the model's own number)")
    how.add_argument(
        "--thoughts",
        default="policy",
        choices=["policy", "greedy", "random", "pause"],
        help="what is thought (policy)",
    )
    how.add_argument("--soft", action="store_true", help="think soft tokens")
    how.add_argument("--relaxation", default="gumbel_softmax", help="of soft tokens (gumbel_softmax)")
    how.add_argument("--soft_top_k", type=int, default=64, help="kept ids of a soft token, at most V (64)")
    how.add_argument(
        "--attention", default="shared", choices=["shared", "dense", "naive"], help="naive: any architecture (shared)"
    )
    then = parser.add_argument_group("how to choose the next token")
    then.add_argument("--greedy", action="store_true", help="the likeliest one")
    then.add_argument("--temperature", type=float, default=1.0, help="of a draw (1)")
    then.add_argument("--top_k", type=int, help="draw from the k likeliest")
    then.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest with this mass")
    then.add_argument("--min_p", type=float, default=0.0, help="draw from those with this share of the largest")


def _generate(given: argparse.Namespace) -> int:
    from softrl.generation.next_token import NextToken
    from softrl.generation.record import as_text
    from softrl.generation.thoughts import generate_with_thoughts

    next_token = NextToken(given.greedy, given.temperature, given.top_k, given.top_p, given.min_p)
    model, tokenizer = load_thinking(given.model)
    from softrl.trainers.batches import INDEX_COLUMN, prompt_batch
    from softrl.trainers.loading import eos_token_ids

    rows = [{"prompt": prompt, INDEX_COLUMN: index} for index, prompt in enumerate(given.prompt)]
    prompts = prompt_batch(rows, tokenizer, 1, None, model.start.device).prompts
    record = generate_with_thoughts(
        model, prompts, given.max_new_tokens, _thinking(given, model.policy.vocab_size), next_token,
        given.num_samples, eos_token_ids(model.lm, tokenizer), given.seed, attention=given.attention,
    )  # fmt: skip
    for text in as_text(record, tokenizer, given.show_thoughts):
        print(text)
    return 0


def _thinking(given: argparse.Namespace, vocab_size: int) -> Any:
    from softrl.generation.thoughts import Thinking
    from softrl.tokens.relaxation import make_relaxation
    from softrl.tokens.truncation import Truncation

    relaxation = None
    if given.soft:
        relaxation = make_relaxation(given.relaxation, Truncation(min(given.soft_top_k, vocab_size)))
    steps = None if given.think_steps is None else tuple(given.think_steps)
    return Thinking(given.think_every, steps, given.think_above, given.n_thought, given.thoughts, relaxation)


def load_thinking(folder: str) -> tuple[Any, Any]:
    """A model that thinks and its tokenizer, on a GPU where there is one.

    Raises:
        ValueError: the folder holds no model that thinks, or no tokenizer.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from softrl.models.thinking import ThinkingLM, load_thinking_config

    logging.disable_progress_bar()
    load_thinking_config(folder)  # says what is missing, before anything is loaded
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no tokenizer ({str(error).splitlines()[0]}); copy the model's there"
        ) from error
    model = ThinkingLM.from_pretrained(folder).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a recipe's path, or its name: thoughts-pointer")
    parser.add_argument("--output_dir", help="where runs and report go (the recipe's)")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    _study_arguments(parser)
    parser.add_argument("--methods", nargs="+", help="run these methods only")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these seeds only")


def _compare(given: argparse.Namespace) -> int:
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    study = _study(given)
    for option, wanted, known in (
        ("methods", given.methods, [method.name for method in study.config.methods]),
        ("seeds", given.seeds, study.config.seeds),
    ):
        if unknown := sorted(set(wanted or []) - set(known)):
            raise ValueError(f"--{option}: {unknown} are not in the recipe, which has {known}")
    try:
        study.train(given.methods, given.seeds)
    except KeyboardInterrupt:
        print("\nStopped. Finished runs are kept; the same command goes on.", file=sys.stderr)
        return 130
    return _report(given)


def _report(given: argparse.Namespace) -> int:
    from softrl.studies.thought_report import write_report

    study = _study(given)
    records = study.records()
    if not records:
        raise ValueError(
            f"{study.config.output_dir} holds no finished run of the recipe; softrl thoughts compare makes them"
        )
    print(f"Report: {write_report(study.config, records, f'{PROG} compare --config {given.config}')}")
    return 0


def _study(given: argparse.Namespace) -> Any:
    from softrl.cli.arguments import find_study
    from softrl.studies.thought_config import load_config
    from softrl.studies.thought_run import ThoughtStudy

    return ThoughtStudy(load_config(find_study(given.config), given.output_dir))


# name -> (its arguments, what it does with them, one line for --help)
_COMMANDS = {
    "generate": (_generate_arguments, _generate, "go on with prompts, thinking before tokens"),
    "compare": (_compare_arguments, _compare, "train ways to think and controls at equal seconds, and report"),
    "report": (_study_arguments, _report, "the page of a comparison's finished runs"),
}
