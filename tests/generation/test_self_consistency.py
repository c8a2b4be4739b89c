"""Self-consistency: the vote, its ties, and the samples it is taken of."""

import pytest
import torch
from helpers import EOS, llama, prompts

from softrl.generation.self_consistency import Vote, majority_vote, self_consistency
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation

T = 6
ENDS = (EOS, 5, 9)


@pytest.mark.parametrize(
    ("answers", "vote"),
    [
        (["3", "4", "4"], Vote("4", 2, 1)),
        (["4", "3", "3", "4"], Vote("4", 2, 0)),  # a tie: the one that came first
        (["7", "3", "5"], Vote("7", 1, 0)),
        ([None, None, "5"], Vote("5", 1, 2)),  # no answer has no vote
        ([None, None], Vote(None, 2, 0)),
        (["", "a"], Vote("", 1, 0)),  # an empty answer is one
    ],
)
def test_votes_and_ties(answers, vote):
    assert majority_vote(answers) == vote


def test_no_votes():
    with pytest.raises(ValueError, match="a vote needs at least one"):
        majority_vote([])


def first_token(row, ids):
    """An answer: of the first token and the prompt; none for some tokens."""
    return f"{row} {ids[0] % 3}" if ids[0] % 5 else None


def test_votes_of_samples_are_those_of_a_rollout():
    policy = Policy(llama(), temperature=1.5)
    indices = [4, 9, 2]
    found = self_consistency(policy, prompts(3), T, first_token, 5, eos_ids=ENDS, seed=3, prompt_indices=indices)
    random = SequenceRandom.keyed(3, 0, indices, 5)
    rollout = hard_rollout(policy, prompts(3), Truncation(1), random, T, 5, ENDS)
    assert torch.equal(found.samples.tokens, rollout.tokens)
    for row in range(3):
        answers = [first_token(row, tokens.tolist()) for tokens in rollout.tokens[5 * row : 5 * row + 5]]
        counts = {answer: answers.count(answer) for answer in answers if answer is not None}
        assert found.votes[row] == max(counts.values())
        assert counts[found.answers[row]] == found.votes[row]
        chosen = 5 * row + answers.index(found.answers[row])
        assert torch.equal(found.tokens[row], rollout.tokens[chosen])
        lengths = rollout.mask[5 * row : 5 * row + 5].sum(-1)
        assert found.forward_tokens[row] == (lengths - 1).sum()
    assert len(set(rollout.mask.sum(-1).tolist())) > 1
    other = self_consistency(policy, prompts(3), T, first_token, 5, eos_ids=ENDS, seed=4, prompt_indices=indices)
    assert not torch.equal(other.samples.tokens[:, 0], found.samples.tokens[:, 0])


def test_one_cold_sample_is_greedy():
    policy = Policy(llama())
    greedy = hard_rollout(policy, prompts(4), Truncation(1), SequenceRandom([0] * 4), T, eos_ids=ENDS, greedy=True)
    found = self_consistency(policy.at_temperature(1e-6), prompts(4), T, first_token, 1, eos_ids=ENDS)
    assert torch.equal(found.tokens, greedy.tokens)
    assert torch.equal(found.mask, greedy.mask)


def test_samples_are_needed():
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        self_consistency(Policy(llama()), prompts(2), T, first_token, 0)
