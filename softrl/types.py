"""The records that the rooms hand to each other: frozen dataclasses, a shape for every field.

Axes, for the whole project: B prompts, G samples a prompt, N = B * G sequences, P prompt tokens, T steps, K kept
tokens a step, V vocabulary, D width. `p` are the weights that are differentiated, `q` the weights that are fed back
and scored; their derivative is taken to be the same (dq := dp).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.masking import is_any_of, log_survival, mask_through_eos


@dataclass(frozen=True)
class Prompts:
    """Left-padded prompts, one row a prompt."""

    ids: Int[Tensor, "B P"]
    mask: Bool[Tensor, "B P"]

    def repeated(self, num_samples: int) -> "Prompts":
        """Every prompt `num_samples` times in a row, so that the samples of a prompt are neighbours."""
        return Prompts(self.ids.repeat_interleave(num_samples, 0), self.mask.repeat_interleave(num_samples, 0))


@dataclass(frozen=True)
class Texts:
    """Given text, one row each, padded on either side. `counted` are the tokens of a plain loss; None: all of them."""

    ids: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    counted: Bool[Tensor, "N T"] | None = None


@dataclass(frozen=True)
class SupervisedTexts:
    """Given text cut where its loss begins: prompts that are only read, and T tokens to be predicted after them.

    `counted` are the tokens of the loss; those that are present and not counted (another speaker's turn) are read too.
    """

    prompts: Prompts
    targets: Int[Tensor, "N T"]  # meaningless where nothing is present
    present: Bool[Tensor, "N T"]
    counted: Bool[Tensor, "N T"]


@dataclass(frozen=True)
class Support:
    """What a step draws and what stays constant thereafter: the kept ids, the noise on them and the hard choice.

    `noise` is in nats and added to the kept logits; `kept` is False where nucleus rules removed one of the K ids
    (its weight is then zero: truncation masks weights, never ids); `choice` indexes the K axis. `draws` are further
    noises on the kept logits, of relaxations that average over several. `guidance` is how much of a true token is fed
    by a guided relaxation, in [0, 1]; that token's id is then the last of the K.
    """

    ids: Int[Tensor, "*batch K"]
    noise: Float[Tensor, "*batch K"]
    kept: Bool[Tensor, "*batch K"]
    choice: Int[Tensor, "*batch"]
    draws: Float[Tensor, "*batch S K"] | None = None
    guidance: Float[Tensor, "*batch"] | None = None

    def tokens(self) -> Int[Tensor, "*batch"]:
        """The hard token of every step."""
        return self.ids.gather(-1, self.choice[..., None]).squeeze(-1)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Support":
        """The same record with every tensor mapped; the function acts on batch axes."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        mapped: dict[str, Any] = {name: None if value is None else function(value) for name, value in values.items()}
        return Support(**mapped)

    def at(self, *index: slice | int) -> "Support":
        """The same record at an index of its batch axes."""
        return self.mapped(lambda value: value[index])

    def flat(self) -> "Support":
        """The same record with its first two batch axes made one."""
        return self.mapped(lambda value: value.flatten(0, 1))

    @classmethod
    def stacked(cls, steps: list["Support"]) -> "Support":
        """Records of single steps, batch axis N, as one with batch axes N, T."""
        return cls._combined(steps, lambda values: torch.stack(values, 1))

    @classmethod
    def joined(cls, parts: list["Support"]) -> "Support":
        """Records of parts of the first batch axis as one."""
        return cls._combined(parts, torch.cat)

    @classmethod
    def _combined(cls, records: list["Support"], function: Callable[[list[Tensor]], Tensor]) -> "Support":
        columns: dict[str, Any] = {
            each.name: [getattr(record, each.name) for record in records] for each in fields(cls)
        }
        combined: dict[str, Any] = {n: None if c[0] is None else function(c) for n, c in columns.items()}
        return cls(**combined)


@dataclass(frozen=True)
class SoftTokens:
    """Probability-weighted mixtures of tokens, sparse on K ids a step.

    `mask` is True on real tokens, up to and including the end-of-sequence token, and False after it. With `eos_ids`
    the end is soft as well: a token counts by its survival, the probability that nothing before it has ended the text.
    """

    ids: Int[Tensor, "N T K"]
    weights: Float[Tensor, "N T K"]
    mask: Bool[Tensor, "N T"]
    eos_ids: tuple[int, ...] = ()

    @property
    def eos_weight(self) -> Float[Tensor, "N T"]:
        """`q[eos]`: kept weight summed over all end-of-sequence ids; 0 where none is kept or stopping is hard."""
        return (self.weights * is_any_of(self.ids, self.eos_ids)).sum(-1)

    @property
    def log_survival(self) -> Float[Tensor, "N T"]:
        """`log s_t`, differentiable in the weights, at least −30; −inf where the mask is False. See `masking`."""
        if not self.eos_ids:
            return torch.zeros_like(self.weights[..., 0]).masked_fill(~self.mask, -torch.inf)
        return log_survival(self.eos_weight).masked_fill(~self.mask, -torch.inf)

    @property
    def survival(self) -> Float[Tensor, "N T"]:
        """`s_t`: what a token counts in reward, KL and length. With hard stopping it is the mask."""
        return self.log_survival.exp()

    def with_weights(self, weights: Float[Tensor, "N T K"]) -> "SoftTokens":
        """The same tokens with other weights, for instance a leaf that gradients are taken for."""
        return replace(self, weights=weights)


def rows_of(record: Any, rows: slice) -> Any:
    """The same record of some of its sequences: every tensor in it has the sequences as its first axis."""
    if isinstance(record, Tensor):
        return record[rows]
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{field.name: rows_of(getattr(record, field.name), rows) for field in fields(record)})
    return record


