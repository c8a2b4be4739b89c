"""Texts that a model goes on to write under rules of equal mean entropy: their quality and diversity, with errors.

Every rule continues the same beginnings of real reviews, one sample each, from the same random streams, so differences
between rules are paired by beginning. Quality: negative log-likelihood under the untruncated model, beside that of
the human continuations (the gap is what counts: text can be too likely), and the Fréchet distance of embeddings to
them. Diversity: distinct n-grams, Self-BLEU, repetition within a text. Measures of sets are of groups of texts, the
groups being the independent units.
Left out: ratings by people, and MAUVE. Entropies are matched behind human text; behind its own text a rule may have
another one.
Source: the gap of perplexities: Holtzman et al. (2020), arXiv:1904.09751; the other measures: see their modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import t
from torch import Tensor
from tqdm.auto import tqdm

from softrl import assets
from softrl.masking import per_sequence_mean
from softrl.models.policy import Policy
from softrl.rewards.judge import SentenceEncoder
from softrl.rewards.set_metrics import SelfBleu, frechet_distance
from softrl.rollouts.hard import hard_rollout
from softrl.studies.basis_bench import PROMPT_TOKENS, Bench, whole_prompts
from softrl.studies.basis_rules import eta_mask
from softrl.studies.entropy_bound import hard_nll
from softrl.studies.html import mean_and_error
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation
from softrl.trainers.batches import decode
from softrl.trainers.evaluation import distinct_n, repetition
from softrl.trainers.loading import eos_token_ids
from softrl.types import HardRollout

HUMAN = "human text"
UNTRUNCATED = "no truncation"
GROUP_TEXTS = 16  # of measures of sets; they depend on the size, so it is the same for all rules
FALSE_ALARMS = 0.05  # chance that any of all differences is reported where there is none
OF_TEXTS = ("nll_nats", "repetition")
OF_GROUPS = ("distinct_1", "distinct_2", "distinct_3", "self_bleu", "frechet")
MEASURES = (*OF_TEXTS, *OF_GROUPS)
_BATCH = 32
_SHOWN = 4


class EtaRule:
    """Plain η-sampling as a rule of a `Truncation`.

    Args:
        epsilon: ε.
    """

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def mask(self, logits: Float[Tensor, "N V"]) -> Bool[Tensor, "N V"]:
        """The tokens it keeps."""
        return eta_mask(logits, self.epsilon)

    def best(self, logits: Float[Tensor, "N V"], scores: Float[Tensor, "N V"]) -> Int[Tensor, "N"]:
        """The kept token of the highest score."""
        return scores.masked_fill(~self.mask(logits), -torch.inf).argmax(-1)


@dataclass(frozen=True)
class TextRow:
    """One continuation."""

    rule: str
    beginning: str
    continuation: str
    nll_nats: float
    repetition: float


@dataclass(frozen=True)
class SampleRow:
    """What one rule writes; `_se` is the standard error over beginnings, or over groups of them.

    Args:
        rule, parameter: its name and ε or top-p; NaN where there is none.
        entropy_nats: mean of the truncated distributions behind human text, which the rules are matched in.
        texts, groups: how many.
        same_as_basis: share of the texts that are the basis-aware rule's, token by token: streams are shared.
        nll_nats: of a token under the untruncated model, mean of a text.
        nll_gap: the same less that of the human continuation of the same beginning.
        repetition: share of equal pairs among a text's bigrams.
        distinct_1, distinct_2, distinct_3: different n-grams over all, of a group.
        self_bleu: of a text against the others of its group, 0 to 100.
        frechet: distance of a group's embeddings to its human continuations'.
    """

    rule: str
    parameter: float
    entropy_nats: float
    texts: int
    groups: int
    same_as_basis: float
    nll_nats: float
    nll_nats_se: float
    nll_gap: float
    nll_gap_se: float
    repetition: float
    repetition_se: float
    distinct_1: float
    distinct_1_se: float
    distinct_2: float
    distinct_2_se: float
    distinct_3: float
    distinct_3_se: float
    self_bleu: float
    self_bleu_se: float
    frechet: float
    frechet_se: float


@dataclass(frozen=True)
class Difference:
    """A rule's measure less the basis-aware rule's, paired by beginning or group.

    Args:
        rule, measure: whose and which.
        difference, error: mean and its standard error.
        errors_needed: how many of its errors away from zero counts: by Student's t for so many beginnings or groups,
            and by Bonferroni for so many differences.
        differs: it is as far away.
    """

    rule: str
    measure: str
    difference: float
    error: float
    errors_needed: float
    differs: bool


@dataclass(frozen=True)
class Written:
    """The continuations of one rule, in the order of the beginnings.

    Args:
        texts: decoded.
        tokens: up to the end of each.
        values: by measure, one number a text or a group.
    """

    texts: list[str]
    tokens: list[tuple[int, ...]]
    values: dict[str, list[float]]


def samples(bench: Bench) -> tuple[list[SampleRow], list[Difference], list[TextRow]]:
    """Write with every rule, and measure."""
    own, rules = bench.settings, _rules(bench)
    ids = bench.beginnings(own.samples, PROMPT_TOKENS + own.tokens)
    given, human = ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
    references = decode(bench.tokenizer, human, torch.ones_like(human, dtype=torch.bool))
    written = {HUMAN: measured(bench, given, human, torch.ones_like(human, dtype=torch.bool), references)}
    with tqdm(total=len(rules) * len(ids), unit="text") as bar:
        for name, (_, _, truncation) in rules.items():
            bar.set_description(name)
            written[name] = _write(bench, given, truncation, references, bar)
    known = {name: (parameter, entropy) for name, (parameter, entropy, _) in rules.items()}
    basis = f"basis-aware {own.rule}"
    nothing = (float("nan"), float("nan"))
    rows = [
        _row(name, *known.get(name, nothing), each, written[HUMAN], written[basis]) for name, each in written.items()
    ]
    beginnings = decode(bench.tokenizer, given, torch.ones_like(given, dtype=torch.bool))
    shown = [
        TextRow(name, beginnings[text], each.texts[text], *(each.values[measure][text] for measure in OF_TEXTS))
        for text in range(min(_SHOWN, len(ids))) for name, each in written.items()
    ]  # fmt: skip
    return rows, differences(written, basis), shown


def _rules(bench: Bench) -> dict[str, tuple[float, float, Truncation]]:
    """Parameter, mean entropy behind human text, and truncation, by name."""
    found = bench.comparison
    table = {row.rule: row for row in found.rows}
    truncations = {
        f"basis-aware {bench.settings.rule}": Truncation(1, support=bench.rule),
        "eta": Truncation(1, support=EtaRule(found.epsilon)), "top-p": Truncation(1, top_p=found.nucleus),
    }  # fmt: skip
    whole = torch.cat([torch.special.entr(piece.softmax(-1)).sum(-1) for piece in bench.contexts.logits.split(64)])
    rules = {name: (table[name].parameter, table[name].entropy_nats, each) for name, each in truncations.items()}
    return rules | {UNTRUNCATED: (float("nan"), float(whole.mean()), Truncation(1))}


def _write(
    bench: Bench, given: Int[Tensor, "B P"], truncation: Truncation, references: list[str], bar: Any
) -> Written:
    own, eos_ids = bench.settings, eos_token_ids(bench.policy.causal_lm, bench.tokenizer)
    tokens = torch.zeros(len(given), own.tokens, dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for rows in torch.arange(len(given)).split(_BATCH):
        random = SequenceRandom.keyed(0, 0, rows.tolist(), 1)
        rollout = hard_rollout(
            bench.policy, whole_prompts(given[rows]), truncation, random, own.tokens, eos_ids=eos_ids
        )
        length = rollout.tokens.shape[1]
        tokens[rows, :length], mask[rows, :length] = rollout.tokens, rollout.mask
        bar.update(len(rows))
    return measured(bench, given, tokens, mask, references)


@torch.no_grad()
def measured(
    bench: Bench, given: Int[Tensor, "B P"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"],
    references: list[str],
) -> Written:  # fmt: skip
    """Every measure of continuations.

    Args:
        given: beginnings.
        tokens, mask: continuations, True through their ends.
        references: human ones.
    """
    texts = decode(bench.tokenizer, tokens, mask)
    sequences = [tuple(row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]
    pieces = [each.split(_BATCH) for each in (given, tokens, mask)]
    nll = torch.cat([text_nll(bench.policy, *each) for each in zip(*pieces, strict=True)])
    values = {"nll_nats": nll.tolist(), "repetition": repetition(tokens, mask).tolist()}
    return Written(texts, sequences, values | of_groups(texts, sequences, references))


def text_nll(
    policy: Policy, given: Int[Tensor, "B P"], tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Of a text's tokens under the untruncated model, nats, mean."""
    return per_sequence_mean(hard_nll(policy, HardRollout(whole_prompts(given), tokens, mask)), mask)


