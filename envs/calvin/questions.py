"""Questions about a moment in CALVIN's scenes, and their answers; and the moment in a sentence. All are read from the simulator's state.

    questions = Questions("D")
    questions.about(robot_obs, scene_obs)       # [("is the drawer open?", "yes."), ("how far is the red block from the hand?", ...), ...]
    questions.describe(robot_obs, scene_obs)    # "the drawer is open, the door is left, ..."

A model that answers them from the cameras alone has to see what a policy has to see. Answers end with a full stop, and hold no other.
Distances are in millimetres along the world's axes, rounded to STEP_MM: x to the right, y forward (from the robot to the cabinet), z up.
"""

from __future__ import annotations

import re
from math import degrees, pi

import numpy as np

from envs.calvin.expert.arm import Arm, Block
from envs.calvin.expert.fixture_skills import HANDLE_Y
from envs.calvin.tasks import COLORS, DRAWER_M, SLIDE_M
from envs.spec import ROBOT_OBS, SCENE_OBS

STEP_MM, FURTHEST_MM = 5, 995
YAW_STEP_DEG = 15
RIGHT_MM, RIGHT_DEG = 20, 15
"""How far a right answer may be off: along each axis half a block's width, so what it names lies on the block, and a heading's own step.
Numbers that were measured or seen are never right to the last digit. Precedent: SpatialRGPT (arXiv 2406.01584) counts within a quarter."""
DIRECTIONS = (("left", "right"), ("back", "forward"), ("down", "up"))
"""Of negative and of positive x, y, z."""
PLACES = {"table": "on the table", "shelf": "in the cabinet", "drawer": "in the drawer", "floor": "on the floor"}
DESCRIBE = "what do you see?"
"""The question that `describe` answers."""
KINDS = {
    DESCRIBE: "description",
    "is the light bulb on?": "lights",
    "is the green light on?": "lights",
    "is the drawer open?": "drawer",
    "where is the sliding door?": "door",
    "what is in the hand?": "hand",
    "where is the block?": "place of a block",
    "how far is the block from the hand?": "distance of a block",
    "how is the block turned?": "heading of a block",
} | {f"how far is the {name} from the hand?": "distance of a fixture" for name in ("drawer handle", "door handle", "switch", "button")}
"""Kinds of questions, the blocks' colours left out."""
WAYS, HEADINGS = "distance", "heading"
"""Kinds that begin so are answered in millimetres and in degrees."""
_OF_A_COLOR = re.compile(rf"({'|'.join(COLORS)}) block")
_CLAUSE = re.compile(r"the (?P<thing>[a-z ]+?) is (?P<state>[a-z ]+)")
_BULB_BOX_Z, _DRAWER_HANDLE_Z, _DOOR_HANDLE_Z, _BUTTON_Z = 0.56, 0.36, 0.53, 0.46


