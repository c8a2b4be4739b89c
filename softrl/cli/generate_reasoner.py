"""`softrl generate` with a model that thinks in latents: hard tokens, by transformers' own `generate`.

Its settings have transformers' meaning; thoughts and draws of a text depend on the seed, the prompt's place and the
sample alone. Left out: soft tokens, which such a model does not read.
"""

import argparse
import json
import sys
from typing import Any

import torch

from softrl.models.reasoner import ReasonerForCausalLM
from softrl.types import Prompts

_SOFT = ("thinking", "collapse", "basis_aware", "basis_aware_rule", "basis_aware_directions", "basis_aware_candidates")


def is_reasoner(model: Any) -> bool:
    """Whether it thinks in latents."""
    return isinstance(model, ReasonerForCausalLM)


def hard_settings(given: argparse.Namespace) -> dict[str, Any]:
    """What transformers is given.

    Raises:
        ValueError: an option of soft tokens; options of draws without any draw.
    """
    from softrl.generation.soft_arguments import HARD_ARGUMENTS, SOFT_ARGUMENTS

    if soft := [name for name in (*SOFT_ARGUMENTS, *_SOFT) if getattr(given, name) not in (None, False)]:
        raise ValueError(f"--{soft[0]} is not for {given.model}, which thinks in latents and writes hard tokens only")
    hard = {name: getattr(given, name) for name in HARD_ARGUMENTS if getattr(given, name) is not None}
    if not given.do_sample:
        if hard:
            raise ValueError(f"--{sorted(hard)[0]} is of draws; give --do_sample as well")
        if given.num_samples > 1:
            raise ValueError(f"--num_samples {given.num_samples} needs draws that differ; give --do_sample as well")
        return {"do_sample": False}
    return {"temperature": 1.0, "top_k": 0, **hard}


def write_hard(given: argparse.Namespace, model: ReasonerForCausalLM, tokenizer: Any, prompts: list[Any]) -> int:
    """Write behind every prompt; texts go to the terminal, and to the file that is given."""
    from softrl.cli.generate import opened

    settings = hard_settings(given)
    rows = [_read(prompt, index, model, tokenizer) for index, prompt in enumerate(prompts)]
    _check_lengths(given, model, rows)
    alone = len(prompts) * given.num_samples == 1
    with opened(given.output_file) as file:
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if not alone and not sys.stderr.isatty():
                print(f"prompt {index + 1} of {len(prompts)} ...", file=sys.stderr, flush=True)
            for sample, (tokens, text) in enumerate(
                _written(given, model, tokenizer, prompt, index, row, settings, alone)
            ):
                _show(prompt, text, alone, given)
                if file is not None:
                    line = {"prompt": prompt, "index": index, "sample": sample, "seed": given.seed, "text": text}
                    file.write(json.dumps({**line, "tokens": tokens}, ensure_ascii=False) + "\n")
                    file.flush()
    return 0


def _read(prompt: Any, index: int, model: ReasonerForCausalLM, tokenizer: Any) -> Prompts:
    from softrl.trainers.batches import INDEX_COLUMN, prompt_batch

    return prompt_batch([{"prompt": prompt, INDEX_COLUMN: index}], tokenizer, 1, None, model.device).prompts


def _check_lengths(given: argparse.Namespace, model: ReasonerForCausalLM, rows: list[Prompts]) -> None:
    """Before any text is written; the last token of a text is never read."""
    longest = max(row.ids.shape[1] for row in rows)
    if model.max_text_tokens is not None and longest + given.max_new_tokens - 1 > model.max_text_tokens:
        raise ValueError(
            f"--max_new_tokens {given.max_new_tokens} after a prompt of {longest} tokens is more than this "
            f"transformer reads: {model.max_text_tokens} tokens beside a thought; give at most "
            f"{max(model.max_text_tokens - longest + 1, 0)}, or a shorter prompt"
        )


def _written(
    given: argparse.Namespace,
    model: ReasonerForCausalLM,
    tokenizer: Any,
    prompt: Any,
    index: int,
    made: Prompts,
    settings: dict[str, Any],
    alone: bool,
) -> list[tuple[list[int], str]]:
    """Tokens and text of every sample."""
    from transformers import TextStreamer

    from softrl.tokens.noise import sequence_seed
    from softrl.trainers.loading import eos_token_ids

    seed, eos = sequence_seed(given.seed, index), list(eos_token_ids(model, tokenizer))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos or [0])[0]
    streamer = None
    if alone and not given.no_stream:
        streamer = TextStreamer(tokenizer, skip_prompt=not isinstance(prompt, str), skip_special_tokens=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        ids = model.generate(
            made.ids, attention_mask=made.mask.long(), max_new_tokens=given.max_new_tokens, seed=seed,
            row_ids=list(range(given.num_samples)), num_return_sequences=given.num_samples, pad_token_id=pad,
            eos_token_id=eos or None, streamer=streamer, stop_strings=given.stop,
            tokenizer=tokenizer if given.stop else None, **settings,
        )  # fmt: skip
    rows = [_until_end(row, eos) for row in ids[:, made.ids.shape[1] :].tolist()]
    return [(row, tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _until_end(row: list[int], eos: list[int]) -> list[int]:
    """Without the padding of a text that is shorter than the others."""
    end = next((place for place, token in enumerate(row) if token in eos), len(row))
    return row[: end + 1]


def _show(prompt: Any, text: str, alone: bool, given: argparse.Namespace) -> None:
    from softrl.trainers.batches import prompt_text

    if alone and not given.no_stream:
        return  # it was streamed
    print(f"{prompt_text(prompt)}{text}" if alone else f"{prompt_text(prompt)}{text}\n{'-' * 8}", flush=True)
