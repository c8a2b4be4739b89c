"""Corpora: what is read is what is decoded, blocks are consecutive, and tokenizers are made once."""

import inspect

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softrl.data import corpus
from softrl.data.characters import character_tokenizer
from softrl.data.corpus import corpus_blocks, corpus_ids, corpus_prompts, corpus_tokenizer, tokenizer_size
from softrl.data.vocabulary import byte_pair_tokenizer

TEXT = 'HAMLET.\n  To be, or not to be:\n\n\tthat is the question -- \'tis é, \u2014 &c.; "aye"  \n' * 20


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["characters", 259, 300, "300"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_text_is_decoded_to_exactly_what_it_was(tmp_path, kind, saved):
    tokenizer = corpus_tokenizer(kind, TEXT)
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(corpus_ids(TEXT, tokenizer)) == TEXT
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == (3 + len(set(TEXT)) if kind == "characters" else int(kind))


def test_byte_pairs_decode_what_they_have_never_seen():
    tokenizer = byte_pair_tokenizer(TEXT, 300)
    for text in ("Zürich 東京 \U0001f600", "\r\n\t  x", "\x00"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_byte_pairs_are_the_most_frequent_ones():
    """In 'abab...' the first pair is a b, the second one that pair with itself."""
    vocabulary = byte_pair_tokenizer("ab" * 50, 261).get_vocab()
    assert {token for token, number in vocabulary.items() if number >= 259} == {"ab", "abab"}


@pytest.mark.parametrize("kind", ["characters", 300])
def test_blocks_are_consecutive_and_the_rest_is_dropped(kind):
    tokenizer = corpus_tokenizer(kind, TEXT)
    ids = tokenizer(TEXT).input_ids
    blocks = corpus_blocks(TEXT, tokenizer, 16)
    assert blocks.column_names == ["input_ids"]
    assert [list(row) for row in blocks["input_ids"]] == [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    assert len(corpus_blocks(TEXT, tokenizer, len(ids))) == 1


def test_a_tokenizer_and_its_tokens_are_made_once(monkeypatch, cache):
    first = corpus_blocks(TEXT, corpus_tokenizer(300, TEXT), 16)
    names = sorted(path.name for path in cache.iterdir() if path.is_dir())
    assert [name.split("-")[1] for name in names] == ["pairs", "tokens"]
    for name in ("_train", "_encode"):
        monkeypatch.setattr(corpus, name, None)  # calling it is an error
    assert corpus_blocks(TEXT, corpus_tokenizer(300, TEXT), 16).to_dict() == first.to_dict()


def test_another_text_size_or_tokenizer_is_made_anew():
    other = TEXT.replace("Ham", "Jam") + "more"
    assert corpus_tokenizer(301, TEXT).get_vocab() != corpus_tokenizer(300, TEXT).get_vocab()
    small, large = corpus_tokenizer(262, TEXT), corpus_tokenizer(300, TEXT)
    for text in (TEXT, other):
        for tokenizer in (small, large):
            assert corpus_ids(text, tokenizer).tolist() == tokenizer(text).input_ids


def test_another_listed_tokenizer_is_no_tokenizer_of_characters():
    """All of a byte-level vocabulary's tokens may be single characters too, but they stand for bytes."""
    tokenizer = byte_pair_tokenizer("ab", 259)
    assert tokenizer.decode(corpus_ids("é b", tokenizer)) == "é b"
    words = Tokenizer(models.WordLevel({"ab": 0, "<unk>": 1}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert np.array_equal(corpus_ids("ab", words), [0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("words", "must be 'characters' or the size of a vocabulary of byte pairs, 259 or more, got 'words'"),
        (258, "259 or more, got 258; 1024 suits a small corpus"),
        ("-300", "got '-300'"),
        (300.5, "got 300.5"),
    ],
)
def test_hostile_kinds(kind, expected):
    with pytest.raises(ValueError, match=expected):
        inspect.unwrap(tokenizer_size)(kind)


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        (TEXT, 1, "block_length_tokens must be a whole number, 2 or more, got 1; the default is 128"),
        ("To be", 6, "text must have block_length_tokens=6 tokens or more, got 5; pass a longer text"),
        ("To Zoe!", 6, r"lacks \['!', 'Z'\]; make it with character_tokenizer"),
    ],
)
def test_hostile_blocks(text, length, expected):
    with pytest.raises(ValueError, match=expected):
        corpus_blocks(text, character_tokenizer(TEXT), length)


def test_other_hostile_input():
    with pytest.raises(ValueError, match=r"text must have one character or more.*got ''; pass the corpus"):
        corpus_tokenizer(300, "")
    with pytest.raises(ValueError, match="size of a byte-pair vocabulary must be a whole number, 259 or more"):
        byte_pair_tokenizer(TEXT, 100)


def test_passages_to_go_on_from_are_spread_over_the_corpus():
    tokenizer = character_tokenizer(TEXT)
    rows = corpus_prompts(TEXT, tokenizer, 50, 4)
    starts = [50 * (index * (len(TEXT) // 50) // 4) for index in range(4)]
    assert list(rows["prompt"]) == [TEXT[start : start + 50] for start in starts]
    assert len(corpus_prompts(TEXT, tokenizer, 50, 10_000)) == len(TEXT) // 50
