"""What truncation rules keep behind human text, at equal mean entropy: basis-aware beside η-sampling and top-p.

η and top-p keep the likeliest tokens, so every number of theirs is exact. A basis-aware rule needs a verdict for every
token below τ; it gets one for the likeliest of them, and for others that are drawn, which estimates sums over the rest
without bias. Whether it keeps the true next token is always asked.
Left out: what rules do to text that is generated with them, see `basis_samples.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from softrl.contexts.basis_aware import BasisAware, eta_threshold
from softrl.contexts.basis_certificate import certified_threshold
from softrl.tokens.truncation import Truncation, nucleus

_ROWS = 64  # contexts at a time where a vocabulary of each is sorted
_BISECTIONS = 24


@dataclass(frozen=True)
class Contexts:
    """Human text, each of whose tokens behind the beginning is a context's true next token.

    Args:
        ids: texts of equal length, shape (B, S).
        num_given: tokens of the beginning.
        logits: the model's own, of all M = B (S − num_given) contexts, text by text.
    """

    ids: Int[Tensor, "B S"]
    num_given: int
    logits: Float[Tensor, "M V"]

    @property
    def true_tokens(self) -> Int[Tensor, "M"]:
        """The next tokens."""
        return self.ids[:, self.num_given :].flatten()

    def tail(self, context: int, length: int) -> list[int]:
        """The last tokens before a context's next one."""
        text, step = divmod(context, self.ids.shape[1] - self.num_given)
        end = self.num_given + step
        return [int(token) for token in self.ids[text, max(0, end - length) : end]]


def top_p_mask(logits: Float[Tensor, "M V"], top_p: float) -> Bool[Tensor, "M V"]:
    """The smallest set of likeliest tokens that holds `top_p`."""
    return torch.cat([nucleus(piece, Truncation(1, top_p=top_p)) for piece in logits.split(_ROWS)])


def eta_mask(logits: Float[Tensor, "M V"], epsilon: float) -> Bool[Tensor, "M V"]:
    """Plain η-sampling: `p̂_i > min(ε, √ε e^{−H})`, and the likeliest token."""
    probs = logits.softmax(-1)
    tau = eta_threshold(torch.special.entr(probs).sum(-1), epsilon)
    return (probs > tau[:, None]) | (probs == probs.amax(-1, keepdim=True))


def mean_entropy(logits: Float[Tensor, "M V"], weights: Tensor) -> float:
    """Of the truncated, renormalised distributions, nats.

    Args:
        weights: a mask of the kept tokens, or what `accepted_weights` returns, shape (M, V).
    """
    entropies = []
    for piece, own in zip(logits.split(_ROWS), weights.split(_ROWS), strict=True):
        log_probs = piece.double().log_softmax(-1)
        kept = log_probs.exp() * own
        mass = kept.sum(-1)
        entropies.append(mass.log() - (kept * log_probs).sum(-1) / mass)
    return float(torch.cat(entropies).mean())


