"""Sweeps: only what is missing is run, failed trials are tried again, several at a time, arms and seeds in order."""

import csv
import json
import threading
import time

import pytest

from softrl.studies.sweep import Arm, Axis, Search, Trial, best, finished, sweep
from softrl.studies.sweep_figures import plot_search
from softrl.studies.sweep_launch import Threads, TrialError
from softrl.studies.sweep_recipes import with_values
from softrl.studies.sweep_record import Source
from softrl.studies.sweep_summary import write_results
from softrl.studies.variance_config import ProblemSpec, VarianceConfig

AXES = (Axis("a", (1, 2, 3)), Axis("b", ("x", None)))


def cost(values):
    return values["a"] ** 2 + (values["b"] is None)


def test_axes_are_read_as_yaml():
    assert Axis.parsed("hops=0,1,null") == Axis("hops", (0, 1, None))
    assert Axis.parsed("lr=1.0e-3,0.5,true,soft") == Axis("lr", (1e-3, 0.5, True, "soft"))
    assert Axis.parsed("policy_weight=0,1e4,'1e4'") == Axis("policy_weight", (0, 10000.0, "1e4"))
    for text in ("hops", "hops=", "=1", "hops=1,1", "hops=10,1e1", "hops=[1]"):
        with pytest.raises(ValueError, match="--grid"):
            Axis.parsed(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "best"}, "--sampler must be one of"),
        ({"sampler": "tpe"}, "needs --trials"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"axes": (AXES[0], AXES[0])}, "different keys"),
        ({"arms": (Arm("one"), Arm("one"))}, "different labels"),
        ({"arms": (Arm("one"),), "only_arms": ("two",)}, "there is no \\['two'\\]"),
        ({"arms": (Arm("one"),), "sampler": "random", "trials": 2}, "no use for arms"),
    ],
)
def test_searches_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Search(**({"axes": AXES, "metric": "m"} | changes))


