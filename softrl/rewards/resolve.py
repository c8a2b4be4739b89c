"""From what a user of TRL passes in `reward_funcs` to rewards: names, files, models and functions.

TRL's reward functions of texts, whose values cannot be differentiated, are refused by name where that is needed.
"""

import copy
import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from softrl.rewards.aligned_reward_model import AlignedClassifierReward
from softrl.rewards.base import Reward
from softrl.rewards.fit import sentiment_reward
from softrl.rewards.function import FunctionReward, name_of
from softrl.rewards.overlap import BleuReward, RougeReward, RougeType
from softrl.rewards.reward_model import SequenceClassifierReward, has_other_ids
from softrl.rewards.similarity import EmbeddingSimilarityReward
from softrl.rewards.text import TextReward, not_differentiable
from softrl.rewards.token_linear import TokenLinearReward
from softrl.rewards.toxicity import ToxicityReward

_PARTS_OF_A_REWARD = ("name", "vocab_size", "soft", "hard")
_TRL_PARAMETERS = ("completions", "completion_ids", "prompts")
_SHORT_NAMES = ", ".join(map(repr, ("sentiment", "bleu", *get_args(RougeType), "similarity", "nontoxic")))
_ACCEPTED = (
    "a reward object (see softrl.rewards.base.Reward), a sequence classifier of transformers, a differentiable "
    "function f(tokens: SoftTokens, **columns) -> Tensor [N], or a name (str)"
)


@dataclass(frozen=True)
class _Policy:
    """What an item has to fit: the policy's tokenizer, name and vocabulary, and whether its gradient is wanted."""

    tokenizer: PreTrainedTokenizerBase
    name: str | None
    vocab_size: int | None
    differentiates: bool


def resolve_rewards(
    reward_funcs: Any,
    tokenizer: PreTrainedTokenizerBase,
    policy_name: str | None,
    vocab_size: int | None = None,
    differentiates: bool = True,
) -> list[Reward]:
    """Rewards from everything that `reward_funcs` may hold.

    Args:
        reward_funcs: one item or a list of them:
            - an object with a soft and a hard face, taken as it is;
            - "sentiment", the built-in classifier, fitted for the policy's tokenizer;
            - "nontoxic", one minus the probability of toxicity by a classifier over words, see `ToxicityReward`;
            - "bleu", "rouge1", "rouge2" or "rougeL", against the data set's column `reference`;
            - "similarity", the cosine of all-MiniLM-L6-v2's embeddings of the completion and of that column;
            - a file that `TokenLinearReward.save` wrote;
            - a hub name or local folder of a sequence classifier, which is aligned if it was saved with another
              tokenizer than the policy's, see `AlignedClassifierReward`; or a model in the policy's vocabulary;
            - a differentiable function of soft tokens, see `FunctionReward`;
            - TRL's function of texts, see `TextReward`, unless rewards are differentiated;
            - a dotted path "module.attribute" to any of these, or to a class or function that makes one when it is
              called without arguments. Modules in the working directory are found.
        tokenizer: the policy's.
        policy_name: its short name, folder or hub name; None if the policy was not loaded by name.
        vocab_size: number of token ids of the policy; default: at least as many as the tokenizer has.
        differentiates: whether soft faces are needed.
    Returns:
        Rewards with different names: a second "length" is called "length_2".
    Raises:
        ValueError: nothing was given, a name means nothing, or a model object has another vocabulary than the policy.
        TypeError: an item is no reward and cannot be made one, or has no soft face where one is needed.
    """
    items = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not items:
        raise ValueError("reward_funcs is empty; pass at least one reward")
    policy = _Policy(tokenizer, policy_name, vocab_size, differentiates)
    return _with_different_names([_resolved(item, policy) for item in items])


def _resolved(item: Any, policy: _Policy) -> Reward:
    if isinstance(item, str):
        return _named(item, policy)
    if isinstance(item, type):
        raise TypeError(f"reward_funcs has the class {item.__name__}; pass an object of it: {item.__name__}(...)")
    if isinstance(item, TextReward) and policy.differentiates:
        raise TypeError(not_differentiable(item.name, ["texts"]))
    if isinstance(item, Reward):
        return item
    if isinstance(item, nn.Module) and type(item).__name__.endswith("ForSequenceClassification"):
        return _in_vocabulary(SequenceClassifierReward(item, policy.tokenizer), policy)
    if isinstance(item, nn.Module) or hasattr(item, "soft") or hasattr(item, "hard"):
        missing = [part for part in _PARTS_OF_A_REWARD if not hasattr(item, part)]
        raise TypeError(
            f"reward_funcs has a {type(item).__name__}, which is no reward: it lacks {', '.join(missing)}. Implement "
            "softrl.rewards.base.Reward: name, vocab_size, soft(tokens, **columns) -> [N], differentiable in "
            "tokens.weights, and hard(ids, mask, **columns) -> [N]"
        )
    if callable(item):
        return _of_function(item, policy)
    raise TypeError(f"reward_funcs has a {type(item).__name__}; pass {_ACCEPTED}")


