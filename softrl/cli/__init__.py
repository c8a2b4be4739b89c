"""The `softrl` command: one file a subcommand, imported only when it is asked for.

Nothing here imports torch or trl at the top level, so that `softrl --help` answers in about a second.
"""

import argparse
import importlib
import sys

# name -> one line for --help. A command lives in softrl/cli/<name>.py and defines `main(argv: list[str]) -> int`.
COMMANDS = {
    "quickstart": "train SmolLM2-135M to write favourable reviews, and print before and after (about five minutes)",
    "train": "train a policy from a recipe: softrl train --config recipes/quickstart.yaml [--key value ...]",
    "evaluate": "held-out completions of a trained policy beside its start: softrl evaluate --config RECIPE",
    "generate": "go on with prompts by soft tokens or hard ones: softrl generate --prompt TEXT [--model FOLDER]",
    "sft": "a supervised start for a policy, on prompts with references: softrl sft --config bleu/keywords",
    "reward": "fit a reward model on labelled texts or preference pairs: softrl reward fit --config minilm/reviews",
    "bench": "measure seconds, memory and errors: softrl bench rollout | thoughts | blocks | memory | hops",
    "variance": "bias, variance and price of gradient estimators: softrl variance --config studies/quick",
    "sweep": "grids and seeds of a recipe, one table and one figure: softrl sweep --config sweeps/reasoner-sharing",
    "study": "measure what a setting does, as a figure: softrl study entropy-bound",
    "compare": "learning curves and reward against KL for several methods: softrl compare --config compare-quick",
    "thoughts": "write with a model that thinks, compare ways to learn it: softrl thoughts generate | compare",
    "inspect": "look inside soft decoding, step by step, on a page or in the terminal: softrl inspect --prompt TEXT",
    "doctor": "what is installed, which engines run here, and whether a recipe fits: softrl doctor --config RECIPE",
    "assets": "fetch, check, convert and cache the embedded model, reviews, encoder and rewards",
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch `softrl COMMAND ...`; returns the process's exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="softrl",
        description="Reinforcement learning of language models by backpropagating rewards through soft tokens.",
        epilog=f"commands:\n{listing}\n\n`softrl COMMAND --help` shows a command's own arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="softrl [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    arguments, _ = parser.parse_known_args(argv[:1])
    if arguments.version:
        from softrl import __version__

        print(f"softrl {__version__}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    command = importlib.import_module(f"softrl.cli.{arguments.command}")
    return command.main(argv[1:])
