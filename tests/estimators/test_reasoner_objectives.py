"""Every objective of the latent reasoner reaches its target on latents that can be enumerated.

A reasoner thinks one latent after each of three one-token texts x; rewards r(h, x) are a fixed table. From scratch, by
Adam in float64, on thoughts that it draws itself, every objective has to bring π(h | x) within a total variation of
0.02 of its target: softmax(r/β₂), or the best latent. Every test also says how far other targets are (β₂ off by 30%).
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from softrl.estimators.cross_entropy_method import DiscreteProposal, SearchSettings, cross_entropy_search
from softrl.estimators.latent_thoughts import scored_latents, with_thought_entropy
from softrl.estimators.thought_rules import THOUGHT_RULES, ScoredThoughts, make_thought_rule
from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig
from softrl.objectives.proxy import forward_proxy_value, proxy_value
from softrl.rewards.surrogate import RewardSurrogate

X, K, BETA, CLOSE = 3, 6, 0.6, 0.02
IDS = torch.arange(X)[:, None]  # texts of one token
LADDER = torch.linspace(-0.9, 0.9, K, dtype=torch.float64)
REWARDS = LADDER[torch.tensor([[3, 0, 5, 1, 4, 2], [0, 1, 4, 2, 3, 5], [2, 5, 1, 4, 0, 3]])]
EVERY = torch.arange(K).view(1, 1, K, 1).expand(X, 1, K, 1)  # all latents as the thoughts of every text
pytestmark = pytest.mark.usefixtures("float64_inside")


def reasoner(core="gru", **settings):
    torch.manual_seed(0)
    given = {
        "vocab_size": X, "core": core, "reasoner_size": 8, "interpreter_size": 8, "weight_groups": "AAAA",
        "use_base_lm": False, "n_thought": 1, "num_latents": K, "learns_log_z": True,
    }  # fmt: skip
    return ReasonerForCausalLM(ReasonerConfig(**(given | settings))).double()


def policy(model):
    """π(h | x) of all latents, exactly."""
    with torch.no_grad():
        return model.think(model.read(IDS), values=EVERY).log_probs[:, 0, :, 0].exp()


def softmax_target(beta):
    return (REWARDS / beta).softmax(-1)


def best_target():
    return nn.functional.one_hot(REWARDS.argmax(-1), K).double()


def apart(first, second):
    """Total variation, of the worst text."""
    return float((first - second).abs().sum(-1).max() / 2.0)


def trained(model, loss_of, steps=250, learning_rate=0.03):
    """Adam on the reasoner's parameters; the rate falls to zero linearly."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()
        schedule.step()
    return policy(model) if model.config.latent_kind == "discrete" else None


def scored_by_table(model, step, num_thoughts, table=REWARDS, prior=False):
    """Thoughts that the reasoner draws, or (for a prior's rules) a uniform prior, with rewards of the table."""
    texts = model.read(IDS)
    uniforms = model.uniforms(texts.positions, num_thoughts, step, list(range(X)))
    drawn = {"values": (K * uniforms[..., 0]).long()} if prior else {"uniforms": uniforms}
    thoughts = model.think(texts, **drawn)
    codes, log_probs = thoughts.values[:, 0, :, 0], thoughts.log_probs[:, 0, :, 0]
    log_prior = torch.full_like(log_probs, -torch.tensor(float(K)).log().item()) if prior else None
    log_z = model.log_z(texts.hidden["A"])[:, 0]
    proposal = log_prior if prior else log_probs.detach()
    return ScoredThoughts(table.gather(1, codes), log_probs, proposal, log_prior, log_z)


# Rules whose target is softmax(r/β₂): their own β, or rewards with the entropy's part.

