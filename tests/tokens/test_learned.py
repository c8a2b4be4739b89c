"""Learned relaxation settings: values and gradients against finite differences and loops, limits, and the guard."""

import json
import math

import pytest
import torch
from estimators.looped import looped_objective
from helpers import ALL_RELAXATIONS, EOS, PairReward, gpt2, prompts, random_for
from safetensors.torch import load_file, save_file

from softrl.estimators.pathwise import pathwise_estimate, surrogate
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.learned import SETTINGS, LearnedRelaxation, Range, ranges_of
from softrl.tokens.relaxation import make_relaxation
from softrl.tokens.temperature import bounded_softmax, entropy_bound_temperature, softmax_entropy
from softrl.tokens.truncation import SmoothTruncation, Truncation, min_p_log_factor, top_k_log_factor
from softrl.types import Support

K = 9
START = {"temperature": 0.7, "max_entropy_nats": 0.9, "min_p": 0.08, "top_k": 4.3}


def logits_of(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def support_of(kept, noise=None):
    ids = torch.arange(kept.shape[-1]).expand(kept.shape)
    noise = torch.zeros(kept.shape, dtype=torch.float64) if noise is None else noise
    return Support(ids, noise, kept, torch.zeros(kept.shape[:-1], dtype=torch.long))


def with_absent(logits):
    """A support that a nucleus rule took the last two ids of row 0 from."""
    kept = torch.ones(logits.shape, dtype=torch.bool)
    kept[0, -2:] = False
    return support_of(kept)


# ---- the entropy bound ----


def test_gradient_of_the_bound_is_the_implicit_one():
    """`dT/dH = T³ / Var_p(z)` by hand and by gradcheck, summed over rows; a row under the bound adds none."""
    logits = torch.cat([logits_of(5, K), torch.tensor([[30.0, *[0.0] * (K - 1)]], dtype=torch.float64)])
    bound = scalar(0.9)
    temperature = entropy_bound_temperature(logits, bound)
    (grad,) = torch.autograd.grad(temperature.sum(), bound)
    assert temperature[-1].item() == 1.0
    t = temperature.detach()[:5]
    p = (logits[:5] / t[:, None]).softmax(-1)
    variance = (p * logits[:5].square()).sum(-1) - (p * logits[:5]).sum(-1).square()
    active = t < 1.0
    assert 3 <= active.sum() < 5
    torch.testing.assert_close(grad, (t**3 / variance)[active].sum(), rtol=1e-8, atol=0)
    assert torch.autograd.gradcheck(entropy_bound_temperature, (logits[:5].requires_grad_(), bound), atol=1e-7)
    assert torch.autograd.gradcheck(bounded_softmax, (logits[:5].requires_grad_(), bound), atol=1e-7)


def test_an_inactive_bound_and_a_tie_leave_the_bound_without_a_gradient():
    peaked = torch.tensor([[10.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    tied = torch.tensor([[2.0, 2.0, 2.0, -1.0]], dtype=torch.float64)
    for logits in (peaked, tied):
        bound = scalar(0.9)  # below log 3 = 1.0986
        weights = bounded_softmax(logits, bound)
        (grad,) = torch.autograd.grad((weights * torch.arange(4.0)).sum(), bound)
        assert grad.item() == 0.0
        assert torch.equal(weights, bounded_softmax(logits, 0.9))


def test_a_float_and_a_tensor_give_the_same_numbers_to_the_last_bit():
    logits, support = logits_of(6, K), with_absent(logits_of(6, K))
    assert torch.equal(bounded_softmax(logits, 0.9), bounded_softmax(logits, scalar(0.9)))
    for name in ALL_RELAXATIONS:
        if name in ("reinmax", "gumbel_rao"):
            continue
        fixed, learned = (make_relaxation(name, Truncation(K), t) for t in (0.7, scalar(0.7)))
        assert torch.equal(fixed.weights(logits, support), learned.weights(logits, support))
        plain = make_relaxation(name, Truncation(K), 0.7, smooth=SmoothTruncation())
        assert torch.equal(fixed.weights(logits, support), plain.weights(logits, support)), "no rules, no change"


# ---- the smooth rules ----


def test_smooth_min_p_by_hand_and_hard_at_width_zero():
    logits = logits_of(6, K)
    p = logits.softmax(-1)
    ratio = p / p.amax(-1, keepdim=True)
    expected = 1 / (1 + torch.exp(-(ratio.log() - math.log(0.08)) / 0.25))
    torch.testing.assert_close(min_p_log_factor(logits, 0.08, 0.25).exp(), expected)
    hard = (ratio > 0.08).double()
    assert 0 < hard.sum() < hard.numel()
    torch.testing.assert_close(min_p_log_factor(logits, 0.08, 1e-6).exp(), hard)


@pytest.mark.parametrize("k", range(1, K + 1))
def test_smooth_top_k_is_hard_at_width_zero_and_whole_k(k):
    logits = logits_of(6, K)
    hard = torch.zeros_like(logits).scatter(-1, logits.topk(k, dim=-1).indices, 1.0)
    torch.testing.assert_close(top_k_log_factor(logits, float(k), 1e-7).exp(), hard)
    weights = make_relaxation(
        "softmax", Truncation(K), 0.7, smooth=SmoothTruncation(top_k=float(k), width_nats=1e-7)
    ).weights(logits, support_of(hard > -1))
    truncated = (logits.masked_fill(hard == 0, -torch.inf) / 0.7).softmax(-1)
    torch.testing.assert_close(weights, truncated)


def test_smooth_top_k_by_hand_between_whole_numbers_and_continuous_at_them():
    """k = 2.25 on 5, 3, 2, 0: thresholds 2.5 at k = 2 and 1 at k = 3, so 2.125; the imagined fifth is −5/3."""
    logits = torch.tensor([[2.0, 5.0, 0.0, 3.0]], dtype=torch.float64)
    for k, threshold in ((2.0, 2.5), (2.25, 2.125), (3.0, 1.0), (4.0, -5 / 6), (3.5, 1 / 12)):
        expected = ((logits - threshold) / 0.3).sigmoid()
        torch.testing.assert_close(top_k_log_factor(logits, k, 0.3).exp(), expected)
    below, above = (top_k_log_factor(logits, k, 0.3) for k in (3 - 1e-9, 3 + 1e-9))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-7)


def test_smooth_top_k_ties_share_the_threshold_and_absent_ids_count_for_nothing():
    tied = torch.tensor([[4.0, 1.0, 1.0, -3.0]], dtype=torch.float64)
    factor = top_k_log_factor(tied, 2.0, 1e-6).exp()
    torch.testing.assert_close(factor, torch.tensor([[1.0, 0.5, 0.5, 0.0]], dtype=torch.float64))
    flat = torch.zeros(1, 4, dtype=torch.float64)
    assert top_k_log_factor(flat, 2.0, 0.25).unique().numel() == 1
    absent = torch.tensor([[4.0, 1.0, 0.5, -torch.inf, -torch.inf]], dtype=torch.float64)
    alone = top_k_log_factor(absent[:, :3], 2.4, 0.25)
    torch.testing.assert_close(top_k_log_factor(absent, 2.4, 0.25)[:, :3], alone)
    for k in (3.0, 4.5, 5.0):  # more than there are: all of them
        assert (top_k_log_factor(absent, k, 1e-6)[:, :3].exp() > 1 - 1e-9).all()
    assert top_k_log_factor(torch.zeros(2, 1, dtype=torch.float64), 1.0, 0.25).abs().max() == 0.0


def relaxation_with(name, values):
    values = dict(zip(("temperature", "max_entropy_nats", "min_p", "top_k"), values, strict=True))
    rules = SmoothTruncation(values["min_p"], values["top_k"], 0.4)
    bound = values["max_entropy_nats"]
    temperature = 1.0 if bound is not None else values["temperature"]
    return make_relaxation(name, Truncation(K), temperature, bound, smooth=rules)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("name", ["softmax", "gumbel_softmax"])
def test_all_gradients_together_by_gradcheck(name, bounded):
    """Settings and logits at once, under noise, with ids that a hard rule removed; finite at those."""
    logits = logits_of(4, K).requires_grad_()
    kept = torch.ones(4, K, dtype=torch.bool)
    kept[0, -2:] = False
    support = support_of(kept, logits_of(4, K, seed=3, scale=1.0))
    settings = [scalar(0.9 if bounded else 0.7), scalar(0.08), scalar(4.3)]

    def weights(logits, first, min_p, top_k):
        values = (None, first, min_p, top_k) if bounded else (first, None, min_p, top_k)
        return relaxation_with(name, values).weights(logits, support)

    assert torch.autograd.gradcheck(weights, (logits, *settings), atol=1e-7)
    p = weights(logits, *settings)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=torch.float64))
    assert p[0, -2:].abs().max() == 0.0
    if bounded:
        assert (softmax_entropy(p.log()) <= 0.9 + 1e-9).all()


def test_a_bound_holds_for_the_smoothly_truncated_distribution_and_is_used_up():
    """It cools `softmax(z) s` as a whole: exactly to the bound where that is above it, not at all where it is not."""
    logits = logits_of(8, K)
    factor = (min_p_log_factor(logits, 0.08, 0.4) + top_k_log_factor(logits, 4.3, 0.4)).exp()
    product = logits.softmax(-1) * factor
    truncated = product / product.sum(-1, keepdim=True)
    relaxation = make_relaxation("softmax", Truncation(K), 1.0, 0.9, smooth=SmoothTruncation(0.08, 4.3, 0.4))
    weights = relaxation.weights(logits, support_of(logits > -99.0))
    above = softmax_entropy(truncated.log()) > 0.9
    assert 2 <= above.sum() <= 6
    torch.testing.assert_close(softmax_entropy(weights.log())[above], torch.full((int(above.sum()),), 0.9).double())
    torch.testing.assert_close(weights[~above], truncated[~above])
    # a power of it, up to the normalisation
    slope = weights[above].log().diff(dim=-1) / truncated[above].log().diff(dim=-1)
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope))
    assert (slope > 1.0).all()


