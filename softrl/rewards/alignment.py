"""From the policy's tokens to the tokens of a reward model with another vocabulary.

Every policy token has a text, and the reward model's tokenizer cuts that text into pieces of its own: none, one or
several. A soft token of the policy becomes as many slots as its candidates have pieces; a slot holds the mixture of
the candidates' pieces at that place and is present as much as candidates reach so far. At one-hot tokens the slots are
the pieces of the tokens, one after another.

WordPiece cuts a text otherwise inside a word than at the beginning of one, so there are two maps, and a candidate
takes the one for inside with the probability that the token in front of it ends in a letter or a digit.

What such maps cannot see: tokenizers that merge across the policy's token borders cut the whole text otherwise.
`AlignedReward` reports how much that matters, by scoring the decoded text as well.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.types import SoftTokens

_MAX_PIECES = 8
_FLOOR = 1e-6  # of a divisor: a slot that is hardly present is hardly read either
_REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no whole character


@dataclass(frozen=True)
class Coverage:
    """How the policy's tokens that are not special were aligned, as shares of their number; they add up to 1."""

    one_piece: float
    several_pieces: float
    no_text: float  # white space that the reward model's tokenizer drops
    unknown: float  # parts of characters, or what becomes the unknown token or more than 8 pieces

    @property
    def total(self) -> float:
        """The share that keeps its whole text."""
        return 1.0 - self.unknown

    def __str__(self) -> str:
        return (
            f"{self.total:.1%} of the policy's tokens keep their text ({self.one_piece:.1%} as one piece, "
            f"{self.several_pieces:.1%} as several, {self.no_text:.1%} are white space that is dropped), "
            f"{self.unknown:.1%} do not"
        )


@dataclass(frozen=True)
class Alignment:
    """Pieces of every policy token, in the reward model's ids; padded with 0 behind `lengths`.

    Row 0 is for tokens at the beginning of a word, or of a text, row 1 for those behind a token that `ends_in_word`.
    Where the reward model's tokenizer makes no difference there is row 0 alone.
    """

    pieces: Int[Tensor, "maps V M"]
    lengths: Int[Tensor, "maps V"]
    ends_in_word: Bool[Tensor, "V"]
    coverage: Coverage

    def to(self, device: torch.device) -> "Alignment":
        """The same maps on a device."""
        tensors = (self.pieces.to(device), self.lengths.to(device), self.ends_in_word.to(device))
        return Alignment(*tensors, self.coverage)


@dataclass(frozen=True)
class Slots:
    """N completions in the reward model's pieces. Slots that no text of the batch can reach are left out.

    `weights` of a slot sum to one where it may be present, `presence` says how much it is (survival left out), `step`
    which of the T tokens it belongs to, and `position` its place in the text of the most probable candidates.
    """

    ids: Int[Tensor, "N L K"]
    weights: Float[Tensor, "N L K"]
    presence: Float[Tensor, "N L"]
    step: Int[Tensor, "L"]
    position: Int[Tensor, "N L"]
    lengths: Int[Tensor, "N"]  # pieces of the most probable candidates


