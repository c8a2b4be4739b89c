"""Cotangents and surrogate against autograd and finite differences, in float64."""

from dataclasses import replace

import pytest
import torch
from estimators.looped import looped_objective
from helpers import (
    ALL_MODELS,
    ALL_RELAXATIONS,
    EOS,
    REPLAYABLE_MODELS,
    PairReward,
    prompts,
    random_for,
    relaxation_of,
    rwkv,
    with_float64_norms,
)

from softrl.estimators.adjoint import chosen_method, solve_cotangents
from softrl.estimators.pathwise import PathwiseObjective, pathwise_estimate, surrogate
from softrl.estimators.system import AdjointSettings, ForwardPass, System
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.soft import soft_rollout
from softrl.types import Prompts

pytestmark = pytest.mark.usefixtures("float64_inside")

T = 6
TEMPERATURE = 1.3
EXACT = {
    "sequential": AdjointSettings("sequential"),
    "blocked, 2": AdjointSettings("blocked", block_length=2, tol=1e-9),
    "blocked, 4": AdjointSettings("blocked", block_length=4, tol=1e-9),
    "parallel": AdjointSettings("parallel", tol=1e-9),
    "autograd": AdjointSettings("autograd"),
}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def make(
    model_name,
    relaxation_name,
    tied=True,
    float64_norms=False,
    eos_ids=(EOS,),
    soft_stopping=False,
    num_steps=T,
    **settings,
):
    model = ALL_MODELS[model_name](tied=tied)
    reference = ALL_MODELS[model_name](seed=3, tied=tied).requires_grad_(False)
    if float64_norms:  # stock Llama norms round to float32 inside, which a difference quotient magnifies
        model, reference = with_float64_norms(model), with_float64_norms(reference)
    policy = Policy(model, TEMPERATURE)
    relaxation = relaxation_of(relaxation_name, **settings)
    terms = DirectTerms(kl_weight=0.3, entropy_weight=0.2, reference=Policy(reference, TEMPERATURE))
    rollout = soft_rollout(
        policy, prompts(), relaxation, random_for(3), num_steps, eos_ids=eos_ids, soft_stopping=soft_stopping
    )
    return policy, relaxation, terms, rollout, reference


def estimated_gradient(policy, relaxation, terms, rollout, settings, reward, one_pass=False):
    forward = ForwardPass.of(policy, rollout) if one_pass else None
    estimate = pathwise_estimate(policy, rollout, relaxation, reward, terms, settings, forward=forward)
    parameters = trained(policy)
    value = surrogate(policy, relaxation, estimate, terms, settings, forward).value.sum()
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def trained(policy):
    return [parameter for parameter in policy.model.parameters() if parameter.requires_grad]


def true_gradient(policy, relaxation, terms, rollout, reference, reward):
    total = looped_objective(
        policy.model, rollout, relaxation, reward, TEMPERATURE, terms.kl_weight, terms.entropy_weight, reference
    )
    grads = torch.autograd.grad(total, trained(policy))
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("relaxation_name", ALL_RELAXATIONS)
@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_surrogate_gradient_is_the_full_derivative(model_name, relaxation_name, tied):
    policy, relaxation, terms, rollout, reference = make(model_name, relaxation_name, tied)
    reward = PairReward()
    expected = true_gradient(policy, relaxation, terms, rollout, reference, reward)
    for method, settings in EXACT.items():
        if method not in ("parallel", "autograd") and model_name not in REPLAYABLE_MODELS:
            continue
        actual = estimated_gradient(policy, relaxation, terms, rollout, settings, reward)
        assert relative(actual, expected) < 1e-6, method


