"""Every path of a checkpoint, in pictures, videos and words.

    from emu3_vla import pipelines

    model = pipelines.load("outputs/train/policy")
    (drawing,) = model.draw("the drawer is open, the light bulb is on.", decoding=pipelines.Decoding(temperature=1, seed=7))
    for piece in model.ask("is the drawer open?", {"rgb_static": static, "rgb_gripper": gripper}): print(piece, end="")

A path is a function in a file of its own, which takes the object that holds the checkpoint first; they are its methods.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from emu3_vla import checkpoint as checkpoints
from emu3_vla.generation.engine import PromptTooLong
from emu3_vla.pipelines import asking, drawing, filming, imagining, interleaving, reconstructing
from emu3_vla.pipelines.asking import TextStream
from emu3_vla.pipelines.base import FORMS, IMAGE, Decoding, PipelineBase
from emu3_vla.pipelines.errors import (
    LacksPart,
    PipelineError,
    UnreadableMedia,
    WrongActions,
    WrongFrames,
    WrongMask,
    WrongPictures,
    WrongSize,
    WrongState,
)
from emu3_vla.pipelines.interleaving import Step
from emu3_vla.pipelines.reconstructing import Reconstruction

__all__ = [
    "FORMS",
    "IMAGE",
    "Decoding",
    "LacksPart",
    "PipelineError",
    "Pipelines",
    "PromptTooLong",
    "Reconstruction",
    "Step",
    "TextStream",
    "UnreadableMedia",
    "WrongActions",
    "WrongFrames",
    "WrongMask",
    "WrongPictures",
    "WrongSize",
    "WrongState",
    "find",
    "load",
]

SHIPPED = "checkpoints"
"""Folder of the shipped checkpoints in the package `policies`."""


class Pipelines(PipelineBase):
    """A checkpoint and all that it can do. `load` makes one; or Pipelines(emu3_vla.load(folder), engine=...)."""

    draw = drawing.draw
    complete = drawing.complete
    film = filming.film
    extend = filming.extend
    ask = asking.ask
    describe = asking.describe
    interleave = interleaving.interleave
    imagine = imagining.imagine
    reconstruct = reconstructing.reconstruct


def load(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    vision_tokenizer: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    **options,
) -> Pipelines:
    """Open a shipped checkpoint by its name, a folder, or a Hugging Face name. Other arguments: of emu3_vla.load and of PipelineBase."""
    parts = {"vision_tokenizer": vision_tokenizer, "text_tokenizer": text_tokenizer}
    return Pipelines(checkpoints.load(find(name), device=device, dtype=dtype, **parts), **options)


def find(name: str | Path) -> str | Path:
    """The folder of a shipped checkpoint of this name, or the name itself. A name wins over a folder of the same name."""
    shipped = Path(str(resources.files("policies"))) / SHIPPED / str(name)
    return shipped if Path(str(name)).name == str(name) and shipped.is_dir() else name
