"""From a recipe's words to estimators: names, their settings, and what has to be fitted before the draws."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.advantages import returns_to_go
from softrl.estimators.base import Estimator
from softrl.estimators.combined import Combined, combination_weight
from softrl.estimators.control_variates import PathwiseControlVariate
from softrl.estimators.pathwise import Pathwise
from softrl.estimators.ppo import PPO
from softrl.estimators.score_function import DR_GRPO, GRPO, REINFORCE, RLOO, ScoreFunction, Scores
from softrl.estimators.soft_score import SoftScoreFunction
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import evaluating
from softrl.studies.language import PILOT_SEED, LanguageProblem
from softrl.tokens.relaxation import RELAXATIONS, GumbelSoftmax, Relaxation, make_relaxation
from softrl.tokens.truncation import Truncation

_PILOT_DRAWS = 64
_RIDGE = 1e-3

RELAXATION_KEYS = ("relaxation", "temperature", "max_entropy_nats", "num_draws", "top_k")
_ADJOINT_KEYS = ("method", "hops", "feedback_discount", "adjoint_clip", "tol", "block_length")


@dataclass(frozen=True)
class Method:
    """An estimator as a recipe names it: `{name: st_gumbel, hops: 2, label: "{hops} hops"}`, or just its name."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @classmethod
    def parsed(cls, given: Any) -> "Method":
        """From a recipe's entry.

        Raises:
            ValueError: neither a name nor a mapping with one; a label with a setting that is not there.
        """
        if isinstance(given, str):
            return cls(given, {}, given)
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise ValueError(f"estimators: expected a name or a mapping with `name`, got {given!r}")
        settings = {key: value for key, value in given.items() if key not in ("name", "label")}
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        try:
            label = str(given.get("label") or "").format(**settings)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"estimators: label {given['label']!r} of {given['name']!r} has no {error}") from error
        return cls(given["name"], settings, label or ", ".join(filter(None, (given["name"], shown))))


def make_estimator(method: Method, language: LanguageProblem) -> Estimator:
    """The estimator that a recipe names, with its pilot run where it needs one.

    Raises:
        ValueError: an unknown name, a setting that the method does not have, or one outside its range.
    """
    if method.name in RELAXATIONS:
        relaxation, settings = _relaxed(method, language, method.name)
        return Pathwise(relaxation, settings)
    if method.name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {method.name!r}; it must be one of {sorted((*ESTIMATORS, *RELAXATIONS))}")
    return ESTIMATORS[method.name](method, language)


def check_settings(method: Method, *known: str) -> None:
    """Raise ValueError where a method has other settings than these."""
    unknown = sorted(set(method.settings) - set(known))
    if unknown:
        raise ValueError(f"estimator {method.name!r} has no setting {unknown}; it has {sorted(known) or 'none'}")


def _relaxed(
    method: Method, language: LanguageProblem, default: str, *more: str
) -> tuple[Relaxation, AdjointSettings]:
    """Relaxation and cotangent settings; K is the whole vocabulary if left out, and the adjoint exact."""
    check_settings(method, *RELAXATION_KEYS, *_ADJOINT_KEYS, *more)
    relaxation = made_relaxation(method, language.problem.truncation, default)
    adjoint = {key: method.settings[key] for key in _ADJOINT_KEYS if key in method.settings}
    return relaxation, AdjointSettings(**({"tol": 1e-6} | adjoint))


def made_relaxation(method: Method, truncation: Truncation, default: str) -> Relaxation:
    """The relaxation of a method's settings, the default one where they name none."""
    given = method.settings
    return make_relaxation(
        given.get("relaxation", default), replace(truncation, top_k=given.get("top_k", truncation.top_k)),
        float(given.get("temperature", 1.0)), given.get("max_entropy_nats"), num_draws=given.get("num_draws"),
    )  # fmt: skip


def _score_function(estimator: ScoreFunction) -> Callable[[Method, LanguageProblem], Estimator]:
    def make(method: Method, language: LanguageProblem) -> Estimator:
        check_settings(method, "scale_rewards", "normalization")
        return replace(estimator, max_length=language.num_steps, **method.settings)

    return make


@dataclass(frozen=True)
class WithBaseline:
    """A score function whose baseline was fitted on pilot draws: a number, or a function of hidden states."""

    score: ScoreFunction
    number: float | None = None
    value: Callable[[Tensor], Tensor] | None = None

    relaxation = None

    @property
    def unbiased_for(self) -> Any:
        return self.score.unbiased_for

    @property
    def cost(self) -> Any:
        return self.score.cost

    def estimate(self, problem: Any, rollout: Any, rewards: Tensor) -> Any:
        """Phase 2: the score function's, with the baseline."""
        if self.value is None:
            return self.score.estimate(problem, rollout, rewards, self.number)
        with torch.no_grad():
            hidden = problem.policy.hidden(rollout.prompts, problem.policy.embed(rollout.tokens))
            return self.score.estimate(problem, rollout, rewards, self.value(hidden))

    def surrogate(self, problem: Any, estimate: Any) -> Tensor:
        """Phase 3."""
        return self.score.surrogate(problem, estimate)


