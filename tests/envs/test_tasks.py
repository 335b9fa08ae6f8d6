"""The oracle against recorded decisions of calvin_env's own."""

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from envs.calvin.tasks import TASKS, _turn_deg, completed_tasks


def _info(state: dict, bodies: dict[str, int], links: dict[str, int]) -> dict:
    """A recorded state in the layout of CalvinEnv's info. Contacts were recorded as (body, link) names, the robot's as body names."""

    def contacts(pairs):
        return [(0, 0, bodies[body], 0, links.get(link, link) if body == "table" else link) for body, link in pairs]

    blocks = {
        name: {
            "uid": bodies[name],
            "current_pos": block["pos"],
            "current_orn": block["quat_xyzw"],
            "current_lin_vel": block["lin_vel"],
            "current_ang_vel": block["ang_vel"],
            "contacts": contacts(block["contacts"]),
        }
        for name, block in state["blocks"].items()
    }
    return {
        "robot_info": {"uid": bodies["robot"], "contacts": [(0, 0, bodies[body]) for body in state["robot_contacts"]]},
        "scene_info": {
            "movable_objects": blocks,
            "fixed_objects": {"table": {"uid": bodies["table"], "links": links}},
            "doors": {name: {"current_state": value} for name, value in state["doors"].items()},
            "lights": {name: {"logical_state": value} for name, value in state["lights"].items()},
        },
    }


def test_every_recorded_case_is_judged_as_calvin_env_did(reference):
    recorded = json.loads((reference / "calvin/oracle_cases.json").read_text())
    names = ["robot", "pedestal", "block_red", "block_blue", "block_pink", "table", "plane"]
    bodies = {name: uid for uid, name in enumerate(names)}
    table_links = recorded["links_table"]
    links = {name: index for index, name in enumerate(table_links) if "base_link" not in name} | {"base_link": -1}
    wrong = [
        index
        for index, case in enumerate(recorded["cases"])
        if completed_tasks(_info(case["start"], bodies, links), _info(case["end"], bodies, links)) != set(case["tasks"])
    ]
    assert len(recorded["cases"]) > 300
    assert not wrong


def test_tasks_are_calvins_in_its_order(reference):
    assert list(TASKS) == json.loads((reference / "calvin/tasks.json").read_text())["order"]


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'open_drawer'"):
        completed_tasks({"robot_info": {}, "scene_info": {}}, {"robot_info": {}, "scene_info": {}}, among=["open_draw"])


def test_info_without_its_parts_is_refused():
    with pytest.raises(ValueError, match="end_info has keys"):
        completed_tasks({"robot_info": {}, "scene_info": {}}, {"scene_info": {}})


def test_turns_are_scipys_euler_angles():
    starts, ends = Rotation.random(500, random_state=0), Rotation.random(500, random_state=1)
    expected = (ends * starts.inv()).as_euler("xyz", degrees=True)
    turns = np.array([_turn_deg(*pair) for pair in zip(starts.as_quat(), ends.as_quat(), strict=True)])
    assert np.abs((turns - expected + 180) % 360 - 180).max() < 1e-9
