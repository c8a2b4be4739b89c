"""The laboratory's problems on language models: tiny ones with an exact truth, and what a recipe would train.

A tiny model is random, a transformer with tied embeddings at a scale at which feedback matters, in float64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softrl.estimators.base import Problem
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.studies.hops import draw_adapters
from softrl.studies.language import LanguageProblem
from softrl.studies.study_rewards import (
    AdditiveReward,
    NearlyConstantReward,
    OracleLikelihood,
    PairReward,
    SharpReward,
)
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

STUDY_REWARDS: dict[str, Callable[..., Any]] = {
    "additive": AdditiveReward,
    "pair": PairReward,
    "sharp": SharpReward,
    "oracle_lstm": OracleLikelihood,
    "nearly_constant": lambda vocab_size, seed=0, **settings: NearlyConstantReward(
        PairReward(vocab_size, seed), **settings
    ),
}
_REWARD_TEXTS = {
    "additive": "a sum over tokens, linear in each",
    "pair": "products of neighbouring tokens",
    "sharp": "a threshold of a sum over tokens, steep as a step",
    "oracle_lstm": "the log-likelihood under a fixed random LSTM",
    "nearly_constant": "a large constant plus a thousandth of the pair reward",
}


def tiny_model(
    vocab_size: int, seed: int = 0, width: int = 8, layers: int = 1, scale: float = 0.4
) -> LlamaForCausalLM:
    """A random Llama with tied embeddings in float64; every matrix is normal with standard deviation `scale`."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale, generator=generator)
    return model


def tiny_lm(
    name: str,
    reward: str = "pair",
    vocab_size: int = 6,
    steps: int = 4,
    num_samples: int = 4,
    kl: float = 0.0,
    entropy: float = 0.0,
    stopping: bool = False,
    scale: float = 0.4,
    width: int = 8,
    layers: int = 1,
    truth_draws: int | None = None,
    seed: int = 0,
    reward_settings: dict[str, Any] | None = None,
) -> LanguageProblem:
    """A tiny language model with one prompt of three tokens.

    Args:
        name: for tables.
        reward: one of `STUDY_REWARDS`; `reward_settings` go to it.
        vocab_size, steps, num_samples: V, T, G.
        kl, entropy: weights of both terms; the reference is another random model.
        stopping: token 1 ends a sequence.
        scale, width, layers: of the model.
        truth_draws: RLOO draws that stand for the truth, where V^T is too much to enumerate.
        seed: of model, reward and draws.
    Raises:
        ValueError: an unknown reward.
    """
    if reward not in STUDY_REWARDS:
        raise ValueError(f"reward must be one of {sorted(STUDY_REWARDS)}, got {reward!r}")
    policy = Policy(tiny_model(vocab_size, seed, width, layers, scale))
    reference = Policy(tiny_model(vocab_size, seed + 1, width, layers, scale)) if kl > 0.0 else None
    made = STUDY_REWARDS[reward](vocab_size, seed=seed + 2, **(reward_settings or {}))
    terms = DirectTerms(kl, entropy, reference)
    problem = Problem(policy, made, terms, Truncation(vocab_size), num_samples)
    ids = torch.arange(2, 5)[None] % vocab_size
    of_what = "enumeration" if truth_draws is None else f"{truth_draws} RLOO draws"
    description = (
        f"Random one-prompt Llama, V={vocab_size}, T={steps}, G={num_samples}, {layers} layer(s) of width {width}; "
        f"reward: {_REWARD_TEXTS[reward]}; KL weight {kl}, entropy weight {entropy}; truth by {of_what}."
    )
    eos_ids = (1,) if stopping else ()
    return LanguageProblem(
        name, description, problem, Prompts(ids, torch.ones_like(ids, dtype=torch.bool)), steps, eos_ids, seed,
        truth_draws=truth_draws,
    )  # fmt: skip


def trained_lm(
    name: str,
    make_trainer: Callable[[list[str]], Any],
    recipe: str = "quickstart",
    overrides: dict[str, Any] | None = None,
    steps: int = 16,
    num_samples: int = 4,
    prompts: int = 2,
    kl: float = 0.0,
    truth_draws: int = 60,
    truth_samples: int = 16,
    seed: int = 0,
) -> LanguageProblem:
    """The policy, prompts and rewards of a training recipe, before training; gradients as sketches.

    Adapters are drawn away from their zero start, where half of their gradient vanishes.

    Args:
        name: for tables.
        make_trainer: makes a `RolloutTrainer` of command-line words, as `softrl train` would.
        recipe, overrides: a recipe of `softrl train`, and keys that replace its own.
        steps, num_samples, prompts: T, G, B.
        kl: weight of the KL to the reference, nats a token.
        truth_draws, truth_samples: RLOO draws that stand for the truth, and the samples a prompt in each.
        seed: of the draws.
    """
    words = [word for key, value in (overrides or {}).items() for word in (f"--{key}", str(value))]
    trainer = make_trainer(["--config", recipe, "--judge", "none", *words])
    draw_adapters(trainer.model)
    batch = trainer.prompt_batch([trainer.train_dataset[row] for row in range(prompts)], num_samples=1)
    policy: Policy = trainer.policy
    terms = DirectTerms(kl, 0.0, trainer.reference if kl > 0.0 else None)
    truncation = Truncation(64, trainer.truncation.top_p, trainer.truncation.min_p)
    problem = Problem(policy, trainer.rewards, terms, truncation, num_samples, dict(batch.columns))
    model = Path(policy.causal_lm.config._name_or_path).name
    changed = "".join(f", {key} {value}" for key, value in (overrides or {}).items())
    description = (
        f"{model}, recipe {recipe}{changed}: {prompts} prompts, T={steps}, G={num_samples}, sampling temperature "
        f"{policy.temperature}, reward {trainer.rewards.name}, KL weight {kl}. Truth: the mean of {truth_draws} RLOO "
        f"draws of {truth_samples} other samples a prompt. Gradients are kept as count sketches of 4,096 numbers, one "
        "for each group of parameters."
    )
    return LanguageProblem(
        name, description, problem, batch.prompts, steps, trainer.eos_ids, seed, batch=1, sketched=True,
        truth_draws=truth_draws, truth_samples=truth_samples,
    )  # fmt: skip
