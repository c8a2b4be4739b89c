"""A problem of four thoughts, two tokens of two, whose expectations are sums over all sets of S of them.

The policy and the talk part share parameters, so that a wrong scale of either part shows.
"""

import itertools

import torch

from softrl.estimators.thought_rules import ScoredThoughts

H, BETA = 4, 0.7  # thoughts there are


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """log π and r of all four thoughts, functions of the same parameters; a proposal and a reference beside."""

    def __init__(self, seed=0):
        self.parameters = numbers(9, seed=seed).requires_grad_()
        self.coupling = 0.4 * numbers(9, H * 5, seed=seed + 100)
        self.log_proposal = (0.5 * numbers(H, seed=seed + 200)).log_softmax(0)
        self.log_prior = numbers(H, seed=seed + 300).log_softmax(0)

    def log_policy(self):
        first, second = self.parameters[:2].log_softmax(0), self.parameters[2:6].reshape(2, 2).log_softmax(-1)
        return (first[:, None] + second).flatten()

    def rewards(self):
        """log p(y = 0 | h) of five tokens."""
        return (self.parameters @ self.coupling).reshape(H, 5).log_softmax(-1)[:, 0]

    def gradient(self, value):
        return torch.autograd.grad(value, self.parameters)[0]

    def mean(self):
        """∇J."""
        return self.gradient((self.log_policy().exp() * self.rewards()).sum())

    def log_mean(self, count):
        """∇ E log (1/S) Σ exp r."""
        sets = all_sets(count)
        values = self.rewards()[sets].logsumexp(-1) - torch.tensor(count, dtype=torch.float64).log()
        return self.gradient((self.log_policy()[sets].sum(-1).exp() * values).sum())

    def scored(self, sets, off_policy=False, **changes):
        log_probs = self.log_policy()[sets]
        log_proposal = self.log_proposal[sets] if off_policy else log_probs.detach()
        uniforms = torch.full(sets.shape, 0.5, dtype=torch.float64)
        log_z = numbers(len(sets), seed=9)
        given = {"log_prior": self.log_prior[sets], "log_z": log_z, "uniforms": uniforms, **changes}
        return ScoredThoughts(self.rewards()[sets], log_probs, log_proposal, **given)


def all_sets(count):
    return torch.tensor(list(itertools.product(range(H), repeat=count)))


def descent(rule, scored):
    """What a trainer ascends, of every anchor."""
    return (rule.talk_weights(scored) * scored.rewards).sum(-1) - rule.thought_losses(scored)


def expected(rule, count, off_policy=False, problem=None, talk=True, **changes):
    """The exact expected gradient of a rule's ascent, over all H^S sets."""
    problem = problem or Problem()
    sets = all_sets(count)
    scored = problem.scored(sets, off_policy, **changes)
    chance = scored.log_proposal.sum(-1).exp()
    torch.testing.assert_close(chance.sum(), torch.ones((), dtype=torch.float64))
    ascent = descent(rule, scored) if talk else -rule.thought_losses(scored)
    return problem.gradient((chance * ascent).sum())


def expected_of_two_anchors(rule, count, off_policy=False):
    """The same for rules that read other anchors: two independent anchors at once; with the sum of both their ∇J."""
    problems, sets = (Problem(0), Problem(1)), all_sets(2 * count)
    gradients = torch.zeros(9, dtype=torch.float64)
    for joint in sets.reshape(-1, 2, count):
        both = [problem.scored(ids[None], off_policy) for problem, ids in zip(problems, joint, strict=True)]
        names = ("rewards", "log_probs", "log_proposal")
        scored = ScoredThoughts(*(torch.cat([getattr(part, name) for part in both]) for name in names))
        total = (scored.log_proposal.sum().exp() * descent(rule, scored)).sum()
        gradients += sum(torch.autograd.grad(total, [problem.parameters for problem in problems]))
    return gradients, sum(problem.mean() for problem in problems)


def apart(ours, theirs):
    """Relative distance, so that 1e-10 and 0.01 mean something."""
    return float((ours - theirs).norm() / theirs.norm())
