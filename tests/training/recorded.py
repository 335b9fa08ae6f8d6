"""Rerun recordings of samples, read back."""

import io
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from rerun.chunk import RrdReader


def rows(recording: Path) -> dict[str, list]:
    """Every logged value of a recording by entity, each with its step."""
    found: dict[str, list] = {}
    for chunk in RrdReader(str(recording)).stream():
        if chunk.entity_path.startswith("/__"):
            continue
        table = chunk.to_record_batch()
        (name,) = [name for name in table.schema.names if name.endswith((":blob", ":values", ":scalars", ":text"))]
        values = zip(table["step"].to_pylist(), table[name].to_pylist(), strict=True)
        found.setdefault(chunk.entity_path.removeprefix("/"), []).extend((step, value[0]) for step, value in values)
    return found


def bars(value: dict) -> np.ndarray:
    return np.array(value["buffer"])


def pixels(blob) -> np.ndarray:
    return np.asarray(Picture.open(io.BytesIO(bytes(blob))))