def _running_mean(method: Method, language: LanguageProblem) -> Estimator:
    check_settings(method)
    _, returns, mask = _pilot(language)
    return WithBaseline(ScoreFunction(baseline="given"), number=returns[mask].mean().item())


def _value(method: Method, language: LanguageProblem) -> Estimator:
    check_settings(method)
    return WithBaseline(ScoreFunction(baseline="given"), value=fitted_value(language))


def _ppo(method: Method, language: LanguageProblem) -> Estimator:
    known = ("gae_lambda", "discount", "whiten", "kl_in", "normalization", "clip_low", "clip_high")
    check_settings(method, *known)
    return PPO(fitted_value(language), max_length=language.num_steps, **method.settings)


def _control_variate(method: Method, language: LanguageProblem) -> Estimator:
    relaxation, settings = _relaxed(method, language, "st_gumbel", "coefficient")
    return PathwiseControlVariate(relaxation, settings, method.settings.get("coefficient", 1.0))


def _soft_score(method: Method, language: LanguageProblem) -> Estimator:
    relaxation, _ = _relaxed(method, language, "gumbel_softmax")
    if not isinstance(relaxation, GumbelSoftmax):
        raise ValueError(f"soft_score needs relaxation gumbel_softmax, got {relaxation.name!r}")
    return SoftScoreFunction(relaxation)


def _combined(method: Method, language: LanguageProblem) -> Estimator:
    relaxation, settings = _relaxed(method, language, "st_gumbel", "weight", "unbiased", "pilot_draws")
    pathwise = Pathwise(relaxation, settings)
    unbiased = make_estimator(Method.parsed(method.settings.get("unbiased", "rloo")), language)
    weight = method.settings.get("weight")
    if weight is None:  # from draws of other samples, so that it does not depend on those it is used on
        count = int(method.settings.get("pilot_draws", _PILOT_DRAWS))
        both = [language.draws(each, 0, count, PILOT_SEED).gradients for each in (pathwise, unbiased)]
        weight = combination_weight(*both)
    return Combined(pathwise, unbiased, weight)


ESTIMATORS: dict[str, Callable[[Method, LanguageProblem], Estimator]] = {
    "reinforce": _score_function(REINFORCE),
    "reinforce_running_mean": _running_mean,
    "reinforce_value": _value,
    "rloo": _score_function(RLOO),
    "grpo": _score_function(GRPO),
    "dr_grpo": _score_function(DR_GRPO),
    "ppo": _ppo,
    "pathwise_control_variate": _control_variate,
    "combined": _combined,
    "soft_score": _soft_score,
}


@torch.no_grad()
def _pilot(language: LanguageProblem) -> tuple[Float[Tensor, "N T D"], Float[Tensor, "N T"], Tensor]:
    """Hidden states, returns-to-go and mask of pilot samples."""
    hidden, returns, masks = [], [], []
    for start in range(0, _PILOT_DRAWS, language.batch):
        numbers = range(start, min(start + language.batch, _PILOT_DRAWS))
        sampled = language.sampled(numbers, PILOT_SEED)
        with evaluating(language.problem.policy.model):
            scores = Scores.of(language.problem, sampled.rollout)
        short = language.num_steps - sampled.rollout.mask.shape[1]  # of rollouts that all ended early
        pad = torch.nn.functional.pad
        values = returns_to_go(sampled.rewards.to(scores.direct.dtype), scores.direct, sampled.rollout.mask)
        hidden.append(pad(scores.hidden, (0, 0, 0, short)))
        returns.append(pad(values, (0, short)))
        masks.append(pad(sampled.rollout.mask, (0, short)))
    return torch.cat(hidden), torch.cat(returns), torch.cat(masks)


def fitted_value(language: LanguageProblem) -> Callable[[Float[Tensor, "N T D"]], Float[Tensor, "N T"]]:
    """V by ridge regression of returns on hidden states of pilot samples: what a value head converges to."""
    hidden, returns, mask = _pilot(language)
    features, targets = hidden[mask].double(), returns[mask].double()
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    scaled = (features - mean) / spread
    scaled = torch.cat([scaled, torch.ones_like(scaled[:, :1])], 1)
    penalty = _RIDGE * len(scaled) * torch.eye(scaled.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0.0  # not of the level, however large it is beside the spread
    weight = torch.linalg.solve(scaled.T @ scaled + penalty, scaled.T @ targets)

    def value(states: Float[Tensor, "N T D"]) -> Float[Tensor, "N T"]:
        scaled = (states.double() - mean) / spread
        return (scaled @ weight[:-1] + weight[-1]).to(states.dtype)

    return value