def of_groups(
    texts: list[str], sequences: list[tuple[int, ...]], references: list[str], size: int = GROUP_TEXTS
) -> dict[str, list[float]]:
    """Measures of sets, one number a whole group; a last one that is not whole is left out, unless it is the only one.

    Args:
        texts, sequences: decoded continuations, and their tokens.
        references: human continuations.
        size: texts of a group.
    """
    starts = range(0, max(1, len(texts) // size) * size, size)
    values: dict[str, list[float]] = {name: [] for name in OF_GROUPS}
    found, real = _last_layer(texts), _last_layer(references)
    for start in starts:
        group = slice(start, start + size)
        for n in (1, 2, 3):
            values[f"distinct_{n}"].append(distinct_n(sequences[group], n))
        others = {"predictions": texts[group], "references": texts[group]}
        values["self_bleu"].append(SelfBleu().compute(**others)["score"])
        values["frechet"].append(frechet_distance(found[group], real[group]))
    return values


def _last_layer(texts: list[str]) -> Float[Tensor, "n D"]:
    """MiniLM's sentence embeddings, which `FrechetDistance` takes too."""
    encoder = SentenceEncoder(assets.encoder())
    return encoder.features(texts)[:, -(encoder.num_features // 3) :]


def _row(name: str, parameter: float, entropy: float, written: Written, human: Written, basis: Written) -> SampleRow:
    gaps = [one - other for one, other in zip(written.values["nll_nats"], human.values["nll_nats"], strict=True)]
    pairs = {measure: mean_and_error(written.values[measure]) for measure in MEASURES}
    pairs["nll_gap"] = mean_and_error(gaps)
    if name == HUMAN:
        pairs["frechet"] = (float("nan"), float("nan"))  # of itself
    numbers = {key: value for measure, (mean, error) in pairs.items()
               for key, value in ((measure, mean), (f"{measure}_se", error))}  # fmt: skip
    count, groups = len(written.texts), len(written.values["distinct_1"])
    same = sum(one == other for one, other in zip(written.tokens, basis.tokens, strict=True)) / count
    return SampleRow(name, parameter, entropy, count, groups, same, **numbers)


def differences(written: Mapping[str, Written], basis: str) -> list[Difference]:
    """Of every other rule, human text included, to the basis-aware one."""
    pairs = [
        (name, measure) for name in written for measure in MEASURES
        if name != basis and (name, measure) != (HUMAN, "frechet")
    ]  # fmt: skip
    return [_difference(written, basis, *pair, len(pairs)) for pair in pairs]


def _difference(written: Mapping[str, Written], basis: str, name: str, measure: str, number: int) -> Difference:
    values, others = written[name].values[measure], written[basis].values[measure]
    mean, error = mean_and_error(one - other for one, other in zip(values, others, strict=True))
    needed = float(t.ppf(1.0 - FALSE_ALARMS / (2.0 * number), max(1, len(values) - 1)))
    return Difference(name, measure, mean, error, needed, error > 0.0 and abs(mean) > needed * error)
