"""A language model so small that its true distributions are known: what basis-aware truncation accepts, and falsely.

Every context is a free input x; a hidden layer, a norm and an output embedding follow. All is trained by exact
cross-entropy to a stationary point, where the theorem's equations hold to rounding. With each context's smallest valid
τ the theorem promises that no accepted token is outside the true support; a constraint set that accepts one makes a
claim that does not hold.
Source: the check in softrl maths, section 10 (V = 16, D = 5).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softrl.contexts.basis_certificate import certified_threshold
from softrl.contexts.basis_reference import reference_threshold
from softrl.contexts.basis_thresholds import Programs, verdicts
from softrl.contexts.final_norm import FinalNorm

NormName = Literal["none", "rms", "layer"]
_STATIONARY = 1e-12  # largest derivative of a context that has arrived
CONSTRAINTS = ("output", "before_norm", "input", "joint")
_PLAIN = "threshold"
# A Jacobian at a deeper state is W A, or the later one's times something: it adds nothing to what follows from those.
_IMPLIED = (
    ("before_norm", "output"), ("input", "output"), ("joint", "output"), ("input", "before_norm"),
    ("joint", "before_norm"), ("before_norm", "joint"),
)  # fmt: skip


class TinyModel(nn.Module):
    """`z = W norm(x + A tanh(x))`, one free x a context.

    Args:
        true_probs: the distributions to learn, shape (N, V).
        width: D.
        norm: which norm stands before W.
        seed: of the first parameters.
    """

    def __init__(self, true_probs: Float[Tensor, "N V"], width: int, norm: NormName, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.true_probs = true_probs
        self.inputs, self.mixing = drawn(len(true_probs), width), drawn(width, width)
        self.weight = drawn(true_probs.shape[1], width)
        self.norm_weight = nn.Parameter(torch.ones(width, dtype=torch.float64))
        self.norm_name = norm

    def state(self, inputs: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """The state before the norm."""
        return inputs + 0.1 * torch.tanh(inputs) @ self.mixing.mT

    @property
    def norm(self) -> FinalNorm:
        return FinalNorm(self.norm_name == "layer", self.norm_weight, eps=0.0)

    def output(self, state: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits."""
        if self.norm_name != "none":
            state = self.norm.normalised(state) * self.norm_weight
        return state @ self.weight.mT

    def loss(self) -> Float[Tensor, ""]:
        """Cross-entropy, nats a context."""
        log_probs = self.output(self.state(self.inputs)).log_softmax(-1)
        return -(self.true_probs * log_probs).sum(-1).mean()

    @torch.no_grad()
    def probs(self) -> Float[Tensor, "N V"]:
        """p̂."""
        return self.output(self.state(self.inputs)).softmax(-1)

    def jacobian(self, context: int, representation: str) -> Float[Tensor, "V d"]:
        """Of a context's logits: W itself, or at the state before the norm, or at the input; "joint" has all columns
        but W's."""
        if representation == "output":
            return self.weight.detach()
        inputs = self.inputs[context].detach()
        before = torch.func.jacrev(self.output)(self.state(inputs)).detach()
        if representation == "before_norm":
            return before
        at_input = torch.func.jacrev(lambda each: self.output(self.state(each)))(inputs).detach()
        return at_input if representation == "input" else torch.cat([before, at_input], -1)


def sparse_distributions(num_contexts: int, vocab_size: int, seed: int) -> Float[Tensor, "N V"]:
    """True distributions in which about half of the tokens are impossible."""
    generator = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(num_contexts, vocab_size, generator=generator, dtype=torch.float64)
    possible = torch.rand(num_contexts, vocab_size, generator=generator) < 0.5
    possible[:, 0] |= ~possible.any(-1)
    return scores.masked_fill(~possible, -torch.inf).softmax(-1)


def trained(model: TinyModel, num_joint: int = 400, num_newton: int = 100) -> Float[Tensor, "N"]:
    """Train everything for a while by L-BFGS, then each context's input to a stationary point by Newton's method.

    The theorem's equations are about a context's own state, so W need not be stationary itself.

    Returns:
        The largest derivative of each context's cross-entropy with respect to its input; a context whose best state is
        infinitely far away keeps one.
    """
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=num_joint, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = model.loss() + 1e-4 * model.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    inputs = model.inputs.detach()
    for _ in range(num_newton):
        inputs, gradients = _newton_step(model, inputs)
        if (gradients < 0.01 * _STATIONARY).all():
            break
    model.inputs.data.copy_(inputs)
    return _each(torch.func.grad(_cross_entropy(model)), model, inputs).abs().amax(-1)


