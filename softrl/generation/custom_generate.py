"""Soft decoding by `model.generate`: transformers' `custom_generate`, as a function and as a folder.

    model.generate(**inputs, custom_generate=soft_decode, max_new_tokens=64, soft_top_k=16)  # any of SOFT_ARGUMENTS
    model.generate(**inputs, custom_generate=str(folder), trust_remote_code=True, max_new_tokens=64, soft_top_k=16)

`write_custom_generate(folder)` writes such a folder; in a model's own folder it makes soft decoding the model's
`generate` for all who load it with `trust_remote_code=True`.

What transformers' own arguments mean: those of sampling are for hard tokens, `temperature` for soft ones as well.
Several texts a prompt need `do_sample=True`, as ever, whatever is drawn. Processors of logits (repetition penalty,
forbidden words, ...) and stopping criteria see the tokens that are shown. What has no meaning here is an error that
names it. Left out: encoder-decoder models, and models that are sharded over processes.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from softrl.assets import write_atomically
from softrl.generation.next_token import NextToken
from softrl.generation.soft_arguments import HARD_ARGUMENTS, decoding_from, next_token_from
from softrl.generation.soft_generate import Streamer, soft_generate, stop_criterion
from softrl.generation.soft_record import SoftText
from softrl.generation.soft_settings import Phase, SoftDecoding, load_soft_decoding
from softrl.models.policy import Policy, check_policy
from softrl.models.state import positions
from softrl.types import Prompts

# Settings of transformers' generation that would do something else than they say; with the values that do nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1), "num_beam_groups": (None, 1), "constraints": (None,), "force_words_ids": (None,),
    "penalty_alpha": (None, 0.0), "dola_layers": (None,), "prompt_lookup_num_tokens": (None,),
    "use_mtp": (None, False), "assistant_early_exit": (None,), "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "typical_p": (None, 1.0), "top_h": (None,), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0),
    "token_healing": (None, False), "cache_implementation": (None, "dynamic"), "prefill_chunk_size": (None,),
    "output_attentions": (None, False), "output_hidden_states": (None, False), "output_scores": (None, False),
    "output_logits": (None, False),
}  # fmt: skip
# Criteria and processors whose work is done by our own code.
_KEPT_TO_HERE = (
    MaxLengthCriteria, EosTokenCriteria, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper,
    LogitNormalization,
)  # fmt: skip
_OF_TRANSFORMERS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache", "past_key_values")
_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None}  # of transformers


@dataclass
class SoftGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`: prompts with texts (N, P + T), and the record."""

    sequences: Tensor | None = None
    record: SoftText | None = None


