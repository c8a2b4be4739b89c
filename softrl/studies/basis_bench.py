"""What the parts of `softrl study basis-aware` share: settings, the real model, its rules, and human text."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrl.assets import resolve_model
from softrl.contexts.basis_aware import BasisAware, basis_aware
from softrl.data.reviews import load_reviews
from softrl.models.policy import Policy
from softrl.studies.basis_rules import Comparison, Contexts, compare_rules
from softrl.types import Prompts

PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        model: name or folder.
        epsilon, rule, num_directions, representation: see `basis_aware`.
        texts: that are read as human text, and generated for the costs.
        tokens: T of each, and of the samples.
        samples: texts that every rule generates for quality and diversity.
        cost_directions: k of the costs beside `num_directions`.
        programs: how many of the programs that drawing asked for HiGHS gets too.
        time_limit_seconds: of HiGHS, a program.
        seeds: of the tiny models.
        vocab_sizes, scaled_directions: V and k of the scaling; k = `num_directions` where V varies, the largest V up
            to the model's own where k does.
        scaled_programs, highs_programs: programs of each V and k, for our solver and for HiGHS.
    """

    model: str = "smollm2-135m"
    epsilon: float = 0.003
    rule: str = "eta"
    num_directions: int = 20
    representation: str = "before_norm"
    texts: int = 16
    tokens: int = 48
    samples: int = 192
    cost_directions: tuple[int, ...] = (5, 20, 80)
    programs: int = 100
    time_limit_seconds: float = 60.0
    seeds: int = 3
    vocab_sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 49152, 131072)
    scaled_directions: tuple[int, ...] = (5, 10, 20, 40, 80)
    scaled_programs: int = 15
    highs_programs: int = 3

    def __post_init__(self) -> None:
        for name, least in (("texts", 1), ("tokens", 1), ("samples", 2), ("seeds", 1), ("scaled_programs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class Bench:
    """The real model, loaded once for all parts that are run.

    Args:
        settings: the study's.
    """

    def __init__(self, settings: Settings):
        self.settings = settings

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return AutoTokenizer.from_pretrained(resolve_model(self.settings.model))

    @cached_property
    def policy(self) -> Policy:
        """In float32."""
        path = resolve_model(self.settings.model)
        return Policy(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())

    @cached_property
    def rule(self) -> BasisAware:
        """Which asks about all tokens, so that draws and estimates are of one truncation."""
        own = self.settings
        return basis_aware(self.policy, own.epsilon, own.rule, own.num_directions, own.representation, None)

    def beginnings(self, number: int, length: int) -> Int[Tensor, "B S"]:
        """Beginnings of reviews, all of one length.

        Raises:
            ValueError: there are not so many.
        """
        rows: list[list[int]] = []
        for row in load_reviews("prompts"):
            ids = self.tokenizer(row["text"]).input_ids
            if len(ids) >= length:
                rows.append(ids[:length])
            if len(rows) == number:
                return torch.tensor(rows)
        raise ValueError(f"there are only {len(rows)} reviews of {length} tokens; ask for fewer texts or tokens")

    @cached_property
    def human(self) -> Int[Tensor, "B S"]:
        """Human text: a beginning, and what follows it."""
        return self.beginnings(self.settings.texts, PROMPT_TOKENS + self.settings.tokens)

    @cached_property
    def states(self) -> Float[Tensor, "M D"]:
        """The model's last hidden states before every token that follows a beginning."""
        given, true = self.human[:, :PROMPT_TOKENS], self.human[:, PROMPT_TOKENS:]
        with torch.no_grad():
            return self.policy.hidden(whole_prompts(given), self.policy.embed(true)).flatten(0, 1)

    @cached_property
    def contexts(self) -> Contexts:
        """Human text with the model's logits."""
        with torch.no_grad():
            logits = torch.cat([self.policy.head(piece) for piece in self.states.split(64)])
        return Contexts(self.human, PROMPT_TOKENS, logits)

    @cached_property
    def comparison(self) -> Comparison:
        """Rules at equal entropy, on these contexts."""
        return compare_rules(self.contexts, replace(self.rule, counts=type(self.rule.counts)()))


def whole_prompts(ids: Int[Tensor, "B P"]) -> Prompts:
    """Prompts of one length."""
    return Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