@dataclass(frozen=True)
class HardRollout:
    """N completions as sampled tokens: all that score-function methods need. `mask` is True through the end."""

    prompts: Prompts  # one row a sequence: already repeated
    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]


@dataclass(frozen=True)
class Rollout:
    """Phase 1: what a policy generated, with all that the gradient phases need in order to replay it.

    `weights` are the recorded p, `fed` the recorded q; neither carries a graph. `targets` are the true tokens of a
    text that the rollout was made along; `mask` is then True on those that count.
    """

    prompts: Prompts  # one row a sequence: already repeated
    support: Support  # batch axes N, T
    weights: Float[Tensor, "N T K"]
    fed: Float[Tensor, "N T K"]
    mask: Bool[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]  # of the policy at its temperature, before nucleus rules, nats
    eos_ids: tuple[int, ...] = ()  # not empty: stopping is soft
    targets: Int[Tensor, "N T"] | None = None

    @property
    def soft_tokens(self) -> SoftTokens:
        """What is fed back and scored."""
        return SoftTokens(self.support.ids, self.fed, self.mask, self.eos_ids)

    @property
    def tokens(self) -> Int[Tensor, "N T"]:
        """The hard token of every step; meaningless where the mask is False."""
        return self.support.tokens()

    @property
    def hard(self) -> HardRollout:
        """The hard tokens, through the first end of sequence where soft stopping may have gone on."""
        return HardRollout(self.prompts, self.tokens, self.mask & mask_through_eos(self.tokens, self.eos_ids))


@dataclass(frozen=True)
class Thoughts:
    """What was thought after A tokens of each text, S times after each: n thought tokens, K kept ids in each.

    `anchors` are the slots of those tokens; where `is_anchor` is False a row has fewer, and what was thought there
    counts for nothing. `fed` are the recorded weights that were fed; neither they nor the support carry a graph.
    """

    anchors: Int[Tensor, "N A"]
    is_anchor: Bool[Tensor, "N A"]
    support: Support  # batch axes N, A, S, n
    fed: Float[Tensor, "N A S n K"]

    @property
    def num_samples(self) -> int:
        """S."""
        return self.fed.shape[2]

    @property
    def length(self) -> int:
        """n, in tokens, without start and end."""
        return self.fed.shape[3]

    @property
    def tokens(self) -> Int[Tensor, "N A S n"]:
        """The hard token of every step."""
        return self.support.tokens()

    @property
    def branch_anchors(self) -> Int[Tensor, "N L"]:
        """The anchor of every branch, L = A * S: samples of an anchor are neighbours."""
        return self.anchors.repeat_interleave(self.num_samples, 1)
