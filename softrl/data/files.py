"""Data sets by name: a file, a folder that `save_to_disk` wrote, or a hub name."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

_BUILDERS = {"jsonl": "json", "txt": "text"}  # where the file's suffix is not the name of its reader


def read_data_set(name: str, builtin: tuple[str, ...]) -> dict[str, Dataset]:
    """Read a data set.

    Args:
        name: a file (.json, .jsonl, .csv, .parquet, .txt with a text a line, column `text`), a folder, or a hub name.
        builtin: other names that the caller takes, for the error's text.
    Returns:
        Its splits; one that has none is "train".
    Raises:
        ValueError: it is an empty file or cannot be read.
    """
    path = Path(name)
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"dataset_name={name!r} is an empty file")
    loaded: Any
    try:
        if path.is_file():
            suffix = path.suffix.lstrip(".")
            loaded = load_dataset(_BUILDERS.get(suffix, suffix), data_files=name)
        else:
            loaded = load_from_disk(name) if path.is_dir() else load_dataset(name)
    except (DatasetsError, OSError) as error:
        raise ValueError(
            f"dataset_name={name!r} cannot be read ({error.__cause__ or error}); pass "
            f"{', '.join(map(repr, builtin))}, a hub name, a folder saved by save_to_disk, or a .json, .jsonl, .csv, "
            ".parquet or .txt file"
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
