"""Soft beam search: the hypotheses of a beam search, each fed a mixture around its own token.

A hypothesis is a text of hard tokens, scored by their log-probabilities as in `beam_search`, after what it was fed.
Those of its continuations that stay in the beam share its next soft token among them. The K kept ids of the relaxation
are partitioned into cells, one around each of these continuations: a kept id belongs to that whose token embedding is
nearest by cosine, and a continuation's own token to itself. A continuation is fed the relaxation's soft token on its
cell, in which its own token is always the heaviest. So mixtures of siblings have no token in common, and at a fixed
temperature, weighted with the masses of their cells, they add up to the parent's soft token. An entropy bound holds
for every cell. The ends of this family:

- W = 1: the only cell is everything that is kept, and the search is greedy soft decoding.
- K = 1, or `own_share` = 1: cells are single tokens, and the search is the ordinary beam search.

A continuation whose own token is not kept is fed that token alone, and takes no part in its siblings' partition. An
end-of-sequence id is in nobody's cell: the text that ends there is a hypothesis of its own, and the others go on.
Source: ours; the idea of a beam whose entries are soft mixtures is from the project's notes (seeds/004, section 6.6).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.generation.beam import BeamSettings, Expansion, Searched, beam_search
from softrl.masking import is_any_of
from softrl.models.policy import Policy, chunk_length
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import SoftmaxMixture
from softrl.types import Prompts


def soft_beam_search(
    policy: Policy,
    prompts: Prompts,
    max_new_tokens: int,
    relaxation: SoftmaxMixture,
    settings: BeamSettings | None = None,
    num_return: int = 1,
    eos_ids: tuple[int, ...] = (),
    own_share: float = 0.0,
) -> Searched:
    """Search for texts whose tokens are fed as mixtures with their competitors.

    Args:
        policy, prompts, max_new_tokens, settings, num_return, eos_ids: as in `beam_search`.
        relaxation: kept ids and weights of a hypothesis's next soft token; its temperature or entropy bound says how
            soft it is. Noise would make siblings differ by chance, so there is none.
        own_share: weight that a hypothesis's own token gets beforehand, 0 to 1; the cell shares the rest.
    Returns:
        As `beam_search`: hard tokens and their log-probabilities given the mixtures before them.
    Raises:
        ValueError: as `beam_search`, K larger than V, or own_share outside [0, 1].
    """
    if not 0.0 <= own_share <= 1.0:
        raise ValueError(f"own_share must lie in [0, 1], got {own_share}; 1 feeds hard tokens")
    relaxation.truncation.check_vocabulary(policy.vocab_size)
    feed = partial(_feed_cells, relaxation=relaxation, own_share=own_share, eos_ids=eos_ids)
    return beam_search(policy, prompts, max_new_tokens, settings, num_return, eos_ids, feed)


def _feed_cells(
    policy: Policy, expansion: Expansion, relaxation: SoftmaxMixture, own_share: float, eos_ids: tuple[int, ...]
) -> Float[Tensor, "M D"]:
    ids, weights = cell_mixtures(policy, expansion, relaxation, own_share, eos_ids)
    return policy.embed_soft(ids.flatten(0, 1), weights.flatten(0, 1))


def cell_mixtures(
    policy: Policy,
    expansion: Expansion,
    relaxation: SoftmaxMixture,
    own_share: float = 0.0,
    eos_ids: tuple[int, ...] = (),
) -> tuple[Int[Tensor, "B W L"], Float[Tensor, "B W L"]]:
    """The mixtures that a step's hypotheses are fed, as ids and weights on L = K + 1 of them.

    The last id is a hypothesis's own token: its share beforehand, or all of it where the relaxation does not keep it.
    """
    drawn = relaxation.draw(expansion.logits, SequenceRandom([]))  # which draws nothing
    kept_logits = expansion.logits.gather(-1, drawn.ids)[expansion.parents]
    support = drawn.mapped(lambda values: values[expansion.parents])
    shared = support.kept & ~is_any_of(support.ids, eos_ids)
    is_centre = expansion.alive & (shared & (support.ids == expansion.tokens[..., None])).any(-1)
    cell = shared & _is_own(policy, support.ids, expansion, is_centre)
    # A hypothesis without a cell gets a harmless one, and no weight on it.
    weights = relaxation.weights(kept_logits, replace(support, kept=cell | ~is_centre[..., None]))
    beforehand = torch.full_like(weights[..., :1], own_share).masked_fill(~is_centre[..., None], 1.0)
    ids = torch.cat([support.ids, expansion.tokens[..., None]], -1)
    return ids, torch.cat([(1.0 - beforehand) * weights, beforehand], -1)


def _is_own(
    policy: Policy, ids: Int[Tensor, "B W K"], expansion: Expansion, is_centre: Bool[Tensor, "B W"]
) -> Bool[Tensor, "B W K"]:
    """Whether a kept id of a hypothesis's parent lies in the hypothesis's own cell."""
    tokens, parents = expansion.tokens, expansion.parents
    are_siblings = (parents[:, :, None] == parents[:, None, :]) & is_centre[:, None, :]
    is_token = ids[..., None] == tokens[:, None, None, :]
    pieces = [_cosines(policy.embed(some), policy.embed(centres)) for some, centres in _in_chunks(policy, ids, tokens)]
    similarity = torch.cat(pieces).masked_fill(is_token, torch.inf)
    nearest = similarity.masked_fill(~are_siblings[:, :, None], -torch.inf).argmax(-1)
    return nearest == torch.arange(tokens.shape[1], device=tokens.device)[None, :, None]


def _in_chunks(
    policy: Policy, ids: Int[Tensor, "B W K"], tokens: Int[Tensor, "B W"]
) -> Iterator[tuple[Tensor, Tensor]]:
    width = policy.causal_lm.config.get_text_config().hidden_size
    size = chunk_length(ids.shape[1] * ids.shape[2] * width)
    return zip(ids.split(size), tokens.split(size), strict=True)


def _cosines(vectors: Float[Tensor, "b W K D"], centres: Float[Tensor, "b W D"]) -> Float[Tensor, "b W K W"]:
    """Of every kept id with every hypothesis of the prompt; float32 at least."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    vectors, centres = (torch.nn.functional.normalize(each.to(dtype), dim=-1) for each in (vectors, centres))
    return torch.einsum("bwkd,bvd->bwkv", vectors, centres)
