"""A reward model with another tokenizer than the policy's, read through the alignment of their vocabularies.

How aligned texts are made is in `aligned.py`, how a classifier reads embeddings in `classifier.py`.
Left out: classifiers that take no position ids, encoder-decoders.
"""

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softrl.rewards.aligned import AlignedReward, AlignedTexts, load_tokenizer
from softrl.rewards.alignment import last_present
from softrl.rewards.classifier import SoftClassifier
from softrl.rewards.reward_model import Link, default_link, default_name, label_index, linked, load_classifier
from softrl.types import SoftTokens


class AlignedClassifierReward(AlignedReward):
    """`link(logits)[label]` of a sequence classifier that has a tokenizer of its own.

    Three figures belong to a text: `soft`; `hard`, the pieces of the policy's ids, which is what `soft` becomes at
    one-hot tokens; and `hard_decoded`, the decoded text as the classifier's own tokenizer cuts it. Trainers log the
    last one as `rewards/<name>_decoded`.

    Args:
        model: an `AutoModelForSequenceClassification`, or a PEFT model around one; frozen and put into evaluation
            mode, in place.
        reward_tokenizer: the model's own, with a fast backend.
        policy_tokenizer: the policy's.
        vocab_size: number of the policy's token ids; default: its tokenizer's.
        name: what logs call it; default: the model's.
        label, link: see `SequenceClassifierReward`.
        include_prompt: put the prompt in front of the completion.
        min_coverage: the least share of the policy's tokens that must keep their text.
    Raises:
        ValueError: too little coverage, or a label or link that the model does not have.
        TypeError: a model that soft tokens cannot be fed to at given positions.
    """

    def __init__(
        self,
        model: nn.Module,
        reward_tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int | None = None,
        name: str | None = None,
        label: int | str | None = None,
        link: Link | None = None,
        include_prompt: bool = True,
        min_coverage: float = 0.9,
    ) -> None:
        classifier = SoftClassifier(model, name or default_name(model))
        super().__init__(
            classifier, reward_tokenizer, policy_tokenizer, vocab_size=vocab_size, include_prompt=include_prompt,
            min_coverage=min_coverage,
        )  # fmt: skip
        config = classifier.model.config
        self.link: Link = link or default_link(config)
        self.index = label_index(self.name, config, label, self.link)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> "AlignedClassifierReward":
        """Load classifier and tokenizer by hub name or local folder; `settings` are the constructor's.

        Raises:
            ValueError: it cannot be loaded, or has no trained head.
        """
        model = load_classifier(name_or_path, **(model_kwargs or {}))
        reward_tokenizer = load_tokenizer(name_or_path)
        return cls(model, reward_tokenizer, policy_tokenizer, name=name or Path(name_or_path).name, **settings)

    @property
    def classifier(self) -> SoftClassifier:
        """What reads embeddings."""
        return cast(SoftClassifier, self.network)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of soft tokens, in float32 at least.

        Raises:
            ValueError: no `prompt` column, token ids outside the policy's vocabulary, or a text that is longer than
                the model's context.
        """
        return linked(self._read(self._aligned(tokens, columns)), self.index, self.link)

    def hard_decoded(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the decoded texts, prompts in front, by the model's own forward on its own tokenizer's ids.

        Raises:
            ValueError: no `prompt` column, or a text that is longer than the model's context.
        """
        rows = self._framed(self._decoded(ids, mask, columns))
        return linked(self._read_rows(rows, ids.device), self.index, self.link)

    def _read(self, texts: AlignedTexts) -> Float[Tensor, "N C"]:
        return self.network.read(texts.embeds, texts.log_presence, _how_likely_last(texts), texts.positions)

    def _read_ids(self, ids: Int[Tensor, "N S"], mask: Int[Tensor, "N S"]) -> Float[Tensor, "N C"]:
        logits = self.network.model(ids, attention_mask=mask).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _how_likely_last(texts: AlignedTexts) -> Float[Tensor, "N S"]:
    """How likely each token of the packed texts is the last one."""
    if texts.num_behind:
        zeros = [texts.written.new_zeros(length) for length in (*texts.front_lengths, texts.num_behind)]
        zeros[-1][-1] = 1.0
        return texts.spread(zeros[:-1], torch.zeros_like(texts.written), zeros[-1])
    last = last_present(texts.written, texts.inside)
    rest = 1.0 - last.sum(-1)
    fronts = [
        torch.cat([rest.new_zeros(length - 1), rest[row : row + 1]]) if length else rest.new_zeros(0)
        for row, length in enumerate(texts.front_lengths)
    ]
    return texts.spread(fronts, last, last.new_zeros(0))
