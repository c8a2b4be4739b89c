"""The numbers of `softrl compare`'s report, by cases made by hand; and the parts of a page."""

import math

import pytest

from softrl.studies.compare_figures import frontier_curve
from softrl.studies.compare_tables import (
    Change,
    at,
    at_equal_kl,
    at_equal_samples,
    at_equal_seconds,
    change_by_prompt,
    curve_beta,
    difference,
    finals,
    mean_at_kl,
    mean_curve,
    rows_of,
)
from softrl.studies.html import embedded, mean_and_error, number, with_error, write_page

pytestmark = pytest.mark.slow  # imports trl


def point(step, kl, rewards, seconds=0.0):
    mean = sum(rewards) / len(rewards)
    return {
        "step": step, "samples": 16 * step, "reward_calls": 16 * step, "seconds": seconds, "evaluation_seconds": 1.0,
        "reward": mean, "rewards_by_prompt": rewards, "judge_by_prompt": [None] * len(rewards),
        "kl_completion": kl, "kl": kl / 4, "distinct_1": 0.5, "distinct_2": 0.5, "base_perplexity": 10.0,
        "completions/mean_length": 4.0,
    }  # fmt: skip


def record(points, method="a", seed=0, beta=0.1, status="done", stage="main"):
    return {
        "stage": stage, "method": method, "trainer": "ppo", "beta": beta, "seed": seed, "learning_rate": 0.1,
        "status": status, "samples_a_rollout": 16, "points": points,
    }  # fmt: skip


def line(kls, rewards, seconds=None, **settings):
    seconds = seconds if seconds is not None else [10.0 * i for i in range(len(kls))]
    each = zip(kls, rewards, seconds, strict=True)
    return record([point(i, kl, [r, r], s) for i, (kl, r, s) in enumerate(each)], **settings)


def test_values_at_equal_kl_are_where_a_run_first_passes_it():
    points = line([1e-7, 2.0, 1.0, 5.0], [0.2, 0.6, 0.0, 1.0])["points"]
    assert at(points, "kl_completion", 0.0, "reward") == pytest.approx(0.2)  # the start, whose KL is rounded
    assert at(points, "kl_completion", 0.5, "reward") == pytest.approx(0.3)
    assert at(points, "kl_completion", 1.5, "reward") == pytest.approx(0.5)  # not on the way back
    assert at(points, "kl_completion", 3.0, "reward") == pytest.approx(0.5)  # half-way from 1 to 5
    assert at(points, "kl_completion", 5.1, "reward") is None
    assert at(points, "kl_completion", 1.0, "judge") is None


def test_means_at_equal_kl_are_over_seeds():
    runs = [
        line([0.0, 2.0], [0.0, 1.0], seed=0, beta=0.0),
        line([0.0, 2.0], [0.0, 0.6], seed=0, beta=0.1),
        line([0.0, 4.0], [0.0, 1.0], seed=1),
        line([0.0, 0.5], [0.0, 9.0], seed=2),  # does not get there
    ]
    mean, error, reached = mean_at_kl(runs, 1.0, "reward")
    assert mean == pytest.approx((0.4 + 0.25) / 2)
    assert error == pytest.approx(0.075)
    assert reached == 2
    assert mean_at_kl(runs, 9.0, "reward")[2] == 0
    curve = frontier_curve(runs[:3], "reward")
    assert curve[0] == pytest.approx((0.0, 0.0, 0.0))
    assert curve[-1][:2] == pytest.approx((2.0, (0.8 + 0.5) / 2))  # as far as every seed gets


def test_changes_are_paired_by_prompt_and_averaged_over_seeds():
    first = record([point(0, 0.0, [0.1, 0.5]), point(1, 1.0, [0.3, 0.9])], seed=0)
    second = record([point(0, 0.0, [0.0, 0.0]), point(1, 1.0, [0.1, 0.1])], seed=1)
    assert change_by_prompt(first, first["points"][1], "reward") == pytest.approx((0.3, 0.1))
    change = Change.of([first, second], "reward")
    assert change.mean == pytest.approx(0.2)
    assert change.error == pytest.approx(0.1)
    assert change.prompt_error == pytest.approx(0.05)
    assert change.z == pytest.approx(2.0)  # by the larger error
    agreeing = Change.of([first, record(first["points"], seed=2)], "reward")  # by chance
    assert (agreeing.error, agreeing.prompt_error) == pytest.approx((0.0, 0.1 / 2**0.5))
    assert agreeing.z == pytest.approx(3.0 * 2**0.5)
    alone = Change.of([first], "reward")
    assert (alone.error, alone.z) == pytest.approx((0.1, 3.0))
    assert Change.of([first], "judge") is None
    assert Change.of([], "reward") is None


