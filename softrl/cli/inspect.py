"""`softrl inspect`: look inside a run of soft decoding, on a page or in the terminal.

Prints or writes what every step mixed and fed back, how unsure the model was, and where the run parts from another:
the hard decode of the same prompt, unless told otherwise. All further options are those of softrl generate.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

PROG = "softrl inspect"
_RECORDED = 8  # ids of a step that a record keeps at least, so that hard steps show what else was likely


def main(argv: list[str]) -> int:
    """Run the command; returns the process's exit status: 2 for a mistake."""
    given, of_generation = _parser().parse_known_args(argv)

    from softrl.assets import AssetError

    try:
        return _inspect(given, of_generation, shlex.join(["softrl", "inspect", *argv]))
    except (AssetError, ValueError, TypeError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder (smollm2-135m)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="generate from this text and look at that")
    what.add_argument("--record", help="look at a text of this file, which softrl generate --output_file wrote")
    parser.add_argument("--index", type=int, default=0, help="which line of the file, from 0 (0)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--compare_model", help="compare with this model's run, decoded in the same way")
    other.add_argument("--compare_record", help="compare with the line of that index in this file")
    other.add_argument("--no_compare", action="store_true", help="compare with nothing, not with the hard decode")
    parser.add_argument("--readings", type=int, default=4, help="texts to draw from the mixtures (4)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--terminal", action="store_true", help="print a table of the steps instead of a page")
    parser.add_argument("--output_file", type=Path, help="the page (runs/inspect.html)")
    return parser


def _inspect(given: argparse.Namespace, of_generation: list[str], command: str) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    if given.readings < 0:
        raise ValueError(f"--readings must not be negative, got {given.readings}")
    run, other, texts = (_recorded if given.record else _generated)(given, of_generation)
    if not run.steps:
        raise ValueError("the text has no tokens, so there is nothing to look at")
    from softrl.studies.inspect_run import readings

    drawn = readings(run, texts, given.readings, given.seed)
    if given.terminal:
        from rich.console import Console

        from softrl.studies.inspect_terminal import show

        show(Console(highlight=False), run, other, drawn)
    if given.output_file or not given.terminal:
        from softrl.studies.inspect_page import write_page

        path = given.output_file or Path("runs/inspect.html")
        write_page(path, run, other, drawn, command)
        print(f"Written to {path}; open it in a browser.")
    return 0


def _recorded(given: argparse.Namespace, of_generation: list[str]) -> tuple[Any, Any, Any]:
    """A line of a file, and one of another if that is asked for."""
    from softrl.studies.inspect_run import run_of
    from softrl.studies.inspect_text import TokenTexts

    if given.compare_model:
        raise ValueError("--compare_model generates, and --record does not; record both runs, then --compare_record")
    bound = argparse.ArgumentParser(prog=PROG, allow_abbrev=False)
    bound.add_argument("--max_entropy_nats", type=float, help="the bound that the run was made with")
    known = bound.parse_args(of_generation)
    texts = TokenTexts(load_tokenizer(given.model))
    name = "soft run" if not given.compare_record else f"run of {Path(given.record).stem}"
    run = run_of(_line(given.record, given.index), texts, name, known.max_entropy_nats)
    other = None
    if given.compare_record:
        other = run_of(_line(given.compare_record, given.index), texts, f"run of {Path(given.compare_record).stem}")
    return run, other, texts


def _line(path: str, index: int) -> dict[str, Any]:
    from softrl.studies.inspect_run import read_lines

    lines = read_lines(path)
    if not 0 <= index < len(lines):
        raise ValueError(f"--index {index}: {path} has {len(lines)} lines, counted from 0")
    return lines[index]


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer, by name or folder.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    from softrl.assets import resolve_model

    try:
        return AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {name} has no tokenizer ({str(error).splitlines()[0]}); name the model that made the run"
        ) from error


