"""Tokens as people can see them: spaces, line ends, controls and halves of characters are shown, nothing is lost.

Tokenizers hold a token as bytes (GPT-2's alphabet for them), as a piece with a mark for the space, or as a word. The
first two are read byte by byte, so that a character that several tokens spell is shown where it is complete, and the
bytes before that as such. Left out: escaping for HTML, which the template does.
"""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import cast

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")  # categories of characters that leave no mark
_SPACE_OF_BYTES, _SPACE_OF_PIECES = "Ġ", "▁"


class TokenTexts:
    """A tokenizer's tokens as text.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)

    def is_special(self, token: int) -> bool:
        """Whether it is a sign of the model's, such as the end of the text, and no text."""
        return token in self._special

    def label(self, token: int) -> str:
        """A token by itself, on one line: `␣the`, `↵`, `\\xE2\\x80`; `⟨id 7⟩` for an id that the tokenizer lacks."""
        data = self._bytes(token)
        if data is None:
            text = self._decode([token])
            return visible(text) if text else f"⟨id {token}⟩"
        return visible(data.decode("utf-8", "surrogateescape")) or "⟨empty⟩"

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """What every token adds to a text, its spaces and line ends kept.

        A character of several tokens stands at its last; the tokens before are shown as the bytes that they are.
        """
        if self._space is None:
            return [visible(text, inline=True) for text in self._added(tokens)]
        data = [self._bytes(token) or b"" for token in tokens]
        ends, found, at = list(accumulate(map(len, data))), [""] * len(data), 0
        for character in b"".join(data).decode("utf-8", "surrogateescape"):
            at += len(character.encode("utf-8", "surrogateescape"))
            found[bisect_left(ends, at)] += character
        return [
            visible(text, inline=True) or _as_bytes(piece) or self.label(token)
            for text, piece, token in zip(found, data, tokens, strict=True)
        ]

    def _added(self, tokens: Sequence[int]) -> list[str]:
        """What decoding gains with every token, for tokenizers that put spaces between words."""
        added, before = [], ""
        for count in range(1, len(tokens) + 1):
            text = self._decode(list(tokens[:count]))
            added.append(text[len(before) :] if text.startswith(before) else self._decode([tokens[count - 1]]))
            before = text
        return [text or f"⟨id {token}⟩" for text, token in zip(added, tokens, strict=True)]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _bytes(self, token: int) -> bytes | None:
        """The bytes of a token; None where the tokenizer has words, or no such token."""
        piece = cast("str | None", self.tokenizer.convert_ids_to_tokens(token))
        if piece is None or self._space is None:
            return None
        if token in self._special:
            return piece.encode()
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        if self._space == _SPACE_OF_BYTES and all(character in _BYTES_OF for character in piece):
            return bytes(_BYTES_OF[character] for character in piece)
        return piece.replace(_SPACE_OF_PIECES, " ").encode()

    @cached_property
    def _space(self) -> str | None:
        """The mark of a space in the vocabulary; None for a tokenizer of words or characters."""
        firsts = {piece[:1] for piece in self.tokenizer.get_vocab()}
        return next((mark for mark in (_SPACE_OF_BYTES, _SPACE_OF_PIECES) if mark in firsts), None)


def visible(text: str, inline: bool = False) -> str:
    """A text with everything in it seen.

    Args:
        text: lone surrogates U+DC80 to U+DCFF stand for bytes that are no character ("surrogateescape").
        inline: within a longer text: spaces stay, and a line end ends the line behind its sign.
    """
    return "".join(_visible_character(character, at == 0, inline) for at, character in enumerate(text))


def _visible_character(character: str, is_first: bool, inline: bool) -> str:
    if character in "\n\t ":
        sign = {"\n": "↵", "\t": "⇥", " ": "" if inline else "␣"}[character]
        return sign + (character if inline else "")
    if "\udc80" <= character <= "\udcff":
        return _as_bytes(bytes([ord(character) - 0xDC00]))
    category = unicodedata.category(character)
    if category in _HIDDEN:
        return f"⟨U+{ord(character):04X}⟩"
    return f"◌{character}" if is_first and category.startswith("M") else character


def _as_bytes(data: bytes) -> str:
    return "".join(f"\\x{byte:02X}" for byte in data)


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones of Latin-1 stand for themselves, others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_BYTES_OF = _alphabet()
