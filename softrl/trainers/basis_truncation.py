"""Basis-aware truncation in training: its arguments, the rule made of them, and what a trainer does beside.

One rule truncates everything: the sampler, soft tokens' supports, log π, evaluation. The gradient takes what it leaves
as given. Directions follow the policy: they are computed anew in every step in which output embedding or final norm
may have changed. Left out: engines that shard parameters, other samplers than softrl's own, float32 (MPS).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from softrl.contexts.basis_aware import BasisAware, Counts, basis_aware
from softrl.models.policy import Policy
from softrl.trainers.engines import shards_parameters

_LOGGED = ("asked", "accepted", "failed", "greedy")  # of `Counts`, a distribution

logger = logging.get_logger(__name__)


@dataclass
class BasisAwareArguments:
    r"""
    Arguments of basis-aware truncation, for configurations that have `top_p`, `min_p` and `temperature` beside them.

    A token below the threshold τ is kept where the softmax bottleneck proves that it has true probability, see
    [`~softrl.contexts.basis_aware.BasisAware`]. The proof is about models trained by cross-entropy: tuning by rewards
    leaves that optimum, and acceptances become unproven as training goes on.

    Parameters:
        basis_aware (`float`, *optional*):
            ε in (0, 1) of the threshold, e.g. `0.003`; in the place of `top_p` and `min_p`, at temperature 1. By
            default tokens are not truncated so. `basis_aware_candidates` says what it costs.
        basis_aware_rule (`str`, *optional*, defaults to `"eta"`):
            `"eta"`: `τ = min(ε, √ε e^{−H})`, H the entropy of the distribution in nats. `"tau"`: τ = ε.
        basis_aware_directions (`int`, *optional*, defaults to `20`):
            Directions of the output embedding that proofs know (k): more prove more, and take longer.
        basis_aware_candidates (`int`, *optional*, defaults to `16`):
            The likeliest tokens below τ that are asked about, in every distribution; the others are rejected. Most of
            the likeliest are accepted (SmolLM2, ε = 0.003: 768 of 768 with 16, 95% with 64), so this bounds what is
            kept; and it is what takes time: 0.03 to 0.05 s a distribution of SmolLM2 on a core with 16, 0.2 to 0.3 s
            with 64. Soft tokens ask once a token, score functions twice a token of their update. Steps took 1.3 times
            as long (soft tokens, LoRA), 1.6 times (RLOO, LoRA), and 1.5 times where the output embedding trains, whose
            directions take 2.4 s a step.
    """

    basis_aware: float | None = field(
        default=None, metadata={"help": "Epsilon of basis-aware truncation, instead of top_p and min_p."}
    )
    basis_aware_rule: str = field(
        default="eta", metadata={"help": "Its threshold: eta sampling's or epsilon itself.", "choices": ["eta", "tau"]}
    )
    basis_aware_directions: int = field(default=20, metadata={"help": "Directions that its proofs know (k)."})
    basis_aware_candidates: int = field(default=16, metadata={"help": "Tokens below the threshold to ask about."})

    def __post_init__(self):
        super().__post_init__()
        if self.basis_aware is None:
            return
        name = f"basis_aware={self.basis_aware}"
        if not 0.0 < self.basis_aware < 1.0:
            raise ValueError(f"basis_aware must lie in (0, 1), got {self.basis_aware}; leave it out to switch it off")
        if self.basis_aware_rule not in ("eta", "tau"):
            raise ValueError(f"basis_aware_rule must be 'eta' or 'tau', got {self.basis_aware_rule!r}")
        for key in ("basis_aware_directions", "basis_aware_candidates"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.temperature != 1.0:
            raise ValueError(
                f"{name} judges the model's own probabilities, at temperature 1, and temperature={self.temperature}; "
                "leave it at 1.0 (soft tokens are cooled by relaxation_temperature)"
            )
        if self.top_p < 1.0 or self.min_p > 0.0:
            raise ValueError(
                f"{name} beside top_p={self.top_p} and min_p={self.min_p}: it takes their place; leave both out"
            )
        if self.use_vllm:
            raise ValueError(
                f"{name} with use_vllm=True: vLLM cannot truncate so, and its samples would not be the policy's; "
                "leave one of them out"
            )

    def make_support(self, policy: Policy) -> BasisAware | None:
        """The rule for a policy, whose training it follows; None without one.

        Raises:
            ValueError: the model or the device is none that it is for, or k is larger than the width.
        """
        if self.basis_aware is None:
            return None
        name = f"basis_aware={self.basis_aware}"
        if self.device.type == "mps":
            raise ValueError(f"{name} computes in float64, which MPS does not have; use_cpu=True, or top_p and min_p")
        try:
            rule = basis_aware(
                policy, self.basis_aware, self.basis_aware_rule, self.basis_aware_directions,
                max_candidates=self.basis_aware_candidates, follow=True,
            )  # fmt: skip
        except ValueError as error:
            k = self.basis_aware_directions
            raise ValueError(f"{name} with basis_aware_directions={k} is not for this model: {error}") from error
        logger.warning(
            f"{name}: the theorem behind basis-aware truncation assumes a model trained by cross-entropy. Tuning by "
            "rewards leaves that optimum, so the tokens below the threshold that it keeps become unproven as training "
            "goes on."
        )
        return rule


class BasisAwareMixin:
    """
    What a trainer does for its rule `support`; nothing where that is None.

    Overrides `training_step` of [`~transformers.Trainer`]: it logs `basis_aware/<count>`, means over the distributions
    of a micro-batch that were truncated, and has directions computed anew after an optimizer step. A subclass calls
    `check_support_engine` when the engine is known.
    """

    support: BasisAware | None = None

    def check_support_engine(self) -> None:
        """Raise ValueError where no process has the whole output embedding."""
        if self.support is not None and shards_parameters(self.accelerator):
            raise ValueError(
                f"basis_aware={self.support.epsilon} needs the whole output embedding on every process, and "
                f"{self.accelerator.distributed_type.value} shards it; use another accelerate configuration (ddp, "
                "zero1, zero2), or top_p and min_p"
            )

    def training_step(self, *arguments: Any, **settings: Any) -> Tensor:
        if self.support is None:
            return super().training_step(*arguments, **settings)
        self.support.counts = Counts()
        loss = super().training_step(*arguments, **settings)
        counts = asdict(self.support.counts)
        own = torch.tensor([[counts[key] / max(counts["contexts"], 1) for key in _LOGGED]], device=loss.device)
        means = self.accelerator.gather(own).mean(0).tolist()
        self._metrics.add({f"basis_aware/{key}": mean for key, mean in zip(_LOGGED, means, strict=True)})
        if self.accelerator.sync_gradients and self.support.source is not None:
            self.support.source.outdate()  # an optimizer steps now, or has done so
        return loss
