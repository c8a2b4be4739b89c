"""A baseline from earlier steps: the exponential moving average of the rewards."""


class RunningMean:
    """`m = Σ_k d^(n−k) r_k / Σ_k d^(n−k)` over the n steps so far; 0 before the first.

    It knows nothing of the step that it is a baseline for, so the estimate stays unbiased. The division makes up for
    the start, as Adam's does.

    Args:
        decay: d in [0, 1): what an older step counts of the next one.
    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.9):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the running mean's decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    @property
    def value(self) -> float:
        """The mean so far."""
        return self.total / self.weight if self.weight > 0.0 else 0.0

    def update(self, reward: float) -> float:
        """The mean after one more step.

        Args:
            reward: mean over the step's sequences.
        """
        self.total = self.decay * self.total + reward
        self.weight = self.decay * self.weight + 1.0
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; the decay is the recipe's."""
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.total, self.weight = float(state["total"]), float(state["weight"])
