"""The discriminator's side of a text GAN: the completions it has seen, its optimiser, its updates, its file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from softrl.assets import write_atomically
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.discriminator import Discriminator, discriminator_loss, gradient_penalty
from softrl.tokens.noise import sequence_seed
from softrl.trainers.gan_config import AdversarialArguments
from softrl.types import SoftTokens

FILE_NAME = "discriminator.pt"
Text = tuple[Tensor, Tensor]  # states [S, D], or [N, S, D], and what each token counts


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
        self._read: list[tuple[Text, Text]] = []  # of each pair, generated and real: the frozen layers read it once
        self.optimizer = torch.optim.AdamW(discriminator.head.parameters(), lr=args.discriminator_learning_rate)

    @torch.no_grad()
    def add(self, pairs: list[Pair]) -> float:
        """Put completions into the buffer, the oldest ones out of it; returns how many of the new ones it tells right.

        That share, of real and generated ones together, is of completions that it was not trained on. Far below its
        accuracy in training it overfits.
        """
        read = self._states(pairs)
        self.pairs = [*self.pairs, *pairs][-self.args.discriminator_buffer_size :]
        self._read = [*self._read, *read][-self.args.discriminator_buffer_size :]
        generated, real = self._batch(read)
        return _accuracy(self.discriminator.log_odds(*real), self.discriminator.log_odds(*generated)).item()

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
        args = self.args
        seed = sequence_seed(self.seed, self.num_updates, accelerator.process_index, 0)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.pairs), generator=generator)[: args.discriminator_batch_size].tolist()
        shares = torch.rand(len(rows), generator=generator)
        generated, real = self._batch([self._read[row] for row in rows])
        with torch.enable_grad():
            of_real, of_generated = self.discriminator.log_odds(*real), self.discriminator.log_odds(*generated)
            loss = discriminator_loss(of_real, of_generated, args.label_smoothing)
            penalty = gradient_penalty(self.discriminator, real, generated, shares)
            self.optimizer.zero_grad()
            (loss + args.gradient_penalty * penalty).backward()
        if accelerator.num_processes > 1:
            for parameter in self.discriminator.head.parameters():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        accuracy = _accuracy(of_real, of_generated)
        return {"loss": loss.item(), "accuracy": accuracy.item(), "gradient_penalty": penalty.item()}

    @torch.no_grad()
    def _states(self, pairs: list[Pair]) -> list[tuple[Text, Text]]:
        """States and presence of every generated and real completion, on the CPU."""
        device, size = next(self.discriminator.head.parameters()).device, self.args.discriminator_batch_size
        read = []
        for start in range(0, len(pairs), size):
            piece = pairs[start : start + size]
            columns = {"prompt": [pair.prompt for pair in piece]}
            sides = []
            for tokens in ([pair.generated for pair in piece], [pair.real for pair in piece]):
                texts = self.discriminator.states(_stacked(tokens, device), columns)
                sides.append(list(zip(*(values.cpu().unbind() for values in texts), strict=True)))
            read += list(zip(*sides, strict=True))
        return read

    def _batch(self, read: list[tuple[Text, Text]]) -> tuple[Text, Text]:
        """Generated and real texts, each stacked, all filled up with nothing to one length."""
        device = next(self.discriminator.head.parameters()).device
        rows = [text for side in zip(*read, strict=True) for text in side]
        states, presence = (pad_sequence(list(values), True).to(device) for values in zip(*rows, strict=True))
        count = len(read)
        return (states[:count], presence[:count]), (states[count:], presence[count:])

    def save(self, folder: str | Path, process_index: int = 0) -> None:
        """Write weights, optimiser and buffer into a checkpoint; other processes than the first their buffers."""
        buffer = [
            {"prompt": pair.prompt, **{name: _as_dict(getattr(pair, name)) for name in ("generated", "real")}}
            for pair in self.pairs
        ]
        state: dict[str, Any] = {"buffer": buffer, "num_updates": self.num_updates}
        if process_index == 0:
            state |= {"head": self.discriminator.head.state_dict(), "optimizer": self.optimizer.state_dict()}
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
        self.discriminator.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        own = Path(folder) / _file_of(process_index)
        state = torch.load(own, weights_only=True) if own.is_file() else {**state, "buffer": []}
        self.num_updates = state["num_updates"]
        self.pairs = [
            Pair(row["prompt"], SoftTokens(**row["generated"]), SoftTokens(**row["real"])) for row in state["buffer"]
        ]
        self._read = self._states(self.pairs)


def pairs_of(prompts: list[Any], generated: SoftTokens, references: list[list[int]]) -> list[Pair]:
    """Rows of generated completions, each with the token ids of a real one of its prompt."""
    made = []
    for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        ids = torch.tensor([reference], dtype=torch.long)
        real = one_hot_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        own = [values[row : row + 1].detach().cpu() for values in (generated.ids, generated.weights, generated.mask)]
        made.append(Pair(prompt, SoftTokens(*own, generated.eos_ids), real))
    return made


def _accuracy(of_real: Tensor, of_generated: Tensor) -> Tensor:
    return torch.cat([of_real > 0, of_generated < 0]).float().mean()


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
