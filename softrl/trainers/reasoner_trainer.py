"""`ReasonerTrainer`: a language model that thinks in latents, trained on plain text, from scratch or further.

The maths is in `estimators.latent_objective`, the model in `models.reasoner`. Left out: engines that shard parameters.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from softrl.assets import resolve_model
from softrl.data.texts import INDEX_COLUMN
from softrl.estimators.latent_objective import LatentExtras, latent_loss
from softrl.estimators.latent_thoughts import searched_thoughts
from softrl.models.policy import evaluating
from softrl.models.reasoner import LatentThoughts, ReasonerForCausalLM
from softrl.models.reasoner_output import IGNORED, ReasonerOutput
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.trainers.loading import load_model, model_name
from softrl.trainers.plain_text_trainer import PlainTextTrainer
from softrl.trainers.reasoner_config import SURROGATE, ReasonerTrainingConfig
from softrl.trainers.reasoner_evaluation import ReasonedText, by_token, measured, num_parameters, summary
from softrl.trainers.reference_state import ReferenceStateMixin
from softrl.trainers.thought_surrogate import SurrogateFit, SurrogateStateMixin

_EVALUATION_STEP = -1  # random streams of evaluations are not those of any training step
_DRAWS = 1  # of a text's random streams, beside the thoughts' own: for rules that draw


@dataclass(frozen=True)
class TextBatch:
    """Rows as a model reads them: tokens padded on the right, labels of those that count, row numbers."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    indices: list[int]


