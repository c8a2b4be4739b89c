"""Without a reasoner a text is read in one pass: what that saves against the plain way, every prefix by itself.

`softrl bench reasoner` prints, for texts of several lengths, how far apart predictions and gradients
of the two ways are, and the processor's seconds of a training pass each. Left out: thoughts, which branch off a text
(`softrl bench thoughts`).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig


@dataclass(frozen=True)
class Paths:
    """Of texts of T tokens: the largest difference, and processor seconds of a forward and backward pass each."""

    num_tokens: int
    difference: float
    gradient_difference: float
    fast_seconds: float
    slow_seconds: float


def one_prefix_at_a_time(model: ReasonerForCausalLM, ids: Int[Tensor, "N T"]) -> Float[Tensor, "N T V"]:
    """log p of the next token after every prefix, each of which all modules read anew."""
    prefixes = (ids[:, :end] for end in range(1, ids.shape[1] + 1))
    return torch.stack([model(prefix).logits[:, -1] for prefix in prefixes], 1)


def measure(num_tokens: int, num_texts: int = 4, width: int = 32, rounds: int = 3) -> Paths:
    """In float64, so that differences are those of the computation and not of its rounding."""
    torch.manual_seed(0)
    sizes = {"base_lm_size": width, "interpreter_size": width}
    model = ReasonerForCausalLM(ReasonerConfig(use_reasoner=False, **sizes)).double()  # type: ignore[arg-type]
    ids = torch.randint(0, model.config.vocab_size, (num_texts, num_tokens))
    fast, slow = (
        _timed(run, model, ids, rounds) for run in (lambda of, given: of(given).logits, one_prefix_at_a_time)
    )
    gradients = max(float((a - b).abs().max()) for a, b in zip(fast[1], slow[1], strict=True))
    return Paths(num_tokens, float((fast[0] - slow[0]).abs().max()), gradients, fast[2], slow[2])


def _timed(
    run: Callable[[ReasonerForCausalLM, Tensor], Tensor], model: ReasonerForCausalLM, ids: Tensor, rounds: int
) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """Predictions, gradients of the loss, and the median of the seconds."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        log_probs = run(model, ids)
        loss = -log_probs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        seconds.append(time.process_time() - started)
    return log_probs.detach(), gradients, statistics.median(seconds)


def run(lengths: Sequence[int]) -> None:
    """Print a row for every T.

    Raises:
        ValueError: a text of fewer than two tokens, which has nothing to predict.
    """
    if least := [length for length in lengths if length < 2]:
        raise ValueError(f"lengths must be at least 2, so that there is a token to predict, got {least[0]}")
    titles = ("largest difference", "of gradients", "one pass, s", "by prefix, s", "ratio")
    print("{:>5} {:>19} {:>13} {:>12} {:>13} {:>6}".format("T", *titles))
    for num_tokens in lengths:
        found = measure(num_tokens)
        print(
            f"{num_tokens:>5} {found.difference:>19.1e} {found.gradient_difference:>13.1e} "
            f"{found.fast_seconds:>12.3f} {found.slow_seconds:>13.3f} {found.slow_seconds / found.fast_seconds:>6.1f}",
            flush=True,
        )