@pytest.mark.parametrize("trains", ["everything", "layers", "layers, reward only"])
@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_one_pass_for_both_phases_and_a_frozen_head(model_name, trains):
    """With head and embedding frozen, the direct terms' gradient comes from phase 2; a shared pass changes nothing."""
    policy, relaxation, terms, rollout, reference = make(model_name, "gumbel_softmax", tied=False)
    if trains != "everything":
        policy.causal_lm.get_input_embeddings().requires_grad_(False)
        policy.causal_lm.get_output_embeddings().requires_grad_(False)
    if "reward only" in trains:
        terms, reference = DirectTerms(), None
    reward = PairReward()
    expected = true_gradient(policy, relaxation, terms, rollout, reference, reward)
    for one_pass in (False, True):
        actual = estimated_gradient(policy, relaxation, terms, rollout, EXACT["parallel"], reward, one_pass)
        assert relative(actual, expected) < 1e-6, one_pass


@pytest.mark.parametrize("relaxation_name", ["softmax", "gumbel_softmax"])
@pytest.mark.parametrize("model_name", ["llama", "mamba"])
def test_survival_is_differentiated(model_name, relaxation_name):
    """Two ends of sequence that are often kept: reward and direct terms depend on q through survival."""
    ends = {"eos_ids": (4, 9), "soft_stopping": True}
    policy, relaxation, terms, rollout, reference = make(model_name, relaxation_name, **ends)
    survival = rollout.soft_tokens.survival
    assert (survival[:, -1] < 0.9).any(), "the ends have to weigh something here"
    expected = true_gradient(policy, relaxation, terms, rollout, reference, PairReward())
    for method, settings in EXACT.items():
        if method not in ("parallel", "autograd") and model_name not in REPLAYABLE_MODELS:
            continue
        actual = estimated_gradient(policy, relaxation, terms, rollout, settings, PairReward())
        assert relative(actual, expected) < 1e-6, method
    ignored = replace(rollout, eos_ids=())
    without = estimated_gradient(policy, relaxation, terms, ignored, EXACT["autograd"], PairReward())
    assert relative(without, expected) > 1e-2, "survival does not matter here: the test is too weak"


@pytest.mark.parametrize("relaxation_name", ["softmax", "gumbel_softmax"])
def test_entropy_bound_and_norm_of_methods_agree(relaxation_name):
    policy, relaxation, terms, rollout, reference = make("llama", relaxation_name, max_entropy_nats=0.7)
    expected = true_gradient(policy, relaxation, terms, rollout, reference, PairReward())
    for method, settings in EXACT.items():
        actual = estimated_gradient(policy, relaxation, terms, rollout, settings, PairReward())
        assert relative(actual, expected) < 1e-6, method


@pytest.mark.parametrize("norm_correction", ["inverse_l2", "match"])
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_norm_correction_is_differentiated(norm_correction, method):
    policy, relaxation, terms, rollout, _ = make("llama", "softmax")
    policy = Policy(policy.model, TEMPERATURE, norm_correction)
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), T)
    expected = estimated_gradient(policy, relaxation, terms, rollout, EXACT["autograd"], PairReward())
    plain = estimated_gradient(
        Policy(policy.model, TEMPERATURE), relaxation, terms, rollout, EXACT[method], PairReward()
    )
    actual = estimated_gradient(policy, relaxation, terms, rollout, EXACT[method], PairReward())
    assert relative(actual, expected) < 1e-6
    assert relative(plain, expected) > 1e-3


@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_derivative_against_finite_differences(model_name):
    """The loop's own J, along a random direction in parameter space, by central differences with common noise."""
    policy, relaxation, terms, rollout, reference = make(model_name, "gumbel_softmax", float64_norms=True)
    gradient = estimated_gradient(policy, relaxation, terms, rollout, EXACT["parallel"], PairReward())
    parameters = list(policy.model.parameters())
    # Half of the direction is the gradient itself, so that the derivative along it stands out of the rounding.
    random = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)
    along = gradient / gradient.norm() + random / random.norm()
    direction = [
        piece.view_as(p) for piece, p in zip(along.split([p.numel() for p in parameters]), parameters, strict=True)
    ]

    def moved(step):
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(change, alpha=step)
            value = looped_objective(
                policy.model, rollout, relaxation, PairReward(), TEMPERATURE, 0.3, 0.2, reference
            ).item()
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(change, alpha=-step)
        return value

    # Richardson: cancels the h² term of the central difference
    coarse, fine = ((moved(step) - moved(-step)) / (2 * step) for step in (2e-5, 1e-5))
    numerical = (4 * fine - coarse) / 3
    analytic = (gradient * along).sum().item()
    assert abs(numerical - analytic) < 1e-6 * abs(analytic)


