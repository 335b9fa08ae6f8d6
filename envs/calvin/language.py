"""Our own wordings of the 34 CALVIN tasks: for training, and apart from them for validation.

Published CALVIN results are measured with CALVIN's own validation sentences, which are read from a user's CALVIN checkout at evaluation
time (eval.protocol.load_annotations); the sentences here are what the expert's demonstrations are labelled with and what an evaluation
without such a checkout speaks. Every sentence names what it is about: colour, place and direction where the task has them; a task that
presupposes a held block says so.
"""

from __future__ import annotations

from functools import cache

COLOURS = ("red", "blue", "pink")
SIDES = ("left", "right")

# Task name pattern: (training wordings, validation wordings). {colour} and {side} are expanded over COLOURS and SIDES.
_ROTATE = (
    (
        "twist the {colour} block to the {side}",
        "give the {colour} block a turn towards the {side}",
        "spin the {colour} block on the table to the {side}",
        "pick up the {colour} block a little and turn it to the {side}",
        "grip the {colour} block and twist it {side}",
        "turn the {colour} cube a quarter turn to the {side}",
        "make the {colour} block face further to the {side} by turning it",
        "hold the {colour} block and rotate your wrist to the {side}",
        "rotate the {colour} cube {side} where it stands",
        "the {colour} block should be turned to the {side}",
        "swivel the {colour} block {side}",
        "please turn the {colour} block around to the {side}",
    ),
    (
        "turn the {colour} block towards the {side} by ninety degrees",
        "grab the {colour} cube and spin it to the {side}",
        "with the gripper, twist the {colour} block round to the {side}",
    ),
)
_PUSH = (
    (
        "shove the {colour} block to the {side}",
        "move the {colour} block across the table to the {side}",
        "nudge the {colour} block over to the {side}",
        "push the {colour} cube {side}",
        "give the {colour} block a push to the {side}",
        "slide the {colour} cube along the table to the {side}",
        "press against the {colour} block so that it moves {side}",
        "with the gripper closed, push the {colour} block {side}",
        "bring the {colour} block further {side} without lifting it",
        "the {colour} block should slide to the {side}",
        "drive the {colour} block towards the {side} side of the table",
        "please push the {colour} block over to the {side}",
    ),
    (
        "shift the {colour} block to the {side} by pushing it",
        "let the {colour} cube slide towards the {side}",
        "push against the {colour} block until it has moved {side}",
    ),
)
_SLIDER = (
    (
        "slide the cabinet door {side}",
        "shift the sliding door {side}",
        "drag the door of the cabinet to the {side}",
        "pull the sliding door over to the {side}",
        "take the door by its handle and bring it to the {side}",
        "run the slider door all the way {side}",
        "make the sliding door go {side}",
        "the sliding door belongs on the {side}",
        "push the handle of the sliding door {side}",
        "move the slider to the {side}",
        "open up the other half of the cabinet by sliding its door {side}",
        "please slide the door over to the {side} end",
    ),
    (
        "bring the sliding door to the {side} end of the cabinet",
        "slide the slider {side}",
        "get the cabinet's sliding door over to the {side}",
    ),
)
_LIFT_TABLE = (
    (
        "raise the {colour} block from the table",
        "take the {colour} block off the table",
        "pick the {colour} cube up from the table",
        "lift the {colour} cube off the table",
        "get hold of the {colour} block on the table and raise it",
        "grip the {colour} block that is on the table and bring it up",
        "hold up the {colour} block that lies on the table",
        "grab the {colour} block from the tabletop",
        "lift up the {colour} block standing on the table",
        "close the gripper on the {colour} block on the table and go up",
        "the {colour} block should leave the table",
        "please pick the {colour} block up off the table",
    ),
    (
        "take hold of the {colour} block on the table and lift it",
        "fetch the {colour} cube from the tabletop",
        "get the {colour} block up into the air from the table",
    ),
)
_LIFT_SLIDER = (
    (
        "take the {colour} block out of the sliding cabinet",
        "pick the {colour} cube up from the cabinet shelf",
        "fetch the {colour} block from behind the sliding door",
        "raise the {colour} block that is in the cabinet",
        "reach into the sliding cabinet and lift the {colour} block",
        "get the {colour} block out of the slider compartment",
        "grip the {colour} cube in the cabinet and bring it up",
        "lift the {colour} cube off the shelf of the cabinet",
        "grab the {colour} block from inside the cabinet",
        "the {colour} block should come out of the sliding cabinet",
        "hold up the {colour} block that stands in the slider",
        "please get the {colour} block off the cabinet shelf",
    ),
    (
        "reach in and take the {colour} block from the cabinet",
        "pick the {colour} block out of the slider",
        "lift up the {colour} cube that stands in the sliding cabinet",
    ),
)
_LIFT_DRAWER = (
    (
        "take the {colour} block out of the drawer",
        "pick the {colour} cube up from inside the drawer",
        "fetch the {colour} block from the open drawer",
        "raise the {colour} block that is in the drawer",
        "reach into the drawer and lift the {colour} block",
        "get the {colour} block out of the drawer",
        "grip the {colour} cube in the drawer and bring it up",
        "lift the {colour} cube out of the drawer",
        "grab the {colour} block at the bottom of the drawer",
        "the {colour} block should come out of the drawer",
        "hold up the {colour} block that lies in the drawer",
        "please lift the {colour} block from the drawer's floor",
    ),
    (
        "reach down into the drawer and pick up the {colour} block",
        "remove the {colour} block from the open drawer",
        "bring the {colour} cube up out of the drawer",
    ),
)
_FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rotate_{colour}_block_{side}": _ROTATE,
    "push_{colour}_block_{side}": _PUSH,
    "move_slider_{side}": _SLIDER,
    "lift_{colour}_block_table": _LIFT_TABLE,
    "lift_{colour}_block_slider": _LIFT_SLIDER,
    "lift_{colour}_block_drawer": _LIFT_DRAWER,
    "open_drawer": (
        (
            "pull the drawer open",
            "pull out the drawer",
            "open up the drawer",
            "draw the drawer out of the table",
            "get the drawer open",
            "hook the drawer's handle and pull it towards you",
            "slide the drawer out",
            "tug on the drawer handle until it is open",
            "the drawer should be open",
            "make the drawer come out",
            "bring the drawer out by its handle",
            "please open the drawer under the table",
        ),
        ("slide open the drawer", "pull the drawer all the way out", "have the drawer opened"),
    ),
    "close_drawer": (
        (
            "push the drawer shut",
            "push the drawer in",
            "shut the drawer",
            "close up the drawer",
            "get the drawer closed",
            "press on the drawer's handle until it is closed",
            "slide the drawer back in",
            "shove the drawer back into the table",
            "the drawer should be closed",
            "make the drawer go back in",
            "bring the drawer back to closed",
            "please close the drawer under the table",
        ),
        ("slide the drawer shut", "push the drawer all the way in", "have the drawer closed"),
    ),
    "place_in_slider": (
        (
            "put the block you hold into the sliding cabinet",
            "set the block you are holding on the cabinet shelf",
            "drop the grasped block inside the sliding cabinet",
            "lay the held block down in the cabinet",
            "release the block in your gripper behind the sliding door",
            "leave the block you hold in the slider compartment",
            "bring the grasped block to the cabinet and let it go there",
            "the block in the gripper belongs in the sliding cabinet",
            "place the block that you hold on the shelf of the cabinet",
            "move the held block into the open half of the cabinet and release it",
            "stow the grasped block in the sliding cabinet",
            "please put the block you are carrying into the slider",
        ),
        (
            "put down the block you hold inside the sliding cabinet",
            "set the grasped block down behind the sliding door",
            "let go of the held block on the cabinet's shelf",
        ),
    ),
    "place_in_drawer": (
        (
            "put the block you hold into the drawer",
            "set the block you are holding down in the drawer",
            "drop the grasped block into the open drawer",
            "lay the held block down in the drawer",
            "release the block in your gripper above the drawer",
            "leave the block you hold in the drawer",
            "bring the grasped block to the drawer and let it go there",
            "the block in the gripper belongs in the drawer",
            "place the block that you hold inside the open drawer",
            "move the held block over the drawer and release it",
            "stow the grasped block in the drawer",
            "please put the block you are carrying into the drawer",
        ),
        (
            "put down the block you hold inside the drawer",
            "let the grasped block fall into the drawer",
            "let go of the held block in the open drawer",
        ),
    ),
    "stack_block": (
        (
            "put the block you hold on another block",
            "set the grasped block down on top of one of the others",
            "build a tower with the block you are holding",
            "lay the held block on top of a block on the table",
            "release the block in your gripper on top of another one",
            "stack the block you hold on another one",
            "balance the grasped block on a block that stands on the table",
            "the block in the gripper belongs on top of another block",
            "make a stack with the held block as its top",
            "place the block that you are carrying upon another block",
            "pile the grasped block onto one on the table",
            "please set the block you hold on top of another",
        ),
        (
            "put the held block on top of another one to make a tower",
            "stack the block in your gripper onto another block",
            "lay the grasped block upon one of the other blocks",
        ),
    ),
    "unstack_block": (
        (
            "take the upper block off the tower",
            "take the tower of blocks apart",
            "lift the top block off the stack and put it on the table",
            "get the upper block down from the other one",
            "undo the stack of blocks",
            "put the block that is on top back on the table",
            "knock the upper block off the lower one",
            "pull the top block off the block below it",
            "no block should stand on another one any more",
            "bring the topmost block down to the table",
            "separate the two stacked blocks",
            "please take down the block on top of the stack",
        ),
        (
            "take the block on top down from the stack",
            "dismantle the tower of blocks",
            "set the upper block of the stack on the table",
        ),
    ),
    "turn_on_lightbulb": (
        (
            "switch on the light bulb",
            "switch the yellow bulb on",
            "push the switch up so that the bulb lights",
            "make the yellow bulb shine",
            "light up the bulb with the switch",
            "flip the switch up to light the bulb",
            "raise the switch lever to get yellow light",
            "get the bulb to glow",
            "the light bulb should be on",
            "put the lamp with the yellow bulb on",
            "bring the switch to its upper position",
            "please switch the bulb on",
        ),
        ("turn the yellow bulb on", "flip the lever so that the bulb shines", "have the light bulb switched on"),
    ),
    "turn_off_lightbulb": (
        (
            "switch off the light bulb",
            "switch the yellow bulb off",
            "push the switch down so that the bulb goes dark",
            "make the yellow bulb stop shining",
            "put out the bulb with the switch",
            "flip the switch down to darken the bulb",
            "lower the switch lever to end the yellow light",
            "get the bulb to go out",
            "the light bulb should be off",
            "put the lamp with the yellow bulb off",
            "bring the switch to its lower position",
            "please switch the bulb off",
        ),
        ("turn the yellow bulb off", "flip the lever so that the bulb goes out", "have the light bulb switched off"),
    ),
    "turn_on_led": (
        (
            "switch on the green led",
            "switch the led on",
            "press the button so that the led lights",
            "make the green led shine",
            "light up the led with the button",
            "hit the button to light the green led",
            "press down the button to get green light",
            "get the led to glow",
            "the green led should be on",
            "put the led on by pressing its button",
            "tap the button until the led lights up",
            "please switch the green light on",
        ),
        ("turn the green led on", "press the button so that the green light shines", "have the led switched on"),
    ),
    "turn_off_led": (
        (
            "switch off the green led",
            "switch the led off",
            "press the button so that the led goes dark",
            "make the green led stop shining",
            "put out the led with the button",
            "hit the button to darken the green led",
            "press down the button to end the green light",
            "get the led to go out",
            "the green led should be off",
            "put the led off by pressing its button",
            "tap the button until the led is dark",
            "please switch the green light off",
        ),
        ("turn the green led off", "press the button so that the green light goes out", "have the led switched off"),
    ),
    "push_into_drawer": (
        (
            "shove the block on the table into the drawer",
            "sweep the block off the table into the open drawer",
            "make the block on the table drop into the drawer",
            "push the block over the edge so that it lands in the drawer",
            "slide the block from the table down into the drawer",
            "get the block on the table to fall into the drawer",
            "nudge the block on the table until it drops into the drawer",
            "move the block from the tabletop into the drawer",
            "the block on the table should end up in the drawer",
            "knock the block on the table into the open drawer",
            "tip the table's block into the drawer by pushing it",
            "please push the block that is on the table into the drawer",
        ),
        (
            "push the block off the table so that it falls into the open drawer",
            "let the block on the table slide into the drawer",
            "bring the block from the table into the drawer",
        ),
    ),
}


