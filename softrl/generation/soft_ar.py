"""Writing on with a softAR model, past its window: hard tokens, or soft ones that collapse when the window moves on.

What is older than the window is in running sums, so that a token costs the same after any history; inside the window
there is a cache. Hard tokens are chosen as anywhere else. Soft ones are the model's own output (y, or the mixture of
all tokens by their probabilities) and stand in the soft region only: a token whose place is among the hard ones is
chosen hard. When a window is full, the soft tokens that are about to leave the region collapse into hard ones, all of
them or those that `which` selects; later windows and memory have what they have become.

A text is read through `Policy`, so every other way to generate works with these models too, `softrl generate` and
`model.generate` included; none of them has collapsing.
Source: softrl maths, section 9, after the notes on softAR.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.contexts.collapse import LearnedCollapse
from softrl.contexts.soft_ar import SoftARForCausalLM
from softrl.contexts.window import WindowLayout
from softrl.contexts.window_state import WindowState
from softrl.generation.next_token import NextToken
from softrl.masking import is_any_of
from softrl.models.nearest import nearest_tokens
from softrl.models.policy import Policy, evaluating
from softrl.rollouts.soft import check_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.temperature import softmax_entropy
from softrl.types import HardRollout, Prompts


@dataclass(frozen=True)
class SoftToken:
    """M soft tokens as a collapse sees them: what was fed, what it was made from, and how sure the model was."""

    embeds: Float[Tensor, "M D"]
    hidden: Float[Tensor, "M D"]
    entropy: Float[Tensor, "M"]  # nats
    distance: Float[Tensor, "M"]  # of `embeds` to the nearest token embedding, Euclidean


def everything(tokens: SoftToken) -> Bool[Tensor, "M"]:
    """Every soft token collapses."""
    return torch.ones_like(tokens.distance, dtype=torch.bool)


@dataclass(frozen=True)
class SoftWriting:
    """How soft tokens collapse.

    Args:
        mapped: vectors in the embeddings' space, the nearest tokens of which are what soft tokens become; None: the
            soft tokens themselves. `learned` makes it of a `LearnedCollapse`, which maps the context they came from.
        which: which of those that leave the soft region collapse, see `contexts.collapse.selective`; the others stay
            what they are.
    """

    mapped: Callable[[SoftToken], Float[Tensor, "M D"]] | None = None
    which: Callable[[SoftToken], Bool[Tensor, "M"]] = everything


def learned(head: LearnedCollapse) -> Callable[[SoftToken], Float[Tensor, "M D"]]:
    """`mapped` of a fitted head."""
    return lambda tokens: head(tokens.hidden)


@dataclass(frozen=True)
class SoftARText(HardRollout):
    """N texts. `tokens` are what was fed where it was hard, and what it becomes by collapsing where it was soft."""

    is_soft: Bool[Tensor, "N T"]  # when it was written
    collapsed: Bool[Tensor, "N T"]  # and has been replaced by its token since, in the context too
    entropy: Float[Tensor, "N T"]  # of the model's distribution, nats
    distance: Float[Tensor, "N T"]  # of a soft token to the nearest embedding, 0 of a hard one
    embeds: Float[Tensor, "N T D"]  # what was fed first
    context: Float[Tensor, "N T D"]  # what the history has of it in the end


@dataclass
class _Writing:
    """The steps so far, one tensor each; `at` is the step of a place in the window."""

    tokens: list[Tensor]
    is_soft: list[Tensor]
    embeds: list[Tensor]
    hidden: list[Tensor]
    entropy: list[Tensor]
    distance: list[Tensor]


def writes_only_soft(layout: WindowLayout, lengths: Int[Tensor, "N"]) -> Bool[Tensor, "N"]:
    """Whether everything that is written after histories of so many tokens is soft, and nothing is ever drawn.

    A token is hard while the first window's hard places fill, or where a window that moves on frees some of them.
    """
    return (lengths >= layout.num_hard) & (layout.stride <= layout.num_soft)


@torch.no_grad()
def soft_ar_generate(
    model: SoftARForCausalLM | Policy,
    prompts: Prompts,
    max_new_tokens: int,
    next_token: NextToken | None = None,
    soft: SoftWriting | None = None,
    num_samples: int = 1,
    eos_ids: tuple[int, ...] = (),
    seed: int = 0,
    pad_id: int = 0,
    indices: list[int] | None = None,
) -> SoftARText:
    """Go on with prompts of any length for any number of tokens.

    Args:
        model: whose window is read anew every `stride` tokens; a policy of it is used with its adapter, whose virtual
            tokens come first in the history, and with its temperature, which is of hard tokens.
        prompts: B left-padded prompts.
        max_new_tokens: T.
        next_token: how hard tokens are chosen; by default the likeliest.
        soft: how soft tokens collapse; None writes hard ones only.
        num_samples: G texts a prompt.
        eos_ids: a text ends where its token, what a soft one would become included, is one of these.
        seed: random numbers are keyed by it, the prompt's number and the sample.
        pad_id: what stands behind a text's end.
        indices: the prompts' numbers, so that a prompt has the same draws in every batch; by default 0, 1, ...
    Returns:
        N = B * G rows of T tokens at most; T is cut to the longest.
    Raises:
        ValueError: prompts that nothing can be generated from, no tokens or texts to generate, or soft tokens for a
            window without a soft region.
    """
    policy = model if isinstance(model, Policy) else Policy(model)
    next_token, layout = next_token or NextToken(greedy=True), policy.causal_lm.model.layout
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if soft is not None and not layout.num_soft:
        raise ValueError("soft: the model's window has no place for soft tokens (num_soft=0); pass None")
    rows = prompts.repeated(num_samples)
    random = SequenceRandom.keyed(
        seed, 0, list(range(len(prompts.ids))) if indices is None else indices, num_samples, prompts.ids.device
    )
    check_rollout(policy, prompts, max_new_tokens, num_samples, random)
    ended, mask, steps = torch.zeros_like(rows.mask[:, 0]), [], _Writing([], [], [], [], [], [])
    contexts: list[Tensor] = []
    collapsed: list[Tensor] = []
    with evaluating(policy.model):
        hidden, state = policy.begin(prompts, num_samples, capacity=max_new_tokens)
        assert isinstance(state, WindowState)
        for number in range(max_new_tokens):
            is_soft = torch.zeros_like(ended) if soft is None else state.places >= layout.num_hard
            _write(policy, steps, hidden, is_soft, next_token, soft, random)
            contexts.append(steps.embeds[-1])
            collapsed.append(torch.zeros_like(ended))
            mask.append(~ended)
            ended = ended | is_any_of(steps.tokens[-1], eos_ids)
            if number == max_new_tokens - 1 or ended.all():
                break
            if soft is not None:
                _collapse(policy, state, steps, soft, contexts, collapsed)
            with policy.context():
                hidden = state.advance(steps.embeds[-1][:, None], is_soft)[:, 0]
    real = torch.stack(mask, 1)
    tokens = torch.stack(steps.tokens, 1).masked_fill(~real, pad_id)
    columns = {name: torch.stack(getattr(steps, name), 1) for name in ("is_soft", "entropy", "distance", "embeds")}
    return SoftARText(
        rows, tokens, real, collapsed=torch.stack(collapsed, 1) & real, context=torch.stack(contexts, 1), **columns
    )


def _write(
    policy: Policy,
    steps: _Writing,
    hidden: Float[Tensor, "N D"],
    is_soft: Bool[Tensor, "N"],
    next_token: NextToken,
    soft: SoftWriting | None,
    random: SequenceRandom,
) -> None:
    """The next token of every row, soft or hard."""
    log_probs = policy.head(hidden).log_softmax(-1)
    tokens = next_token.choose(log_probs, random)
    embeds, entropy = policy.embed(tokens), softmax_entropy(log_probs)
    distance = torch.zeros_like(entropy)
    if soft is not None and is_soft.any():
        with policy.context():
            outputs = policy.causal_lm.soft_outputs(hidden).to(embeds.dtype)
        nearest, distances = nearest_tokens(policy, outputs)
        if soft.mapped is not None:
            nearest, _ = nearest_tokens(policy, soft.mapped(SoftToken(outputs, hidden, entropy, distances)))
        tokens = torch.where(is_soft, nearest, tokens)
        embeds = torch.where(is_soft[:, None], outputs, embeds)
        distance = torch.where(is_soft, distances.to(distance.dtype), distance)
    for name, value in zip(
        ("tokens", "is_soft", "embeds", "hidden", "entropy", "distance"),
        (tokens, is_soft, embeds, hidden, entropy, distance),
        strict=True,
    ):
        getattr(steps, name).append(value)


def _collapse(
    policy: Policy,
    state: WindowState,
    steps: _Writing,
    soft: SoftWriting,
    contexts: list[Tensor],
    collapsed: list[Tensor],
) -> None:
    """Replace the soft tokens that the next one pushes out of the soft region, where `which` says so.

    The newest token is not in the state yet: the step before it stands in a window's last filled place.
    """
    leaving = state.leaving()
    if not leaving.any():
        return
    row, place = leaving.nonzero(as_tuple=True)
    step = (len(steps.tokens) - 2) - (state.filled[row] - 1 - place)
    pairs = list(zip(row.tolist(), step.tolist(), strict=True))

    def taken(name: str) -> Tensor:
        return torch.stack([getattr(steps, name)[t][n] for n, t in pairs])

    fed = taken("embeds")
    chosen = soft.which(SoftToken(fed, taken("hidden"), taken("entropy"), taken("distance")))
    embeds = torch.where(chosen[:, None], policy.embed(taken("tokens")), fed)
    state.replace(leaving, embeds)  # also those that stay what they are: outside of the region they have no type
    for (n, t), goes, embed in zip(pairs, chosen.tolist(), embeds, strict=True):
        if goes:
            contexts[t] = contexts[t].index_put((torch.tensor(n, device=embed.device),), embed)
            collapsed[t] = collapsed[t].index_fill(0, torch.tensor([n], device=embed.device), True)
