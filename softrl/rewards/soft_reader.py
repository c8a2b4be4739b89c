"""A frozen network of transformers that reads embeddings of tokens that are present to a degree.

Presence is told by an additive attention mask. Whether a network honours one is found by trying, not by its name:
`check_bias` compares a biased mask with an ordinary one. What becomes of the hidden states is up to those who inherit:
logits in `classifier.py`, a sentence embedding in `similarity.py`.
Left out: encoder-decoders.
"""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softrl.models.virtual_tokens import unwrap
from softrl.rewards.sequences import attention_bias

_AS_GOOD_AS_HIDDEN = -30.0  # nats of attention
_SHORT_TEXT_LENGTH = 6


class SoftReader(nn.Module, ABC):
    """C numbers of each packed text whose tokens are present to a degree.

    Args:
        model: of transformers, or a PEFT model around one; frozen and put into evaluation mode, in place.
        name: what errors call it.
    Raises:
        TypeError: the model cannot be fed with embeddings.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        # Any: to a type checker every attribute of an nn.Module is a Tensor or a Module.
        self.model: Any = unwrap(model)
        self.model.requires_grad_(False)
        self.eval()
        self.name = name
        self.config: Any = self.model.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        self._accepted = frozenset(inspect.signature(self._network.forward).parameters)
        self._bias_checked_length = 0
        if self.model.config.is_encoder_decoder or "inputs_embeds" not in self._accepted:
            raise TypeError(
                f"{self._described} cannot read soft tokens, which are fed as inputs_embeds to one network; use a "
                "decoder or an encoder of transformers (Llama, Qwen, GPT-2, BERT, ...)"
            )

    @abstractmethod
    def _outputs(
        self,
        embeds: Float[Tensor, "N S D"],
        attention: Tensor,
        weights: Float[Tensor, "N S"],
        positions: Int[Tensor, "N S"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """What is read of packed texts, in float32 at least; `weights` is what each token counts where it pools."""

    @property
    def causal(self) -> bool:
        """Whether its attention hides from every token what comes after it."""
        return False

    @property
    def _network(self) -> Any:
        """What is called with embeddings."""
        return self.model

    @property
    def _described(self) -> str:
        return f"reward {self.name!r} ({type(self.model).__name__})"

    def train(self, mode: bool = True) -> "SoftReader":
        """Stays in evaluation mode: dropout would make another reward of it at every call."""
        return super().train(False)

    def read(
        self,
        embeds: Float[Tensor, "N S D"],
        log_presence: Float[Tensor, "N S"],
        pooled: Float[Tensor, "N S"],
        positions: Int[Tensor, "N S"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """What is read of packed texts whose tokens are present to a degree, in float32 at least.

        Args:
            embeds: of the tokens.
            log_presence: nats, added on the attention to each of them; −inf where there is none.
            pooled: what each counts in the pooled state; classifiers that pool the first token ignore it.
            positions: in the text, where they are not 0, 1, 2, ...
        Raises:
            ValueError: the model's attention takes no bias.
        """
        self.check_bias(embeds.shape[1])
        return self._outputs(embeds, attention_bias(log_presence, self.causal, embeds.dtype), pooled, positions)

    def embedded(self, rows: list[Int[Tensor, "_"]]) -> list[Float[Tensor, "_ D"]]:
        """Embeddings of token ids."""
        return list(self.model.get_input_embeddings()(torch.cat(rows)).split([len(row) for row in rows]))

    @property
    def takes_positions(self) -> bool:
        """Whether what is called with embeddings takes position ids too."""
        return "position_ids" in self._accepted

    @torch.no_grad()
    def check_bias(self, length: int) -> None:
        """Try on texts of up to that length whether a strong negative attention bias hides a token as a mask does.

        A short text shows whether the bias is read at all, a long one whether a sliding window is lost with it.

        Raises:
            ValueError: it does not; soft stopping cannot be told to this model.
        """
        if length <= self._bias_checked_length:
            return
        for tried in (_SHORT_TEXT_LENGTH, max(length, _SHORT_TEXT_LENGTH)):
            try:
                with self._own_precision():
                    biased, masked = self._biased_and_masked(tried)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(self._no_bias(tried)) from error
            if not self._close(biased, masked):
                raise ValueError(self._no_bias(tried))
        self._bias_checked_length = length

    def _biased_and_masked(self, length: int) -> tuple[Float[Tensor, "3 C"], Float[Tensor, "3 C"]]:
        """What is read of a text with its second, a middle and its last token but one hidden by bias, and by mask."""
        ids = (torch.arange(length, device=self.model.device) * 3 + 1) % self.vocab_size
        embeds = self.model.get_input_embeddings()(ids).expand(3, length, -1)
        hole = torch.zeros(3, length, dtype=torch.bool, device=ids.device)
        hole[[0, 1, 2], [1, length // 2, length - 2]] = True
        last = torch.zeros(3, length, device=ids.device)
        last[:, -1] = 1.0
        bias = attention_bias(_AS_GOOD_AS_HIDDEN * hole.float(), self.causal, embeds.dtype)
        return self._outputs(embeds, bias, last), self._outputs(embeds, (~hole).long(), last)

    def _no_bias(self, length: int) -> str:
        return (
            f"{self._described} cannot be told of soft stopping: it does not take an additive attention mask on a "
            f"text of {length} tokens (other attention than eager or sdpa, a sliding window shorter than the text, "
            "ALiBi or recurrent layers); load it with attn_implementation='sdpa' or 'eager', or use hard stopping "
            "(soft_stopping=False)"
        )

    def _own_precision(self) -> torch.autocast:
        """The checks must not take an autocast's rounding for a difference."""
        return torch.autocast(self.model.device.type, enabled=False)

    def _close(self, ours: Float[Tensor, "M C"], theirs: Float[Tensor, "M C"]) -> bool:
        """Up to rounding, which a score near zero may feel: other pooling or other masks differ by far more."""
        precise = self.model.dtype in (torch.float32, torch.float64)
        return bool((ours - theirs).norm() <= (1e-2 if precise else 1e-1) * theirs.norm())
