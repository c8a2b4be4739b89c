"""Parsing recipes and command lines: names, overrides, and errors that say what to do."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from helpers import ALL_REWARDS

from softrl.cli import train
from softrl.cli.train import (
    build_trainer,
    checkpoint_to_resume,
    find_recipe,
    load_judge,
    load_prompts,
    main,
    parse,
)

pytestmark = pytest.mark.slow  # imports trl


def test_quickstart_recipe_is_found_by_name_and_overridden(tmp_path):
    arguments, training, model = parse(
        ["--config", "quickstart", "--max_steps", "3", "--output_dir", str(tmp_path), "--reward_funcs", "a.b", "c.d"]
    )
    assert training.max_steps == 3
    assert training.relaxation == "st_gumbel"
    assert arguments.reward_funcs == ["a.b", "c.d"]
    assert model.model_name_or_path == "smollm2-135m"
    assert model.use_peft is True


def test_every_shipped_recipe_parses():
    folder = find_recipe("quickstart").parent
    others = {folder / "studies", folder / "sweeps"}  # of other commands
    recipes = [path for path in sorted(folder.rglob("*.yaml")) if not others & set(path.parents)]
    assert recipes
    for path in recipes:
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("recipe", "extra", "message"),
    [
        ("learnng_rate: 1.0e-3", [], "unknown recipe key 'learnng_rate': did you mean 'learning_rate'"),
        ("max_entropy: 0.5", [], "unknown recipe key 'max_entropy': did you mean 'max_entropy_nats'"),
        (
            "beta: 0.1",
            ["--relaxatoin", "softmax"],
            "unknown key 'relaxatoin' on the command line: did you mean 'relaxation'",
        ),
        ("- beta", [], "must contain a YAML mapping"),
        ("top_k: 0", [], "top_k must be at least 1"),
        ("max_entropy_nats: 9.0", [], r"max_entropy_nats must lie in \(0, log K\)"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, capsys, recipe, extra, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe + "\n")
    with pytest.raises(ValueError, match=message):
        parse(["--config", str(path), *extra])
    assert main(["--config", str(path), *extra]) == 2
    assert capsys.readouterr().err.startswith("softrl train: ")


def test_missing_things_are_named(tmp_path, capsys):
    assert main(["--config", "nothing"]) == 2
    assert "no recipe 'nothing'" in capsys.readouterr().err
    assert main(["--config"]) == 2
    assert "--config needs" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"judge: cannot import 'no_such_module\.judge'"):
        load_judge("no_such_module.judge")
    assert load_judge("none") is None


def test_resuming_needs_a_checkpoint(tmp_path):
    for wanted, message in (("latest", "holds no checkpoint"), (str(tmp_path / "x"), "is not a folder")):
        _, training, _ = parse(["--output_dir", str(tmp_path), "--resume_from_checkpoint", wanted])
        with pytest.raises(ValueError, match=message):
            checkpoint_to_resume(training)
    for step in (7, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        manifest = {"run": {}, "files": {"model": {"bytes": 7 - step, "sha256": ""}} if step > 7 else {}}
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps(manifest))
    _, training, _ = parse(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"])
    assert checkpoint_to_resume(training) == str(tmp_path / "checkpoint-7")  # the other one is damaged


def test_prompts_from_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"line {i}\n" for i in range(40)))
    arguments, _, _ = parse(["--dataset_name", str(path), "--num_eval_prompts", "10", "--num_train_prompts", "20"])
    train, test = load_prompts(arguments, None)
    assert (len(train), len(test)) == (20, 10)
    assert not set(train["prompt"]) & set(test["prompt"])


def test_data_sets_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "lone.txt").write_text("one prompt\n")
    for name, message in (
        (str(tmp_path / "empty.txt"), "is an empty file"),
        (str(tmp_path / "lone.txt"), "has 1 prompts; it needs two"),
        (str(tmp_path / "broken.json"), "cannot be read .*pass 'review-openings'"),
        (str(tmp_path / "nothing"), "cannot be read .*pass 'review-openings'"),
    ):
        arguments, _, _ = parse(["--dataset_name", name])
        with pytest.raises(ValueError, match=message):
            load_prompts(arguments, None)


def test_prefix_goes_before_every_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"line {i}\n" for i in range(8)))
    arguments, _, _ = parse(["--dataset_name", str(path), "--prompt_prefix", "Well: "])
    train, test = load_prompts(arguments, None)
    assert sorted([*train["prompt"], *test["prompt"]]) == [f"Well: line {i}" for i in range(8)]


def test_conversations_are_prompts_but_take_no_prefix(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "hello"}]}\n' * 8)
    arguments, _, _ = parse(["--dataset_name", str(path)])
    train, _ = load_prompts(arguments, None)
    assert train[0]["prompt"] == [{"role": "user", "content": "hello"}]
    arguments, _, _ = parse(["--dataset_name", str(path), "--prompt_prefix", "Well: "])
    with pytest.raises(ValueError, match=r"prompt_prefix='Well: ' goes before text, but the prompts of .* are conv"):
        load_prompts(arguments, None)


def test_what_the_model_arguments_say_reaches_the_trainer(tmp_path, monkeypatch):
    from trainers.tiny import word_tokenizer

    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "prompts.txt").write_text("w4\nw5\nw6\nw7\n")
    given = {}
    monkeypatch.setattr("softrl.trainers.SoftRolloutTrainer", lambda **arguments: given.update(arguments))
    recipe = [
        "--model_name_or_path",
        str(tmp_path),
        "--dataset_name",
        str(tmp_path / "prompts.txt"),
        "--judge",
        "none",
    ]
    build_trainer(*parse([*recipe, "--dtype", "bfloat16"]))
    assert given["quantization_config"] is None
    assert given["peft_config"] is None
    assert given["args"].model_init_kwargs == {"dtype": "bfloat16", "revision": "main"}
    assert given["processing_class"].padding_side == "left"
    build_trainer(*parse([*recipe, "--load_in_4bit", "true", "--use_peft", "true", "--lora_r", "3"]))
    assert given["quantization_config"].load_in_4bit is True
    assert given["peft_config"].r == 3


MODULE = """
def words(completions, **kwargs):
    return [sum(word in ("w5", "w9", "w14") for word in text.split()) / 5 for text in completions]
