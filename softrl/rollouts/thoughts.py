"""Thoughts: sampled or soft tokens after chosen tokens of a text, and what its true tokens are worth after them.

`thought_rollout` thinks, without gradients, and records; `thought_pass` runs the recorded thoughts through the model
once, all in parallel, with a graph. A branch is `[start, z_1 .. z_n, end, x_{i+1} .. x_{i+n_talk-1}]` after token x_i;
its end and its true tokens predict `x_{i+1} .. x_{i+n_talk}`, mixed with what the text alone predicts.
Source: Zelikman et al. (2024), Quiet-STaR, arXiv:2403.09629; softrl maths, section 6.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.models.branches import BranchAttention, read_texts
from softrl.models.policy import Policy, chunk_length, evaluating, recomputed
from softrl.models.state import positions
from softrl.models.text_state import Branches
from softrl.models.thinking import ThinkingLM
from softrl.tokens.divergences import entropy
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation
from softrl.types import Support, Texts, Thoughts

# What is fed as a thought: draws of the policy, its argmax, draws of the uniform distribution, or a learned embedding.
ThoughtSource = Literal["policy", "greedy", "random", "pause"]


@dataclass(frozen=True)
class ThoughtPass:
    """Recorded thoughts run through a model, with a graph. Axes N texts, A anchors, S thoughts, n and n_talk tokens.

    `log_probs` are log π of the thought's hard tokens, `talk_log_probs` log p of the true tokens after it, mixed with
    the base's, nats; `is_talk` is False where the text has no such token. `mixing` is the weight w at each of them.
    """

    base_hidden: Float[Tensor, "N T D"]
    text_log_probs: Float[Tensor, "N T-1"]  # of tokens 2..T without thoughts
    base_log_probs: Float[Tensor, "N A n_talk"]  # those of them that a thought is followed by
    thought_hidden: Float[Tensor, "N A S n D"]  # that thought tokens are predicted from
    log_probs: Float[Tensor, "N A S n"]
    entropy: Float[Tensor, "N A S n"]
    talk_log_probs: Float[Tensor, "N A S n_talk"]
    mixing: Float[Tensor, "N A S n_talk"]
    is_talk: Bool[Tensor, "N A n_talk"]
    talk_hits: Bool[Tensor, "N A S n_talk"]  # whether the true token is the likeliest one
    base_hits: Bool[Tensor, "N A n_talk"]

    @property
    def rewards(self) -> Float[Tensor, "N A S"]:
        """`log p_mixed(talk | thought)`, summed over the true tokens, nats."""
        return (self.talk_log_probs * self.is_talk[:, :, None]).sum(-1)


@torch.no_grad()
def thought_rollout(
    model: ThinkingLM,
    texts: Texts,
    anchors: Int[Tensor, "N A"],
    is_anchor: Bool[Tensor, "N A"],
    random: SequenceRandom,
    num_samples: int = 1,
    source: ThoughtSource = "policy",
    relaxation: Relaxation | None = None,
    attention: BranchAttention = "shared",
) -> Thoughts:
    """Think after chosen tokens, all at once.

    Args:
        model: thinks `n_thought` tokens.
        texts: N texts.
        anchors, is_anchor: slots of the tokens to think after, see `Thoughts`.
        random: one stream a text, with A * S rows; where A differs between calls, so do the draws.
        num_samples: S.
        source: see `ThoughtSource`; the last two ignore the policy.
        relaxation: think soft tokens; None: sampled ones.
        attention: see `models.branches`.
    Raises:
        ValueError: anchors outside the texts, a random of another size, a relaxation of what is not the policy's, K
            larger than V, or more tokens than the model's context holds.
    """
    check_anchors(texts, anchors, is_anchor)
    if source not in get_args(ThoughtSource):
        raise ValueError(f"source must be one of {get_args(ThoughtSource)}, got {source!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    rows = anchors.shape[1] * num_samples
    if (len(random), random.rows) != (len(anchors), rows):
        raise ValueError(
            f"random: expected {len(anchors)} streams of {rows} rows (anchors * samples), got {len(random)} of "
            f"{random.rows}"
        )
    with evaluating(model):
        each = anchors.repeat_interleave(num_samples, 1)
        branches = _branches(model, texts, each, attention, 1 + model.thinking.n_thought)[1]
        steps, weights, _ = think(model, branches, (len(anchors), rows), random, None, source, relaxation)
    shape = (*anchors.shape, num_samples)
    if not steps:
        return Thoughts(anchors, is_anchor, *_nothing(shape, anchors, model.start))
    support = Support.stacked(steps).mapped(lambda value: value.unflatten(0, shape))
    return Thoughts(anchors, is_anchor, support, torch.stack(weights, 1).unflatten(0, shape))


def think(
    model: ThinkingLM,
    branches: Branches,
    shape: tuple[int, int],
    random: SequenceRandom,
    num_tokens: int | None = None,
    source: ThoughtSource = "policy",
    relaxation: Relaxation | None = None,
) -> tuple[list[Support], list[Float[Tensor, "M K"]], Float[Tensor, "N L 1 D"]]:
    """Think on branches that have been fed nothing yet; called without gradients, in evaluation mode.

    Args:
        model, source, relaxation: see `thought_rollout`.
        branches: L of each of N texts, M = N * L.
        shape: N and L.
        random: M rows together.
        num_tokens: of a thought; None for the model's own number.
    Returns:
        A support and fed weights for every thought token, and an embedding that is still to be fed: the last token's.
    Raises:
        ValueError: a relaxation of what is not the policy's, or K larger than V.
    """
    if relaxation is not None and source != "policy":
        raise ValueError(f"a relaxation makes the policy's own thoughts soft; with source={source!r} leave it out")
    if relaxation is not None:
        relaxation.truncation.check_vocabulary(model.policy.vocab_size)
    steps: list[Support] = []
    weights: list[Tensor] = []
    embeds = model.start.expand(*shape, 1, -1)
    for _ in range(model.thinking.n_thought if num_tokens is None else num_tokens):
        hidden = branches.advance(embeds)[:, :, -1]
        support, fed = _thought_tokens(model.policy, hidden, source, relaxation, random)
        embeds = model.policy.embed_soft(support.ids, fed).unflatten(0, (*shape, 1))
        if source == "pause":
            embeds = model.pause.expand_as(embeds)
        steps.append(support)
        weights.append(fed)
    return steps, weights, embeds


def joined_thoughts(first: Thoughts, second: Thoughts) -> Thoughts:
    """Two sets of thoughts after the same tokens as one, S = S_1 + S_2."""
    fed = torch.cat([first.fed, second.fed], 2)
    columns = {
        field.name: (getattr(first.support, field.name), getattr(second.support, field.name))
        for field in fields(Support)
    }
    values: dict[str, Any] = {name: None if pair[0] is None else torch.cat(pair, 2) for name, pair in columns.items()}
    return Thoughts(first.anchors, first.is_anchor, Support(**values), fed)


def check_anchors(texts: Texts, anchors: Int[Tensor, "N A"], is_anchor: Bool[Tensor, "N A"]) -> None:
    """Raise ValueError where an anchor is no token of its text."""
    if len(texts.ids) == 0 or anchors.shape[0] != len(texts.ids) or anchors.shape[1] == 0:
        raise ValueError(
            f"anchors: expected at least one column and a row for each of {len(texts.ids)} texts, got shape "
            f"{tuple(anchors.shape)}"
        )
    if anchors.min() < 0 or anchors.max() >= texts.ids.shape[1]:
        raise ValueError(
            f"anchors are slots of texts of {texts.ids.shape[1]} tokens, got {anchors.min()} to {anchors.max()}"
        )
    if not texts.mask.gather(1, anchors)[is_anchor].all():
        raise ValueError("anchors: a slot to think after is padding; set is_anchor to False there")


def _nothing(shape: tuple[int, ...], anchors: Tensor, like: Tensor) -> tuple[Support, Tensor]:
    """Thoughts of no tokens."""
    none = anchors.new_zeros(*shape, 0, 1)
    fed = like.new_zeros(*shape, 0, 1)
    return Support(none, fed, none.bool(), none[..., 0]), fed


def _branches(
    model: ThinkingLM, texts: Texts, anchors: Int[Tensor, "N L"], attention: BranchAttention, length: int
) -> tuple[Float[Tensor, "N T D"], Branches]:
    """The texts' hidden states, and branches after the anchors, which will have so many tokens."""
    limit = model.policy.max_length
    deepest = positions(texts.mask).gather(1, anchors).max().item() + 1 + length
    if limit is not None and max(deepest, texts.mask.sum(-1).max().item()) > limit:
        raise ValueError(
            f"a text of {texts.mask.sum(-1).max()} tokens, with {length} of a thought and what it is scored by after "
            f"its last anchor, exceeds the model's context of {limit}; shorten the texts, or think after fewer tokens"
        )
    state = read_texts(model.policy, attention, len(texts.ids), texts.ids.device)
    hidden = state.extend(model.policy.embed(texts.ids), texts.mask)
    return hidden, state.branch(anchors)


