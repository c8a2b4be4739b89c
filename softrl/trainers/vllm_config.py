"""Options of sampling through vLLM: TRL's names, defaults and meanings.

Left out: `vllm_structured_outputs_regex`, since a constrained sampler is not the policy that is scored.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec

from softrl.tokens.relaxation import Relaxation
from softrl.trainers._bridge import BaseConfig

MODES = ("colocate", "server")


@dataclass
class VLLMConfig(BaseConfig):
    r"""
    Base of [`RolloutConfig`]: where hard samples come from. **Untried on hardware**: it needs a GPU, and has been run
    against a stand-in for vLLM only, which holds the calls to TRL's own client.

    With `use_vllm` every hard sample of training and evaluation is drawn by vLLM, through TRL's client, from weights
    that are sent to it before a rollout. Noise of straight-through tokens is drawn afterwards, from its posterior
    given them. Mixtures cannot be sampled so. vLLM draws from random streams of its own: a step cannot be replayed,
    and completions of two evaluations are not paired. Where it computes in another precision than the trainer, the
    tokens are those of a slightly different policy, which nothing here corrects.

    Parameters:
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to sample through vLLM. Requires `vllm` to be installed: `pip install "softrl[vllm]"`.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"server"`: a server that runs elsewhere, started by `VLLM_SERVER_DEV_MODE=1 vllm serve <model>
            --weight-transfer-config '{"backend": "nccl"}'`. `"colocate"`: in this process, on the training GPUs.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"` or `"transformers"`: whose implementation of the model is run, in colocate mode.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Free the engine's memory between rollouts, in colocate mode.
        vllm_server_base_url (`str`, *optional*):
            The server's URL, e.g. `"http://localhost:8000"`; instead of host and port.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Its host.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Its port.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for it to be up.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port that weights are sent through.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that it may take, in colocate mode.
        vllm_max_model_length (`int`, *optional*):
            Its context, in colocate mode; by default the model's.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            GPUs that it splits the model over, in colocate mode.
    """

    use_vllm: bool = field(default=False, metadata={"help": "Sample through vLLM. Untried on hardware."})
    vllm_mode: str = field(
        default="colocate", metadata={"help": "Where vLLM runs: here, or as a server.", "choices": list(MODES)}
    )
    vllm_model_impl: str = field(
        default="vllm", metadata={"help": "Whose implementation of the model vLLM runs: vllm or transformers."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Free vLLM's memory between rollouts, in colocate mode."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "The vLLM server's URL, instead of host and port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the vLLM server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the vLLM server."})
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the vLLM server to be up."}
    )
    vllm_group_port: int = field(default=51216, metadata={"help": "Port that weights are sent to the server through."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for vLLM, in colocate mode."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "vLLM's context, in colocate mode; by default the model's."}
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "GPUs that vLLM splits the model over, in colocate mode."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.vllm_mode not in MODES:
            raise ValueError(f"vllm_mode must be one of {MODES}, got {self.vllm_mode!r}")
        if not self.use_vllm:
            return
        if not vllm_is_installed():
            raise ValueError(
                'use_vllm=True needs vLLM, which is not installed: pip install "softrl[vllm]" (softrl has not been '
                "tried with it on hardware), or leave use_vllm out: softrl then samples by itself"
            )
        if self.top_p < 1.0 and self.min_p > 0.0:
            raise ValueError(
                f"use_vllm=True with top_p={self.top_p} and min_p={self.min_p}: vLLM measures top_p on what min_p has "
                "left, softrl on the whole distribution, so the samples would not be the policy's; use one of them"
            )

    def check_engine_samples(self, relaxation: Relaxation | None) -> None:
        """Refuse, with `use_vllm`, a relaxation whose forward pass vLLM cannot make.

        Raises:
            ValueError: it feeds mixtures, or samples from K kept ids inside a nucleus of mass `top_p`.
        """
        if not self.use_vllm or relaxation is None:
            return
        if not relaxation.feeds_one_hot:
            raise ValueError(
                f"use_vllm=True, and relaxation {relaxation.name!r} feeds mixtures of tokens, which an engine of hard "
                "tokens cannot sample; use relaxation='st_gumbel' or 'straight_through', or use_vllm=False"
            )
        if not relaxation.samples_policy and self.top_p < 1.0:
            raise ValueError(
                f"use_vllm=True with top_p={self.top_p} and relaxation {relaxation.name!r}, which samples from the "
                "top_k kept ids: vLLM measures top_p on what top_k has left, softrl on the whole distribution; use "
                "min_p instead, or relaxation='st_gumbel'"
            )


def vllm_is_installed() -> bool:
    """Whether there is a `vllm` to import; it is not imported for that."""
    return find_spec("vllm") is not None
