"""How a network with a tokenizer of its own reads the policy's tokens: what rewards of that kind have in common.

The alignment and its slots are in `alignment.py`, networks that read embeddings in `soft_reader.py`. Here completions
get the prompts in front of them and the special tokens around them that the network knows from its training.
Left out: networks that take no position ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrl.rewards.alignment import Alignment, align, pieces_of, slots_of, some_word
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.sequences import log_of_presence, mixtures, packed
from softrl.rewards.soft_reader import SoftReader
from softrl.types import SoftTokens

_NUM_CHECKED = 6


@dataclass(frozen=True)
class AlignedTexts:
    """N texts in a network's own pieces: a front (special tokens, prompt), L slots of the completion, an end.

    S is the longest of them; on the right of shorter ones there is nothing, `log_presence` is −inf. `written` is how
    much each slot is present, survival included, and `inside` where the completion has slots at all.
    """

    embeds: Float[Tensor, "N S D"]
    log_presence: Float[Tensor, "N S"]  # nats
    positions: Int[Tensor, "N S"]
    written: Float[Tensor, "N L"]
    inside: Bool[Tensor, "N L"]
    front_lengths: list[int]
    num_behind: int  # special tokens of the end

    def spread(
        self, of_fronts: list[Float[Tensor, "_"]], of_slots: Float[Tensor, "N L"], of_ends: Float[Tensor, "E"]
    ) -> Float[Tensor, "N S"]:
        """A number for each token, from those of the fronts, of the slots and of an end's E tokens; 0 for nothing."""
        return packed(of_fronts, torch.cat([of_slots, of_ends.expand(len(of_slots), -1)], 1), 0.0)


