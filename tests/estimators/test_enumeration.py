"""What every estimator of language models declares, against the exact gradient of a tiny transformer.

V = 5, T = 3, tied embeddings, a KL and an entropy term, sequences that end early; the truth is a sum over all
sequences. Estimators declared unbiased for hard tokens have to lie within the bound in every coordinate and along the
truth; with a planted bias of 5% each of them, and every other estimator as it is, has to leave it. The bound is
Bonferroni's for a false alarm of 1e-4 in a test; with fixed seeds a test that passes once passes always.
"""

import pytest
from helpers import ALL_ESTIMATORS

from softrl.estimators.moments import bonferroni_bound, largest_z
from softrl.studies.methods import Method, make_estimator
from softrl.studies.problems import tiny_lm

HARD = (
    "REINFORCE", "REINFORCE, running mean", "REINFORCE, learned value", "RLOO", "PPO, lambda 1", "control variate",
    "control variate, regression",
)  # fmt: skip
SOFT = ("softmax", "Gumbel-softmax", "policy gradient on soft tokens")


def problem(num_samples):
    language = tiny_lm(
        "test", reward="oracle_lstm", vocab_size=5, steps=3, num_samples=num_samples, scale=0.3, kl=0.1, entropy=0.05,
        stopping=True,
    )  # fmt: skip
    language.batch = max(1, 128 // num_samples)
    return language


def of(name, language):
    return make_estimator(Method.parsed(ALL_ESTIMATORS[name]), language)


def bound(gradients):
    return bonferroni_bound(gradients.shape[1] + 1, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_unbiased_and_five_percent_are_noticed(name):
    """Many samples a draw make the noise small beside 5%; a control variate with many samples is expensive."""
    language = problem(16 if name.startswith("control") else 64)
    estimator, truth = of(name, language), language.truth().gradient
    assert estimator.unbiased_for == "hard"
    gradients = language.draws(estimator, 0, 1200 if name.startswith("control") else 500).gradients
    assert largest_z(gradients, truth) < bound(gradients)
    assert largest_z(1.05 * gradients, truth) > bound(gradients)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL_ESTIMATORS if name not in HARD])
def test_what_is_declared_biased_for_hard_tokens_fails(name):
    """G = 4: a group mean that holds the sample itself shrinks the gradient by a quarter."""
    language = problem(4)
    estimator, truth = of(name, language), language.truth().gradient
    assert estimator.unbiased_for == ("soft" if name in SOFT else None)
    gradients = language.draws(estimator, 0, 500).gradients
    assert largest_z(gradients, truth) > bound(gradients)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [5, 3])
def test_policy_gradient_on_soft_tokens_has_the_pathwise_mean(top_k):
    """Of Gumbel-softmax, whose pathwise gradient is held to finite differences in `test_declarations`.

    With K < V the support changes with the parameters, which the pathwise derivative does not see and the score
    function does: they have to differ there.
    """
    language = problem(8)
    language.eos_ids = ()
    score = make_estimator(Method.parsed({"name": "soft_score", "top_k": top_k}), language)
    gradients = language.draws(score, 0, 1500).gradients
    pathwise = make_estimator(Method.parsed({"name": "gumbel_softmax", "top_k": top_k}), language)
    other = language.draws(pathwise, 0, 400, seed=5).gradients
    z = (gradients.mean(0) - other.mean(0)) / (gradients.var(0) / len(gradients) + other.var(0) / len(other)).sqrt()
    agrees = z.abs().max().item() < bound(gradients)
    assert agrees == (top_k == 5)
