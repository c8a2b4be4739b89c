"""The problems of a variance study as the laboratory draws from them, made of a recipe's entry by its kind."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from softrl.estimators.moments import Truth
from softrl.studies.draws import Draws
from softrl.studies.language import LanguageProblem
from softrl.studies.methods import Method, make_estimator
from softrl.studies.one_step import ONE_STEP_PROBLEMS, OneStepProblem
from softrl.studies.problems import thinking_lm, tiny_lm, trained_lm
from softrl.studies.thought_methods import make_thought_estimator
from softrl.studies.thought_problem import ThoughtProblem
from softrl.studies.variance_config import ProblemSpec, expanded, nested, problem_name

MakeTrainer = Callable[[list[str]], Any]


class LabProblem(Protocol):
    """What the laboratory draws from."""

    name: str
    description: str

    @property
    def groups(self) -> dict[str, slice]: ...

    @property
    def batch(self) -> int:
        """Draws that are made together."""
        ...

    def truth(self) -> Truth: ...

    def long_run(self) -> "tuple[LabProblem, int] | None":
        """What RLOO is drawn from to stand for the truth, and how often; None where the truth is exact."""
        ...

    def make(self, method: Method) -> Any:
        """An estimator, with `unbiased_for`; pilots are run here."""
        ...

    def draws(self, estimator: Any, first: int, count: int) -> Draws: ...


class _Model:
    """A problem on a language model, one that thinks or one that does not, as the laboratory sees it."""

    def __init__(self, problem: LanguageProblem | ThoughtProblem):
        self.problem = problem
        self.name, self.description = problem.name, problem.description

    @property
    def groups(self) -> dict[str, slice]:
        return self.problem.groups

    @property
    def batch(self) -> int:
        return self.problem.batch

    def truth(self) -> Truth:
        return self.problem.truth()

    def long_run(self) -> "tuple[LabProblem, int] | None":
        if isinstance(self.problem, ThoughtProblem) or self.problem.truth_draws is None:
            return None
        return _Model(self.problem.long_run()), self.problem.truth_draws

    def make(self, method: Method) -> Any:
        if isinstance(self.problem, ThoughtProblem):
            return make_thought_estimator(method, self.problem)
        return make_estimator(method, self.problem)

    def draws(self, estimator: Any, first: int, count: int) -> Draws:
        return self.problem.draws(estimator, first, count)


class _OneStep:
    """A one-step problem as the laboratory sees it; its estimators are made by name at every draw."""

    batch = 16

    def __init__(self, name: str, problem: OneStepProblem):
        self.name, self.description, self.problem = name, problem.description, problem

    @property
    def groups(self) -> dict[str, slice]:
        return self.problem.groups

    def truth(self) -> Truth:
        return Truth(self.problem.truth())

    def long_run(self) -> None:
        return None

    def make(self, method: Method) -> Any:
        return _Named(method, self.problem.estimator(method.name, method.settings).unbiased_for)

    def draws(self, estimator: Any, first: int, count: int) -> Draws:
        return self.problem.draw(estimator.method.name, estimator.method.settings, first, count)


@dataclass(frozen=True)
class _Named:
    method: Method
    unbiased_for: str | None


def make_problems(
    spec: ProblemSpec, seed: int, make_trainer: MakeTrainer
) -> Iterator[tuple[dict[str, Any], LabProblem]]:
    """The problems of one entry of a recipe, each with its settings.

    Raises:
        ValueError: an unknown kind, or a setting that it does not have.
    """
    kinds = ("tiny_lm", "trained_lm", "thoughts", *ONE_STEP_PROBLEMS)
    if spec.kind not in kinds:
        raise ValueError(f"problem {spec.name!r}: kind must be one of {list(kinds)}, got {spec.kind!r}")
    for settings in expanded(spec.settings):
        name = problem_name(spec, settings)
        given = nested({"seed": seed} | settings)
        try:
            if spec.kind == "tiny_lm":
                yield given, _Model(tiny_lm(name, **given))
            elif spec.kind == "thoughts":
                yield given, _Model(thinking_lm(name, **given))
            elif spec.kind == "trained_lm":
                yield given, _Model(trained_lm(name, make_trainer, **given))
            else:
                yield given, _OneStep(name, ONE_STEP_PROBLEMS[spec.kind](**given))
        except TypeError as error:
            raise ValueError(f"problem {spec.name!r}, settings: {error}") from error