def _of_function(function: Any, policy: _Policy) -> Reward:
    of_texts = [name for name in inspect.signature(function).parameters if name in _TRL_PARAMETERS]
    if not of_texts:
        return FunctionReward(function)
    if policy.differentiates:
        raise TypeError(not_differentiable(name_of(function), of_texts))
    return TextReward(function, policy.tokenizer)


def _named(text: str, policy: _Policy) -> Reward:
    """A reward by short name, file, folder, dotted path or hub name."""
    if text == "sentiment":
        if policy.name:
            return sentiment_reward(policy.name)
        return sentiment_reward(policy.tokenizer, vocab_size=policy.vocab_size)
    if text == "nontoxic":
        return ToxicityReward.pretrained(policy.tokenizer, vocab_size=policy.vocab_size)
    if text == "bleu":
        return BleuReward(policy.tokenizer)
    if text in get_args(RougeType):
        return RougeReward(policy.tokenizer, rouge_type=cast(RougeType, text))
    if text == "similarity":
        return EmbeddingSimilarityReward.from_pretrained(policy.tokenizer, vocab_size=policy.vocab_size)
    if Path(text).is_file():
        return TokenLinearReward.load(text)
    if _is_dotted_path(text) and not Path(text).is_dir():
        found = imported(text, "reward_funcs")
        return _resolved(found() if _is_factory(found) else found, policy)
    try:
        if has_other_ids(text, policy.tokenizer):
            return AlignedClassifierReward.from_pretrained(text, policy.tokenizer, vocab_size=policy.vocab_size)
        model = SequenceClassifierReward.from_pretrained(text, policy.tokenizer)
    except ValueError as error:
        raise ValueError(
            f"reward_funcs: {text!r} is neither {_SHORT_NAMES}, a file saved by TokenLinearReward, nor a dotted "
            f"path to an object, so it was taken for the name of a model: {error}"
        ) from error
    return _in_vocabulary(model, policy)


def _is_dotted_path(text: str) -> bool:
    return "." in text and all(part.isidentifier() for part in text.split("."))


def imported(text: str, argument: str) -> Any:
    """The object that a dotted path names; modules in the working directory are found.

    Raises:
        ValueError: there is none; the message names the argument that the path was given for.
    """
    module_name, _, attribute = text.rpartition(".")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does, for objects in the working directory
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument}: cannot import {text!r} ({error}); check the spelling and the folder") from error


def _is_factory(found: Any) -> bool:
    """Whether calling it without arguments is how to get a reward: a class, or a function that needs none."""
    if isinstance(found, type):
        return True
    if isinstance(found, Reward | nn.Module) or not callable(found):
        return False
    return not any(
        parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        for parameter in inspect.signature(found).parameters.values()
    )


def _in_vocabulary(reward: SequenceClassifierReward, policy: _Policy) -> SequenceClassifierReward:
    known, tokenizer, vocab_size = reward.vocab_size or 0, policy.tokenizer, policy.vocab_size
    if (vocab_size is None and known < len(tokenizer)) or (vocab_size is not None and known != vocab_size):
        raise ValueError(
            f"reward model {reward.name!r} knows {known} token ids, the policy has {vocab_size or len(tokenizer)}: "
            "their vocabularies differ. Soft tokens are of the policy's vocabulary, so the reward model needs the "
            "policy's tokenizer: take one that was trained from the same base model, or align it, "
            "softrl.rewards.aligned_reward_model.AlignedClassifierReward(model, its_tokenizer, policy_tokenizer)"
        )
    return reward


def _with_different_names(rewards: list[Reward]) -> list[Reward]:
    """The rewards, copies of those whose name is taken by an earlier one: metrics are logged under their names."""
    taken: set[str] = set()
    different = []
    for reward in rewards:
        name, number = reward.name, 1
        while name in taken:
            number += 1
            name = f"{reward.name}_{number}"
        if name != reward.name:
            reward = copy.copy(reward)  # the user's own object keeps its name
            reward.name = name
        taken.add(name)
        different.append(reward)
    return different
