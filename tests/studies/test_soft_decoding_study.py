"""The study of soft against hard decoding: its recipe, its tables, and a whole run on a tiny model."""

import math

import pytest

from softrl.studies.soft_decoding_report import decoding_rows, gap_rows, summary_lines, write_report

_MEASURES = ("accuracy", "base_nll", "own_nll", "distinct_1", "distinct_2", "repetition", "entropy", "length")


def _decoded(**numbers):
    values = dict.fromkeys(_MEASURES, 1.0) | numbers
    return values | {
        "entropy_by_step": [1.0, 2.0, None],
        "fed_by_step": [0.5, 0.25, None],
        "shown": ["<b>The film</b> & more"],
    }


def _record(tuning, seed, hard, soft, status="done"):
    return {
        "tuning": tuning, "seed": seed, "status": status, "seconds": 3.0, "hard_nll": 3.0, "other_nll": 5.0,
        "decodings": {"hard": _decoded(base_nll=hard), "soft": _decoded(base_nll=soft)},
    }  # fmt: skip


RECORDS = [
    _record("untuned", 0, 2.0, 5.0),
    _record("tuned", 0, 2.0, 2.5), _record("tuned", 1, 2.0, 1.0), _record("tuned", 2, 2.0, 3.0),
]  # fmt: skip


def test_gaps_are_differences_to_the_hard_decoding_seed_by_seed():
    rows = {(row.tuning, row.measure): row for row in gap_rows(RECORDS, "untuned")}
    before, after = rows["untuned", "base_nll"], rows["tuned", "base_nll"]
    assert before.gap[0] == 3.0
    assert math.isnan(before.change[0])
    assert after.gap[0] == pytest.approx((0.5 - 1.0 + 1.0) / 3)
    changes = [0.5 - 3.0, 1.0 - 3.0, 1.0 - 3.0]  # of sizes: a gap below zero is a gap as well
    mean = sum(changes) / 3
    assert after.change[0] == pytest.approx(mean)
    spread = math.sqrt(sum((each - mean) ** 2 for each in changes) / 2 / 3)
    assert after.change[1] == pytest.approx(spread)
    assert rows["tuned", "accuracy"].gap == (0.0, 0.0)


def test_the_summary_names_what_changed_beyond_doubt():
    lines = summary_lines(gap_rows(RECORDS, "untuned"))
    assert lines == ["“tuned”, “soft”: the gap in base nll shrank by 2.167 ± 0.167."]
    same = [_record("untuned", 0, 2.0, 5.0), _record("tuned", 0, 2.0, 4.0), _record("tuned", 1, 2.0, 6.0)]
    assert summary_lines(gap_rows(same, "untuned")) == ["No gap changed by more than two standard errors over seeds."]


def test_rows_are_means_over_seeds():
    rows = {(row.tuning, row.decoding): row for row in decoding_rows(RECORDS)}
    assert rows["tuned", "soft"].base_nll[0] == pytest.approx(6.5 / 3)
    assert rows["tuned", "soft"].seeds == 3
