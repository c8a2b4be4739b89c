"""A reward for texts that a toxicity classifier finds harmless: a bidirectional LSTM over words, ported from Keras.

The classifier reads lower-case words, the policy writes tokens: `spelling.py` says which words they make. A word that
is present with probability s moves the LSTM's state by s: `h = s LSTM(x, h) + (1 − s) h`, so that an absent one is
skipped exactly, in both directions and in the pooling. The classifier also reads the padding, in front of the text up
to 100 words and without a mask; so does the port, where the number of pads is a soft number like all the others.

Left out: the prompt. A completion is scored alone, as for the toxicity of continuations (Gehman et al. 2020,
arXiv:2009.11462).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from softrl.assets import WordVocabulary, toxicity_classifier, toxicity_vocabulary
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.spelling import soft_words, spelling_of
from softrl.types import SoftTokens

Label = Literal["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
Link = Literal["probability", "log_probability", "logit"]

MAX_WORDS = 100  # `MAXLEN` of toxic-comment-classifier 0.3.0


class ToxicityClassifier(nn.Module):
    """The network of toxic-comment-classifier: embedding, bidirectional LSTM, maximum over time, two dense layers.

    Args:
        weights: arrays by the names of `softrl.assets.toxicity_classifier`; kernels are [inputs, outputs], the gates
            in Keras's order i, f, c, o.
        max_words: what texts are padded to on the left, and of which longer ones keep the end.
    """

    def __init__(self, weights: Mapping[str, Tensor], max_words: int = MAX_WORDS) -> None:
        super().__init__()
        self.max_words = max_words
        both = {
            name: torch.stack([weights[f"{direction}.{name}"] for direction in ("forward", "backward")])
            for name in ("kernel", "recurrent_kernel", "bias")
        }
        dense = {name: weights[name] for name in ("hidden.kernel", "hidden.bias", "output.kernel", "output.bias")}
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "_"): nn.Parameter(value, requires_grad=False)
                for name, value in {"embedding": weights["embedding"], **both, **dense}.items()
            }
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "ToxicityClassifier":
        """Load what `softrl.assets.toxicity_classifier` wrote."""
        return cls(load_file(folder / "model.safetensors"))

    def forward(self, words: Float[Tensor, "N L D"], presence: Float[Tensor, "N L"]) -> Float[Tensor, "N C"]:
        """Logits of texts.

        Args:
            words: embeddings in the order of the text.
            presence: in [0, 1].
        """
        with torch.autocast(words.device.type, enabled=False):  # a hundred steps of a recurrence need float32
            kept = presence * _between_0_and_1(self.max_words - _sum_behind(presence))
            pads = self.max_words - kept.sum(-1)
            count = int(pads.detach().amax().ceil()) if len(pads) else 0
            behind = torch.arange(count - 1, -1, -1, device=pads.device)  # pads between each and the text
            padding = self.weights["embedding"][0].to(words.dtype).expand(len(words), count, -1)
            pooled = self._pooled(
                torch.cat([padding, words], 1), torch.cat([_between_0_and_1(pads[:, None] - behind), kept], 1)
            )
            hidden = torch.relu(pooled @ self.weights["hidden_kernel"] + self.weights["hidden_bias"])
            return hidden @ self.weights["output_kernel"] + self.weights["output_bias"]

    def _pooled(self, inputs: Float[Tensor, "N S D"], presence: Float[Tensor, "N S"]) -> Float[Tensor, "N outputs"]:
        """The largest outputs over time, forward and backward, of the slots that are present.

        With presence s the maximum moves as the states do, `m = s max(m, h') + (1 − s) m` with the new output h'.
        """
        kernel, recurrent, bias = (self.weights[name] for name in ("kernel", "recurrent_kernel", "bias"))
        into = torch.einsum("nsd,adg->sang", inputs.to(kernel.dtype), kernel) + bias[:, None]
        into = torch.stack([into[:, 0], into[:, 1].flip(0)], 1)  # [S, direction, N, 4H]
        moves = torch.stack([presence, presence.flip(1)]).to(kernel.dtype).permute(2, 0, 1)[..., None]
        state = into.new_zeros(2, len(inputs), recurrent.shape[1])
        cell, largest = state, torch.full_like(state, -1.0)  # outputs are above -1
        for gates, move in zip(into, moves, strict=True):
            i, f, c, o = (gates + state @ recurrent).chunk(4, -1)
            new_cell = f.sigmoid() * cell + i.sigmoid() * c.tanh()
            new_state = o.sigmoid() * new_cell.tanh()
            largest = torch.lerp(largest, torch.maximum(largest, new_state), move)
            cell, state = torch.lerp(cell, new_cell, move), torch.lerp(state, new_state, move)
        return largest.transpose(0, 1).flatten(1)


class ToxicityReward(nn.Module):
    """`1 − P(label)` of a toxicity classifier over words.

    Three figures belong to a text: `soft`; `hard`, which is what `soft` becomes at one-hot tokens; and
    `hard_decoded`, the decoded text cut into words as the classifier's tokenizer cuts it. The last two differ where
    characters are spelt byte by byte, or where a special token stands inside a word. Trainers log the last one as
    `rewards/<name>_decoded`. The classifier reads the last 100 known words; unknown ones are dropped.

    Args:
        classifier: the network; frozen and put into evaluation mode, in place.
        vocabulary: its words.
        policy_tokenizer: the policy's.
        vocab_size: number of the policy's token ids; default: its tokenizer's.
        name: what logs call it.
        label: which of the classifier's six probabilities; the rarer ones (severe_toxic, threat, identity_hate) are
            low for nearly every text.
        link: "probability" `1 − P`, "log_probability" `log(1 − P)` in nats, or "logit" `log((1 − P) / P)` in nats,
            whose gradient does not vanish where the classifier is certain.
    Raises:
        ValueError: no such label or link.
    Source: toxic-comment-classifier 0.3.0 (MIT), trained on the comments of the Jigsaw challenge; the soft state is
        ours.
    """

    def __init__(
        self,
        classifier: ToxicityClassifier,
        vocabulary: WordVocabulary,
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int | None = None,
        name: str = "nontoxic",
        label: Label = "toxic",
        link: Link = "probability",
    ) -> None:
        super().__init__()
        if label not in get_args(Label):
            raise ValueError(f"label must be one of {get_args(Label)}, got {label!r}")
        if link not in get_args(Link):
            raise ValueError(f"link must be one of {get_args(Link)}, got {link!r}")
        self.name = name
        self.classifier = classifier.eval().requires_grad_(False)
        self.vocabulary = vocabulary
        self.policy_tokenizer = policy_tokenizer
        self.vocab_size: int | None = vocab_size or len(policy_tokenizer)
        self.index = get_args(Label).index(label)
        self.link: Link = link
        self.spelling = spelling_of(policy_tokenizer, vocabulary, self.vocab_size)
        self.coverage = self.spelling.coverage
        self._ids = {word: index for index, word in enumerate(vocabulary.words) if word}

    @classmethod
    def pretrained(cls, policy_tokenizer: PreTrainedTokenizerBase, **settings: Any) -> "ToxicityReward":
        """With the classifier of toxic-comment-classifier, fetched when absent; `settings` are the constructor's.

        Raises:
            AssetError: it cannot be made available; the message says what to do.
        """
        folder = toxicity_classifier()
        return cls(ToxicityClassifier.from_folder(folder), toxicity_vocabulary(folder), policy_tokenizer, **settings)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of soft tokens, in float32 at least.

        Raises:
            ValueError: token ids outside the policy's vocabulary.
        """
        self._check_ids(tokens)
        self.spelling = self.spelling.to(tokens.ids.device)
        found = soft_words(tokens, self.spelling)
        embedding = self.classifier.weights["embedding"]
        precise = torch.promote_types(found.weights.dtype, embedding.dtype)
        parts = embedding[found.ids].to(precise) * found.weights.to(precise)[:, None]
        words = parts.new_zeros(found.presence.numel(), parts.shape[-1]).index_add(0, found.slot, parts)
        return self._linked(self.classifier(words.view(*found.presence.shape, -1), found.presence))

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the words that token ids spell, in float32 at least."""
        return self.soft(one_hot_tokens(ids, mask), **columns)

    def hard_decoded(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the decoded texts, cut into words by the classifier's own rules."""
        kept = [row[written].tolist() for row, written in zip(ids, mask, strict=True)]
        texts = self.policy_tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.of_texts(texts)

    def of_texts(self, texts: list[str]) -> Float[Tensor, "N"]:
        """Rewards of texts."""
        embedding = self.classifier.weights["embedding"]
        found = [[self._ids[word] for word in self.vocabulary.words_of(text) if word in self._ids] for text in texts]
        rows = [torch.tensor(row[-self.classifier.max_words :], dtype=torch.long) for row in found]
        ids = pad_sequence(rows, batch_first=True).to(embedding.device)
        return self._linked(self.classifier(embedding[ids], (ids > 0).to(embedding.dtype)))

    def _linked(self, logits: Float[Tensor, "N C"]) -> Float[Tensor, "N"]:
        harmless = -logits[:, self.index].to(torch.promote_types(logits.dtype, torch.float32))
        if self.link == "logit":
            return harmless
        return harmless.sigmoid() if self.link == "probability" else functional.logsigmoid(harmless)

    def _check_ids(self, tokens: SoftTokens) -> None:
        ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
        outside = ids[(ids < 0) | (ids >= len(self.spelling.body))]
        if outside.numel():
            raise ValueError(
                f"token id {int(outside[0])} is outside the {len(self.spelling.body)} ids that reward {self.name!r} "
                "is aligned with; pass vocab_size of the policy"
            )


def _sum_behind(presence: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """What is present behind each slot. Summed from behind: a difference of sums would not be exact at 0 and 1."""
    through = presence.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([through[:, 1:], torch.zeros_like(through[:, :1])], 1)


def _between_0_and_1(values: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Clamped; at 0 and 1 exactly the gradient is the mean of both sides, where `clamp` would let all of it pass."""
    zero, one = torch.zeros_like(values), torch.ones_like(values)
    return torch.minimum(torch.maximum(values, zero), one)
