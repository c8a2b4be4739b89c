"""Self-consistency: several sampled texts, and a majority vote on the answers that are found in them.

Source: Wang et al. (2022), Self-Consistency Improves Chain of Thought Reasoning in Language Models, arXiv:2203.11171
(their unweighted vote).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from softrl.generation.beam import Found
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation
from softrl.types import HardRollout, Prompts

EVERY_TOKEN = Truncation(1)  # no nucleus rule; top_k plays no part in sampling


@dataclass(frozen=True)
class Vote:
    """What most of the answers say: the answer, how many of them give it, and the first that does."""

    answer: str | None
    count: int
    index: int


def majority_vote(answers: Sequence[str | None]) -> Vote:
    """The answer that occurs most often; of those that occur equally often, the one that came first.

    Args:
        answers: of one prompt's samples; None is no answer, which has no vote: it wins only where there is no other.
    Raises:
        ValueError: no answers at all.
    """
    if not answers:
        raise ValueError("answers: a vote needs at least one, got none")
    given = [answer for answer in answers if answer is not None]
    # A Counter lists equal counts in the order of their first occurrence.
    answer, count = Counter(given).most_common(1)[0] if given else (None, len(answers))
    return Vote(answer, count, answers.index(answer))


@dataclass(frozen=True)
class Voted(Found):
    """A text a prompt: the first sample that gives the answer with most votes. All samples lie beside it."""

    answers: tuple[str | None, ...]
    votes: Int[Tensor, "B"]
    samples: HardRollout  # G rows a prompt, side by side


def self_consistency(
    policy: Policy,
    prompts: Prompts,
    max_new_tokens: int,
    answer_of: Callable[[int, list[int]], str | None],
    num_samples: int = 4,
    truncation: Truncation = EVERY_TOKEN,
    eos_ids: tuple[int, ...] = (),
    seed: int = 0,
    prompt_indices: list[int] | None = None,
) -> Voted:
    """Sample, and vote.

    Args:
        policy: the model; its temperature is that of the samples.
        prompts: B left-padded prompts.
        max_new_tokens: T.
        answer_of: the answer in a sample, given the prompt's row and the sample's token ids through its end; None
            where there is none.
        num_samples: G.
        truncation: the nucleus rules of the sampler; `top_k` is not applied.
        eos_ids: a sample ends at the first of these.
        seed, prompt_indices: random numbers are keyed by these and the sample, so that a prompt's samples are the same
            in any batch; indices count the rows by default.
    Returns:
        A text a prompt; T is cut to the longest sample.
    Raises:
        ValueError: as `soft_rollout`, or num_samples < 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    indices = list(range(len(prompts.ids))) if prompt_indices is None else prompt_indices
    random = SequenceRandom.keyed(seed, 0, indices, num_samples, prompts.ids.device)
    samples = hard_rollout(policy, prompts, truncation, random, max_new_tokens, num_samples, eos_ids)
    texts = [tokens[kept].tolist() for tokens, kept in zip(samples.tokens, samples.mask, strict=True)]
    answers = [answer_of(index // num_samples, text) for index, text in enumerate(texts)]
    votes = [majority_vote(answers[row : row + num_samples]) for row in range(0, len(answers), num_samples)]
    chosen = torch.tensor([vote.index + num_samples * row for row, vote in enumerate(votes)])
    chosen = chosen.to(samples.tokens.device)
    return Voted(
        prompts, samples.tokens[chosen], samples.mask[chosen], fed_tokens(samples, num_samples),
        tuple(vote.answer for vote in votes), torch.tensor([vote.count for vote in votes]), samples,
    )  # fmt: skip


def fed_tokens(rollout: HardRollout, num_samples: int = 1) -> Int[Tensor, "B"]:
    """`Found.forward_tokens` of independent texts: all tokens of a prompt's samples but their last ones."""
    return (rollout.mask.sum(-1) - 1).view(-1, num_samples).sum(-1)
