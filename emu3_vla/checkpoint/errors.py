"""The error that every part of this package raises; it has no other home because all of them need it."""


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged, foreign, or put together of parts that do not belong together."""
