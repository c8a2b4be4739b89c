"""The norm before a model's output embedding, and its Jacobian in closed form.

Which module it is, and which of the two formulas it computes, is found by running it: names differ between
architectures, and some scale by 1 + w.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softrl.models.policy import Policy, evaluating


@dataclass(frozen=True)
class FinalNorm:
    """`w ĥ + β` with `ĥ = (h − c mean(h)) / s`, c = 1 for LayerNorm and 0 for RMSNorm, `s² = mean of squares + ε`.

    Args:
        centres: c is 1.
        weight: w.
        bias: β.
        eps: ε.
    """

    centres: bool
    weight: Float[Tensor, "D"]
    bias: Float[Tensor, "D"] | None = None
    eps: float = 1e-5

    def normalised(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """ĥ."""
        centred = hidden - hidden.mean(-1, keepdim=True) if self.centres else hidden
        return centred / self._scale(centred)

    def _scale(self, centred: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch 1"]:
        return (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def jacobian(self, hidden: Float[Tensor, "D"]) -> Float[Tensor, "D D"]:
        """`diag(w) (I − 11ᵀ/D − ĥĥᵀ/D) / s`; RMSNorm drops 11ᵀ/D. Source: softrl maths, section 10."""
        width = hidden.shape[-1]
        centred = hidden - hidden.mean() if self.centres else hidden
        scale = self._scale(centred)
        normalised = centred / scale
        inner = torch.eye(width).to(hidden) - normalised[:, None] * normalised[None] / width
        if self.centres:
            inner = inner - 1.0 / width
        return self.weight.to(hidden)[:, None] * inner / scale


def find_final_norm(policy: Policy) -> FinalNorm | None:
    """The decoder's last module, if it is a norm; None where hidden states come from something else.

    Raises:
        ValueError: the last module is called a norm but computes neither formula.
    """
    module = last_module(policy)
    return None if module is None else norm_of(module, policy)


@torch.no_grad()
def norm_of(module: nn.Module, policy: Policy) -> FinalNorm | None:
    """What the decoder's last module computes now, if that is a norm.

    Raises:
        ValueError: it is called a norm but computes neither formula.
    """
    width = policy.causal_lm.get_output_embeddings().weight.shape[1]
    like = next(module.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    # Away from zero, with and without their mean: they are divided by, and bfloat16 rounds what is near it to zero.
    signs = 2.0 * torch.randint(2, (2, width), generator=generator) - 1.0
    probes = (signs * (1.0 + torch.rand(2, width, generator=generator)) + 0.5).to(like.device, like.dtype)
    inputs = torch.cat([torch.zeros_like(probes[:1]), probes])
    with policy.context():
        bias, first, second = (module(each[None, None])[0, 0].double() for each in inputs)
    for centres in (False, True):
        plain = FinalNorm(centres, torch.ones(width).to(first), None, _epsilon(module))
        weight = (first - bias) / plain.normalised(probes[0].double())
        expected = weight * plain.normalised(probes[1].double()) + bias
        if (expected - second).norm() <= 1e-2 * second.norm():
            return FinalNorm(centres, weight, bias if bias.any() else None, plain.eps)
    if "norm" in type(module).__name__.lower():
        raise ValueError(
            f"{type(module).__name__} before the output embedding is neither LayerNorm nor RMSNorm, so directions "
            "before it are not known; those of W itself (representation='output') are not sound behind a norm"
        )
    return None


def _epsilon(module: nn.Module) -> float:
    names = ("variance_epsilon", "eps", "epsilon")
    return float(next((getattr(module, name) for name in names if hasattr(module, name)), None) or 0.0)


@torch.no_grad()
def last_module(policy: Policy) -> nn.Module | None:
    """The module inside the decoder whose output its last hidden states are."""
    calls: list[tuple[nn.Module, Any]] = []
    handles = [
        module.register_forward_hook(lambda module, _, output: calls.append((module, output)))
        for module in policy.decoder.modules()
        if module is not policy.decoder
    ]
    embedding = policy.causal_lm.get_input_embeddings().weight
    try:
        with evaluating(policy.model), policy.context():
            ids = torch.zeros(1, 2, dtype=torch.long, device=embedding.device)
            arguments = {"inputs_embeds": policy.embed(ids), "use_cache": False}
            states = policy.decoder(**policy.accepted(arguments)).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    same = [module for module, output in calls if isinstance(output, Tensor) and _is_same(output, states)]
    return same[0] if same else None


def _is_same(output: Tensor, states: Tensor) -> bool:
    return output.shape == states.shape and output.data_ptr() == states.data_ptr()
