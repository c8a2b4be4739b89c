"""Pointer chasing: right answers, splits that share no function, and the chances of a guess."""

import inspect
import itertools
from fractions import Fraction

import pytest
from transformers import AutoTokenizer

from softrl.data.pointer_chasing import best_guess_accuracy, pointer_chasing, pointer_tokenizer, worked_answers

N = 6
KINDS = ("cycle", "permutation", "function")


def rows_of(num_rows=300, num_symbols=N, hops=(1, 2, 3), **settings):
    settings = {"kind": "cycle"} | settings
    return pointer_chasing(pointer_tokenizer(num_symbols, max(hops)), num_rows, num_symbols, hops, **settings)


def read(text):
    """The function, hops, start and answer of a text."""
    *pairs, question, start, answer = text.split()
    function = dict(pair.split(">") for pair in pairs)
    assert len(function) == len(pairs)
    return function, int(question[1:]), start, answer


def table(text):
    function = read(text)[0]
    return "".join(function[symbol] for symbol in sorted(function))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_and_chains_by_a_loop_of_our_own(kind, split):
    tokenizer = pointer_tokenizer(N, 3)
    seen = set()
    for row in rows_of(kind=kind, split=split):
        function, hops, symbol, answer = read(row["text"])
        chain = []
        for _ in range(hops):
            symbol = function[symbol]
            chain.append(symbol)
        assert (symbol, hops) == (answer, row["hops"])
        assert tokenizer.convert_ids_to_tokens(row["chain_ids"]) == chain[:-1]
        assert tokenizer.decode(row["input_ids"]) == row["text"]
        assert len(row["input_ids"]) == N + 3
        assert row["answer_position"] + 1 == len(row["input_ids"]) - 1
        seen.add(hops)
    assert seen == {1, 2, 3}


