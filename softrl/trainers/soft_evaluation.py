"""How well a model predicts held-out text behind true tokens, and behind its own soft ones."""

from dataclasses import dataclass

import torch

from softrl.estimators.supervised import fed_entropy, guided_rollout, plain_pass
from softrl.models.policy import Policy, evaluating
from softrl.objectives.token_terms import DirectTerms
from softrl.tokens.guidance import GuidedRelaxation
from softrl.tokens.noise import SequenceRandom
from softrl.types import SupervisedTexts


@dataclass(frozen=True)
class TextNLL:
    """What was measured of one text; all but the first two are sums over its tokens that count, in nats.

    Attributes:
        text_index: of its row.
        count: how many tokens count.
        hard: NLL behind true tokens (teacher forcing).
        soft: NLL of the same tokens behind the model's own soft ones, from the first that counts on.
        entropy, soft_entropy: of the policy, in either case.
        fed_entropy: of what is fed in the latter.
    """

    text_index: int
    count: int
    hard: float
    soft: float
    entropy: float
    soft_entropy: float
    fed_entropy: float


@torch.no_grad()
def measure_texts(
    policy: Policy,
    texts: SupervisedTexts,
    indices: list[int],
    relaxation: GuidedRelaxation,
    random: SequenceRandom,
) -> list[TextNLL]:
    """Both NLLs of every text, one soft rollout without guidance each."""
    terms = DirectTerms(target_weight=1.0)
    with evaluating(policy.model):
        hard = plain_pass(policy, texts, terms)
        nothing = torch.zeros(texts.targets.shape, device=texts.targets.device)
        rollout = guided_rollout(policy, texts, relaxation, nothing, random)
        soft = plain_pass(policy, texts, terms, rollout)
    numbers = (-hard.log_probs, -soft.log_probs, hard.entropy, rollout.entropy, fed_entropy(rollout))
    sums = torch.stack([(each.double() * texts.counted).sum(-1) for each in numbers], 1).tolist()
    counts = texts.counted.sum(-1).tolist()
    return [TextNLL(*row, *values) for *row, values in zip(indices, counts, sums, strict=True)]


def summary(texts: list[TextNLL]) -> dict[str, float]:
    """Means over tokens; `loss` is the NLL behind true tokens, as TRL's is."""
    count = max(sum(text.count for text in texts), 1)

    def mean(name: str) -> float:
        return sum(getattr(text, name) for text in texts) / count

    return {
        "loss": mean("hard"), "hard_nll": mean("hard"), "soft_nll": mean("soft"),
        "nll_gap": mean("soft") - mean("hard"), "entropy": mean("entropy"), "soft_entropy": mean("soft_entropy"),
        "fed_entropy": mean("fed_entropy"),
    }  # fmt: skip
