"""Where a text begins and ends to think: delimiters among its tokens, and what each row does next.

Delimiters of several tokens are found as text where a tokenizer is at hand, since the model may cut `</think>` in
another way than the tokenizer does, and join its last character with what follows.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from softrl.generation.soft_settings import SoftDecoding
from softrl.types import Prompts

# Which rows of token ids (N, S) end now; of transformers' criteria the second argument, scores, is not used.
Stop = Callable[[Tensor, Any], Any]


class Delimiter:
    """Token ids that open or close the thinking.

    Args:
        ids: one or more.
        tokenizer: several ids are then found as the text that they stand for.
    """

    def __init__(self, ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase | None = None):
        self.ids = ids
        self.tokenizer = tokenizer if len(ids) > 1 else None
        if self.tokenizer is not None:
            self.text = self._decoded(list(ids))
            try:
                self.criterion = StopStringCriteria(self.tokenizer, [self.text])
            except ValueError:  # a vocabulary of whole words, of which transformers cannot say what their pieces spell
                self.tokenizer = None

    def _decoded(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def completed(self, tokens: Int[Tensor, "N S"]) -> Bool[Tensor, "N"]:
        """Whether the last token of each row completes the delimiter."""
        if self.tokenizer is not None:
            return self.criterion(tokens, None)
        wanted = torch.tensor(self.ids, device=tokens.device)
        if tokens.shape[1] < len(wanted):
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        return (tokens[:, -len(wanted) :] == wanted).all(-1)

    def last_in(self, ids: list[int]) -> int:
        """Where the delimiter begins for the last time, in tokens or in characters; -1 where it does not occur."""
        if self.tokenizer is not None:
            return self._decoded(ids).rfind(self.text)
        starts = range(len(ids) - len(self.ids), -1, -1)
        return next((at for at in starts if tuple(ids[at : at + len(self.ids)]) == self.ids), -1)


class Turns:
    """Whether each row thinks, and what it has to be fed: one small state a row, moved on after every token."""

    def __init__(self, decoding: SoftDecoding, prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None):
        self.decoding = decoding
        num_rows = len(prompts.ids)
        self.spent = [0] * num_rows  # tokens of thinking
        self.cold = [0] * num_rows  # of them, the last in a row whose entropy was below the bound
        self.thinks = [True] * num_rows
        self.queue: list[list[int]] = [[] for _ in range(num_rows)]  # ids to be fed before anything is chosen
        self.start = self.end = None
        if not decoding.think_start:
            for row in range(num_rows):
                self._think(row)
            return
        self.start, self.end = (Delimiter(ids, tokenizer) for ids in (decoding.think_start, decoding.think_end))
        for row, (ids, mask) in enumerate(zip(prompts.ids, prompts.mask, strict=True)):
            real = ids[mask].tolist()
            is_open = self.start.last_in(real) > self.end.last_in(real)
            self.thinks[row] = False
            if is_open:
                self._think(row)
            elif decoding.force_thinking:
                self.thinks[row], self.queue[row] = True, list(decoding.think_start)

    def forced(self) -> list[int | None]:
        """The id that a row is fed next, whatever the policy says; None where the policy chooses."""
        return [queue[0] if queue else None for queue in self.queue]

    def closes(self, tokens: Int[Tensor, "N S"]) -> Bool[Tensor, "N"]:
        """Which rows have just completed the end of their thinking."""
        thinks = torch.tensor([t and not q for t, q in zip(self.thinks, self.queue, strict=True)])
        nothing = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        return nothing if self.end is None else self.end.completed(tokens) & thinks.to(tokens.device)

    def advance(self, tokens: Int[Tensor, "N S"], entropy_nats: list[float], closes: list[bool]) -> None:
        """Move on past the last token of each row.

        Args:
            tokens: everything so far, prompts included.
            entropy_nats: of the policy where that token was chosen.
            closes: what `closes` said of these tokens.
        """
        opens = [False] * len(entropy_nats) if self.start is None else self.start.completed(tokens).tolist()
        for row, spread in enumerate(entropy_nats):
            if self.queue[row]:
                self.queue[row] = self.queue[row][1:]
                if self.thinks[row] and not self.queue[row]:
                    self._think(row)
            elif self.thinks[row] and closes[row]:
                self.thinks[row] = False
            elif self.thinks[row]:
                bound = self.decoding.cold_stop_nats
                self.spent[row] += 1
                self.cold[row] = self.cold[row] + 1 if bound is not None and spread < bound else 0
                self._stop_if_due(row)
            elif opens[row]:
                self._think(row)

    def _think(self, row: int) -> None:
        self.thinks[row], self.cold[row] = True, 0
        self._stop_if_due(row)

    def _stop_if_due(self, row: int) -> None:
        limit = self.decoding.max_thinking_tokens
        spent = limit is not None and self.spent[row] >= limit
        cold = self.decoding.cold_stop_nats is not None and self.cold[row] >= self.decoding.cold_stop_steps
        if spent or cold:
            self.thinks[row], self.queue[row] = False, list(self.decoding.think_end)
