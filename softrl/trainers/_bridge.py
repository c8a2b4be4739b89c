"""The only place that imports TRL's private names; they move between minor releases, hence the pin in pyproject."""

from trl.models.utils import _ForwardRedirection as ForwardRedirection
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.utils import print_prompt_completions_sample

__all__ = ["BaseConfig", "BaseTrainer", "ForwardRedirection", "print_prompt_completions_sample"]
