"""Recipes for hub models, which cannot be run without the hub: they parse, and tiny models of each kind take steps.

A tiny random model stands in for the recipe's; apart from sizes the settings are the recipe's. That every architecture
learns is shown in tests/trainers.
"""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trainers.tiny import word_tokenizer
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, Qwen2Config
from trl import get_peft_config

from softrl.cli import reward, sft
from softrl.cli.train import find_recipe, parse
from softrl.models.policy import Policy, check_policy
from softrl.rewards.token_linear import TokenLinearReward
from softrl.trainers import SoftRolloutTrainer

pytestmark = pytest.mark.slow  # imports trl

FOLDER = find_recipe("quickstart").parent
OTHERS = {FOLDER / "studies", FOLDER / "sweeps"}  # recipes of other commands
RECIPES = {
    str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.rglob("*.yaml")) if not OTHERS & set(path.parents)
}
V = 80
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **SPECIAL}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
LLAMA = LlamaConfig(**SIZES, **HEADS)
HUB_RECIPES = {
    "tinystories/soft_rollout.yaml": (
        "roneneldan/TinyStories-33M",
        GPTNeoConfig(
            vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
            window_size=8, max_position_embeddings=64, **SPECIAL,
        ),
    ),
    "qwen/soft_rollout.yaml": ("Qwen/Qwen2.5-0.5B-Instruct", Qwen2Config(**SIZES, **HEADS)),
    "smollm2/soft_rollout.yaml": ("HuggingFaceTB/SmolLM2-360M-Instruct", LLAMA),
    "smollm2/mixtures.yaml": ("HuggingFaceTB/SmolLM2-360M-Instruct", LLAMA),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_says_where_its_run_goes(name):
    arguments, training, _ = parse(["--config", str(RECIPES[name])])
    assert Path(training.output_dir).parent == Path("runs")
    assert arguments.num_train_prompts >= training.per_device_train_batch_size
    assert RECIPES[name].read_text().startswith("# ")


@pytest.mark.parametrize("name", [name for name in RECIPES if "\nsft:" in RECIPES[name].read_text()])
def test_a_recipe_with_a_supervised_start_goes_on_from_it(name):
    _, start, _ = sft.parsed(["--config", str(RECIPES[name])])
    _, training, model = parse(["--config", str(RECIPES[name])])
    assert model.model_name_or_path == start.output_dir != training.output_dir


@pytest.mark.parametrize("name", ["minilm/reviews", "rlhf/reviews"])
def test_reward_recipes_parse_and_policies_are_trained_on_what_they_make(name):
    _, training, _ = reward.parsed(["--config", name])
    arguments, _, _ = parse(["--config", name])
    assert arguments.reward_funcs == [training.output_dir]


def test_no_two_recipes_write_to_the_same_folder():
    folders = [parse(["--config", str(path)])[1].output_dir for path in RECIPES.values()]
    assert len(set(folders)) == len(folders)


REVIEWS = [name for name in RECIPES if name.startswith("reviews/")]
OF_THE_METHOD = {"output_dir", "logging_dir", "run_name", "logging_steps", "max_steps", "logging_nan_inf_filter"}


@pytest.mark.parametrize("name", REVIEWS)
def test_recipes_of_one_comparison_differ_in_the_method_only(name):
    """Everything that the trainers have in common is the same, and any of the recipes runs every method."""
    from dataclasses import fields

    from softrl.cli.arguments import TRAINERS, WITHOUT_REWARDS
    from softrl.trainers import RolloutConfig

    (base, first, model), (other, second, other_model) = (
        parse(["--config", str(RECIPES[each])]) for each in ("reviews/soft_rollout.yaml", name)
    )
    assert other_model == model
    assert {**vars(other), "trainer": None} == {**vars(base), "trainer": None}
    shared = {field.name for field in fields(RolloutConfig)} & set(vars(second)) - OF_THE_METHOD
    assert {"beta", "temperature", "num_generations", "learning_rate", "max_completion_length"} <= shared
    different = {key for key in shared if getattr(second, key) != getattr(first, key)}
    assert different <= {"min_p", "accelerator_config"}  # TRL's None for no minimum
    assert second.min_p in (0.0, None)
    for trainer in set(TRAINERS) - set(WITHOUT_REWARDS):
        assert parse(["--config", str(RECIPES[name]), "--trainer", trainer])[0].trainer == trainer


def test_the_comparison_holds_every_trainer_of_a_given_reward():
    from softrl.cli.arguments import TRAINERS, WITHOUT_REWARDS

    of_given_rewards = {trainer for trainer in TRAINERS if not trainer.endswith("_gan")} - set(WITHOUT_REWARDS)
    assert {parse(["--config", str(RECIPES[name])])[0].trainer for name in REVIEWS} == of_given_rewards


def tokenizer():
    return word_tokenizer(vocab_size=V)


def prompts(first, count):
    texts = [" ".join(f"w{3 + (5 * i + 7 * j) % 70}" for j in range(3)) for i in range(first, first + count)]
    return Dataset.from_dict({"prompt": texts})


@pytest.mark.parametrize("name", HUB_RECIPES)
def test_a_tiny_model_of_the_recipe_s_kind_takes_steps_under_its_settings(tmp_path, name):
    model_name, config = HUB_RECIPES[name]
    sizes = {"max_steps": 3, "max_completion_length": 6, "warmup_steps": 0, "output_dir": tmp_path}
    here = {"bf16": "false", "use_cpu": "true", "save_strategy": "no"}
    overrides = [text for key, value in (sizes | here).items() for text in (f"--{key}", str(value))]
    _, training, model_arguments = parse(["--config", str(RECIPES[name]), *overrides])
    assert model_arguments.model_name_or_path == model_name
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    check_policy(Policy(model))
    weight = torch.randn(V, generator=torch.Generator().manual_seed(3))
    trainer = SoftRolloutTrainer(
        model=model,
        reward_funcs=TokenLinearReward(weight, 0.0, link="identity"),
        args=training,
        train_dataset=prompts(0, 64),
        eval_dataset=prompts(64, 48),
        processing_class=tokenizer(),
        peft_config=get_peft_config(model_arguments),
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(0.0 < row["grad_norm"] < math.inf for row in rows)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["kl"] > 1e-9  # away from the reference
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    adapted = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert any("lora" in name for name in adapted) == model_arguments.use_peft
    assert moved == set(adapted)
    if model_arguments.use_peft:  # all-linear reaches attention and MLP of both layers
        assert {name.split(".lora")[0].split(".")[-1] for name in adapted} >= {"q_proj", "o_proj", "down_proj"}
