"""Checkpoint folders, ours and those of others: see `emu3_vla.checkpoint.loading` and `emu3_vla.checkpoint.folder`."""

from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.checkpoint.folder import (
    ACTION,
    MODEL,
    NORMALIZER,
    POLICY,
    PROVENANCE,
    TEXT,
    TOKENIZER_PARTS,
    VISION,
    VOCABULARY,
    Checkpoint,
    PolicySettings,
    came_from,
    load_weights,
    read_policy,
    save,
    save_loaded,
)
from emu3_vla.checkpoint.layouts import CONFIG
from emu3_vla.checkpoint.loading import load
from emu3_vla.checkpoint.weights import WEIGHTS

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
    "came_from",
    "load",
    "load_weights",
    "read_policy",
    "save",
    "save_loaded",
]
