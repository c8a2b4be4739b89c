"""A sequence classifier of transformers, made to read soft tokens.

Its own forward pools the wrong position when it is given embeddings, and knows of no survival; so a classifier that
pools the last token is taken apart here: base model, pooling, head. The others (BERT and its kin pool the first token)
are called as they are. What a model cannot do is found by trying, not by its name: `check_reading` compares with its
own forward on token ids, `SoftReader.check_bias` a biased attention mask with an ordinary one.
Left out: encoder-decoder classifiers.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softrl.rewards.base import one_hot_tokens
from softrl.rewards.sequences import Pooling, mixtures, packed, pooling_weights
from softrl.rewards.soft_reader import SoftReader
from softrl.types import SoftTokens


class SoftClassifier(SoftReader):
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
        super().__init__(model, name)
        self.check_reading()

    @property
    def pools_last(self) -> bool:
        """Whether it is one of those that pool the last token, and are taken apart here."""
        return isinstance(getattr(self.model, "score", None), nn.Module)

    @property
    def causal(self) -> bool:
        """Decoders pool the last token, and nothing else does."""
        return self.pools_last

    @property
    def _network(self) -> Any:
        """The base model, where pooling is ours, else the whole classifier."""
        return self.model.base_model if self.pools_last else self.model

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
        return self._outputs(embeds, (~torch.isneginf(log_survival)).long(), pooled)

    def _outputs(
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
            output = self._network(**{key: value for key, value in arguments.items() if key in self._accepted})
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
