"""How a surrogate of thoughts' rewards is fitted beside the model: every batch once, after it was asked about it."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from softrl.assets import write_atomically
from softrl.estimators.thoughts import is_valid, surrogate_inputs
from softrl.rewards.surrogate import Pooling, RewardSurrogate
from softrl.rollouts.thoughts import ThoughtPass
from softrl.types import Thoughts

_FILE = "surrogate.pt"


class SurrogateFit:
    """A surrogate with an AdamW of its own.

    A batch is estimated before the surrogate has learned from it, so that estimates, and the error that says whether
    to trust them, are of text it has not seen.

    Args:
        width: D.
        max_std_nats: see `RewardSurrogate`.
        learning_rate: of AdamW.
        seed: of weights and bootstraps.
        thought_length: n, of all thoughts; None where it varies, and a thought is read as the mean of its tokens,
            which cannot tell their order.
    """

    def __init__(
        self, width: int, max_std_nats: float, learning_rate: float, seed: int, thought_length: int | None = None
    ):
        pooling: Pooling = "mean" if thought_length is None else "flatten"
        self.surrogate = RewardSurrogate(
            width, thought_length or 1, max_std_nats=max_std_nats, pooling=pooling, seed=seed
        )
        self.optimizer = torch.optim.AdamW(self.surrogate.parameters(), lr=learning_rate, weight_decay=0.0)
        self.num_updates = 0

    def learn(
        self, thoughts: Thoughts, passed: ThoughtPass, embeds: Tensor, accelerator: Accelerator
    ) -> dict[str, float]:
        """One step on the thoughts of a batch, the same on all processes; numbers for the logs, of all processes."""
        valid = is_valid(passed).flatten()
        if not valid.any():  # all processes take a step; this one learns from what counts for nothing
            valid[0] = True
        context, read = surrogate_inputs(thoughts, passed, embeds.detach())
        rewards = passed.rewards.detach().flatten(0, 1).float()
        return self.learn_from(context[valid], read[valid], rewards[valid], accelerator)

    def learn_from(self, context: Tensor, read: Tensor, rewards: Tensor, accelerator: Accelerator) -> dict[str, float]:
        """The same from what the surrogate reads: contexts [M, D], thoughts [M, S, n, D] and their rewards [M, S]."""
        before = self.surrogate(context, read)
        errors = (before.estimated.detach() - rewards).square()
        loss = self.surrogate.loss(context, read, rewards, batch=self.num_updates)
        gradients = torch.autograd.grad(loss, list(self.surrogate.parameters()))
        for parameter, gradient in zip(self.surrogate.parameters(), gradients, strict=True):
            parameter.grad = accelerator.reduce(gradient, "mean")
        self.optimizer.step()
        self.num_updates += 1
        sums = [errors.sum(), before.trusted.float().sum(), before.std_nats.sum(), rewards.new_tensor(rewards.numel())]
        *found, count = accelerator.gather(torch.stack(sums)[None]).sum(0)
        if count == 0:  # nothing in the batch counts, on any process
            return {}
        square, trusted, spread = (each / count for each in found)
        self.surrogate.observe(square)
        numbers = {
            "rmse": square.sqrt(),
            "recent_rmse": self.surrogate.rmse_nats,
            "trusted": trusted,
            "spread": spread,
        }
        return {f"surrogate/{name}": value.item() for name, value in numbers.items()}

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {
            "surrogate": self.surrogate.state_dict(), "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: its surrogate does not know its own error.
        """
        if "mean_square_error" not in state["surrogate"]:
            raise ValueError(
                "the checkpoint's surrogate has no mean_square_error: an older softrl wrote it, which trusted "
                "estimates without asking for their error; start a new run from its model instead of resuming it"
            )
        self.surrogate.load_state_dict(state["surrogate"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = state["num_updates"]


class SurrogateStateMixin:
    """
    What makes a trainer's checkpoints hold its surrogate, if it has one.

    Overrides of [`~transformers.Trainer`]: `_load_optimizer_and_scheduler`; and `save_own_state`.
    """

    surrogate: SurrogateFit | None = None

    def save_own_state(self, folder: Path) -> None:
        super().save_own_state(folder)
        if self.surrogate is not None and self.args.should_save:
            with write_atomically(folder / _FILE) as temporary:
                torch.save(self.surrogate.state_dict(), temporary)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.surrogate is not None:
            path = Path(checkpoint) / _FILE
            if not path.is_file():
                raise ValueError(
                    f"{checkpoint} has no {_FILE}: its run had no reward_surrogate, or objective='surrogate'; start a "
                    "new run from its model instead of resuming it"
                )
            self.surrogate.load_state_dict(torch.load(path, weights_only=True))