def align(
    policy_tokenizer: PreTrainedTokenizerBase, reward_tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Alignment:
    """The pieces of each of the policy's `vocab_size` tokens.

    Special tokens of the policy have none, nor have ids that its tokenizer does not know. A token without a
    counterpart becomes the reward model's unknown token, or nothing if it has no such token.

    Raises:
        ValueError: a tokenizer without a fast backend, whose model cannot be seen.
    """
    backend: Any = getattr(reward_tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"the reward model's tokenizer ({type(reward_tokenizer).__name__}) has no fast backend, which alignment "
            "reads; load it with use_fast=True, or convert it"
        )
    texts = token_texts(policy_tokenizer, vocab_size)
    known = {index: text for index, text in enumerate(texts) if text}
    if type(backend.model).__name__ == "WordPiece":
        vocabulary = backend.get_vocab()
        maps = [[_word_pieces(backend, vocabulary, t, inside) for t in known.values()] for inside in (False, True)]
    else:
        names = [str(policy_tokenizer.convert_ids_to_tokens(index)) for index in known]
        maps = [_pieces(reward_tokenizer, names, [*known.values()])]
    unknown_id = reward_tokenizer.unk_token_id
    lost = [
        _REPLACEMENT in text or any(unknown_id in ids or len(ids) > _MAX_PIECES for ids in cuts)
        for text, *cuts in zip(known.values(), *maps, strict=True)
    ]
    replacement = [] if unknown_id is None else [unknown_id]
    maps = [[replacement if gone else ids for gone, ids in zip(lost, cuts, strict=True)] for cuts in maps]
    lengths = torch.zeros(len(maps), vocab_size, dtype=torch.long)
    pieces = torch.zeros(len(maps), vocab_size, _MAX_PIECES, dtype=torch.long)
    indices = torch.tensor([*known], dtype=torch.long)
    for row, cuts in enumerate(maps):
        lengths[row, indices] = torch.tensor([len(ids) for ids in cuts])
        pieces[row, indices] = torch.tensor([ids + [0] * (_MAX_PIECES - len(ids)) for ids in cuts])
    ends = torch.tensor([text is not None and text[-1:].isalnum() for text in texts])
    width = max(1, int(lengths.max()))
    return Alignment(pieces[..., :width], lengths, ends, _coverage(maps[0], lost))


def _coverage(cuts: list[list[int]], lost: list[bool]) -> Coverage:
    counts = Counter("unknown" if gone else min(len(ids), 2) for ids, gone in zip(cuts, lost, strict=True))
    one, several, none, unknown = (counts[key] / max(1, len(cuts)) for key in (1, 2, 0, "unknown"))
    return Coverage(one, several, none, unknown)


def token_texts(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str | None]:
    """What each token adds to a text, its leading space included; None for special and undefined ids.

    Decoded behind another token: some decoders strip the space at the beginning of a text.
    """
    special = set(tokenizer.all_special_ids)
    ids = [index for index in range(min(vocab_size, len(tokenizer))) if index not in special]
    anchor, before = some_word(tokenizer)
    decoded: Any = tokenizer.batch_decode([[anchor, index] for index in ids], clean_up_tokenization_spaces=False)
    texts: list[str | None] = [None] * vocab_size
    for index, text in zip(ids, decoded, strict=True):
        texts[index] = text[len(before) :] if text.startswith(before) else _REPLACEMENT
    return texts


def some_word(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """A token that is a letter, a number or a word of them, and its text.

    Raises:
        ValueError: there is none.
    """
    for index in range(len(tokenizer)):
        text: Any = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        if index not in tokenizer.all_special_ids and text.isalnum():
            return index, text
    raise ValueError(f"tokenizer {type(tokenizer).__name__} has no token of letters or digits")


def _pieces(tokenizer: PreTrainedTokenizerBase, names: list[str], texts: list[str]) -> list[list[int]]:
    """Pieces of texts that stand inside a longer one; `names` is what the policy's tokenizer calls them."""
    vocabulary = tokenizer.get_vocab()
    # Both call some pieces the same, markers of spaces included; the others are cut.
    others: dict[str, list[int]] = {t: [] for name, t in zip(names, texts, strict=True) if name not in vocabulary}
    if others:
        (anchor,) = _encoded(tokenizer, ["."])
        plain, anchored = (_encoded(tokenizer, [front + text for text in others]) for front in ("", "."))
        for text, alone, behind in zip(others, plain, anchored, strict=True):
            # behind a full stop there is not the space that some tokenizers put before a text
            others[text] = behind[len(anchor) :] if behind[: len(anchor)] == anchor else alone
    return [
        [vocabulary[name]] if name in vocabulary else others[text] for name, text in zip(names, texts, strict=True)
    ]


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False).input_ids


def _word_pieces(backend: Any, vocabulary: dict[str, int], text: str, inside_word: bool) -> list[int]:
    """WordPiece of a text; inside a word, letters and digits without a space in front go on with it."""
    normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]
    ids: list[int] = []
    if inside_word and words and text[0].isalnum() and words[0][0].isalnum():
        continuing = _continuing(backend, vocabulary, words[0])
        if continuing is not None:
            ids, words = continuing, words[1:]
    return ids + [token.id for word in words for token in backend.model.tokenize(word)]


