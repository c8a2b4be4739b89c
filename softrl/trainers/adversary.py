"""The discriminator's side of a text GAN: the completions it has seen, its optimiser, its updates, its file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from softrl.assets import write_atomically
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.discriminator import Discriminator, discriminator_loss, gradient_penalty
from softrl.tokens.noise import sequence_seed
from softrl.trainers.gan_config import AdversarialArguments
from softrl.types import SoftTokens

FILE_NAME = "discriminator.pt"


@dataclass(frozen=True)
class Pair:
    """A generated completion of one prompt and the real one, as soft tokens of one row, on the CPU."""

    prompt: Any
    generated: SoftTokens
    real: SoftTokens


class Adversary:
    """Trains a discriminator on the completions that a generator has made of late.

    Args:
        discriminator: what it trains.
        args: how.
        seed: of its batches.
    """

    def __init__(self, discriminator: Discriminator, args: AdversarialArguments, seed: int) -> None:
        self.discriminator = discriminator
        self.args = args
        self.seed = seed
        self.num_updates = 0
        self.pairs: list[Pair] = []
        self.optimizer = torch.optim.AdamW(discriminator.trainable(), lr=args.discriminator_learning_rate)

    def add(self, pairs: list[Pair]) -> None:
        """Put completions into the buffer, the oldest ones out of it."""
        self.pairs = [*self.pairs, *pairs][-self.args.discriminator_buffer_size :]

    def train(self, num_steps: int, accelerator: Accelerator) -> dict[str, float]:
        """Update the discriminator; returns its loss, accuracy and slope, means over the updates.

        Every process draws from its own buffer, and gradients are averaged over processes.
        """
        totals: dict[str, float] = {}
        for _ in range(num_steps):
            measured = self._update(accelerator)
            totals = {name: totals.get(name, 0.0) + value / num_steps for name, value in measured.items()}
        return totals

    def _update(self, accelerator: Accelerator) -> dict[str, float]:
        args, device = self.args, self.discriminator.head.weight.device
        seed = sequence_seed(self.seed, self.num_updates, accelerator.process_index, 0)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.pairs), generator=generator)[: args.discriminator_batch_size].tolist()
        chosen = [self.pairs[row] for row in rows]
        columns = {"prompt": [pair.prompt for pair in chosen]}
        shares = torch.rand(len(chosen), generator=generator).to(device)
        generated, real = (
            self.discriminator.embedded(_stacked(tokens, device), columns)
            for tokens in ([pair.generated for pair in chosen], [pair.real for pair in chosen])
        )
        generated, real = _of_one_length(generated, real)
        with torch.enable_grad():
            of_real, of_generated = self.discriminator.log_odds(*real), self.discriminator.log_odds(*generated)
            loss = discriminator_loss(of_real, of_generated, args.label_smoothing)
            penalty = gradient_penalty(self.discriminator, real, generated, shares)
            self.optimizer.zero_grad()
            (loss + args.gradient_penalty * penalty).backward()
        if accelerator.num_processes > 1:
            for parameter in self.discriminator.trainable():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        right = torch.cat([of_real > 0, of_generated < 0]).float().mean()
        return {"loss": loss.item(), "accuracy": right.item(), "gradient_penalty": penalty.item()}

    def save(self, folder: str | Path, process_index: int = 0) -> None:
        """Write weights, optimiser and buffer into a checkpoint; other processes than the first their buffers."""
        buffer = [
            {"prompt": pair.prompt, **{name: _as_dict(getattr(pair, name)) for name in ("generated", "real")}}
            for pair in self.pairs
        ]
        state: dict[str, Any] = {"buffer": buffer, "num_updates": self.num_updates}
        if process_index == 0:
            weights = self.discriminator.state_dict()
            weights.pop("embedding.weight")  # the policy's, and the largest part
            state |= {"discriminator": weights, "optimizer": self.optimizer.state_dict()}
        with write_atomically(Path(folder) / _file_of(process_index)) as temporary:
            torch.save(state, temporary)

    def load(self, folder: str | Path, process_index: int = 0) -> None:
        """Restore what `save` wrote.

        Raises:
            ValueError: the checkpoint has no discriminator.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {FILE_NAME}: it is a checkpoint of a trainer without a discriminator; start a new "
                "run from its model instead of resuming it"
            )
        state = torch.load(path, weights_only=True)
        self.discriminator.load_state_dict(state["discriminator"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        own = Path(folder) / _file_of(process_index)
        state = torch.load(own, weights_only=True) if own.is_file() else {**state, "buffer": []}
        self.num_updates = state["num_updates"]
        self.pairs = [
            Pair(row["prompt"], SoftTokens(**row["generated"]), SoftTokens(**row["real"])) for row in state["buffer"]
        ]


def pairs_of(prompts: list[Any], generated: SoftTokens, references: list[list[int]]) -> list[Pair]:
    """Rows of generated completions, each with the token ids of a real one of its prompt."""
    made = []
    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        ids = torch.tensor([reference], dtype=torch.long)
        real = one_hot_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        own = [values[row : row + 1].detach().cpu() for values in (generated.ids, generated.weights, generated.mask)]
        made.append(Pair(prompt, SoftTokens(*own, generated.eos_ids), real))
    return made


def _file_of(process_index: int) -> str:
    return FILE_NAME if process_index == 0 else FILE_NAME.replace(".pt", f"-{process_index}.pt")


def _as_dict(tokens: SoftTokens) -> dict[str, Any]:
    return {"ids": tokens.ids, "weights": tokens.weights, "mask": tokens.mask, "eos_ids": tokens.eos_ids}


def _stacked(rows: list[SoftTokens], device: torch.device) -> SoftTokens:
    """Rows of different lengths and numbers of kept tokens as one batch."""
    steps, kept = (max(row.ids.shape[axis] for row in rows) for axis in (1, 2))

    def padded(values: Tensor) -> Tensor:
        missing = (0, kept - values.shape[2], 0, steps - values.shape[1])
        return F.pad(values, missing)

    return SoftTokens(
        torch.cat([padded(row.ids) for row in rows]).to(device),
        torch.cat([padded(row.weights) for row in rows]).to(device),
        torch.cat([F.pad(row.mask, (0, steps - row.mask.shape[1])) for row in rows]).to(device),
        rows[0].eos_ids,
    )


def _of_one_length(*texts: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Embedded texts filled up with nothing to the longest."""
    longest = max(presence.shape[1] for _, presence in texts)
    return [
        (F.pad(embeds, (0, 0, 0, longest - embeds.shape[1])), F.pad(presence, (0, longest - presence.shape[1])))
        for embeds, presence in texts
    ]
