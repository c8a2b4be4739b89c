"""The step benchmark runs all its contenders on a tiny model, and keeps what it has measured."""

import pytest

pytestmark = pytest.mark.slow  # imports trl, reads the tokenizer and the reward of the real model


def test_contenders_on_a_tiny_model(tmp_path):
    from softrl.studies.rollout import FLOOR, NAIVE, OURS, RLOO, Setting
    from softrl.studies.rollout_report import read, run

    output, names = tmp_path / "rollout.csv", [FLOOR, RLOO, "st_gumbel, hops 2", "gumbel_softmax, auto", *NAIVE]
    rows = run(Setting(model="tiny", num_prompts=2, num_generations=2), [2], names, 1, False, output)
    assert [row.contender for row in rows] == names
    for row in rows:
        assert row.total == pytest.approx(row.generation + row.cotangents + row.gradient, rel=1e-6)
        assert (row.cotangents > 0.0) == (row.contender in OURS)
    assert output.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    run(Setting(model="tiny", beta=0.1), [3], [FLOOR, *NAIVE], 1, True, output, append=True)
    again = read(output)
    assert again[:-1] == rows
    assert (again[-1].contender, again[-1].num_steps) == (FLOOR, 3), "the naive ones have no KL"
    assert again[-1].peak_mib > 0.0
