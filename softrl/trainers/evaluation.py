"""What a policy writes, measured on hard decoded text: reward, judge, KL, perplexity under the base, diversity."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.masking import per_sequence_sum
from softrl.models.policy import Policy, evaluating
from softrl.objectives.token_terms import token_outputs
from softrl.trainers.metrics import sample_std
from softrl.types import Prompts

Judge = Callable[[list[str]], Float[Tensor, "N"]]


@dataclass(frozen=True)
class Sample:
    """One completion and its numbers; KL and NLL are None without a reference.

    `reward` is the weighted sum of `rewards`, which are by name.
    """

    prompt_index: int
    prompt: str
    completion: str
    tokens: tuple[int, ...]
    ended: bool
    reward: float
    judge: float | None
    kl_nats: float | None
    base_nll_nats: float | None
    rewards: dict[str, float] = field(default_factory=dict)


def distinct_n(sequences: list[tuple[int, ...]], n: int) -> float:
    """Different n-grams over all n-grams of a set of completions (Li et al. 2016); 1 is most diverse, 0 if none."""
    grams = Counter(tuple(row[i : i + n]) for row in sequences for i in range(len(row) - n + 1))
    total = sum(grams.values())
    return len(grams) / total if total else 0.0


@torch.no_grad()
def kl_and_base_nll(
    policy: Policy, reference: Policy, prompts: Prompts, tokens: Tensor, mask: Tensor
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Per completion, in nats: exact KL(π‖π_ref) summed over its contexts, and its NLL under the base at T=1."""
    with evaluating(policy.model), evaluating(reference.model):
        hidden = policy.hidden(prompts, policy.embed(tokens))
        reference_hidden = reference.hidden(prompts, reference.embed(tokens))
        outputs = token_outputs(policy, hidden, tokens[..., None], reference, reference_hidden)
        base = reference.at_temperature(1.0)
        base_outputs = token_outputs(base, reference_hidden, tokens[..., None])
    nll = base_outputs.log_normalizer - base_outputs.kept_logits.squeeze(-1)
    return per_sequence_sum(outputs.kl, mask), per_sequence_sum(nll, mask)


def summary(samples: list[Sample]) -> dict[str, float]:
    """Means over completions, with standard errors; perplexity and KL a token are over tokens."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    lengths = [len(sample.tokens) for sample in samples]
    metrics = {
        "reward": rewards.mean().item(),
        "reward/hard": rewards.mean().item(),
        "reward_std": sample_std(rewards),
        "reward_se": sample_std(rewards) / len(samples) ** 0.5,
        "distinct_1": distinct_n([sample.tokens for sample in samples], 1),
        "distinct_2": distinct_n([sample.tokens for sample in samples], 2),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(not sample.ended for sample in samples) / len(samples),
    }
    for name in samples[0].rewards:
        values = torch.tensor([sample.rewards[name] for sample in samples], dtype=torch.float64)
        metrics |= {f"rewards/{name}/mean": values.mean().item(), f"rewards/{name}/std": sample_std(values)}
    if all(sample.judge is not None for sample in samples):
        scores = torch.tensor([sample.judge for sample in samples], dtype=torch.float64)
        metrics |= {"judge": scores.mean().item(), "judge_se": sample_std(scores) / len(samples) ** 0.5}
    if all(sample.kl_nats is not None for sample in samples):
        kl = torch.tensor([sample.kl_nats for sample in samples], dtype=torch.float64)
        nll = torch.tensor([sample.base_nll_nats for sample in samples], dtype=torch.float64)
        metrics |= {
            "kl": (kl.sum() / sum(lengths)).item(),
            "kl_completion": kl.mean().item(),
            "base_perplexity": (nll.sum() / sum(lengths)).exp().item(),
        }
    return metrics
