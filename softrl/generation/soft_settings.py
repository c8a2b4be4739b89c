"""How text is decoded with soft tokens, and the file beside a saved model that says what the model was tuned for.

A text has at most two phases: thinking, which is soft as a rule, and the answer after it, which is hard as a rule.
Left out: how settings are read from a command or from the arguments of `model.generate`: `soft_arguments.py`.
"""

import json
import math
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from softrl.assets import write_atomically
from softrl.generation.next_token import NextToken
from softrl.tokens.embedding import NormCorrection, check_norm_correction
from softrl.tokens.relaxation import RELAXATIONS, Relaxation, SoftmaxMixture
from softrl.tokens.truncation import Truncation

FILE_NAME = "soft_decoding.json"


@dataclass(frozen=True)
class Phase:
    """How the tokens of one part of a text are chosen.

    Args:
        relaxation: what soft tokens are made by; None for hard tokens.
        next_token: how hard tokens are chosen. Beside a relaxation only its temperature counts: the sampling
            temperature, which comes before truncation and is no part of the relaxation.
    Raises:
        ValueError: truncation rules of `next_token` beside a relaxation, which has its own.
    """

    relaxation: Relaxation | None = None
    next_token: NextToken = NextToken()  # noqa: RUF009, it is frozen

    def __post_init__(self) -> None:
        given = self.next_token
        if self.relaxation is not None and (given.top_k is not None or given.truncation.has_nucleus):
            raise ValueError(
                f"next_token has top_k={given.top_k} and {given.truncation} beside relaxation "
                f"{self.relaxation.name!r}; relaxation.truncation is what truncates soft tokens"
            )

    @property
    def temperature(self) -> float:
        """Sampling temperature: every logit is divided by it. The likeliest token needs none."""
        return 1.0 if self.next_token.greedy else self.next_token.temperature


@dataclass(frozen=True)
class SoftDecoding:
    """Soft tokens in a whole text, or in its thinking only.

    Without delimiters a text begins by thinking, and goes on so unless the cold stop or the cap ends it. With them it
    thinks between `think_start` and `think_end`: where the prompt has opened them last, where generated tokens do, or
    from the beginning with `force_thinking`.

    Args:
        thinking: of tokens inside the delimiters, or of all tokens where there are none.
        answer: of the others; None for the likeliest ones, hard.
        think_start, think_end: token ids of the delimiters. The token that completes `think_end` is fed hard, and what
            is fed on purpose is hard too.
        force_thinking: feed `think_start` first, unless the prompt has opened the thinking.
        cold_stop_nats: stop thinking once the policy's entropy has been below this for `cold_stop_steps` tokens of it
            in a row, each row by itself; then `think_end` is fed, where there are delimiters, and the answer follows.
        cold_stop_steps: see there.
        max_thinking_tokens: likewise after so many tokens of thinking in a text, delimiters not counted.
        norm_correction: of mixtures, see `mixture_embedding`; None for the policy's own.
    Raises:
        ValueError: one delimiter without the other, thinking forced without any, or a number outside its range.
    Source: the cold stop is from Zhang et al. (2025), Soft Thinking, arXiv:2505.15778; their runs use 0.01 nats and
        256 steps.
    """

    thinking: Phase
    answer: Phase | None = None
    think_start: tuple[int, ...] = ()
    think_end: tuple[int, ...] = ()
    force_thinking: bool = False
    cold_stop_nats: float | None = None
    cold_stop_steps: int = 256
    max_thinking_tokens: int | None = None
    norm_correction: NormCorrection | None = None

    def __post_init__(self) -> None:
        if bool(self.think_start) != bool(self.think_end):
            raise ValueError(
                f"think_start={self.think_start} and think_end={self.think_end}: give both delimiters, or neither"
            )
        if self.force_thinking and not self.think_start:
            raise ValueError("force_thinking feeds think_start, and there is none; give both delimiters")
        if self.cold_stop_nats is not None and not self.cold_stop_nats > 0.0:
            raise ValueError(f"cold_stop_nats must be positive, got {self.cold_stop_nats}; leave it out for no stop")
        if self.cold_stop_steps < 1:
            raise ValueError(f"cold_stop_steps must be at least 1, got {self.cold_stop_steps}")
        if self.max_thinking_tokens is not None and self.max_thinking_tokens < 0:
            raise ValueError(f"max_thinking_tokens must not be negative, got {self.max_thinking_tokens}")
        if self.norm_correction is not None:
            check_norm_correction(self.norm_correction)

    @property
    def answering(self) -> Phase:
        """The phase after thinking."""
        return self.answer if self.answer is not None else Phase(None, NextToken(greedy=True))

    @property
    def num_kept(self) -> int:
        """K, the most ids that a soft token of either phase keeps; 1 where all are hard."""
        relaxations = (self.thinking.relaxation, self.answering.relaxation)
        return max(1 if each is None else each.truncation.top_k for each in relaxations)


