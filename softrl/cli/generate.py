"""`softrl generate`: go on with prompts by soft tokens, or by hard ones."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from softrl.cli.collapse import collapsing, written

PROG = "softrl generate"
EPILOG = """Without settings a model is decoded as the file soft_decoding.json beside it says, else by mixtures of few
tokens with an entropy bound. With --thinking only what is inside <think> ... </think> is soft. Options of hard tokens
are those of transformers; --temperature is of soft tokens too, unless --soft_temperature is given."""


def main(argv: list[str]) -> int:
    """Run the command; returns the process's exit status: 2 for a mistake."""
    given = make_parser().parse_args(argv)
    from softrl.assets import AssetError

    try:
        return _generate(given)
    except (AssetError, ValueError, TypeError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROG}: stopped; what is written is kept", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """All arguments; softrl inspect passes its own on to it."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, epilog=EPILOG, allow_abbrev=False,
        usage=f"{PROG} (--prompt TEXT ... | --prompts_file FILE | < FILE) [--model NAME] [settings]",
    )  # fmt: skip
    parser.add_argument("--model", default="smollm2-135m", help="a name, a folder, or an adapter's (smollm2-135m)")
    parser.add_argument("--prompt", action="append", help="text to go on with; may be given repeatedly; - reads stdin")
    parser.add_argument("--prompts_file", help="one prompt a line, or .jsonl with a `prompt` each, text or messages")
    parser.add_argument("--chat", action="store_true", help="prompts are a user's messages: use the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of a text (64)")
    parser.add_argument("--num_samples", type=int, default=1, help="texts a prompt (1)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time (8)")
    parser.add_argument("--stop", action="append", help="end a text at this string; may be given repeatedly")
    parser.add_argument("--output_file", help=".jsonl of texts, tokens, kept ids, weights and entropies")
    parser.add_argument("--no_stream", action="store_true", help="print a text when it is finished")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the model (float32)"
    )
    soft = parser.add_argument_group("soft tokens")
    soft.add_argument("--hard", action="store_true", help="no soft tokens at all")
    soft.add_argument("--thinking", action="store_true", help="soft tokens inside <think> ... </think> only")
    soft.add_argument(
        "--collapse",
        help="of a softAR model: write its own soft outputs, and make them tokens when its window moves on: all, "
        "distance:LEAST or entropy:LEAST (nats), or learned, by the model's own head for it",
    )
    _add_soft_arguments(soft)
    basis = parser.add_argument_group(
        "basis-aware truncation, of soft tokens and of draws, instead of top-p and min-p"
    )
    basis.add_argument(
        "--basis_aware", type=float, metavar="EPSILON", help="keep tokens above tau, and those below it that the "
        "softmax bottleneck proves to have true probability; epsilon in (0, 1), such as 0.003",
    )  # fmt: skip
    basis.add_argument("--basis_aware_rule", choices=["eta", "tau"], help="tau by eta-sampling, or epsilon (eta)")
    basis.add_argument("--basis_aware_directions", type=int, help="k, directions of the output embedding (20)")
    basis.add_argument(
        "--basis_aware_candidates", type=int, help="tokens below tau that a soft token asks about (64); draws ask on"
    )
    hard = parser.add_argument_group("hard tokens")
    hard.add_argument("--do_sample", action="store_true", default=None, help="draw them; else the likeliest")
    hard.add_argument("--temperature", type=float, help="of a draw (1)")
    hard.add_argument("--top_k", type=int, help="draw from the k likeliest")
    hard.add_argument("--top_p", type=float, help="draw from the likeliest with this mass")
    hard.add_argument("--min_p", type=float, help="draw from those with this share of the largest")
    return parser


