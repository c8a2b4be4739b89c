"""Rollouts: replay, batching, padding and stopping change nothing that they should not change."""

import pytest
import torch
from helpers import ALL_MODELS, ALL_RELAXATIONS, V, llama, prompts, random_for, relaxation_of

from softrl.estimators.system import recorded_embeds
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts


@pytest.mark.parametrize("relaxation_name", ALL_RELAXATIONS)
@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_parallel_replay_gives_the_recorded_weights(model_name, relaxation_name):
    policy = Policy(ALL_MODELS[model_name](), 0.9)
    relaxation = relaxation_of(relaxation_name)
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), 6)
    with torch.no_grad():
        hidden = policy.hidden(rollout.prompts, recorded_embeds(policy, rollout))
        logits = policy.head(hidden.flatten(0, 1)).unflatten(0, rollout.mask.shape)
        replayed = relaxation.weights(logits.gather(-1, rollout.support.ids), rollout.support)
    torch.testing.assert_close(replayed, rollout.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_padding_and_neighbours_do_not_matter(model_name):
    policy, relaxation, batch = Policy(ALL_MODELS[model_name]()), relaxation_of("gumbel_softmax"), prompts()
    together = soft_rollout(policy, batch, relaxation, random_for(3), 5)
    for row in range(3):
        alone = Prompts(batch.ids[row : row + 1, batch.mask[row]], batch.mask[row : row + 1, batch.mask[row]])
        random = SequenceRandom.keyed(7, 0, [row], 1)
        apart = soft_rollout(policy, alone, relaxation, random, 5)
        assert torch.equal(apart.tokens[0], together.tokens[row])
        torch.testing.assert_close(apart.weights[0], together.weights[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_name", ALL_MODELS)
def test_one_prefill_for_all_samples_of_a_prompt(model_name):
    policy, relaxation, batch = Policy(ALL_MODELS[model_name]()), relaxation_of("st_gumbel"), prompts()
    shared = soft_rollout(policy, batch, relaxation, SequenceRandom.keyed(7, 0, [0, 1, 2], 4), 5, num_samples=4)
    repeated = soft_rollout(policy, batch.repeated(4), relaxation, SequenceRandom.keyed(7, 0, [0, 1, 2], 4), 5)
    assert torch.equal(shared.tokens, repeated.tokens)
    torch.testing.assert_close(shared.weights, repeated.weights, rtol=1e-6, atol=1e-9)
    assert len({tuple(row) for row in shared.tokens[:4].tolist()}) > 1


def test_rollout_steps_match_transformers_on_hard_tokens():
    """Greedy decoding token by token against `generate`, left padding included."""
    model, batch = llama(), prompts()
    greedy = hard_rollout(Policy(model), batch, Truncation(1), random_for(3), 8, eos_ids=(1,), greedy=True)
    tokens, mask = greedy.tokens, greedy.mask
    theirs = model.generate(
        batch.ids, attention_mask=batch.mask.long(), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=2
    )[:, batch.ids.shape[1] :]
    assert torch.equal(tokens.masked_fill(~mask, 2)[:, : theirs.shape[1]], theirs)


def test_straight_through_gumbel_is_the_hard_sampler():
    """Same streams, same model: st_gumbel's forward pass is ordinary sampling, token by token."""
    policy, batch = Policy(llama(), 1.4), prompts()
    relaxation = relaxation_of("st_gumbel", min_p=0.0)
    soft = soft_rollout(policy, batch, relaxation, random_for(3), 6)
    hard = hard_rollout(policy, batch, Truncation(1), random_for(3), 6).tokens
    assert torch.equal(soft.tokens, hard)


def test_sequences_end_at_eos_and_the_rollout_stops_early():
    policy, batch = Policy(llama(), 2.0), prompts(6)
    relaxation = relaxation_of("st_gumbel", top_k=V, min_p=0.0)
    ends = tuple(range(0, V, 3))  # a third of all tokens ends a sequence
    rollout = soft_rollout(policy, batch, relaxation, random_for(6), 50, eos_ids=ends)
    assert rollout.mask.shape[1] < 50
    for tokens, mask in zip(rollout.tokens.tolist(), rollout.mask.tolist(), strict=True):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert all(token not in ends for token in tokens[: length - 1])
        assert tokens[length - 1] in ends
    assert rollout.mask.all(0).any()
    assert not rollout.mask.all()


@pytest.mark.parametrize("soft_stopping", [False, True])
def test_rollouts_go_on_while_another_process_needs_the_model(soft_stopping):
    """What is added is masked: the sequences are those of a process alone."""
    alone, together = Policy(llama()), Policy(llama())
    together.largest = lambda value: max(value, 1.0)
    everything = tuple(range(V))  # any token ends a sequence
    relaxation = relaxation_of("st_gumbel")

    def lengths(policy):
        soft = soft_rollout(
            policy, prompts(), relaxation, random_for(3), 4, eos_ids=everything, soft_stopping=soft_stopping
        )
        return soft.mask, hard_rollout(policy, prompts(), Truncation(1), random_for(3), 4, eos_ids=everything).mask

    for own, shared in zip(lengths(alone), lengths(together), strict=True):
        assert own.shape[1] == 1
        assert shared.tolist() == [[True, False, False, False]] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": Prompts(torch.ones(0, 3).long(), torch.ones(0, 3).bool())}, "at least one prompt"),
        ({"prompts": Prompts(torch.ones(3, 2).long(), torch.tensor([[True, False]] * 3))}, "pad on the left"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_steps": 60}, "exceed the model's context of 64; shorten the prompts"),
        ({"relaxation": relaxation_of("softmax", top_k=50)}, "top_k=50 is larger than the vocabulary, V=23"),
        ({"random": random_for(2)}, "random has 2 streams for 3 prompts x 1 samples"),
    ],
)
def test_bad_rollouts_are_refused(change, message):
    arguments = {"prompts": prompts(), "relaxation": relaxation_of("softmax"), "random": random_for(3), "num_steps": 4}
    with pytest.raises(ValueError, match=message):
        soft_rollout(Policy(llama()), **{**arguments, **change})