"""


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """Arguments that any trainer takes steps with: a tiny model, prompts in a file, a function of texts."""
    from helpers import llama
    from trainers.tiny import word_tokenizer

    llama().float().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"w{3 + i % 7} w{4 + i % 5}\n" for i in range(40)))
    (tmp_path / "users_functions.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.delitem(__import__("sys").modules, "users_functions", raising=False)
    settings = {
        "model_name_or_path": "model", "dtype": "float32", "dataset_name": "prompts.txt", "judge": "none",
        "reward_funcs": "users_functions.words", "num_eval_prompts": 8, "num_generations": 2, "max_steps": 2,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 5, "beta": 0.1,
        "output_dir": "run", "report_to": "none", "logging_steps": 1, "use_cpu": "true", "disable_tqdm": "true",
        "save_strategy": "no", "top_k": 3, "learning_rate": 0.01,
    }  # fmt: skip
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


@pytest.mark.parametrize("trainer", ["reinforce", "ppo", "trl_rloo", "trl_grpo"])
def test_every_trainer_runs_from_the_same_arguments(tiny_run, capsys, monkeypatch, trainer):
    built, original = [], build_trainer
    monkeypatch.setattr("softrl.cli.train.build_trainer", lambda *args: built.append(original(*args)) or built[-1])
    assert main([*tiny_run, "--trainer", trainer, "--gradient_statistics", "true"]) == 0
    said = capsys.readouterr().out
    assert (f"trainer={trainer!r} has no use for top_k" in said) == (trainer != "reinforce")
    (run,) = built
    rows = [row for row in run.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert all("grad/snr" in row for row in rows)
    assert "rewards/words/mean" in rows[0]
    assert run.args.max_completion_length == 5
    assert getattr(run, "beta", 0.1) == 0.1
    if trainer.startswith("trl_"):
        assert run.args.top_k == 0, "K of soft tokens must not truncate TRL's sampler"
        assert type(run).__module__.startswith("trl.")


def test_a_pathwise_trainer_refuses_a_function_of_texts(tiny_run, capsys):
    assert main(tiny_run) == 2
    assert "'words' is a function of completions: its value cannot be differentiated" in capsys.readouterr().err


def test_the_trainer_is_chosen_by_the_recipe_or_the_command_line(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("trainer: ppo\nlam: 0.5\nrelaxation: st_gumbel\n")
    arguments, training, _ = parse(["--config", str(path)])
    assert (arguments.trainer, type(training).__name__, training.lam) == ("ppo", "PPOConfig", 0.5)
    assert capsys.readouterr().out == "softrl train: trainer='ppo' has no use for relaxation\n"
    arguments, training, _ = parse(["--config", str(path), "--trainer=soft_rollout", "--hops", "1"])
    assert (arguments.trainer, training.relaxation, training.hops) == ("soft_rollout", "st_gumbel", 1)
    assert capsys.readouterr().out == "softrl train: trainer='soft_rollout' has no use for lam\n"
    for extra, message in (
        (["--trainer", "rloo"], r"trainer must be one of \('soft_rollout', .*got 'rloo'"),
        (["--lamm", "1"], "unknown key 'lamm' on the command line: did you mean 'lam'"),
        (["--trainer", "trl_grpo", "--hop", "1"], "unknown key 'hop' on the command line: did you mean 'hops'"),
        (["--trainer", "reinforce", "--num_generations", "1"], "num_generations must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(["--config", str(path), *extra])


def test_trl_has_the_defaults_of_the_others():
    """A key that is not given means the same everywhere, but for those that a sampler or a group needs otherwise."""
    from dataclasses import fields

    from softrl.trainers import ReinforceConfig
    from softrl.trainers.trl_config import TrlGRPOConfig, TrlRLOOConfig

    ours = {field.name: field.default for field in fields(ReinforceConfig)}
    for config in (TrlRLOOConfig, TrlGRPOConfig):
        different = {
            field.name for field in fields(config) if field.name in ours and field.default != ours[field.name]
        }
        assert different <= {"top_k", "min_p", "num_generations"}
    assert TrlRLOOConfig("x", min_p=0.0, report_to=[], use_cpu=True).min_p is None
    assert TrlRLOOConfig("x", report_to=[], use_cpu=True).bf16 is False


def test_how_much_of_the_vocabulary_a_reward_with_another_tokenizer_knows_is_printed(tmp_path, capsys, monkeypatch):
    """A trainer that does nothing but hold rewards."""
    rewards = [ALL_REWARDS[name]() for name in ("pair", "similarity", "aligned classifier")]
    accelerator = SimpleNamespace(print=print, end_training=lambda: None)
    trainer = MagicMock(rewards=SimpleNamespace(rewards=rewards), accelerator=accelerator)
    trainer.is_world_process_zero.return_value = False
    monkeypatch.setattr(train, "build_trainer", lambda *arguments: trainer)
    assert main(["--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for reward in rewards[1:]:
        assert f"Reward {reward.name!r} has another tokenizer: {reward.coverage}." in printed
    assert "'pair'" not in printed
