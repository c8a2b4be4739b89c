"""Characters of Shakespeare, on made-up works; the real ones are checked once (slow)."""

import inspect

import pytest
from transformers import AutoTokenizer

from softrl.data.characters import HELD_OUT, character_blocks, character_tokenizer, shakespeare, tidied

TEXT = 'HAMLET.\n  To be, or not to be:\n\n\tthat is the question -- \'tis é, \u2014 &c.; "aye"  \n'
WORKS = {
    "hamlet": "To be  \nor not",
    "twelfth_night": "If music\n\n\n\n\n\nbe\n",
    "winters_tale": "A sad tale",
    "a": "b",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in WORKS.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "card.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("saved", [False, True])
def test_texts_survive_the_tokenizer_saved_and_loaded_too(tmp_path, saved):
    tokenizer = character_tokenizer(TEXT)
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, TEXT[::-1], " ", "\n\n\n", "  a  ", "a ,b 's n't"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 3 + len(set(TEXT))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("\n!").input_ids == [4, 2]  # behind the tabulator, and unknown
    padded = tokenizer(["To", "T"], padding=True)
    assert padded.input_ids[1][1:] == [0]
    assert padded.attention_mask[1] == [1, 0]


def test_ids_depend_on_the_set_of_characters_alone():
    assert character_tokenizer(TEXT).get_vocab() == character_tokenizer(TEXT[::-1] * 2).get_vocab()


def test_works_are_for_training_or_held_out_and_whole(folder):
    assert shakespeare("train", folder) == "b\n\n\nTo be\nor not\n"
    assert shakespeare("test", folder) == "If music\n\n\nbe\n\n\nA sad tale\n"


def test_tidied_leaves_everything_else():
    assert tidied("\n  a b \t\n\n\n\n\n b\r\nc\n") == "  a b\n\n\n b\nc"
    assert tidied(tidied(TEXT)) == tidied(TEXT)


def test_blocks_are_consecutive_and_the_rest_is_dropped():
    text = TEXT * 5
    tokenizer = character_tokenizer(text)
    blocks = character_blocks(text, tokenizer, 16)
    assert blocks.column_names == ["input_ids", "text"]
    assert "".join(blocks["text"]) == text[: len(text) // 16 * 16]
    assert [tokenizer.decode(ids) for ids in blocks["input_ids"]] == blocks["text"]
    assert {len(ids) for ids in blocks["input_ids"]} == {16}
    assert blocks.to_dict() == character_blocks(text, character_tokenizer(text), 16).to_dict()
    assert len(character_blocks(text, tokenizer)["text"][0]) == 128
    assert len(character_blocks(text, tokenizer, len(text))) == 1


@pytest.mark.parametrize(
    ("text", "length", "expected"),
    [
        (TEXT, 1, "block_length_tokens must be a whole number, 2 or more, got 1; the default is 128"),
        (TEXT, 8.0, "block_length_tokens must be a whole number, 2 or more, got 8.0"),
        (TEXT, True, "block_length_tokens must be a whole number, 2 or more, got True"),
        ("To be", 6, "text must have block_length_tokens=6 characters or more, got 5; pass a longer text"),
        ("", 6, "text must have block_length_tokens=6 characters or more, got 0"),
        ("To Zoe!", 6, r"lacks \['!', 'Z'\]; make it with character_tokenizer"),
    ],
)
def test_hostile_blocks(text, length, expected):
    with pytest.raises(ValueError, match=expected):
        inspect.unwrap(character_blocks)(text, character_tokenizer(TEXT), length)


def test_a_text_with_the_name_of_a_special_token():
    text = "to be <eos> or"
    with pytest.raises(ValueError, match=r"tokenizer must make one token of every character.*special tokens"):
        character_blocks(text, character_tokenizer(text), len(text))


def test_other_hostile_input(folder, tmp_path):
    with pytest.raises(ValueError, match=r"text must have one character or more.*got ''; pass the corpus"):
        character_tokenizer("")
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'test'\), got 'dev'; choose one"):
        inspect.unwrap(shakespeare)("dev", folder)
    for path in folder.glob("[htw]*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"folder='.*' must hold works as .txt files, for split='test' any of"):
        shakespeare("test", folder)


@pytest.mark.slow
def test_the_real_works():
    train, test = shakespeare("train"), shakespeare("test")
    assert (len(train), len(test)) == (4_528_312, 524_849)
    assert test.count("by William Shakespeare") == len(HELD_OUT)
    for text in (train, test):
        assert text.isascii()
        assert "gutenberg" not in text.lower()
        assert "copyright" not in text.lower()
    assert set(test) <= set(train)
    tokenizer = character_tokenizer(train)
    assert len(tokenizer) == 87
    assert tokenizer.decode(tokenizer(test).input_ids) == test
    assert not set(character_blocks(train, tokenizer)["text"]) & set(character_blocks(test, tokenizer)["text"])
