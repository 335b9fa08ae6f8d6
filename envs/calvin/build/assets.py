"""Our own low-polygon CALVIN assets: `python -m envs.calvin.build.assets` rewrites `envs/calvin/assets/` byte for byte.

The folder has the layout of calvin_env's `data/`: same relative paths, joint and link names, joint indices, limits,
masses and inertias; geometry and textures are our own, made from dimensions. Lengths are metres before the scale of 0.8
with which tables and blocks are loaded. Every link is one visual mesh of few polygons.

Source of the numbers: calvin_env `data/blocks/*.urdf`, `data/plane/plane.urdf`, and what the two other builders name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from envs.calvin.build.robot import finger_meshes, panda
from envs.calvin.build.tables import TABLES, table_files
from envs.calvin.build.low_polygon import box_shape, inertial, link, robot
from envs.calvin.scenes import BLOCK_LENGTHS_M, OWN_ASSETS, PLANE_URDF, ROBOT_URDF

UNSEEN = (1, 1, 1, 0)
BLOCK_RGBA = {"red": (1, 0, 0, 1), "blue": (0, 0, 1, 1), "pink": (1, 0, 1, 1)}
BLOCKS = ["red_small", "red_middle", "red_big", "blue_small", "blue_big", "pink_small", "pink_middle", "pink_big"]


def build() -> dict[str, bytes]:
    """Every file of the asset folder: relative path → content."""
    files: dict[str, str | bytes] = {ROBOT_URDF: panda(), PLANE_URDF: _plane()}
    files |= {f"franka_panda/meshes/{name}": text for name, text in finger_meshes().items()}
    files |= {f"blocks/block_{block}.urdf": _block(block) for block in BLOCKS}
    for name, table in TABLES.items():
        files |= {f"calvin_table_{name}/{path}": content for path, content in table_files(name, table).items()}
    return {path: content.encode() if isinstance(content, str) else content for path, content in sorted(files.items())}


def main(folder: Path = OWN_ASSETS) -> None:
    """Rewrite `folder` and print where it is."""
    files = build()
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    print(f"{len(files)} files, {sum(map(len, files.values())) / 1e3:.0f} kB: {folder}")


# -- blocks and floor


def _block(block: str) -> str:
    colour, size = block.split("_")
    half = BLOCK_LENGTHS_M[size] / 2
    low, high = (-half, -0.025, -0.025), (half, 0.025, 0.025)
    contact = '<contact><lateral_friction value="0.7"/><spinning_friction value="0.001"/></contact>'
    body = inertial(1, (0, 0, 0), (1, 0, 0, 1, 0, 1))
    shapes = box_shape("visual", low, high, BLOCK_RGBA[colour]), box_shape("collision", low, high)
    return robot(f"block_{colour}", link("base_link", contact, body, *shapes))


def _plane() -> str:
    """A floor to touch, not to see: covering most of an image, it would be the dearest thing to draw."""
    contact = '<contact><lateral_friction value="1"/></contact>'
    body = inertial(0, (0, 0, 0), (0, 0, 0, 0, 0, 0))
    low, high = (-100, -100, -10), (100, 100, 0)
    return robot(
        "plane",
        link("planeLink", contact, body, box_shape("visual", low, high, UNSEEN), box_shape("collision", low, high)),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OWN_ASSETS)
