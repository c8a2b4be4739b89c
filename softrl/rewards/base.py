"""What a reward is: a number per sequence, differentiable in soft tokens and defined on hard ones.

On one-hot soft tokens the two faces agree. The helpers call a reward and check what it returns, so that a wrong
shape, a NaN or a missing gradient is reported by the reward's name and not three rooms later.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.types import SoftTokens

_ROWS_SHOWN = 5


@runtime_checkable
class Reward(Protocol):
    """A reward of the policy's tokens.

    `name` appears in logs; `vocab_size` is the number of token ids it knows, None if it has no vocabulary of its own.
    `columns` are the data set's columns, lists of length N (`prompt` among them); most rewards ignore them.
    """

    name: str
    vocab_size: int | None

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of soft tokens, differentiable in `tokens.weights`; a token counts by its `tokens.survival`."""
        ...

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of token ids; those where the mask is False do not count."""
        ...


@runtime_checkable
class ReadsDecodedText(Protocol):
    """What a reward with a tokenizer of its own has besides: a score of the decoded text, logged beside the others."""

    coverage: Any  # how much of the policy's vocabulary it knows; its str() says so

    def hard_decoded(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the decoded texts as the reward's own tokenizer cuts them."""
        ...


TrlReward = Callable[..., list[float]]


def checked_soft(reward: Reward, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
    """Soft rewards, checked.

    Args:
        reward: the reward to call.
        tokens: N soft sequences; where their weights require a gradient, the rewards must carry one to them.
        columns: passed on.
    Returns:
        A finite reward for each sequence.
    Raises:
        ValueError: another shape than [N], integers, NaN or infinity, or rewards that the weights do not reach.
    """
    rewards = _checked(reward.name, reward.soft(tokens, **columns), len(tokens.ids))
    wanted = torch.is_grad_enabled() and tokens.weights.requires_grad
    if wanted and not _depends_on(rewards, tokens.weights):
        raise ValueError(
            f"reward {reward.name!r} is not differentiable in the weights of the soft tokens: no gradient path leads "
            "from its result to them (argmax, detach, .item() or decoding cut it). Return a differentiable value "
            "from `soft`, or use its hard face with ReinforceTrainer, the score-function trainer."
        )
    return rewards


def checked_hard(
    reward: Reward, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any
) -> Float[Tensor, "N"]:
    """Hard rewards, checked.

    Args:
        reward: the reward to call.
        ids: token ids.
        mask: True on real tokens.
        columns: passed on.
    Returns:
        A finite reward for each sequence.
    Raises:
        ValueError: another shape than [N], integers, NaN or infinity.
    """
    return _checked(reward.name, reward.hard(ids, mask, **columns), len(ids))


def as_trl(reward: Reward, tokenizer: PreTrainedTokenizerBase) -> TrlReward:
    """The reward as a function that TRL's RLOOTrainer and GRPOTrainer take in `reward_funcs`.

    Args:
        reward: its hard face is used, on the ids that TRL sampled: nothing is tokenised again.
        tokenizer: the policy's; its pad id fills short rows, which the mask then hides.
    Returns:
        `f(prompts, completions, completion_ids, **columns) -> list[float]`, named after the reward. Data-set
        columns reach the reward, the prompts as `prompt`; TRL's other keyword arguments do not.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def rewards_for_trl(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        ids, mask = _right_padded(completion_ids, pad_id if pad_id is not None else 0)
        in_data_set = {key: value for key, value in columns.items() if isinstance(value, list)}
        with torch.no_grad():
            return checked_hard(reward, ids, mask, prompt=prompts, **in_data_set).tolist()

    rewards_for_trl.__name__ = reward.name
    return rewards_for_trl


def one_hot_tokens(ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> SoftTokens:
    """Token ids as soft tokens that end where the mask does, in torch's default dtype."""
    return SoftTokens(ids[..., None], torch.ones(*ids.shape, 1, device=ids.device), mask)


def _right_padded(rows: list[list[int]], pad_id: int) -> tuple[Int[Tensor, "N T"], Bool[Tensor, "N T"]]:
    length = max(map(len, rows), default=0)
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], dtype=torch.long)
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows], dtype=torch.bool)
    return ids.reshape(len(rows), length), mask.reshape(len(rows), length)


def _checked(name: str, rewards: Any, num_sequences: int) -> Tensor:
    if not isinstance(rewards, Tensor):
        raise ValueError(f"reward {name!r} returned a {type(rewards).__name__}, expected a tensor of floats")
    if tuple(rewards.shape) != (num_sequences,):
        raise ValueError(
            f"reward {name!r} returned shape {tuple(rewards.shape)}, expected ({num_sequences},): one number per "
            "sequence"
        )
    if not rewards.is_floating_point():
        raise ValueError(f"reward {name!r} returned {rewards.dtype}, expected a floating-point tensor")
    wrong = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if wrong:
        more = f" and {len(wrong) - _ROWS_SHOWN} more" if len(wrong) > _ROWS_SHOWN else ""
        raise ValueError(f"reward {name!r} is NaN or infinite for the sequences {wrong[:_ROWS_SHOWN]}{more}")
    return rewards


def _depends_on(result: Tensor, source: Tensor) -> bool:
    """Whether the graph of `result` reaches `source`; `requires_grad` alone may come from a reward's own weights."""
    if result is source:
        return True
    target = source.grad_fn
    to_visit, visited = [result.grad_fn], set()
    while to_visit:
        node = to_visit.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node is target or getattr(node, "variable", None) is source:
            return True
        to_visit.extend(following for following, _ in node.next_functions)
    return False


class WeightedRewards:
    """The weighted sum of several rewards, itself a reward.

    Args:
        rewards: at least one.
        weights: one number a reward; 1 each if left out.
    Raises:
        ValueError: no reward, or another number of weights than of rewards.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None):
        if not rewards:
            raise ValueError("reward_funcs is empty; pass at least one reward")
        self.rewards = rewards
        self.weights = [1.0] * len(rewards) if weights is None else weights
        if len(self.weights) != len(rewards):
            raise ValueError(
                f"reward_weights has {len(self.weights)} numbers for {len(rewards)} rewards; give one a reward"
            )
        self.name = "+".join(reward.name for reward in rewards)
        self.vocab_size = next((reward.vocab_size for reward in rewards if reward.vocab_size is not None), None)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Weighted sum of the soft faces."""
        return self._weighted([checked_soft(reward, tokens, **columns) for reward in self.rewards])

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Weighted sum of the hard faces."""
        return self._weighted(self.hard_each(ids, mask, **columns))

    def hard_each(
        self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any
    ) -> list[Float[Tensor, "N"]]:
        """The hard face of every reward, unweighted."""
        return [checked_hard(reward, ids, mask, **columns) for reward in self.rewards]

    def _weighted(self, values: list[Tensor]) -> Tensor:
        return torch.stack([weight * value for weight, value in zip(self.weights, values, strict=True)]).sum(0)
