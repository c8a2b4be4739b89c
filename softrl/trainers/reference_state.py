"""Checkpoints that hold the frozen model which a run measures against.

It is the model as it was when training began. A resumed run is handed a model to begin with again, which need not be
that one. Left out: what the reference shares with the trained model (the base LM under adapters), which others save.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softrl.assets import write_atomically

_FILE = "reference.pt"


class ReferenceStateMixin:
    """
    What makes a trainer's checkpoints hold its `prior`, if it has one.

    Overrides of [`~transformers.Trainer`]: `_load_optimizer_and_scheduler`; and `save_own_state`.
    """

    prior: nn.Module | None = None

    def save_own_state(self, folder: Path) -> None:
        super().save_own_state(folder)
        if self.prior is not None and self.args.should_save:
            with write_atomically(folder / _FILE) as temporary:
                torch.save(self._reference_state(), temporary)

    def _reference_state(self) -> dict[str, Tensor]:
        """Of the prior what is not the trained model's own."""
        model = self.accelerator.unwrap_model(self.model)
        shared = {id(value) for value in model.state_dict(keep_vars=True).values()}
        assert self.prior is not None
        state = self.prior.state_dict(keep_vars=True)
        return {name: value.detach() for name, value in state.items() if id(value) not in shared}

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.prior is None:
            return
        path = Path(checkpoint) / _FILE
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {_FILE}, the model that its run began with and that thoughts are compared with: "
                "its run had none, or an older softrl wrote it; start a new run from its model instead of resuming it"
            )
        found, own = torch.load(path, map_location="cpu", weights_only=True), self._reference_state()
        if found.keys() != own.keys():
            raise ValueError(
                f"{path} is of another kind of model: {sorted(found.keys() ^ own.keys())[:3]} are in one of the two; "
                "resume with the model and adapters of its run"
            )
        self.prior.load_state_dict(found, strict=False)
