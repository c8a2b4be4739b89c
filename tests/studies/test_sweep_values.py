"""Numbers as Python reads them, words as YAML does, and differences by path."""

import pytest

from softrl.studies.sweep_values import comparable, differences, flat, in_words, is_number, read_values


@pytest.mark.parametrize(
    "text",
    [sign + digits + end for sign in ("", "-", "+") for digits in ("1", "12.5", "3.", ".5") for end in
     ("", "e4", "E4", "e-3", "e+2")] + ["08", "1.5E10"],
)  # fmt: skip
def test_what_python_reads_as_a_number_is_one(text):
    value = read_values(text)
    assert is_number(value)
    assert value == float(text)
    assert comparable({"a": [text]}) == {"a": [float(text)]}


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "infinity", "NaN", "1e", "e4", "1e4x", "1_0e4", "1e1_0", "1e4.5", "0x1p3", "+", "."]
)
def test_words_stay_words(text):
    assert read_values(text) == text
    assert comparable(text) == text


def test_the_rest_is_as_yaml_has_it():
    text = "{a: true, b: null, c: 010, d: '1e4', e: [1e4, 1e-3], f: 1_000, g: .inf}"
    read = read_values(text)
    assert read == {"a": True, "b": None, "c": 8, "d": "1e4", "e": [10000.0, 0.001], "f": 1000, "g": float("inf")}
    assert [is_number(value) for value in (read["a"], read["c"], read["d"], read["g"])] == [False, True, False, False]
    assert read_values("") is None


def test_differences_name_what_differs():
    then = {"a": 1, "b": {"c": [1, {"d": "1e-3"}], "e": {}}, "gone": None}
    now = {"a": 1.0, "b": {"c": [2, {"d": 0.001}], "e": {}}, "new": "x"}
    assert flat(then) == {"a": 1, "b.c.0": 1, "b.c.1.d": "1e-3", "b.e": {}, "gone": None}
    changed = differences(flat(then, "all"), flat(now, "all"))
    assert changed == {"all.b.c.0": "1 → 2", "all.gone": "None → not set", "all.new": "not set → 'x'"}
    assert in_words(changed, 2) == "all.b.c.0: 1 → 2; all.gone: None → not set; and 1 more"
