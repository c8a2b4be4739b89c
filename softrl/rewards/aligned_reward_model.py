"""A reward model with another tokenizer than the policy's, read through the alignment of their vocabularies.

The alignment and its slots are in `alignment.py`, how a classifier reads embeddings in `classifier.py`.
Left out: classifiers that take no position ids, encoder-decoders.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrl.rewards.alignment import align, last_present, pieces_of, slots_of, some_word
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.classifier import SoftClassifier
from softrl.rewards.reward_model import Link, default_link, default_name, label_index, linked, load_classifier
from softrl.rewards.sequences import log_of_presence, mixtures, packed
from softrl.types import SoftTokens

_NUM_CHECKED = 6


class AlignedClassifierReward(nn.Module):
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
        super().__init__()
        self.name = name or default_name(model)
        self.classifier = SoftClassifier(model, self.name)
        config = self.classifier.model.config
        self.link: Link = link or default_link(config)
        self.index = label_index(self.name, config, label, self.link)
        self.reward_tokenizer = reward_tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.include_prompt = include_prompt
        self.vocab_size: int | None = vocab_size or len(policy_tokenizer)
        self.alignment = align(policy_tokenizer, reward_tokenizer, self.vocab_size)
        self.coverage = self.alignment.coverage
        if self.coverage.total < min_coverage:
            raise ValueError(
                f"reward {self.name!r}: {self.coverage}, and min_coverage={min_coverage} asks for {min_coverage:.1%}; "
                "choose a reward model whose tokenizer knows the policy's texts, or ask for less"
            )
        self._before, self._after = _frame(reward_tokenizer)
        self._first_position = 0
        self._find_first_position()

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
        try:
            reward_tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(name_or_path)!r} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); save the "
                "model's own beside it"
            ) from error
        return cls(model, reward_tokenizer, policy_tokenizer, name=name or Path(name_or_path).name, **settings)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of soft tokens, in float32 at least.

        Raises:
            ValueError: no `prompt` column, token ids outside the policy's vocabulary, or a text that is longer than
                the model's context.
        """
        self._check_ids(tokens)
        texts = self._prompt_texts(len(tokens.ids), columns)
        prompts = self.reward_tokenizer(texts, add_special_tokens=False).input_ids
        fronts = [tokens.ids.new_tensor(self._before + prompt) for prompt in prompts]
        behind_word = torch.tensor([text[-1:].isalnum() for text in texts], device=tokens.ids.device)
        return linked(self._logits(tokens, fronts, behind_word), self.index, self.link)

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the aligned pieces of token ids, in float32 at least."""
        return self.soft(one_hot_tokens(ids, mask), **columns)

    def hard_decoded(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the decoded texts, prompts in front, by the model's own forward on its own tokenizer's ids.

        Raises:
            ValueError: no `prompt` column, or a text that is longer than the model's context.
        """
        kept = [row[written].tolist() for row, written in zip(ids, mask, strict=True)]
        texts = self.policy_tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        fronts = self._prompt_texts(len(ids), columns)
        whole = [front + text for front, text in zip(fronts, texts, strict=True)]
        cut = self.reward_tokenizer(whole, add_special_tokens=False).input_ids
        fill = self.classifier.config.pad_token_id or 0
        framed = [[*self._before, *row, *self._after] or [fill] for row in cut]  # an empty text has to be something
        rows = [torch.tensor(row, device=ids.device) for row in framed]
        self._check_length(max(map(len, rows)))
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = self.classifier.model(pad_sequence(rows, True, fill), attention_mask=mask).logits
        return linked(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.index, self.link)

    def _logits(
        self, tokens: SoftTokens, fronts: list[Int[Tensor, "_"]], behind_word: Bool[Tensor, "N"]
    ) -> Float[Tensor, "N C"]:
        classifier, device = self.classifier, tokens.ids.device
        self.alignment = self.alignment.to(device)
        slots = slots_of(tokens, self.alignment, behind_word)
        after = torch.tensor(self._after, dtype=torch.long, device=device).expand(len(fronts), -1)
        starts = torch.tensor([len(front) for front in fronts], device=device)
        self._check_length(int((starts + slots.lengths).max()) + len(self._after))

        embedding = classifier.model.get_input_embeddings()
        behind = torch.cat([mixtures(embedding, slots.ids, slots.weights), embedding(after)], 1)
        written = tokens.survival.to(slots.presence.dtype)[:, slots.step] * slots.presence
        inside = tokens.mask[:, slots.step]
        log_presence = log_of_presence(written, inside)
        certain = log_presence.new_zeros(after.shape)
        places = torch.cat([slots.position, slots.lengths[:, None] + torch.arange(after.shape[1], device=device)], 1)
        in_order = [torch.arange(len(front), device=device) for front in fronts]
        positions = packed(in_order, places + starts[:, None], 0) + self._first_position
        limit = getattr(classifier.config, "max_position_embeddings", 0) or 0
        return classifier.read(
            packed(classifier.embedded(fronts), behind, 0.0),
            packed(
                [log_presence.new_zeros(len(f)) for f in fronts], torch.cat([log_presence, certain], 1), -torch.inf
            ),
            self._pooled(written, inside, [len(front) for front in fronts]),
            positions.clamp(max=limit - 1) if limit > 0 else positions,  # of slots that are hardly present
        )

    def _pooled(
        self, written: Float[Tensor, "N L"], inside: Bool[Tensor, "N L"], front_lengths: list[int]
    ) -> Float[Tensor, "N S"]:
        """How likely each token of the packed texts is the last one."""
        if self._after:
            ends = torch.cat([torch.zeros_like(written), written.new_zeros(len(written), len(self._after))], 1)
            ends[:, -1] = 1.0
            return packed([written.new_zeros(length) for length in front_lengths], ends, 0.0)
        last = last_present(written, inside)
        rest = 1.0 - last.sum(-1)
        fronts = [
            torch.cat([rest.new_zeros(length - 1), rest[row : row + 1]]) if length else rest.new_zeros(0)
            for row, length in enumerate(front_lengths)
        ]
        return packed(fronts, last, 0.0)

    def _prompt_texts(self, num_rows: int, columns: Mapping[str, Any]) -> list[str]:
        """Prompts as texts; conversations one message a line."""
        if not self.include_prompt:
            return [""] * num_rows
        if "prompt" not in columns:
            raise ValueError(
                f"reward {self.name!r} reads the prompts, and there is no column 'prompt' among {sorted(columns)}; "
                "pass prompt=[...], or make the reward with include_prompt=False"
            )
        return [
            prompt if isinstance(prompt, str) else "".join(f"{message['content']}\n" for message in prompt)
            for prompt in columns["prompt"]
        ]

    def _check_ids(self, tokens: SoftTokens) -> None:
        ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
        known = self.alignment.lengths.shape[1]
        outside = ids[(ids < 0) | (ids >= known)]
        if outside.numel():
            raise ValueError(
                f"token id {int(outside[0])} is outside the {known} ids that reward {self.name!r} is aligned with; "
                "pass vocab_size of the policy"
            )

    def _check_length(self, longest: int) -> None:
        limit = getattr(self.classifier.config, "max_position_embeddings", None)
        if limit is not None and 0 < limit - self._first_position < longest:
            raise ValueError(
                f"prompts and completions of up to {longest} pieces exceed the context of {limit} of reward "
                f"{self.name!r}; shorten them, or leave the prompts out (include_prompt=False)"
            )

    @torch.no_grad()
    def _find_first_position(self) -> None:
        """Set the position id of a text's first token: 0, or behind the pad id (RoBERTa), whichever reads rightly.

        Raises:
            TypeError: neither scores aligned tokens as the model's own forward scores their pieces.
        """
        device = self.classifier.model.device
        lengths = self.alignment.lengths[0]
        some = torch.cat([(lengths == count).nonzero().flatten()[:3] for count in (1, 2, 3)])[:_NUM_CHECKED]
        ids = torch.cat([some, some.flip(0)])[None].to(device)
        tokens = one_hot_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        pieces = [*self._before, *pieces_of(ids[0].tolist(), self.alignment), *self._after]
        front = [torch.tensor(self._before, dtype=torch.long, device=device)]
        with torch.autocast(device.type, enabled=False):
            theirs = self.classifier.model(input_ids=torch.tensor([pieces], device=device)).logits.float()
            for first in (0, (self.classifier.config.pad_token_id or 0) + 1):
                self._first_position = first
                if self.classifier.takes_positions:
                    ours = self._logits(tokens, front, torch.zeros_like(ids[:, 0], dtype=torch.bool)).float()
                    if bool((ours - theirs).norm() <= 1e-2 * theirs.norm()):
                        return
        raise TypeError(
            f"reward {self.name!r} ({type(self.classifier.model).__name__}) does not score aligned tokens as it "
            "scores their pieces: it takes no position ids, or counts them in another way than BERT and RoBERTa; use "
            "another reward model"
        )


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    _, word = some_word(tokenizer)
    (alone,), (framed,) = (tokenizer([word], add_special_tokens=special).input_ids for special in (False, True))
    start = next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), len(framed))
    return framed[:start], framed[start + len(alone) :]
