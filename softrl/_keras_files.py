"""Read what Keras leaves behind, without Keras: the weights of an h5 file, and a pickled `Tokenizer`.

A pickle can run any code while it is loaded. This reader admits the four names that a tokenizer of Keras needs, three
containers of the standard library and the tokenizer's own class, for which it puts an object without code; any other
name ends the reading.
"""

import collections
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softrl._store import AssetError


class _Attributes:
    """Stands for a class of Keras: holds the pickled attributes, and has no code that a pickle could call."""


_TOKENIZER_MODULES = (
    "keras.src.legacy.preprocessing.text",
    "keras.preprocessing.text",
    "keras_preprocessing.text",
)
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("builtins", "int"): int,
    **{(module, "Tokenizer"): _Attributes for module in _TOKENIZER_MODULES},
}


class _TokenizerUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The admitted object of that name.

        Raises:
            AssetError: any other name.
        """
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise AssetError(
                f"the pickled tokenizer asks for {module}.{name}, which no tokenizer of Keras needs: loading it could "
                "run code, so it was not loaded. Delete the file, and look at where it came from."
            ) from None


@dataclass(frozen=True)
class WordVocabulary:
    """What a Keras `Tokenizer` does to a text: lower case, `separators` cut it into words, unknown words are dropped.

    `words[i]` has the id i; id 0 is the padding, whose word is empty.
    """

    words: tuple[str, ...]
    separators: str

    def words_of(self, text: str) -> list[str]:
        """The words of a text, known or not."""
        return [word for word in self.spaced(text).split(" ") if word]

    def spaced(self, text: str) -> str:
        """The text in lower case, with a space for every character that separates words."""
        return text.lower().translate(str.maketrans(dict.fromkeys(self.separators, " ")))


def read_tokenizer(path: Path) -> WordVocabulary:
    """The vocabulary of a pickled Keras `Tokenizer`.

    Raises:
        AssetError: the pickle asks for a name that no tokenizer needs, is no tokenizer, or has settings that
            `WordVocabulary` does not describe (characters for words, a token for unknown words, upper case).
    """
    try:
        with path.open("rb") as file:
            loaded = _TokenizerUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise AssetError(f"{path.name} is no pickled Keras tokenizer: {error}. Run again to fetch it anew.") from error
    found: Mapping[str, Any] = vars(loaded) if isinstance(loaded, _Attributes) else {}
    expected = {"lower": True, "split": " ", "char_level": False, "oov_token": None}
    wrong = {name: found.get(name) for name, value in expected.items() if name not in found or found[name] != value}
    index, size, separators = found.get("word_index"), found.get("num_words"), found.get("filters")
    if wrong or not isinstance(index, dict) or not isinstance(size, int) or not isinstance(separators, str):
        raise AssetError(
            f"{path.name} holds no Keras tokenizer of words as expected ({expected}, with word_index, num_words and "
            f"filters); it differs in {wrong or 'its vocabulary'}. This version of softrl does not know this file."
        )
    kept = sorted((number, word) for word, number in index.items() if number < size)
    if [number for number, _ in kept] != list(range(1, len(kept) + 1)):
        raise AssetError(f"the word ids of {path.name} are not 1, 2, 3 and so on, as a Keras tokenizer gives them.")
    return WordVocabulary(("", *(word for _, word in kept)), separators)


def read_weights(path: Path, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Arrays of a Keras `.weights.h5` file, in float32.

    Args:
        path: the file.
        names: what each array is to be called, and its path in the file.
    Raises:
        AssetError: an array is not there.
    """
    import h5py  # here alone: only a conversion needs it

    with h5py.File(path, "r") as file:
        missing = [place for place in names.values() if place not in file]
        if missing:
            raise AssetError(f"{path.name} has no {', '.join(missing)}: these are other weights than expected.")
        return {name: np.asarray(file[place], dtype=np.float32) for name, place in names.items()}
