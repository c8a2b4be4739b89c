"""`QuietSTaRTrainer`: a language model learns to think before its next tokens. The maths is in `estimators.thoughts`.

Left out: engines that shard parameters, which would have to gather the learned embeddings outside of any module.
"""

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from softrl.data.texts import ANCHOR_COLUMN, INDEX_COLUMN
from softrl.estimators.thoughts import ThoughtExtras, ThoughtLoss, log_proposal, text_loss, thought_loss
from softrl.masking import token_mean
from softrl.models.policy import check_policy, evaluating, evaluation_mode
from softrl.models.thinking import ThinkingLM
from softrl.rollouts.anchors import Anchors, by_entropy, every_kth, given
from softrl.rollouts.thoughts import joined_thoughts, thought_embeds, thought_pass, thought_rollout
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.trainers.loading import model_name
from softrl.trainers.plain_text_trainer import PlainTextTrainer
from softrl.trainers.quietstar_config import QuietSTaRConfig
from softrl.trainers.thinking_model import ThinkingModelMixin, frozen_prior, thinking_model
from softrl.trainers.thought_evaluation import ThoughtSample, measure_texts, measure_thoughts, summary
from softrl.trainers.thought_surrogate import SurrogateFit
from softrl.types import Texts, Thoughts

_DRAWS = 1  # of a text's random streams: 0 thinks, this one is for rules that draw


