"""What QuietSTaRTrainer writes: runs go on exactly, the best one comes back, and a saved model thinks elsewhere."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from generation.thinkers import thinker
from helpers import gru, llama
from peft import LoraConfig, get_peft_model
from trainers.quietstar import quietstar
from trainers.test_checkpoints import Signal
from trainers.test_exports import exported
from trainers.tiny import numbers_of, parameters_of, word_tokenizer

from softrl.models.thinking import ThinkingConfig
from softrl.trainers.callbacks import InterruptCallback
from softrl.trainers.checkpoints import NotResumableError, damage

pytestmark = pytest.mark.slow  # imports trl

TESTS = Path(__file__).parent.parent
SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
KINDS = {
    "sampled": {"estimator": "rloo"},
    "soft": {"estimator": "soft"},
    "surrogate": {"reward_surrogate": True, "surrogate_spread": 100.0},
    "curriculum": {"n_thought": "linear:3->1", "thinking_learning_rate": 0.05},
    "mixture": {"estimator": "listwise", "proposal": "mixture"},
    "partition_learned": {"estimator": "partition_learned"},
    "trice": {"estimator": "trice"},
}


def with_adapters(**config):
    """A thinking model around a Llama with LoRA, in float32, always the same."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
    return thinker(lm=get_peft_model(llama().float(), lora), **{**vars(ThinkingConfig(2, sigmoid=True)), **config})


@pytest.mark.parametrize(
    ("kind", "lora"),
    [*((kind, False) for kind in KINDS), ("surrogate", True), ("mixture", True), ("partition_learned", True)],
)
def test_a_run_goes_on_exactly(tmp_path, kind, lora):
    """From a SIGTERM, in float32, as users train; whatever the thoughts that the second trainer is made with."""

    def run(name):
        model = None
        if lora:
            model = with_adapters(learns_log_z=kind == "partition_learned")
        return quietstar(tmp_path / name, model, float32=True, max_steps=4, **SAVING, **KINDS[kind])

    straight, half, resumed = run("straight"), run("stopped"), run("stopped")
    straight.train()
    half.add_callback(Signal(2, signal.SIGTERM))
    half.add_callback(InterruptCallback())
    half.train()
    assert half.state.global_step == 2
    assert damage(tmp_path / "stopped" / "checkpoint-2") is None
    with torch.no_grad():
        for each in filter(None, (resumed.model, resumed.prior)):
            each.start.add_(0.3)
    resumed.train(resume_from_checkpoint=True)
    assert numbers_of(resumed) == numbers_of(straight)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=0.0, atol=0.0)
    if kind == "surrogate":
        for name, value in straight.surrogate.surrogate.state_dict().items():
            assert torch.equal(value, resumed.surrogate.surrogate.state_dict()[name]), name


def test_a_surrogate_is_not_made_up_where_a_run_goes_on(tmp_path):
    quietstar(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match="its run had no reward_surrogate"):
        quietstar(tmp_path, reward_surrogate=True, max_steps=5, **SAVING).train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_is_named(tmp_path):
    quietstar(tmp_path, **SAVING).train()
    path = tmp_path / "checkpoint-3" / "thinking.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(NotResumableError, match=r"thinking\.safetensors has"):
        quietstar(tmp_path, max_steps=5, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_model_comes_back(tmp_path, lora):
    """The learning rate grows until the model is ruined, so that the best one is not the last."""
    trainer = quietstar(
        tmp_path, with_adapters() if lora else None, float32=True, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_nll", greater_is_better=False, max_steps=4,
        **{**SAVING, "learning_rate": 3.0 if lora else 0.3},
    )  # fmt: skip
    trainer.train()
    found = [row["eval_nll"] for row in trainer.state.log_history if "eval_nll" in row]
    assert min(found) < found[-1]
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.name == f"checkpoint-{1 + found.index(min(found))}"
    assert trainer.evaluate()["eval_nll"] == pytest.approx(min(found), abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "gru", "lora", "soft"])
def test_a_saved_model_thinks_the_same_in_another_process(tmp_path, kind):
    """The same evaluation, and the LM alone by transformers without softrl."""
    model, base = None, tmp_path / "base"
    if kind == "lora":
        llama().float().save_pretrained(base)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")
        model = thinker(lm=get_peft_model(type(llama()).from_pretrained(base), lora), n_thought=2)
    if kind == "gru":
        model = thinker(lm=gru().float(), n_thought=2)
    settings = {"estimator": "soft"} if kind == "soft" else {}
    trainer = quietstar(
        tmp_path / "run", model, float32=True, tokenizer=word_tokenizer(), num_eval_thoughts=2, **settings
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    expected = trainer.evaluate()
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(TESTS / "engines" / "thinks_again.py"),
        str(tmp_path / "model"),
        json.dumps(settings),
    ]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("nll", "base_nll", "marginal_nll", "mixing", "accuracy", "gain", "nll_hard"):
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-6)
    assert abs(expected["eval_gain"]) > 1e-3
    if kind == "gru":  # which is softrl's own
        return
    ids = torch.tensor([[3, 9, 4, 11, 6]])
    logits, _ = exported([tmp_path / "model"], tmp_path / "out")[0]
    torch.testing.assert_close(trainer.model.lm.eval().double()(ids).logits, logits, rtol=0.0, atol=1e-6)


def test_signals_need_the_callback_as_in_other_trainers(tmp_path):
    """`softrl train` adds it; a trainer that is made by hand has none."""
    trainer = quietstar(tmp_path)
    assert not any(isinstance(each, InterruptCallback) for each in trainer.callback_handler.callbacks)
    interrupt = InterruptCallback()
    trainer.add_callback(interrupt)
    trainer.add_callback(Signal(2, signal.SIGINT))
    trainer.train()
    assert interrupt.exit_code == 128 + signal.SIGINT
    assert math.isfinite(trainer.evaluate()["eval_nll"])