SHORTENED = [
    AdjointSettings("parallel", feedback_discount=0.6, tol=1e-12),
    AdjointSettings("parallel", adjoint_clip=0.05, tol=1e-12),
    AdjointSettings("parallel", feedback_discount=0.8, adjoint_clip=0.1, tol=1e-12),
]


@pytest.mark.parametrize("model_name", REPLAYABLE_MODELS)
@pytest.mark.parametrize("settings", SHORTENED, ids=["discount", "clip", "both"])
def test_methods_agree_on_discounted_and_clipped_cotangents(model_name, settings):
    policy, relaxation, terms, rollout, _ = make(model_name, "softmax")
    objective = PathwiseObjective(policy, rollout, PairReward(), terms, {})
    found = {
        method: solve_cotangents(
            policy, rollout, relaxation, objective,
            AdjointSettings(method, feedback_discount=settings.feedback_discount,
                            adjoint_clip=settings.adjoint_clip, tol=1e-12, block_length=3),
        )
        for method in ("autograd", "sequential", "blocked", "parallel")
    }  # fmt: skip
    exact = solve_cotangents(policy, rollout, relaxation, objective, EXACT["autograd"])
    for method in ("sequential", "blocked", "parallel"):
        assert relative(found[method].weights, found["autograd"].weights) < 1e-6
        assert relative(found[method].embeds, found["autograd"].embeds) < 1e-6
    assert relative(found["autograd"].weights, exact.weights) > 1e-2
    if settings.adjoint_clip is not None:
        assert found["parallel"].embeds.norm(dim=-1).max() <= settings.adjoint_clip * (1 + 1e-9)


def test_hops_count_feedback_edges():
    policy, relaxation, terms, rollout, _ = make("llama", "softmax")
    objective = PathwiseObjective(policy, rollout, PairReward(), terms, {})

    def solved(hops):
        return solve_cotangents(
            policy, rollout, relaxation, objective, AdjointSettings("parallel", hops=hops, tol=0.0)
        )

    exact = solve_cotangents(policy, rollout, relaxation, objective, EXACT["autograd"])
    horizon = rollout.mask.shape[1]
    errors = [relative(solved(hops).weights, exact.weights) for hops in range(horizon)]
    assert solved(0).embeds.abs().max() == 0.0
    assert solved(0).sweeps == 0
    assert errors[horizon - 1] < 1e-6
    assert errors[horizon - 2] > 1e-6, "one sweep too few has to be visible, or the test is too weak"
    assert errors[0] > 1e-1
    assert solved(None).sweeps == horizon - 1


def test_tolerance_is_floored_by_the_precision_but_zero_means_every_sweep():
    policy, relaxation, terms, rollout, _ = make("gpt2", "softmax", eos_ids=(), num_steps=9)
    hidden = ForwardPass.of(policy, rollout).hidden
    objective = PathwiseObjective(policy, rollout, PairReward(), terms, {})

    def tolerance(tol):
        return System.linearised(policy, rollout, relaxation, AdjointSettings(tol=tol), objective, hidden).tol

    assert tolerance(1e-3) == 1e-3
    assert tolerance(1e-30) == 4.0 * torch.finfo(torch.float64).eps
    assert tolerance(0.0) == 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tolerance(1e-3) == 4.0 * torch.finfo(torch.bfloat16).eps


def test_residual_bounds_the_true_error_here():
    """The residual is a stopping rule; on this problem the true error stays within ten times it."""
    policy, relaxation, terms, rollout, _ = make("llama", "softmax")
    objective = PathwiseObjective(policy, rollout, PairReward(), terms, {})
    exact = solve_cotangents(policy, rollout, relaxation, objective, EXACT["autograd"])
    for hops in range(1, rollout.mask.shape[1]):
        found = solve_cotangents(
            policy, rollout, relaxation, objective, AdjointSettings("parallel", hops=hops, tol=0.0)
        )
        assert relative(found.embeds, exact.embeds) < 10 * found.residual
        assert found.sweeps == hops


