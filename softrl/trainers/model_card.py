"""The model card: TRL's, with what it gets wrong for our models put right.

TRL's own introduces a local base model as `None`, loads an adapter as if it were a whole model, and prompts a base
model with a chat. Its metadata, tags, badges, versions and citations stay.
"""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard

from softrl.assets import SHORT_NAMES
from softrl.trainers.rollout_config import RolloutConfig

CITATION = """\
@software{softrl,
  title   = {{softrl: Reinforcement learning of language models by backpropagating rewards through soft tokens}},
  author  = {{The softrl team}},
  license = {Apache-2.0},
  year    = {2026}
}"""

_QUICK_START, _TRAINING = "## Quick start", "## Training procedure"


@dataclass(frozen=True)
class CardFacts:
    """What a card says of its model.

    Args:
        name: the model's, or its folder's.
        repository: its id on the hub, None when it has not been pushed.
        base: the base model's hub name or folder, empty when it was built in memory.
        is_adapter: the folder holds a PEFT adapter, not a whole model.
        is_conversational: it was trained on conversations, not on text.
        args: what it was trained with.
    """

    name: str
    repository: str | None
    base: str
    is_adapter: bool
    is_conversational: bool
    args: RolloutConfig

    @property
    def base_is_local(self) -> bool:
        """Whether the base model is a folder on this machine, of which only the last part is shown."""
        return Path(self.base).is_dir()

    @property
    def shown_base(self) -> str:
        """The base model's name, never a path."""
        return Path(self.base).name if self.base_is_local else self.base


def finish_card(path: Path, facts: CardFacts) -> None:
    """Rewrite the card that TRL wrote to `path`: its head, its introduction and its quick start."""
    card = ModelCard.load(path)
    card.data["library_name"] = "peft" if facts.is_adapter else "transformers"
    card.data["pipeline_tag"] = "text-generation"
    card.data["base_model"] = None if facts.base_is_local or not facts.base else facts.base
    training = card.text.split(_TRAINING, 1)[1]
    versions = f"- softrl: {version('softrl')}\n"
    if facts.is_adapter:
        versions += f"- PEFT: {version('peft')}\n"
    training = training.replace("- TRL:", f"{versions}- TRL:", 1)
    text = (
        f"# Model Card for {facts.name}\n\n{_introduction(facts, card.data.get('datasets'))}\n\n"
        f"{_QUICK_START}\n\n```python\n{quick_start(facts)}\n```\n\n"
        f"{_TRAINING}\n\n{_sampling(facts.args)}\n{training}"
    )
    card.text = re.sub(r"\n\s*\n", "\n\n", text)  # TRL's template leaves gaps where it has no badges to show
    card.save(path)


def finish_text_card(path: Path, name: str, base: str, module: str) -> None:
    """The same for a small model of a class of ours, trained on plain text.

    Args:
        path: of the card.
        name: the model's, or its folder's.
        base: the model that it was trained from, empty when it was built in memory.
        module: what has to be imported for the Auto classes to know its class.
    """
    card = ModelCard.load(path)
    card.data["pipeline_tag"] = "text-generation"
    card.data["base_model"] = None if Path(base).is_dir() or not base else base
    training = card.text.split(_TRAINING, 1)[1].replace("- TRL:", f"- softrl: {version('softrl')}\n- TRL:", 1)
    subject = f"This model was trained from `{Path(base).name}`" if base else "This model was trained from scratch"
    quick_start = (
        f"import {module}  # whose classes the Auto classes then know\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        'inputs = tokenizer("To be", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64, do_sample=True)[0]))"
    )
    text = (
        f"# Model Card for {name}\n\n{subject} with softrl, on top of [TRL](https://github.com/huggingface/trl).\n\n"
        f"{_QUICK_START}\n\n```python\n{quick_start}\n```\n\n{_TRAINING}\n{training}"
    )
    card.text = re.sub(r"\n\s*\n", "\n\n", text)
    card.save(path)


