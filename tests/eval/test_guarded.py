"""The safety guard in the loop: every intervention reaches results and recording, and a broken policy ends by name."""

import json
import math
import re

import numpy as np
import pytest
from rerun.chunk import RrdReader

from envs.calvin import CalvinEnv
from envs.calvin.expert.policy import ExpertPolicy
from eval.chain import run_chain
from eval.protocol import load_instructions
from eval.rollout import RolloutConfig, main
from eval.sequences import long_horizon_sequences
from policies.safety import SafetyOptions
from policies.simple import RandomPolicy, ZeroPolicy

INSTRUCTIONS, CHAIN = load_instructions(), long_horizon_sequences(1)[0]
GUARD = SafetyOptions(enabled=True)


@pytest.fixture(scope="module")
def env():
    env = CalvinEnv(observe="on_demand")
    yield env
    env.close()


def run(env, policy, **options):
    return run_chain(env, policy, 0, CHAIN, INSTRUCTIONS, **{"max_steps": 60, "seed": 0, "safety": GUARD} | options)


class Says(ZeroPolicy):
    """Answers the same thing for ever."""

    def __init__(self, answer):
        self.answer = answer

    def infer(self, observation):
        return self.answer


def test_every_intervention_is_in_results_and_recording(tmp_path):
    main(RolloutConfig(policy="random", tasks=("turn_on_led",), max_steps=30, safety=GUARD, output_dir=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    events = results["chains"][0]["safety"]
    assert results["safety"]["acceleration"] == sum(event["kind"] == "acceleration" for event in events) > 5
    assert events[0].keys() == {"kind", "dimension", "asked", "given", "step", "time_s", "detail"}
    assert any(deviation.startswith("variant safety: every action passes a guard") for deviation in results["deviations"])
    logged = []
    for chunk in RrdReader(str(tmp_path / "recording.rrd")).stream():
        if chunk.entity_path == "/events":
            table = chunk.to_record_batch()
            (name,) = [name for name in table.schema.names if name.endswith("TextLog:text")]
            logged += zip(table["step"].to_pylist(), [text[0] for text in table[name].to_pylist()], strict=True)
    logged = [(step, text) for step, text in logged if text.startswith("safety: ")]
    assert sorted(step for step, _ in logged) == [event["step"] for event in events]
    first = events[0]
    said = f"safety: {first['kind']}: {first['dimension']} asked {first['asked']:+.3f}, given {first['given']:+.3f}"
    assert (first["step"], said) in logged


def test_the_expert_solves_with_the_guard_and_is_told_what_was_changed(env):
    result = run(env, ExpertPolicy(), max_steps=360)
    assert (result.num_solved, result.error) == (5, None)
    assert len(result.safety) > 50, "it starts and stops at once, which the limits on acceleration do not let it"


def test_without_the_guard_nothing_is_added(env):
    result = run(env, RandomPolicy(), safety=None)
    assert result.safety == [] and result.acting == {}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"actions": np.full((2, 7), math.nan)}, "NaN or infinite"),
        ({"actions": np.zeros((1, 6))}, r"shape \(6,\), expected \(7,\)"),
        ({"action": np.zeros((1, 7))}, "'no actions' has dtype"),
        ("nothing", "'no actions' has dtype"),
        ({"actions": [["a"] * 7]}, "'no actions' has dtype"),
        ({"actions": [[0] * 7, [0]]}, "'no actions' has dtype"),
    ],
)
def test_a_broken_policy_is_stopped_by_name(env, answer, message):
    result = run(env, Says(answer))
    assert result.error["type"] == "SafetyStopped"
    assert [event["kind"] for event in result.safety] == ["invalid", "stop"]
    assert re.search(message, result.error["message"])


def test_huge_actions_are_clamped_where_they_would_be_refused(env):
    command = np.r_[[1e300] * 6, 1.0]
    assert run(env, Says({"actions": command[None]}), safety=None).error["type"] == "InvalidAction"
    result = run(env, Says({"actions": command[None]}))
    assert result.error is None and result.steps == 60
    low, high = np.array(GUARD.workspace_m).T + np.array([[GUARD.margin_m], [-GUARD.margin_m]])
    target = env.simulation.target_position
    assert (target >= low - 1e-9).all() and (target <= high + 1e-9).all()
