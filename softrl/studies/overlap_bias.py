"""How far soft BLEU and ROUGE are from the mean hard score of the texts that soft tokens stand for, as they sharpen.

Real sentences are the references. A soft text has the reference's token at most places and other sentences' tokens
beside it; its weights are sharpened by a temperature. Left out: dependent tokens, as a policy's are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from softrl.assets import write_atomically
from softrl.data.keywords import review_keywords
from softrl.rewards.overlap import BleuReward, RougeReward, RougeType
from softrl.studies.tables import write_csv
from softrl.types import SoftTokens

TEMPERATURES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1, 0.02)
_NUM_KEPT = 8
_LOGIT_OF_THE_REFERENCE = 2.0  # nats above the others, on average


@dataclass(frozen=True)
class Row:
    """One reward at one temperature, means over texts; `bias` is soft less the mean hard score, with its error."""

    reward: str
    temperature: float
    entropy_nats: float  # a token
    soft: float
    hard: float
    bias: float
    bias_se: float


def run(tokenizer: Any, num_texts: int, num_samples: int, output: Path, figure: Path, seed: int = 0) -> list[Row]:
    """Measure and write rows and figure.

    Args:
        tokenizer: the policy's.
        num_texts: references and soft texts.
        num_samples: hard texts that are drawn from each soft one.
        output: a CSV file.
        figure: a PNG file.
        seed: of logits and samples.
    """
    references = list(review_keywords(tokenizer, num_texts, split="test")["reference"])
    generator = torch.Generator().manual_seed(seed)
    ids, logits, mask = _soft_texts(tokenizer(references, add_special_tokens=False).input_ids, generator)
    rewards = [
        BleuReward(tokenizer),
        *(RougeReward(tokenizer, rouge_type=cast(RougeType, kind)) for kind in get_args(RougeType)),
    ]
    rows = []
    for temperature in tqdm(TEMPERATURES, desc="temperatures", leave=False):
        weights = (logits / temperature).softmax(-1)
        tokens = SoftTokens(ids, weights, mask)
        entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)[mask].mean().item()
        drawn = torch.multinomial(weights.flatten(0, 1), num_samples, replacement=True, generator=generator)
        samples = ids.flatten(0, 1).gather(-1, drawn).unflatten(0, mask.shape).permute(0, 2, 1).flatten(0, 1)
        columns = {"reference": [text for text in references for _ in range(num_samples)]}
        for reward in rewards:
            soft = reward.soft(tokens, reference=references)
            hard = reward.hard(samples, mask.repeat_interleave(num_samples, 0), **columns).view(num_texts, -1)
            bias = (soft - hard.mean(1)).mean().item()
            error = (hard.var(1) / num_samples).sum().sqrt().item() / num_texts
            rows.append(Row(reward.name, temperature, entropy, soft.mean().item(), hard.mean().item(), bias, error))
    write_csv(rows, output)
    plot(rows, figure)
    return rows


def _soft_texts(references: list[list[int]], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and logits [N, T, K] of texts as long as their references, the reference's token first among the kept."""
    longest = max(map(len, references))
    pool = torch.tensor([token for row in references for token in row])
    others = pool[torch.randint(len(pool), (len(references), longest, _NUM_KEPT), generator=generator)]
    mask = torch.arange(longest) < torch.tensor([[len(row)] for row in references])
    for row, reference in enumerate(references):
        others[row, : len(reference), 0] = torch.tensor(reference)
    logits = torch.randn(others.shape, generator=generator, dtype=torch.float64)
    logits[..., 0] += _LOGIT_OF_THE_REFERENCE
    return others, logits, mask


def plot(rows: list[Row], path: Path) -> None:
    """Bias against the entropy of a token, a line for each reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name in dict.fromkeys(row.reward for row in rows):
        own = [row for row in rows if row.reward == name]
        axis.errorbar(
            [row.entropy_nats for row in own], [row.bias for row in own], [2 * row.bias_se for row in own],
            marker="o", markersize=4, label=name,
        )  # fmt: skip
    axis.axhline(0.0, color="grey", linewidth=0.8)
    axis.set_xlabel("entropy of a soft token, nats")
    axis.set_ylabel("soft less mean hard score, ± 2 standard errors")
    axis.grid(alpha=0.3)
    axis.legend()
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
