"""The latent reasoner's loss against sums over positions, thoughts and tokens, and what its gradients reach."""

import math

import pytest
import torch
from estimators.reasoners import reasoner
from helpers import V

from softrl.estimators.cross_entropy_method import SearchSettings
from softrl.estimators.latent_objective import LatentExtras, LatentObjective, latent_loss, predicted_value
from softrl.estimators.thought_rules import make_thought_rule

S = 3
IDS = torch.randint(0, V, (2, 5), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[0, 2] = LABELS[1, 4] = -100
PROXY = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(-1)
ANCHORS = [(0, 0), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]  # a label that counts follows


def passed(model, reparameterised=False):
    return model(IDS, labels=LABELS, num_thoughts=S, seed=3, reparameterised=reparameterised)


def objective(name="reinforce", settings=None, **weights):
    return LatentObjective(make_thought_rule(name, settings or {}), **weights)


def reward_by_hand(log_probs, row, position, beta, proxy):
    """R of one prediction [V]."""
    entropy = -sum(math.exp(value) * value for value in log_probs.tolist())
    if proxy is None:
        value = log_probs[IDS[row, position + 1]].item()
    else:
        value = sum(math.exp(a) * b for a, b in zip(log_probs.tolist(), proxy[row, position].tolist(), strict=True))
    return value + beta * entropy


@pytest.mark.parametrize("proxy", [None, PROXY])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_loss_is_the_sum_of_its_parts_by_hand(proxy, beta):
    """REINFORCE with the mean of an anchor's thoughts as baseline; the thoughts' entropy is −log π in the reward."""
    model = reasoner()
    output = passed(model)
    weights = {"base_weight": 0.5, "interpreter_weight": 0.25, "policy_weight": 2.0, "beta": beta, "beta_2": 0.3}
    found = latent_loss(output, objective(**weights), LatentExtras(log_proxy=proxy))
    base = interpreter = talk = policy = 0.0
    for row, position in ANCHORS:
        of = (row, position, beta, proxy)
        base += reward_by_hand(output.base_log_probs[row, position], *of)
        rewards = [reward_by_hand(output.talk_log_probs[row, position, s], *of) for s in range(S)]
        interpreter += sum(reward_by_hand(output.interpreter_log_probs[row, position, s], *of) for s in range(S)) / S
        talk += sum(rewards) / S
        log_probs = output.thought_log_probs[row, position].tolist()
        scored = [reward - 0.3 * log_prob for reward, log_prob in zip(rewards, log_probs, strict=True)]
        mean = sum(scored) / S
        policy -= sum((one - mean) * log_prob for one, log_prob in zip(scored, log_probs, strict=True)) / S
    expected = -(talk + 0.5 * base + 0.25 * interpreter) + 2.0 * policy
    assert found.loss.item() == pytest.approx(expected / len(ANCHORS), rel=1e-10)
    parts = (found.base, found.interpreter, found.talk, found.policy)
    sums = (base, interpreter, talk, policy)
    assert [part.item() for part in parts] == pytest.approx([each / len(ANCHORS) for each in sums], rel=1e-10)
    assert found.entropy.item() == pytest.approx(
        sum(output.thought_entropy[place].mean().item() for place in ANCHORS) / len(ANCHORS)
    )


def test_beta_one_is_the_reverse_divergence_from_the_proxy():
    log_probs = torch.randn(4, V, dtype=torch.float64).log_softmax(-1)
    proxy = PROXY[0, :4]
    found = predicted_value(log_probs, torch.zeros(4, dtype=torch.long), 1.0, proxy)
    divergence = torch.nn.functional.kl_div(proxy, log_probs, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(found, -divergence)


def gradients(objective, extras=None, reparameterised=False, **settings):
    model = reasoner(**settings)
    loss = latent_loss(passed(model, reparameterised), objective, extras or LatentExtras()).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_nothing_of_the_reasoner_learns_at_policy_weight_zero():
    learned, control = (gradients(objective(policy_weight=weight)) for weight in (1.0, 0.0))
    of_policy = {name for name in control if name.startswith(("cores.B", "cores.C", "latent_head", "start"))}
    assert len(of_policy) >= 8
    for name in of_policy:
        assert learned[name] is not None, name
        assert learned[name].norm() > 0.0, name
        assert control[name] is None, name
    # The codebook is what a second latent follows too, so both parts reach it.
    for name in set(control) - of_policy - {"latent.codebook"}:
        assert torch.allclose(learned[name], control[name]), name  # the talk part is the same


@pytest.mark.parametrize("settings", [{"latent_kind": "gaussian", "latent_size": 2}, {"latent_kind": "soft"}])
def test_reparameterised_thoughts_have_the_gradient_of_the_loss(settings):
    """Finite differences of all that the reasoner's loss depends on, with the same random numbers."""
    rule_free = LatentObjective(None, beta=0.2, beta_2=0.1)
    model = reasoner(**settings)

    def loss():
        return latent_loss(passed(model, True), rule_free, LatentExtras()).loss

    loss().backward()
    for name in ("latent_head.weight", "start", "cores.B.decoder.cells.0.weight_hh", "mixing.last.weight"):
        parameter = dict(model.named_parameters())[name]
        gradient = parameter.grad.flatten()
        place = int(gradient.abs().argmax())
        assert gradient[place].abs() > 1e-5
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[place] += step
                values.append(loss().item())
                parameter.view(-1)[place] -= step
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[place].item(), rel=1e-5), name


def test_elites_are_distilled_by_maximum_likelihood():
    model = reasoner()
    elites = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    search = LatentObjective(None, SearchSettings(), policy_weight=3.0)
    found = latent_loss(passed(model), search, LatentExtras(elite_log_probs=elites))
    found.loss.backward()
    expected = torch.zeros(2, 5, 2, dtype=torch.float64)
    for place in ANCHORS:
        expected[place] = -3.0 / (2 * len(ANCHORS))
    assert torch.allclose(elites.grad, expected)
    assert found.policy.item() == pytest.approx(-sum(elites[place].mean().item() for place in ANCHORS) / len(ANCHORS))


def test_a_trusted_estimate_takes_the_place_of_the_reward_in_the_policy_part_alone():
    model = reasoner()
    output = passed(model)
    estimated = torch.randn(2, 5, S, dtype=torch.float64)
    trusted = torch.ones(2, 5, S, dtype=torch.bool)
    trusted[:, 1:] = False
    plain = latent_loss(output, objective("rloo"), LatentExtras())
    found = latent_loss(output, objective("rloo"), LatentExtras(estimated=estimated, trusted=trusted))
    assert found.talk.item() == plain.talk.item()
    changed = 0.0
    for row, position in ANCHORS:
        used = (estimated if position == 0 else output.rewards)[row, position].tolist()
        log_probs = output.thought_log_probs[row, position].tolist()
        others = [(sum(used) - one) / (S - 1) for one in used]
        changed -= sum((a - b) * c for a, b, c in zip(used, others, log_probs, strict=True)) / S
    assert found.policy.item() == pytest.approx(changed / len(ANCHORS), rel=1e-10)


@pytest.mark.parametrize("settings", [{"n_thought": 0}, {"use_reasoner": False}])
def test_a_model_that_does_not_think_has_no_policy(settings):
    found = latent_loss(passed(reasoner(**settings)), objective(), LatentExtras())
    assert found.policy.item() == found.entropy.item() == 0.0
    assert found.loss.item() == pytest.approx(-(found.base + found.interpreter + found.talk).item())


def test_an_interpreter_alone_is_scored_once():
    found = latent_loss(passed(reasoner(use_base_lm=False)), objective(), LatentExtras())
    assert found.base.item() == found.interpreter.item() == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_2": -0.1}, "beta_2 must be 0 or more, got -0.1"),
        ({"policy_weight": math.nan}, "policy_weight must be 0 or more, got nan"),
        ({"search": SearchSettings()}, "a search finds the thoughts to learn from, without rule="),
    ],
)
def test_hostile_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LatentObjective(make_thought_rule("rloo"), **settings)
