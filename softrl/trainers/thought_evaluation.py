"""What thoughts do for held-out text: NLL of true tokens with and without them, by position and by difficulty."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from softrl.models.branches import BranchAttention
from softrl.models.thinking import ThinkingLM
from softrl.rollouts.anchors import Anchors
from softrl.rollouts.thoughts import ThoughtSource, text_log_probs, thought_embeds, thought_pass, thought_rollout
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.tokens.relaxation import Relaxation
from softrl.types import Texts

MIXING_AT = "mixing_at/"  # and a position: the mean weight of thoughts after that token
_SHOWN_POSITIONS = 8
_EVALUATION_STEP = -1  # random streams of evaluations are not those of any training step


@dataclass(frozen=True)
class ThoughtSample:
    """What was measured of one text, a number for each token that was thought before.

    Attributes:
        text_index: of its row.
        slots: the token that was thought after; the next one is scored.
        base, mixed: NLL of the true token without and with a thought, nats; with several thoughts, their mean.
        marginal: `−log mean exp` of the thoughts' log-likelihoods, a bound that is tighter than their mean.
        mixing: weight of the thought.
        base_hits, hits: whether the true token was the likeliest (of several thoughts: in which share of them).
        thoughts: token ids of the first thought.
    """

    text_index: int
    slots: list[int]
    base: list[float]
    mixed: list[float]
    marginal: list[float]
    mixing: list[float]
    base_hits: list[float]
    hits: list[float]
    thoughts: list[list[int]]


@torch.no_grad()
def measure_thoughts(
    model: ThinkingLM,
    texts: Texts,
    indices: list[int],
    anchors: Anchors,
    num_samples: int = 1,
    source: ThoughtSource = "policy",
    relaxation: Relaxation | None = None,
    seed: int = 0,
    attention: BranchAttention = "shared",
) -> list[ThoughtSample]:
    """Think about held-out texts and score the token after every thought, with the same random numbers every time."""
    where, is_anchor = anchors
    seeds = [sequence_seed(seed, _EVALUATION_STEP, index) for index in indices]
    random = SequenceRandom(seeds, texts.ids.device, rows=where.shape[1] * num_samples)
    thoughts = thought_rollout(model, texts, where, is_anchor, random, num_samples, source, relaxation, attention)
    embeds = thought_embeds(model, thoughts, source)
    passed = thought_pass(model, texts, thoughts, 1, embeds, attention, with_hits=True)
    talk = passed.talk_log_probs[..., 0].float()
    count = torch.tensor(float(num_samples)).log()
    columns: dict[str, Tensor] = {
        "slots": where, "base": -passed.base_log_probs[..., 0].float(), "mixed": -talk.mean(-1),
        "marginal": count - talk.logsumexp(-1), "mixing": passed.mixing[..., 0].float().mean(-1),
        "base_hits": passed.base_hits[..., 0].float(), "hits": passed.talk_hits[..., 0].float().mean(-1),
        "thoughts": thoughts.tokens[:, :, 0],
    }  # fmt: skip
    valid = passed.is_talk[..., 0]
    return [
        ThoughtSample(index, **{name: values[row][valid[row]].tolist() for name, values in columns.items()})
        for row, index in enumerate(indices)
    ]


@torch.no_grad()
def measure_texts(model: ThinkingLM, texts: Texts, indices: list[int], anchors: Anchors) -> list[ThoughtSample]:
    """The same numbers of a model that does not think."""
    where, is_anchor = anchors
    log_probs, hits = text_log_probs(model, texts, with_hits=True)
    samples = []
    for row, index in enumerate(indices):
        slots = where[row][is_anchor[row]]
        nll, hit = (-log_probs[row, slots]).tolist(), hits[row, slots].float().tolist()
        nothing = [0.0] * len(nll)
        samples.append(ThoughtSample(index, slots.tolist(), nll, nll, nll, nothing, hit, hit, [[] for _ in nll]))
    return samples


def summary(samples: list[ThoughtSample]) -> dict[str, float]:
    """Means over tokens: `nll` with thoughts, `base_nll` without, on easy and hard ones; weights by position."""
    base, mixed = _joined(samples, "base"), _joined(samples, "mixed")
    hard = base > base.median()
    values = {
        "nll": mixed.mean(), "base_nll": base.mean(), "gain": (base - mixed).mean(),
        "marginal_nll": _joined(samples, "marginal").mean(), "mixing": _joined(samples, "mixing").mean(),
        "accuracy": _joined(samples, "hits").mean(), "base_accuracy": _joined(samples, "base_hits").mean(),
    }  # fmt: skip
    for name, which in (("hard", hard), ("easy", ~hard)):
        if which.any():
            values |= {f"nll_{name}": mixed[which].mean(), f"base_nll_{name}": base[which].mean()}
    numbers = {name: value.item() for name, value in values.items()}
    weights = by_position(samples, "mixing")
    slots = list(weights)
    for slot in slots[:: max(1, -(-len(slots) // _SHOWN_POSITIONS))]:
        numbers[f"{MIXING_AT}{slot}"] = weights[slot]
    return numbers


def by_position(samples: list[ThoughtSample], name: str) -> dict[int, float]:
    """The mean of a number of `ThoughtSample` over the texts, for every slot."""
    found: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        for slot, value in zip(sample.slots, getattr(sample, name), strict=True):
            found[slot].append(value)
    return {slot: sum(values) / len(values) for slot, values in sorted(found.items())}


def _joined(samples: list[ThoughtSample], name: str) -> Tensor:
    return torch.tensor([value for sample in samples for value in getattr(sample, name)], dtype=torch.float64)
