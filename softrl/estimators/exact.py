"""The true gradient of J by enumeration of all V^T sequences: what the estimators of tiny problems are held to."""

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.estimators.base import Problem
from softrl.estimators.score_function import Scores
from softrl.masking import mask_through_eos
from softrl.rewards.base import checked_hard
from softrl.types import HardRollout, Prompts

MAX_SEQUENCES = 10**6


def all_sequences(
    vocab_size: int, num_steps: int, eos_ids: tuple[int, ...] = ()
) -> tuple[Int[Tensor, "M T"], Bool[Tensor, "M T"]]:
    """Every sequence once, and its mask; what follows an end-of-sequence token is token 0.

    Raises:
        ValueError: more than a million of them.
    """
    if vocab_size**num_steps > MAX_SEQUENCES:
        raise ValueError(
            f"V^T = {vocab_size}^{num_steps} sequences are too many to enumerate; the limit is {MAX_SEQUENCES:,}"
        )
    tokens = torch.tensor(list(itertools.product(range(vocab_size), repeat=num_steps)))
    mask = mask_through_eos(tokens, eos_ids)
    once = (tokens.masked_fill(mask, 0) == 0).all(-1)
    return tokens[once], mask[once]


def exact_objective(
    problem: Problem, prompt: Prompts, num_steps: int, eos_ids: tuple[int, ...] = ()
) -> Float[Tensor, ""]:
    """`J = Σ_x π(x) (R(x) + Σ_t F_t(x))` of one prompt, differentiable in the policy's parameters.

    Args:
        problem: what is maximised; columns hold one entry, for the prompt.
        prompt: one row.
        num_steps: T.
        eos_ids: a sequence ends at the first of these.
    Raises:
        ValueError: too many sequences, or nucleus rules, whose support jumps with the parameters.
    """
    if problem.truncation.has_nucleus:
        raise ValueError("enumeration is of the whole distribution; switch top_p and min_p off")
    tokens, mask = all_sequences(problem.policy.vocab_size, num_steps, eos_ids)
    rollout = HardRollout(prompt.repeated(len(tokens)), tokens, mask)
    scores = Scores.of(problem, rollout)
    columns = {key: list(value) * len(tokens) for key, value in problem.columns.items()}
    with torch.no_grad():
        rewards = checked_hard(problem.reward, tokens, mask, **columns)
    values = rewards.to(scores.log_probs.dtype) + scores.direct.sum(-1)
    return (scores.log_probs.sum(-1).exp() * values).sum()