def _add_soft_arguments(group: Any) -> None:
    """The settings that `model.generate` takes too; they are named here once more, so that --help needs no torch."""
    group.add_argument("--relaxation", help="softmax, gumbel_softmax, straight_through, st_gumbel, ...")
    group.add_argument("--relaxation_temperature", type=float, help="of the weights; instead of an entropy bound")
    group.add_argument("--max_entropy_nats", type=float, help="bound of a soft token's entropy, below log K")
    group.add_argument("--soft_temperature", type=float, help="sampling temperature, before truncation")
    group.add_argument("--soft_top_k", type=int, help="K: ids that a soft token keeps")
    group.add_argument("--soft_top_p", type=float, help="of them, keep the likeliest with this mass")
    group.add_argument("--soft_min_p", type=float, help="of them, keep those with this share of the largest")
    group.add_argument("--norm_correction", help="of a mixture: none, inverse_l2, match")
    group.add_argument("--think_start", help="what opens the thinking, text (<think>)")
    group.add_argument("--think_end", help="what closes it, text (</think>)")
    group.add_argument(
        "--force_thinking", action="store_true", default=None, help="open it first, if the prompt did not"
    )
    group.add_argument("--max_thinking_tokens", type=int, help="end it after so many tokens")
    group.add_argument("--cold_stop_nats", type=float, help="end it where the policy's entropy stays below this")
    group.add_argument("--cold_stop_steps", type=int, help="for so many tokens in a row (256)")


def _generate(given: argparse.Namespace) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    if given.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {given.batch_size}")
    if given.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {given.max_new_tokens}")
    prompts = read_prompts(given)
    writing = collapsing(given)
    model, tokenizer = load(given.model, given.dtype, may_reason=True)
    from softrl.cli.generate_reasoner import is_reasoner, write_hard

    if is_reasoner(model):
        return write_hard(given, model, tokenizer, prompts)
    from softrl.models.policy import Policy, check_policy

    policy = Policy(model)
    check_policy(policy)
    decoding, rule = basis_aware_of(given, policy, decoding_of(given, policy.vocab_size, tokenizer))
    with opened(given.output_file) as file:
        for first in range(0, len(prompts), given.batch_size):
            batch = prompts[first : first + given.batch_size]
            record = _run(given, policy, tokenizer, decoding, writing, batch, first, len(prompts))
            if not _streams(given, len(prompts)):
                _show(record, tokenizer, batch, given.num_samples, len(prompts) * given.num_samples)
            if file is not None:
                for line in lines(record, tokenizer, batch, given.num_samples, given.seed, first):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
    if rule is not None:
        print(f"basis-aware truncation: {rule.counts}", file=sys.stderr)
    return 0


def _run(
    given: argparse.Namespace,
    policy: Any,
    tokenizer: Any,
    decoding: Any,
    writing: Any,
    batch: list[Any],
    first: int,
    count: int,
) -> Any:
    from transformers import TextStreamer

    from softrl.generation.soft_generate import soft_generate
    from softrl.trainers.batches import INDEX_COLUMN, prompt_batch
    from softrl.trainers.loading import eos_token_ids

    rows = [{"prompt": prompt, INDEX_COLUMN: first + index} for index, prompt in enumerate(batch)]
    device = next(policy.model.parameters()).device
    made = prompt_batch(rows, tokenizer, 1, None, device)
    where = f"prompts {first + 1} to {first + len(batch)} of {count}"
    if count > given.batch_size and not sys.stderr.isatty():
        print(f"{where} ...", file=sys.stderr, flush=True)
    if writing is not None:
        return written(given, policy, tokenizer, decoding, writing, made)
    if _streams(given, count):
        streamer: Any = TextStreamer(tokenizer, skip_prompt=not isinstance(batch[0], str), skip_special_tokens=True)
    else:
        streamer = _Bar(given.max_new_tokens, where)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return soft_generate(
        policy, made.prompts, given.max_new_tokens, decoding, given.num_samples,
        eos_token_ids(policy.model, tokenizer), given.seed, made.indices,
        streamer, given.stop, tokenizer, pad_id=pad,
        find_nearest=given.output_file is not None,
    )  # fmt: skip


class _Bar:
    """A streamer that shows on a terminal how far a batch is."""

    def __init__(self, max_new_tokens: int, where: str):
        from tqdm import tqdm

        self.bar = tqdm(total=max_new_tokens, desc=where, unit="token", leave=False, disable=None, initial=-1)

    def put(self, value: Any) -> None:
        """The prompts come first, then every token of the batch."""
        self.bar.update(1)

    def end(self) -> None:
        """Take the bar away."""
        self.bar.close()


