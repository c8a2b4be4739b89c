"""Ways to search with hard and with soft tokens, on questions with one right answer, at equal forward passes.

Every method answers the same questions: greedy decoding of hard tokens and of mixtures, which go on with one row, and,
at widths W, beam search, soft beam search, collapsing beam search and self-consistency, which go on with W rows or
cost as much. What was paid is counted in token embeddings fed behind the prompt. Left out: several seeds of
self-consistency, and budgets for the single rows, which have nothing to spend more passes on.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from softrl.assets import write_atomically
from softrl.data.exact_answers import SOMETIMES_RIGHT, Kind, exact_answers, extract_answer
from softrl.generation.beam import BeamSettings, Found, beam_search
from softrl.generation.collapsing_beam import collapsing_beam_search
from softrl.generation.self_consistency import fed_tokens, self_consistency
from softrl.generation.soft_beam import soft_beam_search
from softrl.masking import per_sequence_sum
from softrl.models.policy import Policy
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.studies.beams_report import SINGLE_ROW, Answers, Item, Row, label, plot, print_table, table_rows
from softrl.studies.entropy_bound import hard_nll
from softrl.studies.tables import write_csv
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import SoftmaxMixture
from softrl.tokens.truncation import Truncation
from softrl.trainers.batches import INDEX_COLUMN, decode, prompt_batch
from softrl.trainers.loading import eos_token_ids
from softrl.types import HardRollout, Prompts


@dataclass(frozen=True)
class Settings:
    """What an answer depends on; a folder of results belongs to one such.

    Args:
        model, base: names or folders, as the results are labelled; the base scores what the model writes, None for the
            model itself.
        items: questions, see `exact_answers` for the fields behind it.
        top_k, max_entropy_nats: of the mixtures; None for no bound.
        temperature: of the samples of self-consistency; the default is that of its paper.
        seed: of questions and samples.
    """

    model: str
    items: int = 200
    kinds: tuple[Kind, ...] = SOMETIMES_RIGHT
    num_digits: int = 2
    num_copied: int = 6
    num_reversed: int = 3
    num_examples: int = 4
    top_k: int = 16
    max_entropy_nats: float | None = None
    temperature: float = 0.7
    seed: int = 0
    base: str | None = None


@dataclass(frozen=True)
class Bench:
    """A model, the base that scores its text, and the questions."""

    policy: Policy
    base: Policy
    tokenizer: PreTrainedTokenizerBase
    settings: Settings

    @cached_property
    def questions(self) -> Dataset:
        """The questions of the test split."""
        own = self.settings
        return exact_answers(
            own.items, own.kinds, own.num_digits, own.num_copied, own.num_reversed, own.num_examples, "test", own.seed
        )

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """An answer ends with its line, too."""
        line_end = self.tokenizer("\n", add_special_tokens=False).input_ids[-1:]
        return tuple(dict.fromkeys([*eos_token_ids(self.policy.causal_lm, self.tokenizer), *line_end]))

    @cached_property
    def max_new_tokens(self) -> int:
        """The longest right answer, its end, and a token to spare."""
        encoded = self.tokenizer(list(self.questions["completion"]), add_special_tokens=False).input_ids
        return max(map(len, encoded)) + 2

    @property
    def mixture(self) -> SoftmaxMixture:
        """What soft methods feed."""
        kept = min(self.settings.top_k, self.policy.vocab_size)
        return SoftmaxMixture(Truncation(kept), max_entropy_nats=self.settings.max_entropy_nats)


@dataclass(frozen=True)
class Batch:
    """Some of the questions as prompts."""

    bench: Bench
    prompts: Prompts
    rows: list[dict[str, Any]]
    num_steps: int

    @property
    def no_random(self) -> SequenceRandom:
        return SequenceRandom([0] * len(self.rows))

    def answer_of(self, row: int, ids: list[int]) -> str | None:
        """The answer in one sample of a row."""
        return extract_answer(self.bench.tokenizer.decode(ids, skip_special_tokens=True), self.rows[row]["kind"])


def _found(rollout: HardRollout) -> Found:
    return Found(rollout.prompts, rollout.tokens, rollout.mask, fed_tokens(rollout))


def _greedy(batch: Batch, width: int) -> Found:
    bench = batch.bench
    rollout = hard_rollout(
        bench.policy, batch.prompts, Truncation(1), batch.no_random, batch.num_steps, 1, bench.eos_ids, greedy=True
    )
    return _found(rollout)


def _greedy_soft(batch: Batch, width: int) -> Found:
    bench = batch.bench
    rollout = soft_rollout(
        bench.policy, batch.prompts, bench.mixture, batch.no_random, batch.num_steps, eos_ids=bench.eos_ids
    )
    return _found(rollout.hard)


def _beam(batch: Batch, width: int) -> Found:
    bench = batch.bench
    return beam_search(bench.policy, batch.prompts, batch.num_steps, BeamSettings(width), eos_ids=bench.eos_ids)


def _soft_beam(batch: Batch, width: int) -> Found:
    bench = batch.bench
    return soft_beam_search(
        bench.policy, batch.prompts, batch.num_steps, bench.mixture, BeamSettings(width), eos_ids=bench.eos_ids
    )


def _collapsing_beam(batch: Batch, width: int) -> Found:
    bench = batch.bench
    return collapsing_beam_search(bench.policy, batch.prompts, batch.num_steps, width, width, eos_ids=bench.eos_ids)


def _self_consistency(batch: Batch, width: int) -> Found:
    bench = batch.bench
    policy = bench.policy.at_temperature(bench.settings.temperature)
    indices = [row[INDEX_COLUMN] for row in batch.rows]
    return self_consistency(
        policy, batch.prompts, batch.num_steps, batch.answer_of, width, eos_ids=bench.eos_ids,
        seed=bench.settings.seed, prompt_indices=indices,
    )  # fmt: skip


METHODS: dict[str, Callable[[Batch, int], Found]] = {
    "greedy": _greedy,
    "greedy soft": _greedy_soft,
    "beam": _beam,
    "soft beam": _soft_beam,
    "collapsing beam": _collapsing_beam,
    "self-consistency": _self_consistency,
}


@torch.no_grad()
def answer(bench: Bench, method: str, width: int, batch_size: int, on_batch: Callable[[int], Any]) -> list[Item]:
    """All questions by one method, in their order; `on_batch` is told how many have been answered since."""
    device = next(bench.policy.model.parameters()).device
    # Questions of equal lengths together, which pads least.
    lengths = [len(ids) for ids in bench.tokenizer(list(bench.questions["prompt"])).input_ids]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    items: dict[int, Item] = {}
    for start in range(0, len(order), batch_size):
        rows = [{**bench.questions[index], INDEX_COLUMN: index} for index in order[start : start + batch_size]]
        prompts = prompt_batch(rows, bench.tokenizer, 1, None, device).prompts
        found = METHODS[method](Batch(bench, prompts, rows, bench.max_new_tokens), width)
        nll = per_sequence_sum(hard_nll(bench.base, found), found.mask)
        texts = decode(bench.tokenizer, found.tokens, found.mask)
        for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
            right = extract_answer(text, row["kind"]) == row["answer"]
            price, length = int(found.forward_tokens[place]), int(found.mask[place].sum())
            items[row[INDEX_COLUMN]] = Item(row["kind"], text, right, price, length, nll[place].item())
        on_batch(len(rows))
    return [items[index] for index in sorted(items)]


def run(bench: Bench, methods: Sequence[str], widths: Sequence[int], batch_size: int, folder: Path) -> list[Row]:
    """Answer what has not been answered, print a table, write rows.csv and accuracy.png.

    Args:
        bench: the model and its questions.
        methods: names in METHODS; greedy, which others are compared with, is always among them.
        widths: of those that have one.
        batch_size: questions at a time.
        folder: keeps every finished method's answers; a rerun with the same one goes on.
    Raises:
        ValueError: an unknown method, a number below 1, or a folder with answers under other settings.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    wanted = _wanted(methods, widths)
    missing = [each for each in wanted if not _path(folder, *each).is_file()]
    for each in wanted:
        if each not in missing:
            _load(_path(folder, *each), bench.settings)
    with tqdm(total=len(missing) * len(bench.questions), unit="question") as bar:
        for method, width in missing:
            bar.set_description(label(method, width))
            started = time.monotonic()
            items = answer(bench, method, width, batch_size, bar.update)
            _save(_path(folder, method, width), bench.settings, items, time.monotonic() - started)
    answers = {each: _load(_path(folder, *each), bench.settings) for each in wanted}
    rows = table_rows(answers)
    print_table(rows, f"{bench.settings.model}, {bench.settings.items} questions")
    write_csv(rows, folder / "rows.csv")
    plot(rows, folder / "accuracy.png")
    return rows


