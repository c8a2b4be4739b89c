"""What configurations share whose trainers relax tokens: the relaxation, and how its cotangents are solved for."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from softrl.estimators.system import METHODS, AdjointSettings
from softrl.models.policy import Policy
from softrl.tokens.relaxation import RELAXATIONS, Relaxation, make_relaxation
from softrl.tokens.temperature import check_entropy_bound
from softrl.tokens.truncation import SupportRule, Truncation
from softrl.trainers.rollout_config import RolloutConfig
from softrl.trainers.scheduled import ScheduledArguments

_AFTER_THE_RUN = 10**9  # any number of steps that no schedule exceeds


@dataclass
class SoftTokenArguments(ScheduledArguments):
    r"""
    Arguments of soft tokens, for configurations that have `top_p` and `min_p` beside them.

    Parameters:
        > Parameters that control the relaxation

        relaxation (`str`, *optional*, defaults to `"st_gumbel"`):
            `"softmax"`, `"gumbel_softmax"`, `"straight_through"`, `"st_gumbel"`, `"gumbel_rao"` or `"reinmax"`.
        gumbel_draws (`int`, *optional*, defaults to `16`):
            Draws of the noise that `"gumbel_rao"` averages over (S).
        top_k (`int` or `str`, *optional*, defaults to `64`):
            Kept ids of a soft token (K); a number or a schedule such as `"linear:128->32"`.
        relaxation_temperature (`float` or `str`, *optional*, defaults to `1.0`):
            τ of the weights; a number or a schedule such as `"exponential:2.0->0.5@200"`.
        max_entropy_nats (`float` or `str`, *optional*):
            Bound the entropy of every soft token instead, in (0, log K); a number or a schedule.
        detach_temperature (`bool`, *optional*, defaults to `False`):
            Treat the entropy bound's temperature as a constant in the backward pass.
        norm_correction (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"inverse_l2"` or `"match"`: restore the norm that a mean of embeddings loses.

        > Parameters that control the cotangents

        cotangent_method (`str`, *optional*, defaults to `"auto"`):
            `"parallel"`, `"blocked"`, `"sequential"`, `"autograd"`, or `"auto"`: `"parallel"` for straight-through
            tokens, with `hops` and for state-space models, `"sequential"` for mixtures; with an entropy bound
            `"parallel"` up to `block_length` steps and `"blocked"` beyond.
        hops (`int`, *optional*):
            Stop the parallel method after this many sweeps; 0 detaches the feedback.
        feedback_discount (`float` or `str`, *optional*, defaults to `1.0`):
            γ per feedback edge; 1 is exact. A number or a schedule.
        adjoint_clip (`float`, *optional*):
            Bound of the adjoint's norm at each step.
        adjoint_tol (`float`, *optional*, defaults to `1e-2`):
            Relative residual at which sweeps stop.
        block_length (`int`, *optional*, defaults to `32`):
            Steps a block of the blocked method.
    """

    _SCHEDULED: ClassVar[dict[str, bool]] = {  # name, and whether it is a whole number
        "top_k": True, "relaxation_temperature": False, "max_entropy_nats": False, "feedback_discount": False,
    }  # fmt: skip
    _MAY_BE_NONE: ClassVar[tuple[str, ...]] = ("max_entropy_nats",)

    relaxation: str = field(
        default="st_gumbel",
        metadata={"help": "Relaxation.", "choices": list(RELAXATIONS)},
    )
    gumbel_draws: int = field(default=16, metadata={"help": "Draws of the noise that gumbel_rao averages over."})
    # A number or a schedule, four of them; see `RolloutConfig.beta` for the annotation.
    top_k: str = field(default=64, metadata={"help": "Kept ids of a soft token (K)."})
    relaxation_temperature: str = field(default=1.0, metadata={"help": "Temperature of the weights."})
    max_entropy_nats: str | None = field(default=None, metadata={"help": "Entropy bound of a soft token."})
    detach_temperature: bool = field(default=False, metadata={"help": "Entropy bound's temperature as a constant."})
    norm_correction: str = field(
        default="none", metadata={"help": "Norm of mixtures.", "choices": ["none", "inverse_l2", "match"]}
    )

    cotangent_method: str = field(
        default="auto", metadata={"help": "How cotangents are solved for.", "choices": list(METHODS)}
    )
    hops: int | None = field(default=None, metadata={"help": "Sweeps of the parallel method; 0 detaches."})
    feedback_discount: str = field(default=1.0, metadata={"help": "Discount per feedback edge."})
    adjoint_clip: float | None = field(default=None, metadata={"help": "Bound of the adjoint's norm at each step."})
    adjoint_tol: float = field(default=1e-2, metadata={"help": "Residual at which sweeps stop."})
    block_length: int = field(default=32, metadata={"help": "Steps a block of the blocked method."})

    def __post_init__(self):
        super().__post_init__()
        if self.gumbel_draws < 1:
            raise ValueError(f"gumbel_draws must be at least 1, got {self.gumbel_draws}")
        if self.uses_relaxation:
            self._check_relaxation()

    @property
    def uses_relaxation(self) -> bool:
        """Whether the method relaxes tokens; where it does not, these arguments do not matter."""
        return True

    def check_relaxation(self, relaxation: Relaxation) -> None:
        """Raise ValueError for a relaxation that does not go with the other arguments."""

    def _check_relaxation(self) -> None:
        # They raise on a number outside its range, before a model is loaded; values in between lie between the ends.
        for step in (0, _AFTER_THE_RUN):
            self.check_relaxation(self.make_relaxation(step, step))
            self.adjoint_settings(step, step)
        schedules = self.schedules()
        if "max_entropy_nats" in schedules:  # the bound has to stay below log K where both change
            check_entropy_bound(float(max(schedules["max_entropy_nats"].ends())), int(min(schedules["top_k"].ends())))

    def make_truncation(self, step: int = 0, max_steps: int = 1, support: SupportRule | None = None) -> Truncation:
        """The sampler's nucleus rules or `support`, and K at a step of the run."""
        top_k = self.values_at(step, max(max_steps, 1))["top_k"]
        return Truncation(top_k, self.top_p, self.min_p, support)

    def make_relaxation(self, step: int = 0, max_steps: int = 1, support: SupportRule | None = None) -> Relaxation:
        """The relaxation at a step of the run."""
        values = self.values_at(step, max(max_steps, 1))
        return make_relaxation(
            self.relaxation,
            self.make_truncation(step, max_steps, support),
            float(values["relaxation_temperature"]),
            None if self.max_entropy_nats is None else float(values["max_entropy_nats"]),
            self.detach_temperature,
            self.gumbel_draws,
        )

    def adjoint_settings(self, step: int = 0, max_steps: int = 1) -> AdjointSettings:
        """How cotangents are solved for at a step of the run."""
        discount = float(self.values_at(step, max(max_steps, 1))["feedback_discount"])
        return AdjointSettings(
            self.cotangent_method, self.hops, discount, self.adjoint_clip, self.adjoint_tol, self.block_length
        )


@dataclass
class RelaxationConfig(SoftTokenArguments, RolloutConfig):
    r"""
    Base of the configurations of trainers that relax tokens: [`SoftRolloutConfig`] and [`ReinforceConfig`].

    This class adds the parameters that are specific to soft tokens, see [`SoftTokenArguments`], to those of
    [`RolloutConfig`]: model, data, sampler, objective and logging.

    Parameters:
        soft_stopping (`bool`, *optional*, defaults to `True`):
            Weigh every token by its survival, so that the gradient knows what stopping earlier or later would change;
            `False` ends sequences by their hard token only.
    """

    _SCHEDULED: ClassVar[dict[str, bool]] = RolloutConfig._SCHEDULED | SoftTokenArguments._SCHEDULED

    soft_stopping: bool = field(default=True, metadata={"help": "Weigh every token by its survival."})

    def check_relaxation(self, relaxation: Relaxation) -> None:
        self.check_engine_samples(relaxation)

    def make_policy(self, model: nn.Module, context: Callable[[], AbstractContextManager] = nullcontext) -> Policy:
        """A model as the policy, or the reference, with the norm correction of its mixtures."""
        return Policy(model, self.temperature, self.norm_correction, context)
