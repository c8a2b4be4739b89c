"""What a policy writes, measured on hard decoded text: reward, judge, KL, perplexity under the base, diversity.

`evaluate_policy` measures any model, whoever trained it, as our trainers' own evaluation does.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from evaluate import EvaluationModule
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.masking import per_sequence_sum
from softrl.models.policy import Policy, evaluating
from softrl.objectives.token_terms import token_outputs
from softrl.rewards.base import ReadsDecodedText, Reward, WeightedRewards
from softrl.rewards.repetition import RepetitionPenalty
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation
from softrl.trainers.batches import Completions, PromptBatch, decode, indexed, prompt_batch, prompt_text
from softrl.trainers.loading import eos_token_ids
from softrl.trainers.metrics import sample_std
from softrl.types import HardRollout, Prompts

_EVALUATION_STEP = -1  # random streams of evaluations: the same draws before, during and after training

Judge = Callable[[list[str]], Float[Tensor, "N"]]


@dataclass(frozen=True)
class Sample:
    """One completion and its numbers; KL and NLL are None without a reference.

    `reward` is the weighted sum of `rewards`, which are by name; `references` is the row's column `reference`.
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
    references: tuple[str, ...] = ()
    repetition: float = 0.0


def distinct_n(sequences: list[tuple[int, ...]], n: int) -> float:
    """Different n-grams over all n-grams of a set of completions (Li et al. 2016); 1 is most diverse, 0 if none."""
    grams = Counter(tuple(row[i : i + n]) for row in sequences for i in range(len(row) - n + 1))
    total = sum(grams.values())
    return len(grams) / total if total else 0.0