def _streams(given: argparse.Namespace, num_prompts: int) -> bool:
    """Texts of one batch would mix on the terminal."""
    return not given.no_stream and given.collapse is None and num_prompts * given.num_samples == 1


def decoding_of(given: argparse.Namespace, vocab_size: int, tokenizer: Any) -> Any:
    """The settings that the command gives, over those beside the model."""
    from softrl.generation.soft_arguments import HARD_ARGUMENTS, SOFT_ARGUMENTS, THINK_END, THINK_START, decoding_from
    from softrl.generation.soft_settings import DEFAULT_DECODING, Phase, SoftDecoding, load_soft_decoding

    soft = {name: getattr(given, name) for name in SOFT_ARGUMENTS if getattr(given, name) is not None}
    hard = {name: getattr(given, name) for name in HARD_ARGUMENTS if getattr(given, name) is not None}
    truncating = sorted(set(hard) - {"do_sample", "temperature"})
    if truncating and not given.do_sample:
        raise ValueError(f"--{truncating[0]} is of draws of hard tokens; give --do_sample as well")
    if given.hard:
        if soft or given.thinking:
            raise ValueError(f"--hard makes no soft tokens; leave out --{sorted(soft)[0] if soft else 'thinking'}")
        if "temperature" in hard and not given.do_sample:
            raise ValueError("--temperature is of draws; give --do_sample as well")
        answering = decoding_from({"do_sample": False} | hard, DEFAULT_DECODING, vocab_size).answering
        return SoftDecoding(Phase(None, answering.next_token))
    saved = load_soft_decoding(given.model)
    has_own = saved is not None and bool(saved.think_start)
    thinks = given.thinking or given.force_thinking
    if "think_start" in soft or "think_end" in soft or (thinks and not has_own):
        soft = {"think_start": THINK_START, "think_end": THINK_END} | soft
    return decoding_from(soft | hard, saved, vocab_size, tokenizer)


def basis_aware_of(given: argparse.Namespace, policy: Any, decoding: Any) -> tuple[Any, Any]:
    """The settings with basis-aware truncation, and its rule, which counts; without it the settings and None.

    Raises:
        ValueError: what `basis_aware` and `truncated_by` refuse, or there is nothing to truncate.
    """
    beside = [name for name in vars(given) if name.startswith("basis_aware_") and getattr(given, name) is not None]
    if given.basis_aware is None:
        if beside:
            raise ValueError(f"--{beside[0]} is of basis-aware truncation; give --basis_aware EPSILON as well")
        return decoding, None
    if (given.hard or given.collapse) and not given.do_sample:
        name = "hard" if given.hard else "collapse"
        raise ValueError(f"--basis_aware is of soft tokens and of draws; with --{name} give --do_sample as well")
    if others := [name for name in ("soft_top_p", "soft_min_p", "top_k", "top_p", "min_p") if getattr(given, name)]:
        raise ValueError(f"--basis_aware truncates in the place of --{others[0]}; leave one of them out")
    from softrl.contexts.basis_aware import basis_aware
    from softrl.generation.basis_aware import truncated_by

    names = {"rule": "rule", "directions": "num_directions", "candidates": "max_candidates"}
    values = {names[name.removeprefix("basis_aware_")]: getattr(given, name) for name in beside}
    rule = basis_aware(policy, given.basis_aware, **values)
    return truncated_by(rule, decoding), rule


def read_prompts(given: argparse.Namespace) -> list[Any]:
    """Texts or conversations from the command line, a file, or stdin.

    Raises:
        ValueError: there are none, or the file holds something else.
    """
    if given.prompt and given.prompts_file:
        raise ValueError("--prompt and --prompts_file are given; keep one of them")
    if given.prompts_file:
        prompts = list(_from_file(Path(given.prompts_file)))
    elif given.prompt and given.prompt != ["-"]:
        prompts = list(given.prompt)
    elif given.prompt or not sys.stdin.isatty():
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    else:
        prompts = []
    if not prompts:
        raise ValueError("there is no prompt; give --prompt TEXT, --prompts_file FILE, or lines on stdin")
    if given.chat:
        prompts = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
    return prompts