def test_smooth_weights_are_softmax_times_the_factors():
    logits = logits_of(5, K)
    relaxation = make_relaxation("softmax", Truncation(K), 0.7, smooth=SmoothTruncation(0.08, 4.3, 0.4))
    factor = (min_p_log_factor(logits, 0.08, 0.4) + top_k_log_factor(logits, 4.3, 0.4)).exp()
    product = (logits / 0.7).softmax(-1) * factor
    expected = product / product.sum(-1, keepdim=True)
    torch.testing.assert_close(relaxation.weights(logits, support_of(logits > -99.0)), expected)


# ---- the module ----


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_starts_where_it_was_put_and_stays_inside_its_range(name):
    between = ranges_of(K)[name]
    lowest, highest = sorted((between.greedy, min(between.loose, 9.0)))
    for share in (1e-6, 0.3, 0.9, 1 - 1e-6):
        value = lowest + share * (highest - lowest)
        raw = torch.tensor(between.raw(value), dtype=torch.float64)
        assert between.value(raw).item() == pytest.approx(value, rel=1e-12)
        learned = LearnedRelaxation(Truncation(K), **{name: value})
        assert learned.values()[name] == pytest.approx(value, rel=2e-6, abs=2e-7 * (highest - lowest))


@pytest.mark.parametrize("name", SETTINGS)
def test_where_float32_saturates_the_relaxation_is_still_a_valid_one(name):
    for num_kept in range(2, 40):
        between = ranges_of(num_kept)[name]
        start = (between.greedy + min(between.loose, 9.0)) / 2
        learned = LearnedRelaxation(Truncation(num_kept), **{name: start})
        for raw in (-200.0, -30.0, 30.0, 200.0):
            with torch.no_grad():
                learned.raw[name].fill_(raw)
            learned.relaxation()
            learned.frozen()