@torch.no_grad()
def repetition(tokens: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """Share of equal pairs among each completion's bigrams, in [0, 1]; see `RepetitionPenalty`."""
    return -RepetitionPenalty(2).hard(tokens, mask).float()


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


@torch.no_grad()
def hard_scores(
    rewards: WeightedRewards, batch: PromptBatch, completions: Completions
) -> dict[str, Float[Tensor, "N"]]:
    """Every reward of the hard tokens as `rewards/<name>`, and their weighted sum as `reward/hard`.

    A reward that reads other tokens than the policy's adds its score of the decoded text, `rewards/<name>_decoded`.
    """
    each = [values.float() for values in rewards.hard_each(completions.tokens, completions.mask, **batch.columns)]
    total = sum(weight * values for weight, values in zip(rewards.weights, each, strict=True))
    scores = {f"rewards/{reward.name}": values for reward, values in zip(rewards.rewards, each, strict=True)}
    for reward in rewards.rewards:
        if isinstance(reward, ReadsDecodedText):
            decoded = reward.hard_decoded(completions.tokens, completions.mask, **batch.columns)
            scores[f"rewards/{reward.name}_decoded"] = decoded.float()
    return scores | {"reward/hard": total}


@dataclass(frozen=True)
class Evaluator:
    """How completions are sampled and measured.

    Args:
        policy: what samples, its temperature included.
        reference: what KL and NLL are measured to; None for neither.
        rewards: hard faces are used.
        tokenizer: the policy's.
        eos_ids: what ends a completion.
        max_completion_length: T.
        truncation: the sampler's nucleus rules.
        judge: scores decoded completions; None for none.
        seed: of the random streams, with each row's index.
        sample_hard: what samples; `hard_rollout`, or a function of the same arguments.
    """

    policy: Policy
    reference: Policy | None
    rewards: WeightedRewards
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    max_completion_length: int
    truncation: Truncation
    judge: Judge | None = None
    seed: int = 42
    sample_hard: Callable[..., HardRollout] = hard_rollout

    @torch.no_grad()
    def samples(self, batch: PromptBatch) -> list[Sample]:
        """Sample and measure one completion for every prompt of a batch of one sample a prompt."""
        random = SequenceRandom.keyed(self.seed, _EVALUATION_STEP, batch.indices, 1, batch.prompts.ids.device)
        sampled = self.sample_hard(
            self.policy, batch.prompts, self.truncation, random, self.max_completion_length, eos_ids=self.eos_ids
        )
        tokens, mask = sampled.tokens, sampled.mask
        count, completions = len(tokens), Completions.of(tokens, mask, self.eos_ids)
        scores = {name: values.tolist() for name, values in hard_scores(self.rewards, batch, completions).items()}
        kl, nll = [None] * count, [None] * count
        if self.reference is not None:
            measured = kl_and_base_nll(self.policy, self.reference, batch.prompts, tokens, mask)
            kl, nll = (values.tolist() for values in measured)
        texts = decode(self.tokenizer, tokens, mask)
        judged = [None] * count if self.judge is None else self.judge(texts).tolist()
        prompts, rewards = batch.columns["prompt"], scores.pop("reward/hard")
        by_name = {name.removeprefix("rewards/"): values for name, values in scores.items()}
        references = batch.columns.get("reference", [()] * count)
        repeated = repetition(tokens, mask).tolist()
        return [
            Sample(
                batch.indices[i], prompt_text(prompts[i]), texts[i], tuple(tokens[i][mask[i]].tolist()),
                completions.ended[i].item(), rewards[i], judged[i], kl[i], nll[i],
                {name: values[i] for name, values in by_name.items()},
                (references[i],) if isinstance(references[i], str) else tuple(references[i] or ()),
                repeated[i],
            )
            for i in range(count)
        ]  # fmt: skip


def evaluate_policy(
    policy: Policy,
    reference: Policy | None,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Reward | list[Reward],
    judge: Judge | None = None,
    *,
    reward_weights: list[float] | None = None,
    max_completion_length: int = 32,
    max_prompt_length: int | None = None,
    truncation: Truncation | None = None,
    eos_ids: tuple[int, ...] | None = None,
    batch_size: int = 32,
    seed: int = 42,
) -> list[Sample]:
    """One completion a held-out prompt from any model, measured as `RolloutTrainer` measures its own.

    Equal seeds and data sets give equal random streams, so completions of two policies are paired; the numbers do not
    depend on the batch size. `summary` makes metrics of the samples.

    Args:
        policy: the model, also one that another trainer trained, with its sampling temperature.
        reference: e.g. the base model, or `Policy(peft_model, temperature, context=peft_model.disable_adapter)`.
        dataset: with a column `prompt`, of texts or of conversations; other columns reach the rewards.
        tokenizer: the policy's.
        rewards: hard faces are used; `softrl.rewards.resolve.resolve_rewards` makes them of names and functions.
        judge: scores decoded completions.
        reward_weights: one a reward, 1 by default.
        max_completion_length, max_prompt_length, truncation: as in training.
        eos_ids: what ends a completion; default: the tokenizer's and those that the model declares.
        batch_size: prompts at a time.
        seed: of the random streams.
    Returns:
        Samples in the data set's order.
    """
    rows = indexed(dataset, "dataset", tokenizer)
    weighted = WeightedRewards(rewards if isinstance(rewards, list) else [rewards], reward_weights)
    eos_ids = eos_token_ids(policy.causal_lm, tokenizer) if eos_ids is None else eos_ids
    evaluator = Evaluator(
        policy,
        reference,
        weighted,
        tokenizer,
        eos_ids,
        max_completion_length,
        truncation or Truncation(1),
        judge,
        seed,
    )
    device = policy.causal_lm.get_input_embeddings().weight.device
    samples: list[Sample] = []
    for start in range(0, len(rows), batch_size):
        some: list[dict[str, Any]] = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        samples += evaluator.samples(prompt_batch(some, tokenizer, 1, max_prompt_length, device))
    return samples


def metrics_of_texts(metrics: dict[str, EvaluationModule], samples: list[Sample]) -> dict[str, float]:
    """Scores of completions against their references by metrics of `evaluate`, as `<metric>/<score>`.

    Raises:
        ValueError: a completion has no reference.
    """
    without = [sample.prompt_index for sample in samples if not sample.references]
    if metrics and without:
        raise ValueError(
            f"eval_metrics={sorted(metrics)} compare completions with the column 'reference' of the data set, which "
            f"is missing or empty for the prompts {without[:5]}; add it (a text or a list of texts), or leave "
            "eval_metrics out"
        )
    texts = [sample.completion for sample in samples]
    references: list[Any] = [list(sample.references) for sample in samples]
    if all(len(several) == 1 for several in references):
        references = [several[0] for several in references]  # what all metrics take
    scores = {name: metric.compute(predictions=texts, references=references) for name, metric in metrics.items()}
    return {
        f"{name}/{key}": float(value)
        for name, found in scores.items()
        for key, value in found.items()
        if isinstance(value, int | float)
    }


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
        "repetition": sum(sample.repetition for sample in samples) / len(samples),
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
