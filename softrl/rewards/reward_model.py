"""A reward model in the policy's vocabulary: any sequence classifier of transformers as a differentiable reward.

How it reads soft tokens is in `classifier.py`; here are prompts, labels and links.
Reward models with another vocabulary are in `aligned_reward_model.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softrl.data.prompts import prompt_ids
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.classifier import SoftClassifier
from softrl.rewards.sequences import Pooling, with_end
from softrl.types import SoftTokens

APPEND_EOS = "append_eos"  # in the model's configuration
Link = Literal["identity", "sigmoid", "softmax", "log_softmax"]


class SequenceClassifierReward(nn.Module):
    """`link(logits)[label]` of a sequence classifier that reads the prompt and the soft completion.

    Under soft stopping a token counts by its survival s_t, in attention (`log s_t` is added on it) and in the pooled
    state: `Σ_t (s_t − s_{t+1}) h_t`, see `sequences.last_token_weights`, or `Σ_t s_t h_t / Σ_t s_t`.

    Args:
        model: an `AutoModelForSequenceClassification`, or a PEFT model around one, whose token ids mean what the
            policy's mean. It is frozen and put into evaluation mode, in place.
        tokenizer: the policy's, for the prompts; not needed without them.
        name: what logs call it; default: the model's.
        label: which logit, by index or by its name in the model's `label2id`; not needed where there is only one.
        link: "identity" takes the logit; "sigmoid" its logistic function, the default where the model says that its
            labels are separate questions (`problem_type="multi_label_classification"`); "softmax" and "log_softmax"
            (in nats) the probability of the label among all.
        pooling: "last" (the default) or "mean", over prompt and completion, for models that pool the last token;
            those that pool the first one (BERT) keep their own way.
        include_prompt: put the `prompt` column (text or conversation) in front of the completion.
        append_eos: put the tokenizer's end of sequence behind completions that were cut off, as models need that were
            trained on whole texts. TRL's `RewardTrainer` ends texts with it (conversations it does not). Default:
            `append_eos` of the model's configuration, which `softrl reward fit` writes; else False.
    Raises:
        ValueError: a label, link or pooling that the model does not have, or no tokenizer for prompts or end.
        TypeError: a model that soft tokens cannot be fed to, see `SoftClassifier`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        label: int | str | None = None,
        link: Link | None = None,
        pooling: Pooling | None = None,
        include_prompt: bool = True,
        append_eos: bool | None = None,
    ) -> None:
        super().__init__()
        self.name = name or default_name(model)
        if include_prompt and tokenizer is None:
            raise ValueError(
                f"reward {self.name!r} reads the prompts and has no tokenizer for them; pass the policy's, or "
                "include_prompt=False"
            )
        self.classifier = SoftClassifier(model, self.name)
        self.vocab_size: int | None = self.classifier.vocab_size
        config = self.classifier.model.config
        self.link = link or default_link(config)
        self.index = label_index(self.name, config, label, self.link)
        self.pooling = checked_pooling(self.name, pooling, self.classifier.pools_last)
        self.tokenizer = tokenizer
        self.include_prompt = include_prompt
        self.append_eos = getattr(config, APPEND_EOS, False) if append_eos is None else append_eos
        ends = getattr(config, "eos_token_id", None)
        self._ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        if self.append_eos and getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(
                f"reward {self.name!r} puts an end of sequence behind completions and knows none; pass a tokenizer "
                "that has one, or append_eos=False"
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
        label: int | str | None = None,
        link: Link | None = None,
        pooling: Pooling | None = None,
        include_prompt: bool = True,
        append_eos: bool | None = None,
        **model_kwargs: Any,
    ) -> "SequenceClassifierReward":
        """Load a classifier by hub name or local folder; `model_kwargs` go to transformers (`dtype`, `revision`, ...).

        Raises:
            ValueError: it cannot be loaded, has no trained head, or was saved with a tokenizer that gives tokens
                other ids than the policy's does.
        """
        if tokenizer is not None and (other := _other_ids(str(name_or_path), tokenizer, model_kwargs.get("revision"))):
            raise ValueError(
                f"{str(name_or_path)!r} has another tokenizer than the policy: {len(other)} tokens have other ids, "
                f"{other[0]}. Take a model that was trained from the policy's base model, or align the vocabularies: "
                "softrl.rewards.aligned_reward_model.AlignedClassifierReward.from_pretrained(name, policy_tokenizer)"
            )
        model = load_classifier(name_or_path, **model_kwargs)
        return cls(
            model, tokenizer, name=name or Path(name_or_path).name, label=label, link=link, pooling=pooling,
            include_prompt=include_prompt, append_eos=append_eos,
        )  # fmt: skip

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of soft tokens, in float32 at least.

        Raises:
            ValueError: no `prompt` column, or texts that the model cannot read, see `SoftClassifier.forward`.
        """
        prompts = self._prompts(tokens.ids, columns)
        if self.append_eos and self.tokenizer is not None:
            tokens = with_end(tokens, self.tokenizer.eos_token_id, self._ends)
        logits = self.classifier(tokens, prompts, self.pooling)
        return linked(logits, self.index, self.link)

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of token ids, in float32 at least."""
        return self.soft(one_hot_tokens(ids, mask), **columns)

    def _prompts(self, ids: Int[Tensor, "N T K"], columns: Mapping[str, Any]) -> list[Int[Tensor, "_"]]:
        """Token ids of the prompts; empty if the reward does not read them."""
        if not self.include_prompt or self.tokenizer is None:
            return [ids.new_zeros(0)] * len(ids)
        if "prompt" not in columns:
            raise ValueError(
                f"reward {self.name!r} reads the prompts, and there is no column 'prompt' among {sorted(columns)}; "
                "pass prompt=[...], or make the reward with include_prompt=False"
            )
        return [ids.new_tensor(prompt_ids(prompt, self.tokenizer)) for prompt in columns["prompt"]]


