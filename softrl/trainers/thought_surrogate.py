"""How a surrogate of thoughts' rewards is fitted beside the model: every batch once, after it was asked about it."""

import torch
from accelerate import Accelerator
from torch import Tensor

from softrl.estimators.thoughts import is_valid, surrogate_inputs
from softrl.rewards.surrogate import RewardSurrogate
from softrl.rollouts.thoughts import ThoughtPass
from softrl.types import Thoughts


class SurrogateFit:
    """A surrogate with an AdamW of its own.

    A batch is estimated before the surrogate has learned from it, so that estimates are of text it has not seen.

    Args:
        width: D.
        max_std_nats: see `RewardSurrogate`.
        learning_rate: of AdamW.
        seed: of weights and bootstraps.
    """

    def __init__(self, width: int, max_std_nats: float, learning_rate: float, seed: int):
        self.surrogate = RewardSurrogate(width, max_std_nats=max_std_nats, seed=seed)
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
        before = self.surrogate(context[valid], read[valid])
        loss = self.surrogate.loss(context[valid], read[valid], rewards[valid], batch=self.num_updates)
        gradients = torch.autograd.grad(loss, list(self.surrogate.parameters()))
        for parameter, gradient in zip(self.surrogate.parameters(), gradients, strict=True):
            parameter.grad = accelerator.reduce(gradient, "mean")
        self.optimizer.step()
        self.num_updates += 1
        error = (before.estimated.detach() - rewards[valid]).square().mean().sqrt()
        numbers = torch.stack([error, before.trusted.float().mean(), before.std_nats.mean()])
        found = accelerator.gather(numbers[None]).mean(0).tolist()
        return {f"surrogate/{name}": value for name, value in zip(("rmse", "trusted", "spread"), found, strict=True)}

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {
            "surrogate": self.surrogate.state_dict(), "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.surrogate.load_state_dict(state["surrogate"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = state["num_updates"]
