"""What produced a result: commit, versions, machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import policies

PACKAGES = ("emu3-vla", "numpy", "pybullet", "torch", "transformers", "gymnasium", "rerun-sdk")


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with "-dirty" where tracked files differ; None outside a checkout."""
    source = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository; ours tracks this file.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def policy_provenance(name: str) -> dict[str, Any] | None:
    """The checkpoint's own provenance.json, or None for a builtin policy. Raises ValueError for an unknown policy."""
    folder = policies.checkpoint_folder(name)
    path = folder / "provenance.json" if folder else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the checkpoint is damaged") from error