WITH_BETA = {
    "listwise": ("listwise", {"beta": BETA}, False),
    "partition, learned log Z": ("partition_learned", {"beta": BETA}, False),
    "partition, estimated log Z": ("partition", {"beta": BETA}, False),
    "partition, log Z by thoughts of a reference": ("partition", {"beta": BETA, "log_z": "importance"}, True),
    "partition, log Z by its own thoughts": ("partition", {"beta": BETA, "log_z": "importance"}, False),
    "nca": ("nca", {"beta": BETA}, True),
}
WITH_ENTROPY = {"reinforce": ("reinforce", {}), "reinforce, batch baseline": ("reinforce", {"baseline": "batch"}),
                "rloo": ("rloo", {})}  # fmt: skip


def check_softmax(found):
    assert apart(found, softmax_target(BETA)) < CLOSE
    for wrong in (1.3 * BETA, BETA / 1.3):
        assert apart(found, softmax_target(wrong)) > 2.0 * CLOSE, "the test could not tell another β₂"


def trained_with_beta(name, core, beta=BETA):
    rule_name, settings, prior = WITH_BETA[name]
    rule, model = make_thought_rule(rule_name, settings | {"beta": beta}), reasoner(core)
    return trained(model, lambda step: rule.thought_losses(scored_by_table(model, step, 64, prior=prior)).mean())


def test_nca_does_not_reach_it_on_thoughts_of_the_policy_or_on_few():
    """Why the trainer draws from the reference, and what its configuration says of how many."""

    def found(num_thoughts, own):
        rule, model = make_thought_rule("nca", {"beta": BETA}), reasoner()

        def loss(step):
            scored = scored_by_table(model, step, num_thoughts, prior=not own)
            uniform = torch.full_like(scored.log_probs, 1.0 / K).log()
            return rule.thought_losses(replace(scored, log_prior=uniform)).mean()

        return apart(trained(model, loss), softmax_target(BETA))

    assert found(64, own=True) > 3.0 * CLOSE
    assert found(4, own=False) > 3.0 * CLOSE


@pytest.mark.parametrize("name", WITH_BETA)
def test_rules_with_a_temperature_reach_softmax(name):
    check_softmax(trained_with_beta(name, "gru"))


def trained_with_entropy(name, core, beta_2=BETA):
    rule, model = make_thought_rule(*WITH_ENTROPY[name]), reasoner(core)

    def loss(step):
        return rule.thought_losses(with_thought_entropy(scored_by_table(model, step, 64), beta_2)).mean()

    return trained(model, loss, steps=200)


@pytest.mark.parametrize("name", WITH_ENTROPY)
def test_score_functions_with_an_entropy_weight_reach_softmax(name):
    check_softmax(trained_with_entropy(name, "gru"))


def test_a_transformer_reaches_it_by_partition():
    check_softmax(trained_with_beta("partition, learned log Z", "transformer"))


def test_a_transformer_reaches_it_by_rloo():
    check_softmax(trained_with_entropy("rloo", "transformer"))


@pytest.mark.parametrize("train", [
    lambda: trained_with_beta("listwise", "gru", 1.3 * BETA),
    lambda: trained_with_entropy("rloo", "gru", 1.3 * BETA),
], ids=["listwise", "rloo"])  # fmt: skip
def test_training_with_another_temperature_would_be_noticed(train):
    with pytest.raises(AssertionError):
        check_softmax(train())


# Rules whose target is the best latent: the mean reward without entropy, and bounds of the marginal likelihood, which
# is largest for the policy that always thinks the latent after which the (one) truth is likeliest.

BEST = {
    "reinforce": ("reinforce", {}),
    "rloo": ("rloo", {}),
    "log_mean_exp": ("log_mean_exp", {}),
    "self_normalized": ("self_normalized", {}),
    "trice": ("trice", {}),
}


@pytest.mark.parametrize("name", BEST)
def test_rules_without_entropy_reach_the_best_latent(name):
    rule, model = make_thought_rule(*BEST[name]), reasoner()
    generator = torch.Generator().manual_seed(0)

    def loss(step):
        scored = scored_by_table(model, step, 64)
        uniforms = torch.rand(scored.rewards.shape, generator=generator, dtype=torch.float64)
        return rule.thought_losses(replace(scored, uniforms=uniforms)).mean()

    found = trained(model, loss, steps=200, learning_rate=0.03)
    assert apart(found, best_target()) < CLOSE
    assert apart(found, softmax_target(BETA)) > 0.2


