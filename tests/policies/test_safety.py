"""The guard: whatever a policy says, the arm stays within its limits; what was changed is told."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.safety import DIMENSIONS, PERIOD_S, UNIT, OutsideLimits, SafetyGuard, SafetyOptions, SafetyStopped

START = np.r_[0.0, -0.1, 0.5, np.pi, 0, 0, 0.08, np.zeros(7), 1.0]
STILL = np.r_[np.zeros(6), 1.0]


def guarded(**options) -> SafetyGuard:
    guard = SafetyGuard(SafetyOptions(enabled=True, **options))
    guard.reset(START)
    return guard


def kinds(events) -> list[tuple[str, str]]:
    return [(event.kind, event.dimension) for event in events]


numbers = st.one_of(
    st.floats(-1, 1),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, math.nan, math.inf]),
)
well_formed = st.lists(st.floats(-1, 1), min_size=7, max_size=7)
hostile = st.one_of(
    st.lists(numbers, min_size=7, max_size=7),
    st.lists(numbers, max_size=9),
    st.none(),
    st.text(max_size=3),
    st.lists(st.lists(numbers, max_size=2), max_size=2),
    st.builds(dict),
)
ages = st.one_of(st.just(0.0), st.floats(allow_nan=True, allow_infinity=True))
# Long runs of one command reach the walls at full speed, which single draws would not.
stretches = st.lists(st.tuples(st.one_of(well_formed, hostile), ages, st.integers(1, 40)), max_size=12)
limits = st.builds(
    SafetyOptions,
    enabled=st.just(True),
    workspace_m=st.tuples(*[st.tuples(st.floats(0.001, 0.5), st.floats(0.001, 0.5)).map(lambda size, at=at: (at - size[0], at + size[1]))
                            for at in START[:3].tolist()]),
    margin_m=st.floats(0, 0.0009),
    rotation_rad=st.tuples(*[st.floats(0.01, 3)] * 3),
    velocity_m_s=st.tuples(*[st.floats(0.01, 2)] * 3),
    acceleration_m_s2=st.tuples(*[st.floats(0.1, 60)] * 3),
    acceleration_rad_s2=st.tuples(*[st.floats(0.1, 100)] * 3),
    gripper_steps=st.integers(1, 5),
    on_invalid=st.sampled_from(["hold", "stop"]),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(limits, stretches)
def test_no_sequence_of_commands_exceeds_a_limit(options, commands):
    guard = SafetyGuard(options)
    guard.reset(START)
    low = np.r_[[axis[0] + options.margin_m for axis in options.workspace_m], np.negative(options.rotation_rad)]
    high = np.r_[[axis[1] - options.margin_m for axis in options.workspace_m], options.rotation_rad]
    fastest = np.r_[options.velocity_m_s, options.velocity_rad_s]
    hardest = np.r_[options.acceleration_m_s2, options.acceleration_rad_s2]
    pose, velocity = np.r_[START[:3], np.zeros(3)], np.zeros(6)
    for command, age, times in commands:
        for _ in range(times):
            try:
                action, events = guard.filter(command, age_s=age)
            except SafetyStopped:
                np.testing.assert_allclose(velocity, 0, atol=1e-8)
                return
            assert action.shape == (7,) and np.isfinite(action).all() and np.abs(action).max() <= 1 and action[6] in (-1, 1)
            moved = action[:6] * UNIT
            pose, before, velocity = pose + moved, velocity, moved / PERIOD_S
            assert (pose >= low - 1e-9).all() and (pose <= high + 1e-9).all()
            assert (np.abs(velocity) <= fastest + 1e-9).all()
            assert (np.abs(velocity - before) <= hardest * PERIOD_S + 1e-7).all()
            json.dumps([event.to_json() for event in events], allow_nan=False)
            changed = command is None or not np.array_equal(np.asarray(command, object), action.astype(object))
            assert changed or not events


def test_what_is_within_the_limits_passes_bit_by_bit_and_is_no_event():
    guard, random = guarded(acceleration_m_s2=(40.0,) * 3, acceleration_rad_s2=(100.0,) * 3), np.random.default_rng(0)
    for _ in range(50):
        asked = np.r_[random.uniform(-1, 1, 6) * 0.3, 1.0]
        action, events = guard.filter(asked)
        np.testing.assert_allclose(action, asked, rtol=0, atol=1e-12)
        assert events == []


def test_every_clamp_says_what_was_asked_and_given():
    guard = guarded(velocity_m_s=(0.3, 0.6, 0.6), acceleration_m_s2=(40.0, 4.5, 40.0))
    action, events = guard.filter([1, 1, 0, 0, 0, 0, 1])
    np.testing.assert_allclose(action[:2], [0.5, 0.25])
    assert kinds(events) == [("velocity", "x"), ("acceleration", "y")]
    assert (events[0].asked, events[0].given, events[0].step) == (1.0, pytest.approx(0.5), 0)
    assert str(events[0]) == "safety: velocity: x asked +1.000, given +0.500"


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dim", range(6))
def test_at_full_speed_into_a_wall_the_arm_brakes_and_stands_at_it(dim, sign):
    guard, command = guarded(), np.r_[np.zeros(6), 1.0]
    command[dim] = sign
    seen = set()
    for _ in range(120):
        seen |= {event.kind for event in guard.filter(command)[1]}
    wall = guard.high[dim] if sign > 0 else guard.low[dim]
    assert guard.pose[dim] == pytest.approx(wall, abs=1e-6)
    assert ("workspace" if dim < 3 else "rotation") in seen
    back, events = guard.filter(-command * np.r_[np.ones(6), -1])
    assert back[dim] * sign < 0, "one can always leave again"


def test_a_broken_command_brakes_and_ends_the_run_by_name():
    guard = guarded(acceleration_m_s2=(9.0,) * 3)
    for _ in range(5):
        guard.filter([1, 0, 0, 0, 0, 0, 1])
    action, events = guard.filter([math.nan] * 7)
    assert kinds(events) == [("invalid", ""), ("stop", "")]
    assert 0 < action[0] < 1, "braking within the limit, not at once"
    assert 0 <= guard.filter([1, 0, 0, 0, 0, 0, 1])[0][0] < action[0]
    with pytest.raises(SafetyStopped, match="the arm was stopped: action has a NaN or infinite entry"):
        guard.filter(STILL)
    guard.reset(START)
    assert guard.filter(STILL)[1] == []


def test_hold_waits_for_the_next_good_command_but_not_for_ever():
    guard = guarded(on_invalid="hold", watchdog_s=0.2)
    assert kinds(guard.filter("nonsense")[1]) == [("invalid", "")]
    assert guard.filter(STILL)[1] == []
    for _ in range(5):
        assert kinds(guard.filter(None)[1]) == [("missing", "")]
    assert kinds(guard.filter(None)[1]) == [("missing", ""), ("stop", "")]
    with pytest.raises(SafetyStopped, match=r"no usable command for 0\.20 s, last: no command came in time"):
        guard.filter(STILL)


def test_commands_decided_on_old_observations_are_not_carried_out():
    guard = guarded(stale_s=0.5)
    assert guard.filter([0.2, 0, 0, 0, 0, 0, 1], age_s=0.5)[0][0] == pytest.approx(0.2)
    action, events = guard.filter([0.2, 0, 0, 0, 0, 0, 1], age_s=0.6)
    assert action[0] == 0 and kinds(events) == [("stale", "")]
    assert kinds(guard.filter(STILL, age_s=math.nan)[1]) == [("stale", "")]


def test_the_gripper_follows_a_repeated_command_only():
    guard = guarded(gripper_steps=3)
    close = np.r_[np.zeros(6), -1.0]
    chatter = [guard.filter(close if step % 2 else STILL)[0][6] for step in range(19)]
    assert set(chatter) == {1.0}
    results = [guard.filter(close) for _ in range(4)]
    assert [action[6] for action, _ in results] == [1, 1, -1, -1]
    assert [kinds(events) for _, events in results] == [[("gripper", "gripper")]] * 2 + [[]] * 2
    assert kinds(guard.filter([0, 0, 0, 0, 0, 0, 0.3])[1]) == [("gripper", "gripper")], "a half-open gripper is no command"


def test_an_arm_outside_its_box_is_refused():
    with pytest.raises(OutsideLimits, match=r"the arm stands at z = 0\.5000 m, outside the workspace \[0\.6, 0\.9\]"):
        guarded(workspace_m=((-1, 1), (-1, 1), (0.6, 0.9)))
    at_the_edge = guarded(workspace_m=((-1, 1), (-1, 1), (0.499, 0.9)))  # within the margin: it may come in, and go no further out
    assert at_the_edge.filter([0, 0, -1, 0, 0, 0, 1])[0][2] == 0 < at_the_edge.filter([0, 0, 1, 0, 0, 0, 1])[0][2]
    with pytest.raises(RuntimeError, match="before reset"):
        SafetyGuard(SafetyOptions()).filter(STILL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace_m": ((0, 0), (0, 1), (0, 1))}, "safety.workspace_m of x is"),
        ({"margin_m": 0.3}, r"safety.margin_m=0.3, expected at least 0 and less than half of workspace_m along z"),
        ({"velocity_m_s": (1.0, 0.0, 1.0)}, "safety.velocity_m_s"),
        ({"acceleration_m_s2": (1.0, math.nan, 1.0)}, "safety.acceleration_m_s2"),
        ({"stale_s": 0.0}, "safety.stale_s=0.0"),
        ({"gripper_steps": 0}, "safety.gripper_steps=0"),
        ({"on_invalid": "ignore"}, "safety.on_invalid=ignore is not one of hold, stop"),
    ],
)
def test_wrong_limits_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SafetyOptions(**options)


def test_dimensions_are_those_of_the_action():
    assert len(DIMENSIONS) == 7 and not SafetyOptions().described() and "guard" in SafetyOptions(enabled=True).described()["safety"]
