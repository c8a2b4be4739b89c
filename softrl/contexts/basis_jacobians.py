"""Directions from the Jacobian of the logits at any representation: a layer's states, earlier tokens' included.

For any tangent u, `J u` is a column for which `uᵀJᵀp = uᵀJᵀp̂` holds: the solver takes such columns as directions.
Products with J and Jᵀ are the model's own, by differentiating backwards once and twice, so no Jacobian is built.

For a linear head every Jacobian at the position of the logits is W·A, so that W implies its constraints; what it adds
is soundness behind a norm. A representation that several contexts share (an input embedding) is stationary for their
sum only, and then proves nothing about one of them.
Source: softrl seeds/002 and maths, section 10; range finding: Halko, Martinsson and Tropp (2011), arXiv:0909.4061.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from softrl.models.policy import Policy, evaluating, frozen

_OVERSAMPLED = 8  # tangents beyond k, of which the best k are kept


class LogitJacobian:
    """Products with J = ∂logits/∂state at one state.

    Args:
        logits_of: a differentiable function of a state.
        state: where, of any shape; n numbers.
    """

    def __init__(self, logits_of: Callable[[Tensor], Float[Tensor, "V"]], state: Tensor):
        with torch.enable_grad():
            self.state = state.detach().requires_grad_()
            self.logits = logits_of(self.state)

    def transposed(self, cotangents: Float[Tensor, "m V"]) -> Float[Tensor, "m n"]:
        """`Jᵀ g` for each g."""
        rows = [torch.autograd.grad(self.logits, self.state, each, retain_graph=True)[0] for each in cotangents]
        return torch.stack([row.reshape(-1) for row in rows])

    def times(self, tangents: Float[Tensor, "m n"]) -> Float[Tensor, "V m"]:
        """`J u` for each u: the derivative of `uᵀ Jᵀ g` by g, which is linear in g."""
        with torch.enable_grad():
            cotangent = torch.zeros_like(self.logits).requires_grad_()
            (pulled,) = torch.autograd.grad(self.logits, self.state, cotangent, create_graph=True)
        shape = self.state.shape
        columns = [
            torch.autograd.grad(pulled, cotangent, each.reshape(shape), retain_graph=True)[0] for each in tangents
        ]
        return torch.stack(columns, -1)


def jacobian_directions(
    jacobian: LogitJacobian, num_directions: int, seed: int = 0, num_rounds: int = 2
) -> tuple[Float[Tensor, "V k"], Float[Tensor, "k n"]]:
    """Columns `J u` for the k tangents that move the model's distribution most.

    They are the leading right singular vectors of `(diag(p̂) − p̂p̂ᵀ)^½ J`, found by random range finding.

    Args:
        jacobian: at one state of one context.
        num_directions: k.
        seed: of the range finder.
        num_rounds: of power iteration, each 2 (k + 8) passes through the model's graph.
    Returns:
        The columns, float64, and the tangents, orthonormal.
    Raises:
        ValueError: k outside [1, n].
    """
    size = jacobian.state.numel()
    if not 1 <= num_directions <= size:
        raise ValueError(f"num_directions must lie between 1 and the state's {size} numbers, got {num_directions}")
    probs = jacobian.logits.detach().double().softmax(-1)
    number = min(num_directions + _OVERSAMPLED, size)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(number, len(probs), generator=generator, dtype=torch.float64).to(probs.device)
    tangents = _pulled(jacobian, probs.sqrt() * draws, probs)
    for _ in range(num_rounds):
        columns = jacobian.times(tangents).double()
        tangents = _pulled(jacobian, (probs[:, None] * columns).T, probs)
    columns = jacobian.times(tangents).double()
    centred = columns - probs @ columns
    _, vectors = torch.linalg.eigh(centred.T @ (centred * probs[:, None]))
    leading = vectors.flip(-1)[:, :num_directions]
    return columns @ leading, leading.T @ tangents.double()


def _pulled(
    jacobian: LogitJacobian, cotangents: Float[Tensor, "m V"], probs: Float[Tensor, "V"]
) -> Float[Tensor, "m n"]:
    """Orthonormal tangents that span what the cotangents, made orthogonal to constants, pull back to."""
    centred = cotangents - cotangents.sum(-1, keepdim=True) * probs
    pulled = jacobian.transposed(centred.to(jacobian.logits.dtype)).double()
    return torch.linalg.qr(pulled.T).Q.T.to(jacobian.state.dtype)


def representation_jacobian(
    policy: Policy, ids: Int[Tensor, "S"], layer: int, positions: tuple[int, ...] = (-1,)
) -> LogitJacobian:
    """The Jacobian of the last position's logits at a layer's states.

    Args:
        policy: the model, at temperature 1; its parameters get no gradient.
        ids: a context of S tokens, without padding.
        layer: 0 for the input embeddings, l for what the l-th block returns.
        positions: whose states; earlier ones act through attention. After the last block only the last one acts.
    Raises:
        ValueError: a layer that the model does not have, or a position outside the context.
    """
    blocks = _blocks(policy)
    if not 0 <= layer <= len(blocks):
        raise ValueError(f"layer must lie between 0 (the input) and {len(blocks)}, got {layer}")
    if not all(-len(ids) <= position < len(ids) for position in positions):
        raise ValueError(f"positions {positions} lie outside the context of {len(ids)} tokens")
    with torch.no_grad():
        embeds = policy.embed(ids[None])
    where = list(positions)

    def logits_of(state: Tensor | None, seen: list[Tensor]) -> Tensor:
        def replaced(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden.detach())
            if state is None:
                return output
            changed = _with_states(hidden, where, state)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        fed = embeds if state is None or layer > 0 else _with_states(embeds, where, state)
        handle = blocks[layer - 1].register_forward_hook(replaced) if layer > 0 else None
        arguments = policy.accepted({"inputs_embeds": fed, "use_cache": False})
        try:
            # The fused kernels have no second derivative.
            with evaluating(policy.model), frozen(policy.model), policy.context(), sdpa_kernel(SDPBackend.MATH):
                last = policy.decoder(**arguments).last_hidden_state[0, -1:]
                return policy.head(last)[0]
        finally:
            if handle is not None:
                handle.remove()

    seen: list[Tensor] = [embeds]
    with torch.no_grad():
        logits_of(None, seen)
    return LogitJacobian(lambda state: logits_of(state, []), seen[-1][0, where])


def _with_states(hidden: Float[Tensor, "1 S D"], positions: list[int], states: Float[Tensor, "j D"]) -> Tensor:
    changed = hidden.clone()
    changed[0, positions] = states
    return changed


def _blocks(policy: Policy) -> nn.ModuleList:
    """The decoder's list of layers."""
    number = getattr(policy.causal_lm.config.get_text_config(), "num_hidden_layers", None)
    for module in policy.decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    return nn.ModuleList()
