"""How much each kind of id counts in the training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from emu3_vla.documents.segments import ActionChunk, End, Image, OpenAction, OpenReasoning, Reasoning, Segment, Text, Video
from emu3_vla.vocabulary import Vocabulary

KINDS = ("action", "text", "special", "vision")
"""Kinds of targets. End of chunk is `action`, end of document and marks of reasoning are `text`; `special` says that an image or actions
begin, and surrounds codes."""
ACTION, TEXT, SPECIAL, VISION = (np.int8(kind) for kind in range(len(KINDS)))


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each kind of target; one of weight 0 is no target at all. Raises ValueError for a weight that is no number from 0 on.

    The defaults weigh a vision code half as much as any other id.
    Source: Emu3 (Nature 2026); baaivision/UniVLA configs/moe_fast_video.json, vision_loss_weight.
    """

    text: float = 1.0  # with end of document and the marks of reasoning
    vision: float = 0.5  # codes alone
    action: float = 1.0  # with begin of action and end of chunk
    special: float = 1.0  # begin of document, and what surrounds codes: begin, size and end of an image, ends of its lines and frames

    def __post_init__(self):
        for part in fields(self):
            if not 0 <= (value := getattr(self, part.name)) < math.inf:
                raise ValueError(f"loss weight of {part.name} is {value}, expected a number from 0 on")

    @classmethod
    def named(cls, name: str) -> LossWeights:
        """One of PRESETS. Raises ValueError for another name."""
        if name not in PRESETS:
            raise ValueError(f"there are no loss weights {name!r}, only {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS: dict[str, LossWeights] = {
    "all": LossWeights(),
    "only-vision": LossWeights(text=0, vision=1, action=0, special=0),
    "only-action": LossWeights(text=0, vision=0, action=1, special=0),
    "only-text": LossWeights(text=1, vision=0, action=0, special=0),
}
"""Source of the first three's reach: baaivision/UniVLA train/datasets.py (apply_loss_on_only_...)."""


def weights_of(segments: Sequence[Segment], spelled: Sequence[np.ndarray], vocabulary: Vocabulary, weights: LossWeights) -> np.ndarray:
    """Weight of each id of a document as a target: float32 (n,); 0 where it is not supervised. spelled: ids of each segment."""
    ids = np.concatenate(spelled)
    values = np.where(ids >= vocabulary.vision_start, np.float32(weights.vision), np.float32(weights.special))
    at = 0
    for segment, part in zip(segments, spelled, strict=True):
        own = slice(at, at := at + len(part))
        match segment:
            case ActionChunk(supervised=False):
                values[own] = 0
                values[own.start] = weights.action  # that actions come is the demonstrator's choice still
            case ActionChunk() | OpenAction():
                values[own] = weights.action
            case Text(supervised=True) | Reasoning(supervised=True) | End(supervised=True) | OpenReasoning():
                values[own] = weights.text
            case Text() | Reasoning() | End() | Image(supervised=False) | Video(supervised=False):
                values[own] = 0
    return values


def kinds_of(segments: Sequence[Segment], spelled: Sequence[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:
    """Kind of each id of a document, an index into KINDS: int8 (n,). By its place, since Emu3's action ids are text ids elsewhere."""
    kinds = np.where(np.concatenate(spelled) >= vocabulary.vision_start, VISION, SPECIAL)
    at = 0
    for segment, part in zip(segments, spelled, strict=True):
        start, at = at, at + len(part)
        if isinstance(segment, ActionChunk):
            kinds[start + 1 : at] = ACTION
        elif isinstance(segment, (Text, Reasoning, End)):
            kinds[start:at] = TEXT
    return kinds
