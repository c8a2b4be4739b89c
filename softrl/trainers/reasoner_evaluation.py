"""What latents do for held-out text: NLL of the mixture, of the base LM and of the interpreter, and mixing weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_output import ReasonerOutput
from softrl.models.reasoner_parts import log_mean_exp
from softrl.trainers.metrics import check_counted


@dataclass(frozen=True)
class ReasonedText:
    """What was measured of one text, sums over its counted tokens.

    Attributes:
        text_index: of its row.
        num_tokens: that count.
        sums: by name: `nll`, `base_nll`, `interpreter_nll` (both after S thoughts, averaged in probability), `mixing`,
            `thought_entropy` (of a whole thought, nats), `hits`; without those that the model does not have.
    """

    text_index: int
    num_tokens: int
    sums: dict[str, float]


def by_token(output: ReasonerOutput) -> dict[str, Tensor]:
    """The numbers of every counted token, [M] each, from a pass with labels; `hits` with logits only."""
    at, targets = output.is_target, output.targets
    assert at is not None
    assert targets is not None
    assert output.rewards is not None
    assert output.interpreter_log_probs is not None

    def of_targets(log_probs: Tensor) -> Tensor:
        chosen = targets.view(*targets.shape, *[1] * (log_probs.ndim - 2)).expand(*log_probs.shape[:-1], 1)
        return log_probs.gather(-1, chosen).squeeze(-1)[at]

    found = {
        "nll": -log_mean_exp(output.rewards[at], -1),
        "interpreter_nll": -log_mean_exp(of_targets(output.interpreter_log_probs), -1),
    }
    if output.logits is not None:
        found["hits"] = (output.logits[at].argmax(-1) == targets[at]).float()
    if output.base_log_probs is not None:
        found["base_nll"] = -of_targets(output.base_log_probs)
    if output.mixing is not None:
        found["mixing"] = output.mixing[at].mean(-1)
    if output.thought_entropy is not None:
        found["thought_entropy"] = output.thought_entropy[at].mean(-1)
    return found


@torch.no_grad()
def measured(output: ReasonerOutput, indices: list[int]) -> list[ReasonedText]:
    """Sums of every text of a batch."""
    assert output.is_target is not None
    counts = output.is_target.sum(-1).tolist()
    parts = {name: values.double().split(counts) for name, values in by_token(output).items()}
    return [
        ReasonedText(index, counts[row], {name: part[row].sum().item() for name, part in parts.items()})
        for row, index in enumerate(indices)
    ]


def summary(texts: list[ReasonedText], model: ReasonerForCausalLM) -> dict[str, float]:
    """Means over tokens, `gain` of the mixture over the base LM, `accuracy`, and how many parameters that took.

    Raises:
        ValueError: no token of any text counts.
    """
    count = sum(text.num_tokens for text in texts)
    check_counted(count, len(texts))
    names = texts[0].sums
    means = {name: sum(text.sums[name] for text in texts) / count for name in names}
    if "hits" in means:
        means["accuracy"] = means.pop("hits")
    if "base_nll" in means:
        means["gain"] = means["base_nll"] - means["nll"]
    return means | num_parameters(model)


def num_parameters(model: ReasonerForCausalLM) -> dict[str, float]:
    """All parameters, what is shared counted once; and those outside of token embeddings."""
    return {
        "num_parameters": float(model.num_parameters()),
        "num_core_parameters": float(model.num_parameters(exclude_embeddings=True)),
    }
