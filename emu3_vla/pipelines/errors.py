"""What can be wrong with what a pipeline is given. Each says in one line what came, what was expected, and what to do."""

from __future__ import annotations


class PipelineError(ValueError):
    """Base of the others: input that a pipeline cannot work with."""


class UnreadableMedia(PipelineError):
    """A picture, video or stored moment that is missing, damaged or of an unknown format."""


class WrongSize(PipelineError):
    """A picture of no or an absurd size, or of one that this checkpoint's vocabulary does not have."""


class WrongPictures(PipelineError):
    """Not the pictures that this checkpoint is shown: of another type or shape, or of other cameras."""


class WrongState(PipelineError):
    """No state of an arm, or one for a checkpoint that is not told its arm's."""


class WrongFrames(PipelineError):
    """A number of frames that cannot be."""


class WrongMask(PipelineError):
    """A mask of another shape than its picture, or one that hides nothing."""


class WrongActions(PipelineError):
    """Actions of another shape than this checkpoint's chunks, or that are no numbers."""


class LacksPart(PipelineError):
    """A checkpoint without a tokenizer, or another part, that this path needs."""
