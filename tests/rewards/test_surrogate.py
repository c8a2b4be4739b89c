"""The surrogate of thoughts' rewards: its loss against loops, what it learns, what it trusts, and its gradients."""

import math

import jaxtyping
import pytest
import torch

from softrl.rewards.surrogate import ERROR_DECAY, RewardSurrogate

M, S, N, D = 5, 3, 2, 4


def numbers(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surrogate(**settings):
    return RewardSurrogate(D, N, **{"num_members": 3, "hidden_units": 8} | settings).double()


def batch(seed=0, count=M, scale=1.0):
    return numbers(count, D, seed=seed, scale=scale), numbers(count, S, N, D, seed=seed + 1, scale=scale)


def truth(context, thoughts):
    """A reward of log-likelihood size that both context and thought enter, in nats."""
    pooled = thoughts.mean(-2)
    return -2.0 + pooled[..., 0] + 0.5 * (context[:, None] * pooled).sum(-1).tanh()


@pytest.mark.parametrize(("pooling", "threshold"), [("mean", 0.7), ("flatten", 1.3)])
def test_members_mean_and_spread_against_loops(pooling, threshold):
    model = surrogate(pooling=pooling, max_std_nats=threshold)
    model.observe(torch.tensor(0.01))
    context, thoughts = batch()
    found = model(context, thoughts)
    trusted = mixed = 0
    for m in range(M):
        spreads = []
        for s in range(S):
            thought = thoughts[m, s].mean(0) if pooling == "mean" else thoughts[m, s].reshape(-1)
            x = torch.cat([context[m], thought])
            hidden = [torch.nn.functional.gelu(x @ model.first[k] + model.first_bias[k]) for k in range(3)]
            each = torch.stack([h @ model.last[k] + model.last_bias[k] for k, h in enumerate(hidden)])
            torch.testing.assert_close(found.estimated[m, s], each.mean(), rtol=1e-12, atol=1e-12)
            spread = ((each - each.mean()).square().sum() / 2).sqrt()
            torch.testing.assert_close(found.std_nats[m, s], spread.detach(), rtol=1e-12, atol=1e-12)
            spreads.append(spread.item())
        agrees = [spread < threshold for spread in spreads]
        assert found.trusted[m].tolist() == [all(agrees)] * S, "siblings are compared: all of them or none"
        trusted, mixed = trusted + all(agrees), mixed + (any(agrees) and not all(agrees))
    assert trusted > 0, "a threshold on one side of everything shows nothing"
    assert mixed > 0, "where members disagree about no or all siblings, their set shows nothing"
    assert found.estimated.requires_grad
    assert not found.std_nats.requires_grad


def test_loss_is_the_weighted_mean_square_of_every_member():
    model, (context, thoughts), rewards = surrogate(), batch(), numbers(M, S, seed=7)
    weights = model.bootstrap_weights(rewards, 4)
    each = []
    for member, weight in zip(model.members(context, thoughts), weights, strict=True):
        each.append((weight * (member - rewards).square()).sum() / weight.sum())
    loss = model.loss(context, thoughts, rewards, 4)
    torch.testing.assert_close(loss, sum(each) / 3, rtol=1e-12, atol=1e-12)


def test_the_fit_is_not_the_policys_business():
    model, rewards = surrogate(), numbers(M, S, seed=7).requires_grad_()
    context, thoughts = (part.requires_grad_() for part in batch())
    model.loss(context, thoughts, rewards).backward()
    assert context.grad is None
    assert thoughts.grad is None
    assert rewards.grad is None
    assert all(parameter.grad.abs().sum() > 0.0 for parameter in model.parameters())


@pytest.mark.parametrize("pooling", ["mean", "flatten"])
def test_gradients_in_soft_thoughts(pooling):
    """Mixtures of embeddings: the gradient to their weights, by finite differences."""
    model, (context, _) = surrogate(pooling=pooling), batch()
    embedding, logits = numbers(6, D, seed=3), numbers(M, S, N, 6, seed=4).requires_grad_()

    def estimated(z):
        return model(context, z.softmax(-1) @ embedding).estimated

    assert torch.autograd.gradcheck(estimated, (logits,), eps=1e-6, atol=1e-7)


def test_bootstraps_are_keyed_and_exponential():
    """Mean and variance 1 of 60,000 draws: |z| > 5 has a chance below 2e-6 (variance of the variance is 8/n)."""
    rewards, model = torch.zeros(200, 100, dtype=torch.float64), surrogate()
    state = torch.get_rng_state()
    weights, again, other = (model.bootstrap_weights(rewards, key) for key in (1, 1, 2))
    assert torch.equal(weights, again)
    assert not torch.equal(weights, other)
    assert not torch.equal(weights[0], weights[1])
    assert abs(float(weights.mean()) - 1.0) < 5.0 / 60_000**0.5
    assert abs(float(weights.var()) - 1.0) < 5.0 * (8.0 / 60_000) ** 0.5
    first, second, seeded = surrogate(), surrogate(), surrogate(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.first, seeded.first)
    assert not torch.equal(first.first[0], first.first[1])
    assert torch.equal(state, torch.get_rng_state()), "the global generator is nobody's to move"


def fitted(model, steps, fresh=True, noise=0.0):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        key = step if fresh else 0
        context, thoughts = batch(1000 + 3 * key, count=32)
        rewards = truth(context, thoughts) + noise * numbers(32, S, seed=2000 + key)
        optimizer.zero_grad()
        model.loss(context, thoughts, rewards, key).backward()
        optimizer.step()
    return model


def test_it_averages_over_continuations_and_knows_where_it_was_fitted():
    """Rewards with a noise of 1 nat (one continuation each): the mean is found, and trusted where there were data."""
    model = fitted(surrogate(hidden_units=32, max_std_nats=0.3), 1500, noise=1.0)
    context, thoughts = batch(5, count=300)
    found, wanted = model(context, thoughts), truth(context, thoughts)
    errors = (found.estimated - wanted).square()
    assert errors.mean().sqrt() < 0.2
    assert errors.mean().sqrt() < 0.3 * wanted.std()
    single = (found.estimated - wanted - numbers(300, S, seed=9)).square()
    model.observe(single)
    assert not model(context, thoughts).trusted.any(), "single continuations differ from their mean by more than 0.3"
    assert model.rmse_nats == pytest.approx(1.0, abs=0.1)
    for _ in range(60):  # rewards that average many
        model.observe(errors)
    found, far = model(context, thoughts), model(*batch(6, count=300, scale=6.0))
    assert found.trusted.double().mean() > 0.9
    assert far.trusted.double().mean() < 0.5
    assert far.std_nats.mean() > 3.0 * found.std_nats.mean()


def test_nothing_is_trusted_before_it_has_learned():
    """Fresh members say about 0, and so agree; what they say of rewards of −2 nats is worth nothing."""
    model = surrogate(hidden_units=32, max_std_nats=0.3, num_members=5)
    with torch.no_grad():
        model.last.mul_(0.1)
    context, thoughts = batch(5, count=64)
    assert model(context, thoughts).std_nats.max() < 0.3
    trusted, apart = [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(500):
        context, thoughts = batch(1000 + 3 * step, count=32)
        rewards = truth(context, thoughts)
        said = model(context, thoughts)
        trusted.append(said.trusted.double().mean().item())
        apart.append((said.estimated - rewards).square().mean().sqrt().item())
        model.observe((said.estimated.detach() - rewards).square())
        optimizer.zero_grad()
        model.loss(context, thoughts, rewards, step).backward()
        optimizer.step()
    first = next(step for step, share in enumerate(trusted) if share > 0.0)
    assert apart[0] > 1.5
    assert min(apart[:20]) > 0.5
    assert max(apart[first : first + 10]) < 0.45
    assert min(trusted[-50:]) > 0.5


def test_the_recent_error_is_a_running_mean():
    model = surrogate(max_std_nats=0.5)
    context, thoughts = batch(scale=0.01)
    assert math.isinf(model.rmse_nats)
    assert not model(context, thoughts).trusted.any()
    model.observe(torch.tensor([math.nan]))
    assert not model(context, thoughts).trusted.any()
    model.observe(torch.tensor([[3.0, 5.0]]))  # the first, whole
    assert model.rmse_nats == pytest.approx(2.0)
    model.observe(torch.tensor([0.0]))
    assert model.rmse_nats == pytest.approx((4.0 * ERROR_DECAY) ** 0.5)
    for _ in range(26):
        model.observe(torch.zeros(2))
    assert model.rmse_nats == pytest.approx((4.0 * ERROR_DECAY**27) ** 0.5)  # 0.48
    assert (model(context, thoughts).trusted == (model(context, thoughts).std_nats < 0.5)).all()
    again = surrogate(max_std_nats=0.5)
    again.load_state_dict(model.state_dict())
    assert again.rmse_nats == model.rmse_nats


def test_no_thoughts_teach_nothing():
    model = surrogate()
    model.loss(numbers(0, D), numbers(0, S, N, D), numbers(0, S)).backward()
    assert all((parameter.grad == 0.0).all() for parameter in model.parameters())


def test_mixed_precision_leaves_estimates_as_they_are():
    model, (context, thoughts) = surrogate().float(), batch()
    expected = model(context.float(), thoughts.float()).estimated
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(context.float(), thoughts.float()).estimated, expected)


def test_bootstraps_alone_make_members_disagree():
    """Members of one start: with equal weights of the data they would stay one."""
    model = surrogate(hidden_units=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    context, thoughts = batch(5)
    assert model(context, thoughts).std_nats.max() < 1e-12
    fitted(model, 100, fresh=False, noise=1.0)
    assert model(context, thoughts).std_nats.min() > 1e-3


@pytest.fixture
def unchecked():
    """As users run it: without jaxtyping's hook, which would be the first to complain here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: surrogate(num_members=1), "num_members must be at least 2.*got 1; 5 is usual"),
        (lambda: surrogate(max_std_nats=0.0), "max_std_nats must be positive.*got 0.0"),
        (lambda: surrogate(pooling="last"), r"pooling must be one of \('mean', 'flatten'\), got 'last'"),
        (lambda: surrogate()(numbers(M, D), numbers(M, S, D)), r"must have the shapes .*\[5, 3, 4\]; embed"),
        (lambda: surrogate()(numbers(2, D), numbers(M, S, N, D)), r"got \[2, 4\] and \[5, 3, 2, 4\]"),
        (lambda: surrogate()(numbers(M, D), numbers(M, S, N, 3)), "width 4 .*got 4 and 3; make another"),
        (
            lambda: surrogate(pooling="flatten")(numbers(M, D), numbers(M, S, 3, D)),
            r"must have 2 tokens \(thought_length\).*got 3; pooling='mean'",
        ),
        (lambda: surrogate().observe(torch.zeros(0)), "square_errors must hold at least one error, got none"),
        (
            lambda: surrogate().loss(*batch(), numbers(M)),
            r"rewards must have the shape \[M, S\] = \[5, 3\].*got \[5\]",
        ),
    ],
)
def test_what_cannot_be_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
