"""Our robot description borrows the Panda's link meshes from the installed `pybullet_data` package, wherever that lies.

PyBullet looks for a URDF's meshes beside the URDF alone (`setAdditionalSearchPath` is for URDF files only), so the
description names its folders by two placeholders, and a copy with the real paths is written once per process.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

PYBULLET_DATA, ASSETS = "${pybullet_data}", "${assets}"


@functools.cache
def robot_urdf(folder: Path, name: str) -> str:
    """Path of the URDF `name` (relative to asset folder `folder`) that PyBullet can load.

    A description without placeholders, such as calvin_env's, is used where it is. Raises FileNotFoundError for a mesh
    that is missing.
    """
    path = Path(folder) / name
    text = path.read_text()
    if PYBULLET_DATA not in text and ASSETS not in text:
        return str(path)
    import pybullet_data

    text = text.replace(PYBULLET_DATA, pybullet_data.getDataPath()).replace(ASSETS, str(Path(folder).resolve()))
    for part in text.split('filename="')[1:]:
        mesh = Path(part.split('"')[0])
        if not mesh.is_file():
            raise FileNotFoundError(f"{path} needs {mesh}, which does not exist; is pybullet (with pybullet_data) installed completely?")
    resolved = temporary_folder("emu3_vla_robot_") / path.name
    resolved.write_text(text)
    return str(resolved)


def temporary_folder(prefix: str) -> Path:
    """A new folder that lives as long as this process. A forked child that ends before leaves it."""
    folder, owner = Path(tempfile.mkdtemp(prefix=prefix)), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder
