"""Batches of supervised fine-tuning, as collators make them, cut where their loss begins."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.types import Prompts, SupervisedTexts

IGNORED = -100  # the label of a token that the loss leaves out, in transformers and TRL


def supervised_texts(
    ids: Int[Tensor, "N L"], labels: Int[Tensor, "N L"], mask: Int[Tensor, "N L"], least_steps: int = 1
) -> SupervisedTexts:
    """Left-padded prompts up to the first counted token of each row, and what follows, padded on the right.

    The first token of a text is never predicted, so it is a prompt at least.

    Args:
        ids: token ids, padded on the right.
        labels: the same ids where the loss counts, `IGNORED` where it does not.
        mask: 1 on real tokens.
        least_steps: T is at least this.
    Raises:
        ValueError: labels that are other tokens than those of the text; padding on the left.
    """
    present = mask.bool()
    counted = (labels != IGNORED) & present
    if (labels != ids)[counted].any():
        raise ValueError(
            "labels name other tokens than input_ids somewhere: here the true token is fed as well as predicted, so "
            f"they must agree; mark what the loss leaves out with {IGNORED}"
        )
    lengths = present.sum(-1)
    if not torch.equal(present, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]):
        raise ValueError("attention_mask: texts must be padded on the right; use the trainer's own collator")
    after_first = counted[:, 1:].int()
    starts = torch.where(after_first.any(-1), after_first.argmax(-1) + 1, 1)
    prompts = _window(ids, starts - int(starts.max()), int(starts.max()))
    num_steps = max(int((lengths - starts).max()), least_steps, 1)
    there = (starts[:, None] + torch.arange(num_steps, device=ids.device)) < lengths[:, None]
    is_prompt = torch.arange(prompts.shape[1], device=ids.device) >= (prompts.shape[1] - starts)[:, None]
    counts = _window(counted.long(), starts, num_steps).bool() & there
    return SupervisedTexts(Prompts(prompts, is_prompt), _window(ids, starts, num_steps), there, counts)


def _window(values: Int[Tensor, "N L"], starts: Int[Tensor, "N"], length: int) -> Int[Tensor, "N W"]:
    """So many values of each row from a place on, which may lie outside: the nearest value is repeated there."""
    places = starts[:, None] + torch.arange(length, device=values.device)
    return values.gather(1, places.clamp(0, values.shape[1] - 1))


def guidance_amounts(texts: SupervisedTexts, amounts: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """How much of each true token is fed: all of those that the loss leaves out, which nobody is to write."""
    return amounts.masked_fill(~texts.counted, 1.0)
