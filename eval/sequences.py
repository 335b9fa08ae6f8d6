"""CALVIN's long-horizon chains: which 1000 chains of five subtasks are run, and in which state each begins.

The chains are a function of three things that this file states: what each task needs and changes symbolically, the order in which task
names are drawn, and numpy's legacy generator seeded as the benchmark seeds it.

Source: CALVIN (arXiv 2112.03227), mees/calvin calvin_models/calvin_agent/evaluation/{multistep_sequences,utils}.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from envs.calvin.layout import Layout, layout_of
from envs.spec import OBSERVATION, ROBOT_OBS, SCENE_OBS
from eval.official_chains import CODES

CHAIN_LENGTH = 5
OFFICIAL_CHAINS = 1000
COLOURS = ("red", "blue", "pink")
SHUFFLE_SEED = 0

Condition = dict[str, Any]
Chain = tuple[Condition, tuple[str, ...]]
_Rule = tuple[Condition, Condition]  # what must hold, what then changes

# The benchmark draws names from this order, so it is part of the chains' definition.
_ORDER = (
    *(f"{verb}_{colour}_block_{side}" for verb in ("rotate", "push") for colour in COLOURS for side in ("right", "left")),
    "move_slider_left",
    "move_slider_right",
    "open_drawer",
    "close_drawer",
    *(f"lift_{colour}_block_{place}" for colour in COLOURS for place in ("table", "slider", "drawer")),
    "place_in_slider",
    "place_in_drawer",
    "stack_block",
    "unstack_block",
    "turn_on_lightbulb",
    "turn_off_lightbulb",
    "turn_on_led",
    "turn_off_led",
    "push_into_drawer",
)

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWX"

# A chain holds at most one task of each kind.
_KINDS = {
    "rotate_": "touch block",
    "push_into_drawer": "push into drawer",
    "push_": "touch block",
    "move_slider": "slider",
    "open_drawer": "drawer",
    "close_drawer": "drawer",
    "place_in": "place",
    "turn_": "light",
    "stack_block": "stack",
    "unstack_block": "unstack",
}

_POSSIBLE = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    "red_block": ("table", "slider_right", "slider_left"),
    "blue_block": ("table", "slider_right", "slider_left"),
    "pink_block": ("table", "slider_right", "slider_left"),
    "grasped": (0,),
}

# CALVIN's neutral pose: see envs.spec for the layout.
_NEUTRAL_ROBOT_OBS = (
    *(0.02586889, -0.2313129, 0.5712808),
    *(3.09045411, -0.02908596, 1.50013585),
    0.07999963,
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),
    1.0,
)
_DRAWER_OPEN_M = 0.22
_SWITCH_ON_M = 0.088
_BLOCK_IN_SLIDER_M = {
    "slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
    "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01),
}
_BLOCK_ON_TABLE_M = (
    (5.00000896e-02, -1.20000177e-01, 4.59990009e-01),
    (2.29995412e-01, -1.19995140e-01, 4.59990010e-01),
)
_YAW_RANGE_RAD = (np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
_SPOTS_APART_M = 0.18
# scene_obs: three blocks from entry 6, six numbers each (position, Euler), in the scene's order.
BLOCKS_AT = 6


def long_horizon_sequences(n: int = OFFICIAL_CHAINS) -> list[Chain]:
    """The first `n` of the 1000 official chains, in the official order: (initial condition, five task names) each.

    Read from the table in eval.official_chains, which `derive_sequences` reproduces. No global random state is touched.
    Raises ValueError unless 1 <= n <= 1000.
    """
    if not 1 <= n <= OFFICIAL_CHAINS:
        raise ValueError(f"number of chains is {n}; the protocol has {OFFICIAL_CHAINS}, so give 1 to {OFFICIAL_CHAINS}")
    conditions = list(initial_conditions())
    return [_decode(code, conditions) for code in CODES.split()[:n]]


def derive_sequences(n: int = OFFICIAL_CHAINS) -> list[Chain]:
    """Draw `n` chains as the benchmark does: half a minute for 1000, since only one draw in about seven thousand is a valid chain.

    n = 1000 gives the official chains; another n gives the chains that CALVIN's code would make for it, which are no part of the 1000.
    """
    conditions = list(initial_conditions())
    chains: list[Chain] = []
    for index, share in enumerate(np.array_split(np.arange(n), len(conditions))):
        chains += [(dict(conditions[index]), chain) for chain in _draw_chains(conditions[index], len(share), seed=index)]
    # A private generator's shuffle draws exactly as numpy's global one does.
    np.random.RandomState(SHUFFLE_SEED).shuffle(chains)
    return chains


def encode_chain(chain: Chain, conditions: list[Condition]) -> str:
    """Seven characters: the condition's number in hexadecimal (2), then a digit of base 34 per task."""
    condition, tasks = chain
    return f"{conditions.index(condition):02x}" + "".join(_DIGITS[_ORDER.index(task)] for task in tasks)


