"""One run of `softrl study soft-decoding`: a model is tuned, then decoded hard and soft.

What is measured of a decoding: how well the model predicts held-out text behind what it fed itself, how likely the
model it began as finds the text it wrote, how much it repeats itself, how many questions it answers, and the entropy
of every step. What the tuning cost: its NLL of Shakespeare, which it was not tuned on.
"""

import gc
import json
import time
from collections.abc import Callable
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from jaxtyping import Bool, Float
from peft import LoraConfig
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from softrl.assets import resolve_model, write_atomically
from softrl.data.characters import shakespeare
from softrl.data.exact_answers import exact_answers, extract_answer
from softrl.data.prompts import review_openings
from softrl.data.texts import MASK_COLUMN
from softrl.generation.soft_generate import soft_generate
from softrl.generation.soft_record import SoftText
from softrl.generation.soft_settings import SoftDecoding
from softrl.masking import per_sequence_mean, token_mean
from softrl.models.policy import Policy
from softrl.studies.entropy_bound import hard_nll
from softrl.studies.html import mean_and_error
from softrl.studies.soft_decoding_config import SoftDecodingStudyConfig, TuningRun
from softrl.tokens.guidance import GuidedRelaxation, guided
from softrl.tokens.relaxation import SoftmaxMixture
from softrl.tokens.truncation import Truncation
from softrl.trainers import SoftSFTConfig, SoftSFTTrainer
from softrl.trainers.batches import decode, prompt_batch
from softrl.trainers.evaluation import distinct_n, repetition
from softrl.trainers.loading import eos_token_ids
from softrl.trainers.soft_evaluation import summary
from softrl.types import Prompts

Record = dict[str, Any]
_FAILURES = (ValueError, RuntimeError, ArithmeticError)  # of a run's own making; they are shown as failed rows
_SHOWN = 6  # texts that a record keeps
_LIKELIEST = SoftmaxMixture(Truncation(1))  # K = 1: hard, greedy tokens as a relaxation
_QUIET = {
    "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "logging_steps": 5, "disable_tqdm": True,
    "dataloader_pin_memory": False, "completion_only_loss": True,
}  # fmt: skip


class SoftDecodingStudy:
    """The runs of a study.

    Args:
        config: the study.
        write: prints a line of progress.
    """

    def __init__(self, config: SoftDecodingStudyConfig, write: Callable[[str], None] | None = None):
        self.config = config
        self.write = write or (lambda line: print(line, flush=True))

    @cached_property
    def material(self) -> "Material":
        """Made once for all runs."""
        return Material(self.config)

    def check(self) -> None:
        """Make every tuning's configuration before the first is trained.

        Raises:
            ValueError: a setting out of range; the tuning is named.
        """
        for run in self.config.runs(seeds=self.config.seeds[:1]):
            try:
                training_arguments(run, "unused")
            except (ValueError, TypeError) as error:
                raise ValueError(f"tuning {run.tuning.name!r}: {error}") from error

    def train(self, tunings: list[str] | None = None, seeds: list[int] | None = None) -> None:
        """Whatever has not been run yet; every finished run is kept."""
        self.check()
        missing = [run for run in self.config.runs(tunings, seeds) if not run.path().is_file()]
        for number, run in enumerate(missing, 1):
            self.write(f"{run.tuning.name}, seed {run.seed} ({number} of {len(missing)})")
            record = measured(run, self.material, self.write)
            path = run.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as temporary:
                temporary.write_text(json.dumps(record), encoding="utf-8")
            gc.collect()  # a trainer and its model refer to each other
            if record["status"] != "done":
                self.write(f"{run.tuning.name}: FAILED, {record['status']}; delete {path} to run it again")

    def records(self) -> list[Record]:
        """All finished runs of the recipe."""
        paths = [run.path() for run in self.config.runs()]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


