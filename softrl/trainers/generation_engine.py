"""Hard rollouts through a generation engine: vLLM, by TRL's own client.

`GenerationEngine.hard_rollout` stands in for `rollouts.hard.hard_rollout` wherever a trainer samples hard tokens.
Untried on hardware: tests run TRL's client against a stand-in for the server.
Left out: sampling text GANs' first completions (prompts may be spread unevenly over processes there, which TRL's
client does not allow), and any correction for an engine that computes in another precision.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from softrl.masking import mask_through_eos
from softrl.models.policy import Policy
from softrl.rollouts.soft import check_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation
from softrl.trainers._bridge import vllm_generation
from softrl.trainers.value_head import NAME as VALUE_HEAD
from softrl.trainers.vllm_config import VLLMConfig
from softrl.types import HardRollout, Prompts


def make_engine(
    args: VLLMConfig, model: nn.Module, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
) -> "GenerationEngine | None":
    """The engine that `args` ask for; None for our own loop. Waits for the server, on the main process."""
    if not args.use_vllm:
        return None
    generation = vllm_generation(
        left_out=VALUE_HEAD,
        model=model,
        accelerator=accelerator,
        processing_class=tokenizer,
        mode=args.vllm_mode,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        server_timeout=args.vllm_server_timeout,
        group_port=args.vllm_group_port,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        logprobs=None,  # log π is computed here, with its gradient
    )
    return GenerationEngine(generation)


class GenerationEngine:
    """TRL's `VLLMGeneration` as a sampler of a policy.

    Args:
        generation: TRL's object, or one that has its `model`, `generate`, `sync_weights` and sampling settings.
    """

    def __init__(self, generation: Any):
        self.generation = generation
        self._pushed: int | None = None  # the step whose weights the engine has

    def push(self, step: int | None) -> None:
        """Send the policy's weights to the engine, LoRA merged and shards gathered, unless it has that step's.

        All processes call it, outside `parts_callable`: TRL gathers parameters that are sharded as they are stored.

        Args:
            step: the step that rollouts belong to; None sends in any case.
        """
        if step is not None and step == self._pushed:
            return
        for module in self.generation.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the root stays gathered after a call, and TRL's FSDP2 branch knows shards only
        self.generation.sync_weights()
        self._pushed = step

    def hard_rollout(
        self,
        policy: Policy,
        prompts: Prompts,
        truncation: Truncation,
        random: SequenceRandom,
        num_steps: int,
        num_samples: int = 1,
        eos_ids: tuple[int, ...] = (),
        top_k: int = 0,
    ) -> HardRollout:
        """Sample from the weights that were pushed last. All processes call it, with equally many prompts.

        Args:
            policy, prompts, truncation, num_steps, num_samples, eos_ids: as `rollouts.hard.hard_rollout`.
            random: nothing is drawn from it; the engine has streams of its own.
            top_k: sample from so many most probable ids only; 0 from all.
        Returns:
            N rows of T tokens at most; T is cut to the longest.
        Raises:
            ValueError: as `soft_rollout`, or the engine ended a completion that is not at its end.
        """
        policy.virtual.refuse("a generation engine")
        check_rollout(policy, prompts, num_steps, num_samples, random)
        self._set(policy.temperature, truncation, top_k, num_steps, eos_ids)
        repeated = prompts.repeated(num_samples)
        rows = [ids[mask].tolist() for ids, mask in zip(repeated.ids.cpu(), repeated.mask.cpu(), strict=True)]
        _, completions, _, _ = self.generation.generate(prompts=rows, images=None, num_generations=num_samples)
        if len(completions) != len(rows):
            raise ValueError(f"the engine returned {len(completions)} completions for {len(rows)} prompts")
        for ids in completions:
            _check_ended(ids, num_steps, eos_ids)
        length = int(policy.largest(float(max(map(len, completions)))))
        tokens, mask = _padded(completions, length, eos_ids[0] if eos_ids else 0)
        tokens, mask = tokens.to(prompts.ids.device), mask.to(prompts.ids.device)
        return HardRollout(repeated, tokens, mask & mask_through_eos(tokens, eos_ids))

    def _set(
        self, temperature: float, truncation: Truncation, top_k: int, num_steps: int, eos_ids: tuple[int, ...]
    ) -> None:
        """What TRL's object reads anew at every call."""
        generation = self.generation
        generation.temperature = temperature
        generation.top_p = truncation.top_p
        generation.min_p = truncation.min_p
        generation.top_k = top_k
        generation.max_completion_length = num_steps
        generation.generation_kwargs = {"stop_token_ids": list(eos_ids), "ignore_eos": not eos_ids}


def _check_ended(ids: list[int], num_steps: int, eos_ids: tuple[int, ...]) -> None:
    if not 0 < len(ids) <= num_steps:
        raise ValueError(f"the engine returned a completion of {len(ids)} tokens; it was asked for 1 to {num_steps}")
    if len(ids) < num_steps and ids[-1] not in eos_ids:
        raise ValueError(
            f"the engine ended a completion after {len(ids)} of {num_steps} tokens with id {ids[-1]}, none of "
            f"the policy's end-of-sequence ids {eos_ids}: either its context is too short (vllm_max_model_length, or "
            "the server's --max-model-len), or it serves a model with other eos_token_id in its generation_config"
        )


def _padded(rows: list[list[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Rows as tensors [N, T] of ids and of what is one; on the right stands `pad`, which has to be some token."""
    tokens = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    return tokens, mask