def test_every_rule_has_a_target_here_or_none():
    """Rankings know no amounts, so they have none."""
    rankings = {"plackett_luce", "dpo", "one_winner"}
    names = {each[0] for group in (WITH_BETA, WITH_ENTROPY, BEST) for each in group.values()}
    assert names | rankings == set(THOUGHT_RULES)


# A surrogate of noisy rewards by MSE, then listwise on its estimates.


def test_a_fitted_surrogate_stands_in_for_noisy_rewards():
    """Rewards as single texts show them, with a standard deviation of 0.3 nats; listwise then sees estimates alone."""
    model, rule = reasoner(), make_thought_rule("listwise", {"beta": BETA})
    surrogate = RewardSurrogate(8, max_std_nats=10.0, num_members=3).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        thoughts = model.think(model.read(IDS), values=EVERY)
        contexts = model.read(IDS).hidden["A"][:, 0]
    embeds = thoughts.embeds[:, 0]
    optimizer = torch.optim.Adam(surrogate.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 400)
    for step in range(400):
        noise = torch.randn(16, X, K, generator=generator, dtype=torch.float64)
        noisy = (REWARDS + 0.3 * noise).flatten(0, 1)
        optimizer.zero_grad()
        surrogate.loss(contexts.repeat(16, 1), embeds.repeat(16, 1, 1, 1), noisy, batch=step).backward()
        optimizer.step()
        schedule.step()
    estimated = surrogate(contexts, embeds).estimated.detach()
    assert (estimated - REWARDS).abs().max() < 0.05

    def loss(step):
        scored = scored_by_table(model, step, 32)
        codes = model.think(model.read(IDS), model.uniforms(torch.zeros(X, 1).long(), 32, step, list(range(X)))).values
        given = estimated.gather(1, codes[:, 0, :, 0])
        scored = replace(
            scored, rewards=torch.zeros_like(scored.rewards), estimated=given, trusted=torch.ones_like(given).bool()
        )
        return rule.thought_losses(scored).mean()

    check_softmax(trained(model, loss))


# Search, then maximum likelihood of the elites.


@pytest.mark.parametrize("core", ["gru", "transformer"])
def test_a_search_distilled_reaches_the_best_latent(core):
    model = reasoner(core)
    generator = torch.Generator().manual_seed(0)
    settings = SearchSettings(num_rounds=6, num_samples=24, num_elites=3, smoothing=0.8)
    found = cross_entropy_search(
        DiscreteProposal.uniform(X, 1, K), lambda codes: REWARDS.gather(1, codes[..., 0]),
        lambda _: torch.rand(X, 24, 1, 1, generator=generator, dtype=torch.float64), settings,
    )  # fmt: skip
    values = found.elites[:, None]

    def loss(step):
        return -model.think(model.read(IDS), values=values).log_probs.mean()

    result = trained(model, loss, steps=100)
    assert apart(result, best_target()) < CLOSE
    assert apart(result, softmax_target(BETA)) > 0.2


# Gaussian latents: a quadratic reward −a/2 (h − m_x)², whose target is N(m_x, β₂/a).

MEANS, CURVATURE = torch.tensor([-1.0, 0.3, 1.5], dtype=torch.float64), 4.0


def gaussian_apart(mean, sigma, beta_2):
    """Total variation of N(μ, σ²) from the target, by quadrature; of the worst text."""
    grid = torch.linspace(-8.0, 8.0, 8001, dtype=torch.float64)[:, None]
    target = torch.distributions.Normal(MEANS, (beta_2 / CURVATURE) ** 0.5)
    densities = [each.log_prob(grid).exp() for each in (torch.distributions.Normal(mean, sigma), target)]
    return float(((densities[0] - densities[1]).abs().sum(0) * (16.0 / 8000) / 2.0).max())


