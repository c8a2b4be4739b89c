"""Configuration of `ReinforceTrainer`."""

from dataclasses import dataclass, field, replace
from typing import Any

from softrl.estimators.combined import Combined
from softrl.estimators.control_variates import PathwiseControlVariate
from softrl.estimators.pathwise import Pathwise
from softrl.estimators.running_mean import RunningMean
from softrl.estimators.score_function import (
    DR_GRPO,
    GRPO,
    REINFORCE,
    REINFORCE_WITH_BASELINE,
    RLOO,
    Normalization,
    ScoreFunction,
)
from softrl.estimators.soft_score import SoftScoreFunction
from softrl.tokens.relaxation import GumbelSoftmax
from softrl.tokens.truncation import SupportRule, Truncation
from softrl.trainers.relaxation_config import RelaxationConfig
from softrl.trainers.rollout_config import RolloutConfig

_SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    "rloo": RLOO,
    "reinforce": REINFORCE,
    "reinforce_running_mean": REINFORCE_WITH_BASELINE,
    "reinforce_value": REINFORCE_WITH_BASELINE,
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
}
PATHWISE_ESTIMATORS = ("pathwise_control_variate", "combined")  # they differentiate the reward
ESTIMATORS = (*_SCORE_FUNCTIONS, *PATHWISE_ESTIMATORS, "soft_score")
_OF_A_GROUP = ("rloo", "grpo", "dr_grpo", *PATHWISE_ESTIMATORS)
LOSS_TYPES: dict[str, Normalization] = {
    "grpo": "sequence_mean",
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "constant",
}


