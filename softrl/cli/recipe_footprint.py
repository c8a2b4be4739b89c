"""From a recipe to what its steps take: reads the recipe as `softrl train` does, and loads no model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softrl.cli.arguments import WITHOUT_REWARDS, TrainArguments
from softrl.models.shape import AdapterShape, ModelShape
from softrl.studies.footprint import Footprint, footprint
from softrl.studies.step_plan import DEEPSPEED, Engine, Method, Precision, Sharding, StepPlan

_FOUR_BIT = 0.5 + 4 / 64  # NF4 with a float32 scale for every 64 weights (Dettmers et al. 2023)
_EIGHT_BIT = 1.0
# Numbers that an optimiser keeps for each trained parameter, by the start of its name; others are taken for AdamW.
_STATES = {
    "sgd": 0.0,
    "adafactor": 0.0,
    "adamw_bnb_8bit": 0.5,
    "adamw_8bit": 0.5,
    "paged_adamw_8bit": 0.5,
    "lion": 1.0,
}


@dataclass(frozen=True)
class RecipeFootprint:
    """A recipe as the formula sees it; `notes` says what it does not see."""

    shape: ModelShape
    adapter: AdapterShape | None
    plan: StepPlan
    precision: Precision
    mixed: bool
    beside: int
    notes: tuple[str, ...]

    def under(self, engine: Engine, num_processes: int) -> Footprint:
        """What one of that many processes holds."""
        precision, sharding = self.precision_under(engine), Sharding(engine, num_processes)
        return footprint(self.shape, self.plan, precision, self.adapter, sharding, self.beside)

    def precision_under(self, engine: Engine) -> Precision:
        """DeepSpeed turns the model into the mixed precision's dtype, FSDP2 gathers it in that; others autocast."""
        if not self.mixed:
            return self.precision
        if engine in DEEPSPEED:
            return replace(self.precision, weights=2, trained=2, compute=2)
        if engine == "fsdp2":
            return replace(self.precision, trained=4, compute=2)
        return replace(self.precision, compute=2, autocast=self.precision.weights > 2)


def recipe_footprint(arguments: TrainArguments, training_args: Any, model_args: Any) -> RecipeFootprint:
    """Read shapes and prompts; the configuration of the model is needed, its weights are not.

    Raises:
        ValueError: a model, data set or setting that cannot be read, or a trainer that is none of our rollouts'.
    """
    from transformers import AutoConfig, AutoTokenizer
    from trl import get_peft_config

    from softrl.assets import resolve_model
    from softrl.models.shape import adapter_shape, model_shape

    if arguments.trainer.startswith("trl_") or arguments.trainer in WITHOUT_REWARDS:
        what = "samples nothing" if arguments.trainer in WITHOUT_REWARDS else "is TRL's own"
        raise ValueError(
            f"trainer={arguments.trainer!r} {what}, and its memory is not estimated; --measure measures it"
        )
    name = resolve_model(model_args.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(name, revision=model_args.model_revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r}: its configuration or tokenizer cannot be read "
            f"({str(error).splitlines()[0]}); pass 'smollm2-135m', a local folder, or a hub name that is cached"
        ) from error
    shape, peft_config = model_shape(config), get_peft_config(model_args)
    beside, notes = _beside(arguments, shape)
    return RecipeFootprint(
        shape,
        None if peft_config is None else adapter_shape(config, peft_config),
        _plan(arguments, training_args, _prompt_length(arguments, training_args, tokenizer)),
        _precision(training_args, model_args, config, adapted=peft_config is not None),
        bool(training_args.bf16 or training_args.fp16),
        beside,
        (*notes, *_unseen(arguments, training_args)),
    )


def _prompt_length(arguments: TrainArguments, training_args: Any, tokenizer: Any) -> int:
    """The longest prompt, in tokens."""
    from softrl.cli.train import load_prompts
    from softrl.data.prompts import prompt_ids

    train, _ = load_prompts(arguments, tokenizer)
    longest = max(len(prompt_ids(prompt, tokenizer)) for prompt in train["prompt"])
    return min(longest, training_args.max_prompt_length or longest)


