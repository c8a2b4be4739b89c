"""The benchmark of thoughts measures every attention in every phase, and says what a process of its own held."""

import json
from dataclasses import asdict

import pytest

from softrl.studies.thought_attention import Row, Setting, contenders, run, table


def test_naive_passes_run_on_short_texts_alone():
    assert ("pass", "naive") in contenders(Setting(num_tokens=32))
    assert ("pass", "naive") not in contenders(Setting(num_tokens=33))
    assert ("rollout", "naive") not in contenders(Setting(num_tokens=32))


def test_ratios_are_to_the_shared_prefix_of_the_same_phase():
    sizes = {"num_tokens": 8, "n_thought": 2, "n_talk": 1, "rounds": 3}
    rows = [
        Row("pass", "shared", seconds=2.0, cpu_seconds=1.0, peak_mib=10.0, **sizes),
        Row("pass", "dense", seconds=5.0, cpu_seconds=4.0, peak_mib=30.0, **sizes),
        Row("rollout", "shared", seconds=1.0, cpu_seconds=1.0, **sizes),
        Row("rollout", "dense", seconds=8.0, cpu_seconds=6.0, **sizes),
    ]
    lines = table(rows).splitlines()
    assert lines[1].split()[4:] == ["dense", "5.000", "2.50", "4.000", "4.00", "30.0", "3.00", "3"]
    assert lines[3].split()[4:] == ["dense", "8.000", "8.00", "6.000", "6.00", "3"]


@pytest.mark.slow
def test_every_contender_is_measured_and_recorded(tmp_path, capsys):
    setting = Setting(num_tokens=6, n_thought=1, n_talk=2)
    rows = run([setting], 2, True, tmp_path / "thoughts.json")
    assert [(row.phase, row.attention) for row in rows] == contenders(setting)
    assert all(row.seconds > 0.0 and row.rounds == 2 for row in rows)
    assert all(row.peak_mib > 0.0 for row in rows if row.phase == "pass")
    record = json.loads((tmp_path / "thoughts.json").read_text())
    assert record["rows"] == [asdict(row) for row in rows]
    assert (tmp_path / "thoughts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(capsys.readouterr().out.splitlines()) >= 6