def gaussian_loss(model, step, objective):
    """Minus the reward with the entropy's part, by paths or by weights of log π."""
    texts = model.read(IDS)
    uniforms = model.uniforms(texts.positions, 1024, step, list(range(X)))
    thoughts = model.think(texts, uniforms, reparameterised=objective == "reparameterised")
    values = thoughts.values[:, 0, :, 0, 0]
    rewards = -CURVATURE / 2.0 * (values - MEANS[:, None]).square()
    if objective == "reparameterised":
        return -(rewards + BETA * thoughts.entropy[:, 0, :, 0]).mean()
    log_probs = thoughts.log_probs[:, 0, :, 0]
    scored = ScoredThoughts(rewards, log_probs, log_probs.detach())
    return make_thought_rule("rloo").thought_losses(with_thought_entropy(scored, BETA)).mean()


@pytest.mark.parametrize(
    ("core", "objective"), [("gru", "reparameterised"), ("gru", "rloo"), ("transformer", "reparameterised")]
)
def test_gaussian_latents_reach_their_target(core, objective):
    model = reasoner(core, latent_kind="gaussian", latent_size=1)
    trained(model, lambda step: gaussian_loss(model, step, objective), steps=150)
    with torch.no_grad():
        texts = model.read(IDS)
        outputs = model.think(texts, model.uniforms(texts.positions, 1, 0, list(range(X)))).outputs
        mean, log_sigma = model.latent.moments(outputs[:, 0, 0, 0])
    moments = (mean[:, 0], log_sigma[:, 0].exp())
    assert gaussian_apart(*moments, BETA) < CLOSE
    assert gaussian_apart(*moments, 1.3 * BETA) > 2.0 * CLOSE
    assert gaussian_apart(*moments, BETA / 1.3) > 2.0 * CLOSE


# π(y | h) under a proxy of the data: exact sums over y.

V = 5


def distributions(seed):
    return 2.0 * torch.randn(3, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_with_beta_1_the_proxy_objective_is_minus_the_reverse_kl():
    logits, proxy = distributions(0).requires_grad_(), distributions(1).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    reverse = torch.nn.functional.kl_div(proxy, log_probs, log_target=True, reduction="none").sum(-1)  # KL(π‖D)
    forward = torch.nn.functional.kl_div(log_probs, proxy, log_target=True, reduction="none").sum(-1)
    ours = proxy_value(log_probs, proxy, 1.0)
    torch.testing.assert_close(ours, -reverse)
    grads = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (ours, -reverse, -forward)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)
    assert (grads[0] - grads[2]).norm() > 0.1 * grads[0].norm(), "forward KL has another one"
    wrong = torch.autograd.grad(proxy_value(log_probs, proxy, 1.3).sum(), logits, retain_graph=True)[0]
    assert (wrong - grads[1]).norm() > 0.1 * grads[1].norm()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_the_optimum_of_the_proxy_objective(beta):
    """D^{1/β}, normalised; the mode with β = 0."""
    proxy, logits = distributions(1).log_softmax(-1), torch.zeros(3, V, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.1)
    for _ in range(250):
        optimizer.zero_grad()
        (-proxy_value(logits.log_softmax(-1), proxy, beta).sum()).backward()
        optimizer.step()
    mode = nn.functional.one_hot(proxy.argmax(-1), V).double()
    targets = {each: (proxy / each).softmax(-1) for each in (0.5, 1.0, 2.0, 1.3 * beta) if each} | {0.0: mode}
    found = logits.detach().softmax(-1)
    assert apart(found, targets[beta]) < CLOSE
    assert all(apart(found, target) > 2.0 * CLOSE for each, target in targets.items() if each != beta)


