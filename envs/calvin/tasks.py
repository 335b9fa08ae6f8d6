"""The 34 CALVIN tasks and the oracle that says which of them happened between two moments.

A task is a change between two infos of `CalvinEnv` (calvin_env's layout). Contacts are PyBullet's contact points, of which only the
other body (entry 2) and the other link (entry 4) are read.

Source: calvin_env `envs/tasks.py` and `conf/tasks/new_playtable_tasks.yaml`, semantics kept, quirks included.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from envs.calvin.scenes import DRAWER, LED, LIGHTBULB, SLIDE

COLORS = ("red", "blue", "pink")
TABLE_TOP, SHELF, DRAWER_FLOOR = "base_link", "plank_link", "drawer_link"

ROTATE_DEG, ROTATE_MAX_TILT_DEG, ROTATE_MAX_MOTION_M = 60, 30, 0.1
PUSH_M = 0.1
SLIDE_M, DRAWER_M = 0.15, 0.12
LIFT_M = {TABLE_TOP: 0.05, SHELF: 0.03, DRAWER_FLOOR: 0.05}
STACK_MAX_SPEED = 1.0


def completed_tasks(start_info: dict, end_info: dict, among: Iterable[str] | None = None) -> set[str]:
    """The tasks that were accomplished between `start_info` and `end_info`.

    Both are what `CalvinEnv` returns as info: {"robot_info": …, "scene_info": …}. among: judge these tasks alone (faster).
    Raises ValueError for a task that CALVIN does not have, or an info without those parts.
    """
    for name, info in (("start_info", start_info), ("end_info", end_info)):
        if "scene_info" not in info or "robot_info" not in info:
            raise ValueError(f"{name} has keys {sorted(info)}, expected robot_info and scene_info as CalvinEnv returns them")
    names = TASKS if among is None else [check_task(name) for name in among]
    return {name for name in names if _ORACLE[name](start_info, end_info)}


def check_task(name: str) -> str:
    """`name`, or ValueError naming the nearest of the 34 tasks."""
    if name not in _ORACLE:
        close = difflib.get_close_matches(str(name), TASKS, n=1)
        raise ValueError(f"unknown task {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(TASKS)}"))
    return name


def _block(info: dict, name: str) -> dict:
    return info["scene_info"]["movable_objects"][name]


def _robot(info: dict) -> int:
    return info["robot_info"]["uid"]


def _bodies(contacts) -> set[int]:
    return {contact[2] for contact in contacts}


def _links(contacts) -> set[tuple[int, int]]:
    return {(contact[2], contact[4]) for contact in contacts}


def _table_link(info: dict, link: str) -> tuple[int, int]:
    table = info["scene_info"]["fixed_objects"]["table"]
    return table["uid"], table["links"][link]


def _moved(start: dict, end: dict, name: str) -> np.ndarray:
    return np.array(_block(end, name)["current_pos"]) - np.array(_block(start, name)["current_pos"])


def _rotated(name: str, sign: int, start: dict, end: dict) -> bool:
    if np.linalg.norm(_moved(start, end, name)) > ROTATE_MAX_MOTION_M:
        return False
    if not _bodies(_block(end, name)["contacts"]) - {_robot(start)}:
        return False
    x, y, z = _turn_deg(_block(start, name)["current_orn"], _block(end, name)["current_orn"])
    return ROTATE_DEG < sign * z < 180 and abs(x) < ROTATE_MAX_TILT_DEG and abs(y) < ROTATE_MAX_TILT_DEG


def _turn_deg(start: Sequence[float], end: Sequence[float]) -> tuple[float, float, float]:
    """Angles about the world's x, y and z axes, in that order, of the turn from one quaternion (x, y, z, w) to another."""
    ax, ay, az, aw = (-start[0], -start[1], -start[2], start[3])
    bx, by, bz, bw = end
    x = bw * ax + bx * aw + by * az - bz * ay
    y = bw * ay - bx * az + by * aw + bz * ax
    z = bw * az + bx * ay - by * ax + bz * aw
    w = bw * aw - bx * ax - by * ay - bz * az
    about_x = math.atan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    about_y = math.asin(max(-1.0, min(1.0, 2 * (w * y - z * x))))
    about_z = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return math.degrees(about_x), math.degrees(about_y), math.degrees(about_z)


def _pushed(name: str, sign: int, start: dict, end: dict) -> bool:
    def others(info: dict) -> set[tuple[int, int]]:
        return {link for link in _links(_block(info, name)["contacts"]) if link[0] != _robot(start)}

    before, after = others(start), others(end)
    return bool(before) and bool(after) and before <= after and sign * _moved(start, end, name)[0] > PUSH_M