# For models that nobody has tuned for soft tokens. K is that of Soft Thinking's runs. SmolLM2-135M on ten openings of
# reviews, 32 tokens each: perplexity of the text 3.1 and 24% repeated 4-grams (greedy 2.9 and 30%); without the bound
# 31 and 43%, with one of 1 nat 5.2 and 39%.
DEFAULT_DECODING = SoftDecoding(Phase(SoftmaxMixture(Truncation(top_k=10), max_entropy_nats=0.5)))


def save_soft_decoding(settings: SoftDecoding, folder: str | Path) -> Path:
    """Write `soft_decoding.json` into a model's folder, whole or not at all.

    Args:
        settings: what the model was tuned for; generation takes it by default.
        folder: is made if it is not there.
    Returns:
        The file's path.
    Raises:
        ValueError: a setting is a tensor, as a learned relaxation's is while it trains.
    """
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = json.dumps(as_mapping(settings), indent=1, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"settings hold more than plain numbers ({error}); freeze learned ones first") from error
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def load_soft_decoding(folder: str | Path) -> SoftDecoding | None:
    """What the model in a folder was tuned for; None if it has no such file.

    Raises:
        ValueError: the file is broken, has keys that this version does not know, or wrong values; the message names
            the file and the key.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}); it was not copied whole, or not written by softrl") from error
    return from_mapping(given, str(path))


def as_mapping(settings: SoftDecoding) -> dict[str, Any]:
    """The settings as nested dictionaries of plain values; `from_mapping` reads them."""
    mapping: dict[str, Any] = _plain(settings)
    return mapping


def _plain(value: Any) -> Any:
    if not is_dataclass(value):
        return value
    name = {"name": value.name} if isinstance(value, Relaxation) else {}
    return {**name, **{each.name: _plain(getattr(value, each.name)) for each in fields(value)}}


def from_mapping(given: Any, where: str) -> SoftDecoding:
    """The inverse of `as_mapping`; settings that are left out have their defaults.

    Raises:
        ValueError: unknown keys or wrong values; the message begins with `where` and the key.
    """
    return _built(SoftDecoding, given, where)


def _built(cls: type, given: Any, where: str) -> Any:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected a mapping of settings, got {given!r}")
    given = dict(given)
    if cls is Relaxation:
        name = given.pop("name", None)
        if not isinstance(name, str) or name not in RELAXATIONS:
            raise ValueError(f"{where}.name: expected one of {sorted(RELAXATIONS)}, got {name!r}")
        cls = RELAXATIONS[name]
    known = {each.name: each for each in fields(cls)}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{where}: unknown settings {unknown}; this version knows {sorted(known)}")
    if missing := [name for name, each in known.items() if each.default is MISSING and name not in given]:
        raise ValueError(f"{where}: settings {missing} are missing")
    hints = get_type_hints(cls)
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in given.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value of JSON as a field's type wants it; ValueError where it is of another."""
    if get_origin(hint) in (Union, types.UnionType):
        options = [each for each in get_args(hint) if each is not type(None)]
        if value is None and len(options) < len(get_args(hint)):
            return None
        hint = options[0]  # of several, the first is the plain one
    if isinstance(hint, type) and is_dataclass(hint):
        return _built(hint, value, where)
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_value(get_args(hint)[0], each, where) for each in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and value == int(value):
        return int(value)
    if hint is bool and isinstance(value, bool):
        return value
    if get_origin(hint) is Literal and value in get_args(hint):
        return value
    wanted = get_args(hint) if get_origin(hint) is Literal else getattr(hint, "__name__", hint)
    raise ValueError(f"{where}: expected {wanted}, got {value!r}")