def _from_file(path: Path) -> Iterator[Any]:
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(texts, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or "prompt" not in row:
            raise ValueError(f"{path}, line {number}: expected an object with a `prompt`, got {line[:60]!r}")
        yield row["prompt"]


def load(name: str, dtype: str = "float32", may_reason: bool = False) -> tuple[Any, Any]:
    """A causal LM and its tokenizer by name, folder or adapter's folder, on a GPU where there is one.

    Raises:
        ValueError: the model thinks between tokens or, where it may not, in latents, or there is no tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import softrl.contexts.soft_ar  # noqa: F401, whose models the Auto classes then know
    from softrl.assets import resolve_model
    from softrl.cli.generate_reasoner import is_reasoner
    from softrl.models.think_tokens import make_room
    from softrl.models.thinking import is_thinking_folder
    from softrl.trainers.loading import supported_dtype

    if is_thinking_folder(name):
        raise ValueError(f"{name} holds a model that thinks between tokens; softrl thoughts generate writes with it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"dtype": supported_dtype(dtype, device)}
    base, has_own = name, (Path(name) / "tokenizer_config.json").is_file()
    if (Path(name) / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        lm = AutoModelForCausalLM.from_pretrained(resolve_model(base), **settings)
        tokenizer = AutoTokenizer.from_pretrained(name if has_own else resolve_model(base), padding_side="left")
        make_room(lm, len(tokenizer))  # for tokens that came with the adapter, which has their rows
        model: Any = PeftModel.from_pretrained(lm, name)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), **settings)
        tokenizer = AutoTokenizer.from_pretrained(name if has_own else resolve_model(base), padding_side="left")
    if is_reasoner(model) and not may_reason:
        raise ValueError(f"{name} thinks in latents and makes no soft tokens; softrl generate writes with it")
    return model.eval().to(device), tokenizer


def opened(name: str | None) -> Any:
    """A file to write, or none."""
    if name is None:
        return nullcontext()
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    return Path(name).open("w", encoding="utf-8")


def _show(record: Any, tokenizer: Any, batch: list[Any], num_samples: int, num_texts: int) -> None:
    from softrl.trainers.batches import decode, prompt_text

    texts = decode(tokenizer, record.tokens, record.mask)
    for row, text in enumerate(texts):
        prompt = prompt_text(batch[row // num_samples])
        print(f"{prompt}{text}" if num_texts == 1 else f"{prompt}{text}\n{'-' * 8}", flush=True)


def lines(
    record: Any, tokenizer: Any, batch: list[Any], num_samples: int, seed: int, first: int
) -> Iterator[dict[str, Any]]:
    """A record as objects for JSON, one a text; of every step the ids of weight, the heaviest first."""
    from softrl.trainers.batches import decode

    texts = decode(tokenizer, record.tokens, record.mask)
    for row, text in enumerate(texts):
        real = record.mask[row]
        kept = [
            [[i, round(w, 6)] for i, w in zip(ids, weights, strict=True) if w > 0.0]
            for ids, weights in zip(record.ids[row][real].tolist(), record.weights[row][real].tolist(), strict=True)
        ]
        count = [len(pairs) for pairs in kept]
        probs = record.probs[row][real].tolist()
        line = {
            "prompt": batch[row // num_samples], "index": first + row // num_samples, "sample": row % num_samples,
            "seed": seed, "text": text, "kept": kept,
            "probs": [[round(p, 6) for p in each[:n]] for each, n in zip(probs, count, strict=True)],
        }  # fmt: skip
        for name in ("tokens", "is_soft", "likeliest", "nearest"):
            line[name] = getattr(record, name)[row][real].tolist()
        for name in ("entropy", "fed_entropy", "distance"):
            line[name] = [round(value, 6) for value in getattr(record, name)[row][real].tolist()]
        yield line
