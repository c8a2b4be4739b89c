"""A folder's record: what a changed recipe changes for its trials, and what it does not."""

import json
from pathlib import Path

import pytest

from softrl.studies.sweep_record import Source, continued, keys_of_model, recipe_keys, recipe_name, source_of

HERE = Path("folder")


def recorded(source):
    return json.loads(json.dumps(continued(source, None, HERE)))


BEFORE = Source("r", {"rate": 0.1, "steps": 5, "problems.0.settings.hops": 1}, {"proxy": {"width": 3}}, ["seed"])


@pytest.mark.parametrize(
    ("now", "names"),
    [
        (Source("s", BEFORE.keys, BEFORE.prepare), "recipe: r → s"),
        (Source("r", BEFORE.keys | {"rate": 0.2}, BEFORE.prepare), "rate: 0.1 → 0.2"),
        (Source("r", BEFORE.keys | {"more": True}, BEFORE.prepare), "more: not set → True"),
        (Source("r", {"rate": 0.1, "steps": 5}, BEFORE.prepare), "problems.0.settings.hops: 1 → not set"),
        (Source("r", BEFORE.keys, {"proxy": {"width": 4}}), "prepare.proxy.width: 3 → 4"),
        (Source("r", BEFORE.keys, {"proxy": {}}), "prepare.proxy.width: 3 → not set"),
    ],
)
def test_a_change_is_named(now, names):
    with pytest.raises(ValueError, match="choose another --output_dir") as caught:
        continued(now, recorded(BEFORE), HERE)
    assert f"({names}" in str(caught.value)


def test_what_no_trial_depends_on_may_change():
    free = ["hops", "rate", "seed"]
    then = recorded(Source("r", BEFORE.keys, BEFORE.prepare, free))
    keys = {"rate": 9.0, "steps": "5", "problems.0.settings.hops": 2}
    now = continued(Source("r", keys, {"other": {"width": 1}}, free), then, HERE)
    assert now["keys"] == {"rate": 9.0, "steps": 5, "problems.0.settings.hops": 2}
    assert now["prepare"] == {"proxy": {"width": 3}, "other": {"width": 1}}


def test_trials_that_leave_a_key_to_the_recipe_are_remembered():
    """First all set the rate; then an arm does not, and it runs with 2; then the rate is changed again."""
    first = recorded(Source("r", {"rate": 1}, {}, ["rate"]))
    second = continued(Source("r", {"rate": 2}, {}, []), first, HERE)
    assert second["keys"] == {"rate": 2}
    third = continued(Source("r", {"rate": 3}, {}, ["rate"]), second, HERE)  # none of these trials reads it
    assert third["keys"] == {"rate": 2}
    with pytest.raises(ValueError, match="rate: 2 → 3"):
        continued(Source("r", {"rate": 3}, {}, []), third, HERE)
    assert continued(Source("r", {"rate": 2}, {}, []), third, HERE)["keys"] == {"rate": 2}


def test_names_are_the_same_everywhere():
    assert recipe_name(Path("/a/recipes/reasoner/shakespeare.yaml")) == "reasoner/shakespeare"
    assert recipe_name(Path("/recipes/b/recipes/quick.yaml")) == "quick"
    assert recipe_name(Path("/a/mine.v2.yaml")) == "mine.v2"


def test_where_results_go_is_not_compared(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("output_dir: a\nreport_to: none\nquestion: q\nrate: 1.0e-3\nday: 2020-01-02\nwords: [a, b]\n")
    keys = {"rate": 0.001, "day": "2020-01-02", "words.0": "a", "words.1": "b"}
    assert recipe_keys(path) == keys
    source = source_of(path, {}, {"b", "a"})
    assert (source.recipe, source.keys, source.set_by_trials) == ("r", keys, ["a", "b"])
    model = keys_of_model(path, {"words": ["c"], "rate": None, "width": 2})
    assert model == {"rate": 0.001, "day": "2020-01-02", "words.0": "c", "width": 2}
    path.write_text("")
    assert recipe_keys(path) == {}
