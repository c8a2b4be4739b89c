"""Soft records of given tokens are what the relaxation would have recorded while sampling them."""

import pytest
import torch
from helpers import V, gpt2, prompts, random_for, relaxation_of

from softrl.models.policy import Policy
from softrl.rollouts.given import rollout_of
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.truncation import nucleus, sampler_log_probs


@pytest.mark.parametrize("name", ["straight_through", "reinmax"])
def test_without_noise_the_record_is_the_same(name):
    policy, relaxation = Policy(gpt2(), temperature=0.8), relaxation_of(name)
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), 6, eos_ids=(1,))
    again = rollout_of(policy, rollout.hard, relaxation, random_for(3, step=9))
    assert (again.support.ids == rollout.support.ids)[rollout.mask].all()
    assert (again.tokens == rollout.tokens)[rollout.mask].all()
    for mine, theirs in ((again.weights, rollout.weights), (again.fed, rollout.fed), (again.entropy, rollout.entropy)):
        torch.testing.assert_close(mine[rollout.mask], theirs[rollout.mask], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["st_gumbel", "gumbel_rao"])
def test_posterior_noise_leaves_the_tokens_alone(name):
    policy, relaxation = Policy(gpt2()), relaxation_of(name, top_k=23, min_p=0.0)
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), 6)
    again = rollout_of(policy, rollout.hard, relaxation, random_for(3, step=9))
    assert (again.tokens == rollout.tokens).all()
    assert (again.fed.argmax(-1) == again.support.choice).all()
    noise = again.support.noise if name == "st_gumbel" else again.support.draws
    other = rollout.support.noise if name == "st_gumbel" else rollout.support.draws
    assert not torch.allclose(noise, other)


def test_posterior_noise_is_that_of_the_sampler_at_its_temperature_and_nucleus():
    """Over tokens of any sampler of π, y − log π is standard Gumbel in every id of the nucleus."""
    policy, draws, batch = Policy(gpt2(), temperature=0.7), 5_000, prompts(1)
    relaxation = relaxation_of("st_gumbel", top_k=V, min_p=0.05)
    sampled = hard_rollout(policy, batch, relaxation.truncation, random_for(draws), 1, num_samples=draws)
    logits = policy.head(policy.begin(batch, 1, 1)[0])
    assert 3 < nucleus(logits, relaxation.truncation).sum() < V

    def largest_z(policy):
        support = rollout_of(policy, sampled, relaxation, random_for(draws, step=9)).support.at(slice(None), 0)
        log_probs = sampler_log_probs(logits, relaxation.truncation).expand(draws, -1)
        noise = support.noise + policy.head(policy.begin(batch, 1, 1)[0]).expand(draws, -1).gather(-1, support.ids)
        noise = (noise - log_probs.gather(-1, support.ids)).masked_fill(~support.kept, 0.0)
        mean = torch.zeros(V, dtype=noise.dtype).scatter_add(0, support.ids.flatten(), noise.flatten()) / draws
        inside = nucleus(logits, relaxation.truncation)[0]
        return ((mean[inside] - 0.57721566) * (6 * draws) ** 0.5 / torch.pi).abs().max()  # of fewer than 23

    assert largest_z(policy) < 4.5
    assert largest_z(policy.at_temperature(1.0)) > 4.5


def test_mixtures_are_refused():
    policy = Policy(gpt2())
    rollout = soft_rollout(policy, prompts(), relaxation_of("softmax"), random_for(3), 2)
    with pytest.raises(ValueError, match="mixtures"):
        rollout_of(policy, rollout.hard, relaxation_of("gumbel_softmax"), random_for(3))
