"""Checkpoints by name: those that are shipped with this program, and by their Hugging Face name what the cache has, else downloaded."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from emu3_vla.checkpoint.errors import CheckpointError
from emu3_vla.checkpoint.weights import WeightFiles

HUB_ID = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")
# What a checkpoint needs; never code (*.py) nor pickles.
PATTERNS = ("*.json", "*.safetensors", "*.tiktoken", "*.txt", "*.yaml")


def find_folder(path: str | Path) -> Path:
    """A folder as it is, that of a shipped checkpoint ("calvin-d"), or the snapshot of a Hugging Face repository named
    "organisation/name" or "organisation/name@revision".

    A shipped name wins over a folder of that name; write ./name for the folder. The local cache comes first; the network is asked
    only for what it lacks, and never with HF_HUB_OFFLINE=1.
    Raises FileNotFoundError for what is neither, CheckpointError for a download that failed.
    """
    folder = shipped_folder(str(path)) or Path(path).expanduser()
    if folder.is_dir():
        return folder
    named = HUB_ID.fullmatch(str(path))
    if folder.exists() or not named:
        raise FileNotFoundError(
            f"{path} is not a folder; a checkpoint is a folder with config.json or model/ in it, the name of a shipped one, or a Hugging "
            "Face name (organisation/name)"
        )
    return _snapshot(named["repository"], named["revision"])


def shipped_folder(name: str) -> Path | None:
    """The folder of the checkpoint that is shipped under that name, or None."""
    package = importlib.util.find_spec("policies")  # found, not imported: this room does not know that one
    if package is None or Path(name).name != name:
        return None
    folder = Path(package.origin).parent / "checkpoints" / name
    return folder if (folder / "provenance.json").is_file() else None


def _snapshot(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = {"repo_id": repository, "revision": revision, "allow_patterns": list(PATTERNS)}
    try:
        folder = Path(snapshot_download(**options, local_files_only=True))
        if _is_whole(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(**options))
    except Exception as error:  # the library's errors and those of its transports share no other base
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{repository} is no folder here and not whole in the local Hugging Face cache, and downloading it failed "
            f"({type(error).__name__}: {said})"
        ) from error


def _is_whole(folder: Path) -> bool:
    """Whether a cached snapshot has its configuration and all its weights; an interrupted download leaves a part."""
    try:
        WeightFiles.open(folder / "model" if (folder / "model").is_dir() else folder)
    except (FileNotFoundError, CheckpointError):
        return False
    return (folder / "config.json").is_file() or (folder / "provenance.json").is_file()