def _continuing(backend: Any, vocabulary: dict[str, int], word: str) -> list[int] | None:
    """The longest pieces first, all with the mark of continuation; None if a part has no piece."""
    mark, ids = backend.model.continuing_subword_prefix, []
    while word:
        size = next((size for size in range(len(word), 0, -1) if mark + word[:size] in vocabulary), None)
        if size is None:
            return None
        ids.append(vocabulary[mark + word[:size]])
        word = word[size:]
    return ids


def slots_of(tokens: SoftTokens, alignment: Alignment, behind_word: Bool[Tensor, "N"]) -> Slots:
    """The slots of soft tokens, differentiable in their weights.

    Slot m of a step holds the m-th piece of every candidate that has one: with `n_k` the number of candidate k's
    pieces, `presence = Σ_{k: n_k > m} q_k`, and weights `q_k / presence` on those candidates. With two maps every
    candidate stands there twice, inside a word and at the beginning of one.

    Args:
        tokens: N completions.
        alignment: of the policy's vocabulary.
        behind_word: whether what stands in front of each completion ends in a letter or a digit.
    """
    precise = torch.promote_types(tokens.weights.dtype, torch.float32)
    ids, weights, rows = _by_map(tokens, tokens.weights.to(precise), alignment, behind_word)
    counts = alignment.lengths[rows, ids].masked_fill(~tokens.mask[..., None], 0)
    chosen = counts.gather(-1, weights.detach().argmax(-1, keepdim=True)).squeeze(-1)
    chosen = chosen * (tokens.survival.detach() > 0.5)  # a text that has probably ended goes no further
    starts = chosen.cumsum(-1) - chosen
    reach = (counts * (weights.detach() > 0)).transpose(0, 1).flatten(1).amax(1).tolist()  # slots of each step
    places = [(step, place) for step, most in enumerate(reach) for place in range(most)]
    step = torch.tensor([step for step, _ in places], dtype=torch.long, device=ids.device)
    place = torch.tensor([place for _, place in places], dtype=torch.long, device=ids.device)

    reached = counts[:, step] > place[:, None]  # [N, L, candidates]
    held = weights[:, step] * reached
    presence = held.sum(-1)
    # Where nothing is present there is nothing to divide: a tiny divisor would make a huge gradient of nothing.
    divisor = torch.where(presence > 0, presence, torch.ones_like(presence)).clamp(min=_FLOOR)
    return Slots(
        alignment.pieces[rows.expand_as(ids)[:, step], ids[:, step], place[:, None].expand_as(reached)],
        held / divisor[..., None],
        presence,
        step,
        starts[:, step] + place,
        chosen.sum(-1),
    )


def _by_map(
    tokens: SoftTokens, weights: Float[Tensor, "N T K"], alignment: Alignment, behind_word: Bool[Tensor, "N"]
) -> tuple[Int[Tensor, "N T candidates"], Float[Tensor, "N T candidates"], Int[Tensor, "candidates"]]:
    """Candidates, their weights, and the row of the alignment that each is read by."""
    ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
    num_kept = ids.shape[-1]
    if len(alignment.lengths) == 1:
        return ids, weights, torch.zeros(num_kept, dtype=torch.long, device=ids.device)
    ends = (weights * alignment.ends_in_word[ids]).sum(-1)
    inside = torch.cat([behind_word[:, None].to(ends), ends[:, :-1]], 1)[..., None]
    rows = torch.arange(2, device=ids.device).repeat_interleave(num_kept)
    return torch.cat([ids, ids], -1), torch.cat([weights * (1.0 - inside), weights * inside], -1), rows


def pieces_of(ids: Iterable[int], alignment: Alignment, behind_word: bool = False) -> list[int]:
    """The pieces of a text's tokens, one after another."""
    found: list[int] = []
    for index in ids:
        row = int(behind_word and len(alignment.lengths) == 2)
        found += alignment.pieces[row, index, : alignment.lengths[row, index]].tolist()
        behind_word = bool(alignment.ends_in_word[index])
    return found


def last_present(presence: Float[Tensor, "N L"], inside: Bool[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """The probability that each slot is the last one that is present, were they independent: `p_l Π_{j>l} (1 − p_j)`.

    At one-hot tokens it is one on the last piece. Where nothing is present all are zero.
    """
    present = presence * inside
    none_behind = (1.0 - present).flip(-1).cumprod(-1).flip(-1)
    return present * torch.cat([none_behind[:, 1:], torch.ones_like(present[:, :1])], -1)