def training_wordings() -> dict[str, list[str]]:
    """Task name → sentences to train on (at least ten a task). A fresh copy."""
    return {task: list(training) for task, (training, _) in _expanded().items()}


def validation_wordings() -> dict[str, list[str]]:
    """Task name → sentences that are never trained on (at least three a task). A fresh copy."""
    return {task: list(validation) for task, (_, validation) in _expanded().items()}


def validation_instruction(task: str) -> str:
    """The one sentence that an evaluation speaks for `task`. Raises ValueError for an unknown task."""
    if task not in _expanded():
        raise ValueError(f"unknown task {task!r}; the 34 tasks are {', '.join(sorted(_expanded()))}")
    return _expanded()[task][1][0]


def task_of(instruction: str) -> str:
    """The task that one of our sentences (training or validation, exact but for case and outer blanks) belongs to.

    Raises ValueError for any other sentence: this is a lookup, not an understanding.
    """
    key = instruction.strip().lower()
    if key not in _tasks_by_sentence():
        raise ValueError(f"{instruction!r} is none of our {len(_tasks_by_sentence())} sentences; name the task instead (task=...)")
    return _tasks_by_sentence()[key]


@cache
def _expanded() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    tasks = {}
    for pattern, (training, validation) in _FAMILIES.items():
        for colour in COLOURS if "{colour}" in pattern else ("",):
            for side in SIDES if "{side}" in pattern else ("",):
                words = {"colour": colour, "side": side}
                tasks[pattern.format(**words)] = (
                    tuple(sentence.format(**words) for sentence in training),
                    tuple(sentence.format(**words) for sentence in validation),
                )
    return tasks


@cache
def _tasks_by_sentence() -> dict[str, str]:
    return {sentence: task for task, (training, validation) in _expanded().items() for sentence in (*training, *validation)}