def _thought_tokens(
    policy: Policy,
    hidden: Float[Tensor, "N L D"],
    source: ThoughtSource,
    relaxation: Relaxation | None,
    random: SequenceRandom,
) -> tuple[Support, Float[Tensor, "M K"]]:
    """One token of every thought, M = N * L, and the weights that are fed, with few logits at a time.

    Which rows of a text draw together is decided by L and V alone, so that its draws are its own.
    """
    size, num_branches = chunk_length(policy.vocab_size), hidden.shape[1]
    texts = max(1, size // num_branches)
    pieces = [
        _thought_token(policy, rows.flatten(0, 1), source, relaxation, random.part(which, rows.shape[1]))
        for which in (slice(first, first + texts) for first in range(0, len(hidden), texts))
        for rows in hidden[which].split(size, 1)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return Support.joined([support for support, _ in pieces]), torch.cat([fed for _, fed in pieces])


def _thought_token(
    policy: Policy,
    hidden: Float[Tensor, "M D"],
    source: ThoughtSource,
    relaxation: Relaxation | None,
    random: SequenceRandom,
) -> tuple[Support, Float[Tensor, "M K"]]:
    """One token of every thought, and the weights that are fed."""
    if relaxation is not None:
        logits = policy.head(hidden)
        support = relaxation.draw(logits, random)
        return support, relaxation.fed(relaxation.weights(logits.gather(-1, support.ids), support), support)
    if source == "pause":
        tokens = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    elif source == "random":
        tokens = random.gumbel(policy.vocab_size, torch.float32).argmax(-1)
    else:
        scores = policy.head(hidden)
        tokens = (scores if source == "greedy" else scores + random.gumbel(scores.shape[-1], scores.dtype)).argmax(-1)
    fed = torch.ones(len(hidden), 1, dtype=policy.dtype, device=hidden.device)
    return Support(tokens[:, None], torch.zeros_like(fed), torch.ones_like(fed).bool(), torch.zeros_like(tokens)), fed


def thought_embeds(model: ThinkingLM, thoughts: Thoughts, source: ThoughtSource) -> Float[Tensor, "N A S n D"]:
    """E(q) of recorded thoughts, differentiable in the embedding (or in `pause`)."""
    shape = thoughts.fed.shape[:-1]
    if source == "pause" or thoughts.length == 0:
        return model.pause.expand(*shape, -1)
    ids, fed = thoughts.support.ids.reshape(-1, thoughts.fed.shape[-1]), thoughts.fed.flatten(0, 3)
    return model.policy.embed_soft(ids, fed).reshape(*shape, -1)


def thought_pass(
    model: ThinkingLM,
    texts: Texts,
    thoughts: Thoughts,
    n_talk: int,
    embeds: Float[Tensor, "N A S n D"],
    attention: BranchAttention = "shared",
    with_entropy: bool = False,
    with_hits: bool = False,
) -> ThoughtPass:
    """Run recorded thoughts through the model, all in parallel, with a graph.

    Args:
        model: may be another one than that which thought (a reference, a proposal).
        texts: N texts.
        thoughts: what was thought about them.
        n_talk: true tokens that are scored after every thought, at least 1.
        embeds: of the thoughts, see `thought_embeds`; a leaf where their cotangents are wanted.
        attention: see `models.branches`.
        with_entropy: measure the entropy of thought tokens; else it is 0.
        with_hits: find out which true tokens are the likeliest ones; else none is.
    Raises:
        ValueError: n_talk < 1, texts of one token, which have none to predict, or more tokens than the model's
            context holds.
    """
    if n_talk < 1 or texts.ids.shape[1] < 2:
        raise ValueError(
            f"n_talk={n_talk} and texts of {texts.ids.shape[1]} tokens: both need at least one true token to predict"
        )
    n, shape = thoughts.length, thoughts.fed.shape[:3]
    base, branches = _branches(model, texts, thoughts.branch_anchors, attention, n + 1 + n_talk)
    where, is_talk = talk_slots(texts, thoughts, n_talk)
    targets = _at(texts.ids[..., None], where)[..., 0]  # N A n_talk
    ends = [model.start, model.end]
    start, end = (each.expand(*shape, 1, -1) for each in ends)
    told = model.policy.embed(targets[:, :, :-1])[:, :, None].expand(*shape, n_talk - 1, -1)
    fed = torch.cat([each.to(start.dtype) for each in (start, embeds, end, told)], 3)
    hidden = branches.advance(fed.flatten(1, 2)).unflatten(1, shape[1:])
    log_probs, spread = _token_log_probs(model.policy, hidden[..., :n, :], thoughts.tokens, with_entropy)
    base_talk, talk = _at(base, where - 1), hidden[..., n + 1 :, :]  # base: the slots before the targets
    weight = model.mixing(base_talk[:, :, None].expand_as(talk), talk)
    mixed, talk_hits = _mixed_log_probs(model, base_talk, talk, weight, targets, with_hits)
    of_text = _text_log_probs(model, base[:, :-1], texts.ids[:, 1:], with_hits)
    base_log_probs, base_hits = (_at(values[..., None], where - 1)[..., 0] for values in of_text)
    return ThoughtPass(
        base, of_text[0], base_log_probs, hidden[..., :n, :], log_probs, spread, mixed, weight, is_talk,
        talk_hits, base_hits,
    )  # fmt: skip


def text_log_probs(
    model: ThinkingLM, texts: Texts, with_hits: bool = False
) -> tuple[Float[Tensor, "N t"], Bool[Tensor, "N t"]]:
    """log p of tokens 2..T without thoughts, t = T - 1, nats, and (if asked for) whether they are the likeliest."""
    hidden = read_texts(model.talk, "naive", len(texts.ids), texts.ids.device).extend(
        model.talk.embed(texts.ids), texts.mask
    )
    return _text_log_probs(model, hidden[:, :-1], texts.ids[:, 1:], with_hits)


def talk_slots(
    texts: Texts, thoughts: Thoughts, n_talk: int
) -> tuple[Int[Tensor, "N A n_talk"], Bool[Tensor, "N A n_talk"]]:
    """Slots of the true tokens after every anchor, and which of them the text has; others point to its last slot."""
    where = thoughts.anchors[..., None] + 1 + torch.arange(n_talk, device=texts.ids.device)
    last = texts.ids.shape[1] - 1
    inside = where.clamp(max=last)
    real = texts.mask.gather(1, inside.flatten(1)).view_as(where)
    return inside, (where <= last) & real & thoughts.is_anchor[..., None]


def _at(values: Tensor, where: Int[Tensor, "N A k"]) -> Tensor:
    """Rows of [N, T, D] at slots: [N, A, k, D]."""
    index = where.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index).unflatten(1, where.shape[1:])


def _token_log_probs(
    policy: Policy, hidden: Float[Tensor, "*batch D"], tokens: Int[Tensor, "*batch"], with_entropy: bool
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """log π of tokens and the entropy, in chunks that the backward pass computes again."""

    def of(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = policy.head(states).log_softmax(-1)
        spread = entropy(log_probs) if with_entropy else log_probs.new_zeros(len(ids))
        return log_probs.gather(-1, ids[:, None])[:, 0], spread

    log_probs, spread = _in_chunks(of, policy, [hidden.reshape(-1, hidden.shape[-1]), tokens.flatten()])
    return log_probs.reshape(tokens.shape), spread.reshape(tokens.shape)


def _text_log_probs(
    model: ThinkingLM, hidden: Float[Tensor, "N t D"], tokens: Int[Tensor, "N t"], with_hits: bool
) -> tuple[Float[Tensor, "N t"], Bool[Tensor, "N t"]]:
    """log p of true tokens without thoughts."""

    def of(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return _of_true(model.talk.head(states).log_softmax(-1), ids, with_hits)

    found = _in_chunks(of, model.talk, [hidden.reshape(-1, hidden.shape[-1]), tokens.flatten()])
    log_probs, hits = (values.view_as(tokens) for values in found)
    return log_probs, hits


def _mixed_log_probs(
    model: ThinkingLM,
    base: Float[Tensor, "N A k D"],
    talk: Float[Tensor, "N A S k D"],
    weight: Float[Tensor, "N A S k"],
    targets: Int[Tensor, "N A k"],
    with_hits: bool,
) -> tuple[Float[Tensor, "N A S k"], Bool[Tensor, "N A S k"]]:
    """log p_mixed of true tokens."""

    def of(base_states: Tensor, states: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return _of_true(model.mixed_log_probs(base_states, states, weights), ids, with_hits)

    width = talk.shape[-1]
    flat = [base[:, :, None].expand_as(talk).reshape(-1, width), talk.reshape(-1, width), weight.flatten()]
    ids = targets[:, :, None].expand(weight.shape).flatten()
    log_probs, hits = (values.view_as(weight) for values in _in_chunks(of, model.talk, [*flat, ids]))
    return log_probs, hits


def _of_true(log_probs: Float[Tensor, "M V"], ids: Int[Tensor, "M"], with_hits: bool) -> tuple[Tensor, Tensor]:
    """Those of the true tokens, and whether these are the likeliest."""
    hits = log_probs.argmax(-1) == ids if with_hits else torch.zeros_like(ids, dtype=torch.bool)
    return log_probs.gather(-1, ids[:, None])[:, 0], hits


def _in_chunks(function: Callable[..., tuple[Tensor, ...]], policy: Policy, values: list[Tensor]) -> list[Tensor]:
    """Apply a function of M positions that reads the vocabulary; a single chunk keeps its graph."""
    size = chunk_length(policy.vocab_size)
    if len(values[0]) <= size:
        return list(function(*values))
    pieces = [recomputed(function, *parts) for parts in zip(*(value.split(size) for value in values), strict=True)]
    return [torch.cat(parts) for parts in zip(*pieces, strict=True)]