def test_relaxation_carries_gradients_and_frozen_the_same_numbers():
    start = {name: START[name] for name in ("max_entropy_nats", "min_p", "top_k")}
    learned = LearnedRelaxation(Truncation(K), "gumbel_softmax", **start).double()
    learned.set_values(start)
    logits, support = logits_of(4, K), with_absent(logits_of(4, K))
    weights = learned.relaxation().weights(logits, support)
    torch.testing.assert_close(learned.frozen().weights(logits, support), weights.detach(), rtol=1e-12, atol=1e-14)
    assert not learned.frozen().weights(logits, support).requires_grad
    (weights * logits_of(4, K, seed=2)).sum().backward()
    for name, raw in learned.raw.items():
        assert raw.grad.abs() > 1e-6, name
    assert learned.values() == pytest.approx(start, rel=1e-12)
    assert isinstance(learned.frozen().max_entropy_nats, float)


@pytest.mark.parametrize("first", ["temperature", "max_entropy_nats"])
@pytest.mark.parametrize("name", ["softmax", "gumbel_softmax"])
def test_the_surrogates_gradient_is_that_of_the_whole_loop(name, first):
    """Learned settings and model at once: three phases against transformers' own forward inside one graph."""
    policy = Policy(gpt2(), 1.3)
    learned = LearnedRelaxation(
        Truncation(7, min_p=0.02), name, **{first: START[first]}, min_p=0.08, top_k=4.3, width_nats=0.4
    ).double()
    rollout = soft_rollout(policy, prompts(), learned.frozen(), random_for(3), 6, eos_ids=(EOS,))
    wanted = [*learned.parameters(), *policy.model.parameters()]
    relaxation = learned.relaxation()
    loop = looped_objective(policy.model, rollout, relaxation, PairReward(), 1.3)
    expected = torch.autograd.grad(loop, wanted)
    for method in ("sequential", "parallel", "autograd"):
        settings, terms = AdjointSettings(method, tol=1e-12 if method == "parallel" else 1e-3), DirectTerms()
        relaxation = learned.relaxation()
        estimate = pathwise_estimate(policy, rollout, relaxation, PairReward(), terms, settings)
        found = torch.autograd.grad(surrogate(policy, relaxation, estimate, terms, settings).value.sum(), wanted)
        for actual, true in zip(found, expected, strict=True):
            assert (actual - true).norm() <= 1e-8 * true.norm(), method
    detached = AdjointSettings("parallel", hops=0)
    relaxation = learned.relaxation()
    estimate = pathwise_estimate(policy, rollout, relaxation, PairReward(), terms, detached)
    (without,) = torch.autograd.grad(surrogate(policy, relaxation, estimate, terms, detached).value.sum(), wanted[:1])
    assert (without - expected[0]).abs() > 1e-3 * expected[0].abs(), "the feedback has to matter here"