def soft_decode(
    model: Any,
    input_ids: Int[Tensor, "N P"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    decoding: SoftDecoding | None = None,
    seed: int | None = None,
    soft_tokenizer: Any = None,
    soft_stop_strings: str | list[str] | None = None,
    num_recorded: int = 1,
    find_nearest: bool = True,
    relaxation: str | None = None,
    relaxation_temperature: float | None = None,
    max_entropy_nats: float | None = None,
    soft_temperature: float | None = None,
    soft_top_k: int | None = None,
    soft_top_p: float | None = None,
    soft_min_p: float | None = None,
    norm_correction: str | None = None,
    think_start: str | list[int] | int | None = None,
    think_end: str | list[int] | int | None = None,
    force_thinking: bool | None = None,
    max_thinking_tokens: int | None = None,
    cold_stop_nats: float | None = None,
    cold_stop_steps: int | None = None,
    **model_kwargs: Any,
) -> Tensor | SoftGenerateOutput:
    """The decoding loop that `model.generate(..., custom_generate=soft_decode)` runs; not to be called directly.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as `generate` prepares
            them.
        decoding: settings to start from; by default those that lie beside the model (`soft_decoding.json`), else
            `DEFAULT_DECODING`. The other settings are those of `soft_arguments.SOFT_ARGUMENTS`; each replaces one.
        seed: of everything that is drawn; by default it is drawn from torch's global generator, so that
            `torch.manual_seed` and `transformers.set_seed` rule here as well.
        soft_tokenizer, soft_stop_strings: the model's tokenizer, for delimiters that are texts, and strings that end a
            text. (What `generate` knows as `tokenizer` and `stop_strings` does not reach a function, but a folder.)
        num_recorded, find_nearest: see `soft_generate`.
    Returns:
        Prompts with texts, as any `generate`; or `SoftGenerateOutput`, with the record.
    Raises:
        ValueError: an argument of `generate` that soft decoding cannot follow; the message names it.
    """
    call = _arguments_of_generate()
    _refuse(model, generation_config, model_kwargs, call.get("assistant_model"))
    given = {
        "relaxation": relaxation, "relaxation_temperature": relaxation_temperature,
        "max_entropy_nats": max_entropy_nats, "soft_temperature": soft_temperature, "soft_top_k": soft_top_k,
        "soft_top_p": soft_top_p, "soft_min_p": soft_min_p, "norm_correction": norm_correction,
        "think_start": think_start, "think_end": think_end, "force_thinking": force_thinking,
        "max_thinking_tokens": max_thinking_tokens, "cold_stop_nats": cold_stop_nats,
        "cold_stop_steps": cold_stop_steps,
    }  # fmt: skip
    policy = Policy(model)
    check_policy(policy)
    if decoding is None and model.config._name_or_path:
        decoding = load_soft_decoding(model.config._name_or_path)
    chosen = _decoding(decoding, given, model, generation_config, policy.vocab_size, soft_tokenizer)
    num_samples, prompt_length = generation_config.num_return_sequences or 1, input_ids.shape[1]
    prompts = _prompts(input_ids[::num_samples], model_kwargs, num_samples)
    criteria = StoppingCriteriaList(each for each in stopping_criteria if not isinstance(each, _KEPT_TO_HERE))
    if soft_stop_strings is not None:
        criteria.append(stop_criterion(soft_stop_strings, soft_tokenizer))
    processors = LogitsProcessorList(each for each in logits_processor if not isinstance(each, _KEPT_TO_HERE))
    streamer, max_new_tokens = call.get("streamer"), generation_config.max_length - prompt_length
    record = soft_generate(
        policy, prompts, max_new_tokens, chosen, num_samples, _eos_ids(generation_config),
        int(torch.randint(2**62, ())) if seed is None else seed, None,
        None if streamer is None else _WithoutPrompt(streamer), criteria or None, soft_tokenizer, processors or None,
        _pad_id(generation_config), num_recorded, find_nearest,
    )  # fmt: skip
    sequences = torch.cat([input_ids, record.tokens], 1)
    if generation_config.return_dict_in_generate:
        return SoftGenerateOutput(sequences=sequences, record=record)
    return sequences


def generate(inputs: Tensor | None = None, *, model: Any, **arguments: Any) -> Tensor | SoftGenerateOutput:
    """`custom_generate/generate.py` of a folder: all that `model.generate` was given, before any preparation."""
    tokenizer, stop = arguments.pop("tokenizer", None), arguments.pop("stop_strings", None)
    if tokenizer is not None:
        arguments.setdefault("soft_tokenizer", tokenizer)
    if stop is not None:
        arguments.setdefault("soft_stop_strings", stop)
    # A model's own folder has put this function in the place of `model.generate`.
    return type(model).generate(model, inputs, custom_generate=soft_decode, **arguments)


def write_custom_generate(folder: str | Path) -> Path:
    """Write `custom_generate/generate.py` into a folder, which `model.generate(custom_generate=folder)` loads.

    Args:
        folder: a model's, or any; is made if it is not there.
    Returns:
        The folder.
    """
    place = Path(folder) / "custom_generate"
    place.mkdir(parents=True, exist_ok=True)
    with write_atomically(place / "generate.py") as temporary:
        temporary.write_text(_GENERATE_PY, encoding="utf-8")
    with write_atomically(place / "requirements.txt") as temporary:
        temporary.write_text("softrl\n", encoding="utf-8")
    return Path(folder)


_GENERATE_PY = '''"""Soft decoding by softrl: model.generate(..., custom_generate=FOLDER, trust_remote_code=True)."""

from softrl.generation.custom_generate import generate

__all__ = ["generate"]
'''


class _WithoutPrompt:
    """A streamer that got the prompts already, from `generate` itself."""

    def __init__(self, streamer: Streamer):
        self.streamer = streamer
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        if not self.is_prompt:
            self.streamer.put(value)
        self.is_prompt = False

    def end(self) -> None:
        self.streamer.end()


def _arguments_of_generate() -> dict[str, Any]:
    """Those of the `generate` that runs us.

    transformers 5.24 keeps `streamer` and `assistant_model` from functions that are no methods of its own: the one
    would print the prompt and nothing more, the other would be ignored. So they are read where they stand.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == GenerationMixin.__module__:
            return frame.f_locals
    return {}


def _decoding(
    saved: SoftDecoding | None,
    given: dict[str, Any],
    model: Any,
    config: GenerationConfig,
    vocab_size: int,
    tokenizer: Any,
) -> SoftDecoding:
    """The settings of this call. Of the model's own settings only what the call changes takes a saved one's place."""
    hard = {name: getattr(config, name) for name in HARD_ARGUMENTS}
    if saved is not None:
        if saved.answer is None:
            saved = replace(saved, answer=Phase(None, next_token_from(hard, NextToken())))
        own = {name: getattr(model.generation_config, name) for name in hard}
        usual = {name: _DEFAULTS[name] if value is None else value for name, value in own.items()}
        hard = {name: value for name, value in hard.items() if value != usual[name]}
    return decoding_from(given | hard, saved, vocab_size, tokenizer)


def _refuse(model: Any, config: GenerationConfig, model_kwargs: dict[str, Any], assistant: Any) -> None:
    """Raise ValueError for arguments that would do something else than they say."""
    unsupported = {
        name: getattr(config, name) for name, idle in _UNSUPPORTED.items() if getattr(config, name, None) not in idle
    }
    if assistant is not None:
        unsupported["assistant_model"] = type(assistant).__name__
    for name, value in model_kwargs.items():
        if name not in (*_OF_TRANSFORMERS, *_UNSUPPORTED) and value is not None:
            unsupported[name] = type(value).__name__
    for name in ("cache", "past_key_values"):
        cache = model_kwargs.get(name)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
            unsupported[name] = f"a filled {type(cache).__name__}"
    if model.config.is_encoder_decoder:
        unsupported["an encoder-decoder model"] = type(model).__name__
    if unsupported:
        raise ValueError(
            f"soft decoding cannot follow {', '.join(f'{name}={value!r}' for name, value in unsupported.items())}; "
            "leave it out, or generate without custom_generate"
        )


def _prompts(input_ids: Int[Tensor, "B P"], model_kwargs: dict[str, Any], num_samples: int) -> Prompts:
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask[::num_samples].bool()
    given = model_kwargs.get("position_ids")
    if given is not None and not torch.equal(given[::num_samples][mask], positions(mask)[mask]):
        raise ValueError("position_ids: soft decoding counts positions from the attention mask; leave them out")
    return Prompts(input_ids, mask)


def _eos_ids(config: GenerationConfig) -> tuple[int, ...]:
    eos = config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def _pad_id(config: GenerationConfig) -> int:
    """What `generate` pads by: the first end of sequence where the model has no padding token."""
    pad, eos = config.pad_token_id, _eos_ids(config)
    return pad if pad is not None else eos[0] if eos else 0
