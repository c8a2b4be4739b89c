"""The only place that imports TRL's private names; they move between minor releases, hence the pin in pyproject."""

from trl.models.utils import _ForwardRedirection as ForwardRedirection
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer

__all__ = ["BaseConfig", "BaseTrainer", "ForwardRedirection"]