def _generated(given: argparse.Namespace, of_generation: list[str]) -> tuple[Any, Any, Any]:
    """A run of the prompt, and what it is compared with."""
    from softrl.cli import generate
    from softrl.generation.next_token import NextToken
    from softrl.generation.soft_settings import Phase, SoftDecoding
    from softrl.studies.inspect_run import run_of
    from softrl.studies.inspect_text import TokenTexts

    words = [*of_generation, "--model", given.model, "--prompt", given.prompt, "--seed", str(given.seed)]
    parser = generate.make_parser()
    parser.prog = PROG
    asked = parser.parse_args(words)
    if asked.prompts_file or asked.num_samples != 1:
        raise ValueError(
            "a page is of one text: leave out --prompts_file and --num_samples, or write them with softrl generate "
            "--output_file and look at one of them with --record and --index"
        )
    model, tokenizer = generate.load(asked.model, asked.dtype)
    texts, vocab_size = TokenTexts(tokenizer), model.get_output_embeddings().weight.shape[0]
    decoding = generate.decoding_of(asked, vocab_size, tokenizer)
    run = _run(asked, model, tokenizer, decoding, "hard run" if asked.hard else "soft run")
    if given.no_compare:
        return run, None, texts
    if given.compare_record:
        line = _line(given.compare_record, given.index)
        return run, run_of(line, texts, f"run of {Path(given.compare_record).stem}"), texts
    if given.compare_model:
        second, its_tokenizer = generate.load(given.compare_model, asked.dtype)
        if its_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{given.model} and {given.compare_model} have different tokens, so runs cannot be compared"
            )
        return run, _run(asked, second, tokenizer, decoding, f"run of {Path(given.compare_model).name}"), texts
    greedy = SoftDecoding(Phase(None, NextToken(greedy=True)))
    return run, _run(asked, model, tokenizer, greedy, "hard decode"), texts


def _run(asked: argparse.Namespace, model: Any, tokenizer: Any, decoding: Any, name: str) -> Any:
    """A model's run of the prompt, as `softrl generate` makes it."""
    from softrl.cli.generate import basis_aware_of
    from softrl.generation.soft_generate import soft_generate
    from softrl.models.policy import Policy, check_policy
    from softrl.studies.inspect_run import line_of, run_of
    from softrl.studies.inspect_text import TokenTexts
    from softrl.trainers.batches import INDEX_COLUMN, prompt_batch, prompt_text
    from softrl.trainers.loading import eos_token_ids

    policy = Policy(model)
    check_policy(policy)
    decoding, _ = basis_aware_of(asked, policy, decoding)
    prompt = [{"role": "user", "content": asked.prompt[0]}] if asked.chat else asked.prompt[0]
    made = prompt_batch([{"prompt": prompt, INDEX_COLUMN: 0}], tokenizer, 1, None, next(model.parameters()).device)
    record = soft_generate(
        policy, made.prompts, asked.max_new_tokens, decoding, 1, eos_token_ids(model, tokenizer), asked.seed,
        stop=asked.stop, tokenizer=tokenizer, num_recorded=min(_RECORDED, policy.vocab_size),
    )  # fmt: skip
    relaxation = decoding.thinking.relaxation
    bound = None if relaxation is None else relaxation.max_entropy_nats
    line = line_of(record, 0, prompt_text(prompt))
    return run_of(line, TokenTexts(tokenizer), name, bound, settings_of(decoding))


def settings_of(decoding: Any) -> dict[str, str]:
    """How a text was decoded, for people to read."""
    relaxation = decoding.thinking.relaxation
    if relaxation is None:
        return {"decoding": "hard, the likeliest token" if decoding.thinking.next_token.greedy else "hard, drawn"}
    found = {"relaxation": relaxation.name, "kept tokens": str(relaxation.truncation.top_k)}
    if relaxation.max_entropy_nats is not None:
        found["entropy bound"] = f"{relaxation.max_entropy_nats:g} nats"
    elif relaxation.temperature != 1.0:
        found["relaxation temperature"] = f"{relaxation.temperature:g}"
    if decoding.thinking.temperature != 1.0:
        found["temperature"] = f"{decoding.thinking.temperature:g}"
    for name, value, off in (
        ("top-p", relaxation.truncation.top_p, 1.0), ("min-p", relaxation.truncation.min_p, 0.0),
        ("norm correction", decoding.norm_correction, None), ("cold stop, nats", decoding.cold_stop_nats, None),
        ("most thinking tokens", decoding.max_thinking_tokens, None),
    ):  # fmt: skip
        if value != off:
            found[name] = str(value)
    return found
