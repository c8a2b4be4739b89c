"""Where to think: the tokens of a text that thoughts follow.

Left out: learning where to think.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.models.policy import Policy, chunk_length, evaluating
from softrl.tokens.divergences import entropy
from softrl.types import Prompts, Texts

Anchors = tuple[Int[Tensor, "N A"], Bool[Tensor, "N A"]]


def can_follow(texts: Texts) -> Bool[Tensor, "N T"]:
    """The slots of tokens that another one follows: after the others there is nothing to predict."""
    follows = torch.zeros_like(texts.mask)
    follows[:, :-1] = texts.mask[:, :-1] & texts.mask[:, 1:]
    return follows


def selected(chosen: Bool[Tensor, "N T"]) -> Anchors:
    """Anchors from a mask over slots, in order; rows with fewer are filled up, and marked. At least one column."""
    count = max(1, int(chosen.sum(-1).max()))
    order = chosen.long().argsort(dim=-1, descending=True, stable=True)[:, :count]
    is_anchor = chosen.gather(1, order)
    first_real = order[:, :1].expand_as(order)
    return torch.where(is_anchor, order, first_real), is_anchor


def every_kth(texts: Texts, interval: int, offset: int = 0) -> Anchors:
    """After every `interval`-th token, from the `offset`-th on (from 0, modulo the interval); 1 is after every token.

    Raises:
        ValueError: interval < 1.
    """
    if interval < 1:
        raise ValueError(f"interval must be at least 1, got {interval}")
    index = texts.mask.long().cumsum(-1) - 1
    return selected(can_follow(texts) & (index % interval == offset % interval))


@torch.no_grad()
def by_entropy(policy: Policy, texts: Texts, count: int) -> Anchors:
    """After the `count` tokens of each text whose next token the policy is least sure of.

    Raises:
        ValueError: count < 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    with evaluating(policy.model):
        hidden = policy.hidden(Prompts(texts.ids[:, :1], texts.mask[:, :1]), policy.embed(texts.ids[:, 1:]))
    unsure = _entropies(policy, hidden)
    unsure = torch.cat([unsure, unsure.new_zeros(len(unsure), 1)], 1)[:, : texts.ids.shape[1]]
    unsure = unsure.masked_fill(~can_follow(texts), -1.0)
    kept = min(count, unsure.shape[1])
    chosen = torch.zeros_like(texts.mask).scatter(1, unsure.topk(kept, -1).indices, True)
    return selected(chosen & can_follow(texts))


def _entropies(policy: Policy, hidden: Float[Tensor, "N T D"]) -> Float[Tensor, "N T"]:
    pieces = hidden.flatten(0, 1).split(chunk_length(policy.vocab_size))
    return torch.cat([entropy(policy.head(piece).log_softmax(-1)) for piece in pieces]).unflatten(0, hidden.shape[:2])


def given(texts: Texts, slots: list[list[int]]) -> Anchors:
    """After the named tokens of each text, counted from 0 without padding; those that nothing follows are left out.

    Raises:
        ValueError: a row's number of lists, or a slot that the text has not.
    """
    lengths = texts.mask.sum(-1).tolist()
    if len(slots) != len(lengths):
        raise ValueError(f"slots: expected a list for each of {len(lengths)} texts, got {len(slots)}")
    index = texts.mask.long().cumsum(-1) - 1
    chosen = torch.zeros_like(texts.mask)
    for row, (wanted, length) in enumerate(zip(slots, lengths, strict=True)):
        if wrong := [slot for slot in wanted if not 0 <= slot < length]:
            raise ValueError(f"slots: text {row} has {length} tokens, and {wrong} are none of them; count from 0")
        if wanted:
            chosen[row] = torch.isin(index[row], torch.tensor(wanted, device=index.device)) & texts.mask[row]
    return selected(chosen & can_follow(texts))
