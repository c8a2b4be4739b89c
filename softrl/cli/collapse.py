"""`softrl generate --collapse`: a softAR model's own soft outputs, which become tokens when its window moves on."""

import argparse
from typing import Any

_WAYS = "all, learned, distance:LEAST or entropy:LEAST"


def collapsing(given: argparse.Namespace) -> Any:
    """How soft tokens collapse, as a function of the model; None where none are written.

    Raises:
        ValueError: another word than those, or what does not go with it.
    """
    if given.collapse is None:
        return None
    from softrl.contexts.collapse import selective
    from softrl.generation.soft_ar import SoftWriting
    from softrl.generation.soft_arguments import SOFT_ARGUMENTS

    names = ("hard", "thinking", "output_file", "stop", *SOFT_ARGUMENTS)
    values = {name: getattr(given, name) for name in names}
    if others := [name for name, value in values.items() if value is not None and value is not False]:
        raise ValueError(
            f"--collapse writes a model's own soft outputs and no record of them; leave out --{others[0]}"
        )
    if given.temperature is not None and not given.do_sample:
        raise ValueError("--temperature is of draws; give --do_sample as well")
    if given.collapse == "learned":
        return _by_its_head
    by, _, least = given.collapse.partition(":")
    try:
        writing = SoftWriting() if given.collapse == "all" else SoftWriting(which=selective(by, float(least)))
    except ValueError as error:
        raise ValueError(f"--collapse must be {_WAYS} with a number, 0 or more, got {given.collapse!r}") from error
    return lambda model: writing


def _by_its_head(model: Any) -> Any:
    from softrl.generation.soft_ar import SoftWriting, learned

    if model.collapse_head is None:
        raise ValueError(
            "--collapse learned needs a model with a head for it; softrl train --trainer soft_ar makes one with "
            "--collapse_head_weight 0.001"
        )
    return SoftWriting(learned(model.collapse_head))


def written(given: argparse.Namespace, policy: Any, tokenizer: Any, decoding: Any, writing: Any, made: Any) -> Any:
    """Soft tokens that collapse, by softAR's own generator.

    Raises:
        ValueError: the model has no window, no soft region, or not the head that is asked for.
    """
    from softrl.contexts.soft_ar import SoftARForCausalLM
    from softrl.generation.soft_ar import soft_ar_generate
    from softrl.trainers.loading import eos_token_ids

    if not isinstance(policy.causal_lm, SoftARForCausalLM):
        raise ValueError(
            f"--collapse needs a window that moves on, and {given.model} has none; train one: softrl train --config "
            "soft_ar/shakespeare"
        )
    if not policy.causal_lm.model.layout.num_soft:
        raise ValueError(
            f"--collapse writes soft tokens, and the window of {given.model} has num_soft=0; leave it out"
        )
    return soft_ar_generate(
        policy, made.prompts, given.max_new_tokens, decoding.answering.next_token,
        writing(policy.causal_lm), given.num_samples, eos_token_ids(policy.model, tokenizer), given.seed,
        indices=made.indices,
    )  # fmt: skip