class ReasonerTrainer(SurrogateStateMixin, ReferenceStateMixin, PlainTextTrainer):
    """
    Trainer of latent reasoners on plain text.

    What it saves loads by transformers' Auto classes (import `softrl.models.reasoner` before). With respect to
    `~transformers.Trainer` it overrides `compute_loss`, `log` (parameter counts), and what [`PlainTextTrainer`],
    [`SurrogateStateMixin`] and [`ReferenceStateMixin`] list.

    Example:

    ```python
    >>> from softrl.data.characters import shakespeare
    >>> from softrl.data.corpus import corpus_blocks, corpus_tokenizer
    >>> from softrl.models.reasoner import ReasonerForCausalLM
    >>> from softrl.trainers import ReasonerTrainer, ReasonerTrainingConfig

    >>> args = ReasonerTrainingConfig("reasoner", weight_groups="AABC")
    >>> tokenizer = corpus_tokenizer("characters", shakespeare("train"))
    >>> trainer = ReasonerTrainer(
    ...     model=ReasonerForCausalLM(args.model_config(len(tokenizer))),
    ...     args=args,
    ...     train_dataset=corpus_blocks(shakespeare("train"), tokenizer, 64),
    ...     processing_class=tokenizer,
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`ReasonerForCausalLM`]):
            The model, or the folder of one.
        args ([`ReasonerTrainingConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Plain text, see [`~softrl.data.texts`]; of the latter several by name, too.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, it is loaded from the model's name.
        callbacks, optimizers:
            As in [`~transformers.Trainer`].
        quantization_config, peft_config (*optional*):
            Must be `None`: the model is small, and trained whole.
    """

    _tag_names = ("trl", "softrl", "latent-reasoner")
    _name = "Reasoner"
    _model_module = "softrl.models.reasoner"
    _why_whole = "the modules of a reasoner are called in parts"

    def __init__(
        self,
        model: "str | ReasonerForCausalLM",
        args: ReasonerTrainingConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        if args is None:
            args = ReasonerTrainingConfig(f"{model_name(model)}-{self._name}")
        if quantization_config is not None or peft_config is not None:
            raise ValueError(
                "ReasonerTrainer trains a small model whole: leave out quantization_config and peft_config (use_peft, "
                "load_in_4bit)"
            )
        others = (train_dataset, eval_dataset, processing_class, callbacks, optimizers)
        super().__init__(model, args, *others)
        for each in (self.prior, self.proxy, self.surrogate and self.surrogate.surrogate):
            if each is not None:
                each.to(self.accelerator.device)

    def make_model(
        self,
        model: "str | ReasonerForCausalLM",
        args: ReasonerTrainingConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> ReasonerForCausalLM:
        reasoner = load_model(model, args)
        if not isinstance(reasoner, ReasonerForCausalLM):
            raise ValueError(
                f"model must be a ReasonerForCausalLM or the folder of one, got a {type(reasoner).__name__}; "
                "model_name_or_path='scratch' makes one"
            )
        args.check_model(reasoner.config)
        self.objective = args.make_objective()
        self.prior = copy.deepcopy(reasoner).eval().requires_grad_(False) if args.draws_from_start else None
        self.proxy = None if args.proxy_model is None else load_proxy(args.proxy_model, reasoner, tokenizer)
        self.thinks = reasoner.config.use_reasoner and reasoner.config.n_thought > 0
        if args.objective == SURROGATE and self.thinks:
            settings = (args.surrogate_spread, args.surrogate_learning_rate, args.seed, reasoner.config.n_thought)
            self.surrogate = SurrogateFit(reasoner.config.reasoner_size, *settings)
        return reasoner

    # Data

    def batch(self, rows: list[dict[str, Any]]) -> TextBatch:
        """Rows of a data set as a model reads them."""
        texts = self._texts(rows)
        counted = texts.mask if texts.counted is None else texts.mask & texts.counted
        labels = texts.ids.masked_fill(~counted, IGNORED)
        return TextBatch(texts.ids, texts.mask, labels, [row[INDEX_COLUMN] for row in rows])

    # Training

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        batch = self.batch(inputs)
        here = batch.mask.sum()[None]
        self.state.num_input_tokens_seen += int(self.accelerator.gather(here).sum())
        with self.accelerator.autocast():
            unwrapped = self.accelerator.unwrap_model(model)
            loss, numbers, learned_from = self._redirect(model, unwrapped, self._loss, batch)
        gathered = self.accelerator.gather(torch.stack(list(numbers.values()))[None].float()).mean(0)
        self._metrics.add(dict(zip(numbers, gathered.tolist(), strict=True)))
        if self.surrogate is not None and learned_from is not None:
            with self._metrics.timed("surrogate"):
                self._metrics.add(self.surrogate.learn_from(*learned_from, self.accelerator))
        return loss

    def _loss(self, batch: TextBatch) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...] | None]:
        """The loss; numbers for the logs; and what a surrogate learns from. Of all these only the loss has a graph.

        An engine takes every parameter in the graph of what is returned here to be waiting for a gradient.
        """
        model = self.accelerator.unwrap_model(self.model)
        output = self.passed(model, batch, self.state.global_step)
        extras = self.extras(output, batch)
        if self.thinks and self.objective.searches:
            extras = replace(extras, elite_log_probs=self._elite_log_probs(model, output, batch))
        found = latent_loss(output, self.objective, extras)
        with torch.no_grad():
            numbers = self._numbers(output) | {
                "loss/base": -found.base, "loss/interpreter": -found.interpreter, "loss/talk": -found.talk,
                "loss/policy": found.policy,
                "reward": found.rewards.sum() / max(found.rewards.numel(), 1),
                "reward_std": found.rewards.std(-1, unbiased=False).sum() / max(len(found.rewards), 1),
            }  # fmt: skip
        learned_from = None
        if self.surrogate is not None and output.is_target is not None:
            context, embeds = surrogate_inputs(output)
            learned_from = (context[output.is_target], embeds[output.is_target], found.rewards.float())
        return found.loss, {name: value.detach() for name, value in numbers.items()}, learned_from

    def passed(self, model: ReasonerForCausalLM, batch: TextBatch, step: int) -> ReasonerOutput:
        """A pass of the model with thoughts keyed by seed, step and text; in training perhaps a reference's."""
        config, values = model.config, None
        evaluates = step == _EVALUATION_STEP
        count = self.args.num_eval_thoughts if evaluates else self.args.num_thoughts
        seed = sequence_seed(self.args.seed, step)
        if self.prior is not None and self.thinks and not evaluates:
            values = thoughts_of(self.prior, batch, count, seed).values
        return model(
            batch.ids, batch.mask, batch.labels, values=values,
            num_thoughts=count if config.n_thought else 1,  # without latents all thoughts are the same
            seed=seed, row_ids=batch.indices,
            reparameterised=self.objective.reparameterises and not evaluates and self.thinks,
            with_logits=evaluates,
        )  # fmt: skip

    def _elite_log_probs(self, model: ReasonerForCausalLM, output: ReasonerOutput, batch: TextBatch) -> Tensor:
        """log π of the best latents after every token, [N, T, E]."""
        search, targets = self.objective.search, output.targets
        assert search is not None
        assert targets is not None
        seed = sequence_seed(self.args.seed, self.state.global_step, _DRAWS)
        found = searched_thoughts(
            model, batch.ids, batch.mask, targets, search, seed, batch.indices, self.objective.beta
        )
        return model.think(model.read(batch.ids, batch.mask), values=found.values).log_probs.sum(-1)

    @torch.no_grad()
    def extras(self, output: ReasonerOutput, batch: TextBatch) -> LatentExtras:
        """What the objective reads beside the model's pass."""
        log_proxy = log_prior = uniforms = estimated = trusted = None
        if self.proxy is not None:
            log_proxy = proxy_log_probs(self.proxy, batch.ids, batch.mask)
        if self.thinks and output.thought_log_probs is not None:
            shape = output.thought_log_probs.shape
            if self.prior is not None:  # which drew them, see `passed`
                read = self.prior.read(batch.ids, batch.mask)
                log_prior = self.prior.think(read, values=output.thought_values).log_probs.sum(-1)
            if self.args.rule_name == "trice":
                key = (self.args.seed, self.state.global_step)
                random = SequenceRandom([sequence_seed(*key, index, _DRAWS) for index in batch.indices])
                uniforms = random.uniform(shape[1] * shape[2]).view(shape).to(output.thought_log_probs)
        if self.surrogate is not None:
            context, embeds = surrogate_inputs(output)
            said = self.surrogate.surrogate(context.flatten(0, 1), embeds.flatten(0, 1))
            estimated, trusted = (each.unflatten(0, context.shape[:2]) for each in (said.estimated, said.trusted))
        return LatentExtras(log_proxy, log_prior, log_prior, uniforms, estimated, trusted)

    @staticmethod
    def _numbers(output: ReasonerOutput) -> dict[str, Tensor]:
        return {name: values.sum() / max(len(values), 1) for name, values in by_token(output).items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and not any("num_parameters" in row for row in self.state.log_history):
            logs = {**logs, **num_parameters(self.accelerator.unwrap_model(self.model))}
        super().log(logs, start_time)

    # Evaluation

    def measure(self, model: ReasonerForCausalLM, rows: list[dict[str, Any]]) -> list[ReasonedText]:
        """NLL of every token after thoughts, and without them."""
        with evaluating(model), self.accelerator.autocast():
            batch = self.batch(rows)
            return measured(self.passed(model, batch, _EVALUATION_STEP), batch.indices)

    def summarised(self, model: ReasonerForCausalLM) -> dict[str, float]:
        return summary(self.last_evaluation, model)


def surrogate_inputs(output: ReasonerOutput) -> tuple[Tensor, Tensor]:
    """Contexts [N, T, D], normalised since their scale differs by model, and thoughts [N, T, S, n, D]; constants."""
    assert output.context is not None
    assert output.thought_embeds is not None
    context = output.context.detach().float()
    return nn.functional.layer_norm(context, context.shape[-1:]), output.thought_embeds.detach().float()


@torch.no_grad()
def thoughts_of(model: ReasonerForCausalLM, batch: TextBatch, count: int, seed: int) -> LatentThoughts:
    """S thoughts after every token, of random numbers as `ReasonerForCausalLM.forward` has them."""
    texts = model.read(batch.ids, batch.mask)
    return model.think(texts, model.uniforms(texts.positions, count, seed, batch.indices))


def load_proxy(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """A frozen language model in the place of the data.

    Raises:
        ValueError: it cannot be loaded, or its tokens are others than the model's.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(name)
    try:
        proxy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except OSError as error:
        raise ValueError(
            f"proxy_model={name!r} cannot be loaded ({str(error).splitlines()[0]}); pass the folder or name of a "
            "causal LM, for instance the output_dir of a run with use_reasoner=false"
        ) from error
    own, others = model.config.vocab_size, proxy.config.get_text_config().vocab_size
    if own != others:
        raise ValueError(f"proxy_model={name!r} has a vocabulary of {others} tokens and the model one of {own}")
    if tokenizer is not None and AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"proxy_model={name!r} has other tokens than the model; train it on the same corpus")
    return proxy.eval().requires_grad_(False)


@torch.no_grad()
def proxy_log_probs(proxy: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """log D(y | x) at every position, [N, T, V]."""
    fixed = {"seed": 0} if isinstance(proxy, ReasonerForCausalLM) else {}  # one that thinks must not do so at random
    return proxy(input_ids=ids, attention_mask=mask, **fixed).logits.float().log_softmax(-1)
