"""What a folder's trials are made from beside their own keys, so that a sweep that goes on notices a change.

That is the recipe's name and contents, and the models that are made first. A key of the recipe that every trial sets
itself has no effect on any, and may change. Left out: the code of softrl, data sets and files that a recipe names.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from softrl.studies.sweep_launch import Values
from softrl.studies.sweep_values import differences, flat, in_words

# Of a recipe: where results go and what is told of them, and sections of other commands. No trial depends on them.
_WITHOUT_EFFECT = (
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "question", "notes", "reward_model", "sft",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What trials are made from.

    Attributes:
        recipe: its name.
        keys: its contents by path, those without effect left out.
        prepare: keys of the models made first, by name.
        set_by_trials: keys that every trial sets.
    """

    recipe: str
    keys: Values
    prepare: Mapping[str, Values]
    set_by_trials: Collection[str] = ()


def source_of(path: Path, prepare: Mapping[str, Values], set_by_trials: Collection[str]) -> Source:
    """Of a recipe's file."""
    return Source(recipe_name(path), recipe_keys(path), prepare, sorted(set_by_trials))


def recipe_name(path: Path) -> str:
    """The same from every folder and on every machine: `reasoner/shakespeare`; outside `recipes`, the file's name."""
    parts = path.resolve().with_suffix("").parts
    folders = [number for number, part in enumerate(parts[:-1]) if part == "recipes"]
    return "/".join(parts[folders[-1] + 1 :]) if folders else parts[-1]


def recipe_keys(path: Path) -> Values:
    """A recipe's contents by path, without what has no effect; those that JSON does not know as text."""
    given = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    keys = {key: value for key, value in given.items() if key not in _WITHOUT_EFFECT}
    return flat(json.loads(json.dumps(keys, default=str)))


def keys_of_model(path: Path, keys: Values) -> Values:
    """All that a model depends on which is made by a recipe with further keys, by path; null leaves the recipe's."""
    own = {key: value for key, value in keys.items() if value is not None}
    of_recipe = {name: value for name, value in recipe_keys(path).items() if not _is_set(name, own)}
    return of_recipe | flat(json.loads(json.dumps(own, default=str)))


def continued(source: Source, then: Mapping[str, Any] | None, folder: Path) -> dict[str, Any]:
    """The record of a folder whose trials go on.

    Args:
        source: of now.
        then: the folder's record; None where it has none.
        folder: for the error.
    Returns:
        A record that holds for all trials, those of then and those of now: what none of then depends on is of now.
    Raises:
        ValueError: something differs on which trials of then and of now depend; the message names it.
    """
    now = json.loads(json.dumps(asdict(source), default=str))
    if then is None:
        return dict(now)
    changed = {} if then["recipe"] == now["recipe"] else {"recipe": f"{then['recipe']} → {now['recipe']}"}
    own = (then["set_by_trials"], now["set_by_trials"])
    differing = differences(then["keys"], now["keys"])
    changed |= {path: of for path, of in differing.items() if not any(_is_set(path, keys) for keys in own)}
    shared = [name for name in now["prepare"] if name in then["prepare"]]  # others are added, as arms are
    before, after = ({name: each["prepare"][name] for name in shared} for each in (then, now))
    changed |= differences(flat(before, "prepare"), flat(after, "prepare"))
    if changed:
        raise ValueError(
            f"{folder} holds trials of another recipe than this one ({in_words(changed)}); choose another --output_dir"
        )
    kept = {path: value for path, value in then["keys"].items() if not _is_set(path, own[0])}
    free = {path: value for path, value in now["keys"].items() if _is_set(path, own[0])}
    return {
        "recipe": now["recipe"], "keys": kept | free, "prepare": then["prepare"] | now["prepare"],
        "set_by_trials": [key for key in own[0] if key in own[1]],
    }  # fmt: skip


def _is_set(path: str, keys: Collection[str]) -> bool:
    """Whether one of a trial's keys replaces what is there; a bare one of a variance recipe does so everywhere."""
    anywhere = path.startswith("problems.") and path.rpartition(".")[2] in keys
    return path in keys or path.partition(".")[0] in keys or anywhere