def test_a_short_optimisation_of_the_settings_raises_the_objective():
    policy, terms, settings = Policy(gpt2().requires_grad_(False), 1.3), DirectTerms(), AdjointSettings("sequential")
    learned = LearnedRelaxation(Truncation(7), temperature=0.8, top_k=4.3)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    values = []
    for _ in range(12):
        relaxation = learned.relaxation()
        rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), 4)
        values.append(PairReward().soft(rollout.soft_tokens).sum().item())
        estimate = pathwise_estimate(policy, rollout, relaxation, PairReward(), terms, settings)
        optimizer.zero_grad()
        (-surrogate(policy, relaxation, estimate, terms, settings).value.sum()).backward()
        optimizer.step()
    assert values[-1] > values[0] + 0.05 * abs(values[0])


# ---- the guard, saving, errors ----


def test_the_guard_holds_settings_off_the_greedy_end_and_reports_those_that_came_to_it():
    """A loss that pulls all settings to greedy: alone they go to their ends, with the barrier they stay away."""

    def pulled(weight):
        learned = LearnedRelaxation(Truncation(K), temperature=0.7, min_p=0.08, top_k=4.3)
        optimizer = torch.optim.Adam(learned.parameters(), lr=0.2)
        logits = logits_of(20, K).float()
        for _ in range(200):
            weights = learned.relaxation().weights(logits, support_of(logits > -99.0))
            loss = -weights.clamp(min=1e-9).mul(weights).sum(-1).log().mean() + learned.penalty(weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return learned

    alone, guarded = pulled(0.0), pulled(0.1)
    assert len(alone.report()) >= 2
    assert any("learned temperature has come from 0.7 to 0.1" in line for line in alone.report())
    assert all(alone.ranges[name].holds(value) or value == pytest.approx(alone.ranges[name].greedy, rel=1e-5)
               for name, value in alone.values().items())  # fmt: skip
    assert guarded.report() == []
    assert guarded.values()["temperature"] > 0.15


def test_the_barrier_by_hand_and_its_gradient():
    learned = LearnedRelaxation(Truncation(K), temperature=0.7, min_p=0.08).double()
    learned.set_values({"temperature": 0.3, "min_p": 0.2})
    expected = 2.0 * (math.log(1 + 0.6 / 0.2) + math.log(1 + 0.42 / 0.3))
    assert learned.penalty(2.0).item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(learned.penalty(2.0), learned.raw["temperature"])
    slope = 1 - math.exp(-0.2)  # of softplus where its value is 0.2
    assert grad.item() == pytest.approx(-2.0 * 0.6 / (0.2 * 0.8) * slope, rel=1e-9)
    at_start = LearnedRelaxation(Truncation(K), temperature=0.7, min_p=0.08)
    assert at_start.penalty(1.0).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert at_start.penalty(0.0).item() == 0.0


def test_saved_as_safetensors_and_as_json(tmp_path):
    learned = LearnedRelaxation(
        Truncation(K, min_p=0.01), "gumbel_softmax", max_entropy_nats=0.9, top_k=4.3, greedy_ends={"top_k": 3.0}
    )
    with torch.no_grad():
        for index, raw in enumerate(learned.raw.values()):
            raw.add_(0.123456789 * (index + 1))
    again = LearnedRelaxation.from_dict(json.loads(json.dumps(learned.to_dict())))
    assert again.values() == learned.values()
    assert again.frozen() == learned.frozen()
    assert again.penalty(1.0).item() == learned.penalty(1.0).item()
    save_file(learned.state_dict(), tmp_path / "settings.safetensors")
    fresh = LearnedRelaxation(Truncation(K, min_p=0.01), "gumbel_softmax", max_entropy_nats=1.0, top_k=5.0)
    fresh.load_state_dict(load_file(tmp_path / "settings.safetensors"))
    assert fresh.raw["max_entropy_nats"].item() == learned.raw["max_entropy_nats"].item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to learn: give at least one of"),
        ({"temperature": 0.7, "max_entropy_nats": 0.9}, "both given; a bound sets the temperature itself"),
        ({"temperature": 0.7, "relaxation": "st_gumbel"}, r"'st_gumbel' feeds one-hot tokens.*use one that feeds"),
        ({"temperature": 0.7, "relaxation": "soft"}, "relaxation must be one of"),
        ({"temperature": 0.1}, r"temperature must lie strictly between 0.1 \(greedy_ends\) and inf .*got 0.1"),
        ({"min_p": 0.6}, r"min_p must lie strictly between 0.5 \(greedy_ends\) and 0.0001"),
        ({"top_k": 9.0}, "top_k must lie strictly between 2"),
        (
            {"top_k": 4.0, "greedy_ends": {"top_k": 0.5}},
            r"greedy_ends\['top_k'\] must lie between 1.0 and 9.0, got 0.5",
        ),
        ({"top_k": 4.0, "greedy_ends": {"k": 0.5}}, "greedy_ends: names must be among"),
        ({"top_k": 4.0, "width_nats": 0.0}, "width_nats must be positive"),
        ({"top_k": 1.5, "truncation": Truncation(1)}, "need two kept ids or more, got K=1"),
    ],
)
def test_what_cannot_be_learned_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearnedRelaxation(**{"truncation": Truncation(K), **arguments})


