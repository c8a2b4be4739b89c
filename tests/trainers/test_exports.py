"""What a trainer saves gives the same logits in plain transformers and PEFT, in a process without softrl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import gpt2, llama
from peft import LoraConfig
from safetensors.torch import load_file
from trainers.tiny import make
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow  # imports trl, starts a process

SCRIPT = Path(__file__).parent.parent / "engines" / "exported.py"
IDS = [[3, 9, 4, 11, 6]]
METHODS = {"SoftRollout": {}, "Reinforce": {"num_generations": 2}, "PPO": {"num_generations": 2}}


def exported(folders, output):
    """Logits and texts of saved models, by a process of its own."""
    names = [str(folder) for folder in folders]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(names), json.dumps(IDS), str(output)],
        check=True,
        env=environment,
        timeout=300,
    )
    tensors = load_file(output)
    return [(tensors[f"{name}:logits"], tensors[f"{name}:text"]) for name in names]


def test_saved_models_give_the_same_logits_elsewhere(tmp_path, tokenizer):
    """All parameters and LoRA, tied and untied; the final model, and a checkpoint."""
    folders, expected = [], []
    for build in (llama, gpt2):
        base = tmp_path / build.__name__
        build().float().save_pretrained(base)
        for lora in (None, LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian")):
            for method, settings in METHODS.items():
                folder = tmp_path / f"{build.__name__}-{method}-{lora is not None}"
                trainer = make(
                    folder, tokenizer, AutoModelForCausalLM.from_pretrained(base), method=method, peft_config=lora,
                    save_strategy="steps", save_steps=3, **settings,
                )  # fmt: skip
                trainer.train()
                trainer.save_model(str(folder))
                folders += [folder, folder / "checkpoint-3"]
                model = trainer.model.eval().double()
                with torch.no_grad():
                    logits = model(torch.tensor(IDS)).logits
                    text = model.generate(input_ids=torch.tensor(IDS), max_new_tokens=4, do_sample=False)
                expected += [(logits, text)] * 2
    for (logits, text), (found_logits, found_text) in zip(expected, exported(folders, tmp_path / "out"), strict=True):
        torch.testing.assert_close(found_logits, logits, rtol=0.0, atol=1e-6)
        assert torch.equal(found_text, text)
    assert (expected[0][0] - expected[2][0]).abs().max() > 1e-3  # two runs differ