def test_a_rerun_does_only_what_is_missing_and_what_failed(tmp_path):
    called = []

    def objective(values, fails=None, stops=None):
        called.append(dict(values))
        if values == fails:
            raise TrialError("no")
        if values == stops:
            raise KeyboardInterrupt
        return cost(values)

    search = Search(AXES, "m")
    failing, stopping = {"a": 2, "b": "x"}, {"a": 3, "b": "x"}
    with pytest.raises(KeyboardInterrupt):
        sweep(search, lambda values: objective(values, failing, stopping), tmp_path)
    assert len(called) == 5
    trials = sweep(search, objective, tmp_path)
    assert called[5:]
    assert {json.dumps(v) for v in called[5:]} == {json.dumps(v) for v in (failing, stopping, {"a": 3, "b": None})}
    assert {json.dumps(t.values): t.metric for t in trials} == {json.dumps(v): cost(v) for v in search.grid()}
    before = len(called)
    assert len(sweep(search, objective, tmp_path)) == 6
    assert len(called) == before
    assert finished(search, tmp_path) == trials
    write_results(search, trials, tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["a"], row["b"]): float(row["m"]) for row in rows} == {
        (str(v["a"]), v["b"] or "null"): cost(v) for v in search.grid()
    }
    plot_search(search.keys, "m", trials, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert best(search, trials).values == {"a": 1, "b": "x"}
    assert best(Search(AXES, "m", maximize=True), trials).values == {"a": 3, "b": None}
    with pytest.raises(ValueError, match="holds a sweep with"):
        sweep(Search(AXES, "other"), objective, tmp_path)


def test_failed_trials_are_in_the_table(tmp_path):
    def objective(values):
        raise TrialError("no")

    trials = sweep(Search(AXES[:1], "m"), objective, tmp_path)
    assert [trial.metric for trial in trials] == [None] * 3
    assert best(Search(AXES[:1], "m"), trials) is None
    assert {trial.error for trial in trials} == {"no"}
    write_results(Search(AXES[:1], "m"), trials, tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text().count("failed") == 3


def test_a_random_search_counts_earlier_trials(tmp_path):
    called = []
    for wanted in (3, 5):
        sweep(Search(AXES, "m", sampler="random", trials=wanted), lambda v: called.append(v) or 1.0, tmp_path)
        assert len(called) == wanted
    assert len({json.dumps(values) for values in called}) > 1


def test_arms_replace_axes_and_all_of_a_seed_comes_before_the_next():
    arms = (Arm("one", {"c": 5}), Arm("two", {}, (Axis("a", (None,)), Axis("d", (8, 9)))))
    search = Search((Axis("seed", (7, 8)), Axis("a", (1, 2))), "m", arms=arms, fixed={"e": 6})
    assert search.keys == ["arm", "a", "d", "seed"]
    first = [
        {"arm": "one", "seed": 7, "a": 1}, {"arm": "one", "seed": 7, "a": 2},
        {"arm": "two", "seed": 7, "a": None, "d": 8}, {"arm": "two", "seed": 7, "a": None, "d": 9},
    ]  # fmt: skip
    assert search.grid() == [*first, *({**values, "seed": 8} for values in first)]
    assert search.given(first[0]) == {"e": 6, "c": 5, "seed": 7, "a": 1}
    assert search.given(first[2]) == {"e": 6, "seed": 7, "a": None, "d": 8}
    only = Search(search.axes, "m", arms=arms, only_arms=("one",))
    assert only.keys == search.keys
    assert len(only.grid()) == 4


def test_a_folder_takes_more_values_and_arms_but_no_other_keys(tmp_path):
    called = []
    run = lambda values: called.append(values) or 1.0  # noqa: E731
    one, two = Arm("one", {"c": 5}), Arm("two")
    sweep(Search((Axis("a", (1, 2)),), "m", arms=(one, two), only_arms=("one",)), run, tmp_path)
    assert called == [{"arm": "one", "a": 1}, {"arm": "one", "a": 2}]
    trials = sweep(Search((Axis("a", (2, 3)),), "m", arms=(one, two)), run, tmp_path)
    assert called[2:] == [{"arm": "one", "a": 3}, {"arm": "two", "a": 2}, {"arm": "two", "a": 3}]
    assert len(trials) == 5
    with pytest.raises(ValueError, match=r"arms \['one'\] with other keys"):
        sweep(Search((Axis("a", (2,)),), "m", arms=(Arm("one", {"c": 6}),)), run, tmp_path)
    with pytest.raises(ValueError, match="holds a sweep with"):
        sweep(Search((Axis("a", (2,)),), "m", arms=(one, two), fixed={"e": 1}), run, tmp_path)
    with pytest.raises(ValueError, match="holds no sweep"):
        finished(Search((Axis("a", (2,)),), "m"), tmp_path / "other")


def test_workers_run_at_the_same_time_and_failures_stop_nobody(tmp_path):
    together = threading.Barrier(3)  # broken unless three trials run at once

    def objective(values):
        together.wait(timeout=10.0)
        if values == {"a": 2, "b": None}:
            raise TrialError("no")
        return {"m": cost(values), "other": 5.0}

    trials = sweep(Search(AXES, "m"), Threads(objective, 3), tmp_path)
    assert len(trials) == 6
    assert [t.values for t in trials if t.metric is None] == [{"a": 2, "b": None}]
    assert all(t.metric == cost(t.values) and t.numbers["other"] == 5.0 for t in trials if t.metric is not None)
    with pytest.raises(ValueError, match="at least 1"):
        Threads(objective, 0)


def test_an_error_of_one_trial_stops_the_others_and_they_are_run_again(tmp_path):
    stopped = threading.Event()

    def objective(values):
        if values["a"] == 1:
            return {"other": 1.0}
        stopped.wait(timeout=10.0)
        raise TrialError("stopped")

    search = Search(AXES[:1], "m")
    with pytest.raises(ValueError, match=r"no metric 'm'; it has \['other'\]"):
        sweep(search, Threads(objective, 2, stopped.set), tmp_path)
    assert stopped.is_set()
    called = []
    sweep(search, lambda values: called.append(values["a"]) or 1.0, tmp_path)
    assert called == [1, 2, 3]


def test_a_metric_that_is_no_number_is_a_failure(tmp_path):
    trials = sweep(Search(AXES[:1], "m"), lambda values: float("nan") if values["a"] == 2 else 1.0, tmp_path)
    assert [trial.metric for trial in trials] == [1.0, None, 1.0]
    assert trials[1].error == "m is nan"


def test_two_sweeps_do_not_share_a_folder_at_the_same_time(tmp_path):
    def objective(values):
        with pytest.raises(ValueError, match="a sweep is running"):
            sweep(Search(AXES[:1], "m"), lambda values: 1.0, tmp_path)
        return 1.0

    assert len(sweep(Search(AXES[:1], "m"), objective, tmp_path)) == 3


def test_seconds_are_those_of_the_trial(tmp_path):
    def objective(values):
        time.sleep(0.01)
        return {"m": 1.0} if values["a"] == 1 else {"m": 1.0, "trial_seconds": 12.0}

    seconds = [trial.seconds for trial in sweep(Search(AXES[:1], "m"), objective, tmp_path)]
    assert 0.01 <= seconds[0] < 5.0
    assert seconds[1:] == [12.0, 12.0]


def test_keys_reach_settings_and_estimators():
    spec = ProblemSpec("t", "tiny_lm", ["rloo", {"name": "st_gumbel", "hops": 0}], {"steps": 2})
    config = VarianceConfig("?", "out", [spec], draws=8)
    assert with_values(config, {"hops": 2}).problems[0].estimators[1]["hops"] == 2
    assert with_values(config, {"steps": 3}).problems[0].settings["steps"] == 3
    assert with_values(config, {"draws": 9}).draws == 9
    assert with_values(config, {"problems.0.settings.kl": 0.1}).problems[0].settings["kl"] == 0.1
    assert with_values(config, {"problems.0.estimators.1.hops": 5}).problems[0].estimators[1]["hops"] == 5
    assert with_values(config, {"problems.0.draws": 7}).problems[0].draws == 7
    assert config.problems[0] == ProblemSpec("t", "tiny_lm", ["rloo", {"name": "st_gumbel", "hops": 0}], {"steps": 2})
    for key in ("hop", "problems.1.settings.steps", "problems.0.estimators.0.hops", "question.x", "problems.0.drws"):
        with pytest.raises(ValueError, match="unknown key"):
            with_values(config, {key: 1})


def test_other_numbers_are_columns(tmp_path):
    trials = [Trial({"a": 1}, 2.0, 3.0, {"m": 2.0, "n": 5.0}), Trial({"a": 2}, None, 1.0)]
    write_results(Search((Axis("a", (1, 2)),), "m"), trials, tmp_path / "results.csv", ["m", "n"])
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines == ["a,m,n,seconds,state", "1,2,5,3,finished", "2,,,1,failed"]


SIZES = {"size": ["width", "height"], "all": ["height", "depth"]}


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"fixed": {"width": 3}}, r"'size' sets 'width' .*given as well; leave out 'size' or 'width'"),
        ({"fixed": {"width": None}}, "'size' sets 'width'"),
        ({"axes": (Axis("size", (1, 2)), Axis("height", (3,)))}, "'size' sets 'height'"),
        ({"arms": (Arm("one"), Arm("two", {"height": 3}))}, "'size' sets 'height' .*in arm 'two'"),
        ({"arms": (Arm("two", {}, (Axis("height", (3,)),)),)}, "'size' sets 'height' .*in arm 'two'"),
        ({"arms": (Arm("two", {"width": 3}, (Axis("size", (None, 5)),)),)}, "'size' sets 'width' .*in arm 'two'"),
        ({"fixed": {"all": 3}}, "'all' sets 'height' .*set by 'size'"),
    ],
)
def test_a_key_beside_one_that_sets_it_is_refused(given, pattern):
    with pytest.raises(ValueError, match=pattern):
        Search(**({"axes": (Axis("size", (1, 2)),), "metric": "m", "together": SIZES} | given))


