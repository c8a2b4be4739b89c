"""Fit the sentiment reward and its judge on the cached reviews, once, and keep them in the cache.

The reward is fitted on the "reward" part of the reviews and tested on the "judge" part, the judge the other way
round; no text is in both parts, and neither sees the reviews that prompts come from. A cached fit is used as long as
everything that went into it is unchanged (texts, vocabulary or encoder, settings); its `card.json` says how well it
does on the other part.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from softrl import assets
from softrl.rewards import fit_judge, fit_reward
from softrl.rewards.judge import SentenceEncoder, SentimentJudge
from softrl.rewards.token_linear import TokenLinearReward

REWARD_NAME = "sentiment-reward"
JUDGE_NAME = "sentiment-judge"

_REWARD_FILE = "reward.safetensors"
_JUDGE_FILE = "head.safetensors"


def sentiment_reward(
    tokenizer: PreTrainedTokenizerBase | str | Path = "smollm2-135m",
    *,
    vocab_size: int | None = None,
    rebuild: bool = False,
) -> TokenLinearReward:
    """The token-linear sentiment reward for a policy's vocabulary; fitted in about half a minute when not cached.

    Args:
        tokenizer: the policy's tokenizer, or its model as a short name, folder or hub name.
        vocab_size: of the policy; default: what the model's config says, or the tokenizer's length.
        rebuild: fit it again although it is cached.
    Returns:
        A reward in (0, 1): the probability of favourable, from the mean weight of the tokens.
    Raises:
        AssetError: something cannot be fetched or written.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        path = assets.resolve_model(str(tokenizer))
        tokenizer = AutoTokenizer.from_pretrained(path)
        vocab_size = vocab_size or int(AutoConfig.from_pretrained(path).get_text_config().vocab_size)
    known, size = tokenizer, vocab_size or len(tokenizer)
    vocabulary = _vocabulary_hash(known)
    inputs = {
        "reviews": assets.sha256_of(assets.reviews_csv()),
        "vocabulary": vocabulary,
        "vocab_size": size,
        "settings": fit_reward.SETTINGS,
    }

    def build(folder: Path) -> dict[str, Any]:
        assets.announce("fitting the sentiment reward, one weight per token, on half of the reviews; half a minute")
        reward, facts = fit_reward.fit(known, size)
        reward.save(folder / _REWARD_FILE)
        assets.announce(f"fitted the sentiment reward in {facts['seconds']} s")
        return facts

    name = f"{REWARD_NAME}-{size}-{vocabulary[:8]}"
    folder = assets.cached_folder(name, inputs, build, needs_mb=10, rebuild=rebuild)
    return TokenLinearReward.load(folder / _REWARD_FILE)


def sentiment_judge(*, device: str | torch.device = "cpu", rebuild: bool = False) -> SentimentJudge:
    """The judge of favourable texts; fitted in one to three minutes when not cached.

    Args:
        device: where its encoder runs.
        rebuild: fit it again although it is cached.
    Returns:
        A judge that shares no text, no vocabulary and no weights with the reward.
    Raises:
        AssetError: something cannot be fetched or written.
    """
    folder = assets.encoder()
    inputs = {
        "reviews": assets.sha256_of(assets.reviews_csv()),
        "encoder": assets.read_card(folder)["inputs"],
        "settings": fit_judge.SETTINGS,
    }
    encoder = SentenceEncoder(folder, device)

    def build(target: Path) -> dict[str, Any]:
        assets.announce("fitting the sentiment judge, a head on MiniLM, on the other half; one to three minutes")
        judge, facts = fit_judge.fit(encoder)
        judge.save(target / _JUDGE_FILE)
        assets.announce(f"fitted the sentiment judge in {facts['seconds']} s")
        return facts

    fitted = assets.cached_folder(JUDGE_NAME, inputs, build, needs_mb=10, rebuild=rebuild)
    return SentimentJudge.load(fitted / _JUDGE_FILE, encoder)


def token_linear_judge() -> Callable[[list[str]], Float[Tensor, "N"]]:
    """The token-linear sentiment classifier of SmolLM2's tokens as a judge of texts, for policies trained on another.

    Returns:
        A function from N texts to probabilities of favourable, in (0, 1); an empty text scores its bias.
    Raises:
        AssetError: something cannot be fetched or written.
    """
    path = assets.language_model()
    tokenizer, classifier = AutoTokenizer.from_pretrained(path), sentiment_reward(path)

    def score(texts: list[str]) -> Float[Tensor, "N"]:
        rows = tokenizer(texts, add_special_tokens=False).input_ids
        ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        return classifier.hard(ids, mask)

    return score


def _vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokens and their ids, the same for equal vocabularies wherever they were loaded from."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
