"""Log-likelihoods under a frozen language model as rewards: of the completion, or of a target behind it.

The model shares the policy's vocabulary. Left out: models with another one.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from softrl.data.prompts import prompt_ids
from softrl.masking import survival_mean, survival_sum
from softrl.models.policy import Policy, chunk_length, evaluating
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.ngrams import Presence
from softrl.rewards.sequences import attention_bias, log_of_presence, mixtures, packed
from softrl.types import Prompts, SoftTokens

Reduction = Literal["mean", "sum"]


class _LikelihoodReward(nn.Module, ABC):
    """What both have in common: a frozen language model, prompts in front, a mean or a sum over tokens."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, reduction: Reduction) -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
        self.model = model.requires_grad_(False)
        self.eval()
        self.lm = Policy(model)
        self.lm.virtual.refuse("the likelihood")
        self.name = name
        self.tokenizer = tokenizer
        self.reduction: Reduction = reduction
        self.vocab_size: int | None = self.lm.vocab_size

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, tokenizer: PreTrainedTokenizerBase, *, model_kwargs: dict | None = None,
        **settings: Any,
    ) -> "_LikelihoodReward":  # fmt: skip
        """Load the language model by hub name or local folder; `settings` are the constructor's.

        Raises:
            ValueError: it cannot be loaded.
        """
        try:
            model = AutoModelForCausalLM.from_pretrained(name_or_path, **(model_kwargs or {}))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(name_or_path)!r} cannot be loaded as a causal language model ({str(error).splitlines()[0]}); "
                "pass a hub name or a local folder of one"
            ) from error
        return cls(model, tokenizer, **settings)

    def train(self, mode: bool = True) -> "_LikelihoodReward":
        """Stays in evaluation mode: dropout would make another reward of it at every call."""
        return super().train(False)

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Log-likelihoods for token ids, nats."""
        return self.soft(one_hot_tokens(ids, mask), **columns)

    @abstractmethod
    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Log-likelihoods for soft tokens, nats."""

    def _prompts(self, columns: dict[str, Any], device: torch.device) -> list[Int[Tensor, "_"]]:
        prompts = columns.get("prompt")
        if prompts is None:
            raise ValueError(f"reward {self.name!r} reads the prompts, and was called without a column 'prompt'")
        found = [torch.tensor(prompt_ids(prompt, self.tokenizer), device=device) for prompt in prompts]
        empty = [row for row, ids in enumerate(found) if len(ids) == 0]
        if empty:
            raise ValueError(
                f"reward {self.name!r}: prompt {empty[0]} is empty, and a first token has no likelihood without "
                "something in front of it; begin prompts with a token"
            )
        return found

    def _mixed(self, tokens: SoftTokens) -> Float[Tensor, "N T D"]:
        ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
        outside = ids[(ids < 0) | (ids >= self.lm.vocab_size)]
        if outside.numel():
            raise ValueError(
                f"token id {int(outside[0])} is outside the {self.lm.vocab_size} ids of reward {self.name!r}: the "
                "vocabularies of policy and reward differ"
            )
        return mixtures(self.lm.causal_lm.get_input_embeddings(), ids, tokens.weights)

    def _reduced(self, values: Float[Tensor, "N T"], counts: Float[Tensor, "N T"]) -> Float[Tensor, "N"]:
        return (survival_mean if self.reduction == "mean" else survival_sum)(values, counts.to(values.dtype))

    def _log_probs(
        self, hidden: Float[Tensor, "N T D"], ids: Int[Tensor, "N T K"], weights: Float[Tensor, "N T K"]
    ) -> Float[Tensor, "N T"]:
        """`Σ_k q_k log p(id_k)`, in chunks that the backward pass computes again: [N, T, V] is never kept."""
        size = chunk_length(self.lm.vocab_size)
        rows = (hidden.flatten(0, 1), ids.flatten(0, 1), weights.flatten(0, 1))
        pieces = [
            checkpoint(_expected_log_prob, self.lm, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in zip(*(values.split(size) for values in rows), strict=True)
        ]
        return torch.cat(pieces).unflatten(0, hidden.shape[:2])


def _expected_log_prob(
    lm: Policy, hidden: Float[Tensor, "M D"], ids: Int[Tensor, "M K"], weights: Float[Tensor, "M K"]
) -> Float[Tensor, "M"]:
    log_probs = lm.head(hidden).log_softmax(-1).gather(-1, ids)
    return (weights.to(log_probs.dtype) * log_probs).sum(-1)


class LikelihoodReward(_LikelihoodReward):
    """Log-likelihood of the completion given the prompt, `Σ_t s_t Σ_k q_tk log p(id_tk | prompt, e_1 .. e_{t−1})`.

    With soft tokens it is minus a cross entropy: linear in what a token says, and non-linear in what the tokens in
    front of it say. Nothing in front of a token that is written has ended the text, so a context is not weighted by
    survival. By itself it is maximised by the most likely text: add an entropy bonus, or another reward.

    Args:
        model: a causal LM of transformers (or a PEFT model around one) whose token ids mean what the policy's mean;
            frozen and put into evaluation mode, in place. Not the policy itself.
        tokenizer: the policy's, for the prompts.
        reduction: "mean" over the tokens, nats a token, or "sum", nats.
        name: what logs call it.
    Raises:
        ValueError: an unknown reduction.
        TypeError: a model that soft tokens cannot be fed to, see `Policy`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reduction: Reduction = "mean",
        name: str = "likelihood",
    ) -> None:
        super().__init__(model, tokenizer, name, reduction)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Log-likelihoods of soft tokens, in float32 at least.

        Raises:
            ValueError: no or an empty prompt, or token ids that the model does not know.
        """
        prompts = _left_padded(self._prompts(columns, tokens.ids.device))
        hidden = self.lm.hidden(prompts, self._mixed(tokens))
        ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
        return self._reduced(self._log_probs(hidden, ids, tokens.weights), tokens.survival)


class TargetLikelihoodReward(_LikelihoodReward):
    """Log-likelihood of a target behind the completion, `log p(y | x, h)`: how much the completion helps to tell y.

    The model reads prompt, completion, separator, target. A completion's token enters as the mixture of embeddings,
    and attention on it is biased by the logarithm of its presence `s_t (1 − q_t[eos])`, so that the end-of-sequence
    token itself is not read. The separator's position follows the soft length, rounded: at one-hot tokens it is where
    it would be in the plain text.

    Args:
        model: as in `LikelihoodReward`; with an attention that takes additive masks ("sdpa" or "eager").
        tokenizer: the policy's, for prompts and targets.
        target_column: of the data set; a text a row, which is not empty.
        separator: text between completion and target; at least one token.
        baseline: subtract `log p(y | x)`, which moves the reward's zero to "does not help" and changes no gradient.
        reduction: over the target's tokens.
        eos_ids: tokens that end a completion; the tokenizer's by default.
        name: what logs call it.
    Raises:
        ValueError: an unknown reduction, or a separator without a token.
        TypeError: a model that soft tokens cannot be fed to, or that does not score them as it scores token ids.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        target_column: str = "target",
        separator: str = "\n",
        baseline: bool = False,
        reduction: Reduction = "mean",
        eos_ids: tuple[int, ...] | None = None,
        name: str = "target_likelihood",
    ) -> None:
        super().__init__(model, tokenizer, name, reduction)
        self.target_column = target_column
        self.separator = tokenizer(separator, add_special_tokens=False).input_ids
        if not self.separator:
            raise ValueError(f"separator={separator!r} has no token; give one, such as a line break")
        self.baseline = baseline
        ending = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos_ids = ending if eos_ids is None else eos_ids
        self._check_reading()

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Log-likelihoods of the targets, in float32 at least.

        Raises:
            ValueError: no or an empty prompt or target, or token ids that the model does not know.
        """
        prompts = self._prompts(columns, tokens.ids.device)
        targets = self._targets(columns, tokens.ids.device)
        scores = self._scores(prompts, self._mixed(tokens), Presence.of(tokens, self.eos_ids), targets)
        if not self.baseline:
            return scores
        nothing = SoftTokens(tokens.ids[:, :0], tokens.weights[:, :0], tokens.mask[:, :0])
        with torch.no_grad():
            without = self._scores(prompts, self._mixed(nothing), Presence.of(nothing, self.eos_ids), targets)
        return scores - without

    def _targets(self, columns: dict[str, Any], device: torch.device) -> list[Int[Tensor, "_"]]:
        rows = columns.get(self.target_column)
        if rows is None:
            raise ValueError(
                f"reward {self.name!r} scores a target, and the data set has no column {self.target_column!r} (it has "
                f"{sorted(columns)}); add it, or name another one with target_column"
            )
        found = []
        for index, text in enumerate(rows):
            ids = self.tokenizer(text, add_special_tokens=False).input_ids if isinstance(text, str) else []
            if not ids:
                raise ValueError(
                    f"reward {self.name!r}: row {index} of the column {self.target_column!r} is {repr(text)[:60]}; "
                    "give a text of at least one token"
                )
            found.append(torch.tensor(ids, device=device))
        return found

    def _scores(
        self,
        prompts: list[Int[Tensor, "_"]],
        completions: Float[Tensor, "N T D"],
        presence: Presence,
        targets: list[Int[Tensor, "_"]],
    ) -> Float[Tensor, "N"]:
        device, num_steps = completions.device, completions.shape[1]
        separator = torch.tensor(self.separator, device=device)
        target, written = _right_padded(targets)
        behind = torch.cat([separator.expand(len(targets), -1), target], 1)
        there = presence.written * presence.goes_on
        tail = torch.cat([written.new_ones(len(targets), len(separator)), written], 1)

        of_prompts = self.lm.embed(torch.cat(prompts)).split([len(prompt) for prompt in prompts])
        embeds = packed(of_prompts, torch.cat([completions, self.lm.embed(behind)], 1), 0.0)
        log_there = log_of_presence(there, presence.mask)
        seen = torch.cat([log_there, tail.to(there).log()], 1)
        log_presence = packed([there.new_zeros(len(prompt)) for prompt in prompts], seen, -torch.inf)
        lengths = there.detach().masked_fill(~presence.mask, 0.0).sum(-1).round().long()
        inside = torch.arange(num_steps, device=device).expand(len(targets), -1)
        places = torch.cat([inside, lengths[:, None] + torch.arange(behind.shape[1], device=device)], 1)
        starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        positions = packed(
            [torch.arange(len(prompt), device=device) for prompt in prompts], places + starts[:, None], 0
        )

        with self.lm.context():
            states = self.lm.decoder(
                inputs_embeds=embeds,
                attention_mask=attention_bias(log_presence, True, embeds.dtype),
                position_ids=positions,
                use_cache=False,
            ).last_hidden_state
        before = starts + num_steps + len(separator) - 1  # where the target's first token is predicted
        index = before[:, None] + torch.arange(target.shape[1], device=device)
        index = index.clamp(max=states.shape[1] - 1)  # of padding, which counts nothing
        hidden = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        ones = torch.ones_like(target[..., None], dtype=torch.promote_types(hidden.dtype, torch.float32))
        return self._reduced(self._log_probs(hidden, target[..., None], ones), written.to(ones.dtype))

    @torch.no_grad()
    def _check_reading(self) -> None:
        """Compare with the model's own forward on the plain text; the completion has two steps that are not present.

        Raises:
            TypeError: the log-likelihoods differ, or the model does not take what it is given.
        """
        device = self.lm.causal_lm.get_input_embeddings().weight.device
        some = [i for i in range(self.lm.vocab_size) if i not in self.eos_ids][:6]
        prompt, completion, target = (torch.tensor(ids, device=device) for ids in (some[:2], some[2:4], some[4:]))
        ids = torch.cat([completion, completion])[None]
        tokens = one_hot_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        ended = Presence(ids.new_tensor([[1, 1, 0, 0]]).to(tokens.weights), tokens.weights[..., 0], tokens.mask)
        plain = torch.cat([prompt, completion, torch.tensor(self.separator, device=device), target])
        try:
            with torch.autocast(device.type, enabled=False), evaluating(self.model):
                ours = self._scores([prompt], self._mixed(tokens), ended, [target])
                logits = self.model(input_ids=plain[None]).logits[0, -len(target) - 1 : -1]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise TypeError(self._cannot_read) from error
        theirs = logits.to(ours.dtype).log_softmax(-1).gather(-1, target[:, None]).sum()
        theirs = theirs / len(target) if self.reduction == "mean" else theirs
        precise = self.lm.dtype in (torch.float32, torch.float64)
        if not bool((ours - theirs).abs() <= (1e-3 if precise else 3e-2) * theirs.abs()):
            raise TypeError(self._cannot_read)

    @property
    def _cannot_read(self) -> str:
        return (
            f"reward {self.name!r} ({type(self.lm.causal_lm).__name__}) does not score a target behind a soft "
            "completion as it scores plain text: its attention takes no additive mask or no position ids (recurrent "
            "layers, ALiBi, another attention than sdpa or eager); load it with attn_implementation='sdpa' or use "
            "another model"
        )


def _left_padded(rows: list[Int[Tensor, "_"]]) -> Prompts:
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    present = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True, padding_side="left")
    return Prompts(ids, present)


def _right_padded(rows: list[Int[Tensor, "_"]]) -> tuple[Int[Tensor, "N L"], Bool[Tensor, "N L"]]:
    present = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(present, batch_first=True)