def _wanted(methods: Sequence[str], widths: Sequence[int]) -> list[tuple[str, int]]:
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods must be of {tuple(METHODS)}, got {unknown}")
    if not methods:
        raise ValueError(f"methods: name one or more of {tuple(METHODS)}")
    if any(width < 1 for width in widths) or not widths:
        raise ValueError(f"widths must be 1 or more, got {list(widths)}")
    names = [name for name in METHODS if name in methods or name == "greedy"]
    return [(name, width) for name in names for width in ((1,) if name in SINGLE_ROW else sorted(set(widths)))]


def _path(folder: Path, method: str, width: int) -> Path:
    return folder / f"{label(method, width).replace(', ', '-').replace(' ', '-')}.json"


def _save(path: Path, settings: Settings, items: list[Item], seconds: float) -> None:
    record = {"settings": asdict(settings), "seconds": seconds, "items": [asdict(item) for item in items]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def _load(path: Path, settings: Settings) -> Answers:
    record = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(asdict(settings)))
    other = {name: (record["settings"].get(name), value) for name, value in wanted.items()}
    other = {name: pair for name, pair in other.items() if pair[0] != pair[1]}
    if other:
        differing = "; ".join(f"{name}: {found!r}, now {now!r}" for name, (found, now) in other.items())
        raise ValueError(f"{path} was made with other settings ({differing}); give another --output_dir or delete it")
    return Answers([Item(**item) for item in record["items"]], record["seconds"])
