"""Model cards: their code runs, names are names and not paths; and what is pushed to the hub."""

import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import llama
from huggingface_hub import ModelCard
from peft import LoraConfig
from trainers.tiny import CHAT_TEMPLATE, make, word_tokenizer
from transformers import LlamaForCausalLM

from softrl.trainers.model_card import CardFacts, quick_start

pytestmark = pytest.mark.slow  # imports trl

LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture
def base(tmp_path, tokenizer):
    """A model that was loaded from a local folder."""
    llama().float().save_pretrained(tmp_path / "tiny-base")
    tokenizer.save_pretrained(tmp_path / "tiny-base")
    return LlamaForCausalLM.from_pretrained(tmp_path / "tiny-base")


def code_of(card):
    return re.search(r"## Quick start\n\n```python\n(.*?)\n```", card.text, re.DOTALL).group(1)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_cards_code_loads_what_was_trained(tmp_path, base, monkeypatch, capsys, adapter, chat):
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    prompt = [{"role": "user", "content": "w4 w5"}] if chat else "w4 w5"
    data = Dataset.from_dict({"prompt": [prompt] * 4})
    trainer = make(
        tmp_path / "my-run", tokenizer, base, train=data, peft_config=LORA if adapter else None, temperature=0.7,
        top_p=0.9, max_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of(ModelCard.load(tmp_path / "my-run" / "README.md")), names)
    assert capsys.readouterr().out.strip()
    loaded = names["model"] if adapter else names["generator"].model
    tokens = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        difference = loaded(tokens).logits - trainer.model(tokens).logits
    assert difference.abs().max() < 1e-6
    for folder in ("my-run", "my-run/checkpoint-1"):
        card = (tmp_path / folder / "README.md").read_text()
        assert str(tmp_path) not in card
        for text in ("temperature=0.7", "top_p=0.9", "sampling temperature 0.7, top-p 0.9", "`tiny-base`", "my-run"):
            assert text in card
        for text in ("@software{softrl", "@software{vonwerra2020trl", "trained with softrl", "- softrl: ", "- TRL: "):
            assert card.count(text) == 1, text
        data = ModelCard(card).data
        assert data.library_name == ("peft" if adapter else "transformers")
        assert {"softrl", "soft-rollout", "trl"} <= set(data.tags)
        assert data.base_model is None
        assert ("a PEFT adapter for `tiny-base`" in card) == adapter


def test_adapters_of_hub_models_and_of_short_names(tmp_path):
    args = SimpleNamespace(temperature=1.0, top_p=1.0, min_p=0.05, max_completion_length=8, basis_aware=None)
    code = quick_start(CardFacts("run", "me/run", "org/base", True, False, args))
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/run")  # loads org/base with it' in code
    assert "temperature=1.0, top_k=0, min_p=0.05)" in code
    (tmp_path / "smollm2-135m").mkdir()
    code = quick_start(CardFacts("run", None, str(tmp_path / "smollm2-135m"), True, False, args))
    assert 'base = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"))' in code
    assert 'PeftModel.from_pretrained(base, "run")' in code


def test_a_hub_model_is_linked_and_a_nameless_one_is_not(tmp_path, tokenizer):
    model = llama()
    trainer = make(tmp_path / "run", tokenizer, model)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "None" not in card
    model.config._name_or_path = "org/base"
    trainer.create_model_card(model_name="mine", dataset_name="org/data", tags="a-tag")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.base_model == "org/base"
    assert "a-tag" in card.data.tags
    assert "# Model Card for mine" in card.text
    assert "[org/base](https://huggingface.co/org/base) on the [org/data](" in card.text


class Hub:
    """Records what would be uploaded."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, name, **settings):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id, folder_path, **settings):
        from pathlib import Path

        files = {path.name for path in Path(folder_path).iterdir()}
        self.uploads.append((repo_id, files, (Path(folder_path) / "README.md").read_text()))


@pytest.mark.parametrize("by_argument", [False, True])
def test_pushing_uploads_model_tokenizer_and_card(tmp_path, base, tokenizer, monkeypatch, by_argument):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    pushing = {"push_to_hub": True, "hub_strategy": "end"} if by_argument else {}
    trainer = make(tmp_path / "my-run", tokenizer, base, peft_config=LORA, **pushing)
    trainer.save_model() if by_argument else trainer.push_to_hub()
    ((repository, files, card),) = hub.uploads
    assert repository == "me/my-run"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files
    assert 'PeftModel.from_pretrained(base, "me/my-run")' in card
    assert str(tmp_path) not in card