def _lifted(name: str, link: str, start: dict, end: dict) -> bool:
    return (
        _moved(start, end, name)[2] > LIFT_M[link]
        and _bodies(_block(end, name)["contacts"]) == {_robot(start)}
        and _table_link(start, link) in _links(_block(start, name)["contacts"])
    )


def _placed(link: str, start: dict, end: dict) -> bool:
    held = _bodies(start["robot_info"]["contacts"])
    names = [name for name, block in start["scene_info"]["movable_objects"].items() if held == {block["uid"]}]
    if not names or held & _bodies(end["robot_info"]["contacts"]):
        return False
    only_robot = _bodies(_block(start, names[0])["contacts"]) == {_robot(start)}
    return only_robot and _table_link(end, link) in _links(_block(end, names[0])["contacts"])


def _pushed_into_drawer(start: dict, end: dict) -> bool:
    # calvin_env also means to ask that the robot does not touch the block, but compares unlike types, so it never does.
    return any(
        _links(_block(start, name)["contacts"]) == {_table_link(start, TABLE_TOP)}
        and _table_link(end, DRAWER_FLOOR) in _links(_block(end, name)["contacts"])
        for name in start["scene_info"]["movable_objects"]
    )


def _door_moved(joint: str, by_m: float, start: dict, end: dict) -> bool:
    moved = end["scene_info"]["doors"][joint]["current_state"] - start["scene_info"]["doors"][joint]["current_state"]
    return moved > by_m if by_m > 0 else moved < by_m


def _light_switched(light: str, to: int, start: dict, end: dict) -> bool:
    states = [info["scene_info"]["lights"][light]["logical_state"] for info in (start, end)]
    return states == [1 - to, to]


def _blocks_touching(info: dict, name: str) -> tuple[set[int], set[int]]:
    """(blocks, other bodies) in contact with a block."""
    blocks = {block["uid"] for block in info["scene_info"]["movable_objects"].values()}
    contacts = _bodies(_block(info, name)["contacts"])
    return contacts & blocks, contacts - blocks


def _at_rest(info: dict, name: str) -> bool:
    block = _block(info, name)
    return bool(np.all(np.abs([*block["current_lin_vel"], *block["current_ang_vel"]]) < STACK_MAX_SPEED))


def _stacked(start: dict, end: dict) -> bool:
    for name in start["scene_info"]["movable_objects"]:
        blocks, others = _blocks_touching(end, name)
        if not _blocks_touching(start, name)[0] and blocks and not others and _at_rest(end, name):
            return True
    return False


def _unstacked(start: dict, end: dict) -> bool:
    for name in start["scene_info"]["movable_objects"]:
        blocks, others = _blocks_touching(start, name)
        if blocks and not others and not _blocks_touching(end, name)[0] and _at_rest(start, name):
            return True
    return False


def _build_oracle() -> dict[str, Callable[[dict, dict], bool]]:
    oracle: dict[str, Callable[[dict, dict], bool]] = {}
    for color in COLORS:
        oracle[f"rotate_{color}_block_right"] = partial(_rotated, f"block_{color}", -1)
        oracle[f"rotate_{color}_block_left"] = partial(_rotated, f"block_{color}", 1)
    for color in COLORS:
        oracle[f"push_{color}_block_right"] = partial(_pushed, f"block_{color}", 1)
        oracle[f"push_{color}_block_left"] = partial(_pushed, f"block_{color}", -1)
    oracle["move_slider_left"] = partial(_door_moved, SLIDE, SLIDE_M)
    oracle["move_slider_right"] = partial(_door_moved, SLIDE, -SLIDE_M)
    oracle["open_drawer"] = partial(_door_moved, DRAWER, DRAWER_M)
    oracle["close_drawer"] = partial(_door_moved, DRAWER, -DRAWER_M)
    for color in COLORS:
        for place, link in (("table", TABLE_TOP), ("slider", SHELF), ("drawer", DRAWER_FLOOR)):
            oracle[f"lift_{color}_block_{place}"] = partial(_lifted, f"block_{color}", link)
    oracle["place_in_slider"] = partial(_placed, SHELF)
    oracle["place_in_drawer"] = partial(_placed, DRAWER_FLOOR)
    oracle["stack_block"] = _stacked
    oracle["unstack_block"] = _unstacked
    for light, name in ((LIGHTBULB, "lightbulb"), (LED, "led")):
        oracle[f"turn_on_{name}"] = partial(_light_switched, light, 1)
        oracle[f"turn_off_{name}"] = partial(_light_switched, light, 0)
    oracle["push_into_drawer"] = _pushed_into_drawer
    return oracle


_ORACLE = _build_oracle()
TASKS: tuple[str, ...] = tuple(_ORACLE)
"""The 34 tasks in CALVIN's order."""
