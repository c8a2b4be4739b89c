"""`SoftARTrainer`: pre-training of a language model that reads its history through compressed windows.

The maths is in `objectives.soft_ar`, the model in `contexts.soft_ar`. Left out: engines that shard parameters.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from softrl.contexts.soft_ar import NO_MEMORY, SoftARForCausalLM
from softrl.data.texts import INDEX_COLUMN
from softrl.models.policy import Policy, check_policy
from softrl.objectives.soft_ar import TokenScores, text_hidden, token_scores
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.trainers.loading import load_model, model_name
from softrl.trainers.plain_text_trainer import PlainTextTrainer
from softrl.trainers.soft_ar_config import SoftARTrainingConfig
from softrl.trainers.soft_ar_evaluation import PERMUTED, ReadText, read_texts, summary
from softrl.types import Texts

logger = logging.get_logger(__name__)

_MEMORY = 1  # of a text's random streams: 0 says which tokens are soft


class SoftARTrainer(PlainTextTrainer):
    """
    Trainer of softAR models on plain text: hard tokens only, or with the model's own soft ones in every window.

    What it saves loads by transformers' Auto classes and is a policy for the trainers of rewards. With respect to
    `~transformers.Trainer` it overrides `compute_loss`, `get_eval_dataloader` (the order), and what
    [`PlainTextTrainer`] lists.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from softrl.trainers import SoftARTrainer

    >>> trainer = SoftARTrainer(
    ...     model="smollm2-135m",
    ...     train_dataset=Dataset.from_dict({"text": ["The film is long.", "I went to see it."]}),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            A softAR model, or any causal LM, which then gets the window that `args` describes: an object, or a name
            (hub, local folder, or `"smollm2-135m"`).
        args ([`SoftARTrainingConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Plain text, see [`~softrl.data.texts`]; of the latter several by name, too.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, it is loaded from the model's name.
        callbacks, optimizers:
            As in [`~transformers.Trainer`].
        quantization_config, peft_config (*optional*):
            Must be `None`: a model that learns to read memory is trained whole.
    """

    _tag_names = ("trl", "softrl", "soft-ar")
    _name = "SoftAR"
    _model_module = "softrl.contexts.soft_ar"
    _why_whole = "a head that reads the embedding finds it outside of its module's call"

    def __init__(
        self,
        model: "str | PreTrainedModel",
        args: SoftARTrainingConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        if args is None:
            args = SoftARTrainingConfig(f"{model_name(model)}-{self._name}")
        if quantization_config is not None or peft_config is not None:
            raise ValueError(
                "SoftARTrainer trains a model whole, since its memory slots are new to every layer: leave out "
                "quantization_config and peft_config (use_peft, load_in_4bit); adapters go with the reward trainers"
            )
        others = (train_dataset, eval_dataset, processing_class, callbacks, optimizers)
        super().__init__(model, args, *others)
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        for name, dataset in datasets.items() if args.eval_beyond_tokens is not None else ():
            if dataset is not None:
                where = "eval_dataset" if name is None else f"eval_dataset[{name!r}]"
                _check_beyond(args.eval_beyond_tokens, max(map(len, dataset["input_ids"])) - 1, where)

    def make_model(
        self,
        model: "str | PreTrainedModel",
        args: SoftARTrainingConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> SoftARForCausalLM:
        windowed = soft_ar_model(model, args)
        if args.collapse_head_weight > 0.0 and windowed.collapse_head is None:
            windowed.add_collapse_head()
        check_policy(Policy(windowed))
        least = windowed.model.layout.uncompressed
        if args.eval_beyond_tokens is not None and not args.eval_beyond_tokens >= least:  # nan is none either
            raise ValueError(
                f"eval_beyond_tokens={args.eval_beyond_tokens} is inside the window, whose first "
                f"{least} tokens have no memory; give as many or more"
            )
        return windowed

    # Data

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Texts in an order that mixes the works they are from: each gets the memory of another text of its batch."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        return super().get_eval_dataloader(dataset.shuffle(seed=0) if isinstance(dataset, Dataset) else dataset)

    def _uniform(self, rows: list[dict[str, Any]], count: int, *stream: int) -> Tensor:
        """Uniform numbers [N, count] keyed by seed, step and text."""
        key = (self.args.seed, self.state.global_step)
        seeds = [sequence_seed(*key, row[INDEX_COLUMN], *stream) for row in rows]
        return SequenceRandom(seeds, self.accelerator.device).uniform(count)

    # Training

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        args, texts = self.args, self._texts(inputs)
        values = args.values_at(self.state.global_step, max(self.state.max_steps, 1))
        share = float(values["soft_share"])
        is_soft = self._uniform(inputs, texts.ids.shape[1]) < share if share > 0.0 else None
        memory_of = None
        if args.memory_dropout > 0.0:
            rows = torch.arange(len(inputs), device=texts.ids.device)
            forgets = self._uniform(inputs, 1, _MEMORY)[:, 0] < args.memory_dropout
            memory_of = torch.where(forgets, NO_MEMORY, rows)
        with self.accelerator.autocast():
            unwrapped = self.accelerator.unwrap_model(model)
            scores = self._redirect(model, unwrapped, self._scores, texts, is_soft, memory_of)
        counted = (texts.mask if texts.counted is None else texts.mask & texts.counted)[:, 1:]
        loss = scores.loss.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
        self._record(texts, scores, counted)
        if not args.schedules()["soft_share"].is_constant:
            self._metrics.add({"soft_share": share})
        return loss

    def _scores(self, texts: Texts, is_soft: Tensor | None, memory_of: Tensor | None) -> TokenScores:
        model, objective = self.accelerator.unwrap_model(self.model), self.args.objective
        hidden = text_hidden(model, texts, is_soft, memory_of, objective.detached)
        return token_scores(model, hidden, texts.ids, objective)

    @torch.no_grad()
    def _record(self, texts: Texts, scores: TokenScores, counted: Tensor) -> None:
        values = {"nll": scores.nll, "accuracy": scores.hits, "squared_error": scores.squared_error}
        values["collapse_error"] = scores.collapse_error
        sums = [(value.double() * counted).sum() for value in values.values()]
        sums += [counted.sum().double(), texts.mask.sum().double()]
        *numbers, count, tokens = self.accelerator.gather(torch.stack(sums)[None]).sum(0).tolist()
        self.state.num_input_tokens_seen += int(tokens)
        logged = {name: value / max(count, 1.0) for name, value in zip(values, numbers, strict=True)}
        config = self.accelerator.unwrap_model(self.model).config
        missing = {"squared_error": config.output != "embedding", "collapse_error": not config.collapse_head}
        logged = {name: value for name, value in logged.items() if not missing.get(name)}
        self._metrics.add(logged)

    # Evaluation

    def measure(self, model: SoftARForCausalLM, rows: list[dict[str, Any]]) -> list[ReadText]:
        """Every text with its own memory, with none, and with another text's; see `soft_ar_evaluation`."""
        with self.accelerator.autocast():
            return read_texts(model, self._texts(rows), [row[INDEX_COLUMN] for row in rows])

    def summarised(self, model: SoftARForCausalLM) -> dict[str, float]:
        beyond, texts = self.args.eval_beyond_tokens, self.last_evaluation
        if beyond is None:
            beyond = model.model.layout.uncompressed
        else:
            _check_beyond(
                beyond, max((read for text in texts for read in text.read), default=beyond + 1), "eval_dataset"
            )
        if model.model.layout.num_slots and not any(PERMUTED in text.nll for text in texts):
            logger.warning_once(
                "No batch of the evaluation had a second text, whose memory could be lent, so that there are no "
                "metrics _permuted; raise per_device_eval_batch_size to 2 or more, and pass two texts or more."
            )
        return summary(self.last_evaluation, model, beyond) | num_parameters(model)


def _check_beyond(beyond_tokens: int, longest: int, where: str) -> None:
    """Raise ValueError where metrics `_beyond` are asked for and would be missing."""
    if not longest > beyond_tokens:
        raise ValueError(
            f"eval_beyond_tokens={beyond_tokens} is reached by no text of {where}, whose predictions that count are "
            f"from {longest} tokens at most; lower it, or pass longer texts (max_length, block_length_tokens)"
        )


def soft_ar_model(model: "str | PreTrainedModel", args: SoftARTrainingConfig) -> SoftARForCausalLM:
    """The model that is trained: as it is where it has a window, else a causal LM behind the window of `args`.

    Raises:
        ValueError: a weight or a share asks for an output or a soft region that the model's own window has not.
        TypeError: no causal LM that reads embeddings.
    """
    loaded: Any = load_model(model, args)
    if isinstance(loaded, SoftARForCausalLM):
        _check_own_window(loaded, args)
        return loaded
    _ = Policy(loaded)  # its error says what is wanted
    settings = {"output": args.output, "distance_temperature": args.distance_temperature}
    return SoftARForCausalLM.from_backbone(loaded, args.layout, **settings)


def _check_own_window(model: SoftARForCausalLM, args: SoftARTrainingConfig) -> None:
    """Raise on what the model cannot learn, and name the settings of a window that it does not get."""
    output, layout = model.config.output, model.model.layout
    if args.regression_weight > 0.0 and output != "embedding":
        raise ValueError(
            f"regression_weight={args.regression_weight} is of a vector that is put out, and the model has "
            f"output={output!r} already; leave it out, or begin with a causal LM that has no window"
        )
    if max(args.schedules()["soft_share"].ends()) > 0.0 and not layout.num_soft:
        raise ValueError(
            f"soft_share={args.soft_share!r} needs a soft region, and the model's window has num_soft=0 already; "
            "leave it out, or begin with a causal LM that has no window"
        )
    pairs = {name: (getattr(args.layout, name), getattr(layout, name)) for name in layout.__dataclass_fields__}
    pairs["output"] = (args.output, output)
    pairs["distance_temperature"] = (args.distance_temperature, model.config.distance_temperature)
    if others := [f"{name}={given!r} (it has {own!r})" for name, (given, own) in pairs.items() if given != own]:
        logger.warning(f"The model has a window already and keeps it; these settings do nothing: {', '.join(others)}.")


def num_parameters(model: SoftARForCausalLM) -> dict[str, float]:
    """Of the whole model, tied ones once; and without those of the token embeddings, in and out."""
    embeddings = {id(each.weight) for each in (model.get_input_embeddings(), model.lm_head) if hasattr(each, "weight")}
    sizes = {id(each): each.numel() for each in model.parameters()}
    total = sum(sizes.values())
    inside = total - sum(size for key, size in sizes.items() if key in embeddings)
    return {"num_parameters": float(total), "num_parameters_without_embeddings": float(inside)}