def _plan(arguments: TrainArguments, args: Any, prompt_length: int) -> StepPlan:
    return StepPlan(
        num_sequences=args.per_device_train_batch_size,
        prompt_length=prompt_length,
        num_steps=args.max_completion_length,
        num_kept=args.make_truncation().top_k,
        method=_method(arguments, args),
        block_length=getattr(args, "block_length", 32),
        checkpointed=args.gradient_checkpointing,
        has_kl=args.needs_reference,
        has_entropy=args.entropy_coef > 0.0,
        accumulates=args.gradient_accumulation_steps > 1,
        states_per_parameter=next(
            (states for start, states in _STATES.items() if str(args.optim.value).startswith(start)), 2.0
        ),
    )


def _method(arguments: TrainArguments, args: Any) -> Method:
    if arguments.trainer in ("ppo", "reinforce_gan") or not getattr(args, "uses_relaxation", False):
        return "score_function"
    if getattr(args, "estimator", None) == "soft_score":
        return "score_function"
    from softrl.estimators.adjoint import chosen_method

    chosen = chosen_method(args.adjoint_settings(), args.make_relaxation(), args.max_completion_length, True)
    methods: dict[str, Method] = {
        "parallel": "parallel", "blocked": "blocked", "sequential": "sequential", "autograd": "autograd",
    }  # fmt: skip
    return methods[chosen]


def _precision(args: Any, model_args: Any, config: Any, adapted: bool) -> Precision:
    import torch

    from softrl.trainers.loading import supported_dtype

    given = (args.model_init_kwargs or {}).get("dtype", model_args.dtype) or "float32"
    if given == "auto":
        given = config.dtype or "float32"
    supported = supported_dtype(str(given).removeprefix("torch."), args.device)
    size = getattr(torch, supported).itemsize
    quantized = _FOUR_BIT if model_args.load_in_4bit else _EIGHT_BIT if model_args.load_in_8bit else None
    trained = 2 if quantized is not None else 4 if adapted else size
    return Precision(size, trained, size, quantized=quantized)


def _beside(arguments: TrainArguments, shape: ModelShape) -> tuple[int, list[str]]:
    """Bytes of the reward models and the judge in float32, and which of them are not counted."""
    total, notes = 0, []
    if arguments.judge == "sentiment" or "similarity" in arguments.reward_funcs:
        total += _classifier_bytes("minilm-l6")
    for name in arguments.reward_funcs:
        if name == "sentiment":
            total += 4 * shape.vocab_size
        elif Path(name).is_file():
            total += Path(name).stat().st_size
        elif Path(name).is_dir():
            total += _classifier_bytes(name)
        elif name not in ("bleu", "rouge1", "rouge2", "rougeL", "similarity"):
            notes.append(f"reward {name!r} is not counted")
    return total, notes


def _classifier_bytes(name: str) -> int:
    from transformers import AutoConfig, AutoModel

    from softrl.assets import resolve_model
    from softrl.models.shape import num_parameters

    return 4 * num_parameters(AutoConfig.from_pretrained(resolve_model(name)), AutoModel)


def _unseen(arguments: TrainArguments, args: Any) -> list[str]:
    notes = []
    if getattr(args, "surrogate_chunks", 1) > 1:
        notes.append("surrogate_chunks makes the last phase smaller: less than this")
    if arguments.trainer in ("text_gan", "reinforce_gan"):
        notes.append("the discriminator is not counted")
    if arguments.trainer == "ppo" and args.num_mini_batches > 1:
        notes.append("PPO's mini-batches are smaller than the batch: less than this")
    if getattr(args, "estimator", None) in ("combined", "pathwise_control_variate"):
        notes.append(f"estimator={args.estimator!r} is counted by its pathwise part")
    return notes