def test_a_proxy_value_is_a_sum_over_the_vocabulary():
    log_probs, proxy = distributions(0).log_softmax(-1), distributions(1).log_softmax(-1)
    for row, ours in enumerate(proxy_value(log_probs, proxy, 0.7)):
        expected = sum(log_probs[row, y].exp() * (proxy[row, y] - 0.7 * log_probs[row, y]) for y in range(V))
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        proxy_value(log_probs, proxy, -1.0)


def test_the_forward_proxy_value_is_minus_the_forward_kl_by_enumeration():
    logits, proxy = distributions(0).requires_grad_(), distributions(1).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    ours = forward_proxy_value(log_probs, proxy)
    for row in range(3):
        expected = sum(proxy[row, y].exp() * (log_probs[row, y] - proxy[row, y]) for y in range(V))
        torch.testing.assert_close(ours[row], expected)
    (grad,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(grad, proxy.exp() - logits.softmax(-1).detach())  # maximum likelihood on samples of D
    spread = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(forward_proxy_value(log_probs, proxy, 0.7), ours + 0.7 * spread)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        forward_proxy_value(log_probs, proxy, -1.0)


# From a forward pass to a record of thoughts.


def test_scored_latents_are_the_anchors_of_a_forward_pass():
    model = reasoner()
    ids = torch.tensor([[0, 2, 1], [1, 1, 0]])
    labels = torch.tensor([[0, -100, 1], [1, 1, 0]])
    out = model(ids, labels=labels, num_thoughts=2, seed=0)
    scored = scored_latents(out)
    where = [(0, 1), (1, 0), (1, 1)]
    assert len(scored.rewards) == 3
    for index, (row, position) in enumerate(where):
        talk = out.talk_log_probs[row, position, :, labels[row, position + 1]]
        torch.testing.assert_close(scored.rewards[index], talk)
        torch.testing.assert_close(scored.log_probs[index], out.thought_log_probs[row, position])
        torch.testing.assert_close(scored.log_z[index], out.log_z[row, position])
    assert torch.equal(scored.log_proposal, scored.log_probs.detach())
    regularised = with_thought_entropy(scored, 0.4)
    torch.testing.assert_close(regularised.rewards, scored.rewards - 0.4 * scored.log_probs)
    grads = [torch.autograd.grad(each.rewards.sum(), model.latent_head.weight, retain_graph=True, allow_unused=True)
             for each in (scored, regularised)]  # fmt: skip
    assert grads == [(None,), (None,)], "the entropy's part is a constant"
    with pytest.raises(ValueError, match="pass labels to the forward pass"):
        scored_latents(model(ids, seed=0))
    with pytest.raises(ValueError, match="no position has a next token that counts"):
        scored_latents(model(ids, labels=torch.full_like(ids, -100), seed=0))
    with pytest.raises(ValueError, match="beta_2 is the weight of an entropy"):
        with_thought_entropy(scored, -0.1)


def test_a_score_function_with_the_entropys_part_has_the_gradient_of_both():
    """`∇(E r + β₂ H)` by enumeration of all 6² thoughts of two latents, and as the rule's expectation over them."""
    model = reasoner(n_thought=2)
    codes = torch.cartesian_prod(torch.arange(K), torch.arange(K))
    texts = model.read(IDS)
    thoughts = model.think(texts, values=codes.expand(X, 1, -1, -1))
    log_probs = thoughts.log_probs[:, 0].sum(-1)
    rewards = torch.randn(X, K * K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = [model.latent_head.weight, model.start, model.latent.codebook]
    exact = (log_probs.exp() * (rewards - BETA * log_probs)).sum()
    scored = ScoredThoughts(rewards.reshape(-1, 1), log_probs.reshape(-1, 1), log_probs.detach().reshape(-1, 1))
    losses = make_thought_rule("reinforce", {"baseline": "none"}).thought_losses(with_thought_entropy(scored, BETA))
    expected = -(log_probs.detach().exp().flatten() * losses).sum()
    truth, ours = (torch.autograd.grad(each, parameters, retain_graph=True) for each in (exact, expected))
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
