"""Schedules against their closed forms, the grammar, and the KL controller on a plant whose answer is known."""

import math

import pytest

from softrl.objectives.schedules import AdaptiveKL, Schedule, parse_epoch_schedule, parse_schedule


@pytest.mark.parametrize(
    ("text", "values"),  # by step of a run of 100
    [
        ("linear:2.0->0.5", {0: 2.0, 20: 1.7, 50: 1.25, 100: 0.5, 130: 0.5}),
        ("cosine:1.0->0.1", {0: 1.0, 25: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 50: 0.55, 100: 0.1}),
        ("exponential:2.0->0.5", {0: 2.0, 25: math.sqrt(2.0), 50: 1.0, 75: math.sqrt(0.5), 100: 0.5}),
        ("linear:0->1@40", {0: 0.0, 10: 0.25, 40: 1.0, 41: 1.0}),
        ("linear:0->1@0.2", {0: 0.0, 10: 0.5, 20: 1.0, 99: 1.0}),
        ("cosine:1e-3->-1e-3@1.0", {0: 1e-3, 50: 0.0, 100: -1e-3}),
        (" linear : 1 -> 3 @ 1 ", {0: 1.0, 1: 3.0}),
        ("0.7", {0: 0.7, 55: 0.7}),
        (0.7, {0: 0.7, 55: 0.7}),
        (3, {0: 3, 55: 3}),
    ],
)
def test_values_are_the_closed_forms(text, values):
    schedule = parse_schedule(text, "relaxation_temperature")
    assert {step: schedule.at(step, 100) for step in values} == pytest.approx(values, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize(("first", "last"), [(0.3, 0.1), (0.1, 0.3), (0.2, 0.9), (1e-7, 1e3)])
def test_ends_are_exact_and_nothing_leaves_them(shape, first, last):
    schedule = parse_schedule(f"{shape}:{first}->{last}@0.7", "beta")
    values = [schedule.at(step, 333) for step in range(334)]
    assert (values[0], values[-1]) == schedule.ends() == (first, last)  # not approximately
    assert values == sorted(values, reverse=first > last)
    assert len(set(values)) > 200
    assert schedule.at(234, 333) == last  # 0.7 of 333 is 233.1
    assert schedule.at(233, 333) != last


def test_whole_numbers_stay_whole():
    schedule = parse_schedule("exponential:64->8", "top_k", is_integer=True)
    values = [schedule.at(step, 30) for step in range(31)]
    assert all(type(value) is int for value in values)
    assert values[:3] == [64, round(64 * 8 ** (-1 / 30)), round(64 * 8 ** (-2 / 30))]
    assert values[10] == 32
    assert values[-1] == 8
    assert type(parse_schedule(64, "top_k", is_integer=True).at(3, 5)) is int
    assert parse_schedule("linear:2->1", "relaxation_temperature").at(1, 4) == 1.75  # integers only where asked for


def test_only_a_fraction_needs_the_length_of_the_run():
    assert parse_schedule("linear:2.0->1.0@4", "beta").at(2, -1) == 1.5
    assert parse_schedule(0.5, "beta").at(2, -1) == 0.5
    assert parse_schedule("linear:2.0->1.0", "beta").at(0, 0) == 2.0
    assert parse_schedule("linear:2.0->2.0", "beta").is_constant
    with pytest.raises(ValueError, match=r"max_steps must be at least 1 .* got -1; .*\"@200\""):
        parse_schedule("linear:2.0->1.0", "beta").at(1, -1)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        Schedule(1.0, 2.0).at(-1, 10)


@pytest.mark.parametrize(
    ("value", "is_integer", "message"),
    [
        ("linear:2.0", False, "it does not follow the grammar"),
        ("linear:2.0->0.5@", False, "it does not follow the grammar"),
        ("2.0->0.5", False, "it does not follow the grammar"),
        ("linear:nan->0.5", False, "it does not follow the grammar"),
        ("", False, "it does not follow the grammar"),
        (float("nan"), False, "both ends must be finite, got nan and nan"),
        ("linear:1e999->1", False, "both ends must be finite, got inf and 1"),
        ("cubic:2.0->0.5", False, r"shape must be one of \('linear', 'cosine', 'exponential'\), got 'cubic'"),
        ("exponential:2.0->0.0", False, r"needs two positive ends, got 2\.0 and 0\.0"),
        ("linear:2.0->0.5@0", False, "a span in steps must be at least 1, got 0"),
        ("linear:2.0->0.5@-3", False, "a span in steps must be at least 1, got -3"),
        ("linear:2.0->0.5@1.5", False, r"must lie in \(0, 1\], got 1\.5; steps have no decimal point"),
        ("linear:8->2.5", True, r"both ends must be integers, got 8 and 2\.5"),
        (2.5, True, r"both ends must be integers, got 2\.5 and 2\.5"),
    ],
)
def test_errors_name_the_argument_and_show_the_grammar(value, is_integer, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_schedule(value, "top_k", is_integer)
    assert str(caught.value).startswith(f"top_k={value!r}: ")
    assert '"linear:2.0->0.5"' in str(caught.value)


def test_controller_takes_the_paper_s_steps():
    controller = AdaptiveKL(0.2, target_nats_per_token=0.5, horizon=10)
    assert controller.update(0.55) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert controller.update(5.0) == pytest.approx(0.202 * (1 + 0.1 * 0.2))  # clipped above
    assert controller.update(0.0) == pytest.approx(0.202 * 1.02 * (1 - 0.1 * 0.2))  # and below
    before = controller.weight
    assert controller.update(0.5) == before


@pytest.mark.parametrize("init", [1e-3, 0.1, 10.0])
def test_controller_brings_a_plant_to_its_target(init):
    """KL follows c / β with a lag: in equilibrium β = c / target."""
    controller, kl = AdaptiveKL(init, target_nats_per_token=0.1, horizon=5), 0.0
    for _ in range(600):
        kl += 0.3 * (0.004 / controller.weight - kl)
        controller.update(kl)
    assert kl == pytest.approx(0.1, rel=1e-3)
    assert controller.weight == pytest.approx(0.04, rel=1e-3)


def test_a_resumed_controller_goes_on():
    measured = [0.3, 0.05, 0.11, 0.4, 0.02, 0.1]
    whole, first = AdaptiveKL(0.1, 0.1), AdaptiveKL(0.1, 0.1)
    weights = [whole.update(kl) for kl in measured]
    for kl in measured[:3]:
        first.update(kl)
    second = AdaptiveKL(9.0, 0.1)
    second.load_state_dict(first.state_dict())
    assert [second.update(kl) for kl in measured[3:]] == weights[3:]


def test_controller_refuses_what_it_cannot_control():
    for arguments, message in (
        ((0.0, 0.1), r"init must be positive and finite, got 0\.0"),
        ((0.1, 0.0), r"target_nats_per_token must be positive and finite, got 0\.0"),
        ((0.1, 0.1, 0.5), r"horizon must be at least 1 step, got 0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveKL(*arguments)
    controller = AdaptiveKL(0.1, 0.1)
    with pytest.raises(ValueError, match="kl must be finite, got nan"):
        controller.update(float("nan"))
    assert controller.weight == 0.1
    for state in ({}, {"weight": 0.0}, {"weight": 0.1, "step": 3}):
        with pytest.raises(ValueError, match="as `state_dict` gives it"):
            controller.load_state_dict(state)


def test_a_value_by_epoch_changes_at_its_epoch_and_the_last_one_stays():
    schedule = parse_epoch_schedule("epochs: 1.0, 0.7, 0.3", "guidance_alpha")
    assert schedule.ends() == (1.0, 0.3)
    assert not schedule.is_constant
    found = [schedule.at(epoch) for epoch in (0.0, 0.5, 1.0 - 1e-9, 1.0, 1.99, 2.0, 7.5)]
    assert found == [1.0, 1.0, 0.7, 0.7, 0.7, 0.3, 0.3]
    assert parse_epoch_schedule("linear:1.0->0.0", "guidance_alpha") == parse_schedule("linear:1.0->0.0", "x")
    assert parse_epoch_schedule("epochs:0.5", "guidance_alpha").is_constant


@pytest.mark.parametrize("text", ["epochs:", "epochs:1.0,x", "epochs:1.0,0.2,0.5", "epochs:nan"])
def test_impossible_values_by_epoch_are_named_with_the_grammar(text):
    with pytest.raises(ValueError, match=r"guidance_alpha='epochs:.*Expected .*a value an epoch"):
        parse_epoch_schedule(text, "guidance_alpha")
