"""Settings of soft decoding by flat names, as `model.generate` and a command line have them, over a model's own.

Names that transformers has (`do_sample`, `temperature`, `top_k`, `top_p`, `min_p`) are of hard tokens; `temperature`
is that of soft tokens too, unless `soft_temperature` is given.
"""

import difflib
import math
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from softrl.generation.next_token import NextToken
from softrl.generation.soft_settings import DEFAULT_DECODING, Phase, SoftDecoding
from softrl.tokens.embedding import check_norm_correction
from softrl.tokens.relaxation import Relaxation, make_relaxation
from softrl.tokens.truncation import Truncation

THINK_START, THINK_END = "<think>", "</think>"

# name -> what it does; a command makes its options of them, see `softrl generate --help`
SOFT_ARGUMENTS: dict[str, tuple[type, str]] = {
    "relaxation": (str, "how a soft token is made: softmax, gumbel_softmax, straight_through, st_gumbel, ..."),
    "relaxation_temperature": (float, "of a soft token's weights, on the kept ids; instead of an entropy bound"),
    "max_entropy_nats": (float, "bound of a soft token's entropy, below log K; instead of a relaxation temperature"),
    "soft_temperature": (float, "sampling temperature of soft tokens, before they are truncated"),
    "soft_top_k": (int, "K: ids that a soft token keeps"),
    "soft_top_p": (float, "of them, keep the likeliest with this mass"),
    "soft_min_p": (float, "of them, keep those with this share of the largest probability"),
    "norm_correction": (str, "of a mixture's norm: none, inverse_l2, match"),
    "think_start": (str, f"what opens the thinking, for instance {THINK_START}: only what is inside is soft"),
    "think_end": (str, f"what closes it, for instance {THINK_END}"),
    "force_thinking": (bool, "open the thinking first, where the prompt has not"),
    "max_thinking_tokens": (int, "end the thinking after so many tokens"),
    "cold_stop_nats": (float, "end the thinking where the policy's entropy stays below this"),
    "cold_stop_steps": (int, "for so many tokens in a row"),
}
HARD_ARGUMENTS = ("do_sample", "temperature", "top_k", "top_p", "min_p")
_OF_THE_TEXT = tuple(SOFT_ARGUMENTS)[tuple(SOFT_ARGUMENTS).index("norm_correction") :]  # the others make a soft token


def decoding_from(
    given: dict[str, Any],
    base: SoftDecoding | None = None,
    vocab_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> SoftDecoding:
    """The settings of a model with some of them replaced.

    A relaxation temperature takes the place of the base's entropy bound, and the other way round. A smaller
    `soft_top_k` may leave the base's bound nothing to do, which is then dropped.

    Args:
        given: by the names of `SOFT_ARGUMENTS` and `HARD_ARGUMENTS`; None counts as not given. Delimiters are texts,
            or token ids.
        base: what to start from; the default decoding where there is none.
        vocab_size: V; the base's K, which nobody has asked for, is cut to it.
        tokenizer: of delimiters that are texts.
    Raises:
        ValueError: an unknown name (the closest is named), values out of range, or delimiters that are text without a
            tokenizer.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        known = [*SOFT_ARGUMENTS, *HARD_ARGUMENTS]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"unknown setting {name!r}; {f'did you mean {close[0]!r}?' if close else known}")
    base = DEFAULT_DECODING if base is None else base
    thinking = base.thinking
    if thinking.relaxation is not None or any(name in SOFT_ARGUMENTS for name in given):
        temperature = given.get("soft_temperature", given.get("temperature", thinking.temperature))
        relaxation = _relaxation(given, thinking.relaxation, vocab_size)
        thinking = Phase(relaxation, NextToken(temperature=temperature))
    answer = base.answer
    if any(name in given for name in HARD_ARGUMENTS):
        answer = Phase(None, next_token_from(given, base.answering.next_token))
    others = {name: given[name] for name in _OF_THE_TEXT if name in given}
    check_norm_correction(others.get("norm_correction", "none"))
    for name in ("think_start", "think_end"):
        if name in others:
            others[name] = delimiter_ids(others[name], tokenizer, name)
    return replace(base, thinking=thinking, answer=answer, **others)


def _relaxation(given: dict[str, Any], base: Relaxation | None, vocab_size: int | None) -> Relaxation:
    """The base's relaxation with what is given in its place."""
    base = base or DEFAULT_DECODING.thinking.relaxation
    assert base is not None
    inherited = base.truncation.top_k if vocab_size is None else min(base.truncation.top_k, vocab_size)
    truncation = Truncation(
        given.get("soft_top_k", inherited),
        given.get("soft_top_p", base.truncation.top_p),
        given.get("soft_min_p", base.truncation.min_p),
    )
    temperature, bound = given.get("relaxation_temperature"), given.get("max_entropy_nats")
    if temperature is None and bound is None:
        temperature, bound = base.temperature, base.max_entropy_nats
        if bound is not None and bound >= math.log(truncation.top_k):
            bound = None
    name, temperature = given.get("relaxation", base.name), 1.0 if temperature is None else temperature
    if name == base.name:
        return replace(base, truncation=truncation, temperature=temperature, max_entropy_nats=bound)
    return make_relaxation(name, truncation, temperature, bound)


def next_token_from(given: dict[str, Any], base: NextToken) -> NextToken:
    """How hard tokens are chosen, by the names of `HARD_ARGUMENTS`; transformers' `top_k` of 0 keeps all."""
    given = {name: value for name, value in given.items() if value is not None}
    greedy = not given["do_sample"] if "do_sample" in given else base.greedy
    if greedy:
        return NextToken(greedy=True)
    return NextToken(
        False,
        given.get("temperature", base.temperature),
        given.get("top_k", base.top_k) or None,
        given.get("top_p", base.top_p),
        given.get("min_p", base.min_p),
    )


def delimiter_ids(value: Any, tokenizer: PreTrainedTokenizerBase | None, name: str) -> tuple[int, ...]:
    """A delimiter's token ids, from text, an id or ids.

    Raises:
        ValueError: text without a tokenizer, no ids, or something else.
    """
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(f"{name}={value!r} is text, and there is no tokenizer; pass soft_tokenizer, or token ids")
        value = tokenizer(value, add_special_tokens=False).input_ids
    ids = (value,) if isinstance(value, int) else tuple(value)
    if not ids or not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
        raise ValueError(f"{name}: expected a text or token ids, got {value!r}")
    return ids