def _introduction(facts: CardFacts, dataset: str | None) -> str:
    base = f"`{facts.shown_base}`"
    if not facts.base_is_local:
        base = f"[{facts.base}](https://huggingface.co/{facts.base})"
    what = "a PEFT adapter for" if facts.is_adapter else "a fine-tuned version of"
    subject = f"This model is {what} {base}" if facts.base else "This model was built in memory and trained"
    data = f" on the [{dataset}](https://huggingface.co/datasets/{dataset}) dataset" if dataset else ""
    return f"{subject}{data}.\nIt has been trained with softrl, on top of [TRL](https://github.com/huggingface/trl)."


def _sampling(args: RolloutConfig) -> str:
    settings = [f"temperature {args.temperature:g}"]
    settings += [f"top-p {args.top_p:g}"] if args.top_p < 1.0 else []
    settings += [f"min-p {args.min_p:g}"] if args.min_p > 0.0 else []
    if args.basis_aware is not None:
        settings.append(
            f"basis-aware truncation (BA-{args.basis_aware_rule}, epsilon {args.basis_aware:g}, "
            f"{args.basis_aware_directions} directions, {args.basis_aware_candidates} candidates)"
        )
    return (
        f"The policy was trained at sampling {', '.join(settings)}, on completions of at most "
        f"{args.max_completion_length} tokens."
    )


def quick_start(facts: CardFacts) -> str:
    """Python that loads the model from the hub, or from the folder above its own, and samples as in training."""
    args = facts.args
    location = facts.repository or facts.name
    sampling = f"max_new_tokens={args.max_completion_length}, do_sample=True, temperature={args.temperature}, top_k=0"
    sampling += f", top_p={args.top_p}" if args.top_p < 1.0 else ""
    sampling += f", min_p={args.min_p}" if args.min_p > 0.0 else ""
    if args.basis_aware is not None:
        sampling += ", logits_processor=LogitsProcessorList([truncation])"
    prompt = '[{"role": "user", "content": "Tell me about a film."}]' if facts.is_conversational else '"The film is"'
    if not facts.is_adapter:
        lines = [
            *_imports(args, "pipeline"),
            "",
            f'generator = pipeline("text-generation", model="{location}")',
            *_truncation(args, "generator.model"),
            f"output = generator({prompt}, {sampling}, return_full_text=False)",
            'print(output[0]["generated_text"])',
        ]
        return "\n".join(lines)
    if facts.is_conversational:
        encode = f'apply_chat_template({prompt}, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        encode = f"inputs = tokenizer.{encode}"
    else:
        encode = f'inputs = tokenizer({prompt}, return_tensors="pt")'
    lines = [
        *_load_adapter(facts, location),
        f'tokenizer = AutoTokenizer.from_pretrained("{location}")',
        encode,
        *_truncation(args, "model"),
        f"output = model.generate(**inputs, {sampling})",
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _imports(args: RolloutConfig, *names: str) -> list[str]:
    """Imports of names of transformers, with what basis-aware truncation needs."""
    if args.basis_aware is None:
        return [f"from transformers import {', '.join(names)}"]
    return [
        "from softrl.generation.basis_aware import BasisAwareLogitsProcessor",
        f"from transformers import {', '.join(sorted([*names, 'LogitsProcessorList']))}",
    ]


def _truncation(args: RolloutConfig, model: str) -> list[str]:
    if args.basis_aware is None:
        return []
    return [
        f'truncation = BasisAwareLogitsProcessor({model}, {args.basis_aware}, "{args.basis_aware_rule}", '
        f'{args.basis_aware_directions}, max_candidates={args.basis_aware_candidates}, how="mask")'
    ]


def _load_adapter(facts: CardFacts, location: str) -> list[str]:
    if facts.base and not facts.base_is_local:
        return [
            "from peft import AutoPeftModelForCausalLM",
            *_imports(facts.args, "AutoTokenizer"),
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{location}")  # loads {facts.base} with it',
        ]
    base, imports = f'"{facts.shown_base}"', []
    if facts.shown_base in SHORT_NAMES:
        base, imports = f"resolve_model({base})", ["from softrl.assets import resolve_model"]
    return [
        "from peft import PeftModel",
        *imports,
        *_imports(facts.args, "AutoModelForCausalLM", "AutoTokenizer"),
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        f'model = PeftModel.from_pretrained(base, "{location}")',
    ]