def test_settings_that_are_not_one_number_or_could_not_learn_are_refused():
    for arguments, message in (
        ({"temperature": torch.ones(2)}, r"one real number, shape \(\), got shape \(2,\)"),
        ({"temperature": torch.tensor(-1.0)}, "relaxation temperature must be positive, got -1.0"),
        ({"max_entropy_nats": torch.tensor(9.0)}, r"max_entropy_nats must lie in \(0, log K\).*got 9.0"),
        ({"max_entropy_nats": torch.tensor(0.5), "temperature": torch.tensor(1.0)}, "leave temperature at 1.0"),
        ({"max_entropy_nats": torch.tensor(0.5), "detach_temperature": True}, "leaves a learned max_entropy_nats"),
        ({"smooth": SmoothTruncation(top_k=9.5)}, r"smooth top_k=9.5 is larger than the number of kept ids, K=9"),
    ):
        with pytest.raises(ValueError, match=message):
            make_relaxation("softmax", Truncation(K), **arguments)
    for arguments, message in (
        ({"min_p": 1.0}, r"smooth min_p must lie in \(0, 1\), got 1.0"),
        ({"top_k": 0.5}, "smooth top_k must be at least 1, got 0.5"),
        ({"top_k": torch.ones(1)}, "the smooth top_k, where it is a tensor, must be one real number"),
    ):
        with pytest.raises(ValueError, match=message):
            SmoothTruncation(**arguments)
    with pytest.raises(ValueError, match="learned temperature does not apply to relaxation 'reinmax'"):
        make_relaxation("reinmax", Truncation(K), torch.tensor(0.7))
    for name in ("reinmax", "gumbel_rao"):
        with pytest.raises(ValueError, match=f"smooth truncation does not apply to relaxation '{name}'"):
            make_relaxation(name, Truncation(K), smooth=SmoothTruncation(0.1))
    learned = LearnedRelaxation(Truncation(K), temperature=0.7)
    with pytest.raises(ValueError, match="'top_k' is not learned here"):
        learned.set_values({"top_k": 3.0})
    with pytest.raises(ValueError, match="weight must not be negative"):
        learned.penalty(-1.0)
    assert Range(0.1, math.inf).holds(0.2)