def _decode(code: str, conditions: list[Condition]) -> Chain:
    return dict(conditions[int(code[:2], 16)]), tuple(_ORDER[_DIGITS.index(digit)] for digit in code[2:])


def initial_conditions() -> Iterator[Condition]:
    """The 192 symbolic states a chain may begin in: one or two blocks on the table, at most one in each half of the cabinet."""
    for values in product(*_POSSIBLE.values()):
        if values.count("table") in (1, 2) and values.count("slider_right") < 2 and values.count("slider_left") < 2:
            yield dict(zip(_POSSIBLE, values, strict=True))


def initial_state(condition: Condition, scene: str = "D") -> tuple[np.ndarray, np.ndarray]:
    """The simulator state that a chain with `condition` begins in.

    Returns robot_obs float64 (15,) and scene_obs float64 (24,), laid out as envs.spec says; the arm is in CALVIN's neutral pose. The
    blocks' yaw and which table spot each takes are drawn from a generator seeded by the condition alone. CALVIN defines these states for
    scene D; those of A, B and C are ours, drawn alike, on spots that lie to their fixtures as D's spots do to D's.
    Raises ValueError for another scene.
    """
    layout = layout_of(scene)
    random = np.random.RandomState(initial_state_seed(condition))
    spots = [np.array(spot) for spot in (_BLOCK_ON_TABLE_M if scene == "D" else _table_spots(layout))]
    random.shuffle(spots)
    scene_obs = np.zeros(OBSERVATION[SCENE_OBS].shape)
    scene_obs[0] = layout.slide_limit * (condition["slider"] == "left")
    scene_obs[1] = _DRAWER_OPEN_M * (condition["drawer"] == "open")
    scene_obs[3] = _SWITCH_ON_M * condition["lightbulb"]
    scene_obs[4], scene_obs[5] = condition["lightbulb"], condition["led"]
    slots = list(layout.block_lengths)
    # Yaws are drawn for red, blue, pink in turn, which is the order of D's blocks.
    for colour, spot in zip(COLOURS, _block_spots(condition, spots, _slider_spots(layout)), strict=True):
        at = BLOCKS_AT + 6 * slots.index(colour)
        scene_obs[at : at + 3] = spot
        scene_obs[at + 5] = random.uniform(*_YAW_RANGE_RAD)
    robot_obs = np.array(_NEUTRAL_ROBOT_OBS)
    assert robot_obs.shape == OBSERVATION[ROBOT_OBS].shape
    return robot_obs, scene_obs


def _table_spots(layout: Layout) -> list[tuple[float, float, float]]:
    """Two spots as far apart as D's, about the middle of the table that is in reach and beside the button's ring; so are D's."""
    middle = sum(layout.free_table_x()) / 2
    _, y, z = _BLOCK_ON_TABLE_M[0]
    return [(middle + side * _SPOTS_APART_M / 2, y, z) for side in (-1, 1)]


def _slider_spots(layout: Layout) -> dict[str, tuple[float, float, float]]:
    """The spots in the cabinet: as far from its left and its right end as D's."""
    end_of_d = dict(zip(_BLOCK_IN_SLIDER_M, layout_of("D").cavity, strict=True))
    end = dict(zip(_BLOCK_IN_SLIDER_M, layout.cavity, strict=True))
    return {name: (x + (end[name] - end_of_d[name]), y, z) for name, (x, y, z) in _BLOCK_IN_SLIDER_M.items()}


def initial_state_seed(condition: Condition) -> int:
    """Seed of a condition's block poses: 32-bit FNV-1 with initial hash 0 over the UTF-16LE bytes of `str(condition.values())`."""
    value = 0
    for byte in str({key: condition[key] for key in _POSSIBLE}.values()).encode("utf-16-le"):
        value = (value * 0x01000193) & 0xFFFFFFFF ^ byte
    return value


def _block_spots(condition: Condition, table: list[np.ndarray], slider: dict[str, tuple[float, float, float]]) -> Iterator[np.ndarray]:
    """Positions of red, blue, pink in turn. The first free table spot goes to red, else blue; pink always takes the second."""
    red_on_table = condition["red_block"] == "table"
    spot_of = {"red": table[0], "blue": table[1 if red_on_table else 0], "pink": table[1]}
    for colour in COLOURS:
        place = condition[f"{colour}_block"]
        yield spot_of[colour] if place == "table" else np.array(slider[place])


