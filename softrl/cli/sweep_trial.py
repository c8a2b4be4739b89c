"""One trial of `softrl sweep`: a `softrl train` run in a process and a folder of its own, and the numbers it left."""

import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softrl.studies.sweep_launch import Processes, TrialError, Values

PROG = "softrl sweep"
_RUN = "import sys; from softrl.cli.sweep_trial import train_trial; sys.exit(train_trial(sys.argv[1:]))"


@dataclass(frozen=True)
class TrainTrials:
    """Runs trials of a recipe of `softrl train`.

    Args:
        recipe: its path.
        folder: of the sweep.
        given: all keys of a trial, by its folder's name.
        run: what the process's Python is told; another one in tests.
    """

    recipe: Path
    folder: Path
    given: dict[str, Values]
    run: str = _RUN

    def __call__(self, values: Values, processes: Processes) -> dict[str, float]:
        """The numbers of a trial; one that has been finished is not run again.

        Raises:
            TrialError: the run failed; the message ends with the last line of its log.
        """
        name = folder_name(values)
        where = self.folder / "trials" / name
        where.mkdir(parents=True, exist_ok=True)
        if not (where / "metrics.json").is_file():
            words = [*words_of(self.recipe, self.given[name]), "--output_dir", str(where), *resuming(where)]
            status = processes.run([sys.executable, "-c", self.run, *words], where / "log.txt")
            if status != 0:
                raise TrialError(f"the run ended with status {status}; see {where / 'log.txt'}: {_last_line(where)}")
        return dict(json.loads((where / "metrics.json").read_text(encoding="utf-8")))


PREPARED = "{prepared}"


def prepare(recipe: Path, models: Mapping[str, Values], folder: Path, processes: Processes) -> None:
    """Train what trials start from or are scored by, each in a folder of its own; what has been made is kept.

    Raises:
        ValueError: a run failed, or what has been made, or begun, is of other keys.
    """
    from softrl.studies.sweep_record import keys_of_model

    for name, keys in models.items():
        where = folder / "prepared" / name
        where.mkdir(parents=True, exist_ok=True)
        if _is_made(where, keys_of_model(recipe, keys)):
            continue
        print(f"{PROG}: making {where} first", flush=True)
        words = [*words_of(recipe, keys), "--output_dir", str(where), *resuming(where)]
        if (status := processes.run([sys.executable, "-c", _MAKE, *words], where / "log.txt")) != 0:
            raise ValueError(f"{where} was not made, status {status}; see {where / 'log.txt'}: {_last_line(where)}")
        (where / _MAKING).replace(where / _MADE)


def _is_made(where: Path, keys: Values) -> bool:
    """Compare with the keys that were written before; those of a marker from before there were any are not known."""
    from softrl.studies.sweep_values import differences, in_words

    made = (where / _MADE).is_file()
    marker = where / (_MADE if made else _MAKING)
    text = marker.read_text(encoding="utf-8") if marker.is_file() else ""
    if text and (made or resuming(where)) and (changed := differences(json.loads(text), keys)):
        raise ValueError(
            f"{where} is of other keys than this recipe's ({in_words(changed)}); choose another --output_dir"
        )
    _write(keys, marker)
    return made


_MAKE = "import sys; from softrl.cli.train import main; sys.exit(main(sys.argv[1:]))"
_MADE, _MAKING = "made", "making"  # hold the keys, one once it is finished, the other from the beginning


def with_prepared(given: Values, folder: Path) -> Values:
    """Keys of a trial with the folders of what has been prepared."""
    where = str(folder / "prepared")
    return {key: of.replace(PREPARED, where) if isinstance(of, str) else of for key, of in given.items()}


def _last_line(folder: Path) -> str:
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "")


def check_keys(recipe: Path, given: Values) -> None:
    """Refuse a key that no trainer has, before the first run."""
    from softrl.cli.arguments import parse

    parse([*words_of(recipe, given), "--output_dir", "unused"], PROG)


def words_of(recipe: Path, given: Values) -> list[str]:
    """The command line of `softrl train` for a trial; null leaves a key as the recipe has it."""
    words = [(key, str(value)) for key, value in given.items() if value is not None]
    return ["--config", str(recipe), *(word for key, value in words for word in (f"--{key}", value))]


def resuming(folder: Path) -> list[str]:
    """An interrupted run goes on from its last checkpoint."""
    return ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []


def folder_name(values: Values) -> str:
    """A folder for a trial, readable."""
    return re.sub(r"[^A-Za-z0-9._=,-]+", "_", ",".join(f"{key}={value}" for key, value in values.items()))


def train_trial(argv: list[str]) -> int:
    """Train, evaluate, and write metrics.json: the last of everything that was logged, and the final evaluation.

    Returns:
        0; where a signal stopped it, after a checkpoint, what a shell reports for that.
    """
    begun = time.monotonic()
    from softrl.cli.train import build_trainer, parse, train
    from softrl.trainers.callbacks import InterruptCallback

    arguments, training_args, model_args = parse(argv, PROG)
    trainer = build_trainer(arguments, training_args, model_args)
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    if (status := train(trainer, _checkpoint(training_args), PROG)) is not None:
        return status
    if interrupt.signal is not None:
        return interrupt.exit_code
    metrics: dict[str, Any] = {}
    for row in trainer.state.log_history:
        metrics |= row
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    numbers = {**parameter_counts(trainer.model), **numbers, "trial_seconds": time.monotonic() - begun}
    _write(numbers, Path(training_args.output_dir) / "metrics.json")
    return 0


def _checkpoint(training_args: Any) -> str | None:
    """What to go on from; from the beginning where none is whole."""
    from softrl.cli.train import checkpoint_to_resume

    try:
        return checkpoint_to_resume(training_args)
    except ValueError as error:
        print(f"{PROG}: {error}; from the beginning", flush=True)
        return None


def parameter_counts(model: Any) -> dict[str, float]:
    """Parameters of a model, each once however many modules share it: all, without embeddings, and trained ones."""
    from torch import nn

    every = {id(each): each for each in model.parameters()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        "num_parameters": sum(each.numel() for each in every.values()),
        "num_parameters_without_embeddings": sum(p.numel() for name, p in every.items() if name not in embedded),
        "num_trained_parameters": sum(each.numel() for each in every.values() if each.requires_grad),
    }


def _write(numbers: dict[str, Any], path: Path) -> None:
    from softrl.assets import write_atomically

    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(numbers, indent=1, sort_keys=True), encoding="utf-8")