def test_gradients_flow_through_our_cache_only_if_it_is_in_the_graph():
    """A canary for transformers' cache API: two steps through a growing cache have the gradient of one joint pass."""
    policy = Policy(ALL_MODELS["llama"]())
    batch = prompts()
    embeds = torch.randn(3, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, state = policy.begin(batch, 1, capacity=3, growing=True)
    stepped = torch.cat([policy.advance(state, embeds[:, t : t + 1]) for t in range(2)], 1)
    joint = policy.hidden(batch, embeds)[:, 1:]
    assert relative(stepped, joint) < 1e-9
    cotangent = torch.randn_like(joint)
    (by_step,) = torch.autograd.grad(stepped, embeds, cotangent)
    (by_joint,) = torch.autograd.grad(joint, embeds, cotangent)
    assert relative(by_step, by_joint) < 1e-9


@pytest.mark.parametrize("relaxation_name", ["softmax", "st_gumbel"])
def test_a_model_with_neither_cache_nor_mask(relaxation_name):
    """RWKV decodes from its whole prefix; prompts have to be of one length, which is said."""
    model, relaxation = rwkv(), relaxation_of(relaxation_name)
    policy, padded = Policy(model, TEMPERATURE), prompts()
    with pytest.raises(ValueError, match=r"RwkvForCausalLM does not mask; give it prompts of one length"):
        soft_rollout(policy, padded, relaxation, random_for(3), T)
    batch = Prompts(padded.ids, torch.ones_like(padded.mask))
    rollout = soft_rollout(policy, batch, relaxation, random_for(3), T, eos_ids=(EOS,))
    terms = DirectTerms(entropy_weight=0.2)
    expected = true_gradient(policy, relaxation, terms, rollout, None, PairReward())
    for method in ("parallel", "autograd"):
        actual = estimated_gradient(policy, relaxation, terms, rollout, EXACT[method], PairReward())
        assert relative(actual, expected) < 1e-6, method


@pytest.mark.parametrize(
    ("relaxation", "settings", "num_steps", "replayable", "method"),
    [
        ("st_gumbel", {}, 500, True, "parallel"),
        ("gumbel_softmax", {"hops": 2}, 500, True, "parallel"),
        ("gumbel_softmax", {}, 500, False, "parallel"),
        ("gumbel_softmax", {}, 5, True, "sequential"),
        ("softmax", {"bound": 0.5}, 32, True, "parallel"),
        ("softmax", {"bound": 0.5}, 33, True, "blocked"),
        ("softmax", {"bound": 0.5, "method": "sequential"}, 33, True, "sequential"),
    ],
)
def test_what_auto_chooses(relaxation, settings, num_steps, replayable, method):
    made = relaxation_of(relaxation, max_entropy_nats=settings.pop("bound", None))
    assert chosen_method(AdjointSettings(**settings), made, num_steps, replayable) == method


def test_blocks_bound_the_sweeps_and_stop_at_the_tolerance():
    policy, relaxation, terms, rollout, _ = make("gpt2", "gumbel_softmax", eos_ids=(), num_steps=17)
    objective = PathwiseObjective(policy, rollout, PairReward(), terms, {})
    exact = solve_cotangents(policy, rollout, relaxation, objective, AdjointSettings("sequential"))

    def solved(**settings):
        return solve_cotangents(policy, rollout, relaxation, objective, AdjointSettings(**settings))

    whole = solved(method="blocked", block_length=4, tol=0.0)
    assert whole.sweeps == 4.0
    assert whole.residual == 0.0, "as many sweeps as steps are exact"
    assert relative(whole.weights, exact.weights) < 1e-9
    loose = solved(method="blocked", block_length=8, tol=1e-3)
    assert 1.0 < loose.sweeps < 8.0
    assert 0.0 < loose.residual <= 1e-3
    assert 1e-9 < relative(loose.weights, exact.weights) < 1e-2
    assert solved(method="parallel", tol=1e-9).sweeps > 8.0