def load_classifier(name_or_path: str | Path, **model_kwargs: Any) -> nn.Module:
    """A sequence classifier of transformers by hub name or local folder.

    Raises:
        ValueError: it cannot be loaded, or has no trained head.
    """
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, output_loading_info=True, **model_kwargs
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name_or_path)!r} cannot be loaded as a sequence classifier ({str(error).splitlines()[0]}); "
            "pass a hub name or a local folder of one"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"{str(name_or_path)!r} is no trained sequence classifier: its weights lack "
            f"{sorted(loading['missing_keys'])[:3]}; pass a model that was trained as one (with trl's "
            "RewardTrainer, for instance)"
        )
    return model


def has_other_ids(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model was saved with a tokenizer that gives tokens other ids than this one does."""
    return bool(_other_ids(name, tokenizer, None))


def _other_ids(name: str, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> list[str]:
    """Tokens of both vocabularies that have other ids, in words. Vocabularies of one size may still differ."""
    try:
        theirs = PreTrainedTokenizerFast.from_pretrained(name, revision=revision or "main").get_vocab()
    except (OSError, ValueError):  # no tokenizer.json there; a model that is not there is reported when it is loaded
        return []
    ours = tokenizer.get_vocab()
    shared = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    return [f"{token!r} is {theirs[token]} there and {ours[token]} here" for token in shared]


def default_name(model: Any) -> str:
    """What logs call a model: the last part of the hub name or folder that it came from, else its class."""
    return Path(getattr(model.config, "_name_or_path", "")).name or type(model).__name__


def default_link(config: Any) -> Link:
    """What makes a reward of the logits, as transformers' own pipeline does it; "identity" for a reward model."""
    return "sigmoid" if config.problem_type == "multi_label_classification" else "identity"


def linked(logits: Float[Tensor, "N C"], index: int, link: Link) -> Float[Tensor, "N"]:
    """`link(logits)[index]` of every text."""
    if link == "softmax":
        logits = logits.softmax(-1)
    elif link == "log_softmax":
        logits = logits.log_softmax(-1)
    elif link == "sigmoid":
        logits = logits.sigmoid()
    return logits[:, index]


def label_index(name: str, config: Any, label: int | str | None, link: str) -> int:
    """Which logit a label is.

    Raises:
        ValueError: the model has no such label, or the link is none.
    """
    if link not in get_args(Link):
        raise ValueError(f"link must be one of {get_args(Link)}, got {link!r}")
    if link.endswith("softmax") and config.num_labels == 1:
        raise ValueError(f"link={link!r} of reward {name!r}, which has one logit, is constant; use 'sigmoid'")
    if label is None and config.num_labels == 1:
        return 0
    index = config.label2id.get(label) if isinstance(label, str) else label
    if index is None or not 0 <= index < config.num_labels:
        raise ValueError(
            f"reward {name!r} has {config.num_labels} labels {config.id2label}; label must be one of their indices or "
            f"names, got {label!r}"
        )
    return index


def checked_pooling(name: str, pooling: Pooling | None, pools_last: bool) -> Pooling:
    """The pooling to use.

    Raises:
        ValueError: an unknown one, or one for a model that has its own.
    """
    if pooling is not None and pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {get_args(Pooling)}, got {pooling!r}")
    if pooling is not None and not pools_last:
        raise ValueError(f"pooling={pooling!r}: reward {name!r} pools the first token in its own way; leave it out")
    return pooling or "last"
