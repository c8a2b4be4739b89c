"""The only place that imports TRL's private names; they move between minor releases, hence the pin in pyproject."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from trl.models.utils import _ForwardRedirection as ForwardRedirection
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.utils import disable_dropout_in_model, print_prompt_completions_sample

__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "ForwardRedirection",
    "disable_dropout_in_model",
    "print_prompt_completions_sample",
    "vllm_generation",
]


def vllm_generation(left_out: str, **settings: Any) -> Any:
    """TRL's `VLLMGeneration`, which never sends the parameters of submodules named `left_out`.

    Imported here and not above: with it comes all of vLLM, where that is installed.
    """
    from trl.generation.vllm_generation import VLLMGeneration

    class Generation(VLLMGeneration):
        def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
            # All are gone through, since gathering one is collective.
            for name, parameter in super()._iter_named_params():
                if left_out not in name.split("."):
                    yield name, parameter

    return Generation(**settings)