class Questions:
    """Of one scene. Raises ValueError for an unknown scene."""

    def __init__(self, scene: str = "D"):
        self._arm = Arm(scene)

    def about(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> list[tuple[str, str]]:
        """Every question and its answer, always the same questions in the same order. robot_obs: (15,). scene_obs: (24,)."""
        arm = self._look(robot_obs, scene_obs)
        held = arm.held()
        asked = [
            (DESCRIBE, self._description(arm, held)),
            ("is the light bulb on?", _yes(scene_obs[4])),
            ("is the green light on?", _yes(scene_obs[5])),
            ("is the drawer open?", _yes(arm.drawer > DRAWER_M / 2)),
            ("where is the sliding door?", f"{_door(arm)}."),
            ("what is in the hand?", f"the {held} block." if held else "nothing."),
        ]
        for color in COLORS:
            block = arm.block(color)
            asked += [
                (f"where is the {color} block?", f"{_place(block, held)}."),
                (f"how far is the {color} block from the hand?", f"{_way(block.position - arm.tool[:3])}."),
                (f"how is the {color} block turned?", f"{_yaw(block)} degrees."),
            ]
        fixtures = self._fixtures(arm)
        asked += [(f"how far is the {name} from the hand?", f"{_way(at - arm.tool[:3])}.") for name, at in fixtures.items()]
        return asked

    def describe(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> str:
        """The moment in one sentence: what can be on or off, open or closed, and where the blocks are."""
        arm = self._look(robot_obs, scene_obs)
        return self._description(arm, arm.held())

    @staticmethod
    def sentences() -> list[str]:
        """Every word and number that questions and answers use, often enough for a text tokenizer to learn them."""
        numbers = [f"{number} {word}" for number in range(0, FURTHEST_MM + 1, STEP_MM) for pair in DIRECTIONS for word in pair]
        yaws = [f"{number} degrees." for number in range(0, 180, YAW_STEP_DEG)]
        arm_states = [(np.zeros(15), np.zeros(24))]
        asked = [text for state in arm_states for pair in Questions("D").about(*state) for text in pair]
        places = [f"the {color} block is {place}, " for color in COLORS for place in (*PLACES.values(), "in the hand")]
        others = ["yes.", "no.", "nothing.", "left.", "right.", *(f"the {color} block." for color in COLORS)]
        return [*numbers, *yaws, *asked, *places, *others]

    def _look(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> Arm:
        self._arm.forget()
        self._arm.sense({ROBOT_OBS: robot_obs, SCENE_OBS: scene_obs})
        return self._arm

    @staticmethod
    def _fixtures(arm: Arm) -> dict[str, np.ndarray]:
        layout = arm.layout
        return {
            "drawer handle": np.array([layout.drawer_x, layout.drawer_handle_y(arm.drawer), _DRAWER_HANDLE_Z]),
            "door handle": np.array([layout.slide_handle_x - arm.slide, HANDLE_Y, _DOOR_HANDLE_Z]),
            "switch": np.array([layout.switch_x, HANDLE_Y, _BULB_BOX_Z]),
            "button": np.array([*layout.button, _BUTTON_Z]),
        }

    @staticmethod
    def _description(arm: Arm, held: str | None) -> str:
        parts = [
            f"the drawer is {'open' if arm.drawer > DRAWER_M / 2 else 'closed'}",
            f"the door is {_door(arm)}",
            f"the light bulb is {_on(arm.scene_obs[4])}",
            f"the green light is {_on(arm.scene_obs[5])}",
            *(f"the {color} block is {_place(arm.block(color), held)}" for color in COLORS),
        ]
        return ", ".join(parts) + "."


def kind_of(question: str) -> str:
    """What a question is about, for figures by kind. Raises ValueError for one that `Questions` does not ask."""
    kind = KINDS.get(_OF_A_COLOR.sub("block", question))
    if kind is None:
        raise ValueError(f"{question!r} is no question about CALVIN's scenes")
    return kind


def is_right(question: str, answer: str, truth: str) -> bool:
    """Whether an answer is right: word for word, or, where it is numbers, within RIGHT_MM and RIGHT_DEG of the true ones.

    Raises ValueError for a question and for a truth that `Questions` does not give.
    """
    kind = kind_of(question)
    if not is_number(kind):
        return answer == truth
    read = way_mm if kind.startswith(WAYS) else heading_deg
    true = read(truth)
    try:
        off = np.abs(read(answer) - true)
    except ValueError:
        return False
    return bool((off <= RIGHT_MM).all() if read is way_mm else min(off, 180 - off) <= RIGHT_DEG)


def is_number(kind: str) -> bool:
    """Whether questions of this kind are answered with numbers."""
    return kind.startswith((WAYS, HEADINGS))


def way_mm(answer: str) -> np.ndarray:
    """How far something is, from the words of an answer: float64 (3,), x y z. Raises ValueError for another answer."""
    words = answer.removesuffix(".").split()
    signs = [pair.index(word) * 2 - 1 for word, pair in zip(words[1::2], DIRECTIONS, strict=False) if word in pair]
    if len(words) != 6 or len(signs) != 3 or not all(word.isdigit() for word in words[::2]):
        raise ValueError(f"{answer!r} is no distance, expected one like '125 right 40 back 80 down.'")
    return np.array([sign * float(word) for sign, word in zip(signs, words[::2], strict=True)])


def heading_deg(answer: str) -> float:
    """The heading that an answer says, in [0, 180). Raises ValueError for another answer."""
    number, _, unit = answer.partition(" ")
    if unit != "degrees." or not number.isdigit() or int(number) >= 180:
        raise ValueError(f"{answer!r} is no heading, expected one like '135 degrees.'")
    return float(number)


def clauses(description: str) -> dict[str, str]:
    """What a description says of each thing: {"drawer": "open", "red block": "on the table", ...}; what is no clause is left out."""
    found = (_CLAUSE.fullmatch(clause) for clause in description.strip().removesuffix(".").split(", "))
    return {match["thing"]: match["state"] for match in found if match}


def _yes(value: float) -> str:
    return "yes." if value > 0.5 else "no."


def _on(value: float) -> str:
    return "on" if value > 0.5 else "off"


def _door(arm: Arm) -> str:
    return "left" if arm.slide > SLIDE_M / 2 else "right"


def _place(block: Block, held: str | None) -> str:
    return "in the hand" if block.color == held else PLACES[block.place]


def _yaw(block: Block) -> int:
    """Heading of the long side in [0, 180)."""
    return round(degrees(block.yaw % pi) / YAW_STEP_DEG) * YAW_STEP_DEG % 180


def _way(vector_m: np.ndarray) -> str:
    """ "125 right 40 back 80 down"."""
    parts = []
    for value, (negative, positive) in zip(vector_m.tolist(), DIRECTIONS, strict=True):
        millimetres = min(round(abs(value) * 1000 / STEP_MM) * STEP_MM, FURTHEST_MM)
        parts.append(f"{millimetres} {positive if value > 0 else negative}")
    return " ".join(parts)