def _draw_chains(condition: Condition, number: int, seed: int) -> Iterator[tuple[str, ...]]:
    random = np.random.RandomState(seed)
    possible_first = {i for i, task in enumerate(_ORDER) if any(_holds(condition, needs) for needs, _ in _RULES[task])}
    while number:
        # The benchmark calls choice(34, size=5, replace=False), which is the head of a permutation.
        drawn = random.permutation(len(_ORDER))[:CHAIN_LENGTH].tolist()
        if drawn[0] in possible_first and is_valid_chain(condition, tuple(_ORDER[i] for i in drawn)):
            number -= 1
            yield tuple(_ORDER[i] for i in drawn)


def is_valid_chain(condition: Condition, tasks: tuple[str, ...]) -> bool:
    """Whether each task in turn is possible in exactly one way, starting from `condition`, and no two are of one kind."""
    kinds = {_KIND_OF[task] for task in tasks}
    if len(kinds) != len(tasks):
        return False
    state = condition
    for task in tasks:
        following = [state | effect for needs, effect in _RULES[task] if _holds(state, needs)]
        if len(following) != 1:
            return False
        state = following[0]
    return True


def is_possible(condition: Condition, tasks: Sequence[str]) -> bool:
    """Whether the tasks can be done one after another, each in some way, starting from `condition`."""
    states = [condition]
    for task in tasks:
        states = states_after(states, task)
    return bool(states)


def states_after(states: Sequence[Condition], task: str) -> list[Condition]:
    """Where `task` leads from any of these states, in each way in which it can be done; empty where it is not possible."""
    return [state | effect for state in states for needs, effect in _RULES[task] if _holds(state, needs)]


def kind_of(task: str) -> str:
    """The kind of a task; a chain never holds two of one kind."""
    if task.startswith("lift_"):
        return "lift from " + task.rsplit("_", 1)[1]
    return next(kind for prefix, kind in _KINDS.items() if task.startswith(prefix))


def _holds(state: Condition, needs: Condition) -> bool:
    return all(state[key] in value if isinstance(value, tuple) else state[key] == value for key, value in needs.items())


def _rules() -> dict[str, list[_Rule]]:
    """Task name → the ways in which it can be done, each (needs, effect)."""
    rules: dict[str, list[_Rule]] = {task: [] for task in _ORDER}
    free = {"grasped": 0}
    simple = {
        "move_slider_left": ("slider", "right", "left"),
        "move_slider_right": ("slider", "left", "right"),
        "open_drawer": ("drawer", "closed", "open"),
        "close_drawer": ("drawer", "open", "closed"),
        "turn_on_lightbulb": ("lightbulb", 0, 1),
        "turn_off_lightbulb": ("lightbulb", 1, 0),
        "turn_on_led": ("led", 0, 1),
        "turn_off_led": ("led", 1, 0),
    }
    for task, (key, before, after) in simple.items():
        rules[task].append((free | {key: before}, {key: after}))
    for colour in COLOURS:
        for task, way in _block_rules(colour):
            rules[task].append(way)
    return rules


def _block_rules(colour: str) -> Iterator[tuple[str, _Rule]]:
    block, free, held = f"{colour}_block", {"grasped": 0}, {"grasped": 1}
    others = [f"{other}_block" for other in COLOURS if other != colour]
    up, down = {block: "grasped", "grasped": 1}, {"grasped": 0}
    for verb in ("rotate", "push"):
        for side in ("right", "left"):
            yield f"{verb}_{block}_{side}", (free | {block: "table"}, {block: "table"})
    yield f"lift_{block}_table", (free | {block: "table"}, up)
    # The sliding door covers the half of the cabinet that it is moved to.
    yield f"lift_{block}_slider", (free | {block: "slider_left", "slider": "right"}, up)
    yield f"lift_{block}_slider", (free | {block: "slider_right", "slider": "left"}, up)
    yield f"lift_{block}_drawer", (free | {block: "drawer", "drawer": "open"}, up)
    for side in ("right", "left"):
        yield "place_in_slider", (held | {block: "grasped", "slider": side}, down | {block: f"slider_{side}"})
    yield "place_in_drawer", (held | {block: "grasped", "drawer": "open"}, down | {block: "drawer"})
    for other in others:
        stacked = {block: "stacked_top", other: "stacked_bottom"}
        yield "stack_block", (held | {block: "grasped", other: "table"}, down | stacked)
        yield "unstack_block", (free | stacked, {block: "table", other: "table"})
    away = {other: ("slider_right", "slider_left") for other in others}
    yield "push_into_drawer", (free | away | {block: "table", "drawer": "open"}, down | {block: "drawer"})


_RULES = _rules()
_KIND_OF = {task: kind_of(task) for task in _ORDER}
