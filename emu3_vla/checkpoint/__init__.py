"""Checkpoint folders, ours and those of others: see `emu3_vla.checkpoint.loading` and `emu3_vla.checkpoint.folder`."""

from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.checkpoint.folder import (
    ACTION,
    CONFIG,
    MODEL,
    NORMALIZER,
    POLICY,
    PROVENANCE,
    TEXT,
    TOKENIZER_PARTS,
    VISION,
    VOCABULARY,
    WEIGHTS,
    Checkpoint,
    PolicySettings,
    load_weights,
    save,
)
from emu3_vla.checkpoint.loading import load

__all__ = [
    "ACTION",
    "CONFIG",
    "MODEL",
    "NORMALIZER",
    "POLICY",
    "PROVENANCE",
    "TEXT",
    "TOKENIZER_PARTS",
    "VISION",
    "VOCABULARY",
    "WEIGHTS",
    "Checkpoint",
    "CheckpointError",
    "PolicySettings",
    "load",
    "load_weights",
    "save",
]
