"""Soft records of given tokens are what the relaxation would have recorded while sampling them."""

import pytest
import torch
from helpers import gpt2, prompts, random_for, relaxation_of

from softrl.models.policy import Policy
from softrl.rollouts.given import rollout_of
from softrl.rollouts.soft import soft_rollout


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


def test_mixtures_are_refused():
    policy = Policy(gpt2())
    rollout = soft_rollout(policy, prompts(), relaxation_of("softmax"), random_for(3), 2)
    with pytest.raises(ValueError, match="mixtures"):
        rollout_of(policy, rollout.hard, relaxation_of("gumbel_softmax"), random_for(3))