@dataclass(frozen=True)
class Prefixes:
    """What the n likeliest tokens of every context hold, for all n: η and top-p keep such sets.

    Args:
        probs: falling.
        mass: of the n likeliest, shape (M, V).
        entropy_nats: of these, renormalised; the last column is the model's own.
    """

    probs: Float[Tensor, "M V"]
    mass: Float[Tensor, "M V"]
    entropy_nats: Float[Tensor, "M V"]

    @classmethod
    def of(cls, logits: Float[Tensor, "M V"]) -> "Prefixes":
        """Of logits at temperature 1."""
        columns = []
        for piece in logits.split(_ROWS):
            probs = piece.double().softmax(-1).sort(-1, descending=True).values
            mass = probs.cumsum(-1)
            entropy = mass.log() + torch.special.entr(probs).cumsum(-1) / mass
            columns.append([each.float() for each in (probs, mass, entropy)])
        return cls(*(torch.cat(column) for column in zip(*columns, strict=True)))

    def top_p(self, top_p: float) -> Int[Tensor, "M"]:
        """How many tokens top-p keeps."""
        return (self.mass - self.probs < top_p).sum(-1).clamp(min=1)

    def eta(self, epsilon: float) -> Int[Tensor, "M"]:
        """How many tokens η-sampling keeps."""
        tau = eta_threshold(self.entropy_nats[:, -1], epsilon)
        return (self.probs > tau[:, None]).sum(-1).clamp(min=1)

    def mean_entropy(self, counts: Int[Tensor, "M"]) -> float:
        """Of so many likeliest tokens a context."""
        return float(self.entropy_nats.gather(1, counts[:, None] - 1).mean())

    def matched(self, rule: Callable[[float], Int[Tensor, "M"]], target: float, low: float, high: float) -> float:
        """The parameter at which the mean entropy is `target`, by bisection on its logarithm.

        Args:
            rule: counts from a parameter; the larger it is, the fewer.
            low, high: between which it lies.
        """
        for _ in range(_BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.mean_entropy(rule(middle)) > target else (low, middle)
        return (low * high) ** 0.5


@torch.no_grad()
def accepted_weights(
    rule: BasisAware, logits: Float[Tensor, "N V"], num_likeliest: int = 24, num_drawn: int = 24, seed: int = 0
) -> Float[Tensor, "N V"]:
    """Accepted tokens, as weights whose sums are unbiased for sums over all accepted ones.

    Tokens above τ weigh 1, and so do accepted ones of the likeliest below it. Of the others `num_drawn` are drawn by
    their probability; an accepted one weighs `mass / (num_drawn p̂_i)` each time, the other tokens 0.

    Args:
        rule: counted in its `counts`.
        logits: the model's own, at temperature 1.
        num_likeliest: below τ; with as many as there are all weights are 0 or 1.
        num_drawn: of the rest; 0 leaves it out.
        seed: of the draws.
    """
    programs = rule.programs(logits)
    probs, kept = programs.probs, programs.probs > programs.tau[:, None]
    below = probs.masked_fill(kept, 0.0)
    values, tokens = below.topk(min(num_likeliest, probs.shape[1]), dim=-1)
    rest = below.scatter(1, tokens, 0.0)
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = rest.clamp(min=1e-300).multinomial(max(1, num_drawn), replacement=True, generator=generator)
    found = rule.verdicts(
        logits, torch.cat([tokens, drawn], 1), torch.cat([values > 0.0, rest.gather(1, drawn) > 0], 1)
    )
    is_accepted = found.accepted.to(probs)
    weights = kept.to(probs).scatter_add(1, tokens, is_accepted[:, : tokens.shape[1]] * (values > 0.0))
    each = rest.sum(-1, keepdim=True) / (num_drawn * rest.gather(1, drawn).clamp(min=1e-300)) if num_drawn else 0.0
    weights = weights.scatter_add(1, drawn, is_accepted[:, tokens.shape[1] :] * each)
    likeliest = torch.zeros_like(weights).scatter(1, probs.argmax(-1, keepdim=True), 1.0)
    return torch.where(weights.any(-1, keepdim=True), weights, likeliest).float()


@dataclass(frozen=True)
class Rule:
    """What a rule leaves of human text's contexts, M of them.

    Args:
        rule, parameter: its name and ε or top-p.
        contexts: M.
        entropy_nats: mean of the truncated distributions.
        kept, mass: mean number of kept tokens, and their probability before truncation.
        true_kept: share of the true next tokens that are kept.
        true_gained, true_lost: share of the contexts in which it keeps the true token and the basis-aware rule does
            not, and the other way round.
        beyond_eta, beyond_top_p, beyond_both: kept tokens a context that η, top-p, both at the same entropy reject.
        true_beyond_both: true next tokens among the last, share of the contexts.
    """

    rule: str
    parameter: float
    contexts: int
    entropy_nats: float
    kept: float
    mass: float
    true_kept: float
    true_gained: float
    true_lost: float
    beyond_eta: float
    beyond_top_p: float
    beyond_both: float
    true_beyond_both: float


@dataclass(frozen=True)
class Comparison:
    """The rules at equal entropy on the same contexts.

    Args:
        basis: of the basis-aware rule, see `accepted_weights`.
        eta, top_p: masks.
        epsilon, nucleus: parameters of these.
        rows: a table.
    """

    basis: Float[Tensor, "M V"]
    eta: Bool[Tensor, "M V"]
    top_p: Bool[Tensor, "M V"]
    epsilon: float
    nucleus: float
    rows: list[Rule]


def compare_rules(contexts: Contexts, rule: BasisAware, num_likeliest: int = 24, num_drawn: int = 24) -> Comparison:
    """Basis-aware truncation, and top-p and η at its mean entropy, on contexts whose next token is known."""
    logits, true_tokens = contexts.logits, contexts.true_tokens
    pieces, accepts = [], []
    for number, piece in enumerate(tqdm(logits.split(4), desc="verdicts behind human text", leave=False)):
        pieces.append(accepted_weights(rule, piece, num_likeliest, num_drawn, number))
        true = true_tokens[4 * number : 4 * number + len(piece), None]
        accepts.append(rule.verdicts(piece, true).accepted[:, 0])
    basis, prefixes = torch.cat(pieces), Prefixes.of(logits)
    target = mean_entropy(logits, basis)
    epsilon = prefixes.matched(prefixes.eta, target, 1e-9, 0.9)
    # top-p through the mass that is left out, which spans decades
    left_out = prefixes.matched(lambda each: prefixes.top_p(1 - each), target, 1e-6, 0.999)
    eta, top_p = eta_mask(logits, epsilon), top_p_mask(logits, 1 - left_out)
    probs = torch.cat([piece.softmax(-1) for piece in logits.split(_ROWS)])
    likeliest = probs == probs.amax(-1, keepdim=True)
    same = (probs > rule.tau(probs)[:, None]) | likeliest
    accepted = torch.cat(accepts) | likeliest.gather(1, true_tokens[:, None])[:, 0]  # the greedy fallback
    rules = {
        f"basis-aware {rule.rule}": (rule.epsilon, basis), "eta": (epsilon, eta), "top-p": (1 - left_out, top_p),
        f"{rule.rule}, same epsilon": (rule.epsilon, same),
    }  # fmt: skip
    rows = []
    for name, (parameter, weights) in rules.items():
        true = accepted if weights is basis else weights.gather(1, true_tokens[:, None])[:, 0].bool()
        beyond = [(weights * ~others).sum(-1).float().mean() for others in (eta, top_p, eta | top_p)]
        is_beyond = true & ~(eta | top_p).gather(1, true_tokens[:, None])[:, 0]
        shares = (true, true & ~accepted, accepted & ~true)
        rows.append(Rule(
            name, parameter, len(logits), mean_entropy(logits, weights), float(weights.sum(-1).float().mean()),
            float((probs * weights).sum(-1).mean()), *(float(share.float().mean()) for share in shares),
            *map(float, beyond), float(is_beyond.float().mean()),
        ))  # fmt: skip
    return Comparison(basis, eta, top_p, epsilon, 1 - left_out, rows)


@dataclass(frozen=True)
class ContextRow:
    """One context: its last tokens and how many tokens rules of equal mean entropy keep; see `Rule`."""

    context: str
    true_next: str
    entropy_nats: float
    tau: float
    kept_basis: float
    kept_eta: int
    kept_top_p: int
    beyond_eta: float
    beyond_top_p: float
    beyond_both: float


def context_rows(contexts: Contexts, found: Comparison, rule: BasisAware, tokenizer: Any) -> list[ContextRow]:
    """A row a context; counts of the basis-aware rule are estimates, see `accepted_weights`."""
    rows = []
    for context, logits in enumerate(contexts.logits):
        probs = logits.double().softmax(-1)
        weights, eta, top_p = found.basis[context], found.eta[context], found.top_p[context]
        rows.append(ContextRow(
            tokenizer.decode(contexts.tail(context, 12)), tokenizer.decode([int(contexts.true_tokens[context])]),
            float(torch.special.entr(probs).sum()), float(rule.tau(probs[None])), float(weights.sum()),
            int(eta.sum()), int(top_p.sum()),
            *(float((weights * ~each).sum()) for each in (eta, top_p, eta | top_p)),
        ))  # fmt: skip
    return rows


@dataclass(frozen=True)
class Example:
    """A token that the basis-aware rule accepts, and that η and top-p at equal mean entropy reject.

    Args:
        context, token, true_next: text: the last tokens before it, the token itself, what the human text has.
        probability: p̂.
        tau: of the basis-aware rule: p̂ is below it.
        certified_bound: of τ_i by the independent checker: p̂ is above it, which is the proof.
        eta_tau: of the matched η, below which it rejects.
        rank: 1 for the likeliest token.
        mass_before: probability of the likelier tokens; top-p rejects where it is `nucleus` or more.
    """

    context: str
    token: str
    true_next: str
    probability: float
    tau: float
    certified_bound: float
    eta_tau: float
    rank: int
    mass_before: float


def examples(
    contexts: Contexts, found: Comparison, rule: BasisAware, tokenizer: Any, number: int = 30, seed: int = 0
) -> list[Example]:
    """The likeliest such token of contexts that are drawn at random; contexts without one are passed over."""
    order = torch.randperm(len(contexts.logits), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[tuple[int, Example]] = []
    for context in order:
        if len(rows) == number:
            break
        probs = contexts.logits[context].double().softmax(-1)
        new = (found.basis[context] > 0) & ~found.eta[context] & ~found.top_p[context]
        if new.any():
            token = int((probs * new).argmax())
            rows.append((context, _example(contexts, found, rule, tokenizer, context, token)))
    return [row for _, row in sorted(rows, key=lambda each: each[0])]


def _example(
    contexts: Contexts, found: Comparison, rule: BasisAware, tokenizer: Any, context: int, token: int
) -> Example:
    logits = contexts.logits[context][None]
    programs = rule.programs(logits)
    verdict = rule.verdicts(logits, torch.tensor([[token]], device=logits.device))
    probs, tau = programs.probs[0], float(programs.tau[0])
    y = verdict.certificate[0, 0].cpu().numpy()
    bound = certified_threshold(programs.directions.cpu().numpy(), probs.cpu().numpy(), token, tau, y)
    likelier = probs > probs[token]
    return Example(
        tokenizer.decode(contexts.tail(context, 16)), tokenizer.decode([token]),
        tokenizer.decode([int(contexts.true_tokens[context])]), float(probs[token]), tau, bound,
        float(eta_threshold(torch.special.entr(probs).sum(), found.epsilon)), int(likelier.sum()) + 1,
        float(probs[likelier].sum()),
    )  # fmt: skip
