"""How well a policy orders held-out sets of completions, set by set, so that an error can be given."""

from dataclasses import dataclass

import torch
from datasets import Dataset

from softrl.data.ranked import ranked_batch
from softrl.models.policy import evaluating
from softrl.trainers.listwise_trainer import ListwisePreferenceTrainer, completion_log_probs, pairs_in_order


@dataclass(frozen=True)
class RankedSet:
    """A set of completions and how it is ordered.

    Attributes:
        prompt: text, or a conversation.
        log_probs: log π of each completion, nats.
        loss: the trainer's.
        accuracy: share of the pairs that β (log π − log π_ref) orders rightly, one half for equal ones: 0.5 before
            training. None where the set is one tie.
        policy_accuracy: the same of log π itself, which the reference may order well or badly.
        margin: β (log π − log π_ref) of the best, less that of the others; None where the set is one tie.
    """

    prompt: str | list[dict[str, str]]
    log_probs: tuple[float, ...]
    loss: float
    accuracy: float | None
    policy_accuracy: float | None
    margin: float | None


@torch.no_grad()
def evaluate_sets(trainer: ListwisePreferenceTrainer, dataset: Dataset) -> list[RankedSet]:
    """Measure the trainer's model, as it is now, on sets; on one process."""
    found: list[RankedSet] = []
    size, model = trainer.args.per_device_eval_batch_size, trainer.model
    with evaluating(model), trainer.compute_loss_context_manager():
        for start in range(0, len(dataset), size):
            found += _measured(trainer, [dataset[row] for row in range(start, min(start + size, len(dataset)))])
    return found


def _measured(trainer: ListwisePreferenceTrainer, rows: list[dict]) -> list[RankedSet]:
    batch = ranked_batch(rows, trainer.processing_class, trainer.args.max_length).to(trainer.accelerator.device)
    own = completion_log_probs(trainer.model, batch)
    log_ratio = batch.by_set(own - trainer.reference_log_probs(trainer.model, batch))
    losses, scores, own = trainer.losses(log_ratio, batch), trainer.args.beta * log_ratio, batch.by_set(own)
    measures = []
    for index, row in enumerate(rows):
        mask, ranks = batch.mask[index], batch.ranks[index]
        best = mask & (ranks == ranks[mask].min())
        others = mask & ~best
        margin = (scores[index][best].mean() - scores[index][others].mean()).item() if others.any() else None
        shares = []
        for values in (scores, own):
            right, ordered = (counts[index].item() for counts in pairs_in_order(values, batch))
            shares.append(right / ordered if ordered else None)
        measures.append(
            RankedSet(row["prompt"], tuple(own[index][mask].tolist()), losses[index].item(), *shares, margin)
        )
    return measures