def test_a_key_that_stands_for_others_leaves_them_alone_where_it_is_null_or_not_used():
    arms = (Arm("alike"), Arm("own", {"width": 7}, (Axis("size", (None,)),)))
    search = Search((Axis("size", (1, 2)),), "m", arms=arms, together=SIZES)
    assert [search.given(values) for values in search.grid()] == [
        {"width": 1, "height": 1}, {"width": 2, "height": 2}, {"width": 7, "height": None},
    ]  # fmt: skip
    unused = Search((Axis("width", (1,)),), "m", fixed={"height": 3}, together=SIZES)
    assert unused.given(unused.grid()[0]) == {"height": 3, "width": 1}
    assert unused.set_by_all() == ["height", "width"]
    assert search.set_by_all() == ["width"]


def test_a_folder_of_before_words_were_numbers_goes_on(tmp_path):
    """Its journal has `1e4` as a word, in a trial and among the keys of all."""
    called = []
    run = lambda values: called.append(values) or 1.0  # noqa: E731
    sweep(Search((Axis("a", (0, "1e4")),), "m", fixed={"rate": "1e-3", "tokenizer": "512"}), run, tmp_path)
    search = Search((Axis.parsed("a=0,1e4,3"),), "m", fixed={"rate": 0.001, "tokenizer": "512"})
    trials = sweep(search, run, tmp_path)
    assert called == [{"a": 0}, {"a": "1e4"}, {"a": 3}]
    assert [trial.values["a"] for trial in trials] == [0, 10000.0, 3]
    assert isinstance(trials[1].values["a"], float)
    sweep(Search((Axis.parsed("a=0,'1e4'"),), "m", fixed=search.fixed), run, tmp_path)
    assert len(called) == 3
    again = finished(Search((Axis.parsed("a=0.0,10000"),), "m", fixed=search.fixed), tmp_path)
    assert [repr(trial.values["a"]) for trial in again] == ["0.0", "10000", "3"]
    with pytest.raises(ValueError, match="holds a sweep with"):
        sweep(Search(search.axes, "m", fixed={"rate": 0.01, "tokenizer": "512"}), run, tmp_path)


def test_what_is_made_first_waits_until_the_folder_may_go_on(tmp_path):
    made = []
    source = Source("r", {"rate": 1}, {})
    sweep(Search(AXES[:1], "m"), lambda values: float(len(made)), tmp_path, source, lambda: made.append(1))
    assert [trial.metric for trial in finished(Search(AXES[:1], "m"), tmp_path)] == [1.0] * 3
    for search, other in ((Search(AXES, "m"), source), (Search(AXES[:1], "m"), Source("r", {"rate": 2}, {}))):
        with pytest.raises(ValueError, match="choose another --output_dir"):
            sweep(search, lambda values: 1.0, tmp_path, other, lambda: made.append(2))
    assert made == [1]


def test_a_folder_without_trials_takes_another_recipe(tmp_path):
    """What failed before the first trial was a mistake of the recipe, which is mended."""

    def fails():
        raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        sweep(Search(AXES[:1], "m"), lambda values: 1.0, tmp_path, Source("r", {"rate": 1}, {}), fails)
    assert len(sweep(Search(AXES[:1], "m"), lambda values: 1.0, tmp_path, Source("r", {"rate": 2}, {}))) == 3
