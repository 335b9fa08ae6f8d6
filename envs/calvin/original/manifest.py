"""The files of calvin_env's `data/` folder that scenes A-D load, by size and SHA-256, so that a copy can be checked.

    python -m envs.calvin.original.manifest path/to/calvin_env/data     # rewrites calvin_env_data.json from a checkout of COMMIT

The files themselves are not ours and are not in this package: `envs.calvin.original.fetch` downloads them.

Source of sizes and hashes: calvin_env 797142c. Its `data/` folder serves both versions of the simulator that we follow.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from envs.calvin.scenes import SCENES

COMMIT = "797142c588c21e76717268b7b430958dbd13bf48"
LICENCES = {"LICENSE": "LICENSE", "data/franka_panda/LICENSE.txt": "franka_panda/LICENSE.txt"}
"""Where the licence texts lie in calvin_env (MIT) and for the Panda (Apache-2.0), and where beside the data they go."""
MANIFEST = Path(__file__).with_name("calvin_env_data.json")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file: its size in bytes and the SHA-256 of its content, in hex."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of the file at `path`."""
        content = path.read_bytes()
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What is wrong with a copy of the folder: paths relative to it, in the manifest's order."""

    missing: tuple[str, ...]
    different: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.different)

    def __str__(self) -> str:
        parts = [
            f"{len(paths)} {what} ({paths[0]}{', ...' if len(paths) > 1 else ''})"
            for what, paths in (("missing", self.missing), ("not those of calvin_env", self.different))
            if paths
        ]
        return " and ".join(parts) or "none"


@cache
def required_files() -> dict[str, FileRecord]:
    """Every file that scenes A-D load: path relative to `data/` → record."""
    return {path: FileRecord(**record) for path, record in json.loads(MANIFEST.read_text())["files"].items()}


@cache
def licence_files() -> dict[str, FileRecord]:
    """The licence texts that go with them: path relative to a fetched folder → record."""
    return {path: FileRecord(**record) for path, record in json.loads(MANIFEST.read_text())["licences"].items()}


def damage(folder: Path) -> Damage:
    """Compare `folder` with calvin_env's `data/`; further files are nobody's business. Raises NotADirectoryError where there is none."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; expected calvin_env's data/")
    files = required_files()
    missing = tuple(path for path in files if not (folder / path).is_file())
    different = tuple(path for path, record in files.items() if path not in missing and FileRecord.of(folder / path) != record)
    return Damage(missing=missing, different=different)


def loaded_files(folder: Path) -> list[str]:
    """What scenes A-D load from `folder`, sorted: URDFs, the meshes that they name, their materials and textures."""
    found: set[Path] = set()
    waiting = [folder / name for scene in SCENES.values() for name in scene.files]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _references(path)
    return sorted(path.relative_to(folder).as_posix() for path in found)


REFERENCES = {".urdf": r'filename="(?:package://)?([^"]+)"', ".obj": r"^mtllib (\S+)", ".mtl": r"^\s*map_Kd\s+(\S+)"}


def _references(path: Path) -> Iterator[Path]:
    if path.suffix not in REFERENCES:
        return
    for name in re.findall(REFERENCES[path.suffix], path.read_text(errors="replace"), re.MULTILINE):
        target = (path.parent / name).resolve()
        # One collision mesh names a texture by a Windows path of its author's; PyBullet goes on without it, and so do we.
        if path.suffix == ".urdf" or target.is_file():
            yield target


def main(folder: Path) -> None:
    """Rewrite the manifest from calvin_env's `data/` folder in a checkout of COMMIT."""
    folder = folder.resolve()
    licences = {ours: FileRecord.of(folder.parent / theirs) for theirs, ours in LICENCES.items()}
    files = {path: FileRecord.of(folder / path) for path in loaded_files(folder)}
    manifest = {
        "commit": COMMIT,
        "licences": {path: vars(record) for path, record in licences.items()},
        "files": {path: vars(record) for path, record in files.items()},
    }
    MANIFEST.write_text(_one_line_each(manifest))
    print(f"{len(files)} files, {sum(record.size for record in files.values()) / 1e6:.1f} MB: {MANIFEST}")


def _one_line_each(manifest: dict) -> str:
    text = json.dumps(manifest, indent=1)
    return re.sub(r"\{\s+(\"size\": \d+),\s+(\"sha256\": \"\w+\")\s+\}", r"{\1, \2}", text) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
