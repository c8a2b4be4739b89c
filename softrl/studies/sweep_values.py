"""Values of a sweep's keys: read from text, and compared with those of earlier.

YAML 1.1, which PyYAML reads, takes `1e4` and `1e-3` for words: it asks for a point and for the exponent's sign. Here
they are numbers wherever a sweep reads values: in its recipe and on the command line. What is quoted stays a word.
Left out: `nan`, `inf` and `infinity`, which stay words (YAML's own are `.nan` and `.inf`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"  # Python's float syntax without words and "_"
NOT_SET = "not set"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads as a number what Python does; comes last, so what YAML reads otherwise is not touched."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_NUMBER})\Z"), list("-+.0123456789"))


def read_values(text: str) -> Any:
    """YAML, with all that Python reads as a number."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def is_number(value: Any) -> bool:
    """A finite int or float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def comparable(value: Any) -> Any:
    """A value with words that are numbers as numbers: folders of before hold `1e4` as a word."""
    if isinstance(value, Mapping):
        return {str(key): comparable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(each) for each in value]
    return float(value) if isinstance(value, str) and re.fullmatch(_NUMBER, value) else value


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of mappings and lists by path, as in `problems.0.settings.steps`; an empty one inside is a leaf."""
    return dict(_leaves(value, path)) if path or value else {}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    inner: dict[Any, Any] = {}
    if isinstance(value, Mapping):
        inner = dict(value)
    elif isinstance(value, list | tuple):
        inner = dict(enumerate(value))
    if not inner:
        yield path, value
    for key, each in inner.items():
        yield from _leaves(each, f"{path}.{key}" if path else str(key))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """By path, `then → now` of each that differs."""
    missing = object()
    both = {path: (then.get(path, missing), now.get(path, missing)) for path in dict.fromkeys([*then, *now])}
    shown = {
        path: [NOT_SET if each is missing else repr(each) for each in pair]
        for path, pair in both.items()
        if comparable(pair[0]) != comparable(pair[1])
    }
    return {path: " → ".join(words) for path, words in shown.items()}


def in_words(changed: Mapping[str, str], at_most: int = 8) -> str:
    """Differences in one line."""
    lines = [f"{path}: {words}" for path, words in changed.items()]
    more = [f"and {len(lines) - at_most} more"] if len(lines) > at_most else []
    return "; ".join([*lines[:at_most], *more])
