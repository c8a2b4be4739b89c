"""Questions with one right answer: right, apart between the splits, the same for a seed; and hostile completions."""

import inspect
import re

import pytest

from softrl.data.exact_answers import KINDS, WORDS, exact_answers, extract_answer
from softrl.data.prompts import split_of


def solved(line):
    """The question of a line and its answer, by a rule of our own."""
    question, answer = re.fullmatch(r"(.* (?:=|->))(?: (.*))?", line).groups()
    if question.endswith("="):
        left, sign, right, _ = question.split()
        return question, answer, str(int(left) + int(right) * {"+": 1, "-": -1}[sign])
    task, words = question.removesuffix(" ->").split(": ")
    return question, answer, {"copy": words, "reverse": " ".join(words.split()[::-1])}[task]


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_and_examples_are_right(split):
    rows = exact_answers(200, KINDS, split=split, num_examples=2)
    assert len(set(rows["prompt"])) == 200
    assert [row["kind"] for row in rows][:5] == [*KINDS, KINDS[0]]
    questions = set()
    for row in rows:
        *examples, asked = row["prompt"].split("\n")
        question, nothing, answer = solved(asked)
        assert nothing is None
        assert row["answer"] == answer
        assert row["completion"] == f" {answer}"
        assert split_of(question) == split
        assert extract_answer(row["completion"] + "\n9 more words", row["kind"]) == answer
        questions.add(question)
        assert len(examples) == 2
        shown = [solved(example) for example in examples]
        assert all(given == right for _, given, right in shown)
        assert all(split_of(example) == "train" for example, _, _ in shown)
        assert question not in {example for example, _, _ in shown}
    assert len(questions) == 200


def test_sizes():
    rows = exact_answers(40, KINDS, num_digits=3, num_copied=5, num_reversed=4)
    for row in rows:
        numbers = [int(number) for number in re.findall(r"\d+", row["prompt"].split("\n")[-1])]
        words = row["answer"].split()
        if row["kind"] in ("addition", "subtraction"):
            assert all(100 <= number <= 999 for number in numbers)
            assert int(row["answer"]) >= 0
        else:
            assert len(set(words)) == {"copying": 5, "reversal": 4}[row["kind"]]
            assert set(words) <= set(WORDS)
    assert any(int(row["answer"]) < 10 for row in exact_answers(20, ["addition"], num_digits=1))


def test_a_seed_says_everything_and_fewer_rows_are_the_first():
    rows = exact_answers(60, seed=3)
    assert list(rows) == list(exact_answers(60, seed=3))
    assert list(exact_answers(20, seed=3)) == list(rows)[:20]
    assert not set(exact_answers(60, seed=4)["prompt"]) & set(rows["prompt"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 71", "71"),
        ("71\n12 + 3 = 15", "71"),
        ("\n\n 71", "71"),
        ("the answer is 71.", "71"),
        ("71 apples and 12 pears", "71"),
        ("0071", "71"),
        ("000", "0"),
        ("-0", "0"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("1,234", "1234"),
        ("12, 13", "12"),
        ("12-13", "12"),
        ("7x", "7"),
        ("71.5", None),
        (".5", None),
        ("1.000", None),
        ("1,2345", None),
        ("12,34", None),
        ("", None),
        (" \n\t\n", None),
        ("seventy-one", None),
        ("\u0661\u0662", None),
        ("\u00b2", None),
        ("9" * 5000, "9" * 5000),
        ("\x00\ufffd 8 \x1b[0m", "8"),
        ("=" * 100 + "1" + "," * 100, "1"),
    ],
)
def test_numbers_in_hostile_text(text, answer):
    assert extract_answer(text, "addition") == answer
    assert extract_answer(text, "subtraction") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" milk sand", "milk sand"),
        ("Milk, SAND.\nreverse: a ->", "milk sand"),
        ("\n milk   sand \n", "milk sand"),
        ("milk sand sand", "milk sand sand"),
        ("milk-sand", "milk sand"),
        ("milk_sand 12", "milk sand"),
        ("", None),
        ("12 34 -> .", None),
        ("m\u00edlk", "m\u00edlk"),
        ("\ufffd\x00", None),
    ],
)
def test_words_in_hostile_text(text, answer):
    assert extract_answer(text, "copying") == answer
    assert extract_answer(text, "reversal") == answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "num_rows must be at least 1, got 0"),
        ({"num_digits": 0}, "num_digits must be at least 1"),
        ({"num_examples": 0}, "num_examples must be at least 1"),
        ({"num_copied": 1}, "num_copied must lie between 2 and 16, got 1"),
        ({"num_reversed": 17}, "num_reversed must lie between 2 and 16, got 17"),
        ({"kinds": []}, r"kinds must be one or more of .*got \(\)"),
        ({"kinds": ["division"]}, "kinds must be one or more of"),
        ({"split": "dev"}, "split must be one of"),
        ({"num_rows": 200, "kinds": ["addition"], "num_digits": 1}, "hardly more than"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(exact_answers)(**arguments)
