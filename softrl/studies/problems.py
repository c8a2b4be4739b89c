"""The laboratory's problems on language models: tiny ones with an exact truth, and what a recipe would train.

A tiny model is random, a transformer with tied embeddings at a scale at which feedback matters, in float64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from softrl.estimators.base import Problem
from softrl.estimators.thought_exact import ThoughtTruth
from softrl.models.policy import Policy
from softrl.models.thinking import ThinkingConfig, ThinkingLM
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.anchors import every_kth
from softrl.studies.hops import draw_adapters
from softrl.studies.language import LanguageProblem
from softrl.studies.study_rewards import (
    AdditiveReward,
    NearlyConstantReward,
    OracleLikelihood,
    PairReward,
    SharpReward,
)
from softrl.studies.thought_problem import Part, Prior, ThoughtProblem
from softrl.tokens.noise import sequence_seed
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts, Texts

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
MAX_THOUGHTS = 4096  # all at once in one pass, with its graph
_OBJECTIVES = {
    "mean": "E r(h)", "log_mean": "E log (1/S) Σ exp r(h), the bound of S thoughts", "marginal": "log E exp r(h)",
}  # fmt: skip


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


def tiny_thinker(
    vocab_size: int, n_thought: int, temperature: float, seed: int, width: int, layers: int, scale: float,
    mixing_weight: float,
) -> ThinkingLM:  # fmt: skip
    """A random model that thinks, in float64; its mixing weights lie about `mixing_weight`, and not at their zero."""
    model = ThinkingLM(tiny_model(vocab_size, seed, width, layers, scale), ThinkingConfig(n_thought, temperature))
    generator = torch.Generator().manual_seed(sequence_seed(seed, vocab_size))
    with torch.no_grad():
        for embedding in (model.start, model.end, model.pause):
            embedding.normal_(0.0, scale, generator=generator)
        for parameter in model.mixing.parameters():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        model.mixing.last.weight.mul_(0.5)
        model.mixing.last.bias.fill_(mixing_weight)
    return model.double().eval()


def thinking_lm(
    name: str,
    vocab_size: int = 6,
    n_thought: int = 2,
    n_talk: int = 1,
    num_texts: int = 2,
    text_length: int = 5,
    think_every: int = 2,
    num_samples: int = 2,
    temperature: float = 1.0,
    prior: Prior = "model",
    objective: ThoughtTruth = "mean",
    part: Part = "thought",
    mixing_weight: float = 0.5,
    scale: float = 0.4,
    width: int = 8,
    layers: int = 1,
    seed: int = 0,
) -> ThoughtProblem:
    """A tiny model that thinks about random texts.

    Args:
        name: for tables.
        vocab_size, n_thought, n_talk, num_samples: V, n, n_talk, S.
        num_texts, text_length, think_every: N texts of so many tokens, and an interval of thoughts from the first one.
        temperature: of thoughts alone: low is a peaked policy, high a flat one, with the same rewards.
        prior: another random model, or the uniform distribution.
        objective, part: of the truth.
        mixing_weight: about which a thought's weights in the prediction lie.
        scale, width, layers: of the model.
        seed: of models, texts and draws.
    Raises:
        ValueError: a setting outside its range, or more thoughts (or sets of them) than can be enumerated.
    """
    choices = {"prior": (prior, Prior), "part": (part, Part), "objective": (objective, ThoughtTruth)}
    for setting, (value, known) in choices.items():
        if value not in get_args(known):
            raise ValueError(f"{setting} must be one of {list(get_args(known))}, got {value!r}")
    counts = {"n_thought": n_thought, "n_talk": n_talk, "num_texts": num_texts, "num_samples": num_samples}
    for setting, number in counts.items():
        if number < 1:
            raise ValueError(f"{setting} must be at least 1, got {number}")
    if text_length < 2:
        raise ValueError(
            f"text_length must leave a token to predict after a thought, so be at least 2, got {text_length}"
        )
    if vocab_size**n_thought > MAX_THOUGHTS:
        raise ValueError(
            f"V^n = {vocab_size}^{n_thought} thoughts are too many to enumerate in one pass; the limit is "
            f"{MAX_THOUGHTS:,}: lower vocab_size or n_thought"
        )
    makes = (width, layers, scale, mixing_weight)
    model = tiny_thinker(vocab_size, n_thought, temperature, seed, *makes)
    other = tiny_thinker(vocab_size, n_thought, temperature, seed + 1, *makes) if prior == "model" else None
    generator = torch.Generator().manual_seed(sequence_seed(seed, text_length, num_texts))
    orders = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(num_texts)])
    ids = orders.repeat(1, -(-text_length // vocab_size))[:, :text_length]  # equal tokens would be equal contexts
    texts = Texts(ids, torch.ones_like(ids, dtype=torch.bool))
    anchors = every_kth(texts, think_every)
    description = (
        f"Random Llama that thinks, V={vocab_size}, thoughts of {n_thought} token(s) at temperature {temperature:g}, "
        f"n_talk={n_talk}, S={num_samples} after each of {anchors[0].numel()} tokens of {num_texts} text(s); "
        f"{layers} layer(s) of width {width}. Truth: {_OBJECTIVES[objective]}, "
        f"{'its gradient through the policy of thoughts' if part == 'thought' else 'all of its gradient'}, by "
        f"enumeration of all {vocab_size**n_thought} thoughts. Prior: "
        f"{'another such model' if prior == 'model' else 'the uniform distribution'}."
    )
    return ThoughtProblem(name, description, model, other, texts, anchors, n_talk, num_samples, objective, part, seed)