class Material:
    """Texts, questions, tokenizer and the model that every tuning begins from, for reference.

    Args:
        config: the study.
    """

    def __init__(self, config: SoftDecodingStudyConfig):
        self.config = config
        name = resolve_model(config.model)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, padding_side="left")
        self.base = Policy(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
        self.base.model.requires_grad_(False)

    @cached_property
    def train(self) -> Dataset:
        """Reviews and questions with their answers, as rows of ids of which the second part counts."""
        config = self.config
        answers = exact_answers(config.num_train_answers, split="train", **config.answers)
        return concatenate_datasets([self._reviews("train", config.num_train_texts), self._answered(answers)])

    @cached_property
    def texts(self) -> Dataset:
        """Held-out reviews."""
        return self._reviews("test", self.config.num_texts)

    @cached_property
    def others(self) -> Dataset:
        """Text that no tuning reads: Shakespeare, evenly spread."""
        length = self.config.prompt_length_tokens + self.config.text_length_tokens
        text, count = shakespeare("test"), self.config.num_texts
        room = 40 * length  # characters: no text has so long words throughout
        starts = [number * (len(text) - room) // count for number in range(count)]
        pieces = [text[start : start + room] for start in starts]
        return self._rows([ids[:length] for ids in self.tokenizer(pieces, add_special_tokens=False).input_ids])

    @cached_property
    def questions(self) -> Dataset:
        """Held-out questions."""
        return exact_answers(self.config.num_answers, split="test", **self.config.answers)

    @cached_property
    def line_end(self) -> int:
        """The last token of a line, where an answer ends."""
        return int(self.tokenizer("\n", add_special_tokens=False).input_ids[-1])

    def _reviews(self, split: Any, count: int) -> Dataset:
        lengths = (self.config.prompt_length_tokens, split)
        rows = review_openings(self.tokenizer, count, *lengths, reference_length_tokens=self.config.text_length_tokens)
        encode = self.tokenizer
        ids = [
            encode(prompt, add_special_tokens=False).input_ids + encode(reference, add_special_tokens=False).input_ids
            for prompt, reference in zip(rows["prompt"], rows["reference"], strict=True)
        ]
        return self._rows(ids)

    def _rows(self, ids: list[list[int]]) -> Dataset:
        given = self.config.prompt_length_tokens
        masks = [[0] * given + [1] * (len(row) - given) for row in ids]
        return Dataset.from_dict({"input_ids": ids, MASK_COLUMN: masks})

    def _answered(self, questions: Dataset) -> Dataset:
        asked = self.tokenizer(list(questions["prompt"]), add_special_tokens=False).input_ids
        answered = self.tokenizer(list(questions["completion"]), add_special_tokens=False).input_ids
        ids = [[*question, *answer, self.line_end] for question, answer in zip(asked, answered, strict=True)]
        masks = [[0] * len(q) + [1] * (len(row) - len(q)) for q, row in zip(asked, ids, strict=True)]
        return Dataset.from_dict({"input_ids": ids, MASK_COLUMN: masks})


def training_arguments(run: TuningRun, folder: str) -> SoftSFTConfig:
    """The trainer's arguments of a run."""
    settings = {**_QUIET, **run.settings}
    if run.tuning.is_none:
        settings["max_steps"] = 1  # never taken
    return SoftSFTConfig(**{"output_dir": folder, **settings})


def measured(run: TuningRun, material: Material, write: Callable[[str], None]) -> Record:
    """Tune the model and measure it."""
    record: Record = {
        "tuning": run.tuning.name, "seed": run.seed, "settings": run.settings, "status": "done", "losses": [],
        "seconds": 0.0,
    }  # fmt: skip
    begun = time.monotonic()
    with TemporaryDirectory() as folder:
        try:
            trainer = make_trainer(run, material, folder)
            if not run.tuning.is_none:
                started = time.monotonic()
                trainer.train()
                record["seconds"] = time.monotonic() - started
                record["losses"] = [log for log in trainer.state.log_history if "loss" in log]
            record |= measure(trainer, material, write)
        except _FAILURES as error:
            record["status"] = f"{type(error).__name__}: {error}"
    return record | {"total_seconds": time.monotonic() - begun}


def make_trainer(run: TuningRun, material: Material, folder: str) -> SoftSFTTrainer:
    """The trainer of a run, from the model that all begin from."""
    peft = run.study.peft
    trainer = SoftSFTTrainer(
        run.study.model, training_arguments(run, folder), material.train,
        {"texts": material.texts, "others": material.others}, processing_class=material.tokenizer,
        peft_config=None if peft is None else LoraConfig(**peft),
    )  # fmt: skip
    for quieted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(quieted)
    return trainer


@torch.no_grad()
def measure(trainer: SoftSFTTrainer, material: Material, write: Callable[[str], None]) -> Record:
    """Everything that is said about a model: by decoding, and of itself."""
    decodings = {}
    for name, decoding in tqdm(material.config.decodings.items(), desc="decodings"):
        numbers = text_numbers(trainer.policy, material, decoding) | answer_numbers(trainer.policy, material, decoding)
        numbers |= own_token_numbers(trainer, decoding)
        decodings[name] = numbers
        write(
            f"  {name}: base NLL {numbers['base_nll']:.3f}, accuracy {numbers['accuracy']:.1%}, "
            f"NLL behind its own tokens {numbers['own_nll']:.3f}"
        )
    hard = next(iter(decodings.values()))["hard_nll"]  # behind true tokens: the same whatever the decoding
    return {"decodings": decodings, "hard_nll": hard, "other_nll": _measured(trainer, "others")["hard_nll"]}


def text_numbers(policy: Policy, material: Material, decoding: SoftDecoding) -> Record:
    """What a model writes after the openings of held-out reviews."""
    config, tokenizer = material.config, material.tokenizer
    eos_ids = eos_token_ids(policy.causal_lm, tokenizer)
    prompts = torch.tensor([row[: config.prompt_length_tokens] for row in material.texts["input_ids"]])
    nlls, lengths, repeated, sequences, entropies, fed, masks = [], [], [], [], [], [], []
    shown: list[str] = []
    for number, ids in enumerate(prompts.to(_device(policy)).split(config.batch_size)):
        given = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
        indices = list(range(number * config.batch_size, number * config.batch_size + len(ids)))
        record = soft_generate(
            policy, given, config.text_length_tokens, decoding, eos_ids=eos_ids, prompt_indices=indices,
            find_nearest=False,
        )  # fmt: skip
        nlls += per_sequence_mean(hard_nll(material.base, record), record.mask).tolist()
        lengths += record.mask.sum(-1).tolist()
        repeated += repetition(record.tokens, record.mask).tolist()
        sequences += [tuple(row[mask].tolist()) for row, mask in zip(record.tokens, record.mask, strict=True)]
        for kept, values in ((entropies, record.entropy), (fed, record.fed_entropy), (masks, record.mask)):
            kept.append(_to_length(values, config.text_length_tokens))
        texts = decode(tokenizer, torch.cat([ids, record.tokens], 1), torch.cat([given.mask, record.mask], 1))
        shown += texts[: max(0, _SHOWN - len(shown))]
    mean, error = mean_and_error(nlls)
    mask = torch.cat(masks)
    return {
        "base_nll": mean, "base_nll_se": error, "distinct_1": distinct_n(sequences, 1),
        "distinct_2": distinct_n(sequences, 2), "repetition": sum(repeated) / len(repeated),
        "length": sum(lengths) / len(lengths), "entropy": token_mean(torch.cat(entropies), mask).item(),
        "entropy_by_step": _by_step(torch.cat(entropies), mask), "fed_by_step": _by_step(torch.cat(fed), mask),
        "largest_fed_by_step": torch.cat(fed).amax(0).tolist(), "shown": shown,
    }  # fmt: skip


def answer_numbers(policy: Policy, material: Material, decoding: SoftDecoding) -> Record:
    """Held-out questions that a model answers rightly; the shown token of a soft step is the heaviest."""
    config, questions = material.config, material.questions
    ends = (*eos_token_ids(policy.causal_lm, material.tokenizer), material.line_end)
    longest = max(map(len, material.tokenizer(list(questions["completion"]), add_special_tokens=False).input_ids))
    right: list[bool] = []
    for start in range(0, len(questions), config.batch_size):
        rows = [dict(questions[row]) for row in range(start, min(start + config.batch_size, len(questions)))]
        prompts = prompt_batch(
            [{**row, "prompt_index": start + index} for index, row in enumerate(rows)], material.tokenizer, 1, None,
            _device(policy),
        ).prompts  # fmt: skip
        record: SoftText = soft_generate(
            policy, prompts, longest + 2, decoding, eos_ids=ends, find_nearest=False,
            prompt_indices=list(range(start, start + len(rows))),
        )  # fmt: skip
        texts = decode(material.tokenizer, record.tokens, record.mask)
        right += [extract_answer(text, row["kind"]) == row["answer"] for text, row in zip(texts, rows, strict=True)]
    kinds = {
        kind: [r for r, k in zip(right, questions["kind"], strict=True) if k == kind] for kind in questions["kind"]
    }
    return {
        "accuracy": sum(right) / len(right), "right": right,
        "accuracy_by_kind": {kind: sum(values) / len(values) for kind, values in kinds.items()},
    }  # fmt: skip


def own_token_numbers(trainer: SoftSFTTrainer, decoding: SoftDecoding) -> Record:
    """NLL of held-out text behind what the model feeds itself all the while, and behind true tokens."""
    numbers = _measured(trainer, "texts", guided(decoding.thinking.relaxation or _LIKELIEST, "mix"))
    return {"own_nll": numbers["soft_nll"], "hard_nll": numbers["hard_nll"]}


def _measured(trainer: SoftSFTTrainer, name: str, relaxation: GuidedRelaxation | None = None) -> dict[str, float]:
    batches = trainer.get_eval_dataloader(name)
    found = [text for inputs in batches for text in trainer.measure(trainer._prepare_inputs(inputs), relaxation)]
    return summary(found)


def _device(policy: Policy) -> torch.device:
    return policy.causal_lm.get_input_embeddings().weight.device


def _to_length(values: Tensor, length: int) -> Tensor:
    """Steps up to a length; those that no row of a batch got to are zero, as those after a row's end are."""
    return torch.nn.functional.pad(values, (0, length - values.shape[1]))


def _by_step(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> list[float | None]:
    """Means over the rows that got so far; None where none did."""
    counts = mask.sum(0)
    sums = (values * mask).sum(0)
    return [None if n == 0 else total / n for total, n in zip(sums.tolist(), counts.tolist(), strict=True)]
