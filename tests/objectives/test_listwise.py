"""Listwise and partition objectives against formulas written out, DPO, REINFORCE, and targets that they must reach."""

import itertools
import math

import pytest
import torch

from softrl.objectives import listwise, partition

V, BETA = 6, 0.7


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ranking_probability(scores, order):
    """Of one order, item after item drawn without replacement."""
    left, probability = list(range(len(scores))), 1.0
    for item in order:
        probability *= float(scores[item].exp() / scores[left].exp().sum())
        left.remove(item)
    return probability


def test_plackett_luce_is_the_likelihood_of_a_ranking():
    scores = numbers(4)
    found = 0.0
    for order in itertools.permutations(range(4)):
        ranks = torch.tensor([[order.index(item) for item in range(4)]])
        probability = math.exp(-float(listwise.plackett_luce(scores[None], ranks)))
        assert probability == pytest.approx(ranking_probability(scores, order), rel=1e-12)
        found += probability
    assert found == pytest.approx(1.0)


def test_two_items_are_dpo_in_every_form():
    scores = numbers(5, 2)
    expected = -torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1])
    ranks = torch.tensor([[1, 2]]).expand(5, -1)
    torch.testing.assert_close(listwise.plackett_luce(scores, ranks), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(listwise.one_winner(scores), expected, rtol=1e-12, atol=1e-12)
    winner = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(5, -1)
    torch.testing.assert_close(listwise.listwise_cross_entropy(scores, winner), expected, rtol=1e-12, atol=1e-12)


def test_ties_share_their_denominator_and_are_drawn_together():
    scores = numbers(1, 3).requires_grad_()
    loss = listwise.plackett_luce(scores, torch.tensor([[1, 2, 2]]))
    s = scores[0]
    expected = s.logsumexp(0) - s[0] + 2 * s[1:].logsumexp(0) - s[1] - s[2]
    torch.testing.assert_close(loss[0], expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert (gradient[0, 1] - gradient[0, 2]) * (s[1] - s[2]) > 0.0  # a step down brings the two nearer


LOSSES = {
    "plackett_luce": lambda s, r, mask: listwise.plackett_luce(s, -r, mask),
    "listwise": lambda s, r, mask: listwise.listwise_cross_entropy(s, listwise.target_weights(r, BETA, mask), mask),
    "one winner": lambda s, r, mask: listwise.one_winner(s, mask),
    "nca": lambda s, r, mask: listwise.noise_contrastive(s, listwise.target_weights(r, BETA, mask), mask),
}


@pytest.mark.parametrize("name", LOSSES)
def test_items_that_do_not_exist_change_nothing(name):
    scores, rewards = numbers(3, 4), numbers(3, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    padded = scores.masked_fill(~mask, torch.nan).requires_grad_()
    loss = LOSSES[name](padded, rewards.masked_fill(~mask, 1e9), mask)
    for row, size in enumerate((3, 2, 4)):
        alone = LOSSES[name](scores[row : row + 1, :size], rewards[row : row + 1, :size], None)
        torch.testing.assert_close(loss[row : row + 1], alone, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), padded)
    assert gradient[mask].isfinite().all()
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("name", [*LOSSES, "partition", "vargrad"])
def test_gradients_pass_finite_differences(name):
    rewards = numbers(2, 4, seed=1)

    def loss(scores):
        if name == "partition":
            return partition.partition_loss(scores, rewards, BETA, torch.tensor([0.3, -0.2], dtype=torch.float64))
        if name == "vargrad":
            return partition.partition_loss(scores, rewards, BETA)
        return LOSSES[name](scores, rewards, None)

    assert torch.autograd.gradcheck(loss, numbers(2, 4).requires_grad_(), eps=1e-6, atol=1e-7)


def test_vargrad_on_the_policys_own_samples_is_reinforce_with_the_mean_as_baseline():
    log_pi = numbers(3, 5).requires_grad_()
    log_ref, rewards = numbers(3, 5, seed=1), numbers(3, 5, seed=2)
    loss = partition.partition_loss(log_pi - log_ref, rewards, BETA).sum()
    total = (rewards - BETA * (log_pi - log_ref)).detach()
    reinforce = ((total - total.mean(-1, keepdim=True)) * log_pi).mean(-1).sum()
    ours, theirs = (torch.autograd.grad(value, log_pi, retain_graph=True)[0] for value in (loss, reinforce))
    torch.testing.assert_close(ours, -2.0 / BETA * theirs, rtol=0.0, atol=1e-6)
    held = partition.partition_loss(
        log_pi - log_ref, rewards, BETA, partition.vargrad_log_z((log_pi - log_ref).detach(), rewards, BETA)
    )
    torch.testing.assert_close(torch.autograd.grad(held.sum(), log_pi)[0], ours, rtol=1e-12, atol=1e-12)


def reached(name, steps=1500, size=64, count=8):
    """Total variation between the target and a policy over V latents, trained on samples of another proposal."""
    generator = torch.Generator().manual_seed(3)
    reward, log_ref = numbers(V, seed=4), numbers(V, seed=5).log_softmax(0)
    proposal = torch.full((V,), 1.0 / V, dtype=torch.float64)
    if name == "nca":  # it is about noise of the reference, and exact for large sets only
        proposal, count, size = log_ref.exp(), 256, 32
    logits = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    log_z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, log_z], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        items = torch.multinomial(proposal.expand(size, -1), count, replacement=True, generator=generator)
        scores, rewards = (logits.log_softmax(0) - log_ref)[items], reward[items]
        weights = listwise.target_weights(rewards, BETA)
        if name == "listwise":
            loss = listwise.listwise_cross_entropy(scores, weights)
        elif name == "nca":
            loss = listwise.noise_contrastive(scores, weights)
        elif name == "one winner":
            winner = torch.multinomial(weights, 1, generator=generator)
            first = torch.cat([winner, torch.arange(count).expand(size, -1)], 1)
            rest = torch.ones(size, count + 1, dtype=torch.bool).scatter(1, winner + 1, False)
            loss = listwise.one_winner(scores.gather(1, first), rest)
        elif name == "plackett_luce":
            noise = -torch.rand(rewards.shape, generator=generator, dtype=torch.float64).log()
            order = (rewards / BETA - noise.log()).argsort(-1, descending=True)
            loss = listwise.plackett_luce(scores, order.argsort(-1))
        else:
            loss = partition.partition_loss(scores, rewards, BETA, log_z.expand(size) if name == "partition" else None)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    target = (log_ref + reward / BETA).softmax(0)
    start = 0.5 * (1.0 / V - target).abs().sum()
    assert start > 0.2, "nothing to learn shows nothing"
    if name == "partition":
        assert float(log_z.detach()) == pytest.approx(float((log_ref + reward / BETA).logsumexp(0)), abs=0.02)
    return float(0.5 * (logits.detach().softmax(0) - target).abs().sum())


@pytest.mark.parametrize("name", ["listwise", "plackett_luce", "one winner", "nca", "partition", "vargrad"])
def test_every_objective_reaches_its_target_from_another_proposals_samples(name):
    assert reached(name) < 0.02


def test_log_z_of_samples():
    reward, log_ref = numbers(V, seed=4), numbers(V, seed=5).log_softmax(0)
    exact = float((log_ref + reward / BETA).logsumexp(0))
    generator = torch.Generator().manual_seed(0)
    own = torch.multinomial(log_ref.exp().expand(1, -1), 200_000, replacement=True, generator=generator)
    assert float(partition.importance_log_z(reward[own], BETA)) == pytest.approx(exact, abs=0.02)
    other = torch.randint(V, (1, 200_000), generator=generator)
    weighted = partition.importance_log_z(reward[other], BETA, log_ref[other] + math.log(V))
    assert float(weighted) == pytest.approx(exact, abs=0.02)
    assert abs(float(partition.importance_log_z(reward[other], BETA)) - exact) > 0.1  # the plain mean is not Z there


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="must be positive"):
        listwise.target_weights(numbers(1, 2), 0.0)
    with pytest.raises(ValueError, match="must be positive"):
        partition.partition_loss(numbers(1, 2), numbers(1, 2), -1.0)
    with pytest.raises(ValueError, match="a set has one"):
        partition.partition_loss(numbers(1, 1), numbers(1, 1), 1.0)
    nobody = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="a set has no item"):
        listwise.plackett_luce(numbers(2, 2), numbers(2, 2), nobody)
    with pytest.raises(ValueError, match="needs its winner"):
        listwise.one_winner(numbers(2, 2), torch.tensor([[True, True], [True, False]]))
