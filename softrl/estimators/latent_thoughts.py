"""How the latent reasoner learns: its forward pass as the record that rules of learning from thoughts read.

The rules themselves are in `thought_rules`. Of every anchor (a position whose next token counts) a trainer minimises
`rule.thought_losses(scored) − Σ_s rule.talk_weights(scored)_s · scored.rewards_s`, and what it adds for the base LM.
Axes: N texts, T tokens, M anchors, S thoughts, n latents, V vocabulary, D width.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.estimators.cross_entropy_method import (
    DiscreteProposal,
    GaussianProposal,
    Proposal,
    SearchSettings,
    cross_entropy_search,
)
from softrl.estimators.thought_base import ScoredThoughts
from softrl.models.reasoner import ReadTexts, ReasonerForCausalLM, ReasonerOutput
from softrl.objectives.proxy import ProxyDivergence, forward_proxy_value, proxy_value
from softrl.tokens.divergences import entropy
from softrl.tokens.noise import sequence_seed


def scored_latents(output: ReasonerOutput) -> ScoredThoughts:
    """The thoughts of all anchors, M of them, drawn from the policy itself; rewards are the labels' log-likelihood.

    Args:
        output: of a forward pass with labels.
    Raises:
        ValueError: no labels were given, or none of them counts.
    """
    rewards, valid, log_probs = output.rewards, output.is_target, output.thought_log_probs
    if rewards is None or valid is None:
        raise ValueError("output has no rewards: pass labels to the forward pass")
    if not valid.any():
        raise ValueError("no position has a next token that counts, so no thought has a reward; pass other texts")
    log_probs = torch.zeros_like(rewards) if log_probs is None else log_probs
    log_z = None if output.log_z is None else output.log_z[valid]
    return ScoredThoughts(rewards[valid], log_probs[valid], log_probs[valid].detach(), log_z=log_z)


def with_thought_entropy(scored: ScoredThoughts, beta_2: float) -> ScoredThoughts:
    """Rewards `r − β₂ log π(h | x)`, the second part a constant: a score function then ascends `E r + β₂ H[π(h | x)]`.

    Exact whatever the number of latents, as `∇H = −E[log π ∇log π]`; the optimum is `π* = softmax(r/β₂)`. The rules
    `listwise`, `nca`, `partition` and `partition_learned` have the same target by their own `beta` and need no bonus.

    Args:
        scored: rewards keep their graph, since what is added is constant.
        beta_2: β₂ >= 0.
    Raises:
        ValueError: β₂ is negative.
    """
    if beta_2 < 0.0:
        raise ValueError(f"beta_2 is the weight of an entropy and must not be negative, got {beta_2}")
    bonus = -beta_2 * scored.log_probs.detach()
    estimated = None if scored.estimated is None else scored.estimated + bonus
    return replace(scored, rewards=scored.rewards + bonus, estimated=estimated)


def predicted_value(
    log_probs: Float[Tensor, "*batch V"],
    targets: Int[Tensor, "*batch"],
    beta: float = 0.0,
    log_proxy: Float[Tensor, "*batch V"] | None = None,
    proxy_divergence: ProxyDivergence = "reverse",
) -> Float[Tensor, "*batch"]:
    """R of predictions, nats; differentiable in them.

    Args:
        log_probs: log π(y | h, x), normalised.
        targets: the true next tokens, which a proxy makes unread.
        beta: β.
        log_proxy: log D(y | x), finite.
        proxy_divergence: see `latent_objective.LatentObjective`.
    """
    if log_proxy is not None:
        of_proxy = forward_proxy_value if proxy_divergence == "forward" else proxy_value
        return of_proxy(log_probs.flatten(0, -2), log_proxy.flatten(0, -2), beta).view(targets.shape)
    value = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    if beta == 0.0:
        return value
    return value + beta * entropy(log_probs.flatten(0, -2)).view(value.shape)


@dataclass(frozen=True)
class FoundThoughts:
    """Elites of a search after every token: latents to be scored with `values=`, best first, and their rewards."""

    values: Tensor  # N T E n, and a value's own axes
    rewards: Float[Tensor, "N T E"]


@torch.no_grad()
def searched_thoughts(
    model: ReasonerForCausalLM,
    input_ids: Int[Tensor, "N T"],
    attention_mask: Tensor | None,
    targets: Int[Tensor, "N T"],
    settings: SearchSettings,
    seed: int,
    row_ids: list[int] | None = None,
    beta: float = 0.0,
) -> FoundThoughts:
    """Search the latents of every position for those with the highest reward R, see `predicted_value`.

    At β = 0 they are those after which the next token is likeliest.

    Elites are distilled by maximum likelihood: minimise `−log π(h | x)` of `model(..., values=found.values)`, and the
    talk part's `−rewards` beside it. The search starts from uniform codes, or standard normal vectors, not from the
    reasoner: what it finds does not depend on what the reasoner prefers.

    Args:
        model: with discrete or Gaussian latents.
        input_ids, attention_mask: texts.
        targets: next tokens; where there is none, any id.
        settings: of the search.
        seed, row_ids: see `ReasonerForCausalLM.forward`.
        beta: β, weight of H[π(y | h, x)] in R.
    Raises:
        ValueError: the model has no latents, or soft ones.
    """
    texts = model.read(input_ids, attention_mask)
    shape = tuple(input_ids.shape)
    rows = list(range(shape[0])) if row_ids is None else row_ids

    def uniforms(index: int) -> Tensor:
        drawn = model.uniforms(texts.positions, settings.num_samples, sequence_seed(seed, index), rows)
        return drawn.flatten(0, 1)

    def score(values: Tensor) -> Tensor:
        return _rewards(model, texts, values.unflatten(0, shape), targets, beta).flatten(0, 1)

    found = cross_entropy_search(_first_proposal(model, input_ids), score, uniforms, settings)
    return FoundThoughts(found.elites.unflatten(0, shape), found.rewards.unflatten(0, shape))


def _first_proposal(model: ReasonerForCausalLM, input_ids: Tensor) -> Proposal:
    config, count = model.config, input_ids.numel()
    if not config.use_reasoner or config.n_thought == 0 or config.latent_kind == "soft":
        raise ValueError(
            "a search needs discrete or Gaussian latents, got "
            f"use_reasoner={config.use_reasoner}, n_thought={config.n_thought}, latent_kind={config.latent_kind!r}"
        )
    if config.latent_kind == "discrete":
        first = DiscreteProposal.uniform(count, config.n_thought, config.num_latents)
        return DiscreteProposal(first.probs.to(input_ids.device))
    normal = GaussianProposal.standard(count, config.n_thought, config.latent_size)
    like = model.start
    return GaussianProposal(normal.mean.to(like), normal.std.to(like))


def _rewards(
    model: ReasonerForCausalLM, texts: ReadTexts, values: Tensor, targets: Int[Tensor, "N T"], beta: float
) -> Float[Tensor, "N T S"]:
    """R of the mixed predictions after given latents."""
    hidden = model.interpreted(texts, model.latent.embed(values))
    talk = model.talk(texts, hidden)["talk_log_probs"]
    return predicted_value(talk, targets[:, :, None].expand(talk.shape[:3]), beta)
