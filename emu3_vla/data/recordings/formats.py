"""Which format a folder is in, and how each is opened."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from emu3_vla.data.recordings import calvin, lerobot, lerobot_v21, lerobot_v30, zarr_store
from emu3_vla.data.recordings.recording import RecordingError, Source
from emu3_vla.data.recordings.tables import read_json

FORMATS = ("calvin", "lerobot_v2.1", "lerobot_v3.0", "zarr")
ALIASES = {"lerobot_v2": "lerobot_v2.1", "lerobot_v3": "lerobot_v3.0"}
SOURCES: dict[str, type] = {
    "calvin": calvin.Source,
    "lerobot_v2.1": lerobot_v21.Source,
    "lerobot_v3.0": lerobot_v30.Source,
    "zarr": zarr_store.Source,
}


def named(format: str) -> str:
    """The full name of a format. Raises ValueError naming the nearest one."""
    full = ALIASES.get(format, format)
    if full not in FORMATS:
        close = difflib.get_close_matches(format, [*FORMATS, *ALIASES], n=1)
        raise ValueError(f"unknown format {format!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(FORMATS)}"))
    return full


def detect(folder: Path) -> str:
    """The format of the dataset in `folder`. Raises FileNotFoundError, or RecordingError where it is none that is known."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist, expected the folder of a dataset")
    if (folder / lerobot.INFO).is_file():
        version = read_json(folder / lerobot.INFO).get("codebase_version")
        for format, layout in (("lerobot_v2.1", lerobot_v21), ("lerobot_v3.0", lerobot_v30)):
            if version in layout.VERSIONS:
                return format
        known = ", ".join((*lerobot_v21.VERSIONS, *lerobot_v30.VERSIONS))
        raise RecordingError(f"{folder} is a LeRobot dataset of version {version!r}, expected one of {known}")
    if (folder / "store.json").is_file():
        return "zarr"
    if (folder / calvin.IDS).is_file():
        return "calvin"
    splits = [name for name in ("training", "validation") if (folder / name / calvin.IDS).is_file()]
    if splits:
        raise RecordingError(
            f"{folder} is a CALVIN dataset of {len(splits)} splits; name one of them: {', '.join(str(folder / s) for s in splits)}"
        )
    raise RecordingError(
        f"{folder} is no dataset that is known: expected {lerobot.INFO} (LeRobot), store.json (our episode store) or {calvin.IDS} (CALVIN)"
    )


def open_dataset(folder: str | Path) -> Source:
    """The dataset in `folder`, whatever its format. Raises what `detect` raises, and RecordingError for a damaged one."""
    folder = Path(folder)
    format = detect(folder)
    if format.startswith("lerobot"):
        require_pyarrow()
    return SOURCES[format](folder)


def require_pyarrow() -> None:
    """Raise ValueError, with what to install, where LeRobot's tables cannot be read."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("LeRobot datasets need pyarrow: pip install 'emu3-vla[data]'")
