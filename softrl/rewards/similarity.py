"""How close in meaning the completion is to a reference: the cosine of their sentence embeddings.

The encoder reads the completion through an alignment of vocabularies (`aligned.py`) and the reference as the text
that it is. A reward of this kind can be gamed by texts that only the encoder takes for similar: watch the decoded
face, and a metric of another kind (`overlap_metrics.py`).
Left out: encoders that pool their first or last token, layers behind the pooling, relative positions that ignore
position ids (MPNet), encoder-decoders.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase

from softrl.assets import resolve_model
from softrl.rewards.aligned import AlignedReward, AlignedTexts, load_tokenizer
from softrl.rewards.alignment import last_present
from softrl.rewards.soft_reader import SoftReader
from softrl.types import SoftTokens

_FLOOR = 1e-6  # of a divisor: of a text that is hardly there


class SoftEncoder(SoftReader):
    """Sentence embeddings: last hidden states, averaged over the tokens as much as each of them is present.

    Args:
        model: an encoder of transformers, or a PEFT model around one; frozen and put into evaluation mode, in place.
        name: what errors call it.
    Raises:
        TypeError: the model cannot be fed with embeddings, is a decoder, or counts places instead of positions.
        ValueError: its attention takes no bias.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__(model, name)
        if self._hides_what_comes_after():
            raise TypeError(
                f"{self._described} hides from tokens what comes after them: it is a decoder, and the mean over its "
                "tokens is no sentence embedding; use an encoder trained with mean pooling, such as 'minilm-l6'"
            )
        if self.takes_positions and self._sees_gaps():
            raise TypeError(
                f"{self._described} counts how many places are between two tokens, also those where nothing is, "
                "instead of reading position ids (relative positions, as in MPNet); use a relative of BERT, RoBERTa "
                "or ModernBERT, such as 'minilm-l6'"
            )

    @torch.no_grad()
    def _hides_what_comes_after(self) -> bool:
        states = self.model(torch.tensor([[2, 3], [2, 4]], device=self.model.device)).last_hidden_state[:, 0]
        return torch.allclose(states[0], states[1], rtol=1e-4, atol=1e-6)

    @torch.no_grad()
    def _sees_gaps(self) -> bool:
        """Whether hidden places between tokens matter, at the same position ids."""
        ids = torch.tensor([[2, 3, 4]], device=self.model.device)
        embeds, there = self.model.get_input_embeddings()(ids), torch.ones_like(ids).float()

        def with_gap(values: Tensor) -> Tensor:
            gap = torch.zeros_like(values[:, :1]).repeat_interleave(8, 1)
            return torch.cat([values[:, :2], gap, values[:, 2:]], 1)

        with self._own_precision():
            dense = self.read(embeds, there.log(), there, ids)
            loose = self.read(with_gap(embeds), with_gap(there).log(), with_gap(there), with_gap(ids))
        precise = self.model.dtype in (torch.float32, torch.float64)
        return bool((dense - loose).norm() > (1e-4 if precise else 3e-2) * dense.norm())

    def _outputs(
        self,
        embeds: Float[Tensor, "N S D"],
        attention: Tensor,
        weights: Float[Tensor, "N S"],
        positions: Int[Tensor, "N S"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """Embeddings of packed texts."""
        at = {} if positions is None else {"position_ids": positions}
        return _mean(self.model(inputs_embeds=embeds, attention_mask=attention, **at).last_hidden_state, weights)


class EmbeddingSimilarityReward(AlignedReward):
    """Cosine of the sentence embeddings of the completion and of a reference, in [−1, 1].

    An embedding is `Σ_l s_l h_l / Σ_l s_l` over the encoder's last hidden states, special tokens such as [CLS] and
    [SEP] included. A token of the text is present with the probability s_l that a candidate reaches so far and that
    nothing before it has ended the text; attention on it is biased by `log s_l`. Of several references that of the
    highest cosine counts. Where the encoder's tokenizer puts no special tokens around a text, an empty one has no
    embedding: its reward is 0, and the cosine is multiplied by the probability that there is any token.

    The three faces `soft`, `hard` and `hard_decoded` are those of `AlignedReward`; trainers log the last one as
    `rewards/<name>_decoded`. With the policy's own tokenizer the alignment is the identity, but for special tokens and
    parts of characters, which are not read.

    Args:
        model: an encoder of transformers (`AutoModel`), or a PEFT model around one, that was trained with mean
            pooling; frozen and put into evaluation mode, in place.
        reward_tokenizer: the model's own, with a fast backend.
        policy_tokenizer: the policy's.
        column: of the data set, the references: a text or a list of texts a row, none of them empty.
        vocab_size: number of the policy's token ids; default: its tokenizer's.
        name: what logs call it.
        include_prompt: put the prompt in front of the completion, not of the reference.
        min_coverage: the least share of the policy's tokens that must keep their text.
    Raises:
        ValueError: too little coverage, or a model whose attention takes no bias.
        TypeError: a model that soft tokens cannot be fed to at given positions, or a decoder.
    Source: mean pooling and cosine: N. Reimers, I. Gurevych (2019), "Sentence-BERT", arXiv:1908.10084; of soft
        tokens: ours.
    """

    def __init__(
        self,
        model: nn.Module,
        reward_tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        column: str = "reference",
        vocab_size: int | None = None,
        name: str = "similarity",
        include_prompt: bool = False,
        min_coverage: float = 0.9,
    ) -> None:
        super().__init__(
            SoftEncoder(model, name), reward_tokenizer, policy_tokenizer, vocab_size=vocab_size,
            include_prompt=include_prompt, min_coverage=min_coverage,
        )  # fmt: skip
        self.column = column

    @classmethod
    def from_pretrained(
        cls,
        policy_tokenizer: PreTrainedTokenizerBase,
        name_or_path: str | Path = "minilm-l6",
        *,
        model_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> "EmbeddingSimilarityReward":
        """Load encoder and tokenizer by short name, hub name or local folder; `settings` are the constructor's.

        Args:
            policy_tokenizer: the policy's.
            name_or_path: of the encoder; "minilm-l6" is all-MiniLM-L6-v2, which `softrl assets` provides.
            model_kwargs: for transformers (`dtype`, `revision`, ...).
        Raises:
            ValueError: it cannot be loaded, or its weights are not those of an encoder.
            AssetError: a short name's model cannot be made available.
        """
        folder = resolve_model(str(name_or_path))
        model = load_encoder(folder, **(model_kwargs or {}))
        return cls(model, load_tokenizer(folder), policy_tokenizer, **settings)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Cosines for soft tokens, in float32 at least.

        Raises:
            ValueError: references are missing, malformed or too long, no `prompt` column where it is read, token ids
                outside the policy's vocabulary, or a text that is longer than the model's context.
        """
        texts = self._aligned(tokens, columns)
        return self._similarity(self._read(texts), columns) * _how_likely_not_empty(texts)

    def hard_decoded(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Cosines for the decoded texts, by the model's own forward on its own tokenizer's ids.

        Raises:
            ValueError: references are missing, malformed or too long, no `prompt` column where it is read, or a text
                that is longer than the model's context.
        """
        rows = self._framed(self._decoded(ids, mask, columns))
        similarity = self._similarity(self._read_rows(rows, ids.device), columns)
        return similarity * torch.tensor([bool(row) for row in rows], device=ids.device)

    def _similarity(self, embeddings: Float[Tensor, "N D"], columns: dict[str, Any]) -> Float[Tensor, "N"]:
        """The highest cosine of each embedding and those of its row's references."""
        rows = self._references(columns, len(embeddings))
        texts = list(dict.fromkeys(text for row in rows for text in row))  # samples of a prompt have the same
        with torch.no_grad():
            references = self._read_rows(self._framed(texts), embeddings.device)
        cosines = F.normalize(embeddings, dim=-1) @ F.normalize(references, dim=-1).T.to(embeddings.dtype)
        others = torch.tensor([[text not in row for text in texts] for row in rows], device=cosines.device)
        return cosines.masked_fill(others, -torch.inf).amax(-1)

    def _references(self, columns: dict[str, Any], num_rows: int) -> list[list[str]]:
        """The references of every row."""
        if self.column not in columns:
            raise ValueError(
                f"reward {self.name!r} compares with references, and the data set has no column {self.column!r} (it "
                f"has {sorted(columns) or 'none'}); add it, texts or lists of texts, or name another one with column"
            )
        rows = columns[self.column]
        if len(rows) != num_rows:
            raise ValueError(
                f"reward {self.name!r} got {len(rows)} rows of references for {num_rows} completions; give each one"
            )
        return [self._checked(row, index) for index, row in enumerate(rows)]

    def _checked(self, row: Any, index: int) -> list[str]:
        """The references of one row."""
        where = f"reward {self.name!r}: row {index} of the column {self.column!r}"
        texts = [row] if isinstance(row, str) else row
        if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
            lengths = [len(ids) for ids in self.reward_tokenizer(list(texts), add_special_tokens=False).input_ids]
        else:
            lengths = [0]
        if not all(lengths):
            raise ValueError(
                f"{where} is {repr(row)[:60]} ({type(row).__name__}); give a text of at least one token, or a list of "
                "at least one such text"
            )
        longest = max(lengths) + len(self._before) + len(self._after)
        if self._max_length is not None and longest > self._max_length:
            raise ValueError(
                f"{where} has {longest} pieces, special tokens included, and the model reads {self._max_length}; "
                "shorten the text"
            )
        return list(texts)

    def _read(self, texts: AlignedTexts) -> Float[Tensor, "N C"]:
        ones = [texts.written.new_ones(length) for length in (*texts.front_lengths, texts.num_behind)]
        present = texts.spread(ones[:-1], texts.written, ones[-1])
        missing = int(present.shape[1] == 0)  # all are empty: networks take no texts without a place
        return self.network.read(
            F.pad(texts.embeds, (0, 0, 0, missing)),
            F.pad(texts.log_presence, (0, missing), value=-torch.inf),
            F.pad(present, (0, missing)),
            F.pad(texts.positions, (0, missing), value=self._first_position),
        )

    def _read_ids(self, ids: Int[Tensor, "N S"], mask: Int[Tensor, "N S"]) -> Float[Tensor, "N C"]:
        return _mean(self.network.model(ids, attention_mask=mask).last_hidden_state, mask)


def load_encoder(name_or_path: str | Path, **model_kwargs: Any) -> nn.Module:
    """An encoder of transformers by hub name or local folder; its pooler, which is not used, may be untrained.

    Raises:
        ValueError: it cannot be loaded, or lacks weights.
    """
    try:
        model, loading = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **model_kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name_or_path)!r} cannot be loaded as an encoder ({str(error).splitlines()[0]}); pass a hub name or "
            "a local folder of one"
        ) from error
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"{str(name_or_path)!r} is no trained encoder: its weights lack {missing[:3]}; pass a sentence encoder "
            "such as 'minilm-l6'"
        )
    return model


def _how_likely_not_empty(texts: AlignedTexts) -> Float[Tensor, "N"]:
    """1 for texts with special tokens or a prompt, else the probability that a slot is present."""
    some = last_present(texts.written, texts.inside).sum(-1)
    certain = [length + texts.num_behind > 0 for length in texts.front_lengths]
    return torch.where(torch.tensor(certain, device=some.device), torch.ones_like(some), some)


def _mean(states: Float[Tensor, "N S D"], weights: Num[Tensor, "N S"]) -> Float[Tensor, "N D"]:
    """`Σ_s w_s h_s / Σ_s w_s`, in float32 at least; 0 where all weights are."""
    precise = torch.promote_types(states.dtype, torch.float32)
    weights = weights.to(precise)
    total = weights.sum(-1, keepdim=True).clamp(min=_FLOOR)
    return torch.einsum("ns,nsd->nd", weights / total, states.to(precise))