class QuietSTaRTrainer(ThinkingModelMixin, PlainTextTrainer):
    """
    Trainer that teaches a causal language model to think before its next tokens, on plain text.

    With respect to `~transformers.Trainer` it overrides `compute_loss`, `create_optimizer` (a learning rate of its own
    for what thinking adds), and what [`PlainTextTrainer`] and [`ThinkingModelMixin`] list.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from softrl.trainers import QuietSTaRTrainer

    >>> trainer = QuietSTaRTrainer(
    ...     model="smollm2-135m",
    ...     train_dataset=Dataset.from_dict({"text": ["The film is long.", "I went to see it."]}),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`ThinkingLM`]):
            What learns to think: a name (hub, local folder, or `"smollm2-135m"`), a causal LM, a PEFT model around
            one, or a model that thinks already; a folder that holds such a one is loaded with its thoughts.
        args ([`QuietSTaRConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Plain text, see [`~softrl.data.texts`]; of the latter several by name, too.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, it is loaded from the model's name.
        callbacks, optimizers:
            As in [`~transformers.Trainer`].
        quantization_config, peft_config:
            As in [`~trl.SFTTrainer`].
    """

    _tag_names = ("trl", "softrl", "quiet-star")
    _name = "QuietSTaR"
    _why_whole = "the learned embeddings of thoughts lie outside of any module's call"

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel | ThinkingLM",
        args: QuietSTaRConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            args = QuietSTaRConfig(f"{model_name(model)}-{self._name}")
        self.thoughts_sampled = 0  # by this process since it began
        self._wrapping = (quantization_config, peft_config)
        others = (train_dataset, eval_dataset, processing_class, callbacks, optimizers)
        super().__init__(model, args, *others, needs_anchors=args.think_at == "given")
        if self.is_deepspeed_enabled and args.is_soft:
            raise ValueError("estimator='soft' differentiates a pass twice, which DeepSpeed does not allow; use DDP")
        for each in (self.prior, self.surrogate and self.surrogate.surrogate):
            if each is not None:
                each.to(self.accelerator.device)

    def make_model(
        self,
        model: "str | PreTrainedModel | PeftModel | ThinkingLM",
        args: QuietSTaRConfig,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> ThinkingLM:
        thinking = thinking_model(model, args, *self._wrapping, tokenizer)
        check_policy(thinking.talk)
        top_k = min(args.top_k, thinking.policy.vocab_size)
        self.relaxation = args.make_relaxation(top_k) if args.is_soft else None
        self.objective = args.objective(self.relaxation)
        self.prior = frozen_prior(thinking) if args.needs_prior else None
        if args.reward_surrogate:
            settings = (args.surrogate_spread, args.surrogate_learning_rate, args.seed)
            self.surrogate = SurrogateFit(len(thinking.start), *settings)
        return thinking

    # Data

    def anchors(self, model: ThinkingLM, texts: Texts, rows: list[dict[str, Any]], offset: int = 0) -> Anchors:
        """Where to think about these texts."""
        args = self.args
        if args.think_at == "given":
            return given(texts, [row[ANCHOR_COLUMN] for row in rows])
        if args.think_at == "entropy":
            return by_entropy(model.talk, texts, args.think_count)
        return every_kth(texts, args.think_every, offset)

    # Training

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        unwrapped = self.accelerator.unwrap_model(model)
        length = self._follow_curriculum(unwrapped)
        evaluation_mode(unwrapped)
        if not self.args.thinks:
            self._count_tokens(inputs)
            return self._loss_without_thoughts(model, self._texts(inputs))
        rows, others = self._split(inputs)
        texts = self._texts(rows)
        with self._metrics.timed("thoughts"), self.accelerator.autocast():
            where = self.anchors(unwrapped, texts, rows, offset=self.state.global_step)
            thoughts = self._think(unwrapped, texts, where, rows)
        with self.accelerator.autocast():
            extras = self._extras(unwrapped, texts, thoughts, rows)
            beside = self._texts(others) if others else None
            output = self._redirect(model, unwrapped, self._loss, texts, thoughts, extras, beside)
        self.thoughts_sampled += int(thoughts.is_anchor.sum()) * thoughts.num_samples
        self._record(thoughts, output, length)
        self._count_tokens(inputs)
        if self.surrogate is not None and thoughts.length:
            with self._metrics.timed("surrogate"):
                self._metrics.add(self.surrogate.learn(thoughts, output.passed, output.embeds, self.accelerator))
        return output.loss

    def _split(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows to think about, and those that name no place to; all are of the first kind where no row names one."""
        if self.args.think_at != "given" or not any(row[ANCHOR_COLUMN] for row in rows):
            return rows, []
        return [row for row in rows if row[ANCHOR_COLUMN]], [row for row in rows if not row[ANCHOR_COLUMN]]

    def _loss(self, texts: Texts, thoughts: Thoughts, extras: ThoughtExtras, others: Texts | None) -> ThoughtLoss:
        model = self.accelerator.unwrap_model(self.model)
        return thought_loss(model, texts, thoughts, self.objective, extras, others)

    def _loss_without_thoughts(self, model: nn.Module, texts: Texts) -> Tensor:
        unwrapped = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            loss = self._redirect(model, unwrapped, text_loss, unwrapped, texts)
        self._metrics.add({"base_nll": self.accelerator.gather(loss.detach()[None]).mean().item()})
        return loss

    def _count_tokens(self, rows: list[dict[str, Any]]) -> None:
        here = torch.tensor([sum(len(row["input_ids"]) for row in rows)], device=self.accelerator.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(here).sum())

    def _follow_curriculum(self, model: ThinkingLM) -> int:
        length = int(self.args.lengths.at(self.state.global_step, max(self.state.max_steps, 1)))
        for each in (model, self.prior):
            if each is not None:
                each.thinking = replace(each.thinking, n_thought=length)
        return length

    def _random(self, rows: list[dict[str, Any]], numbers: int, *stream: int) -> SequenceRandom:
        """A stream a text, keyed by seed, step and text."""
        key = (self.args.seed, self.state.global_step)
        seeds = [sequence_seed(*key, row[INDEX_COLUMN], *stream) for row in rows]
        return SequenceRandom(seeds, self.accelerator.device, rows=numbers)

    def _think(self, model: ThinkingLM, texts: Texts, where: Anchors, rows: list[dict[str, Any]]) -> Thoughts:
        args, made = self.args, []
        counts = {"policy": args.num_thoughts, "prior": 0}
        if self.prior is not None and args.proposal != "policy":
            counts["prior"] = args.num_thoughts // (2 if args.proposal == "mixture" else 1)
            counts["policy"] = args.num_thoughts - counts["prior"]
        for stream, (name, count) in enumerate(counts.items()):
            if count:
                thinker = model if name == "policy" else self.prior
                random = self._random(rows, where[0].shape[1] * count, *([2 * stream] if stream else []))
                relaxation = self.relaxation if args.thoughts == "policy" else None
                made.append(
                    thought_rollout(
                        thinker, texts, *where, random, count, args.thoughts, relaxation, args.branch_attention
                    )
                )
        return made[0] if len(made) == 1 else joined_thoughts(*made)

    @torch.no_grad()
    def _extras(
        self, model: ThinkingLM, texts: Texts, thoughts: Thoughts, rows: list[dict[str, Any]]
    ) -> ThoughtExtras:
        args, shape = self.args, thoughts.fed.shape[:3]
        proposal = prior = uniforms = None
        if self.prior is not None:
            prior = self._log_probs(self.prior, texts, thoughts)
            if args.proposal != "policy":
                proposal = log_proposal(self._log_probs(model, texts, thoughts), prior, args.proposal)
        if args.estimator == "trice":
            random = self._random(rows, shape[1] * shape[2], _DRAWS)
            uniforms = random.exponential(1, torch.float32).neg().exp().view(shape)
        surrogate = None if self.surrogate is None else self.surrogate.surrogate
        return ThoughtExtras(proposal, prior if args.scores_by_prior else None, uniforms, surrogate)

    def _log_probs(self, model: ThinkingLM, texts: Texts, thoughts: Thoughts) -> Tensor:
        """log π of whole thoughts under another model than that which is trained, or without a graph."""
        with evaluating(model):
            embeds = thought_embeds(model, thoughts, "policy")
            return thought_pass(model, texts, thoughts, 1, embeds, self.args.branch_attention).log_probs.sum(-1)

    @torch.no_grad()
    def _record(self, thoughts: Thoughts, output: ThoughtLoss, length: int) -> None:
        passed = output.passed
        valid = passed.is_talk[..., 0]

        def mean(values: Tensor) -> Tensor:
            return token_mean(values, valid)  # 0 where no text has a token to think after

        talk, base = passed.talk_log_probs[..., 0], passed.base_log_probs[..., 0]
        values = {
            "loss/base": output.base, "loss/talk": output.talk, "loss/policy": output.policy,
            "nll": -mean(talk.mean(-1)), "base_nll": -mean(base),
            "reward": mean(passed.rewards.mean(-1)),
            "reward_std": mean(passed.rewards.std(-1, unbiased=False)),
            "mixing": mean(passed.mixing[..., 0].mean(-1)),
        }  # fmt: skip
        if thoughts.length:
            values["thought_log_prob"] = mean(passed.log_probs.mean((-2, -1)))
        if self.args.entropy_weight > 0.0:
            values["entropy"] = output.entropy
        gathered = self.accelerator.gather(torch.stack([value.float() for value in values.values()])[None]).mean(0)
        logged = dict(zip(values, gathered.tolist(), strict=True))
        if not self.args.lengths.is_constant:
            logged["n_thought"] = float(length)
        self._metrics.add(logged)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        rates = {"mixing": self.args.mixing_learning_rate, "thinking": self.args.thinking_learning_rate}
        if {group.get("name") for group in optimizer.param_groups} & rates.keys():
            return optimizer
        named = dict((self.model if model is None else model).named_parameters())
        for group_name, rate in rates.items():
            own = {id(value): value for name, value in named.items() if _parameter_group(name) == group_name}
            if rate is None:
                continue
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            settings = {"params": list(own.values()), "lr": rate, "weight_decay": 0.0, "name": group_name}
            optimizer.add_param_group(settings)
        return optimizer

    # Evaluation

    def measure(self, model: ThinkingLM, rows: list[dict[str, Any]]) -> list[ThoughtSample]:
        """Think about rows of an evaluation set and score what follows."""
        args, texts = self.args, self._texts(rows)
        relaxation = self.relaxation if args.thoughts == "policy" else None
        with evaluating(model), self.accelerator.autocast():
            where = self.anchors(model, texts, rows)
            indices = [row[INDEX_COLUMN] for row in rows]
            if not args.thinks:
                return measure_texts(model, texts, indices, where)
            return measure_thoughts(
                model, texts, indices, where, args.num_eval_thoughts, args.thoughts, relaxation, args.seed,
                args.branch_attention,
            )  # fmt: skip

    def summarised(self, model: ThinkingLM) -> dict[str, float]:
        return summary(self.last_evaluation)


def _parameter_group(name: str) -> str:
    """Which learning rate a parameter has: "lm", "mixing" (the head) or "thinking" (what else thinking adds)."""
    first = name.removeprefix("module.").split(".")[0]
    return first if first in ("lm", "mixing") else "thinking"
