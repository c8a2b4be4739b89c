"""`softrl generate --collapse`: a softAR model's own soft outputs, which become tokens when its window moves on."""

import argparse
import sys
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
    if given.num_samples < 1:
        raise ValueError(f"--num_samples must be at least 1, got {given.num_samples}")
    if given.num_samples > 1 and not given.do_sample:
        raise ValueError(
            f"--num_samples {given.num_samples} would be copies of one text, since soft tokens are not drawn; give "
            "--do_sample as well, for the hard ones among them, or leave it out"
        )
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
    if given.do_sample:
        _say_where_nothing_is_drawn(policy, made)
    return soft_ar_generate(
        policy, made.prompts, given.max_new_tokens, decoding.answering.next_token,
        writing(policy.causal_lm), given.num_samples, eos_token_ids(policy.model, tokenizer), given.seed,
        indices=made.indices,
    )  # fmt: skip


def _say_where_nothing_is_drawn(policy: Any, made: Any) -> None:
    """A warning on stderr: the texts are right, but no option of draws does anything for them."""
    from softrl.generation.soft_ar import writes_only_soft

    layout = policy.causal_lm.model.layout
    rows = writes_only_soft(layout, made.prompts.mask.sum(-1) + policy.virtual.count).tolist()
    if numbers := [str(index + 1) for index, only_soft in zip(made.indices, rows, strict=True) if only_soft]:
        print(
            f"--do_sample does nothing for prompt {', '.join(numbers)}: soft tokens are not drawn, and behind a "
            f"prompt of {layout.num_hard} tokens or more (num_hard) this window, with stride {layout.stride} and "
            f"num_soft={layout.num_soft}, has soft ones only; its samples are copies of one text",
            file=sys.stderr,
        )