@dataclass
class ReinforceConfig(RelaxationConfig):
    r"""
    Configuration class for the [`ReinforceTrainer`].

    This class includes only the parameters that are specific to score-function estimators. Model, data, sampler,
    objective and logging are those of [`RolloutConfig`]; the parameters of [`RelaxationConfig`] matter to the
    estimators that relax tokens only (`hops` defaults to 2 here). Names that TRL has too mean what they mean there.

    Parameters:
        > Parameters that control the estimator

        estimator (`str`, *optional*, defaults to `"rloo"`):
            - `"rloo"`: the mean reward of the prompt's other samples as baseline.
            - `"reinforce"`: no baseline.
            - `"reinforce_running_mean"`: a running mean of earlier steps' rewards.
            - `"reinforce_value"`: a learned value of the context.
            - `"grpo"`: the group's mean, scaled and normalised by `scale_rewards` and `loss_type`.
            - `"dr_grpo"`: the group's mean, not scaled, and a constant normalisation.
            - `"pathwise_control_variate"`: RLOO less a control variate made of pathwise cotangents; unbiased.
            - `"combined"`: a weighted mean of the pathwise estimate and RLOO.
            - `"soft_score"`: the policy gradient of Gumbel-softmax rollouts, whatever `relaxation` says.

            All but the three without a group baseline and `"soft_score"` need `num_generations` of at least 2.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What `"grpo"` divides advantages by: the standard deviation of the group's returns (`"group"`), of the
            micro-batch's (`"batch"`), or nothing (`"none"`).
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            How `"grpo"` sums over tokens: `"grpo"`, a mean over each sequence's; `"bnpo"`, a mean over the
            micro-batch's; `"dapo"`, the same over those of all processes (TRL's spans the gradient accumulation too,
            whose later rollouts do not exist yet here); `"dr_grpo"`, the sum over `max_completion_length`.
        running_mean_decay (`float`, *optional*, defaults to `0.9`):
            What an older step counts of the next one in the running mean.
        value_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the value head.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        control_variate_coefficient (`float` or `str`, *optional*, defaults to `1.0`):
            η of the control variate; `"regression"` takes it from the other samples, of at least 3 a prompt.
        pathwise_weight (`float`, *optional*, defaults to `0.5`):
            Weight of the pathwise estimate in `"combined"`, in [0, 1].
    """

    hops: int | None = field(default=2, metadata={"help": "Sweeps of the parallel method; 0 detaches."})

    estimator: str = field(default="rloo", metadata={"help": "Gradient estimator.", "choices": list(ESTIMATORS)})
    scale_rewards: str = field(
        default="group", metadata={"help": "What grpo divides advantages by.", "choices": ["group", "batch", "none"]}
    )
    loss_type: str = field(
        default="grpo", metadata={"help": "How grpo sums over tokens.", "choices": list(LOSS_TYPES)}
    )
    running_mean_decay: float = field(default=0.9, metadata={"help": "Decay of the running mean of rewards."})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the value head."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    # A number or "regression"; see `RolloutConfig.beta` for the annotation.
    control_variate_coefficient: str = field(
        default=1.0, metadata={"help": "Coefficient of the control variate, or 'regression'."}
    )
    pathwise_weight: float = field(default=0.5, metadata={"help": "Weight of the pathwise estimate in 'combined'."})

    def __post_init__(self):
        for name, options in (
            ("estimator", ESTIMATORS), ("scale_rewards", ("group", "batch", "none")), ("loss_type", tuple(LOSS_TYPES)),
        ):  # fmt: skip
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        if self.control_variate_coefficient != "regression":
            try:
                self.control_variate_coefficient = float(self.control_variate_coefficient)
            except ValueError as error:
                raise ValueError(
                    "control_variate_coefficient must be a number or 'regression', got "
                    f"{self.control_variate_coefficient!r}"
                ) from error
        super().__post_init__()
        self._check_group()
        RunningMean(self.running_mean_decay)
        if self.vf_coef < 0.0:
            raise ValueError(f"vf_coef must not be negative, got {self.vf_coef}")

    def _check_group(self) -> None:
        regression = self.estimator == "pathwise_control_variate" and self.control_variate_coefficient == "regression"
        needed = 3 if regression else 2
        if self.estimator in _OF_A_GROUP and self.num_generations < needed:
            raise ValueError(
                f"estimator={self.estimator!r}{' with the regression' if regression else ''} compares the samples of "
                f"a prompt, so num_generations must be at least {needed}, got {self.num_generations}; or take "
                "estimator='reinforce', 'reinforce_running_mean' or 'reinforce_value'"
            )

    @property
    def uses_relaxation(self) -> bool:
        return self.estimator not in _SCORE_FUNCTIONS

    @property
    def differentiates_rewards(self) -> bool:
        """Whether soft faces of rewards are read."""
        return self.uses_relaxation

    def _check_relaxation(self) -> None:
        super()._check_relaxation()
        self.check_engine_samples(self.make_estimator().relaxation)

    def make_truncation(self, step: int = 0, max_steps: int = 1, support: SupportRule | None = None) -> Truncation:
        if not self.uses_relaxation:
            return RolloutConfig.make_truncation(self, support)
        return super().make_truncation(step, max_steps, support)

    def make_estimator(self, step: int = 0, max_steps: int = 1, support: SupportRule | None = None) -> Any:
        """The estimator at a step of the run."""
        if self.estimator in _SCORE_FUNCTIONS:
            plain = replace(_SCORE_FUNCTIONS[self.estimator], max_length=self.max_completion_length)
            if self.estimator == "grpo":
                return replace(plain, scale_rewards=self.scale_rewards, normalization=LOSS_TYPES[self.loss_type])
            return plain
        if self.estimator == "soft_score":
            bound = self.values_at(step, max(max_steps, 1)).get("max_entropy_nats")
            temperature = float(self.values_at(step, max(max_steps, 1))["relaxation_temperature"])
            return SoftScoreFunction(GumbelSoftmax(self.make_truncation(step, max_steps, support), temperature, bound))
        settings = self.adjoint_settings(step, max_steps)
        relaxation = self.make_relaxation(step, max_steps, support)
        if self.estimator == "combined":
            return Combined(Pathwise(relaxation, settings), RLOO, self.pathwise_weight)
        return PathwiseControlVariate(relaxation, settings, self.control_variate_coefficient)