def test_differences_are_paired_by_seed_and_weight():
    mine = [line([0.0, 2.0], [0.1, 0.8], [0.0, 10.0], seed=seed) for seed in (0, 1, 2)]
    theirs = [line([0.0, 4.0], [0.1, 0.3 + 0.2 * seed], [0.0, 20.0], method="b", seed=seed) for seed in (0, 1)]
    theirs.append(line([0.0, 4.0], [0.1, 0.9], method="b", seed=2, beta=0.7))  # no pair
    mean, error, seeds = difference(mine, theirs, lambda a, b: at_equal_samples(a, b, "reward"))
    assert (mean, error, seeds) == (pytest.approx(0.4), pytest.approx(0.1), 2)
    # After the shorter one's 10 seconds the other is half-way.
    assert at_equal_seconds(mine[0], theirs[0], "reward") == pytest.approx(0.8 - 0.2)
    assert at_equal_seconds(theirs[0], mine[0], "reward") == pytest.approx(0.2 - 0.8)
    assert at_equal_kl(mine[0], theirs[0], "reward", 1.0) == pytest.approx(0.45 - 0.15)
    assert at_equal_kl(mine[0], theirs[0], "reward", 3.0) is None


def test_equal_samples_are_the_last_that_both_have():
    longer, shorter = line([0, 1, 2], [0.0, 0.5, 0.9]), line([0, 1], [0.0, 0.2])  # one was stopped by its seconds
    assert at_equal_samples(longer, shorter, "reward") == pytest.approx(0.3)


def test_final_numbers_leave_out_failed_runs_and_count_them():
    runs = [
        line([0.0, 2.0], [0.0, 0.4], [0.0, 8.0], seed=0),
        line([0.0, 4.0], [0.0, 0.6], [0.0, 6.0], seed=1),
        record([], seed=2, status="loss is not finite at step 3"),
        line([0.0, 1.0], [0.0, 9.0], stage="tuning"),
        record([], method="b", status="RuntimeError: no memory"),
    ]
    first, second = finals(runs)
    assert (first.seeds, first.failed, second.seeds, second.failed) == (2, 1, 0, 1)
    assert first.reward.mean == pytest.approx(0.5)
    assert first.means["kl_completion"] == pytest.approx((3.0, 1.0))
    assert first.means["seconds_a_rollout"] == pytest.approx((7.0, 1.0))
    assert second.reward is None
    rows = rows_of(runs)
    assert [row.status for row in rows].count("loss is not finite at step 3") == 1
    assert [row.reward for row in rows if row.status != "done"] == [None, None]


def test_curves_end_where_the_shortest_run_does():
    runs = [line([0, 1, 2], [0.0, 0.4, 0.8], seed=0), line([0, 1], [0.2, 0.6], [0.0, 20.0], seed=1)]
    curve = mean_curve(runs, "reward")
    assert [each["samples"] for each in curve] == [0, 16]
    assert curve[1] == pytest.approx({"samples": 16, "seconds": 15.0, "mean": 0.5, "error": 0.1})
    assert mean_curve([], "reward") == []
    assert curve_beta([*runs, line([0], [0], beta=0.9)]) == 0.1


def test_numbers_are_written_for_readers():
    numbers = [0.0, 1234.5, 12.345, 0.01234, 1e-7, math.inf]
    assert [number(value) for value in numbers] == ["0", "1234", "12.3", "0.0123", "1.00e-07", "inf"]
    assert number(None) == number(math.nan) == with_error(None, None) == "\N{EN DASH}"
    assert with_error(0.5, 0.1, signed=True) == "+0.500 ± 0.100"
    assert with_error(0.5, math.nan) == "0.500"
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert math.isnan(mean_and_error([1.0])[1])


def test_a_page_escapes_and_embeds(tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    values = {"rows": [["<b>", 1.5]], "source": embedded(tmp_path / "a.png")}
    body = "{{ table(['x', 'y'], rows) }}{{ figure(source, 'a & b') }}"
    write_page(tmp_path / "page.html", "1 < 2", body, values)
    page = (tmp_path / "page.html").read_text()
    assert "<title>1 &lt; 2</title>" in page
    assert '<td class="text">&lt;b&gt;</td><td>1.5</td>' in page
    assert 'src="data:image/png;base64,cG5n"' in page
    with pytest.raises(Exception, match="'missing' is undefined"):
        write_page(tmp_path / "page.html", "t", "{{ missing }}", {})
