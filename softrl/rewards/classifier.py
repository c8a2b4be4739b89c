"""A sequence classifier of transformers, made to read soft tokens.

Its own forward pools the wrong position when it is given embeddings, and knows of no survival; so a classifier that
pools the last token is taken apart here: base model, pooling, head. The others (BERT and its kin pool the first token)
are called as they are. What a model cannot do is found by trying, not by its name: `check_reading` compares with its
own forward on token ids, `check_bias` a biased attention mask with an ordinary one.
Left out: encoder-decoder classifiers.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softrl.models.policy import unwrap
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.sequences import Pooling, attention_bias, mixtures, packed, pooling_weights
from softrl.types import SoftTokens

_AS_GOOD_AS_HIDDEN = -30.0  # nats of attention
_SHORT_TEXT_LENGTH = 6


class SoftClassifier(nn.Module):
    """Logits of texts whose completions are soft.

    A soft token enters as the mixture of the model's own embeddings. With soft stopping the attention on it is biased
    by `log s_t`, and the pooled state is weighted by survival.

    Args:
        model: an `AutoModelForSequenceClassification`, or a PEFT model around one; frozen and put into evaluation
            mode, in place.
        name: what errors call it.
    Raises:
        TypeError: the model cannot be fed with embeddings, or does not score them as it scores token ids.
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
        self.pools_last = isinstance(getattr(self.model, "score", None), nn.Module)
        self._accepted = frozenset(inspect.signature(self._reader.forward).parameters)
        self._bias_checked_length = 0
        if self.model.config.is_encoder_decoder or "inputs_embeds" not in self._accepted:
            raise TypeError(
                f"{self._described} cannot read soft tokens, which are fed as inputs_embeds to one network; use a "
                "decoder or an encoder of transformers (Llama, Qwen, GPT-2, BERT, ...)"
            )
        self.check_reading()

    @property
    def _reader(self) -> Any:
        """What is called with embeddings: the base model, where pooling is ours, else the whole classifier."""
        return self.model.base_model if self.pools_last else self.model

    @property
    def _described(self) -> str:
        return f"reward {self.name!r} ({type(self.model).__name__})"

    def train(self, mode: bool = True) -> "SoftClassifier":
        """Stays in evaluation mode: dropout would make another reward of it at every call."""
        return super().train(False)

    def forward(
        self, tokens: SoftTokens, prompts: list[Int[Tensor, "_"]], pooling: Pooling = "last"
    ) -> Float[Tensor, "N C"]:
        """Logits, in float32 at least.

        Args:
            tokens: N completions.
            prompts: token ids in front of each; may be empty.
            pooling: for classifiers that pool the last token.
        Raises:
            ValueError: an empty text, one longer than the model's context, ids outside its vocabulary, or soft
                stopping with a model whose attention takes no bias.
        """
        lengths = [len(prompt) for prompt in prompts]
        ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
        self._check_texts(ids, tokens.mask, prompts)
        mixed = mixtures(self.model.get_input_embeddings(), ids, tokens.weights)
        embeds = packed(self.embedded(prompts), mixed, 0.0)
        certain = [tokens.weights.new_zeros(length) for length in lengths]
        log_survival = packed(certain, tokens.log_survival, -torch.inf)
        pooled = pooling_weights(tokens, lengths, pooling, self.config.pad_token_id)
        if tokens.eos_ids:
            return self.read(embeds, log_survival, pooled)
        return self._logits(embeds, (~torch.isneginf(log_survival)).long(), pooled)

    def read(
        self,
        embeds: Float[Tensor, "N S D"],
        log_presence: Float[Tensor, "N S"],
        pooled: Float[Tensor, "N S"],
        positions: Int[Tensor, "N S"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """Logits of packed texts whose tokens are present to a degree, in float32 at least.

        Args:
            embeds: of the tokens.
            log_presence: nats, added on the attention to each of them; −inf where there is none.
            pooled: what each counts in the pooled state, for classifiers that pool the last token.
            positions: in the text, where they are not 0, 1, 2, ...
        Raises:
            ValueError: the model's attention takes no bias.
        """
        self.check_bias(embeds.shape[1])
        return self._logits(embeds, attention_bias(log_presence, self.pools_last, embeds.dtype), pooled, positions)

    def embedded(self, rows: list[Int[Tensor, "_"]]) -> list[Float[Tensor, "_ D"]]:
        """Embeddings of token ids."""
        return list(self.model.get_input_embeddings()(torch.cat(rows)).split([len(row) for row in rows]))

    @property
    def takes_positions(self) -> bool:
        """Whether what is called with embeddings takes position ids too."""
        return "position_ids" in self._accepted

    def _logits(
        self,
        embeds: Float[Tensor, "N S D"],
        attention: Tensor,
        weights: Float[Tensor, "N S"],
        positions: Int[Tensor, "N S"] | None = None,
    ) -> Float[Tensor, "N C"]:
        """Logits of packed texts; the pooling weights are for classifiers that pool the last token."""
        arguments: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": attention}
        if not self.pools_last:
            logits = self.model(**arguments, **({} if positions is None else {"position_ids": positions})).logits
        else:
            in_order = torch.arange(embeds.shape[1], device=embeds.device)[None]
            arguments |= {"use_cache": False, "position_ids": in_order if positions is None else positions}
            output = self._reader(**{key: value for key, value in arguments.items() if key in self._accepted})
            hidden = output.last_hidden_state
            precise = torch.promote_types(hidden.dtype, torch.float32)
            pooled = torch.einsum("ns,nsd->nd", weights.to(precise), hidden.to(precise))
            logits = self.model.score(pooled.to(hidden.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _check_texts(self, ids: Int[Tensor, "N T K"], mask: Tensor, prompts: list[Int[Tensor, "_"]]) -> None:
        """Raise a ValueError for texts that the model cannot read."""
        for found in (ids.flatten(), torch.cat(prompts)):
            outside = found[(found < 0) | (found >= self.vocab_size)]
            if outside.numel():
                raise ValueError(
                    f"token id {int(outside[0])} is outside the {self.vocab_size} ids of {self._described}: the "
                    "vocabularies of policy and reward differ; the reward needs the policy's tokenizer"
                )
        lengths = mask.sum(-1) + mask.new_tensor([len(prompt) for prompt in prompts], dtype=torch.long)
        if not lengths.all():
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(f"{self._described} got an empty text: sequence {row} has neither a prompt nor a token")
        longest = mask.shape[1] + max(map(len, prompts))
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and 0 < limit < longest:  # XLNet says -1
            raise ValueError(
                f"prompts and completions of up to {longest} tokens exceed the context of {limit} of "
                f"{self._described}; shorten them, or leave the prompts out (include_prompt=False)"
            )

    @torch.no_grad()
    def check_reading(self) -> None:
        """Compare with the model's own forward on token ids, a text at a time.

        Raises:
            TypeError: the logits differ, for one of padding, pooling or embeddings.
        """
        some = [token_id for token_id in range(8) if token_id != self.config.pad_token_id][:4]
        texts = torch.tensor([some[start:] + some[:start] for start in range(4)], device=self.model.device)
        lengths = [4, 3, 2, 1]  # by chance alone, wrong pooling would not pass four times
        mask = torch.arange(4, device=texts.device) < texts.new_tensor(lengths)[:, None]
        with self._own_precision():
            ours = self(one_hot_tokens(texts, mask), [texts.new_zeros(0)] * 4)
            alone = [self.model(input_ids=text[None, :length]) for text, length in zip(texts, lengths, strict=True)]
        theirs = torch.cat([output.logits for output in alone]).to(ours.dtype)
        if not self._close(ours, theirs):
            raise TypeError(
                f"{self._described} scores embeddings behind padding otherwise than token ids alone "
                f"({ours.tolist()} and {theirs.tolist()}); softrl reads classifiers that pool the last token under a "
                "head called `score`, or the first one, and that honour attention masks. Please report it"
            )

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
        """Logits of a text with its second, a middle and its last token but one hidden by bias, and by mask."""
        ids = (torch.arange(length, device=self.model.device) * 3 + 1) % self.vocab_size
        embeds = self.model.get_input_embeddings()(ids).expand(3, length, -1)
        hole = torch.zeros(3, length, dtype=torch.bool, device=ids.device)
        hole[[0, 1, 2], [1, length // 2, length - 2]] = True
        last = torch.zeros(3, length, device=ids.device)
        last[:, -1] = 1.0
        bias = attention_bias(_AS_GOOD_AS_HIDDEN * hole.float(), self.pools_last, embeds.dtype)
        return self._logits(embeds, bias, last), self._logits(embeds, (~hole).long(), last)

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
