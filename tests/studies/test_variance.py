"""The variance laboratory: recipes, resuming, moments of a known case, exact truths, and what a page needs of rows."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from softrl.cli.arguments import find_recipe
from softrl.estimators.moments import Truth
from softrl.studies import variance
from softrl.studies.draws import Draws
from softrl.studies.methods import Method, make_estimator
from softrl.studies.problems import tiny_lm
from softrl.studies.variance import Store, run
from softrl.studies.variance_config import ProblemSpec, VarianceConfig, expanded, load_config, nested

TINY = {"reward": "pair", "vocab_size": 4, "steps": 2, "num_samples": 4}
RECIPE = {
    "question": "Which?",
    "output_dir": "unused",
    "draws": 8,
    "problems": [{"name": "t", "kind": "tiny_lm", "settings": TINY, "estimators": ["rloo"]}],
}
FOLDER = find_recipe("studies/quick").parent
SHIPPED = [path for path in sorted(FOLDER.glob("*.yaml")) if "problems" in yaml.safe_load(path.read_text())]


def config_of(tmp_path, **changes):
    return VarianceConfig(
        "Which?", str(tmp_path), [ProblemSpec("t", "tiny_lm", ["rloo", "st_gumbel"], TINY)], **changes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drws": 3}, r"unknown keys \['drws'\]"),
        ({"question": ...}, r"missing keys \['question'\]"),
        ({"problems": []}, "`problems` is empty"),
        ({"draws": 1}, "`draws` must be at least 2"),
        ({"problems": [{"name": "t", "kind": "tiny_lm"}]}, r"problem 1: missing keys \['estimators'\]"),
        ({"problems": ["t"]}, "problem 1: expected a mapping"),
        ({"problems": [RECIPE["problems"][0] | {"setings": {}}]}, r"problem 1: unknown keys \['setings'\]"),
    ],
)
def test_bad_recipes_name_the_key(tmp_path, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (RECIPE | changes).items() if v is not ...}))
    with pytest.raises(ValueError, match=message):
        load_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tiny"}, "kind must be one of"),
        ({"settings": TINY | {"stepps": 3}}, "stepps"),
        ({"settings": TINY | {"reward": "paar"}}, "reward must be one of"),
        ({"estimators": ["rlo"]}, "unknown estimator 'rlo'"),
        ({"estimators": [{"name": "st_gumbel", "hop": 1}]}, r"no setting \['hop'\]"),
        ({"estimators": ["rloo", {"name": "rloo"}]}, r"\['rloo'\] come"),
        ({"estimators": [{"name": "st_gumbel", "hops": [0, 1], "label": "st"}]}, r"\['st'\] come"),
        ({"estimators": [{"name": "rloo", "label": "{hops}"}]}, "has no 'hops'"),
    ],
)
def test_bad_problems_and_estimators_name_what_is_wrong(tmp_path, changes, message):
    spec = ProblemSpec(**({"name": "t", "kind": "tiny_lm", "settings": TINY, "estimators": ["rloo"]} | changes))
    with pytest.raises(ValueError, match=message):
        run(VarianceConfig("Which?", str(tmp_path), [spec], draws=4), lambda words: None)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_load_and_say_how_they_are_run(path):
    config = load_config(path)
    assert config.output_dir == f"runs/studies/{path.stem}"
    assert f"softrl variance --config studies/{path.stem}" in path.read_text()
    for spec in config.problems:
        assert variance._methods(spec)
        assert list(expanded(spec.settings))


def test_lists_stand_for_one_of_each(tmp_path):
    settings = TINY | {"steps": [1, 2], "num_samples": [2, 3]}
    spec = ProblemSpec("t", "tiny_lm", ["rloo", {"name": "st_gumbel", "hops": [0, 1], "label": "h{hops}"}], settings)
    rows, descriptions = run(VarianceConfig("Which?", str(tmp_path), [spec], draws=4), lambda words: None)
    names = [f"t, steps {steps}, num_samples {samples}" for steps in (1, 2) for samples in (2, 3)]
    assert list(descriptions) == names
    whole = [(row.problem, row.estimator, row.reward_calls) for row in rows if row.group == "all"]
    assert whole == [(name, label, float(name[-1])) for name in names for label in ("rloo", "h0", "h1")]


def test_dotted_settings_go_into_mappings():
    assert nested({"a": 1, "b.c": 2, "b.d": 3}) == {"a": 1, "b": {"c": 2, "d": 3}}


def test_a_resumed_study_has_the_same_rows_and_draws_nothing_again(tmp_path, monkeypatch):
    first, _ = run(config_of(tmp_path, draws=24), lambda words: None)

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr("softrl.studies.language.LanguageProblem.draws", never)
    monkeypatch.setattr("softrl.studies.language.LanguageProblem.truth", never)
    assert str([asdict(row) for row in run(config_of(tmp_path, draws=24), lambda words: None)[0]]) == str(
        [asdict(row) for row in first]
    )
    with pytest.raises(AssertionError, match="drawn again"):
        run(config_of(tmp_path, draws=25), lambda words: None)


def test_more_draws_go_on_after_those_there_are(tmp_path):
    run(config_of(tmp_path / "a", draws=16), lambda words: None)
    resumed, _ = run(config_of(tmp_path / "a", draws=40), lambda words: None)
    whole, _ = run(config_of(tmp_path / "b", draws=40), lambda words: None)
    for one, other in zip(resumed, whole, strict=True):
        assert one.draws == 40
        assert (one.bias2, one.variance, one.cosine) == pytest.approx(
            (other.bias2, other.variance, other.cosine), rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("name", ["rloo", "st_gumbel", "gumbel_softmax", "pathwise_control_variate"])
def test_draws_do_not_depend_on_how_they_are_batched(name):
    def draws(batch, *parts):
        language = tiny_lm("t", **TINY, kl=0.1, stopping=True)
        language.batch = batch
        estimator = make_estimator(Method.parsed(name), language)
        return torch.cat([language.draws(estimator, first, count).gradients for first, count in parts])

    whole = draws(16, (0, 12))
    torch.testing.assert_close(draws(5, (0, 7), (7, 5)), whole, rtol=0, atol=1e-12)
    assert (whole[0] - whole[1]).norm() > 1e-3  # draws differ


class Known:
    """Draws `truth + bias + noise` of known bias and variance, and a truth that is exact or itself noisy."""

    name, description, groups, batch = "known", "made by hand", {"first": slice(0, 1)}, 16

    def __init__(self, truth_noise=0.0):
        self.gradient = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)
        self.truth_noise = truth_noise

    def normal(self, count):
        return torch.randn(count, 3, generator=self.generator, dtype=torch.float64)

    def long_run(self):
        return None

    def truth(self):
        if not self.truth_noise:
            return Truth(self.gradient)
        return Truth.from_draws(self.gradient + self.truth_noise * self.normal(400))

    def make(self, method):
        class Made:
            bias, spread = method.settings["bias"], method.settings["spread"]
            unbiased_for = None if method.settings["bias"] else "hard"

        return Made()

    def draws(self, estimator, first, count):
        bias = torch.tensor([0.0, estimator.bias, 0.0], dtype=torch.float64)
        return Draws(self.gradient + bias + estimator.spread * self.normal(count), 7.0, 0.25)


@pytest.mark.parametrize("truth_noise", [0.0, 10.0])
def test_moments_of_a_known_case(tmp_path, truth_noise):
    """‖g‖² = 25, bias² 4/25, variance 3/25. Errors below are five standard deviations, so false with P < 1e-5."""
    methods = [Method("a", {"bias": 2.0, "spread": 1.0}, "biased"), Method("b", {"bias": 0.0, "spread": 2.0}, "not")]
    problem = Known(truth_noise)
    rows = variance._of_problem(problem, methods, 2500, Store(Path(tmp_path), {}), {})
    biased, unbiased = (row for row in rows if row.group == "all")
    # a noisy truth has a standard error of 10 / 20 a coordinate: it moves bias² by 2 · 2 · 0.5 / 25 and little else
    slack = 0.5 if truth_noise else 0.02
    assert biased.bias2 == pytest.approx(4 / 25, abs=slack)
    assert biased.variance == pytest.approx(3 / 25, rel=0.25 if truth_noise else 0.1)
    assert biased.mse == pytest.approx(biased.bias2 + biased.variance, rel=1e-3)
    assert unbiased.variance == pytest.approx(12 / 25, rel=0.25 if truth_noise else 0.1)
    assert abs(unbiased.bias_z) < 4.5
    assert unbiased.mse_at_equal_calls == pytest.approx(unbiased.mse, rel=0.02, abs=0.02)
    assert (biased.unbiased_for, unbiased.unbiased_for) == ("none", "hard")
    assert biased.truth_noise == pytest.approx(0.75 / 25 if truth_noise else 0.0, rel=0.3)
    if not truth_noise:
        assert biased.snr == pytest.approx((29 / 3) ** 0.5, rel=0.1)
        assert biased.scaled_mse == pytest.approx(1 - 25**2 / (25 * 32), abs=0.02)
        assert biased.bias2_low < 4 / 25 < biased.bias2_high


@pytest.mark.parametrize("settings", [{}, {"kl": 0.2, "entropy": 0.1, "stopping": True}])
def test_the_exact_truth_is_the_mean_of_a_long_run(settings):
    """RLOO is unbiased: the largest of 1 + P z-scores of 512 draws. False with P < 1e-3 by Bonferroni's bound."""
    from softrl.estimators.moments import bonferroni_bound, largest_z

    language = tiny_lm("t", **TINY, **settings)
    truth = language.truth()
    estimator = make_estimator(Method.parsed("rloo"), language)
    gradients = language.draws(estimator, 0, 512).gradients
    moving = gradients.std(0) > 1e-12
    bound = bonferroni_bound(int(moving.sum()) + 1)
    assert largest_z(gradients[:, moving], truth.gradient[moving]) < bound
    planted = gradients[:, moving] + 0.4 * truth.gradient[moving]
    assert largest_z(planted, truth.gradient[moving]) > bound
    assert truth.gradient[~moving].abs().max() < 1e-9 if (~moving).any() else True


def test_a_fitted_value_does_not_mind_the_level():
    """The level of a nearly constant reward is not shrunk: variance beside RLOO's, not thousands of it."""
    settings = TINY | {"reward": "nearly_constant", "reward_settings": {"offset": 1e4, "spread": 1e-2}}
    language = tiny_lm("t", **settings)
    variances = [
        language.draws(make_estimator(Method.parsed(name), language), 0, 64).gradients.var(0).sum()
        for name in ("reinforce_value", "rloo")
    ]
    assert variances[0] < 2.0 * variances[1]