def _cross_entropy(model: TinyModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda inputs, true_probs: -(true_probs * model.output(model.state(inputs)).log_softmax(-1)).sum()


def _each(function: Callable[..., Tensor], model: TinyModel, inputs: Float[Tensor, "N D"]) -> Tensor:
    return torch.func.vmap(function)(inputs, model.true_probs).detach()


def _newton_step(model: TinyModel, inputs: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N"]]:
    """A step down along every curved direction, halved until the loss is not higher; and the largest derivatives."""
    loss = _cross_entropy(model)
    gradient = _each(torch.func.grad(loss), model, inputs)
    curvatures, axes = torch.linalg.eigh(_each(torch.func.hessian(loss), model, inputs))
    size = curvatures.abs()
    flat = size < 1e-9 * size.amax(-1, keepdim=True)  # behind a norm the length of the state does nothing
    along = (axes.mT @ gradient[..., None])[..., 0]
    step = -(axes @ (along / size.masked_fill(flat, torch.inf))[..., None])[..., 0]
    before, share = _each(loss, model, inputs), torch.ones(len(inputs), 1, dtype=inputs.dtype)
    for _ in range(30):
        is_higher = _each(loss, model, inputs + share * step) > before + 1e-15
        if not is_higher.any():
            break
        share = torch.where(is_higher[:, None], share / 2, share)
    return inputs + share * step, gradient.abs().amax(-1)


@dataclass(frozen=True)
class TinyResult:
    """What one constraint set accepts on all contexts.

    Args:
        norm, seed: of the model.
        constraints: which representation's Jacobian.
        accepted: tokens, all contexts together, those above τ included.
        false: of these, tokens of true probability zero.
        by_threshold: tokens above τ.
        settled_by_highs: programs that our solver, made for small τ, left undecided.
        num_contexts: contexts at a stationary point, to which all this refers.
    """

    norm: str
    seed: int
    constraints: str
    accepted: int
    false: int
    by_threshold: int
    settled_by_highs: int
    num_contexts: int


@dataclass(frozen=True)
class Nested:
    """Two sets of accepted tokens of which theory says that the first is part of the second.

    Args:
        norm, seed: of the model.
        smaller, larger: the sets; "output, k=2" has the two leading directions only.
        tokens_smaller, tokens_larger: how many, all contexts together.
        violations: tokens of the smaller set that are not in the larger one.
    """

    norm: str
    seed: int
    smaller: str
    larger: str
    tokens_smaller: int
    tokens_larger: int
    violations: int


def smallest_tau(true_probs: Float[Tensor, "N V"], probs: Float[Tensor, "N V"]) -> Float[Tensor, "N"]:
    """The least τ with `p <= p̂ / (1−τ)`, and 1e-6 more: training's rounding must be small beside it."""
    return 1 - 1 / (true_probs / probs).amax(-1) + 1e-6


def independent(columns: Float[Tensor, "N V d"], tolerance: float = 1e-7) -> Float[Tensor, "N V r"]:
    """An orthonormal basis of the columns; the largest rank of a context for all, padded by zeros."""
    left, strengths, _ = torch.linalg.svd(columns, full_matrices=False)
    present = strengths > tolerance * strengths[:, :1]
    rank = int(present.sum(-1).max())
    return (left * present[:, None])[..., :rank].contiguous()


def accepted_tokens(programs: Programs) -> tuple[Bool[Tensor, "N V"], int]:
    """Tokens that are accepted by proof, and how many programs HiGHS had to settle.

    τ is near 1 here, where our solver gives up on some programs. HiGHS's dual solution is a proof like ours, and is
    checked like ours.
    """
    probs, tau = programs.probs, programs.tau
    found = verdicts(programs, torch.arange(probs.shape[1]).expand(len(probs), -1))
    accepted = found.accepted.clone()
    open_ones = torch.nonzero(found.undecided).tolist()
    for context, token in open_ones:
        program = (programs.directions[context].numpy(), probs[context].numpy(), token, float(tau[context]))
        reference = reference_threshold(*program)
        accepted[context, token] = certified_threshold(*program, reference.y) < float(probs[context, token])
    return accepted, len(open_ones)


def tiny_check(
    norm: NormName, num_contexts: int = 45, vocab_size: int = 16, width: int = 5, seed: int = 0
) -> tuple[list[TinyResult], list[Nested]]:
    """Train one model; count what every constraint set accepts, and where sets are not nested as theory says."""
    true_probs = sparse_distributions(num_contexts, vocab_size, seed)
    model = TinyModel(true_probs, width, norm, seed)
    there = torch.nonzero(trained(model) < _STATIONARY)[:, 0]
    true_probs, probs = true_probs[there], model.probs()[there]
    tau = smallest_tau(true_probs, probs)
    sets = {_PLAIN: probs > tau[:, None]}
    chains, results = [], []
    for name in CONSTRAINTS:
        columns = independent(torch.stack([model.jacobian(context, name) for context in there.tolist()]))
        sets[name], unsettled = accepted_tokens(Programs(columns, probs, tau))
        results.append(TinyResult(
            norm, seed, name, int(sets[name].sum()), int((sets[name] & (true_probs == 0.0)).sum()),
            int(sets[_PLAIN].sum()), unsettled, len(there),
        ))  # fmt: skip
        if name in ("output", "before_norm"):
            few = {f"{name}, k={k}": columns[..., :k].contiguous() for k in range(1, columns.shape[-1])}
            sets |= {key: accepted_tokens(Programs(own, probs, tau))[0] for key, own in few.items()}
            chains.append([_PLAIN, *few, name])
    pairs = [pair for chain in chains for pair in itertools.pairwise(chain)]
    return results, [_nested(norm, seed, sets, *pair) for pair in (*pairs, *_IMPLIED)]


def _nested(norm: str, seed: int, sets: dict[str, Tensor], smaller: str, larger: str) -> Nested:
    first, second = sets[smaller], sets[larger]
    counts = (int(each.sum()) for each in (first, second, first & ~second))
    return Nested(norm, seed, smaller, larger, *counts)