def test_kinds_are_what_they_say():
    for text in rows_of(kind="cycle")["text"]:
        function, _, start, _ = read(text)
        path = [start]
        while function[path[-1]] != start:
            path.append(function[path[-1]])
        assert len(path) == N
    tables = {kind: [table(text) for text in rows_of(kind=kind)["text"]] for kind in KINDS}
    assert all(len(set(values)) == N for values in tables["permutation"])
    assert any(len(set(values)) < N for values in tables["function"])
    assert any(set(zip("abcdef", values, strict=True)) & {("a", "a"), ("c", "c")} for values in tables["permutation"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_symbols", [5, N])
def test_no_function_is_in_both_splits_whatever_the_seed(kind, num_symbols):
    train, test = (
        {
            table(text)
            for seed in (0, 1)
            for text in rows_of(200, num_symbols, kind=kind, split=split, seed=seed)["text"]
        }
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test


def test_a_fifth_of_the_functions_is_held_out():
    """Of the 720 permutations; within four standard deviations of a binomial. The hash is fixed: it cannot flicker."""
    from softrl.data.pointer_chasing import _is_test

    held_out = sum(_is_test("".join(values)) for values in itertools.permutations("abcdef"))
    assert abs(held_out - 144) < 4 * (720 * 0.2 * 0.8) ** 0.5


def test_the_seed_says_which_and_fewer_are_the_first_of_more():
    assert rows_of(20).to_dict() == rows_of(20).to_dict()
    assert rows_of(20)[:5] == rows_of(5).to_dict()
    assert rows_of(20)["text"] != rows_of(20, seed=1)["text"]
    # written down once: another machine or Python must draw the same
    assert rows_of(1)["text"] == ["b>d d>e a>c e>a c>f f>b ?1 f b"]


def test_starts_hops_and_orders_are_uniform():
    """Chi-square-like: every count within 5 standard deviations; about 1e-5 for 18 counts by chance, seed fixed."""
    texts = [text.split() for text in rows_of(3000)["text"]]
    for slot, values in ((-2, "abcdef"), (-3, ("?1", "?2", "?3"))):
        for value in values:
            expected, share = 3000 / len(values), 1 / len(values)
            count = sum(words[slot] == value for words in texts)
            assert abs(count - expected) < 5 * (expected * (1 - share)) ** 0.5
    for key in "abcdef":
        count = sum(words[0][0] == key for words in texts)
        assert abs(count - 500) < 5 * (500 * 5 / 6) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hops", [1, 2, 3, 4, 5, 6])
def test_the_best_guess_by_enumeration(kind, hops):
    """Over all functions of five symbols and the start `a`: how often is the commonest answer right?"""
    n = 5
    tables = itertools.product(range(n), repeat=n) if kind == "function" else itertools.permutations(range(n))
    answers, total = [0] * n, 0
    for values in tables:
        path = [0]
        for _ in range(n * hops):
            path.append(values[path[-1]])
        if kind == "cycle" and 0 in path[1:n]:
            continue
        answers[path[hops]] += 1
        total += 1
    assert best_guess_accuracy(n, hops, kind) == pytest.approx(float(Fraction(max(answers), total)), abs=1e-12)


def test_worked_answers_show_the_symbols_between_behind_a_mark():
    rows, tokenizer = rows_of(50), pointer_tokenizer(N, 3)
    mark = tokenizer.convert_tokens_to_ids(":")
    shown = worked_answers(tokenizer, rows)
    assert len(shown) == 50
    for row, longer in zip(rows, shown, strict=True):
        start = row["answer_position"]
        work = [*row["chain_ids"], row["input_ids"][-1]]
        assert longer["input_ids"] == [*row["input_ids"][: start + 1], mark, *work]
        assert longer["completion_mask"] == [0] * (start + 2) + [1] * len(work)


def test_the_tokenizer_is_saved_and_loaded(tmp_path):
    tokenizer = pointer_tokenizer(N, 3)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len(loaded) == 3 + N + 3 + N**2 + 1
    assert loaded.convert_tokens_to_ids(["<pad>", "<eos>", "<unk>", "a", "f", "?1", "?3", "a>a"]) == [
        *range(4),
        8,
        9,
        11,
        12,
    ]
    text = rows_of(1)["text"][0]
    assert loaded.decode(loaded(text).input_ids) == text
    assert loaded("a g b").input_ids == [3, 2, 4]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_rows": 0}, "num_rows must be a whole number, 1 or more, got 0; choose"),
        ({"num_rows": 2.5}, "num_rows must be a whole number, 1 or more, got 2.5"),
        ({"num_symbols": 4}, "num_symbols must be a whole number, from 5 to 26, got 4"),
        ({"num_symbols": 27}, "num_symbols must be a whole number, from 5 to 26, got 27"),
        ({"num_symbols": True}, "num_symbols must be a whole number, from 5 to 26, got True"),
        ({"hops": []}, r"hops must be a list of one number of hops or more, got \[\]; pass \[2\]"),
        ({"hops": 2}, r"hops must be a list of one number of hops or more, got 2; pass \[2\]"),
        ({"hops": "12"}, "hops must be a list of one number of hops or more, got '12'"),
        ({"hops": [1, 0]}, "every number of hops must be a whole number, 1 or more, got 0"),
        ({"hops": [1, "2"]}, "every number of hops must be a whole number, 1 or more, got '2'"),
        ({"kind": "map"}, r"kind must be one of \('cycle', 'permutation', 'function'\), got 'map'; choose"),
        ({"split": "dev"}, r"split must be one of \('train', 'test'\), got 'dev'; choose"),
        ({"hops": [4]}, r"it lacks 1, the first is '\?4'; pass pointer_tokenizer\(6, 4\)"),
        ({"num_symbols": 7}, r"it lacks 14, .*pass pointer_tokenizer\(7, 3\)"),
    ],
)
def test_hostile_input(settings, expected):
    arguments = {"num_rows": 3, "num_symbols": N, "hops": [1, 2, 3]} | settings
    with pytest.raises(ValueError, match=expected):
        inspect.unwrap(pointer_chasing)(pointer_tokenizer(N, 3), **arguments)


def test_hostile_tokenizers_and_guesses():
    with pytest.raises(ValueError, match="max_hops must be a whole number, 1 or more, got 0; choose another max_hops"):
        pointer_tokenizer(N, 0)
    with pytest.raises(ValueError, match="num_symbols must be a whole number, from 5 to 26, got 3"):
        pointer_tokenizer(3, 2)
    with pytest.raises(ValueError, match="every number of hops must be a whole number, 1 or more, got -1"):
        best_guess_accuracy(N, -1)
    with pytest.raises(ValueError, match="kind must be one of"):
        inspect.unwrap(best_guess_accuracy)(N, 1, "tree")