class AlignedReward(nn.Module, ABC):
    """A reward of a network that reads aligned texts.

    Three figures belong to a text: `soft`; `hard`, the pieces of the policy's ids, which is what `soft` becomes at
    one-hot tokens; and `hard_decoded`, the decoded text as the network's own tokenizer cuts it. Trainers log the last
    one as `rewards/<name>_decoded`.

    Args:
        network: reads embeddings; its name is the reward's.
        reward_tokenizer: the network's own, with a fast backend.
        policy_tokenizer: the policy's.
        vocab_size: number of the policy's token ids; default: its tokenizer's.
        include_prompt: put the prompt in front of the completion.
        min_coverage: the least share of the policy's tokens that must keep their text.
    Raises:
        ValueError: too little coverage.
        TypeError: a network that soft tokens cannot be fed to at given positions.
    """

    def __init__(
        self,
        network: SoftReader,
        reward_tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int | None,
        include_prompt: bool,
        min_coverage: float,
    ) -> None:
        super().__init__()
        self.network = network
        self.name = network.name
        self.reward_tokenizer = reward_tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.include_prompt = include_prompt
        self.vocab_size: int | None = vocab_size or len(policy_tokenizer)
        self.alignment: Alignment = align(policy_tokenizer, reward_tokenizer, self.vocab_size)
        self.coverage = self.alignment.coverage
        if self.coverage.total < min_coverage:
            raise ValueError(
                f"reward {self.name!r}: {self.coverage}, and min_coverage={min_coverage} asks for {min_coverage:.1%}; "
                "choose a reward model whose tokenizer knows the policy's texts, or ask for less"
            )
        self._before, self._after = _frame(reward_tokenizer)
        self._first_position = 0
        self._find_first_position()

    @abstractmethod
    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of soft tokens, in float32 at least."""

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the aligned pieces of token ids, in float32 at least."""
        return self.soft(one_hot_tokens(ids, mask), **columns)

    @abstractmethod
    def hard_decoded(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the decoded texts, by the model's own forward on its own tokenizer's ids."""

    @abstractmethod
    def _read(self, texts: AlignedTexts) -> Float[Tensor, "N C"]:
        """What the network says of texts, in float32 at least."""

    @abstractmethod
    def _read_ids(self, ids: Int[Tensor, "N S"], mask: Int[Tensor, "N S"]) -> Float[Tensor, "N C"]:
        """What the model's own forward says of its own tokenizer's ids, in float32 at least."""

    def _aligned(self, tokens: SoftTokens, columns: Mapping[str, Any]) -> AlignedTexts:
        """Completions behind their prompts.

        Raises:
            ValueError: no `prompt` column, token ids outside the policy's vocabulary, or a text that is longer than
                the model's context.
        """
        self._check_ids(tokens)
        texts = self._prompt_texts(len(tokens.ids), columns)
        prompts = self.reward_tokenizer(texts, add_special_tokens=False).input_ids
        fronts = [tokens.ids.new_tensor(self._before + prompt) for prompt in prompts]
        behind_word = torch.tensor([text[-1:].isalnum() for text in texts], device=tokens.ids.device)
        return self._packed(tokens, fronts, behind_word)

    def _decoded(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], columns: Mapping[str, Any]) -> list[str]:
        """Decoded texts behind their prompts, without the policy's special tokens."""
        kept = [row[written].tolist() for row, written in zip(ids, mask, strict=True)]
        texts = self.policy_tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [front + text for front, text in zip(self._prompt_texts(len(ids), columns), texts, strict=True)]

    def _framed(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts with the special tokens around them; nothing for an empty text without such tokens."""
        cut = self.reward_tokenizer(texts, add_special_tokens=False).input_ids
        return [[*self._before, *row, *self._after] for row in cut]

    def _read_rows(self, rows: list[list[int]], device: torch.device) -> Float[Tensor, "N C"]:
        """What the model's own forward says of framed texts of any lengths; an empty one becomes a pad id.

        Raises:
            ValueError: a text that is longer than the model's context.
        """
        fill = self.network.config.pad_token_id or 0
        ids = [torch.tensor(row or [fill], device=device) for row in rows]  # an empty text has to be something
        self._check_length(max(map(len, ids)))
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return self._read_ids(pad_sequence(ids, True, fill), mask)

    def _packed(
        self, tokens: SoftTokens, fronts: list[Int[Tensor, "_"]], behind_word: Bool[Tensor, "N"]
    ) -> AlignedTexts:
        network, device = self.network, tokens.ids.device
        self.alignment = self.alignment.to(device)
        slots = slots_of(tokens, self.alignment, behind_word)
        after = torch.tensor(self._after, dtype=torch.long, device=device).expand(len(fronts), -1)
        starts = torch.tensor([len(front) for front in fronts], device=device)
        self._check_length(int((starts + slots.lengths).max()) + len(self._after))

        embedding = network.model.get_input_embeddings()
        behind = torch.cat([mixtures(embedding, slots.ids, slots.weights), embedding(after)], 1)
        written = tokens.survival.to(slots.presence.dtype)[:, slots.step] * slots.presence
        inside = tokens.mask[:, slots.step]
        log_presence = log_of_presence(written, inside)
        certain = log_presence.new_zeros(after.shape)
        places = torch.cat([slots.position, slots.lengths[:, None] + torch.arange(after.shape[1], device=device)], 1)
        in_order = [torch.arange(len(front), device=device) for front in fronts]
        positions = packed(in_order, places + starts[:, None], 0) + self._first_position
        limit = getattr(network.config, "max_position_embeddings", 0) or 0
        return AlignedTexts(
            packed(network.embedded(fronts), behind, 0.0),
            packed(
                [log_presence.new_zeros(len(f)) for f in fronts], torch.cat([log_presence, certain], 1), -torch.inf
            ),
            positions.clamp(max=limit - 1) if limit > 0 else positions,  # of slots that are hardly present
            written,
            inside,
            [len(front) for front in fronts],
            len(self._after),
        )

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
        limit = self._max_length
        if limit is not None and limit < longest:
            raise ValueError(
                f"prompts and completions of up to {longest} pieces exceed the context of {limit} of reward "
                f"{self.name!r}; shorten them, or leave the prompts out (include_prompt=False)"
            )

    @property
    def _max_length(self) -> int | None:
        """The model's context in pieces, special tokens included; None if it has no bound."""
        limit = getattr(self.network.config, "max_position_embeddings", None)
        return None if limit is None or limit <= 0 else limit - self._first_position

    @torch.no_grad()
    def _find_first_position(self) -> None:
        """Set the position id of a text's first token: 0, or behind the pad id (RoBERTa), whichever reads rightly.

        Raises:
            TypeError: neither reads aligned tokens as the model's own forward reads their pieces.
        """
        device = self.network.model.device
        lengths = self.alignment.lengths[0]
        some = torch.cat([(lengths == count).nonzero().flatten()[:3] for count in (1, 2, 3)])[:_NUM_CHECKED]
        ids = torch.cat([some, some.flip(0)])[None].to(device)
        tokens = one_hot_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        pieces = [*self._before, *pieces_of(ids[0].tolist(), self.alignment), *self._after]
        front = [torch.tensor(self._before, dtype=torch.long, device=device)]
        with torch.autocast(device.type, enabled=False):
            own_ids = torch.tensor([pieces], device=device)
            theirs = self._read_ids(own_ids, torch.ones_like(own_ids)).float()
            for first in (0, (self.network.config.pad_token_id or 0) + 1):
                self._first_position = first
                if self.network.takes_positions:
                    texts = self._packed(tokens, front, torch.zeros_like(ids[:, 0], dtype=torch.bool))
                    if bool((self._read(texts).float() - theirs).norm() <= 1e-2 * theirs.norm()):
                        return
        raise TypeError(
            f"reward {self.name!r} ({type(self.network.model).__name__}) does not read aligned tokens as it reads "
            "their pieces: it takes no position ids, or counts them in another way than BERT and RoBERTa; use another "
            "reward model"
        )


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """A model's own tokenizer.

    Raises:
        ValueError: there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name_or_path)!r} has no tokenizer that can be loaded ({str(error).splitlines()[0]}); save the "
            "model's own beside it"
        ) from error


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    _, word = some_word(tokenizer)
    (alone,), (framed,) = (tokenizer([word], add_special_tokens=special).input_ids for special in (False, True))
    start = next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), len(framed))
    return framed[:start], framed[start + len(alone) :]
